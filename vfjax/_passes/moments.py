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
        count: Number of samples.
        mean: Shaped like the channels; float32 or better.
        m2: Sum of squared deviations from the mean; same shape and dtype.
    """

    count: Any
    mean: Any
    m2: Any

    @property
    def var(self) -> Any:
        """Population variance."""
        return self.m2 / self.count


def moments_of(value: Array, sample_axes: tuple[int, ...]) -> Pooled:
    """Moments of one batch."""
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    count = math.prod(value.shape[a] for a in sample_axes)
    _, mean, var, _ = shifted_moments(value, sample_axes)
    return Pooled(jnp.asarray(count, mean.dtype), mean, var * count)


def shifted_moments(
    value: Array, sample_axes: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    """Mean and variance over some axes, reading the values once.

    Subtracting a squared mean from a mean square loses digits if the mean is large compared to the
    standard deviation, and centring values on their mean takes a second read. Instead, values are
    shifted by the mean of a few of them, which is known before the rest is read. Since these few
    count too, the variance is at least their share of the squared distance to the mean: little is
    lost even if they are outliers.

    Args:
        value: Float array, float32 or better.
        sample_axes: The axes to reduce; the few are a slice along the first of them.

    Returns:
        The shifted values, the mean, the variance, and the mean of the shifted values.
    """
    axis = sample_axes[0]
    few = jax.lax.slice_in_dim(value, 0, min(_FEW, value.shape[axis]), axis=axis)
    shift = few.mean(sample_axes, keepdims=True)
    value = value - shift
    rest = value.mean(sample_axes)
    var = jnp.maximum(jnp.square(value).mean(sample_axes) - jnp.square(rest), 0)
    return value, jnp.squeeze(shift, sample_axes) + rest, var, rest


def pool(a: Pooled, b: Pooled) -> Pooled:
    """Moments of the union of two sets of samples, on host or device."""
    count = a.count + b.count
    mean, step = union_means(a.mean, b.mean, b.count / count)
    second = union_second(a.var, b.var, step * step, b.count / count)
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
    return (var > _DEAD * var.max()) & (var > floor * floor)


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


def covariance_of(first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """Covariances `[n, m]` of two sites, each given as shifted values `[samples, n]` and means."""
    exact = jax.lax.Precision.HIGHEST
    shifted = jnp.matmul(first[0].T, second[0], precision=exact) / len(first[0])
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
