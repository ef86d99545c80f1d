"""Groups that move independently inside each entry of another: the dims of each attention head.

Tying axes gives a group of dims one permutation for all heads. The permutation may differ from head
to head if nothing ever looks at a dim without its head: wherever the dims occur, the heads occur
too, exactly once, and an equation that pairs two arrays' dims, or sums over them, does so head by
head. Then `(head, dim) -> (head, p[head][dim])` is a symmetry too: rules tie dimensions position by
position, so a rule that holds for one permutation of the dims holds for one in each head.

This is checked for all values and equations that were followed, including those inside loops. Rules
that pair some dimensions of an array and keep others (`dot_general`, say) record this: a dim must
be on the same side as its head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vfjax._propagate.atoms import Atoms, Axis, Window


class Use(NamedTuple):
    """A parameter-only operand of a layer, and the axes that the layer contracts and keeps."""

    primitive: str
    contracted: list[Axis]
    kept: list[Axis]


class Together(NamedTuple):
    """Dimensions `these` of an operand, whose atoms' owners must lie in `others`."""

    axes: tuple[tuple[int, ...], ...]
    these: frozenset[int]
    others: frozenset[int]


@dataclasses.dataclass
class Record:
    """What propagation saw: layers, the axes of all values, and how rules treat dimensions.

    Attributes:
        uses: Parameter-only operands of layers, in order.
        values: The axes of every value that depends on anything.
        together: What rules say that treat some dimensions of an operand differently from others.
        taken: Atoms of axes of which a single entry was taken, and which.
        stepped: Atoms of axes of parameters that a scan over layers steps over.
        kept: Axes of kernels that their layers do not contract, where there are several.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    values: dict[tuple[tuple[int, ...], ...], None] = dataclasses.field(default_factory=dict)
    together: dict[Together, None] = dataclasses.field(default_factory=dict)
    taken: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    stepped: list[int] = dataclasses.field(default_factory=list)
    kept: list[list[Axis]] = dataclasses.field(default_factory=list)

    def see(self, axes: Sequence[Axis]) -> None:
        """Records the axes of a value."""
        self.values[tuple(map(tuple, axes))] = None

    def keep(self, axes: Sequence[Axis], these: Iterable[int], others: Iterable[int] = ()) -> None:
        """Records that `these` dimensions are treated together, apart from all but `others`."""
        these = frozenset(these)
        entry = Together(tuple(map(tuple, axes)), these, these | frozenset(others))
        self.together[entry] = None


class _Spot(NamedTuple):
    """Where a group occurs in a value."""

    group: int
    dim: int
    windows: tuple[Window, ...]


def independent(
    algebra: Atoms, record: Record, group_of: Callable[[int], int | None], sizes: dict[int, int]
) -> dict[int, int]:
    """Finds which groups may move independently inside each entry of which others.

    Args:
        algebra: The atoms, after all equations have been followed.
        record: What was seen.
        group_of: The group of an atom, or None.
        sizes: Number of entries by group.

    Returns:
        By group the other, the largest if there are several; no other is a key of the mapping.
    """
    possible: dict[int, set[int]] = {}
    for axes in record.values:
        spots = _spots(algebra, axes, group_of)
        for spot in spots:
            if possible.get(spot.group) != set():
                candidates = set(_around(spot, spots))
                possible[spot.group] = possible.get(spot.group, candidates) & candidates
    for axes, these, others in record.together:
        spots = _spots(algebra, axes, group_of) if any(possible.values()) else []
        for spot in spots:
            if spot.dim in these and possible[spot.group]:
                around = _around(spot, spots)
                apart = {group for group, dim in around.items() if dim not in others}
                possible[spot.group] -= apart
    chosen: dict[int, int] = {}
    for group in sorted(possible):
        others = possible[group] - chosen.keys()
        if others and group not in chosen.values():
            chosen[group] = max(others, key=lambda other: (sizes[other], -other))
    return chosen


def _spots(
    algebra: Atoms, axes: Sequence[Iterable[int]], group_of: Callable[[int], int | None]
) -> list[_Spot]:
    return [
        _Spot(group, dim, place.windows)
        for dim, axis in enumerate(axes)
        for place in algebra.places(axis)
        if (group := group_of(place.atom)) is not None
    ]


def _around(spot: _Spot, spots: Sequence[_Spot]) -> dict[int, int]:
    """By group, the dimension of those that occur exactly once with each entry of a spot."""
    dims: dict[int, int] = {}
    never = set()
    for other in spots:
        if other is spot:
            continue
        whole = not other.windows
        if other.dim == spot.dim:
            pairs = zip(other.windows, spot.windows, strict=False)
            fork = next(((a, b) for a, b in pairs if a != b), None)
            if fork is not None and (fork[0][0], fork[0][3]) == (fork[1][0], fork[1][3]):
                continue  # in another segment
            whole = fork is None and len(other.windows) <= len(spot.windows)
        if other.group == spot.group:
            return {}
        if not whole or other.group in dims:
            never.add(other.group)
        dims[other.group] = other.dim
    return {group: dim for group, dim in dims.items() if group not in never}
