"""Moments after linear maps of channels, computed from the moments before."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vfjax._types import Array
from vfjax.symmetry._group_maps import check_permutation
from vfjax.symmetry._places import (
    Place,
    map_axis,
    map_within,
    permute_at,
    size_at,
)


def single(given: Any) -> np.ndarray | Array:
    """The merge map of a group: a permutation or a matrix, or a stack of either."""
    given = given[0] if isinstance(given, tuple) else given
    if np.ndim(given) not in (1, 2, 3):
        raise ValueError(
            "a group's map must be a permutation [n] or [h, n], a matrix [m, n] or [h, m, n] or a "
            f"pair of matrices, got an array of shape {np.shape(given)}"
        )
    return given


def _is_matrix(given: Any) -> bool:
    if given is None:
        return False
    integer = np.issubdtype(np.asarray(given).dtype, np.integer)
    return np.ndim(given) == 3 or (np.ndim(given) == 2 and not integer)


def _check(axis: Place, maps: Sequence[Any], n: int, heads: int | None, site: str) -> None:
    """Checks the models' maps of a group with n entries; None means the identity."""
    for given in maps:
        if given is None:
            continue
        each = np.ndim(given) == (3 if _is_matrix(given) else 2)
        if each and heads is None:
            raise ValueError(
                f"maps[{axis.group!r}] holds a map for each entry of another group, and "
                f'the moments at "{site}" are pooled over these; carry those of other sites'
            )
        if _is_matrix(given):
            shape = np.shape(given)
            if shape[-1] != n or (each and shape[0] != heads):
                wanted = f"[m, {n}]" + (f" or [{heads}, m, {n}]" if heads is not None else "")
                raise ValueError(
                    f"maps[{axis.group!r}] must be a matrix {wanted}, got {shape}: the group has "
                    f"{n} entries"
                )
            continue
        check_permutation(axis.group, given, n, heads, within=heads is not None)
    rows = [np.shape(given)[-2] if _is_matrix(given) else n for given in maps]
    if len(set(rows)) > 1:
        raise ValueError(
            f"maps[{axis.group!r}]: matrices [m, {n}] of all models must agree in m, got {rows}"
        )


def _product(matrix: np.ndarray, array: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)


def carry(
    mean: Any, var: Any, covariance: Any, axis: Place, maps: Sequence[Any], site: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Applies one group's maps to the moments of one site, on the host."""
    mean, var = np.asarray(mean), np.asarray(var)
    # Covariances are over the flattened channel axes, and so is the order of what they hold.
    shape = mean.shape[1:]
    before, after = mean.shape[: 1 + axis.at.axis], shape[1 + axis.at.axis :]
    mean, var = (value.reshape(len(value), -1) for value in (mean, var))
    covariance = None if covariance is None else np.asarray(covariance)
    size = math.prod(shape)
    n = size_at(axis.group, axis.at, shape)
    heads = None if axis.owner is None else size_at(axis.group, axis.owner, shape)
    _check(axis, maps, n, heads, site)

    def ordered(array: np.ndarray, permutation: Any) -> np.ndarray:
        return permute_at(array, axis.at, axis.owner, np.asarray(permutation))

    def unflattened(array: np.ndarray) -> np.ndarray:
        return array.reshape(*before, -1, *after)

    if not any(map(_is_matrix, maps)):
        whole = np.arange(size).reshape(shape)
        order = [(whole if m is None else ordered(whole, m)).reshape(-1) for m in maps]
        mean, var = (
            np.stack([v[o] for v, o in zip(value, order, strict=True)]) for value in (mean, var)
        )
        if covariance is not None:
            rows = np.stack(order)[:, None, :, None]
            columns = np.stack(order)[None, :, None, :]
            models = np.arange(len(maps))
            covariance = covariance[
                models[:, None, None, None], models[None, :, None, None], rows, columns
            ]
        return unflattened(mean), unflattened(var), covariance
    if covariance is None or np.isnan(covariance[0, 0]).any():
        raise ValueError(
            f'carrying moments at "{site}" through a matrix needs the covariances within each '
            f'model: measure with covariance=["{site}"] (or True at taps)'
        )
    matrices = []
    for m in maps:
        whole = np.eye(size).reshape(*shape, size)
        if m is not None and np.ndim(m) == 3:
            assert axis.owner is not None  # `_check`
            each = [functools.partial(_product, np.asarray(matrix)) for matrix in m]
            whole = map_within(
                whole, axis.at, axis.owner, lambda view, k, i, each=each: each[i](view, k)
            )
        elif _is_matrix(m):
            whole = map_axis(whole, axis.at, functools.partial(_product, np.asarray(m)))
        elif m is not None:
            whole = ordered(whole, m)
        matrices.append(whole.reshape(-1, size).astype(covariance.dtype))
    stacked = np.stack(matrices)
    covariance = stacked[:, None] @ covariance @ stacked.swapaxes(1, 2)[None]
    mean = (stacked @ mean[..., None])[..., 0]
    # Rounding may make a variance of zero negative.
    var = np.maximum(np.einsum("kkpp->kp", covariance), 0)
    return unflattened(mean), unflattened(var), covariance
