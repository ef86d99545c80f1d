"""The compiled part of `vfjax.stats`: moments of a batch, and merging batches.

A batch is reduced on the device in one compiled call for all models; what comes out is small, and a
second, tiny call merges it into what was pooled before, in place. `stream` and `by_pieces` serve
every pass that works like this.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from vfjax._batches import batch_size, batches
from vfjax._examples import separable
from vfjax._meshes import on_mesh, on_meshes, replicate
from vfjax._pooled import ROUNDINGS, shifted_moments
from vfjax._trees.paths import flatten_named
from vfjax._types import Array, PyTree
from vfjax.network import Network
from vfjax.symmetry._places import (
    Axis,
    Window,
    grid,
    moved,
    rows,
)

# On CPU the largest value of a piece of a batch, and the fewest examples in a piece.
_PIECE_BYTES = 4 << 20
_PIECE_MIN = 16


class GroupAxis(NamedTuple):
    """A channel axis that carries a group, as in `vfjax.symmetry.Axis`."""

    group: str
    axis: int
    outer: int
    inner: int
    windows: tuple[Window, ...] = ()
    # Where the group lies that this one moves within, if the channel axes tell its entries apart.
    owner: Axis | None = None

    @property
    def place(self) -> Axis:
        """The same as a place of a value that has the channel axes alone."""
        return Axis("", self.axis, "elementwise", self.outer, self.inner, self.windows)

    def after(self, mapped: GroupAxis, length: int, m: int) -> GroupAxis:
        """Where it lies after another group of an axis of some length has got m entries."""
        move = functools.partial(moved, mapped=mapped.place, length=length, m=m)
        return GroupAxis(
            self.group, self.axis, *move(self.place)[3:], owner=self.owner and move(self.owner)
        )


class Site(NamedTuple):
    """How a site is read: what to capture, and which of its axes are channels."""

    name: str
    source: str
    # Where the channels are, of a value that becomes `[before, n, after]` before `keep` counts its
    # axes; None to leave it as it is.
    split: Axis | None
    # Channel axes; None for all but the first.
    keep: tuple[int, ...] | None
    axes: tuple[GroupAxis, ...]
    # Where the owners lie, of a value that becomes `[owners * n, rest]`; None for one without.
    around: Axis | None = None


class Plan(NamedTuple):
    """What a pass measures: hashable, so that it is part of the key of a compilation."""

    sites: tuple[Site, ...]
    covariance: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tree"], meta_fields=["net"])
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A tree and the network that runs it, as one pytree."""

    net: Network
    tree: PyTree


def vmapped() -> bool:
    """Whether models are vmapped; on CPU that makes their convolutions slow, so it loops."""
    return jax.default_backend() != "cpu"


def each(fn: Callable[[Any, PyTree], Any], models: Sequence[Any], x: PyTree) -> tuple[Any, ...]:
    """`fn(model, x)` of every model; vmapped over those that are alike where that is fast."""
    if not vmapped():
        return tuple(fn(model, x) for model in models)
    alike: dict[Any, list[int]] = {}
    for k, model in enumerate(models):
        leaves, structure = jax.tree.flatten(model)
        types = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        alike.setdefault((structure, types), []).append(k)
    found: list[Any] = [None] * len(models)
    for members in alike.values():
        if len(members) == 1:  # under vmap, `cond` would take both of its branches
            found[members[0]] = fn(models[members[0]], x)
            continue
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[models[k] for k in members])
        results = jax.vmap(fn, (0, None))(stacked, x)
        for place, k in enumerate(members):
            found[k] = jax.tree.map(lambda a, place=place: a[place], results)
    return tuple(found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure(
    plan: Plan, mesh: Any, models: tuple[Model, ...], x: PyTree
) -> tuple[dict[str, Any], list[Array]]:
    """Moments of one batch, and the number of samples at each site."""
    if mesh is not None:
        return on_mesh(functools.partial(_batch, plan), mesh)(models, x)
    batch = functools.partial(_batch, plan, models)
    parts = pieces({model.net: model.tree for model in models}, x)
    return by_pieces(batch, functools.partial(_merge, plan), parts, x)


def pieces(models: Mapping[Network, PyTree], x: PyTree) -> int:
    """Into how many equal pieces a batch is cut, where that only saves time.

    The numbers are those of as many small batches. On CPU what a layer makes of a large batch is
    out of the caches before its statistics read it.

    Args:
        models: By network, a tree that it runs; leaves that it lacks count as traced.
        x: The batch.
    """
    found = {_pieces(net, tree, x) for net, tree in models.items()}
    return found.pop() if len(found) == 1 else 1


def _pieces(net: Network, tree: PyTree, x: PyTree) -> int:
    size, leaves = batch_size(x), jax.tree.leaves(x)
    if jax.default_backend() != "cpu" or size < 2 * _PIECE_MIN:
        return 1
    if any(AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types for a in leaves):
        return 1  # even over one device, a loop would have to be told how its slices lie
    named, _ = flatten_named(tree)
    whole = net._traces.at(named, x)
    most = max(_PIECE_BYTES * size // max(whole.widest, 1), _PIECE_MIN)
    piece = next(n for n in range(min(size, most), 0, -1) if size % n == 0)
    if not _PIECE_MIN <= piece < size:
        return 1
    try:
        part = jax.tree.map(lambda a: jax.ShapeDtypeStruct((piece, *a.shape[1:]), a.dtype), x)
        traced = net._traces.at(named, part)
    except Exception:  # whatever a function raises that only takes batches of this size
        return 1
    return size // piece if separable(whole.graph, traced.graph) else 1


def by_pieces(
    fn: Callable[[PyTree], tuple[Any, list[Array]]],
    merge: Callable[[Any, Any, Any], Any],
    parts: int,
    x: PyTree,
) -> tuple[Any, list[Array]]:
    """Reduces a batch piece by piece, one after the other in one loop.

    Args:
        fn: From a batch to what it is reduced to, and the number of samples at each site.
        merge: Merges what was pooled and a piece, given the piece's share of both together.
        parts: Number of pieces, which divides the batch.
        x: The batch.

    Returns:
        What `fn` returns, of the whole batch.
    """
    if parts == 1:
        return fn(x)
    xs = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), x)
    empty, _ = jax.eval_shape(fn, jax.tree.map(lambda a: a[0], xs))
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty)

    def step(pooled: Any, nth: tuple[Array, PyTree]) -> tuple[Any, list[Array]]:
        piece, counts = fn(nth[1])
        merged = merge(pooled, piece, 1 / nth[0])
        # Not merged with nothing: the square of a large mean may overflow.
        first = functools.partial(jnp.where, nth[0] == 1)
        return jax.tree.map(first, piece, merged), counts

    pooled, counts = jax.lax.scan(step, empty, (jnp.arange(1.0, parts + 1), xs))
    return pooled, [n.sum(dtype=n.dtype) for n in counts]


