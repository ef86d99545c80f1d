"""Leaves that act outside of layers, norms and biases, and weights that were closed over."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from vfjax._analysis.layers import LinearSite
from vfjax._analysis.norms import NormSite
from vfjax._jaxpr import INPUT, PARAM, Graph
from vfjax._jaxpr.primitives import (
    LINEAR,
    MOMENTS,
    PRODUCTS,
    REDUCTIONS,
    ROOTS,
    SPREAD,
    SUMS,
)


def leaves_outside(
    graph: Graph, layers: Iterable[LinearSite], norms: Iterable[NormSite]
) -> list[tuple[int, str, str]]:
    """Leaves that meet the input outside of kernels, biases and normalisations.

    Examples are positional and token embeddings, layer scales and gates: permutations follow them,
    but corrections and the removal of biases do not reach them.

    Args:
        graph: The graph.
        layers: Its layers.
        norms: Its normalisations with stored statistics. Those by moments of the input, such as
            LayerNorm, are recognised here.

    Returns:
        `(index of the leaf, primitive, file:line)`, once each, in the order of the equations.
    """
    kernels = {site.index: site.side for site in layers}
    biases = {site.bias_equation for site in layers}
    known = {index for site in norms for index in site.equations}
    normalised: set[int] = set()
    moments = _moments(graph)
    uses: dict[tuple[int, str, str], None] = {}
    for index, equation in enumerate(graph.equations):
        if not equation.depends & INPUT:
            continue
        name, inputs = equation.primitive, equation.inputs
        within = normalised & set(equation.values)
        is_root = name in ROOTS and moments & set(equation.values)
        if index in known or is_root or (within and (name in PRODUCTS or name in SPREAD)):
            normalised.update(v for v in equation.outputs if v is not None)
        if index in biases | known or (within and name in PRODUCTS | SUMS):
            continue
        for k, value in enumerate(inputs):
            if not isinstance(value, int) or graph.depends[value] != PARAM:
                continue
            if kernels.get(index) != k:
                uses |= {(leaf, name, equation.where): None for leaf in _leaves(graph, value)}
    for value in graph.output_ids:
        if graph.depends[value] == PARAM:
            uses |= {(leaf, "output", "unknown"): None for leaf in _leaves(graph, value)}
    return list(uses)


def _leaves(graph: Graph, value: int) -> list[int]:
    read = {v for i in graph.needed([value], ()) for v in graph.equations[i].values} | {value}
    return [k for k, v in enumerate(graph.inputs[: graph.num_leaves]) if v in read]


def _moments(graph: Graph) -> set[int]:
    """Values computed from reductions of input-dependent values, entry by entry."""
    moments: set[int] = set()
    for equation in graph.equations:
        if not equation.depends & INPUT:
            continue
        name = equation.primitive
        reading = [v for v in equation.values if graph.depends[v] & INPUT]
        keeps = name in SPREAD | PRODUCTS | SUMS | ROOTS | MOMENTS
        if name in REDUCTIONS or (keeps and moments.issuperset(reading)):
            moments.update(v for v in equation.outputs if v is not None)
    return moments


def closed_over(graph: Graph) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Linear equations of the input and a constant array that was closed over, not computed.

    Yields:
        `(shape of the constant, primitive, file:line)`.
    """
    for equation in graph.equations:
        if equation.primitive not in LINEAR or not equation.depends & INPUT:
            continue
        for value, var in zip(equation.inputs, equation.eqn.invars, strict=True):
            if isinstance(value, int) and graph.depends[value]:
                continue
            if not jnp.issubdtype(var.aval.dtype, jnp.inexact) or not _given(graph, value):
                continue
            yield var.aval.shape, equation.primitive, equation.where


def _given(graph: Graph, value: int | jex.Literal) -> bool:
    """Whether an array of numbers went into a constant, not only an iota or a fill."""
    if not isinstance(value, int):
        return np.ndim(value.val) > 0
    read = {v for i in graph.needed([value], ()) for v in graph.equations[i].values} | {value}
    return any(np.ndim(graph.consts[v]) > 0 for v in read if v in graph.consts)


def report_statistics(traced: Any) -> None:
    """Warns if leaves act as statistics of norms that are not recognised.

    Args:
        traced: A `Traced`.
    """
    if traced.unrecognised:
        warnings.warn(
            f"{listed_statistics(traced.unrecognised)}. If they are stored statistics, no norm in "
            "net.norms has them: renorm.reset cannot renew them, and weight matching counts them "
            "as weights. Write the norm as (x - mean) * rsqrt(var + eps) * scale + bias, with "
            "leaves or multiples of leaves as mean and var.",
            stacklevel=4,
        )


def listed_statistics(leaves: Sequence[tuple[str, str, str]]) -> str:
    """A clause that names leaves of `Traced.unrecognised`, and what they do."""
    shown = [f"'{path}' {verb} an activation at {where}" for path, verb, where in leaves[:3]]
    return ", ".join(shown) + (f" (and {len(leaves) - 3} more)" if len(leaves) > 3 else "")


def report_missing_layers(traced: Any) -> None:
    """Raises or warns if the network has no layers, or multiplies by constants instead.

    Args:
        traced: A `Traced`.

    Raises:
        ValueError: If all weights are closed over.

    Warns:
        UserWarning: If there are no layers, or some layers have constant weights.
    """
    closed = [f"{shape} at {where}" for shape, _, where in closed_over(traced.graph)]
    some = ", ".join(closed[:3]) + (" and more" if len(closed) > 3 else "")
    remedy = "Pass weights in `variables`: `apply_fn = lambda variables, x: ...`."
    if closed and not traced.layers:
        raise ValueError(
            "apply_fn reads no layer's weights from variables, but multiplies its input by the "
            f"constant arrays {some}: the weights are closed over. {remedy}"
        )
    if closed:
        warnings.warn(
            f"apply_fn multiplies by the constant arrays {some}, which no merge can reach. If they "
            f"are trained: {remedy}",
            stacklevel=4,
        )
    if not traced.layers:
        inside = f" Layers may lie inside {list(traced.opaque)}." if traced.opaque else ""
        warnings.warn(
            "The network has no layers: nowhere do parameters meet the input in a matrix product "
            f"or convolution.{inside}",
            stacklevel=4,
        )
