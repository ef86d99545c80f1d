"""Moments at sites, of several models, in one pass over data.

One pass over the data gives, at every requested site and for every model, the mean and variance of
each channel over the pooled samples, and between any two models the covariances of their channels.
Batches are merged by the update of Chan, Golub & LeVeque (1979), and values are shifted close to
zero before they are squared, so the numbers do not depend on how the data was cut into batches and
keep float32 accuracy.

The forward passes of all models and the statistics of a batch are one compiled call.
"""

from __future__ import annotations

from vfjax.stats._moments import Moments as Moments
from vfjax.stats._moments import moments as moments
from vfjax.stats._sites import resolve_sites as resolve_sites

__all__ = [
    "Moments",
    "moments",
    "resolve_sites",
]
