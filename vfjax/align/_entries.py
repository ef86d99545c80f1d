"""Groups inside the entries of others, as the dims of heads: what matchers do entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vfjax.network._network import Network
from vfjax.network._records import JointTap
from vfjax.stats._sites import joint_taps, taps_by_site


class Part(NamedTuple):
    """What is matched by itself: a group, or what a group has inside one entry of another.

    Attributes:
        group: Name of the group.
        entry: Number of the entry of the group that it is within, in the order that these are
            matched in; None for a group within no other.
    """

    group: str
    entry: int | None = None

    def __str__(self) -> str:
        return self.group if self.entry is None else f"{self.group}[{self.entry}]"


def gather(found: Mapping[Part, Any], axis: int = 0) -> dict[str, Any]:
    """What was found for every part, by group: stacked for one with several entries.

    Args:
        found: By part, an array or a tree of arrays; parts of one group in order.
        axis: Where the entries are counted.

    Example:
        >>> parts = {Part("g"): np.ones(3), Part("d", 0): np.ones(2), Part("d", 1): np.ones(2)}
        >>> {group: value.shape for group, value in gather(parts).items()}
        {'g': (3,), 'd': (2, 2)}
    """
    entries: dict[str, list[Any]] = {}
    for part, value in found.items():
        entries.setdefault(part.group, []).append(value)
    alone = {part.group for part in found if part.entry is None}
    return {
        group: values[0]
        if group in alone
        else jax.tree.map(lambda *each: np.stack(each, axis), *values)
        for group, values in entries.items()
    }


def permuting(orders: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps `(M, U)`, float32, of groups permuted by int `[n]`, or `[h, n]` inside h entries."""
    maps = {}
    for group, order in orders.items():
        matrix = np.eye(np.shape(order)[-1], dtype=np.float32)[np.asarray(order)]
        maps[group] = matrix, matrix.swapaxes(-1, -2)
    return maps


def within(nets: Sequence[Network]) -> dict[str, str]:
    """By group, the one inside each entry of which it is matched by itself.

    Networks whose heads differ in number have no head for every head, so that heads are mixed, and
    their dims are mapped alike in all.
    """
    first, *others = (net.spec.sizes for net in nets)
    return {
        group: owner
        for group, owner in nets[0].spec.within.items()
        if all(sizes[owner] == first[owner] for sizes in others)
    }


def matched_sites(
    net: Network, inside: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, JointTap]]:
    """Taps by which groups are matched, by site: those of groups by themselves, and joint ones.

    Pooled over dims, heads say less than with them; dims pooled over heads say nothing.

    Args:
        net: The traced network.
        inside: What `within` gives for several networks; None for this one alone.
    """
    inside = net.spec.within if inside is None else inside
    joint = {site: tap for site, tap in joint_taps(net).items() if tap.group in inside}
    nested = {*inside, *(tap.owner for tap in joint.values())}
    plain = taps_by_site(net)
    return {site: tap for site, tap in plain.items() if tap.group not in nested}, joint
