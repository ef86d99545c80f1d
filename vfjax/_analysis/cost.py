"""The cost of an equation: its operations, counted as torchstat counts those of modules."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from vfjax._jaxpr import INPUT, Graph, contraction, is_elementwise
from vfjax._jaxpr.primitives import ACTIVATIONS, CONV, CUSTOM, POOLS


def equation_flops(
    graph: Graph, index: int, conv_biases: Collection[int], norms: Collection[int]
) -> int:
    """Operations of one equation over the whole batch, counted as torchstat counts modules.

    A multiply-accumulate counts once; a convolution's bias, an activation and a pool's or
    mean's input count one per element, a normalisation by stored statistics two; everything
    else is free.

    Args:
        graph: The flat graph.
        index: Which of its equations.
        conv_biases: Indices of equations that add a convolution's bias.
        norms: Indices of the first equations of normalisations by stored statistics.
    """
    equation = graph.equations[index]
    if not equation.depends & INPUT:
        return 0
    sizes = [int(np.prod(graph.avals[v].shape)) for v in equation.values]
    out = int(np.prod(graph.avals[next(v for v in equation.outputs if v is not None)].shape))
    name = equation.primitive
    if (product := contraction(name, equation.params)) is not None:
        shape = equation.eqn.invars[0].aval.shape
        return out * int(np.prod([shape[a] for a in product.contract[0]]))
    if name == CONV:
        dims = equation.params["dimension_numbers"]
        kernel = equation.eqn.invars[1].aval.shape
        return out * int(np.prod(kernel)) // kernel[dims.rhs_spec[0]]
    if index in conv_biases:
        return out
    if index in norms:
        return 2 * out
    if name in POOLS:
        return max(sizes)
    if name in ACTIVATIONS or (name in CUSTOM and is_elementwise(equation)):
        return out
    return 0
