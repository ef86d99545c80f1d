"""The permutation spec of a traced network, from what was found of its axes and leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vfjax._effects import KERNEL, SCALES, Effect, obstacle
from vfjax._propagate import Propagation
from vfjax._propagate.groups import named_groups
from vfjax.symmetry._places import Axis, FixedAxis
from vfjax.symmetry._spec import PermutationSpec


def from_propagation(
    propagation: Propagation,
    paths: Sequence[str],
    effects: Mapping[int, Mapping[str, Effect]] | None = None,
) -> tuple[PermutationSpec, dict[int, str]]:
    """The spec of a network whose axes have been followed.

    Args:
        propagation: What `_propagate.propagate` found.
        paths: Paths of the variables' leaves, in their order.
        effects: By index of a leaf, how it acts, as `_effects.effects` finds it.

    Returns:
        The spec, and the name of every group by its id in `propagation.axes`.
    """
    groups, sizes, names = named_groups(propagation, paths)
    path_of = dict(zip(propagation.leaves, paths, strict=True))
    fixed = [FixedAxis(path_of[f.leaf], f.axis, f.primitive, f.where) for f in propagation.fixed]
    places = {name: tuple(Axis(*entry) for entry in entries) for name, entries in groups.items()}
    within = {names[group]: names[other] for group, other in propagation.within.items()}
    by_path = {paths[leaf]: found for leaf, found in (effects or {}).items()}
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


def _tied(
    propagation: Propagation, path_of: Mapping[int, str], names: Mapping[int, str]
) -> dict[str, str]:
    """Groups with a leaf along which one layer writes and another reads, and that leaf."""
    roles: dict[tuple[int, int, int], set[str]] = {}
    for tie in propagation.ties:
        roles.setdefault((tie.leaf, tie.axis, tie.position), set()).add(tie.role)
    found: dict[str, str] = {}
    for (leaf, axis, position), known in roles.items():
        group = propagation.axes[leaf][axis][position].group
        if len(known) > 1 and group is not None:
            found.setdefault(
                names[group],
                f"axis {axis} of '{path_of[leaf]}' is written by one layer and read by another",
            )
    return found
