"""Renormalisation: what statistics are afterwards, where corrections go, and what stays."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import Compilations, along, assert_close, conv, norm, of_shapes, traced
from vfjax import (
    checkpoint,
    merge,
    renorm,
    stats,
)

# Moments of float32 values, summed in different orders, and folded into float32 kernels.
ROUNDING = 5e-5


def close(actual, expected, tol=ROUNDING):
    assert_close(actual, expected, tol, least=1e-30)


def trees_close(actual, expected, tol=ROUNDING):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(close, tol=tol), actual, expected)


# ------------------------------------------------------------------------------------- networks


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)


def head(v, x):
    x = x.mean((1, 2)) @ v["head"]
    return x + along(v["bias"], x)


def plain(v, x):
    for k in (1, 2, 3):
        x = conv(x, v[f"w{k}"])
        x = jax.nn.relu(x + along(v[f"b{k}"], x))
    return head(v, x)


def batchnorm(v, x):
    for k in (1, 2, 3):
        x = jax.nn.relu(norm(v[f"n{k}"], conv(x, v[f"w{k}"])))
    return head(v, x)


def residual(v, x):
    x = jax.nn.relu(norm(v["n0"], conv(x, v["w0"])))
    for block in ("a", "b"):
        p = v[block]
        y = jax.nn.relu(norm(p["n1"], conv(x, p["w1"])))
        y = norm(p["n2"], conv(y, p["w2"]))
        x = jax.nn.relu(y + (norm(p["n3"], conv(x, p["short"])) if "short" in p else x))
    return head(v, x)


def preactivated(v, x):
    """A norm that follows no layer directly, as in pre-activation residual networks."""
    x = conv(x, v["w1"])
    x = x + conv(jax.nn.relu(norm(v["n1"], x)), v["w2"])
    x = x + conv(jax.nn.relu(norm(v["n2"], x)), v["w3"])
    return head(v, jax.nn.relu(norm(v["n3"], x)))


def layernorm(v, x):
    """No biases and no stored means: a shift has nowhere to go."""
    for k in (1, 2, 3):
        x = jax.nn.relu(layer_norm(conv(x, v[f"w{k}"])))
    return head(v, x)


def masked(v, x):
    """A kernel behind a mask, into which no correction folds. The layer's name is "mask"."""
    for k in (1, 2, 3):
        w = v[f"w{k}"]
        x = conv(x, w * (1 - 0.5 * v["mask"]) if k == 2 else w)
        x = jax.nn.relu(x + along(v[f"b{k}"], x))
    return head(v, x)


def shared(v, x):
    """One kernel used twice."""
    x = conv(x, v["w1"])
    x = jax.nn.relu(x + along(v["b1"], x))
    for k in (2, 3):
        x = conv(x, v["w2"])
        x = jax.nn.relu(x + along(v[f"b{k}"], x))
    return head(v, x)


