"""Parts of groups that are matched together, and the maps of their permutations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Part(NamedTuple):
    """What is matched as a unit: a group, or its features inside one entry of another group.

    Attributes:
        group: Name of the group.
        entry: Index of the entry of the owner, in the order in which these are matched; None for a
            group that is not within another.
    """

    group: str
    entry: int | None = None

    def __str__(self) -> str:
        return self.group if self.entry is None else f"{self.group}[{self.entry}]"


def gather(results: Mapping[Part, Any], axis: int = 0) -> dict[str, Any]:
    """The results of all parts by group, stacked for a group with several entries.

    Args:
        results: By part, an array or a tree of arrays; parts of one group in order.
        axis: The new axis, along which entries are stacked.

    Example:
        >>> parts = {Part("g"): np.ones(3), Part("d", 0): np.ones(2), Part("d", 1): np.ones(2)}
        >>> {group: value.shape for group, value in gather(parts).items()}
        {'g': (3,), 'd': (2, 2)}
    """
    entries: dict[str, list[Any]] = {}
    for part, value in results.items():
        entries.setdefault(part.group, []).append(value)
    alone = {part.group for part in results if part.entry is None}
    return {
        group: values[0]
        if group in alone
        else jax.tree.map(lambda *each: np.stack(each, axis), *values)
        for group, values in entries.items()
    }


def permuting(orders: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps `(M, U)`, float32, of groups permuted by int `[n]`, or `[h, n]` inside h entries."""
    maps = {}
    for group, order in orders.items():
        matrix = np.eye(np.shape(order)[-1], dtype=np.float32)[np.asarray(order)]
        maps[group] = matrix, matrix.swapaxes(-1, -2)
    return maps
