"""Groups that show in no activations, such as those inside a loop: weights match them instead.

The groups that were matched on data are held fixed at what was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from vfjax._maps import Maps, permuting
from vfjax._trees import flatten_named
from vfjax._types import PyTree
from vfjax.align._ascent import counted_axes, on_host
from vfjax.align._taps import matched_sites
from vfjax.align._weights import best_match
from vfjax.network._network import Network
from vfjax.symmetry._entries import apart
from vfjax.symmetry._spec import PermutationSpec

Untapped = Literal["weights", "keep"]

# How often weights are also matched from random permutations, where a group is on two axes of a
# leaf or inside another: a search from the identity alone often ends elsewhere.
_RESTARTS = 3


def check_untapped(untapped: Any) -> None:
    """Checks the option of matchers on data.

    Raises:
        ValueError: If it is unknown.
    """
    if untapped not in get_args(Untapped):
        raise ValueError(f'`untapped` must be "weights" or "keep", got {untapped!r}')


def untapped_groups(net: Network) -> tuple[str, ...]:
    """The groups that matching on data cannot see."""
    plain, joint = matched_sites(net)
    seen = {tap.group for tap in (*plain.values(), *joint.values())}
    seen |= {tap.owner for tap in joint.values()}
    return tuple(group for group in net.spec.groups if group not in seen)


def alone(spec: PermutationSpec, groups: Sequence[str]) -> PermutationSpec:
    """A spec of some groups, each within another only if that is one of them."""
    return dataclasses.replace(
        spec,
        groups={group: spec.groups[group] for group in groups},
        sizes={group: spec.sizes[group] for group in groups},
        within={g: o for g, o in spec.within.items() if g in groups and o in groups},
        rigid={},
    )


def in_full(spec: PermutationSpec, permutations: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Permutations in their usual shapes: `[h, n]` for a group within another."""
    full = {}
    for group, p in permutations.items():
        shape = (spec.sizes[spec.within[group]],) if group in spec.within else ()
        full[group] = np.broadcast_to(p, (*shape, p.shape[-1])).astype(np.int32)
    return full


def match_untapped(
    net: Network, a: PyTree, b: PyTree, groups: Sequence[str]
) -> tuple[dict[str, np.ndarray], bool]:
    """Matches some groups by the weights of two models whose other groups are matched already.

    Args:
        net: The traced network.
        a: The model to align to.
        b: The model to permute. Leaves that differ in shape do not count.
        groups: The groups.

    Returns:
        Their permutations, and whether the search converged.
    """
    spec = alone(net.spec, groups)
    flats = [flatten_named(tree).leaves for tree in (a, b)]
    equal = {
        path: leaf
        for path, leaf in flats[0].items()
        if path in flats[1] and np.shape(leaf) == np.shape(flats[1][path])
    }
    counted = counted_axes(spec, equal, frozenset(net.statistics & equal.keys()))
    sides = [apart(spec, {p: on_host(flat[p]) for p in counted}) for flat in flats]
    (spec, left), (_, right) = sides
    counted = counted_axes(spec, left, frozenset())
    twice = any(len(axes) > 1 for held in counted.values() for axes in held.values())
    restarts = _RESTARTS if twice or spec.within else 0
    random = np.random.default_rng(0)
    found = best_match(spec, spec.sizes, left, right, counted, random, restarts=restarts)
    return in_full(net.spec, found.permutations), found.converged


def with_untapped(
    maps: Maps, nets: Sequence[Network], trees: Sequence[PyTree], untapped: Untapped
) -> Maps:
    """Maps of groups that show in activations, with those that weights find for the others.

    Args:
        maps: The maps of a matcher on data.
        nets: One network per model.
        trees: The models.
        untapped: Whether weights match the other groups, or they keep their order.
    """
    groups = untapped_groups(nets[0])
    if not groups or untapped == "keep":
        return dataclasses.replace(maps, unmatched=groups)
    mapped = [
        maps.map_tree(net, tree, k) for k, (net, tree) in enumerate(zip(nets, trees, strict=True))
    ]
    rest = [
        permuting(match_untapped(nets[0], mapped[0], tree, groups)[0]) if k else {}
        for k, tree in enumerate(mapped)
    ]
    if maps.sizes:  # every feature of the merge says how many it is made of
        each = {g: np.full(m.shape[:-1], maps.models) for g, (m, _) in (rest[-1]).items()}
        maps = dataclasses.replace(maps, sizes={**maps.sizes, **each})
    both = tuple({**of, **more} for of, more in zip(maps.maps, rest, strict=True))
    return dataclasses.replace(maps, maps=both, by_weights=groups, unmatched=())
