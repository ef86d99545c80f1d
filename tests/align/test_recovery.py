"""Recovery of permuted copies: what the order of units hides, and what no order can exceed."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import lively, mlp, random_permutations, resnet, same_permutations, traced
from vfjax import PermutationSpec, align
from vfjax.symmetry import invert
from zoo.convolutional import unet, unet_inputs, unet_shapes
from zoo.registry import drawn, orders

KEY = jax.random.key(0)


def heads(v, x):
    """Queries of several heads per key, on a residual stream."""
    h = jnp.tanh(x @ v["emb"])
    batch, tokens, _ = h.shape
    q = (h @ v["q"]).reshape(batch, tokens, 2, 3, 4)
    k, u = ((h @ v[name]).reshape(batch, tokens, 2, 4) for name in ("k", "v"))
    scores = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k), -1)
    out = jnp.einsum("bgrts,bsgd->btgrd", scores, u).reshape(batch, tokens, 24)
    return (h + out @ v["o"]).mean(1) @ v["head"]


def scaled(v, x):
    """Heads whose queries and keys are normalised by one scale for all heads."""
    h = jnp.tanh(x @ v["emb"])

    def unit(name, scale):
        z = jnp.einsum("btc,chd->bthd", h, v[name])
        size = jax.lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-6)
        return z * size * jnp.broadcast_to(v[scale], z.shape)

    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", unit("q", "s"), unit("k", "t")), -1)
    out = jnp.einsum("bhts,bshd->bthd", scores, jnp.einsum("btc,chd->bthd", h, v["v"]))
    return (h + jnp.einsum("bthd,hdc->btc", out, v["o"])).mean(1) @ v["head"]


def convolve(x, w, groups=1):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=names, feature_group_count=groups
    )


def group_norm(x, scale, groups):
    y = x.reshape(*x.shape[:-1], groups, -1)
    y = y - y.mean((1, 2, 4), keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean((1, 2, 4), keepdims=True) + 1e-5)
    return y.reshape(x.shape) * jnp.broadcast_to(scale, x.shape)


def grouped(v, x):
    """GroupNorm in four groups beside a convolution in two."""
    h = jax.nn.relu(group_norm(convolve(x, v["c0"]), v["s0"], 4))
    h = jax.nn.relu(group_norm(convolve(h, v["c1"], groups=2), v["s1"], 4))
    return h.mean((1, 2)) @ v["head"]


def stream(v, x):
    """Grouped convolutions inside a residual stream."""
    h = jax.nn.relu(convolve(x, v["c0"]))
    for name in ("g1", "g2"):
        h = h + jax.nn.relu(convolve(h, v[name], groups=4))
    return h.mean((1, 2)) @ v["head"]


def matrices(v, x):
    """Dense layers that write matrices; each axis is mixed on its own."""
    h = jax.nn.relu(jnp.einsum("bi,ijk->bjk", x, v["k0"]))
    h = jax.nn.relu(jnp.einsum("bjk,jl->blk", h, v["k1"]))
    return jnp.einsum("blk,lkm->bm", h, v["k2"])


def mixer(v, x):
    """Tokens mixed for every channel, and channels for every token."""
    h = x @ v["emb"]
    for name in ("1", "2"):
        y = jax.nn.gelu(jnp.swapaxes(h, 1, 2) @ v["t" + name]) @ v["u" + name]
        h = h + jnp.swapaxes(y, 1, 2)
        h = h + jax.nn.gelu(h @ v["c" + name]) @ v["d" + name]
    return h.mean(1) @ v["head"]


def noisy(v, x):
    """A plain stack of dense layers."""
    for k in range(6):
        x = jax.nn.relu(x @ v[f"w{k}"])
    return x @ v["head"]


NETWORKS = {
    heads: (
        {"emb": (6, 12), "q": (12, 24), "k": (12, 8), "v": (12, 8), "o": (24, 12), "head": (12, 3)},
        (8, 5, 6),
    ),
    scaled: (
        {name: (12, 3, 4) for name in "qkv"}
        | {"emb": (6, 12), "s": (4,), "t": (4,), "o": (3, 4, 12), "head": (12, 3)},
        (8, 5, 6),
    ),
    grouped: (
        {"c0": (3, 3, 3, 12), "s0": (12,), "c1": (3, 3, 6, 12), "s1": (12,), "head": (12, 3)},
        (8, 6, 6, 3),
    ),
    stream: (
        {"c0": (3, 3, 3, 12), "g1": (3, 3, 3, 12), "g2": (3, 3, 3, 12), "head": (12, 3)},
        (8, 6, 6, 3),
    ),
    matrices: ({"k0": (5, 4, 6), "k1": (4, 9), "k2": (9, 6, 3)}, (40, 5)),
    mixer: (
        {"emb": (6, 8), "head": (8, 3)}
        | {f"{a}{k}": s for k in "12" for a, s in zip("tu", ((5, 7), (7, 5)), strict=True)}
        | {f"{a}{k}": s for k in "12" for a, s in zip("cd", ((8, 10), (10, 8)), strict=True)},
        (8, 5, 6),
    ),
}


def copy_of(fn, seed):
    shapes, x = NETWORKS[fn]
    net, a = traced(fn, shapes, x), lively(shapes, seed)
    orders = net.spec.random(jax.random.key(seed))
    wanted = invert({g: np.asarray(p) for g, p in orders.items()}, within=net.spec.within)
    return net, a, net.spec.permute(a, orders), wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fn", NETWORKS)
def test_a_copy_is_recovered_where_groups_share_an_axis(fn, seed):
    net, a, b, wanted = copy_of(fn, seed)
    found = align.match_weights(net, a, b, key=jax.random.key(seed))
    same_permutations(found.permutations, wanted)
    assert found.objective[-1] == pytest.approx(found.bound, rel=1e-6)
    x = np.random.default_rng(seed).normal(size=NETWORKS[fn][1]).astype(np.float32)
    same_permutations(align.match_activations(net, a, b, [x]).permutations, wanted)


@pytest.mark.parametrize("fn", NETWORKS)
def test_a_network_matched_with_itself_stays(fn):
    net, a, _, _ = copy_of(fn, 0)
    x = np.random.default_rng(0).normal(size=NETWORKS[fn][1]).astype(np.float32)
    for found in (align.match_weights(net, a, a, key=KEY), align.match_activations(net, a, a, [x])):
        assert found.moved == 0


def shifted(v, x):
    """One layer that writes matrices, with a shift for all rows and one for all columns."""
    h = jnp.einsum("bi,ijk->bjk", x, v["k"])
    h = h + jnp.broadcast_to(v["t"][:, None], h.shape)
    return jnp.einsum("bjk,jkm->bm", jax.nn.relu(h + jnp.broadcast_to(v["s"], h.shape)), v["head"])


@pytest.mark.parametrize("seed", range(4))
def test_groups_that_cross_are_matched_by_the_correlations_of_their_units(seed):
    """Against NumPy's correlations: no order of one group alone is better than the one found."""
    shapes = {"k": (5, 3, 4), "t": (3,), "s": (4,), "head": (3, 4, 2)}
    net, a, b = traced(shifted, shapes, (2, 5)), lively(shapes, seed), lively(shapes, seed + 9)
    x = np.random.default_rng(seed).normal(size=(60, 5)).astype(np.float32)
    found = align.match_activations(net, a, b, [x])
    rows, columns = (found.permutations[group] for group in ("k:heads", "k:dims"))
    units = [
        np.maximum(np.einsum("bi,ijk->bjk", x, v["k"]) + v["t"][:, None] + v["s"], 0)
        for v in (a, b)
    ]
    table = np.corrcoef(*(u.reshape(60, 12) for u in units), rowvar=False)[:12, 12:].reshape(
        3, 4, 3, 4
    )

    def total(rows, columns):
        places = np.arange(3)[:, None], np.arange(4), np.asarray(rows)[:, None], np.asarray(columns)
        return table[places].sum()

    assert found.objective[-1] == pytest.approx(total(rows, columns), rel=1e-4)
    best = total(rows, columns) + 1e-4
    assert all(total(other, columns) <= best for other in itertools.permutations(range(3)))
    assert all(total(rows, other) <= best for other in itertools.permutations(range(4)))


