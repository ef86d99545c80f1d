"""Where a search starts that does not depend on the order of units: at the most optimistic gains.

A coordinate ascent compares the units of one group while the others lie in whatever order they
have. In deep networks, and where groups share leaves, that order hides the pairs of a permuted
copy. Here groups are decided one after another, and what is still open is taken at its best: with
both slices sorted along the axes of open groups, an inner product is the largest that any order of
these can give (the rearrangement inequality), and it depends on no order. Units of a permuted copy
reach this bound at their own partner, so a copy is recovered in one go unless sorting makes two
units equal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vfjax.align._ascent import dot, permuted, products
from vfjax.align._assignment import assign
from vfjax.symmetry._places import Axis, grid, map_axis
from vfjax.symmetry._spec import PermutationSpec

Counted = Mapping[str, Mapping[str, tuple[Axis, ...]]]


def optimistic_start(
    spec: PermutationSpec,
    sizes: Mapping[str, int],
    left: Mapping[str, np.ndarray],
    right: Mapping[str, np.ndarray],
    counted: Counted,
    least: float = 0.0,
) -> dict[str, np.ndarray] | None:
    """Permutations of all groups, each by the largest gain that those after it leave possible.

    Args:
        spec: The groups.
        sizes: Their sizes.
        left: The leaves that count of the model to align to.
        right: The leaves that count of the model to permute.
        counted: Their axes, by path and group.
        least: The agreement below which to give up: the inner product of the kernels whose groups
            are all decided, over half the sum of their square norms. It is 1 in a copy.

    Returns:
        By group, int32 `[n]`, or `[h, n]` for a group within another; None if it gave up.
    """
    found, moved, held = {}, dict(right), {}
    for group, n in sizes.items():
        shape = (sizes[spec.within[group]], n) if group in spec.within else (n,)
        found[group] = np.broadcast_to(np.arange(n, dtype=np.int32), shape)
        held[group] = [path for path, axes in counted.items() if group in axes]
    squares = {path: dot(left[path], left[path]) for path in counted}
    waiting = {group: None for group in sizes if held[group]}
    agreed = most = 0.0

    def known(group: str) -> float:
        """The share of a group's weights that is compared without any optimism."""
        sure = sum(squares[p] for p in held[group] if counted[p].keys() & waiting.keys() == {group})
        return sure / (sum(squares[path] for path in held[group]) or 1.0)

    while waiting:
        group = max((g for g in waiting if spec.within.get(g) not in waiting), key=known)
        gain: Any = 0.0
        for path in held[group]:
            for place in counted[path][group]:
                others = _others(spec, counted[path], waiting, place)
                pair = _sorted(left[path], others), _sorted(moved[path], others)
                gain = gain + _gains(*pair, place, spec.owner(group, place))
        order = assign(gain) if gain.ndim == 2 else np.stack([assign(each) for each in gain])
        found[group] = order
        del waiting[group]
        for path in held[group]:
            moved[path] = permuted(spec, moved[path], counted[path], (group,), {group: order})
            if left[path].ndim > 1 and counted[path].keys().isdisjoint(waiting):
                agreed += dot(left[path], moved[path])
                most += (squares[path] + dot(moved[path], moved[path])) / 2
        if agreed < least * most:
            return None
    return found


def _others(
    spec: PermutationSpec,
    axes: Mapping[str, tuple[Axis, ...]],
    waiting: Collection[str],
    place: Axis,
) -> list[Axis]:
    """The other places of undecided groups on a leaf; groups within others first.

    Entries of an owner can be sorted only once what is inside them is, since each has its own
    order.
    """
    groups = [group for group in axes if group in waiting]
    groups.sort(key=lambda group: group not in spec.within)
    return [other for group in groups for other in axes[group] if other != place]


def _sorted(leaf: np.ndarray, places: Sequence[Axis]) -> np.ndarray:
    for place in places:
        leaf = map_axis(leaf, place, lambda view, k: np.sort(view, axis=k))
    return leaf


def _gains(a: np.ndarray, b: np.ndarray, place: Axis, owner: Axis | None) -> np.ndarray:
    """Inner products `[n, n]` of the units of a group, or `[h, n, n]` inside each owner."""
    if owner is None:
        return products(a, b, place)
    one, other = grid(a, place, owner), grid(b, place, owner)
    return one @ other.swapaxes(1, 2)
