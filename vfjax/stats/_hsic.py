"""Inner products between the features of sites: the compiled part of linear CKA.

With centred features `X_i` `[n, p_i]` of site i, linear CKA follows from `H_ij = ||X_i^T
X_j||_F^2`. This is the squared norm of a covariance, `p_i x p_j`, which can be pooled over batches
in one pass. It is also the inner product of the Gram matrices `X_i X_i^T` and `X_j X_j^T`, `n x n`,
which need all of a site's features at once. Which of the two is smaller depends on the network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import Mask, batch_size, compiled, masked, on_mesh, on_meshes, stream, wide
from vfjax._passes.masking import examples
from vfjax._passes.moments import ROUNDINGS, scale_of, union_means, union_second
from vfjax._trees import native
from vfjax._types import Array, PyTree
from vfjax.network._layout import as_float, by_example, whole_layout
from vfjax.network._valid import valid_at

Shape = tuple[int, ...]


class Runs(Protocol):
    """A model with its network, such as `vfjax.merge.Merged`: a pytree that can be run."""

    @property
    def net(self) -> Any:
        """The traced network."""

    def run(self, x: Any, *, capture: Any = None) -> Any:
        """The output; with `capture` also the values at sites, by name."""


# With a mask, the means `[p]` of the features that count, one per site of all models in turn.
_Means = list[Array] | None
# Models, the scales of their features, again one per site, and those means.
_State = tuple[tuple[Runs, ...], list[Array], _Means]

# Entries of a Gram matrix to multiply at a time, in float64 on the host.
_BLOCK = 1 << 18


class Job(NamedTuple):
    """The sites to read of each model; hashable, so that it can be a static argument of `jit`.

    Attributes:
        sites: Names of sites, by model.
        shapes: Shapes of the values of one example, by model and site.
    """

    sites: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[Shape, ...], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of features of each site, of all models in turn."""
        return tuple(math.prod(shape) for shapes in self.shapes for shape in shapes)

    def only(self, chosen: Sequence[int]) -> Job:
        """The job of some of the sites, given by their index in `widths`."""
        sites, shapes, place = [], [], 0
        for names, of_model in zip(self.sites, self.shapes, strict=True):
            kept = [k for k in range(len(names)) if place + k in chosen]
            sites.append(tuple(names[k] for k in kept))
            shapes.append(tuple(of_model[k] for k in kept))
            place += len(names)
        return Job(tuple(sites), tuple(shapes))


def job_of(models: Sequence[Runs], sites: Sequence[Sequence[str]]) -> Job:
    """The job for some sites of each model, with the shapes of the values of one example.

    Raises:
        TypeError: If a site does not hold an array of real numbers.
    """
    shapes = []
    for model, names in zip(models, sites, strict=True):
        x = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), model.net.x)
        leaves, structure = jax.tree.flatten(model)  # JAX's caches would keep the model's network
        leaves = list(map(native, leaves))

        def captured(leaves: Any, x: Any, structure: Any = structure, names: Any = names) -> Any:
            return structure.unflatten(leaves).run(x, capture=names)[1]

        values = jax.eval_shape(captured, leaves, x)
        for name in names:
            dtype = getattr(values[name], "dtype", None)
            if dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
                what = type(values[name]).__name__ if dtype is None else str(dtype)
                raise TypeError(f'site "{name}" must hold an array of real numbers, got {what}')
        shapes.append(tuple(values[name].shape for name in names))
    return Job(tuple(map(tuple, sites)), tuple(shapes))


def itemsize() -> int:
    """The most bytes of a feature: features are float32, or float64 if that is enabled."""
    return jax.dtypes.canonicalize_dtype(np.float64).itemsize


def _features(
    job: Job, models: Sequence[Runs], x: PyTree, valid: Array | None = None, means: _Means = None
) -> list[Array]:
    """The features `[batch, p]` of every site, float32 or better.

    With a mask they are less their means, and 0 where they do not count: an example then adds what
    counts of it to every sum over examples, and nothing else.
    """
    features, size = [], batch_size(x)
    for model, names, shapes in zip(models, job.sites, job.shapes, strict=True):
        if names:
            _, values = model.run(x, capture=names)
            counts = _counts(model, names, valid)
            for name, shape in zip(names, shapes, strict=True):
                value = _by_rows(name, as_float(values[name], name), shape, size)
                if means is not None:
                    mean = means[len(features)][None]
                    value = value - mean
                    floor = ROUNDINGS * jnp.finfo(value.dtype).eps * jnp.abs(mean)
                    there = jnp.broadcast_to(counts[name], values[name].shape)
                    there = _by_rows(name, there, shape, size) & ~(jnp.abs(value) <= floor)
                    value = jnp.where(there, value, 0)
                features.append(value)
    return features