@pytest.mark.filterwarnings("ignore:the channels of layer")  # normed across skips
def test_a_copy_of_a_deep_unet_is_recovered():
    """Of 87 groups, many nested and in long chains; a search from the order as it is gets stuck."""
    shapes, x = unet_shapes(4, 3, 1), unet_inputs(1, np.random.default_rng(0))
    x["image"] = np.zeros((1, 8, 8, 3), np.float32)
    with jax.numpy_rank_promotion("allow"):
        net = vfjax.trace(functools.partial(unet, levels=3, blocks=1), drawn(shapes, 0), x)
    assert len(net.spec.groups) > 80
    a, stuck = drawn(shapes, 0), 0
    for seed in range(4):
        copy = net.spec.permute(a, orders(net.spec, seed))
        search = functools.partial(align.match_weights, net, a, copy, key=jax.random.key(seed))
        found = search()
        jax.tree.map(np.testing.assert_array_equal, net.spec.permute(copy, found.permutations), a)
        stuck += search(optimistic=False).objective[-1] < 0.999 * found.bound
    assert stuck


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6])
def test_a_noisy_copy_of_a_deep_network_is_recovered(noise):
    shapes = {"w0": (4, 12)} | {f"w{k}": (12, 12) for k in range(1, 6)} | {"head": (12, 3)}
    net, a = traced(noisy, shapes, (2, 4)), lively(shapes, 0)
    found_alone = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        near = {p: v + np.float32(noise * v.std() * rng.normal(size=v.shape)) for p, v in a.items()}
        orders = random_permutations(net.spec, seed)
        b = net.spec.permute(near, orders)
        found = align.match_weights(net, a, b, key=jax.random.key(seed))
        truth = sum(np.vdot(a[p], near[p]) for p in a)
        assert found.objective[-1] >= truth * (1 - 1e-6)
        alone = align.match_weights(net, a, b, key=jax.random.key(seed), optimistic=False)
        found_alone.append(alone.objective[-1] >= truth * (1 - 1e-6))
    assert not all(found_alone)  # else the network is too easy for this test


