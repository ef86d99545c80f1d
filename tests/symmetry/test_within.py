"""Groups that move by themselves inside each entry of another: the dims of heads."""

from __future__ import annotations

import itertools
import types
import zlib

import equinox as eqx
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from helpers import normal
from vfjax import align, stats
from vfjax._propagate import RULES
from vfjax.align import match_activations, match_weights
from vfjax.symmetry import PermutationSpec, check_spec, compose, invert

HEADS, DIMS, WIDTH = 3, 4, 7
TOKENS = normal(0, 3, 5, WIDTH)
KEY = jax.random.key(0)


def drawn(shapes):
    """Random leaves, each from its own path."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape) * 0.5
        return jnp.asarray(noise + (leaf.ndim == 1), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def attention(scale=lambda q, k, v, p: (q, k, v), mixed=lambda out, p: out):
    """Attention on leaves with an axis of heads; `scale` and `mixed` are what is done besides."""

    def apply(p, x):
        query, key, value = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in ("q", "k", "v"))
        query, key, value = scale(query, key + p["bias"][None, None], value, p)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
        out = mixed(jnp.einsum("bhqk,bkhd->bqhd", scores, value), p)
        return jnp.einsum("bqhd,hdc->bqc", out, p["out"]).mean(1)

    return apply


def leaves(**more):
    shapes = {name: (WIDTH, HEADS, DIMS) for name in "qkv"}
    shapes |= {"bias": (HEADS, DIMS), "out": (HEADS, DIMS, 2), **more}
    return drawn({name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()})


def change(fn, variables, x, spec, key=0):
    """Largest change of the output under random permutations, relative to its size."""
    fn = jax.jit(fn)
    net = types.SimpleNamespace(spec=spec, run=fn)
    size = float(jnp.abs(fn(variables, x)).max())
    return check_spec(net, variables, x, key=jax.random.key(key)) / size


BOTH = {"q:dims": "q:heads", "v:dims": "q:heads"}
INDEPENDENT = {  # what is done besides, and leaves for it
    "plain": (attention(), {}),
    "a scale for each head": (
        attention(lambda q, k, v, p: (q * p["s"][None, None], k, v)),
        {"s": (HEADS, DIMS)},
    ),
    "a scale that all entries share": (
        attention(lambda q, k, v, p: (q * p["s"], k, v)),
        {"s": ()},
    ),
    "normalised in each head": (
        attention(lambda q, k, v, p: (q / jnp.linalg.norm(q, axis=-1, keepdims=True), k, v)),
        {},
    ),
    "gated": (attention(mixed=lambda out, p: out * jax.nn.silu(out)), {}),
    "normalised over all heads": (
        attention(mixed=lambda out, p: out / jnp.linalg.norm(out, axis=(-1, -2), keepdims=True)),
        {},
    ),
    "flattened and back": (
        attention(mixed=lambda out, p: jnp.tanh(out.reshape(3, 5, -1)).reshape(out.shape)),
        {},
    ),
    "in a loop": (
        attention(mixed=lambda out, p: lax.fori_loop(0, 2, lambda i, c: jnp.sin(c) + out, out)),
        {},
    ),
    "scanned over tokens": (
        attention(
            mixed=lambda out, p: jnp.moveaxis(
                lax.scan(lambda c, t: (c + t, c * t), 0 * out[:, 0], jnp.moveaxis(out, 1, 0))[1],
                0,
                1,
            )
        ),
        {},
    ),
}
TIED = {  # likewise, and which groups stay independent
    "a scale that heads share": (
        attention(lambda q, k, v, p: (q * p["s"][None, None, None], k, v)),
        {"s": (DIMS,)},
        {"v:dims": "q:heads"},
    ),
    "talking heads": (
        attention(lambda q, k, v, p: (q, k, jnp.einsum("bthd,hg->btgd", v, p["mix"]))),
        {"mix": (HEADS, HEADS)},
        {"q:dims": "q:heads"},
    ),
    "talking heads with a skip": (
        attention(lambda q, k, v, p: (q, k, v + jnp.einsum("bthd,hg->btgd", v, p["mix"]))),
        {"mix": (HEADS, HEADS)},
        {"q:dims": "q:heads"},
    ),
    "the mean of heads": (
        attention(mixed=lambda out, p: out - out.mean(2, keepdims=True)),
        {},
        {"q:dims": "q:heads"},
    ),
    "a layer in all heads": (
        attention(lambda q, k, v, p: (q, k, jnp.tanh(v @ p["w"]))),
        {"w": (DIMS, DIMS)},
        {"q:dims": "q:heads"},
    ),
    "a layer in all heads in a loop": (
        attention(
            lambda q, k, v, p: (q, k, lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c @ p["w"]), v))
        ),
        {"w": (DIMS, DIMS)},
        {"q:dims": "q:heads"},
    ),
    "scores of all pairs of heads": (
        attention(
            lambda q, k, v, p: (
                q + jnp.einsum("bthd,bsgd->btsh", q, k).mean((1, 2))[:, None, :, None],
                k,
                v,
            )
        ),
        {},
        {"v:dims": "q:heads"},
    ),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_dims_of_heads_are_independent(name):
    apply, more = INDEPENDENT[name]
    variables = leaves(**more)
    spec = vfjax.trace(apply, variables, TOKENS).spec
    assert {spec.within.get("q:dims"), spec.within.get("v:dims")} == {"q:heads"}, spec
    permutations = spec.random(KEY)
    assert permutations["q:dims"].shape == (HEADS, DIMS)
    assert len(np.unique(permutations["q:dims"], axis=0)) > 1
    assert max(change(apply, variables, TOKENS, spec, key) for key in range(3)) < 1e-5


@pytest.mark.parametrize("name", TIED)
def test_dims_that_heads_share_are_one_group(name):
    apply, more, within = TIED[name]
    variables = leaves(**more)
    spec = vfjax.trace(apply, variables, TOKENS).spec
    assert {k: v for k, v in spec.within.items() if k in BOTH} == within, spec
    assert max(change(apply, variables, TOKENS, spec, key) for key in range(3)) < 1e-5
    # It would be a mistake to move them apart, where the leaves allow it.
    groups = {g: [a for a in axes if a.path not in more] for g, axes in spec.groups.items()}
    if {a.path for a in groups["q:heads"]} >= {"q", "k", "v", "out"}:
        wrong = PermutationSpec(groups, spec.sizes, within=BOTH)
        assert change(apply, variables, TOKENS, wrong) > 1e-3


def test_rules_must_say_what_they_keep(monkeypatch):
    """Without that, heads that are mixed would go unnoticed, and the invariance check tells."""
    apply, more, _ = TIED["talking heads with a skip"]
    variables = leaves(**more)

    def silent(rule):
        def apply_rule(step):
            monkeypatch.setattr(step.record, "keep", lambda *args: None)
            return rule(step)

        return apply_rule

    for name, rule in RULES.items():
        monkeypatch.setitem(RULES, name, silent(rule))
    spec = vfjax.trace(apply, variables, TOKENS).spec
    assert {k: v for k, v in spec.within.items() if k in BOTH} == BOTH
    assert change(apply, variables, TOKENS, spec) > 1e-3


def test_grouped_convolutions_have_channels_within_groups():
    def conv(x, kernel, groups=1):
        dims = ("NHC", "HIO", "NHC")
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    def apply(p, x):
        h = jnp.tanh(conv(jnp.tanh(conv(x, p["stem"])), p["grouped"], 3))
        return h.mean(1) @ p["head"]

    shapes = {"stem": (3, WIDTH, 6), "grouped": (3, 2, 12), "head": (12, 2)}
    variables = drawn({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})
    spec = vfjax.trace(apply, variables, TOKENS).spec
    assert spec.within == {"stem:channels": "stem:groups", "grouped": "stem:groups"}
    assert max(change(apply, variables, TOKENS, spec, key) for key in range(3)) < 1e-5


# ------------------------------------------------------------------------------ specs as values

PLACES = {
    "heads": [("a", 1, "out", 1, DIMS), ("b", 0), ("c", 0, "in", 1, DIMS)],
    "dims": [("a", 1, "out", HEADS, 1), ("b", 1), ("c", 0, "in", HEADS, 1)],
    "hidden": [("c", 1, "out"), ("d", 0, "in")],
}
SPEC = PermutationSpec(PLACES, within={"dims": "heads"})
SHAPES = {"a": (WIDTH, HEADS * DIMS), "b": (HEADS, DIMS), "c": (HEADS * DIMS, 6), "d": (6, 2)}


def tree():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def headed(p, x, heads=HEADS):
    h = (x @ p["a"]).reshape(*x.shape[:-1], heads, -1) + p["b"][None, None]
    h = h / jnp.abs(h).sum(-1, keepdims=True)  # told apart by heads
    return jnp.tanh(h.reshape(*x.shape[:-1], -1) @ p["c"]) @ p["d"]


def permutations(seed, alike=False):
    rng = np.random.default_rng(seed)
    dims = np.stack([rng.permutation(DIMS) for _ in range(HEADS)])
    return {"heads": rng.permutation(HEADS), "dims": dims[0] if alike else dims}


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


SEEDS = st.integers(0, 2**16)
LAWS = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)


@LAWS
@hypothesis.given(SEEDS, SEEDS, st.booleans(), st.booleans(), st.booleans())
def test_permuting_within_is_a_group_action(first, second, one, other, only_heads):
    v, p, q = tree(), permutations(first, one), permutations(second, other)
    if only_heads:
        del q["dims"]
    composed = compose(p, q, within=SPEC.within)
    assert same(SPEC.permute(SPEC.permute(v, p), q), SPEC.permute(v, composed))
    undo = invert(p, within=SPEC.within)
    assert same(SPEC.permute(SPEC.permute(v, p), undo), v)
    for each in compose(p, undo, within=SPEC.within).values():
        assert (each == np.arange(each.shape[-1])).all()
    # Three at once, in either order.
    again = permutations(first + second)
    left = compose(composed, again, within=SPEC.within)
    right = compose(p, compose(q, again, within=SPEC.within), within=SPEC.within)
    assert same({k: np.broadcast_to(x, np.shape(right[k])) for k, x in left.items()}, right)


def test_entry_of_a_head():
    """Dim k of head i is what was dim `p[i, k]` of head `q[i]`."""
    v, p = tree(), permutations(1)
    moved = SPEC.permute(v, p)
    for i, k in itertools.product(range(HEADS), range(DIMS)):
        head, dim = p["heads"][i], p["dims"][i, k]
        assert moved["b"][i, k] == v["b"][head, dim]
        np.testing.assert_array_equal(moved["c"][i * DIMS + k], v["c"][head * DIMS + dim])
    assert all(isinstance(leaf, np.ndarray) for leaf in moved.values())
    assert same(jax.jit(SPEC.permute)(v, p), moved)
    alike = SPEC.permute(v, {"dims": p["dims"][0]})
    assert same(alike, SPEC.permute(v, {"dims": np.stack([p["dims"][0]] * HEADS)}))


def test_maps_of_each_head():
    v, p = tree(), permutations(2)
    eye = np.eye(DIMS, dtype=np.float32)
    dims = eye[p["dims"]]
    heads = np.eye(HEADS, dtype=np.float32)[p["heads"]]
    maps = {"heads": (heads, heads.T), "dims": (dims, dims.swapaxes(1, 2))}
    assert same(SPEC.apply(v, maps), SPEC.permute(v, p))
    # In each head another dim is split in two; what reads them takes half of each.
    merge = np.stack([eye[[*range(DIMS), i]] for i in range(HEADS)])
    unmerge = merge.swapaxes(1, 2) / merge.sum(1)[:, :, None]
    grown = SPEC.apply(v, {"dims": (merge, unmerge)})
    assert grown["a"].shape == (WIDTH, HEADS * (DIMS + 1)) and grown["b"].shape == (HEADS, DIMS + 1)

    def run(p, x, heads=HEADS):
        h = (x @ p["a"]).reshape(*x.shape[:-1], heads, -1) + p["b"][None, None]
        return jnp.tanh(jnp.sin(h).reshape(*x.shape[:-1], -1) @ p["c"]) @ p["d"]

    np.testing.assert_allclose(run(grown, TOKENS), run(v, TOKENS), rtol=1e-4, atol=1e-5)
    # A head may be split as well, before: its copy has maps of its own.
    merge_heads = np.eye(HEADS, dtype=np.float32)[[0, 1, 2, 1]]
    halves = merge_heads.T / merge_heads.sum(0)[:, None]
    more = [merge[[0, 1, 2, 0]], unmerge[[0, 1, 2, 0]]]
    both = SPEC.apply(v, {"dims": tuple(more), "heads": (merge_heads, halves)})
    np.testing.assert_allclose(run(both, TOKENS, 4), run(v, TOKENS), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"one map for each of the 4 entries of 'heads'; it .* 3"):
        SPEC.apply(v, {"dims": (merge, unmerge), "heads": (merge_heads, halves)})


def test_specs_with_groups_within_others_are_checked():
    v, p = tree(), permutations(0)
    assert "dims in each of heads" in repr(SPEC).replace(" (4)", "")
    assert SPEC == PermutationSpec(PLACES)
    assert SPEC.validate(v, p) == {"heads": HEADS, "dims": DIMS, "hidden": 6}
    with pytest.raises(ValueError, match="within has the group 'nothing'"):
        PermutationSpec(PLACES, within={"dims": "nothing"})
    with pytest.raises(ValueError, match="inside 'dims', which is inside another group itself"):
        PermutationSpec(PLACES, within={"dims": "heads", "hidden": "dims"})
    alone = {**PLACES, "dims": [*PLACES["dims"], ("e", 0)]}
    with pytest.raises(ValueError, match="at e.0., 'dims' must be inside one place of 'heads'"):
        PermutationSpec(alone, within={"dims": "heads"}).validate({**v, "e": np.ones(DIMS)})
    with pytest.raises(ValueError, match=r"shape \(4,\) or \(3, 4\); it has \(2, 4\)"):
        SPEC.permute(v, {"dims": p["dims"][:2]})
    with pytest.raises(ValueError, match=r"must have shape \(3,\); it has \(1, 3\)"):
        SPEC.permute(v, {"heads": p["heads"][None]})
    with pytest.raises(ValueError, match="each of 0 to 3 must occur exactly once"):
        SPEC.permute(v, {"dims": np.zeros((HEADS, DIMS), int)})
    with pytest.raises(ValueError, match="needs the spec's `within`"):
        invert(p)
    with pytest.raises(ValueError, match="needs the spec's `within`"):
        compose(p, p)


# ------------------------------------------------------------------------------------- matching


class Block(nn.Module):
    """A pre-norm transformer block between an embedding and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name="attention")(y)
        y = nn.gelu(nn.Dense(9, name="up")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dense(8, name="down")(y)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm3")(x).mean(1))


def flax_block():
    model = Block()
    return model.apply, drawn(jax.eval_shape(model.init, KEY, TOKENS))


def fused_block():
    def apply(p, x):
        x = x @ p["embed"]
        y = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        qkv = (y @ p["qkv"] + p["bias"][None, None]).reshape(*x.shape[:2], 3, 2, 3)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
        out = jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(*x.shape[:2], 6)
        x = x + out @ p["out"]
        x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return x.mean(1) @ p["head"]

    shapes = {"embed": (WIDTH, 8), "qkv": (8, 18), "bias": (18,), "out": (6, 8)}
    shapes |= {"up": (8, 9), "down": (9, 8), "head": (8, 3)}
    return apply, drawn({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})


def equinox_block():
    keys = jax.random.split(KEY, 3)
    parts = {
        "embed": eqx.nn.Linear(WIDTH, 8, key=keys[0]),
        "attention": eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=keys[1]),
        "head": eqx.nn.Linear(8, 3, key=keys[2]),
    }
    params, static = eqx.partition(parts, eqx.is_array)

    def one(params, x):
        parts = eqx.combine(params, static)
        x = jax.vmap(parts["embed"])(x)
        x = x + parts["attention"](x, x, x)
        return parts["head"](jnp.tanh(x).mean(0))

    return jax.vmap(one, in_axes=(None, 0)), drawn(params)


