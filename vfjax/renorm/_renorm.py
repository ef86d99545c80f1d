"""RESET, REPAIR and RESCALE: giving a merged network the moments that its layers should have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from vfjax._analysis import listed_statistics
from vfjax._maps import Maps
from vfjax._passes import Mask
from vfjax._trees import with_leaves
from vfjax._trees.concrete import check_host
from vfjax._types import PyTree
from vfjax.merge._arguments import merged_of
from vfjax.merge._merged import Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._checks import check_batch
from vfjax.network._network import Network
from vfjax.network._sites import Sites
from vfjax.renorm import _passes
from vfjax.renorm._copies import warn_of_unrecognised, with_copies
from vfjax.renorm._doubt import Given, check_order
from vfjax.renorm._goals import goals_of
from vfjax.renorm._write import fold_all
from vfjax.stats._moments import Moments

_SWEEPS = {"batch": _passes.by_batch, "layer": _passes.by_layer}


def reset(
    net: Network | Sequence[Network],
    merged: PyTree | Merged,
    data: Iterable[Any],
    *,
    sweeps: str = "batch",
    mask: Mask | None = None,
    also: Mapping[str, str] | None = None,
) -> PyTree | Merged:
    """RESET: measures the stored statistics of every norm of trunk and heads again.

    Averaged running statistics describe neither the edge models nor the merged one. As in training
    mode, each norm sees a batch that upstream norms have normalised by its own statistics; means
    and (population) variances are pooled over batches. Scales and shifts of norms do not change.
    Each head has its own statistics.

    Args:
        net: The traced network, or those that `merged` was made with.
        merged: A merged tree, which may lack variances, or a `Merged`.
        data: Re-iterable of `x` or `(x, label)`; for a `Merged` also a list of its crossings.
        sweeps: "batch" for one pass, exact on one batch; "layer" for one pass per norm along the
            deepest path, exact on any data.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`.
        also: Which leaves that the network does not read are copies of statistics, and are renewed
            too, in the proportion that they had to them: `{"hidden": "average"}` says that each
            leaf with the component (or `/`-joined components) `hidden` in its path is a copy of the
            leaf with `average` there. `{}`: none, and without a warning.

    Returns:
        A tree or a `Merged`, as given. Norms inside stems keep their statistics.

    Raises:
        TypeError: If data has another structure or dtype than was traced, `mask` is not a function
            to booleans, or `also` is not such a mapping.
        ValueError: If the network has no norm with stored statistics that is recognised, if data is
            empty or exhausted, if `merged` does not fit the network, or an entry of `also` fits no
            leaf.

    Warns:
        UserWarning: If leaves act as statistics of norms that are not recognised
            (`net.unrecognised`), or a leaf that is not read looks like a copy of a statistic and
            `also` is not given.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     u = x @ v["kernel"]
        ...     return (u - v["mean"]) / jnp.sqrt(v["var"] + 1e-5)
        >>> tree = {"kernel": 3 * jnp.eye(2), "mean": jnp.zeros(2), "var": jnp.ones(2)}
        >>> x = jnp.array([[0.0, 1.0], [2.0, 5.0]])
        >>> net = vfjax.trace(apply_fn, tree, x)
        >>> new = reset(net, tree, [x])
        >>> new["mean"].tolist(), new["var"].tolist()
        ([3.0, 9.0], [9.0, 36.0])

    Source: Jordan et al. (2023), "REPAIR: REnormalizing Permuted Activations for Interpolation
    Repair", section 4; the reference code averages per-batch unbiased variances instead.
    """
    model = merged_of(net, merged)
    listed = listed_statistics(model.net.unrecognised)
    if not model.net.norms and listed:
        raise ValueError(
            "net has no normalisation with stored statistics that is recognised, so there is "
            f"nothing to reset: net.norms is empty, but {listed}. Write the norm as (x - mean) * "
            "rsqrt(var + eps) * scale + bias, with leaves or multiples of leaves as mean and var. "
            "If these are no statistics, use repair or rescale."
        )
    if not model.net.norms:
        raise ValueError(
            "net has no normalisation with stored statistics, so there is nothing to reset; "
            "see net.norms. Networks without BatchNorm need repair or rescale."
        )
    warn_of_unrecognised(model.net, listed)
    new = _renormalised(model, data, {}, sweeps, centre=False, mask=mask)
    return with_copies(model, new, _norms_of(model), also).given_back()


def repair(
    net: Network | Sequence[Network],
    merged: PyTree | Merged,
    data: Iterable[Any],
    *,
    references: Sequence[PyTree] | Moments | Sequence[Moments],
    maps: Maps | None = None,
    weights: Sequence[float] | None = None,
    sites: Sites = "paper",
    sweeps: str = "batch",
    mask: Mask | None = None,
) -> PyTree | Merged:
    """REPAIR: gives pre-activations the averaged mean and standard deviation of the edge models.

    Per channel, over examples and positions,
    `z <- (z - mean[z]) / std[z] * sum_k w_k std_k + sum_k w_k mean_k`, without an epsilon. A
    channel that is constant (variance zero to rounding, or below 1e-12 of the layer's largest)
    keeps its scale and only its mean moves. Norms with stored statistics are reset in the same
    pass.

    Args:
        net: The traced network, or those that `merged` was made with.
        merged: A merged tree, or a `Merged`.
        data: Re-iterable of `x` or `(x, label)`; for a `Merged` also a list of its crossings.
        references: The edge models, aligned, or with `maps` the originals; or their
            `vfjax.stats.moments` at the sites (for models that differ in shape, a sequence of the
            moments of each).
        maps: Maps of the references into the basis of the merge. If they mix features, moments
            given as references need `covariance` at the sites.
        weights: One per reference, summing to one. None for those of `merged`, if that is a
            `Merged` of as many models, else 1/K each.
        sites: Layers to correct: "paper", "all", or their names, as in
            `vfjax.stats.resolve_sites`. In a `Merged` with a cut, only layers of the trunk and the
            averaged layers at the cut are corrected.
        sweeps: "batch" for one pass, in which upstream layers are corrected by the batch's own
            moments: exact on one batch. "layer" for one pass per depth: exact on any data.
        mask: Which positions of a batch count, for the references too: a function of x to booleans,
            as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`.

    Returns:
        For a `Merged`, a `Merged`. For a tree, a tree if every correction folds into kernels and
        biases (or the means of norms that follow directly), else a `Merged` of cut 0 that holds the
        other corrections explicitly.

    Raises:
        TypeError: If data has another structure or dtype than was traced, or `mask` is not a
            function to booleans.
        ValueError: If references, weights or sites do not fit, if data is empty or exhausted, or
            `merged` does not fit the network.

    Warns:
        UserWarning: If the channels of a reference seem to be in another order than those of the
            merged model: over all sites, neither the ranks of their means and standard deviations
            correlate by more than two standard errors, nor these numbers with what the other
            references leave unexplained; and no layer is a weighted sum of the references'. With
            fewer than 4 K^2 channels for K references this is not checked.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     return jnp.maximum(x @ v["w1"] + v["b1"], 0) @ v["w2"]
        >>> a = {"w1": jnp.eye(2), "b1": jnp.ones(2), "w2": jnp.ones((2, 1))}
        >>> merged = a | {"w1": 0.5 * jnp.eye(2), "b1": jnp.zeros(2)}
        >>> x = jnp.array([[0.0, 1.0], [2.0, 5.0]])
        >>> net = vfjax.trace(apply_fn, a, x)
        >>> new = repair(net, merged, [x], references=[a])
        >>> new["w1"].tolist(), new["b1"].tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])

    Source: Jordan et al. (2023), "REPAIR: REnormalizing Permuted Activations for Interpolation
    Repair", eq. 3; "Vanishing Feature", section on normalisation. Their code divides through a
    BatchNorm, with its epsilon.
    """
    model = merged_of(net, merged)
    goals, given = goals_of(model, data, references, maps, weights, sites, mask)
    new = _renormalised(model, data, goals, sweeps, centre=True, mask=mask, references=given)
    return new.given_back()


def rescale(
    net: Network | Sequence[Network],
    merged: PyTree | Merged,
    data: Iterable[Any],
    *,
    references: Sequence[PyTree] | Moments | Sequence[Moments],
    maps: Maps | None = None,
    weights: Sequence[float] | None = None,
    sites: Sites = "paper",
    sweeps: str = "batch",
    mask: Mask | None = None,
) -> PyTree | Merged:
    """RESCALE: gives pre-activations the averaged standard deviation of the edge models.

    Per channel, over examples and positions, `z <- z / std[z] * sum_k w_k std_k`. The value is not
    centred: its mean (and its bias) is scaled too, and nothing is added; the standard deviation is
    taken about the mean. As in `repair`, constant channels keep scale 1, and norms with stored
    statistics are reset in the same pass.

    Args:
        net: The traced network, or those that `merged` was made with.
        merged: A merged tree, or a `Merged`.
        data: Re-iterable of `x` or `(x, label)`; for a `Merged` also a list of its crossings.
        references: The edge models, aligned, or with `maps` the originals; or their
            `vfjax.stats.moments` at the sites (for models that differ in shape, a sequence of the
            moments of each).
        maps: Maps of the references into the basis of the merge. If they mix features, moments
            given as references need `covariance` at the sites.
        weights: As in `repair`.
        sites: As in `repair`.
        sweeps: As in `repair`.
        mask: As in `repair`.

    Returns:
        As `repair`; corrections fold wherever the kernel is a leaf that is used once.

    Raises:
        TypeError: As `repair`.
        ValueError: As `repair`.

    Warns:
        UserWarning: As `repair`.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     return jnp.maximum(x @ v["w1"] + v["b1"], 0) @ v["w2"]
        >>> a = {"w1": jnp.eye(2), "b1": jnp.ones(2), "w2": jnp.ones((2, 1))}
        >>> merged = a | {"w1": 0.5 * jnp.eye(2)}
        >>> x = jnp.array([[0.0, 1.0], [2.0, 5.0]])
        >>> net = vfjax.trace(apply_fn, a, x)
        >>> rescale(net, merged, [x], references=[a])["b1"].tolist()
        [2.0, 2.0]

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", section on normalisation.
    """
    model = merged_of(net, merged)
    goals, given = goals_of(model, data, references, maps, weights, sites, mask)
    new = _renormalised(model, data, goals, sweeps, centre=False, mask=mask, references=given)
    return new.given_back()


def _norms_of(given: Unpacked) -> list[str]:
    """The norms of the trunk."""
    net, model = given.net, given.model
    return [
        n.name
        for n in net.norms
        if not (model.cut and net.in_stem(n.site, model.cut)) and not model.in_heads(n.site)
    ]


def _renormalised(
    given: Unpacked,
    data: Iterable[Any],
    goals: dict[str, Any],
    sweeps: str,
    *,
    centre: bool,
    mask: Mask | None,
    references: Given | None = None,
) -> Unpacked:
    if sweeps not in _SWEEPS:
        raise ValueError(f"sweeps must be 'batch' or 'layer', got {sweeps!r}")
    net, model = given.net, given.model
    check_host("moments are measured", merged=model.arrays, goals=goals)
    check_batch(net)
    norms = _norms_of(given)
    heads = [n.name for n in net.norms if model.in_heads(n.site)]
    places = tuple((k, name) for k in range(len(model.heads)) for name in heads)
    job = _passes.Job(model.frame, tuple(goals), tuple(norms), places)
    new = given
    if job.layers or job.norms or job.heads:
        new = _with_variances(given)
        results = _SWEEPS[sweeps](job, new, data, goals, centre=centre, mask=mask)
        new = fold_all(new, results, shift=centre)
        if references is not None:
            check_order(given, results.layers, references)
    if given.plain:
        # A tree that becomes a `Merged` records that it was merged from the references.
        new = new.put(weights=(1.0,) if references is None else references.weights)
    return new


def _with_variances(given: Unpacked) -> Unpacked:
    """Fills variances that the model lacks with ones, so that they can be measured."""
    model = given.model
    kept = model.net.trunk_leaves(model.cut, model.end)
    unknown = [n.var for n in model.net.norms if n.var in kept and n.var not in given.trunk.leaves]
    if not unknown:
        return given
    ones = {path: jnp.ones(a.shape, a.dtype) for path, a in model.net.leaves(unknown).items()}
    whole = with_leaves(model.trunk, ones)
    return Unpacked(dataclasses.replace(model, trunk=whole), given.plain)
