"""Maps that merge features of equal label: checking labels, and what matrices they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np


def pairs_of(labels: np.ndarray, models: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maps `(M, U)` per model of the labels of one group; M holds the factor K.

    Args:
        labels: What `check_labels` returned.
        models: K.

    Returns:
        For each model float32 `[m, n]` and `[n, m]`, or `[h, m, n]` and `[h, n, m]`.

    Example:
        >>> (merge, unmerge), _ = pairs_of(np.array([0, 0, 1, 1]), 2)
        >>> merge.tolist(), unmerge.tolist()
        ([[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    """
    member = np.eye(labels.max() + 1)[labels]
    # Times K: the models are averaged after, which divides by as much.
    shares = models * member / member.sum(-2, keepdims=True)
    merge, unmerge = (np.split(v.astype(np.float32), models, -2) for v in (shares, member))
    return [(m.swapaxes(-1, -2), u) for m, u in zip(merge, unmerge, strict=True)]


def sizes_of(labels: np.ndarray) -> np.ndarray:
    """How many features each merged feature is made of, int `[m]` or `[h, m]`."""
    return np.eye(labels.max() + 1)[labels].sum(-2).astype(int)


def check_labels(group: str, labels: Any, models: int) -> np.ndarray:
    """Labels as an array, of which each number from 0 on occurs.

    Args:
        group: Name of the group.
        labels: Int `[models * n]`, or `[h, models * n]` inside each of h entries of another group.
        models: How many models the features are of.

    Raises:
        TypeError: If they are no integers.
        ValueError: If they are not as many for each model, are negative, or leave out a number.
    """
    found = np.asarray(labels)
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"labels[{group!r}] must hold integers; it holds {found.dtype}")
    if found.ndim not in (1, 2) or not found.size or found.shape[-1] % models:
        raise ValueError(
            f"labels[{group!r}] must be of shape ({models} * n,) or (h, {models} * n), a label for "
            f"each feature of {models} models; it has {found.shape}"
        )
    if found.min() < 0:
        raise ValueError(f"labels[{group!r}] must be 0 or more; it holds {found.min()}")
    for row in np.atleast_2d(found):
        missing = np.setdiff1d(np.arange(found.max() + 1), row)
        if missing.size:
            raise ValueError(
                f"labels[{group!r}] must be 0 to {found.max()} without a gap, but {missing[0]} is "
                "missing: np.unique(labels, return_inverse=True)[1] numbers them anew"
            )
    return found
