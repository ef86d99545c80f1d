"""Transport by activations: the moments that compare networks, whose widths may differ, at taps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import Mask, check_finite_means, compiled, on_mesh, stream
from vfjax._passes.masking import check_valid
from vfjax._passes.moments import covariance_of, merge_moments, union_second, without_rounding
from vfjax._types import Array, PyTree
from vfjax.align._taps import matched_sites, within
from vfjax.network._checks import check_batch
from vfjax.network._layout import Layout, layout_of
from vfjax.network._network import Network
from vfjax.network._valid import valid_at
from vfjax.stats._measure import read
from vfjax.stats._moments import Moments

# Means, variances and covariances with the first network; each by network, then by site.
Measured = dict[str, list[dict[str, Array]]]


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
        """Mean squared differences `[n, m]`, with negative results of rounding set to zero."""
        (first, second), (one, other) = self.means, self.variances
        squares = one[:, None] + other - 2 * self.covariance
        return np.maximum(squares, 0) + (first[:, None] - second) ** 2


def pair_of(moments: Moments, site: str, model: int, to: int) -> Pair:
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
    return _pair(moments.mean[site], moments.var[site], (model, to), block[model, to])


def _pair(mean: Any, var: Any, at: tuple[int, int], covariance: Any) -> Pair:
    """Two of many networks' moments, in float64."""
    means, variances = (
        (np.asarray(v[at[0]], np.float64), np.asarray(v[at[1]], np.float64)) for v in (mean, var)
    )
    return Pair(means, variances, np.asarray(covariance, np.float64))


def measure(
    nets: Sequence[Network],
    trees: Sequence[PyTree],
    data: Iterable[Any],
    mask: Mask | None = None,
) -> list[dict[str, Pair]]:
    """Measures networks against the first of them, in one pass over data.

    Args:
        nets: One per tree, with the same groups; their widths may differ.
        trees: The models.
        data: Re-iterable of `x` or `(x, label)`.
        mask: As in `vfjax.stats.moments`.

    Returns:
        For every network but the first, its moments and those of the first, by tap.

    Raises:
        TypeError: If data has another dtype.
        ValueError: If data is empty or exhausted, or makes a value NaN or infinite, or the taps of
            two networks differ by more than their widths.
    """
    for net in nets:
        check_batch(net)
    inside = within(nets)
    sites = tuple(_sites(net, inside) for net in nets)
    for k, of in enumerate(sites):
        if [site.name for site in of] != [site.name for site in sites[0]]:
            raise ValueError(
                f"net[{k}] shows its groups at other places than net[0]: {[s.name for s in of]} "
                f"and {[s.name for s in sites[0]]}; networks may differ in widths only"
            )
    names = tuple(site.name for site in sites[0])
    pooled, counts = stream(
        functools.partial(_measure, tuple(nets), sites),
        functools.partial(_pool, names),
        tuple(trees),
        data,
        like=nets[0].x,
        mask=mask,
    )
    check_valid(dict(zip(names, counts, strict=True)))
    pooled = jax.tree.map(np.asarray, pooled)
    for means in pooled["mean"]:
        check_finite_means(means)
    pooled["var"] = jax.tree.map(without_rounding, pooled["mean"], pooled["var"])

    def pair(k: int, name: str, covariance: Any) -> Pair:
        mean, var = ([of[name] for of in pooled[what]] for what in ("mean", "var"))
        return _pair(mean, var, (k, 0), covariance)

    return [
        {name: pair(k, name, covariance) for name, covariance in of.items()}
        for k, of in enumerate(pooled["covariance"], start=1)
    ]


def _sites(net: Network, inside: Mapping[str, str]) -> tuple[Layout, ...]:
    return tuple(layout_of(net, name) for of in matched_sites(net, inside) for name in of)


@compiled(static=3)
def _measure(
    nets: tuple[Network, ...],
    sites: tuple[tuple[Layout, ...], ...],
    mesh: Any,
    trees: tuple[PyTree, ...],
    x: PyTree,
    valid: Array | None,
) -> tuple[Measured, list[Array]]:
    return on_mesh(functools.partial(_batch, nets, sites), mesh)(trees, x, valid)


def _batch(
    nets: tuple[Network, ...],
    sites: tuple[tuple[Layout, ...], ...],
    trees: tuple[PyTree, ...],
    x: PyTree,
    valid: Array | None,
) -> tuple[Measured, list[Array]]:
    names = [site.name for site in sites[0]]
    counts: list[dict[str, int]] = [{} for _ in nets]
    reads = [
        read(net, of, names, count, x, tree, {} if valid is None else valid_at(net, of, valid))
        for net, of, count, tree in zip(nets, sites, counts, trees, strict=True)
    ]
    for k, count in enumerate(counts):
        if count != counts[0]:
            raise ValueError(
                f"the taps of net[{k}] have other numbers of samples than those of net[0], {count} "
                f"and {counts[0]}; networks may differ in widths only, and if these are numbers of "
                'heads, be compared on="weights" only'
            )
    mean, var, rest, rows, some = zip(*reads, strict=True)
    covariance = [
        {
            name: covariance_of(
                (rows[k][name], rest[k][name]), (rows[0][name], rest[0][name]), some[0].get(name)
            )
            for name in names
        }
        for k in range(1, len(nets))
    ]
    batch = {"mean": list(mean), "var": list(var), "covariance": covariance}
    return batch, [jnp.asarray(some[0].get(n, counts[0][n]), jnp.int32) for n in names]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _pool(names: tuple[str, ...], pooled: Measured, batch: Measured, share: Any) -> Measured:
    """The moments of the union of two sets of samples; `share` is the second set's fraction."""
    shares = share if isinstance(share, list) else [share] * len(names)
    out: Measured = {what: [{} for _ in of] for what, of in pooled.items()}
    for name, part in zip(names, shares, strict=True):
        steps = []
        for k in range(len(pooled["mean"])):
            old, new = ((one["mean"][k][name], one["var"][k][name]) for one in (pooled, batch))
            out["mean"][k][name], out["var"][k][name], step = merge_moments(old, new, part)
            steps.append(step)
        for k, of in enumerate(pooled["covariance"]):
            between = jnp.outer(steps[k + 1], steps[0])
            other = batch["covariance"][k][name]
            out["covariance"][k][name] = union_second(of[name], other, between, part)
    return out
