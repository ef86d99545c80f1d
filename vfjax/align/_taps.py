"""What matchers read at taps: correlations and covariances, by group and by entry of its owner.

A tap shows one group; a joint tap shows a group inside each entry of another, as the dims of heads.
Owners (heads) are matched first, and then the group inside them entry by entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vfjax._maps import Maps, Part, gather, spread_of
from vfjax._passes import Mask
from vfjax._trees import check_sequence
from vfjax._types import Array, PyTree
from vfjax.align._assignment import assign_in_place
from vfjax.network._arguments import Models, comparable, networks
from vfjax.network._layout import layout_of
from vfjax.network._network import Network
from vfjax.network._records import JointTap
from vfjax.network._sites import joint_taps, select, taps_by_site
from vfjax.network._unaligned import warn_of_fixed
from vfjax.stats._moments import Moments, measured

# Per model, the permutations of the owners of other groups.
Orders = Sequence[Mapping[str, np.ndarray]]


def with_spreads(maps: Maps, net: Network, moments: Moments) -> Maps:
    """Adds to maps the spreads of the mapped features, which scales of norms need.

    Args:
        maps: Maps that a matcher found.
        net: The traced network.
        moments: `stats.moments(net, trees, data, sites="taps", covariance=True)`.

    Returns:
        The maps with `spreads`; unchanged where no scale of a norm needs them.

    Raises:
        ValueError: If `moments` lacks a covariance.

    Example:
        >>> import vfjax
        >>> tree = {"w": np.float32([[1, 2]]), "v": np.float32([[3], [4]])}
        >>> net = vfjax.trace(lambda v, x: abs(x @ v["w"]) @ v["v"], tree, np.ones((2, 1)))
        >>> x = np.float32([[1], [2]])
        >>> moments = vfjax.stats.moments(net, [tree] * 2, [x], sites="taps", covariance=True)
        >>> maps = Maps.of_permutations([None, {"w": [1, 0]}])
        >>> with_spreads(maps, net, moments) is maps
        True
    """
    if not maps.unknown(net):
        return maps
    owners = {owner: np.arange(net.spec.sizes[owner]) for owner in net.spec.within.values()}
    orders = [owners | of for of in maps.permutations]
    at_taps: list[dict[Part, list[np.ndarray]]] = [{} for _ in maps.maps]
    for part, block, _ in tap_covariances(net, moments, orders):
        for k, of in enumerate(maps.mixing):
            if part.group in of:
                matrix = of[part.group][0]
                matrix = matrix[part.entry] if np.ndim(matrix) == 3 else matrix
                at_taps[k].setdefault(part, []).append(spread_of(matrix, block[k, k]))
    spreads = [gather({p: np.mean(taps, 0) for p, taps in of.items()}) for of in at_taps]
    return dataclasses.replace(maps, spreads=tuple(spreads))


def models_at_taps(net: Network | Sequence[Network], trees: Sequence[PyTree]) -> Models:
    """Checks that models can be matched at the taps of their groups.

    Args:
        net: The traced network, or one per tree.
        trees: The trees; leaves behind the taps may differ in shape.

    Returns:
        The models.

    Raises:
        TypeError: If `net` is not a traced network, or a tree holds a leaf that is not an array.
        ValueError: If there are fewer than two trees, they differ before a tap, or hold NaN or
            infinity.
    """
    check_sequence(trees, name="trees")
    nets = networks(net, len(trees))
    models = comparable(nets, trees, select(nets[0], "taps"))
    if len(trees) < 2:
        raise ValueError(f"trees must be two or more, got {len(trees)}")
    warn_of_fixed(nets[0])
    return models


def moments_at_taps(
    models: Models,
    data: Iterable[Any],
    covariance: Literal["all", "cross"],
    mask: Mask | None = None,
) -> Moments:
    """Moments of models at all taps, with covariances of all pairs, or of different models only.

    `mask` as in `vfjax.stats.moments`.

    Raises:
        ValueError: If the networks' taps differ, or as `vfjax.stats.moments`.
    """
    names = select(models.net, "taps")
    first, *others = (
        [layout_of(net, name) for name in select(net, "taps")] for net in dict.fromkeys(models.nets)
    )
    if any(layouts != first for layouts in others):
        raise ValueError(
            "net has networks that lay out the values at the sites differently; measure each "
            "separately, stats.moments(net[k], [trees[k]], data, ...)"
        )
    return measured(models, data, names, names, cross=covariance == "cross", mask=mask)


def network_of(net: Network | Sequence[Network], moments: Moments) -> Network:
    """The network whose taps and groups represent those of all models: the first.

    Args:
        net: The traced network, or one per model, with the same groups at the same taps.
        moments: Moments of the models.

    Raises:
        TypeError: If `net` is not a traced network.
        ValueError: If there are not as many networks as models.
    """
    first = net if isinstance(net, Network) else networks(net, moments.models)[0]
    warn_of_fixed(first)
    return first


def matched_sites(
    net: Network, inside: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, JointTap]]:
    """Taps at which groups are matched, by site: those of single groups, and joint taps.

    Heads and their dims are matched at joint taps only: heads pooled over dims tell less, and dims
    pooled over heads tell nothing.

    Args:
        net: The traced network.
        inside: The result of `within` for several networks; None for this one alone.
    """
    inside = net.spec.within if inside is None else inside
    joint = {site: tap for site, tap in joint_taps(net).items() if tap.group in inside}
    nested = {*inside, *(tap.owner for tap in joint.values())}
    plain = taps_by_site(net)
    return {site: tap for site, tap in plain.items() if tap.group not in nested}, joint


def within(nets: Sequence[Network]) -> dict[str, str]:
    """The owner of every group that is matched separately inside each entry of it, by group.

    Where networks differ in their number of heads, heads cannot be paired: heads are then mixed,
    and the dims of all heads are mapped in the same way.
    """
    first, *others = (net.spec.sizes for net in nets)
    return {
        group: owner
        for group, owner in nets[0].spec.within.items()
        if all(sizes[owner] == first[owner] for sizes in others)
    }


def match_owners(net: Network, moments: Moments) -> list[dict[str, np.ndarray]]:
    """Matches the owners of other groups, such as heads, with those of the first model.

    The value of pairing two owners is the sum of the correlations of their entries, by the best
    assignment of these.

    Args:
        net: The traced network.
        moments: Moments with covariances at the joint taps.

    Returns:
        Per model, the permutation of every owner with a joint tap; the identity for the first.

    Raises:
        ValueError: If the covariances at a joint tap were not measured.
    """
    return [
        {
            owner: assign_in_place(np.zeros((net.spec.sizes[owner],) * 2), inner)[0]
            if model
            else np.arange(net.spec.sizes[owner])
            for owner, inner in joint_gains(net, moments, 0, model).items()
        }
        for model in range(moments.models)
    ]


def tap_covariances(
    net: Network, moments: Moments, orders: Orders
) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
    """Yields the covariances and standard deviations at each tap, with the part that it shows.

    Args:
        net: The traced network.
        moments: Moments with all covariances at the taps.
        orders: Per model, the permutations of the owners of other groups. Units inside the k-th
            owner of one model are compared with those inside the k-th owner of the others.

    Yields:
        For each tap its part, the covariances `[K, K, n, n]` and the standard deviations `[K, n]`;
        for a joint tap, one such triple for every entry of the owner.

    Raises:
        ValueError: If a tap's covariances, or those within the models, were not measured.
    """
    std = moments.std
    plain, joint = matched_sites(net)
    for site in (*plain, *joint):
        block = None if moments.covariance is None else moments.covariance.get(site)
        if block is None or np.isnan(block := np.asarray(block)).any():
            raise ValueError(
                f'moments lacks some covariances at the tap "{site}"; measure with sites="taps", '
                "covariance=True"
            )
        spread = np.asarray(std[site])
        if site in plain:
            yield Part(plain[site].group), block, spread
            continue
        tap, models = joint[site], np.arange(len(spread))
        h, n = net.spec.sizes[tap.owner], net.spec.sizes[tap.group]
        order = np.stack([of[tap.owner] for of in orders])
        block, spread = block.reshape(*block.shape[:2], h, n, h, n), spread.reshape(-1, h, n)
        rows, columns = models[:, None], models[None, :]
        for entry, at in enumerate(order.T):
            inside = block[rows, columns, at[:, None], :, at[None, :], :]
            yield Part(tap.group, entry), inside, spread[models, at]


def in_place(net: Network) -> dict[str, np.ndarray]:
    """The permutations that move nothing, int32 `[n]`, or `[h, n]` for a group within another."""
    spec, order = net.spec, {}
    for group, n in spec.sizes.items():
        shape = (spec.sizes[spec.within[group]], n) if group in spec.within else (n,)
        order[group] = np.broadcast_to(np.arange(n, dtype=np.int32), shape).copy()
    return order


def joint_gains(
    net: Network, moments: Moments, to: int, model: int
) -> dict[str, dict[str, np.ndarray]]:
    """Correlations of the units inside every entry of an owner in one model and in another.

    Returns:
        By owner and group within it, `[h, h, n, n]`: entry `[i, j, a, b]` is the sum over joint
        taps of the correlation of unit a in entry i of `to` with unit b in entry j of `model`.

    Raises:
        ValueError: If the covariances at a joint tap are missing.
    """
    gains: dict[str, dict[str, np.ndarray]] = {}
    for site, tap in matched_sites(net)[1].items():
        h, n = net.spec.sizes[tap.owner], net.spec.sizes[tap.group]
        flat = correlation_between(moments, site, to, model)
        total = gains.setdefault(tap.owner, {})
        split = flat.reshape(h, n, h, n).swapaxes(1, 2)
        total[tap.group] = total.get(tap.group, 0.0) + split
    return gains


def correlation_between(moments: Moments, site: str, to: int, model: int) -> np.ndarray:
    """Correlations `[n, n]` between two models at a site.

    Raises:
        ValueError: If their covariances were not measured.
    """
    block = None if moments.covariance is None else moments.covariance.get(site)
    if block is None or np.isnan(block := np.asarray(block)[to, model]).any():
        raise ValueError(
            f'`moments` has no covariance between models {to} and {model} at the tap "{site}"; '
            'measure with sites="taps", covariance="cross"'
        )
    std = np.sqrt(np.asarray(moments.var[site]))
    return correlation(block, std[to], std[model])


def correlation(
    covariance: Array | np.ndarray, std_a: Array | np.ndarray, std_b: Array | np.ndarray
) -> np.ndarray:
    """Pearson correlations `[n, n]` in float64; 0 for a unit without variance.

    Args:
        covariance: `[n, n]` between the units of two models.
        std_a: `[n]`, standard deviations of the first.
        std_b: `[n]`, of the second.

    Example:
        >>> correlation(np.ones((2, 2)), np.array([1.0, 0.0]), np.array([2.0, 1.0])).tolist()
        [[0.5, 1.0], [0.0, 0.0]]
    """
    scale = np.outer(np.asarray(std_a, np.float64), np.asarray(std_b, np.float64))
    out = np.zeros_like(scale)
    return np.divide(np.asarray(covariance, np.float64), scale, out=out, where=scale > 0)
