"""Cycle-consistent matching: permutations of K models to one universe, whatever their order.

Aligning all models to one of them makes that one special, and matching them pair by pair need not
close: from a to b to c and back to a, units end in other places. Here each model has permutations
to a shared universe, and the pairwise ones follow from these, so that every cycle closes ("C2M3:
Cycle-Consistent Multi-Model Merging", Crisostomi et al., 2024). Maximised is what all pairs have in
common, the sum over i < j of the correlation of activations or of the inner product of weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vfjax import stats
from vfjax._tree import check_trees, flatten_named
from vfjax.align import _cycles
from vfjax.align.activations import _in_place, correlation
from vfjax.align.weights import _counted, _generator, _host, match_weights
from vfjax.network import Network, check_net
from vfjax.symmetry import compose, invert

__all__ = ["Universe", "match_universe", "match_universe_moments"]

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Universe:
    """Permutations of K models to a shared universe.

    `found.apply(net, trees)` aligns them all; `Maps.of_permutations(found.permutations)` is what
    `vfjax.merge.partial` takes.

    Attributes:
        permutations: Per model and group, int32 `[n]`: the axis in the universe's order is
            `take(old, permutation)`.
        objective: What was maximised, after each step of the ascent; never decreasing.
        converged: Whether at the end no model could be improved, rather than the limit on steps
            ending the search.
    """

    permutations: tuple[Mapping[str, np.ndarray], ...]
    objective: tuple[float, ...]
    converged: bool

    def pairwise(self, *, to: int = 0, model: int = 1) -> dict[str, np.ndarray]:
        """Permutations that align one model to another, by way of the universe.

        Those from a to b and from b to c, composed, are those from a to c.

        Args:
            to: Index of the model to align to.
            model: Index of the model to permute.

        Returns:
            int32 `[n]` by group; `net.spec.permute(trees[model], these)` is in the order of
            `trees[to]`.

        Raises:
            ValueError: If an index is out of range.

        Example:
            >>> p = [{"h": np.array([2, 0, 1])}, {"h": np.array([1, 0, 2])}]
            >>> found = Universe(tuple(p), (1.0,), True)
            >>> found.pairwise(to=0, model=1)["h"].tolist()
            [0, 2, 1]
        """
        for name, index in (("to", to), ("model", model)):
            if not 0 <= index < len(self.permutations):
                raise ValueError(
                    f"`{name}` must be in 0..{len(self.permutations) - 1}, got {index}"
                )
        return compose(self.permutations[model], invert(self.permutations[to]))

    def apply(self, net: Network, trees: Sequence[PyTree]) -> list[PyTree]:
        """The models in the universe's order, of which the merge is the mean.

        Args:
            net: The traced network.
            trees: The K models, in the order in which they were matched.

        Returns:
            K trees.

        Raises:
            ValueError: If there are not K trees, or they do not fit the network.
        """
        if len(trees) != len(self.permutations):
            raise ValueError(
                f"trees must be the {len(self.permutations)} models matched, got {len(trees)}"
            )
        return [net.spec.permute(v, p) for v, p in zip(trees, self.permutations, strict=True)]

    def __repr__(self) -> str:
        """How many models and groups, and how it ended, in one line."""
        models, groups = len(self.permutations), len(self.permutations[0])
        steps = len(self.objective) - 1
        return (
            f"Universe({models} models, {groups} group{'' if groups == 1 else 's'}, objective "
            f"{self.objective[-1]:.6g} after {steps} step{'' if steps == 1 else 's'}, "
            f"{'converged' if self.converged else 'not converged'})"
        )


def match_universe(
    net: Network,
    trees: Sequence[PyTree],
    data: Iterable[Any] | None = None,
    *,
    key: Array | None = None,
    max_steps: int = 100,
) -> Universe:
    """Matches K models at once, so that their order does not matter.

    From the best of several starts (the models as they are, all of them aligned to any one, and
    spectral synchronisation of all pairs), all permutations ascend together: Frank-Wolfe over
    doubly stochastic matrices, rounded, and then model after model, always the one that helps most.
    The same ascent without Frank-Wolfe is tried too; the better one is returned. The objective is
    therefore at least that of aligning all models to any one of them.

    Args:
        net: The traced network.
        trees: Two or more parameter trees.
        data: Re-iterable of `x` or `(x, label)`, to match activations by correlation as
            `match_activations` does; None to match weights as `match_weights` does.
        key: Random key for matching weights, as there; not used with data.
        max_steps: The most steps of Frank-Wolfe, and of the ascent. At 0 the best start is
            returned.

    Returns:
        The permutations. Reordering the trees reorders them and changes nothing else, exactly: sums
        over models are taken in an order that the models' numbers decide.

    Raises:
        TypeError: If `net` is no traced network, a tree holds a leaf that is no array, `key` is no
            random key, or data has another dtype.
        ValueError: If there are fewer than two trees, they differ or hold NaN or infinity, data is
            empty or exhausted, `max_steps` is negative, or neither data nor a key is given.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> a = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(3, 2))}
        >>> a = jax.tree.map(jnp.float32, a)
        >>> x = jnp.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], a, x)
        >>> trees = [a, *(net.spec.permute(a, {"w": np.array(p)}) for p in ([2, 0, 1], [1, 0, 2]))]
        >>> found = match_universe(net, trees, [x])
        >>> [found.pairwise(to=0, model=k)["w"].tolist() for k in (1, 2)]
        [[1, 2, 0], [1, 0, 2]]

    Source: "C2M3: Cycle-Consistent Multi-Model Merging" (Crisostomi et al., 2024), section 3, which
    starts Frank-Wolfe at the identity and matches weights.
    """
    check_net(net)
    check_trees(trees)
    if len(trees) < 2:
        raise ValueError(f"trees must be two or more, got {len(trees)}")
    _check_steps(max_steps)
    if data is None and key is None:
        raise ValueError(
            "`data` is None, so that weights are matched, which needs a random `key`, as "
            "jax.random.key(0); or give batches to match activations on"
        )
    order = _canonical([flatten_named(tree)[0].values() for tree in trees])
    chosen = [trees[k] for k in order]
    if data is None:
        assert key is not None
        found = _of_weights(net, chosen, key, max_steps)
    elif not net.taps:
        found = Universe((_in_place(net).permutations,) * len(trees), (0.0,), converged=True)
    else:
        moments = stats.moments(net, chosen, data, sites="taps", covariance="cross")
        found = match_universe_moments(net, moments, max_steps=max_steps)
    return _reordered(found, order)


def match_universe_moments(
    net: Network, moments: stats.Moments, *, max_steps: int = 100
) -> Universe:
    """The same for activations, from moments alone.

    Args:
        net: The traced network.
        moments: `stats.moments(net, trees, data, sites="taps", covariance="cross")`.
        max_steps: As in `match_universe`.

    Returns:
        As `match_universe`. Groups without a tap keep their order in all models. Moments measured
        with the models in another order may differ by rounding, and only so can what is found.

    Raises:
        TypeError: If `net` is no traced network.
        ValueError: If `moments` lacks covariances at a tap or is of one model, or `max_steps` is
            negative.

    Example:
        >>> import jax, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> tree = {"w": np.float32(rng.normal(size=(4, 3))), "v": np.ones((3, 2), np.float32)}
        >>> x = np.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], tree, x)
        >>> found = vfjax.stats.moments(net, [tree] * 3, [x], sites="taps", covariance="cross")
        >>> match_universe_moments(net, found)
        Universe(3 models, 1 group, objective 9 after 0 steps, converged)
    """
    check_net(net)
    _check_steps(max_steps)
    models = moments.models
    if models < 2:
        raise ValueError(f"moments must be of two models or more, got {models}")
    parts = [*moments.mean.values(), *moments.var.values()]
    order = _canonical([[part[k] for part in parts] for k in range(models)])
    found = [dict(_in_place(net).permutations) for _ in range(models)]
    ends = []
    for group, blocks in _correlations(net, moments).items():
        end = _of_correlations(group, blocks[np.ix_(order, order)], max_steps)
        for model, permutation in zip(order, end.permutations[group], strict=True):
            found[model][group] = permutation
        ends.append(end)
    # Groups are problems of their own: what one has reached stays while others go on.
    steps = max(len(end.history) for end in ends)
    history = sum(np.pad(e.history, (0, steps - len(e.history)), mode="edge") for e in ends)
    converged = all(end.converged for end in ends)
    return Universe(tuple(found), tuple(np.asarray(history).tolist()), converged)


def _of_correlations(group: str, blocks: np.ndarray, max_steps: int) -> _cycles.Found:
    """The permutations of one group, from correlations `[K, K, n, n]`."""
    models, _, n, _ = blocks.shape
    place = np.arange(n)
    stars = [
        np.stack(
            [place if k == to else _cycles.nearby(blocks[to, k], place) for k in range(models)]
        )
        for to in range(models)
    ]
    starts = [np.tile(place, (models, 1)), *stars, *_cycles.synchronised(blocks)]
    objective = _cycles.Correlations(blocks)
    return _cycles.solve(objective, [{group: p} for p in starts], max_steps=max_steps)


def _of_weights(net: Network, trees: Sequence[PyTree], key: Array, max_steps: int) -> Universe:
    """The permutations of all groups, from the weights of models in canonical order."""
    named = [flatten_named(tree)[0] for tree in trees]
    counted = _counted(net.spec, named[0], net.statistics)
    leaves = [{path: _host(held[path]) for path in counted} for held in named]
    seed = int(_generator(key).integers(2**63))
    objective = _cycles.Weights(net.spec, leaves, counted, seed)
    models, sizes = len(trees), net.spec.sizes
    in_place = _in_place(net).permutations
    pairs = [
        [
            in_place if a == b else match_weights(net, trees[a], trees[b], key=key).permutations
            for b in range(models)
        ]
        for a in range(models)
    ]
    stars = [{g: np.stack([p[g] for p in row]) for g in sizes} for row in pairs]
    agreed = {}
    for group, n in sizes.items():
        # Entry [a, b] takes units of b to places of a.
        found = np.stack([[np.eye(n)[p[group]] for p in row] for row in pairs])
        agreed[group] = _cycles.synchronised((found + found.transpose(1, 0, 3, 2)) / 2)
    spectral = [{group: guesses[k] for group, guesses in agreed.items()} for k in range(models)]
    as_they_are = {group: np.tile(p, (models, 1)) for group, p in in_place.items()}
    end = _cycles.solve(objective, [as_they_are, *stars, *spectral], max_steps=max_steps)
    permutations = tuple({g: p[k] for g, p in end.permutations.items()} for k in range(models))
    return Universe(permutations, tuple(end.history), end.converged)


def _correlations(net: Network, moments: stats.Moments) -> dict[str, np.ndarray]:
    """By group, correlations `[K, K, n, n]` between different models, the sum over its taps."""
    std, total, models = moments.std, {}, moments.models
    for site, tap in stats.taps_by_site(net).items():
        block = None if moments.covariance is None else moments.covariance.get(site)
        block = None if block is None else np.asarray(block)
        spread, n = np.asarray(std[site]) if block is not None else None, net.spec.sizes[tap.group]
        whole = total.setdefault(tap.group, np.zeros((models, models, n, n)))
        for i, j in zip(*np.triu_indices(models, 1), strict=True):
            if block is None or spread is None or np.isnan(block[i, j]).any():
                raise ValueError(
                    f'moments has no covariance between models {i} and {j} at the tap "{site}"; '
                    'measure with sites="taps", covariance="cross"'
                )
            found = correlation(block[i, j], spread[i], spread[j])
            whole[i, j] += found
            whole[j, i] += found.T
    return total


def _canonical(parts: Sequence[Iterable[Any]]) -> list[int]:
    """Indices of models in an order that their numbers decide.

    The search treats all models alike, but sums of floats depend on the order of what is summed.
    """
    digests = []
    for model in parts:
        digest = hashlib.sha256()
        for array in model:
            digest.update(np.ascontiguousarray(array).tobytes())
        digests.append(digest.digest())
    return sorted(range(len(digests)), key=digests.__getitem__)


def _reordered(found: Universe, order: Sequence[int]) -> Universe:
    """What was found for models in some order, for them in their own."""
    permutations = [found.permutations[index] for index in np.argsort(order)]
    return dataclasses.replace(found, permutations=tuple(permutations))


def _check_steps(max_steps: Any) -> None:
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"`max_steps` must be a whole number >= 0, got {max_steps!r}")
