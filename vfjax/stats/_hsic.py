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

from vfjax._passes import batch_size, batches, compiled, on_mesh, on_meshes, stream, wide
from vfjax._passes.moments import ROUNDINGS, scale_of, union_means, union_second
from vfjax._trees import native
from vfjax._types import Array, PyTree
from vfjax.network._layout import as_float, by_example

Shape = tuple[int, ...]


class Runs(Protocol):
    """A model with its network, such as `vfjax.merge.Merged`: a pytree that can be run."""

    @property
    def net(self) -> Any:
        """The traced network."""

    def run(self, x: Any, *, capture: Any = None) -> Any:
        """The output; with `capture` also the values at sites, by name."""


# Models, and the scales of their features, one per site of all models in turn.
_State = tuple[tuple[Runs, ...], list[Array]]

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


def _features(job: Job, models: Sequence[Runs], x: PyTree) -> list[Array]:
    """The features `[batch, p]` of every site, float32 or better."""
    features = []
    for model, names, shapes in zip(models, job.sites, job.shapes, strict=True):
        if names:
            _, values = model.run(x, capture=names)
            for name, shape in zip(names, shapes, strict=True):
                value = as_float(values[name], name)
                value, axis = by_example(name, value, shape, batch_size(x))
                features.append(jnp.moveaxis(value, axis, 0).reshape(batch_size(x), -1))
    return features


def _scaled(job: Job, state: _State, x: PyTree) -> list[Array]:
    """The features, scaled so that their products stay in the range of float32."""
    models, scales = state
    return [f * scale for f, scale in zip(_features(job, models, x), scales, strict=True)]


def _with_scales(
    job: Job, models: tuple[Runs, ...], data: Iterable[PyTree]
) -> tuple[_State, Iterable[PyTree]]:
    """The models with scales of all their sites, and the data, again from its first batch.

    The first batch sets the scales, since all batches must share them. CKA does not depend on them.
    """
    data = iter(data)
    first = next(data)
    mesh, placed, x = next(on_meshes([first], models))
    return (models, _scales(job, mesh, placed, x)), itertools.chain([first], data)


@compiled(static=2)
def _scales(job: Job, mesh: Any, models: Any, x: PyTree) -> list[Array]:
    def scales(models: Any, x: PyTree) -> list[Array]:
        return [scale_of(f) for f in _features(job, models, x)]

    return on_mesh(scales, mesh)(models, x)


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
    job: Job, models: tuple[Runs, ...], data: Iterable[Any], pairs: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """`H / n^2` `[sites, sites]` from the covariances of pairs of sites, in one pass.

    Each site has an arbitrary scale.

    Args:
        job: The sites to read.
        models: The models.
        data: Batches.
        pairs: Pairs `(i, j)` of sites, including each site with itself.

    Returns:
        float64, 0 for pairs that were not requested.
    """
    state, data = _with_scales(job, models, data)
    pooled, _ = stream(
        functools.partial(_covariances, job, pairs),
        functools.partial(_pool, pairs),
        state,
        data,
        like=models[0].net.x,
    )
    means, covariances = jax.tree.map(np.asarray, pooled)
    varies = {}
    for (i, j), block in zip(pairs, covariances, strict=True):
        if i == j:
            floor = ROUNDINGS * np.finfo(block.dtype).eps * np.abs(means[i])
            varies[i] = ~(np.diagonal(block) <= np.square(floor))  # NaN counts as varying
    out = np.zeros((len(job.widths),) * 2)
    for (i, j), block in zip(pairs, covariances, strict=True):
        kept = block[varies[i]][:, varies[j]].astype(np.float64)
        out[i, j] = out[j, i] = np.vdot(kept, kept)
    return out