BLOCKS = {"flax": flax_block, "fused": fused_block, "equinox": equinox_block}
SIZES = {"flax": [8, 2, 3, 3, 9], "fused": [8, 2, 3, 3, 9], "equinox": [8, 2, 4, 4]}


@pytest.mark.parametrize("name", BLOCKS)
def test_matching_recovers_heads_and_the_dims_of_each(name):
    apply, a = BLOCKS[name]()
    net = vfjax.trace(apply, a, TOKENS)
    spec = net.spec
    assert sorted(spec.sizes.values()) == sorted(SIZES[name]), spec
    assert len(spec.within) == 2 and len(set(spec.within.values())) == 1
    assert max(change(apply, a, TOKENS, spec, key) for key in range(3)) < 1e-5
    drawn = jax.tree.map(np.asarray, spec.random(jax.random.key(3)))
    inner = next(iter(spec.within))
    assert len(np.unique(drawn[inner], axis=0)) == 2  # not alike in both heads
    b = spec.permute(a, drawn)
    wanted = invert(drawn, within=spec.within)

    by_weights = match_weights(net, a, b, key=KEY, restarts=4)
    assert by_weights.converged
    assert same(by_weights.permutations, wanted)
    data = [normal(k, *TOKENS.shape) for k in range(3)]
    by_activations = match_activations(net, a, b, data)
    assert same(by_activations.permutations, wanted)
    assert same(spec.permute(b, by_activations.permutations), a)
    assert (
        by_weights.moved
        == by_activations.moved
        == sum(
            (p != q).sum()
            for p, q in ((np.asarray(x), np.arange(np.shape(x)[-1])) for x in wanted.values())
        )
    )
    # As many taps as there are queries, keys and values.
    assert sorted(tap.group in spec.within for tap in net.joint_taps) == [True] * 3


