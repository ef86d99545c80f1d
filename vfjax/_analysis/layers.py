"""The layers of a graph: their kernels, biases, pre-activations and depths.

Layers are recognised by dependency and by following values, never by the names of modules, so
Linen, NNX, Equinox and plain JAX are read in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from vfjax._analysis.views import (
    View,
    blocks_of,
    varying_axes,
    view_of,
)
from vfjax._jaxpr import INPUT, PARAM, Equation, Graph, contraction
from vfjax._jaxpr.primitives import ADD, BROADCAST, CAST, CONV, LAYOUT, LINEAR, TRANSPOSE


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSite:
    """A layer in a graph: the linear equation, what it reads, and its pre-activation.

    Attributes:
        index: Index of the linear equation.
        side: Which operand is the kernel, 0 or 1.
        kernel: The kernel's leaf, or None if more than layout lies between (a mask, a sum).
        leaf: Index of the leaf that names the layer.
        out_axes: Axes of the kernel operand that its channels run over.
        preactivation: Id of the pre-activation.
        bias: The bias leaf, None without one (or if it is computed from several leaves).
        bias_equation: Index of the equation that adds the bias, or None.
        channel_axes: Axes of the pre-activation that hold channels.
        channels: For each channel of the pre-activation, in row-major order of its channel axes,
            its row-major position along the kernel operand's `out_axes`.
    """

    index: int
    side: int
    kernel: View | None
    leaf: int
    out_axes: tuple[int, ...]
    preactivation: int
    bias: View | None
    bias_equation: int | None
    channel_axes: tuple[int, ...]
    channels: np.ndarray


def linear_sites(graph: Graph, norms: Collection[int] = ()) -> list[LinearSite]:
    """The layers of a graph, in the order of their equations.

    Args:
        graph: The graph.
        norms: Indices of the equations of norms with stored statistics: none adds a bias, though
            one may add a mean's negative.
    """
    sites = []
    for index, equation in enumerate(graph.equations):
        if equation.primitive not in LINEAR:
            continue
        bits = [graph.depends[v] if isinstance(v, int) else 0 for v in equation.inputs[:2]]
        if sorted(b & INPUT for b in bits) == [0, INPUT] and PARAM in bits:
            sites.append(_linear_site(graph, index, bits.index(PARAM), norms))
    return sites


def _linear_site(graph: Graph, index: int, side: int, norms: Collection[int]) -> LinearSite:
    equation = graph.equations[index]
    operand = equation.values[side]
    kernel = view_of(graph, operand)
    if kernel is not None and not kernel.rigid:
        kernel = None
    leaf = kernel.leaf if kernel is not None else _largest_leaf(graph, operand)
    out_axes, channel_axes = _output_axes(equation, side)
    shape = graph.avals[equation.result].shape
    sizes = [shape[a] if a in channel_axes else 1 for a in range(len(shape))]
    # Channels are numbered along the kernel operand's own axes; sample axes shrink to size one.
    labels = np.arange(int(np.prod(sizes))).reshape(sizes)
    value, axes, labels, bias_index, bias = _preactivation(
        graph, equation.result, channel_axes, labels, norms
    )
    return LinearSite(
        index=index,
        side=side,
        kernel=kernel,
        leaf=leaf,
        out_axes=out_axes,
        preactivation=value,
        bias=bias,
        bias_equation=bias_index,
        channel_axes=axes,
        channels=labels.reshape(-1),
    )


def _largest_leaf(graph: Graph, value: int) -> int:
    """The largest leaf of a computed kernel, which names the layer; masks do not count."""
    leaves = {v for i in graph.needed([value], ()) for v in graph.equations[i].values} | {value}
    leaves = sorted(leaves & set(graph.inputs[: graph.num_leaves]))

    def weight(leaf: int) -> tuple[bool, int]:
        aval = graph.avals[leaf]
        return jnp.issubdtype(aval.dtype, jnp.inexact), int(np.prod(aval.shape))

    return graph.inputs.index(max(leaves, key=weight))


def _output_axes(equation: Equation, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the kernel operand that survive, and the axes of the result that they become."""
    if equation.primitive == CONV:
        dims = equation.params["dimension_numbers"]
        if side == 1:
            return (dims.rhs_spec[0],), (dims.out_spec[1],)
        return (dims.lhs_spec[0],), (dims.out_spec[0],)  # exotic: a kernel convolved by the input
    dims = contraction(equation.primitive, equation.params)
    assert dims is not None
    batch = dims.batch
    free = [dims.kept(k, v.aval.ndim) for k, v in enumerate(equation.eqn.invars[:2])]
    offset = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    out_axes = (*batch[side], *free[side])
    channel = (*range(len(batch[side])), *range(offset, offset + len(free[side])))
    return tuple(out_axes), tuple(channel)


