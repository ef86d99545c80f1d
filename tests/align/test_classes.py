"""Models with classes of their own: matched, zipped with a head each, run, saved and loaded."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import Compilations, assert_close, initial, take_road
from vfjax import (
    align,
    checkpoint,
    merge,
    renorm,
    stats,
)

CLASSES = (3, 5)
ROUNDING = 1e-5


def close(actual, expected, tol=ROUNDING):
    assert_close(actual, expected, tol, least=1e-9)


def same(actual, expected):
    jax.tree.map(close, actual, expected)


def mlp(v, x):
    x = jax.nn.relu(x @ v["a"] + v["s"][None])
    return jax.nn.relu(x @ v["b"]) @ v["c"]


class Conv(nn.Module):
    """Two convolutions, one with a norm, and a head."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="a")(x))
        x = nn.Conv(4, (3, 3), strides=2, name="b")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="n")(x))
        return nn.Dense(self.classes, name="c")(x.mean((1, 2)))


def draw(seed, classes):
    rng = np.random.default_rng([seed, 3])
    shapes = {"a": (4, 8), "s": (8,), "b": (8, 6), "c": (6, classes)}
    return {k: np.float32(rng.normal(size=s) / np.sqrt(s[0])) for k, s in shapes.items()}


@functools.cache
def case(kind):
    """Networks, models of `CLASSES`, the same models with heads alike, and data."""
    rng = np.random.default_rng(0)
    if kind in ("shared", "apart"):
        data = [np.float32(rng.normal(size=(n, 4))) for n in (40, 24)]
        trees = [draw(k, n) for k, n in enumerate(CLASSES)]
        alike = [{**tree, "c": trees[0]["c"]} for tree in trees]
        net = vfjax.trace(mlp, trees[0], data[0])
        nets = net if kind == "shared" else [net, vfjax.trace(mlp, trees[1], data[0])]
        return nets, net, trees, alike, data
    data = [np.float32(rng.normal(size=(n, 6, 6, 2))) for n in (20, 12)]
    with jax.numpy_rank_promotion("allow"):
        modules = [Conv(n) for n in CLASSES]
        trees = [initial(m, data[0], seed=k) for k, m in enumerate(modules)]
        nets = [vfjax.trace(m.apply, t, data[0]) for m, t in zip(modules, trees, strict=True)]
    head = trees[0]["params"]["c"]
    alike = [{**tree, "params": {**tree["params"], "c": head}} for tree in trees]
    return nets, nets[0], trees, alike, data


@pytest.fixture(params=["shared", "apart", "modules"])
def models(request):
    with jax.numpy_rank_promotion("allow"):  # which Flax itself needs
        yield case(request.param)


MATCHERS = {
    "zip": align.zip_features,
    "zip by permutations": functools.partial(align.zip_features, matcher="permute"),
    "cca": align.cca,
}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("sites", ["taps", "paper", ["input"]])
def test_moments_do_not_look_behind_their_sites(models, monkeypatch, sites, backend):
    nets, net, trees, alike, data = models
    take_road(monkeypatch, backend)
    covariance = sites == "taps"
    found = stats.moments(nets, trees, data, sites=sites, covariance=covariance)
    same(found, stats.moments(net, alike, data, sites=sites, covariance=covariance))


def test_moments_of_three_models_keep_their_order(models):
    nets, _, trees, _, data = models
    order = [1, 0, 1]
    mixed = [nets[k] for k in order] if isinstance(nets, list) else nets
    found = stats.moments(mixed, [trees[k] for k in order], data, sites="taps", covariance=True)
    pair = stats.moments(nets, trees, data, sites="taps", covariance=True)
    for site in pair.sites:
        close(found.mean[site], np.asarray(pair.mean[site])[order])
        close(found.covariance[site], np.asarray(pair.covariance[site])[np.ix_(order, order)])


def test_a_second_pass_compiles_nothing(models):
    nets, _, trees, _, data = models
    stats.moments(nets, trees, data, sites="taps")
    others = [jax.tree.map(lambda a: a + 1, t) for t in trees]
    with Compilations() as compiled:
        stats.moments(nets, others, data, sites="taps")
    assert compiled.count == 0


@pytest.mark.parametrize("matcher", MATCHERS)
def test_zips_are_those_of_the_shared_layers(models, matcher, tmp_path):
    nets, net, trees, alike, data = models
    found = MATCHERS[matcher](nets, trees, data)
    shared = MATCHERS[matcher](net, alike, data)
    same(found.maps, shared.maps)
    end = net.depth - 1
    model = merge.partial(nets, trees, found, span=slice(None, end))
    if net.norms:
        model = renorm.reset(nets, model, data)
    expected = merge.partial(net, alike, shared, span=slice(None, end))
    if net.norms:
        expected = renorm.reset(net, expected, data)
    same(model.trunk, expected.trunk)
    x = data[0]
    outs = jax.jit(model)(x)
    assert [out.shape for out in outs] == [(len(x), n) for n in CLASSES]
    close(outs[0], expected(x)[0])
    if not net.norms:  # heads by hand
        (z,) = model.run_trunk(x)[0].values
        for k, (out, tree) in enumerate(zip(outs, trees, strict=True)):
            unmerge = found.maps[k]["b"][1] if "b" in found.maps[k] else np.eye(z.shape[1])
            close(out, jax.nn.relu(z @ unmerge.T) @ tree["c"])
    checkpoint.save(tmp_path / "model", model)
    again = checkpoint.load(tmp_path / "model", net=nets)
    same(again(x), outs)


