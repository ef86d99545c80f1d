"""The algebra of axes: products and sums of atoms, which can be tied, refined and fixed.

An axis is a row-major product of atoms, and an atom may be a sum of segments (see `atoms`). The
rules of the primitives need only four operations:

* `unify` ties two axes whose entries an equation pairs one to one; if their atoms differ, it
  refines both to a common refinement;
* `divide` and `reshape` refine an axis into segments or factors because an equation looks inside;
* `fix` gives up an axis because an equation treats its entries differently.

Each of them only removes symmetries: tying identifies two permutations, refining keeps those that
respect the product or the sum, fixing keeps the identity. A rule that was right for the atoms that
it met therefore stays right whatever later equations do, and one pass over the equations suffices,
loops included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from vfjax._propagate.atoms import Atoms, Axis, Cause


class Algebra(Atoms):
    """Atoms, and the operations on axes of them."""

    def unify(self, left: Iterable[int], right: Iterable[int], cause: Cause) -> None:
        """Ties two axes of equal length, refining their atoms where they differ.

        Args:
            left: An axis.
            right: Another.
            cause: The equation that pairs them, blamed if no common refinement exists.
        """
        left, right = list(left), list(right)
        if self.length(left) != self.length(right):
            self.fix([*left, *right], cause)
            return
        if not self.length(left):
            return
        sides = self.segments(left), self.segments(right)
        if len(sides[0]) == len(sides[1]) == 1:
            self._pair(sides[0][0], sides[1][0], cause)
            return
        points = sorted({end for side in sides for end in self._ends(side)[:-1]})
        divided = self.divide(left, points, cause), self.divide(right, points, cause)
        for a, b in zip(*divided, strict=True):
            self.unify(a, b, cause)

    def divide(self, axis: Iterable[int], points: Sequence[int], cause: Cause) -> list[Axis]:
        """Cuts an axis at increasing positions inside it.

        A product is cut through its first factor; a cut that falls inside an entry of that factor
        fixes the product.

        Args:
            axis: An axis.
            points: Where to cut it.
            cause: The equation that cuts.

        Returns:
            The `len(points) + 1` pieces.
        """
        if not points:
            return [list(axis)]
        pieces: list[list[Axis]] = [[]]
        start = 0
        for segment in self.segments(axis):
            stop = start + self.length(segment)
            inside = [point - start for point in points if start < point < stop]
            for piece in self._cut(segment, inside, cause) if inside else [segment]:
                pieces[-1].append(piece)
                start += self.length(piece)
                if start in points:
                    pieces.append([])
        return [self.total(piece, cause) for piece in pieces]

    def reshape(self, axes: Sequence[Axis], shape: Sequence[int], cause: Cause) -> list[Axis]:
        """The axes after a row-major reshape to `shape`.

        A boundary that no refinement of the atoms can express fixes all that lies to its left.
        """
        if not math.prod(shape):
            return [[self.atom(n, cause)] for n in shape]
        flat = [atom for axis in axes for atom in self.expand(axis)]
        result: list[Axis] = []
        for n in reversed(shape):
            axis: Axis = []
            missing = n
            while missing > 1 and flat:
                atom = flat.pop()
                expanded = self.expand([atom])
                if expanded != [atom]:  # an earlier turn refined its class
                    flat += expanded
                elif missing % self.size(atom) == 0:
                    axis.insert(0, atom)
                    missing //= self.size(atom)
                elif (factors := self._factor(atom, missing, cause)) is not None:
                    flat += [*factors[0], *factors[1]]
                else:
                    self.fix([*flat, atom, *axis], cause)
                    rest = shape[: len(shape) - len(result)]
                    return [[self.atom(m, cause)] for m in rest] + result
            result.insert(0, axis)
        return result

    def _ends(self, segments: Sequence[Axis]) -> list[int]:
        return list(accumulate(map(self.length, segments)))

    def _cut(self, segment: Axis, points: Sequence[int], cause: Cause) -> list[Axis]:
        """Cuts a product through its first factor."""
        first, *rest = segment
        if self.parts(first) is not None:  # an earlier cut refined its class
            return self.divide(segment, points, cause)
        inner = self.length(rest)
        sizes = [b - a for a, b in pairwise([0, *points, self.length(segment)])]
        if any(size % inner for size in sizes):
            self.fix(segment, cause)
            return [[self.atom(size, cause)] for size in sizes]
        parts = self.refine(first, "sum", [size // inner for size in sizes], cause)
        return [[part, *rest] for part in parts]

    def _pair(self, left: Axis, right: Axis, cause: Cause) -> None:
        """Ties two products from the right, factoring where their factors differ."""
        left, right = list(left), list(right)
        while left and right:
            a, b = left.pop(), right.pop()
            expanded = self.expand([a]), self.expand([b])
            m, n = self.size(a), self.size(b)
            if expanded != ([a], [b]):  # an earlier turn refined its class
                left += expanded[0]
                right += expanded[1]
            elif m == n and self.parts(a) is None and self.parts(b) is None:
                self.tie(a, b, cause)
            elif m == n:
                self.unify([a], [b], cause)
            else:
                factors = self._factor(a, n, cause) if m > n else self._factor(b, m, cause)
                if factors is None:
                    self.fix([a, b], cause)
                    break
                high, low = factors
                (left if m > n else right).extend(high)
                self.unify(low, [b if m > n else a], cause)
        self.fix([*left, *right], cause)

    def _factor(self, atom: int, low: int, cause: Cause) -> tuple[Axis, Axis] | None:
        """An atom or a sum as a product with `low` inner entries, or None if it cannot be one."""
        size = self.size(atom)
        if size % low:
            return None
        if self.parts(atom) is None:
            high, inner = self.refine(atom, "product", (size // low, low), cause)
            return [high], [inner]
        segments = self.segments([atom])
        if any(self.length(segment) % low for segment in segments):
            return None
        shapes = [(self.length(segment) // low, low) for segment in segments]
        pairs = [self.reshape([s], shape, cause) for s, shape in zip(segments, shapes, strict=True)]
        for _, inner in pairs[1:]:
            self.unify(pairs[0][1], inner, cause)
        return self.total([high for high, _ in pairs], cause), pairs[0][1]
