"""Weights of an average over models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

Array = jax.Array

# Weights given in float32 still sum to one.
_TOLERANCE = 1e-5


def resolve_weights(
    weights: Sequence[float] | Array | None, count: int, *, of: str = "trees"
) -> tuple[float, ...]:
    """Checks the weights of `count` models.

    Args:
        weights: One number per model, summing to one; None for `1 / count` each. Numbers outside
            `[0, 1]` extrapolate, which is allowed.
        count: The number of models.
        of: What is weighted, for error messages.

    Returns:
        One Python float per model (for traced weights: one traced scalar, unchecked but in number).

    Raises:
        TypeError: If `weights` is no flat sequence.
        ValueError: If there are not `count` of them, one is not finite, or they do not sum to one.

    Example:
        >>> resolve_weights(None, 4)
        (0.25, 0.25, 0.25, 0.25)
    """
    if weights is None:
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
    if len(given) != count:
        raise ValueError(f"weights has {len(given)} entries for {count} {of}; give one per model")
    if traced:
        return given
    given = tuple(float(w) for w in given)
    if not all(math.isfinite(w) for w in given):
        raise ValueError(f"weights must be finite numbers, got {given}")
    if abs(math.fsum(given) - 1.0) > _TOLERANCE:
        raise ValueError(
            f"weights must sum to one, got {given} with sum {math.fsum(given):g}; divide them by it"
        )
    return given
