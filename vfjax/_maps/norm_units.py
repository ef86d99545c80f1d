"""Norms in the units of their output, in which maps that mix features are right.

A map is found from features behind a norm, and applied to the layer before it. Where it permutes,
it is right there too. Where it mixes channels it is not: before a norm each channel has a unit of
its own, which the norm takes away. So a layer is put into the units of its norm's output first,
which changes no function: `kernel * a`, `mean * a` with `a = scale / sqrt(var + eps)`, and in the
norm the scale `|scale|` and the variance to it. (A norm without scale has one of 1. One that no
layer comes before alone, as in pre-activation networks, stays as it is.)

What the mixed norm's scale has to be is the standard deviation of the mixed features: at most
`|M| |scale|`, where all parts rise and fall together, and less by how much these correlate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees.paths import flatten_named, with_leaves, without
from vfjax._types import PyTree
from vfjax.network._network import Network
from vfjax.network._records import Norm


def norms_in_units(net: Network, unknown: Collection[str]) -> list[Norm]:
    """The norms with variances among `unknown` paths whose layer can be rescaled."""
    return [
        norm
        for norm in net.norms
        if norm.var in unknown and norm.layer is not None and net.can_fold(norm.layer, shift=False)
    ]


def in_output_units(net: Network, tree: PyTree, unknown: Collection[str]) -> PyTree:
    """The same function, with layers in the units of the output of the norm that follows."""
    for norm in norms_in_units(net, unknown):
        assert norm.layer is not None
        leaves, _ = flatten_named(tree)
        path = norm.scale
        if not {path or norm.var, norm.var, norm.mean} <= leaves.keys():
            continue
        var = jnp.asarray(leaves[norm.var], jnp.float32)
        scale = jnp.ones_like(var) if path is None else jnp.asarray(leaves[path], jnp.float32)
        factor = scale * jax.lax.rsqrt(var + norm.eps)
        # A variance is not negative: a channel that the norm all but silences keeps some.
        spread = jnp.maximum(jnp.abs(scale), np.sqrt(2 * norm.eps))
        layer = net.layer(norm.layer)
        tree = net.fold(tree, layer.name, factor.reshape(layer.channel_shape), None)
        leaves, _ = flatten_named(tree)
        changed = {norm.mean: leaves[norm.mean] * factor, norm.var: spread**2 - norm.eps}
        if path is not None:
            changed[path] = spread
        tree = with_leaves(
            tree, {p: jnp.asarray(v, jnp.result_type(leaves[p])) for p, v in changed.items()}
        )
    return tree


def mixed_scales(
    net: Network,
    tree: PyTree,
    unknown: Collection[str],
    maps: Mapping[str, tuple[Any, Any]],
    spreads: Mapping[str, Any],
) -> dict[str, Any]:
    """By path, the scales of norms in output units after their features are mixed."""
    paths = {norm.scale for norm in norms_in_units(net, unknown) if norm.scale is not None}
    paths &= (leaves := flatten_named(tree)[0]).keys()
    alone = without(tree, leaves.keys() - paths)
    sizes = {
        group: (np.abs(pair[0]) * np.asarray(spreads.get(group, 1.0))[..., None], pair[1])
        for group, pair in maps.items()
    }
    # Here scales stand for standard deviations, which sum as values do.
    plain = dataclasses.replace(net.spec, scaling=())
    return flatten_named(plain.apply(alone, sizes))[0] if paths else {}


def spread_of(merge: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The standard deviation of mixed features, relative to that of parts that rise and fall alike.

    Args:
        merge: `[m, n]`, or one for each entry of another group, `[h, m, n]`.
        covariance: `[n, n]` of the features, likewise.

    Returns:
        `[m]` or `[h, m]`, from 0 to 1; 1 for one part alone, and where nothing varies.

    Example:
        >>> both = np.array([[1.0, 1.0]])
        >>> spread_of(both, np.array([[1.0, 0.0], [0.0, 1.0]])).round(3).tolist()
        [0.707]
        >>> spread_of(both, np.array([[1.0, -1.0], [-1.0, 1.0]])).tolist()
        [0.0]
    """
    merge, covariance = np.asarray(merge, np.float64), np.asarray(covariance, np.float64)
    std = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 0))
    most = (np.abs(merge) @ std[..., None])[..., 0]
    own = np.sqrt(np.maximum(((merge @ covariance) * merge).sum(-1), 0))
    ones = np.ones_like(most)
    return np.minimum(np.divide(own, most, out=ones, where=most > 0), 1)
