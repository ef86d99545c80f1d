"""Norms in the units of their output, in which maps that mix features are right.

Matchers compute a map from features after a norm, and the map is applied to the layer before it. A
permutation is right there too. A map that mixes channels is not: before a norm each channel has
different units, which the norm removes. So the layer is first put into the units of its norm's
output, which does not change the function: `kernel * a` and `mean * a` with
`a = scale / sqrt(var + eps)`, and in the norm the scale `|scale|` with the variance
`scale^2 - eps`, at which it divides by `|scale|`. (A norm without a scale has scale 1. A norm that
does not directly follow a single layer, as in pre-activation networks, stays unchanged.)

The scale of the mixed norm must be the standard deviation of the mixed features: `|M| |scale|` if
all parts are perfectly correlated, and less otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfjax._trees import changed, flatten_named, with_leaves, without
from vfjax._types import PyTree
from vfjax.network._network import Network
from vfjax.network._records import Norm
from vfjax.network._stored import Stored, deviation, stored, storing, variance_at


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
        old = stored(net, norm.name, leaves)
        scale = jnp.ones_like(old.var)
        if path is not None:
            scale = jnp.asarray(leaves[path], jnp.float32).reshape(scale.shape)
        factor = scale / deviation(net, norm.name, leaves, old.var)
        # The new variance must stay positive, even if the scale is almost 0.
        least = deviation(net, norm.name, leaves, jnp.full_like(old.var, norm.eps))
        spread = jnp.maximum(jnp.abs(scale), least)
        layer = net.layer(norm.layer)
        tree = net.fold(tree, layer.name, factor.reshape(layer.channel_shape), None)
        leaves, _ = flatten_named(tree)
        variance = variance_at(net, norm.name, leaves, spread)
        new = storing(net, norm.name, leaves, Stored(old.mean * factor, variance))
        if path is not None:
            new[path] = spread.reshape(jnp.shape(leaves[path]))
        tree = with_leaves(
            tree, {p: changed(leaves[p], None, lambda _, v=v: v) for p, v in new.items()}
        )
    return tree


def mixed_scales(
    net: Network,
    tree: PyTree,
    unknown: Collection[str],
    maps: Mapping[str, tuple[Any, Any]],
    spreads: Mapping[str, Any],
) -> dict[str, Any]:
    """The scales of norms in output units after their features are mixed, by path."""
    paths = {norm.scale for norm in norms_in_units(net, unknown) if norm.scale is not None}
    paths &= (leaves := flatten_named(tree)[0]).keys()
    alone = without(tree, leaves.keys() - paths)
    sizes = {
        group: (np.abs(pair[0]) * np.asarray(spreads.get(group, 1.0))[..., None], pair[1])
        for group, pair in maps.items()
    }
    # Without `scaling`, `apply` maps these scales by |M|, as standard deviations require.
    plain = dataclasses.replace(net.spec, scaling=())
    return flatten_named(plain.apply(alone, sizes, also={}))[0] if paths else {}


def spread_of(merge: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The standard deviation of mixed features, relative to perfectly correlated parts.

    Args:
        merge: `[m, n]`, or one for each entry of another group, `[h, m, n]`.
        covariance: `[n, n]` of the features, or `[h, n, n]`.

    Returns:
        `[m]` or `[h, m]`, from 0 to 1; 1 for a single part, and if nothing varies.

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
