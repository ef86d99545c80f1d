"""Optimal transport: sending the units of one network to those of another, in parts if need be.

For every group of tied axes a transport plan sends the units of a model to those of the first, at
the least total distance between what they compute ("Model Fusion via Optimal Transport", Singh &
Jaggi, 2020: OTFusion). Distances are those between activations on the same data, or between
incoming weights, from the input on. Where widths agree an exact plan is a permutation; where they
differ, or the plan is regularised, units are mixed, and networks of different widths are mapped
onto the first one's.

A plan `T [n, m]` gives two maps, whose rows sum to one: what writes the group takes
`M = diag(1 / T^T 1) T^T`, so that each unit of the first network is met by the mean of the units
sent to it; what reads the group takes `U = diag(1 / T 1) T`, so that weights on a unit go, in
parts, to the units that it was sent to. OTFusion takes `M^T` for `U`. In equal shares
`U = M^T m / n` is m / n of that, n being the other width and m the first: the same where widths
agree, while for widths that differ only U keeps what all units together give. A network whose units
are doubled, with half the outgoing weights each, is mapped by U to the network itself, and by `M^T`
to one with half the outgoing weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from vfjax import stats
from vfjax._tree import check_trees
from vfjax.align._between import Pair, pair_of
from vfjax.align._maps import Maps
from vfjax.align._plans import Problem, Solver, maps_of, shares_of
from vfjax.network import Network, check_net

__all__ = ["transport", "transport_moments"]

Array = jax.Array
PyTree = Any
Marginals = Literal["uniform", "l1", "l2", "softmax"]


def transport(
    net: Network,
    trees: Sequence[PyTree],
    data: Iterable[Any] | None = None,
    *,
    on: Literal["activations", "weights"] = "activations",
    regularization: float = 0.0,
    marginals: Marginals = "uniform",
    squared: bool = False,
    tolerance: float = 1e-4,
    max_iterations: int = 10_000,
) -> Maps:
    """Finds transport plans from the units of every model to those of the first.

    Args:
        net: The traced network.
        trees: Two or more parameter trees. The first stays as it is.
        data: Re-iterable of `x` or `(x, label)`; None with `on="weights"`.
        on: What the distance of two units is between.
        regularization: 0 for exact plans, which are permutations; more for Sinkhorn's iteration,
            as the weight of the plan's entropy in parts of the mean distance.
        marginals: Shares of the units: `"uniform"` for equal ones; `"l1"` or `"l2"` in proportion
            to the norms of what is compared; `"softmax"` of the l2 norms. A norm of activations
            is a mean over the samples, and `"l1"` is not known of them. No share is less than a
            thousandth of the mean.
        squared: Whether distances are squared.
        tolerance: Up to which error in the sums of the plan's rows, of one in all, Sinkhorn's
            iteration goes on.
        max_iterations: The most iterations.

    Returns:
        The maps; the first model's are absent.

    Raises:
        TypeError: If `net` is no traced network, a tree holds a leaf that is no array, or data has
            another dtype.
        ValueError: If there are fewer than two trees, they differ or hold NaN or infinity, data is
            missing, empty or exhausted, or an option is out of range.

    Warns:
        UserWarning: If Sinkhorn's iteration does not converge.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> a = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(3, 2))}
        >>> a = jax.tree.map(jnp.float32, a)
        >>> x = jnp.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], a, x)
        >>> b = net.spec.permute(a, {"w": np.array([2, 0, 1])})
        >>> found = transport(net, [a, b], [x])
        >>> merged = vfjax.merge.interpolate(found.apply(net, [a, b]))
        >>> bool(jnp.allclose(net.run(merged, x), net.run(a, x), atol=1e-5))
        True

    Source: "Model Fusion via Optimal Transport" (Singh & Jaggi, 2020), section 4; the reference
    code takes no biases and no norms.
    """
    check_net(net)
    check_trees(trees)
    solver = Solver(regularization, tolerance, max_iterations)
    if len(trees) < 2:
        raise ValueError(f"trees must be two or more, got {len(trees)}")
    if data is None:
        raise ValueError('data is None: give batches to measure on, or on="weights"')
    moments = stats.moments(net, trees, data, sites="taps", covariance="cross")
    return _by_activations(net, moments, solver, marginals, squared)


def transport_moments(
    net: Network,
    moments: stats.Moments,
    *,
    regularization: float = 0.0,
    marginals: Marginals = "uniform",
    squared: bool = False,
    tolerance: float = 1e-4,
    max_iterations: int = 10_000,
) -> Maps:
    """Transport by activations from moments alone: one pass over data serves all options.

    Args:
        net: The traced network.
        moments: `stats.moments(net, trees, data, sites="taps", covariance="cross")`.
        regularization: As in `transport`.
        marginals: As in `transport`.
        squared: As in `transport`.
        tolerance: As in `transport`.
        max_iterations: As in `transport`.

    Returns:
        As `transport`.

    Raises:
        TypeError: If `net` is no traced network.
        ValueError: If `moments` lack the covariances at a tap or are of one model, or an option is
            out of range.

    Example:
        >>> import jax, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> tree = {"w": np.float32(rng.normal(size=(4, 3))), "v": np.ones((3, 2), np.float32)}
        >>> x = np.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], tree, x)
        >>> trees = [tree, net.spec.permute(tree, {"w": [2, 0, 1]})]
        >>> found = vfjax.stats.moments(net, trees, [x], sites="taps", covariance="cross")
        >>> transport_moments(net, found).maps[1]["w"][0].tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    check_net(net)
    solver = Solver(regularization, tolerance, max_iterations)
    if moments.models < 2:
        raise ValueError(f"moments must be of two models or more, got {moments.models}")
    return _by_activations(net, moments, solver, marginals, squared)


def _by_activations(
    net: Network, moments: stats.Moments, solver: Solver, marginals: str, squared: bool
) -> Maps:
    sites: dict[str, list[str]] = {}
    for site, tap in stats.taps_by_site(net).items():
        sites.setdefault(tap.group, []).append(site)
    problems = {}
    for model in range(1, moments.models):
        for group, names in sites.items():
            pairs = [pair_of(moments, name, model, 0) for name in names]
            problems[model, group] = _problem(pairs, marginals, squared)
    plans = solver.plans(problems)
    maps: list[dict[str, Any]] = [{} for _ in range(moments.models)]
    for (model, group), plan in plans.items():
        maps[model][group] = maps_of(plan)
    return Maps(tuple(maps), {})


def _problem(pairs: Sequence[Pair], marginals: str, squared: bool) -> Problem:
    """The problem of one group, distances and mean squares being means over its taps."""
    cost = sum(pair.distances for pair in pairs) / len(pairs)
    norms = [np.sqrt(sum(pair.squares[side] for pair in pairs) / len(pairs)) for side in (0, 1)]
    shares = [shares_of(norm, marginals) for norm in norms]
    return Problem(cost if squared else np.sqrt(cost), *shares)
