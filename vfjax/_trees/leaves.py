"""A leaf through an operation and back: types that JAX would change, and types without promotion.

Trees may hold more than JAX arrays: NumPy arrays of types that JAX narrows unless 64 bits are
enabled, arrays in another byte order, Python numbers. What an operation returns for a leaf is of
that leaf's type, so whoever computes on leaves asks here where, and in which type, to compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a Python number.

    Example:
        >>> is_number(2.0), is_number(np.float32(2.0))
        (True, False)
    """
    return type(leaf) in (bool, int, float, complex)


def is_wide(leaf: Any) -> bool:
    """Whether a leaf is NumPy's and of a type that JAX would narrow.

    Operations compute such leaves in NumPy, and so can arguments other than tracers.

    Example:
        >>> is_wide(np.ones(2, np.float64)), is_wide(np.ones(2, np.float32)), is_wide(jnp.ones(2))
        (True, False, False)
    """
    return (
        isinstance(leaf, (np.ndarray, np.generic))
        and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    )


def on_host(leaf: Any, *others: Any) -> bool:
    """Whether an operation on a leaf and other values is to be computed in NumPy.

    Args:
        leaf: The leaf, whose type the result is to have.
        others: What else takes part.

    Returns:
        Whether the leaf is a number or `is_wide`, and no other value is traced.

    Example:
        >>> on_host(np.ones(2), jnp.ones(2)), on_host(jnp.ones(2), np.ones(2)), on_host(0.5)
        (True, False, True)
    """
    wide = is_number(leaf) or is_wide(leaf)
    return wide and not any(isinstance(other, Tracer) for other in others)


def like_leaf(value: Any, leaf: Any) -> Any:
    """A value computed in NumPy, as what the leaf is: of its dtype, or a Python number.

    Args:
        value: A NumPy array or scalar.
        leaf: A leaf.

    Returns:
        A number for a number, a NumPy array for a leaf that `is_wide`, else a JAX array.

    Example:
        >>> like_leaf(np.float64(0.5), 2.0), like_leaf(np.ones(1), np.zeros(1, np.int64)).dtype
        (0.5, dtype('int64'))
    """
    if is_number(leaf):
        return type(leaf)(np.asarray(value)[()])
    value = np.asarray(value).astype(leaf.dtype, copy=False)
    return value if is_wide(leaf) else jnp.asarray(value)


def changed(leaf: Any, slot: int | None, change: Callable[[Any], Any]) -> Any:
    """A leaf, or a slice of it along its first axis, after a function of it.

    Args:
        leaf: The leaf.
        slot: Index of the slice; None for the whole leaf.
        change: A function of the leaf or slice in float32 or better, to the same number of values.

    Returns:
        A new leaf of the same type, unless what JAX would narrow is traced.

    Example:
        >>> changed(np.array([1.0, 2.0], np.float64), 1, lambda part: 3 * part)
        array([1., 6.])
    """
    if is_wide(leaf):
        part = leaf if slot is None else leaf[slot]
        value = change(part)
        if not isinstance(value, Tracer):
            new = np.array(leaf)
            new[... if slot is None else slot] = np.reshape(np.asarray(value), part.shape)
            return new
    leaf = jnp.asarray(leaf)
    part = leaf if slot is None else leaf[slot]
    value = jnp.asarray(change(part.astype(sum_type(leaf.dtype))))
    value = value.reshape(part.shape).astype(leaf.dtype)
    return value if slot is None else leaf.at[slot].set(value)


def sum_type(dtype: Any) -> np.dtype:
    """The type in which values of an inexact type are summed: float32 or better.

    Types of 8 bits and less do not promote, as JAX leaves it to its caller what they become.

    Example:
        >>> [sum_type(name).name for name in ("bfloat16", "float8_e4m3fn", "float64", "complex64")]
        ['float32', 'float32', 'float64', 'complex64']
    """
    dtype = jnp.dtype(dtype)
    small = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return np.dtype(np.float32) if small else np.promote_types(dtype, np.float32)


def native(leaf: Any) -> Any:
    """A leaf in this machine's byte order, the only one that JAX knows.

    Example:
        >>> native(np.ones(2, ">f4")).dtype == np.float32
        True
    """
    if not isinstance(leaf, (np.ndarray, np.generic)) or leaf.dtype.isnative:
        return leaf
    return leaf.astype(leaf.dtype.newbyteorder("="))


def as_numpy(leaf: Any) -> np.ndarray:
    """A leaf as a NumPy array in this machine's byte order; of random keys their data.

    Raises:
        TypeError: If JAX does not have its dtype.

    Example:
        >>> as_numpy(2.0), as_numpy(jax.random.key(7))
        (array(2.), array([0, 7], dtype=uint32))
    """
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = native(np.asarray(leaf))
    if not is_known(array.dtype):
        raise TypeError(f"JAX does not have the dtype {array.dtype}")
    return array


@functools.cache
def is_known(dtype: np.dtype) -> bool:
    """Whether JAX has a type, if perhaps a narrower one in its place.

    Example:
        >>> [is_known(np.dtype(name)) for name in ("int64", "U3", "O")]
        [True, False, False]
    """
    try:
        jnp.result_type(np.empty(0, dtype))
    except TypeError:
        return False
    return True
