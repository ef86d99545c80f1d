"""ZipIt!: merging features that correlate, within a model as well as between models.

For every group of tied axes the features of K models are merged, pair by pair, to as many as one
model has ("ZipIt! Merging Models from Different Tasks without Training", Stoica et al., 2024). What
comes out is a merge matrix M and an unmerge matrix U for each model: the mean of the mapped models
is the zip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from vfjax import stats
from vfjax._tree import check_trees
from vfjax.align._covariances import tap_covariances
from vfjax.align._greedy import greedy_groups
from vfjax.align._maps import Maps
from vfjax.align.activations import PLACE, correlation
from vfjax.network import Network, check_net

__all__ = ["zip_features", "zip_moments"]

Array = jax.Array
PyTree = Any


def zip_features(
    net: Network,
    trees: Sequence[PyTree],
    data: Iterable[Any],
    *,
    alpha: float = 0.3,
    beta: float = 0.125,
) -> Maps:
    """Matches the features of K models greedily by correlation, as ZipIt! does.

    Pairs are merged from the most correlated on until a group has its size again. A merged feature
    goes back among the others; it has with any other the least of its parts' correlations, times
    `alpha`, and counts for the model of its first part.

    Args:
        net: The traced network.
        trees: Two or more parameter trees.
        data: Re-iterable of `x` or `(x, label)`.
        alpha: Discount of merged features, in [0, 1]; at 0 nothing is merged twice, which does for
            two models only. A negative correlation is not discounted, which would make it larger.
        beta: Share of the merges that may be within a model, in [0, 1], equally many for each; at 0
            all are between models.

    Returns:
        The maps. Groups without a tap are averaged as they are. The variances that a BatchNorm
        stores are unknown for merged features: measure them anew with `vfjax.renorm.reset`.

    Raises:
        TypeError: If `net` is no traced network, a tree holds a leaf that is no array, or data has
            another dtype.
        ValueError: If there are fewer than two trees, they differ or hold NaN or infinity, data is
            empty or exhausted, or `alpha` or `beta` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> a = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(3, 2))}
        >>> a = jax.tree.map(jnp.float32, a)
        >>> x = jnp.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], a, x)
        >>> b = net.spec.permute(a, {"w": np.array([2, 0, 1])})
        >>> found = zip_features(net, [a, b], [x])
        >>> merged = vfjax.merge.interpolate(found.apply(net, [a, b]))
        >>> bool(jnp.allclose(net.run(merged, x), net.run(a, x), atol=1e-5))
        True

    Source: "ZipIt! Merging Models from Different Tasks without Training", section 4. The reference
    code lets one merge within each model pass at beta 0, and discounts negative correlations.
    """
    check_net(net)
    check_trees(trees)
    if len(trees) < 2:
        raise ValueError(f"trees must be two or more, got {len(trees)}")
    _check(alpha, beta, len(trees))
    if not net.taps:
        return Maps(tuple({} for _ in trees), {})
    moments = stats.moments(net, trees, data, sites="taps", covariance=True)
    return zip_moments(net, moments, alpha=alpha, beta=beta)


def zip_moments(
    net: Network, moments: stats.Moments, *, alpha: float = 0.3, beta: float = 0.125
) -> Maps:
    """The same from moments alone: one pass over data serves all `alpha` and `beta`.

    Args:
        net: The traced network.
        moments: `stats.moments(net, trees, data, sites="taps", covariance=True)`.
        alpha: As in `zip_features`.
        beta: As in `zip_features`.

    Returns:
        As `zip_features`.

    Raises:
        TypeError: If `net` is no traced network.
        ValueError: If `moments` lacks covariances at a tap or is of one model, or `alpha` or `beta`
            is out of range.

    Example:
        >>> import jax, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> tree = {"w": np.float32(rng.normal(size=(4, 3))), "v": np.ones((3, 2), np.float32)}
        >>> x = np.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], tree, x)
        >>> found = vfjax.stats.moments(net, [tree, tree], [x], sites="taps", covariance=True)
        >>> zip_moments(net, found).maps[1]["w"][0].tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    check_net(net)
    models = moments.models
    if models < 2:
        raise ValueError(f"moments must be of two models or more, got {models}")
    _check(alpha, beta, models)
    found = {}
    for group, similarity in correlations(net, moments).items():
        n = net.spec.sizes[group]
        place = np.tile(np.eye(n), (models, models))
        labels = greedy_groups(similarity + PLACE * place, [n] * models, n, alpha=alpha, beta=beta)
        found[group] = labels
    return Maps.of_labels(found, models)


def correlations(net: Network, moments: stats.Moments) -> dict[str, np.ndarray]:
    """By group, the correlations `[K n, K n]` of all models' features, the mean over its taps."""
    taps: dict[str, list[np.ndarray]] = {}
    for group, block, std in tap_covariances(net, moments):
        models, n = std.shape
        whole = block.transpose(0, 2, 1, 3).reshape(models * n, models * n)
        taps.setdefault(group, []).append(correlation(whole, std.reshape(-1), std.reshape(-1)))
    return {group: np.mean(found, axis=0) for group, found in taps.items()}


def _check(alpha: float, beta: float, models: int) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    if alpha == 0 and models > 2:
        raise ValueError(
            f"alpha must be positive for {models} models: merging each feature once leaves half of "
            f"the {models} times as many"
        )
