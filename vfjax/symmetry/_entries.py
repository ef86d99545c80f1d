"""Stacks: leaves each of whose entries along a dimension has groups of its own.

A place may lie in one entry of a stack alone, the fourth layer of those that a scan steps over,
say. Such a leaf is taken apart along these dimensions, into pieces of length 1 along each, so that
all else sees leaves that are no stacks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

if TYPE_CHECKING:
    from vfjax.symmetry._places import Axis
    from vfjax.symmetry._spec import PermutationSpec

T = TypeVar("T")
S = TypeVar("S", bound="PermutationSpec")

Entries = tuple[tuple[int, int], ...]
"""Entries of a stack, as pairs (dimension, index along it)."""


def pieces(shape: tuple[int, ...], places: Iterable[Axis]) -> list[Entries]:
    """The pieces of a leaf in which its groups differ; `[()]` if it is no stack."""
    dims = sorted({dim for a in places for dim, _ in a.entries})
    ranges = (range(shape[dim]) for dim in dims)
    return [tuple(zip(dims, at, strict=True)) for at in itertools.product(*ranges)]


def around(piece: Entries) -> Iterator[Entries]:
    """The entries that a piece is part of: places with any of these lie in it."""
    for count in range(len(piece) + 1):
        yield from itertools.combinations(piece, count)


def divided(
    shape: tuple[int, ...], items: Sequence[T], place: Callable[[T], Axis]
) -> Iterator[tuple[Entries, list[T]]]:
    """The pieces of a leaf, and for each those items, in order, whose places lie in it."""
    held: dict[Entries, list[tuple[int, T]]] = {}
    for k, item in enumerate(items):
        held.setdefault(place(item).entries, []).append((k, item))
    for piece in pieces(shape, map(place, items)):
        inside = [pair for entries in around(piece) for pair in held.get(entries, ())]
        yield piece, [item for _, item in sorted(inside, key=lambda pair: pair[0])]


def bare(a: Axis) -> Axis:
    """A place as it lies in its pieces."""
    return a._replace(entries=())


def piece_of(leaf: Any, piece: Entries) -> Any:
    """A piece of an array, of length 1 along the stack's dimensions."""
    for dim, index in piece:
        if isinstance(leaf, jax.Array):  # compiled once for all indices
            leaf = lax.dynamic_slice_in_dim(leaf, np.int32(index), 1, dim)
        else:
            leaf = leaf[(slice(None),) * dim + (slice(index, index + 1),)]
    return leaf


def whole(leaves: Mapping[Entries, Any], path: str) -> Any:
    """An array from all of its pieces.

    Raises:
        ValueError: If their shapes differ.
    """
    pieces = dict(leaves)
    shapes = {np.shape(leaf) for leaf in pieces.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"the entries of the stack '{path}' would have different shapes, {sorted(shapes)}: map "
            "all of its groups along one axis to the same number of features."
        )
    library: Any = np if all(isinstance(leaf, np.ndarray) for leaf in pieces.values()) else jnp
    while any(pieces):
        joined: dict[Entries, list[Any]] = {}
        for at, leaf in pieces.items():
            joined.setdefault(at[:-1], []).append(leaf)
        dim = next(iter(pieces))[-1][0]
        pieces = {at: library.concatenate(each, axis=dim) for at, each in joined.items()}
    return pieces[()]


def by_piece(
    leaf: Any, items: Sequence[T], place: Callable[[T], Axis], fn: Callable[[Any, list[T]], Any]
) -> Any:
    """An array with `fn(piece, items)` in place of its pieces, given what lies in each of them."""
    path = next((place(item).path for item in items), "")
    parts = divided(np.shape(leaf), items, place)
    return whole({at: fn(piece_of(leaf, at), inside) for at, inside in parts}, path)


def in_entry(leaf: Any, a: Axis, fn: Callable[[Any], Any]) -> Any:
    """An array with `fn(piece)` in place of the pieces in which a place lies."""
    return by_piece(leaf, [a], lambda a: a, lambda piece, inside: fn(piece) if inside else piece)


def apart(spec: S, leaves: Mapping[str, Any]) -> tuple[S, dict[str, Any]]:
    """A spec and leaves without stacks: every piece of one is a leaf of its own, `path[index]`.

    Args:
        spec: A `PermutationSpec`.
        leaves: Leaves by path; groups are kept along these only.
    """
    found: dict[str, list[Axis]] = {}
    for axes in spec.groups.values():
        for a in axes:
            if a.entries and a.path in leaves:
                found.setdefault(a.path, []).append(a)
    if not found:
        return spec, dict(leaves)
    names = {
        path: {
            at: path + "".join(f"[{k}]" for _, k in at)
            for at in pieces(np.shape(leaves[path]), axes)
        }
        for path, axes in found.items()
    }
    separate = {
        name: leaf
        for path, whole in leaves.items()
        for name, leaf in (
            ((name, piece_of(whole, at)) for at, name in names[path].items())
            if path in names
            else [(path, whole)]
        )
    }
    within: dict[str, dict[Entries, list[str]]] = {path: {} for path in names}
    for path, of in names.items():
        for at, name in of.items():
            for entries in around(at):
                within[path].setdefault(entries, []).append(name)
    groups = {
        group: [
            bare(a._replace(path=name))
            for a in axes
            for name in (within[a.path][a.entries] if a.path in within else [a.path])
        ]
        for group, axes in spec.groups.items()
    }
    return dataclasses.replace(spec, groups=groups), separate
