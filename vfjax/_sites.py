"""What a graph holds: layers with their kernel, bias and pre-activation, and the elementwise region after.

Everything here is found by dependency and by following values, never by the names of modules, so that
Linen, NNX, Equinox and plain JAX read the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from vfjax import _graph
from vfjax._graph import INPUT, PARAM, Graph

CAST = frozenset({"convert_element_type", "copy", "copy_p", "reduce_precision"})
LAYOUT = frozenset({"reshape", "transpose", "squeeze", "expand_dims"})
ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp copy copy_p cos cosh
    convert_element_type div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le
    lgamma log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or pow
    reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
    xor""".split()
)
"""Primitives that map each position of their operands to the same position of the result."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A parameter leaf seen through casts, transposes, reshapes and broadcasts.

    Attributes:
        leaf: Index of the leaf among the variables' leaves.
        slot: Which slice of the leaf, where a scan over stacked layers was unrolled, else None.
        steps: `("reshape", shape)`, `("transpose", permutation)` or `("broadcast", (shape, dims))`,
            applied in this order to the leaf (or to its slice).
    """

    leaf: int
    slot: int | None
    steps: tuple[tuple[str, Any], ...]

    @property
    def rigid(self) -> bool:
        """Whether each entry of the leaf is seen exactly once."""
        return all(kind != "broadcast" for kind, _ in self.steps)

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Shows an array of the leaf's (or slice's) shape as the operand shows the leaf."""
        for kind, how in self.steps:
            if kind == "reshape":
                array = array.reshape(how)
            elif kind == "transpose":
                array = array.transpose(how)
            else:
                shape, dims = how
                expanded = [1] * len(shape)
                for source, target in enumerate(dims):
                    expanded[target] = array.shape[source]
                array = np.broadcast_to(array.reshape(expanded), shape)
        return array

    def backward(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Carries an array of the operand's shape back to the leaf's; needs a rigid view."""
        shapes = [shape]
        for kind, how in self.steps:
            last = shapes[-1]
            shapes.append(tuple(how) if kind == "reshape" else tuple(last[i] for i in how))
        for (kind, how), before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            array = array.reshape(before) if kind == "reshape" else array.transpose(np.argsort(how))
        return array


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSite:
    """A layer in a graph: the linear equation, what it reads, and its pre-activation.

    Attributes:
        index: Index of the linear equation.
        side: Which operand is the kernel, 0 or 1.
        kernel: The kernel's leaf, or None where more than layout lies between (a mask, a sum).
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


def view_of(graph: Graph, value: Any) -> View | None:
    """The leaf that a value is, seen through casts and layout only, or None."""
    steps: list[tuple[str, Any]] = []
    slot, pending = None, False
    while isinstance(value, int) and value in graph.producer:
        equation = graph.equations[graph.producer[value]]
        name, params, shape = equation.primitive, equation.params, graph.avals[value].shape
        if len(equation.values) != 1 or slot is not None:
            return None
        source = equation.values[0]
        if name == "slice" and pending and _is_slot(graph, equation):
            # The slice and squeeze of one step of an unrolled scan.
            slot, pending = params["start_indices"][0], False
            steps.pop()
        elif name in CAST:
            pass
        elif name == "transpose":
            steps.append(("transpose", tuple(params["permutation"])))
        elif name in LAYOUT:
            pending = name == "squeeze" and tuple(params["dimensions"]) == (0,)
            steps.append(("reshape", tuple(shape)))
        elif name == "broadcast_in_dim":
            dims = tuple(params["broadcast_dimensions"])
            if int(np.prod(shape)) == int(np.prod(graph.avals[source].shape)):
                steps.append(("reshape", tuple(shape)))
            else:
                steps.append(("broadcast", (tuple(shape), dims)))
        else:
            return None
        value = source
    if value not in graph.inputs[: graph.num_leaves]:
        return None
    return View(graph.inputs.index(value), slot, tuple(reversed(steps)))


def _is_slot(graph: Graph, equation: _graph.Equation) -> bool:
    shape = graph.avals[equation.values[0]].shape
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    whole = all((a, b) == (0, n) for a, b, n in zip(start[1:], limit[1:], shape[1:], strict=True))
    return whole and limit[0] - start[0] == 1


def varying_axes(graph: Graph, value: Any) -> frozenset[int]:
    """Axes along which a value may vary; a broadcast axis does not."""
    if not isinstance(value, int):
        return frozenset()
    shape = graph.avals[value].shape
    full = frozenset(i for i, n in enumerate(shape) if n > 1)
    if value not in graph.producer:
        return full
    equation = graph.equations[graph.producer[value]]
    if equation.primitive == "broadcast_in_dim":
        inner = varying_axes(graph, equation.inputs[0])
        dims = equation.params["broadcast_dimensions"]
        return frozenset(dims[i] for i in inner if shape[dims[i]] > 1)
    if equation.primitive in ELEMENTWISE:
        parts = [varying_axes(graph, v) for v in equation.inputs if np.ndim(_aval(graph, v))]
        return frozenset().union(*parts)
    return full


def _aval(graph: Graph, value: Any) -> Any:
    return graph.avals[value] if isinstance(value, int) else value.val


def linear_sites(graph: Graph) -> list[LinearSite]:
    """The layers of a graph, in the order of their equations."""
    sites = []
    for index, equation in enumerate(graph.equations):
        if equation.primitive not in _graph.LINEAR:
            continue
        bits = [graph.depends[v] if isinstance(v, int) else 0 for v in equation.inputs[:2]]
        if sorted(b & INPUT for b in bits) == [0, INPUT] and PARAM in bits:
            sites.append(_linear_site(graph, index, bits.index(PARAM)))
    return sites


def _linear_site(graph: Graph, index: int, side: int) -> LinearSite:
    equation = graph.equations[index]
    operand = equation.inputs[side]
    kernel = view_of(graph, operand)
    if kernel is not None and not kernel.rigid:
        kernel = None
    leaf = kernel.leaf if kernel is not None else _largest_leaf(graph, operand)
    out_axes, channel_axes = _output_axes(equation, side)
    shape = graph.avals[equation.outputs[0]].shape
    sizes = [shape[a] if a in channel_axes else 1 for a in range(len(shape))]
    # Channels are numbered along the kernel operand's own axes; sample axes shrink to size one.
    labels = np.arange(int(np.prod(sizes))).reshape(sizes)
    value, axes, labels, bias_index, bias = _preactivation(
        graph, equation.outputs[0], channel_axes, labels
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
    leaves = {v for i in graph.needed([value], ()) for v in graph.equations[i].values} | {value}
    leaves &= set(graph.inputs[: graph.num_leaves])
    return graph.inputs.index(max(sorted(leaves), key=lambda v: int(np.prod(graph.avals[v].shape))))


def _output_axes(equation: _graph.Equation, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the kernel operand that survive, and the axes of the result that they become."""
    if equation.primitive == "conv_general_dilated":
        dims = equation.params["dimension_numbers"]
        if side == 1:
            return (dims.rhs_spec[0],), (dims.out_spec[1],)
        return (dims.lhs_spec[0],), (dims.out_spec[0],)  # a kernel convolved by the input: exotic
    (contract, batch) = equation.params["dimension_numbers"]
    ranks = [v.aval.ndim for v in equation.eqn.invars[:2]]
    free = [
        [a for a in range(ranks[k]) if a not in contract[k] and a not in batch[k]] for k in (0, 1)
    ]
    offset = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    out_axes = (*batch[side], *free[side])
    channel = (*range(len(batch[side])), *range(offset, offset + len(free[side])))
    return tuple(out_axes), tuple(channel)


