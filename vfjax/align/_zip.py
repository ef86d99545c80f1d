"""ZipIt!: merging features that correlate, within a model as well as between models.

For every group of tied axes the features of K models are merged, pair by pair, until there are as
many as one model has ("ZipIt! Merging Models from Different Tasks without Training", Stoica et al.,
2024). The result is a merge matrix M and an unmerge matrix U for each model; the mean of the mapped
models is the zip.

Heads of attention are paired one to one with those of the first model, by how well their dims pair
up; then the dims of each head are merged separately.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from vfjax._maps import Maps, Part, check_is_maps, gather
from vfjax._passes import Mask
from vfjax._trees.options import check_key, number
from vfjax._types import Array, PyTree
from vfjax.align._assignment import PLACE
from vfjax.align._grouping import (
    greedy_groups,
    identity_groups,
    kmeans_groups,
    optimal_groups,
    permute_groups,
)
from vfjax.align._taps import (
    Orders,
    correlation,
    match_owners,
    models_at_taps,
    moments_at_taps,
    network_of,
    tap_covariances,
    with_spreads,
)
from vfjax.align._untapped import Untapped, check_untapped, untapped_groups, with_untapped
from vfjax.network._network import Network
from vfjax.stats._moments import Moments

Matcher = Literal["greedy", "optimal", "kmeans", "permute", "identity"]


def zip_features(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    data: Iterable[Any],
    *,
    matcher: Matcher = "greedy",
    alpha: float = 0.3,
    beta: float = 0.125,
    key: Array | None = None,
    untapped: Untapped = "weights",
    mask: Mask | None = None,
) -> Maps:
    """Matches the features of K models by correlation, even within a model, as ZipIt! does.

    Matchers:

    * `"greedy"`, as in ZipIt!: merges the most correlated pair, again and again, until the group
      has its original size. A merged feature goes back among the others; its correlation with any
      other is the least of its parts' correlations, times `alpha`, and it counts for the model of
      its first part.
    * `"optimal"`, for two models: the pairs with the largest sum of correlations, within or between
      models, without a budget. Needs networkx (extra `matching`); takes some seconds for hundreds
      of features, where the plain algorithm takes minutes.
    * `"kmeans"`: clusters of standardised features, of any size.
    * `"permute"`: pairs the features of each model with those of model 0 by an assignment, as
      `match_activations` does for two models.
    * `"identity"`: pairs features in the same place, heads included.

    Two groups that are contracted with each other, such as the dimensions of a head's queries and
    keys, both take M, so their products hold `M^T M`: an approximation where features are merged
    rather than permuted.

    Args:
        net: The traced network, or one per tree: networks of one architecture may differ behind
            the taps, as in their numbers of classes.
        trees: Two or more parameter trees. Leaves that no tap depends on, such as those of
            heads with different classes, may differ in shape.
        data: Re-iterable of `x` or `(x, label)`.
        matcher: One of the above.
        alpha: For the greedy matcher: discount of merged features, in [0, 1]. At 0 no feature is
            merged twice, which is enough for two models only. Negative correlations are not
            discounted, since that would make them larger.
        beta: For the greedy matcher: share of the merges that may be within a model, in [0, 1],
            divided equally among the models. At 0 each merge is of two features that count for
            different models; with `alpha` > 0 a chain of merges can join two features of one model
            even then, since a merged feature counts for its first part's model only.
        key: Random key for k-means.
        untapped: As in `match_activations`: how groups without a tap are matched.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`.

    Returns:
        The maps; `by_weights` or `unmatched` names groups without a tap. Groups that can only be
        permuted (`net.spec.rigid`, such as the width of a tied kernel) are permuted. The variances
        that a BatchNorm stores are unknown for merged features: measure them again with
        `vfjax.renorm.reset`.

    Raises:
        TypeError: If `net` is not a traced network, a tree holds a leaf that is not an array, `key`
            is not a random key, or data has another dtype.
        ValueError: If there are fewer than two trees, they differ before a tap or hold NaN or
            infinity, data is empty or exhausted, `matcher` is unknown, does not fit the number of
            models or lacks its key, or `alpha` or `beta` is out of range.
        ModuleNotFoundError: If `matcher` is "optimal" and networkx is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> a = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(3, 2))}
        >>> a = jax.tree.map(jnp.float32, a)
        >>> x = jnp.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], a, x)
        >>> b = net.spec.permute(a, {"w": np.array([2, 0, 1])})
        >>> maps = zip_features(net, [a, b], [x])
        >>> merged = vfjax.merge.interpolate(maps.apply(net, [a, b]))
        >>> bool(jnp.allclose(net.run(merged, x), net.run(a, x), atol=1e-5))
        True

        Or from moments, which serve every matcher; b has all three features of a:

        >>> moments = vfjax.stats.moments(net, [a, b], [x], sites="taps", covariance=True)
        >>> maps = zip_moments(net, moments, matcher="permute")
        >>> maps.maps[1]["w"][0].tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        >>> round(merged_correlation(net, moments, maps)["w"], 4)
        3.0

    Source: "ZipIt! Merging Models from Different Tasks without Training", section 4. The reference
    code lets one merge within each model pass at beta 0, and discounts negative correlations.
    """
    models = models_at_taps(net, trees)
    _check(matcher, alpha, beta, key, len(trees))
    check_untapped(untapped)
    if not models.net.taps:
        maps = Maps(tuple({} for _ in trees), {})
        return with_untapped(maps, models.nets, trees, untapped)
    moments = moments_at_taps(models, data, "all", mask)
    options = {"matcher": matcher, "alpha": alpha, "beta": beta, "key": key}
    maps = zip_moments(models.net, moments, **options)
    return with_untapped(maps, models.nets, trees, untapped)


def zip_moments(
    net: Network | Sequence[Network],
    moments: Moments,
    *,
    matcher: Matcher = "greedy",
    alpha: float = 0.3,
    beta: float = 0.125,
    key: Array | None = None,
) -> Maps:
    """As `zip_features`, from moments alone: one pass over the data serves all matchers.

    Args:
        net: The traced network, or one per model.
        moments: `stats.moments(net, trees, data, sites="taps", covariance=True)`.
        matcher: As in `zip_features`.
        alpha: As in `zip_features`.
        beta: As in `zip_features`.
        key: As in `zip_features`.

    Returns:
        As `zip_features`.

    Raises:
        TypeError: If `net` is not a traced network, or `key` is not a random key.
        ValueError: If `moments` lacks covariances at a tap or is of one model, `matcher` is
            unknown, does not fit the number of models or lacks its key, or `alpha` or `beta` is out
            of range.
        ModuleNotFoundError: If `matcher` is "optimal" and networkx is not installed.

    Example: see `zip_features`.

    Source: as `zip_features`.
    """
    net = network_of(net, moments)
    models = moments.models
    if models < 2:
        raise ValueError(f"moments must be of two models or more, got {models}")
    _check(matcher, alpha, beta, key, models)
    orders = match_owners(net, moments)
    if matcher == "identity":
        orders = [{owner: np.sort(order) for owner, order in of.items()} for of in orders]
    heads = {owner: np.concatenate([of[owner].argsort() for of in orders]) for owner in orders[0]}
    labels_of = {}
    for index, (part, similarity) in enumerate(correlations(net, moments, orders).items()):
        n = net.spec.sizes[part.group]
        place = np.tile(np.eye(n), (models, models))
        similarity = similarity + PLACE * place
        if part.group in net.spec.rigid and matcher != "identity":
            labels = permute_groups(similarity, models)
        elif matcher == "greedy":
            labels = greedy_groups(similarity, [n] * models, n, alpha=alpha, beta=beta)
        elif matcher == "optimal":
            labels = optimal_groups(similarity)
        elif matcher == "kmeans":
            assert key is not None
            labels = kmeans_groups(similarity, n, jax.random.fold_in(key, index))
        else:
            labels = (permute_groups if matcher == "permute" else identity_groups)(
                similarity, models
            )
        labels_of[part] = _in_order(labels)
    maps = with_spreads(Maps.of_labels({**heads, **gather(labels_of)}, models), net, moments)
    return dataclasses.replace(maps, unmatched=untapped_groups(net))


def merged_correlation(
    net: Network | Sequence[Network], moments: Moments, maps: Maps
) -> dict[str, float]:
    """The score that matchers maximise: how much merged features correlate, by group.

    Args:
        net: The traced network, or one per model.
        moments: `stats.moments(net, trees, data, sites="taps", covariance=True)`.
        maps: Maps that take each feature to one merged feature, such as those of `zip_moments`.

    Returns:
        For each group with a tap, a sum over merged features. Each adds the sum of the correlations
        of its parts with one another, over all ordered pairs, divided by the number of parts: for a
        pair, its correlation. K-means maximises this over all groupings of features, "optimal" over
        pairs. Heads count by their dims.

    Raises:
        TypeError: If `net` is not a traced network.
        ValueError: If `moments` lacks covariances at a tap, or a map splits features or mixes
            heads.

    Example: see `zip_features`.

    Source: none. It is the objective of the k-means with which the paper of `zip_features` compares
    its matcher, without the correlation of each feature with itself.
    """
    net = network_of(net, moments)
    check_is_maps(maps)
    total: dict[str, float] = {}
    owners = dict.fromkeys(tap.owner for tap in net.joint_taps)
    mixed = sorted(maps.mixed & owners.keys())
    if mixed:
        raise ValueError(f"maps must pair entries of {mixed[0]!r}, inside which others are mapped")
    orders = [
        {owner: of.get(owner, np.arange(net.spec.sizes[owner])) for owner in owners}
        for of in maps.permutations
    ]
    for part, similarity in correlations(net, moments, orders).items():
        group, plain = part.group, np.eye(net.spec.sizes[part.group])
        each = [m[group][1] if group in m else plain for m in maps.maps]
        member = np.concatenate([m if m.ndim == 2 else m[part.entry] for m in each])
        if not ((member == 0) | (member == 1)).all() or (member.sum(1) != 1).any():
            raise ValueError(
                f"maps must take each feature to one merged feature, but those of {group!r} do not"
            )
        np.fill_diagonal(similarity, 0)
        within = np.einsum("ic,ij,jc->c", member, similarity, member, optimize=True)
        score = float((within / np.maximum(member.sum(0), 1)).sum())
        total[group] = total.get(group, 0.0) + score
    return total


def correlations(
    net: Network, moments: Moments, orders: Orders | None = None
) -> dict[Part, np.ndarray]:
    """Correlations `[K n, K n]` of all models' features by part, averaged over its taps.

    Args:
        net: The traced network.
        moments: Moments with all covariances at the taps.
        orders: Per model, the permutations of the owners of other groups; None to match them.
    """
    orders = match_owners(net, moments) if orders is None else orders
    taps: dict[Part, list[np.ndarray]] = {}
    for part, block, std in tap_covariances(net, moments, orders):
        models, n = std.shape
        whole = block.transpose(0, 2, 1, 3).reshape(models * n, models * n)
        taps.setdefault(part, []).append(correlation(whole, std.reshape(-1), std.reshape(-1)))
    return {part: np.mean(each, axis=0) for part, each in taps.items()}


def _in_order(labels: np.ndarray) -> np.ndarray:
    """The same groups, numbered in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _check(matcher: str, alpha: float, beta: float, key: Array | None, models: int) -> None:
    if matcher not in get_args(Matcher):
        known = ", ".join(f'"{name}"' for name in get_args(Matcher))
        raise ValueError(f"matcher must be one of {known}, got {matcher!r}")
    if matcher == "optimal" and models > 2:
        raise ValueError(
            f'matcher "optimal" merges pairs, which for {models} models leaves too many features; '
            'use "greedy" or "kmeans"'
        )
    if matcher == "optimal" and importlib.util.find_spec("networkx") is None:
        raise ModuleNotFoundError(
            'matcher "optimal" needs networkx: pip install "vfjax[matching]"', name="networkx"
        )
    if matcher == "kmeans" and key is None:
        raise ValueError('matcher "kmeans" draws its first centres: give it a random `key`')
    if matcher == "kmeans":
        check_key(key)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= number(value) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    if matcher == "greedy" and alpha == 0 and models > 2:
        raise ValueError(
            f"alpha must be positive for {models} models: merging each feature once leaves half of "
            f"the {models} times as many"
        )
