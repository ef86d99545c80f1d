"""Folding a correction of a pre-activation, `z' = scale * z + shift`, into a layer's leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfjax._analysis import LinearSite, Traced, View, slot_of
from vfjax._jaxpr import Graph
from vfjax._trees import changed
from vfjax._types import Array


class FoldError(ValueError):
    """A correction cannot be folded into leaves and has to stay explicit."""


def obstacle(traced: Traced, name: str, *, shift: bool) -> str | None:
    """Why a correction of a layer cannot be folded, or None if it can.

    Args:
        traced: The trace.
        name: The layer.
        shift: Whether the correction shifts, or only scales.

    Returns:
        A clause that completes "it cannot be folded: ", or None.
    """
    site, graph = traced.layers[name], traced.graph
    if site.kernel is None:
        return "its kernel is computed from several leaves"
    reason = _unfit(graph, site.kernel, (site.index,), "kernel")
    if reason is not None:
        return reason
    if site.bias_equation is not None:
        if site.bias is None:
            return "its bias is computed from several leaves"
        if _bias_index(graph, site) is None:
            return "its bias is shared between channels"
        return _unfit(graph, site.bias, (site.bias_equation,), "bias")
    if not shift:
        return None
    after = traced.norm_after(site)
    if after is None:
        return "it has no bias and no normalisation with a stored mean follows directly"
    if _mean_index(traced, site) is None:
        return "the mean of the normalisation that follows is shared between channels"
    norm = traced.norms[after]
    return _unfit(graph, norm.mean, norm.equations, "following norm's mean")


def fold(
    traced: Traced, leaves: Mapping[str, Any], name: str, scale: Any, shift: Any
) -> dict[str, Any]:
    """Leaves after folding `z' = scale * z + shift` into the layer that computes z.

    Args:
        traced: The trace.
        leaves: Leaves by path; those that folding does not change may be missing.
        name: The layer.
        scale: Float, of the shape of the pre-activation's channel axes.
        shift: The same, or None for no shift at all.

    Returns:
        A new dict with the kernel, and the bias or the mean of the norm that follows, replaced.

    Raises:
        FoldError: If there is nowhere to fold it.
    """
    reason = obstacle(traced, name, shift=shift is not None)
    if reason is not None:
        raise FoldError(f"The correction of layer '{name}' cannot be folded: {reason}.")
    site, graph = traced.layers[name], traced.graph
    kernel = site.kernel
    assert kernel is not None  # otherwise there is an obstacle
    scale = _vector(graph, site, scale, "scale")
    shift = None if shift is None else _vector(graph, site, shift, "shift")
    new = dict(leaves)
    shifts_norm = shift is not None and site.bias_equation is None
    after = traced.norm_after(site) if shifts_norm else None
    norm = None if after is None else traced.norms[after]
    mean = None if norm is None else norm.mean
    needed = [view for view in (kernel, site.bias, mean) if view is not None]
    for path in (traced.paths[view.leaf] for view in needed):
        if path not in new:
            raise FoldError(
                f"The correction of layer '{name}' cannot be folded: variables lacks '{path}'."
            )
    by_kernel = _pick(scale, np.argsort(site.channels))
    operand = graph.avals[graph.equations[site.index].values[site.side]].shape
    sizes = [n if a in site.out_axes else 1 for a, n in enumerate(operand)]
    # `channels` counts along out_axes in that order, which need not be ascending.
    factor = by_kernel.reshape([operand[a] for a in site.out_axes])
    factor = factor.transpose(np.argsort(site.out_axes)).reshape(sizes)
    full = jnp.broadcast_to(factor, operand)
    path = traced.paths[kernel.leaf]
    new[path] = changed(
        new[path], kernel.slot, lambda leaf: leaf * kernel.backward(full, leaf.shape)
    )
    if site.bias is not None:
        index = _bias_index(graph, site)
        assert index is not None  # or there is an obstacle
        order, path = np.argsort(index), traced.paths[site.bias.leaf]

        def affine(leaf: Array) -> Array:
            moved = jnp.ravel(leaf) * _pick(scale, order)
            moved = moved if shift is None else moved + _pick(shift, order)
            return moved.reshape(leaf.shape)

        new[path] = changed(new[path], site.bias.slot, affine)
    elif norm is not None and mean is not None and shift is not None:
        index = _mean_index(traced, site)
        assert index is not None  # or there is an obstacle
        order, path = np.argsort(index), traced.paths[mean.leaf]
        moved = _pick(norm.leaf_for(shift, traced.scalars(new)), order)
        new[path] = changed(
            new[path], mean.slot, lambda leaf: (jnp.ravel(leaf) - moved).reshape(leaf.shape)
        )
    return new


def _pick(values: Array, index: np.ndarray) -> Array:
    """`values[index]`, without a gather (slow to dispatch) if the channels are in order."""
    return values if np.array_equal(index, np.arange(values.size)) else values[index]


def _vector(graph: Graph, site: LinearSite, value: Any, what: str) -> Array:
    shape, dtype = graph.avals[site.preactivation].shape, graph.avals[site.preactivation].dtype
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{what} holds complex numbers, and the layer's values are {dtype}.")
    wanted = tuple(shape[a] for a in site.channel_axes)
    if jnp.shape(value) != wanted:
        raise ValueError(
            f"{what} has shape {jnp.shape(value)}; the layer's channels have shape {wanted}."
        )
    return jnp.ravel(jnp.asarray(value))


def _unfit(graph: Graph, view: View, readers: Sequence[int], what: str) -> str | None:
    """Why a leaf cannot absorb a correction meant for what some equations compute, or None."""
    if not jnp.issubdtype(graph.avals[graph.inputs[view.leaf]].dtype, jnp.inexact):
        return f"its {what} holds integers"
    if not _sole_use(graph, view, readers):
        return f"its {what} is used more than once"
    return None


def _sole_use(graph: Graph, view: View, readers: Sequence[int]) -> bool:
    """Whether only one of some equations uses a leaf, or its slice."""
    value, whole = graph.inputs[view.leaf], view.slot is not None
    while True:
        users = graph.users.get(value, ())
        if value in graph.output_ids:
            return False
        if whole and all(slot_of(graph, graph.equations[u]) is not None for u in users):
            users = [u for u in users if slot_of(graph, graph.equations[u]) == view.slot]
            whole = False
        if len(users) != 1:
            return False
        equation = graph.equations[users[0]]
        if users[0] in readers:
            return equation.values.count(value) == 1
        value = equation.result


def _bias_index(graph: Graph, site: LinearSite) -> np.ndarray | None:
    """For each channel of the pre-activation, the entry of the bias leaf that is added to it."""
    if site.bias is None:
        return None
    shape = graph.avals[site.preactivation].shape
    return _leaf_index(graph, site.bias, shape, site.channel_axes)


def _mean_index(traced: Traced, site: LinearSite) -> np.ndarray | None:
    """For each channel of the pre-activation, the entry of the norm's mean subtracted from it."""
    link = traced.norm_link(site)
    if link is None:
        return None
    name, axes = link
    norm = traced.norms[name]
    shape = traced.graph.avals[norm.input].shape
    return _leaf_index(traced.graph, norm.mean, shape, axes)


def _leaf_index(
    graph: Graph, view: View, shape: tuple[int, ...], channel_axes: tuple[int, ...]
) -> np.ndarray | None:
    """Entry of a leaf seen at each channel; None unless each entry serves one channel."""
    leaf = graph.avals[graph.inputs[view.leaf]].shape[view.slot is not None :]
    channels = int(np.prod([shape[a] for a in channel_axes]))
    if int(np.prod(leaf)) != channels:
        return None
    index = view.forward(np.arange(channels).reshape(leaf))
    index = np.broadcast_to(index, shape)
    first = tuple(slice(None) if a in channel_axes else 0 for a in range(len(shape)))
    return index[first].reshape(-1)
