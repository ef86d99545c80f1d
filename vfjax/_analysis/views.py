"""Parameter leaves seen through casts and layout, and axes along which values vary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vfjax._jaxpr import Equation, Graph
from vfjax._jaxpr.primitives import (
    BROADCAST,
    CAST,
    ELEMENTWISE,
    LAYOUT,
    RESHAPE,
    REV,
    SLICE,
    SQUEEZE,
    TRANSPOSE,
)

Steps = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A parameter leaf seen through casts, transposes, reshapes, reversals and broadcasts.

    Attributes:
        leaf: Index of the leaf among the variables' leaves.
        slot: Index of a slice of the leaf, if a scan over stacked layers was unrolled, else None.
        steps: `("reshape", shape)`, `("transpose", permutation)`, `("rev", dims)` or
            `("broadcast_in_dim", (shape, dims))`, applied in this order to the leaf (or to its
            slice).
    """

    leaf: int
    slot: int | None
    steps: Steps

    @property
    def rigid(self) -> bool:
        """Whether each entry of the leaf is seen exactly once."""
        return all(kind != BROADCAST for kind, _ in self.steps)

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Transforms an array of the leaf's (or slice's) shape to the operand's shape."""
        for kind, how in self.steps:
            if kind == RESHAPE:
                array = array.reshape(how)
            elif kind == TRANSPOSE:
                array = array.transpose(how)
            elif kind == REV:
                array = array[_reversed(how, array.ndim)]
            else:
                shape, dims = how
                expanded = [1] * len(shape)
                for source, target in enumerate(dims):
                    expanded[target] = array.shape[source]
                array = np.broadcast_to(array.reshape(expanded), known(shape))
        return array

    def backward(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Transforms an array of the operand's shape back to the leaf's; needs a rigid view."""
        shapes = [shape]
        for kind, how in self.steps:
            last = shapes[-1]
            if kind == TRANSPOSE:
                shapes.append(tuple(last[i] for i in how))
            else:
                shapes.append(tuple(how) if kind == RESHAPE else last)
        for (kind, how), before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            if kind == REV:
                array = array[_reversed(how, array.ndim)]
            elif kind == RESHAPE:
                array = array.reshape(before)
            else:
                array = array.transpose(np.argsort(how))
        return array


def _reversed(dims: Sequence[int], rank: int) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if k in dims else None) for k in range(rank))


def known(shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape for NumPy: in place of a symbolic size, which no leaf varies along, stands a 2."""
    return tuple(n if isinstance(n, int) else 2 for n in shape)


def view_of(graph: Graph, value: Any) -> View | None:
    """A value as a leaf seen through casts and layout, or None if it is more than that."""
    steps: list[tuple[str, Any]] = []
    slot, squeezed = None, False
    while isinstance(value, int) and value in graph.producer:
        equation = graph.equations[graph.producer[value]]
        name, params = equation.primitive, equation.params
        if len(equation.inputs) != 1 or (slot is not None and name not in CAST):
            return None
        source = equation.inputs[0]
        if name in CAST:
            pass
        elif name == SLICE and squeezed and slot_of(graph, equation) is not None:
            # One step of an unrolled scan over stacked layers, or a `stacked[3]` in the user's
            # code.
            slot = slot_of(graph, equation)
            steps.pop()
        elif name == REV:
            steps.append((REV, tuple(params["dimensions"])))
        elif name in LAYOUT or name == BROADCAST:
            steps.append(step_of(graph, equation))
        else:
            return None
        if name not in CAST:
            squeezed = name == SQUEEZE and tuple(params["dimensions"]) == (0,)
        value = source
    if value not in graph.inputs[: graph.num_leaves]:
        return None
    return View(graph.inputs.index(value), slot, tuple(reversed(steps)))


def step_of(graph: Graph, equation: Equation) -> tuple[str, Any]:
    """What an equation of layout or a broadcast does, as a step of a `View`."""
    name, params, shape = equation.primitive, equation.params, graph.avals[equation.result].shape
    if name == TRANSPOSE:
        return TRANSPOSE, tuple(params["permutation"])
    if name == BROADCAST and _size(shape) != _size(_aval(graph, equation.inputs[0]).shape):
        return BROADCAST, (tuple(shape), tuple(params["broadcast_dimensions"]))
    return RESHAPE, tuple(shape)


def slot_of(graph: Graph, equation: Equation) -> int | None:
    """The index along axis 0 of a slice that takes one whole entry, else None."""
    if equation.primitive != SLICE:
        return None
    shape = graph.avals[equation.values[0]].shape
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    if any((a, b) != (0, n) for a, b, n in zip(start[1:], limit[1:], shape[1:], strict=True)):
        return None
    return start[0] if limit[0] - start[0] == 1 else None


def blocks_of(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Splits a reshape into the smallest runs of axes, before and after, of equal size."""
    i = j = 0
    blocks = []
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
        blocks.append((tuple(block_in), tuple(block_out)))
    return blocks


def varying_axes(graph: Graph, value: Any) -> frozenset[int]:
    """Axes along which a value may vary; a broadcast axis does not."""
    if not isinstance(value, int):
        return frozenset()
    shape = graph.avals[value].shape
    full = frozenset(i for i, n in enumerate(shape) if n > 1)
    if value not in graph.producer:
        return full
    equation = graph.equations[graph.producer[value]]
    name, params = equation.primitive, equation.params
    if name in ELEMENTWISE:
        # jax 0.12 broadcasts dimensions of size one inside the primitive; they do not vary there.
        parts = [varying_axes(graph, v) for v in equation.inputs if np.ndim(_aval(graph, v))]
        return frozenset().union(*parts)
    if name == BROADCAST:
        inner, dims = varying_axes(graph, equation.inputs[0]), params["broadcast_dimensions"]
        return frozenset(int(dims[i]) for i in inner if shape[dims[i]] > 1)
    if name == TRANSPOSE:
        inner = varying_axes(graph, equation.inputs[0])
        return frozenset(k for k, p in enumerate(params["permutation"]) if p in inner)
    if name in LAYOUT:
        inner = varying_axes(graph, equation.inputs[0])
        blocks = blocks_of(_aval(graph, equation.inputs[0]).shape, shape)
        return full & {k for source, target in blocks if inner & set(source) for k in target}
    return full


def _aval(graph: Graph, value: Any) -> Any:
    return graph.avals[value] if isinstance(value, int) else value.aval


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape))
