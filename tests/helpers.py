"""What the tests of several rooms share: layers, variables, networks, and how close is equal.

All numbers are drawn by NumPy and compared by it: with JAX every shape would cost a compilation
per operation. Networks are traced once per process, as tracing again means compiling again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# ------------------------------------------------------------------------------------ comparisons


def assert_close(actual, expected, tol, least=0.0):
    """Equal up to a share of the largest entry of what is expected, taken as `least` or more."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tol * abs(expected).max(initial=least)
    )


def same_permutations(found, wanted):
    """The same groups, and the same order of each."""
    assert found.keys() == wanted.keys()
    for group in wanted:
        np.testing.assert_array_equal(found[group], wanted[group])


# ---------------------------------------------------------------------------------------- numbers


def random_permutations(spec, seed):
    """An order of every group."""
    rng = np.random.default_rng(seed)
    return {g: rng.permutation(n).astype(np.int32) for g, n in spec.sizes.items()}


def initial(module, x, seed=0):
    """What `module.init` gives, but for the numbers: nothing is compiled.

    Kernels keep the size of what passes, biases and means are 0, scales and variances 1. Trees of
    other seeds differ in the kernels (and in what else a module draws).
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("bias", "mean"):
            return np.zeros(leaf.shape, leaf.dtype)
        if name in ("scale", "var"):
            return np.ones(leaf.shape, leaf.dtype)
        inputs = max(int(np.prod(leaf.shape[:-1])), 1)
        return np.asarray(rng.normal(size=leaf.shape) / np.sqrt(inputs), leaf.dtype)

    with jax.numpy_rank_promotion("allow"):  # which Flax itself needs
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


# ----------------------------------------------------------------------------------------- layers


def along(v, x):
    """A vector along the last axis of x; implicit broadcasts raise."""
    return jnp.broadcast_to(v, x.shape)


def norm(p, x):
    """BatchNorm by stored statistics."""
    root = jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"]
    return (x - along(p["mean"], x)) * along(root, x) + along(p["bias"], x)


def conv(x, w, stride=1):
    """A padded convolution, channels last."""
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
