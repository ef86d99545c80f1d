"""Stacks: arrays each of whose entries along a dimension has axes of its own.

Layers are often stacked: those that a scan steps over, experts, vmapped networks. Units of one
entry of such a stack need not be in the order of another's. The stack's dimension itself has no
symmetry, so its entries keep their places, and every entry can have its own permutations.

A first pass ties the axes of all entries, as they lie along one axis of one array. `stacked` finds
the dimensions that run over entries and are fixed. In a second pass the leaves along them have
different axes in each entry. An equation that acts entry by entry is followed once for each entry,
as if all others were like it; before any other, the axes of all entries are tied.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from vfjax._jaxpr import INPUT, PARAM, Graph, scan_arity, scans_layers
from vfjax._jaxpr.primitives import DOT, SCAN, SLICE
from vfjax._propagate import registry
from vfjax._propagate.atoms import Cause
from vfjax._propagate.dims import pieces, through
from vfjax._propagate.folds import Folds
from vfjax._propagate.registry import Stack, Step, Value

T = TypeVar("T")

# The largest number of entries of one leaf that have axes of their own.
_MOST = 4096
# The longest dimension of which a slice may take single entries: longer ones are tables.
_LONGEST = 512


class Along(NamedTuple):
    """A dimension of a leaf along which it is a stack.

    Attributes:
        dim: The dimension.
        indices: The entries with axes of their own.
        cause: Why the dimension is fixed.
    """

    dim: int
    indices: tuple[int, ...]
    cause: Cause


def stacked(graph: Graph, algebra: Folds, env: Mapping[int, Value]) -> dict[int, dict[Any, Along]]:
    """Finds the leaves that are stacks.

    Args:
        graph: The network.
        algebra: The atoms, after all equations have been followed.
        env: The axes of all values.

    Returns:
        By the id of a leaf, its dimensions that run over entries, by a name of the stack.
    """
    single: set[int] = set()  # classes of dimensions from which single entries are taken
    whole: set[int] = set()  # classes of dimensions all of whose entries are used
    for equation in graph.equations:
        bits = [graph.depends[v] if isinstance(v, int) else 0 for v in equation.inputs]
        if equation.depends == PARAM:
            value = env[equation.values[0]]
            for taken in pieces(equation.eqn) or ():
                for axis, n, (start, stop) in zip(value.axes, value.shape, taken, strict=True):
                    if stop - start == 1 < n <= _LONGEST:
                        single.update(map(algebra.find, axis))
        elif equation.primitive == DOT and sorted(bits[:2], key=lambda b: b & INPUT)[0] == PARAM:
            side = bits.index(PARAM)
            axes = env[equation.values[side]].axes
            for dim in equation.params["dimension_numbers"][1][side]:
                if all(algebra.cause(place.atom) for place in algebra.places(axes[dim])):
                    whole.update(map(algebra.find, axes[dim]))
        elif equation.primitive == SCAN and scans_layers(equation.eqn, bits):
            first = sum(scan_arity(equation.params))
            for v, b in list(zip(equation.inputs, bits, strict=True))[first:]:
                if b == PARAM:
                    whole.update(map(algebra.find, env[v].axes[0]))
    found: dict[int, dict[Any, Along]] = {}
    if not single | whole:
        return found
    for leaf in graph.inputs[: graph.num_leaves]:
        entries = 1
        for dim, axis in enumerate(env[leaf].axes if len(env[leaf].shape) > 1 else ()):
            n, name = env[leaf].shape[dim], algebra.find(axis[0])
            segments = algebra.segments(axis)
            starts = itertools.accumulate([0, *map(algebra.length, segments)])
            indices = tuple(
                start
                for start, segment in zip(starts, segments, strict=False)
                if algebra.length(segment) == 1
            )
            indices = tuple(range(n)) if name in whole else indices
            entries *= len(indices) or 1
            if (
                indices
                and n > 1
                and entries <= _MOST
                and _parts(algebra, axis[0]) & (single | whole)
            ):
                causes = algebra.causes(axis) or [Cause(SLICE)]
                found.setdefault(leaf, {}).setdefault(name, Along(dim, indices, causes[0]))
    return found


def _parts(algebra: Folds, atom: int) -> set[int]:
    """The classes of an atom and of the segments that it was cut into."""
    parts = algebra.parts(atom)
    inner = parts.atoms if parts is not None and parts.kind == "sum" else ()
    return {algebra.find(atom)}.union(*(_parts(algebra, part) for part in inner))


def stack(algebra: Folds, shape: Sequence[int], depends: int, along: Mapping[Any, Along]) -> Value:
    """A leaf whose entries along some dimensions have axes of their own."""
    shared = {of.dim: [algebra.atom(shape[of.dim], of.cause)] for of in along.values()}
    entries = {
        index: [shared.get(k) or [algebra.atom(n)] for k, n in enumerate(shape)]
        for index in itertools.product(*(of.indices for of in along.values()))
    }
    dims = {name: of.dim for name, of in along.items()}
    return Value(_first(entries), tuple(shape), depends, Stack(dims, entries))


def apply(step: Step) -> list[Value]:
    """Applies the primitive's rule; to stacks once for every entry, if it acts entry by entry."""
    operands = [{} if value.stack is None else value.stack.dims for value in step.inputs]
    if not any(operands):
        return registry.apply(step)
    taken = pieces(step.eqn)
    after = through(step.eqn, operands) if taken is None else [operands[0]] * len(taken)
    if after is None:
        return registry.apply(
            dataclasses.replace(step, inputs=[_tied(step, value) for value in step.inputs])
        )
    known: dict[Any, set[int]] = {}
    for value in step.inputs:
        if value.stack is not None:
            for k, name in enumerate(value.stack.dims):
                known.setdefault(name, set()).update(index[k] for index in value.stack.entries)
    for name in known if taken is not None else ():
        ranges = [range(*part[operands[0][name]]) for part in taken or ()]
        kept = {index for index in known[name] if any(index in r for r in ranges)}
        known[name] = kept | {r.start for r in ranges if not kept.intersection(r)}
    indices = [
        dict(zip(known, at, strict=True)) for at in itertools.product(*map(sorted, known.values()))
    ]
    followed = [
        registry.apply(dataclasses.replace(step, inputs=[entry(v, at) for v in step.inputs]))
        for at in indices
    ]
    results = []
    for r, dims in enumerate(after):
        inside = taken[r] if taken is not None else None
        entries: dict[tuple[int, ...], list] = {}
        new: dict[Any, int] = {}
        for at, values in zip(indices, followed, strict=True):
            index = []
            for name, dim in dims.items():
                start, stop = inside[dim] if inside is not None else (0, step.shapes[r][dim])
                if not start <= at[name] < stop:
                    break
                if stop - start > 1:
                    partial = inside is not None and stop - start != step.inputs[0].shape[dim]
                    new[(name, start, stop) if partial else name] = dim
                    index.append(at[name] - start)
            else:
                axes = entries.setdefault(tuple(index), values[r].axes)
                if axes is not values[r].axes:
                    for one, other in zip(axes, values[r].axes, strict=True):
                        step.unify(one, other)
        depends = followed[0][r].depends
        own = Stack(new, entries) if new else None
        results.append(Value(_first(entries), step.shapes[r], depends, own))
    return results


