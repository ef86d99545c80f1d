"""Activation matching: pairing units that respond in the same way to the same data.

Units are compared by the Pearson correlation of their activations ("Git Re-Basin: Merging Models
modulo Permutation Symmetries", Ainsworth, Hayase & Srinivasa, 2023, section 3.1, with correlation
in place of the inner product, as in "REPAIR", Jordan et al., 2023). Moments are pooled exactly over
all samples, in one pass. A group that a residual stream carries is visible at several taps; its
correlations are summed over them, and one linear assignment per group gives the optimum.

Heads of attention and the dims inside each are matched together, by the correlations of the dims of
every head with those of every other. The best assignment of dims gives the value of each pair of
heads, and an assignment of heads over these values gives the optimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vfjax._passes import Mask
from vfjax._types import PyTree
from vfjax.align._assignment import Alignment, assign_in_place
from vfjax.align._crossed import match_crossed
from vfjax.align._taps import (
    correlation_between,
    in_place,
    joint_gains,
    matched_sites,
    models_at_taps,
    moments_at_taps,
    network_of,
)
from vfjax.align._untapped import Untapped, check_untapped, match_untapped, untapped_groups
from vfjax.network._arguments import Models
from vfjax.network._network import Network
from vfjax.network._sites import sampled_groups
from vfjax.stats._moments import Moments
from vfjax.symmetry._group_maps import compose

# A rise of the correlations below this is rounding.
_RISE = 1e-6


def match_activations(
    net: Network | Sequence[Network],
    a: PyTree,
    b: PyTree,
    data: Iterable[Any] | None,
    *,
    moments: Moments | None = None,
    untapped: Untapped = "weights",
    mask: Mask | None = None,
) -> Alignment:
    """Finds permutations of `b` whose units correlate best with those of `a`.

    Args:
        net: The traced network, or those of `a` and of `b`: networks of one architecture may differ
            behind the taps, as in their numbers of classes.
        a: Parameter tree to align to.
        b: Parameter tree to permute. Leaves that no tap depends on, such as those of heads with
            different classes, may differ in shape.
        data: Re-iterable of `x` or `(x, label)`; None if `moments` are given.
        moments: Moments of `[a, b]` in this order, if they have already been measured:
            `stats.moments(net, [a, b], data, sites="taps", covariance="cross")`.
        untapped: Groups that show at no tap, such as those inside a loop, are matched by
            `"weights"` with all others held fixed, or `"keep"` their order.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`.

    Returns:
        The alignment; its objective is the sum of the correlations of all pairs at all taps. Its
        `by_weights` or `unmatched` names the groups without a tap; if no group has a tap, no data
        is read. A unit that does not vary on the data has correlation 0.

    Raises:
        TypeError: If `net` is not a traced network, a tree holds a leaf that is not an array, or
            data has another dtype.
        ValueError: If the trees differ before a tap or hold NaN or infinity, data is empty
            or exhausted, or `moments` lack the covariances at a tap.

    Example: see `help(vfjax.align)`, which matches a network with a permuted copy of itself.
    """
    models = models_at_taps(net, [a, b])
    check_untapped(untapped)
    if moments is None and data is None:
        raise ValueError("`data` is None: give batches to measure on, or `moments`")
    if moments is not None and mask is not None:
        raise ValueError("`mask` is for `data`, and `moments` are given: measure them with it")
    found = _measured(models, data, moments, mask)
    if not found.unmatched or untapped == "keep":
        return found
    moved = models.nets[1].spec.permute(b, found.permutations)
    rest, converged = match_untapped(models.net, a, moved, found.unmatched)
    return Alignment(
        {**found.permutations, **rest}, found.objective, converged, by_weights=found.unmatched
    )


def _measured(
    models: Models, data: Iterable[Any] | None, moments: Moments | None, mask: Mask | None
) -> Alignment:
    """The alignment by data alone."""
    if not models.net.taps:
        return _in_place(models.net)
    if moments is None:
        return _in_rounds(models, data, mask)
    if moments.models != 2:
        raise ValueError(
            f"`moments` must be those of [a, b], but it has {moments.models} models; use "
            "match_moments to choose two of them"
        )
    return match_moments(models.net, moments)


def _in_rounds(models: Models, data: Any, mask: Mask | None) -> Alignment:
    """Matches two models; again with the second permuted, where samples depend on that.

    Where a tap shows one group along its channels and another along its samples, as when tokens are
    mixed for every channel, units are compared sample by sample in whatever order the samples of
    each model have. Once these are matched, the comparison is of like with like.
    """
    net, own = models.nets
    found = match_moments(net, moments_at_taps(models, data, "cross", mask))
    while found.moved and sampled_groups(net):
        order = {g: p for g, p in found.permutations.items() if g in own.spec.groups}
        aligned = models.become([models.trees[0], own.spec.permute(models.trees[1], order)])
        step = match_moments(net, moments_at_taps(aligned, data, "cross", mask))
        if step.objective[-1] <= found.objective[-1] * (1 + _RISE):
            break
        permutations = compose(found.permutations, step.permutations, within=net.spec.within)
        objective = (*found.objective, *step.objective)
        found = dataclasses.replace(found, permutations=permutations, objective=objective)
    return found


def match_moments(
    net: Network | Sequence[Network], moments: Moments, *, to: int = 0, model: int = 1
) -> Alignment:
    """Matches the activations of two out of K models, from moments alone.

    One pass over the data with all models serves every pair.

    Args:
        net: The traced network, or one per model.
        moments: Moments with covariances at the taps (`"cross"` is enough).
        to: Index of the model to align to.
        model: Index of the model to permute.

    Returns:
        The alignment, as `match_activations`; groups without a tap keep their order, and
        `unmatched` names them.

    Raises:
        TypeError: If `net` is not a traced network.
        ValueError: If an index is out of range, or the covariances at a tap are missing.

    Example:
        >>> import jax, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> trees = [{"w": np.float32(rng.normal(size=(4, 3))), "v": np.ones((3, 2), np.float32)}]
        >>> x = np.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], trees[0], x)
        >>> trees += [net.spec.permute(trees[0], {"w": p}) for p in ([2, 0, 1], [1, 0, 2])]
        >>> moments = vfjax.stats.moments(net, trees, [x], sites="taps", covariance="cross")
        >>> [match_moments(net, moments, model=k).permutations["w"].tolist() for k in (1, 2)]
        [[1, 2, 0], [1, 0, 2]]
    """
    net = network_of(net, moments)
    if not net.taps:
        return _in_place(net)
    for name, index in (("to", to), ("model", model)):
        if not 0 <= index < moments.models:
            raise ValueError(f"`{name}` must be in 0..{moments.models - 1}, got {index}")
    spec, inner = net.spec, joint_gains(net, moments, to, model)
    outer: dict[str, np.ndarray] = {}
    for site, tap in matched_sites(net)[0].items():
        gain = correlation_between(moments, site, to, model)
        outer[tap.group] = outer.get(tap.group, 0.0) + gain
    permutations, objective = dict(_in_place(net).permutations), 0.0
    crossed = match_crossed(net, moments, to, model)
    if crossed is not None:
        permutations |= crossed.permutations
        objective += crossed.objective[-1]
    for group in (*outer, *inner):
        if crossed is not None and group in crossed.permutations:
            continue
        n, within = spec.sizes[group], inner.get(group, {})
        gain = outer.get(group, np.zeros((n, n)))
        chosen, inside = assign_in_place(gain, within)
        permutations |= {group: chosen, **inside}
        objective += float(gain[np.arange(n), chosen].sum())
        for name, each in within.items():
            pairs = each[np.arange(n), chosen]
            objective += float(np.take_along_axis(pairs, inside[name][..., None], axis=2).sum())
    return Alignment(permutations, (objective,), True, unmatched=untapped_groups(net))


def _in_place(net: Network) -> Alignment:
    """The alignment that moves nothing."""
    return Alignment(in_place(net), (0.0,), True, unmatched=untapped_groups(net))
