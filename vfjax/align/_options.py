"""Numbers among the options of matchers: to check their range is to check their type, too."""

from __future__ import annotations

import math
import operator
from typing import Any


def number(value: Any) -> float:
    """An option as a float; NaN, which is in no range, if it is no number.

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
    """An option as an integer; -1, below the range of a count, if it is no whole number.

    Example:
        >>> whole(2), whole(2.0), whole("2")
        (2, -1, -1)
    """
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1
