"""Places of a group in a parameter tree: naming them, checking them, and mapping along them.

A group's entries lie along an axis of a leaf, and not always alone: after a flattened 4x4 map, each
channel owns 16 rows of a dense kernel. Its place is then the middle of a row-major
(outer, n, inner) view of the axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

ROLES = ("out", "in", "elementwise")


class Axis(NamedTuple):
    """One place of a group: its entries lie along an axis of a leaf.

    Attributes:
        path: Path of the leaf, such as `params/Conv_0/kernel`.
        axis: The axis, counted from 0.
        role: "out" for an axis of a kernel that its layer keeps (output channels), "in" for one
            that it contracts with data (input channels), "elementwise" for everything else (a
            bias, the scale of a norm).
        outer: The group's n entries sit in the middle of a row-major (outer, n, inner) view of the
            axis. A dense layer after a flattened 4x4 map has outer 16 and inner 1.
        inner: See `outer`. An axis of heads, each of size 8, has inner 8.
    """

    path: str
    axis: int
    role: str = "elementwise"
    outer: int = 1
    inner: int = 1

    def __str__(self) -> str:
        block = "" if self.outer == self.inner == 1 else f"({self.outer},n,{self.inner})"
        role = "" if self.role == "elementwise" else f" {self.role}"
        return f"{self.path}[{self.axis}]{block}{role}"


class FixedAxis(NamedTuple):
    """An axis of a leaf that has no symmetry, and why.

    Attributes:
        path: Path of the leaf.
        axis: The axis.
        primitive: What fixed it: the name of a primitive; "input" or "output" if it is tied to an
            axis of these; "constant" if it meets constants that differ; "unused" if nothing reads
            the leaf.
        where: Source line, "file:line", or "".
    """

    path: str
    axis: int
    primitive: str
    where: str


def as_axis(group: str, place: Any) -> Axis:
    """Checks a place written by hand and makes it an `Axis`.

    Args:
        group: Name of its group, for messages.
        place: `(path, axis)`, `(path, axis, role)` or `(path, axis, role, outer, inner)`.

    Returns:
        The place.

    Raises:
        TypeError: If it is something else.
        ValueError: If the role is unknown or a number out of range.
    """
    try:
        a = Axis(*place)
    except TypeError:
        a = None
    if (
        a is None
        or not isinstance(a.path, str)
        or not all(isinstance(n, (int, np.integer)) for n in (a.axis, a.outer, a.inner))
    ):
        raise TypeError(
            f"group {group!r} lists {place!r}; a place is (path, axis), (path, axis, role) or "
            "(path, axis, role, outer, inner)."
        )
    if a.role not in ROLES:
        raise ValueError(f"group {group!r}: role {a.role!r} of '{a.path}' must be one of {ROLES}.")
    if a.axis < 0 or a.outer < 1 or a.inner < 1:
        raise ValueError(
            f"group {group!r} lists {tuple(a)!r}; the axis is counted from 0, and outer and inner "
            "are at least 1."
        )
    return a._replace(axis=int(a.axis), outer=int(a.outer), inner=int(a.inner))


def size_at(group: str, a: Axis, shape: tuple[int, ...]) -> int:
    """Number of entries that a group has at a place of a leaf of some shape."""
    if a.axis >= len(shape):
        raise ValueError(
            f"group {group!r}: axis {a.axis} of '{a.path}' is out of range; the leaf has shape "
            f"{shape}."
        )
    length, block = shape[a.axis], a.outer * a.inner
    if length % block:
        raise ValueError(
            f"group {group!r}: axis {a.axis} of '{a.path}' has {length} entries, which cannot be "
            f"viewed as ({a.outer}, n, {a.inner})."
        )
    return length // block


def resized(a: Axis, mapped: Axis, length: int, m: int) -> Axis:
    """Where a place lies after the group at another place of its axis has got m entries.

    Args:
        a: A place.
        mapped: Another place along the same axis.
        length: Length of the axis before.
        m: Number of entries of the group at `mapped` after.
    """
    n = length // (mapped.outer * mapped.inner)
    if a.inner % (n * mapped.inner) == 0:
        return a._replace(inner=a.inner // n * m)
    return a._replace(outer=a.outer // n * m)


def absent_paths(variables: Any) -> list[str]:
    """Paths at which a tree holds None."""
    flat, _ = jax.tree_util.tree_flatten_with_path(variables, is_leaf=lambda v: v is None)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, v in flat if v is None]
    return [path.removesuffix("/value") for path in paths]


def map_axis(leaf: Any, a: Axis, fn: Callable[[Any, int], Any]) -> Any:
    """Applies `fn(view, dimension)` to the view in which a place is a dimension of its own.

    Args:
        leaf: An array.
        a: The place.
        fn: A function that may change the length of that dimension.

    Returns:
        The array, with the axis put together again.
    """
    if a.outer == a.inner == 1:
        return fn(leaf, a.axis)
    before, after = leaf.shape[: a.axis], leaf.shape[a.axis + 1 :]
    n = leaf.shape[a.axis] // (a.outer * a.inner)
    result = fn(leaf.reshape(*before, a.outer, n, a.inner, *after), a.axis + 1)
    return result.reshape(*before, a.outer * result.shape[a.axis + 1] * a.inner, *after)