def _counts(model: Runs, names: Sequence[str], valid: Array | None) -> dict[str, Array]:
    """What counts at the sites of a model; empty if everything does."""
    layouts = [whole_layout(model.net, name) for name in names]
    return {} if valid is None else valid_at(model.net, layouts, valid)


def _by_rows(name: str, value: Array, single: Shape, size: int) -> Array:
    """A value as `[batch, p]`."""
    value, axis = by_example(name, value, single, size)
    return jnp.moveaxis(value, axis, 0).reshape(size, -1)


def means_of(job: Job, models: tuple[Runs, ...], data: Iterable[Any], mask: Mask) -> list[Array]:
    """The means of what counts, by site and feature, in one pass."""
    measure, like = functools.partial(_measure_means, job), models[0].net.x
    means, _ = stream(measure, _pool_means, models, data, like=like, mask=mask, host=list)
    return jax.device_put(means)


@compiled(static=2)
def _measure_means(
    job: Job, mesh: Any, models: tuple[Runs, ...], x: PyTree, valid: Array
) -> tuple[list[Array], list[Array]]:
    """Means of what counts in one batch, by site and feature, and its number of examples."""

    def batch(models: tuple[Runs, ...], x: PyTree, valid: Array) -> Any:
        means, numbers = [], []
        features = iter(_features(job, models, x))
        for model, names, shapes in zip(models, job.sites, job.shapes, strict=True):
            _, values = jax.eval_shape(lambda m, x, n=names: m.run(x, capture=n), model, x)
            counts = _counts(model, names, valid)
            for name, shape in zip(names, shapes, strict=True):
                there = jnp.broadcast_to(counts[name], values[name].shape)
                there, value = _by_rows(name, there, shape, batch_size(x)), next(features)
                numbers.append(there.sum(0))
                some = jnp.maximum(numbers[-1], 1).astype(value.dtype)
                means.append(jnp.where(there, value, 0).sum(0) / some)
        return means, numbers

    means, numbers = on_mesh(batch, mesh)(models, x, valid)
    return [mean[None] for mean in means], numbers


def _pool_means(pooled: list[Any], batch: list[Any], shares: list[Any]) -> list[Any]:
    """Means of the union of two sets of samples."""
    return [
        union_means(old, new, share)[0]
        for old, new, share in zip(pooled, batch, shares, strict=True)
    ]


def _scaled(job: Job, state: _State, x: PyTree, valid: Array | None) -> list[Array]:
    """The features, scaled so that their products stay in the range of float32."""
    models, scales, means = state
    features = _features(job, models, x, valid, means)
    return [f * scale for f, scale in zip(features, scales, strict=True)]


def _with_scales(
    job: Job, models: tuple[Runs, ...], data: Iterable[PyTree], mask: Mask | None, means: _Means
) -> tuple[_State, Iterable[PyTree]]:
    """The models with scales of all their sites, and the data, again from its first batch.

    The first batch sets the scales, since all batches must share them. CKA does not depend on them.
    """
    data, read = iter(data), []

    def remembered() -> Iterator[PyTree]:
        for x in data:
            read.append(x)
            yield x

    first = next(masked(remembered(), mask, like=models[0].net.x))
    mesh, (placed, there), (x, valid) = next(on_meshes([first], (models, means)))
    scales = _scales(job, mesh, placed, x, valid, there)
    return (models, scales, means), itertools.chain(read, data)


@compiled(static=2)
def _scales(
    job: Job, mesh: Any, models: Any, x: PyTree, valid: Array | None, means: _Means
) -> list[Array]:
    def scales(*given: Any) -> list[Array]:
        return [scale_of(f) for f in _features(job, *given)]

    return on_mesh(scales, mesh)(models, x, valid, means)


def _centred(x: Array) -> tuple[Array, Array]:
    """Features less their means, exactly 0 where they vary only by rounding; and the means."""
    mean = x.mean(0, keepdims=True)
    x = x - mean
    floor = ROUNDINGS * jnp.finfo(x.dtype).eps * jnp.abs(mean)
    constant = jnp.abs(x).max(0, keepdims=True) <= floor  # NaN compares false and so is kept
    return jnp.where(constant, 0, x), mean[0]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


