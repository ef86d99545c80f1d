"""Norms with stored statistics where features are mixed: their scales belong to the mixtures.

A BatchNorm after a layer has a scale per channel. Permuted channels take theirs along; of a mixture
of channels the scale does not follow from those of its parts (nor does the stored variance). So
scales move into the layer before channels are mixed, and are measured on the mixtures after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vfjax import _tree
from vfjax._fits import check_fits
from vfjax.network import Network, Norm

Array = jax.Array
PyTree = Any


def absorb_norms(net: Network, tree: PyTree) -> PyTree:
    """Moves what norms multiply by into the layers before them; the network computes the same.

    After that, the pre-activation of such a layer has the scale at which its norm hands it on:
    `scale = sqrt(var + eps)`. Matrices can then mix channels in the right proportions, and the
    standard deviations of pre-activations are goals for `vfjax.renorm.reset`.

    Args:
        net: The traced network.
        tree: A model's parameters.

    Returns:
        A tree of the same function. Norms that follow no layer directly, or share a leaf with
        another, and layers whose kernel is no plain leaf that is used once, stay as they are.

    Raises:
        TypeError: If `net` is no traced network, or a leaf no array.
        ValueError: If the tree does not fit the network.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     return (x @ v["w"] - v["mean"]) / jnp.sqrt(v["var"]) * v["scale"]
        >>> tree = {"w": jnp.eye(2), "mean": jnp.ones(2), "var": jnp.full(2, 4.0)}
        >>> tree["scale"] = jnp.array([1.0, -3.0])
        >>> net = vfjax.trace(apply_fn, tree, jnp.ones((1, 2)))
        >>> new = absorb_norms(net, tree)
        >>> new["w"].diagonal().tolist(), new["scale"].tolist(), new["mean"].tolist()
        ([0.5, -1.5], [1.0, 3.0], [0.5, -1.5])
    """
    check_fits(net, tree, "tree")
    leaves, _ = _tree.flatten_named(tree)
    for layer, (norm, path) in scaled_layers(net).items():
        scale, var = jnp.asarray(leaves[path]), jnp.asarray(leaves[norm.var])
        mean = jnp.asarray(leaves[norm.mean])
        factor = scale / jnp.sqrt(var + norm.eps).astype(scale.dtype)
        found = net.layer(layer)
        tree = net.fold(tree, layer, factor.reshape(found.channel_shape), None)
        var = (factor**2 * var).astype(var.dtype)
        tree = _tree.with_leaves(
            tree,
            {
                norm.mean: (factor * mean).astype(mean.dtype),
                norm.var: var,
                path: jnp.sqrt(var + norm.eps).astype(scale.dtype),
            },
        )
    return tree


def scaled_layers(net: Network) -> dict[str, tuple[Norm, str]]:
    """Layers that a norm with a scale of its own follows directly, with both."""
    uses = Counter(path for n in net.norms for path in (n.mean, n.var, n.scale))
    return {
        norm.layer: (norm, norm.scale)
        for norm in net.norms
        if norm.layer is not None
        and norm.scale is not None
        and uses[norm.scale] == uses[norm.mean] == uses[norm.var] == 1
        and net.can_fold(norm.layer, shift=False)
        and all(
            aval.size == net.layer(norm.layer).channels
            for aval in net.leaves([norm.scale, norm.mean, norm.var]).values()
        )
    }


def with_scales(net: Network, tree: PyTree, stds: Mapping[str, Array]) -> PyTree:
    """The tree with the scales of norms replaced.

    Args:
        net: The traced network.
        tree: Its variables.
        stds: By layer of `scaled_layers`, the standard deviation that its norm hands on.
    """
    norms, leaves = scaled_layers(net), {}
    old, _ = _tree.flatten_named(tree)
    for layer, std in stds.items():
        _, path = norms[layer]
        leaves[path] = std.reshape(jnp.shape(old[path])).astype(jnp.result_type(old[path]))
    return _tree.with_leaves(tree, leaves)
