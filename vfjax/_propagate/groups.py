"""From a propagation to named groups: which axes of which leaves move together, in what role."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vfjax._propagate import Propagation, Tie

# What two groups on the output axes of one kernel most often are.
_SUFFIXES = {"conv_general_dilated": (":groups", ":channels")}
_DEFAULT_SUFFIXES = (":heads", ":dims")


class Entry(NamedTuple):
    """Where a group sits: in the middle of a row-major (outer, size, inner) view of an axis."""

    path: str
    axis: int
    role: str
    outer: int
    inner: int


def named_groups(
    propagation: Propagation, paths: Sequence[str]
) -> tuple[dict[str, tuple[Entry, ...]], dict[str, int], dict[int, str]]:
    """Names the groups and lists their axes.

    A group is named after the first layer that writes it: the path of that layer's kernel without
    its last component (`params/Conv_0`), or the whole path where kernels share a parent. Groups
    come in the order in which the network writes them, then those that no layer writes, named after
    their first leaf.

    Args:
        propagation: The groups.
        paths: Paths of the leaves, in their order.

    Returns:
        Axes by group name, sizes by group name, and names by group id.
    """
    path_of = dict(zip(propagation.leaves, paths, strict=True))
    names = _names(propagation, path_of)
    roles: dict[tuple[int, int, int], str] = {}
    for tie in propagation.ties:
        place = (tie.leaf, tie.axis, tie.position)
        # A tied embedding is written by one layer and contracted by another: of the two maps that a
        # merge may apply, contraction is the one that needs the inverse, so it decides.
        if tie.role == "in" or place not in roles:
            roles[place] = tie.role

    groups: dict[str, list[Entry]] = {name: [] for name in names.values()}
    sizes: dict[str, int] = {}
    for leaf, path in path_of.items():
        for k, atoms in enumerate(propagation.axes[leaf]):
            for position, atom in enumerate(atoms):
                if atom.group is None:
                    continue
                outer = math.prod(a.size for a in atoms[:position])
                inner = math.prod(a.size for a in atoms[position + 1 :])
                role = roles.get((leaf, k, position), "elementwise")
                name = names[atom.group]
                groups[name].append(Entry(path, k, role, outer, inner))
                sizes[name] = atom.size
    return {name: tuple(entries) for name, entries in groups.items()}, sizes, names


def _names(propagation: Propagation, path_of: dict[int, str]) -> dict[int, str]:
    """A name for every group, in the order in which the network writes them."""

    def group_of(tie: Tie) -> int | None:
        return propagation.axes[tie.leaf][tie.axis][tie.position].group

    written: dict[int, list[int]] = {}  # kernel -> groups on its output axes
    first: dict[int, Tie] = {}  # group -> where it is written first
    for tie in propagation.ties:
        group = group_of(tie)
        if tie.role == "out" and group is not None:
            first.setdefault(group, tie)
            groups = written.setdefault(tie.leaf, [])
            if group not in groups:
                groups.append(group)

    siblings = Counter(_parent(path_of[leaf]) for leaf in written)
    names: dict[int, str] = {}
    for group, tie in first.items():
        path, groups = path_of[tie.leaf], written[tie.leaf]
        parent = _parent(path)
        base = parent if parent and siblings[parent] == 1 else path
        suffix = ""
        if len(groups) == 2:
            pair = _SUFFIXES.get(tie.primitive, _DEFAULT_SUFFIXES)
            suffix = pair[groups.index(group)]
        elif len(groups) > 2:
            suffix = f":{groups.index(group)}"
        names[group] = _unique(base + suffix, names)
    for leaf, path in path_of.items():
        for atoms in propagation.axes[leaf]:
            for atom in atoms:
                if atom.group is not None and atom.group not in names:
                    names[atom.group] = _unique(path, names)
    return names


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _unique(name: str, names: dict[int, str]) -> str:
    taken, count, candidate = set(names.values()), 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    return candidate
