"""Tests of transport: what plans do to networks, of equal widths and of different ones."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import Compilations, resnet
from helpers import normed_convnet as convnet
from vfjax import align, merge, stats
from vfjax.align import _by_activations


def mlp(v, x):
    for k in range(2):
        x = jax.nn.relu(x @ v[f"w{k}"] + v[f"b{k}"][None])
    return x @ v["w2"] + v["b2"][None]


SHAPES = {
    mlp: {"w0": (6, 16), "b0": (16,), "w1": (16, 12), "b1": (12,), "w2": (12, 4), "b2": (4,)},
    convnet: {"k0": (3, 3, 3, 8), "k1": (3, 3, 8, 12), "d0": (4 * 4 * 12, 10), "d1": (10, 4)}
    | {f"{name}{k}": (8 + 4 * k,) for name in ("mean", "var", "scale", "bias") for k in range(2)},
    resnet: {"stem": (12, 16), "a0": (16, 24), "b0": (24, 16), "a1": (16, 24), "b1": (24, 16)}
    | {"head": (16, 4)},
}
INPUTS = {mlp: (6,), convnet: (4, 4, 3), resnet: (12,)}
FUNCTIONS = list(SHAPES)


def make(apply_fn, seed):
    rng = np.random.default_rng(seed)
    tree = {}
    for path, shape in SHAPES[apply_fn].items():
        leaf = rng.normal(size=shape)
        if len(shape) > 1:
            # Weights that sum to zero, so that no unit is dead on all of the data.
            leaf -= leaf.mean(tuple(range(leaf.ndim - 1)), keepdims=True)
            leaf /= np.sqrt(np.prod(shape[:-1]))
        else:
            leaf *= 0.1
        leaf += path.startswith("scale")
        tree[path] = np.float32(abs(leaf) + 0.5 if path.startswith("var") else leaf)
    return tree


@functools.cache
def traced(apply_fn):
    return vfjax.trace(apply_fn, make(apply_fn, 0), batches(apply_fn)[0])


@functools.cache
def batches(apply_fn):
    rng = np.random.default_rng(9)
    return [np.float32(rng.normal(size=(n, *INPUTS[apply_fn]))) for n in (120, 70)]


def merged(net, trees, found):
    return merge.interpolate(found.apply(net, trees))


def find(net, trees, on, apply_fn, **options):
    data = batches(apply_fn) if on == "activations" else None
    return align.transport(net, trees, data, on=on, **options)


@pytest.mark.parametrize("on", ["activations", "weights"])
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_a_network_is_left_as_it_is_by_itself(apply_fn, on):
    net, tree = traced(apply_fn), make(apply_fn, 0)
    found = find(net, [tree, tree], on, apply_fn)
    assert found.maps[0] == {}
    assert found.maps[1].keys() == net.spec.groups.keys()
    for pair in found.maps[1].values():
        for matrix in pair:
            np.testing.assert_array_equal(matrix, np.eye(len(matrix)))


@pytest.mark.parametrize("on", ["activations", "weights"])
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_permuted_copies_are_put_back(apply_fn, on):
    net, tree = traced(apply_fn), make(apply_fn, 0)
    moved = [net.spec.random(jax.random.key(seed)) for seed in (1, 2)]
    trees = [tree, *(net.spec.permute(tree, p) for p in moved)]
    found = find(net, trees, on, apply_fn)
    for maps, permutation in zip(found.maps[1:], moved, strict=True):
        for group, places in permutation.items():
            matrix, back = maps[group]
            np.testing.assert_array_equal(matrix.argmax(1), np.argsort(places))
            np.testing.assert_array_equal(back, matrix.T)
    for path, leaf in merged(net, trees, found).items():
        np.testing.assert_allclose(leaf, tree[path], rtol=1e-6)


def test_moments_serve_all_models():
    net = traced(mlp)
    trees = [make(mlp, seed) for seed in range(3)]
    moments = stats.moments(net, trees, batches(mlp), sites="taps", covariance="cross")
    found = align.transport_moments(net, moments)
    for model in (1, 2):
        alone = align.transport(net, [trees[0], trees[model]], batches(mlp))
        for group, (matrix, _) in alone.maps[1].items():
            np.testing.assert_array_equal(matrix, found.maps[model][group][0])


def doubled(tree, times):
    """The mlp with unit i of layer k repeated `times[k][i]` times, its outgoing weights shared."""
    new = dict(tree)
    for k, counts in enumerate(times):
        new[f"w{k}"] = np.repeat(new[f"w{k}"], counts, axis=-1)
        new[f"b{k}"] = np.repeat(new[f"b{k}"], counts, axis=-1)
        shared = new[f"w{k + 1}"] / np.float32(counts)[:, None]
        new[f"w{k + 1}"] = np.repeat(shared, counts, axis=0)
    return new


@pytest.mark.parametrize("on", ["activations", "weights"])
@pytest.mark.parametrize("wide, times", [(0, (2, 3)), (1, (2, 3)), (1, (3, 1))])
def test_doubled_units_are_brought_together_and_taken_apart(on, wide, times):
    narrow = make(mlp, 0)
    counts = [np.full(len(narrow[f"b{k}"]), n) for k, n in enumerate(times)]
    x = batches(mlp)[0]
    copy = doubled(narrow, counts)
    nets = [traced(mlp), vfjax.trace(mlp, copy, x)]
    copy = nets[1].spec.permute(copy, nets[1].spec.random(jax.random.key(5)))
    np.testing.assert_allclose(mlp(copy, x), mlp(narrow, x), rtol=1e-4, atol=1e-5)
    trees = [narrow, copy]
    if wide == 0:
        nets, trees = nets[::-1], trees[::-1]
    data = batches(mlp) if on == "activations" else None
    found = align.transport(nets, trees, data, on=on)
    for group, (matrix, back) in found.maps[1].items():
        assert matrix.shape == back.shape[::-1]
        assert matrix.shape == (nets[0].spec.sizes[group], nets[1].spec.sizes[group])
    mapped = nets[1].spec.apply(trees[1], found.maps[1])
    for path, leaf in mapped.items():
        np.testing.assert_allclose(leaf, trees[0][path], rtol=1e-5, atol=1e-6)
    whole = merge.interpolate([trees[0], mapped])
    np.testing.assert_allclose(mlp(whole, x), mlp(narrow, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on", ["activations", "weights"])
def test_doubled_channels_with_norms_and_a_flattened_map(on):
    narrow = make(convnet, 0)
    wide = {
        path: np.repeat(leaf, 2 if path.endswith("0") else 3, axis=-1)
        for path, leaf in narrow.items()
        if not path.startswith("d")
    }
    wide["k1"] = np.repeat(wide["k1"], 2, axis=2) / 2
    rows = np.repeat(narrow["d0"].reshape(16, 12, 10), 3, axis=1) / 3
    wide |= {"d0": rows.reshape(-1, 10), "d1": narrow["d1"]}
    data = batches(convnet)
    net = vfjax.trace(convnet, wide, data[0])
    wide = net.spec.permute(wide, net.spec.random(jax.random.key(0)))
    np.testing.assert_allclose(convnet(wide, data[0]), convnet(narrow, data[0]), atol=1e-5)
    given = data if on == "activations" else None
    found = align.transport([traced(convnet), net], [narrow, wide], given, on=on)
    for path, leaf in net.spec.apply(wide, found.maps[1]).items():
        np.testing.assert_allclose(leaf, narrow[path], rtol=1e-5, atol=1e-6)


def test_classes_may_differ():
    trees = [make(mlp, 0), {**make(mlp, 1), "w2": np.ones((12, 7), np.float32)}]
    trees[1]["b2"] = np.ones(7, np.float32)
    nets = [traced(mlp), vfjax.trace(mlp, trees[1], batches(mlp)[0])]
    for on, data in (("weights", None), ("activations", batches(mlp))):
        found = align.transport(nets, trees, data, on=on).maps[1]
        assert nets[1].spec.apply(trees[1], found)["w2"].shape == (12, 7)


def test_widths_agree_where_groups_share_an_axis():
    """The blocks of one group on an axis depend on the width of the other."""

    def flat(v, x):
        q, k = ((x @ v[name]).reshape(2, 5, 2, -1) for name in "qk")
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
        mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), (x @ v["v"]).reshape(q.shape))
        return mixed.reshape(2, 5, -1) @ v["o"]

    def make(dims):
        rng = np.random.default_rng(dims)
        shapes = {name: (6, 2 * dims) for name in "qkv"} | {"o": (2 * dims, 5)}
        return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}

    x = np.ones((2, 5, 6), np.float32)
    trees = [make(3), make(4)]
    nets = [vfjax.trace(flat, tree, x) for tree in trees]
    with pytest.raises(ValueError, match="other widths in .* and shares an axis of"):
        align.transport(nets, trees, on="weights")
    other = nets[0].spec.permute(trees[0], nets[0].spec.random(jax.random.key(0)))
    found = align.transport(nets[0], [trees[0], other], on="weights")
    for path, leaf in nets[0].spec.apply(other, found.maps[1]).items():
        np.testing.assert_array_equal(leaf, trees[0][path])


@pytest.mark.parametrize("regularization", [0, 0.05])
@pytest.mark.parametrize("on", ["activations", "weights"])
def test_other_widths_run_on_the_first_network(on, regularization):
    rng = np.random.default_rng(3)
    shapes = {"w0": (6, 10), "b0": (10,), "w1": (10, 15), "b1": (15,), "w2": (15, 4), "b2": (4,)}
    other = {path: np.float32(rng.normal(size=shape)) for path, shape in shapes.items()}
    trees, data = [make(mlp, 0), other, make(mlp, 1)], batches(mlp)
    nets = [traced(mlp), vfjax.trace(mlp, other, data[0]), traced(mlp)]
    given = data if on == "activations" else None
    found = align.transport(nets, trees, given, on=on, regularization=regularization)
    # A model's plans do not depend on which others are there.
    alone = find(nets[0], [trees[0], trees[2]], on, mlp, regularization=regularization)
    for group, pair in found.maps[2].items():
        for matrix, expected in zip(pair, alone.maps[1][group], strict=True):
            np.testing.assert_allclose(matrix, expected, atol=1e-3)
            np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-5)
    mapped = [n.spec.apply(t, m) for n, t, m in zip(nets, trees, found.maps, strict=True)]
    assert mlp(merge.interpolate(mapped), data[0]).shape == (120, 4)


def test_moments_between_networks_are_those_of_one():
    """The pass over networks of different widths gives what the pass over equal ones does."""
    net, trees = traced(convnet), [make(convnet, seed) for seed in range(3)]
    data = batches(convnet)
    moments = stats.moments(net, trees, data, sites="taps", covariance="cross")
    for model, sites in enumerate(_by_activations.measure([net] * 3, trees, data), start=1):
        assert sites.keys() == set(stats.resolve_sites(net, "taps"))
        for site, pair in sites.items():
            expected = _by_activations.pair_of(moments, site, model, 0)
            for got, wanted in zip(jax.tree.leaves(pair), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())


def test_distances_are_those_of_the_samples():
    net, trees = traced(mlp), [make(mlp, seed) for seed in (0, 1)]
    data = batches(mlp)
    (sites,) = _by_activations.measure([net] * 2, trees, data)
    x = np.concatenate(data)
    hidden = [np.float64(jax.nn.relu(x @ t["w0"] + t["b0"][None])) for t in trees]
    expected = ((hidden[1][:, :, None] - hidden[0][:, None]) ** 2).mean(0)
    np.testing.assert_allclose(sites["w0:act"].distances, expected, rtol=1e-4, atol=1e-6)
    for got, values in zip(sites["w0:act"].squares, reversed(hidden), strict=True):
        np.testing.assert_allclose(got, (values**2).mean(0), rtol=1e-4)


def test_biases_count():
    """Units of equal kernels are told apart by their biases alone."""
    rng = np.random.default_rng(0)
    column = np.float32(rng.normal(size=(4, 1)))
    tree = {"w": np.repeat(column, 5, 1), "b": np.float32(rng.normal(size=5))}
    tree["v"] = np.float32(rng.normal(size=(5, 2)))

    def apply_fn(v, x):
        return jax.nn.relu(x @ v["w"] + v["b"][None]) @ v["v"]

    net = vfjax.trace(apply_fn, tree, np.ones((2, 4), np.float32))
    places = np.array([3, 1, 4, 0, 2])
    other = net.spec.permute(tree, {"w": places})
    found = align.transport(net, [tree, other], on="weights")
    np.testing.assert_array_equal(found.maps[1]["w"][0].argmax(1), np.argsort(places))
    bare = [{**t, "b": np.zeros(5, np.float32)} for t in (tree, other)]
    blind = align.transport(net, bare, on="weights")
    np.testing.assert_array_equal(blind.maps[1]["w"][0], np.eye(5))


def test_scales_and_shifts_count_and_means_do_not():
    net, tree = traced(convnet), make(convnet, 0)
    tree["k0"] = np.repeat(tree["k0"][..., :1], 8, axis=-1)
    places = np.roll(np.arange(8), 3)
    other = net.spec.permute(tree, {"k0": places})
    other["mean0"] = np.float32(np.random.default_rng(0).uniform(1, 9, size=8))
    found = align.transport(net, [tree, other], on="weights")
    np.testing.assert_array_equal(found.maps[1]["k0"][0].argmax(1), np.argsort(places))


@pytest.mark.parametrize("seed", range(3))
def test_units_that_a_norm_takes_away_do_not_count(seed):
    """A permuted copy with rescaled kernels and compensated statistics computes the same."""

    def apply_fn(v, x):
        for k in range(3):
            mean, var, scale, bias = (v[f"{name}{k}"][None] for name in ("m", "v", "s", "b"))
            x = x @ v[f"w{k}"] + v[f"c{k}"][None]
            x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias)
        return x @ v["head"]

    rng, sizes, tree = np.random.default_rng(seed), (6, 16, 16, 16), {}
    for k, (n, m) in enumerate(itertools.pairwise(sizes)):
        tree |= {f"w{k}": rng.normal(size=(n, m)), f"v{k}": rng.uniform(0.5, 2, size=m)}
        tree |= {f"{name}{k}": rng.normal(size=m) for name in ("m", "s", "b", "c")}
    tree = jax.tree.map(np.float32, tree | {"head": rng.normal(size=(16, 4))})
    x = np.float32(rng.normal(size=(50, 6)))
    net = vfjax.trace(apply_fn, tree, x)
    other = dict(tree)
    for k in range(3):
        # Some rows change their sign, which the scale gives back.
        sign = rng.choice([-1, 1], size=16)
        unit, shift = np.exp(rng.normal(size=16)) * sign, rng.normal(size=16)
        other[f"w{k}"] = tree[f"w{k}"] * unit
        other[f"c{k}"] = tree[f"c{k}"] * unit + shift
        other[f"m{k}"] = tree[f"m{k}"] * unit + shift
        other[f"v{k}"] = (tree[f"v{k}"] + 1e-5) * unit**2 - 1e-5
        other[f"s{k}"] = tree[f"s{k}"] * sign
    other = jax.tree.map(np.float32, other)
    np.testing.assert_allclose(apply_fn(other, x), apply_fn(tree, x), rtol=1e-3, atol=1e-3)
    places = net.spec.random(jax.random.key(seed))
    found = align.transport(net, [tree, net.spec.permute(other, places)], on="weights")
    for group, order in places.items():
        matrix = found.maps[1][group][0]
        np.testing.assert_array_equal(matrix, np.eye(16)[np.argsort(order)])


def test_later_writers_count_in_further_sweeps():
    """The stem tells nothing of the stream's units; what the blocks write does."""
    net, tree = traced(resnet), make(resnet, 0)
    tree["stem"] = np.repeat(tree["stem"][:, :1], 16, axis=1)
    for k in range(2):  # each hidden unit reads its stream alike, so that the stream can wait
        tree[f"a{k}"] = np.repeat(tree[f"a{k}"][:1], 16, axis=0)
    places = {"stem": np.roll(np.arange(16), 5)}
    other = net.spec.permute(tree, places)
    once = align.transport(net, [tree, other], on="weights").maps[1]["stem"][0]
    np.testing.assert_array_equal(once, np.eye(16))
    again = align.transport(net, [tree, other], on="weights", sweeps=3).maps[1]["stem"][0]
    np.testing.assert_array_equal(again.argmax(1), np.argsort(places["stem"]))


