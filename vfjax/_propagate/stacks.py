"""Stacks: arrays each of whose entries along a dimension has axes of its own.

Layers are often stacked: those that a scan steps over, experts, vmapped networks. Units of one
entry of such a stack need not be in the order of another's. The stack's dimension itself has no
symmetry, so its entries keep their places, and every entry can have its own permutations.

A first pass ties the axes of all entries, as they lie along one axis of one array. `stacked` finds
the dimensions that run over entries and are fixed. In a second pass the leaves along them have
different axes in each entry. An equation that acts entry by entry is followed once for each entry,
as if all others were like it; if it also combines what it makes of each, their axes are tied. So
are the axes of all entries before any other equation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from vfjax._jaxpr import PARAM, Graph, scan_arity, scans_layers, union
from vfjax._jaxpr.primitives import CUSTOM, DOT, INLINE, LOOPS, SCAN, SLICE
from vfjax._propagate import registry
from vfjax._propagate.atoms import Cause
from vfjax._propagate.dims import Ranges, pieces, through
from vfjax._propagate.folds import Folds
from vfjax._propagate.registry import Axes, Stack, Step, Value
from vfjax._propagate.within import Record

T = TypeVar("T")

NESTED = LOOPS | INLINE | CUSTOM

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


def stacked(
    graph: Graph, algebra: Folds, env: Mapping[int, Value], record: Record
) -> dict[int, dict[Any, Along]]:
    """Finds the leaves that are stacks.

    Args:
        graph: The network.
        algebra: The atoms, after all equations have been followed.
        env: The axes of all values.
        record: What was seen.

    Returns:
        By the id of a leaf, its dimensions that run over entries, by a name of the stack.
    """
    single: dict[int, set[int]] = {}  # by class of an axis, the single entries that are taken
    for atom, start in record.taken:
        single.setdefault(algebra.find(atom), set()).add(start)
    whole = {algebra.find(atom) for atom in record.stepped}
    kept: set[int] = set()  # fixed axes that layers keep beside others that have symmetries
    for axes in record.kept:
        free = [_free(algebra, axis) for axis in axes]
        for axis, own in zip(axes, free, strict=True):
            kept.update(map(algebra.find, axis if any(free) and not own else ()))
    found: dict[int, dict[Any, Along]] = {}
    for leaf in graph.inputs[: graph.num_leaves] if single or whole or kept else ():
        entries = 1
        for dim, axis in enumerate(env[leaf].axes):
            name = algebra.find(axis[0])
            indices = {
                start + k
                for start, atom in _segments(algebra, axis[0])
                for k in single.get(algebra.find(atom), ())
            }
            if name in whole | kept:
                indices = {*range(env[leaf].shape[dim])}
            if len(indices) > 1 and entries * len(indices) <= _MOST:
                entries *= len(indices)
                causes = algebra.causes(axis) or [Cause(SLICE)]
                along = Along(dim, tuple(sorted(indices)), causes[0])
                found.setdefault(leaf, {}).setdefault(name, along)
    return found


def _free(algebra: Folds, axis: Sequence[int]) -> bool:
    """Whether some part of an axis has a symmetry."""
    return any(algebra.cause(place.atom) is None for place in algebra.places(axis))


def _segments(algebra: Folds, atom: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """An atom and the segments that it was cut into, with their positions."""
    yield start, atom
    parts = algebra.parts(atom)
    for part in parts.atoms if parts is not None and parts.kind == "sum" else ():
        yield from _segments(algebra, part, start)
        start += algebra.size(part)


def stack(algebra: Folds, shape: Sequence[int], depends: int, along: Mapping[Any, Along]) -> Value:
    """A leaf whose entries along some dimensions have axes of their own."""
    shared = {of.dim: [algebra.atom(shape[of.dim], of.cause)] for of in along.values()}
    entries = {
        index: [shared.get(k) or [algebra.atom(n)] for k, n in enumerate(shape)]
        for index in itertools.product(*(of.indices for of in along.values()))
    }
    dims = {name: of.dim for name, of in along.items()}
    return Value(_first(entries), tuple(shape), depends, Stack(dims, entries))


def _note(step: Step) -> None:
    """Records the axes of parameters that an equation treats as if they ran over entries."""
    bits = [value.depends for value in step.inputs]
    if union(bits) == PARAM:
        for taken in pieces(step.eqn) or ():
            for axis, n, (start, stop) in zip(*step.inputs[0][:2], taken, strict=True):
                if stop - start == 1 < n <= _LONGEST and len(axis) == 1:
                    step.record.taken.append((axis[0], start))
    elif step.primitive == DOT and PARAM in bits:
        side = bits.index(PARAM)
        contracted = step.params["dimension_numbers"][0][side]
        kernel = enumerate(step.inputs[side].axes)
        step.record.kept.append([axis for dim, axis in kernel if dim not in contracted])
    elif step.primitive == SCAN and scans_layers(step.eqn, bits):
        for value in step.inputs[sum(scan_arity(step.params)) :]:
            step.record.stepped.extend(value.axes[0] if value.depends == PARAM else ())


def apply(step: Step) -> list[Value]:
    """Applies the primitive's rule; to stacks once for every entry, if it acts entry by entry."""
    operands = [_dims(value) for value in step.inputs]
    if not any(operands):
        _note(step)
        return registry.apply(step)
    taken = pieces(step.eqn)
    after = through(step.eqn, operands) if taken is None else [operands[0]] * len(taken)
    if after is None:
        nested = step.primitive in NESTED  # whose rules follow what is inside with stacks
        inputs = step.inputs if nested else [tied(step, value) for value in step.inputs]
        return registry.apply(dataclasses.replace(step, inputs=inputs))
    indices = _indices(step, taken)
    followed = [
        registry.apply(dataclasses.replace(step, inputs=[_entry(step, v, at) for v in step.inputs]))
        for at in indices
    ]
    return [
        _joined(
            step,
            [(at, values[r]) for at, values in zip(indices, followed, strict=True)],
            dims,
            None if taken is None else taken[r],
        )
        for r, dims in enumerate(after)
    ]


