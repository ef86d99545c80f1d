"""Tests of the streaming statistics: laws against NumPy over the concatenated data."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vfjax
from helpers import Compilations, take_road
from vfjax import stats

# Two passes in float32 over a few thousand samples of order one.
RTOL = 2e-5


class Conv(nn.Module):
    """Two convolutions, one of them strided, and a head; with or without BatchNorm."""

    norm: bool = False

    @nn.compact
    def __call__(self, x):
        for width, stride in ((6, 1), (8, 2)):
            x = nn.Conv(width, (3, 3), strides=stride)(x)
            if self.norm:
                x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.relu(x)
        return nn.Dense(3)(x.mean((1, 2)))


class Residual(nn.Module):
    """A stem, a block with an identity skip, a layer with a projection around it, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(4, (3, 3), name="a1")(x))
        x = nn.relu(x + nn.Conv(6, (3, 3), name="a2")(y))
        y = nn.relu(nn.Dense(7, name="b1")(x))
        x = nn.relu(nn.Dense(8, name="b0")(x) + nn.Dense(8, name="b2")(y))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def _make(model, count=2, seed=0, shape=(4, 8, 8, 3)):
    """A traced network, `count` trees with random values everywhere, and NumPy inputs."""
    rng = np.random.default_rng(seed)
    x = jnp.zeros(shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def draw(leaf):
        # Of the order of one through any layer; positive, for the sake of variances.
        width = np.sqrt(np.prod(leaf.shape[:-1]))
        return (rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-1, 1], leaf.shape)).astype(
            leaf.dtype
        ) / width.astype(leaf.dtype)

    def fill(path, leaf):
        return np.abs(draw(leaf)) if path[-1].key == "var" else draw(leaf)

    trees = [jax.tree_util.tree_map_with_path(fill, shapes) for _ in range(count)]
    net = vfjax.trace(lambda v, x: model.apply(v, x), trees[0], x)
    return net, trees, rng.normal(size=(37, *shape[1:])).astype(x.dtype)


@functools.cache
def conv():
    return _make(Conv())


@functools.cache
def residual():
    return _make(Residual())


def _normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def _cut(data, *sizes):
    return np.split(data, np.cumsum(sizes)[:-1]) if sizes else [data]


def _values(net, tree, data, site):
    """A site's value in one evaluation of all data, in float64."""
    run = jax.jit(lambda v, x: net.run(v, x, capture=[site])[1][site])
    return np.asarray(run(tree, data), np.float64)


def _close(found, wanted, rtol=RTOL):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


@pytest.mark.parametrize("sizes", [(37,), (16, 16, 5), (1, 36)])
def test_moments_are_those_of_the_concatenated_data(sizes):
    net, trees, data = conv()
    found = stats.moments(net, trees, _cut(data, *sizes), sites="all")
    assert found.sites == tuple(layer.name for layer in net.layers)
    assert found.models == 2
    names = [layer.name for layer in net.layers]
    run = jax.jit(lambda v: net.run(v, data, capture=names)[1])
    for k, tree in enumerate(trees):
        values = run(tree)
        for layer in net.layers:
            value = np.asarray(values[layer.name], np.float64)
            _close(found.mean[layer.name][k], value.mean(layer.sample_axes))
            _close(found.var[layer.name][k], value.var(layer.sample_axes))
            _close(found.std[layer.name][k], value.std(layer.sample_axes))
            assert found.count[layer.name] == value.size / layer.channels


def test_order_of_batches_is_irrelevant():
    net, trees, data = conv()
    parts = _cut(data, 16, 16, 5)
    one = stats.moments(net, trees, parts, sites="taps", covariance=True)
    two = stats.moments(net, trees, parts[::-1], sites="taps", covariance=True)
    jax.tree.map(_close, one, two)


def test_labels_are_dropped():
    net, trees, data = conv()
    one = stats.moments(net, trees, [data])
    two = stats.moments(net, trees, [(data, np.zeros(len(data)))])
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("count", [1, 3])
def test_several_models_are_measured_as_one_by_one(count):
    net, trees, data = _make(Conv(norm=True), count)
    together = stats.moments(net, trees, _cut(data, 20, 17))
    for k, tree in enumerate(trees):
        alone = stats.moments(net, [tree], _cut(data, 20, 17))
        for site in together.sites:
            _close(together.mean[site][k], alone.mean[site][0])
            _close(together.var[site][k], alone.var[site][0])