# ------------------------------------------------------------------------------------ covariances


def covariance_bytes(widths: Sequence[int], pairs: Sequence[tuple[int, int]]) -> int:
    """Bytes that `by_covariances` needs: covariances of one batch, and the pooled ones."""
    return 2 * itemsize() * sum(widths[i] * widths[j] for i, j in pairs)


def by_covariances(
    job: Job,
    models: tuple[Runs, ...],
    data: Iterable[Any],
    pairs: tuple[tuple[int, int], ...],
    *,
    mask: Mask | None = None,
    means: _Means = None,
) -> np.ndarray:
    """`H / n^2` `[sites, sites]` from the covariances of pairs of sites, in one pass.

    Each site has an arbitrary scale.

    Args:
        job: The sites to read.
        models: The models.
        data: Batches.
        pairs: Pairs `(i, j)` of sites, including each site with itself.
        mask: As in `vfjax.stats.moments`.
        means: The result of `means_of`.

    Returns:
        float64, 0 for pairs that were not requested.
    """
    state, data = _with_scales(job, models, data, mask, means)
    pooled, _ = stream(
        functools.partial(_covariances, job, pairs),
        functools.partial(_pool, pairs),
        state,
        data,
        like=models[0].net.x,
        mask=mask,
    )
    found, covariances = jax.tree.map(np.asarray, pooled)
    varies = {}
    for (i, j), block in zip(pairs, covariances, strict=True):
        if i == j:
            floor = ROUNDINGS * np.finfo(block.dtype).eps * np.abs(found[i])
            varies[i] = ~(np.diagonal(block) <= np.square(floor))  # NaN counts as varying
    out = np.zeros((len(job.widths),) * 2)
    for (i, j), block in zip(pairs, covariances, strict=True):
        kept = block[varies[i]][:, varies[j]].astype(np.float64)
        out[i, j] = out[j, i] = np.vdot(kept, kept)
    return out


@compiled(static=3)
def _covariances(
    job: Job,
    pairs: tuple[tuple[int, int], ...],
    mesh: Any,
    state: Any,
    x: PyTree,
    valid: Array | None,
) -> tuple[Any, list[Array]]:
    """Means of the sites in one batch, and covariances of the pairs."""

    def batch(state: Any, x: PyTree, valid: Array | None) -> tuple[list[Array], list[Array]]:
        centred = [_centred(f) for f in _scaled(job, state, x, valid)]
        blocks = [_product(centred[i][0].T, centred[j][0]) / batch_size(x) for i, j in pairs]
        return [mean for _, mean in centred], blocks

    return on_mesh(batch, mesh)(state, x, valid), [jnp.int32(batch_size(x))]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _pool(pairs: tuple[tuple[int, int], ...], pooled: Any, batch: Any, share: Any) -> Any:
    """Means and covariances of the union of two sets of examples; the first is donated."""
    share = share[0] if isinstance(share, list) else share
    means, steps = union_means(pooled[0], batch[0], share)
    blocks = [
        union_second(old, new, jnp.outer(steps[i], steps[j]), share)
        for (i, j), old, new in zip(pairs, pooled[1], batch[1], strict=True)
    ]
    return means, blocks


# ------------------------------------------------------------------------------- Gram matrices


def gram_bytes(widths: Sequence[int], count: int) -> int:
    """The fewest bytes that `by_grams` needs: all Gram matrices, and one site's features twice."""
    return itemsize() * (len(widths) * count**2 + 2 * count * max(widths))