def _reshape_axes(
    before: Sequence[int], after: Sequence[int], channel: Sequence[int]
) -> tuple[int, ...] | None:
    """Channel axes after a reshape, or None if it mixes channels with samples."""
    kept: list[int] = []
    for source, target in blocks_of(before, after):
        kinds = {k in channel for k in source if before[k] > 1}
        if len(kinds) > 1:
            return None
        if kinds == {True}:
            kept += [k for k in target if after[k] > 1]
    return tuple(kept)


def follow(
    graph: Graph, value: int, axes: tuple[int, ...], labels: np.ndarray
) -> tuple[int, int, tuple[int, ...], np.ndarray]:
    """Follows single-use casts and layout to their consumer.

    Returns:
        The consumer's index or -1, the value that it reads, and that value's axes and labels.
    """
    while True:
        users = graph.users.get(value, ())
        if len(users) != 1 or value in graph.output_ids:
            return -1, value, axes, labels
        equation = graph.equations[users[0]]
        name, before = equation.primitive, graph.avals[value].shape
        target = equation.result
        after = graph.avals[target].shape
        expands = name == BROADCAST and np.prod(after) == np.prod(before)
        if not (name in CAST | LAYOUT or expands) or len(equation.inputs) != 1:
            return users[0], value, axes, labels
        if name == TRANSPOSE:
            permutation = equation.params["permutation"]
            axes = tuple(k for k, p in enumerate(permutation) if p in axes)
            labels = labels.transpose(permutation)
        elif name not in CAST:
            moved = _reshape_axes(before, after, axes)
            if moved is None:
                return users[0], value, axes, labels
            axes = moved
            labels = labels.reshape([n if k in axes else 1 for k, n in enumerate(after)])
        value = target


def _preactivation(
    graph: Graph,
    value: int,
    axes: tuple[int, ...],
    labels: np.ndarray,
    norms: Collection[int],
) -> tuple[int, tuple[int, ...], np.ndarray, int | None, View | None]:
    index, followed, new_axes, new_labels = follow(graph, value, axes, labels)
    if index >= 0 and index not in norms and graph.equations[index].primitive in ADD:
        equation = graph.equations[index]
        others = [v for v in equation.inputs if v != followed]
        other = others[0] if len(others) == 1 else None
        same = graph.avals[equation.result].shape == graph.avals[followed].shape
        if (
            isinstance(other, int)
            and same
            and graph.depends[other] == PARAM
            and varying_axes(graph, other) <= set(new_axes)
        ):
            return equation.result, new_axes, new_labels, index, view_of(graph, other)
    return value, axes, labels, None, None


def depths(graph: Graph, sites: Sequence[LinearSite]) -> tuple[dict[int, int], dict[int, int]]:
    """Depth of each layer, and the most layers on a path after it, both by equation index."""
    layers = {site.index for site in sites}
    above: dict[int, int] = {}
    depth: dict[int, int] = {}
    for index, equation in enumerate(graph.equations):
        deepest = max((above.get(v, 0) for v in equation.values), default=0) + (index in layers)
        above.update((v, deepest) for v in equation.results)
        if index in layers:
            depth[index] = deepest
    below: dict[int, int] = {}
    after: dict[int, int] = {}
    for index in reversed(range(len(graph.equations))):
        equation = graph.equations[index]
        rest = [below[v] for v in equation.outputs if v in below]
        rest += [0 for v in equation.outputs if v in graph.output_ids]
        if not rest:
            continue
        after[index] = max(rest)
        reach = max(rest) + (index in layers)
        for value in equation.values:
            below[value] = max(below.get(value, 0), reach)
    return depth, after
