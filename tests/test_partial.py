"""Partial merges: stems, trunk and heads, and the maps between their bases."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import merge
from vfjax.align import Maps

ROUNDING = 2e-5


def close(actual, expected, tol=ROUNDING):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * abs(expected).max(initial=1e-9))


def along(v, x):
    return jnp.broadcast_to(v, x.shape)


def norm(p, x):
    root = jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"]
    return (x - along(p["mean"], x)) * along(root, x) + along(p["bias"], x)


def dense(x, w, b):
    x = x @ w
    return x + along(b, x)


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def mlp(v, x):
    for i in (1, 2, 3):
        x = jax.nn.relu(dense(x, v[f"w{i}"], v[f"b{i}"]))
    return dense(x, v["w4"], v["b4"])


def chain(v, x):
    for i in (1, 2, 3):
        x = jax.nn.relu(norm(v[f"n{i}"], conv(x, v[f"w{i}"])))
    return dense(x.mean((1, 2)), v["w4"], v["b4"])


def residual(v, x):
    x = jax.nn.relu(norm(v["n0"], conv(x, v["w0"])))
    for i in (1, 3):
        y = jax.nn.relu(norm(v[f"n{i}"], conv(x, v[f"w{i}"])))
        x = jax.nn.relu(x + norm(v[f"n{i + 1}"], conv(y, v[f"w{i + 1}"])))
    return x.mean((1, 2)) @ v["w5"]


def attention(v, x):
    x = x @ v["embed"]
    q, k, u = (jnp.einsum("btd,dhe->bthe", x, v[name]) for name in "qku")
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k), axis=-1)
    x = x + jnp.einsum("bhts,bshe->bthe", scores, u).reshape(*x.shape[:2], -1) @ v["o"]
    x = x + jax.nn.gelu(x @ v["m1"]) @ v["m2"]
    return x.mean(1) @ v["head"]


def normal(rng, *shape):
    return jnp.asarray(
        rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 1)), jnp.float32
    )


def norms(rng, n):
    return {
        "mean": 0.1 * normal(rng, n),
        "var": 0.5 + jnp.abs(normal(rng, n)),
        "scale": 1 + 0.1 * normal(rng, n),
        "bias": 0.1 * normal(rng, n),
    }


def draw(name, seed, classes=3):
    rng = np.random.default_rng([seed, len(name)])
    if name == "mlp":
        sizes = (4, 6, 7, 5, classes)
        found = {
            f"w{i}": normal(rng, a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes), 1)
        }
        return found | {f"b{i}": 0.1 * normal(rng, n) for i, n in enumerate(sizes[1:], 1)}
    if name == "chain":
        sizes = (2, 4, 5, 6)
        found = {
            f"w{i}": normal(rng, 3, 3, a, b)
            for i, (a, b) in enumerate(itertools.pairwise(sizes), 1)
        }
        found |= {f"n{i}": norms(rng, n) for i, n in enumerate(sizes[1:], 1)}
        return found | {"w4": normal(rng, 6, classes), "b4": normal(rng, classes)}
    if name == "residual":
        sizes = [(2, 5), (5, 4), (4, 5), (5, 6), (6, 5)]
        found = {f"w{i}": normal(rng, 3, 3, *s) for i, s in enumerate(sizes)}
        found |= {f"n{i}": norms(rng, s[1]) for i, s in enumerate(sizes)}
        return found | {"w5": normal(rng, 5, classes)}
    shapes = {"embed": (3, 8), "o": (8, 8), "m1": (8, 6), "m2": (6, 8), "head": (8, classes)}
    shapes |= dict.fromkeys("qku", (8, 2, 4))
    return {key: normal(rng, *shape) for key, shape in shapes.items()}


APPLY = {"mlp": mlp, "chain": chain, "residual": residual, "attention": attention}
INPUT = {"mlp": (5, 4), "chain": (5, 6, 6, 2), "residual": (5, 6, 6, 2), "attention": (5, 4, 3)}
_NETS = {}


def case(name, models=2):
    x = jax.random.normal(jax.random.key(3), INPUT[name])
    trees = [draw(name, seed) for seed in range(models)]
    if name not in _NETS:
        _NETS[name] = vfjax.trace(APPLY[name], trees[0], x)
    return _NETS[name], trees, x


def slices(depth):
    return [slice(a, b) for a in range(depth + 1) for b in range(a, depth + 1)]


@pytest.fixture(params=list(APPLY))
def name(request):
    return request.param


def test_merging_a_model_with_itself_changes_nothing(name):
    net, (tree, _), x = case(name)
    expected = net.run(tree, x)
    for merged in slices(net.depth):
        model = merge.partial(net, [tree, tree, tree], merged=merged)
        out = model(x)
        assert model.merged == merged
        if merged.stop == net.depth:
            close(out, expected)
        else:
            assert len(out) == 3
            for found in out:
                close(found, expected)


def test_preserve_first_is_the_case_without_heads(name):
    net, trees, x = case(name)
    for layers in range(net.depth + 1):
        ours = merge.partial(net, trees, merged=slice(layers, None), alpha=0.25)
        theirs = merge.preserve_first(net, trees, layers=layers, weights=(0.75, 0.25))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def zip_of(name, models=2):
    """Every group's features merged at random, within models and between them."""
    net, trees, x = case(name, models)
    rng = np.random.default_rng(1)
    labels = {
        group: rng.permutation(
            np.concatenate([np.arange(n), rng.integers(n, size=(models - 1) * n)])
        )
        for group, n in net.spec.sizes.items()
    }
    return net, trees, x, Maps.of_labels(labels, models)


def test_zips_merge_every_range_of_layers(name):
    net, trees, x, found = zip_of(name)
    assert found.mixed
    for merged in slices(net.depth):
        model = merge.partial(net, trees, found, merged=merged)
        if found.unknown(net) & net.trunk_leaves(merged.start, merged.stop):
            with pytest.raises(ValueError, match=r"renorm\.reset"):
                model(x)
            continue
        for out in jax.tree.leaves(model(x)):
            assert out.shape == net.run(trees[0], x).shape and np.isfinite(out).all()


def test_nothing_merged_returns_every_models_own_outputs(name):
    net, trees, x, found = zip_of(name)
    for maps in (None, found):
        model = merge.partial(net, trees, maps, merged=slice(None, 0))
        assert model.cut == model.end == 0 and not model.stems
        for out, tree in zip(model(x), trees, strict=True):
            np.testing.assert_array_equal(out, net.run(tree, x))
