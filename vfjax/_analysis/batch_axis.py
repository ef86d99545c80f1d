"""Whether a batch may be computed in pieces: whether a network treats each example separately.

The batch axis of the input is followed through the graph, equation by equation. The answer is no
for a network that mixes examples (batch statistics, attention over the batch), and for one that
differs at another batch size. It is yes only if certain: a primitive that is not known here counts
as mixing examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from vfjax._analysis.views import varying_axes
from vfjax._jaxpr import INPUT, Equation, Graph, is_elementwise, subjaxpr
from vfjax._jaxpr.primitives import (
    BROADCAST,
    CONCATENATE,
    CONV,
    CUMULATIVE,
    DOT,
    ELEMENTWISE,
    LAYOUT,
    PAD,
    REDUCTIONS,
    REV,
    SLICE,
    SORT,
    SPLIT,
    SPREAD,
    STACK,
    TILE,
    TRANSPOSE,
    WINDOWS,
)


class Mixed(Exception):
    """Examples meet, or may meet."""


def separable(whole: Graph, piece: Graph) -> bool:
    """Whether a network computes the same for pieces of a batch as for the whole batch.

    Args:
        whole: Its graph for a batch, with the batch axis first in every input.
        piece: Its graph for a smaller batch, of two examples or more.
    """
    try:
        axes = batch_axes(whole)
        return _alike(whole, piece, axes) and axes == batch_axes(piece)
    except Mixed:
        return False


def batch_axes(graph: Graph) -> dict[int, int]:
    """The batch axis of every value that depends on the input.

    Raises:
        Mixed: If examples meet, or the output's first axis is not the batch.
    """
    axes = dict.fromkeys(graph.inputs[graph.num_leaves :], 0)
    for equation in graph.equations:
        if equation.depends & INPUT:
            axis = axis_after(graph, equation, axes)
            axes.update((value, axis) for value in equation.results)
    if any(axes.get(value) != 0 for value in graph.output_ids):
        raise Mixed
    return axes


# Parameters of primitives that may contain the batch size and nothing else that matters.
_SIZES = frozenset({"shape", "new_sizes", "sizes", "limit_indices", "slice_sizes"})


def _alike(a: Graph, b: Graph, axes: Mapping[int, int]) -> bool:
    """Whether two graphs differ only in the length of the batch."""
    if a.inputs != b.inputs or len(a.equations) != len(b.equations):
        return False
    if not _same_operands(a.outputs, b.outputs) or a.consts.keys() != b.consts.keys():
        return False
    if not all(_equal(a.consts[v], b.consts[v]) for v in a.consts):
        return False
    stretched = set()
    for value in {*a.inputs, *(v for e in a.equations for v in e.results)}:
        one, two = a.avals[value], b.avals[value]
        if one.dtype != two.dtype or len(one.shape) != len(two.shape):
            return False
        differ = {k for k, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)) if n != m}
        if value in axes and differ - {axes[value]}:
            return False
        if value not in axes and differ:
            # Broadcast along the batch, as a bias may be. A sum over it would depend on its length.
            if differ & varying_axes(a, value):
                return False
            stretched.add(value)
    return all(
        _alike_equations(one, two)
        and (
            one.depends & INPUT
            or one.primitive in SPREAD | ELEMENTWISE
            or stretched.isdisjoint(one.values)
        )
        for one, two in zip(a.equations, b.equations, strict=True)
    )


def _alike_equations(a: Equation, b: Equation) -> bool:
    return (
        a.outputs == b.outputs
        and _same_operands(a.inputs, b.inputs)
        and _alike_operations(a.eqn, b.eqn)
    )


def _alike_operations(a: Any, b: Any) -> bool:
    """Whether two JAX equations do the same apart from sizes; calls are looked into."""
    if a.primitive.name != b.primitive.name:
        return False
    one, two = subjaxpr(a), subjaxpr(b)
    if one is not None and two is not None:
        (one, consts), (two, more) = one, two
        ids_one, ids_two = _numbered(one), _numbered(two)
        return (
            len(one.eqns) == len(two.eqns)
            and not (consts or more or one.constvars or two.constvars)
            and _same_operands(ids_one(one.outvars), ids_two(two.outvars))
            and all(
                _alike_operations(e, f) and _same_operands(ids_one(e.invars), ids_two(f.invars))
                for e, f in zip(one.eqns, two.eqns, strict=True)
            )
        )
    return a.params.keys() == b.params.keys() and all(
        name in _SIZES or _equal(a.params[name], b.params[name]) for name in a.params
    )


def _numbered(jaxpr: Any) -> Callable[[Sequence[Any]], list[Any]]:
    """A function that numbers variables of a jaxpr in the order of their definition."""
    variables = [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    number = {v: k for k, v in enumerate(variables)}
    return lambda vs: [v if isinstance(v, jex.Literal) else number[v] for v in vs]


def _same_operands(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether operands are the same values of two graphs, or equal literals."""

    def same(one: Any, two: Any) -> bool:
        if isinstance(one, jex.Literal) and isinstance(two, jex.Literal):
            types: list[Any] = [one.aval, two.aval]
            return types[0].dtype == types[1].dtype and _equal(one.val, two.val)
        return isinstance(one, int) and isinstance(two, int) and one == two

    return len(a) == len(b) and all(map(same, a, b))


