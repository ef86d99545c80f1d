"""Groups inside the entries of others, as the dims of heads: what matchers do entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vfjax.network._network import Network
from vfjax.network._records import JointTap
from vfjax.stats._sites import joint_taps, taps_by_site


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
