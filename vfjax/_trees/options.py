"""Checks of options: numbers, whose range check also catches a wrong type, and random keys."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp


def number(value: Any) -> float:
    """An option as a float; NaN, which is in no range, if it is not a number.

    Example:
        >>> number(2), number("2"), number(None)
        (2.0, nan, nan)
    """
    if isinstance(value, (str, bytes, bool)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def whole(value: Any) -> int:
    """An option as an integer; -1, below the range of a count, if it is not a whole number.

    Example:
        >>> whole(2), whole(2.0), whole("2")
        (2, -1, -1)
    """
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1


def check_key(key: Any) -> None:
    """Raises a TypeError unless `key` is a random key.

    Args:
        key: What the caller gave.
    """
    try:
        jax.random.bits(key, (4,), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`key` must be a random key, as jax.random.key(0); got {key!r}") from error
