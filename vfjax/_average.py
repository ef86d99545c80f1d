"""Averages of parameter trees, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vfjax import _tree
from vfjax._types import Array, PyTree
from vfjax._weights import resolve_weights, weighted_mean


def resolve_mix(
    weights: Sequence[float] | None, alpha: float | None, count: int
) -> tuple[float, ...]:
    """The weights of `count` trees, given as such or, of two, as an alpha.

    Raises:
        TypeError: If `weights` is no flat sequence.
        ValueError: If both are given, `alpha` for other than two trees, or weights do not fit.
    """
    if alpha is not None:
        if weights is not None:
            raise ValueError("give either weights or alpha, not both")
        if count != 2:
            raise ValueError(f"alpha is for two trees, got {count}; give weights")
        weights = (1 - alpha, alpha)
    return resolve_weights(weights, count)


def average_trees(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """The average of alike trees; integer leaves must agree.

    Args:
        trees: The trees.
        weights: One per tree, summing to one.
    """
    named = [_tree.flatten_named(tree) for tree in trees]
    treedef = named[0][1]
    leaves = [
        _average_leaf(path, [leaves[path] for leaves, _ in named], weights) for path in named[0][0]
    ]
    return jax.tree.unflatten(treedef, leaves)


def _average_leaf(path: str, leaves: Sequence[Array], weights: Sequence[float]) -> Array:
    if not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.inexact):
        return _agreed(path, leaves)
    return weighted_mean(leaves, weights)


def _agreed(path: str, leaves: Sequence[Array]) -> Array:
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return leaves[0]

    def plain(leaf: Array) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    for k, leaf in enumerate(leaves[1:], start=1):
        if not np.array_equal(plain(leaves[0]), plain(leaf)):
            raise ValueError(
                f"leaf {path!r} is of dtype {jnp.result_type(leaf)}, which cannot be averaged, and "
                f"differs between trees 0 and {k}; make them agree, or keep it out of the trees"
            )
    return leaves[0]