def _tap_matrices(net, tree, data):
    """The features of every tap in float64, samples by features."""
    names = [tap.name for tap in net.taps]
    values = jax.jit(lambda v, x: net.run(v, x, capture=names)[1])(tree, data)
    found = {}
    for tap in net.taps:
        value = np.asarray(values[tap.name], np.float64)
        shape, n = value.shape, net.spec.sizes[tap.group]
        value = value.reshape(*shape[: tap.axis], tap.outer, n, tap.inner, *shape[tap.axis + 1 :])
        found[tap.name] = np.moveaxis(value, tap.axis + 1, -1).reshape(-1, n)
    return found


@pytest.mark.parametrize("make", [conv, residual])
@pytest.mark.parametrize("sizes", [(16, 16, 5)])
def test_covariances_are_those_of_the_concatenated_data(make, sizes):
    net, trees, data = make()
    full = stats.moments(net, trees, _cut(data, *sizes), sites="taps", covariance=True)
    cross = stats.moments(net, trees, _cut(data, *sizes), sites="taps", covariance="cross")
    assert set(full.covariance) == {tap.name for tap in net.taps}
    one, two = (_tap_matrices(net, tree, data) for tree in trees)
    for tap in net.taps:
        n = net.spec.sizes[tap.group]
        a, b = one[tap.name], two[tap.name]
        wanted = np.cov(a.T, b.T, bias=True).reshape(2, n, 2, n).transpose(0, 2, 1, 3)
        _close(full.covariance[tap.name], wanted)
        _close(full.mean[tap.name], [a.mean(0), b.mean(0)])
        _close(full.var[tap.name], np.einsum("kkaa->ka", wanted))
        for i, j in ((0, 1), (1, 0)):
            _close(cross.covariance[tap.name][i, j], wanted[i, j])
        assert np.isnan(cross.covariance[tap.name][0, 0]).all()
        assert full.count[tap.name] == len(a)


def test_three_models_have_covariances_between_all_pairs():
    net, trees, data = _make(Conv(), 3)
    found = stats.moments(net, trees, _cut(data, 20, 17), sites="taps", covariance="cross")
    tap = net.taps[1]
    matrices = [_tap_matrices(net, tree, data)[tap.name] for tree in trees]
    centred = [m - m.mean(0) for m in matrices]
    for i in range(3):
        for j in range(3):
            if i != j:
                wanted = centred[i].T @ centred[j] / len(centred[i])
                _close(found.covariance[tap.name][i, j], wanted)


def test_covariance_adds_taps_to_other_sites_and_sites_of_ones_choice():
    net, trees, data = conv()
    found = stats.moments(net, trees, [data], covariance=True)
    taps = tuple(tap.name for tap in net.taps)
    assert found.sites == (*stats.resolve_sites(net, "paper"), *taps)
    assert tuple(found.covariance) == taps
    mixed = stats.moments(net, trees, [data], sites=["input", taps[0]], covariance="cross")
    assert tuple(mixed.covariance) == (taps[0],)
    name = net.layers[0].name
    chosen = stats.moments(net, trees, [data], sites=[name], covariance=[name])
    value = _values(net, trees[0], data, name).reshape(-1, 6)
    _close(chosen.covariance[name][0, 0], np.cov(value.T, bias=True))
    assert stats.moments(net, trees, [data]).covariance is None


def test_large_means_lose_nothing():
    """With means of 300 standard deviations, sums of squares would be off by half a per cent."""

    def apply_fn(v, x):
        return (x @ v["a"] + v["shift"][None]) @ v["b"]

    rng = np.random.default_rng(0)
    v = {"a": _normal(rng, 5, 8), "shift": 1e3 + _normal(rng, 8), "b": _normal(rng, 8, 2)}
    x = _normal(rng, 3000, 5)
    net = vfjax.trace(apply_fn, v, x[:10])
    w = {**v, "shift": -v["shift"]}
    found = stats.moments(net, [v, w], _cut(x, 900, 900, 900, 300), sites="taps", covariance=True)
    site = net.taps[0].name
    a, b = (np.asarray(x, np.float64) @ np.asarray(u["a"]) + np.asarray(u["shift"]) for u in (v, w))
    wanted = np.cov(a.T, b.T, bias=True).reshape(2, 8, 2, 8).transpose(0, 2, 1, 3)
    # The values themselves are rounded to 1e3 * 6e-8, a standard deviation being about 2.
    _close(found.covariance[site], wanted, 1e-4)
    _close(found.var[site][0], a.var(0), 1e-4)
    _close(found.mean[site][0], a.mean(0), 1e-6)