def _batch(plan: Plan, models: tuple[Model, ...], x: PyTree) -> tuple[dict[str, Any], list[Array]]:
    counts: dict[str, int] = {}

    def one(model: Model, x: PyTree) -> tuple[dict[str, Array], ...]:
        own: dict[str, int] = {}
        found = read(model.net, plan.sites, plan.covariance, own, x, model.tree)
        if own != (counts or own):
            raise ValueError(
                "net has networks with other numbers of samples at the sites of one and of "
                f"another, {own} and {counts}; networks may differ behind the sites only"
            )
        counts.update(own)
        return found

    parts = each(one, models, x)
    mean, var, rest = (
        {site.name: jnp.stack([part[k][site.name] for part in parts]) for site in plan.sites}
        for k in (0, 1, 2)
    )
    rows = {name: [part[3][name] for part in parts] for name in plan.covariance}

    def product(name: str, i: int, j: int) -> Array:
        return covariance_of((rows[name][i], rest[name][i]), (rows[name][j], rest[name][j]))

    products = {
        name: jnp.stack([product(name, i, j) for i, j in plan.pairs])
        for name in plan.covariance
        if plan.pairs
    }
    for name, found in products.items():
        own = [k for k, (i, j) in enumerate(plan.pairs) if i == j]
        if own:
            # What the products give already costs no pass of its own.
            squares = jnp.stack([jnp.diagonal(found[k]) for k in own])
            var[name] = jnp.maximum(squares, 0).reshape(var[name].shape)
    batch = {"mean": mean, "var": var, "covariance": products}
    return batch, [jnp.asarray(counts[site.name], jnp.int32) for site in plan.sites]


def read(
    net: Network,
    sites: tuple[Site, ...],
    covariance: Collection[str],
    counts: dict[str, int],
    x: PyTree,
    tree: PyTree,
) -> tuple[dict[str, Array], ...]:
    """Moments of one model's values on a batch, by site.

    Args:
        net: The traced network.
        sites: What to read.
        covariance: Names of those whose values are wanted too.
        counts: Filled with the number of samples, by name: no result, so that `vmap` leaves it.
        x: The batch.
        tree: The model.

    Returns:
        Means, variances, means of the shifted values, and the shifted values `[samples, channels]`.
    """
    _, values = net.run(tree, x, capture=tuple(dict.fromkeys(site.source for site in sites)))
    mean, var, rest, rows = {}, {}, {}, {}
    for site in sites:
        value, sample = arrange(values[site.source], site)
        name = site.name
        value, mean[name], var[name], rest[name] = shifted_moments(value, sample)
        counts[name] = value.size // max(mean[name].size, 1)
        if name in covariance:
            keep = [a for a in range(value.ndim) if a not in sample]
            rows[name] = value.transpose(*sample, *keep).reshape(counts[name], -1)
    return mean, var, rest, rows