def attention(v, x):
    heads = {name: jnp.einsum("btd,dhk->bthk", x, v[name]) for name in "qkv"}
    scores = jnp.einsum("bthk,bshk->bhts", heads["q"], heads["k"])
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), heads["v"])
    return jax.nn.relu(jnp.einsum("bthk,hkd->btd", mixed, v["o"]) + v["b"]) @ v["head"]


@pytest.mark.parametrize("seed", range(3))
def test_heads_and_their_dimensions_wait_for_each_other(seed):
    """Neither has a writer without the other: norms that no order changes break the circle.

    The layer that reads them waits for both, though its bias could be compared before.
    """
    rng = np.random.default_rng(seed)
    shapes = {name: (6, 3, 4) for name in "qkv"} | {"o": (3, 4, 5), "head": (5, 2)}
    tree = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    tree["b"] = np.zeros((1, 1, 5), np.float32)
    x = np.float32(rng.normal(size=(2, 5, 6)))
    net = vfjax.trace(attention, tree, x)
    assert len(net.spec.groups) == 4
    other = net.spec.permute(tree, net.spec.random(jax.random.key(seed)))
    found = align.transport(net, [tree, other], on="weights")
    for path, leaf in net.spec.apply(other, found.maps[1]).items():
        np.testing.assert_array_equal(leaf, tree[path])


