"""Passes over data for `vfjax.renorm`: they measure a merged network and compute its corrections.

`by_batch` takes one pass. Every site is corrected by the moments of the batch itself, so that later
layers see corrected values, as in a network in training mode; the moments of the uncorrected values
are pooled over batches. `by_layer` takes one pass per rank of sites, with the corrections of
earlier ranks fixed to their pooled moments, which is exact on any data. `_write` puts the results
into the model.

A pass is one compiled call per batch. Trees, weights, goals and the kind of correction are
arguments of that call, so that all models of one network and cut share one compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import (
    Mask,
    check_finite_means,
    compiled,
    keep,
    late,
    masked,
    on_mesh,
    on_meshes,
    wide,
)
from vfjax._passes.masking import check_valid
from vfjax._passes.moments import Pooled, coefficients, moments_of, pool
from vfjax._trees import flatten_named
from vfjax._types import Array, PyTree
from vfjax.merge._merged import Arrays, Frame, Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._crossing import Crossing
from vfjax.network._inside import ranks_of
from vfjax.network._layout import as_float, whole_layout
from vfjax.network._network import Network
from vfjax.network._records import Norm
from vfjax.network._stored import (
    Part,
    Stored,
    deviation_ratio,
    statistics_of,
    stored,
    storing,
)
from vfjax.network._valid import valid_at


class Job(NamedTuple):
    """What a pass corrects; hashable, since it is the key of a compilation.

    Attributes:
        frame: The merged model without its arrays.
        layers: Layers of the trunk whose pre-activation is corrected.
        norms: Norms of the trunk whose stored statistics are renewed.
        heads: Norms of the heads whose stored statistics are renewed, as (model, norm).
    """

    frame: Frame
    layers: tuple[str, ...]
    norms: tuple[str, ...]
    heads: tuple[tuple[int, str], ...] = ()

    @property
    def net(self) -> Network:
        """The network of the trunk."""
        return self.frame.net


class Found(NamedTuple):
    """The results of the passes.

    Attributes:
        corrections: `{layer: (scale, shift)}`.
        norms: `{norm: moments of its corrected input}`, in the trunk.
        heads: `{(model, norm): moments of its corrected input}`, in the heads.
        layers: `{layer: moments before its correction}`.
    """

    corrections: dict[str, tuple[Any, Any]]
    norms: dict[str, Pooled]
    heads: dict[tuple[int, str], Pooled]
    layers: dict[str, Pooled]


# A batch or a crossing, and which positions of the batch count, None for all.
Item = tuple[PyTree, Array | None]


class _Given(NamedTuple):
    """The traced arguments of a compiled pass."""

    arrays: Arrays
    # 1 to correct the mean (REPAIR), 0 for the standard deviation alone (RESCALE).
    centre: Any
    # Exactly one of these two is given. By layer, the goal mean and standard deviation, to correct
    # by the moments of the batch;
    goals: Mapping[str, tuple[Array, Array]] | None
    # or the scale and shift that earlier passes found.
    fixed: Mapping[str, tuple[Array, Array]] | None


def by_batch(
    job: Job,
    model: Unpacked,
    data: Iterable[Any],
    goals: Mapping[str, tuple[Array, Array]],
    *,
    centre: bool,
    mask: Mask | None = None,
) -> Found:
    """Corrects each batch by its own moments, in one pass, and pools these moments.

    Args:
        job: What to correct.
        model: The merged model.
        data: Batches, or a list of crossings that `model.crossing` computed from them.
        goals: Mean and standard deviation to reach, by layer.
        centre: Whether to correct the mean too.
        mask: Which positions of the batches count, as in `vfjax.stats.moments`.

    Returns:
        Corrections and moments; exact if there is one batch.
    """
    given = _given(model, centre, goals={name: goals[name] for name in job.layers})
    pooled = _pass(job, given, inputs(job.net, job.frame.cut, data, mask))
    corrections = {n: _coefficients(pooled[n], goals[n], centre) for n in job.layers}
    heads = {place: pooled[label(*place)] for place in job.heads}
    norms, layers = ({n: pooled[n] for n in names} for names in (job.norms, job.layers))
    return Found(corrections, norms, heads, layers)


def by_layer(
    job: Job,
    model: Unpacked,
    data: Iterable[Any],
    goals: Mapping[str, tuple[Array, Array]],
    *,
    centre: bool,
    mask: Mask | None = None,
) -> Found:
    """Corrects one rank after the other, in one pass each, with earlier corrections fixed.

    Args:
        job: What to correct.
        model: The merged model.
        data: Batches, or a list of crossings that `model.crossing` computed from them.
        goals: Mean and standard deviation to reach, by layer.
        centre: Whether to correct the mean too.
        mask: Which positions of the batches count, as in `vfjax.stats.moments`.

    Returns:
        Corrections and moments; exact on any data.
    """
    results = Found({}, {}, {}, {})
    read = _stored(model.model, data, mask)
    identity = {
        name: (jnp.ones_like(goals[name][0]), jnp.zeros_like(goals[name][0])) for name in job.layers
    }
    for rank in ranks(job):
        given = _given(
            model,
            centre,
            fixed=identity | results.corrections,
            measured=results,
        )
        pooled = _pass(job, given, read())
        for name in rank:
            if name in job.layers:
                results.layers[name] = pooled[name]
                results.corrections[name] = _coefficients(pooled[name], goals[name], centre)
        for name in rank:
            if name in job.norms:
                layer = job.net.norm(name).layer
                before = None if layer is None else results.corrections.get(layer)
                results.norms[name] = _moved(pooled[name], before)
        results.heads.update({p: pooled[label(*p)] for p in job.heads if label(*p) in rank})
    return results


def renewed(model: Unpacked, results: Found) -> Unpacked:
    """The model with the measured statistics in its norms."""
    if not results.norms and not results.heads:
        return model
    heads = []
    for k, head in enumerate(model.heads):
        own = {norm: moments for (of, norm), moments in results.heads.items() if of == k}
        heads.append(with_statistics(model.model.net_of(k), head.leaves, own))
    trunk = with_statistics(model.net, model.trunk.leaves, results.norms)
    return model.put(trunk=trunk, heads=heads)


def with_statistics(
    net: Network, leaves: Mapping[str, Any], by_norm: Mapping[str, Pooled]
) -> dict[str, Any]:
    """Replaces the stored statistics of norms.

    A norm that is used several times has one pair of leaves, which gets the pooled moments of all
    uses.

    Args:
        net: The traced network.
        leaves: Leaves of its variables by path.
        by_norm: Moments of the inputs of norms, by name of the norm.

    Returns:
        New leaves; statistics have the dtypes of the old ones.
    """
    new = dict(leaves)
    joined: dict[tuple[Part, Part], tuple[str, Pooled]] = {}
    for name, moments in by_norm.items():
        key = statistics_of(net, name)
        joined[key] = name, pool(joined[key][1], moments) if key in joined else moments
    for name, moments in joined.values():
        new |= storing(net, name, new, Stored(moments.mean, moments.var))
    return new


def ranks(job: Job) -> list[list[str]]:
    """Orders sites in ranks, so that each depends on the corrections of earlier ranks only.

    A norm that directly follows a corrected layer has that layer's rank: the moments of its input
    follow from the layer's.
    """
    trunk = ranks_of(job.net, job.layers, job.norms)
    heads: list[list[str]] = []  # after the whole trunk, and each by its own graph
    for model in dict.fromkeys(model for model, _ in job.heads):
        norms = tuple(norm for k, norm in job.heads if k == model)
        own = ranks_of(job.frame.net_of(model), (), norms)
        heads += [[] for _ in range(len(own) - len(heads))]
        for rank, names in zip(heads, own, strict=False):
            rank += [label(model, name) for name in names]
    return trunk + heads


def label(model: int, norm: str) -> str:
    """Name under which the moments at a norm of a head are pooled."""
    return f"{norm} (head {model})"


def _coefficients(
    now: Pooled, goal: tuple[Any, Any], centre: bool
) -> tuple[np.ndarray, np.ndarray]:
    """As `coefficients`, on the host: channels are few, and nothing is compiled for each layer."""
    goal_mean, goal_std = (np.asarray(a) for a in goal)
    dtype = goal_mean.dtype
    now = Pooled(*(np.asarray(v, dtype) for v in now))
    scale, shift = coefficients(now, (goal_mean, goal_std), centre)
    return scale.astype(dtype), shift.astype(dtype)


def _moved(moments: Pooled, correction: tuple[Any, Any] | None) -> Pooled:
    """Moments of `scale * z + shift`, from those of z."""
    if correction is None:
        return moments
    scale, shift = (np.reshape(v, np.shape(moments.mean)) for v in correction)
    return Pooled(moments.count, scale * moments.mean + shift, scale**2 * moments.m2)


def _given(
    model: Unpacked,
    centre: bool,
    *,
    goals: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    measured: Found | None = None,
) -> _Given:
    model = model if measured is None else renewed(model, measured)
    return _Given(model.model.arrays, np.asarray(centre), goals, fixed)


def _pass(job: Job, given: _Given, items: Iterable[Item]) -> dict[str, Pooled]:
    """Takes one pass: moments of every layer before its correction, of norms' inputs after it."""
    placed = on_meshes(items, given)
    pooled: dict[str, Pooled] = {}
    for batch in late(_measure(job, *on) for on in placed):
        # On the host: batches may be many, and sites are small.
        for name, moments in wide(batch).items():
            pooled[name] = pool(pooled[name], moments) if name in pooled else moments
    check_valid({name: moments.count for name, moments in pooled.items()})
    check_finite_means({name: moments.mean for name, moments in pooled.items()})
    return pooled


