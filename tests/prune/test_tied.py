"""Kernels that are looked up as well: `emb[ids]` is scored as `one_hot(ids) @ emb` is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from helpers import assert_close, of_shapes
from vfjax import prune

VOCAB, WIDTH = 7, 3
SHAPES = {"emb": (VOCAB, WIDTH), "w": (WIDTH, WIDTH)}
IDS = np.random.default_rng(0).integers(0, VOCAB - 1, (6, 4)).astype(np.int32)  # one never occurs
LABEL = np.random.default_rng(1).integers(0, VOCAB, 6)


def language_model(lookup, v, ids):
    return jnp.tanh(lookup(v["emb"], ids) @ v["w"]).mean(1) @ v["emb"].T


def one_hot(emb, ids):
    return jax.nn.one_hot(ids, VOCAB) @ emb


def sliced(emb, ids):
    row = lambda i: lax.dynamic_slice(emb, (i, jnp.zeros_like(i)), (1, WIDTH))[0]  # noqa: E731
    return jax.vmap(jax.vmap(row))(ids)


def first_alone(emb, ids):
    """Looks one position up by itself: two uses of the leaf."""
    return jnp.concatenate([emb[ids[:, :1]], jnp.take(emb, ids[:, 1:], axis=0)], 1)


LOOKUPS = {
    "index": lambda emb, ids: emb[ids],
    "take": lambda emb, ids: jnp.take(emb, ids, axis=0),
    "clip": lambda emb, ids: jnp.take(emb, ids, axis=0, mode="clip"),
    "columns": lambda emb, ids: jnp.moveaxis(jnp.take(emb.T, ids, axis=1), 0, -1),
    "heads": lambda emb, ids: emb.reshape(VOCAB, WIDTH, 1)[ids].reshape(*ids.shape, WIDTH),
    "half": lambda emb, ids: emb.astype(jnp.bfloat16)[ids].astype(jnp.float32),
    "vmap": lambda emb, ids: jax.vmap(lambda row: emb[row])(ids),
    "sliced": sliced,
    "twice": first_alone,
}


@functools.cache
def case(name):
    lookup = one_hot if name == "one-hot" else LOOKUPS[name]
    tree = of_shapes(SHAPES, 2)
    return vfjax.trace(functools.partial(language_model, lookup), tree, IDS), tree


def batches():
    return [(IDS[:4], LABEL[:4]), (IDS[4:], LABEL[4:])]


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_is_a_use_of_the_kernel(name):
    (net, tree), (like, _) = case(name), case("one-hot")
    assert "emb" in prune.prunable(net)
    found, wanted = (prune.wanda(n, tree, batches()).values for n in (net, like))
    for path in SHAPES:
        assert_close(found[path], wanted[path], 1e-2 if name == "half" else 1e-5)


def test_gradients_are_those_of_both_uses():
    (net, tree), (like, _) = case("index"), case("one-hot")
    for score, options in ((prune.fisher, {}), (prune.woodfisher, {"count": 6})):
        found, wanted = (score(n, tree, batches(), **options).values for n in (net, like))
        for path in SHAPES:
            assert_close(found[path], wanted[path], 1e-4)


def test_wanda_by_hand():
    net, tree = case("index")
    _, inside = net.run(tree, IDS, capture=["emb:in"])
    counts = np.bincount(IDS.reshape(-1), minlength=VOCAB) / len(IDS)
    squares = (np.asarray(inside["emb:in"], np.float64) ** 2).mean(0)
    wanted = np.abs(np.asarray(tree["emb"], np.float64))
    wanted *= np.sqrt(squares[None] + counts[:, None])
    assert counts[-1] == 0
    assert_close(prune.wanda(net, tree, batches()).values["emb"], wanted, 1e-5)


def test_positions_out_of_range_read_nothing():
    def fn(v, ids):
        return jnp.take(v["emb"], ids, axis=0, mode="fill", fill_value=0).sum(1) @ v["emb"].T

    tree = {"emb": of_shapes(SHAPES, 2)["emb"]}
    net = vfjax.trace(fn, tree, IDS)
    beyond = np.where(IDS == 0, VOCAB + 3, IDS)
    found = prune.wanda(net, tree, [beyond]).values["emb"]
    _, inside = net.run(tree, beyond, capture=["emb:in"])
    norm = np.sqrt((np.asarray(inside["emb:in"]) ** 2).mean(0))
    assert_close(found[0], np.abs(tree["emb"][0]) * norm, 1e-5)


def test_a_table_of_a_stack_counts_in_its_own_entry():
    def fn(v, ids):
        return v["both"][1][ids].sum(1) @ v["both"][0].T + v["both"][0][ids].sum(1) @ v["w"]

    tree = of_shapes({"both": (2, VOCAB, WIDTH), "w": (WIDTH, VOCAB)}, 2)
    net = vfjax.trace(fn, tree, IDS)
    found = prune.wanda(net, tree, [IDS]).values["both"]
    counts = np.bincount(IDS.reshape(-1), minlength=VOCAB) / len(IDS)
    _, inside = net.run(tree, IDS, capture=["both[0]:in"])
    squares = (np.asarray(inside["both[0]:in"], np.float64) ** 2).mean(0)[None] + counts[:, None]
    assert_close(found[0], np.abs(tree["both"][0]) * np.sqrt(squares), 1e-5)
    assert not found[1].any()  # looked up only, and so no layer's kernel