@pytest.mark.parametrize("on", ["activations", "weights"])
def test_entropic_maps_tend_to_the_exact_ones(on):
    net, tree, noise = traced(mlp), make(mlp, 0), make(mlp, 1)
    other = {path: np.float32(leaf + 0.2 * noise[path]) for path, leaf in tree.items()}
    trees = [tree, net.spec.permute(other, net.spec.random(jax.random.key(1)))]
    exact = find(net, trees, on, mlp).maps[1]["w0"][0]
    off = []
    for part in (1.0, 0.1, 0.003):
        maps = find(net, trees, on, mlp, regularization=part).maps[1]
        off.append(np.abs(maps["w0"][0] - exact).max())
        for matrix in maps["w0"]:
            np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-5)
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-2
    same = find(net, [trees[0]] * 2, on, mlp, regularization=0.003).maps[1]
    for matrix, back in same.values():
        np.testing.assert_allclose(matrix, np.eye(len(matrix)), atol=1e-3)
        np.testing.assert_allclose(back, np.eye(len(matrix)), atol=1e-3)


@pytest.mark.parametrize("marginals", ["l1", "l2", "softmax"])
def test_shares_by_importance(marginals):
    net, trees = traced(mlp), [make(mlp, seed) for seed in (0, 1)]
    found = align.transport(net, trees, on="weights", marginals=marginals)
    matrix, back = found.maps[1]["w0"]
    norms = []
    for tree in trees:
        rows = np.concatenate([tree["w0"].T, tree["b0"][:, None]], 1)
        norm = np.linalg.norm(rows, 1 if marginals == "l1" else 2, axis=1)
        norm = np.exp(norm) if marginals == "softmax" else norm
        norms.append(norm / norm.sum())
    # Both maps are of one plan with these shares.
    np.testing.assert_allclose(matrix * norms[0][:, None], (back * norms[1][:, None]).T, atol=1e-6)
    if marginals != "l1":
        found = align.transport(net, trees, batches(mlp), marginals=marginals)
        (sites,) = _by_activations.measure([net] * 2, trees, batches(mlp))
        norms = [np.sqrt(v) for v in sites["w0:act"].squares]
        norms = [np.exp(v) if marginals == "softmax" else v for v in norms]
        share = [
            np.maximum(v, 1e-3 * v.mean()) / np.maximum(v, 1e-3 * v.mean()).sum() for v in norms
        ]
        matrix, back = found.maps[1]["w0"]
        np.testing.assert_allclose(
            matrix * share[1][:, None], (back * share[0][:, None]).T, atol=1e-6
        )