@pytest.mark.parametrize("seed", range(3))
def test_heads_and_dims_are_assigned_at_their_joint_optimum(seed):
    """Against all permutations of heads and of the dims in each."""
    rng = np.random.default_rng(seed)
    heads, dims = 3, 2
    gain = rng.normal(size=(heads, heads))
    inner = {name: rng.normal(size=(heads, heads, dims, dims)) for name in "qv"}

    def total(outer, within):
        found = sum(gain[i, j] for i, j in enumerate(outer))
        for name, each in within.items():
            found += sum(
                inner[name][i, outer[i], k, each[i][k]] for i in range(heads) for k in range(dims)
            )
        return found

    orders = list(itertools.product(itertools.permutations(range(dims)), repeat=heads))
    best = max(
        total(outer, {"q": q, "v": v})
        for outer in itertools.permutations(range(heads))
        for q in orders
        for v in orders
    )
    # Weights whose inner products are these gains: columns of an identity in the first network.
    flat = {name: each.transpose(0, 2, 1, 3).reshape(6, 6) for name, each in inner.items()}
    a, b = {"g": np.eye(3), "q": np.eye(6), "v": np.eye(6)}, {"g": gain, **flat}
    owner = [("g", 1, "out"), ("q", 1, "out", 1, dims), ("v", 1, "out", 1, dims)]
    groups = {name: [(name, 1, "out", heads, 1)] for name in "qv"}
    spec = PermutationSpec({"heads": owner, **groups}, within=dict.fromkeys("qv", "heads"))
    found = match_weights(spec, a, b, key=KEY)
    assert found.objective[-1] == pytest.approx(best, rel=1e-12)
    moved = spec.permute(b, found.permutations)
    assert sum(np.trace(leaf) for leaf in moved.values()) == pytest.approx(best, rel=1e-12)


