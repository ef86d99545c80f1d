"""Stacks: every entry of a stacked leaf has its own order of units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from helpers import assert_close, change, infer, lively, traced
from vfjax.symmetry import Axis, PermutationSpec, check_spec, compose, invert

D, N = 4, 6


def scanned(p, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w[0] + w[1][None]) @ w[2], None

    stack = tuple(p[name] for name in ("w1", "b1", "w2"))
    return lax.scan(layer, jnp.sin(x @ p["stem"]), stack)[0] @ p["head"]


def looped(p, x):
    """The same network as a Python loop."""
    h = jnp.sin(x @ p["stem"])
    for k in range(3):
        h = h + jnp.tanh(h @ p["w1"][k] + p["b1"][k][None]) @ p["w2"][k]
    return h @ p["head"]


def prepared(p, x):
    """The same network with its leaves cast, masked and transposed before they are taken apart."""
    mask = jnp.ones((3, 1, N)) / 2
    w1 = (p["w1"].astype(jnp.float32) * mask * 2).transpose(0, 2, 1)
    w1, b1 = jnp.split(w1, 3), p["b1"][:, None]
    h = jnp.sin(x @ p["stem"])
    for k in range(3):
        h = h + jnp.tanh(h @ w1[k][0].T + b1[k]) @ p["w2"][k]
    return h @ p["head"]


def mapped(p, x):
    """Towers that a loop over layers computes one by one, and that are then averaged."""
    h = jnp.sin(x @ p["stem"])
    towers = lax.map(lambda w: jnp.tanh(h @ w[0] + w[1][None]) @ w[2], (p["w1"], p["b1"], p["w2"]))
    return towers.mean(0) @ p["head"]


def vmapped(p, x):
    """Whole networks side by side, whose outputs are kept apart."""
    h = jnp.sin(x @ p["stem"])

    def one(w1, b1, w2):
        return jax.nn.softmax(jax.nn.gelu(h @ w1 + b1[None]) @ w2)

    return jax.vmap(one)(p["w1"], p["b1"], p["w2"]).transpose(1, 0, 2) @ p["head"]


def experts(p, x):
    """The two best of several experts, all of which are computed."""
    h = jnp.sin(x @ p["stem"])
    gate, chosen = lax.top_k(jax.nn.softmax(h @ p["router"]), 2)
    weight = (jax.nn.one_hot(chosen, 3) * gate[..., None]).sum(1)
    hidden = jax.nn.silu(jnp.einsum("bd,edn->ben", h, p["w1"]) + p["b1"][None])
    return (h + jnp.einsum("ben,end,be->bd", hidden, p["w2"], weight)) @ p["head"]


def dispatched(p, x):
    """Experts that see only what was sent to them, in the style of Switch."""
    h = jnp.sin(x @ p["stem"])
    sent = jax.nn.one_hot(jnp.argmax(h @ p["router"], -1), 3)
    place = jax.nn.one_hot(jnp.cumsum(sent, 0).max(-1).astype(int) - 1, 8)
    dispatch = sent[:, :, None] * place[:, None, :]
    inside = jnp.einsum("bec,bd->ecd", dispatch, h)
    hidden = jnp.tanh(inside @ p["w1"] + p["b1"][:, None])
    return jnp.einsum("bec,ecd->bd", dispatch, hidden @ p["w2"]) @ p["head"]


ONE = {"stem": (5, D), "w1": (3, D, N), "b1": (3, N), "w2": (3, N, D), "head": (D, 2)}
STACKS = {
    scanned: ONE,
    looped: ONE,
    prepared: ONE,
    mapped: ONE,
    vmapped: ONE,
    experts: {**ONE, "router": (D, 3)},
    dispatched: {**ONE, "router": (D, 3)},
}


def reordered(tree, seed):
    """The tree with the units of every entry in an order of their own, by NumPy; and the orders."""
    rng = np.random.default_rng(seed)
    tree = {name: np.array(leaf) for name, leaf in tree.items()}
    orders = [rng.permutation(N) for _ in range(len(tree["w1"]))]
    for k, order in enumerate(orders):
        tree["w1"][k] = tree["w1"][k][:, order]
        tree["b1"][k] = tree["b1"][k][order]
        tree["w2"][k] = tree["w2"][k][order]
    return tree, orders


@pytest.mark.parametrize("fn", STACKS, ids=lambda fn: fn.__name__)
def test_every_entry_of_a_stack_has_its_own_order(fn):
    net, tree = traced(fn, STACKS[fn], (8, 5)), lively(STACKS[fn], 0)
    x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    own = {f"w1[{k}]": k for k in range(3)}
    assert own.keys() == net.spec.groups.keys() - {"stem", "w2"}
    moved, orders = reordered(tree, 2)
    out = net.run(tree, x)
    assert_close(net.run(moved, x), out, 1e-5)
    permuted = net.spec.permute(tree, {name: orders[k] for name, k in own.items()})
    for name, leaf in moved.items():
        np.testing.assert_array_equal(permuted[name], leaf)
    assert check_spec(net, tree, x) < 1e-5 * np.abs(out).max()


def test_a_stack_has_the_groups_of_its_layers_written_out():
    def apart(p, x):
        h = jnp.sin(x @ p["stem"])
        for k in range(3):
            h = h + jnp.tanh(h @ p[f"w1{k}"] + p[f"b1{k}"][None]) @ p[f"w2{k}"]
        return h @ p["head"]

    shapes = {"stem": (5, D), "head": (D, 2)}
    for k in range(3):
        shapes |= {f"w1{k}": (D, N), f"b1{k}": (N,), f"w2{k}": (N, D)}
    written = {
        frozenset((a.path, a.axis, a.role) for a in axes)
        for axes in traced(apart, shapes, (8, 5)).spec.groups.values()
    }
    found = set()
    for axes in traced(scanned, ONE, (8, 5)).spec.groups.values():
        places = set()
        for a in axes:
            stacked = a.path in ("w1", "b1", "w2")
            entries = [k for _, k in a.entries] or (range(3) if stacked else [""])
            places |= {(f"{a.path}{k}", a.axis - stacked, a.role) for k in entries}
        found.add(frozenset(places))
    assert found == written


def test_a_chain_of_layers_has_a_group_between_each_two():
    def chain(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["w"])[0] @ p["b"]

    shapes = {"a": (5, N), "w": (3, N, N), "b": (N, 2)}
    net, tree = traced(chain, shapes, (8, 5)), lively(shapes, 0)
    assert list(net.spec.sizes.values()) == [N] * 4
    assert set(net.spec.groups["w[0]"]) == {
        Axis("w", 2, "out", entries=((0, 0),)),
        Axis("w", 1, "in", entries=((0, 1),)),
    }
    assert check_spec(net, tree, np.ones((8, 5), np.float32)) < 1e-6


def test_more_layers_than_are_unrolled_have_their_own_orders_too():
    shapes = {**ONE, "w1": (66, D, N), "b1": (66, N), "w2": (66, N, D)}
    net, tree = traced(scanned, shapes, (8, 5)), lively(shapes, 0)
    tree["w2"] = tree["w2"] / 16
    x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    assert len(net.layers) == 2 and len(net.spec.groups) == 67
    moved, orders = reordered(tree, 2)
    assert_close(net.run(moved, x), net.run(tree, x), 1e-5)
    back = net.spec.permute(moved, {f"w1[{k}]": np.argsort(p) for k, p in enumerate(orders)})
    for name, leaf in tree.items():
        np.testing.assert_array_equal(back[name], leaf)


def test_experts_inside_a_scan_over_layers():
    """Stacks of stacks: [layers, experts, ...]."""

    def apply(p, x):
        def layer(h, w):
            gate = (h @ w[0] > 0).astype(h.dtype)
            hidden = jnp.tanh(jnp.einsum("bd,edn->ben", h, w[1]))
            return h + jnp.einsum("ben,end,be->bd", hidden, w[2], jnp.cumsum(gate, 1)), None

        return lax.scan(layer, jnp.sin(x @ p["stem"]), (p["g"], p["w1"], p["w2"]))[0] @ p["head"]

    shapes = {"stem": (5, D), "g": (2, D, 3), "w1": (2, 3, D, N), "w2": (2, 3, N, D)}
    shapes["head"] = D, 2
    net, tree = traced(apply, shapes, (8, 5)), lively(shapes, 0)
    x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    own = [f"w1[{k}][{e}]" for k in range(2) for e in range(3)]
    assert set(own) <= net.spec.groups.keys() and len(net.spec.groups) == 7
    moved = {name: np.array(leaf) for name, leaf in tree.items()}
    orders = np.random.default_rng(2).permuted(np.tile(np.arange(N), (2, 3, 1)), axis=-1)
    moved["w1"] = np.take_along_axis(moved["w1"], orders[:, :, None], axis=3)
    moved["w2"] = np.take_along_axis(moved["w2"], orders[..., None], axis=2)
    assert_close(net.run(moved, x), net.run(tree, x), 1e-5)
    back = net.spec.permute(tree, dict(zip(own, orders.reshape(6, N), strict=True)))
    np.testing.assert_array_equal(back["w1"], moved["w1"])
    np.testing.assert_array_equal(back["w2"], moved["w2"])


def test_what_treats_entries_alike_ties_them():
    """A running sum over the entries mixes their units, so that all have one order."""

    def apply(p, x):
        h = jnp.einsum("bd,edn->ben", x, p["w"])
        return jnp.einsum("ben,nk->bek", jnp.cumsum(jnp.tanh(h), axis=1), p["v"])

    shapes = {"w": (3, 5, N), "v": (N, 2)}
    net, tree = traced(apply, shapes, (8, 5)), lively(shapes, 0)
    assert net.spec.groups["w"] == (Axis("v", 0, "in"), Axis("w", 2, "out"))
    x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    assert check_spec(net, tree, x) < 1e-5


def test_free_entries_move_as_a_group_of_their_own():
    """Experts that are summed can be reordered; the units of each move with its expert."""

    def apply(p, x):
        return jnp.einsum("ben,enk->bk", jnp.tanh(jnp.einsum("bd,edn->ben", x, p["w"])), p["v"])

    net = traced(apply, {"w": (3, 5, N), "v": (3, N, 2)}, (8, 5))
    assert not any(a.entries for axes in net.spec.groups.values() for a in axes)
    assert sorted(net.spec.sizes.values()) == [3, N] and len(net.spec.within) == 1


def test_a_row_that_is_read_alone():
    """Entries that nothing reads alone follow the first that something does."""

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"][1]) @ p["w"][3]) @ p["v"]

    shapes = {"w": (4, N, N), "v": (N, 2)}
    net = traced(apply, shapes, (8, N))
    of = {g: {str(a) for a in axes} for g, axes in net.spec.groups.items()}
    assert of == {
        "w[1]": {"w[0=0][2] out", "w[0=1][2] out", "w[0=2][2] out", "w[0=3][1] in"},
        "w[3]": {"w[0=3][2] out", "v[0] in"},
    }
    x = np.random.default_rng(1).normal(size=(8, N)).astype(np.float32)
    assert check_spec(net, lively(shapes, 0), x) < 1e-5


def test_layers_that_are_taken_apart_inside_a_loop():
    """Two recurrent layers in one leaf, which a loop over time reads entry by entry."""

    def apply(p, x):
        def step(states, x):
            new = []
            for k, h in enumerate(states):
                new.append(jnp.tanh(x @ p["wx"][k] + h @ p["wh"][k]))
                x = x + new[-1] @ p["wo"][k]
            return tuple(new), x

        start = jnp.zeros((x.shape[0], N)), jnp.zeros((x.shape[0], N))
        return lax.scan(step, start, x.swapaxes(0, 1))[1].mean(0) @ p["head"]

    shapes = {"wx": (2, D, N), "wh": (2, N, N), "wo": (2, N, D), "head": (D, 2)}
    tree, x = lively(shapes, 0), np.ones((3, 5, D), np.float32)
    spec = infer(apply, tree, x)
    assert spec.sizes == {"wx[0]": N, "wx[1]": N}
    assert change(apply, tree, x, spec) < 1e-5


DEEP = {"w1": (66, D, N), "w2": (66, N, D), "g": (66, N), "v": (66, N, 2), "head": (D, 2)}


def emitting(p, x):
    def layer(h, w):
        inside = jnp.tanh(h @ w[0])
        return h + inside @ w[1] / 16, inside

    h, inside = lax.scan(layer, x, (p["w1"], p["w2"]))
    return h @ p["head"] + jnp.einsum("lbn,lnk->bk", inside * p["g"][:, None], p["v"])


def carrying(p, x):
    def layer(state, w):
        h, before = state
        inside = jnp.tanh(h @ w[0] + before / 8)
        return (h + inside @ w[1] / 16, inside), None

    start = x, jnp.zeros((x.shape[0], N))
    return lax.scan(layer, start, (p["w1"], p["w2"]))[0][0] @ p["head"]


@pytest.mark.parametrize(("fn", "groups"), [(emitting, 66), (carrying, 1)])
def test_what_a_scan_hands_on_from_layer_to_layer_is_shared_by_them(fn, groups):
    """What it emits for each layer is not."""
    tree, x = lively(DEEP, 0), np.ones((3, D), np.float32)
    spec = infer(fn, tree, x)
    assert sum(name.startswith("w1") for name in spec.groups) == groups
    assert change(fn, tree, x, spec) < 1e-5


# --------------------------------------------------------------------------------- specs and values


STACKED = PermutationSpec(
    {
        "a": [("w", 2, "out", 1, 1, (), ((0, 0),)), ("v", 1, "in", 1, 1, (), ((0, 0),))],
        "b": [("w", 2, "out", 1, 1, (), ((0, 1),)), ("v", 1, "in", 1, 1, (), ((0, 1),))],
        "d": [("w", 1, "in")],
    }
)


def test_a_spec_of_stacks_written_by_hand():
    rng = np.random.default_rng(0)
    tree = {"w": rng.normal(size=(2, 4, 3)), "v": rng.normal(size=(2, 3, 5))}
    assert STACKED.validate(tree) == {"a": 3, "b": 3, "d": 4}
    p = {"a": np.array([2, 0, 1]), "b": np.array([1, 0, 2]), "d": np.array([3, 1, 0, 2])}
    once = STACKED.permute(tree, p)
    np.testing.assert_array_equal(once["w"][0], tree["w"][0][p["d"]][:, p["a"]])
    np.testing.assert_array_equal(once["v"][1], tree["v"][1][p["b"]])
    for name, leaf in STACKED.permute(once, invert(p)).items():
        np.testing.assert_array_equal(leaf, tree[name])
    twice = STACKED.permute(once, p)
    for name, leaf in STACKED.permute(tree, compose(p, p)).items():
        np.testing.assert_array_equal(leaf, twice[name])
    in_jax = jax.jit(STACKED.permute)(jax.tree.map(jnp.asarray, tree), p)
    assert_close(in_jax["w"], once["w"], 1e-6)
    assert "w[0=1][2] out" in repr(STACKED)


def test_matrices_map_the_entries_of_a_stack():
    rng = np.random.default_rng(0)
    tree = {
        "w": np.float32(rng.normal(size=(2, 4, 3))),
        "v": np.float32(rng.normal(size=(2, 3, 5))),
    }
    maps = {g: (rng.normal(size=(2, 3)), rng.normal(size=(3, 2))) for g in "ab"}
    new = STACKED.apply(tree, maps)
    for k, g in enumerate("ab"):
        assert_close(new["w"][k], tree["w"][k] @ maps[g][0].T, 1e-5)
        assert_close(new["v"][k], maps[g][1].T @ tree["v"][k], 1e-5)
    with pytest.raises(ValueError, match="entries of the stack 'w' would have different shapes"):
        STACKED.apply(tree, {"a": maps["a"]})


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        (((2, 0),), "not along the axis 2 itself"),
        (((0, -1),), "counted from 0"),
        (((0, 0), (0, 1)), "each along another dimension"),
    ],
)
def test_entries_that_cannot_be(entries, match):
    with pytest.raises(ValueError, match=match):
        PermutationSpec({"a": [("w", 2, "out", 1, 1, (), entries)]})


def test_entries_that_do_not_fit_the_tree():
    with pytest.raises(ValueError, match="'w' has no entry 1 along dimension 0"):
        STACKED.validate({"w": np.ones((1, 4, 3)), "v": np.ones((1, 3, 5))})
    spec = PermutationSpec({"a": [("w", 1)], "b": [("w", 1, "out", 1, 1, (), ((0, 1),))]})
    with pytest.raises(ValueError, match="overlap on axis 1 of 'w'"):
        spec.validate({"w": np.ones((2, 3))})


def test_values_of_stacks_are_mapped_entry_by_entry():
    """The crossing of a cut behind experts shows the units of each in an order of its own."""
    net, tree = traced(experts, STACKS[experts], (8, 5)), lively(STACKS[experts], 0)
    x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    moved, orders = reordered(tree, 2)
    maps = {f"w1[{k}]": order for k, order in enumerate(orders)}
    site, after = (net.run(of, x, capture=["w1:act"])[1] for of in (tree, moved))
    assert_close(net.map_site(tree, x, "w1:act", site["w1:act"], maps), after["w1:act"], 1e-5)
    crossing = net.map_crossing(tree, net.run(tree, x, stop=2), maps)
    assert_close(net.run(moved, crossing, start=2), net.run(tree, x), 1e-5)
