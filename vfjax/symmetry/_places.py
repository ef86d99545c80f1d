"""Places of a group in a parameter tree: naming them, checking them, and mapping along them.

A group's entries lie along an axis of a leaf, but may share it: after a flattened 4x4 map, each
channel owns 16 rows of a dense kernel. The group's place is then the middle of a row-major
(outer, n, inner) view of the axis. Where features were concatenated the place is a segment of the
axis, given by windows: each selects a part of the middle of such a view.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.symmetry._entries import bare, in_entry, piece_of
from vfjax.symmetry._group_maps import take

ROLES = ("out", "in", "elementwise")

Window = tuple[int, int, int, int]
"""(outer, start, size, inner): `size` of the n entries of a row-major (outer, n, inner) view."""


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
        windows: Nested segments to select first, outermost first, as (outer, start, size, inner):
            each views the current segment as (outer, n, inner) and keeps `size` of the n entries
            from `start` on. The last 4 of 12 concatenated features are `((1, 8, 4, 1),)`.
        entries: If the leaf is a stack, each of whose entries has groups of its own: the entries in
            which the place lies, as (dimension, index). The fourth of layers that were stacked for
            a scan is `((0, 3),)`.
    """

    path: str
    axis: int
    role: str = "elementwise"
    outer: int = 1
    inner: int = 1
    windows: tuple[Window, ...] = ()
    entries: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        role = "" if self.role == "elementwise" else f" {self.role}"
        entries = "".join(f"[{dim}={index}]" for dim, index in self.entries)
        return f"{self.path}{entries}[{self.axis}]{self.block}{role}"

    @property
    def block(self) -> str:
        """How the group lies along the axis, as text; empty if the group fills the axis."""
        parts = [(o, f"{start}:{start + size}", i) for o, start, size, i in self.windows]
        parts += [] if self.outer == self.inner == 1 else [(self.outer, "n", self.inner)]
        return "".join(f"[{n}]" if o == i == 1 else f"({o},{n},{i})" for o, n, i in parts)


class Place(NamedTuple):
    """Where a group lies along an axis of a value.

    Attributes:
        group: Name of the group.
        at: The place; its path is empty.
        owner: Where the group lies that this one moves within, if the value shows both.
    """

    group: str
    at: Axis
    owner: Axis | None = None

    def after(self, mapped: Axis, length: int, m: int) -> Place:
        """The place after the group at `mapped`, on an axis of `length`, has become m entries."""
        move = functools.partial(moved, mapped=mapped, length=length, m=m)
        return Place(self.group, move(self.at), self.owner and move(self.owner))

    def bare(self) -> Place:
        """The place as it lies in the pieces of a stack (see `_entries`)."""
        return Place(self.group, bare(self.at), self.owner and bare(self.owner))


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
    """Checks a place written by hand and turns it into an `Axis`.

    Args:
        group: Name of its group, for messages.
        place: `(path, axis)`, `(path, axis, role)`, `(path, axis, role, outer, inner)`, the last
            with windows, or that with entries.

    Returns:
        The place.

    Raises:
        TypeError: If it is something else.
        ValueError: If the role is unknown or a number is out of range.
    """
    try:
        a = Axis(*place)
        numbers = [a.axis, a.outer, a.inner, *itertools.chain(*a.windows, *a.entries)]
    except TypeError:
        a, numbers = None, []
    if (
        a is None
        or not isinstance(a.path, str)
        or not all(isinstance(n, (int, np.integer)) for n in numbers)
        or any(len(window) != 4 for window in a.windows)
        or any(len(entry) != 2 for entry in a.entries)
    ):
        raise TypeError(
            f"group {group!r} lists {place!r}; a place is (path, axis), (path, axis, role), "
            "(path, axis, role, outer, inner), the last with a tuple of windows "
            "(outer, start, size, inner), or that with a tuple of entries (dimension, index)."
        )
    if a.role not in ROLES:
        raise ValueError(f"group {group!r}: role {a.role!r} of '{a.path}' must be one of {ROLES}.")
    if (
        a.axis < 0
        or min([a.outer, a.inner, *(n for o, _, s, i in a.windows for n in (o, s, i))]) < 1
    ):
        raise ValueError(
            f"group {group!r} lists {tuple(a)!r}; the axis is counted from 0, and outer, inner and "
            "the sizes of windows are at least 1."
        )
    if any(start < 0 for _, start, _, _ in a.windows):
        raise ValueError(f"group {group!r} lists {tuple(a)!r}; a window starts at 0 or later.")
    dims = [dim for dim, _ in a.entries]
    if min([0, *itertools.chain(*a.entries)]) < 0 or len({*dims, a.axis}) <= len(dims):
        raise ValueError(
            f"group {group!r} lists {tuple(a)!r}; entries are counted from 0, each along another "
            f"dimension, and not along the axis {a.axis} itself."
        )
    windows = tuple(tuple(int(n) for n in window) for window in a.windows)
    entries = tuple(sorted((int(dim), int(index)) for dim, index in a.entries))
    numbers = {"axis": int(a.axis), "outer": int(a.outer), "inner": int(a.inner)}
    return a._replace(windows=windows, entries=entries, **numbers)


