"""The compiled part of `vfjax.stats`: moments of a batch, and merging batches.

One compiled call reduces a batch on the device for all models. A second, tiny one merges the small
result into the pooled moments, which it donates. `vfjax._passes.streaming` runs the pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import by_pieces, compiled, each, each_piece, on_mesh
from vfjax._passes.moments import (
    covariance_of,
    merge_moments,
    shifted_moments,
    union_second,
    without_rounding,
)
from vfjax._types import Array, PyTree
from vfjax.network._layout import Layout, arrange, by_channel
from vfjax.network._network import Network
from vfjax.network._valid import valid_at
from vfjax.stats._pieces import pieces


class Job(NamedTuple):
    """What a pass measures; hashable, so that it can be a static argument of `jit`."""

    sites: tuple[Layout, ...]
    covariance: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tree"], meta_fields=["net"])
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A tree and the network that runs it, as one pytree."""

    net: Network
    tree: PyTree


@compiled(static=2)
def measure(
    job: Job, mesh: Any, models: tuple[Model, ...], x: PyTree, valid: Array | None
) -> tuple[dict[str, Any], list[Array]]:
    """Moments of one batch, and the number of samples at each site.

    Without covariances they are those of the pieces of the batch, stacked; with `valid`, which says
    what counts, there is one.
    """
    batch = functools.partial(_batch, job)
    if mesh is not None or valid is not None:
        moments, counts = on_mesh(batch, mesh)(models, x, valid)
        return moments if job.covariance else jax.tree.map(lambda a: a[None], moments), counts
    batch = functools.partial(batch, models)
    parts = pieces({model.net: model.tree for model in models}, x)
    if job.covariance:
        return by_pieces(batch, functools.partial(merge, job), parts, x)
    moments, counts = each_piece(batch, parts, x)
    return moments, [n.sum(dtype=n.dtype) for n in counts]


def _batch(
    job: Job, models: tuple[Model, ...], x: PyTree, valid: Array | None = None
) -> tuple[dict[str, Any], list[Array]]:
    counts: dict[str, int] = {}
    known = {} if valid is None else valid_at(models[0].net, job.sites, valid)

    def one(model: Model, x: PyTree) -> tuple[dict[str, Array], ...]:
        own: dict[str, int] = {}
        results = read(model.net, job.sites, job.covariance, own, x, model.tree, known)
        if own != (counts or own):
            raise ValueError(
                "net has networks with other numbers of samples at the sites of one and of "
                f"another, {own} and {counts}; networks may differ only after the sites"
            )
        counts.update(own)
        return results

    parts = each(one, models, x)
    mean, var, rest = (
        {site.name: jnp.stack([part[k][site.name] for part in parts]) for site in job.sites}
        for k in (0, 1, 2)
    )
    rows = {name: [part[3][name] for part in parts] for name in job.covariance}

    some = parts[0][4]

    def product(name: str, i: int, j: int) -> Array:
        first, second = ((rows[name][k], rest[name][k]) for k in (i, j))
        return covariance_of(first, second, some.get(name))

    products = {
        name: jnp.stack([product(name, i, j) for i, j in job.pairs])
        for name in job.covariance
        if job.pairs
    }
    for name, blocks in products.items():
        own = [k for k, (i, j) in enumerate(job.pairs) if i == j]
        if own:
            # The diagonals of the products are these variances; XLA need not reduce the values
            # again.
            squares = jnp.stack([jnp.diagonal(blocks[k]) for k in own])
            var[name] = jnp.maximum(squares, 0).reshape(var[name].shape)
    batch = {"mean": mean, "var": var, "covariance": products}
    return batch, [jnp.asarray(some.get(name, counts[name]), jnp.int32) for name in mean]


def read(
    net: Network,
    sites: tuple[Layout, ...],
    covariance: Collection[str],
    counts: dict[str, int],
    x: PyTree,
    tree: PyTree,
    valid: Mapping[str, Array],
) -> tuple[dict[str, Array], ...]:
    """Moments of one model's values on a batch, by site.

    Args:
        net: The traced network.
        sites: The sites to read.
        covariance: Names of the sites whose values to return too.
        counts: Filled with the number of samples by name. It is not returned, since `vmap` would
            turn the Python numbers into arrays.
        x: The batch.
        tree: The model.
        valid: Which values count, by site, as `valid_at` gives it; empty if all do.

    Returns:
        Means, variances, means of the shifted values, the shifted values `[samples, channels]`; and
        with `valid` the numbers of samples.

    Raises:
        ValueError: If what counts varies along the channels of a covariance.
    """
    _, values = net.run(tree, x, capture=tuple(dict.fromkeys(site.source for site in sites)))
    mean, var, rest, rows, some = {}, {}, {}, {}, {}
    for site in sites:
        value, sample = arrange(values[site.source], site)
        name = site.name
        value, mean[name], var[name], rest[name], count = shifted_moments(
            value, sample, valid.get(name)
        )
        counts[name] = math.prod(value.shape[a] for a in sample)
        if valid:
            some[name] = count if count.size > 1 else count.reshape(())
        if name in covariance:
            if np.size(count) > 1:
                raise ValueError(
                    f"mask varies along the channels of '{name}', where a covariance would be of "
                    "different samples for every pair; leave it out of `sites`"
                )
            rows[name] = by_channel(value, sample)
    return mean, var, rest, rows, some


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def pool(job: Job, pooled: dict[str, Any], batch: dict[str, Any], share: Any) -> dict[str, Any]:
    """Moments of the union of two sets of samples; donates the first. `share` is the second's."""
    return merge(job, pooled, batch, share)


def merge(job: Job, pooled: dict[str, Any], batch: dict[str, Any], share: Any) -> dict[str, Any]:
    """As `pool`, not compiled; without covariances also of NumPy arrays."""
    names = [site.name for site in job.sites]
    shares = dict(
        zip(names, share if isinstance(share, list) else [share] * len(names), strict=True)
    )
    out: dict[str, Any] = {"mean": {}, "var": {}, "covariance": {}}
    for name in names:
        old, new = ((one["mean"][name], one["var"][name]) for one in (pooled, batch))
        part = shares[name] if np.ndim(shares[name]) == 0 else shares[name][None]
        out["mean"][name], out["var"][name], step = merge_moments(old, new, part)
        if name in pooled["covariance"]:
            rows = step.reshape(len(step), -1)
            between = jnp.stack([jnp.outer(rows[i], rows[j]) for i, j in job.pairs])
            old, new = (one["covariance"][name] for one in (pooled, batch))
            out["covariance"][name] = union_second(old, new, between, shares[name])
    return out


def finish(job: Job, pooled: dict[str, Any]) -> tuple[dict[str, Array], ...]:
    """Mean, variance and covariance `[K, K, n, n]` by site; variances within rounding become 0.

    Computed on the host: the arrays are small, and nothing needs to be compiled.
    """
    pooled = jax.tree.map(np.asarray, pooled)
    mean, var, blocks = pooled["mean"], {}, {}
    for site, value in pooled["var"].items():
        var[site] = without_rounding(mean[site], value)
    for site, value in pooled["covariance"].items():
        models = len(mean[site])
        blocks[site] = np.full((models, models, *value.shape[1:]), np.nan, value.dtype)
        for (i, j), block in zip(job.pairs, value, strict=True):
            blocks[site][i, j], blocks[site][j, i] = block, block.T
    # `jnp.asarray` would compile a program for each shape.
    return jax.device_put((mean, var, blocks))