def covariance_of(first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """Covariances `[n, m]` of what `read` gave: shifted values `[samples, n]` and their means."""
    exact = jax.lax.Precision.HIGHEST
    found = jnp.matmul(first[0].T, second[0], precision=exact) / len(first[0])
    return found - jnp.outer(first[1].reshape(-1), second[1].reshape(-1))


def arrange(value: Any, site: Site) -> tuple[Array, tuple[int, ...]]:
    """A site's value in float32 or better, channels as axes of their own, and its sample axes."""
    if not hasattr(value, "dtype"):
        raise TypeError(
            f'site "{site.name}" holds a {type(value).__name__} of arrays; statistics need one '
            "array"
        )
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    if site.split is not None and site.around is not None:
        value = grid(value, site.split, site.around)
        value = value.reshape(-1, value.shape[-1])
    elif site.split is not None:
        value = rows(value, site.split)
    keep = tuple(range(1, value.ndim)) if site.keep is None else site.keep
    return value, tuple(a for a in range(value.ndim) if a not in keep)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def pool(
    plan: Plan, pooled: dict[str, Any], batch: dict[str, Any], share: float | Array
) -> dict[str, Any]:
    """Chan's merge of two sets of samples; `share` is the batch's part of all samples so far."""
    return _merge(plan, pooled, batch, share)


def _merge(
    plan: Plan, pooled: dict[str, Any], batch: dict[str, Any], share: float | Array
) -> dict[str, Any]:
    out: dict[str, Any] = {"covariance": {}}
    out["mean"], out["var"], steps = merge_moments(
        (pooled["mean"], pooled["var"]), (batch["mean"], batch["var"]), share
    )
    for site, old in pooled["covariance"].items():
        rows = steps[site].reshape(steps[site].shape[0], -1)
        between = jnp.stack([jnp.outer(rows[i], rows[j]) for i, j in plan.pairs])
        new = old + (batch["covariance"][site] - old) * share
        out["covariance"][site] = new + between * (share * (1 - share))
    return out


def merge_moments(
    pooled: tuple[PyTree, PyTree], batch: tuple[PyTree, PyTree], share: float | Array
) -> tuple[PyTree, PyTree, PyTree]:
    """Means and variances of the union of two sets of samples (Chan, Golub and LeVeque 1979).

    Args:
        pooled: Means and variances of the first set, two trees of one structure.
        batch: Those of the second.
        share: The second set's part of all samples.

    Returns:
        Means, variances, and the steps from the first set's means to the second's.
    """
    steps = jax.tree.map(jnp.subtract, batch[0], pooled[0])

    def mean(old: Array, step: Array) -> Array:
        return old + step * jnp.asarray(share, old.dtype)

    def var(old: Array, new: Array, step: Array) -> Array:
        part = jnp.asarray(share, old.dtype)
        return old + (new - old) * part + jnp.square(step) * (part * (1 - part))

    means = jax.tree.map(mean, pooled[0], steps)
    return means, jax.tree.map(var, pooled[1], batch[1], steps), steps


def finish(plan: Plan, pooled: dict[str, Any]) -> tuple[dict[str, Array], ...]:
    """Mean, variance and covariance `[K, K, n, n]` by site, rounding taken off the variances.

    On the host: it is little, and there it needs no compilation.
    """
    pooled = jax.tree.map(np.asarray, pooled)
    mean, var, blocks = pooled["mean"], {}, {}
    for site, value in pooled["var"].items():
        var[site] = without_rounding(mean[site], value)
    for site, value in pooled["covariance"].items():
        models = len(mean[site])
        blocks[site] = np.full((models, models, *value.shape[1:]), np.nan, value.dtype)
        for (i, j), block in zip(plan.pairs, value, strict=True):
            blocks[site][i, j], blocks[site][j, i] = block, block.T
    return jax.tree.map(jnp.asarray, (mean, var, blocks))


def without_rounding(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Variances, zero where they are no larger than the rounding of the values themselves."""
    floor = ROUNDINGS * np.finfo(var.dtype).eps * np.abs(mean)
    return np.where(var <= np.square(floor), 0, var)


def stream(
    measure: Callable[[Any, Any, PyTree], tuple[Any, list[Array]]],
    pool: Callable[[Any, Any, float], Any],
    state: PyTree,
    data: Iterable[Any],
    *,
    like: PyTree,
) -> tuple[Any, list[float]]:
    """Pools what a measurement gives over all batches of `data`, wherever they lie.

    Args:
        measure: `(mesh, state, x)` to what `pool` takes and the number of samples at each site; the
            mesh is the one that the batches are sharded over, or None.
        pool: `(pooled, batch, share)` to what is pooled then; `share` is the batch's part of all
            examples so far.
        state: What `measure` needs, placed on the mesh before it gets it.
        data: As `batches` takes it.
        like: The traced input.

    Returns:
        What was pooled over all batches, and the number of samples at each site.

    Raises:
        TypeError: As `batches`.
        ValueError: As `batches`.
    """
    pooled, samples, counts = None, 0, []
    for mesh, placed, x in on_meshes(batches(data, like=like), state):
        size = batch_size(x)
        batch, each = measure(mesh, placed, x)
        samples += size
        if pooled is not None:
            pooled = pool(replicate(pooled, mesh), batch, size / samples)
            continue
        # Every batch has the same number of positions per example.
        pooled, counts = batch, [int(n) / size for n in each]
    assert pooled is not None  # `batches` gives one or raises
    return pooled, [n * samples for n in counts]