C = 4
BN = {"mean": (C,), "var": (C,), "scale": (C,), "bias": (C,)}
HEAD = {"head": (C, 3), "bias": (3,)}
KERNELS = {"w1": (3, 3, 2, C), "w2": (3, 3, C, C), "w3": (3, 3, C, C)}
BIASES = {"b1": (C,), "b2": (C,), "b3": (C,)}
BLOCK = {"w1": (3, 3, C, C), "w2": (3, 3, C, C), "n1": BN, "n2": BN}
NETWORKS = {
    "plain": (plain, KERNELS | BIASES | HEAD),
    "batchnorm": (batchnorm, KERNELS | HEAD | {"n1": BN, "n2": BN, "n3": BN}),
    "residual": (
        residual,
        {"w0": (3, 3, 2, C), "n0": BN, "a": BLOCK}
        | {"b": BLOCK | {"short": (1, 1, C, C), "n3": BN}}
        | HEAD,
    ),
    "preactivated": (preactivated, KERNELS | HEAD | {"n1": BN, "n2": BN, "n3": BN}),
    "layernorm": (layernorm, KERNELS | HEAD),
    "masked": (masked, KERNELS | BIASES | HEAD | {"mask": (3, 3, C, C)}),
    "shared": (shared, {"w1": KERNELS["w1"], "w2": KERNELS["w2"]} | BIASES | HEAD),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


@functools.cache
def network(name):
    """A traced network, two edge models, and data of one batch.

    Tests share compilations by sharing networks and the shape of the batch.
    """
    fn, shapes = NETWORKS[name]
    edges = [of_shapes(shapes, seed) for seed in (0, 1)]
    x = np.random.default_rng(9).normal(size=(16, 3, 3, 2))
    # Samples of different size, so that batches differ.
    x = jnp.asarray(x * np.linspace(0.5, 2, 16)[:, None, None, None], jnp.float32)
    return traced(fn, shapes, x.shape), edges, [x]


def several(data):
    """The same samples in two batches of different size."""
    return [data[0][:10], data[0][10:]]


def sites_of(net, cut):
    """Layers that are corrected at a cut, spelled out."""
    names = stats.resolve_sites(net, "paper")
    return [n for n in names if net.layer(n).depth >= cut]


def measured(model, data, names):
    """Mean and standard deviation of a model's pre-activations, over all of the data."""
    x = jnp.concatenate(data)
    _, values = model.run(x, capture=names)
    axes = {n: model.net.layer(n).sample_axes for n in names}
    means = {n: np.asarray(v, np.float64).mean(axes[n]) for n, v in values.items()}
    stds = {n: np.asarray(v, np.float64).std(axes[n]) for n, v in values.items()}
    return means, stds


def as_model(net, merged):
    return merged if isinstance(merged, merge.Merged) else merge.as_merged(net, merged)


RENORM = {"repair": renorm.repair, "rescale": renorm.rescale}
both = pytest.mark.parametrize("kind", list(RENORM))


# ------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "repair") for name in NETWORKS]
    + [(name, "rescale") for name in ("plain", "batchnorm", "layernorm", "masked")],
)
def test_statistics_are_the_interpolated_ones_on_one_batch(name, kind):
    net, edges, data = network(name)
    weights = (0.3, 0.7)
    tree = merge.interpolate(edges, weights)
    new = RENORM[kind](net, tree, data, references=edges, weights=weights)
    check_statistics(net, as_model(net, new), edges, data, weights, kind)


@pytest.mark.parametrize(
    ("name", "kind"), [("plain", "rescale"), ("residual", "repair"), ("preactivated", "repair")]
)
def test_sweeps_over_layers_are_exact_on_several_batches(name, kind):
    net, edges, data = network(name)
    data = several(data)
    tree = merge.interpolate(edges)
    new = RENORM[kind](net, tree, data, references=edges, sweeps="layer")
    check_statistics(net, as_model(net, new), edges, data, None, kind)
    # One pass is close, but not exact.
    single = as_model(net, RENORM[kind](net, tree, data, references=edges))
    goal = stats.moments(net, edges, data).mixed()[1]
    for site, std in measured(single, data, list(goal))[1].items():
        np.testing.assert_allclose(std, goal[site], rtol=0.5)


def check_statistics(net, model, edges, data, weights, kind, cut=0):
    names = sites_of(net, cut)
    goal_mean, goal_std = stats.moments(net, edges, data, sites=names).mixed(weights)
    means, stds = measured(model, data, names)
    for name in names:
        close(stds[name], goal_std[name])
        # A shift without a bias to go into sits in the mean of the norm that follows.
        if kind == "repair" and net.layer(name).norm is None:
            close(means[name], goal_mean[name], tol=ROUNDING * 4)
    if net.norms:
        check_norms(net, model, data)


def check_norms(net, model, data):
    """Stored statistics are the moments of what the norm then sees."""
    x = jnp.concatenate(data)
    trunk = dict(
        zip(net.paths, jax.tree.leaves(model.trunk, is_leaf=lambda v: v is None), strict=True)
    )
    norms = [n for n in net.norms if model.cut == 0 or not net.in_stem(n.site, model.cut)]
    _, values = model.run(x, capture=[n.site for n in norms])
    for n in norms:
        value = values[n.site]
        close(trunk[n.var], value.var(n.sample_axes))
        close(trunk[n.mean] + 0, value.mean(n.sample_axes), tol=ROUNDING * 4)


@pytest.mark.parametrize(
    ("name", "kind"), [("plain", "repair"), ("batchnorm", "rescale"), ("residual", "repair")]
)
def test_statistics_at_every_cut(name, kind):
    net, edges, data = network(name)
    weights = (0.3, 0.7)
    references = stats.moments(net, edges, data)
    for cut in range(1, net.depth + 1):
        model = merge.preserve_first(net, edges, layers=cut, weights=weights)
        # weights=None: those of the merged model.
        new = RENORM[kind](net, model, data, references=references)
        assert isinstance(new, merge.Merged) and new.cut == cut
        if sites_of(net, cut):
            check_statistics(net, new, edges, data, weights, kind, cut)