def test_nothing_is_compiled_twice():
    net, trees = traced(mlp), [make(mlp, seed) for seed in (0, 1)]
    nets = [net, vfjax.trace(mlp, trees[1], batches(mlp)[0])]
    for seed in (2, 3):
        trees, data = [make(mlp, seed), make(mlp, seed + 5)], batches(mlp)
        with Compilations() as compiled:
            align.transport(nets, trees, data, regularization=0.1 * seed)
            align.transport(nets, trees, on="weights", regularization=0.1 * seed, tolerance=1e-3)
    assert compiled.count == 0


def test_errors():
    net, trees, data = traced(mlp), [make(mlp, seed) for seed in (0, 1)], batches(mlp)
    with pytest.raises(ValueError, match="trees must be two or more, got 1"):
        align.transport(net, trees[:1], data)
    with pytest.raises(ValueError, match="data is None: give batches"):
        align.transport(net, trees)
    with pytest.raises(ValueError, match="data is not read"):
        align.transport(net, trees, data, on="weights")
    with pytest.raises(ValueError, match='on must be "activations" or "weights", got'):
        align.transport(net, trees, data, on="both")
    with pytest.raises(ValueError, match="sweeps must be 0"):
        align.transport(net, trees, data, sweeps=1)
    with pytest.raises(ValueError, match="sweeps must be 0, or a whole number .* got 1.5"):
        align.transport(net, trees, on="weights", sweeps=1.5)
    with pytest.raises(ValueError, match="regularization must be 0 .* got 'x'"):
        align.transport(net, trees, data, regularization="x")
    with pytest.raises(ValueError, match="marginals must be one of uniform, l2, softmax here"):
        align.transport(net, trees, data, marginals="l1")
    with pytest.raises(ValueError, match="2 networks for 3 trees"):
        align.transport([net, net], [*trees, trees[0]], data)
    with pytest.raises(TypeError, match="net must be a Network or a sequence"):
        align.transport(mlp, trees, data)
    with pytest.raises(ValueError, match=r"net\[1\] has other layers"):
        align.transport([net, traced(resnet)], [trees[0], make(resnet, 0)], data)
    moments = stats.moments(net, trees, data, sites="taps")
    with pytest.raises(ValueError, match="no covariance between models 0 and 1 at the tap"):
        align.transport_moments(net, moments)
    alone = stats.moments(net, trees[:1], data, sites="taps", covariance=True)
    with pytest.raises(ValueError, match="two models or more, got 1"):
        align.transport_moments(net, alone)
    nan = {**trees[1], "b0": np.full(16, np.nan, np.float32)}
    other = vfjax.trace(mlp, trees[1], data[0])
    for given in (net, [net, other]):
        with pytest.raises(ValueError, match=r"trees\[1\] holds 16 NaN"):
            align.transport(given, [trees[0], nan], data)
