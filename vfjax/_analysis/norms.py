"""Normalisations with stored statistics: `(x - mean) * rsqrt(var + eps) * scale + bias`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.extend import core as jex

from vfjax._analysis.views import View, varying_axes, view_of
from vfjax._jaxpr import INPUT, PARAM, Graph
from vfjax._jaxpr.primitives import (
    ADD,
    CAST,
    DIV,
    INTEGER_POW,
    MAX,
    MUL,
    POW,
    PRODUCTS,
    RSQRT,
    SPREAD,
    SQRT,
    SQUARE,
    SUB,
)


@dataclasses.dataclass(frozen=True, eq=False)
class NormSite:
    """A normalisation by stored statistics.

    Attributes:
        index: Index of the equation `x - mean`; its first operand is the norm's input.
        mean: The leaf of means.
        var: The leaf of variances.
        scale: The leaf of scales, or None.
        bias: The leaf of shifts, or None.
        eps: The number added to the variance.
        channel_axes: Axes of the norm's input that the statistics vary along.
    """

    index: int
    mean: View
    var: View
    scale: View | None
    bias: View | None
    eps: float
    channel_axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Factor:
    """One factor of a product of parameters: `(leaf + eps) ** power`; eps is None if not added."""

    view: View
    eps: float | None
    power: float


def norm_sites(graph: Graph) -> list[NormSite]:
    """The normalisations with stored statistics of a graph, in the order of their equations."""
    sites = []
    for index, equation in enumerate(graph.equations):
        if equation.primitive != SUB or len(equation.values) != 2:
            continue
        x, mean = equation.values
        if not graph.depends[x] & INPUT or graph.depends[mean] != PARAM:
            continue
        view = view_of(graph, mean)
        if view is None or graph.avals[equation.result].shape != graph.avals[x].shape:
            continue
        variance = _variance(graph, equation.result, view)
        if variance is None:
            continue
        var, scale, value = variance
        axes = tuple(sorted(varying_axes(graph, mean)))
        shift = _shift(graph, value, axes)
        sites.append(NormSite(index, view, var.view, scale, shift, var.eps or 0.0, axes))
    return sites


def _variance(graph: Graph, value: int, mean: View) -> tuple[_Factor, View | None, int] | None:
    """Follows `x - mean` through products with `(var + eps) ** -0.5` and maybe a scale."""
    var: _Factor | None = None
    scale: View | None = None
    for _ in range(6):
        users = graph.users.get(value, ())
        if len(users) != 1 or value in graph.output_ids:
            break
        equation = graph.equations[users[0]]
        if equation.primitive not in CAST:
            if equation.primitive not in PRODUCTS or len(equation.values) != 2:
                break
            left, right = equation.values
            other = right if left == value else left
            if graph.depends[other] != PARAM:
                break
            if equation.primitive == DIV and left != value:
                break
            for factor in _factors(graph, other, 1.0 if equation.primitive == MUL else -1.0):
                if factor.power == -0.5 and var is None and _alike(graph, factor.view, mean):
                    var = factor
                elif factor.power == 1.0 and factor.eps is None and scale is None:
                    scale = factor.view
        value = equation.result
    return None if var is None else (var, scale, value)


def _alike(graph: Graph, a: View, b: View) -> bool:
    """Whether two views may be mean and variance of one norm: other leaves, same shape and slot."""
    shapes = [graph.avals[graph.inputs[v.leaf]].shape for v in (a, b)]
    return shapes[0] == shapes[1] and a.slot == b.slot and a.leaf != b.leaf


def _factors(graph: Graph, value: Any, power: float) -> list[_Factor]:
    """Splits a power of a parameter-only value into factors that are leaves, where possible."""
    if not isinstance(value, int):
        return []
    view = view_of(graph, value)
    if view is not None:
        return [_Factor(view, None, power)]
    if value not in graph.producer:
        return []
    equation = graph.equations[graph.producer[value]]
    name, operands = equation.primitive, equation.inputs
    if name in SPREAD:
        return _factors(graph, operands[0], power)
    if name == MUL:
        return [f for v in operands for f in _factors(graph, v, power)]
    if name == DIV:
        return _factors(graph, operands[0], power) + _factors(graph, operands[1], -power)
    if name in ADD:
        numbers = [_number(graph, v) for v in operands]
        leaves = [v for v, n in zip(operands, numbers, strict=True) if n is None]
        view = view_of(graph, leaves[0]) if len(leaves) == 1 else None
        if view is None and len(leaves) == 1:
            view = _clamped(graph, leaves[0])
        eps = next((n for n in numbers if n is not None), None)
        return [] if view is None or eps is None else [_Factor(view, eps, power)]
    if name == MAX:
        view = _clamped(graph, value)
        return [] if view is None else [_Factor(view, 0.0, power)]
    exponent = {SQRT: 0.5, RSQRT: -0.5, SQUARE: 2.0}.get(name)
    if name == INTEGER_POW:
        exponent = equation.params["y"]
    elif name == POW:
        exponent = _number(graph, operands[1])
    return [] if exponent is None else _factors(graph, operands[0], power * exponent)


def _clamped(graph: Graph, value: Any) -> View | None:
    """The leaf in `maximum(leaf, number)`, seen through layout: a variance kept nonnegative."""
    while value in graph.producer:
        equation = graph.equations[graph.producer[value]]
        if equation.primitive == MAX:
            leaves = [v for v in equation.inputs if _number(graph, v) is None]
            return view_of(graph, leaves[0]) if len(leaves) == 1 else None
        if equation.primitive not in SPREAD or not isinstance(equation.inputs[0], int):
            return None
        value = equation.inputs[0]
    return None


def _number(graph: Graph, value: Any) -> float | None:
    """The number in a literal or a uniform constant, or None."""
    for _ in range(4):
        if isinstance(value, jex.Literal):
            array = np.ravel(np.asarray(value.val))
            return float(array[0]) if array.size and (array == array[0]).all() else None
        if value in graph.consts:
            array = np.ravel(np.asarray(graph.consts[value]))
            return float(array[0]) if array.size and (array == array[0]).all() else None
        if value not in graph.producer or graph.depends[value]:
            return None
        equation = graph.equations[graph.producer[value]]
        if equation.primitive not in SPREAD:
            return None
        value = equation.inputs[0]
    return None


def _shift(graph: Graph, value: int, axes: tuple[int, ...]) -> View | None:
    """The leaf that is added to the normalised value along its channels, if any."""
    for _ in range(3):
        users = graph.users.get(value, ())
        if len(users) != 1 or value in graph.output_ids:
            return None
        equation = graph.equations[users[0]]
        if equation.primitive in CAST:
            value = equation.result
            continue
        if equation.primitive not in ADD:
            return None
        others = [v for v in equation.values if v != value]
        if len(others) != 1 or graph.depends[others[0]] != PARAM:
            return None
        if not varying_axes(graph, others[0]) <= set(axes):
            return None
        return view_of(graph, others[0])
    return None
