"""RESET of norms in every form: it ends where RESET of the same norm in the plain form ends."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from vfjax import align, diagnose, merge, renorm

C, EPS = 4, 1e-3


def plain(p, x):
    return (x - p["mean"]) / jnp.sqrt(p["var"] + EPS) * p["scale"] + p["bias"]


def keras(p, x):
    inv = lax.rsqrt(p["var"] + EPS) * p["scale"]
    return x * inv + (-p["mean"] * inv + p["bias"])


def frozen(p, x):
    scale = p["scale"] * (p["var"] + EPS) ** -0.5
    return scale * x + (p["bias"] - p["mean"] * scale)


def split(p, x):
    std = jnp.sqrt(p["var"] + EPS)
    return x / std * p["scale"] - p["mean"] / std * p["scale"] + p["bias"]


def added(p, x):
    return (x + -p["mean"]) * (1 / jnp.sqrt(p["var"] + EPS)) * p["scale"] + p["bias"]


def centred(p, x):
    return (x - p["mean"]) * lax.rsqrt(p["var"] + EPS) * (1 + (p["scale"] - 1)) + p["bias"]


def debiased(p, x):
    """As Equinox does: averages from zero, and a counter."""
    left = jnp.where(p["count"] == 0, 1, 1 - 0.9 ** p["count"])
    return plain(p | {"mean": p["mean"] / left, "var": p["var"] / left}, x)


def weighted(p, x):
    """The sums of weighted statistics, and the sum of the weights."""
    return plain(p | {"mean": p["mean"] / p["total"], "var": p["var"] / p["total"]}, x)


def deviations(p, x):
    return (x - p["mean"]) * lax.rsqrt(jnp.square(p["var"]) + EPS) * p["scale"] + p["bias"]


# What each form stores, of a variance and a mean.
FORMS = {
    "plain": (plain, lambda m, v: (m, v)),
    "keras": (keras, lambda m, v: (m, v)),
    "frozen": (frozen, lambda m, v: (m, v)),
    "split": (split, lambda m, v: (m, v)),
    "added": (added, lambda m, v: (m, v)),
    "centred": (centred, lambda m, v: (m, v)),
    "debiased": (debiased, lambda m, v: (m * (1 - 0.9**3), v * (1 - 0.9**3))),
    "weighted": (weighted, lambda m, v: (2.5 * m, 2.5 * v)),
    "deviations": (deviations, lambda m, v: (m, np.sqrt(v))),
}


def tree_of(store, seed):
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=C), 0.5 + rng.random(C)
    tree = {
        "w": rng.normal(size=(3, C)),
        "u": rng.normal(size=(C, C)),
        "v": rng.normal(size=(C, 2)),
    }
    for k in "01":
        stored = dict(zip(("mean", "var"), store(mean, var), strict=True))
        norm = stored | {"scale": 1 + 0.3 * rng.normal(size=C), "bias": rng.normal(size=C)}
        tree[f"n{k}"] = norm | {"total": np.array(2.5)}
    tree = jax.tree.map(jnp.float32, tree)
    for k in "01":
        tree[f"n{k}"]["count"] = jnp.int32(3)
    return tree


@functools.cache
def network(name):
    form, store = FORMS[name]

    def fn(p, x):
        rows = {k: jax.tree.map(lambda a: a[None] if a.ndim else a, p[k]) for k in ("n0", "n1")}
        x = jnp.tanh(form(rows["n0"], x @ p["w"]))
        return jnp.tanh(form(rows["n1"], x @ p["u"])) @ p["v"]

    trees = [tree_of(store, seed) for seed in (0, 1)]
    return vfjax.trace(fn, trees[0], X), trees


X = jnp.float32(np.random.default_rng(9).normal(1, 2, size=(16, 3)))
DATA = [X[:10], X[10:]]


@pytest.mark.parametrize("name", list(FORMS))
def test_reset_ends_where_the_plain_form_does(name):
    net, trees = network(name)
    known, same = network("plain")
    assert [(n.mean, n.var, n.layer) for n in net.norms] == [
        ("n0/mean", "n0/var", "w"), ("n1/mean", "n1/var", "u")
    ]  # fmt: skip
    assert net.spec == known.spec and not net.spec.rigid
    assert net.statistics == known.statistics and net.flops == known.flops
    assert net.others == known.others == () and net.depth == known.depth
    np.testing.assert_allclose(net.run(trees[0], X), known.run(same[0], X), rtol=1e-4, atol=1e-5)
    merged, expected = merge.interpolate(trees), merge.interpolate(same)
    for sweeps in ("layer", "batch") if name == "debiased" else ("batch",):
        new = renorm.reset(net, merged, DATA, sweeps=sweeps)
        wanted = renorm.reset(known, expected, DATA, sweeps=sweeps)
        out = known.run(wanted, X)
        np.testing.assert_allclose(net.run(new, X), out, rtol=1e-4, atol=1e-4)
        for norm in ("n0", "n1"):
            stored = FORMS[name][1](wanted[norm]["mean"], wanted[norm]["var"])
            for leaf, value in zip(("mean", "var"), stored, strict=True):
                np.testing.assert_allclose(new[norm][leaf], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["keras", "debiased", "deviations"])
def test_what_else_reads_statistics_agrees_too(name):
    """Folding a shift, mixing features."""
    (net, trees), (known, same) = network(name), network("plain")
    scale, shift = jnp.float32([1, 2, 3, 4]), jnp.float32([1, -1, 0, 2])
    assert net.can_fold("w")
    pairs = [(net.fold(trees[0], "w", scale, shift)), known.fold(same[0], "w", scale, shift)]
    np.testing.assert_allclose(net.run(pairs[0], X), known.run(pairs[1], X), rtol=1e-3, atol=1e-4)
    maps = align.zip_features(known, same, [X])
    merged = [
        renorm.reset(a, merge.interpolate(maps.apply(a, of)), [X])
        for a, of in ((net, trees), (known, same))
    ]
    np.testing.assert_allclose(net.run(merged[0], X), known.run(merged[1], X), rtol=1e-3, atol=1e-3)


def test_stale_statistics_are_reported_in_moments():
    rows = [
        diagnose.report(net, trees[0], [X], references=trees).norms
        for net, trees in (network("debiased"), network("plain"))
    ]
    for one, two in zip(*rows, strict=True):
        assert one.stale == two.stale
        assert one.mean_error == pytest.approx(two.mean_error, rel=1e-3)
        assert one.std_ratio == pytest.approx(two.std_ratio, rel=1e-3)


@pytest.mark.parametrize(
    "divide",
    [
        lambda v: v,
        lambda v: v + 1e-5,
        lambda v: jnp.maximum(v, 1e-5),
        lambda v: jnp.sqrt(jnp.square(v)) + 1e-5,
    ],
)
def test_stored_standard_deviations(divide):
    net = vfjax.trace(
        lambda p, x: jnp.tanh((x @ p["w"] - p["m"][None]) / divide(p["s"])[None]) @ p["v"],
        tree := {"w": X[:3, :3], "m": jnp.ones(3), "s": jnp.full(3, 2.0), "v": jnp.ones((3, 1))},
        X,
    )
    assert net.norms[0].deviations
    new = renorm.reset(net, tree, [X])
    value = np.asarray(X @ tree["w"])
    np.testing.assert_allclose(new["m"], value.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["s"], value.std(0), rtol=1e-5)


def test_statistics_in_another_order_or_axis_than_channels():
    """Channels first, statistics of a map, stored transposed."""

    def fn(p, x):
        y = (x - p["m"].T[None]) * lax.rsqrt(p["s"].T + EPS)[None]
        return jnp.tanh(y) @ p["v"]

    x = jnp.float32(np.random.default_rng(0).normal(size=(6, 2, 3)) * [[1, 2, 3], [4, 5, 6]])
    tree = {"m": jnp.zeros((3, 2)), "s": jnp.ones((3, 2)), "v": jnp.ones((3, 1))}
    net = vfjax.trace(fn, tree, x)
    new = renorm.reset(net, tree, [x])
    np.testing.assert_allclose(new["m"], x.mean(0).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["s"], x.var(0).T, rtol=1e-5)


def half(form):
    """Activations in bfloat16, statistics in float32, and one pair of leaves for two norms."""

    def fn(p, x):
        for kernel in ("w", "u"):
            x = (x @ p[kernel]).astype(jnp.float32)
            x = jnp.tanh(form(jax.tree.map(lambda a: a[None], p["norm"]), x)).astype(jnp.bfloat16)
        return x @ p["v"]

    rng = np.random.default_rng(0)
    kernels = {"w": (3, C), "u": (C, C), "v": (C, 2)}
    tree = {k: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for k, s in kernels.items()}
    tree["norm"] = {"mean": jnp.zeros(C), "var": jnp.ones(C), "scale": jnp.ones(C)}
    tree["norm"]["bias"] = jnp.zeros(C)
    x = X.astype(jnp.bfloat16)
    net = vfjax.trace(fn, tree, x)
    assert [norm.name for norm in net.norms] == ["norm/mean", "norm/mean#2"]
    return renorm.reset(net, tree, [x])["norm"]


def test_half_precision_activations_and_one_pair_of_leaves_for_two_norms():
    found, expected = half(keras), half(plain)
    for name in ("mean", "var"):
        assert found[name].dtype == jnp.float32
        # Activations are rounded to eight bits, at places that differ.
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-2, atol=2e-2)
        assert not (expected[name] == (name == "var")).any()


def test_statistics_that_are_not_recognised_are_named():
    def fn(p, x):
        x = jnp.tanh((x @ p["w"] - p["m0"][None]) * lax.rsqrt(p["v0"] + EPS)[None])
        # The second moment is stored in place of the variance.
        var = p["v1"] - jnp.square(p["m1"])
        return (x @ p["u"] - p["m1"][None]) * lax.rsqrt(var + EPS)[None]

    tree = {"w": jnp.ones((3, C)), "u": jnp.eye(C)} | {
        f"{k}{n}": jnp.ones(C) for k in "mv" for n in "01"
    }
    with pytest.warns(UserWarning, match="'m1' subtracts from .*test_forms.py.*, 'v1' divides"):
        net = vfjax.trace(fn, tree, X)
    assert [(path, verb) for path, verb, _ in net.unrecognised] == [
        ("m1", "subtracts from"), ("v1", "divides")
    ]  # fmt: skip
    assert [norm.name for norm in net.norms] == ["m0"]
    with pytest.warns(UserWarning, match="'m1' subtracts .* stay as they were"):
        new = renorm.reset(net, tree, [X])
    assert (new["v1"] == tree["v1"]).all() and not (new["v0"] == tree["v0"]).all()

    def alone(p, x):
        return (x @ p["w"] - p["m0"][None]) * jnp.exp(-p["v0"])[None] @ p["u"]

    with pytest.warns(UserWarning, match="'m0' subtracts"):
        net = vfjax.trace(alone, tree, X)
    with pytest.raises(ValueError, match="net.norms is empty, but 'm0' subtracts from"):
        renorm.reset(net, tree, [X])


# ------------------------------------------------------------------ copies that only training reads


def haiku(p, x):
    average = {name: p[name]["average"] for name in ("mean", "var")}
    return (
        jnp.tanh(plain(jax.tree.map(lambda a: a[None], p["norm"] | average), x @ p["w"])) @ p["v"]
    )


def copies(seed):
    rng = np.random.default_rng(seed)
    tree = {"w": rng.normal(size=(3, C)), "v": rng.normal(size=(C, 2))}
    tree["norm"] = {"scale": 1 + 0.3 * rng.normal(size=C), "bias": rng.normal(size=C)}
    for name in ("mean", "var"):
        average = np.abs(rng.normal(size=C)) + 0.5
        tree[name] = {"average": average, "hidden": average * (1 - 0.9**5), "counter": np.ones(())}
    return jax.tree.map(jnp.float32, tree)


def test_copies_follow_by_the_caller_s_word():
    trees = [copies(0), copies(1)]
    net = vfjax.trace(haiku, trees[0], X)
    order = np.array([2, 0, 3, 1])
    with pytest.warns(UserWarning, match=r"'mean/hidden', 'var/hidden'.* have an axis"):
        left = net.spec.permute(trees[1], {"w": order})
    assert (left["mean"]["hidden"] == trees[1]["mean"]["hidden"]).all()
    moved = net.spec.permute(trees[1], {"w": order}, also={"hidden": "average"})
    for name in ("mean", "var"):
        assert (moved[name]["average"] == trees[1][name]["average"][order]).all()
        assert (moved[name]["hidden"] == trees[1][name]["hidden"][order]).all()
    merged = merge.interpolate([trees[0], moved])
    with pytest.warns(UserWarning, match=r"reset leaves 'mean/hidden', 'var/hidden' as they were"):
        renorm.reset(net, merged, [X])
    quiet = renorm.reset(net, merged, [X], also={})
    new = renorm.reset(net, merged, [X], also={"hidden": "average"})
    for name in ("mean", "var"):
        assert (quiet[name]["hidden"] == merged[name]["hidden"]).all()
        assert (quiet[name]["average"] == new[name]["average"]).all()
        expected = new[name]["average"] * (1 - 0.9**5)
        np.testing.assert_allclose(new[name]["hidden"], expected, rtol=1e-5)


def test_equinox_with_debiased_averages():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(C, axis_name="b", mode="batch")
    state = state.set(norm.batch_counter, state.get(norm.batch_counter) + 3)
    params, static = eqx.partition((norm, state), eqx.is_array)

    def fn(p, x, train=False):
        norm, state = eqx.combine(p["norm"], static)
        norm = eqx.nn.inference_mode(norm, not train)
        return jax.vmap(lambda r: norm(p["w"] @ r, state)[0], axis_name="b")(x)

    tree = {"norm": params, "w": jnp.float32(np.random.default_rng(0).normal(size=(C, 3)))}
    net = vfjax.trace(fn, tree, X)
    assert net.norms[0].layer == "w" and net.others == () and net.unrecognised == ()
    new = renorm.reset(net, tree, [X])
    np.testing.assert_allclose(net.run(new, X), fn(tree, X, train=True), rtol=1e-4, atol=1e-5)
