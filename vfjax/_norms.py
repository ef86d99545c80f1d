"""Finding normalisation with stored statistics, `(x - mean) * rsqrt(var + eps) * scale + bias`, in a graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.extend import core as jex

from vfjax._graph import INPUT, PARAM, Graph
from vfjax._sites import CAST, ELEMENTWISE, View, varying_axes, view_of

_ROOTS = frozenset({"sqrt", "rsqrt", "pow", "integer_pow"})


@dataclasses.dataclass(frozen=True, eq=False)
class NormSite:
    """A normalisation by stored statistics.

    Attributes:
        index: Index of the equation `x - mean`; its first operand is the norm's input.
        mean: The leaf of means.
        var: The leaf of variances.
        scale: The leaf of scales, or None.
        bias: The leaf of shifts, or None.
        eps: What is added to the variance.
        channel_axes: Axes of the norm's input that the statistics vary along.
    """

    index: int
    mean: View
    var: View
    scale: View | None
    bias: View | None
    eps: float
    channel_axes: tuple[int, ...]


def norm_sites(graph: Graph) -> list[NormSite]:
    """The normalisations with stored statistics of a graph, in the order of their equations."""
    sites = []
    for index, equation in enumerate(graph.equations):
        if equation.primitive != "sub" or not all(isinstance(v, int) for v in equation.inputs):
            continue
        x, mean = equation.inputs
        if not graph.depends[x] & INPUT or graph.depends[mean] != PARAM:
            continue
        view = view_of(graph, mean)
        if view is None:
            continue
        found = _variance(graph, equation.outputs[0], view)
        if found is None:
            continue
        var, scale, eps, value = found
        axes = tuple(sorted(varying_axes(graph, mean)))
        sites.append(NormSite(index, view, var, scale, _shift(graph, value), eps, axes))
    return sites


def _variance(graph: Graph, value: int, mean: View) -> tuple[View, View | None, float, int] | None:
    """Follows `x - mean` through multiplications until one of them holds `rsqrt(var + eps)`."""
    var: View | None = None
    scale: View | None = None
    eps = 0.0
    for _ in range(4):
        users = [u for u in graph.users.get(value, ())]
        if len(users) != 1:
            break
        equation = graph.equations[users[0]]
        if equation.primitive in CAST:
            value = equation.outputs[0]
            continue
        if equation.primitive not in ("mul", "div") or len(equation.values) != 2:
            break
        other = equation.inputs[1] if equation.inputs[0] == value else equation.inputs[0]
        if not isinstance(other, int) or graph.depends[other] != PARAM:
            break
        if equation.primitive == "div" and equation.inputs[0] != value:
            break
        roots, factors = _factors(graph, other)
        for root in roots:
            leaf, added = root
            if _shape(graph, leaf) == _shape(graph, mean) and var is None:
                var, eps = leaf, added
        if len(factors) == 1 and scale is None:
            scale = factors[0]
        value = equation.outputs[0]
    return None if var is None else (var, scale, eps, value)


def _shape(graph: Graph, view: View) -> tuple[int, ...]:
    return graph.avals[graph.inputs[view.leaf]].shape


def _factors(graph: Graph, value: int) -> tuple[list[tuple[View, float]], list[View]]:
    """Splits a parameter-only value into roots of `leaf + eps` and plain leaves."""
    view = view_of(graph, value)
    if view is not None:
        return [], [view]
    roots: list[tuple[View, float]] = []
    factors: list[View] = []
    todo = [value]
    while todo:
        current = todo.pop()
        view = view_of(graph, current)
        if view is not None:
            factors.append(view)
            continue
        if current not in graph.producer:
            continue
        equation = graph.equations[graph.producer[current]]
        if equation.primitive in _ROOTS and (root := _root(graph, equation.inputs[0])):
            roots.append(root)
        elif equation.primitive in ("mul", "div") or equation.primitive not in ELEMENTWISE:
            todo.extend(equation.values)
        elif equation.primitive in CAST:
            todo.extend(equation.values)
    return roots, factors


def _root(graph: Graph, value: Any) -> tuple[View, float] | None:
    """The leaf and the eps of `leaf + eps`, or of a plain leaf."""
    for _ in range(8):
        if not isinstance(value, int):
            return None
        view = view_of(graph, value)
        if view is not None:
            return view, 0.0
        if value not in graph.producer:
            return None
        equation = graph.equations[graph.producer[value]]
        if equation.primitive in ("add", "add_any"):
            numbers = [_number(graph, v) for v in equation.inputs]
            leaves = [v for v, n in zip(equation.inputs, numbers, strict=True) if n is None]
            if len(leaves) != 1 or (view := view_of(graph, leaves[0])) is None:
                return None
            return view, float(next(n for n in numbers if n is not None))
        if equation.primitive == "max":  # a variance kept above zero
            leaves = [v for v in equation.inputs if _number(graph, v) is None]
            value = leaves[0] if len(leaves) == 1 else None
        elif len(equation.values) == 1:
            value = equation.values[0]
        else:
            return None
    return None


def _number(graph: Graph, value: Any) -> float | None:
    """The number that a literal or a uniform constant holds, or None."""
    for _ in range(4):
        if isinstance(value, jex.Literal):
            return float(np.ravel(np.asarray(value.val))[0])
        if value in graph.consts:
            array = np.ravel(np.asarray(graph.consts[value]))
            return float(array[0]) if array.size and (array == array[0]).all() else None
        if value not in graph.producer or graph.depends[value]:
            return None
        equation = graph.equations[graph.producer[value]]
        if equation.primitive not in CAST | {"broadcast_in_dim", "reshape"}:
            return None
        value = equation.inputs[0]
    return None


def _shift(graph: Graph, value: int) -> View | None:
    """The leaf that is added to the normalised value, if any."""
    for _ in range(3):
        users = graph.users.get(value, ())
        if len(users) != 1:
            return None
        equation = graph.equations[users[0]]
        if equation.primitive in CAST:
            value = equation.outputs[0]
            continue
        if equation.primitive not in ("add", "add_any"):
            return None
        others = [v for v in equation.values if v != value]
        if len(others) != 1 or graph.depends[others[0]] != PARAM:
            return None
        return view_of(graph, others[0])
    return None
