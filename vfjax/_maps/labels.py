"""Labels of features to merge: checking them, and turning them into maps."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_labels(group: str, labels: Any, models: int) -> np.ndarray:
    """Checks the labels of a group, which must be 0 to m - 1 without a gap; returns an array.

    Args:
        group: Name of the group.
        labels: Int `[models * n]`, or `[h, models * n]` inside each of h entries of another group.
        models: The number of models.

    Raises:
        TypeError: If they are not integers.
        ValueError: If their number differs by model, or they are negative or leave out a number.
    """
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"labels[{group!r}] must hold integers; it holds {array.dtype}")
    if array.ndim not in (1, 2) or not array.size or array.shape[-1] % models:
        raise ValueError(
            f"labels[{group!r}] must be of shape ({models} * n,) or (h, {models} * n), a label for "
            f"each feature of {models} models; it has {array.shape}"
        )
    if array.min() < 0:
        raise ValueError(f"labels[{group!r}] must be 0 or more; it holds {array.min()}")
    for row in np.atleast_2d(array):
        missing = np.setdiff1d(np.arange(array.max() + 1), row)
        if missing.size:
            raise ValueError(
                f"labels[{group!r}] must be 0 to {array.max()} without a gap, but {missing[0]} is "
                "missing: np.unique(labels, return_inverse=True)[1] numbers them anew"
            )
    return array


def pairs_of(labels: np.ndarray, models: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps `(M, U)` per model from the labels of one group; M includes the factor K.

    Args:
        labels: The result of `check_labels`.
        models: K.

    Returns:
        For each model float32 `[m, n]` and `[n, m]`, or `[h, m, n]` and `[h, n, m]`.

    Example:
        >>> (merge, unmerge), _ = pairs_of(np.array([0, 0, 1, 1]), 2)
        >>> merge.tolist(), unmerge.tolist()
        ([[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    """
    member = np.eye(labels.max() + 1)[labels]
    # Times K, since the mapped models are then averaged, which divides by K.
    shares = models * member / member.sum(-2, keepdims=True)
    merge, unmerge = (np.split(v.astype(np.float32), models, -2) for v in (shares, member))
    return [(m.swapaxes(-1, -2), u) for m, u in zip(merge, unmerge, strict=True)]


def sizes_of(labels: np.ndarray) -> np.ndarray:
    """How many features each merged feature is made of, int `[m]` or `[h, m]`."""
    return np.eye(labels.max() + 1)[labels].sum(-2).astype(int)