@compiled(static=3)
def _covariances(
    job: Job, pairs: tuple[tuple[int, int], ...], mesh: Any, state: Any, x: PyTree
) -> tuple[Any, list[Array]]:
    """Means of the sites in one batch, and covariances of the pairs."""

    def batch(state: Any, x: PyTree) -> tuple[list[Array], list[Array]]:
        centred = [_centred(f) for f in _scaled(job, state, x)]
        blocks = [_product(centred[i][0].T, centred[j][0]) / batch_size(x) for i, j in pairs]
        return [mean for _, mean in centred], blocks

    return on_mesh(batch, mesh)(state, x), []


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _pool(pairs: tuple[tuple[int, int], ...], pooled: Any, batch: Any, share: Any) -> Any:
    """Means and covariances of the union of two sets of examples; the first is donated."""
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
) -> np.ndarray:
    """`H` `[sites, sites]` from the Gram matrices of all sites; each site has an arbitrary scale.

    One pass reads as many sites as have features that fit into the remaining memory.

    Args:
        job: The sites to read.
        models: The models.
        read: Returns the batches, from the first one on each call.
        count: Number of examples.
        memory: The most bytes to use; not less than `gram_bytes`.

    Returns:
        float64.
    """
    free = memory - gram_bytes(job.widths, count)
    grams: list[np.ndarray] = []
    for group in _groups(job.widths, free // (itemsize() * count)):
        measure = functools.partial(_rows, job.only(group))
        features, _ = stream(measure, _append, models, read(), like=models[0].net.x)
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
def _rows(job: Job, mesh: Any, models: Any, x: PyTree) -> tuple[list[list[Array]], list[Array]]:
    """For each site a list of one array, its features in this batch."""
    features = on_mesh(functools.partial(_features, job), mesh)(models, x)
    return [[rows] for rows in features], []


def _append(pooled: list[list[Array]], batch: list[list[Array]], share: float) -> list[list[Array]]:
    return [before + new for before, new in zip(pooled, batch, strict=True)]


@jax.jit
def _gram(parts: list[Array]) -> Array:
    x = jnp.concatenate(parts)
    x, _ = _centred(x * scale_of(x))
    return _product(x, x.T)


# ------------------------------------------------------------------------------------ minibatches


def by_minibatches(
    job: Job, models: tuple[Runs, ...], data: Iterable[Any]
) -> tuple[np.ndarray, int]:
    """Unbiased estimates of HSIC `[sites, sites]`, averaged over batches by number of examples.

    Each site has an arbitrary scale. Batches of fewer than four examples, for which there is no
    such estimate, are left out.

    Returns:
        float64, and the number of examples used.
    """
    like, count = models[0].net.x, 0

    def counted() -> Iterator[PyTree]:
        nonlocal count
        for x in batches(data, like=like):
            if batch_size(x) >= 4:
                count += batch_size(x)
                yield x
        if not count:
            raise ValueError('estimator="minibatch" needs batches of 4 examples or more')

    state, counted_data = _with_scales(job, models, counted())
    hsic, _ = stream(
        functools.partial(_inner_product, job), _mean, state, counted_data, like=like, host=wide
    )
    return np.asarray(hsic, np.float64), count


def _mean(pooled: np.ndarray, batch: np.ndarray, share: float) -> np.ndarray:
    return pooled + (batch - pooled) * share


@compiled(static=2)
def _inner_product(job: Job, mesh: Any, state: Any, x: PyTree) -> tuple[Array, list[Array]]:
    """The estimate from one batch for all pairs of sites (Song et al. 2012)."""
    n = batch_size(x)

    def batch(state: Any, x: PyTree) -> Array:
        grams = []
        for x_i in _scaled(job, state, x):
            centred, _ = _centred(x_i)  # the estimate is invariant; centring reduces rounding
            grams.append(_product(centred, centred.T) * (1 - jnp.eye(n, dtype=x_i.dtype)))
        stack = jnp.stack(grams)
        flat, rows, sums = stack.reshape(len(grams), -1), stack.sum(1), stack.sum((1, 2))
        total = _product(flat, flat.T)
        total += jnp.outer(sums, sums) / ((n - 1) * (n - 2))
        total -= _product(rows, rows.T) * (2 / (n - 2))
        return total / (n * (n - 3))

    return on_mesh(batch, mesh)(state, x)[None], []