def test_sweeps_over_layers_at_a_cut():
    net, edges, data = network("residual")
    data = several(data)
    model = merge.preserve_first(net, edges, layers=3)
    new = renorm.repair(net, model, data, references=edges, sweeps="layer")
    check_statistics(net, new, edges, data, None, "repair", cut=3)


def test_rescale_adds_no_shift():
    """Without biases and norms, a network's pre-activations at x = 0 stay 0."""
    net, edges, data = network("layernorm")
    new = renorm.rescale(net, merge.interpolate(edges), data, references=edges)
    assert not isinstance(new, merge.Merged)
    x = jnp.zeros_like(data[0])
    names = list(stats.resolve_sites(net, "paper"))
    for value in net.run(new, x, capture=names)[1].values():
        assert bool((value == 0).all())


@pytest.mark.parametrize(
    ("name", "kind"), [("plain", "repair"), ("residual", "repair"), ("masked", "rescale")]
)
def test_a_model_merged_with_itself_stays_itself(name, kind):
    net, (tree, _), data = network(name)
    start = tree
    if net.norms:
        start = renorm.reset(net, tree, data)
    expected = net.run(start, data[0])
    for layers in range(net.depth + 1):
        model = merge.preserve_first(net, [start] * 2, layers=layers, weights=(0.3, 0.7))
        new = RENORM[kind](net, model, data, references=[start] * 2)
        # Corrections near one add the rounding of their own measurement.
        close(new(data[0]), expected, tol=2e-4)


@pytest.mark.parametrize("name", ["plain", "batchnorm", "layernorm"])
def test_the_edges_come_back_at_the_ends(name):
    net, edges, data = network(name)
    for alpha in (0, 1):
        weights = (1 - alpha, alpha)
        start = [renorm.reset(net, e, data) if net.norms else e for e in edges]
        tree = merge.interpolate(start, weights)
        new = renorm.repair(net, tree, data, references=start, weights=weights)
        close(as_model(net, new)(data[0]), net.run(start[alpha], data[0]), tol=2e-4)


# --------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize(
    ("name", "kind", "explicit"),
    [
        ("plain", "repair", []),
        ("batchnorm", "repair", []),
        ("residual", "repair", []),
        ("residual", "rescale", []),
        ("layernorm", "repair", ["w1", "w2", "w3"]),
        ("layernorm", "rescale", []),
        ("masked", "repair", ["mask"]),
        ("masked", "rescale", ["mask"]),
        ("shared", "repair", ["w2", "w2#2"]),
        ("shared", "rescale", ["w2", "w2#2"]),
    ],
)
def test_corrections_that_do_not_fold_stay_explicit(name, kind, explicit):
    net, edges, data = network(name)
    new = RENORM[kind](net, merge.interpolate(edges), data, references=edges)
    if explicit:
        assert isinstance(new, merge.Merged) and new.cut == 0 and new.stems == ()
        assert sorted(new.corrections) == explicit
        assert new.params == net.params
    else:
        assert jax.tree.structure(new) == jax.tree.structure(edges[0])


@pytest.mark.parametrize(
    ("name", "kind"), [("plain", "repair"), ("batchnorm", "repair"), ("shared", "rescale")]
)
def test_folding_changes_no_output(name, kind):
    net, edges, data = network(name)
    apply_fn = NETWORKS[name][0]

    def hidden(v, x):
        """The same network, whose kernels are not leaves, so that nothing folds."""
        return apply_fn({k: w * 1 if k[0] in "wh" else w for k, w in v.items()}, x)

    opaque = vfjax.trace(hidden, edges[0], data[0])
    assert not any(opaque.can_fold(layer.name, shift=False) for layer in opaque.layers)
    for cut in (0, 2):
        folded, explicit = (
            RENORM[kind](of, merge.preserve_first(of, edges, layers=cut), data, references=edges)
            for of in (net, opaque)
        )
        assert sorted(explicit.corrections) == sorted(sites_of(opaque, cut))
        assert len(sites_of(opaque, cut)) == len(sites_of(net, cut))
        assert len(folded.corrections) <= len(explicit.corrections)
        close(folded(data[0]), explicit(data[0]), tol=2e-4)


def test_a_second_correction_joins_an_explicit_first():
    net, edges, data = network("masked")
    once = renorm.repair(net, merge.interpolate(edges), data, references=edges)
    goals = [jax.tree.map(lambda v: v * 1.5, e) for e in edges]
    twice = renorm.repair(net, once, data, references=goals)
    assert sorted(twice.corrections) == ["mask"]
    check_statistics(net, twice, goals, data, None, "repair")
    # Repairing what is repaired changes nothing.
    again = renorm.repair(net, once, data, references=edges)
    close(again(data[0]), once(data[0]), tol=2e-4)


