"""Tests of transport: what plans do to networks, of equal widths and of different ones."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import vfjax
from vfjax import align, merge, stats


def mlp(v, x):
    for k in range(2):
        x = jax.nn.relu(x @ v[f"w{k}"] + v[f"b{k}"][None])
    return x @ v["w2"] + v["b2"][None]


def convnet(v, x):
    """Convolutions with running statistics, a flattened map, a dense layer and a head."""
    for k in range(2):
        x = jax.lax.conv_general_dilated(
            x, v[f"k{k}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        row = {name: v[f"{name}{k}"][None, None, None] for name in ("mean", "var", "scale", "bias")}
        x = (x - row["mean"]) * jax.lax.rsqrt(row["var"] + 1e-5)
        x = jax.nn.relu(x * row["scale"] + row["bias"])
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ v["d0"]) @ v["d1"]


def resnet(v, x):
    h = jax.nn.relu(x @ v["stem"])
    for k in range(2):
        h = jax.nn.relu(h + jax.nn.relu(h @ v[f"a{k}"]) @ v[f"b{k}"])
    return h @ v["head"]


SHAPES = {
    mlp: {"w0": (6, 16), "b0": (16,), "w1": (16, 12), "b1": (12,), "w2": (12, 4), "b2": (4,)},
    convnet: {"k0": (3, 3, 3, 8), "k1": (3, 3, 8, 12), "d0": (4 * 4 * 12, 10), "d1": (10, 4)}
    | {f"{name}{k}": (8 + 4 * k,) for name in ("mean", "var", "scale", "bias") for k in range(2)},
    resnet: {"stem": (12, 16), "a0": (16, 24), "b0": (24, 16), "a1": (16, 24), "b1": (24, 16)}
    | {"head": (16, 4)},
}
INPUTS = {mlp: (6,), convnet: (4, 4, 3), resnet: (12,)}
FUNCTIONS = list(SHAPES)


def make(apply_fn, seed):
    rng = np.random.default_rng(seed)
    tree = {}
    for path, shape in SHAPES[apply_fn].items():
        leaf = rng.normal(size=shape)
        if len(shape) > 1:
            # Weights that sum to zero, so that no unit is dead on all of the data.
            leaf -= leaf.mean(tuple(range(leaf.ndim - 1)), keepdims=True)
            leaf /= np.sqrt(np.prod(shape[:-1]))
        else:
            leaf *= 0.1
        leaf += path.startswith("scale")
        tree[path] = np.float32(abs(leaf) + 0.5 if path.startswith("var") else leaf)
    return tree


@functools.cache
def traced(apply_fn):
    return vfjax.trace(apply_fn, make(apply_fn, 0), batches(apply_fn)[0])


@functools.cache
def batches(apply_fn):
    rng = np.random.default_rng(9)
    return [np.float32(rng.normal(size=(n, *INPUTS[apply_fn]))) for n in (120, 70)]


def merged(net, trees, found):
    return merge.interpolate(found.apply(net, trees))


def find(net, trees, on, apply_fn, **options):
    data = batches(apply_fn) if on == "activations" else None
    return align.transport(net, trees, data, on=on, **options)


@pytest.mark.parametrize("on", ["activations"])
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_a_network_is_left_as_it_is_by_itself(apply_fn, on):
    net, tree = traced(apply_fn), make(apply_fn, 0)
    found = find(net, [tree, tree], on, apply_fn)
    assert found.maps[0] == {}
    assert found.maps[1].keys() == net.spec.groups.keys()
    for pair in found.maps[1].values():
        for matrix in pair:
            np.testing.assert_array_equal(matrix, np.eye(len(matrix)))


@pytest.mark.parametrize("on", ["activations"])
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_permuted_copies_are_put_back(apply_fn, on):
    net, tree = traced(apply_fn), make(apply_fn, 0)
    moved = [net.spec.random(jax.random.key(seed)) for seed in (1, 2)]
    trees = [tree, *(net.spec.permute(tree, p) for p in moved)]
    found = find(net, trees, on, apply_fn)
    for maps, permutation in zip(found.maps[1:], moved, strict=True):
        for group, places in permutation.items():
            matrix, back = maps[group]
            np.testing.assert_array_equal(matrix.argmax(1), np.argsort(places))
            np.testing.assert_array_equal(back, matrix.T)
    for path, leaf in merged(net, trees, found).items():
        np.testing.assert_allclose(leaf, tree[path], rtol=1e-6)


def test_moments_serve_all_models():
    net = traced(mlp)
    trees = [make(mlp, seed) for seed in range(3)]
    moments = stats.moments(net, trees, batches(mlp), sites="taps", covariance="cross")
    found = align.transport_moments(net, moments)
    for model in (1, 2):
        alone = align.transport(net, [trees[0], trees[model]], batches(mlp))
        for group, (matrix, _) in alone.maps[1].items():
            np.testing.assert_array_equal(matrix, found.maps[model][group][0])