@compiled(static=2)
def _measure(job: Job, mesh: Any, given: _Given, item: Item) -> dict[str, Pooled]:
    return on_mesh(functools.partial(_moments, job), mesh)(given, *item)


def _moments(job: Job, given: _Given, x: PyTree, valid: Array | None) -> dict[str, Pooled]:
    model = job.frame.model(given.arrays)
    measured: dict[str, Pooled] = {}

    def counting(net: Network, names: Sequence[str]) -> dict[str, Array]:
        """What counts at sites; empty if everything does."""
        layouts = [whole_layout(net, name) for name in names]
        return {} if valid is None else valid_at(net, layouts, valid)

    at_layers = counting(job.net, job.layers)

    def at_layer(name: str, z: Array) -> Array:
        layer = job.net.layer(name)
        measured[name] = moments_of(as_float(z, name), layer.sample_axes, at_layers.get(name))
        if given.goals is None:
            assert given.fixed is not None  # one of the two is given
            pair = given.fixed[name]
        else:
            pair = coefficients(measured[name], given.goals[name], given.centre)
        return layer.affine(*pair)(z)

    def at_norms(net: Network, tree: PyTree, labels: Mapping[str, str]) -> dict[str, Any]:
        """Edits that measure the norms of a tree; `labels` names their moments."""
        leaves, _ = flatten_named(tree)
        norms = [net.norm(name) for name in labels]
        here = counting(net, [norm.site for norm in norms])

        def edit(norm: Norm, u: Array) -> Array:
            now = moments_of(as_float(u, norm.site), norm.sample_axes, here.get(norm.site))
            measured[labels[norm.name]] = now
            return u if given.goals is None else _as_if(net, norm, leaves, now, u)

        return {norm.site: functools.partial(edit, norm) for norm in norms}

    edit = {name: functools.partial(at_layer, name) for name in job.layers}
    edit |= at_norms(job.net, model.trunk, {name: name for name in job.norms})
    out, _ = model.run_trunk(x, edit=edit)
    for k in dict.fromkeys(k for k, _ in job.heads):
        labels = {norm: label(k, norm) for of, norm in job.heads if of == k}
        model.run_head(k, out, edit=at_norms(model.net_of(k), model.heads[k], labels))
    return measured