@both
def test_a_model_with_corrections_is_saved_and_loaded(kind, tmp_path):
    net, edges, data = network("masked")
    new = RENORM[kind](net, merge.interpolate(edges), data, references=edges)
    checkpoint.save(tmp_path / "m", new)
    loaded = checkpoint.load(tmp_path / "m", net=net)
    assert list(loaded.corrections) == ["mask"]
    np.testing.assert_array_equal(loaded(data[0]), new(data[0]))


def test_stems_are_touched_at_the_cut_only():
    net, edges, data = network("plain")
    model = merge.preserve_first(net, edges, layers=2)
    new = renorm.repair(net, model, data, references=edges)
    assert new.corrections == {}
    for before, after in zip(model.stems, new.stems, strict=True):
        np.testing.assert_array_equal(before["w1"], after["w1"])
        np.testing.assert_array_equal(before["b1"], after["b1"])
        factor = after["w2"] / before["w2"]
        np.testing.assert_allclose(
            factor, np.broadcast_to(factor[0, 0, 0], factor.shape), rtol=1e-4
        )
    ratios = [
        a["w2"][0, 0, 0] / b["w2"][0, 0, 0] for a, b in zip(new.stems, model.stems, strict=True)
    ]
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=1e-4)


def test_a_stem_without_bias_lends_its_shift_to_the_norm_of_the_trunk():
    net, edges, data = network("batchnorm")
    model = merge.preserve_first(net, edges, layers=2)
    new = renorm.repair(net, model, data, references=edges)
    assert new.corrections == {}
    # The norm's own statistics undo the repair: what comes out is RESET's.
    close(new(data[0]), renorm.reset(net, model, data)(data[0]), tol=2e-4)
    for before, after in zip(model.stems, new.stems, strict=True):
        np.testing.assert_array_equal(before["n1"]["mean"], after["n1"]["mean"])


# ----------------------------------------------------------------------------------------- reset


@pytest.mark.parametrize("name", ["batchnorm", "residual", "preactivated"])
@pytest.mark.parametrize("sweeps", ["batch", "layer"])
def test_reset_stores_the_moments_of_what_norms_see(name, sweeps):
    net, edges, data = network(name)
    if sweeps == "layer":
        data = several(data)
    tree = merge.interpolate(edges)
    new = renorm.reset(net, tree, data, sweeps=sweeps)
    check_norms(net, merge.as_merged(net, new), data)
    leaves = dict(zip(net.paths, jax.tree.leaves(tree), strict=True))
    changed = dict(zip(net.paths, jax.tree.leaves(new), strict=True))
    for path in net.paths:
        if path.split("/")[-1] not in ("mean", "var"):
            np.testing.assert_array_equal(leaves[path], changed[path])
    model = merge.preserve_first(net, edges, layers=2)
    again = renorm.reset(net, model, data, sweeps=sweeps)
    check_norms(net, again, data)
    trees_close(again.stems, model.stems, tol=0)


def test_one_pass_of_reset_pools_what_a_network_in_training_mode_would():
    """Against running the network with batch statistics, batch by batch."""
    net, edges, data = network("batchnorm")
    data = several(data)
    tree = merge.interpolate(edges)
    new = renorm.reset(net, tree, data)
    counts, means, squares = [], [], []
    for x in data:
        for k in (1, 2):
            u = conv(x, tree[f"w{k}"])
            p = tree[f"n{k}"] | {"mean": u.mean((0, 1, 2)), "var": u.var((0, 1, 2))}
            x = jax.nn.relu(norm(p, u))
        counts.append(u.size / C)
        means.append(u.mean((0, 1, 2)))
        squares.append(jnp.square(u).mean((0, 1, 2)))
    share = np.asarray(counts) / np.sum(counts)
    mean = sum(s * m for s, m in zip(share, means, strict=True))
    var = sum(s * q for s, q in zip(share, squares, strict=True)) - mean**2
    close(new["n2"]["mean"], mean)
    close(new["n2"]["var"], var)


def test_reset_keeps_leaf_dtypes():
    net, edges, data = network("batchnorm")
    trees = [jax.tree.map(lambda v: v.astype(jnp.bfloat16), e) for e in edges]
    x = data[0].astype(jnp.bfloat16)
    net = vfjax.trace(batchnorm, trees[0], x)
    new = renorm.reset(net, merge.interpolate(trees), [x])
    assert all(v.dtype == jnp.bfloat16 for v in jax.tree.leaves(new))
    close(
        new["n1"]["var"].astype(jnp.float32),
        conv(x, merge.interpolate(trees)["w1"]).astype(jnp.float32).var((0, 1, 2)),
        tol=0.02,  # one rounding of bfloat16, twice
    )