def test_weights_of_heads_alone_are_matched_at_the_optimum():
    """With nothing else to match, one assignment of the block is the optimum of all."""
    shapes = {"w": (4, 6), "v": (6, 2)}
    rng = np.random.default_rng(0)
    a, b = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(2))
    groups = {
        "heads": [("w", 1, "out", 1, 3), ("v", 0, "in", 1, 3)],
        "dims": [("w", 1, "out", 2, 1), ("v", 0, "in", 2, 1)],
    }
    spec = PermutationSpec(groups, within={"dims": "heads"})
    found = match_weights(spec, a, b, key=KEY)

    def objective(moved):
        return sum(float(np.vdot(a[k], moved[k])) for k in a)

    orders = list(itertools.permutations(range(3)))
    best = max(
        objective(spec.permute(b, {"heads": np.array(h), "dims": np.array(d)}))
        for h in itertools.permutations(range(2))
        for d in itertools.product(orders, repeat=2)
    )
    assert found.objective[-1] == pytest.approx(best, rel=1e-12)
    assert objective(spec.permute(b, found.permutations)) == pytest.approx(best, rel=1e-12)
    alike = match_weights(PermutationSpec(groups), a, b, key=KEY, restarts=5)
    assert alike.objective[-1] <= found.objective[-1]


