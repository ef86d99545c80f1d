"""Norms in the units of their output: what makes maps that mix features right before a norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vfjax
from vfjax import align, merge, renorm, stats
from vfjax._maps import spread_of


def network(activation, *, has_scale=True):
    """A dense layer, a BatchNorm, an activation, and a dense layer."""

    def apply_fn(v, x):
        mean, var, bias = (v[name][None] for name in ("mean", "var", "bias"))
        scale = v["scale"][None] if has_scale else 1
        u = (x @ v["w"] - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias
        return activation(u) @ v["head"]

    return apply_fn


def tree(seed, x, *, width=6):
    """A model whose stored statistics are those of the data."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(x.shape[1], width))
    found = {
        "w": w,
        "mean": (x @ w).mean(0),
        "var": (x @ w).var(0),
        "scale": rng.normal(size=width),
        "bias": rng.normal(size=width),
        "head": rng.normal(size=(width, 3)),
    }
    return jax.tree.map(jnp.float32, found)


@pytest.fixture
def x():
    return jnp.float32(np.random.default_rng(0).normal(size=(200, 6)) @ np.diag([1, 2, 3, 1, 1, 5]))


def dense(seed, n=6):
    """The second model's features are rotated."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return align.Maps(({}, {"w": (np.float32(rotation), np.float32(rotation.T))}))


def test_units_keep_the_function(x):
    model = tree(1, x)
    # A channel that the norm silences, one that it mirrors, one that hardly varies.
    model["scale"] = model["scale"].at[:3].set(jnp.float32([0, -2, 1e-4]))
    net = vfjax.trace(network(jax.nn.relu), model, x)
    found = dense(0).in_units(net, model)
    before, after = net.run(model, x), net.run(found, x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
    np.testing.assert_allclose(found["scale"][3:], np.abs(model["scale"][3:]), rtol=1e-6)


def test_permutations_leave_units_as_they_are(x):
    model = tree(1, x)
    net = vfjax.trace(network(jax.nn.relu), model, x)
    maps = align.Maps.of_permutations([None, {"w": [1, 0, 2, 3, 4, 5]}])
    assert maps.in_units(net, model) is model


def test_a_mixed_linear_model_keeps_its_function(x):
    """Without an activation the features behind the norm are mixed and unmixed exactly."""
    models = [tree(1, x), tree(2, x)]
    net = vfjax.trace(network(lambda u: u), models[0], x)
    moments = stats.moments(net, models, [x], sites="taps", covariance=True)
    maps = align.with_spreads(dense(3), net, moments)
    mapped = maps.apply(net, models)[1]
    assert mapped["var"] is None
    before, after = net.run(models[1], x), net.run(renorm.reset(net, mapped, [x]), x)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3 * np.abs(before).max())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), has_scale=st.booleans())
def test_units_before_the_norm_do_not_count(seed, has_scale):
    """What a norm takes away cannot decide what a merge becomes."""
    rng = np.random.default_rng(seed)
    x = jnp.float32(rng.normal(size=(100, 6)))
    a, b = tree(seed, x), tree(seed + 1, x)
    unit = jnp.float32(rng.uniform(0.2, 5, size=6))
    other = b | {"w": b["w"] * unit[None], "mean": b["mean"] * unit}
    # So that eps counts alike.
    other["var"] = (b["var"] + 1e-5) * unit**2 - 1e-5
    net = vfjax.trace(network(jax.nn.relu, has_scale=has_scale), a, x)
    outputs = []
    for second in (b, other):
        moments = stats.moments(net, [a, second], [x], sites="taps", covariance=True)
        maps = align.with_spreads(dense(seed), net, moments)
        merged = renorm.reset(net, merge.interpolate(maps.apply(net, [a, second])), [x])
        outputs.append(net.run(merged, x))
    np.testing.assert_allclose(*outputs, rtol=1e-2, atol=1e-2 * np.abs(outputs[0]).max())


def test_a_cut_before_the_norm_mixes_in_the_same_units(x):
    """In a chain, averaging the first layer or its outputs is the same, through maps too."""
    models = [tree(1, x), tree(2, x)]
    net = vfjax.trace(network(jax.nn.relu), models[0], x)
    maps = align.cca(net, models, [x])
    whole, cut = (
        renorm.reset(net, merge.partial(net, models, maps, span=slice(layers, None)), [x])(x)
        for layers in (0, 1)
    )
    np.testing.assert_allclose(cut, whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 5), m=st.integers(1, 5))
def test_spreads_are_those_of_mixed_samples(seed, n, m):
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(50, n)) @ rng.normal(size=(n, n))
    mix = rng.normal(size=(m, n))
    most = np.abs(mix) @ samples.std(0)
    found = spread_of(mix, np.cov(samples.T, bias=True).reshape(n, n))
    np.testing.assert_allclose(found * most, (samples @ mix.T).std(0), rtol=1e-6)


def test_features_that_do_not_vary_have_no_spread_to_lose():
    assert spread_of(np.ones((1, 2)), np.zeros((2, 2))).tolist() == [1.0]