def _indices(step: Step, taken: Sequence[Ranges] | None) -> list[dict[Any, int]]:
    """The entries of an equation's stacks that need to be followed, by the names of the stacks."""
    known: dict[Any, set[int]] = {}
    for value in step.inputs:
        if value.stack is not None:
            for k, name in enumerate(value.stack.dims):
                known.setdefault(name, set()).update(index[k] for index in value.stack.entries)
    for name, dim in (_dims(step.inputs[0]) if taken is not None else {}).items():
        ranges = [range(*part[dim]) for part in taken or ()]
        kept = {index for index in known[name] if any(index in r for r in ranges)}
        known[name] = kept | {r.start for r in ranges if not kept.intersection(r)}
    product = itertools.product(*map(sorted, known.values()))
    return [dict(zip(known, at, strict=True)) for at in product]


def _joined(
    step: Step,
    followed: Sequence[tuple[Mapping[Any, int], Value]],
    dims: Mapping[Any, int],
    taken: Ranges | None,
) -> Value:
    """One result of an equation, as a stack of what became of each entry.

    Args:
        step: The equation.
        followed: The result by the entry that was followed.
        dims: The dimensions of the result that run over stacks. Entries of other stacks are
            combined in it, which ties them.
        taken: What a slice takes.
    """
    entries: dict[tuple[int, ...], Axes] = {}
    new: dict[Any, int] = {}
    for at, value in followed:
        index = []
        for name, dim in dims.items():
            start, stop = (0, value.shape[dim]) if taken is None else taken[dim]
            if not start <= at[name] < stop:
                break
            if stop - start > 1:
                part = taken is not None and stop - start != step.inputs[0].shape[dim]
                new[(name, start, stop) if part else name] = dim
                index.append(at[name] - start)
        else:
            axes = entries.setdefault(tuple(index), value.axes)
            for one, other in zip(axes, value.axes, strict=True) if axes is not value.axes else ():
                step.unify(one, other)
    first = followed[0][1]
    return Value(_first(entries), first.shape, first.depends, Stack(new, entries) if new else None)


def _dims(value: Value) -> Mapping[Any, int]:
    return {} if value.stack is None else value.stack.dims


def _entry(step: Step, value: Value, at: Mapping[Any, int]) -> Value:
    """A value as if all entries of its stacks were like the one at some indices."""
    if value.stack is not None:
        index = tuple(at[name] for name in value.stack.dims)
        entries = value.stack.entries
        axes = entries[index] if index in entries else _first(entries)
        return Value(axes, value.shape, value.depends)
    if value.depends:
        # Along what was broadcast it does not vary: it need not tie entries to each other.
        return registry.reading(step.algebra, value) if value.flat else value
    # A constant does not vary along what is free in it: it need not tie entries to each other.
    free = [not step.algebra.causes(axis) for axis in value.axes]
    copies = [
        step.free(n) if f else axis
        for axis, n, f in zip(value.axes, value.shape, free, strict=True)
    ]
    return Value(copies, value.shape, 0)


def tied(step: Step, value: Value) -> Value:
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
    dims, known = tuple(_dims(value).values()), entries_of(value)
    if not dims or dim in dims:
        return {(): value.axes[dim]}
    first = _first(known)
    every = itertools.product(*(range(value.shape[d]) for d in dims))
    return {
        tuple(sorted(zip(dims, index, strict=True))): known.get(index, first)[dim]
        for index in (*known, *(i for i in every if i not in known))
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
