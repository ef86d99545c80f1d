"""Moments per channel: of a batch, pooled over batches, and the correction that changes them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._types import Array, PyTree

# A channel below this fraction of its layer's largest variance counts as constant.
_DEAD = 1e-12
# So does one whose standard deviation is within this many roundings of its mean.
ROUNDINGS = 8
# Examples whose mean values are shifted by.
_FEW = 4


class Pooled(NamedTuple):
    """Moments of a value per channel.

    Attributes:
        count: Number of samples.
        mean: Shaped like the channels; float32 or better.
        m2: Sum of squared deviations from the mean, likewise.
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
    """Mean and variance over some axes, in one read of the values.

    The difference of a mean square and a squared mean loses its digits where the mean is large
    against the standard deviation, and centring values on their mean reads them once more. Instead
    they are shifted by the mean of a few of them, which is known before they are read. Since the
    few count too, the variance is at least their share of the squared distance to the mean: little
    is lost even if they are odd.

    Args:
        value: Float array, float32 or better.
        sample_axes: The axes to reduce; the first of them is cut to get at the few.

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
    """Moments of the union of two sets of samples (Chan, Golub and LeVeque 1979)."""
    count = a.count + b.count
    step = b.mean - a.mean
    share = b.count / count
    return Pooled(count, a.mean + step * share, a.m2 + b.m2 + step * step * (a.count * share))


def alive(mean: Any, var: Any) -> Any:
    """Which channels of a layer vary: neither constant to rounding nor far below the others.

    Args:
        mean: Means of the channels, a JAX or NumPy array of float32 or better.
        var: Their variances.

    Returns:
        Booleans, shaped likewise.
    """
    floor = ROUNDINGS * jnp.finfo(mean.dtype).eps * abs(mean)
    return (var > _DEAD * var.max()) & (var > floor * floor)


def coefficients(
    now: Pooled, goal: tuple[Array, Array], centre: bool | Array
) -> tuple[Array, Array]:
    """Scale and shift that give a value its goal moments.

    A channel keeps scale 1 if its variance is zero to rounding or below 1e-12 of the largest in the
    layer, since no scale makes a constant vary. REPAIR still moves its mean to the goal.

    Args:
        now: Moments of the value.
        goal: Mean and standard deviation that it should have.
        centre: Whether to correct the mean; the shift is 0 if not.

    Returns:
        Scale and shift.
    """
    mean, var = jnp.asarray(now.mean), jnp.asarray(now.var)
    goal_mean, goal_std = goal
    varies = alive(mean, var)
    scale = jnp.where(varies, goal_std / jnp.sqrt(jnp.where(varies, var, 1)), 1)
    return scale, jnp.where(centre, goal_mean - scale * mean, 0)


def covariance_of(first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """Covariances `[n, m]` of what `read` gave: shifted values `[samples, n]` and their means."""
    exact = jax.lax.Precision.HIGHEST
    found = jnp.matmul(first[0].T, second[0], precision=exact) / len(first[0])
    return found - jnp.outer(first[1].reshape(-1), second[1].reshape(-1))


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


def without_rounding(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Variances, zero where they are no larger than the rounding of the values themselves."""
    floor = ROUNDINGS * np.finfo(var.dtype).eps * np.abs(mean)
    return np.where(var <= np.square(floor), 0, var)


# The largest exponent of two by which values are scaled: float32 holds its inverse too.
_EXPONENT = 120


def scale_of(*arrays: Array) -> Array:
    """A power of two that brings the largest entry near one, so that it scales without rounding."""
    largest = jnp.stack([jnp.abs(a).max(initial=0) for a in arrays]).max()
    exponent = jnp.clip(jnp.frexp(largest)[1], -_EXPONENT, _EXPONENT)
    return jnp.ldexp(jnp.ones((), largest.dtype), -exponent)