def test_nothing_to_reset_is_an_error_and_a_trunk_without_norms_is_not():
    net, edges, data = network("plain")
    with pytest.raises(ValueError, match="nothing to reset"):
        renorm.reset(net, edges[0], data)
    net, edges, data = network("batchnorm")
    whole_stems = merge.ensemble(net, edges)
    close(renorm.reset(net, whole_stems, data)(data[0]), whole_stems(data[0]), tol=0)


# ------------------------------------------------------------------------------------------ data


def test_the_order_of_batches_and_samples_does_not_matter():
    net, edges, data = network("preactivated")
    data = several(data)
    tree = merge.interpolate(edges)
    references = stats.moments(net, edges, data)
    one = renorm.repair(net, tree, data, references=references)
    two = renorm.repair(net, tree, [d[::-1] for d in data[::-1]], references=references)
    trees_close(two, one, tol=2e-4)
    # However cut into batches, exactly so with sweeps over layers.
    parts = jnp.split(jnp.concatenate(data), [6])
    one = renorm.repair(net, tree, data, references=references, sweeps="layer")
    two = renorm.repair(net, tree, parts, references=references, sweeps="layer")
    trees_close(two, one, tol=2e-4)


def test_labels_are_dropped_and_references_may_be_trees_or_moments():
    net, edges, data = network("plain")
    tree = merge.interpolate(edges)
    labelled = [(x, jnp.zeros(len(x), int)) for x in data]
    one = renorm.rescale(net, tree, data, references=edges)
    two = renorm.rescale(net, tree, labelled, references=stats.moments(net, edges, labelled))
    trees_close(two, one, tol=1e-6)


def test_stored_crossings_stand_in_for_batches():
    net, edges, data = network("residual")
    data = several(data)
    references = stats.moments(net, edges, data)
    model = merge.preserve_first(net, edges, layers=3)
    crossings = [jax.jit(model.crossing)(x) for x in data]
    for sweeps in ("batch", "layer"):
        one = renorm.repair(net, model, data, references=references, sweeps=sweeps)
        two = renorm.repair(net, model, crossings, references=references, sweeps=sweeps)
        trees_close(two, one, tol=2e-4)
    with pytest.raises(ValueError, match="crossings, which the references cannot"):
        renorm.repair(net, model, crossings, references=edges)
    other = merge.preserve_first(net, edges, layers=2)
    with pytest.raises(ValueError, match="data must hold crossings at the model's cut, 2"):
        renorm.repair(net, other, crossings, references=references)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_batches_give_the_same(axis_type):
    net, edges, data = network("batchnorm")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[axis_type],))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    references = stats.moments(net, edges, data)
    split = [jax.device_put(data[0], sharding), data[0][:6]]
    model = merge.preserve_first(net, edges, layers=2)
    one = renorm.repair(net, model, [data[0], data[0][:6]], references=references)
    two = renorm.repair(net, model, split, references=references)
    trees_close(jax.device_get(two), jax.device_get(one), tol=2e-4)


def test_a_second_call_compiles_nothing():
    net, edges, data = network("plain")
    references = stats.moments(net, edges, data)
    models = [merge.preserve_first(net, edges, layers=2, weights=(a, 1 - a)) for a in (0.25, 0.5)]
    renorm.repair(net, models[0], data, references=references)
    with Compilations() as compiled:
        # Another column of a table, another weight, another kind: all share the compilation.
        renorm.repair(net, models[1], data, references=references)
        renorm.rescale(net, models[1], data, references=references)
        renorm.rescale(net, models[0], data, references=references)
    assert compiled.count == 0


# --------------------------------------------------------------------------------- dead channels


@both
def test_a_constant_channel_keeps_its_scale(kind):
    net, edges, data = network("plain")
    dead = jax.tree.map(lambda v: v, merge.interpolate(edges))
    dead["w2"] = dead["w2"].at[..., 1].set(0)
    dead["b2"] = dead["b2"].at[1].set(3.0)
    new = RENORM[kind](net, dead, data, references=edges)
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(new))
    np.testing.assert_array_equal(new["w2"][..., 1], 0)
    # REPAIR moves the mean to the goal; RESCALE leaves the constant alone.
    goal, _ = stats.moments(net, edges, data, sites=["w2"]).mixed()
    expected = goal["w2"][1] if kind == "repair" else 3.0
    np.testing.assert_allclose(new["b2"][1], expected, rtol=1e-5)