def _as_if(net: Network, norm: Norm, leaves: Mapping[str, Array], now: Pooled, u: Array) -> Array:
    """The input that the norm maps, by its old statistics, to where the batch's would map `u`."""
    dtype = now.mean.dtype
    old = Stored(*(v.astype(dtype) for v in stored(net, norm.name, leaves)))
    factor = deviation_ratio(net, norm.name, leaves, old.var, now.var).astype(dtype)
    now_mean, factor, mean = (
        jnp.expand_dims(v, norm.sample_axes) for v in (now.mean, factor, old.mean)
    )
    return ((u.astype(mean.dtype) - now_mean) * factor + mean).astype(u.dtype)


def inputs(net: Network, cut: int, data: Iterable[Any], mask: Mask | None = None) -> Iterator[Item]:
    """The batches of `data`, checked, with what is valid of each; or the crossings that it lists.

    Raises:
        TypeError: As `vfjax._passes.masked`.
        ValueError: As `vfjax._passes.masked`; if a crossing is not of the model's cut, or there are
            crossings and a mask.
    """
    if not (isinstance(data, (list, tuple)) and any(isinstance(c, Crossing) for c in data)):
        yield from masked(data, mask, like=net.x)
        return
    if mask is not None:
        raise ValueError("mask is a function of x, and data holds crossings; give batches of x")
    for c in data:
        if not isinstance(c, Crossing) or c.depth != cut:
            what = f"a crossing at {c.depth}" if isinstance(c, Crossing) else type(c).__name__
            raise ValueError(f"data must hold crossings at the model's cut, {cut}, got {what}")
        yield c, None


def _stored(model: Merged, data: Iterable[Any], mask: Mask | None) -> Callable[[], Iterable[Item]]:
    """Data for several passes: the crossings of all batches, where they fit into memory."""

    def read() -> Iterator[Item]:
        return inputs(model.net, model.cut, data, mask)

    if model.cut == 0:
        return read
    crossings = ((x if isinstance(x, Crossing) else _cross(model, x), valid) for x, valid in read())
    kept = keep(crossings, ())
    return (lambda: kept) if kept else read


@jax.jit
def _cross(model: Merged, x: PyTree) -> Crossing:
    return model.crossing(x)
