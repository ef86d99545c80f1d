"""Permutations and matrices of a group: checking, applying, inverting and composing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from vfjax._trees import like_leaf, on_host, sum_type
from vfjax._types import Array


def check_permutation(
    name: str, permutation: Any, n: int | None, heads: int | None = None, *, within: bool = False
) -> None:
    """Checks the permutation of a group with n entries; of a tracer only shape and dtype.

    If the group moves `within` another of `heads` entries, there may be one for each of these.
    """
    if not isinstance(permutation, jax.Array):
        permutation = np.asarray(permutation)
    if not jnp.issubdtype(permutation.dtype, jnp.integer):
        raise TypeError(f"permutations[{name!r}] must hold integers; it holds {permutation.dtype}.")
    shape = tuple(permutation.shape)
    size = shape[-1] if shape else 0
    if not shape or n not in (None, size) or len(shape) > (2 if within else 1):
        wanted = f"({'n' if n is None else n},)"
        raise ValueError(
            f"permutations[{name!r}] must have shape {wanted}; it has {shape}."
            + (
                " One for each entry of another group needs the spec's `within`."
                * (len(shape) == 2)
            )
        )
    if len(shape) == 2 and heads not in (None, shape[0]):
        raise ValueError(
            f"permutations[{name!r}] must have shape ({size},) or ({heads}, {size}); it "
            f"has {shape}."
        )
    if isinstance(permutation, Tracer):
        return
    if not (np.sort(np.asarray(permutation)) == np.arange(size)).all():
        raise ValueError(
            f"permutations[{name!r}] is not a permutation: each of 0 to {size - 1} must occur "
            "exactly once."
        )


def check_by_group(argument: str, given: Any) -> None:
    """Raises a TypeError unless an argument is a mapping from groups."""
    if isinstance(given, Mapping):
        return
    if isinstance(getattr(given, "permutations", None), Mapping):  # an Alignment
        hint = f"pass its permutations, {argument}=found.permutations"
    elif hasattr(given, "permutations"):  # Maps, or a Universe
        hint = "it has those of several models: pass one of its `permutations`, a mapping"
    else:
        hint = "as found.permutations of an Alignment"
    raise TypeError(
        f"{argument} must be a mapping from groups to arrays; it was a {type(given).__name__}: "
        f"{hint}"
    )


def check_matrices(name: str, pair: Any, n: int | None, *, within: bool = False) -> None:
    """Checks the merge and unmerge matrices of a group with n entries, or those for each head."""
    try:
        merge, unmerge = (np.shape(matrix) for matrix in pair)
    except (TypeError, ValueError):
        raise TypeError(f"maps[{name!r}] must be a pair of matrices (M, U).") from None
    n = merge[-1] if n is None and merge else n
    one, other = merge, unmerge
    if within and len(merge) == len(unmerge) == 3 and merge[0] == unmerge[0]:
        one, other = merge[1:], unmerge[1:]
    if len(one) != 2 or one[1] != n or other != one[::-1]:
        raise ValueError(
            f"maps[{name!r}] must be matrices M [m, {n}] and U [{n}, m]; they have shapes {merge} "
            f"and {unmerge}."
        )


def check_maps(specs: Sequence[Any], maps: Sequence[Mapping[str, Any]]) -> None:
    """Checks the sizes and finiteness of several models' pairs of matrices by group.

    Args:
        specs: The spec of each model's network.
        maps: Per model and group, `(M, U)`.

    Raises:
        TypeError: If a map is not a pair.
        ValueError: If a group or the size of a matrix does not fit, or an entry is not finite.
    """
    widths: dict[str, set[int | None]] = {group: set() for of in maps for group in of}
    for k, (spec, of) in enumerate(zip(specs, maps, strict=True)):
        spec.check_known("maps", of)
        for group, pair in of.items():
            check_matrices(group, pair, spec.sizes.get(group), within=group in spec.within)
            bad = sum(np.count_nonzero(~np.isfinite(matrix)) for matrix in pair)
            if bad:
                raise ValueError(
                    f"maps[{group!r}] of model {k} hold {bad} NaN or infinite entries: look for "
                    "diverged models, or data with such values"
                )
        for group, counts in widths.items():
            counts.add(np.shape(of[group][0])[-2] if group in of else spec.sizes.get(group))
    for group, counts in widths.items():
        if len(counts) > 1:
            raise ValueError(
                f"maps[{group!r}] merges the models to different numbers of features, "
                f"{sorted(counts, key=str)}; a merged group has one size"
            )


def check_matrix(name: str, matrix: Any, n: int) -> None:
    """Checks one matrix of a group with n entries."""
    if np.ndim(matrix) != 2 or np.shape(matrix)[1] != n:
        raise ValueError(
            f"maps[{name!r}] must be a matrix [m, {n}]: the group has {n} entries; its shape is "
            f"{np.shape(matrix)}."
        )


def as_permutation(merge: Any, unmerge: Any) -> np.ndarray | None:
    """The permutation that a pair of matrices represents (stacked for a stack), or None."""
    if isinstance(merge, Tracer) or isinstance(unmerge, Tracer):
        return None
    merge, unmerge = np.asarray(merge), np.asarray(unmerge)
    if merge.ndim == 3:
        each = [as_permutation(*pair) for pair in zip(merge, unmerge, strict=True)]
        found = [p for p in each if p is not None]
        return np.stack(found) if len(found) == len(each) else None
    if merge.shape[0] != merge.shape[1]:
        return None
    order = merge.argmax(1)
    rows = np.arange(len(order))
    if np.count_nonzero(merge) != len(order) or (merge[rows, order] != 1).any():
        return None
    if np.count_nonzero(unmerge) != len(order) or (unmerge[order, rows] != 1).any():
        return None
    return order.astype(np.int32) if len(set(order.tolist())) == len(order) else None


def take(array: Any, permutation: Any, axis: int) -> Any:
    """Reorders a dimension, keeping dtype and sharding.

    A numpy array stays one unless the permutation is a JAX array, and one that JAX would narrow
    unless it is traced.
    """
    if isinstance(array, np.ndarray) and (
        not isinstance(permutation, jax.Array) or on_host(array, permutation)
    ):
        return np.take(array, permutation, axis=axis)
    array, permutation = jnp.asarray(array), jnp.asarray(permutation)
    sharding = jax.typeof(array).sharding
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        # On an explicit mesh JAX requires the sharding of an indexed array.
        index = (slice(None),) * axis + (permutation,)
        return array.at[index].get(out_sharding=sharding, mode="clip")
    return jnp.take(array, permutation, axis=axis, mode="clip")


def contract(matrix: Any, array: Any, axis: int) -> Array:
    """Multiplies a dimension by a matrix `[m, n]`, in float32 or better; keeps the dtype.

    Raises:
        TypeError: If the matrix is complex and the array is not.
    """
    if np.iscomplexobj(matrix) and not np.iscomplexobj(array):
        raise TypeError(f"a matrix of {matrix.dtype} does not map an array of {array.dtype}")
    if on_host(array, matrix):
        product = np.tensordot(np.asarray(matrix), array, axes=(1, axis))
        return like_leaf(np.moveaxis(product, 0, axis), array)
    matrix, array = jnp.asarray(matrix), jnp.asarray(array)
    dtype = jnp.promote_types(sum_type(array.dtype), sum_type(matrix.dtype))
    product = jnp.tensordot(
        matrix.astype(dtype), array.astype(dtype), axes=(1, axis), precision=lax.Precision.HIGHEST
    )
    return jnp.moveaxis(product, 0, axis).astype(array.dtype)


def invert(
    permutations: Mapping[str, Any], *, within: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The inverses of permutations.

    Args:
        permutations: By group, an integer array `[n]`, or `[h, n]` for a group in `within`.
        within: `spec.within`; needed if a group has a permutation for each entry of another.

    Returns:
        By group, the inverse permutation, of the same shape.

    Raises:
        TypeError: If one does not hold integers.
        ValueError: If one is not a permutation.

    Example:
        >>> invert({"h": np.array([2, 0, 1])})["h"]
        array([1, 2, 0])
    """
    within = within or {}
    check_permutations(permutations, {}, within)
    inverse = {name: as_array(p).argsort(axis=-1) for name, p in permutations.items()}
    for name, permutation in inverse.items():
        # Head j lay at place inverse[j], so the inverse for that place undoes what moved inside it.
        if permutation.ndim == 2 and within[name] in inverse:
            inverse[name] = take(permutation, inverse[within[name]], 0)
    return inverse