def by_grams(
    job: Job,
    models: tuple[Runs, ...],
    read: Callable[[], Iterable[Any]],
    count: int,
    memory: int,
    *,
    mask: Mask | None = None,
    means: _Means = None,
) -> np.ndarray:
    """`H` `[sites, sites]` from the Gram matrices of all sites; each site has an arbitrary scale.

    One pass reads as many sites as have features that fit into the remaining memory.

    Args:
        job: The sites to read.
        models: The models.
        read: Returns the batches, from the first one on each call.
        count: Number of examples, with those that do not count.
        memory: The most bytes to use; not less than `gram_bytes`.
        mask: As in `vfjax.stats.moments`.
        means: The result of `means_of`.

    Returns:
        float64.
    """
    free = memory - gram_bytes(job.widths, count)
    grams: list[np.ndarray] = []
    for group in _groups(job.widths, free // (itemsize() * count)):
        measure = functools.partial(_rows, job.only(group))
        state = models, None if means is None else [means[k] for k in group]
        features, _ = stream(measure, _append, state, read(), like=models[0].net.x, mask=mask)
        while features:
            grams.append(np.asarray(_gram(features.pop(0))))
    out = np.zeros((len(grams),) * 2)
    rows = max(_BLOCK // count, 1)
    for start in range(0, count, rows):
        block = np.stack([g[start : start + rows].ravel() for g in grams]).astype(np.float64)
        out += block @ block.T
    return out


def _groups(widths: Sequence[int], most: int) -> list[list[int]]:
    """Sites in order, in groups of at most `most` features not counting the group's largest."""
    groups: list[list[int]] = []
    for k in range(len(widths)):
        group = [*groups[-1], k] if groups else []
        taken = [widths[i] for i in group]
        if not group or sum(taken) - max(taken) > most:
            groups.append([k])
        else:
            groups[-1] = group
    return groups


@compiled(static=2)
def _rows(
    job: Job, mesh: Any, state: Any, x: PyTree, valid: Array | None
) -> tuple[list[list[Array]], list[Array]]:
    """For each site a list of one array, its features in this batch."""
    models, means = state
    features = on_mesh(functools.partial(_features, job), mesh)(models, x, valid, means)
    return [[rows] for rows in features], []


def _append(pooled: list[list[Array]], batch: list[list[Array]], share: Any) -> list[list[Array]]:
    return [before + new for before, new in zip(pooled, batch, strict=True)]


@jax.jit
def _gram(parts: list[Array]) -> Array:
    x = jnp.concatenate(parts)
    x, _ = _centred(x * scale_of(x))
    return _product(x, x.T)


# ------------------------------------------------------------------------------------ minibatches


def by_minibatches(
    job: Job,
    models: tuple[Runs, ...],
    data: Iterable[Any],
    *,
    mask: Mask | None = None,
    means: _Means = None,
) -> tuple[np.ndarray, int]:
    """Unbiased estimates of HSIC `[sites, sites]`, averaged over batches by number of examples.

    Each site has an arbitrary scale. Batches of fewer than four examples, for which there is no
    such estimate, are left out. `mask` and `means` as in `by_covariances`.

    Returns:
        float64, and the number of examples used.
    """
    like, count = models[0].net.x, 0

    def counted() -> Iterator[PyTree]:
        nonlocal count
        for x, valid in masked(data, mask, like=like):
            some = int(examples(x, valid))
            if some >= 4:
                count += some
                yield x
        if not count:
            raise ValueError('estimator="minibatch" needs batches of 4 examples or more')

    state, counted_data = _with_scales(job, models, counted(), mask, means)
    measure = functools.partial(_inner_product, job)
    hsic, _ = stream(measure, _mean, state, counted_data, like=like, mask=mask, host=wide)
    return np.asarray(hsic, np.float64), count


def _mean(pooled: np.ndarray, batch: np.ndarray, share: Any) -> np.ndarray:
    share = share[0] if isinstance(share, list) else share
    return pooled + (batch - pooled) * share


@compiled(static=2)
def _inner_product(
    job: Job, mesh: Any, state: Any, x: PyTree, valid: Array | None
) -> tuple[Array, list[Array]]:
    """The estimate from one batch for all pairs of sites (Song et al. 2012)."""
    size, n = batch_size(x), examples(x, valid)

    def batch(state: Any, x: PyTree, valid: Array | None) -> Array:
        grams = []
        for x_i in _scaled(job, state, x, valid):
            # The estimate is invariant; centring reduces rounding. What a mask leaves is centred.
            centred = x_i if valid is not None else _centred(x_i)[0]
            grams.append(_product(centred, centred.T) * (1 - jnp.eye(size, dtype=x_i.dtype)))
        stack = jnp.stack(grams)
        flat, rows, sums = stack.reshape(len(grams), -1), stack.sum(1), stack.sum((1, 2))
        total = _product(flat, flat.T)
        total += jnp.outer(sums, sums) / ((n - 1) * (n - 2))
        total -= _product(rows, rows.T) * (2 / (n - 2))
        return total / (n * (n - 3))

    return on_mesh(batch, mesh)(state, x, valid)[None], [jnp.int32(n)]
