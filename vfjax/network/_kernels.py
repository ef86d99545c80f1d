"""The weights of a layer, row by row, and sums of squares of the inputs of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._analysis import LinearSite, Traced, View, view_of
from vfjax._jaxpr import INPUT, PARAM, Equation, contraction, evaluate
from vfjax._jaxpr.primitives import CONV, LINEAR, LOOKUPS
from vfjax._types import Array, PyTree
from vfjax.network._checks import named_leaves
from vfjax.network._layout import whole_layout
from vfjax.network._network import Network
from vfjax.network._retrace import traces_of
from vfjax.network._sites import inputs_of
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


class LoopKernel(NamedTuple):
    """A leaf that layers inside a loop multiply by.

    Attributes:
        kind: "conv" or "dense".
        rows: The places of its weights in the flattened leaf, int `[outputs, inputs]`.
    """

    kind: str
    rows: np.ndarray


def loop_kernels(net: Network) -> dict[str, LoopKernel]:
    """The kernels of layers that lie inside loops and so are no layers of the network, by path."""
    traced = traces_of(net).reference
    if not traced.opaque:
        return {}
    graph = traced.graph
    taken = {graph.inputs[site.leaf] for site in traced.layers.values()}
    contracted: dict[int, set[int]] = {}
    kinds: dict[int, str] = {}
    for tie in traced.propagation.ties:
        if tie.primitive in LINEAR and tie.leaf not in taken:
            kinds[tie.leaf] = "conv" if tie.primitive == CONV else "dense"
            axes = contracted.setdefault(tie.leaf, set())
            axes.update([tie.axis] if tie.role == "in" else ())
    kernels = {}
    for leaf, inputs in contracted.items():
        shape = graph.avals[leaf].shape
        kept = [axis for axis in range(len(shape)) if axis not in inputs]
        if inputs and kept:
            places = np.arange(math.prod(shape)).reshape(shape).transpose(*kept, *sorted(inputs))
            rows = places.reshape(math.prod(shape[axis] for axis in kept), -1)
            kernels[traced.paths[graph.inputs.index(leaf)]] = LoopKernel(kinds[leaf], rows)
    return kernels


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
        more: list[Array] = []
        if len(equation.inputs) > 2:  # which rows meet which kernel
            more = _values(net, traced, variables, x, equation.inputs[2:])
        squares.append(_squares(equation, site, avals, [inputs[at], *more], results.get(name)))
    return squares


def _equation(traced: Traced, layer: str) -> Equation:
    return traced.graph.equations[traced.layers[layer].index]


def looked_up(net: Network, paths: Collection[str]) -> tuple[str, ...]:
    """Which of some leaves the input also looks up, as it does tied embeddings, `leaf[ids]`."""
    traced = traces_of(net).reference
    found = {traced.paths[view.leaf] for _, view in _lookups(traced)}
    return tuple(path for path in traced.paths if path in found and path in paths)


def lookup_squares(
    net: Network,
    variables: PyTree,
    x: PyTree,
    paths: Sequence[str],
    valid: Array | None = None,
) -> list[Array]:
    """For each weight, how often it is looked up.

    These are the sums of its squared inputs, as `leaf[ids]` is `one_hot(ids) @ leaf`.

    Args:
        net: The traced network.
        variables: Its parameters.
        x: A batch.
        paths: Paths of leaves, as `looked_up` returns them.
        valid: Which positions of x count, as `valid_at` takes it; None if all do.

    Returns:
        For each leaf an array of its shape, float32.

    Raises:
        ValueError: If what is looked up does not begin with the axes of `valid`.
    """
    if not paths:
        return []
    named = named_leaves(net, variables)
    traced = traces_of(net).at(named, x)
    graph = traced.graph
    uses = [use for use in _lookups(traced) if traced.paths[use[1].leaf] in paths]
    counts = {path: jnp.zeros(np.shape(named[path]), jnp.float32) for path in paths}
    for equation, view in uses:
        where = _values(net, traced, variables, x, equation.inputs[1:])
        path, shape = traced.paths[view.leaf], graph.avals[equation.values[0]].shape

        def total(
            table: Array, equation: Equation = equation, where: Any = where, path: str = path
        ) -> Array:
            result = equation.eqn.primitive.bind(table, *where, **equation.params)
            if valid is not None:
                if result.shape[: valid.ndim] != valid.shape:
                    raise ValueError(
                        f"mask gives booleans of shape {valid.shape}, and what is looked up in "
                        f"'{path}' has shape {result.shape}: its first axes must be the same"
                    )
                apart = (*valid.shape, *[1] * (result.ndim - valid.ndim))
                result = jnp.where(valid.reshape(apart), result, 0)
            return result.sum()

        count = jax.grad(total)(jnp.zeros(shape, jnp.float32))
        if view.slot is None:
            counts[path] += view.backward(count, counts[path].shape)
        else:
            count = view.backward(count, counts[path].shape[1:])
            counts[path] = counts[path].at[view.slot].add(count)
    return [counts[path] for path in paths]


def _lookups(traced: Traced) -> list[tuple[Equation, View]]:
    """The equations by which the input looks entries of a leaf up."""
    graph, found = traced.graph, []
    for equation in graph.equations:
        if equation.primitive in LOOKUPS and equation.depends == PARAM | INPUT:
            table = equation.inputs[0]
            view = view_of(graph, table)
            if view is not None and view.rigid:
                found.append((equation, view))
    return found


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


def _values(
    net: Network, traced: Traced, variables: PyTree, x: PyTree, wanted: Sequence[Any]
) -> list[Array]:
    """Values of a graph by their ids, and literals."""
    leaves = named_leaves(net, variables)
    ids = [v for v in wanted if isinstance(v, int)]
    named = zip(traced.graph.inputs, traced.paths, strict=False)
    env = {v: jnp.asarray(leaves[path]) for v, path in named if path in leaves}
    env |= zip(inputs_of(traced), map(jnp.asarray, jax.tree.leaves(x)), strict=True)
    found = evaluate(traced.graph, env, ids)
    return [found[v] if isinstance(v, int) else jnp.asarray(v.val) for v in wanted]


def _squares(
    equation: Equation,
    site: LinearSite,
    avals: Any,
    operands: Sequence[Array],
    valid: Array | None,
) -> Array:
    params, (x, *more) = dict(equation.params), operands
    x = jnp.square(jnp.abs(x) if jnp.iscomplexobj(x) else x.astype(_wide(x)))
    dtype = _wide(x)
    shape = list(_kernel_aval(equation, site, avals).shape)
    product = contraction(equation.primitive, params)
    if product is not None:
        kept = product.kept(site.side, len(shape))
        shape = [1 if axis in kept else n for axis, n in enumerate(shape)]
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
        result = equation.eqn.primitive.bind(*operands, *more, **params)
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