@both
def test_a_large_constant_does_not_seem_to_vary(kind):
    """Rounding of a mean of 3000 is noise of 1e-4, and no signal to blow up."""
    net, (tree, _), data = network("plain")
    large = dict(tree)
    large["w2"] = large["w2"].at[..., 1].set(0)
    large["b2"] = large["b2"].at[1].set(3000.7)
    new = RENORM[kind](net, large, data, references=[large])
    np.testing.assert_allclose(new["b2"][1], 3000.7, rtol=1e-5)
    np.testing.assert_array_equal(new["w2"][..., 1], 0)


def test_vanishing_features_are_restored_however_small():
    """No eps: a layer whose standard deviation is 1e-9 is scaled by 1e9."""
    net, edges, data = network("plain")
    tiny = dict(merge.interpolate(edges))
    tiny["w1"], tiny["b1"] = tiny["w1"] * 1e-9, tiny["b1"] * 1e-9
    new = renorm.repair(net, tiny, data, references=edges)
    check_statistics(net, merge.as_merged(net, new), edges, data, None, "repair")


# ---------------------------------------------------------------------------------------- biases


def biases(net, tree):
    leaves = dict(zip(net.paths, jax.tree.leaves(tree, is_leaf=lambda v: v is None), strict=True))
    return {layer.depth: leaves[layer.bias] for layer in net.layers if layer.bias is not None}


@pytest.mark.parametrize("side", ["last", "first"])
def test_biases_are_removed_from_either_end_counting_the_head(side):
    net, (tree, _), _ = network("plain")
    for count in range(net.depth + 1):
        new = renorm.remove_bias(net, tree, **{side: count})
        for depth, bias in biases(net, new).items():
            lost = depth > net.depth - count if side == "last" else depth <= count
            expected = jnp.zeros_like(bias) if lost else biases(net, tree)[depth]
            np.testing.assert_array_equal(bias, expected)
        kernels = {k: v for k, v in new.items() if k not in ("b1", "b2", "b3", "bias")}
        trees_close(kernels, {k: tree[k] for k in kernels}, tol=0)
    trees_close(renorm.remove_bias(net, tree, **{side: 0}), tree, tol=0)
    trees_close(renorm.remove_bias(net, tree, **{side: "all"}), new, tol=0)


@pytest.mark.parametrize("name", ["plain", "shared", "masked"])
def test_first_and_last_together_are_all(name):
    """Each bias is of the first k layers or of the last L - k, and of one of them only."""
    net, (tree, _), _ = network(name)
    everything = renorm.remove_bias(net, tree, last="all")
    for count in range(net.depth + 1):
        first = renorm.remove_bias(net, tree, first=count)
        last = renorm.remove_bias(net, tree, last=net.depth - count)
        trees_close(renorm.remove_bias(net, first, last=net.depth - count), everything, tol=0)
        jax.tree.map(
            lambda a, b, whole, none: np.testing.assert_array_equal(a + b, whole + none),
            *(biases(net, v) for v in (first, last, tree, everything)),
        )


def test_removal_leaves_norms_and_stems_alone():
    net, edges, _ = network("residual")
    for side in ("last", "first"):
        new = renorm.remove_bias(net, edges[0], **{side: "all"})
        np.testing.assert_array_equal(new["bias"], 0)
        trees_close(new["a"], edges[0]["a"], tol=0)
    net, edges, _ = network("plain")
    model = merge.preserve_first(net, edges, layers=2)
    for side in ("last", "first"):
        new = renorm.remove_bias(net, model, **{side: "all"})
        trees_close(new.stems, model.stems, tol=0)
        np.testing.assert_array_equal(new.trunk["b3"], 0)
        assert new.trunk["b2"] is None and new.weights == model.weights
    # Layers in stems count, though they keep their biases.
    trees_close(renorm.remove_bias(net, model, first=2), model, tol=0)
    new = renorm.remove_bias(net, model, first=3)
    np.testing.assert_array_equal(new.trunk["b3"], 0)
    trees_close(new.trunk["bias"], model.trunk["bias"], tol=0)


