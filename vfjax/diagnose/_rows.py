"""The compiled part of `features`: measuring several networks on one batch at once.

Everything is a mean or a deviation over samples, so that batches, and pieces of a batch, can be
pooled like moments. On the device values are scaled near one before they are squared, so that any
that float32 holds can be measured; the host works in float64. At a
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

from vfjax._passes import (
    Mask,
    batch_size,
    compiled,
    each,
    each_piece,
    mesh_of,
    on_mesh,
    replicate,
    stream,
    wide,
)
from vfjax._passes.moments import ROUNDINGS, alive, scale_of, union_deviation, union_means
from vfjax._trees.concrete import check_host, check_one_device
from vfjax._types import Array, PyTree
from vfjax.merge._merged import Merged
from vfjax.network._layout import Layout, arrange, by_example, sample_axes
from vfjax.network._network import Network
from vfjax.network._valid import valid_at
from vfjax.stats._pieces import pieces

# The numbers that are per channel.
CHANNELS = ("mean", "std")


class Row(NamedTuple):
    """What is pooled of one row, in NumPy, in float64 or better.

    Attributes:
        mean: `[...]`, the mean over examples, shaped like `f(0)`.
        std: `[...]`, the standard deviation over examples.
        norm: The mean over examples of `||f(x) - f(0)||`.
        norm_std: Its standard deviation over examples.
        examples: The number of examples.
        counts: That in which a unit counts, shaped like `mean`; without a mask `examples`.
        offset: With a mask, the mean over examples of `||f(0)||`, which then depends on what counts
            in an example; else None.
    """

    mean: np.ndarray
    std: np.ndarray
    norm: Any
    norm_std: Any
    examples: Any
    counts: Any
    offset: Any = None

    @property
    def size(self) -> float:
        """The number of units that count in an example, on average."""
        return float(np.broadcast_to(self.counts, self.mean.shape).sum() / self.examples)


# Of every network, the rows at each site.
Rows = tuple[dict[str, list[Row]], ...]


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
    # With a mask, which arrays of x it reads.
    kept: tuple[bool, ...] | None = None

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
    check_host("passes over data measure", models=networks)
    if mesh is None:
        check_one_device(models=networks)
    if mesh is not None:
        x = replicate(x, mesh)
    return _offsets(job, mesh, networks, x)


@compiled(static=2)
def _offsets(job: Job, mesh: Any, networks: tuple[Carried, ...], x: PyTree) -> Offsets:
    def evaluated(networks: tuple[Carried, ...], x: PyTree) -> Offsets:
        return each(functools.partial(_values, job), networks, x)

    return on_mesh(evaluated, mesh)(networks, x)


def shapes(job: Job, networks: tuple[Carried, ...]) -> Any:
    """What `offsets` returns, as shapes and dtypes."""
    read = functools.partial(_values, job)
    zero = zero_example(job.net)
    return tuple(jax.eval_shape(read, network, zero) for network in networks)


def measure(
    job: Job,
    networks: tuple[Carried, ...],
    shifts: Offsets,
    data: Iterable[Any],
    mask: Mask | None = None,
) -> Rows:
    """One pass over data: the rows of every network, pooled over all batches.

    With a mask, which `job.kept` must tell of, the input 0 of an example is the example with zeros
    in all arrays that the mask does not read; `shifts` are not used.
    """
    pooled, _ = stream(
        functools.partial(_measure, job),
        _merge,
        (networks, shifts if mask is None else None),
        data,
        like=job.net.x,
        mask=mask,
        host=_summed,
    )
    return pooled


@compiled(static=2)
def _measure(
    job: Job, mesh: Any, state: tuple[tuple[Carried, ...], Any], x: PyTree, valid: Array | None
) -> tuple[tuple[Any, ...], list[Array]]:
    if valid is not None:
        rows = on_mesh(functools.partial(_masked_batch, job), mesh)(state[0], x, valid)
        return jax.tree.map(lambda a: a[None], rows), []
    if mesh is not None:
        rows = on_mesh(functools.partial(_batch, job), mesh)(state, x)
        return jax.tree.map(lambda a: a[None], rows), []
    return each_piece(functools.partial(_batch, job, state), pieces(_runs(state[0]), x), x), []


def _batch(job: Job, state: tuple[tuple[Carried, ...], Offsets], x: PyTree) -> tuple[Any, ...]:
    size = batch_size(x)

    def one(network: tuple[Carried, dict[str, tuple[Array, ...]]], x: PyTree) -> Any:
        model, shift = network
        values = _values(job, model, x)
        return {
            site.name: [
                _reduce(site, value, at_zero, size)
                for value, at_zero in zip(values[site.source], shift[site.source], strict=True)
            ]
            for site in job.sites
        }

    return each(one, tuple(zip(*state, strict=True)), x)


def _masked_batch(
    job: Job, networks: tuple[Carried, ...], x: PyTree, valid: Array
) -> tuple[Any, ...]:
    """As `_batch`, of what counts."""
    size, known = batch_size(x), valid_at(job.net, job.sites, valid)
    leaves, tree = jax.tree.flatten(x)
    assert job.kept is not None
    zeroed = [a if kept else jnp.zeros_like(a) for a, kept in zip(leaves, job.kept, strict=True)]
    nothing = jax.tree.unflatten(tree, zeroed)

    def one(network: Carried, x: PyTree) -> Any:
        values, zeros = _values(job, network, x), _values(job, network, nothing)
        (single,) = shapes(job, (network,))
        return {
            site.name: [
                _reduce_valid(site, known[site.name], *each, size)
                for each in zip(
                    values[site.source], zeros[site.source], single[site.source], strict=True
                )
            ]
            for site in job.sites
        }

    return each(one, networks, x)


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
    """What needs the values of all examples; the rest is done on the host, once for all batches.

    Returns:
        `mean`: by unit, shaped like `at_zero`; `square`: by unit, the mean square of the distance
        to that mean; `norm`: by example, the square of the distance to `at_zero`; and `scale`, by
        whose square the latter two are to be divided.
    """
    parts, axis = by_example(site.name, value, at_zero.shape, size)
    single = at_zero.reshape(*parts.shape[:axis], 1, *parts.shape[axis + 1 :])
    mean = parts.mean(axis, keepdims=True)
    units = mean.reshape(at_zero.shape)
    scale = scale_of(units - at_zero)
    others = tuple(a for a in range(parts.ndim) if a != axis)
    return {
        "mean": units,
        "square": jnp.square((parts - mean) * scale).mean(axis).reshape(at_zero.shape),
        "norm": jnp.square((parts - single) * scale).sum(others),
        "scale": scale,
    }


def _reduce_valid(
    site: Layout, valid: Array, value: Array, zeros: Array, single: Any, size: int
) -> dict[str, Array]:
    """As `_reduce`, of the entries that count; `zeros` are the values at the input 0.

    Returns:
        Also `counts`: by unit, the number of examples in which it counts; `some`: by example,
        whether any unit does; `zero`: by example, the square of the size of its value at the input
        0, to be divided by the square of `zero_scale`.
    """
    whole = jnp.broadcast_to(valid, value.shape)
    (parts, axis), (at_zero, _), (counts, _) = (
        by_example(site.name, a, single.shape, size) for a in (value, zeros, whole)
    )
    number = counts.sum(axis, keepdims=True)
    some = jnp.maximum(number, 1).astype(parts.dtype)

    def mean_of(values: Array) -> Array:
        return jnp.where(counts, values, 0).sum(axis, keepdims=True) / some

    def length(values: Array) -> Array:
        others = tuple(a for a in range(parts.ndim) if a != axis)
        return jnp.square(jnp.where(counts, values, 0)).sum(others)

    mean = mean_of(parts)
    scale, zero_scale = scale_of(mean_of(parts - at_zero)), scale_of(mean_of(at_zero))
    return {
        "mean": mean.reshape(single.shape),
        "square": mean_of(jnp.square((parts - mean) * scale)).reshape(single.shape),
        "norm": length((parts - at_zero) * scale),
        "scale": scale,
        "counts": number.reshape(single.shape),
        "some": counts.any(tuple(a for a in range(parts.ndim) if a != axis)),
        "zero": length(at_zero * zero_scale),
        "zero_scale": zero_scale,
    }


def _summed(measured: tuple[Any, ...]) -> Rows:
    """Of a piece of a batch, what can be pooled: in the unit of the values."""

    def row(of: dict[str, np.ndarray]) -> Row:
        some = of.get("some", np.ones(len(of["norm"]), bool)).astype(bool)
        of = wide(of)
        norms = (np.sqrt(of["norm"]) / of["scale"])[some]
        std = np.sqrt(of["square"]) / of["scale"]
        offset = None
        if "zero" in of:
            offset = (np.sqrt(of["zero"]) / of["zero_scale"])[some].mean()
        counts = of.get("counts", len(norms))
        return Row(of["mean"], std, norms.mean(), norms.std(), len(norms), counts, offset)

    return tuple({site: list(map(row, rows)) for site, rows in of.items()} for of in measured)


def _merge(pooled: Rows, piece: Rows, _: Any) -> Rows:
    """The rows of the union of two sets of samples."""

    def union(old: Row, new: Row) -> Row:
        examples, counts = old.examples + new.examples, old.counts + new.counts
        share = new.examples / max(examples, 1)
        of_units = share if np.ndim(counts) == 0 else new.counts / np.maximum(counts, 1)
        mean, step = union_means(old.mean, new.mean, of_units)
        std = union_deviation(old.std, new.std, step, of_units)
        norm, step = union_means(old.norm, new.norm, share)
        norm_std = union_deviation(old.norm_std, new.norm_std, step, share)
        offset = None if old.offset is None else union_means(old.offset, new.offset, share)[0]
        return Row(mean, std, norm, norm_std, examples, counts, offset)

    return jax.tree.map(union, pooled, piece, is_leaf=lambda node: isinstance(node, Row))


def numbers(
    site: Layout, rows: Sequence[Row], at_zero: Sequence[Any], weights: Any
) -> dict[str, np.ndarray]:
    """Combines a network's rows at a site, on the host.

    Args:
        site: The site.
        rows: The network's rows there.
        at_zero: Its values at the input 0, one per row; with a mask their shapes and dtypes.
        weights: Weights of the models of a `Merged`, by which rows are averaged.

    Returns:
        The fields of `Features` for one network; `mean` and `std` only where all rows have the same
        channels.
    """
    each_row = [_of_row(site, *row) for row in zip(rows, at_zero, strict=True)]
    shapes = {one["mean"].shape for one in each_row}
    share = np.asarray(weights) if len(each_row) > 1 else np.ones(1)
    dtype = at_zero[0].dtype
    with np.errstate(over="ignore"):  # overflow is reported later, with the name of the site
        return {
            what: np.tensordot(share, np.stack([one[what] for one in each_row]), 1).astype(dtype)
            for what in each_row[0]
            if what not in CHANNELS or len(shapes) == 1
        }


def _of_row(site: Layout, row: Row, at_zero: np.ndarray) -> dict[str, Any]:
    """The numbers of one row."""
    samples = sample_axes(site, row.mean.ndim)
    present = 1 if row.offset is None else row.counts / row.examples  # share of the examples
    seen = np.broadcast_to(present, row.mean.shape).sum(samples, keepdims=True)
    seen = np.maximum(seen, np.finfo(np.float64).tiny)
    mean = (row.mean * present).sum(samples, keepdims=True) / seen
    apart = row.mean - mean
    squares = (np.square(row.std) + np.square(apart)) * present
    std = np.sqrt(squares.sum(samples) / np.squeeze(seen, samples))
    spread = _length(row.std * np.sqrt(present))
    mean = np.squeeze(mean, samples)
    # Deviations no larger than the rounding of the values themselves count as 0.
    rounding = ROUNDINGS * np.finfo(at_zero.dtype).eps
    std = np.where(std <= rounding * np.abs(mean), 0, std)
    small = rounding * _length(row.mean * np.sqrt(present))
    spread = np.where(spread <= small, 0, spread)
    if row.offset is None:
        # Values are nearest to their mean, so their distance to f(0) bounds the spread: where they
        # equal f(0), the spread is 0 to the last bit.
        spread = np.minimum(spread, np.hypot(row.norm, row.norm_std))
        offset = _length(np.asarray(at_zero, row.mean.dtype))
    else:
        offset = row.offset
    counted = np.squeeze(seen, samples) > np.finfo(np.float64).tiny
    varies = alive(mean.astype(at_zero.dtype), std**2) & counted
    return {
        "feature": row.norm,
        "feature_std": row.norm_std,
        "offset": offset,
        "mean": mean,
        "std": std,
        "variance": np.square(spread) / max(row.size, 1),
        "dead": 1 - varies.sum() / max(counted.sum(), 1),
    }


def _length(values: np.ndarray) -> Any:
    """The L2 norm; `np.linalg.norm` hands long vectors to threads, which takes longer."""
    return np.sqrt(np.square(values).sum())
