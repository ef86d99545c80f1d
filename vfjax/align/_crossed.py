"""Activation matching of groups that cross at a tap: as weight matching of correlations.

Where one value shows several groups across each other (heads, the queries that share a head, and
their dims; or the axes of a dense layer that writes a matrix), the units are combinations of
entries, and no part of the value shows one group alone. The sum of the correlations of paired
units is then `<I, P C^T>`: the inner product of the identity with the correlations, permuted along
the channels of one network. That is what weight matching maximises, for a leaf I in one network
and `C^T` in the other, whose first axes carry the groups as the tap does.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vfjax.align._ascent import counted_axes
from vfjax.align._assignment import PLACE, Alignment
from vfjax.align._taps import correlation_between, matched_sites
from vfjax.align._weights import best_match
from vfjax.network._layout import layout_of
from vfjax.network._network import Network
from vfjax.network._sites import crossed_taps
from vfjax.stats._moments import Moments
from vfjax.symmetry._places import Axis
from vfjax.symmetry._spec import PermutationSpec


def crossed_groups(net: Network) -> frozenset[str]:
    """Groups that cross others at some tap, and those that they are within or that are within them.

    They are matched by `match_crossed`.
    """
    sites = crossed_taps(net)
    groups = {place.group for site in sites for place in layout_of(net, site).groups}
    groups |= {net.spec.within.get(group, group) for group in groups}
    return frozenset(g for g in net.spec.groups if g in groups or net.spec.within.get(g) in groups)


def match_crossed(net: Network, moments: Moments, to: int, model: int) -> Alignment | None:
    """Matches the groups that cross others, by all taps that show them.

    Args:
        net: The traced network.
        moments: Moments with covariances at the taps.
        to: Index of the model to align to.
        model: Index of the model to permute.

    Returns:
        The alignment of these groups, or None if there are none.

    Raises:
        ValueError: If covariances at a tap are missing.
    """
    groups = crossed_groups(net)
    if not groups:
        return None
    places: dict[str, list[Axis]] = {group: [] for group in groups}
    left, right = {}, {}
    for site in _sites(net):
        shown = layout_of(net, site).groups
        if groups.isdisjoint(place.group for place in shown):
            continue
        correlation = correlation_between(moments, site, to, model)
        shape = (*moments.mean[site].shape[1:], len(correlation))
        identity = np.eye(len(correlation))
        left[site] = identity.reshape(shape)
        # Ties go to units that stay in place, as in every assignment.
        right[site] = (correlation.T + PLACE * identity).reshape(shape)
        for place in shown:
            if place.owner is None and place.group in net.spec.within:
                continue  # its order in each entry of its owner cannot be told here
            places[place.group].append(place.at._replace(path=site))
    sizes = {group: net.spec.sizes[group] for group in net.spec.groups if group in places}
    within = {g: owner for g, owner in net.spec.within.items() if g in groups}
    spec = PermutationSpec({group: places[group] for group in sizes}, sizes, within=within)
    return best_match(
        spec,
        sizes,
        left,
        right,
        counted_axes(spec, left, frozenset()),
        np.random.default_rng(0),
        restarts=0,
        bound=sum(float(leaf.max(tuple(range(leaf.ndim - 1))).sum()) for leaf in right.values()),
    )


def _sites(net: Network) -> Iterable[str]:
    """The taps, with whole values in place of their parts where these cross."""
    whole = crossed_taps(net)
    parts = {name for name, site in net.sites.items() if site.source in whole}
    plain, joint = matched_sites(net)
    return *(name for name in (*plain, *joint) if name not in parts), *whole