@pytest.mark.parametrize("side", ["last", "first"])
@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (-1, ValueError, "must be from 0 to 4"),
        (5, ValueError, "must be from 0 to 4"),
        (1.5, TypeError, 'must be an integer or "all"'),
        ("every", TypeError, 'must be an integer or "all"'),
        (True, TypeError, 'must be an integer or "all"'),
    ],
)
def test_bad_counts_of_biases(side, count, error, message):
    net, edges, _ = network("plain")
    with pytest.raises(error, match=f"{side} {message}"):
        renorm.remove_bias(net, edges[0], **{side: count})


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "got neither"), ({"last": 1, "first": 0}, "got last=1 and first=0")],
)
def test_biases_are_removed_from_one_end(given, message):
    net, edges, _ = network("plain")
    with pytest.raises(ValueError, match=f"exactly one of last and first must be given, {message}"):
        renorm.remove_bias(net, edges[0], **given)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_calibration_is_homogeneous_in_the_weights(weights):
    net, edges, _ = network("plain")
    tree = merge.interpolate(edges, weights)
    new = renorm.calibrate_bias(net, tree, references=edges, weights=weights)
    a, b = (biases(net, e) for e in edges)
    for depth, bias in biases(net, new).items():
        close(bias, weights[0] ** depth * a[depth] + weights[1] ** depth * b[depth], tol=1e-6)
    if 1.0 in weights:
        trees_close(new, edges[weights.index(1.0)], tol=0)
    if weights == (0.5, 0.5):
        trees_close(renorm.calibrate_bias(net, tree), new, tol=1e-6)
    np.testing.assert_array_equal(new["w2"], tree["w2"])


def test_calibration_without_references_counts_models():
    net, edges, _ = network("plain")
    three = [*edges, edges[0]]
    tree = merge.interpolate(three)
    for layers in (0, 2):
        model = merge.preserve_first(net, three, layers=layers)
        new = renorm.calibrate_bias(net, model)
        trees_close(new.stems, model.stems, tol=0)
        np.testing.assert_allclose(new.trunk["b3"], tree["b3"] / 9, rtol=1e-6)
        np.testing.assert_allclose(new.trunk["bias"], tree["bias"] / 27, rtol=1e-6)
        trees_close(new, renorm.calibrate_bias(net, model, references=three), tol=1e-6)
    np.testing.assert_allclose(renorm.calibrate_bias(net, tree)["b3"], tree["b3"] / 4, rtol=1e-6)
    new = renorm.calibrate_bias(net, tree, weights=(1 / 3, 1 / 3, 1 / 3))
    np.testing.assert_allclose(new["b3"], tree["b3"] / 9, rtol=1e-6)


def test_unequal_weights_need_references():
    net, edges, _ = network("plain")
    model = merge.preserve_first(net, edges, layers=1, weights=(0.3, 0.7))
    with pytest.raises(ValueError, match="weights are unequal"):
        renorm.calibrate_bias(net, model)
    with pytest.raises(ValueError, match="weights are unequal"):
        renorm.calibrate_bias(net, merge.interpolate(edges), weights=(0.3, 0.7))
    new = renorm.calibrate_bias(net, model, references=edges)  # its own weights
    np.testing.assert_allclose(
        new.trunk["b2"], 0.09 * edges[0]["b2"] + 0.49 * edges[1]["b2"], rtol=1e-5
    )
    # An end of the interval is an edge model, whose biases are its own.
    for weights in ((1, 0), (0, 1)):
        end = merge.preserve_first(net, edges, layers=1, weights=weights)
        trees_close(renorm.calibrate_bias(net, end), end, tol=0)


def test_a_bias_of_several_depths_cannot_be_calibrated():
    def fn(v, x):
        for w in ("w1", "w2"):
            x = x @ v[w]
            x = jax.nn.relu(x + along(v["b"], x))
        return x @ v["w3"]

    tree = {
        "w1": jnp.ones((2, 2)),
        "w2": jnp.ones((2, 2)),
        "w3": jnp.ones((2, 2)),
        "b": jnp.ones(2),
    }
    net = vfjax.trace(fn, tree, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="'b' serves layers of depths"):
        renorm.calibrate_bias(net, tree)
    with pytest.raises(ValueError, match="'b' serves layers of depths"):
        renorm.remove_bias(net, tree, last=2)
    with pytest.raises(ValueError, match="'b' serves layers of depths"):
        renorm.remove_bias(net, tree, first=1)
    np.testing.assert_array_equal(renorm.remove_bias(net, tree, first=2)["b"], 0)
    np.testing.assert_array_equal(renorm.remove_bias(net, tree, last=1)["b"], 1)
    np.testing.assert_array_equal(renorm.remove_bias(net, tree, last="all")["b"], 0)


