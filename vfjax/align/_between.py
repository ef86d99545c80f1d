"""Moments between two networks, at the taps of their groups: widths may differ."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vfjax import stats


class Pair(NamedTuple):
    """Moments of n units of one network and m of another, on the same samples.

    Attributes:
        means: `[n]` and `[m]`.
        variances: `[n]` and `[m]`.
        covariance: `[n, m]`.
    """

    means: tuple[np.ndarray, np.ndarray]
    variances: tuple[np.ndarray, np.ndarray]
    covariance: np.ndarray

    @property
    def squares(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean squares, `[n]` and `[m]`."""
        (first, second), (one, other) = self.means, self.variances
        return one + first**2, other + second**2

    @property
    def distances(self) -> np.ndarray:
        """Mean squared differences `[n, m]`, zero where rounding would have them negative."""
        (first, second), (one, other) = self.means, self.variances
        squares = one[:, None] + other - 2 * self.covariance
        return np.maximum(squares, 0) + (first[:, None] - second) ** 2


def pair_of(moments: stats.Moments, site: str, model: int, to: int) -> Pair:
    """The moments of two of K models, units of `model` first.

    Raises:
        ValueError: If their covariances were not measured.
    """
    block = None if moments.covariance is None else moments.covariance.get(site)
    if block is None or np.isnan(np.asarray(block[model, to])).any():
        raise ValueError(
            f'moments has no covariance between models {to} and {model} at the tap "{site}"; '
            'measure with sites="taps", covariance="cross"'
        )
    means, variances = (
        tuple(np.asarray(values[site][k], np.float64) for k in (model, to))
        for values in (moments.mean, moments.var)
    )
    return Pair(means, variances, np.asarray(block[model, to], np.float64))  # type: ignore[arg-type]
