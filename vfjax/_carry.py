"""Moments of values after linear maps of their channels, from the moments before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vfjax._maps import check_permutation
from vfjax._streaming import GroupAxis

Array = jax.Array


def single(found: Any) -> np.ndarray | Array:
    """The merge map of a group: a permutation or a matrix."""
    found = found[0] if isinstance(found, tuple) else found
    if np.ndim(found) not in (1, 2):
        raise ValueError(
            "a group's map must be a permutation [n], a matrix [m, n] or a pair of matrices, got "
            f"an array of shape {np.shape(found)}"
        )
    return found


def _check(group: str, maps: Sequence[Any], n: int) -> None:
    """Checks the models' maps of a group with n entries; None is the identity."""
    for found in maps:
        if np.ndim(found) == 2 and np.shape(found)[1] != n:
            raise ValueError(
                f"maps[{group!r}] must be a matrix [m, {n}], got {np.shape(found)}: the group has "
                f"{n} entries"
            )
        if np.ndim(found) == 1:
            check_permutation(group, found, n)
    rows = [np.shape(found)[0] if np.ndim(found) == 2 else n for found in maps]
    if len(set(rows)) > 1:
        raise ValueError(
            f"maps[{group!r}]: matrices [m, {n}] of all models must agree in m, got {rows}"
        )


def _flat(axis: GroupAxis, shape: tuple[int, ...]) -> GroupAxis:
    """The same along all channel axes of moments `[K, *channels]`, laid out as one."""
    before, after = math.prod(shape[1 : 1 + axis.axis]), math.prod(shape[2 + axis.axis :])
    return axis._replace(axis=0, outer=axis.outer * before, inner=axis.inner * after)


def carry(
    mean: Any, var: Any, covariance: Any, axis: GroupAxis, maps: Sequence[Any], site: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """One group's maps applied to the moments of one site, on the host."""
    mean, var = np.asarray(mean), np.asarray(var)
    if mean.ndim > 2:  # covariances run over all channel axes as one
        before, after = mean.shape[: 1 + axis.axis], mean.shape[2 + axis.axis :]
        flat = _flat(axis, mean.shape)
        mean, var = (value.reshape(len(mean), -1) for value in (mean, var))
        mean, var, covariance = carry(mean, var, covariance, flat, maps, site)
        return mean.reshape(*before, -1, *after), var.reshape(*before, -1, *after), covariance
    covariance = None if covariance is None else np.asarray(covariance)
    size = mean.shape[1 + axis.axis]
    n = size // (axis.outer * axis.inner)
    _check(axis.group, maps, n)
    if all(m is None or np.ndim(m) == 1 for m in maps):
        whole = np.arange(size).reshape(axis.outer, n, axis.inner)
        order = [whole.reshape(-1) if m is None else whole[:, np.asarray(m)].ravel() for m in maps]
        mean, var = (
            np.stack([np.take(v, o, axis.axis) for v, o in zip(value, order, strict=True)])
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
        matrix = np.eye(n) if m is None else np.eye(n)[np.asarray(m)] if np.ndim(m) == 1 else m
        matrix = np.kron(np.eye(axis.outer), np.kron(np.asarray(matrix), np.eye(axis.inner)))
        matrices.append(matrix.astype(covariance.dtype))
    stacked = np.stack(matrices)
    covariance = stacked[:, None] @ covariance @ stacked.swapaxes(1, 2)[None]
    mean = (stacked @ mean[..., None])[..., 0]
    # A variance of zero may come out below it by rounding.
    return mean, np.maximum(np.einsum("kkpp->kp", covariance), 0), covariance
