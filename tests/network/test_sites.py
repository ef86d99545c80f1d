"""The registry of sites: every function takes every name that it lists, or says why it cannot."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import normal
from vfjax import diagnose, merge, prune, renorm, stats

SEEDS = itertools.count()


def draw(*shape):
    return normal(next(SEEDS), *shape)


def _mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]


def _conv(p, x):
    for k in "ab":
        x = jax.lax.conv_general_dilated(
            x, p[k], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        norm = {what: value[None, None, None] for what, value in p["norm" + k].items()}
        x = (x - norm["mean"]) / jnp.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ p["head"]


def _residual(p, x):
    x = jax.nn.relu(x @ p["stem"])
    x = jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"] + x @ p["short"])
    return x @ p["head"]


def _attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k), axis=-1)
    out = jnp.einsum("bhts,bshe->bthe", weights, v)
    return jax.nn.relu(jnp.einsum("bthe,heo->bto", out, p["out"])).mean(1) @ p["head"]


def _joined(p, x):
    """Two groups show in one tap: what two layers make is joined, and a third adds to it."""
    both = jnp.concatenate([x @ p["a"], x @ p["b"]], axis=-1)
    return jax.nn.relu(both + x @ p["c"]) @ p["head"]


def _shared(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["head"]


def _scan(p, x):
    x, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["layers"]["kernel"])
    return x @ p["head"]


def _axes(p, x):
    """Examples on the last axis of a layer and, behind a transpose, on the first of its tap."""
    return jax.nn.relu(jax.vmap(lambda r: r @ p["a"], out_axes=1)(x)).T @ p["b"]


def _norm():
    return {"mean": draw(4), "var": draw(4) ** 2 + 1, "scale": jnp.ones(4), "bias": draw(4)}


def _networks():
    rows, tokens, images = draw(6, 3), draw(5, 3, 4), draw(6, 4, 4, 3)
    kernels = {"a": draw(3, 3, 3, 4), "b": draw(3, 3, 4, 4)}
    heads = {name: draw(4, 2, 3) for name in "qkv"} | {"out": draw(2, 3, 5)}
    return {
        "mlp": (_mlp, {"a": draw(3, 4), "b": draw(4), "c": draw(4, 2)}, rows),
        "conv": (
            _conv,
            kernels | {"norma": _norm(), "normb": _norm(), "head": draw(4, 2)},
            images,
        ),
        "residual": (
            _residual,
            {"stem": draw(3, 4), "head": draw(4, 2)} | {k: draw(4, 4) for k in ("a", "b", "short")},
            rows,
        ),
        "attention": (_attention, heads | {"head": draw(5, 2)}, tokens),
        "joined": (
            _joined,
            {"a": draw(3, 2), "b": draw(3, 4), "c": draw(3, 6), "head": draw(6, 2)},
            rows,
        ),
        "shared": (_shared, {"w": draw(3, 3), "head": draw(3, 2)}, rows),
        "scan": (_scan, {"layers": {"kernel": draw(4, 3, 3)}, "head": draw(3, 2)}, rows),
        "transposed": (_axes, {"a": draw(3, 4), "b": draw(4, 2)}, rows),
    }


NETWORKS = _networks()


def traced(name):
    fn, p, x = NETWORKS[name]
    return vfjax.trace(fn, p, x), p, x


def kinds(net):
    found = {}
    for site in net.sites.values():
        found.setdefault(site.kind, []).append(site.name)
    return found


def test_names():
    net, _, _ = traced("mlp")
    names = ["input", "a", "c", "a:act", "c:act", "a:in", "c:in", "output"]
    assert list(net.sites) == names
    assert [net.sites[name].layer for name in names] == [None, *"acacac", None]
    assert set(kinds(traced("conv")[0])["norm"]) == {"norma/mean:in", "normb/mean:in"}
    assert {"w", "w#2", "w#2:act", "w#2:in"} < set(traced("shared")[0].sites)
    assert {f"layers/kernel[3]{end}" for end in ("", ":act", ":in")} < set(traced("scan")[0].sites)
    heads = kinds(traced("attention")[0])
    assert "q:act[q:dims in q:heads]" in heads["joint"] and "q:act" in heads["tap"]
    joined = kinds(traced("joined")[0])
    assert len(joined["group"]) >= 2, joined


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_is_taken_or_refused_with_a_reason(name):
    net, p, x = traced(name)
    plain, _ = net.run(p, x, capture=())
    layers = {layer.name for layer in net.layers}
    whole = [site.name for site in net.sites.values() if site.whole]
    parts = [site for site in net.sites.values() if not site.whole]
    assert set(stats.resolve_sites(net, "taps")) <= set(net.sites)

    # Whole values are read and replaced.
    _, found = net.run(p, x, capture=whole)
    for site in whole:
        same, again = net.run(p, x, capture=[site], edit={site: lambda a: a})
        np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(again[site], found[site])
    model = merge.as_merged(net, p)
    same, again = model.run(x, capture=whole)
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)
    for part in parts:
        for call in (
            lambda site: net.run(p, x, capture=[site]),
            lambda site: net.run(p, x, edit={site: abs}),
            lambda site: model.run(x, capture=[site]),
            lambda site: net.places(site),
            lambda site: diagnose.features(net, p, [x], sites=[site]),
            lambda site: diagnose.cka((net, p), (net, p), [x], sites=[site]),
            lambda site: diagnose.decompose(net, p, x, sites=[site]),
        ):
            with pytest.raises(
                ValueError, match=re.escape(f"'{part.name}' is a part of '{part.source}'")
            ):
                call(part.name)
        assert net.in_stem(part.name, net.depth) == net.in_stem(part.source, net.depth)

    # Moments are those of the values that `run` reads, over all axes but the channels.
    moments = stats.moments(net, [p], [x], sites=list(net.sites))
    assert moments.sites == tuple(net.sites)
    for site in whole:
        total = np.mean(np.asarray(found[site], np.float64))
        np.testing.assert_allclose(np.mean(moments.mean[site]), total, rtol=1e-4, atol=1e-5)

    # Features are distances from the values at 0.
    features = diagnose.features(net, p, [x], sites=whole)
    zero = net.run(p, jnp.zeros_like(x[:1]), capture=whole)[1]
    sizes = {site.name: site.size for site in features.sites}
    for site in whole:
        offset = np.linalg.norm(np.asarray(zero[site]))
        np.testing.assert_allclose(features.offset[site], [offset], rtol=1e-4, atol=1e-5)
        assert sizes[site] == np.size(found[site]) // len(x)
        close = np.testing.assert_allclose
        close(features.mean[site].ravel(), moments_of(net, site, found), rtol=1e-4, atol=1e-5)
    matrix = diagnose.cka((net, p), (net, p), [x], sites=whole).matrix
    np.testing.assert_allclose(np.diagonal(matrix), 1, rtol=1e-4)

    # Only layers are corrected and pruned.
    for site in net.sites:
        for call in (renorm.repair, renorm.rescale):
            if site in layers:
                call(net, p, [x], references=[p], sites=[site])
                continue
            with pytest.raises(ValueError, match="sites must be layers.*is (the|what|a part)"):
                call(net, p, [x], references=[p], sites=[site])
        for call in (
            lambda names: prune.magnitude(net, p, names=names),
            lambda names: prune.wanda(net, p, [x], names=names),
        ):
            if site in layers:
                assert set(call([site]).rows) == {site}
                continue
            with pytest.raises(ValueError, match="a site, not a layer"):
                call([site])


def moments_of(net, site, found):
    """The means of a site's channels, from its own record."""
    value = np.asarray(found[site], np.float64)
    kind, of = net.sites[site].kind, net.sites[site].of
    if kind == "layer":
        axes = net.layer(of).sample_axes
    elif kind == "norm":
        axes = net.norm(of).sample_axes
    elif kind in ("input", "output"):
        axes = (0,)
    elif site == "out:in":
        axes = (0, 1)
    elif (kind, value.shape) == ("tap", (4, 6)):
        axes = (1,)  # behind a transpose
    else:  # channels come last in what these networks read and tap
        axes = tuple(range(value.ndim - (2 if site in ("q:act", "k:act", "v:act") else 1)))
    return value.mean(axes).ravel()


