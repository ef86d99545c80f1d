"""Moments per channel: of a batch, pooled over batches, and corrections that change them."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._types import Array, PyTree

# A channel below this fraction of its layer's largest variance counts as constant.
_DEAD = 1e-12
# So does one whose standard deviation is within this many rounding errors of its mean.
ROUNDINGS = 8
# Values are shifted by the mean of this many examples.
_FEW = 4


class Pooled(NamedTuple):
    """The moments of each channel of a value.

    Attributes:
        count: Number of samples, an array that broadcasts against the mean.
        mean: Shaped like the channels; float32 or better.
        m2: Sum of squared deviations from the mean; same shape and dtype.
    """

    count: Any
    mean: Any
    m2: Any

    @property
    def var(self) -> Any:
        """Population variance."""
        return self.m2 / self.count.clip(1)


def moments_of(value: Array, sample_axes: tuple[int, ...], valid: Array | None = None) -> Pooled:
    """Moments of one batch of float32 or better; `valid` as in `shifted_moments`."""
    _, mean, var, _, count = shifted_moments(value, sample_axes, valid)
    count = count.reshape(()) if np.size(count) == 1 and valid is not None else count
    return Pooled(jnp.asarray(count, mean.dtype), mean, var * count)


def shifted_moments(
    value: Array, sample_axes: tuple[int, ...], valid: Array | None = None
) -> tuple[Array, Array, Array, Array, Any]:
    """Mean and variance over some axes, reading the values once.

    Subtracting a squared mean from a mean square loses digits if the mean is large compared to the
    standard deviation, and centring values on their mean takes a second read. Instead, values are
    shifted by the mean of a few of them, which is known before the rest is read. Since these few
    count too, the variance is at least their share of the squared distance to the mean: little is
    lost even if they are outliers.

    Args:
        value: Float array, float32 or better.
        sample_axes: The axes to reduce; the few are a slice along the first of them.
        valid: Booleans that say which values count, broadcast against them; None for all. Where
            there are some, values are shifted by their mean, in a second read.

    Returns:
        The shifted values, 0 where they do not count; the mean, the variance, the mean of the
        shifted values; and the number of samples, an int, or with `valid` an array that broadcasts
        against the mean. Without samples, mean and variance are 0.
    """
    axis = sample_axes[0]
    if valid is None:
        count: Any = math.prod(value.shape[a] for a in sample_axes)
        few = jax.lax.slice_in_dim(value, 0, min(_FEW, value.shape[axis]), axis=axis)
        shift = few.mean(sample_axes, keepdims=True)
        value = value - shift
        rest = value.mean(sample_axes)
        squares = jnp.square(value).mean(sample_axes)
    else:
        shape = [n if a in sample_axes else valid.shape[a] for a, n in enumerate(value.shape)]
        count = jnp.broadcast_to(valid, shape).sum(sample_axes)
        some = jnp.maximum(count, 1).astype(value.dtype)
        total = jnp.where(valid, value, 0).sum(sample_axes, keepdims=True)
        shift = total / jnp.expand_dims(some, sample_axes)
        value = jnp.where(valid, value - shift, 0)
        rest = value.sum(sample_axes) / some
        squares = jnp.square(value).sum(sample_axes) / some
    var = jnp.maximum(squares - jnp.square(rest), 0)
    return value, jnp.squeeze(shift, sample_axes) + rest, var, rest, count


def pool(a: Pooled, b: Pooled) -> Pooled:
    """Moments of the union of two sets of samples, on host or device."""
    count = a.count + b.count
    share = b.count / count.clip(1)  # there may be no samples yet
    mean, step = union_means(a.mean, b.mean, share)
    second = union_second(a.var, b.var, step * step, share)
    return Pooled(count, mean, second * count)


def alive(mean: Any, var: Any) -> Any:
    """Which channels of a layer vary: not constant up to rounding, nor far below the others.

    Args:
        mean: Means of the channels, a JAX or NumPy array of float32 or better.
        var: Their variances.

    Returns:
        Booleans of the same shape.
    """
    floor = ROUNDINGS * np.finfo(mean.dtype).eps * abs(mean)
    return (var > _DEAD * var.max(initial=0)) & (var > floor * floor)


def coefficients(now: Pooled, goal: tuple[Any, Any], centre: bool | Array) -> tuple[Any, Any]:
    """The scale and shift that give a value its goal moments.

    A channel keeps scale 1 if its variance is zero up to rounding or below 1e-12 of the layer's
    largest, since no scale makes a constant vary. REPAIR still moves its mean to the goal.

    Args:
        now: Moments of the value, JAX or NumPy arrays, as the results are.
        goal: Mean and standard deviation that it should have.
        centre: Whether to correct the mean; the shift is 0 if not.

    Returns:
        Scale and shift.
    """
    mean, var = now.mean, now.var
    xp, (goal_mean, goal_std) = mean.__array_namespace__(), goal
    varies = alive(mean, var)
    scale = xp.where(varies, goal_std / xp.sqrt(xp.where(varies, var, 1)), 1)
    return scale, xp.where(centre, goal_mean - scale * mean, 0)


def covariance_of(
    first: tuple[Array, Array], second: tuple[Array, Array], count: Any = None
) -> Array:
    """Covariances `[n, m]` of two sites, each given as shifted values `[samples, n]` and means.

    Of the samples, `count` count and the others are 0; None if all count.
    """
    exact = jax.lax.Precision.HIGHEST
    count = len(first[0]) if count is None else jnp.maximum(count, 1).astype(first[0].dtype)
    shifted = jnp.matmul(first[0].T, second[0], precision=exact) / count
    return shifted - jnp.outer(first[1].reshape(-1), second[1].reshape(-1))


def union_means(old: PyTree, new: PyTree, share: float | Array) -> tuple[PyTree, PyTree]:
    """Means of the union of two sets of samples, and the second set's means less the first's.

    Args:
        old: Means of the first set, a tree of arrays.
        new: Those of the second.
        share: The second set's part of all samples.
    """
    steps = jax.tree.map(operator.sub, new, old)
    return jax.tree.map(lambda a, step: a + step * _part(share, a), old, steps), steps


def union_second(old: Array, new: Array, between: Array, share: float | Array) -> Array:
    """Second central moments of the union of two sets of samples (Chan, Golub and LeVeque 1979).

    Args:
        old: Variances or covariances of the first set.
        new: Those of the second.
        between: Products of the steps between the means: squares for variances, outer products for
            covariances.
        share: The second set's part of all samples.
    """
    part = _part(share, old)
    return old + (new - old) * part + between * (part * (1 - part))


def union_deviation(old: Any, new: Any, step: Any, share: float) -> Any:
    """As `union_second`, from and to square roots, whose squares need not be finite.

    Args:
        old: Standard deviations of the first set, NumPy arrays.
        new: Those of the second.
        step: Sizes of the steps between the means.
        share: The second set's part of all samples.
    """
    within = np.hypot(old * (1 - share) ** 0.5, new * share**0.5)
    return np.hypot(within, step * (share * (1 - share)) ** 0.5)


def _part(share: Any, like: Any) -> Any:
    """A share cast to the dtype that it multiplies; a Python float is weakly typed and adapts."""
    return share if isinstance(share, float) else share.astype(like.dtype)


def merge_moments(
    pooled: tuple[PyTree, PyTree], batch: tuple[PyTree, PyTree], share: float | Array
) -> tuple[PyTree, PyTree, PyTree]:
    """Means and variances of the union of two sets of samples.

    Args:
        pooled: Means and variances of the first set, two trees of one structure.
        batch: Those of the second.
        share: The second set's part of all samples.

    Returns:
        Means, variances, and the steps from the first set's means to the second's.
    """
    means, steps = union_means(pooled[0], batch[0], share)

    def var(old: Array, new: Array, step: Array) -> Array:
        return union_second(old, new, step * step, share)

    return means, jax.tree.map(var, pooled[1], batch[1], steps), steps


def without_rounding(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Variances, with zero in place of those within the rounding errors of the values."""
    floor = ROUNDINGS * np.finfo(var.dtype).eps * np.abs(mean)
    return np.where(var <= np.square(floor), 0, var)


# The largest exponent of two to scale by: float32 can represent the inverse as well.
_EXPONENT = 120


def scale_of(*arrays: Array) -> Array:
    """A power of two that brings the largest entry near one; scaling by it does not round."""
    largest = jnp.stack([jnp.abs(a).max(initial=0) for a in arrays]).max()
    largest = jnp.clip(jnp.where(largest == 0, 1, largest), 2.0**-_EXPONENT, 2.0**_EXPONENT)
    bits = jnp.finfo(largest.dtype)
    return 1 / jax.lax.reduce_precision(largest, bits.nexp, 0)
