"""Covariances at taps, by group, as matchers take them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vfjax import stats
from vfjax.network import Network


def tap_covariances(
    net: Network, moments: stats.Moments
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The covariances and standard deviations at each tap, with the group that it is of.

    Args:
        net: The traced network.
        moments: Moments with all covariances at the taps.

    Yields:
        For each tap its group, the covariances `[K, K, n, n]` and standard deviations `[K, n]`.

    Raises:
        ValueError: If a tap's covariances, or those within the models, were not measured.
    """
    std = moments.std
    for site, tap in stats.taps_by_site(net).items():
        block = None if moments.covariance is None else moments.covariance.get(site)
        if block is None or np.isnan(block := np.asarray(block)).any():
            raise ValueError(
                f'moments has not all covariances at the tap "{site}"; measure with sites="taps", '
                "covariance=True"
            )
        yield tap.group, block, np.asarray(std[site])