def test_moments_of_heads_are_carried():
    apply, a = fused_block()
    net = vfjax.trace(apply, a, TOKENS)
    drawn = jax.tree.map(np.asarray, net.spec.random(jax.random.key(4)))
    b = net.spec.permute(a, drawn)
    joint = [tap.name for tap in net.joint_taps]
    assert stats.resolve_sites(net, "taps")[-3:] == tuple(joint)
    data = [TOKENS]
    measured = [
        stats.moments(net, [tree], data, sites=[*joint, "qkv", "up"], covariance=joint)
        for tree in (a, b)
    ]
    assert measured[0].mean[joint[0]].shape == (1, 6)
    assert measured[0].covariance[joint[0]].shape == (1, 1, 6, 6)
    carried = measured[0].carried([drawn])
    for site in (*joint, "qkv", "up"):
        np.testing.assert_allclose(carried.mean[site], measured[1].mean[site], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(carried.var[site], measured[1].var[site], rtol=1e-4, atol=1e-5)
    for site in joint:
        np.testing.assert_allclose(
            carried.covariance[site], measured[1].covariance[site], rtol=1e-4, atol=1e-5
        )
    pooled = stats.moments(net, [a], data, sites="taps")
    with pytest.raises(ValueError, match="are pooled over these"):
        pooled.carried([drawn])
    with pytest.raises(ValueError, match='no covariance between models 0 and 1 at the tap "qkv'):
        align.match_moments(net, stats.moments(net, [a, b], data, sites=["up"]))


def test_carried_matrices_of_several_segments():
    """A segment that grows moves those behind it."""

    def apply(p, x):
        h = jnp.tanh(x @ p["w"])
        return h[..., :5] @ p["a"] + h[..., 5:] @ p["b"]

    shapes = {"w": (WIDTH, 9), "a": (5, 2), "b": (4, 2)}
    v = drawn({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})
    net = vfjax.trace(apply, v, TOKENS)
    assert sorted(net.spec.sizes.values()) == [4, 5]
    found = stats.moments(net, [v], [TOKENS], sites=["w"], covariance=["w"])
    rng = np.random.default_rng(0)
    maps = {g: rng.normal(size=(n + 2, n)).astype(np.float32) for g, n in net.spec.sizes.items()}
    carried = found.carried([maps])
    by_size = {m.shape[1]: m for m in maps.values()}
    whole = np.zeros((13, 9), np.float32)
    whole[:7, :5], whole[7:, 5:] = by_size[5], by_size[4]
    np.testing.assert_allclose(carried.mean["w"][0], whole @ found.mean["w"][0], rtol=1e-4)
    wanted = whole @ found.covariance["w"][0, 0] @ whole.T
    np.testing.assert_allclose(carried.covariance["w"][0, 0], wanted, rtol=1e-3, atol=1e-5)
