"""The algebra of axes: row-major products of atoms, which can be tied, split and fixed.

An *axis* of an array is a list of atoms, its row-major factors: the axis of length 320 that comes
out of flattening a 4x4 map of 20 channels is `[4, 4, 20]`. An *atom* is a factor that moves as one:
to permute it permutes every axis in which it occurs. Three operations are all that the rules of the
primitives need:

* `unify` ties two axes, since an equation pairs their entries one with one;
* `split`, used by `unify` and `reshape`, refines an atom into a product of two, since an equation
  looks inside it;
* `fix` gives up an axis, since an equation treats its entries differently.

Each only ever removes symmetries: tying identifies two permutations, splitting keeps those that
respect the product, fixing keeps the identity. A rule that was right for the atoms as it found them
therefore stays right whatever later equations do, and one pass over the equations suffices, loops
included.

Atoms are integers. Tied atoms form a class (union-find), and size, split and fixedness are facts
about the class, while each atom keeps its own identity: layout operations pass atoms on untouched,
which lets `Propagation` trace an operand of a layer back to the axis of the leaf that it came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Axis = list[int]
"""Atoms of one axis, in row-major order. Atoms of size 1 may be left out."""


class Cause(NamedTuple):
    """Why an atom is fixed.

    Attributes:
        primitive: Name of the primitive, or "input" or "output".
        equation: An object with a `where` ("file:line"), or None where no equation is to blame.
    """

    primitive: str
    equation: Any = None


class Algebra:
    """Classes of atoms: union-find with splitting."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._cause: list[Cause | None] = []
        self._halves: dict[int, tuple[int, int]] = {}

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
        """Why the atom is fixed, or None if it is free. For atoms that `expand` returned."""
        return self._cause[self.find(atom)]

    def length(self, axis: Iterable[int]) -> int:
        """Number of entries of an axis."""
        return math.prod(self._size[atom] for atom in axis)

    def expand(self, axis: Iterable[int]) -> Axis:
        """The axis in atoms that are not split, without those of size 1."""
        expanded: Axis = []
        stack = list(axis)[::-1]
        while stack:
            atom = stack.pop()
            halves = self._halves_of(atom)
            if halves is not None:
                stack += halves[::-1]
            elif self._size[atom] != 1:
                expanded.append(atom)
        return expanded

    def fix(self, axis: Iterable[int], cause: Cause) -> None:
        """Takes every symmetry from an axis. The first cause is remembered."""
        for atom in self.expand(axis):
            root = self.find(atom)
            self._cause[root] = self._cause[root] or cause

    def unify(self, left: Iterable[int], right: Iterable[int], cause: Cause) -> None:
        """Ties two axes of equal length, splitting atoms where their products differ.

        Args:
            left: An axis.
            right: Another.
            cause: The equation that pairs them, blamed if no common refinement exists.
        """
        left, right = self.expand(left), self.expand(right)
        while left and right:
            a, b = left.pop(), right.pop()
            halves_a, halves_b = self._halves_of(a), self._halves_of(b)
            if halves_a is not None or halves_b is not None:  # an earlier turn split its class
                left += halves_a or (a,)
                right += halves_b or (b,)
                continue
            m, n = self._size[a], self._size[b]
            if m == n:
                self._union(a, b, cause)
            elif n and m % n == 0:
                left += self._split(a, m // n, n)
                right.append(b)
            elif m and n % m == 0:
                left.append(a)
                right += self._split(b, n // m, m)
            else:
                self.fix([a, b], cause)
                break
        self.fix([*left, *right], cause)

    def reshape(self, axes: Sequence[Axis], shape: Sequence[int], cause: Cause) -> list[Axis]:
        """The axes after a row-major reshape to `shape`.

        Boundaries that no refinement of the atoms can express fix what lies left of them.
        """
        flat = [atom for axis in axes for atom in self.expand(axis)]
        result: list[Axis] = []
        for n in reversed(shape):
            axis: Axis = []
            missing = n
            while missing > 1 and flat:
                atom = flat.pop()
                halves = self._halves_of(atom)
                size = self._size[atom]
                if halves is not None:
                    flat += halves
                elif size and missing % size == 0:
                    axis.insert(0, atom)
                    missing //= size
                elif size % missing == 0:
                    flat += self._split(atom, size // missing, missing)
                else:
                    self.fix([*flat, atom, *axis], cause)
                    rest = shape[: len(shape) - len(result)]
                    return [[self.atom(m, cause)] for m in rest] + result
            result.insert(0, axis)
        return result

    def _split(self, atom: int, high: int, low: int) -> tuple[int, int]:
        """Refines the atom's class into a row-major product; returns the atom's own halves."""
        root = self.find(atom)
        cause = self._cause[root]
        self._halves[root] = (self.atom(high, cause), self.atom(low, cause))
        return self._halves_of(atom)  # type: ignore[return-value]

    def _halves_of(self, atom: int) -> tuple[int, int] | None:
        if atom in self._halves:
            return self._halves[atom]
        shared = self._halves.get(self.find(atom))
        if shared is None:
            return None
        # Halves of its own, tied to its class's, so that the atom keeps its identity.
        high, low = (self.atom(self._size[half]) for half in shared)
        own = high, low
        for mine, theirs in zip(own, shared, strict=True):
            self._parent[mine] = self.find(theirs)
        self._halves[atom] = own
        return own

    def _union(self, a: int, b: int, cause: Cause) -> None:
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        why = self._cause[a] or self._cause[b]
        if why is not None and why.equation is None:
            why = Cause(why.primitive, cause.equation)  # where the fixed axis met the free one
        self._parent[b] = a
        self._cause[a] = why
