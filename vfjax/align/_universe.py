"""Cycle-consistent matching: permutations of K models to one universe, whatever their order.

Aligning all models to one of them makes that one special, and matching them pair by pair need not
be consistent: from a to b to c and back to a, units may end up elsewhere. Here each model has
permutations to a shared universe, from which the pairwise ones follow, so that every cycle closes
("C2M3: Cycle-Consistent Multi-Model Merging", Crisostomi et al., 2024). The objective sums what all
pairs i < j have in common: correlations of activations, or inner products of weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vfjax._trees import check_alike
from vfjax._types import Array, PyTree
from vfjax.align import _cycles
from vfjax.align._ascent import counted_axes, generator_of, on_host
from vfjax.align._assignment import assign_in_place, assign_pairs
from vfjax.align._taps import (
    correlation_between,
    in_place,
    joint_gains,
    matched_sites,
    models_at_taps,
    moments_at_taps,
    network_of,
)
from vfjax.align._weights import best_match
from vfjax.network._arguments import Models, networks
from vfjax.network._network import Network
from vfjax.stats._moments import Moments
from vfjax.symmetry._group_maps import compose, invert

# How often the weights of two models with heads are also matched from random permutations: a search
# from the identity often ends with the wrong heads, and heads are not relaxed.
_RESTARTS = 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Universe:
    """Permutations of K models to a shared universe.

    `universe.apply(net, trees)` aligns them all; `vfjax.merge.partial` takes
    `Maps.of_permutations(universe.permutations)`.

    Attributes:
        permutations: Per model and group, int32 `[n]`: the axis in the universe's order is
            `take(old, permutation)`. For a group within another of h entries, int32 `[h, n]`.
        objective: The maximised quantity after each step of the ascent; never decreasing.
        converged: Whether the search ended because no model could be improved, rather than at the
            limit on steps.
        within: `PermutationSpec.within` of the network.
    """

    permutations: tuple[Mapping[str, np.ndarray], ...]
    objective: tuple[float, ...]
    converged: bool
    within: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def pairwise(self, *, to: int = 0, model: int = 1) -> dict[str, np.ndarray]:
        """Permutations that align one model to another, by way of the universe.

        The permutations from a to b and from b to c compose to those from a to c.

        Args:
            to: Index of the model to align to.
            model: Index of the model to permute.

        Returns:
            int32 `[n]` or `[h, n]` by group; `net.spec.permute(trees[model], permutations)` is in
            the order of `trees[to]`.

        Raises:
            ValueError: If an index is out of range.

        Example:
            >>> p = [{"h": np.array([2, 0, 1])}, {"h": np.array([1, 0, 2])}]
            >>> universe = Universe(tuple(p), (1.0,), True)
            >>> universe.pairwise(to=0, model=1)["h"].tolist()
            [0, 2, 1]
        """
        for name, index in (("to", to), ("model", model)):
            if not 0 <= index < len(self.permutations):
                raise ValueError(
                    f"`{name}` must be in 0..{len(self.permutations) - 1}, got {index}"
                )
        back = invert(self.permutations[to], within=self.within)
        return compose(self.permutations[model], back, within=self.within)

    def apply(self, net: Network | Sequence[Network], trees: Sequence[PyTree]) -> list[PyTree]:
        """The models in the universe's order; their mean is the merge.

        Args:
            net: The traced network, or one per model.
            trees: The K models, in the order in which they were matched.

        Returns:
            K trees.

        Raises:
            ValueError: If there are not K trees, or they do not fit the network.

        Example:
            >>> import jax, vfjax
            >>> tree = {"w": np.float32([[1, 2]]), "v": np.ones((2, 1), np.float32)}
            >>> x = np.ones((1, 1), np.float32)
            >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], tree, x)
            >>> order, swapped = {"w": np.array([0, 1])}, {"w": np.array([1, 0])}
            >>> universe = Universe((order, swapped), (0.0,), True)
            >>> [moved["w"].tolist() for moved in universe.apply(net, [tree, tree])]
            [[[1.0, 2.0]], [[2.0, 1.0]]]
        """
        if len(trees) != len(self.permutations):
            raise ValueError(
                f"trees must be the {len(self.permutations)} models matched, got {len(trees)}"
            )
        models = zip(networks(net, len(trees)), trees, self.permutations, strict=True)
        return [own.spec.permute(tree, p) for own, tree, p in models]

    def __repr__(self) -> str:
        """Its numbers of models and groups, and how the search ended, in one line."""
        models, groups = len(self.permutations), len(self.permutations[0])
        steps = len(self.objective) - 1
        return (
            f"Universe({models} models, {groups} group{'' if groups == 1 else 's'}, objective "
            f"{self.objective[-1]:.6g} after {steps} step{'' if steps == 1 else 's'}, "
            f"{'converged' if self.converged else 'not converged'})"
        )


def match_universe(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    data: Iterable[Any] | None = None,
    *,
    key: Array | None = None,
    max_steps: int = 100,
) -> Universe:
    """Matches K models at once, so that their order does not matter.

    The search starts from the best of several candidates: the models as they are, all of them
    aligned to any one, and spectral synchronisation of all pairs. From there all permutations
    ascend together, by Frank-Wolfe over doubly stochastic matrices, rounded, and then one model at
    a time, always the one that raises the objective most. The same ascent without Frank-Wolfe is
    tried as well, and the better result is returned. The objective is therefore at least that of
    aligning all models to any one of them. Heads of attention and the dims inside each form one
    step of the ascent, and are not relaxed.

    Args:
        net: The traced network, or one per tree: networks of one architecture may differ behind
            the taps, as in their numbers of classes.
        trees: Two or more parameter trees. With data, leaves that no tap depends on, such as those
            of heads with different classes, may differ in shape.
        data: Re-iterable of `x` or `(x, label)`, to match activations by correlation as
            `match_activations` does; None to match weights as `match_weights` does.
        key: Random key for matching weights, as in `match_weights`; not used with data.
        max_steps: The largest number of steps of Frank-Wolfe, and of the ascent. At 0 the best
            start is returned.

    Returns:
        The permutations. Reordering the trees reorders them and changes nothing else, not even by
        rounding: sums over models are taken in an order that the models' values determine.

    Raises:
        TypeError: If `net` is not a traced network, a tree holds a leaf that is not an array, `key`
            is not a random key, or data has another dtype.
        ValueError: If there are fewer than two trees, they differ (with data, before a
            tap) or hold NaN or infinity, data is empty or exhausted, `max_steps` is negative, or
            neither data nor a key is given.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> a = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(3, 2))}
        >>> a = jax.tree.map(jnp.float32, a)
        >>> x = jnp.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], a, x)
        >>> trees = [a, *(net.spec.permute(a, {"w": np.array(p)}) for p in ([2, 0, 1], [1, 0, 2]))]
        >>> universe = match_universe(net, trees, [x])
        >>> [universe.pairwise(to=0, model=k)["w"].tolist() for k in (1, 2)]
        [[1, 2, 0], [1, 0, 2]]

        Or from moments; here the models are equal, and match where they are:

        >>> moments = vfjax.stats.moments(net, [a] * 3, [x], sites="taps", covariance="cross")
        >>> match_universe_moments(net, moments)
        Universe(3 models, 1 group, objective 9 after 0 steps, converged)

    Source: "C2M3: Cycle-Consistent Multi-Model Merging" (Crisostomi et al., 2024), section 3, which
    starts Frank-Wolfe at the identity and matches weights.
    """
    models = models_at_taps(net, trees)
    _check_steps(max_steps)
    if data is None and key is None:
        raise ValueError(
            "`data` is None, so weights are matched, which needs a random `key`, such as "
            "jax.random.key(0); or give batches to match activations on"
        )
    order = _canonical([leaves.values() for leaves in models.leaves])
    chosen = models.pick(order)
    if data is None:
        assert key is not None
        check_alike(models.leaves, finite=False)
        universe = _of_weights(chosen, key, max_steps)
    elif not chosen.net.taps:
        universe = _in_place(chosen.net, len(chosen))
    else:
        moments = moments_at_taps(chosen, data, "cross")
        universe = match_universe_moments(chosen.net, moments, max_steps=max_steps)
    return _reordered(universe, order)


def match_universe_moments(
    net: Network | Sequence[Network], moments: Moments, *, max_steps: int = 100
) -> Universe:
    """As `match_universe` by activations, from moments alone.

    Args:
        net: The traced network, or one per model.
        moments: `stats.moments(net, trees, data, sites="taps", covariance="cross")`.
        max_steps: As in `match_universe`.

    Returns:
        As `match_universe`. Groups without a tap keep their order in all models. If moments are
        measured with the models in another order, the result may differ, but only by rounding.

    Raises:
        TypeError: If `net` is not a traced network.
        ValueError: If `moments` lacks covariances at a tap or is of one model, or `max_steps` is
            negative.

    Example: see `match_universe`.

    Source: as `match_universe`, with correlations in place of weights.
    """
    net = network_of(net, moments)
    _check_steps(max_steps)
    models = moments.models
    if models < 2:
        raise ValueError(f"moments must be of two models or more, got {models}")
    parts = [*moments.mean.values(), *moments.var.values()]
    order = _canonical([[part[k] for part in parts] for k in range(models)])
    by_model = [dict(p) for p in _in_place(net, models).permutations]
    ends = [
        _of_correlations(group, blocks[np.ix_(order, order)], max_steps)
        for group, blocks in _correlations(net, moments).items()
    ]
    for owner, inner in _inside(net, moments).items():
        ordered = {group: blocks[np.ix_(order, order)] for group, blocks in inner.items()}
        ends.append(_of_nested(owner, ordered, max_steps))
    for end in ends:
        for group, permutations in end.permutations.items():
            for model, permutation in zip(order, permutations, strict=True):
                by_model[model][group] = permutation
    if not ends:  # no group shows at a tap
        return _in_place(net, models)
    # Groups are separate problems: the objective of one that has ended stays while others go on.
    steps = max(len(end.history) for end in ends)
    history = sum(np.pad(e.history, (0, steps - len(e.history)), mode="edge") for e in ends)
    converged = all(end.converged for end in ends)
    history = tuple(np.asarray(history).tolist())
    return Universe(tuple(by_model), history, converged, net.spec.within)


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


def _of_nested(owner: str, inner: Mapping[str, np.ndarray], max_steps: int) -> _cycles.Found:
    """The permutations of an owner and of the groups inside, from `[K, K, h, h, n, n]` by group.

    One start is a universe of the owners, matched by the value of the best assignments inside, and
    then a universe of the units inside each of its entries.
    """
    models, _, h = next(iter(inner.values())).shape[:3]
    value, stars = np.zeros((models, models, h, h)), []
    for to in range(models):
        row = []
        for k in range(models):
            gains = {group: blocks[to, k] for group, blocks in inner.items()}
            value[to, k] = sum(assign_pairs(gain)[1] for gain in gains.values())
            # The blocks of a model with itself are zero, and ties stay in place.
            outer, inside = assign_in_place(np.zeros((h, h)), gains)
            row.append({owner: outer, **inside})
        stars.append({name: np.stack([of[name] for of in row]) for name in row[0]})
    still = {name: np.broadcast_to(np.arange(p.shape[-1]), p.shape) for name, p in stars[0].items()}
    outer = _of_correlations(owner, value, max_steps).permutations[owner]
    rows, columns = np.arange(models)[:, None], np.arange(models)[None, :]
    agreed = {owner: outer}
    for group, blocks in inner.items():
        entries = [
            _of_correlations(group, blocks[rows, columns, at[:, None], at[None, :]], max_steps)
            for at in outer.T
        ]
        agreed[group] = np.stack([end.permutations[group] for end in entries], axis=1)
    objective = _cycles.Nested(owner, inner)
    start = _cycles.best_of(objective, [still, *stars, agreed])
    return _cycles.ascend(objective, start, max_steps=max_steps)


def _of_weights(given: Models, key: Array, max_steps: int) -> Universe:
    """The permutations of all groups, from the weights of models in canonical order."""
    net = given.net
    counted = counted_axes(net.spec, given.leaves[0], net.statistics)
    leaves = [{path: on_host(held[path]) for path in counted} for held in given.leaves]
    seed = int(generator_of(key).integers(2**63))
    objective = _cycles.Weights(net.spec, leaves, counted, seed)
    models, spec, still = len(given), net.spec, in_place(net)
    sizes, restarts = spec.check_leaves(given.leaves[0], ()), _RESTARTS if spec.within else 0

    def match(a: Any, b: Any) -> Mapping[str, np.ndarray]:
        # A generator per pair, so that each draws what `match_weights` would draw from the key.
        random = generator_of(key)
        return best_match(spec, sizes, a, b, counted, random, restarts).permutations

    pairs = [
        [still if i == j else match(a, b) for j, b in enumerate(leaves)]
        for i, a in enumerate(leaves)
    ]
    stars = [{g: np.stack([p[g] for p in row]) for g in still} for row in pairs]
    nested, agreed = {*spec.within, *spec.within.values()}, {}
    for group in (group for group in still if group not in nested):
        # Entry [a, b] takes units of b to places of a.
        relative = np.stack([[np.eye(len(p[group]))[p[group]] for p in row] for row in pairs])
        agreed[group] = _cycles.synchronised((relative + relative.transpose(1, 0, 3, 2)) / 2)
    # Eigenvectors cannot be rounded to heads and their dims together; those come from a star.
    spectral = [
        {g: agreed[g][k] if g in agreed else stars[k][g] for g in still} for k in range(models)
    ]
    as_they_are = {group: np.stack([p] * models) for group, p in still.items()}
    end = _cycles.solve(objective, [as_they_are, *stars, *spectral], max_steps=max_steps)
    permutations = tuple({g: p[k] for g, p in end.permutations.items()} for k in range(models))
    return Universe(permutations, tuple(end.history), end.converged, spec.within)


def _correlations(net: Network, moments: Moments) -> dict[str, np.ndarray]:
    """By group, correlations `[K, K, n, n]` between different models, the sum over its taps."""
    sites, total = matched_sites(net)[0], {}
    for i, j in itertools.combinations(range(moments.models), 2):
        for site, tap in sites.items():
            block = correlation_between(moments, site, i, j)
            shape = moments.models, moments.models, *block.shape
            whole = total.setdefault(tap.group, np.zeros(shape))
            whole[i, j] += block
            whole[j, i] += block.T
    return total


def _inside(net: Network, moments: Moments) -> dict[str, dict[str, np.ndarray]]:
    """By owner and group inside its h entries, correlations `[K, K, h, h, n, n]`."""
    total: dict[str, dict[str, np.ndarray]] = {}
    for i, j in itertools.combinations(range(moments.models), 2):
        for owner, inner in joint_gains(net, moments, i, j).items():
            for group, block in inner.items():
                shape = moments.models, moments.models, *block.shape
                whole = total.setdefault(owner, {}).setdefault(group, np.zeros(shape))
                whole[i, j] = block
                whole[j, i] = block.transpose(1, 0, 3, 2)
    return total


def _canonical(parts: Sequence[Iterable[Any]]) -> list[int]:
    """Indices of models in an order that depends on their values alone, by a hash of them.

    The search treats all models in the same way, but sums of floats depend on the order of terms.
    """
    digests = []
    for model in parts:
        digest = hashlib.sha256()
        for array in model:
            digest.update(np.ascontiguousarray(array).tobytes())
        digests.append(digest.digest())
    return sorted(range(len(digests)), key=digests.__getitem__)


def _reordered(universe: Universe, order: Sequence[int]) -> Universe:
    """Puts permutations of models that were matched in another order back into their own order."""
    permutations = [universe.permutations[index] for index in np.argsort(order)]
    return dataclasses.replace(universe, permutations=tuple(permutations))


def _in_place(net: Network, models: int) -> Universe:
    """The permutations that move nothing."""
    return Universe((in_place(net),) * models, (0.0,), True, net.spec.within)


def _check_steps(max_steps: Any) -> None:
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"`max_steps` must be a whole number >= 0, got {max_steps!r}")
