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
    Axis,
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


def _flat(axis: Place, shape: tuple[int, ...]) -> Place:
    """A place along the flattened channel axes of moments `[K, *channels]`."""
    at, owner = (_laid_out(place, shape) for place in (axis.at, axis.owner))
    return Place(axis.group, at, owner)


def _laid_out(place: Axis | None, shape: tuple[int, ...]) -> Any:
    """A place along one channel axis, as a place along all of them flattened."""
    if place is None:
        return None
    before, after = math.prod(shape[1 : 1 + place.axis]), math.prod(shape[2 + place.axis :])
    if not place.windows:
        return place._replace(axis=0, outer=place.outer * before, inner=place.inner * after)
    (outer, start, size, inner), *rest = place.windows
    return place._replace(axis=0, windows=((outer * before, start, size, inner * after), *rest))


def _product(matrix: np.ndarray, array: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)


def carry(
    mean: Any, var: Any, covariance: Any, axis: Place, maps: Sequence[Any], site: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Applies one group's maps to the moments of one site, on the host."""
    mean, var = np.asarray(mean), np.asarray(var)
    if mean.ndim > 2:  # covariances are over the flattened channel axes
        before, after = mean.shape[: 1 + axis.at.axis], mean.shape[2 + axis.at.axis :]
        flat = _flat(axis, mean.shape)
        mean, var = (value.reshape(len(mean), -1) for value in (mean, var))
        mean, var, covariance = carry(mean, var, covariance, flat, maps, site)
        return mean.reshape(*before, -1, *after), var.reshape(*before, -1, *after), covariance
    covariance = None if covariance is None else np.asarray(covariance)
    size = mean.shape[1 + axis.at.axis]
    n = size_at(axis.group, axis.at, (size,))
    heads = None if axis.owner is None else size_at(axis.group, axis.owner, (size,))
    _check(axis, maps, n, heads, site)

    def ordered(line: np.ndarray, permutation: Any) -> np.ndarray:
        return permute_at(line, axis.at, axis.owner, np.asarray(permutation))

    if not any(map(_is_matrix, maps)):
        whole = np.arange(size)
        order = [whole if m is None else ordered(whole, m) for m in maps]
        mean, var = (
            np.stack([np.take(v, o, axis.at.axis) for v, o in zip(value, order, strict=True)])
            for value in (mean, var)
        )
        if covariance is not None:
            rows = np.stack(order)[:, None, :, None]
            columns = np.stack(order)[None, :, None, :]
            models = np.arange(len(maps))
            covariance = covariance[
                models[:, None, None, None], models[None, :, None, None], rows, columns
            ]
        return mean, var, covariance
    if covariance is None or np.isnan(covariance[0, 0]).any():
        raise ValueError(
            f'carrying moments at "{site}" through a matrix needs the covariances within each '
            f'model: measure with covariance=["{site}"] (or True at taps)'
        )
    matrices = []
    for m in maps:
        whole = np.eye(size)
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
        matrices.append(whole.astype(covariance.dtype))
    stacked = np.stack(matrices)
    covariance = stacked[:, None] @ covariance @ stacked.swapaxes(1, 2)[None]
    mean = (stacked @ mean[..., None])[..., 0]
    # Rounding may make a variance of zero negative.
    return mean, np.maximum(np.einsum("kkpp->kp", covariance), 0), covariance
