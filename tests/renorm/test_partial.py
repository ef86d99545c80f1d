"""Renormalising and diagnosing what was merged through maps, with stems and heads."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import along, assert_close, conv, norm, take_road
from vfjax import (
    diagnose,
    merge,
    renorm,
    stats,
)
from vfjax._trees import flatten_named
from vfjax.align import Maps

ROUNDING = 1e-4


def close(actual, expected, tol=ROUNDING):
    assert_close(actual, expected, tol, least=1e-9)


# ------------------------------------------------------------------------------------- networks


def residual(v, x):
    """Norms, a shortcut with a kernel, and a stream that crosses cuts inside the second block."""
    x = jax.nn.relu(norm(v["n0"], conv(x, v["w0"])))
    y = jax.nn.relu(norm(v["n1"], conv(x, v["w1"])))
    x = jax.nn.relu(norm(v["n2"], conv(y, v["w2"])) + norm(v["n5"], conv(x, v["short"])))
    y = jax.nn.relu(norm(v["n3"], conv(x, v["w3"])))
    x = jax.nn.relu(norm(v["n4"], conv(y, v["w4"])) + x)
    x = x.mean((1, 2)) @ v["head"]
    return x + along(v["bias"], x)


def heads(v, x):
    """Layers with biases, one of them with two channel axes, on rows."""
    x = jax.nn.relu((z := x @ v["w1"]) + along(v["b1"], z))
    z = jnp.einsum("bd,dhe->bhe", x, v["w2"])
    x = jax.nn.relu(z + along(v["b2"], z))
    x = jnp.einsum("bhe,heo->bo", x, v["w3"])
    x = jax.nn.relu(x + along(v["b3"], x))
    x = x @ v["w4"]
    return x + along(v["b4"], x)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 1)), "float32")


def draw(name, seed, classes=3):
    rng = np.random.default_rng([seed, 11])
    if name == "heads":
        shapes = {"w1": (4, 6), "w2": (6, 2, 3), "w3": (2, 3, 5), "w4": (5, classes)}
        found = {key: normal(rng, *shape) for key, shape in shapes.items()}
        sizes = {"b1": (6,), "b2": (2, 3), "b3": (5,), "b4": (classes,)}
        return found | {key: 0.3 * normal(rng, *shape) for key, shape in sizes.items()}
    sizes = {"w0": (2, 4), "w1": (4, 5), "w2": (5, 6), "short": (4, 6), "w3": (6, 4), "w4": (4, 6)}
    found = {key: normal(rng, 3, 3, *size) for key, size in sizes.items()}
    for k, n in enumerate((4, 5, 6, 4, 6, 6)):
        found[f"n{k}"] = {
            "mean": 0.1 * normal(rng, n),
            "var": 0.5 + jnp.abs(normal(rng, n)),
            "scale": 1 + 0.1 * normal(rng, n),
            "bias": 0.1 * normal(rng, n),
        }
    return found | {"head": normal(rng, 6, classes), "bias": 0.1 * normal(rng, classes)}


APPLY = {"residual": residual, "heads": heads}
SHAPE = {"residual": (8, 5, 5, 2), "heads": (40, 4)}
_NETS = {}


def case(name, models=2, classes=3):
    x = 1 + jnp.float32(np.random.default_rng(3).normal(size=SHAPE[name]))
    trees = [draw(name, seed, classes if seed else 3) for seed in range(models)]
    if name not in _NETS:
        _NETS[name] = vfjax.trace(APPLY[name], trees[0], x)
    return _NETS[name], trees, x


def random_zip(net, models):
    rng = np.random.default_rng(4)
    labels = {
        group: rng.permutation([*range(n), *rng.integers(n, size=(models - 1) * n)])
        for group, n in net.spec.sizes.items()
    }
    return Maps.of_labels(labels, models)


def dense(net, models):
    """Invertible maps of all models but the first, as canonical correlations give."""
    rng = np.random.default_rng(5)
    maps: list[dict] = [{}]
    for _ in range(models - 1):
        maps.append({})
        for group, n in net.spec.sizes.items():
            m = np.eye(n) + 0.4 * rng.standard_normal((n, n)) / np.sqrt(n)
            maps[-1][group] = m.astype(np.float32), np.linalg.inv(m).astype(np.float32)
    return Maps(tuple(maps))


MAPS = {"zip": random_zip, "dense": dense}


def of_site(value, axes):
    value = np.asarray(value, np.float64)
    return value.mean(axes), value.var(axes)


def leaf(tree, path):
    return flatten_named(tree)[0][path]


def check_norms(model, x):
    """Every norm outside of stems stores the moments of what it reads, of one batch."""
    net = model.net
    measured = [n for n in net.norms if not (model.cut and net.in_stem(n.site, model.cut))]
    assert measured
    _, found = model.read(x, [n.site for n in measured])
    for n in measured:
        trees = model.heads if model.in_heads(n.site) else (model.trunk,)
        assert len(found[n.site]) == len(trees)
        for value, tree in zip(found[n.site], trees, strict=True):
            mean, var = of_site(value, n.sample_axes)
            close(leaf(tree, n.mean), mean, 1e-3)
            close(leaf(tree, n.var), var, 1e-3)


# ------------------------------------------------------------------------------------------- RESET


@pytest.mark.parametrize("sweeps", ["batch", "layer"])
@pytest.mark.parametrize("kind", list(MAPS))
def test_reset_measures_what_merging_left_unknown(kind, sweeps):
    net, trees, x = case("residual", 3)
    found = MAPS[kind](net, 3)
    tree = merge.interpolate(found.apply(net, trees))
    assert len(jax.tree.leaves(tree)) == len(jax.tree.leaves(trees[0])) - 6
    new = renorm.reset(net, tree, [x], sweeps=sweeps)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, trees[0])
    check_norms(merge.as_merged(net, new), x)
    for name in ("w3", "bias"):
        np.testing.assert_array_equal(new[name], tree[name])


@pytest.mark.parametrize("merged", [slice(None, 2), slice(1, 4), slice(3, None), slice(4, 4)])
def test_reset_of_models_with_stems_and_heads(merged):
    net, trees, x = case("residual")
    model = merge.partial(net, trees, random_zip(net, 2), span=merged)
    for sweeps in ("batch", "layer"):
        new = renorm.reset(net, model, [x], sweeps=sweeps)
        assert (new.cut, new.end) == (model.cut, model.end)
        check_norms(new, x)
        for one, two in zip(new.stems, model.stems, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, two)
        for out in jax.tree.leaves(new(x)):
            assert np.isfinite(out).all()


def test_reset_on_several_batches_pools_them_in_heads_too():
    net, trees, x = case("residual")
    model = merge.partial(net, trees, random_zip(net, 2), span=slice(1, 3))
    new = renorm.reset(net, model, [x[:5], x[5:]], sweeps="layer")
    check_norms(new, x)
    crossings = [model.crossing(x[:5]), model.crossing(x[5:])]
    other = renorm.reset(net, model, crossings, sweeps="layer")
    jax.tree.map(lambda a, b: close(a, b, 1e-3), other, new)


# --------------------------------------------------------------------------------- REPAIR, RESCALE


def check_moments(model, x, goals, names, *, means):
    _, found = model.run(x, capture=names)
    layers = {layer.name: layer for layer in model.net.layers}
    goal_mean, goal_std = goals
    for name in names:
        mean, var = of_site(found[name], layers[name].sample_axes)
        close(np.sqrt(var), goal_std[name], 1e-3)
        if means and layers[name].bias is not None:  # else it goes into the norm behind
            close(mean, goal_mean[name], 1e-3)


def carried_by_hand(net, trees, maps, x, names, weights):
    """Goals: of the values of each model, mapped at the layer, means and standard deviations."""
    mean, std = {}, {}
    layers = {layer.name: layer for layer in net.layers}
    for name in names:
        rows = []
        for tree, of in zip(trees, maps.merging, strict=True):
            tree = maps.in_units(net, tree)
            value = net.run(tree, x, capture=[name])[1][name]
            rows.append(of_site(net.map_site(tree, x, name, value, of), layers[name].sample_axes))
        mean[name] = sum(w * m for w, (m, _) in zip(weights, rows, strict=True))
        std[name] = sum(w * np.sqrt(v) for w, (_, v) in zip(weights, rows, strict=True))
    return mean, std


@pytest.mark.parametrize("kind", list(MAPS))
@pytest.mark.parametrize("name", list(APPLY))
def test_goals_are_the_models_own_moments_in_the_basis_of_the_merge(name, kind):
    net, trees, x = case(name, 3)
    found = MAPS[kind](net, 3)
    weights = (0.5, 0.3, 0.2)
    tree = merge.interpolate(found.apply(net, trees), weights)
    names = [layer.name for layer in net.layers]  # shortcuts, and two channel axes
    goals = carried_by_hand(net, trees, found, x, names, weights)
    scaled = [found.in_units(net, tree) for tree in trees]
    moments = stats.moments(net, scaled, [x], sites="all", covariance=names)
    for references in (trees, moments):
        options = {"references": references, "maps": found, "weights": weights, "sites": "all"}
        new = (
            merge.as_merged(net, repaired)
            if not isinstance(repaired := renorm.repair(net, tree, [x], **options), merge.Merged)
            else repaired
        )
        check_moments(new, x, goals, names, means=True)
    new = renorm.rescale(net, merge.as_merged(net, tree), [x], **options)
    check_moments(new, x, goals, names, means=False)
    # Carried beforehand, moments are references as any.
    carried = found.carry(moments)
    again = renorm.rescale(
        net, merge.as_merged(net, tree), [x], references=carried, weights=weights, sites="all"
    )
    jax.tree.map(close, again, new)


@pytest.mark.parametrize("name", list(APPLY))
def test_partial_merges_are_repaired_in_their_trunk(name):
    net, trees, x = case(name)
    found = random_zip(net, 2)
    depth = net.depth
    for merged in (slice(1, 3), slice(None, depth - 1), slice(2, None)):
        model = merge.partial(net, trees, found, span=merged)
        options = {"references": trees, "maps": found, "sites": "all"}
        new = renorm.repair(net, model, [x], **options)
        inside = [
            layer.name
            for layer in net.layers
            if not model.in_heads(layer.name)
            and (not model.in_stems(layer.name) and layer.depth >= model.cut)
            and (not model.cut or layer.main or not net.in_stem(layer.name, model.cut))
        ]
        goals = carried_by_hand(net, trees, found, x, inside, (0.5, 0.5))
        check_moments(new, x, goals, inside, means=True)
        for one, two in zip(new.stems, model.stems, strict=True):  # corrected behind the maps
            jax.tree.map(np.testing.assert_array_equal, one, two)
        if name == "heads":
            for one, two in zip(new.heads, model.heads, strict=True):
                jax.tree.map(np.testing.assert_array_equal, one, two)


def test_permutations_as_maps_do_with_variances_alone():
    net, trees, x = case("heads")
    moves = [{}, net.spec.random(jax.random.key(1))]
    found = Maps.of_permutations(moves)
    aligned = [trees[0], net.spec.permute(trees[1], moves[1])]
    model = merge.partial(net, trees, found, span=slice(1, 3))
    expected = renorm.repair(net, model, [x], references=aligned)
    plain = stats.moments(net, trees, [x], sites="all")
    for references in (trees, plain):
        new = renorm.repair(net, model, [x], references=references, maps=found)
        jax.tree.map(close, new, expected)


def test_references_with_classes_of_their_own():
    net, trees, x = case("heads", classes=7)
    found = random_zip(net, 2)
    model = merge.partial(net, trees, found, span=slice(1, 3))
    new = renorm.repair(net, model, [x], references=trees, maps=found)
    layers = ["w1", "w2", "w3"]
    each = [stats.moments(net, [tree], [x], sites="paper", covariance=layers) for tree in trees]
    other = renorm.repair(net, model, [x], references=each, maps=found)
    jax.tree.map(close, other, new)
    assert [out.shape for out in new(x)] == [(40, 3), (40, 7)]


def test_what_moments_lack_is_said():
    net, trees, x = case("heads")
    found = random_zip(net, 2)
    tree = merge.interpolate(found.apply(net, trees))
    plain = stats.moments(net, trees, [x])
    with pytest.raises(ValueError, match=r'covariance=\["w1"\]'):
        renorm.repair(net, tree, [x], references=plain, maps=found)
    with pytest.raises(ValueError, match="a sequence of moments of one model each"):
        renorm.repair(net, tree, [x], references=[plain, plain], maps=found)
    with pytest.raises(TypeError, match=r"maps must be a vfjax\.align\.Maps"):
        renorm.repair(net, tree, [x], references=trees, maps=[{}, {}])
    with pytest.raises(ValueError, match="the 2 models matched, got 3"):
        renorm.repair(net, tree, [x], references=[*trees, trees[0]], maps=found)


# ------------------------------------------------------------------------------------------ biases


def test_biases_change_in_the_trunk_alone():
    net, trees, _ = case("heads")
    model = merge.partial(net, trees, span=slice(1, 3))
    new = renorm.remove_bias(net, model, last="all")
    assert not new.trunk["b2"].any() and not new.trunk["b3"].any()
    new = renorm.remove_bias(net, model, last=2)
    assert new.trunk["b2"].any() and not new.trunk["b3"].any()
    calibrated = renorm.calibrate_bias(net, model)
    close(calibrated.trunk["b3"], model.trunk["b3"] / 4)
    found = random_zip(net, 2)
    model = merge.partial(net, trees, found, span=slice(1, 3))
    mapped = found.apply(net, trees)
    calibrated = renorm.calibrate_bias(net, model, references=mapped)
    close(calibrated.trunk["b2"], (mapped[0]["b2"] + mapped[1]["b2"]) / 4)
    for part in ("stems", "heads"):
        jax.tree.map(np.testing.assert_array_equal, getattr(calibrated, part), getattr(model, part))


@pytest.mark.parametrize("merged", [slice(None), slice(None, 3), slice(1, 3)])
def test_originals_with_maps_calibrate_as_mapped_references_do(merged):
    net, trees, _ = case("heads", classes=7 if merged.stop else 3)
    maps = random_zip(net, 2)
    model = merge.partial(net, trees, maps, span=merged, alpha=0.25)
    expected = renorm.calibrate_bias(net, model, references=maps.apply(net, trees))
    found = renorm.calibrate_bias(net, model, references=trees, maps=maps)
    jax.tree.map(close, found, expected)
    first, second = (np.asarray(tree["b3"]) for tree in maps.apply(net, trees))
    close(found.trunk["b3"], 0.75**3 * first + 0.25**3 * second)
    if merged == slice(None):
        tree = merge.interpolate(maps.apply(net, trees), alpha=0.25)
        options = {"references": trees, "maps": maps, "weights": (0.75, 0.25)}
        jax.tree.map(close, renorm.calibrate_bias(net, tree, **options), found.trunk)


def test_calibration_of_models_of_other_widths():
    def apply_fn(v, x):
        h = x @ v["a"]
        h = jax.nn.relu(h + along(v["ab"], h)) @ v["b"]
        h = jax.nn.relu(h + along(v["bb"], h)) @ v["c"]
        return h + along(v["cb"], h)

    rng = np.random.default_rng(5)
    trees = []
    for n, m, classes in ((8, 6, 3), (9, 7, 5)):
        shapes = {"a": (4, n), "b": (n, m), "c": (m, classes)}
        biases = {"ab": (n,), "bb": (m,), "cb": (classes,)}
        trees.append({name: normal(rng, *shape) for name, shape in (shapes | biases).items()})
    x = jnp.float32(np.random.default_rng(1).normal(size=(40, 4)))
    nets = [vfjax.trace(apply_fn, tree, x) for tree in trees]
    maps = vfjax.align.transport(nets, trees, [x])
    mapped = maps.apply(nets, trees)
    for merged in (slice(0, 2), slice(1, 2)):
        model = merge.partial(nets, trees, maps, span=merged)
        expected = (mapped[0]["bb"] + mapped[1]["bb"]) / 4
        for net in (nets, nets[0]):
            for options in ({"references": mapped}, {"references": trees, "maps": maps}):
                found = renorm.calibrate_bias(net, model, **options)
                close(found.trunk["bb"], expected)
            with pytest.raises(ValueError, match=r"references\[1\] has shape .* and maps=maps"):
                renorm.calibrate_bias(net, model, references=trees)
        report = diagnose.report(nets, model, [x], references=trees, maps=maps)
        assert all("maps.apply" not in advice.call for advice in report.advice)
    model = merge.partial(nets, trees, maps, span=slice(0, 2))
    with pytest.raises(ValueError, match="there are none"):
        renorm.calibrate_bias(nets, model, maps=maps)
    with pytest.raises(TypeError, match=r"maps must be a vfjax\.align\.Maps"):
        renorm.calibrate_bias(nets, model, references=trees, maps=[{}, {}])
    with pytest.raises(TypeError, match="references must be a list or tuple"):
        renorm.calibrate_bias(nets, model, references=trees[0])
    with pytest.raises(ValueError, match="the 2 models matched, got 1|2 networks for 1"):
        renorm.calibrate_bias(nets, model, references=trees[:1], maps=maps)


# --------------------------------------------------------------------------------------- diagnosis


def test_features_of_models_with_heads_are_means_over_heads():
    net, trees, x = case("heads")
    model = merge.partial(net, trees, random_zip(net, 2), span=slice(1, 3), alpha=0.25)
    found = diagnose.features(net, model, [x], sites=["w1", "w3", "w4", "output"])
    zero = jnp.zeros_like(x)
    _, here = model.read(x, ["w4", "w3"])
    _, there = model.read(zero, ["w4", "w3"])
    for site, weights in (("w4", (0.75, 0.25)), ("w3", (1.0,))):
        lengths = [
            np.linalg.norm(a - b, axis=-1).mean()
            for a, b in zip(here[site], there[site], strict=True)
        ]
        close(found.feature[site], [np.dot(weights, lengths)])
    close(found.feature["output"], found.feature["w4"])


@functools.cache
def own_networks(name):
    """The one network of models with 3 and 7 classes, and one each."""
    _, trees, x = case(name, classes=7)
    nets = [case(name)[0], vfjax.trace(APPLY[name], trees[1], x)]
    return nets[0], nets


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("apart", [False, True])
def test_features_of_heads_with_classes_of_their_own(monkeypatch, apart, backend):
    take_road(monkeypatch, backend)
    _, trees, x = case("heads", classes=7)
    nets = own_networks("heads")[apart]
    maps = random_zip(case("heads")[0], 2)
    model = merge.partial(nets, trees, maps, span=slice(1, 3), alpha=0.25)
    found = diagnose.features(nets, model, [x], references=trees, maps=maps, sites="layers")
    here, there = (model.read(at, ["w4"])[1]["w4"] for at in (x, jnp.zeros_like(x)))
    lengths = [np.linalg.norm(a - b, axis=-1).mean() for a, b in zip(here, there, strict=True)]
    close(found.feature["w4"], [np.dot((0.75, 0.25), lengths)])
    for k, (own, tree) in enumerate(zip(own_networks("heads")[1], trees, strict=True)):
        alone = diagnose.features(own, tree, [x], sites=["w4"])
        for what in ("feature", "feature_std", "offset", "variance", "dead"):
            theirs = getattr(found.references, what)["w4"][k : k + 1]
            close(theirs, getattr(alone, what)["w4"])
    for record in (found, found.references):
        assert list(record.mean) == list(record.std) == ["w1", "w2", "w3"]
        assert [site.size for site in record.sites] == [6, 6, 5, 5]  # of 3 and 7 classes
        assert all(np.isfinite(record.feature_rms[site]).all() for site in record.names)
    assert all(np.isfinite(found.relative[site]).all() for site in found.names)
    taps = diagnose.features(nets, [model, model], [x], references=trees, maps=maps)
    close(taps.feature["w4:act"], np.repeat(found.feature["w4"], 2))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", APPLY)
def test_reports_on_copies_with_heads_of_their_own(tmp_path, name, apart):
    net, trees, x = case(name)
    tree = renorm.reset(net, trees[0], [x], sweeps="layer") if net.norms else trees[0]
    last, bias = ("head", "bias") if name == "residual" else ("w4", "b4")
    head = draw(name, 0, classes=7)
    other = {**tree, last: head[last], bias: head[bias]}
    nets = own_networks(name)[apart]
    moves = net.spec.random(jax.random.key(2))
    copies = [tree, net.spec.permute(other, moves)]
    found = Maps.of_permutations([None, vfjax.symmetry.invert(moves, within=net.spec.within)])
    for merged in (slice(1, 3), slice(None, net.depth - 1)):
        model = merge.partial(nets, copies, found, span=merged)
        report = diagnose.report(
            nets, model, [x], references=copies, maps=found, page=tmp_path / "page.html"
        )
        assert [advice.remedy for advice in report.advice] == ["nothing to do"]
        close([row.relative for row in report.layers], np.ones(len(report.layers)))
        assert "nan" not in str(report) and (tmp_path / "page.html").exists()
        end = report.layers[-1]
        assert end.apart and np.isnan([end.std_ratio, end.mean_shift, end.rescaled_shift]).all()
        assert all(abs(row.std_ratio - 1) < 1e-3 for row in report.layers[:-1])


def test_reports_on_models_of_other_widths():
    def apply_fn(v, x):
        return jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"]) @ v["c"]

    rng = np.random.default_rng(2)
    sizes = [(4, 8, 6, 3), (4, 9, 7, 5)]
    trees = [
        {name: normal(rng, *size[k : k + 2]) for k, name in enumerate("abc")} for size in sizes
    ]
    x = jnp.float32(np.random.default_rng(1).normal(size=(40, 4)))
    nets = [vfjax.trace(apply_fn, tree, x) for tree in trees]
    maps = vfjax.align.transport(nets, trees, [x])
    model = merge.partial(nets, trees, maps, span=slice(0, 2))
    for net in (nets, nets[0]):  # those that the model was made with
        found = diagnose.report(net, model, [x], references=trees, maps=maps)
        assert found.advice and not np.isnan(found.layers[0].kernel_ratio)
        assert list(found.features.references.mean) == ["a", "b"]
    # Compared as they are, without a basis of the merge: by the size of their features alone.
    found = diagnose.report(nets, trees[0], [x], references=trees)
    assert [np.isnan(row.std_ratio) for row in found.layers] == [True] * 3
    alone = diagnose.features(nets[1], trees[1], [x], sites="layers")
    for name in alone.names:
        close(found.features.references.feature[name][1:], alone.feature[name])
    with pytest.raises(ValueError, match="net has 3 networks for 2 trees"):
        diagnose.features([*nets, nets[0]], trees[0], [x], references=trees)
    with pytest.raises(ValueError, match=r"references\[1\] has shape \(4, 9\) at 'a'"):
        diagnose.features(nets[0], trees[0], [x], references=trees)


def test_references_are_carried_into_the_basis_of_the_merge():
    net, trees, x = case("heads")
    for maps in (random_zip(net, 2), dense(net, 2)):
        tree = merge.interpolate(maps.apply(net, trees))
        sites = ["w1", "w1:act", "w2", "w3:act", "w4"]
        found = diagnose.features(net, tree, [x], references=trees, maps=maps, sites=sites)
        moments = stats.moments(net, trees, [x], sites=sites, covariance=sites[:4])
        carried = maps.carry(moments)
        for site in sites:
            close(found.references.mean[site], carried.mean[site])
            close(found.references.std[site], carried.std[site])
        # At the ends nothing is mapped.
        plain = diagnose.features(net, tree, [x], references=trees, sites=sites)
        close(found.references.feature["w4"], plain.references.feature["w4"])


def test_reports_on_a_model_merged_with_a_permuted_copy_of_itself():
    net, trees, x = case("residual")
    tree = renorm.reset(net, trees[0], [x], sweeps="layer")
    moves = net.spec.random(jax.random.key(2))
    copies = [tree, net.spec.permute(tree, moves)]
    found = Maps.of_permutations([None, vfjax.symmetry.invert(moves)])
    for merged in (slice(None), slice(1, 3), slice(None, 4)):
        model = merge.partial(net, copies, found, span=merged)
        report = diagnose.report(net, model, [x], references=copies, maps=found)
        assert [advice.remedy for advice in report.advice] == ["nothing to do"]
        close(report.layers[-1].relative, 1.0)
        for row in report.layers:
            assert row.mean_shift < 1e-3 and abs(row.std_ratio - 1) < 1e-3
            assert row.apart == model.apart(row.site)
        kernels = [row.merge_cosine for row in report.layers if not np.isnan(row.merge_cosine)]
        close(kernels, np.ones(len(kernels)))


def test_reports_on_partial_zips_say_what_to_do():
    net, trees, x = case("residual")
    trees = [renorm.reset(net, tree, [x], sweeps="layer") for tree in trees]
    found = random_zip(net, 2)
    model = merge.partial(net, trees, found, span=slice(None, 4))
    with pytest.raises(ValueError, match=r"renorm\.reset"):
        diagnose.report(net, model, [x], references=trees, maps=found)
    model = renorm.reset(net, model, [x], sweeps="layer")
    report = diagnose.report(net, model, [x], references=trees, maps=found)
    assert not any(norm.stale for norm in report.norms)
    assert "vfjax" in str(report) or report.advice
    # A head whose statistics are those of before is found out.
    stale = renorm.reset(net, merge.partial(net, trees, found, span=slice(None, 4)), [x])
    old = [{**head, "n4": {**head["n4"], "var": 9 * head["n4"]["var"]}} for head in stale.heads]
    report = diagnose.report(
        net, dataclasses.replace(stale, heads=tuple(old)), [x], references=trees, maps=found
    )
    assert "RESET" in [advice.remedy for advice in report.advice]


def test_other_diagnoses_take_models_with_heads():
    net, trees, x = case("heads")
    model = merge.partial(net, trees, span=slice(1, 3))
    found = diagnose.cka(model, (net, trees[0]), [x])
    assert found.first == ("w1:act", "w2:act") or "w4:act" not in found.first
    with pytest.raises(ValueError, match="inside the stems or heads"):
        diagnose.cka(model, (net, trees[0]), [x], sites=["w4"])
    same = merge.partial(net, [trees[0]] * 2, span=slice(1, 3))
    factors = diagnose.rescale_product(net, same, [trees[0]])
    close(list(factors.values()), np.ones(len(factors)))


def test_test_accuracy_of_every_head():
    net, trees, x = case("heads")
    model = merge.partial(net, trees, random_zip(net, 2), span=slice(1, 3))
    label = jnp.argmax(model(x)[1], -1)
    found = vfjax.train.evaluate(lambda m, x: m(x)[1], model, [(x, label)])
    assert found.accuracy == 1.0
