"""Weighted means of trees, and checks of the weights."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vfjax._trees import paths
from vfjax._trees.concrete import check_one_device
from vfjax._trees.leaves import as_numpy, like_leaf, on_host, sum_type
from vfjax._types import Array, PyTree

# Loose enough that weights given in float32 still sum to one.
_TOLERANCE = 1e-5


def resolve_weights(
    weights: Sequence[float] | Array | None, count: int | None, *, of: str = "trees"
) -> tuple[float, ...]:
    """Checks the weights of `count` models.

    Args:
        weights: One number per model, summing to one; None for `1 / count` each. Numbers outside
            `[0, 1]` extrapolate, which is allowed.
        count: The number of models; None for as many as there are weights.
        of: The noun for what is weighted, in error messages.

    Returns:
        One Python float per model. Traced weights come back as traced scalars; of those only the
        number is checked.

    Raises:
        TypeError: If `weights` is not a flat sequence.
        ValueError: If there are not `count` weights, one is not finite, or they do not sum to one.

    Example:
        >>> resolve_weights(None, 4)
        (0.25, 0.25, 0.25, 0.25)
    """
    if weights is None:
        if count is None:
            raise TypeError("weights is None and the number of models is unknown")
        return (1.0 / count,) * count
    if not isinstance(weights, (list, tuple)) and np.ndim(weights) != 1:
        raise TypeError(
            f"weights must be a sequence of numbers, one per model, got {weights!r}; for two "
            "models and an alpha, (1 - alpha, alpha)"
        )
    traced = isinstance(weights, Tracer) or (
        not isinstance(weights, (jax.Array, np.ndarray))
        and any(isinstance(w, Tracer) for w in weights)
    )
    given: tuple[Any, ...] = tuple(weights)
    if len(given) != count and count is not None:
        raise ValueError(f"weights has {len(given)} entries for {count} {of}; give one per model")
    if traced:
        return given
    for k, weight in enumerate(given):
        if not _real(weight):
            raise TypeError(f"weights[{k}] must be a number, got {weight!r}, of {weights!r}")
    given = tuple(float(w) for w in given)
    if not all(math.isfinite(w) for w in given):
        raise ValueError(f"weights must be finite numbers, got {given}")
    if abs(math.fsum(given) - 1.0) > _TOLERANCE:
        raise ValueError(
            f"weights must sum to one, got {given} with sum {math.fsum(given):g}; divide them by it"
        )
    return given


def _real(value: Any) -> bool:
    """Whether something is one real number, traced or not."""
    if isinstance(value, Tracer):
        return not value.shape
    known = hasattr(value, "__float__") and not isinstance(value, (str, bytes))
    return known and not np.shape(value) and not np.iscomplexobj(value)


def resolve_mix(
    weights: Sequence[float] | None, alpha: float | None, count: int
) -> tuple[float, ...]:
    """The weights of `count` trees, given directly or, for two trees, by an alpha.

    Raises:
        TypeError: If `weights` is not a flat sequence.
        ValueError: If both are given, `alpha` is given for other than two trees, or the weights are
            invalid.
    """
    if alpha is not None:
        if not _real(alpha):
            raise TypeError(f"alpha must be a number, the weight of the second tree, got {alpha!r}")
        if weights is not None:
            raise ValueError("give either weights or alpha, not both")
        if count != 2:
            raise ValueError(f"alpha is for two trees, got {count}; give weights")
        weights = (1 - alpha, alpha)
    return resolve_weights(weights, count)


def weighted_mean(arrays: Sequence[Array], weights: Sequence[Any]) -> Array:
    """Averages arrays of one floating-point dtype in float32 or better, and casts back.

    A mean whose first array JAX would narrow, or is a Python number, is computed in NumPy and of
    that type, unless something is traced.

    An array of weight 0 is left out, even if it holds NaN, and one of weight 1 is not multiplied:
    weights of zeros and a single one return that array's values exactly.

    Args:
        arrays: K arrays of equal shape and dtype, or Python numbers.
        weights: K weights, as returned by `resolve_weights`.

    Returns:
        An array of that shape and dtype, or a number.

    Example:
        >>> float(weighted_mean([jnp.float32(0), jnp.float32(4)], (0.75, 0.25)))
        1.0
    """
    pairs = zip(arrays, weights, strict=True)
    kept = [(a, w) for a, w in pairs if not (isinstance(w, float) and w == 0.0)]
    host = on_host(arrays[0], *arrays[1:], *weights)
    if len(kept) == 1 and isinstance(kept[0][1], float) and kept[0][1] == 1.0:
        return like_leaf(kept[0][0], arrays[0]) if host else jnp.asarray(kept[0][0])
    terms, shares = map(list, zip(*kept, strict=True))
    if host:
        accumulator = sum_type(np.result_type(arrays[0]))
        return like_leaf(_sum(np, terms, shares, accumulator), arrays[0])
    return _weighted_sum(terms, shares)


@jax.jit
def _weighted_sum(arrays: list[Array], weights: list[Any]) -> Array:
    """Compiled once for a shape, whatever the weights, where each operation would be otherwise."""
    return _sum(jnp, arrays, weights, sum_type(arrays[0].dtype)).astype(arrays[0].dtype)


def _sum(library: Any, arrays: list[Any], weights: list[Any], accumulator: np.dtype) -> Any:
    """The weighted sum in a type, by NumPy or by JAX."""
    terms = (
        library.asarray(array).astype(accumulator) * library.asarray(weight, accumulator)
        for array, weight in zip(arrays, weights, strict=True)
    )
    return functools.reduce(operator.add, terms)


def average_flats(flats: Sequence[paths.Flat], weights: Sequence[float]) -> PyTree:
    """The average of flattened trees of one structure; integer leaves must agree.

    Args:
        flats: The flattened trees.
        weights: One per tree, summing to one.

    Returns:
        A tree with the structure of the first.
    """
    check_one_device(**{f"trees[{k}]": flat.leaves for k, flat in enumerate(flats)})
    means = {
        path: _average_leaf(path, [flat.leaves[path] for flat in flats], weights)
        for path in flats[0].leaves
    }
    return paths.Flat(means, flats[0].treedef).tree()


def _average_leaf(path: str, leaves: Sequence[Array], weights: Sequence[float]) -> Array:
    if not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.inexact):
        return _agreed(path, leaves)
    return weighted_mean(leaves, weights)


def _agreed(path: str, leaves: Sequence[Array]) -> Array:
    """The leaf that all trees share (traced leaves are taken to agree)."""
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return leaves[0]

    for k, leaf in enumerate(leaves[1:], start=1):
        if not np.array_equal(as_numpy(leaves[0]), as_numpy(leaf)):
            raise ValueError(
                f"leaf {path!r} is of dtype {jnp.result_type(leaf)}, which cannot be averaged, and "
                f"differs between trees 0 and {k}; make them agree, or keep it out of the trees"
            )
    return leaves[0]
