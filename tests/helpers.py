"""What the tests of several rooms share: layers, variables, networks, and how close is equal.

All numbers are drawn by NumPy and compared by it: with JAX every shape would cost a compilation
per operation. Networks are traced once per process, as tracing again means compiling again.
"""

from __future__ import annotations

import functools
import importlib.util
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from vfjax._analysis import from_propagation
from vfjax._jaxpr import flatten
from vfjax._propagate import propagate
from vfjax._trees import leaf_paths
from vfjax.symmetry import check_spec

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


def normal(seed, *shape):
    """Normal numbers as a JAX array, in float32; nothing is compiled."""
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


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


def infer(fn, variables, x):
    """The spec of `fn(variables, x)`."""
    (leaves, treedef), (inputs, x_treedef) = map(jax.tree.flatten, (variables, x))

    def flat(*args):
        split = len(leaves)
        return fn(
            jax.tree.unflatten(treedef, args[:split]), jax.tree.unflatten(x_treedef, args[split:])
        )

    graph = flatten(jax.make_jaxpr(flat)(*leaves, *inputs), len(leaves))
    return from_propagation(propagate(graph), leaf_paths(variables))[0]


def randomised(variables, seed=2):
    """Random numbers in every leaf: initial biases of 0 would hide what is not permuted."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        noise = rng.standard_normal(leaf.shape) * 0.5
        noise = np.abs(noise) + 0.5 if "var" in name else noise + (leaf.ndim == 1)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def change(fn, variables, x, spec, key=0):
    """Largest change of the output under random permutations, relative to its size."""
    fn = jax.jit(fn)
    net = types.SimpleNamespace(spec=spec, run=fn)
    size = max(float(jnp.abs(out).max()) for out in jax.tree.leaves(fn(variables, x)))
    return check_spec(net, variables, x, key=jax.random.key(key)) / size


def draw(tree, seed=0):
    """Random leaves, variances positive."""

    def leaf(path, a):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a if not isinstance(a, jax.ShapeDtypeStruct) else jnp.zeros(a.shape, a.dtype)
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([seed, sum(name.encode())])
        noise = rng.standard_normal(a.shape)
        return jnp.asarray(abs(noise) + 0.5 if "var" in name else noise, a.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def of_shapes(shapes, seed):
    """Random leaves of given shapes: kernels like a network's, variances positive."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name, value = path[-1].key, rng.normal(size=shape)
        if name == "var":
            value = 0.5 + np.square(value)
        elif name == "scale":
            value = 1 + 0.2 * value
        elif len(shape) > 1:
            value = value * (2 / np.prod(shape[:-1])) ** 0.5
        else:
            value = 0.3 * value
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=_is_shape)


def lively(shapes, seed):
    """Random leaves of given shapes with no unit that is dead on data, and so like any other.

    Biases and means are small, and weights sum to zero, so that positive means of inputs cancel.
    """
    rng = np.random.default_rng(seed)
    tree = {p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}
    sums = {p: v.mean(tuple(range(v.ndim - 1)), keepdims=True) for p, v in tree.items()}
    tree = {p: v - sums[p] if v.ndim > 1 else v for p, v in tree.items()}
    scale = {p: 0.1 if v.ndim == 1 else np.prod(v.shape[:-1]) ** -0.5 for p, v in tree.items()}
    tree = {p: v * np.float32(scale[p]) for p, v in tree.items()}
    return {p: np.abs(v) + np.float32(0.5) if p == "var" else v for p, v in tree.items()}


def close(a, b, rtol=1e-5):
    """Equality up to float32 rounding of sums, relative to the largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * (1e-6 + abs(y).max(initial=0)))


def _is_shape(node):
    return type(node) is tuple


_TRACED = {}


def traced(fn, shapes, x):
    """The network of a function, by the shapes of its variables and of its input, in float32.

    Kept by all three, for all tests of a process.
    """
    key = fn, repr(shapes), x
    if key not in _TRACED:
        like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        variables = jax.tree.map(like, shapes, is_leaf=_is_shape)
        _TRACED[key] = vfjax.trace(fn, variables, like(x))
    return _TRACED[key]


def mlp(v, x):
    for k in range(2):
        x = jax.nn.relu(x @ v[f"w{k}"] + v[f"b{k}"][None])
    return x @ v["w2"]


def convnet(v, x):
    """Two convolutions, one with stored statistics, a flattened map, a dense layer and a head."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, v["k0"], (1, 1), "SAME", dimension_numbers=dims)
    spread = jax.lax.rsqrt(v["var"] + 1e-5)
    x = jax.nn.relu((x - v["mean"][None, None, None]) * spread[None, None, None])
    x = jax.nn.relu(
        jax.lax.conv_general_dilated(x, v["k1"], (2, 2), "SAME", dimension_numbers=dims)
    )
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ v["d0"]) @ v["d1"]


def normed_convnet(v, x):
    """Two convolutions with stored statistics, a flattened map, a dense layer and a head."""
    for k in range(2):
        x = conv(x, v[f"k{k}"])
        row = {name: v[f"{name}{k}"][None, None, None] for name in ("mean", "var", "scale", "bias")}
        x = (x - row["mean"]) * jax.lax.rsqrt(row["var"] + 1e-5)
        x = jax.nn.relu(x * row["scale"] + row["bias"])
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ v["d0"]) @ v["d1"]


def resnet(v, x):
    """A stream of one width, two blocks with identity skips, channels last."""
    h = jax.nn.relu(x @ v["stem"])
    for k in range(2):
        h = jax.nn.relu(h + jax.nn.relu(h @ v[f"a{k}"]) @ v[f"b{k}"])
    return h @ v["head"]


# -------------------------------------------------------------------------------------- similarity


def correlations(moments, group):
    """Correlations `[K n, K n]` of all models' units, averaged over the sites of a group.

    Units that never vary have none.
    """
    found = []
    for site, axes in moments.axes:
        if [axis.group for axis in axes] == [group] and site in moments.covariance:
            std = np.asarray(moments.std[site], np.float64).ravel()
            blocks = np.asarray(moments.covariance[site], np.float64)
            whole = np.concatenate([np.concatenate(list(row), 1) for row in blocks])
            scale = np.outer(std, std)
            found.append(np.divide(whole, scale, out=np.zeros_like(scale), where=scale > 0))
    return np.mean(found, axis=0)


# ----------------------------------------------------------------------------------------- programs


class Compilations:
    """Counts compilations in a `with` block."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, *_, **__):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def take_road(monkeypatch, backend):
    """Chooses between ways to compute as on another backend, and computes on this one.

    A network that was traced before may have programs that were compiled for the other way.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: backend)


def without(monkeypatch, *packages, there=()):
    """Makes packages look as if they were not installed, and others as if they were."""
    find = importlib.util.find_spec

    def found(name, *more):
        return None if name in packages else name in there or find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", found)
