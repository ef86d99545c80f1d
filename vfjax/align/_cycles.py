"""Permutations of K models to a shared universe: the objective, its relaxation, and the ascent.

All pairs of models count equally: `F = sum_{i<j} <P_i model_i, P_j model_j>`. Two kinds of
objective share the search: correlations, with one matrix for every pair of models and each group on
its own; and weights, whose leaves couple the groups.

Permutations are int `[K, n]` by group; their relaxations are doubly stochastic, `[K, n, n]`, with a
row for every place in the universe. Those of a group inside each of h entries of another, such as
the dims of heads, are `[K, h, n]`; they are matched together with their owner, and not relaxed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import scipy.linalg

from vfjax.align._ascent import (
    dot,
    permuted,
    products,
    search_blocks,
)
from vfjax.align._assignment import PLACE, assign, assign_within
from vfjax.symmetry._places import Axis, map_axis, permute_axis
from vfjax.symmetry._spec import PermutationSpec

# Rises below this, relative to the objective's scale, are rounding errors.
_RISE = 1e-10
# The relaxation stops when steps become this small: it only serves to find better permutations.
_RELAXED = 1e-6


class Objective(Protocol):
    """What the ascent needs to know about F."""

    models: int
    scale: float

    def value(self, permutations: Mapping[str, np.ndarray]) -> float:
        """F at permutations."""
        ...

    def respond(
        self, model: int, permutations: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """Permutations of one model, `[n]` by group, that match it to the others as they stand."""
        ...


class Relaxed(Objective, Protocol):
    """What the relaxation needs to know about F in addition."""

    def gradient(self, at: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The gradient of the relaxed F."""
        ...

    def along(self, at: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray]) -> np.ndarray:
        """Coefficients of the polynomial `t -> F(at + t (end - at))`, lowest power first.

        The end is a corner of the polytope: permutations, int `[K, n]` by group.
        """
        ...

    def loosened(self, start: Mapping[str, np.ndarray]) -> tuple[Relaxed, frozenset[str]]:
        """F of the groups that can be relaxed, with the others held fixed; and which those are."""
        ...