def size_at(group: str, a: Axis, shape: tuple[int, ...]) -> int:
    """The number of entries of a group at a place of a leaf of some shape."""
    if a.axis >= len(shape):
        raise ValueError(
            f"group {group!r}: axis {a.axis} of '{a.path}' is out of range; the leaf has shape "
            f"{shape}."
        )
    for dim, index in a.entries:
        if dim >= len(shape) or index >= shape[dim]:
            raise ValueError(
                f"group {group!r}: '{a.path}' has no entry {index} along dimension {dim}; the leaf "
                f"has shape {shape}."
            )
    length = shape[a.axis]
    for outer, start, size, inner in (*a.windows, (a.outer, 0, 0, a.inner)):
        if length % (outer * inner):
            raise ValueError(
                f"group {group!r}: axis {a.axis} of '{a.path}' has {length} entries, which cannot "
                f"be viewed as ({outer}, n, {inner})."
            )
        length //= outer * inner
        if start + size > length:
            raise ValueError(
                f"group {group!r}: axis {a.axis} of '{a.path}' has {length} entries to look into, "
                f"and the window {start}:{start + size} ends after them."
            )
        length = size or length
    return length


@functools.lru_cache(maxsize=4096)
def overlap(places: tuple[Axis, ...], length: int) -> tuple[int, int] | None:
    """Two places along one axis that share entries without being each other's blocks, or None."""
    for i, j in itertools.combinations(range(len(places)), 2):
        try:
            if places[i][3:] == places[j][3:]:
                return i, j
            resized(places[i], places[j], length, 1)
        except ValueError:
            return i, j
    return None


def resized(a: Axis, mapped: Axis, length: int, m: int) -> Axis:
    """Where a place lies after the group at `mapped` on its axis has become m entries.

    Args:
        a: A place.
        mapped: A place along the same axis.
        length: Length of the axis before.
        m: Number of entries of the group at `mapped` afterwards.

    Raises:
        ValueError: If the two share entries without being each other's blocks.
    """
    levels, _ = _resized(_levels(a), _levels(mapped), length, m)
    *windows, (outer, _, _, inner) = levels
    return a._replace(outer=outer, inner=inner, windows=tuple(windows))


def moved(a: Axis, mapped: Axis, length: int, m: int) -> Axis:
    """As `resized`, but for a place along any axis."""
    return resized(a, mapped, length, m) if a.axis == mapped.axis else a


def _levels(a: Axis) -> list[Window]:
    """The windows, then the group itself as a window of size 0, which stands for all."""
    return [*a.windows, (a.outer, 0, 0, a.inner)]