def compose(
    first: Mapping[str, Any], second: Mapping[str, Any], *, within: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The permutation equal to two, applied one after the other.

    `spec.permute(v, compose(p, q))` equals `spec.permute(spec.permute(v, p), q)`.

    Args:
        first: By group, an integer array `[n]`, or `[h, n]` for a group in `within`; applied
            first.
        second: The same, applied second. If only one of the two has a group, its permutation is
            kept.
        within: `spec.within`; needed if a group has a permutation for each entry of another.

    Returns:
        By group, an integer array `[n]` or `[h, n]`.

    Raises:
        TypeError: If one does not hold integers.
        ValueError: If one is not a permutation, or two of the same group differ in size.

    Example:
        >>> compose({"h": np.array([2, 0, 1])}, {"h": np.array([1, 0, 2])})["h"]
        array([0, 2, 1])
    """
    within = within or {}
    check_by_group("first", first)
    check_by_group("second", second)
    sizes = {name: np.shape(p)[-1] for name, p in [*second.items(), *first.items()] if np.ndim(p)}
    for given in (first, second):
        check_permutations(given, sizes, within)
    composed = {**first, **second}
    for name in first:
        one, other = as_array(first[name]), second.get(name)
        heads = second.get(within.get(name, ""))
        if one.ndim == 2 and heads is not None:
            one = take(one, as_array(heads), 0)  # in the heads' new order
        if other is None:
            composed[name] = one if one.ndim == 2 else first[name]
            continue
        other = as_array(other)
        if one.ndim == other.ndim == 1:
            composed[name] = take(one, other, 0)
            continue
        library: Any = np if isinstance(one, np.ndarray) and isinstance(other, np.ndarray) else jnp
        one, other = library.broadcast_arrays(*map(library.atleast_2d, (one, other)))
        composed[name] = library.take_along_axis(one, other, axis=1)
    return composed


def check_permutations(
    permutations: Mapping[str, Any], sizes: Mapping[str, int | None], within: Mapping[str, str]
) -> None:
    """Checks permutations by group; those for each entry of another group also against it."""
    check_by_group("permutations", permutations)
    for name, permutation in permutations.items():
        owner = within.get(name)
        heads = None
        if owner is not None:
            known = permutations.get(owner)
            heads = np.size(known) if known is not None else sizes.get(owner)
        check_permutation(name, permutation, sizes.get(name), heads, within=owner is not None)


def as_array(array: Any) -> Any:
    """Returns a JAX array unchanged, anything else as a numpy array."""
    return array if isinstance(array, jax.Array) else np.asarray(array)
