"""Folding a correction of a pre-activation, `z' = scale * z + shift`, into the leaves that make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._graph import Graph
from vfjax._sites import LinearSite, View
from vfjax._traced import Traced

Array = jax.Array


class FoldError(ValueError):
    """A correction has no leaf to go into and has to stay explicit."""


def obstacle(traced: Traced, name: str, *, shift: bool) -> str | None:
    """Why a correction of a layer cannot be folded, or None if it can.

    Args:
        traced: The trace.
        name: The layer.
        shift: Whether the correction shifts, or only scales.

    Returns:
        A clause that completes "it cannot be folded: ", or None.
    """
    site = traced.layers[name]
    if site.kernel is None:
        return "its kernel is computed from several leaves"
    if _shared(traced, site, site.kernel):
        return "its kernel is used more than once"
    if site.bias_equation is not None:
        if site.bias is None:
            return "its bias is computed from several leaves"
        if _bias_index(traced.graph, site) is None:
            return "its bias is shared between channels"
        if _shared(traced, site, site.bias):
            return "its bias is used more than once"
    elif shift and traced.norm_after(site) is None:
        return "it has no bias and no normalisation with a stored mean follows directly"
    elif shift and _mean_index(traced, site) is None:
        return "the mean of the normalisation that follows is shared between channels"
    return None


def fold(
    traced: Traced, leaves: Mapping[str, Any], name: str, scale: Any, shift: Any
) -> dict[str, Any]:
    """Leaves after folding `z' = scale * z + shift` into the layer that makes z.

    Args:
        traced: The trace.
        leaves: Leaves by path; those that are not changed may be missing.
        name: The layer.
        scale: Shape of the pre-activation's channel axes, float.
        shift: Alike, or None for no shift at all.

    Returns:
        A new dict with the kernel, and the bias or the mean of the norm that follows, replaced.

    Raises:
        FoldError: If there is nowhere to fold it.
    """
    reason = obstacle(traced, name, shift=shift is not None)
    if reason is not None:
        raise FoldError(f"The correction of layer '{name}' cannot be folded: {reason}.")
    site, graph = traced.layers[name], traced.graph
    scale = jnp.ravel(jnp.asarray(scale))
    shift = None if shift is None else jnp.ravel(jnp.asarray(shift))
    new = dict(leaves)
    by_kernel = scale[np.argsort(site.channels)]
    operand = graph.avals[graph.equations[site.index].inputs[site.side]].shape
    sizes = [n if a in site.out_axes else 1 for a, n in enumerate(operand)]
    # `channels` counts along out_axes in their own order, which need not be ascending.
    factor = by_kernel.reshape([operand[a] for a in site.out_axes])
    factor = factor.transpose(np.argsort(site.out_axes)).reshape(sizes)
    full = jnp.broadcast_to(factor, operand)
    new[traced.paths[site.kernel.leaf]] = _update(
        new[traced.paths[site.kernel.leaf]],
        site.kernel.slot,
        lambda leaf: leaf * site.kernel.backward(full, leaf.shape),
    )
    if site.bias is not None:
        index = np.argsort(_bias_index(graph, site))
        path = traced.paths[site.bias.leaf]

        def affine(leaf: Array) -> Array:
            moved = jnp.ravel(leaf) * scale[index]
            moved = moved if shift is None else moved + shift[index]
            return moved.reshape(leaf.shape)

        new[path] = _update(new[path], site.bias.slot, affine)
    elif shift is not None:
        norm = traced.norms[traced.norm_after(site)]
        index = np.argsort(_mean_index(traced, site))
        path = traced.paths[norm.mean.leaf]
        if path not in new:
            raise FoldError(f"The correction of layer '{name}' needs '{path}', which is not here.")
        new[path] = _update(
            new[path],
            norm.mean.slot,
            lambda leaf: (jnp.ravel(leaf) - shift[index]).reshape(leaf.shape),
        )
    return new


def _update(leaf: Any, slot: int | None, change: Callable[[Array], Array]) -> Array:
    leaf = jnp.asarray(leaf)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    if slot is None:
        return change(leaf.astype(wide)).astype(leaf.dtype)
    return leaf.at[slot].set(change(leaf[slot].astype(wide)).astype(leaf.dtype))


def _shared(traced: Traced, site: LinearSite, view: View) -> bool:
    """Whether a leaf (or its slice) serves anything but this layer."""
    graph = traced.graph
    value = graph.inputs[view.leaf]
    if value in graph.output_ids:
        return True
    users = graph.users.get(value, ())
    if view.slot is None:
        chain = value
        for _ in range(len(view.steps) + 8):
            users = graph.users.get(chain, ())
            if len(users) != 1:
                return True
            if users[0] in (site.index, site.bias_equation):
                equation = graph.equations[users[0]]
                return sum(v == chain for v in equation.values) != 1
            chain = graph.equations[users[0]].outputs[0]
        return True
    slots = [
        graph.equations[u].params["start_indices"][0]
        for u in users
        if graph.equations[u].primitive == "slice"
    ]
    return len(slots) != len(users) or slots.count(view.slot) != 1


def _bias_index(graph: Graph, site: LinearSite) -> np.ndarray | None:
    """For each channel of the pre-activation, the entry of the bias leaf that it adds."""
    shape = graph.avals[site.preactivation].shape
    return _leaf_index(graph, site.bias, shape, site.channel_axes)


def _mean_index(traced: Traced, site: LinearSite) -> np.ndarray | None:
    norm = traced.norms[traced.norm_after(site)]
    shape = traced.graph.avals[site.preactivation].shape
    return _leaf_index(traced.graph, norm.mean, shape, site.channel_axes)


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
