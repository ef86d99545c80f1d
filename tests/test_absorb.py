"""Scales of norms where features are mixed: moved into layers before, measured after."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import align, merge, models, renorm, stats

KEY = jax.random.key(0)


def apply_fn(v, x):
    def norm(z, name):
        z = (z - v[f"{name}/mean"]) * jax.lax.rsqrt(v[f"{name}/var"] + 1e-5)
        return z * v[f"{name}/scale"] + v[f"{name}/shift"]

    h = jax.nn.relu(norm(x @ v["first"], "a"))
    return jax.nn.relu(norm(h @ v["second"] + v["bias"], "b")) @ v["head"]


def tree_of(seed):
    rng = np.random.default_rng(seed)
    tree = {"first": (5, 6), "second": (6, 4), "bias": (4,), "head": (4, 3)}
    tree = {name: rng.normal(size=size) for name, size in tree.items()}
    for name, n in (("a", 6), ("b", 4)):
        tree |= {f"{name}/mean": rng.normal(size=n), f"{name}/var": rng.uniform(0.5, 3, n)}
        tree |= {f"{name}/scale": rng.normal(size=n), f"{name}/shift": rng.normal(size=n)}
    return jax.tree.map(jnp.float32, tree)


@pytest.fixture(scope="module")
def pair():
    x = jax.random.normal(KEY, (200, 5))
    trees = [tree_of(0), tree_of(1)]
    return vfjax.trace(apply_fn, trees[0], x), trees, x


def test_absorbed_norms_compute_the_same(pair):
    net, trees, x = pair
    for tree in trees:
        new = renorm.absorb_norms(net, tree)
        np.testing.assert_allclose(net.run(new, x), net.run(tree, x), rtol=1e-4, atol=1e-4)
        for name in "ab":
            expected = np.sqrt(new[f"{name}/var"] + 1e-5)
            np.testing.assert_allclose(new[f"{name}/scale"], expected, rtol=1e-5)
        assert not np.allclose(new["first"], tree["first"])
        np.testing.assert_array_equal(new["head"], tree["head"])


def test_absorbing_twice_changes_nothing_more(pair):
    net, trees, _ = pair
    once = renorm.absorb_norms(net, trees[0])
    twice = renorm.absorb_norms(net, once)
    for path, leaf in once.items():
        np.testing.assert_allclose(twice[path], leaf, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet20", "vgg11-bn"])
def test_absorbed_models_compute_the_same(name):
    model = models.create(name, width=0.125)
    x = jax.random.normal(KEY, (8, 16, 16, 3))
    tree = jax.jit(model.init)(KEY, x)
    keys = iter(jax.random.split(KEY, 1000))
    tree = jax.tree.map(lambda a: a + 0.1 * jax.random.uniform(next(keys), a.shape), tree)
    net = vfjax.trace(models.apply_fn(model), tree, x)
    run = jax.jit(net.run)
    before, after = run(tree, x), run(renorm.absorb_norms(net, tree), x)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())


def test_shared_scales_stay(pair):
    """A norm whose scale serves another, too, is left alone, and so is one behind no layer."""

    def shared(v, x):
        def norm(z):
            return (z - v["mean"][None]) * jax.lax.rsqrt(v["var"][None] + 1e-5) * v["scale"][None]

        return norm(jax.nn.relu(norm(x @ v["w"])))

    tree = {"w": jnp.eye(3), "mean": jnp.ones(3), "var": jnp.ones(3), "scale": 2 * jnp.ones(3)}
    net = vfjax.trace(shared, tree, jnp.ones((2, 3)))
    assert len(net.norms) == 2
    new = renorm.absorb_norms(net, tree)
    assert all(np.array_equal(new[path], leaf) for path, leaf in tree.items())


@pytest.mark.parametrize("layers", [slice(None), slice(1, None)])
def test_norms_hand_on_the_averaged_deviations_of_the_mixtures(pair, layers):
    net, trees, x = pair
    absorbed = [renorm.absorb_norms(net, tree) for tree in trees]
    sites = ["first", "second", *stats.taps_by_site(net)]
    moments = stats.moments(net, absorbed, [x], sites=sites, covariance=sites)
    maps = align.cca_moments(net, moments)
    merged = merge.partial(net, absorbed, maps, merged=layers)
    new = renorm.reset(net, merged, [x], references=moments, maps=maps)
    _, found = new.run(x, capture=[norm.site for norm in net.norms])
    goals = maps.carry(moments).mixed()[1]
    for name, layer in (("a", "first"), ("b", "second")):
        (norm,) = (n for n in net.norms if n.layer == layer)
        z, trunk = np.asarray(found[norm.site]), jax.tree.map(np.asarray, new.trunk)
        # Without the epsilon, which takes a little more where variances are small.
        z = (z - trunk[f"{name}/mean"]) / np.sqrt(trunk[f"{name}/var"])
        std = (z * trunk[f"{name}/scale"]).std(0)
        np.testing.assert_allclose(std, goals[layer], rtol=1e-3)
    # Without references scales are what the maps made of them.
    plain = renorm.reset(net, merged, [x])
    np.testing.assert_array_equal(plain.trunk["a/scale"], merged.trunk["a/scale"])
    assert not np.allclose(plain.trunk["a/scale"], new.trunk["a/scale"], rtol=1e-2)