@pytest.mark.parametrize("wrap", [list, iter])
def test_means_that_grow_large_later_lose_nothing_either(wrap):
    """The first samples, from which the others are shifted by 1000, are far from typical."""
    rng = np.random.default_rng(0)
    x = _normal(rng, 3000, 4)
    x[2:] += 1000
    v = {"a": _normal(rng, 4, 3), "b": _normal(rng, 3, 2)}
    net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], v, x[:2])
    found = stats.moments(net, [v], wrap(_cut(x, 2, 1499, 1499)), sites=["input"])
    _close(found.var["input"][0], np.float64(x).var(0), 1e-5)
    _close(found.mean["input"][0], np.float64(x).mean(0), 1e-6)
    assert found.count == {"input": 3000}


def test_float32_agrees_with_float64(x64):
    model = Conv()
    net, trees, data = _make(model)
    assert data.dtype == np.float64
    wide = stats.moments(net, trees, _cut(data, 20, 17), sites="taps", covariance=True)
    narrow = [jax.tree.map(lambda a: a.astype(np.float32), tree) for tree in trees]
    small = data.astype(np.float32)
    single = vfjax.trace(lambda v, x: model.apply(v, x), narrow[0], small[:4])
    found = stats.moments(single, narrow, _cut(small, 20, 17), sites="taps", covariance=True)
    values = _tap_matrices(net, trees[0], data)
    for site in wide.sites:
        assert wide.mean[site].dtype == wide.covariance[site].dtype == jnp.float64
        assert found.mean[site].dtype == found.covariance[site].dtype == jnp.float32
        _close(found.mean[site], wide.mean[site])
        _close(found.covariance[site], wide.covariance[site])
        _close(wide.var[site][0], values[site].var(0), 1e-12)


def test_a_bfloat16_network_has_float32_statistics():
    def apply_fn(v, x):
        return jax.nn.relu(x @ v["a"]) @ v["b"]

    v = {"a": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones((4, 2), jnp.bfloat16)}
    x = jax.random.normal(jax.random.key(0), (999, 3), jnp.bfloat16)
    net = vfjax.trace(apply_fn, v, x[:3])
    found = stats.moments(net, [v], [x[:500], x[500:]], sites=["a"], covariance=["a"])
    assert {a.dtype for a in (found.mean["a"], found.var["a"], found.covariance["a"])} == {
        jnp.dtype(jnp.float32)
    }
    value = np.asarray(x, np.float64).sum(1)
    # The values are rounded to 8 bits, one by one; the statistics are not.
    _close(found.var["a"][0], np.full(4, value.var()), 1e-3)


def test_a_constant_channel_has_no_variance():
    def apply_fn(v, x):
        return (x @ v["a"] + v["b"][None]) @ v["c"]

    v = {"a": jnp.ones((3, 4)).at[:, 1].set(0.0), "b": jnp.full(4, 100.3), "c": jnp.ones((4, 2))}
    x = _normal(np.random.default_rng(0), 999, 3)
    net = vfjax.trace(apply_fn, v, x[:3])
    found = stats.moments(net, [v], _cut(x, 333, 333, 333), sites=["a"])
    assert (np.asarray(found.var["a"][0]) > 0).tolist() == [True, False, True, True]


def _block(v, x):
    """A layer whose channels are heads of a fixed size, and one after a flattened map."""
    h = jax.nn.relu(jnp.einsum("bpi,io->bpo", x, v["a"]))
    return h.reshape(h.shape[0], -1) @ v["b"]


def test_layers_with_positions_and_other_axis_orders():
    def nchw(v, x):
        y = jax.lax.conv_general_dilated(x, v["k"], (1, 1), "SAME")
        return jax.nn.relu(y + v["b"][None, :, None, None]).mean((2, 3)) @ v["w"]

    rng = np.random.default_rng(0)
    v = {"k": _normal(rng, 5, 3, 3, 3), "b": _normal(rng, 5), "w": _normal(rng, 5, 2)}
    x = _normal(rng, 9, 3, 6, 6)
    net = vfjax.trace(nchw, v, x)
    found = stats.moments(net, [v], _cut(x, 5, 4), sites=["k", "k:act"], covariance=True)
    value = _values(net, v, x, "k")
    _close(found.mean["k"][0], value.mean((0, 2, 3)))
    rows = np.moveaxis(np.maximum(value, 0), 1, -1).reshape(-1, 5)
    _close(found.covariance["k:act"][0, 0], np.cov(rows.T, bias=True))

    v = {"a": _normal(rng, 3, 5), "b": _normal(rng, 20, 2)}
    x = _normal(rng, 9, 4, 3)
    net = vfjax.trace(_block, v, x)
    found = stats.moments(net, [v], _cut(x, 5, 4), sites=["a"])
    _close(found.mean["a"][0], _values(net, v, x, "a").mean((0, 1)))
    assert found.count["a"] == 36


