"""Named groups from a propagation: which axes of which leaves move together, in what role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vfjax._analysis.effects import KERNEL, SCALES, Effect, obstacle
from vfjax._jaxpr.primitives import CONV
from vfjax._propagate import Atom, Propagation, Tie
from vfjax.symmetry._places import Axis, FixedAxis
from vfjax.symmetry._spec import PermutationSpec

# Suffixes of two groups on the output axes of one kernel: the owner, whose entries hold copies of
# the other, and the other; by primitive, then for all others.
_SUFFIXES = {CONV: (":groups", ":channels")}
_DEFAULT_SUFFIXES = (":heads", ":dims")


def from_propagation(
    propagation: Propagation,
    paths: Sequence[str],
    effects: Mapping[int, Mapping[str, Effect]] | None = None,
) -> tuple[PermutationSpec, dict[int, str]]:
    """The spec of a network from its propagation.

    Args:
        propagation: The result of `vfjax._propagate.propagation.propagate`.
        paths: Paths of the variables' leaves, in their order.
        effects: By index of a leaf, how it acts: the result of `effects.leaf_effects`.

    Returns:
        The spec, and the name of every group by its id in `propagation.axes`.
    """
    groups, sizes, names = named_groups(propagation, paths)
    path_of = dict(zip(propagation.leaves, paths, strict=True))
    fixed = [FixedAxis(path_of[f.leaf], f.axis, f.primitive, f.where) for f in propagation.fixed]
    places = groups
    within = {names[group]: names[other] for group, other in propagation.within.items()}
    by_path = {paths[leaf]: acts for leaf, acts in (effects or {}).items()}
    scaling: set[str] = set()
    rigid = _tied(propagation, path_of, names)
    for name, axes in places.items():
        for a in axes:
            acts = by_path.get(a.path, {})
            if a.role == "elementwise" and acts.keys() & {SCALES, KERNEL}:
                scaling.add(a.path)
            effect = obstacle(a.role, acts)
            if effect is not None:
                rigid.setdefault(name, f"'{a.path}' {effect}")
    return PermutationSpec(places, sizes, fixed, within, scaling, rigid), names


def named_groups(
    propagation: Propagation, paths: Sequence[str]
) -> tuple[dict[str, tuple[Axis, ...]], dict[str, int], dict[int, str]]:
    """Names the groups and lists their axes.

    A group is named after the first layer that writes it: the path of that layer's kernel without
    its last component (`params/Conv_0`), or the whole path where kernels share a parent. Groups
    are listed in the order in which the network writes them; then come those that no layer writes,
    named after their first leaf.

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
        # A tied embedding is kept by one layer and contracted by another. Contraction decides,
        # since of the two maps that a merge may apply it needs the inverse.
        if tie.role == "in" or place not in roles:
            roles[place] = tie.role

    groups: dict[str, list[Axis]] = {name: [] for name in names.values()}
    sizes: dict[str, int] = {}
    for leaf, path in path_of.items():
        for k, atoms in enumerate(propagation.axes[leaf]):
            for position, atom in enumerate(atoms):
                if atom.group is None:
                    continue
                role = roles.get((leaf, k, position), "elementwise")
                name = names[atom.group]
                where = atom.outer, atom.inner, atom.windows, atom.entries
                groups[name].append(Axis(path, k, role, *where))
                sizes[name] = atom.size
    return {name: tuple(entries) for name, entries in groups.items()}, sizes, names


def _names(propagation: Propagation, path_of: dict[int, str]) -> dict[int, str]:
    """A name for every group, in the order in which the network writes them."""

    def group_of(tie: Tie) -> int | None:
        return propagation.axes[tie.leaf][tie.axis][tie.position].group

    # Kernel, and the entries of it if it is a stack -> groups on its output axes.
    written: dict[tuple[int, Any], list[int]] = {}
    first: dict[int, Tie] = {}  # group -> where it is written first
    for tie in propagation.ties:
        group = group_of(tie)
        if tie.role == "out" and group is not None:
            first.setdefault(group, tie)
            entries = propagation.axes[tie.leaf][tie.axis][tie.position].entries
            groups = written.setdefault((tie.leaf, entries), [])
            if group not in groups:
                groups.append(group)

    siblings = Counter(_parent(path_of[leaf]) for leaf in {leaf for leaf, _ in written})
    names: dict[int, str] = {}
    for group, tie in first.items():
        this = tie.axis, propagation.axes[tie.leaf][tie.axis][tie.position]
        path, groups = path_of[tie.leaf], written[tie.leaf, this[1].entries]
        parent = _parent(path)
        base = parent if parent and siblings[parent] == 1 else path
        base += "".join(f"[{index}]" for _, index in this[1].entries)
        suffix = ""
        if len(groups) > 1:
            others = [
                (axis, atom)
                for axis, atoms in enumerate(propagation.axes[tie.leaf])
                for atom in atoms
                if atom.group in groups and atom.group != group
            ]
            around = any(_inside(other, this) for other in others)
            pair = _SUFFIXES.get(tie.primitive, _DEFAULT_SUFFIXES)
            if around != any(_inside(this, other) for other in others):
                suffix = pair[0] if around else pair[1]
            else:
                suffix = f":{groups.index(group)}"
        names[group] = _unique(base + suffix, names)
    for leaf, path in path_of.items():
        for atoms in propagation.axes[leaf]:
            for atom in atoms:
                if atom.group is not None and atom.group not in names:
                    names[atom.group] = _unique(path, names)
    return names


def _inside(one: tuple[int, Atom], other: tuple[int, Atom]) -> bool:
    """Whether each entry of the other atom of a leaf owns a copy of this one."""
    (axis, a), (along, b) = one, other
    if a.entries != b.entries:
        return False
    if axis != along:
        return axis > along
    depth = min(len(a.windows), len(b.windows))
    if a.windows[:depth] != b.windows[:depth]:
        return False
    if len(b.windows) > depth:
        return b.windows[depth][3] % (a.size * a.inner) == 0
    outer = a.windows[depth][0] if len(a.windows) > depth else a.outer
    return outer % (b.outer * b.size) == 0


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _unique(name: str, names: dict[int, str]) -> str:
    taken, count, candidate = set(names.values()), 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    return candidate


def _tied(
    propagation: Propagation, path_of: Mapping[int, str], names: Mapping[int, str]
) -> dict[str, str]:
    """By group, the leaf along whose axis one layer writes and another reads, as a clause."""
    roles: dict[tuple[int, int, int], set[str]] = {}
    for tie in propagation.ties:
        roles.setdefault((tie.leaf, tie.axis, tie.position), set()).add(tie.role)
    reasons: dict[str, str] = {}
    for (leaf, axis, position), known in roles.items():
        group = propagation.axes[leaf][axis][position].group
        if len(known) > 1 and group is not None:
            reasons.setdefault(
                names[group],
                f"axis {axis} of '{path_of[leaf]}' is written by one layer and read by another",
            )
    return reasons