def entry(value: Value, at: Mapping[Any, int]) -> Value:
    """A value as if all entries of its stacks were like the one at some indices."""
    if value.stack is None:
        return value
    index = tuple(at[name] for name in value.stack.dims)
    axes = value.stack.entries.get(index, _first(value.stack.entries))
    return Value(axes, value.shape, value.depends)


def _tied(step: Step, value: Value) -> Value:
    """A value without stacks: the axes of all entries are tied."""
    if value.stack is None:
        return value
    first, *others = value.stack.entries.values()
    along = set(value.stack.dims.values())
    for axes in others:
        for dim in set(range(len(axes))) - along:
            step.unify(first[dim], axes[dim])
    return Value(first, value.shape, value.depends)


def _first(entries: Mapping[Any, Any]) -> Any:
    return next(iter(entries.values()))


def entries_of(value: Value) -> Mapping[tuple[int, ...], list]:
    """The axes of all entries of a value; a value that is no stack has one."""
    return {(): value.axes} if value.stack is None else value.stack.entries


At = tuple[tuple[int, int], ...]
"""Entries of stacks, as pairs of a dimension and an index along it."""


def along(value: Value, dim: int) -> dict[At, list[int]]:
    """The axes along one dimension, by the entries of stacks in which they lie."""
    if value.stack is None or dim in (dims := tuple(value.stack.dims.values())):
        return {(): value.axes[dim]}
    first = _first(value.stack.entries)
    return {
        tuple(sorted(zip(dims, index, strict=True))): value.stack.entries.get(index, first)[dim]
        for index in itertools.product(*(range(value.shape[d]) for d in dims))
    }


def shared(by_entry: Mapping[At, T]) -> dict[At, T]:
    """Joins the entries along each dimension along which all of them agree."""
    kept = dict(by_entry)
    for dim in [dim for dim, _ in _first_key(kept)]:
        joined: dict[At, T] = {}
        for at, of in kept.items():
            if joined.setdefault(tuple(pair for pair in at if pair[0] != dim), of) != of:
                break
        else:
            kept = joined
    return kept


def shorten(at: At, kept: Mapping[At, Any]) -> At:
    """The entries in a result of `shared` that entries became part of."""
    dims = {dim for dim, _ in _first_key(kept)}
    return tuple(pair for pair in at if pair[0] in dims)


def _first_key(mapping: Mapping[At, Any]) -> At:
    return next(iter(mapping))
