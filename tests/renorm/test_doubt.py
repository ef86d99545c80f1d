"""References in another order than the merged model are warned about, and no others."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import vfjax
from helpers import normal
from vfjax import merge, renorm, stats

WIDTH = 24
DATA = [normal(9, 64, 6) + 0.3]


def mlp(p, x):
    for k in range(3):
        x = jax.nn.relu(x @ p[f"w{k}"] + p[f"b{k}"][None])
    return x @ p["v"]


def residual(p, x):
    """The layer that reads the input is none of the sites of the paper."""
    x = jax.nn.relu(x @ p["w0"] + p["b0"][None])
    x = x + jax.nn.relu(x @ p["w1"] + p["b1"][None]) @ p["w2"]
    return jax.nn.relu(x + p["b2"][None]) @ p["v"]


def tree_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"w0": (6, WIDTH), "w1": (WIDTH, WIDTH), "w2": (WIDTH, WIDTH), "v": (WIDTH, 3)}
    tree = {name: rng.normal(size=s) * (2 / s[0]) ** 0.5 for name, s in shapes.items()}
    tree |= {f"b{k}": 0.1 * rng.normal(size=WIDTH) for k in range(3)}
    return {name: np.float32(leaf) for name, leaf in tree.items()}


@functools.cache
def network(fn):
    return vfjax.trace(fn, tree_of(0), DATA[0])


def moved(net, tree, seed):
    rng = np.random.default_rng(seed)
    return net.spec.permute(tree, {g: rng.permutation(n) for g, n in net.spec.sizes.items()})


REMEDIES = {"repair": renorm.repair, "rescale": renorm.rescale}


@pytest.mark.parametrize("remedy", list(REMEDIES))
@pytest.mark.parametrize("fn", [mlp, residual])
def test_references_in_another_order_are_warned_about(fn, remedy):
    net, edges = network(fn), [tree_of(0), tree_of(1)]
    merged = merge.interpolate(edges)
    for seed in (0, 1):
        wrong = [edges[0], moved(net, edges[1], seed)]
        with pytest.warns(UserWarning, match=r"^references\[1\] may not be in the order"):
            REMEDIES[remedy](net, merged, DATA, references=wrong)
    # A copy that was aligned for the merge, but not as a reference; all of them; one pass a layer.
    for references in ([edges[0], moved(net, edges[0], 3)], [moved(net, e, 4) for e in edges]):
        with pytest.warns(UserWarning, match="in the order of the merged model"):
            REMEDIES[remedy](net, edges[0], DATA, references=references, sweeps="layer")


def test_moments_in_another_order_are_warned_about():
    net, edges = network(mlp), [tree_of(0), tree_of(1)]
    references = stats.moments(net, [edges[0], moved(net, edges[1], 0)], DATA)
    with pytest.warns(UserWarning, match=r"^references\[1\] may not"):
        renorm.repair(net, merge.interpolate(edges), DATA, references=references)
    references = stats.moments(net, edges, DATA)
    renorm.repair(net, merge.interpolate(edges), DATA, references=references)


def noisy(tree, seed):
    rng = np.random.default_rng(seed)
    return {k: a + 0.1 * a.std() * np.float32(rng.normal(size=a.shape)) for k, a in tree.items()}


def pruned(tree, seed):
    return {k: np.where(abs(a) > np.quantile(abs(a), 0.6), a, 0) for k, a in tree.items()}


# Warnings are errors.
@pytest.mark.parametrize("fn", [mlp, residual])
def test_references_in_the_merged_model_s_order_are_not(fn):
    net = network(fn)
    for seed in range(2):
        edges = [tree_of(2 * seed), tree_of(2 * seed + 1)]
        merged = jax.tree.map(np.asarray, merge.interpolate(edges))
        repaired = renorm.repair(net, merged, DATA, references=edges)
        for model in (repaired, noisy(merged, seed), pruned(merged, seed), edges[0]):
            references = [edges[0]] if model is edges[0] else edges
            renorm.repair(net, model, DATA, references=references)
        # Models that are the same, or almost; several of them; a tree that is only an edge.
        renorm.repair(net, edges[0], DATA, references=[edges[0]] * 2)
        several = [noisy(edges[0], k) for k in range(4)]
        renorm.rescale(net, noisy(merge.interpolate(several), 5), DATA, references=several)
        renorm.repair(net, merge.interpolate(edges, (0.9, 0.1)), DATA, references=edges)


def test_partial_merges_and_few_channels():
    net, edges = network(mlp), [tree_of(0), tree_of(1)]
    for cut in (1, 2):
        model = merge.preserve_first(net, edges, layers=cut)
        renorm.repair(net, model, DATA, references=edges)
    # One layer of 16 channels has one degree of freedom too few; with 17 the same are doubted.
    for width in (16, 17):
        rng = np.random.default_rng(width)
        few = [
            {"w": np.float32(rng.normal(size=(6, width))), "v": np.ones((width, 1), np.float32)}
            for _ in range(2)
        ]
        net = vfjax.trace(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], few[0], DATA[0])
        odd = [few[0], {**few[1], "w": np.roll(few[1]["w"], 7, 1)}]
        args = net, merge.interpolate(few), DATA
        if width == 16:
            renorm.repair(*args, references=odd)
        else:
            with pytest.warns(UserWarning, match=r"references\[1\] may not"):
                renorm.repair(*args, references=odd)
