"""The weights of a layer, row by row, and sums of squares of the inputs of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._analysis import LinearSite, Traced
from vfjax._jaxpr import Equation, evaluate
from vfjax._jaxpr.primitives import CONV, DOT
from vfjax._types import Array, PyTree
from vfjax.network._checks import named_leaves
from vfjax.network._layout import whole_layout
from vfjax.network._network import Network
from vfjax.network._retrace import traces_of
from vfjax.network._valid import valid_at, valid_results


def kernel_rows(net: Network, layer: str) -> np.ndarray:
    """Where the weights of a layer lie in its kernel's flattened leaf.

    Args:
        net: The traced network.
        layer: Name of a layer whose kernel is a leaf.

    Returns:
        int `[outputs, inputs]`: a row for each output channel, with the kernel's other axes as the
        layer uses them, row-major.
    """
    traced = traces_of(net).reference
    site = traced.layers[layer]
    assert site.kernel is not None
    aval = traced.graph.avals[traced.graph.inputs[site.kernel.leaf]]
    places = np.arange(aval.size).reshape(aval.shape)
    if site.kernel.slot is not None:
        places = places[site.kernel.slot]
    return _by_output(site, site.kernel.forward(places))


def input_squares(
    net: Network,
    variables: PyTree,
    x: PyTree,
    layers: Sequence[str],
    valid: Array | None = None,
) -> list[Array]:
    """For each weight the sum of its squared inputs, over examples and positions.

    This is the gradient with respect to the kernel of the summed output of the layer on its squared
    input. It is the same for all outputs (of a feature group), so it is computed for one.

    Args:
        net: The traced network.
        variables: Its parameters.
        x: A batch.
        layers: Names of layers.
        valid: Which positions of x count, as `valid_at` takes it; None if all do.

    Returns:
        For each layer an array like the kernel operand, of size one along axes that `spread`
        repeats.
    """
    sites = [f"{name}:in" for name in layers]
    _, inputs = net.run(variables, x, capture=sites)
    if valid is not None:
        counts = valid_at(net, [whole_layout(net, at) for at in sites], valid)
        inputs = {at: jnp.where(counts[at], inputs[at], 0) for at in sites}
    traced = traces_of(net).at(named_leaves(net, variables), x)
    # A convolution also looks from positions that do not count at those that do.
    looking = [name for name in layers if _equation(traced, name).primitive == CONV]
    results = {} if valid is None else valid_results(net, looking, valid)
    squares = []
    for name, at in zip(layers, sites, strict=True):
        site = traced.layers[name]
        equation, avals = _equation(traced, name), traced.graph.avals
        squares.append(_squares(equation, site, avals, inputs[at], results.get(name)))
    return squares


def _equation(traced: Traced, layer: str) -> Equation:
    return traced.graph.equations[traced.layers[layer].index]


def spread(net: Network, layer: str, squares: Any) -> np.ndarray:
    """The result of `input_squares` for a layer, repeated for each of its weights.

    Args:
        net: The traced network.
        layer: Name of the layer.
        squares: That layer's entry in the result of `input_squares`.

    Returns:
        float64 `[outputs, inputs]`, in the order of `kernel_rows`.
    """
    traced = traces_of(net).reference
    site = traced.layers[layer]
    equation = traced.graph.equations[site.index]
    shape = _kernel_aval(equation, site, traced.graph.avals).shape
    squares = np.asarray(squares, np.float64)
    for axis, size in enumerate(shape):
        squares = np.repeat(squares, size // squares.shape[axis], axis)
    return _by_output(site, squares)


def _by_output(site: LinearSite, operand: np.ndarray) -> np.ndarray:
    """A kernel operand as `[outputs, inputs]`."""
    first = range(len(site.out_axes))
    moved = np.moveaxis(operand, site.out_axes, first)
    outputs = int(np.prod(moved.shape[: len(site.out_axes)]))
    return moved.reshape(outputs, -1)


def _kernel_aval(equation: Equation, site: LinearSite, avals: Any) -> Any:
    value = equation.inputs[site.side]
    assert isinstance(value, int)
    return avals[value]


def _squares(
    equation: Equation, site: LinearSite, avals: Any, x: Array, valid: Array | None
) -> Array:
    params = dict(equation.params)
    x = jnp.square(jnp.abs(x) if jnp.iscomplexobj(x) else x.astype(_wide(x)))
    dtype = _wide(x)
    shape = list(_kernel_aval(equation, site, avals).shape)
    if equation.primitive == DOT:
        contract, batch = params["dimension_numbers"]
        tied = {*contract[site.side], *batch[site.side]}
        shape = [n if axis in tied else 1 for axis, n in enumerate(shape)]
    elif params["batch_group_count"] == 1:
        numbers = params["dimension_numbers"]
        if site.side == 1:
            shape[numbers.rhs_spec[0]] = params["feature_group_count"]
        else:  # the kernel is the left operand
            shape[numbers.lhs_spec[0]] = 1
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = dtype

    def total(kernel: Array) -> Array:
        operands = [x.astype(dtype)] * 2
        operands[site.side] = kernel
        result = equation.eqn.primitive.bind(*operands, **params)
        return (result if valid is None else jnp.where(valid, result, 0)).sum()

    return jax.grad(total)(jnp.zeros(shape, dtype))


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def kernels(net: Network, leaves: Mapping[str, Any], names: Sequence[str]) -> list[np.ndarray]:
    """The kernels of layers as the layers use them, including masks and sums: `[n]` each.

    Args:
        net: The traced network.
        leaves: Leaves of its variables by path; those that these layers do not read may be missing.
        names: Names of the layers.
    """
    traced = traces_of(net).reference
    graph = traced.graph
    sites = [traced.layers[name] for name in names]
    operands = [graph.equations[site.index].values[site.side] for site in sites]
    # Most kernels are leaves as they are: nothing is computed then, or put on a device.
    read = {v for index in graph.needed(operands, ()) for v in graph.equations[index].values}
    env = {}
    for value, path in zip(graph.inputs, traced.paths, strict=False):
        if path in leaves and (value in read or value in operands):
            env[value] = jnp.asarray(leaves[path]) if value in read else leaves[path]
    values = evaluate(graph, env, operands)
    found = (np.ravel(np.asarray(values[operand])) for operand in operands)
    return [a.astype(np.promote_types(a.dtype, np.float64)) for a in found]
