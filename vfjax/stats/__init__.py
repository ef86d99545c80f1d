"""Moments at sites, of several models, in one pass over data.

`moments(net, trees, data, sites=..., covariance=...)` returns the mean and variance of each channel
at every site of every model, and the covariances of channels between models. They are pooled over
examples and positions, and do not depend on how the data is cut into batches.

- For matching: `sites="taps", covariance="cross"` with two models; `covariance=True` for matchers
  that look within a model too. The sites are `resolve_sites(net, "taps")`, the groups
  `net.spec.groups`.
- For REPAIR and RESCALE: `sites="paper"`, the pre-activations that the paper corrects.
- `Moments.mixed` averages over models; `Moments.carried` maps through permutations or matrices.

    >>> import jax, numpy as np, vfjax
    >>> v, x = {"w": np.eye(2), "v": np.ones((2, 1))}, np.float32([[0, 1], [2, 5]])
    >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], v, x)
    >>> taps = moments(net, [v, v], [x[:1], x[1:]], sites="taps", covariance=True)
    >>> taps.mean["w:act"][0].tolist(), taps.covariance["w:act"][0, 1].tolist()
    ([1.0, 3.0], [[1.0, 2.0], [2.0, 4.0]])

Pass images without augmentation. Batches are merged by the update of Chan, Golub and LeVeque
(1979), and values are shifted close to zero before they are squared, to keep float32 accuracy.
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