def _reshape_axes(
    before: Sequence[int], after: Sequence[int], channel: Sequence[int]
) -> tuple[int, ...] | None:
    """Channel axes after a reshape, or None if it mixes channels with samples."""
    i = j = 0
    found: list[int] = []
    while i < len(before) or j < len(after):
        block_in, block_out, a, b = [], [], 1, 1
        while True:
            if a <= b and i < len(before) and (a < b or not block_in):
                block_in.append(i)
                a *= before[i]
                i += 1
            elif j < len(after) and (b < a or not block_out):
                block_out.append(j)
                b *= after[j]
                j += 1
            else:
                break
        if a != b:
            return None
        real = [k for k in block_in if before[k] > 1]
        kinds = {k in channel for k in real}
        if len(kinds) > 1:
            return None
        if kinds == {True}:
            found += [k for k in block_out if after[k] > 1]
    return tuple(found)


def _follow(
    graph: Graph, value: int, axes: tuple[int, ...], labels: np.ndarray
) -> tuple[int, int, tuple[int, ...], np.ndarray]:
    """Follows single-use casts and layout; the consumer's index, and the value that it reads."""
    while True:
        users = graph.users.get(value, ())
        if len(users) != 1 or value in graph.output_ids:
            return -1, value, axes, labels
        equation = graph.equations[users[0]]
        name, before = equation.primitive, graph.avals[value].shape
        if name not in CAST | LAYOUT or len(equation.values) != 1:
            return users[0], value, axes, labels
        target = equation.outputs[0]
        after = graph.avals[target].shape
        if name == "transpose":
            permutation = equation.params["permutation"]
            axes = tuple(k for k, p in enumerate(permutation) if p in axes)
            labels = labels.transpose(permutation)
        elif name in LAYOUT:
            moved = _reshape_axes(before, after, axes)
            if moved is None:
                return users[0], value, axes, labels
            axes = moved
            labels = labels.reshape([n if k in axes else 1 for k, n in enumerate(after)])
        value = target