def test_permutations_are_those_of_the_shared_layers(models):
    nets, net, trees, alike, data = models
    found = align.match_activations(nets, *trees, data)
    same(found.permutations, align.match_activations(net, *alike, data).permutations)
    moments = stats.moments(nets, trees, data, sites="taps", covariance="cross")
    given = align.match_activations(nets, *trees, None, moments=moments)
    same(given.permutations, found.permutations)
    same(align.match_moments(nets, moments).permutations, found.permutations)
    universe = align.match_universe(nets, trees, data)
    same(universe.permutations, align.match_universe(net, alike, data).permutations)
    for own, other in zip(universe.apply(nets, trees), universe.apply(net, alike), strict=True):
        other = jax.tree.map(lambda a, b: b if a.shape == b.shape else a, own, other)
        same(own, other)
    maps = align.Maps.of_permutations(universe.permutations)
    outs = merge.partial(nets, trees, maps, span=slice(None, net.depth - 1))(data[0])
    assert [out.shape[1] for out in outs] == list(CLASSES)


def test_matchers_of_moments_take_a_network_per_model(models):
    nets, net, trees, _, data = models
    moments = stats.moments(nets, trees, data, sites="taps", covariance=True)
    for of in (align.zip_moments, align.cca_moments):
        same(of(nets, moments).maps, of(net, moments).maps)
    zipped = align.zip_moments(nets, moments)
    assert align.merged_correlation(nets, moments, zipped) == align.merged_correlation(
        net, moments, zipped
    )
    same(align.canonical_correlations(nets, moments), align.canonical_correlations(net, moments))
    with pytest.raises(ValueError, match="net has 3 networks for 2 trees"):
        align.zip_moments([net] * 3, moments)


def test_permuted_copies_with_heads_of_their_own_are_found_out(models):
    nets, net, trees, _, data = models
    other = nets[1] if isinstance(nets, list) else nets
    moves = net.spec.random(jax.random.key(4))
    # The first model's layers in another order, and the second one's head.
    head = {"c": trees[1]["c"]} if "c" in trees[1] else {}
    copy = {**trees[0], **head}
    if "params" in copy:
        copy["params"] = {**copy["params"], "c": trees[1]["params"]["c"]}
    pair = [trees[0], other.spec.permute(copy, moves)]
    found = align.zip_features(nets, pair, data, alpha=0.0, beta=0.0)
    model = merge.partial(nets, pair, found, span=slice(None, net.depth - 1))
    if net.norms:
        model = renorm.reset(nets, model, data)
        pair = [renorm.reset(own, tree, data) for own, tree in zip(nets, pair, strict=True)]
    runs = [nets] * 2 if not isinstance(nets, list) else nets
    for out, own, tree in zip(model(data[0]), runs, pair, strict=True):
        close(out, own.run(tree, data[0]), tol=1e-4)


# ------------------------------------------------------------------------------------------ errors


def test_what_sites_depend_on_must_be_alike():
    net, _, trees, _, data = case("shared")
    nets = case("apart")[0]
    for given in (net, nets):
        with pytest.raises(ValueError, match=r"trees\[1\] has shape \(6, 5\) at 'c' where trees"):
            stats.moments(given, trees, data, sites="all")
        with pytest.raises(ValueError, match=r"trees\[1\] has shape \(6, 5\) at 'c' where trees"):
            stats.moments(given, trees, data, sites=["output"])
    wide = {**trees[1], "b": np.ones((8, 7), np.float32), "c": np.ones((7, 5), np.float32)}
    for given in (net, [net, vfjax.trace(mlp, wide, data[0])]):
        for matcher in (align.zip_features, align.cca, align.match_universe):
            with pytest.raises(ValueError, match=r"trees\[1\] has shape \(8, 7\) at 'b' where"):
                matcher(given, [trees[0], wide], data)
    with pytest.raises(ValueError, match=r"trees\[1\] has shape \(6, 5\) at 'c' where trees"):
        align.match_universe(net, trees, key=jax.random.key(0))
    nan = {**trees[1], "c": np.full((6, 5), np.nan, np.float32)}
    with pytest.raises(ValueError, match=r"trees\[1\] holds 30 NaN"):
        align.cca(net, [trees[0], nan], data)
    with pytest.raises(ValueError, match="lacks"):
        align.cca(net, [trees[0], {k: v for k, v in trees[1].items() if k != "c"}], data)


def test_modules_of_other_classes_need_a_network_each():
    with jax.numpy_rank_promotion("allow"):
        _, net, trees, _, data = case("modules")
        with pytest.raises(ValueError, match="need a network each"):
            align.zip_features(net, trees, data)
        with pytest.raises(ValueError, match="net has 1 networks for 2 trees"):
            align.zip_features([net], trees, data)


def test_networks_must_show_as_many_samples():
    def strided(v, x, stride):
        x = jax.lax.conv_general_dilated(
            x, v["a"], (stride,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        return jax.nn.relu(x).mean(1) @ v["c"]

    rng = np.random.default_rng(0)
    tree = {
        "a": jnp.asarray(rng.normal(size=(3, 2, 4)), "float32"),
        "c": jnp.asarray(rng.normal(size=(4, 3)), "float32"),
    }
    x = np.float32(rng.normal(size=(6, 8, 2)))
    nets = [vfjax.trace(functools.partial(strided, stride=n), tree, x) for n in (1, 2)]
    with pytest.raises(ValueError, match="other numbers of samples"):
        stats.moments(nets, [tree, tree], [x], sites="taps", covariance=True)
