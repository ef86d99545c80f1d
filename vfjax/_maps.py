"""Maps of a group, permutations and matrices: checking, applying, inverting, composing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

Array = jax.Array


def check_permutation(name: str, permutation: Any, n: int | None) -> None:
    """Checks the permutation of a group with n entries; of a tracer, shape and dtype only."""
    if not isinstance(permutation, jax.Array):
        permutation = np.asarray(permutation)
    if not jnp.issubdtype(permutation.dtype, jnp.integer):
        raise TypeError(f"permutations[{name!r}] must hold integers; it holds {permutation.dtype}.")
    if permutation.ndim != 1 or n not in (None, permutation.size):
        raise ValueError(
            f"permutations[{name!r}] must have shape ({'n' if n is None else n},); it has "
            f"{permutation.shape}."
        )
    if isinstance(permutation, Tracer):
        return
    if not np.array_equal(np.sort(np.asarray(permutation)), np.arange(permutation.size)):
        raise ValueError(
            f"permutations[{name!r}] is no permutation: each of 0 to {permutation.size - 1} must "
            "occur exactly once."
        )


def check_matrices(name: str, pair: Any, n: int | None) -> None:
    """Checks the merge and unmerge matrix of a group with n entries."""
    try:
        merge, unmerge = (np.shape(matrix) for matrix in pair)
    except (TypeError, ValueError):
        raise TypeError(f"maps[{name!r}] must be a pair of matrices (M, U).") from None
    n = merge[-1] if n is None and merge else n
    if len(merge) != 2 or merge[1] != n or unmerge != merge[::-1]:
        raise ValueError(
            f"maps[{name!r}] must be matrices M [m, {n}] and U [{n}, m]; they have shapes {merge} "
            f"and {unmerge}."
        )


def check_matrix(name: str, matrix: Any, n: int) -> None:
    """Checks one matrix of a group with n entries."""
    if np.ndim(matrix) != 2 or np.shape(matrix)[1] != n:
        raise ValueError(
            f"maps[{name!r}] must be a matrix [m, {n}]: the group has {n} entries; its shape is "
            f"{np.shape(matrix)}."
        )


def take(array: Any, permutation: Any, axis: int) -> Any:
    """Reorders a dimension, keeping dtype and sharding.

    A numpy array stays one unless the permutation is a JAX array.
    """
    if isinstance(array, np.ndarray) and not isinstance(permutation, jax.Array):
        return np.take(array, permutation, axis=axis)
    array, permutation = jnp.asarray(array), jnp.asarray(permutation)
    sharding = jax.typeof(array).sharding
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        # On an explicit mesh, how an indexed array is laid out has to be said.
        index = (slice(None),) * axis + (permutation,)
        return array.at[index].get(out_sharding=sharding, mode="clip")
    return jnp.take(array, permutation, axis=axis, mode="clip")


def contract(matrix: Any, array: Any, axis: int) -> Array:
    """Multiplies a dimension by a matrix `[m, n]`, in float32 or better; keeps the dtype."""
    matrix, array = jnp.asarray(matrix), jnp.asarray(array)
    dtype = jnp.promote_types(jnp.promote_types(array.dtype, matrix.dtype), jnp.float32)
    product = jnp.tensordot(
        matrix.astype(dtype), array.astype(dtype), axes=(1, axis), precision=lax.Precision.HIGHEST
    )
    return jnp.moveaxis(product, 0, axis).astype(array.dtype)


def invert(permutations: Mapping[str, Any]) -> dict[str, Any]:
    """The permutations that undo others.

    Args:
        permutations: By group, an integer array `[n]`.

    Returns:
        By group, the inverse `[n]`.

    Raises:
        TypeError: If one is not of integers.
        ValueError: If one is no permutation.

    Example:
        >>> invert({"h": np.array([2, 0, 1])})["h"]
        array([1, 2, 0])
    """
    for name, permutation in permutations.items():
        check_permutation(name, permutation, None)
    return {name: as_array(p).argsort() for name, p in permutations.items()}


def compose(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One permutation for two, applied one after the other.

    `spec.permute(v, compose(p, q))` equals `spec.permute(spec.permute(v, p), q)`.

    Args:
        first: By group, an integer array `[n]`; the one applied first.
        second: By group, an integer array `[n]`. A group that only one of them has keeps that one.

    Returns:
        By group, an integer array `[n]`.

    Raises:
        TypeError: If one is not of integers.
        ValueError: If one is no permutation, or two of a group differ in size.

    Example:
        >>> compose({"h": np.array([2, 0, 1])}, {"h": np.array([1, 0, 2])})["h"]
        array([0, 2, 1])
    """
    for name, permutation in [*first.items(), *second.items()]:
        check_permutation(name, permutation, np.size(first.get(name, permutation)))
    composed = {**first, **second}
    for name in first.keys() & second.keys():
        composed[name] = take(as_array(first[name]), as_array(second[name]), 0)
    return composed


def as_array(array: Any) -> Any:
    """A JAX array as it is, anything else as a numpy array."""
    return array if isinstance(array, jax.Array) else np.asarray(array)