def _preactivation(
    graph: Graph, value: int, axes: tuple[int, ...], labels: np.ndarray
) -> tuple[int, tuple[int, ...], np.ndarray, int | None, View | None]:
    index, followed, new_axes, new_labels = _follow(graph, value, axes, labels)
    if index >= 0 and graph.equations[index].primitive in ("add", "add_any"):
        equation = graph.equations[index]
        others = [v for v in equation.inputs if v != followed]
        other = others[0] if len(others) == 1 else None
        same = graph.avals[equation.outputs[0]].shape == graph.avals[followed].shape
        if (
            isinstance(other, int)
            and same
            and graph.depends[other] == PARAM
            and varying_axes(graph, other) <= set(new_axes)
        ):
            return equation.outputs[0], new_axes, new_labels, index, view_of(graph, other)
    return value, axes, labels, None, None


def is_elementwise(equation: _graph.Equation) -> bool:
    """Whether an equation is elementwise, looking into custom derivatives such as relu's."""
    if equation.primitive in ELEMENTWISE:
        return True
    inner = _graph.subjaxpr(equation.eqn)
    return inner is not None and _elementwise_jaxpr(inner[0])


def _elementwise_jaxpr(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        inner = _graph.subjaxpr(eqn)
        if inner is not None and _elementwise_jaxpr(inner[0]):
            continue
        scalar = eqn.primitive.name == "broadcast_in_dim" and all(
            isinstance(v, jex.Literal) or not v.aval.shape for v in eqn.invars
        )
        if eqn.primitive.name not in ELEMENTWISE and not scalar:
            return False
    return True


def tap_of(graph: Graph, value: int) -> int:
    """The tap after a pre-activation: the last value of the elementwise region that follows it.

    A reduction whose result comes back to the region, as a LayerNorm's moments do, belongs to it; the
    region ends at the first value that a layer, a pool, a reshape or another reduction reads.
    """
    shape = graph.avals[value].shape
    region = {value}
    order = [value]
    while order:
        current = min(order)
        order.remove(current)
        if current in graph.output_ids:
            return current
        following = []
        for index in graph.users.get(current, ()):
            equation = graph.equations[index]
            inside = is_elementwise(equation) and all(
                graph.avals[v].shape == shape for v in equation.outputs if v is not None
            )
            if inside:
                following += [v for v in equation.outputs if v is not None and v not in region]
            elif not _returns(graph, index, region, shape):
                return current
        region.update(following)
        order += [v for v in following if v not in order]
    return max(region)


def _returns(graph: Graph, index: int, region: set[int], shape: tuple[int, ...]) -> bool:
    """Whether what an equation makes of the region comes back to it elementwise."""
    todo, seen = [index], set()
    while todo:
        equation = graph.equations[todo.pop()]
        if equation.primitive in _graph.LINEAR:
            continue
        for value in equation.outputs:
            for user in graph.users.get(value, ()):
                target = graph.equations[user]
                result = graph.avals[target.outputs[0]].shape
                if is_elementwise(target) and result == shape and region & set(target.values):
                    return True
                # A statistic of the region is never larger than the region.
                if user not in seen and int(np.prod(result)) <= int(np.prod(shape)):
                    seen.add(user)
                    todo.append(user)
    return False


def depths(graph: Graph, sites: Sequence[LinearSite]) -> tuple[dict[int, int], dict[int, int]]:
    """Depth of every layer, and how many layers follow it at most, by equation index."""
    layers = {site.index for site in sites}
    above: dict[int, int] = {}
    depth: dict[int, int] = {}
    for index, equation in enumerate(graph.equations):
        deepest = max((above.get(v, 0) for v in equation.values), default=0) + (index in layers)
        above.update((v, deepest) for v in equation.outputs if v is not None)
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
