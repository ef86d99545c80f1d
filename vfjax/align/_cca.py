"""CCA: invertible linear maps that bring one model's features to another's canonical directions.

Canonical correlation analysis finds, for the features of two networks, the directions that are most
correlated, one after the other. Mapping one model's canonical directions onto the other's is the
alignment of "Harmony in Diversity: Merging Neural Networks with Canonical Correlation Analysis"
(Horoi et al., 2024): where matching by permutation gives each unit one partner, here a unit is
matched with a combination of units.

Heads of attention are paired one to one with those of the first model, by how well their dims
correlate; then the dims of each head are mapped separately.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vfjax._maps import Maps, Part, gather, permuting
from vfjax._passes import Mask
from vfjax._trees.options import number
from vfjax._types import PyTree
from vfjax.align._assignment import PLACE, assign
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


def cca(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    data: Iterable[Any],
    *,
    regularization: float = 1.0,
    relative: bool = True,
    dtype: Any = None,
    untapped: Untapped = "weights",
    mask: Mask | None = None,
) -> Maps:
    """Maps every model's features onto those of the first by canonical correlation analysis.

    With covariances `Sxx` of the features of model 0, `Syy` of those of model k, a ridge added to
    both, and `U S V^T = svd(Sxx^-1/2 Sxy Syy^-1/2)`, the features of model k take `T = Sxx^1/2 U
    V^T Syy^-1/2`, and what reads them takes `T^-1`. Mapped features have the covariances of model
    0's features, and are the closest to them in whitened coordinates among all maps that do. Where
    a group has several taps, their covariances are averaged.

    Behind a ReLU, a unit that is dead on the data has no variance, however negative its
    pre-activations are; maps found there mix these pre-activations into those of live units.

    Two groups that are contracted with each other, such as the dimensions of a head's queries and
    keys, both take `T`, so their products hold `T^T T`: an approximation, unless `T` is orthogonal.

    Canonical correlations of zero leave directions undetermined: those of dead or duplicate units,
    or all but the first N - 1 for N samples. These follow the permutation that matches the units
    best, so that a network matched with itself does not change.

    Only model 0 is left unchanged, so the result depends on which model comes first. To avoid that
    with K >= 3 models, match them cycle-consistently (`match_universe`).

    Args:
        net: The traced network, or one per tree: networks of one architecture may differ behind
            the taps, as in their numbers of classes.
        trees: Two or more parameter trees; model 0 is the one to map onto. Leaves that no tap
            depends on, such as those of heads with different classes, may differ in shape.
        data: Re-iterable of `x` or `(x, label)`.
        regularization: Ridge on the covariances within each model, 0 or more. It bounds how much
            the maps can amplify: the norm of `T` is at most
            `sqrt((largest variance of model 0 + ridge) / ridge of model k)`.
        relative: Whether the ridge is a fraction of each model's mean variance at the taps, which
            makes the maps independent of the scale of the features, or (False) in the squared units
            of the features, as the paper's 0.1. With a ridge far below the mean variance,
            directions of little variance count as much as the others.
        dtype: Dtype of the decompositions and maps, `np.float32` or `np.float64`; None for that of
            the moments, which is float32 unless the network computes in float64.
        untapped: As in `match_activations`: how groups without a tap are matched.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`.

    Returns:
        The maps `(T, T^-1)` of all models but the first; `by_weights` or `unmatched` names groups
        without a tap. Groups that can only be permuted (`net.spec.rigid`, such as the width of a
        tied kernel) are permuted. The variances that a BatchNorm stores are unknown for combined
        features: measure them again with `vfjax.renorm.reset`.

    Raises:
        TypeError: If `net` is not a traced network, a tree holds a leaf that is not an array, data
            has another dtype, or `dtype` is neither float32 nor float64.
        ValueError: If there are fewer than two trees, they differ before a tap or hold NaN or
            infinity, data is empty or exhausted, or `regularization` is negative or not finite.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> a = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(3, 2))}
        >>> a = jax.tree.map(jnp.float32, a)
        >>> x = jnp.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], a, x)
        >>> b = net.spec.permute(a, {"w": np.array([2, 0, 1])})
        >>> maps = cca(net, [a, b], [x])
        >>> merged = vfjax.merge.interpolate(maps.apply(net, [a, b]))
        >>> bool(jnp.allclose(net.run(merged, x), net.run(a, x), atol=1e-4))
        True

        Or from moments, which serve every ridge; b has all the features of a:

        >>> moments = vfjax.stats.moments(net, [a, b], [x], sites="taps", covariance=True)
        >>> same = cca_moments(net, moments).maps[1]["w"][0]
        >>> bool(np.allclose(same, maps.maps[1]["w"][0], atol=1e-4))
        True
        >>> canonical_correlations(net, moments, regularization=0)["w"].round(3).tolist()
        [[1.0, 1.0, 1.0]]

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", appendix on alignments, whose
    code has `regularization=0.1, relative=False`, takes the features after each ReLU and decomposes
    in float32; and Horoi et al., 2024, section 4.
    """
    models = models_at_taps(net, trees)
    _check(regularization, dtype)
    check_untapped(untapped)
    if not models.net.taps:
        maps = Maps(tuple({} for _ in trees), {})
        return with_untapped(maps, models.nets, trees, untapped)
    moments = moments_at_taps(models, data, "all", mask)
    options = {"regularization": regularization, "relative": relative, "dtype": dtype}
    maps = cca_moments(models.net, moments, **options)
    return with_untapped(maps, models.nets, trees, untapped)


def cca_moments(
    net: Network | Sequence[Network],
    moments: Moments,
    *,
    regularization: float = 1.0,
    relative: bool = True,
    dtype: Any = None,
) -> Maps:
    """As `cca`, from moments alone: one pass over the data serves all ridges.

    Args:
        net: The traced network, or one per model.
        moments: `stats.moments(net, trees, data, sites="taps", covariance=True)`.
        regularization: As in `cca`.
        relative: As in `cca`.
        dtype: As in `cca`.

    Returns:
        As `cca`.

    Raises:
        TypeError: If `net` is not a traced network, or `dtype` is neither float32 nor float64.
        ValueError: If `moments` lacks covariances at a tap or is of one model, or `regularization`
            is negative or not finite.

    Example: see `cca`.

    Source: as `cca`.
    """
    net = network_of(net, moments)
    maps: list[dict[str, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(moments.models)]
    pooled, orders = _pooled(net, moments, regularization, dtype)
    for k in range(1, moments.models):
        pairs = {
            part: _Pair(block, k, regularization, relative, _rounding(moments, block))
            for part, block in pooled.items()
        }
        own = gather(
            {
                part: pair.permuted() if part.group in net.spec.rigid else pair.maps()
                for part, pair in pairs.items()
            }
        )
        maps[k] = {**permuting(orders[k]), **own}
    found = with_spreads(Maps(tuple(maps), {}), net, moments)
    return dataclasses.replace(found, unmatched=untapped_groups(net))


def canonical_correlations(
    net: Network | Sequence[Network],
    moments: Moments,
    *,
    regularization: float = 1.0,
    relative: bool = True,
    dtype: Any = None,
) -> dict[str, np.ndarray]:
    """Canonical correlations of every model with model 0, by group: how much they have in common.

    Args:
        net: The traced network, or one per model.
        moments: `stats.moments(net, trees, data, sites="taps", covariance=True)`.
        regularization: As in `cca`; it lowers the correlations of directions of little variance.
        relative: As in `cca`.
        dtype: As in `cca`.

    Returns:
        By group `[K - 1, n]`, of models 1 to K - 1, descending, from 0 to 1. For a group within
        another of h entries, `[K - 1, h, n]`, with the entries in the order of model 0. Owners of
        other groups, such as heads, have no correlations.

    Raises:
        TypeError: As `cca_moments`.
        ValueError: As `cca_moments`.

    Example: see `cca`.

    Source: the singular values `S` of `cca`; Horoi et al., 2024, section 4.
    """
    net, by_part = network_of(net, moments), {}
    for part, block in _pooled(net, moments, regularization, dtype)[0].items():
        eps = _rounding(moments, block)
        pairs = (_Pair(block, k, regularization, relative, eps) for k in range(1, len(block)))
        # Rounding can raise the correlations of equal features above one.
        by_part[part] = np.stack([np.minimum(pair.correlations, 1) for pair in pairs])
    return gather(by_part, axis=1)


class _Pair:
    """The canonical correlation analysis of one group of model k with model 0.

    Everything is computed in the eigenbases of the two covariances, where whitening is a division.
    The polar factor `Q = U V^T` is nevertheless that of symmetric whitening: the bases cancel.
    """

    def __init__(
        self, block: np.ndarray, k: int, regularization: float, relative: bool, eps: float
    ) -> None:
        self.block, self.k = block, k
        self.constant = False
        bases, roots, alive = [], [], []
        for covariance in (block[0, 0], block[k, k]):
            values, basis = np.linalg.eigh((covariance + covariance.T) / 2)
            # Eigenvalues below this are rounding errors of the covariances.
            floor = len(values) * eps * max(values[-1], 0)
            ridge = regularization * (np.maximum(values, 0).mean() if relative else 1)
            self.constant |= not floor > 0
            bases.append(basis)
            roots.append(np.sqrt(np.maximum(values, floor) + ridge))
            alive.append(values > floor)
        self.bases, self.roots = bases, roots
        if self.constant:
            self.correlations = np.zeros(len(block[0, 0]), block.dtype)
            return
        shared = bases[0].T @ block[0, k] @ bases[1] / np.outer(*roots)
        # A direction that does not vary in one model correlates with nothing in the other.
        shared *= np.outer(*alive)
        self.left, self.correlations, self.right = np.linalg.svd(shared)
        self.rounding = len(shared) * np.finfo(block.dtype).eps

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """`T [n, n]` and its inverse."""
        if self.constant:
            return self.permuted()
        (to, of), (grow, shrink) = self.bases, self.roots
        decided = self.correlations > self.rounding
        rotation = self.left[:, decided] @ self.right[decided]
        if not decided.all():
            left, right = self.left[:, ~decided], self.right[~decided]
            inner = left.T @ (to.T @ self._permutation() @ of) @ right.T
            first, _, second = np.linalg.svd(inner)
            rotation = rotation + left @ (first @ second) @ right
        return (
            to @ (grow[:, None] * rotation / shrink) @ of.T,
            of @ (shrink[:, None] * rotation.T / grow) @ to.T,
        )

    def permuted(self) -> tuple[np.ndarray, np.ndarray]:
        """A permutation `[n, n]` and its inverse, where units cannot be mixed or do not vary."""
        permutation = self._permutation()
        return permutation, permutation.T.copy()

    def _permutation(self) -> np.ndarray:
        """The permutation of model k's units that correlates best, as a matrix."""
        n = len(self.block[0, 0])
        std = [np.sqrt(np.maximum(np.diag(self.block[i, i]), 0)) for i in (0, self.k)]
        order = assign(correlation(self.block[0, self.k], *std) + PLACE * np.eye(n))
        return np.eye(n, dtype=self.block.dtype)[order]


def _pooled(
    net: Network, moments: Moments, regularization: float, dtype: Any
) -> tuple[dict[Part, np.ndarray], Orders]:
    """Checks all arguments, and averages the covariances `[K, K, n, n]` of each part over its taps.

    Also returns, per model, the permutations of the owners of other groups.
    """
    if moments.models < 2:
        raise ValueError(f"moments must be of two models or more, got {moments.models}")
    _check(regularization, dtype)
    orders = match_owners(net, moments)
    taps: dict[Part, list[np.ndarray]] = {}
    for part, block, _ in tap_covariances(net, moments, orders):
        taps.setdefault(part, []).append(block.astype(dtype or block.dtype))
    return {part: np.mean(blocks, axis=0) for part, blocks in taps.items()}, orders


def _rounding(moments: Moments, block: np.ndarray) -> float:
    """The relative rounding error of the covariances, both as measured and as decomposed."""
    assert moments.covariance is not None
    measured = next(iter(moments.covariance.values())).dtype
    return float(max(np.finfo(measured).eps, np.finfo(block.dtype).eps))


def _check(regularization: float, dtype: Any) -> None:
    if not 0 <= number(regularization) < np.inf:
        raise ValueError(f"regularization must be 0 or more and finite, got {regularization!r}")
    if dtype is not None and np.dtype(dtype) not in (np.float32, np.float64):
        raise TypeError(f"dtype must be np.float32 or np.float64, got {np.dtype(dtype)}")
