"""Propagation through a whole graph: one pass over its equations, then the atoms are read off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from jax.extend import core as jex

from vfjax._jaxpr import INPUT, PARAM, Graph
from vfjax._propagate import (
    calls,
    draws,
    elementwise,
    indexing,
    layout,
    linear,
    matrices,
    reduce,
    stacks,
)
from vfjax._propagate.atoms import Cause, Place, Window
from vfjax._propagate.folds import Folds
from vfjax._propagate.registry import Step, Value, constant, reading, shape_of
from vfjax._propagate.within import Record, independent

# Imported for their rules.
_FAMILIES = (calls, draws, elementwise, indexing, layout, linear, matrices, reduce)


class Atom(NamedTuple):
    """A part of an axis that moves as one, and where it lies.

    Attributes:
        size: Number of entries.
        group: Which atoms it moves with; None if it is fixed or touches no leaf.
        outer: Its entries are the middle of a row-major (outer, size, inner) view of its last
            window (or of the axis).
        inner: See `outer`.
        windows: Nested segments of the axis to look into first, as (outer, start, size, inner).
        entries: In which entries of a stack it lies alone, as (dimension, index); see `stacks`.
    """

    size: int
    group: int | None
    outer: int = 1
    inner: int = 1
    windows: tuple[Window, ...] = ()
    entries: tuple[tuple[int, int], ...] = ()


class Fixed(NamedTuple):
    """An axis of a leaf without any symmetry.

    Attributes:
        leaf: Id of the leaf's value.
        axis: The axis.
        primitive: What fixed it: a primitive, "input" or "output" (it is tied to one of their
            axes),
            "constant" (it meets constants that differ), or "unused" (nothing reads the leaf).
        where: "file:line" of the equation, or "".
    """

    leaf: int
    axis: int
    primitive: str
    where: str


class Tie(NamedTuple):
    """A layer contracts or keeps an atom of a leaf's axis.

    Attributes:
        primitive: The layer's primitive.
        leaf: Id of the leaf's value.
        axis: The axis.
        position: Which of the axis's atoms.
        role: "in" if the layer contracts it with data that depends on x, "out" if it keeps it.
    """

    primitive: str
    leaf: int
    axis: int
    position: int
    role: str


@dataclasses.dataclass(frozen=True)
class Propagation:
    """The symmetries of all axes of a graph.

    Attributes:
        axes: By value id, the atoms of each dimension's axis, leaving out those of size 1; where
            entries of a stack differ, the atoms of one entry after another.
        leaves: Ids of the variables' leaves, in their order.
        fixed: Axes of leaves that no group touches.
        ties: What layers do with the leaves, in graph order.
        within: By group, another inside each of whose entries it moves independently (see
            `within`).
    """

    axes: dict[int, tuple[tuple[Atom, ...], ...]]
    leaves: tuple[int, ...]
    fixed: tuple[Fixed, ...]
    ties: tuple[Tie, ...]
    within: dict[int, int]


def propagate(graph: Graph) -> Propagation:
    """Finds which axes of the leaves can be permuted together.

    It never fails: axes that it cannot follow are fixed, and reported in `Propagation.fixed`.

    Args:
        graph: A flattened network.

    Returns:
        Groups of tied axes, for every value of the graph.
    """
    algebra, env, record = _follow(graph, {})
    if leaves := stacks.stacked(graph, algebra, env, record):
        algebra, env, record = _follow(graph, leaves)
    return _collect(graph, algebra, env, record)


def _follow(
    graph: Graph, leaves: Mapping[int, Mapping[Any, stacks.Along]]
) -> tuple[Folds, dict[int, Value], Record]:
    """Follows all equations, from leaves of which some are stacks."""
    algebra, record = Folds(), Record()
    env: dict[int, Value] = {}
    for k, value in enumerate(graph.inputs):
        cause = None if k < graph.num_leaves else Cause("input")
        shape = shape_of(graph.avals[value])
        bits = INPUT if cause else PARAM
        if value in leaves:
            env[value] = stacks.stack(algebra, shape, bits, leaves[value])
        else:
            env[value] = Value([[algebra.atom(n, cause)] for n in shape], shape, bits)
        for axes in stacks.entries_of(env[value]).values():
            record.see(axes)
    for value, array in graph.consts.items():
        env[value] = constant(algebra, array, shape_of(graph.avals[value]))

    for equation in graph.equations:
        operands = [
            constant(algebra, v.val, shape_of(v.aval))
            if isinstance(v, jex.Literal)
            else reading(algebra, env[v])
            for v in equation.inputs
        ]
        step = Step(algebra, equation.eqn, operands, equation, record)
        for value, result in zip(equation.outputs, stacks.apply(step), strict=True):
            if value is not None:
                env[value] = result

    for value in graph.output_ids:
        producer = graph.producer.get(value)
        maker = None if producer is None else graph.equations[producer]
        for axes in stacks.entries_of(env[value]).values():
            for axis in axes:
                algebra.fix(axis, Cause("output", maker))
    algebra.close()
    return algebra, env, record


def _collect(graph: Graph, algebra: Folds, env: dict[int, Value], record: Record) -> Propagation:
    """Numbers the groups and reads everything out of the algebra."""
    leaves = graph.inputs[: graph.num_leaves]
    used = [leaf for leaf in leaves if graph.users.get(leaf) or leaf in graph.output_ids]
    origin: dict[int, list[tuple[int, int, int]]] = {}
    groups: dict[int, int] = {}
    fixed = []
    for leaf in leaves:
        for k, axis in enumerate(env[leaf].axes):
            if leaf not in used:
                fixed.append(Fixed(leaf, k, "unused", ""))
                continue
            atoms = [
                p.atom for of in stacks.along(env[leaf], k).values() for p in algebra.places(of)
            ]
            free = [atom for atom in atoms if algebra.cause(atom) is None]
            for atom in free:
                groups.setdefault(algebra.find(atom), len(groups))
            if causes := [] if free else algebra.causes(axis):
                fixed.append(Fixed(leaf, k, *_blame(causes)))

    sizes = {group: algebra.size(root) for root, group in groups.items()}

    def read(place: Place) -> Atom:
        group = groups.get(algebra.find(place.atom))
        return Atom(algebra.size(place.atom), group, place.outer, place.inner, place.windows)

    shown: dict[int, tuple[tuple[Atom, ...], ...]] = {}
    own = set(leaves)
    for v, value in env.items():
        if value.stack is None and v not in own:
            shown[v] = tuple(tuple(map(read, algebra.places(axis))) for axis in value.axes)
            continue
        by_axis = []
        for k in range(len(value.axes)):
            places = {at: algebra.places(of) for at, of in stacks.along(value, k).items()}
            atoms = {at: tuple(map(read, of)) for at, of in places.items()}
            kept = stacks.shared(atoms)
            by_axis.append(tuple(a._replace(entries=at) for at, of in kept.items() for a in of))
            if v in own:
                starts = dict(zip(kept, accumulate([0, *map(len, kept.values())]), strict=False))
                for at, of in places.items():
                    first = starts[stacks.shorten(at, kept)]
                    for i, place in enumerate(of):
                        known = origin.setdefault(place.atom, [])
                        known += [(v, k, first + i)] * ((v, k, first + i) not in known)
        shown[v] = tuple(by_axis)

    ties = []
    for use in record.uses:
        for role, axes in (("out", use.kept), ("in", use.contracted)):
            for axis in axes:
                for place in algebra.places(axis):
                    known = origin.get(place.atom, ())
                    ties += [Tie(use.primitive, *at, role) for at in known]
    return Propagation(
        axes=shown,
        leaves=leaves,
        fixed=tuple(fixed),
        ties=tuple(ties),
        within=independent(algebra, record, lambda atom: groups.get(algebra.find(atom)), sizes),
    )


def _blame(causes: list[Cause]) -> tuple[str, str]:
    """The most telling cause: a primitive before the network's ends."""
    telling = [cause for cause in causes if cause.primitive not in ("input", "output")]
    cause = (telling or causes)[0]
    return cause.primitive, "" if cause.equation is None else cause.equation.where