def test_biases_of_an_unrolled_scan_are_told_apart():
    def fn(v, x):
        def step(x, p):
            y = x @ p["w"]
            return jax.nn.relu(y + along(p["b"], y)), None

        x, _ = jax.lax.scan(step, x, v["layers"])
        return x @ v["head"]

    layers = {"w": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 2))}
    tree = {"layers": layers, "head": jnp.ones((2, 2))}
    net = vfjax.trace(fn, tree, jnp.ones((1, 2)))
    new = renorm.remove_bias(net, tree, last=2)
    np.testing.assert_array_equal(new["layers"]["b"], [[1, 1], [1, 1], [0, 0]])
    new = renorm.remove_bias(net, tree, first=2)
    np.testing.assert_array_equal(new["layers"]["b"], [[0, 0], [0, 0], [1, 1]])
    new = renorm.calibrate_bias(net, tree)
    np.testing.assert_array_equal(new["layers"]["b"][:, 0], [1, 0.5, 0.25])


# ------------------------------------------------------------------------------------- bad input


def nan_tree(tree):
    return tree | {"b1": tree["b1"] * jnp.nan}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sites": ["nowhere"]}, ValueError, "nowhere"),
        ({"sites": ["w1:act"]}, ValueError, "sites must be layers"),
        ({"sites": "taps"}, ValueError, "sites must be layers"),
        ({"sweeps": "twice"}, ValueError, "sweeps must be 'batch' or 'layer'"),
        ({"weights": (0.5, 0.6)}, ValueError, "weights must sum to one"),
        ({"weights": (1.0,)}, ValueError, "weights has 1 entries for 2 references"),
        ({"references": []}, ValueError, "references is empty"),
        ({"references": {"w1": 1}}, TypeError, "references must be a list or tuple"),
        ({"references": [{"v": jnp.ones(2)}]}, ValueError, "references.0. differs in structure"),
        ({"data": []}, ValueError, "`data` gave no batches"),
        ({"data": [np.zeros((2, 3, 3, 2), "int32")]}, TypeError, "dtype int32"),
        ({"merged": {"v": jnp.ones(2)}}, ValueError, "merged differs in structure"),
    ],
)
@both
def test_bad_input(kind, change, error, message):
    net, edges, data = network("plain")
    given = {"merged": edges[0], "data": data, "references": edges} | change
    merged, data = given.pop("merged"), given.pop("data")
    with pytest.raises(error, match=message):
        RENORM[kind](net, merged, data, **given)


def test_more_bad_input():
    net, edges, data = network("plain")
    tree = merge.interpolate(edges)
    with pytest.raises(ValueError, match="merged holds 4 NaN"):
        renorm.rescale(net, nan_tree(tree), data, references=edges)
    with pytest.raises(ValueError, match="merged holds 4 NaN"):
        renorm.remove_bias(net, nan_tree(tree), last=1)
    with pytest.raises(ValueError, match="exhausted"):
        renorm.rescale(net, tree, iter(data), references=edges)
    few = stats.moments(net, edges, data, sites=["w1"])
    with pytest.raises(ValueError, match="references holds no moments at .'w2'"):
        renorm.rescale(net, tree, data, references=few)
    other, others, _ = network("masked")
    model = merge.preserve_first(other, others, layers=1)
    with pytest.raises(ValueError, match="another network"):
        renorm.rescale(net, model, data, references=edges)
    with pytest.raises(ValueError, match="another network"):
        renorm.calibrate_bias(net, model)


def test_sites_by_name_and_all():
    net, edges, data = network("plain")
    tree = merge.interpolate(edges)
    one = renorm.repair(net, tree, data, references=edges, sites=["w2"])
    np.testing.assert_array_equal(one["w1"], tree["w1"])
    np.testing.assert_array_equal(one["w3"], tree["w3"])
    every = renorm.repair(net, tree, data, references=edges, sites="all")
    goal = stats.moments(net, edges, data, sites=["head"]).mixed()
    means, stds = measured(merge.as_merged(net, every), data, ["head"])
    close(means["head"], goal[0]["head"])
    close(stds["head"], goal[1]["head"])


@pytest.mark.parametrize("method", [renorm.repair, renorm.rescale])
def test_data_with_nan_is_an_error(method):
    v = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}
    x = jax.random.normal(jax.random.key(0), (5, 4))
    net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], v, x)
    references = vfjax.stats.moments(net, [v], [x])
    with pytest.raises(ValueError, match="data gives NaN"):
        method(net, v, [x, x.at[0].set(jnp.nan)], references=references)
