"""The compiled part of `features`: measuring several networks on one batch at once.

Everything is a mean or a deviation over samples, so that batches, and pieces of a batch, can be
pooled like moments. All numbers are in the unit of the values rather than its square, so that any
values that float32 holds can be measured: they are scaled near one before they are squared. At a
site, a network has one row of numbers, or one per model inside stems or heads of a `Merged`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import batch_size, each, each_piece, mesh_of, on_mesh, replicate, stream
from vfjax._passes.moments import ROUNDINGS, alive, length, scale_of, union_deviation, union_means
from vfjax._types import Array, PyTree
from vfjax.merge._merged import Merged
from vfjax.network._layout import Layout, arrange, by_example
from vfjax.network._network import Network
from vfjax.stats._pieces import pieces

# The numbers that are per channel.
CHANNELS = ("mean", "std")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Measurements of one network: by site, one array per row. Rows may differ in shape.

    Attributes:
        mean: `[*channels]`, mean over examples and positions.
        std: `[*channels]`, standard deviation over examples and positions.
        norm: `[]`, the mean over examples of `||f(x) - f(0)||`.
        norm_std: `[]`, its standard deviation over examples.
        centre: `[...]`, the mean over examples of `f(x) - f(0)`, shaped like `f(0)`.
        spread: `[]`, the root of `E ||f(x) - E f(x)||^2`.
    """

    mean: dict[str, tuple[Array, ...]]
    std: dict[str, tuple[Array, ...]]
    norm: dict[str, tuple[Array, ...]]
    norm_std: dict[str, tuple[Array, ...]]
    centre: dict[str, tuple[Array, ...]]
    spread: dict[str, tuple[Array, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """A network, with the matrices that carry its values into the basis of a merge.

    Attributes:
        model: The network.
        apart: For each of its models, by group, the matrix `[m, n]` for features of its stem and
            head; empty where these are already in that basis.
        whole: By group, the matrix `[m, n]`, or permutation int `[n]`, for features of the trunk.
    """

    model: Merged
    apart: tuple[dict[str, Array], ...] = ()
    whole: dict[str, Array] = dataclasses.field(default_factory=dict)


class Job(NamedTuple):
    """What a pass measures; hashable, since it is the key of a compilation."""

    net: Network
    sites: tuple[Layout, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sites to capture."""
        return tuple(site.source for site in self.sites)


# By network and site, one array per row.
Offsets = tuple[dict[str, tuple[Array, ...]], ...]


def zero_example(net: Network) -> PyTree:
    """The input 0: zeros of the traced input's dtypes, one example."""
    return jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), net.x)


def offsets(job: Job, networks: tuple[Carried, ...]) -> Offsets:
    """`f(0)` of every network at every site: one forward pass of one example."""
    mesh, x = mesh_of(networks), zero_example(job.net)
    if mesh is not None:
        x = replicate(x, mesh)
    return _offsets(job, mesh, networks, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _offsets(job: Job, mesh: Any, networks: tuple[Carried, ...], x: PyTree) -> Offsets:
    def evaluated(networks: tuple[Carried, ...], x: PyTree) -> Offsets:
        return each(functools.partial(_values, job), networks, x)

    return on_mesh(evaluated, mesh)(networks, x)


def measure(
    job: Job, networks: tuple[Carried, ...], shifts: Offsets, data: Iterable[Any]
) -> tuple[Rows, ...]:
    """One pass over data: the rows of every network, pooled over all batches."""
    state = (networks, shifts)
    pooled, _ = stream(
        functools.partial(_measure, job), _merge, state, data, like=job.net.x, host=True
    )
    return pooled


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    job: Job, mesh: Any, state: tuple[tuple[Carried, ...], Offsets], x: PyTree
) -> tuple[tuple[Rows, ...], list[Array]]:
    if mesh is not None:
        rows = on_mesh(functools.partial(_batch, job), mesh)(state, x)
        return jax.tree.map(lambda a: a[None], rows), []
    return each_piece(functools.partial(_batch, job, state), pieces(_runs(state[0]), x), x), []


def _merge(pooled: tuple[Rows, ...], batch: tuple[Rows, ...], share: Any) -> tuple[Rows, ...]:
    return tuple(_union(old, new, share) for old, new in zip(pooled, batch, strict=True))


def _union(old: Rows, new: Rows, share: Any) -> Rows:
    """The rows of the union of two sets of samples."""
    means, steps = union_means(
        (old.mean, old.norm, old.centre), (new.mean, new.norm, new.centre), share
    )
    sizes = (*steps[:2], jax.tree.map(length, steps[2]))
    std, norm_std, spread = jax.tree.map(
        lambda a, b, step: union_deviation(a, b, step, share),
        (old.std, old.norm_std, old.spread),
        (new.std, new.norm_std, new.spread),
        sizes,
    )
    return Rows(*(means[0], std, means[1], norm_std, means[2], spread))


def _batch(job: Job, state: tuple[tuple[Carried, ...], Offsets], x: PyTree) -> tuple[Rows, ...]:
    size = batch_size(x)

    def one(network: tuple[Carried, dict[str, tuple[Array, ...]]], x: PyTree) -> Rows:
        model, shift = network
        values = _values(job, model, x)
        by_site: dict[str, list[dict[str, Array]]] = {
            site.name: [
                _reduce(site, value, at_zero, size)
                for value, at_zero in zip(values[site.source], shift[site.source], strict=True)
            ]
            for site in job.sites
        }
        names = [field.name for field in dataclasses.fields(Rows)]
        return Rows(
            **{
                what: {site: tuple(row[what] for row in rows) for site, rows in by_site.items()}
                for what in names
            }
        )

    return each(one, tuple(zip(*state, strict=True)), x)


def _runs(networks: tuple[Carried, ...]) -> dict[Network, PyTree]:
    """The traced networks that run, each with one of its trees, or {} where there is none."""
    trees: dict[Network, PyTree] = {}
    for model in (network.model for network in networks):
        trees.setdefault(model.net, model.trunk)
        trees |= {own: {} for own in model.nets if own not in trees}
    return trees


def _values(job: Job, network: Carried, x: PyTree) -> dict[str, tuple[Array, ...]]:
    """Values at every site, one per row, in float32 or better."""
    model = network.model
    _, values = model.read(x, job.sources)
    trees = {True: model.stems, False: model.heads}
    for source in job.sources:
        if network.apart and model.apart(source):
            parts = trees[model.in_stems(source)]
            values[source] = tuple(
                model.net_of(k).map_site(parts[k], x, source, value, network.apart[k])
                for k, value in enumerate(values[source])
            )
        elif network.whole:
            (value,) = values[source]
            values[source] = (model.net.map_site(model.trunk, x, source, value, network.whole),)
    return {
        site.source: tuple(arrange(value, site)[0] for value in values[site.source])
        for site in job.sites
    }


def _reduce(site: Layout, value: Array, at_zero: Array, size: int) -> dict[str, Array]:
    """One row: the moments of a value per channel, and of its distance to the value at zero.

    Variances are about the mean of every unit, which takes a second read of the value, and are
    exact for that, however small they are beside the distance.
    """
    _, samples = arrange(value, site)
    parts, axis = by_example(site.name, value, at_zero.shape, size)
    single = at_zero.reshape(*parts.shape[:axis], 1, *parts.shape[axis + 1 :])
    example = parts.mean(axis, keepdims=True)
    units = example.reshape(at_zero.shape)
    mean = units.mean(samples, keepdims=True)
    centre, apart = units - at_zero, units - mean
    scale = scale_of(centre, apart)

    within = jnp.square((parts - example) * scale).mean(axis).reshape(at_zero.shape)
    others = tuple(a for a in range(parts.ndim) if a != axis)
    norm = jnp.sqrt(jnp.square((parts - single) * scale).sum(others))
    return {
        "mean": jnp.squeeze(mean, samples),
        "std": jnp.sqrt((within + jnp.square(apart * scale)).mean(samples)) / scale,
        "norm": norm.mean() / scale,
        "norm_std": norm.std() / scale,
        "centre": centre,
        "spread": jnp.sqrt(within.sum()) / scale,
    }


def numbers(site: str, rows: Rows, at_zero: Sequence[Any], weights: Any) -> dict[str, np.ndarray]:
    """Combines a network's rows at a site, on the host.

    Args:
        site: The site.
        rows: The network's rows.
        at_zero: Its values at the input 0, one per row.
        weights: Weights of the models of a `Merged`, by which rows are averaged.

    Returns:
        The fields of `Features` for one network; `mean` and `std` only where all rows have the same
        channels.
    """
    each_row = [_of_row(rows, site, at, zero) for at, zero in enumerate(at_zero)]
    shapes = {one["mean"].shape for one in each_row}
    share = np.asarray(weights) if len(each_row) > 1 else np.ones(1)
    dtype = rows.norm[site][0].dtype
    with np.errstate(over="ignore"):  # overflow is reported later, with the name of the site
        return {
            what: np.tensordot(share, np.stack([one[what] for one in each_row]), 1).astype(dtype)
            for what in each_row[0]
            if what not in CHANNELS or len(shapes) == 1
        }


def _of_row(rows: Rows, site: str, at: int, at_zero: Any) -> dict[str, np.ndarray]:
    """The numbers of one row."""
    mean = rows.mean[site][at]
    row = {
        field.name: np.asarray(getattr(rows, field.name)[site][at], np.float64)
        for field in dataclasses.fields(rows)
    }
    zero = np.asarray(at_zero, np.float64)
    # Deviations no larger than the rounding of the values themselves count as 0.
    rounding = ROUNDINGS * np.finfo(rows.norm[site][at].dtype).eps
    std = np.where(row["std"] <= rounding * np.abs(row["mean"]), 0, row["std"])
    example = np.linalg.norm(zero + row["centre"])
    spread = np.where(row["spread"] <= rounding * example, 0, row["spread"])
    # Values are nearest to their mean, so their distance to f(0) bounds the spread: where they
    # equal f(0), the spread is 0 to the last bit.
    spread = np.minimum(spread, np.hypot(row["norm"], row["norm_std"]))
    return {
        "feature": row["norm"],
        "feature_std": row["norm_std"],
        "offset": np.asarray(np.linalg.norm(zero)),
        "mean": row["mean"],
        "std": std,
        "variance": np.square(spread) / max(zero.size, 1),
        "dead": np.asarray(1 - alive(mean, std**2).mean()),
    }