class Correlations:
    """One group: `F = sum_{i<j} tr(P_i C_ij P_j^T)`.

    Args:
        blocks: `[K, K, n, n]`, where `blocks[j, i]` is the transpose of `blocks[i, j]`; blocks of a
            model with itself do not count.
    """

    def __init__(self, blocks: np.ndarray) -> None:
        self.models = len(blocks)
        self.blocks = np.array(blocks, np.float64)
        self.blocks[np.arange(self.models), np.arange(self.models)] = 0.0
        self.scale = float(np.abs(self.blocks).max(-1, initial=0.0).sum()) / 2

    def value(self, permutations: Mapping[str, np.ndarray]) -> float:
        (p,) = permutations.values()
        pairs = zip(*np.triu_indices(self.models, 1), strict=True)
        return float(sum(self.blocks[i, j][p[i], p[j]].sum() for i, j in pairs))

    def respond(self, model: int, permutations: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ((group, p),) = permutations.items()
        gain = sum(self.blocks[other, model][p[other]] for other in range(self.models))
        return {group: nearby(np.asarray(gain), p[model])}

    def gradient(self, at: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ((group, p),) = at.items()
        return {group: np.einsum("iua,ijab->jub", p, self.blocks, optimize=True)}

    def along(self, at: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray]) -> np.ndarray:
        ((group, p),), (q,) = at.items(), end.values()
        step = np.eye(p.shape[1])[q] - p
        slope, bend = self.gradient(at)[group], self.gradient({group: step})[group]
        return np.array([np.vdot(slope, p) / 2, np.vdot(slope, step), np.vdot(bend, step) / 2])

    def loosened(self, start: Mapping[str, np.ndarray]) -> tuple[Relaxed, frozenset[str]]:
        return self, frozenset(start)


class Nested:
    """A group and those inside each of its entries: `F = sum_{i<j} sum over these of C_ij`.

    Args:
        owner: The group, of h entries.
        blocks: By group inside, `[K, K, h, h, n, n]`: entry `[i, j, s, t]` holds the correlations
            of the units in entry s of model i with those in entry t of model j.
    """

    def __init__(self, owner: str, blocks: Mapping[str, np.ndarray]) -> None:
        self.owner, self.blocks = owner, blocks
        self.models = len(next(iter(blocks.values())))
        self.scale = sum(float(np.abs(block).max((3, 5)).sum()) / 2 for block in blocks.values())

    def value(self, permutations: Mapping[str, np.ndarray]) -> float:
        total, outer = 0.0, permutations[self.owner]
        entries = np.arange(outer.shape[1])
        for name, block in self.blocks.items():
            p = permutations[name]
            for i, j in zip(*np.triu_indices(self.models, 1), strict=True):
                pairs = block[i, j, outer[i], outer[j]]
                total += float(pairs[entries[:, None], p[i], p[j]].sum())
        return total

    def respond(self, model: int, permutations: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outer, inner, most = permutations[self.owner], {}, 0.0
        for name, block in self.blocks.items():
            p, gain = permutations[name], np.zeros(block.shape[2:])
            for other in range(self.models):
                if other != model:
                    rows = block[other, model, outer[other]]
                    gain += np.take_along_axis(rows, p[other][:, None, :, None], axis=2)
            most += np.abs(gain).max(initial=0.0)
            # Ties go to units that stay in place, both inside every entry and among the entries.
            place = p[model][outer[model].argsort()]
            inner[name] = gain + (PLACE * most + 1e-300) * np.eye(block.shape[-1])[place]
        h = outer.shape[1]
        chosen, inside = assign_within((PLACE * most + 1e-300) * np.eye(h)[outer[model]], inner)
        return {self.owner: chosen, **inside}


class Weights:
    """All groups at once: `F = sum_{i<j} sum over leaves <P_i leaf_i, P_j leaf_j>`.

    Args:
        spec: Which axes carry which group.
        leaves: The leaves that count by path, on the host, one mapping per model.
        counted: Their axes, by path and group.
        seed: Decides the order of the groups in the sweeps of `respond`; the same for all models.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        leaves: Sequence[Mapping[str, np.ndarray]],
        counted: Mapping[str, Mapping[str, tuple[Axis, ...]]],
        seed: int,
    ) -> None:
        self.spec, self.leaves, self.seed = spec, leaves, seed
        self.models = len(leaves)
        self.counted = counted
        # Groups inside the entries of another are permuted after it.
        self.order = tuple(sorted(spec.groups, key=spec.within.__contains__))
        self.places = {
            path: [(group, axis) for group, axes in held.items() for axis in axes]
            for path, held in counted.items()
        }
        norms = np.sqrt([[dot(leaf, leaf) for leaf in held.values()] for held in leaves])
        self.scale = float((norms.sum(0) ** 2 - (norms**2).sum(0)).sum()) / 2

    def value(self, permutations: Mapping[str, np.ndarray]) -> float:
        total = 0.0
        for path in self.counted:
            moved = [self._moved(path, k, permutations) for k in range(self.models)]
            for k in range(1, self.models):
                total += dot(moved[k], np.asarray(np.sum(moved[:k], 0, np.float64)))
        return total

    def respond(
        self, model: int, permutations: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        others = [k for k in range(self.models) if k != model]
        rest = {
            p: np.sum([self._moved(p, k, permutations) for k in others], 0) for p in self.counted
        }
        start = {group: p[model] for group, p in permutations.items()}
        random = np.random.default_rng(self.seed)
        return search_blocks(
            self.spec, rest, self.leaves[model], self.counted, start, random, 100, 1e-12
        ).permutations

    def gradient(self, at: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        slopes = {group: np.zeros(p.shape) for group, p in at.items()}
        for path, places in self.places.items():
            # By model and place, the leaf with all other places mapped; `mapped` has all of them.
            but = []
            for k in range(self.models):
                leaf = self.leaves[k][path]
                but.append([self._mapped(leaf, k, at, _without(places, p)) for p in places])
            mapped = [self._mapped(own[0], k, at, places[:1]) for k, own in enumerate(but)]
            total = np.sum(mapped, 0)
            for k in range(self.models):
                for (group, axis), leaf in zip(places, but[k], strict=True):
                    slopes[group][k] += products(total - mapped[k], leaf, axis)
        return slopes

    def along(self, at: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray]) -> np.ndarray:
        # Each place of a group makes a leaf linear in t, and a product of two leaves has twice the
        # degree of one.
        coefficients = np.zeros(1 + 2 * max(map(len, self.places.values()), default=0))
        for path, places in self.places.items():
            before: list[np.ndarray] = []
            for k in range(self.models):
                powers = [self.leaves[k][path]]
                for group, axis in places:
                    still = [_contract(at[group][k], leaf, axis) for leaf in powers]
                    moved = [permute_axis(leaf, axis, end[group][k]) for leaf in powers]
                    steps = [a - b for a, b in zip(moved, still, strict=True)]
                    both = [a + b for a, b in zip(still[1:], steps[:-1], strict=True)]
                    powers = [still[0], *both, steps[-1]]
                for i, a in enumerate(before):
                    for j, b in enumerate(powers):
                        coefficients[i + j] += dot(a, b)
                before = [a + b for a, b in zip(before, powers, strict=True)] if before else powers
        return coefficients

    def _moved(self, path: str, model: int, permutations: Mapping[str, np.ndarray]) -> np.ndarray:
        """A leaf of a model, permuted."""
        own = {group: p[model] for group, p in permutations.items()}
        order = tuple(group for group in self.order if group in own)
        return permuted(self.spec, self.leaves[model][path], self.counted[path], order, own)

    def loosened(self, start: Mapping[str, np.ndarray]) -> tuple[Relaxed, frozenset[str]]:
        nested = {*self.spec.within, *self.spec.within.values()}
        free = frozenset(start.keys() - nested)
        if free == start.keys():
            return self, free
        held = {group: start[group] for group in nested}
        counted = {}
        for path, of in self.counted.items():
            left = {group: axes for group, axes in of.items() if group in free}
            if left:  # else the leaf adds a constant
                counted[path] = left
        leaves = [{p: self._moved(p, k, held) for p in counted} for k in range(self.models)]
        return Weights(self.spec, leaves, counted, self.seed), free

    def _mapped(
        self,
        leaf: np.ndarray,
        model: int,
        at: Mapping[str, np.ndarray],
        places: Sequence[tuple[str, Axis]],
    ) -> np.ndarray:
        """A leaf of a model with some of its places mapped."""
        for group, axis in places:
            leaf = _contract(at[group][model], leaf, axis)
        return leaf


def _without(places: Sequence[tuple[str, Axis]], one: tuple[str, Axis]) -> list[tuple[str, Axis]]:
    return [place for place in places if place != one]


def _contract(matrix: np.ndarray, leaf: np.ndarray, axis: Axis) -> np.ndarray:
    """Maps a place of a group by a square matrix, on the host, without transposing the leaf."""
    matrix = matrix.astype(leaf.dtype)

    def product(view: np.ndarray, k: int) -> np.ndarray:
        flat = view.reshape(math.prod(view.shape[:k]), view.shape[k], -1)
        last = flat.shape[2] == 1
        mapped = flat[..., 0] @ matrix.T if last else np.matmul(matrix, flat)
        return mapped.reshape(view.shape)

    return map_axis(leaf, axis, product)


def nearby(gain: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The permutation of largest gain; among equals, the one closest to `place`."""
    gain = np.array(gain, np.float64)
    gain[np.arange(len(place)), place] += PLACE * np.abs(gain).max(initial=0.0) + 1e-300
    return assign(gain)


class Found(NamedTuple):
    """The result of a search.

    Attributes:
        permutations: int32 `[K, n]` by group.
        history: F after every step of the ascent.
        converged: Whether it ended because no model can be improved, not at the limit on steps.
    """

    permutations: dict[str, np.ndarray]
    history: list[float]
    converged: bool


def solve(
    objective: Relaxed, starts: Sequence[Mapping[str, np.ndarray]], *, max_steps: int
) -> Found:
    """Ascends from the best start, and from its relaxation; the result is no worse than any start.

    Args:
        objective: F.
        starts: Permutations, int `[K, n]` by group; the first wins ties.
        max_steps: The most steps of the relaxation, and of the ascent.
    """
    start = best_of(objective, starts)
    direct = ascend(objective, start, max_steps=max_steps)
    loose, groups = objective.loosened(start)
    free = {group: p for group, p in start.items() if group in groups}
    start = {**start, **relax(loose, free, max_steps=max_steps)}
    relaxed = ascend(objective, start, max_steps=max_steps)
    better = relaxed.history[-1] - direct.history[-1] > _RISE * objective.scale
    return relaxed if better else direct


def best_of(
    objective: Objective, starts: Sequence[Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """The start of largest F; the first, among those that differ only by rounding."""
    values = [objective.value(start) for start in starts]
    near = max(values) - _RISE * objective.scale
    return next(s for s, value in zip(starts, values, strict=True) if value >= near)


def relax(
    objective: Relaxed, start: Mapping[str, np.ndarray], *, max_steps: int
) -> dict[str, np.ndarray]:
    """Frank-Wolfe over the doubly stochastic matrices of all models and groups at once.

    Every step moves towards the permutations that are best by the gradient, all of them at once,
    and stops where F is largest on that line, along which F is a polynomial.

    Returns:
        The permutations nearest to where it ends.

    Source: "C2M3: Cycle-Consistent Multi-Model Merging" (Crisostomi et al., 2024), algorithm 1.
    """
    at = {group: np.eye(p.shape[1])[p] for group, p in start.items()}
    for _ in range(max_steps):
        slope = objective.gradient(at)
        end = {
            group: np.stack([nearby(*pair) for pair in zip(slope[group], _nearest(p), strict=True)])
            for group, p in at.items()
        }
        curve = np.polynomial.Polynomial(objective.along(at, end))
        turns = curve.deriv().roots()
        inside = turns.real[(np.abs(turns.imag) < 1e-9) & (turns.real > 0) & (turns.real < 1)]
        lengths = np.array([1.0, *inside])
        length = lengths[curve(lengths).argmax()]
        if curve(length) - curve(0.0) <= _RELAXED * objective.scale:
            break
        at = {
            group: (1 - length) * p + length * np.eye(p.shape[1])[end[group]]
            for group, p in at.items()
        }
    return {group: _nearest(p) for group, p in at.items()}


def _nearest(stochastic: np.ndarray) -> np.ndarray:
    """The permutations nearest to doubly stochastic matrices `[K, n, n]`."""
    return np.stack([assign(matrix) for matrix in stochastic])


def ascend(objective: Objective, start: Mapping[str, np.ndarray], *, max_steps: int) -> Found:
    """Steepest ascent: moves the model that raises F most, until no move raises it."""
    current = {group: np.array(p, np.int32) for group, p in start.items()}
    history, converged = [objective.value(current)], False
    while not converged and len(history) <= max_steps:
        tried = []
        for model in range(objective.models):
            new = {group: p.copy() for group, p in current.items()}
            for group, p in objective.respond(model, current).items():
                new[group][model] = p
            tried.append((objective.value(new), new))
        best, new = max(tried, key=lambda pair: pair[0])
        converged = best - history[-1] <= _RISE * objective.scale
        if not converged:
            current = new
            history.append(best)
    return Found(current, history, converged)


def synchronised(blocks: np.ndarray) -> list[np.ndarray]:
    """Spectral synchronisation: permutations that agree best with all blocks in the mean square.

    If all blocks agreed exactly, the leading n eigenvectors of the whole matrix would span the
    permutations of all models ("Solving the multi-way matching problem by permutation
    synchronization", Pachauri, Kondor & Singh, 2013). They are rounded in the basis of each model
    in turn, which gives K candidates.

    Args:
        blocks: `[K, K, n, n]`, symmetric as a whole.

    Returns:
        K arrays, int32 `[K, n]`.
    """
    models, _, n, _ = blocks.shape
    whole = blocks.transpose(0, 2, 1, 3).reshape(models * n, models * n)
    span = (models * n - n, models * n - 1)
    factors = scipy.linalg.eigh(whole, subset_by_index=span)[1].reshape(models, n, n)
    return [np.stack([assign(to @ factor.T) for factor in factors]) for to in factors]
