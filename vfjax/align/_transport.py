"""Optimal transport: sending the units of one network to those of another, whole or in parts.

For every group of tied axes a transport plan sends the units of a model to those of the first, at
the least total distance between them ("Model Fusion via Optimal Transport", Singh &
Jaggi, 2020: OTFusion). Distances are between activations on the same data, or between incoming
weights, from the input on. Where widths agree, an exact plan is a permutation. Where they differ,
or the plan is regularised, units are mixed; the mapped network has the widths of the first.

A plan `T [n, m]` gives two maps, whose rows sum to one: what writes the group takes
`M = diag(1 / T^T 1) T^T`, so that each unit of the first network meets the mean of the units sent
to it; what reads the group takes `U = diag(1 / T 1) T`, so that the weights on a unit go, in parts,
to the units that it was sent to. OTFusion takes `M^T` for `U`. For equal shares U is n / m times
that: the same where widths agree, but where they differ only U preserves the sum that a reader gets
from all units. A network whose units are duplicated, with half the outgoing weights each, is mapped
by U to the original network, and by `M^T` to one with half the outgoing weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from vfjax._maps import Maps
from vfjax._passes import Mask
from vfjax._trees import Flat, check_finite, check_trees, flatten_named
from vfjax._trees.concrete import check_host
from vfjax._trees.options import whole
from vfjax._types import PyTree
from vfjax.align._by_activations import Pair, measure, pair_of
from vfjax.align._by_weights import match_incoming
from vfjax.align._heads import Compared, mapped, problems_of
from vfjax.align._plans import Key, Problem, Solver
from vfjax.align._taps import matched_sites, moments_at_taps, within
from vfjax.align._untapped import Untapped, check_untapped, untapped_groups, with_untapped
from vfjax.network._arguments import Models, check_net, networks
from vfjax.network._network import Network
from vfjax.network._unaligned import warn_of_fixed
from vfjax.stats._moments import Moments
from vfjax.symmetry._places import absent_paths

Marginals = Literal["uniform", "l1", "l2", "softmax"]


def transport(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    data: Iterable[Any] | None = None,
    *,
    on: Literal["activations", "weights"] = "activations",
    regularization: float = 0.0,
    marginals: Marginals = "uniform",
    squared: bool = False,
    sweeps: int = 0,
    tolerance: float = 1e-4,
    max_iterations: int = 10_000,
    untapped: Untapped = "weights",
    mask: Mask | None = None,
) -> Maps:
    """Maps the units of every model to those of the first by optimal transport.

    With `on="activations"` the distance of two units is the root mean squared difference of their
    activations on the data, over all taps of their group. With `on="weights"` it is the distance of
    the weights that write them: kernels, whose inputs have been mapped, biases, and the scales and
    shifts of norms. Kernels before a norm with stored statistics are first put into the units of
    its output, by its scale and stored variance; biases there, and stored means, are not compared.
    Groups are then taken in the order of the network. A group that several layers write, such as a
    residual stream, is compared at those whose inputs are mapped by then; `sweeps` compares every
    group again at all of them.

    Two groups that are contracted with each other, such as the dimensions of a head's queries and
    keys, preserve the function only under permutations, so mixing their units is an approximation.

    Heads of attention are sent one to one, at the costs of exact plans between their dims, even
    where `regularization` mixes the dims inside them. Networks that differ in the number of heads
    can be compared by weights only; their heads are mixed, and the dims of all heads are mapped in
    the same way.

    Args:
        net: The traced network, or one per tree: networks of one architecture may differ in widths
            and classes.
        trees: Two or more parameter trees. The first does not change.
        data: Re-iterable of `x` or `(x, label)`; None with `on="weights"`.
        on: Whether distances are between activations or between weights.
        regularization: 0 for exact plans, which are permutations where widths agree and shares are
            equal. A positive value for Sinkhorn's iteration: the weight of the plan's entropy,
            relative to the mean distance in the group; 0.01 to 0.1 is usual.
        marginals: Shares of the units: `"uniform"` for equal shares; `"l1"` or `"l2"` for shares in
            proportion to the norms of what is compared; `"softmax"` for the softmax of the l2
            norms. Norms of activations are means over the samples; `"l1"` is not available for
            them. No share is below a thousandth of the mean.
        squared: Whether distances are squared.
        sweeps: Number of sweeps over all groups after the first, with `on="weights"`; they end
            early if one changes nothing.
        tolerance: Sinkhorn's iteration, in float64, goes on while the row sums of a plan, which add
            up to one, are off by more than this in total. The smaller `regularization`, the more
            iterations it takes. If the error stays above the tolerance, a warning says so: a plan
            that misses its shares may even seem cheaper than the exact one.
        max_iterations: The largest number of iterations.
        untapped: With `on="activations"`, as in `match_activations`: how groups without a tap are
            matched.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`.

    Returns:
        The maps `(M, U)`, float32, rows summing to one; the first model has none. With
        `on="activations"`, `by_weights` or `unmatched` names groups without a tap. Groups that can
        only be permuted (`net.spec.rigid`, such as the width of a tied kernel) are permuted, by
        exact plans. Where units are mixed, the variances that a norm stores are unknown: measure
        them again with `vfjax.renorm.reset`.

    Raises:
        TypeError: If `net` is not a traced network, a tree holds a leaf that is not an array, or
            data has another dtype.
        ValueError: If there are fewer than two trees, they do not fit their networks or hold NaN or
            infinity; if data is missing, empty or exhausted, or given where it is not read; if an
            option is out of range; or if an exact plan is too large: the linear programme, for
            shares that differ or units that cannot be cut into few equal pieces, takes at most
            2^20 entries.

    Warns:
        UserWarning: If the error of a plan is above `tolerance` after `max_iterations`.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, vfjax
        >>> rng = np.random.default_rng(0)
        >>> a = {"w": rng.normal(size=(4, 3)), "v": rng.normal(size=(3, 2))}
        >>> a = jax.tree.map(jnp.float32, a)
        >>> x = jnp.float32(rng.normal(size=(50, 4)))
        >>> net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], a, x)
        >>> b = net.spec.permute(a, {"w": np.array([2, 0, 1])})
        >>> maps = transport(net, [a, b], [x])
        >>> merged = vfjax.merge.interpolate(maps.apply(net, [a, b]))
        >>> bool(jnp.allclose(net.run(merged, x), net.run(a, x), atol=1e-5))
        True

        Or from moments, which serve every option:

        >>> moments = vfjax.stats.moments(net, [a, b], [x], sites="taps", covariance="cross")
        >>> transport_moments(net, moments).maps[1]["w"][0].tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]

    Source: "Model Fusion via Optimal Transport" (Singh & Jaggi, 2020), section 4. Its code takes
    neither biases nor norms, also maps the output layer, and compares activations before the
    non-linearity.
    """
    nets = networks(net, len(trees))
    one_net = all(other is nets[0] for other in nets)
    models = Models(nets, tuple(trees), check_trees(trees) if one_net else _flats(nets, trees))
    check_host("plans are found", trees=list(trees))
    if len(trees) < 2:
        raise ValueError(f"trees must be two or more, got {len(trees)}")
    warn_of_fixed(nets[0])
    solver = Solver(regularization, tolerance, max_iterations, nets[0].spec.rigid)
    if whole(sweeps) < 0 or (sweeps and on != "weights"):
        raise ValueError(
            f'sweeps must be 0, or a whole number of more with on="weights", got {sweeps!r}'
        )
    if on == "weights":
        for name, given in (("data", data), ("mask", mask)):
            if given is not None:
                raise ValueError(f'{name} is not read with on="weights": leave it out')
        _check_marginals(marginals, ("uniform", "l1", "l2", "softmax"))
        options = {"marginals": marginals, "squared": squared, "sweeps": sweeps}
        return Maps(({}, *match_incoming(nets, trees, solver, **options)), {})
    if on != "activations":
        raise ValueError(f'on must be "activations" or "weights", got {on!r}')
    if data is None:
        raise ValueError('data is None: give batches to measure on, or on="weights"')
    _check_marginals(marginals, ("uniform", "l2", "softmax"))
    check_untapped(untapped)
    if not nets[0].taps:
        pairs = [{} for _ in trees[1:]]
    elif one_net:
        moments = moments_at_taps(models, data, "cross", mask)
        pairs = _pairs(nets[0], moments)
    else:
        pairs = measure(nets, trees, data, mask)
    maps = _by_activations(nets, pairs, solver, marginals, squared)
    return with_untapped(maps, nets, trees, untapped)


def transport_moments(
    net: Network,
    moments: Moments,
    *,
    regularization: float = 0.0,
    marginals: Marginals = "uniform",
    squared: bool = False,
    tolerance: float = 1e-4,
    max_iterations: int = 10_000,
) -> Maps:
    """As `transport` by activations, from moments alone: one pass over data serves all options.

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
        TypeError: If `net` is not a traced network.
        ValueError: If `moments` lack the covariances at a tap or are of one model, or an option is
            out of range.

    Warns:
        UserWarning: As `transport`.

    Example: see `transport`.

    Source: as `transport`.
    """
    check_net(net)
    warn_of_fixed(net)
    solver = Solver(regularization, tolerance, max_iterations, net.spec.rigid)
    _check_marginals(marginals, ("uniform", "l2", "softmax"))
    if moments.models < 2:
        raise ValueError(f"moments must be of two models or more, got {moments.models}")
    return _by_activations([net], _pairs(net, moments), solver, marginals, squared)


def _pairs(net: Network, moments: Moments) -> list[dict[str, Pair]]:
    """For every model but the first, its moments and those of the first, by tap."""
    sites = [site for of in matched_sites(net) for site in of]
    return [
        {site: pair_of(moments, site, model, 0) for site in sites}
        for model in range(1, moments.models)
    ]


def _by_activations(
    nets: Sequence[Network],
    pairs: list[dict[str, Pair]],
    solver: Solver,
    marginals: str,
    squared: bool,
) -> Maps:
    sites: dict[str, list[str]] = {}
    sizes, inside = nets[0].spec.sizes, within(nets)
    for taps in matched_sites(nets[0], inside):
        for site, tap in taps.items():
            sites.setdefault(tap.group, []).append(site)
    orders: dict[int, dict[str, np.ndarray]] = {}
    problems: dict[Key, Problem] = {}
    for model, by_tap in enumerate(pairs, start=1):
        compared = {
            group: _compared([by_tap[name] for name in names], squared)
            for group, names in sites.items()
        }
        orders[model], parts = problems_of(compared, inside, sizes, marginals)
        problems |= {(model, part): problem for part, problem in parts.items()}
    for group, n in sizes.items():
        k = next((k for k, net in enumerate(nets) if net.spec.sizes[group] != n), 0)
        if k and group not in sites:
            raise ValueError(
                f"group '{group}' has other widths in net[{k}] and net[0], and shows in no "
                'activations; use on="weights"'
            )
    plans = solver.plans(problems)
    maps = (
        mapped(orders[model], {part: plan for (of, part), plan in plans.items() if of == model})
        for model in orders
    )
    return Maps(({}, *maps), {}, unmatched=untapped_groups(nets[0]))


def _compared(pairs: Sequence[Pair], squared: bool) -> Compared:
    """Compares the units of one group, by means of distances and squares over its taps."""
    cost = np.mean([pair.distances for pair in pairs], axis=0)
    norms = [np.sqrt(np.mean([pair.squares[side] for pair in pairs], axis=0)) for side in (0, 1)]
    return Compared(cost if squared else np.sqrt(cost), (norms[0], norms[1]))


def _check_marginals(marginals: str, known: Sequence[str]) -> None:
    if marginals not in known:
        raise ValueError(f"marginals must be one of {', '.join(known)} here, got {marginals!r}")


def _flats(nets: Sequence[Network], trees: Sequence[PyTree]) -> tuple[Flat, ...]:
    """Flattens trees, and checks that they fit their networks and differ in widths only."""
    flats: list[Flat] = []
    groups = nets[0].spec.groups
    axes = Counter(axis[:2] for places in groups.values() for axis in places)
    for k, (net, tree) in enumerate(zip(nets, trees, strict=True)):
        flats.append(flatten_named(tree, name=f"trees[{k}]"))
        net.spec.check_leaves(flats[k].leaves, absent_paths(tree))
        check_finite(flats[k].leaves, name=f"trees[{k}]")
        for group, places in groups.items():
            if [a[:3] for a in places] != [a[:3] for a in net.spec.groups[group]]:
                raise ValueError(
                    f"group '{group}' ties other axes in net[{k}] than in net[0]; networks may "
                    "differ in widths and classes only"
                )
            shared = next((axis.path for axis in places if axes[axis[:2]] > 1), None)
            if shared is not None and net.spec.sizes[group] != nets[0].spec.sizes[group]:
                raise ValueError(
                    f"group '{group}' has other widths in net[{k}] and net[0], and shares an axis "
                    f"of '{shared}' with another group; there, widths must agree"
                )
    return tuple(flats)
