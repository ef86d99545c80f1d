"""Folded axes: one axis that a reshape shows as several dimensions without splitting it yet.

The first equation that looks at these dimensions decides how it is split. Most treat them as
factors: 12 channels become 3 heads of 4. A slice of one of them treats them as segments instead, as
in `qkv.reshape(..., 3, heads, dims)[..., 0, :, :]`, and segments need not have anything in common:
the values' dims are then not tied to those of queries and keys, as they would be as factors.

An equation may leave an axis folded if it keeps the axis's dimensions together and does the same
whatever the order of all their entries. The rules of such equations are marked `lazy`; before any
other rule, all folded axes of the operands are factored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from vfjax._propagate.algebra import Algebra
from vfjax._propagate.atoms import Axis, Cause, Parts


@dataclasses.dataclass
class _Fold:
    """An axis, one atom for each dimension that shows it, and the reshape that did."""

    source: Axis
    atoms: tuple[int, ...]
    cause: Cause


class Folds(Algebra):
    """The algebra of axes, with axes that are folded until an equation looks inside."""

    def __init__(self) -> None:
        super().__init__()
        self._folds: dict[int, _Fold] = {}

    def parts(self, atom: int) -> Parts | None:
        """As in `Atoms`; factors a folded axis first."""
        if atom in self._folds:
            fold = self._folds[atom]
            self._factors(fold.source, fold.atoms, fold.cause)
        return super().parts(atom)

    def fold(self, axis: Axis, shape: Sequence[int], cause: Cause) -> list[Axis]:
        """Shows an axis as dimensions, none of which has size 1."""
        if len(shape) < 2:
            return [axis] * len(shape)
        atoms = tuple(map(self.atom, shape))
        self._folds.update(dict.fromkeys(atoms, _Fold(axis, atoms, cause)))
        return [[atom] for atom in atoms]

    def pick(
        self, axes: Sequence[Axis], dim: int, points: Sequence[int], cause: Cause
    ) -> list[list[Axis]]:
        """Cuts an array along a dimension.

        Args:
            axes: The array's axes.
            dim: The dimension.
            points: Where to cut it: increasing positions inside it.
            cause: The equation that cuts.

        Returns:
            The axes of each of the `len(points) + 1` pieces.
        """
        fold = self._folds.get(axes[dim][0]) if len(axes[dim]) == 1 else None
        if fold is None:
            pieces = self.divide(axes[dim], points, cause)
            return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in pieces]
        atoms, source = self._from(fold, axes[dim][0])
        inner = [self.size(atom) for atom in atoms[1:]]
        pieces = self.divide(source, [p * math.prod(inner) for p in points], cause)
        lengths = [b - a for a, b in pairwise([0, *points, self.size(atoms[0])])]
        cut = []
        for piece, n in zip(pieces, lengths, strict=True):
            single = n == 1
            new = self.fold(piece, inner if single else [n, *inner], cause)
            became = dict(zip(atoms, [[], *new] if single else new, strict=True))
            cut.append([[x for atom in axis for x in became.get(atom, [atom])] for axis in axes])
        return cut

    def settle(self, axes: Iterable[Axis]) -> None:
        """Factors the folded parts of some axes."""
        for axis in axes:
            self.expand(axis)

    def close(self) -> None:
        """Leaves axes that are still folded at the end as they are: atoms tied to nothing."""
        self._folds.clear()

    def _from(self, fold: _Fold, first: int) -> tuple[tuple[int, ...], Axis]:
        """The dimensions from `first` on, still folded, and their axis; factors those before."""
        k = fold.atoms.index(first)
        if k == 0:
            return fold.atoms, fold.source
        sizes = [self.size(atom) for atom in fold.atoms]
        shape = math.prod(sizes[:k]), math.prod(sizes[k:])
        outer, source = self.reshape([fold.source], shape, fold.cause)
        self._factors(outer, fold.atoms[:k], fold.cause)
        rest = _Fold(source, fold.atoms[k:], fold.cause)
        if len(rest.atoms) > 1:
            self._folds.update(dict.fromkeys(rest.atoms, rest))
        else:
            self._factors(source, rest.atoms, fold.cause)
        return rest.atoms, source

    def _factors(self, source: Axis, atoms: Sequence[int], cause: Cause) -> None:
        """Makes atoms the factors of an axis."""
        for atom in atoms:
            del self._folds[atom]
        axes = self.reshape([source], [self.size(atom) for atom in atoms], cause)
        for atom, axis in zip(atoms, axes, strict=True):
            self._parts[atom] = Parts("product", tuple(axis), None)
