"""Leaves that a network does not read, but that move with those it reads, by the caller's word.

Training keeps state that evaluation never reads: a second copy of a running average, the moments of
an optimiser, a head of its own. A trace shows no symmetry of it, and none is made up.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vfjax._trees import flatten_named, some
from vfjax._types import PyTree
from vfjax.symmetry._places import Axis, FixedAxis

Also = Mapping[str, str | Mapping[int, str]]
"""By part of a path: the part in place of it in the path of the leaf that is followed; or by path
of a leaf: by axis, the group that lies along it."""


def followed(leaves: Mapping[str, Any], unread: Collection[str], also: Also) -> dict[str, str]:
    """The leaf that each unread leaf follows.

    Args:
        leaves: Leaves of the tree by path.
        unread: Paths of the leaves that the network does not read.
        also: What the caller said; entries by axis are left out here.

    Returns:
        Paths of leaves that are read, by paths of unread ones.

    Raises:
        TypeError: If `also` is not such a mapping.
        ValueError: If an entry fits no unread leaf, or a leaf's shape differs from that of the one
            it would follow.
    """
    if not isinstance(also, Mapping):
        raise TypeError(
            "also must be a mapping from (a part of) the path of a leaf that is not read to (that "
            f'of) a leaf that is read, such as {{"hidden": "average"}}; got {also!r}'
        )
    found: dict[str, str] = {}
    for part, instead in also.items():
        if isinstance(instead, Mapping):
            continue
        matches = {
            path: other
            for path in unread
            for other in _replaced(path, part, instead)
            if other in leaves and other not in unread
        }
        if not matches:
            raise ValueError(
                f"also={{{part!r}: {instead!r}}} fits no leaf: no path has {part!r} in it, is not "
                f"read by the network, and is that of a leaf that is read with {instead!r} in its "
                f"place. Not read are {some(sorted(unread))}."
            )
        for path, other in matches.items():
            shapes = np.shape(leaves[path]), np.shape(leaves[other])
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"also: '{path}' has shape {shapes[0]} and cannot follow '{other}', which has "
                    f"{shapes[1]}; give its groups by axis, as {{'{path}': {{0: 'group'}}}}."
                )
            found[path] = other
    return found


def _replaced(path: str, part: str, instead: str) -> Iterable[str]:
    """The path with a part of whole components replaced, wherever it has it."""
    names, old = path.split("/"), part.split("/")
    new = instead.split("/") if instead else []
    for k in range(len(names) - len(old) + 1):
        if names[k : k + len(old)] == old:
            yield "/".join([*names[:k], *new, *names[k + len(old) :]])


def extended(
    groups: Mapping[str, Sequence[Axis]],
    fixed: Iterable[FixedAxis],
    leaves: Mapping[str, Any],
    also: Also,
) -> dict[str, tuple[Axis, ...]]:
    """Groups with places in leaves that follow others.

    Args:
        groups: Places by name of the group.
        fixed: Axes without symmetry.
        leaves: Leaves of the tree by path.
        also: As in `PermutationSpec.permute`.

    Raises:
        TypeError: As `followed`.
        ValueError: As `followed`, or if a leaf is read, or a group is unknown.
    """
    read = _read(groups, fixed)
    added: dict[str, list[Axis]] = {name: list(axes) for name, axes in groups.items()}
    for path, other in followed(leaves, leaves.keys() - read, also).items():
        for name, axes in groups.items():
            added[name] += [a._replace(path=path) for a in axes if a.path == other]
    for path, axes in also.items():
        if not isinstance(axes, Mapping):
            continue
        if path in read or path not in leaves:
            why = "is read by the network" if path in leaves else "is no leaf"
            raise ValueError(f"also: '{path}' {why}; name a leaf that the network does not read.")
        for axis, name in axes.items():
            if name not in groups:
                raise ValueError(f"also: '{path}' has no group {name!r}; there are {some(groups)}.")
            added[name].append(Axis(path, axis))
    return {name: tuple(axes) for name, axes in added.items()}


def _read(groups: Mapping[str, Sequence[Axis]], fixed: Iterable[FixedAxis]) -> frozenset[str]:
    placed = {a.path for axes in groups.values() for a in axes}
    return frozenset(placed | {f.path for f in fixed if f.primitive != "unused"})


def warn_of_unread(
    groups: Mapping[str, Sequence[Axis]],
    fixed: Iterable[FixedAxis],
    variables: PyTree,
    by_group: Mapping[str, Any],
) -> None:
    """Warns of leaves that the network does not read, if they have an axis like one that moves.

    That is an axis as long as one that a group lies along whose order changes. Random keys do not
    count.

    Args:
        groups: Places by name of the group.
        fixed: Axes without symmetry.
        variables: The tree.
        by_group: Permutations, or pairs of matrices, by group.
    """
    unread = {f.path for f in fixed if f.primitive == "unused"}
    if not unread:
        return
    leaves = flatten_named(variables).leaves
    moving = [name for name, p in by_group.items() if not _stays(p)]
    places = [a for name in moving for a in groups[name] if a.path in leaves]
    lengths = {np.shape(leaves[a.path])[a.axis] for a in places} - {1}
    stale = [path for path in sorted(unread & leaves.keys()) if _may_move(leaves[path], lengths)]
    if stale:
        warnings.warn(
            f"{some(stale)} {'has' if len(stale) == 1 else 'have'} an axis as long as one that is "
            "mapped, but the traced function reads no such leaf, and so they stay as they are. "
            "If training reads them, they no longer fit the others. Say what they follow, as "
            'also={"hidden": "average"} (the leaf with "average" in place of "hidden" in its '
            'path) or also={"head/kernel": {0: "group"}}; or that nothing else moves: also={}.',
            stacklevel=4,
        )


def _stays(permutation: Any) -> bool:
    """Whether a permutation is known to move nothing."""
    if isinstance(permutation, (tuple, list, Tracer)):  # a pair of matrices, or traced
        return False
    array = np.asarray(permutation)
    return bool((array == np.arange(array.shape[-1])).all())


def _may_move(leaf: Any, lengths: Collection[int]) -> bool:
    dtype = jnp.result_type(leaf)
    random = jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32
    return not random and not set(np.shape(leaf)).isdisjoint(lengths)
