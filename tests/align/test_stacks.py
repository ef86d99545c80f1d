"""A permuted copy of a network with stacked layers, experts or loops is recovered, exactly.

The copy is made by NumPy, entry by entry. A network without stacks is the same network written out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from helpers import assert_close, lively, traced
from vfjax import align, checkpoint, merge, prune, stats

# A router says which expert is which.
pytestmark = pytest.mark.filterwarnings("ignore:the channels of layer")

D, N = 4, 6


def layers(p, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w[0] + w[1][None]) @ w[2], None

    stack = tuple(p[name] for name in ("w1", "b1", "w2"))
    return lax.scan(layer, jnp.sin(x @ p["stem"]), stack)[0] @ p["head"]


def experts(p, x):
    h = jnp.sin(x @ p["stem"])
    gate, chosen = lax.top_k(jax.nn.softmax(h @ p["router"]), 2)
    weight = (jax.nn.one_hot(chosen, 3) * gate[..., None]).sum(1)
    hidden = jnp.tanh(jnp.einsum("bd,edn->ben", h, p["w1"]) + p["b1"][None])
    return (h + jnp.einsum("ben,end,be->bd", hidden, p["w2"], weight)) @ p["head"]


def towers(p, x):
    """A network under `vmap`, whose outputs are kept apart."""
    h = jnp.sin(x @ p["stem"])
    one = lambda w1, b1, w2: jnp.tanh(h @ w1 + b1[None]) @ w2  # noqa: E731
    return jax.vmap(one)(p["w1"], p["b1"], p["w2"]) @ p["head"]


SHAPES = {"stem": (5, D), "w1": (3, D, N), "b1": (3, N), "w2": (3, N, D), "head": (D, 2)}
SHAPES["router"] = D, 3
X = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)


def copy_of(tree, seed=2):
    """The tree with the units of every entry in an order of their own."""
    rng = np.random.default_rng(seed)
    tree = {name: np.array(leaf) for name, leaf in tree.items()}
    for k in range(len(tree["w1"])):
        order = rng.permutation(N)
        tree["w1"][k] = tree["w1"][k][:, order]
        tree["b1"][k] = tree["b1"][k][order]
        tree["w2"][k] = tree["w2"][k][order]
    return tree


def case(fn, count=3):
    shapes = {
        name: (count, *s[1:]) if name in ("w1", "b1", "w2") else s for name, s in SHAPES.items()
    }
    tree = lively(shapes, 0)
    return traced(fn, shapes, X.shape), tree, copy_of(tree)


def same(tree, other, tol=1e-6):
    for name in tree:
        assert_close(other[name], tree[name], tol)


@pytest.mark.parametrize("fn", [layers, experts, towers], ids=lambda fn: fn.__name__)
def test_a_copy_with_every_entry_reordered_is_recovered(fn):
    net, tree, copy = case(fn)
    found = align.match_weights(net, tree, copy, key=jax.random.key(0))
    same(tree, net.spec.permute(copy, found.permutations), 0)
    found = align.match_activations(net, tree, copy, [X])
    assert not found.by_weights + found.unmatched
    same(tree, net.spec.permute(copy, found.permutations), 0)


@pytest.mark.parametrize("fn", [layers, experts], ids=lambda fn: fn.__name__)
def test_maps_of_every_matcher_recover_the_copy(fn):
    net, tree, copy = case(fn)
    for matcher in (align.zip_features, align.transport):
        same(tree, matcher(net, [tree, copy], [X]).apply(net, [tree, copy])[1])
    same(tree, align.transport(net, [tree, copy], on="weights").apply(net, [tree, copy])[1])
    maps = align.cca(net, [tree, copy], [X])
    assert_close(net.run(maps.apply(net, [tree, copy])[1], X), net.run(tree, X), 1e-4)


@pytest.mark.parametrize("data", [None, [X]], ids=["weights", "activations"])
def test_a_universe_of_copies(data):
    net, tree, copy = case(layers)
    trees = [copy, tree, copy_of(tree, 3)]
    found = align.match_universe(net, trees, data, key=jax.random.key(0))
    first, *others = found.apply(net, trees)
    for other in others:
        same(first, other, 0)


def test_more_layers_than_are_unrolled_are_matched_by_weights():
    net, tree, copy = case(layers, 66)
    tree["w2"], copy["w2"] = tree["w2"] / 16, copy["w2"] / 16
    for found in (
        align.match_weights(net, tree, copy, key=jax.random.key(0)),
        align.match_activations(net, tree, copy, [X]),
    ):
        same(tree, net.spec.permute(copy, found.permutations), 0)
    assert len(found.by_weights) == 66


def test_merging_and_saving_with_stacks(tmp_path):
    net, tree, copy = case(layers)
    maps = align.zip_features(net, [tree, copy], [X])
    averaged = merge.interpolate(maps.apply(net, [tree, copy]))
    same(tree, averaged)
    model = merge.partial(net, [tree, copy], maps, span=slice(2, None))
    assert_close(model(X), net.run(tree, X), 1e-5)
    checkpoint.save(tmp_path / "model", model)
    assert_close(checkpoint.load(tmp_path / "model", net=net)(X), model(X), 1e-6)
    found = align.match_weights(net, tree, copy, key=jax.random.key(0)).permutations
    checkpoint.save(tmp_path / "order", dict(found))
    loaded = checkpoint.load(tmp_path / "order")
    same(tree, net.spec.permute(copy, loaded), 0)


def test_masks_of_stacks_move_with_their_networks():
    net, tree, copy = case(layers)
    masks = prune.masks(prune.magnitude(net, tree), 0.5)
    p = align.match_weights(net, copy, tree, key=jax.random.key(0)).permutations
    masks = jax.tree.map(lambda mask, leaf: np.broadcast_to(mask, leaf.shape), masks, tree)
    moved = net.spec.permute(masks, p)
    pruned = prune.apply(copy, moved)
    assert_close(net.run(pruned, X), net.run(prune.apply(tree, masks), X), 1e-5)


def test_moments_of_stacks_are_carried_entry_by_entry():
    net, tree, copy = case(experts)
    sites = ["w1", "w1:act"]
    moments = stats.moments(net, [tree, copy], [X], sites=sites, covariance=sites)
    found = align.match_weights(net, tree, copy, key=jax.random.key(0)).permutations
    carried = moments.carried([{}, found])
    matrices = {g: np.eye(len(p))[p] for g, p in found.items()}
    for new in (carried, moments.carried([{}, matrices])):
        for site in sites:
            assert new.mean[site].shape == (2, 3, N)
            assert_close(new.mean[site][1], new.mean[site][0], 1e-5)
            assert_close(new.var[site][1], new.var[site][0], 1e-5)
            assert_close(new.covariance[site][1, 1], new.covariance[site][0, 0], 1e-5)
