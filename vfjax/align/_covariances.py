"""Covariances at taps, by what is matched by itself, as matchers take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vfjax._maps.parts import Part
from vfjax.align._entries import matched_sites
from vfjax.align.activations import assign_in_place, joint_gains
from vfjax.network._network import Network
from vfjax.stats._moments import Moments

Orders = Sequence[Mapping[str, np.ndarray]]


def match_owners(net: Network, moments: Moments) -> list[dict[str, np.ndarray]]:
    """Matches the owners of other groups, as heads of their dims, with those of the first model.

    What pairing two of them is worth is the sum of the correlations of the best assignments of what
    is inside.

    Args:
        net: The traced network.
        moments: Moments with covariances at the joint taps.

    Returns:
        Per model, by owner with a joint tap, its permutation; the first model's is the identity.

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
    """The covariances and standard deviations at each tap, with the part that it is of.

    Args:
        net: The traced network.
        moments: Moments with all covariances at the taps.
        orders: Per model, the permutations of the owners of other groups: what is inside the k-th
            of them is compared with what is inside the k-th of the others.

    Yields:
        For each tap its group, the covariances `[K, K, n, n]` and standard deviations `[K, n]`; for
        a joint tap these for every entry of the owner.

    Raises:
        ValueError: If a tap's covariances, or those within the models, were not measured.
    """
    std = moments.std
    plain, joint = matched_sites(net)
    for site in (*plain, *joint):
        block = None if moments.covariance is None else moments.covariance.get(site)
        if block is None or np.isnan(block := np.asarray(block)).any():
            raise ValueError(
                f'moments has not all covariances at the tap "{site}"; measure with sites="taps", '
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
