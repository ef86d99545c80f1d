"""Whether a network treats every example by itself, so that a batch may be computed in pieces.

The batch axis of the input is followed through the graph, equation by equation. A network that
mixes examples (batch statistics, an attention over the batch) is told, and so is every primitive
that is not known here: the answer is yes only where it is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vfjax import _taps
from vfjax._graph import INPUT, Equation, Graph
from vfjax._views import CAST, ELEMENTWISE, LAYOUT, REDUCTIONS, varying_axes


class _Mixed(Exception):
    """Examples meet, or may meet."""


def apart(graph: Graph) -> bool:
    """Whether every value of a graph holds its examples apart, along one axis of each.

    Args:
        graph: A network's graph at a batch of two or more, batch axis first in every input.
    """
    axes = dict.fromkeys(graph.inputs[graph.num_leaves :], 0)
    try:
        for equation in graph.equations:
            if not equation.depends & INPUT:
                continue
            axis = _axis(graph, equation, axes)
            axes.update((value, axis) for value in equation.results)
    except _Mixed:
        return False
    return all(axes.get(value) == 0 for value in graph.output_ids)


def _axis(graph: Graph, equation: Equation, axes: Mapping[int, int]) -> int:
    """The batch axis of an equation's results; raises `_Mixed` where there is none."""
    name = equation.primitive
    if name == "dot_general":
        return _dot(graph, equation, axes)
    if name == "conv_general_dilated":
        return _convolution(equation, axes)
    found = {axes[v] for v in equation.values if v in axes}
    if len(found) != 1:
        raise _Mixed
    axis = found.pop()
    for value in equation.values:
        # What does not depend on the input may be laid out along the batch, but not vary there.
        if value not in axes and axis in varying_axes(graph, value):
            raise _Mixed
    if name in CAST | ELEMENTWISE or _taps.is_elementwise(equation):
        return axis
    rule = _RULES.get(name)
    if rule is None:
        raise _Mixed
    before = graph.avals[equation.values[0]].shape
    return rule(equation.params, axis, before, graph.avals[equation.result].shape)


def _dot(graph: Graph, equation: Equation, axes: Mapping[int, int]) -> int:
    contract, batch = equation.params["dimension_numbers"]
    found = set()
    offset = len(batch[0])
    for side, value in enumerate(equation.inputs):
        shape = equation.eqn.invars[side].aval.shape
        free = [a for a in range(len(shape)) if a not in contract[side] and a not in batch[side]]
        axis = axes.get(value) if isinstance(value, int) else None
        if axis is not None and axis in contract[side]:
            raise _Mixed
        if axis is not None:
            place = batch[side].index(axis) if axis in batch[side] else offset + free.index(axis)
            found.add(place)
        offset += len(free)
    if len(found) != 1:
        raise _Mixed  # every example with every other
    place = found.pop()
    for side, value in enumerate(equation.inputs):
        shared = place < len(batch[side]) and not (isinstance(value, int) and value in axes)
        if shared and batch[side][place] in varying_axes(graph, value):
            raise _Mixed
    return place


def _convolution(equation: Equation, axes: Mapping[int, int]) -> int:
    params, dims = equation.params, equation.params["dimension_numbers"]
    x, kernel = (axes.get(v) if isinstance(v, int) else None for v in equation.inputs)
    if kernel is not None or x != dims.lhs_spec[0] or params["batch_group_count"] != 1:
        raise _Mixed
    return dims.out_spec[0]


Shape = tuple[int, ...]


def _reshape(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    ahead = np.prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and np.prod(after[:place]) == ahead:
            return place
    raise _Mixed


def _transpose(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    return params["permutation"].index(axis)


def _broadcast(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    return params["broadcast_dimensions"][axis]


def _reduce(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    if axis in params["axes"]:
        raise _Mixed
    return axis - sum(a < axis for a in params["axes"])


def _window(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    alone = params["window_dimensions"][axis] == params["window_strides"][axis] == 1
    if not alone or before[axis] != after[axis]:
        raise _Mixed
    return axis


def _pad(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
    if any(params["padding_config"][axis]):
        raise _Mixed
    return axis


def _untouched(*names: str) -> Callable[[Mapping[str, Any], int, Shape, Shape], int]:
    """A rule for primitives that work along the axes which these parameters name."""

    def rule(params: Mapping[str, Any], axis: int, before: Shape, after: Shape) -> int:
        touched = [np.ravel(params[name]).tolist() for name in names]
        if any(axis in found for found in touched) or before[axis] != after[axis]:
            raise _Mixed
        return axis

    return rule


_RULES: dict[str, Callable[[Mapping[str, Any], int, Shape, Shape], int]] = {
    **dict.fromkeys(LAYOUT, _reshape),
    **dict.fromkeys(REDUCTIONS | {"argmin"}, _reduce),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _window),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _untouched("axis")),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "sort": _untouched("dimension"),
    "concatenate": _untouched("dimension"),
    "split": _untouched("axis"),
    "rev": _untouched("dimensions"),
    "slice": _untouched(),  # which touches an axis only by making it shorter
    "pad": _pad,
}
