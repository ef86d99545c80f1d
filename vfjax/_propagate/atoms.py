"""Atoms: what axes are made of, which of them are tied, and how they are refined.

An *axis* of an array is a list of atoms, its row-major factors: flattening a 4x4 map of 20 channels
gives an axis of length 320, `[4, 4, 20]`. An *atom* is a factor that moves as one: permuting it
permutes every axis in which it occurs. It may be refined, once, in one of two ways:

* into a *product*, row-major factors that move independently: 12 channels into 3 heads of 4;
* into a *sum*, consecutive segments that move independently: the parts of a concatenation.

Atoms are integers. Tied atoms form a class (union-find), and size, refinement and fixedness are
facts about the class, while each atom keeps its identity: layout operations pass atoms on
untouched, so `Propagation` can trace an operand of a layer back to the axis of the leaf that it
came from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Axis = list[int]
"""Atoms of one axis, in row-major order. Atoms of size 1 may be left out."""

Window = tuple[int, int, int, int]
"""(outer, start, size, inner): `size` of the n entries of a row-major (outer, n, inner) view."""


class Cause(NamedTuple):
    """Why an atom is fixed.

    Attributes:
        primitive: Name of the primitive, or "input" or "output".
        equation: An object with a `where` ("file:line"), or None where no equation is to blame.
    """

    primitive: str
    equation: Any = None


class Parts(NamedTuple):
    """How an atom is refined.

    Attributes:
        kind: "product" or "sum".
        atoms: Its factors or segments, in order.
        cause: What refined it.
    """

    kind: str
    atoms: tuple[int, ...]
    cause: Cause | None


class Place(NamedTuple):
    """An unrefined atom of an axis, and where in the axis it lies.

    Attributes:
        atom: The atom.
        outer: In the last window (or the axis), its entries are in the middle of a row-major
            (outer, n, inner) view.
        inner: See `outer`.
        windows: Nested segments to look into first, outermost first.
    """

    atom: int
    outer: int
    inner: int
    windows: tuple[Window, ...]


class Atoms:
    """Classes of atoms: union-find with refinement."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._cause: list[Cause | None] = []
        self._parts: dict[int, Parts] = {}

    def atom(self, size: int, cause: Cause | None = None) -> int:
        """A new atom; a `cause` makes it fixed."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._cause.append(cause)
        return len(self._parent) - 1

    def find(self, atom: int) -> int:
        """The representative of the atom's class."""
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def size(self, atom: int) -> int:
        """Number of entries."""
        return self._size[atom]

    def cause(self, atom: int) -> Cause | None:
        """Why the atom is fixed, or None if it is free. For atoms that are not refined."""
        return self._cause[self.find(atom)]

    def length(self, axis: Iterable[int]) -> int:
        """Number of entries of an axis."""
        return math.prod(self._size[atom] for atom in axis)

    def parts(self, atom: int) -> Parts | None:
        """The atom's factors or segments, each tied to its class's; None if it is whole."""
        if atom in self._parts:
            return self._parts[atom]
        shared = self._parts.get(self.find(atom))
        if shared is None:
            return None
        own = tuple(self.atom(self._size[part]) for part in shared.atoms)
        for mine, theirs in zip(own, shared.atoms, strict=True):
            self._parent[mine] = self.find(theirs)
        self._parts[atom] = shared._replace(atoms=own)
        return self._parts[atom]

    def refine(self, atom: int, kind: str, sizes: Sequence[int], cause: Cause) -> tuple[int, ...]:
        """Refines the class of a whole atom; returns the atom's own parts."""
        root = self.find(atom)
        parts = tuple(self.atom(size, self._cause[root]) for size in sizes)
        self._parts[root] = Parts(kind, parts, cause)
        own = self.parts(atom)
        assert own is not None
        return own.atoms

    def tie(self, a: int, b: int, cause: Cause) -> None:
        """Merges the classes of two whole atoms of equal size."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        why = self._cause[a] or self._cause[b]
        if why is not None and why.equation is None:
            why = Cause(
                why.primitive, cause.equation
            )  # blame the equation where the fixed axis met the free one
        self._parent[b] = a
        self._cause[a] = why

    def product(self, axis: Axis) -> int:
        """One atom for a whole axis."""
        if len(axis) == 1:
            return axis[0]
        atom = self.atom(self.length(axis))
        if axis:
            self._parts[atom] = Parts("product", tuple(axis), None)
        return atom

    def total(self, axes: Sequence[Axis], cause: Cause | None = None) -> Axis:
        """The axis in which axes follow one another."""
        axes = [axis for axis in axes if self.length(axis)]
        if len(axes) == 1:
            return axes[0]
        atom = self.atom(sum(map(self.length, axes)))
        if axes:
            self._parts[atom] = Parts("sum", tuple(map(self.product, axes)), cause)
        return [atom]

    def expand(self, axis: Iterable[int]) -> Axis:
        """The factors of an axis, whole atoms and sums, without those of size 1."""
        expanded: Axis = []
        stack = list(axis)[::-1]
        while stack:
            atom = stack.pop()
            parts = self.parts(atom)
            if parts is not None and parts.kind == "product":
                stack += parts.atoms[::-1]
            elif self._size[atom] != 1:
                expanded.append(atom)
        return expanded

    def segments(self, axis: Iterable[int]) -> list[Axis]:
        """The consecutive segments of an axis; the first factor of each is a whole atom."""
        axis = self.expand(axis)
        parts = self.parts(axis[0]) if axis else None
        if parts is None:
            return [axis]
        return [segment for part in parts.atoms for segment in self.segments([part, *axis[1:]])]

    def places(self, axis: Iterable[int], windows: tuple[Window, ...] = ()) -> list[Place]:
        """The whole atoms of an axis, and where each lies."""
        places: list[Place] = []
        factors = self.expand(axis)
        for k, atom in enumerate(factors):
            outer, inner = self.length(factors[:k]), self.length(factors[k + 1 :])
            parts = self.parts(atom)
            if parts is None:
                places.append(Place(atom, outer, inner, windows))
                continue
            start, within = 0, windows
            if windows and outer == inner == 1:  # a segment that is a sum itself
                *before, (outer, start, _, inner) = windows
                within = tuple(before)
            for part in parts.atoms:
                window = outer, start, self._size[part], inner
                places += self.places([part], (*within, window))
                start += self._size[part]
        return places

    def copied(self, axes: Sequence[Axis]) -> list[Axis]:
        """Axes as those of an array that no variable changes, for one of its readers alone.

        Where such an array is free it does not vary, so what one reader ties says nothing about
        another, and where it is fixed each reader is to blame for itself. Free factors that follow
        one another are then one: all their entries are equal. (A class in two places is none of
        these: it might be free only if it moves in both.)
        """
        counts = Counter(self.find(place.atom) for axis in axes for place in self.places(axis))
        shared = {root: self.atom(self.size(root)) for root, n in counts.items() if n > 1}

        def copy(axis: Iterable[int]) -> Axis:
            new: Axis = []
            equal = 1  # the free entries that precede what comes next
            for atom in self.expand(axis):
                parts = self.parts(atom)
                if parts is None and self.cause(atom) is None and self.find(atom) not in shared:
                    equal *= self.size(atom)
                    continue
                if equal != 1:
                    new.append(self.atom(equal))
                    equal = 1
                if parts is not None:
                    new += self.total([copy([part]) for part in parts.atoms], parts.cause)
                elif (cause := self.cause(atom)) is not None:
                    new.append(self.atom(self.size(atom), cause))
                else:
                    new.append(shared[self.find(atom)])
            return new + ([self.atom(equal)] if equal != 1 else [])

        return [copy(axis) for axis in axes]

    def fix(self, axis: Iterable[int], cause: Cause) -> None:
        """Removes every symmetry of an axis. The first cause is remembered."""
        for place in self.places(axis):
            root = self.find(place.atom)
            self._cause[root] = self._cause[root] or cause

    def causes(self, axis: Axis) -> list[Cause]:
        """Why parts of an axis are fixed, or why it was cut into single entries."""
        causes = [self.cause(place.atom) for place in self.places(axis)]
        causes += [parts.cause for parts in map(self.parts, self.expand(axis)) if parts is not None]
        return [cause for cause in causes if cause is not None]