def test_what_a_layer_reads_is_measured():
    net, p, x = traced("mlp")
    hidden = np.asarray(jax.nn.relu(x @ p["a"] + p["b"][None]))
    found = stats.moments(net, [p, p], [x[:4], x[4:]], sites=["a:in", "c:in"], covariance=["c:in"])
    np.testing.assert_allclose(found.mean["a:in"][0], np.mean(x, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean["c:in"][1], hidden.mean(0), rtol=1e-5)
    cross = np.cov(hidden.T, bias=True)
    np.testing.assert_allclose(found.covariance["c:in"][0, 1], cross, rtol=1e-4, atol=1e-5)
    order = np.array([2, 0, 3, 1])
    carried = found.carried([{"a": order}, None])
    np.testing.assert_allclose(carried.mean["c:in"][0], hidden.mean(0)[order], rtol=1e-5)

    net, p, x = traced("conv")
    found = stats.moments(net, [p], [x], sites=["a:in", "b:in", "head:in"])
    np.testing.assert_allclose(found.mean["a:in"][0], np.mean(x, (0, 1, 2)), rtol=1e-5, atol=1e-6)
    assert found.count == {"a:in": 96, "b:in": 96, "head:in": 6}


def test_what_cannot_be_measured_says_why():
    def mixing(p, x):
        return (p["w"] @ x.T @ p["u"]).T

    p, x = {"w": draw(4, 3), "u": draw(6, 6)}, draw(6, 3)
    net = vfjax.trace(mixing, p, x)  # of batches of six alone, so nothing tells
    assert stats.moments(net, [p], [x], sites=["w:in"]).mean["w:in"].shape == (1, 3)

    def pooled(p, x):
        return x + (jnp.ones((1, 1)) * x.mean(0, keepdims=True).sum(1, keepdims=True)) @ p["w"]

    p = {"w": draw(1, 3)}
    net = vfjax.trace(pooled, p, x)
    with pytest.raises(ValueError, match=r"'w:in' cannot be measured.*no axis of it holds the ex"):
        stats.moments(net, [p], [x], sites=["w:in"])

    def summed(p, x):
        return x + jnp.broadcast_to(p["w"][:, :1], (1, len(x))) @ x

    net = vfjax.trace(summed, p, x)
    with pytest.raises(ValueError, match=r"'w:in' cannot be.*the examples are among them.*, 'w'"):
        stats.moments(net, [p], [x], sites=["w:in"])


def test_ends_of_several_arrays():
    def pair(p, x):
        h = x["one"] @ p["w"] + x["two"]
        return h, h @ p["v"]

    p, x = {"w": draw(3, 4), "v": draw(4, 2)}, {"one": draw(5, 3), "two": draw(5, 4)}
    net = vfjax.trace(pair, p, x)
    out, found = net.run(p, x, capture=list(net.sites))
    jax.tree.map(np.testing.assert_array_equal, (found["input"], found["output"]), (x, out))
    for site in ("input", "output"):
        with pytest.raises(TypeError, match=f'site "{site}" holds a .* of arrays'):
            stats.moments(net, [p], [x], sites=[site])
        with pytest.raises(TypeError, match=f'site "{site}" holds a .* of arrays'):
            diagnose.features(net, p, [x], sites=[site])
        with pytest.raises(TypeError, match=f'site "{site}" must hold an array'):
            diagnose.cka((net, p), (net, p), [x], sites=[site])
        with pytest.raises(ValueError, match=f"the network's {site} must be one array"):
            net.places(site)
    rest = [site for site in net.sites if site not in ("input", "output")]
    assert stats.moments(net, [p], [x], sites=rest).sites == tuple(rest)
    assert diagnose.features(net, p, [x], sites=rest).names == tuple(rest)


def test_a_tap_that_groups_share():
    net, p, x = traced("joined")
    both = np.concatenate([x @ p["a"], x @ p["b"]], -1)
    value = np.maximum(both + np.asarray(x @ p["c"]), 0)
    site = net.sites[kinds(net)["group"][0]].source
    taps = stats.resolve_sites(net, "taps")
    assert site not in taps
    found = stats.moments(net, [p], [x], sites=[site])
    np.testing.assert_allclose(found.mean[site][0], value.mean(0), rtol=1e-5, atol=1e-6)
    measured = diagnose.features(net, p, [x], sites=[site])
    listed = diagnose.features(net, p, [x], sites="taps")
    assert site in listed.names
    np.testing.assert_array_equal(measured.feature[site], listed.feature[site])


def test_words_mean_the_same_everywhere():
    net, p, x = traced("residual")
    for word in ("paper", "layers", "all"):
        names = stats.resolve_sites(net, word)
        assert diagnose.features(net, p, [x], sites=word).names == names
        assert stats.moments(net, [p], [x], sites=word).sites == names
        one = renorm.rescale(net, p, [x], references=[p], sites=word)
        other = renorm.rescale(net, p, [x], references=[p], sites=names)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert stats.resolve_sites(net, "paper") == ("a", "b")
    assert stats.resolve_sites(net, "all") == tuple(layer.name for layer in net.layers)
    for word in ("taps", "every"):
        with pytest.raises(ValueError, match="must be layers|must be .*, got"):
            renorm.repair(net, p, [x], references=[p], sites=word)


def test_two_sites_of_one_value_are_both_edited():
    net, p, x = traced("mlp")
    edits = {"c:act": lambda z: z + 1, "c": lambda z: 2 * z}
    out, found = net.run(p, x, capture=["c", "c:act", "output"], edit=edits)
    expected = 2 * _mlp(p, x) + 1
    for value in (out, *found.values()):
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_channels_of_a_tap_behind_a_transpose():
    net, p, x = traced("transposed")
    values = net.run(p, x, capture=["a", "a:act"])[1]
    channels = np.maximum(x @ p["a"], 0).mean(0)
    assert [values[site].shape for site in ("a", "a:act")] == [(6, 4), (4, 6)]
    features = diagnose.features(net, p, [x], sites=["a:act"])
    np.testing.assert_allclose(features.mean["a:act"][0], channels, rtol=1e-5, atol=1e-6)
    found = stats.moments(net, [p], [x], sites=["a:act", "b:in"])
    for mean in found.mean.values():
        np.testing.assert_allclose(mean[0], channels, rtol=1e-5, atol=1e-6)


def test_what_is_read_behind_a_cut_is_a_value_of_its_own():
    """The first layer's value is kept per model; behind the cut its average is read."""
    net, p, x = traced("mlp")
    other = jax.tree.map(lambda a: a + 1, p)
    model = merge.preserve_first(net, [p, other], layers=1)
    found = diagnose.features(net, model, [x], sites=["a", "a:act", "a:in", "c:in"])
    hidden = [np.asarray(jax.nn.relu(x @ v["a"] + v["b"][None])) for v in (p, other)]
    before = [np.asarray(x @ v["a"] + v["b"][None]) for v in (p, other)]
    after = np.maximum(np.mean(before, 0), 0)
    np.testing.assert_allclose(found.mean["c:in"][0], after.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.mean["a:in"][0], np.mean(x, 0), rtol=1e-5, atol=1e-6)
    assert found.site("c:in").depth == 1 and found.site("a:in").depth == 0
    assert not np.allclose(after, np.mean(hidden, 0))


def test_misspelt_names():
    net, p, x = traced("mlp")
    for call in (
        lambda site: net.run(p, x, capture=[site]),
        lambda site: net.run(p, x, edit={site: abs}),
        lambda site: net.in_stem(site, 1),
        lambda site: net.places(site),
        lambda site: stats.moments(net, [p], [x], sites=[site]),
        lambda site: diagnose.features(net, p, [x], sites=[site]),
        lambda site: renorm.repair(net, p, [x], references=[p], sites=[site]),
    ):
        with pytest.raises(ValueError, match="the network has no site 'a:atc'; did you mean 'a:a"):
            call("a:atc")
    with pytest.raises(ValueError, match=r"no site 'zzzz'; it has, among others, \['input', 'a'"):
        net.run(p, x, capture=["zzzz"])
    with pytest.raises(ValueError, match="no layer 'heda'"):
        net.layer("heda")
    with pytest.raises(ValueError, match="'c:in' is what the layer 'c' reads, a site, not a layer"):
        prune.magnitude(net, p, names=["c:in"])


def test_words_are_taken_wherever_sites_are():
    """One word for several sites, in `run`, on merged models and in pruning too; alone only."""
    rng = np.random.default_rng(0)
    p = {name: np.float32(rng.normal(size=(3, 3))) for name in "abc"}
    x = np.float32(rng.normal(size=(4, 3)))
    net = vfjax.trace(lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"], p, x)
    for word in ("all", "layers", "paper", "taps"):
        names = stats.resolve_sites(net, word)
        assert list(net.run(p, x, capture=word)[1]) == (
            [f"{name}:act" for name in "abc"] if word == "taps" else list(names)
        )
    model = merge.preserve_first(net, [p, p], layers=1)
    assert set(model.run(x, capture="all")[1]) == set("abc")
    masked = prune.magnitude(net, p, names="paper").values
    assert sorted(masked) == ["a", "b"]
    with pytest.raises(ValueError, match="not a layer"):
        prune.magnitude(net, p, names="taps")
    for call in (
        lambda: net.run(p, x, capture=["all"]),
        lambda: stats.moments(net, [p], [x], sites=["all"]),
    ):
        with pytest.raises(ValueError, match="'all' stands for several sites: pass it alone"):
            call()