def test_input_output_and_norm_sites():
    net, trees, data = _make(Conv(norm=True))
    norm = net.norms[1]
    sites = ["input", "output", f"{norm.name}:in"]
    found = stats.moments(net, trees, _cut(data, 20, 17), sites=sites)
    _close(found.mean["input"][0], data.mean(0))
    _close(found.var["output"][1], _values(net, trees[1], data, "output").var(0))
    wanted = _values(net, trees[1], data, sites[2])
    _close(found.var[sites[2]][1], wanted.var((0, 1, 2)))


def test_resolve_sites():
    net, _, _ = conv()
    names = [layer.name for layer in net.layers]
    assert stats.resolve_sites(net, "paper") == tuple(names[:-1])
    assert stats.resolve_sites(net, "all") == stats.resolve_sites(net, "layers") == tuple(names)
    assert stats.resolve_sites(net, "taps") == tuple(f"{name}:act" for name in names[:-1])
    assert stats.resolve_sites(net, ["output", names[0], "output"]) == ("output", names[0])

    net, _, _ = residual()
    assert {name.split("/")[1] for name in stats.resolve_sites(net, "paper")} == {
        *("a1", "a2", "b1", "b2")
    }
    assert len(stats.resolve_sites(net, "all")) == 7


def test_unknown_sites():
    net, trees, data = conv()
    with pytest.raises(ValueError, match='"paper", "layers", "all", "taps"'):
        stats.resolve_sites(net, "none")
    with pytest.raises(ValueError, match=r'pass \["output"\]'):
        stats.resolve_sites(net, "output")
    with pytest.raises(ValueError, match="no site 'params/Conv_0/kernal'; did you mean 'par"):
        stats.resolve_sites(net, ["params/Conv_0/kernal"])
    with pytest.raises(TypeError, match="sequence of site names"):
        stats.resolve_sites(net, [0])
    with pytest.raises(ValueError, match="`covariance`"):
        stats.moments(net, trees, [data], covariance="full")


def test_a_function_is_no_network():
    for measure in (lambda f: stats.moments(f, [{}], []), lambda f: stats.resolve_sites(f, "all")):
        with pytest.raises(TypeError, match=r"`?net`?.*vfjax\.trace"):
            measure(lambda v, x: x)


def test_bad_trees_and_data():
    net, trees, data = conv()
    with pytest.raises(TypeError, match="trees must be a list or tuple"):
        stats.moments(net, trees[0], [data])
    bad = jax.tree.map(lambda a: np.where(a == a.max(), np.nan, a).astype(a.dtype), trees[1])
    with pytest.raises(ValueError, match=r"trees\[1\] holds .* NaN"):
        stats.moments(net, [trees[0], bad], [data])
    with pytest.raises(ValueError, match="no batches"):
        stats.moments(net, trees, [])
    with pytest.raises(TypeError, match="dtype uint8"):
        stats.moments(net, trees, [data.astype(np.uint8)])
    once = iter([data])
    stats.moments(net, trees, once)
    with pytest.raises(ValueError, match="exhausted"):
        stats.moments(net, trees, once)


def test_mixed_averages_standard_deviations():
    net, trees, data = conv()
    found = stats.moments(net, trees, [data])
    mean, std = found.mixed((0.25, 0.75))
    for site in found.sites:
        a, b = (np.sqrt(np.asarray(v)) for v in found.var[site])
        _close(std[site], 0.25 * a + 0.75 * b)
        _close(mean[site], 0.25 * found.mean[site][0] + 0.75 * found.mean[site][1])
    with pytest.raises(ValueError, match="sum to one"):
        found.mixed((1.0, 1.0))
    with pytest.raises(ValueError, match="3 entries for 2 models"):
        found.mixed((0.5, 0.25, 0.25))


