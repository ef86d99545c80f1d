"""Tests of features: laws against NumPy over the concatenated data, and what they apply to."""

from __future__ import annotations

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vfjax
from helpers import Compilations, take_road
from vfjax import (
    diagnose,
    merge,
    renorm,
    stats,
)

# Two passes in float32 over a few thousand samples of order one.
RTOL = 3e-5


class Conv(nn.Module):
    """A padded convolution and BatchNorm, a block with a projection around it, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), name="a")(x)))
        y = nn.relu(nn.Conv(3, (3, 3), name="b")(x))
        x = nn.relu(nn.Conv(5, (1, 1), name="skip")(x) + nn.Conv(5, (3, 3), name="c")(y))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def _draw(tree, rng):
    def fill(path, leaf):
        width = np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        value = rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-1, 1], leaf.shape) / width
        positive = "var" in jax.tree_util.keystr(path)
        return np.asarray(np.abs(value) if positive else value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


@functools.cache
def conv():
    """A traced network, three trees, and 37 inputs."""
    rng = np.random.default_rng(0)
    x = jnp.zeros((4, 6, 6, 3))
    model = Conv()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    trees = [_draw(shapes, rng) for _ in range(3)]
    net = vfjax.trace(lambda v, x: model.apply(v, x), trees[0], x)
    return net, trees, rng.normal(size=(37, 6, 6, 3)).astype(np.float32)


def _residual(v, x):
    x = jax.nn.relu(x @ v["a"] + v["p"][None])
    y = jax.nn.relu(x @ v["b"] + v["q"][None])
    x = jax.nn.relu(x @ v["skip"] + (y @ v["c"] + v["r"][None]))
    return x @ v["head"]


@functools.cache
def residual():
    """A block with a projection around it; three trees and 20 inputs."""
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 6), "p": (6,), "b": (6, 5), "q": (5,), "c": (5, 4), "r": (4,)}
    shapes |= {"skip": (6, 4), "head": (4, 2)}
    trees = [{k: np.float32(rng.normal(size=s)) for k, s in shapes.items()} for _ in range(3)]
    x = np.float32(rng.normal(size=(20, 3)))
    return vfjax.trace(_residual, trees[0], x[:4]), trees, x


def _mlp(v, x):
    x = jax.nn.relu(x @ v["a"] + v["p"][None])
    x = jax.nn.relu(x @ v["b"] + v["q"][None])
    return x @ v["c"] + v["r"][None]


@functools.cache
def mlp(width=6):
    rng = np.random.default_rng(1)
    shapes = {"a": (3, width), "p": (width,), "b": (width, 5), "q": (5,), "c": (5, 2), "r": (2,)}
    trees = [{k: np.float32(rng.normal(size=s)) for k, s in shapes.items()} for _ in range(3)]
    x = np.float32(rng.normal(size=(20, 3)))
    return vfjax.trace(_mlp, trees[0], x[:4]), trees, x


def _cut(data, *sizes):
    return np.split(data, np.cumsum(sizes)[:-1])


def _close(found, wanted, rtol=RTOL):
    wanted = np.asarray(wanted)
    assert np.shape(found) == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max(initial=0))


def _same(found, wanted, rtol=RTOL):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(functools.partial(_close, rtol=rtol), found, wanted)


def _values(run, x, sites):
    """Values of all data and of the zero input, by site, in float64."""
    found = [jax.jit(run)(a) for a in (x, jax.tree.map(lambda a: np.zeros_like(a[:1]), x))]
    return {s: [np.asarray(values[s], np.float64) for values in found] for s in sites}


def _wanted(at_x, at_zero, keep):
    """The numbers of one site by their definitions."""
    g = (at_x - at_zero).reshape(len(at_x), -1)
    norm = np.linalg.norm(g, axis=1)
    sample = tuple(a for a in range(at_x.ndim) if a not in keep)
    std = at_x.std(sample)
    return {
        "feature": norm.mean(),
        "feature_std": norm.std(),
        "offset": np.linalg.norm(at_zero),
        "mean": at_x.mean(sample),
        "std": std,
        "variance": g.var(0).mean(),
        "dead": (std == 0).mean(),
    }


def _keep(net, site):
    if site in ("input", "output"):
        return tuple(range(1, 4 if site == "input" else 2))
    norms = {norm.site: norm.channel_axes for norm in net.norms}
    return norms.get(site) or net.layer(site.removesuffix(":act")).channel_axes


def test_numbers_are_those_of_the_concatenated_data():
    net, trees, x = conv()
    layers = [layer.name for layer in net.layers]
    taps = [layer.tap for layer in net.layers]
    sites = ["input", *layers, *taps, net.norms[0].site, "output"]
    found = diagnose.features(net, trees[:2], _cut(x, 18, 1, 18), sites=sites)
    assert found.names == tuple(sites) and found.models == 2 and found.references is None
    for k, tree in enumerate(trees[:2]):
        values = _values(lambda a, t=tree: net.run(t, a, capture=sites)[1], x, sites)
        for site in sites:
            wanted = _wanted(*values[site], _keep(net, site))
            for what, value in wanted.items():
                _close(getattr(found, what)[site][k], value)
            size = found.site(site).size
            assert size == values[site][0][0].size
            _close(found.feature_rms[site][k], wanted["feature"] / np.sqrt(size))
            _close(found.offset_rms[site][k], wanted["offset"] / np.sqrt(size))
            if site != "input":
                _close(found.ratio[site][k], wanted["feature"] / wanted["offset"])


def test_the_moments_are_those_of_stats():
    net, trees, x = residual()
    found = diagnose.features(net, trees[:2], _cut(x, 12, 8), sites="paper")
    moments = stats.moments(net, trees[:2], _cut(x, 12, 8), sites="paper")
    assert found.names == moments.sites
    _same(found.mean, moments.mean)
    _same(found.std, moments.std)


def test_large_means_lose_nothing():
    """Inputs far from 0 have features that are large against their deviations."""
    net, trees, x = mlp()
    parts = _cut(x + 1000, 12, 8)
    found = diagnose.features(net, trees[0], parts, sites=["a", "b"])
    for site in found.names:
        values = _values(lambda a, s=site: net.run(trees[0], a, capture=[s])[1], x + 1000, [site])
        wanted = _wanted(*values[site], (1,))
        for what in ("feature", "mean", "dead"):
            _close(getattr(found, what)[site][0], wanted[what])
        # The values themselves are rounded to 1e3 * 6e-8, their deviations being about 2.
        _close(found.std[site][0], wanted["std"], 1e-3)
        _close(found.variance[site][0], wanted["variance"], 1e-3)


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (12, 7, 1)])
@pytest.mark.parametrize("centre", [0.0, 3000.0])
def test_the_variance_of_examples_around_a_point(centre, sizes):
    net, trees, x = mlp()
    x = np.float32(centre + 1 + (1e-2 if centre == 0 else 1) * x)
    found = diagnose.features(net, trees[:2], _cut(x, *sizes), references=trees[2:], sites=["a"])
    for k, tree in enumerate(trees[:2]):
        wanted = (x.astype(np.float64) @ tree["a"]).var(0).mean()
        _close(found.variance["a"][k], wanted, 1e-3)
    assert np.isfinite(found.variance_ratio["a"]).all()
    ends = diagnose.variance_collapse(found, eps=1e-6, sites=["a"])
    assert not ends.collapsed.any()


@pytest.mark.parametrize("size", [2.0**60, 2.0**-60])
def test_the_size_of_the_values_makes_no_difference(size):
    """Of numbers whose squares float32 hardly holds, or does not."""
    net, trees, x = mlp()
    plain = diagnose.features(net, trees[0], _cut(x, 12, 8), sites=["a"])
    scale = np.float32(size)
    scaled = {**trees[0], "a": trees[0]["a"] * scale, "p": trees[0]["p"] * scale}
    found = diagnose.features(net, scaled, _cut(x, 12, 8), sites=["a"])
    for what in ("feature", "feature_std", "offset", "mean", "std"):
        _close(getattr(found, what)["a"] / scale, getattr(plain, what)["a"], 1e-6)
    _close(np.float64(found.variance["a"]) / size**2, plain.variance["a"], 1e-6)
    assert found.dead["a"] == plain.dead["a"] == 0


def test_values_whose_squares_float32_does_not_hold():
    net, trees, x = mlp()
    low = {k: v * np.float32(2.0**-100) for k, v in trees[0].items()}
    found = diagnose.features(net, low, _cut(x, 12, 8), sites=["a"])
    plain = diagnose.features(net, trees[0], _cut(x, 12, 8), sites=["a"])
    for what in ("feature", "std"):
        values = np.float64(getattr(found, what)["a"])
        _close(values * 2.0**100, getattr(plain, what)["a"], 1e-6)
    assert found.dead["a"] == found.variance["a"] == 0
    high = {k: v * np.float32(2.0**70) for k, v in trees[0].items()}
    with pytest.raises(ValueError, match="variance of 'a' is too large for float32"):
        diagnose.features(net, high, [x], sites=["a"])


def test_sites_and_what_is_known_of_them():
    net, trees, x = residual()
    found = diagnose.features(net, trees[0], [x])
    assert found.names == tuple(layer.tap for layer in net.layers)
    assert [s.layer for s in found.sites] == [layer.name for layer in net.layers]
    assert [s.depth for s in found.sites] == [layer.depth for layer in net.layers]
    assert [s.main for s in found.sites] == [layer.main for layer in net.layers]
    assert not all(s.main for s in found.sites)
    layers = diagnose.features(net, trees[0], [x], sites="layers")
    assert layers.names == tuple(layer.name for layer in net.layers)
    ends = diagnose.features(net, trees[0], [x], sites=["output", "input"])
    assert [s.depth for s in ends.sites] == [4, 0]
    # The shortcut joins the layer that it goes around: they have one tap, measured once.
    np.testing.assert_array_equal(found.feature["skip:act"], found.feature["c:act"])
    net, trees, x = conv()
    (site,) = diagnose.features(net, trees[0], [x], sites=[net.norms[0].site]).sites
    assert site.layer == net.layers[0].name


def test_several_networks_are_measured_as_one_by_one():
    net, trees, x = residual()
    model = merge.preserve_first(net, trees[:2], layers=2)
    many = [trees[0], model, trees[1]]
    together = diagnose.features(net, many, _cut(x, 12, 8), references=trees[2:])
    assert together.models == 3 and together.references.models == 1
    for k, one in enumerate(many[:2]):
        alone = diagnose.features(net, one, _cut(x, 12, 8))
        for what in ("feature", "feature_std", "offset", "mean", "std", "variance", "dead"):
            mine = {name: v[k : k + 1] for name, v in getattr(together, what).items()}
            _same(mine, getattr(alone, what))


def test_a_merged_model_from_its_first_layer_is_its_tree():
    net, trees, x = mlp()
    tree = merge.interpolate(trees[:2])
    one = diagnose.features(net, tree, [x])
    _same(diagnose.features(net, merge.as_merged(net, tree), [x]), one)
    _same(diagnose.features(net, merge.preserve_first(net, trees[:2], layers=0), [x]), one)


def test_stems_count_as_their_models_do_and_the_cut_as_the_average():
    net, trees, x = residual()
    weights = (0.25, 0.75)
    model = merge.preserve_first(net, trees[:2], layers=2, weights=weights)
    sites = [s for layer in net.layers for s in (layer.name, layer.tap)]
    found = diagnose.features(
        net, model, _cut(x, 12, 8), references=trees[:2], weights=weights, sites=sites
    )
    apart = [site for site in sites if model.apart(site)]
    assert apart and not model.apart(net.layers[1].name)
    edges = found.references
    for site in apart:
        for what in ("feature", "offset", "std", "variance", "dead"):
            a, b = getattr(edges, what)[site]
            _close(getattr(found, what)[site][0], 0.25 * a + 0.75 * b)
        # What is kept apart has lost nothing.
        _close(found.relative[site], [1.0], 1e-6)
    rest = [site for site in sites if site not in apart]
    values = _values(lambda a: model.run(a, capture=rest)[1], x, rest)
    for site in rest:
        for what, value in _wanted(*values[site], _keep(net, site)).items():
            _close(getattr(found, what)[site][0], value)


def test_corrections_are_seen():
    net, trees, x = mlp()
    merged = merge.interpolate(trees[:2])
    fixed = renorm.rescale(net, merged, [x], references=trees[:2], sites=["a"])
    found = diagnose.features(net, [merged, fixed], [x], references=trees[:2], sites=["a"])
    goal = np.asarray(found.references.std["a"]).mean(0)
    _close(found.std["a"][1], goal)
    assert not np.allclose(found.std["a"][0], goal, rtol=0.1)


def test_a_layer_that_ignores_its_input_has_no_feature():
    net, trees, x = mlp()
    blind = {**trees[0], "c": np.zeros_like(trees[0]["c"])}
    found = diagnose.features(net, [trees[0], blind], [x])
    for what in ("feature", "feature_std", "variance", "ratio"):
        value = getattr(found, what)["c:act"]
        assert value[0] > 0 and value[1] == 0
    assert found.dead["c:act"].tolist() == [0, 1]
    _close(found.offset["c:act"][1], np.linalg.norm(blind["r"]))
    _close(found.feature["b:act"][1], found.feature["b:act"][0])


def test_a_network_without_offset_has_an_infinite_ratio():
    net, trees, x = mlp()
    bare = {k: np.zeros_like(v) if k in "pqr" else v for k, v in trees[0].items()}
    nothing = {k: np.zeros_like(v) for k, v in trees[0].items()}
    found = diagnose.features(net, [bare, nothing], [x])
    for site in found.names:
        assert found.offset[site].tolist() == [0, 0]
        assert np.isinf(found.ratio[site][0]) and np.isnan(found.ratio[site][1])


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_features_scale_as_the_magnitude_argument_says(scale):
    """W <- lambda W, b <- lambda^l b in a ReLU network: both scale by lambda^l."""
    net, trees, x = mlp()
    tree, depth = trees[0], dict(zip("abcpqr", (1, 1, 1, 1, 2, 3), strict=True))
    scaled = {k: v * np.float32(scale ** depth[k]) for k, v in tree.items()}
    found = diagnose.features(net, [tree, scaled], [x], references=[tree])
    for level, site in enumerate(found.names, start=1):
        # Powers of two scale floats exactly.
        for what in ("feature", "offset", "feature_std", "mean", "std"):
            values = np.asarray(getattr(found, what)[site])
            _close(values[1], values[0] * scale**level, 1e-6)
        _close(found.relative[site], [1, scale**level], 1e-6)
        _close(found.variance_ratio[site], [1, scale ** (2 * level)], 1e-5)


def test_a_network_is_one_relative_to_itself():
    net, trees, x = mlp()
    found = diagnose.features(net, trees[0], [x], references=[trees[0], trees[0]])
    for site in found.names:
        assert found.relative[site].tolist() == found.variance_ratio[site].tolist() == [1.0]


def test_references_are_averaged_with_weights():
    net, trees, x = mlp()
    found = diagnose.features(net, trees[2], [x], references=trees[:2], weights=(0.25, 0.75))
    for site in found.names:
        a, b = found.references.feature[site]
        _close(found.relative[site], found.feature[site] / (0.25 * a + 0.75 * b))


def test_weights_are_those_of_the_merged_models():
    net, trees, x = mlp()
    models = [
        merge.preserve_first(net, trees[:2], layers=2, weights=w) for w in ((0.2, 0.8), (0.7, 0.3))
    ]
    found = diagnose.features(net, models, [x], references=trees[:2], sites=["a", "c"])
    assert found.shares == ((0.2, 0.8), (0.7, 0.3))
    # Kept apart, the first layer has lost nothing.
    _close(found.relative["a"], [1.0, 1.0], 1e-6)
    a, b = found.references.feature["c"]
    _close(
        found.relative["c"], found.feature["c"] / np.array([0.2 * a + 0.8 * b, 0.7 * a + 0.3 * b])
    )
    with pytest.raises(ValueError, match="different weights of the references"):
        _ = found.weights
    given = diagnose.features(
        net, models, [x], references=trees[:2], weights=(0.5, 0.5), sites=["c"]
    )
    assert given.shares == ((0.5, 0.5),) * 2 and given.weights == (0.5, 0.5)
    three = diagnose.features(net, models[0], [x], references=trees, sites=["c"])
    assert three.weights == (1 / 3,) * 3


def test_variance_leaves_out_what_differs_between_positions_alone():
    """At padded borders a constant image has other values than inside."""

    def apply_fn(v, x):
        x = x * v["gate"][None, None, None]
        y = jax.lax.conv_general_dilated(
            x + 1, v["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.mean((1, 2)) @ v["w"]

    v = {"gate": jnp.zeros(2), "k": jnp.ones((3, 3, 2, 4)), "w": jnp.ones((4, 2))}
    x = np.float32(np.random.default_rng(0).normal(size=(8, 5, 5, 2)))
    net = vfjax.trace(apply_fn, v, x)
    found = diagnose.features(net, v, [x], sites=["k"])
    assert found.variance["k"] == found.feature["k"] == 0
    assert (np.asarray(found.std["k"]) > 1).all() and found.dead["k"] == 0


def test_dead_channels_are_those_that_repair_leaves():
    net, trees, x = mlp()
    tree = {k: v.copy() for k, v in trees[0].items()}
    tree["a"][:, :2], tree["p"][:2] = 0, 100.3
    found = diagnose.features(net, tree, _cut(x, 7, 13), sites=["a"])
    _close(found.dead["a"], [2 / 6])
    assert (np.asarray(found.std["a"][0]) == 0).tolist() == [True] * 2 + [False] * 4


def _runs(monkeypatch):
    """Sizes of the batches that networks are run on, as they are traced."""
    sizes = []
    run = vfjax.Network.run

    def counted(self, variables, x, **kwargs):
        sizes.append(jax.tree.leaves(x)[0].shape[0])
        return run(self, variables, x, **kwargs)

    monkeypatch.setattr(vfjax.Network, "run", counted)
    return sizes


def test_the_input_zero_is_run_once(monkeypatch):
    _, trees, x = mlp()
    ran, traced = [], _runs(monkeypatch)

    def seen(x):
        ran.append(len(x))
        return x

    def apply_fn(v, x):
        return _mlp(v, jax.pure_callback(seen, jax.ShapeDtypeStruct(x.shape, x.dtype), x))

    net = vfjax.trace(apply_fn, trees[0], x[:4])  # nothing is compiled for it yet
    diagnose.features(net, trees[0], _cut(x, 5, 5, 5, 5))
    assert sorted(ran) == [1, 5, 5, 5, 5]
    assert traced == [1, 5]


def test_a_second_pass_compiles_nothing():
    net, trees, x = mlp()
    diagnose.features(net, trees[:2], _cut(x, 8, 8, 4))
    with Compilations() as compiled:
        diagnose.features(net, trees[1:], _cut(x, 8, 8, 4))
    assert compiled.count == 0


def test_pieces_of_a_batch_give_the_numbers_of_the_batch(monkeypatch):
    _, trees, x = mlp(60_000)  # 4 MiB, which is what a piece may take, hold 17 examples.
    x = np.concatenate([x + 1, x, x, x - 2])
    sizes, found = _runs(monkeypatch), []
    for backend, size in (("gpu", 80), ("cpu", 16)):  # Pieces pay on CPU only.
        take_road(monkeypatch, backend)
        sizes.clear()
        net = vfjax.trace(_mlp, trees[0], x[:4])
        found.append(diagnose.features(net, trees[0], [x]))
        assert set(sizes) == {1, size}
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        _close(a, b)


def test_vmapped_networks_give_the_same_numbers(monkeypatch):
    """The road that accelerators take."""
    _, trees, x = mlp()
    found = []
    for backend in ("cpu", "gpu"):
        take_road(monkeypatch, backend)
        net = vfjax.trace(_mlp, trees[0], x)
        models = [merge.preserve_first(net, t, layers=2) for t in (trees[:2], trees[1:])]
        many = [trees[0], models[0], trees[1], models[1]]
        found.append(diagnose.features(net, many, _cut(x, 10, 10), references=trees[2:]))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        _close(a, b)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_give_the_same_numbers(kind):
    net, trees, x = mlp()
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    over = NamedSharding(mesh, PartitionSpec("batch"))
    parts = _cut(x, 8, 8, 4)
    # The ragged last batch divides by no mesh and stays on the host.
    sharded = [jax.device_put(part, over) if len(part) == 8 else part for part in parts]
    wanted = diagnose.features(net, trees[:2], parts, references=trees[2:])
    _same(diagnose.features(net, trees[:2], sharded, references=trees[2:]), wanted)
    placed = [jax.device_put(t, NamedSharding(mesh, PartitionSpec())) for t in trees]
    _same(diagnose.features(net, placed[:2], sharded[::-1], references=placed[2:]), wanted)


# ------------------------------------------------------------------------- what they apply to


def test_examples_on_another_axis_or_merged_with_positions():
    """A network may lay examples out as it likes: time first, or tokens in rows."""

    def time_first(v, x):
        x = jax.nn.relu(x.transpose(1, 0, 2) @ v["a"] + 1)
        return x.mean(0) @ v["b"]

    def rows(v, x):
        y = jax.nn.relu(x.reshape(-1, 3) @ v["a"] + 1)
        return y.reshape(*x.shape[:2], -1).mean(1) @ v["b"]

    rng = np.random.default_rng(0)
    v = {"a": np.float32(rng.normal(size=(3, 4))), "b": np.float32(rng.normal(size=(4, 2)))}
    x = np.float32(rng.normal(size=(9, 5, 3)))
    value = np.maximum(np.float64(x) @ v["a"] + 1, 0)
    for fn in (time_first, rows):
        net = vfjax.trace(fn, v, x)
        found = diagnose.features(net, v, _cut(x, 4, 4, 1), sites=["a:act"])
        assert found.site("a:act").size == 20
        wanted = _wanted(value, np.ones((1, 5, 4)), (2,))
        for what in wanted:
            _close(getattr(found, what)["a:act"][0], wanted[what])


def test_a_site_without_examples_is_an_error():
    def apply_fn(v, x):
        y = x @ v["a"]
        return y + (y.mean(0, keepdims=True) @ v["b"])

    v = {"a": jnp.eye(3), "b": jnp.eye(3)}
    net = vfjax.trace(apply_fn, v, jnp.ones((4, 3)))
    diagnose.features(net, v, [jnp.ones((4, 3))], sites=["a"])
    with pytest.raises(ValueError, match='site "b" has shape .* no axis of it holds the examples'):
        diagnose.features(net, v, [jnp.ones((4, 3))], sites=["b"])


def test_inputs_of_several_parts_and_integers():
    """The input 0 is token 0 of an embedding, at zeros of the other part."""

    def apply_fn(v, x):
        return jax.nn.relu(v["table"][x["token"]] + x["more"] @ v["w"]) @ v["head"]

    rng = np.random.default_rng(0)
    v = {k: np.float32(rng.normal(size=s)) for k, s in [("table", (7, 4)), ("w", (3, 4))]}
    v["head"] = np.float32(rng.normal(size=(4, 2)))
    x = {"token": np.arange(10, dtype=np.int32) % 7, "more": np.float32(rng.normal(size=(10, 3)))}
    net = vfjax.trace(apply_fn, v, x)
    halves = [jax.tree.map(lambda a, k=k: a[5 * k : 5 * k + 5], x) for k in (0, 1)]
    found = diagnose.features(net, v, halves, sites=["head"])
    at_x = np.maximum(np.float64(v["table"])[x["token"]] + x["more"] @ v["w"], 0) @ v["head"]
    at_zero = np.maximum(np.float64(v["table"])[:1], 0) @ v["head"]
    for what, value in _wanted(at_x, at_zero, (1,)).items():
        _close(getattr(found, what)["head"][0], value)
    with pytest.raises(TypeError, match='site "input" holds a dict'):
        diagnose.features(net, v, [x], sites=["input"])


def test_equinox_and_nnx():
    keys = jax.random.split(jax.random.key(0), 2)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.Lambda(lambda h: jax.nn.relu(h).mean((1, 2))),
            eqx.nn.Linear(4, 2, key=keys[1]),
        ]
    )
    params, static = eqx.partition(module, eqx.is_array)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3 * 5 * 5, 36, rngs=rngs)
            self.head = nnx.Linear(36, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.first(x.reshape(len(x), -1))))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    x = np.float32(np.random.default_rng(0).normal(size=(6, 3, 5, 5)))
    for fn, tree in (
        (lambda p, x: jax.vmap(eqx.combine(p, static))(x), params),
        (lambda s, x: nnx.merge(graphdef, s)(x), state),
    ):
        net = vfjax.trace(fn, tree, x)
        found = diagnose.features(net, tree, [x])
        assert len(found.names) == 2 and found.sites[0].size == 4 * 3 * 3
        out = jax.jit(fn)(tree, np.concatenate([x, np.zeros_like(x[:1])]))
        wanted = np.linalg.norm(np.float64(out[:-1]) - np.float64(out[-1:]), axis=1).mean()
        _close(found.feature[found.names[-1]], [wanted])


def _looped(v, x):
    """A layer that is used twice, then three that are stacked."""
    for _ in range(2):
        x = jnp.tanh(x @ v["w"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, v["stack"])
    return x @ v["head"]


def test_shared_and_stacked_layers():
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4), "stack": (3, 4, 4), "head": (4, 2)}
    edges = [{k: np.float32(rng.normal(size=s)) for k, s in shapes.items()} for _ in range(2)]
    merged = merge.interpolate(edges)
    x = np.float32(rng.normal(size=(10, 4)))
    net = vfjax.trace(_looped, edges[0], x[:2])
    found = diagnose.features(net, merged, _cut(x, 6, 4), references=edges, sites="layers")
    kernels = {
        "w": ("w", ...),
        "w#2": ("w", ...),
        **{f"stack[{k}]": ("stack", k) for k in range(3)},
        "head": ("head", ...),
    }
    assert found.names == tuple(kernels)
    assert [site.depth for site in found.sites] == [1, 2, 3, 4, 5, 6]
    value, product, sizes = np.float64(x), 1.0, {}
    for name, (leaf, part) in kernels.items():
        value = value @ merged[leaf][part]
        _close(found.feature[name][0], np.linalg.norm(value, axis=1).mean())
        value = np.tanh(value)
        goal = np.mean([np.abs(edge[leaf][part]).mean() for edge in edges])
        product *= goal / np.abs(merged[leaf][part]).mean()
        sizes[name] = product
    assert diagnose.rescale_product(net, merged, edges) == pytest.approx(sizes, rel=1e-5)


def test_bfloat16_batchnorm():
    """Statistics are kept in float32 beside kernels and inputs of 16 bits."""

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16, name="conv")(x)
            x = nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16, name="norm")(x)
            return nn.Dense(2, dtype=jnp.bfloat16, name="head")(nn.relu(x).mean((1, 2)))

    model, x = Half(), jnp.asarray(conv()[2][:12], jnp.bfloat16)
    tree = _draw(jax.eval_shape(model.init, jax.random.key(0), x), np.random.default_rng(0))
    net = vfjax.trace(lambda v, x: model.apply(v, x), tree, x)
    sites = [net.norms[0].site, "params/conv/kernel:act", "output"]
    found = diagnose.features(net, tree, [x[:5], x[5:]], sites=sites)
    assert {a.dtype for a in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    values = _values(lambda a: net.run(tree, a, capture=sites)[1], x, sites)
    for site in sites:
        wanted = _wanted(*values[site], _keep(net, site))
        for what in ("feature", "offset", "variance", "std"):
            # Eight bits in every value, rounded another way in other batches.
            _close(getattr(found, what)[site][0], wanted[what], 1e-2)


def test_a_tree_that_is_a_list_is_one_network():
    v = [jnp.eye(3), jnp.ones((3, 2))]
    x = jnp.ones((4, 3))
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v[0]) @ v[1], v, x)
    assert diagnose.features(net, v, [x]).models == 1
    assert diagnose.features(net, [v, v], [x], references=[v]).models == 2


def test_precision(x64):
    _, trees, x = mlp()
    wide = jax.tree.map(np.float64, trees[0])
    net = vfjax.trace(_mlp, wide, np.float64(x))
    found = diagnose.features(net, wide, [np.float64(x)])
    assert {a.dtype for a in jax.tree.leaves(found)} == {np.dtype(np.float64)}
    small = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), trees[0])
    low = jnp.asarray(x, jnp.bfloat16)
    half = diagnose.features(vfjax.trace(_mlp, small, low), small, [low])
    assert {a.dtype for a in jax.tree.leaves(half)} == {np.dtype(np.float32)}
    # Eight bits in every value.
    _close(half.feature["c:act"], found.feature["c:act"], 0.05)


def test_a_record_is_a_pytree():
    net, trees, x = mlp()
    found = diagnose.features(net, trees[:2], [x], references=trees[2:])
    doubled = jax.jit(lambda f: jax.tree.map(lambda a: 2 * a, f))(found)
    assert doubled.names == found.names and doubled.references.models == 1
    _close(doubled.feature["a:act"], 2 * found.feature["a:act"])
    _close(jax.jit(lambda f: f.relative["b:act"])(found), found.relative["b:act"])


# ------------------------------------------------------------------------------------- errors


def test_errors():
    net, trees, x = mlp()
    tree, measure = trees[0], functools.partial(diagnose.features, net)
    with pytest.raises(TypeError, match="net must be a Network"):
        diagnose.features(_mlp, tree, [x])
    with pytest.raises(ValueError, match='"paper", "layers", "all", "taps".*got "none"'):
        measure(tree, [x], sites="none")
    with pytest.raises(ValueError, match=r'pass \["a:act"\]'):
        measure(tree, [x], sites="a:act")
    with pytest.raises(ValueError, match="no site 'a:acts'; did you mean 'a:act'"):
        measure(tree, [x], sites=["a:acts"])
    with pytest.raises(TypeError, match="sequence of site names"):
        measure(tree, [x], sites=[1])
    with pytest.raises(ValueError, match="names no site"):
        measure(tree, [x], sites=[])
    with pytest.raises(ValueError, match="no batches"):
        measure(tree, [])
    with pytest.raises(TypeError, match="dtype float64"):
        measure(tree, [x.astype(np.float64)])
    with pytest.raises(ValueError, match="variables differs .* it lacks"):
        measure({"a": tree["a"]}, [x])
    with pytest.raises(ValueError, match=r"references\[1\] differs"):
        measure(tree, [x], references=[tree, {"a": tree["a"]}])
    with pytest.raises(ValueError, match="variables is empty"):
        measure([], [x])
    bad = {**tree, "q": np.full_like(tree["q"], np.nan)}
    with pytest.raises(ValueError, match=r"variables\[1\] holds .* NaN"):
        measure([tree, bad], [x])
    with pytest.raises(ValueError, match="3 entries for 2 references"):
        measure(tree, [x], references=trees[:2], weights=(0.5, 0.25, 0.25))
    with pytest.raises(ValueError, match="weights are those of the references"):
        measure(tree, [x], weights=(1.0,))
    other = vfjax.trace(_mlp, tree, x)
    with pytest.raises(ValueError, match="another network"):
        measure(merge.as_merged(other, tree), [x])
    with pytest.raises(ValueError, match="data gives NaN or infinite values in"):
        measure(tree, [x, np.full_like(x, np.inf)])
    with pytest.raises(ValueError, match="no references to relate to"):
        _ = measure(tree, [x]).relative
    with pytest.raises(ValueError, match="nothing was measured at 'd'"):
        measure(tree, [x]).site("d")


def test_a_network_that_is_not_defined_at_zero():
    v = {"a": jnp.eye(3), "b": jnp.eye(3)}
    x = jnp.ones((4, 3))
    net = vfjax.trace(lambda v, x: (x / (x @ v["a"])) @ v["b"], v, x)
    with pytest.raises(ValueError, match=r"f\(0\) is NaN or infinite in 3 entries of 'a:act'"):
        diagnose.features(net, v, [x])