@pytest.mark.parametrize("fn", [heads, scaled, grouped, stream, matrices])
def test_the_search_from_optimistic_gains_makes_nothing_worse(fn):
    net, a, _, _ = copy_of(fn, 0)
    b = lively(NETWORKS[fn][0], 1)
    search = functools.partial(align.match_weights, net, a, b, key=KEY)
    alone, both = search(optimistic=False), search()
    assert alone.objective[-1] <= both.objective[-1] <= both.bound
    restarts = [search(restarts=n, optimistic=False).objective[-1] for n in (0, 2)]
    assert restarts[0] == alone.objective[-1] <= restarts[1]


def test_ordinary_networks_are_matched_as_before():
    """Networks that were trained apart, of plain layers, are searched once, unless asked."""
    shapes = {"w0": (6, 16), "b0": (16,), "w1": (16, 12), "b1": (12,), "w2": (12, 4)}
    streams = {"stem": (12, 16), "a0": (16, 24), "b0": (24, 16), "a1": (16, 24), "b1": (24, 16)}
    for fn, of, x in ((mlp, shapes, (2, 6)), (resnet, streams | {"head": (16, 4)}, (2, 12))):
        net, a, b = traced(fn, of, x), lively(of, 0), lively(of, 1)
        search = functools.partial(align.match_weights, net, a, b, key=KEY)
        default, alone, asked = search(), search(optimistic=False), search(optimistic=True)
        same_permutations(default.permutations, alone.permutations)
        assert default.objective == alone.objective
        assert asked.objective[-1] >= alone.objective[-1]


def test_no_permutation_exceeds_the_bound():
    rng = np.random.default_rng(0)
    spec = PermutationSpec({"h": [("w", 0, "in"), ("w", 1, "out")]})
    a, b = ({"w": rng.normal(size=(6, 6))} for _ in range(2))
    found = align.match_weights(spec, a, b, key=KEY)
    for seed in range(20):
        moved = spec.permute(b, {"h": np.random.default_rng(seed).permutation(6)})
        assert np.vdot(a["w"], moved["w"]) <= found.bound
    assert f"of at most {found.bound:.6g} after" in repr(found)
    same = align.match_weights(spec, a, a, key=KEY)
    assert same.bound == pytest.approx(same.objective[-1])