@pytest.mark.parametrize("make", [conv, residual])
def test_moments_carried_through_permutations_are_those_of_the_permuted_network(make):
    net, trees, data = make()
    rng = np.random.default_rng(5)
    permutations = {group: rng.permutation(n) for group, n in net.spec.sizes.items()}
    moved = [trees[0], net.spec.permute(trees[1], permutations)]
    sites = [*stats.resolve_sites(net, "all"), *stats.resolve_sites(net, "taps")]
    before = stats.moments(net, trees, [data], sites=sites, covariance=True)
    after = stats.moments(net, moved, [data], sites=sites, covariance=True)
    jax.tree.map(_close, before.carried([None, permutations]), after)


def test_moments_carried_through_matrices():
    net, trees, data = conv()
    first, last = net.layers[0], net.layers[1]
    group = first.group
    rng = np.random.default_rng(3)
    matrices = [{group: rng.normal(size=(4, 6))} for _ in trees]
    sites = [first.name, last.name]
    found = stats.moments(net, trees, [data], sites=sites, covariance=[first.name])
    carried = found.carried(matrices)
    for k, m in enumerate(matrices):
        rows = _values(net, trees[k], data, first.name) @ np.asarray(m[group], np.float64).T
        _close(carried.mean[first.name][k], rows.mean((0, 1, 2)))
        _close(carried.std[first.name][k], rows.std((0, 1, 2)))
    np.testing.assert_array_equal(carried.mean[last.name], found.mean[last.name])
    permutation = np.array([3, 1, 2, 0, 5, 4])
    as_matrix = {group: np.eye(6)[permutation]}
    pair = {group: (np.eye(6)[permutation], np.eye(6)[permutation].T)}
    wanted = found.carried([{group: permutation}, None])
    jax.tree.map(_close, found.carried([as_matrix, None]), wanted)
    jax.tree.map(_close, found.carried([pair, None]), wanted)


def test_carrying_needs_covariances_and_one_map_per_model():
    net, trees, data = conv()
    found = stats.moments(net, trees, [data], covariance="cross")
    group = net.layers[0].group
    with pytest.raises(ValueError, match="needs the covariances within each model"):
        found.carried([{group: np.eye(6)}, None])
    with pytest.raises(ValueError, match="one map .* 2 models, got 1"):
        found.carried([None])
    with pytest.raises(ValueError, match="got a mapping"):
        found.carried({group: np.arange(6)})


def test_moments_are_a_pytree():
    net, trees, data = conv()
    found = stats.moments(net, trees, [data], covariance=True)
    doubled = jax.jit(lambda m: jax.tree.map(lambda a: 2 * a, m))(found)
    assert isinstance(doubled, stats.Moments)
    assert doubled.axes == found.axes
    site = found.sites[0]
    _close(doubled.mean[site], 2 * found.mean[site])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_give_the_same_numbers(kind):
    net, trees, data = conv()
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    over = NamedSharding(mesh, PartitionSpec("batch"))
    parts = _cut(data, 16, 16, 5)
    # The ragged last batch divides by no mesh and stays on the host.
    sharded = [jax.device_put(part, over) if len(part) == 16 else part for part in parts]
    sites = ["input", *stats.resolve_sites(net, "all")]
    alone = stats.moments(net, trees, parts, sites=sites, covariance=True)
    jax.tree.map(_close, stats.moments(net, trees, sharded, sites=sites, covariance=True), alone)
    placed = [jax.device_put(t, NamedSharding(mesh, PartitionSpec())) for t in trees]
    reverse = stats.moments(net, placed, sharded[::-1], sites=sites, covariance=True)
    jax.tree.map(_close, reverse, alone)


def test_vmapped_models_give_the_same_numbers(monkeypatch):
    """The road that accelerators take."""
    net, trees, data = _make(Conv())
    looped = stats.moments(net, trees, [data], covariance=True)
    take_road(monkeypatch, "gpu")
    net, _, _ = _make(Conv())
    jax.tree.map(_close, stats.moments(net, trees, [data], covariance=True), looped)


# 4 MiB, which is what a piece may take, hold fewer than 32 examples of so many units.
WIDE = 60_000


def _runs(net, trees, x, monkeypatch, **how):
    """How many examples the network was evaluated at, per run, while measuring."""
    sizes = []
    run = type(net).run

    def counted(self, variables, x, **kwargs):
        sizes.append(x.shape[0])
        return run(self, variables, x, **kwargs)

    monkeypatch.setattr(type(net), "run", counted)
    return stats.moments(net, trees, [x], **how), set(sizes)


