"""The compiled part of `features`: what one batch tells of several networks at once.

Everything is a mean or a variance over samples, so that batches, and pieces of a batch, merge as
moments do. At a site, a network has one row of numbers, or one per model where the site lies inside
the stems of a `Merged`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._batches import batch_size
from vfjax._merged import Merged
from vfjax._pooled import ROUNDINGS, alive
from vfjax._streaming import (
    Site,
    arrange,
    by_pieces,
    merge_moments,
    mesh_of,
    on_mesh,
    pieces,
    replicate,
    stream,
    vmapped,
    without_rounding,
)
from vfjax.network import Network

Array = jax.Array
PyTree = Any

# Above this share of the mean square of f(x) - f(0), a variance may be found by subtracting from
# it; below, the difference would lose more than two of seven digits, and values are centred.
_LEAST = 0.02


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What was measured of one network, by site; P rows each.

    Attributes:
        mean: `[P, *channels]`, over examples and positions.
        var: `[P, *channels]`, likewise.
        norm: `[P]`, the mean over examples of `||f(x) - f(0)||`.
        norm_var: `[P]`, its variance over examples.
        centre: `[P, ...]`, the mean over examples of `f(x) - f(0)`, shaped like `f(0)`.
    """

    mean: dict[str, Array]
    var: dict[str, Array]
    norm: dict[str, Array]
    norm_var: dict[str, Array]
    centre: dict[str, Array]


class Job(NamedTuple):
    """What a pass measures: hashable, so that it is the key of a compilation."""

    net: Network
    sites: tuple[Site, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sites to capture."""
        return tuple(site.source for site in self.sites)


# By network and site, one array per row.
Offsets = tuple[dict[str, tuple[Array, ...]], ...]


def zero_example(net: Network) -> PyTree:
    """The input 0: zeros of the traced input's dtypes, one example."""
    return jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), net.x)


def offsets(job: Job, networks: tuple[Any, ...]) -> Offsets:
    """`f(0)` of every network at every site: one forward pass of one example."""
    mesh, x = mesh_of(networks), zero_example(job.net)
    if mesh is not None:
        x = replicate(x, mesh)
    return _offsets(job, mesh, networks, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _offsets(job: Job, mesh: Any, networks: tuple[Any, ...], x: PyTree) -> Offsets:
    def found(networks: tuple[Any, ...], x: PyTree) -> Offsets:
        return _each(functools.partial(_values, job), networks, x)

    return on_mesh(found, mesh)(networks, x)


def measure(
    job: Job, networks: tuple[Any, ...], shifts: Offsets, data: Iterable[Any]
) -> tuple[Rows, ...]:
    """One pass over data: the rows of every network, pooled over all batches."""
    pooled, _ = stream(
        functools.partial(_measure, job), _pool, (networks, shifts), data, like=job.net.x
    )
    return jax.tree.map(np.asarray, pooled)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    job: Job, mesh: Any, state: tuple[tuple[Any, ...], Offsets], x: PyTree
) -> tuple[tuple[Rows, ...], list[Array]]:
    if mesh is not None:
        return on_mesh(functools.partial(_batch, job), mesh)(state, x), []
    first = state[0][0]
    parts = pieces(job.net, first.trunk if isinstance(first, Merged) else first, x)
    return by_pieces(lambda x: (_batch(job, state, x), []), _merge, parts, x)


@functools.partial(jax.jit, donate_argnums=0)
def _pool(pooled: tuple[Rows, ...], batch: tuple[Rows, ...], share: Any) -> tuple[Rows, ...]:
    return _merge(pooled, batch, share)


def _merge(pooled: tuple[Rows, ...], batch: tuple[Rows, ...], share: Any) -> tuple[Rows, ...]:
    def moments(rows: tuple[Rows, ...]) -> tuple[PyTree, PyTree]:
        return [(r.mean, r.norm) for r in rows], [(r.var, r.norm_var) for r in rows]

    means, variances, _ = merge_moments(moments(pooled), moments(batch), share)
    centres = jax.tree.map(
        lambda old, new: old + (new - old) * jnp.asarray(share, old.dtype),
        [r.centre for r in pooled],
        [r.centre for r in batch],
    )
    return tuple(
        Rows(mean=mean, var=var, norm=norm, norm_var=norm_var, centre=centre)
        for (mean, norm), (var, norm_var), centre in zip(means, variances, centres, strict=True)
    )


def _batch(job: Job, state: tuple[tuple[Any, ...], Offsets], x: PyTree) -> tuple[Rows, ...]:
    size = batch_size(x)

    def one(network: tuple[Any, dict[str, tuple[Array, ...]]], x: PyTree) -> Rows:
        model, shift = network
        values = _values(job, model, x)
        found: dict[str, list[dict[str, Array]]] = {
            site.name: [
                _reduce(site, value, at_zero, size)
                for value, at_zero in zip(values[site.source], shift[site.source], strict=True)
            ]
            for site in job.sites
        }
        names = [field.name for field in dataclasses.fields(Rows)]
        return Rows(
            **{
                what: {site: jnp.stack([row[what] for row in rows]) for site, rows in found.items()}
                for what in names
            }
        )

    return _each(one, tuple(zip(*state, strict=True)), x)


