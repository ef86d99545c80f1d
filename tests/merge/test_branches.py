"""Branches off the longest path: several outputs, early exits, towers of different depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import assert_close, normal, of_shapes, traced
from vfjax import merge, renorm, stats

X = normal(1, 6, 3)


def relu(x):
    return jax.nn.relu(x)


def exits(v, x):
    """An early exit of one layer and one of two, beside a main path of four."""
    h = relu(x @ v["w1"])
    side = relu(h @ v["e1"]) @ v["e2"]
    h = relu(h @ v["w2"])
    early = h @ v["exit"]
    return {"main": relu(h @ v["w3"]) @ v["w4"], "early": early, "side": side}


EXITS = {
    **{"w1": (3, 5), "w2": (5, 5), "w3": (5, 5), "w4": (5, 2)},
    **{"e1": (5, 4), "e2": (4, 2), "exit": (5, 2)},
}


def past(v, x):
    """A shortcut of two layers to the output, which no layer reads."""
    y = relu(relu(x @ v["w1"]) @ v["w2"]) @ v["w3"]
    return y + jnp.tanh(x @ v["s1"]) @ v["s2"]


PAST = {"w1": (3, 5), "w2": (5, 5), "w3": (5, 2), "s1": (3, 4), "s2": (4, 2)}


def tower(v, x):
    """A residual tower: its first block changes the width by a shortcut of two layers."""
    y = relu(relu(relu(x @ v["a1"]) @ v["a2"]) @ v["a3"]) @ v["a4"]
    x = relu(y + relu(x @ v["s1"]) @ v["s2"])
    return relu(x @ v["b"]) @ v["c"]


TOWER = {
    **{"a1": (3, 4), "a2": (4, 4), "a3": (4, 4), "a4": (4, 5)},
    **{"s1": (3, 2), "s2": (2, 5), "b": (5, 4), "c": (4, 3)},
}


def text(v, x):
    return tower(v, relu(relu(x @ v["t1"]) @ v["t2"]))


TEXT = {"t1": (3, 4), "t2": (4, 3), **TOWER}


def towers(v, x):
    """Two towers whose embeddings are compared, as CLIP does: six layers and eight."""
    a, b = tower(v["image"], x), text(v["text"], x)
    return a @ b.T


def apart(v, x):
    return tower(v["image"], x), text(v["text"], x)


TOWERS = {"image": TOWER, "text": TEXT}


def trees_of(shapes, count=3):
    return [of_shapes(shapes, seed) for seed in range(count)]


def mean(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


@pytest.mark.parametrize(("fn", "shapes"), [(exits, EXITS), (past, PAST), (apart, TOWERS)])
def test_all_layers_apart_are_the_ensemble_of_every_output(fn, shapes):
    net, trees = traced(fn, shapes, X.shape), trees_of(shapes)
    weights = (0.5, 0.3, 0.2)
    outs = [fn(tree, X) for tree in trees]
    wanted = jax.tree.map(lambda *a: sum(w * x for w, x in zip(weights, a, strict=True)), *outs)
    for model in (
        merge.ensemble(net, trees, weights),
        merge.preserve_first(net, trees, layers=net.depth, weights=weights),
    ):
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), model(X), wanted)
    merged = merge.preserve_first(net, trees, layers=0)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), merged(X), fn(mean(trees), X))
    # A model merged with itself is itself, wherever it is cut.
    for layers in range(net.depth + 1):
        itself = merge.preserve_first(net, trees[:1] * 2, layers=layers)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), itself(X), outs[0])


def test_a_branch_is_cut_as_far_from_its_end_as_the_main_path():
    net = traced(exits, EXITS, X.shape)
    main = ["w1", "w2", "w3", "w4"]
    # By cut, the branch's layers in the stem: none, none, none, one from each end, all.
    wanted = [[], [], [], ["e1"], ["e1", "e2", "exit"]]
    for cut, side in enumerate(wanted):
        assert net.stem_leaves(cut) == {*main[:cut], *side}
        assert net.trunk_leaves(cut) == set(EXITS) - {*main[:cut], *side}
        assert net.stem_params(cut) + net.trunk_params(cut) == net.params
        assert net.stem_flops(cut) + net.trunk_flops(cut) == net.flops
    trees = trees_of(EXITS, 2)
    a, b = ({k: np.asarray(v, np.float64) for k, v in tree.items()} for tree in trees)
    x = np.asarray(X, np.float64)
    # By hand at 3 of 4: means of pre-activations, then averaged weights.
    h = [np.maximum(x @ t["w1"], 0) for t in (a, b)]
    side = np.maximum(sum(z @ t["e1"] for z, t in zip(h, (a, b), strict=True)) / 2, 0)
    h = [np.maximum(z @ t["w2"], 0) for z, t in zip(h, (a, b), strict=True)]
    deep = np.maximum(sum(z @ t["w3"] for z, t in zip(h, (a, b), strict=True)) / 2, 0)
    found = merge.preserve_first(net, trees, layers=3)(X)
    assert_close(found["main"], deep @ (a["w4"] + b["w4"]) / 2, 1e-5)
    assert_close(found["side"], side @ (a["e2"] + b["e2"]) / 2, 1e-5)
    exit_ = (a["exit"] + b["exit"]) / 2
    assert_close(found["early"], sum(h) / 2 @ exit_, 1e-5)


@pytest.mark.parametrize("fn", [towers, apart])
def test_towers_are_cut_as_each_alone_counted_from_its_end(fn):
    net, trees = traced(fn, TOWERS, X.shape), trees_of(TOWERS, 2)
    parts = {"image": (tower, TOWER), "text": (text, TEXT)}
    alone = {k: traced(f, shapes, X.shape) for k, (f, shapes) in parts.items()}
    assert [net.depth, alone["image"].depth, alone["text"].depth] == [8, 6, 8]
    for layers in range(net.depth + 1):
        own = {"image": max(0, layers - 2), "text": layers}
        outs = {}
        for name, of in alone.items():
            halves = [tree[name] for tree in trees]
            model = merge.preserve_first(of, halves, layers=own[name])
            outs[name] = model(X)
            for side in ("stem_leaves", "trunk_leaves"):
                got = {p.removeprefix(f"{name}/") for p in getattr(net, side)(layers) if name in p}
                want = getattr(of, side)(own[name])
                assert got == want, (layers, name, side)
        found = merge.preserve_first(net, trees, layers=layers)(X)
        joined = outs["image"] @ outs["text"].T if fn is towers else (outs["image"], outs["text"])
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, joined)


def test_heads_begin_where_stems_end():
    net, trees = traced(exits, EXITS, X.shape), trees_of(EXITS, 2)
    model = merge.partial(net, trees, span=slice(1, 3))
    assert model.in_heads("exit") and model.in_heads("e2") and not model.in_heads("e1")
    crossing, _ = model.run_trunk(X)
    for k, out in enumerate(model(X)):
        wanted = net.run(trees[k], crossing, start=3)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), out, wanted)


def test_the_ends_of_branches_at_the_cut_are_corrected():
    net, trees = traced(exits, EXITS, X.shape), trees_of(EXITS, 2)
    model = merge.preserve_first(net, trees, layers=4)
    sites = ["w4", "e2", "exit"]  # the averaged pre-activations
    repaired = renorm.repair(net, model, [X], references=trees, sites=sites)
    goals = stats.moments(net, trees, [X], sites=sites)
    for site, (value,) in repaired.read(X, sites)[1].items():
        assert_close(value.mean(0), goals.mean[site].mean(0), 1e-4, least=1)
        assert_close(value.std(0), np.asarray(goals.std[site]).mean(0), 1e-4)
