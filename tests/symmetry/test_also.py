"""Leaves that a network does not read follow those that it reads, by the caller's word alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import traced
from vfjax import align
from vfjax.symmetry import PermutationSpec

N = 5
READ = {"w": (3, N), "b": (N,), "v": (2 * N, 2)}
SHAPES = {
    "params": READ,
    "opt": {"mu": READ, "nu": READ},
    "head": {"kernel": (N, 4), "bias": (4,)},
    "decay": (),
    "classes": (7,),
}


def mlp(p, x):
    h = jax.nn.relu(x @ p["params"]["w"] + p["params"]["b"][None])
    return jnp.concatenate([h, -h], 1) @ p["params"]["v"]


def tree_of(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda node: type(node) is tuple)


NET = traced(mlp, SHAPES, (4, 3))
(GROUP,) = NET.spec.groups
ORDER = {GROUP: np.array([3, 0, 4, 1, 2])}
MOMENTS = {"opt/mu": "params", "opt/nu": "params"}


def test_moments_of_an_optimiser_move_as_their_parameters_do():
    tree = tree_of()
    tree["opt"]["mu"] = jax.tree.map(lambda a: 2 * a, tree["params"])
    new = NET.spec.permute(tree, ORDER, also=MOMENTS | {"head/kernel": {0: GROUP}})
    assert not (new["params"]["v"] == tree["params"]["v"]).all()
    for name, leaf in new["params"].items():
        np.testing.assert_array_equal(new["opt"]["mu"][name], 2 * leaf)
        assert (leaf == NET.spec.permute(tree, ORDER, also={})["params"][name]).all()
    np.testing.assert_array_equal(new["head"]["kernel"], tree["head"]["kernel"][ORDER[GROUP]])
    for name in ("decay", "classes"):
        np.testing.assert_array_equal(new[name], tree[name])
    back = {GROUP: np.argsort(ORDER[GROUP])}
    again = NET.spec.permute(new, back, also=MOMENTS | {"head/kernel": {0: GROUP}})
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_what_could_follow_is_named_and_nothing_else():
    tree = tree_of()
    with pytest.warns(UserWarning) as warned:
        left = NET.spec.permute(tree, ORDER)
    said = str(warned[0].message)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert "head/kernel" in said and "'classes'" not in said and "params/" not in said
    np.testing.assert_array_equal(left["opt"]["mu"]["b"], tree["opt"]["mu"]["b"])
    # Silent where nothing moves, nothing could follow, or the caller says so.
    NET.spec.permute(tree, {GROUP: np.arange(N)})
    NET.spec.permute(tree, {})
    NET.spec.permute(tree, ORDER, also={})
    keys = {"params": tree["params"], "key": np.zeros(N, np.uint32), "count": np.int32(3)}
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), keys)
    vfjax.trace(mlp, like, jax.ShapeDtypeStruct((4, 3), np.float32)).spec.permute(keys, ORDER)


def test_maps_and_jit_take_it_too():
    tree = tree_of()
    maps = align.Maps.of_permutations([None, ORDER])
    expected = NET.spec.permute(tree, ORDER, also=MOMENTS)
    found = maps.apply(NET, [tree, tree], also=MOMENTS)
    jax.tree.map(np.testing.assert_array_equal, found, [tree, expected])
    jitted = jax.jit(lambda t, p: NET.spec.permute(t, p, also=MOMENTS))(tree, ORDER)
    jax.tree.map(np.testing.assert_array_equal, jitted, expected)
    with pytest.warns(UserWarning, match="opt/mu"):
        maps.apply(NET, [tree, tree])
    pair = np.eye(N, dtype=np.float32)[ORDER[GROUP]]
    mixed = NET.spec.apply(tree, {GROUP: (pair, pair.T)}, also=MOMENTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mixed, expected)


def test_by_hand_and_inside_windows():
    spec = PermutationSpec({"h": [("w", 0, "out", 1, 1, ((1, 2, 3, 1),))]})
    tree = {"w": np.arange(5), "ema": {"w": np.arange(5)}}
    new = spec.permute(tree, {"h": [2, 0, 1]}, also={"ema/w": "w"})
    assert new["ema"]["w"].tolist() == new["w"].tolist() == [0, 1, 4, 2, 3]


@pytest.mark.parametrize(
    ("also", "error", "message"),
    [
        ({"hidden": "average"}, ValueError, r"'hidden'.* fits no leaf.*Not read are"),
        ({"params": "opt/mu"}, ValueError, "fits no leaf"),
        ({"head/kernel": "params/w"}, ValueError, r"\(5, 4\) and cannot follow .*\(3, 5\)"),
        ({"head/kernel": {0: "h"}}, ValueError, "no group 'h'"),
        ({"head/kernel": {1: GROUP}}, ValueError, "has 4 entries"),
        ({"head": {0: GROUP}}, ValueError, "'head' is no leaf"),
        ({"params/w": {1: GROUP}}, ValueError, "is read by the network"),
        (["head/kernel"], TypeError, "also must be a mapping"),
    ],
)
def test_what_fits_nothing_is_an_error(also, error, message):
    with pytest.raises(error, match=message):
        NET.spec.permute(tree_of(), ORDER, also=also)
