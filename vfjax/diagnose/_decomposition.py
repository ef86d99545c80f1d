"""Exact decomposition of linear networks: the feature, and the contribution of each bias.

In a network of linear layers every value is `f(x) = g(x) + h`, where g is linear in the input and h
is the sum of what each bias contributes ("Vanishing Feature: Diagnosing Model Merging and Beyond",
section on linear networks). `decompose` computes these for any traced network that is affine,
whatever its structure; `decompose_matrices` does so for chains of matrices, with or without
residual connections.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vfjax._passes import batches, compiled
from vfjax._trees import flatten_named
from vfjax._types import Array, PyTree
from vfjax.diagnose._rows import zero_example
from vfjax.diagnose._sites import resolve_sites
from vfjax.merge._merged import Merged
from vfjax.network._arguments import check_net, fitting
from vfjax.network._inside import Part, added_parts, reaches, why_not_affine
from vfjax.network._network import Network
from vfjax.network._sites import Sites


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Decomposition:
    """Features and offsets of a linear network at every site, on n examples.

    A pytree; arrays are float32 or better. `value = feature + offset` and
    `offset = sum(contributions) + rest` hold up to float rounding of `value`: the parts are
    computed separately, not as differences of large numbers. Parts of one example have an axis of
    size 1 in place of the axis of examples.

    Attributes:
        value: By site, `f(x)`, n examples.
        feature: By site, `g(x) = f(x) - f(0)`, n examples; linear in x.
        offset: By site, `h = f(0)`, one example.
        contributions: By site and bias, the value that this bias alone gives at the input 0, one
            example. Biases are the leaves that are added (or subtracted, as the stored means of
            norms) on the way to the site, by path (`path[3]` in stacked layers).
        rest: By site, the value at the input 0 without any of these biases, one example; nonzero
            only where constants or other leaves are added.
    """

    value: dict[str, Array]
    feature: dict[str, Array]
    offset: dict[str, Array]
    contributions: dict[str, dict[str, Array]]
    rest: dict[str, Array]


def decompose(
    net: Network, variables: PyTree, x: PyTree, *, sites: Sites = "taps"
) -> Decomposition:
    """Decomposes a linear network into its feature and the contributions of its biases.

    Any traced network that is affine in its input will do, which is checked on its graph: chains,
    residual and branching networks, convolutions, average pools, BatchNorm in evaluation mode.
    With `theta_0` the variables without biases and `theta_j` those with bias j alone,
    `g(x) = f(x; theta_0) - f(0; theta_0)`, and the contribution of bias j is
    `f(0; theta_j) - f(0; theta_0)`; `f(0; theta_0)` is 0 unless there are other constants.

    A `vfjax.merge.Merged` is a different network, with its own biases: trace it, as in
    `decompose(vfjax.trace(lambda m, x: m(x), merged, x), merged, x)`.

    Args:
        net: The traced network.
        variables: A tree of its variables.
        x: A batch of n examples.
        sites: As in `vfjax.diagnose.features`. `"taps"` are the layers' outputs, after residual
            sums.

    Returns:
        Values, features, offsets and contributions.

    Raises:
        TypeError: If `net` is not a traced network, `variables` is a `Merged` of it, a leaf is not
            an array, or x has another structure or dtype than was traced.
        ValueError: If the network is not known to be affine (the message says why), if the tree
            does not fit it or holds NaN or infinite values, or if a site does not exist.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"w": 2 * jnp.eye(1), "b": jnp.ones(1), "v": 3 * jnp.eye(1), "c": jnp.ones(1)}
        >>> def residual(v, x):
        ...     x = x @ v["w"] + v["b"]
        ...     return x + x @ v["v"] + v["c"]
        >>> net = vfjax.trace(residual, v, jnp.ones((1, 1)))
        >>> parts = decompose(net, v, jnp.ones((1, 1)))
        >>> parts.feature["v:act"].tolist(), parts.offset["v:act"].tolist()
        ([[8.0]], [[5.0]])
        >>> {bias: part.item() for bias, part in parts.contributions["v:act"].items()}
        {'b': 4.0, 'c': 1.0}

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", propositions on linear and on
    residual linear networks, without their misprints.
    """
    check_net(net)
    if isinstance(variables, Merged) and variables.net is net:
        raise TypeError(
            "variables must be a tree of net's variables, got a Merged, which is a different "
            "network: decompose(vfjax.trace(lambda m, x: m(x), merged, x), merged, x)"
        )
    fitting(net, variables, "variables")
    names = resolve_sites(net, sites)
    x = next(batches([x], like=net.x, name="x"))
    obstacle = why_not_affine(net)
    if obstacle is not None:
        raise ValueError(
            f"{obstacle}. Only linear networks are the sum of a feature and the contributions of "
            "biases; vfjax.diagnose.features measures any network"
        )
    biases = added_parts(net)
    value, bare, offset, rest, alone = _evaluate(
        net, names, tuple(biases), variables, x, zero_example(net)
    )
    rest_of = {name: rest[name] for name in names}
    return Decomposition(
        value={name: value[name] for name in names},
        feature={name: bare[name] - rest_of[name] for name in names},
        offset={name: offset[name] for name in names},
        contributions={
            name: {
                str(bias): alone[name][k] - rest_of[name]
                for k, bias in enumerate(biases)
                if reaches(net, biases[bias], name)
            }
            for name in names
        },
        rest=rest_of,
    )


def decompose_matrices(
    weights: Sequence[Any],
    biases: Sequence[Any | None],
    x: Any,
    *,
    residual: Collection[int] = (),
) -> Decomposition:
    """Decomposes a chain of matrices, by products of the matrices.

    `f^(l) = f^(l-1) W^(l) + b^(l)`, plus `f^(l-1)` in residual layers. With `M^(l) = W^(l)`, and
    `I + W^(l)` in residual layers, `g^(l) = x M^(1) ... M^(l)`, and bias j contributes
    `b^(j) M^(j+1) ... M^(l)`. (The paper writes column vectors, with matrices transposed and
    products reversed.)

    Args:
        weights: L kernels, `[in, out]`, first layer first.
        biases: L biases `[out]`, None for a layer without bias.
        x: `[n, in]`, n examples.
        residual: Numbers of the layers, from 1, that add their input to their output.

    Returns:
        The decomposition at sites `"1"` to `"L"`; biases have the same names, and the rest is 0.

    Raises:
        ValueError: If shapes do not chain, if the numbers of weights and biases differ, if a
            residual layer is not square, or if `residual` holds a number that is not a layer's.

    Example:
        >>> import jax.numpy as jnp
        >>> weights, biases = [2 * jnp.eye(1), 3 * jnp.eye(1)], [jnp.ones(1), jnp.ones(1)]
        >>> parts = decompose_matrices(weights, biases, jnp.ones((1, 1)), residual=[2])
        >>> parts.feature["2"].item(), parts.offset["2"].item()
        (8.0, 5.0)
        >>> {bias: part.item() for bias, part in parts.contributions["2"].items()}
        {'1': 4.0, '2': 1.0}

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", propositions on linear and on
    residual linear networks, without their misprints; the sums of elementary symmetric products
    are expanded products of `I + W`.
    """
    x, kernels, shifts = _checked(weights, biases, x, residual)
    product, carried = None, {}
    result = Decomposition({}, {}, {}, {}, {})
    for number, (kernel, shift) in enumerate(zip(kernels, shifts, strict=True), start=1):
        step = kernel + jnp.eye(len(kernel), dtype=x.dtype) if number in residual else kernel
        product = step if product is None else _matmul(product, step)
        carried = {name: _matmul(rows, step) for name, rows in carried.items()}
        if shift is not None:
            carried[str(number)] = jnp.eye(len(shift), dtype=x.dtype)
        name = str(number)
        parts = {j: _matmul(shifts[int(j) - 1][None], rows) for j, rows in carried.items()}
        nothing = jnp.zeros((1, kernel.shape[1]), x.dtype)
        result.feature[name] = _matmul(x, product)
        result.contributions[name] = parts
        result.offset[name] = sum(parts.values(), start=nothing)
        result.value[name] = result.feature[name] + jnp.broadcast_to(
            result.offset[name], result.feature[name].shape
        )
        result.rest[name] = nothing
    return result


@compiled(static=3)
def _evaluate(
    net: Network,
    names: tuple[str, ...],
    biases: tuple[Part, ...],
    variables: PyTree,
    x: PyTree,
    zero: PyTree,
) -> tuple[Any, ...]:
    """Values on x with all biases and with none, then at 0 with all, none, and each alone.

    In full precision, whatever the accelerator's default, so that the parts add up to the value.
    """
    named, treedef = flatten_named(variables)

    def run(leaves: Mapping[str, Array], x: PyTree) -> dict[str, Array]:
        with jax.default_matmul_precision("highest"):
            _, captured = net.run(
                jax.tree.unflatten(treedef, list(leaves.values())), x, capture=names
            )
        return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), captured)

    def kept(keep: Array) -> dict[str, Array]:
        leaves = {path: jnp.asarray(leaf) for path, leaf in named.items()}
        for bias, flag in zip(biases, keep, strict=True):
            part = ... if bias.slot is None else bias.slot
            leaf = leaves[bias.path]
            leaves[bias.path] = leaf.at[part].multiply(flag.astype(leaf.dtype))
        return leaves

    none = kept(jnp.zeros(len(biases)))
    alone = jax.vmap(lambda keep: run(kept(keep), zero))(jnp.eye(len(biases))) if biases else {}
    return run(named, x), run(none, x), run(named, zero), run(none, zero), alone


_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _checked(
    weights: Sequence[Any], biases: Sequence[Any | None], x: Any, residual: Collection[int]
) -> tuple[Array, list[Array], list[Array | None]]:
    """Arguments of `decompose_matrices` as arrays of one dtype, float32 or better."""
    if len(weights) != len(biases) or len(weights) == 0:
        raise ValueError(
            "weights and biases must be equally many, one of each per layer (None for no bias), "
            f"got {len(weights)} and {len(biases)}"
        )
    given = [x, *weights, *(b for b in biases if b is not None)]
    dtype = jnp.result_type(jnp.float32, *given)
    x, kernels = jnp.asarray(x, dtype), [jnp.asarray(w, dtype) for w in weights]
    shifts = [None if b is None else jnp.asarray(b, dtype) for b in biases]
    if x.ndim != 2:
        raise ValueError(f"x must be [n, in], got shape {list(x.shape)}")
    width = x.shape[1]
    for number, (kernel, shift) in enumerate(zip(kernels, shifts, strict=True), start=1):
        if kernel.ndim != 2 or kernel.shape[0] != width:
            raise ValueError(
                f"weights[{number - 1}] must be [{width}, out], as layer {number} takes {width} "
                f"values, got shape {list(kernel.shape)}"
            )
        width = kernel.shape[1]
        if shift is not None and shift.shape != (width,):
            raise ValueError(
                f"biases[{number - 1}] must have shape [{width}], got {list(shift.shape)}"
            )
        if number in residual and kernel.shape[0] != width:
            raise ValueError(
                f"layer {number} is residual, so weights[{number - 1}] must be square, got shape "
                f"{list(kernel.shape)}"
            )
    unknown = sorted(set(residual) - set(range(1, len(kernels) + 1)))
    if unknown:
        raise ValueError(
            f"residual must hold numbers of layers from 1 to {len(kernels)}, got {unknown}"
        )
    return x, kernels, shifts