def _grown(levels: Sequence[Window], length: int, m: int) -> int:
    """The length of an axis after the group inside some windows has become m entries."""
    (outer, _, size, inner), *rest = levels
    n = length // (outer * inner)
    return outer * inner * (n - size + _grown(rest, size, m) if rest else m)


def _resized(
    levels: Sequence[Window], mapped: Sequence[Window], length: int, m: int
) -> tuple[list[Window], int]:
    """The windows after the change, and the length of the axis."""
    (outer, start, size, inner), *rest = levels
    (outside, first, count, inside), *deeper = mapped
    new = _grown(mapped, length, m)
    n, old = length // (outer * inner), length // (outside * inside)
    now = new // (outside * inside)
    if (outer, inner) == (outside, inside):
        if not rest and not deeper:
            return [(outer, start, size, inner)], new  # the group itself
        if rest and deeper and (start, size) == (first, count):
            rest, size = _resized(rest, deeper, size, m)
            return [(outer, start, size, inner), *rest], new
        if rest and deeper and (start + size <= first or first + count <= start):
            start += now - old if start > first else 0
            return [(outer, start, size, inner), *rest], new
    elif outer % (outside * old) == 0 and inside % (n * inner) == 0:
        return [(outer // old * now, start, size, inner), *rest], new
    elif inner % (inside * old) == 0 and outside % (n * outer) == 0:
        return [(outer, start, size, inner // old * now), *rest], new
    raise ValueError("the two places overlap")


def absent_paths(variables: Any) -> list[str]:
    """Paths at which a tree holds None."""
    flat, _ = jax.tree_util.tree_flatten_with_path(variables, is_leaf=lambda v: v is None)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, v in flat if v is None]
    return [path.removesuffix("/value") for path in paths]


def owners(a: Axis, others: Iterable[Axis]) -> list[Axis]:
    """The places in the same leaf that surround a place, or lie on another axis."""
    return [
        b
        for b in others
        if b.path == a.path
        and set(b.entries) <= set(a.entries)
        and (b.windows == a.windows[: len(b.windows)] if a.axis == b.axis else not b.windows)
    ]


def rows(leaf: Any, a: Axis) -> Any:
    """A leaf as `[before, n, after]`, with the n entries of a place in the middle."""
    leaf = piece_of(leaf, a.entries)
    before, length = math.prod(leaf.shape[: a.axis]), leaf.shape[a.axis]
    after = math.prod(leaf.shape[a.axis + 1 :])
    for outer, start, size, inner in a.windows:
        before, after, length = before * outer, inner * after, length // (outer * inner)
        leaf, length = leaf.reshape(before, length, after)[:, start : start + size], size
    return leaf.reshape(before * a.outer, length // (a.outer * a.inner), a.inner * after)


def permute_at(leaf: Any, a: Axis, owner: Axis | None, permutation: Any) -> Any:
    """Permutes a place, or with `[h, n]` inside each of the h entries of its owner's place."""
    if owner is None or permutation.ndim == 1:
        return permute_axis(leaf, a, permutation)
    return map_within(leaf, a, owner, lambda view, k, i: take(view, permutation[i], k))


def permute_axis(leaf: Any, a: Axis, permutation: Any) -> Any:
    """Reorders the entries at a place: `new = take(old, permutation)`."""
    if a.entries:
        return map_axis(leaf, a, lambda view, k: take(view, permutation, k))
    if a.outer != 1 or a.inner != 1 or a.windows:
        line, order = a._replace(axis=0), np.arange(leaf.shape[a.axis], dtype=np.int32)
        permutation = map_axis(order, line, lambda view, k: take(view, permutation, k))
    return take(leaf, permutation, a.axis)


def grid(leaf: Any, a: Axis, owner: Axis) -> Any:
    """A leaf as `[owners, n, rest]`: a place's n entries inside each entry of its owner's place."""
    leaf, a, owner = piece_of(leaf, a.entries), bare(a), bare(owner)
    library = np if isinstance(leaf, np.ndarray) else jnp
    parts = [library.moveaxis(rows(part, inner), 1, 0) for part, inner in _entries(leaf, a, owner)]
    return library.stack([part.reshape(len(part), -1) for part in parts])


def map_within(leaf: Any, a: Axis, owner: Axis, fn: Callable[[Any, int, int], Any]) -> Any:
    """Like `map_axis`, with `fn(view, dimension, i)` inside the i-th entry of an owner's place."""
    if a.entries:
        return in_entry(leaf, a, lambda piece: map_within(piece, bare(a), bare(owner), fn))
    parts, views = [], []
    alone = resized(owner, owner, leaf.shape[owner.axis], 1)
    for i, (part, inner) in enumerate(_entries(leaf, a, owner)):
        parts.append(map_axis(part, inner, lambda view, k, i=i: fn(view, k, i)))
        length, longer = part.shape[a.axis], parts[-1].shape[a.axis]
        if i == 0 and length != longer and a.axis == owner.axis:
            block = math.prod(outer * inside for outer, _, _, inside in _levels(inner))
            m = size_at("", inner, part.shape) + (longer - length) // block
            alone = resized(alone, inner, length, m)

    def keep(view: Any, k: int) -> Any:
        views.append(view)
        return view

    for part in parts:
        map_axis(part, alone, keep)
    library = np if all(isinstance(view, np.ndarray) for view in views) else jnp
    return map_axis(parts[0], alone, lambda _, k: library.concatenate(views, axis=k))


def _entries(leaf: Any, a: Axis, owner: Axis) -> Iterator[tuple[Any, Axis]]:
    """For each entry of the owner, the leaf with that entry alone, and the place in it."""
    inner = resized(a, owner, leaf.shape[a.axis], 1) if a.axis == owner.axis else a
    for i in range(size_at("", owner, leaf.shape)):
        index = slice(i, i + 1)
        yield map_axis(leaf, owner, lambda v, k, s=index: v[(*(slice(None),) * k, s)]), inner


def map_axis(leaf: Any, a: Axis, fn: Callable[[Any, int], Any]) -> Any:
    """Applies `fn(view, dimension)` to the view in which a place is a whole dimension.

    Args:
        leaf: An array.
        a: The place.
        fn: A function that may change the length of that dimension.

    Returns:
        The array, with the axis reassembled.
    """
    if a.entries:
        return in_entry(leaf, a, lambda piece: map_axis(piece, bare(a), fn))
    if a.windows:
        (outer, start, size, inner), *deeper = a.windows
        return _inside(
            leaf,
            a.axis,
            outer,
            inner,
            fn=functools.partial(
                _window,
                start=start,
                stop=start + size,
                place=a._replace(windows=tuple(deeper)),
                fn=fn,
            ),
        )
    return _inside(leaf, a.axis, a.outer, a.inner, fn)


def _inside(leaf: Any, axis: int, outer: int, inner: int, fn: Callable[[Any, int], Any]) -> Any:
    """Applies `fn(view, dimension)` to the middle of a row-major (outer, n, inner) view."""
    if outer == inner == 1:
        return fn(leaf, axis)
    before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
    n = leaf.shape[axis] // (outer * inner)
    result = fn(leaf.reshape(*before, outer, n, inner, *after), axis + 1)
    return result.reshape(*before, outer * result.shape[axis + 1] * inner, *after)


def _window(
    leaf: Any, axis: int, *, start: int, stop: int, place: Axis, fn: Callable[[Any, int], Any]
) -> Any:
    """Applies a function to a place inside a segment of a dimension."""
    whole = (slice(None),) * axis
    middle = map_axis(leaf[(*whole, slice(start, stop))], place._replace(axis=axis), fn)
    parts = leaf[(*whole, slice(start))], middle, leaf[(*whole, slice(stop, None))]
    library = np if isinstance(middle, np.ndarray) else jnp
    return library.concatenate(parts, axis=axis)