def _each(
    fn: Callable[[Any, PyTree], Any], networks: tuple[Any, ...], x: PyTree
) -> tuple[Any, ...]:
    """`fn(network, x)` of every network; vmapped over those of one structure where that is fast."""
    if not vmapped():
        return tuple(fn(network, x) for network in networks)
    alike: dict[Any, list[int]] = {}
    for k, network in enumerate(networks):
        alike.setdefault(jax.tree.structure(network), []).append(k)
    found: list[Any] = [None] * len(networks)
    for members in alike.values():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[networks[k] for k in members])
        results = jax.vmap(fn, (0, None))(stacked, x)
        for place, k in enumerate(members):
            found[k] = jax.tree.map(lambda a, place=place: a[place], results)
    return tuple(found)


def _values(job: Job, network: Any, x: PyTree) -> dict[str, tuple[Array, ...]]:
    """Values at every site, one per row, in float32 or better."""
    if isinstance(network, Merged):
        _, found = network.read(x, job.sources)
    else:
        _, found = job.net.run(network, x, capture=job.sources)
        found = {source: (value,) for source, value in found.items()}
    return {
        site.source: tuple(arrange(value, site)[0] for value in found[site.source])
        for site in job.sites
    }


def _reduce(site: Site, value: Array, at_zero: Array, size: int) -> dict[str, Array]:
    """One row: the moments of a value per channel, and of its distance to the value at zero.

    Two reads of the value give all: its mean over examples, by unit, and the squares of its
    distance, summed over positions, by example and channel. The distance is used once, so that XLA
    need not write it down.
    """
    _, samples = arrange(value, site)
    parts, single, axis = _by_example(site, value, at_zero, size)
    example = parts.mean(axis).reshape(at_zero.shape)
    centre = example - at_zero

    # Where an axis of examples was split off, those behind it have moved.
    moved = parts.ndim - value.ndim
    channels = [a + moved * (a >= axis) for a in range(value.ndim) if a not in samples]
    positions = tuple(a for a in range(parts.ndim) if a != axis and a not in channels)
    # The barrier keeps what follows from reading the values again.
    squares = jax.lax.optimization_barrier(jnp.square(parts - single).sum(positions))
    behind = axis - sum(a < axis for a in positions)
    others = tuple(a for a in range(squares.ndim) if a != behind)
    norm = jnp.sqrt(squares.sum(others))

    mean = example.mean(samples, keepdims=True)
    square = squares.sum(behind) * (squares.size // squares.shape[behind] / value.size)
    # By parts: of every unit about its own mean, and of the units' means.
    var = square - jnp.square(centre).mean(samples) + jnp.square(example - mean).mean(samples)
    var = jax.lax.cond(
        (var >= _LEAST * square).all(),
        lambda value, mean, var: var,
        lambda value, mean, var: jnp.square(value - mean).mean(samples),
        *(value, mean, var),
    )
    return {
        "mean": jnp.squeeze(mean, samples),
        "var": var,
        "norm": norm.mean(),
        "norm_var": norm.var(),
        "centre": centre,
    }


def _by_example(site: Site, value: Array, at_zero: Array, size: int) -> tuple[Array, Array, int]:
    """Values of `size` examples and of one, with an axis of examples alone, and that axis.

    It is the one along which the value of one example is shorter, whatever the network did to
    layouts.
    """
    many, single = value.shape, at_zero.shape
    axes = [a for a, (n, m) in enumerate(zip(many, single, strict=False)) if n != m]
    if size == 1 and not axes:
        return value[None], at_zero[None], 0
    if len(many) != len(single) or len(axes) != 1 or many[axes[0]] != size * single[axes[0]]:
        raise ValueError(
            f'site "{site.name}" has shape {list(many)} at {size} examples and {list(single)} at '
            "one: no axis of it holds the examples, so it has no features; leave it out of `sites`"
        )
    axis = axes[0]
    if single[axis] == 1:
        return value, at_zero, axis
    # Examples were merged with positions, as by x.reshape(-1, features): they are outermost.
    value, at_zero = (
        a.reshape(*a.shape[:axis], -1, single[axis], *a.shape[axis + 1 :]) for a in (value, at_zero)
    )
    return value, at_zero, axis


def numbers(site: str, rows: Rows, at_zero: Sequence[Any], weights: Any) -> dict[str, np.ndarray]:
    """What a network's rows at a site come to, on the host.

    Args:
        site: The site.
        rows: The network's rows.
        at_zero: Its values at the input 0, one per row.
        weights: Those of the models of a `Merged`, over which rows are averaged.

    Returns:
        The fields of `Features`, of one network.
    """
    mean, norm = rows.mean[site], rows.norm[site]
    var = without_rounding(mean, rows.var[site])
    square = np.square(norm) + rows.norm_var[site]
    examples = tuple(range(1, rows.centre[site].ndim))
    # E||g - E g||^2 = E||g||^2 - ||E g||^2, of which rounding leaves about its eps.
    spread = square - np.square(rows.centre[site]).sum(examples)
    spread = np.where(spread <= ROUNDINGS * np.finfo(norm.dtype).eps * square, 0, spread)
    found = {
        "feature": norm,
        "feature_std": np.sqrt(rows.norm_var[site]),
        "offset": np.stack([np.linalg.norm(np.ravel(value)) for value in at_zero]),
        "mean": mean,
        "std": np.sqrt(var),
        "variance": spread / max(rows.centre[site][0].size, 1),
        "dead": np.stack([1 - alive(m, v).mean() for m, v in zip(mean, var, strict=True)]),
    }
    share = np.asarray(weights) if len(norm) > 1 else np.ones(1)
    return {what: np.tensordot(share, v, 1).astype(norm.dtype) for what, v in found.items()}
