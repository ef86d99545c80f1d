"""Batches that are read several times, kept on the device where they fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

# What is kept, at most, in bytes: 10,000 images of CIFAR take an eighth of it.
_KEEP_BYTES = 1 << 30


def keep(items: Iterable[Any], again: Iterable[Any]) -> Iterable[Any]:
    """Reads items once and keeps their arrays on the device, unless they are too large for that.

    Args:
        items: Pytrees of arrays, checked already.
        again: What to read from next time if they are too large.

    Returns:
        A list of the items, or `again`.

    Example:
        >>> import numpy as np
        >>> kept = keep((np.ones(2) for _ in range(3)), again=())
        >>> len(kept), isinstance(kept[0], jax.Array)
        (3, True)
    """
    kept, size = [], 0
    for item in items:
        kept.append(jax.tree.map(jnp.asarray, item))
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(kept[-1]))
        if size > _KEEP_BYTES:
            return again
    return kept