@pytest.mark.parametrize("covariance", [False, True, "cross"])
def test_pieces_of_a_batch_give_the_numbers_of_the_batch(monkeypatch, covariance):
    how = {"sites": "taps", "covariance": covariance}
    shape = (4, 64, 64, 3)
    _, trees, x = _make(Conv(norm=True), seed=3, shape=shape)
    x = np.concatenate([x + 3, x, x - 1])[:96]
    found = []
    # Pieces pay on CPU only: 4 MiB hold 42 images of 64x64 positions with 6 channels.
    for backend, size in (("gpu", 96), ("cpu", 32)):
        take_road(monkeypatch, backend)
        net, *_ = _make(Conv(norm=True), seed=3, shape=shape)
        moments, sizes = _runs(net, trees, x, monkeypatch, **how)
        assert sizes == {size}
        found.append(moments)
    whole, cut = found
    assert cut.count == whole.count
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL)


def test_a_network_that_mixes_examples_gets_its_batches_whole(monkeypatch):
    v = {"a": jnp.eye(3, WIDE), "b": jnp.ones((WIDE, 2))}
    x = jnp.arange(192.0).reshape(64, 3)

    def mixing(v, x):
        y = x @ v["a"]
        return (y - y.mean(0, keepdims=True)) @ v["b"]

    def plain(v, x):
        return jax.nn.relu(x @ v["a"]) @ v["b"]

    def by_size(v, x):
        return plain(v, x / len(x))

    def one_size(v, x):
        return plain(v, x + jnp.zeros((64, 3)))

    for fn, size in ((mixing, 64), (plain, 16), (by_size, 64), (one_size, 64)):
        found, sizes = _runs(vfjax.trace(fn, v, x), [v], x, monkeypatch, sites=["b"])
        assert sizes == {size}
        np.testing.assert_allclose(found.mean["b"][0], fn(v, x).mean(0), rtol=RTOL, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_one_device(kind):
    net, trees, x = _make(Conv(), seed=5, shape=(4, 64, 64, 3))
    x = np.concatenate([x, x])[:64]
    mesh = jax.make_mesh((1,), ("d",), axis_types=(kind,))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    found, plain = stats.moments(net, trees, [placed]), stats.moments(net, trees, [x])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL)


def test_pieces_of_enormous_values_have_finite_variances():
    v = {"a": jnp.ones((3, WIDE)), "b": jnp.full(WIDE, 3e19)}
    net = vfjax.trace(lambda v, x: x @ v["a"] + v["b"][None], v, jnp.ones((64, 3)))
    assert not np.asarray(stats.moments(net, [v], [jnp.ones((64, 3))], sites=["a"]).var["a"]).any()


def test_a_batch_without_a_fitting_divisor_stays_whole(monkeypatch):
    net, trees, x = _make(Conv(), seed=4, shape=(4, 128, 128, 3))
    assert _runs(net, trees, x[:37], monkeypatch)[1] == {37}


def test_a_second_pass_compiles_nothing():
    net, trees, data = conv()
    parts = _cut(data, 16, 16, 5)
    stats.moments(net, trees, parts, covariance="cross")
    with Compilations() as compiled:
        stats.moments(net, trees[::-1], parts, covariance="cross")
    assert compiled.count == 0


def test_data_with_nan_is_an_error():
    v = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}
    x = jnp.ones((5, 4)).at[2, 1].set(jnp.nan)
    net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], v, x)
    with pytest.raises(ValueError, match="data gives NaN or infinite values in 3 of 3 channels"):
        stats.moments(net, [v], [x[:2], x[2:]], sites=["a"])


def test_cross_covariances_need_two_models():
    net, trees, data = conv()
    with pytest.raises(ValueError, match='"cross" needs two models or more, .* has 1'):
        stats.moments(net, trees[:1], [data], covariance="cross")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (np.arange(3), ValueError, r"\(6,\)"),  # it would drop the other channels
        (np.array([0, 0, 1, 2, 3, 4]), ValueError, "is not a permutation"),
        (np.arange(6.0), TypeError, "must hold integers"),
        (np.eye(5), ValueError, r"\[m, 6\], got \(5, 5\)"),
    ],
)
def test_moments_are_carried_through_maps_that_fit_only(wrong, error, message):
    net, trees, data = conv()
    first = net.layers[0]
    sites = [first.name]
    found = stats.moments(net, trees, [data[:4]], sites=sites, covariance=sites)
    with pytest.raises(error, match=rf"{first.group}.*{message}"):
        found.carried([None, {first.group: wrong}])
    maps = [{first.group: np.ones((m, 6))} for m in (4, 3)]
    with pytest.raises(ValueError, match=rf"{first.group}.* must agree in m, got \[4, 3\]"):
        found.carried(maps)