def _equal(a: Any, b: Any) -> bool:
    if hasattr(a, "shape") and hasattr(b, "shape"):
        # Compared by bytes, so that NaN equals itself.
        return a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return type(a) is type(b) and (a == b or a != a and b != b)


def axis_after(graph: Graph, equation: Equation, axes: Mapping[int, int]) -> int:
    """The batch axis of an equation's results; raises `Mixed` if they have none."""
    name = equation.primitive
    if name == DOT:
        return _dot(graph, equation, axes)
    if name == CONV:
        return _convolution(equation, axes)
    places = {axes[v] for v in equation.values if v in axes}
    if len(places) != 1:
        raise Mixed
    axis = places.pop()
    for value in equation.values:
        # A value without input may be broadcast along the batch, but must not vary there.
        if value not in axes and axis in varying_axes(graph, value):
            raise Mixed
    if is_elementwise(equation):
        return axis
    rule = _RULES.get(name)
    if rule is None:
        raise Mixed
    before = graph.avals[equation.values[0]].shape
    return rule(equation.params, axis, before, graph.avals[equation.result].shape)


def _dot(graph: Graph, equation: Equation, axes: Mapping[int, int]) -> int:
    contract, batch = equation.params["dimension_numbers"]
    places = set()
    offset = len(batch[0])
    for side, value in enumerate(equation.inputs):
        shape = equation.eqn.invars[side].aval.shape
        free = [a for a in range(len(shape)) if a not in contract[side] and a not in batch[side]]
        axis = axes.get(value) if isinstance(value, int) else None
        if axis is not None and axis in contract[side]:
            raise Mixed
        if axis is not None:
            place = batch[side].index(axis) if axis in batch[side] else offset + free.index(axis)
            places.add(place)
        offset += len(free)
    if len(places) != 1:
        raise Mixed  # every example meets every other
    place = places.pop()
    for side, value in enumerate(equation.inputs):
        shared = place < len(batch[side]) and not (isinstance(value, int) and value in axes)
        if shared and batch[side][place] in varying_axes(graph, value):
            raise Mixed
    return place


def _convolution(equation: Equation, axes: Mapping[int, int]) -> int:
    params, dims = equation.params, equation.params["dimension_numbers"]
    x, kernel = (axes.get(v) if isinstance(v, int) else None for v in equation.inputs)
    if kernel is not None or x != dims.lhs_spec[0] or params["batch_group_count"] != 1:
        raise Mixed
    return dims.out_spec[0]


Shape = tuple[int, ...]


def _reshape(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    ahead = np.prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and np.prod(after[:place]) == ahead:
            return place
    raise Mixed


def _transpose(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    return params["permutation"].index(axis)


def _broadcast(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    return params["broadcast_dimensions"][axis]


def _reduce(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    if axis in params["axes"]:
        raise Mixed
    return axis - sum(a < axis for a in params["axes"])


def _window(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    one = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    if any(params[name][axis] != 1 for name in one) or any(params["padding"][axis]):
        raise Mixed
    return axis


def _pad(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    if any(params["padding_config"][axis]):
        raise Mixed
    return axis


def _stack(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    return axis + (params["axis"] <= axis)


def _tile(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    if params["reps"][axis] != 1:
        raise Mixed
    return axis


def _untouched(*names: str) -> Callable[[Mapping[str, Any], int, Shape, Shape], int]:
    """A rule for primitives that work along the axes in these parameters."""

    def rule(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
        touched = [np.ravel(params[name]).tolist() for name in names]
        if any(axis in axes for axes in touched) or before[axis] != after[axis]:
            raise Mixed
        return axis

    return rule


_RULES: dict[str, Callable[[Mapping[str, Any], int, Shape, Shape], int]] = {
    **dict.fromkeys(LAYOUT, _reshape),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(CUMULATIVE, _untouched("axis")),
    TRANSPOSE: _transpose,
    BROADCAST: _broadcast,
    SORT: _untouched("dimension"),
    CONCATENATE: _untouched("dimension"),
    SPLIT: _untouched("axis"),
    STACK: _stack,
    TILE: _tile,
    REV: _untouched("dimensions"),
    SLICE: _untouched(),  # a slice touches an axis only by making it shorter
    PAD: _pad,
}
