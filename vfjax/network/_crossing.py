"""The values that cross a cut from stem to trunk, averaged and mapped."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees import resolve_weights, weighted_mean
from vfjax._trees.concrete import check_one_device
from vfjax._types import Array
from vfjax.symmetry._entries import by_piece
from vfjax.symmetry._group_maps import check_matrix, contract
from vfjax.symmetry._places import Place, map_axis, map_within, permute_at, size_at


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """The values that cross a cut, from stem to trunk.

    Attributes:
        values: Arrays, in the order in which the network computes them.
        depth: Depth of the cut.
        origin: Structure, shapes and dtypes of the network's input, apart from its batch size.
    """

    values: tuple[Array, ...]
    depth: int = dataclasses.field(metadata={"static": True})
    origin: Hashable = dataclasses.field(default=None, metadata={"static": True}, repr=False)


def average(
    crossings: Sequence[Crossing], averaged: Sequence[bool], weights: Sequence[Any] | None
) -> Crossing:
    """See `Network.average_crossings`; `averaged` says which values depend on parameters."""
    first = crossings[0]
    if len({c.depth for c in crossings}) > 1:
        raise ValueError(f"crossings are of different cuts: {[c.depth for c in crossings]}.")
    shapes = {tuple((jnp.shape(v), jnp.result_type(v)) for v in c.values) for c in crossings}
    if len({c.origin for c in crossings}) > 1 or len(shapes) > 1:
        raise ValueError(f"crossings are of different inputs; their shapes are {shapes}.")
    weights = resolve_weights(weights, len(crossings), of="crossings")
    check_one_device(**{f"crossings[{k}]": c.values for k, c in enumerate(crossings)})
    values = []
    for mix, *column in zip(averaged, *(c.values for c in crossings), strict=True):
        dtype = column[0].dtype
        if not mix:
            values.append(column[0])
            continue
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"A value of dtype {dtype} that depends on parameters crosses the cut at depth "
                f"{first.depth}; models disagree on it, and it has no average. Cut elsewhere."
            )
        values.append(weighted_mean(column, weights))
    return Crossing(tuple(values), first.depth, first.origin)


def mapped(
    crossing: Crossing, places: Sequence[Sequence[Place]], maps: Mapping[str, Any]
) -> Crossing:
    """See `Network.map_crossing`; `places` are the groups of each value, with their places."""
    values = [
        mapped_value(value, at, maps) for value, at in zip(crossing.values, places, strict=True)
    ]
    return Crossing(tuple(values), crossing.depth, crossing.origin)


def mapped_value(value: Array, places: Sequence[Place], maps: Mapping[str, Any]) -> Array:
    """See `Network.map_site`; `places` are the groups of the value, those within others last."""
    todo = [place for place in places if place.group in maps]
    fn = functools.partial(_mapped_piece, maps=maps)
    return by_piece(value, todo, lambda place: place.at, fn)


def _mapped_piece(value: Array, todo: Sequence[Place], maps: Mapping[str, Any]) -> Array:
    todo = [place.bare() for place in todo]
    while todo:
        place, *todo = todo
        length, at = value.shape[place.at.axis], place.at
        given = maps[place.group]
        value = _mapped(value, place, given)
        if value.shape[at.axis] != length:
            todo = [other.after(at, length, np.shape(given)[-2]) for other in todo]
    return value


def _mapped(value: Array, place: Place, given: Any) -> Array:
    group, at, owner = place
    if np.issubdtype(given.dtype, np.integer):
        return permute_at(value, at, owner, given)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise ValueError(
            f"A value of dtype {value.dtype} that carries the group {group!r} crosses the cut, and "
            "a matrix cannot map it. Cut elsewhere."
        )
    if owner is not None and np.ndim(given) == 3:
        return map_within(value, at, owner, lambda view, axis, i: contract(given[i], view, axis))
    check_matrix(group, given, size_at(group, at, value.shape))
    return map_axis(value, at, lambda view, axis: contract(given, view, axis))
