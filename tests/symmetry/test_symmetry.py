"""Permutation specs as values, and the group laws of applying them."""

from __future__ import annotations

import pickle
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vfjax.symmetry import Axis, PermutationSpec, check_spec, compose, invert

GROUPS = {
    "hidden": [("a/kernel", 1, "out"), ("a/bias", 0), ("b/kernel", 0, "in", 2, 1)],
    "heads": [("b/kernel", 1, "out", 1, 4), ("c/kernel", 0, "in")],
    "dims": [("b/kernel", 1, "out", 3, 1), ("c/kernel", 1, "in")],
}
SPEC = PermutationSpec(GROUPS)
SIZES = {"hidden": 5, "heads": 3, "dims": 4}


def tree(dtype=np.float32):
    """A dense layer, one after a flattened map of two positions that writes heads, and a third."""
    shapes = {"a/kernel": (3, 5), "a/bias": (5,), "b/kernel": (10, 12), "c/kernel": (3, 4, 2)}
    rng = np.random.default_rng(0)
    variables = {"step": np.int32(7)}
    for path, shape in shapes.items():
        layer, leaf = path.split("/")
        variables.setdefault(layer, {})[leaf] = rng.normal(size=shape).astype(dtype)
    return variables


def network(p, x):
    h = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"][None, None])  # [examples, positions, 5]
    h = jnp.sin(h.reshape(len(x), -1) @ p["b"]["kernel"]).reshape(-1, 3, 4)
    return jnp.einsum("bhd,hdo->bo", h, p["c"]["kernel"])


X = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)


def permutations(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.permutation(n) for name, n in SIZES.items()}


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(p, q) and p.dtype == q.dtype for p, q in leaves)


SEEDS = st.integers(0, 2**16)
LAWS = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)


@LAWS
@hypothesis.given(SEEDS, SEEDS)
def test_permuting_is_a_group_action(first, second):
    p, q = permutations(first), permutations(second)
    v = tree()
    assert same(SPEC.permute(SPEC.permute(v, p), q), SPEC.permute(v, compose(p, q)))
    assert same(SPEC.permute(SPEC.permute(v, p), invert(p)), v)
    assert all(np.array_equal(c, np.arange(len(c))) for c in compose(p, invert(p)).values())
    assert compose(p, {}) == p


def test_new_axis_is_take_of_the_old():
    v, p = tree(), np.array([3, 1, 4, 0, 2])
    moved = SPEC.permute(v, {"hidden": p})
    np.testing.assert_array_equal(moved["a"]["kernel"], v["a"]["kernel"][:, p])
    # Positions are outer: each is permuted in itself.
    rows = v["b"]["kernel"].reshape(2, 5, 12)[:, p].reshape(10, 12)
    np.testing.assert_array_equal(moved["b"]["kernel"], rows)
    assert moved["step"] == 7
    assert same(SPEC.permute(v, {}), v)


def test_the_function_is_invariant():
    net = types.SimpleNamespace(spec=SPEC, run=network)
    size = float(jnp.abs(network(tree(), X)).max())
    for seed in range(3):
        assert check_spec(net, tree(), X, key=jax.random.key(seed)) < 1e-5 * size


def test_check_spec_sees_a_wrong_spec():
    wrong = PermutationSpec({"h": [("a/kernel", 1, "out"), ("a/bias", 0)]})
    net = types.SimpleNamespace(spec=wrong, run=network)
    assert check_spec(net, tree(), X) > 0.1
    masked = types.SimpleNamespace(spec=wrong, run=lambda p, x: jnp.array([-jnp.inf, 1.0]))
    assert check_spec(masked, tree(), X) == 0
    broken = tree()
    broken["a"]["bias"][0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite value at 'a/bias'"):
        check_spec(net, broken, X)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8"])
def test_permute_keeps_dtypes_and_numpy(dtype):
    v = tree(jnp.dtype(dtype))
    moved = SPEC.permute(v, permutations(0))
    assert isinstance(moved["a"]["kernel"], np.ndarray)
    assert moved["a"]["kernel"].dtype == dtype
    if dtype != "float64":  # which JAX arrays cannot hold by default
        device = jax.tree.map(jnp.asarray, v)
        moved_too = SPEC.permute(device, jax.tree.map(jnp.asarray, permutations(0)))
        assert same(jax.tree.map(np.asarray, moved_too), moved)


def test_permute_under_jit_and_vmap():
    v, p = jax.tree.map(jnp.asarray, tree()), permutations(0)
    assert same(jax.jit(SPEC.permute)(v, p), SPEC.permute(v, p))
    many = [permutations(k) for k in range(3)]
    stacked = jax.tree.map(lambda *ps: jnp.stack(ps), *many)
    batched = jax.vmap(SPEC.permute, in_axes=(None, 0))(v, stacked)
    for k, each in enumerate(many):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], batched)
        assert same(one, SPEC.permute(v, each))


def test_absent_leaves_are_passed_over():
    v, p = tree(), permutations(0)
    whole = SPEC.permute(v, p)
    partial = {**v, "a": None, "c": {"kernel": None}}
    assert SPEC.validate(partial) == SIZES
    moved = SPEC.permute(partial, p)
    assert moved["a"] is None and moved["c"] == {"kernel": None}
    np.testing.assert_array_equal(moved["b"]["kernel"], whole["b"]["kernel"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_permute_sharded_leaves(kind):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    spec = PermutationSpec({"h": [("w", 1, "out"), ("b", 0), ("v", 0, "in")]})
    v = {
        "w": np.ones((3, 1)) * np.arange(4),
        "b": np.arange(4.0),
        "v": np.arange(8.0).reshape(4, 2),
    }
    v = jax.tree.map(lambda leaf: leaf.astype(np.float32), v)
    layout = {"w": (None, "model"), "b": ("model",), "v": ("model", None)}
    sharded = {
        k: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*layout[k])))
        for k, leaf in v.items()
    }
    p = {"h": np.array([2, 0, 3, 1])}
    with jax.set_mesh(mesh):
        moved = spec.permute(sharded, p)
    assert same(jax.tree.map(np.asarray, moved), spec.permute(v, p))
    if kind == AxisType.Explicit:
        assert moved["w"].sharding.is_equivalent_to(sharded["w"].sharding, 2)


def matrices(p):
    merge = np.eye(len(p), dtype=np.float32)[p]
    return merge, merge.T


@LAWS
@hypothesis.given(SEEDS)
def test_a_permutation_is_a_special_map(seed):
    p, v = permutations(seed), tree()
    mapped = SPEC.apply(v, {name: matrices(each) for name, each in p.items()})
    assert same(jax.tree.map(np.asarray, mapped), SPEC.permute(v, p))


def test_maps_merge_and_unmerge():
    """Duplicating a feature and reading the mean of its copies is the identity."""
    v = tree()
    merge = np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 4]]
    unmerge = merge.T / merge.sum(0)[:, None]
    mapped = SPEC.apply(v, {"hidden": (merge, unmerge)})
    assert mapped["a"]["kernel"].shape == (3, 6) and mapped["b"]["kernel"].shape == (12, 12)
    assert jnp.allclose(network(mapped, X), network(v, X), atol=1e-5)
    assert SPEC.validate(mapped)["hidden"] == 6
    half = SPEC.apply(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree()), {})
    assert half["a"]["bias"].dtype == jnp.bfloat16


def test_random_is_reproducible_and_needs_sizes():
    with pytest.raises(ValueError, match="does not know the sizes of 'hidden', 'heads', 'dims'"):
        SPEC.random(jax.random.key(0))
    one, two = (SPEC.random(jax.random.key(k), tree()) for k in (0, 0))
    assert same(one, two)
    assert {name: len(p) for name, p in one.items()} == SIZES
    SPEC.validate(tree(), one)


def test_equality_is_that_of_the_partition():
    renamed = {"x": GROUPS["dims"], "y": GROUPS["hidden"][::-1], "z": GROUPS["heads"], "empty": []}
    other = PermutationSpec(renamed, SIZES | {"x": 4}, [("c/kernel", 2, "output", "here:1")])
    assert other == SPEC and hash(other) == hash(SPEC)
    assert len({SPEC, other}) == 1
    changed = {**GROUPS, "dims": [*GROUPS["dims"][:1], ("c/kernel", 1, "out")]}
    assert PermutationSpec(changed) != SPEC
    merged = {"all": [place for axes in GROUPS.values() for place in axes]}
    assert PermutationSpec(merged) != SPEC
    assert SPEC != GROUPS
    assert pickle.loads(pickle.dumps(other)) == SPEC


def test_repr_is_readable():
    spec = PermutationSpec(GROUPS, SIZES, [("c/kernel", 2, "output", "here:1")])
    assert repr(spec).splitlines() == [
        "PermutationSpec(3 groups)",
        "  hidden (5): a/kernel[1] out, a/bias[0], b/kernel[0](2,n,1) in",
        "  heads (3): b/kernel[1](1,n,4) out, c/kernel[0] in",
        "  dims (4): b/kernel[1](3,n,1) out, c/kernel[1] in",
        "  fixed axes: 1 by output",
    ]
    assert isinstance(spec.groups["heads"][0], Axis)


def edit(**changes):
    groups = {**GROUPS, **changes}
    return lambda: PermutationSpec(groups).validate(tree())


def given(**given):
    return lambda: SPEC.permute(tree(), given)


def mapped(**maps):
    return lambda: SPEC.apply(tree(), maps)


EYE = np.eye(5, dtype=np.float32)
ERRORS = {
    "no tuple": (edit(x=["a/kernel"]), TypeError, "a place is"),
    "no axis": (edit(x=[("a/kernel",)]), TypeError, "a place is"),
    "axis no number": (edit(x=[("a/kernel", "out")]), TypeError, "a place is"),
    "role": (edit(x=[("a/kernel", 0, "output")]), ValueError, "role 'output' of 'a/kernel' must"),
    "negative axis": (edit(x=[("a/kernel", -2)]), ValueError, "counted from 0"),
    "twice": (edit(x=[("a/bias", 0, "out")]), ValueError, "'a/bias' is listed twice, in 'hidden'"),
    "path": (edit(x=[("a/kernle", 0)]), ValueError, "no leaf 'a/kernle'.*it has .*'a/kernel'"),
    "range": (edit(x=[("a/bias", 1)]), ValueError, r"axis 1 of 'a/bias' is out of range.*\(5,\)"),
    "block": (edit(x=[("c/kernel", 2, "out", 3)]), ValueError, r"cannot be viewed as \(3, n, 1\)"),
    "sizes": (edit(x=[("a/kernel", 0), ("c/kernel", 2)]), ValueError, "has 2 entries.*but 3"),
    "overlap": (edit(x=[("b/kernel", 1, "in", 2, 1)]), ValueError, "overlap on axis 1 of 'b/"),
    "group": (given(other=[0]), ValueError, "the group 'other'.*it has 'hidden'"),
    "length": (given(heads=[0, 1]), ValueError, r"must have shape \(3,\); it has \(2,\)"),
    "rank": (given(heads=[[0, 1, 2]]), ValueError, r"must have shape \(3,\)"),
    "floats": (given(heads=[0.0, 1.0, 2.0]), TypeError, "must hold integers; it holds float"),
    "repeated": (given(heads=[0, 1, 1]), ValueError, "is not a permutation: each of 0 to 2"),
    "negative": (given(heads=[0, 1, -1]), ValueError, "is not a permutation"),
    "map of a group": (mapped(other=(EYE, EYE)), ValueError, "maps has the group 'other'"),
    "no pair": (mapped(hidden=EYE), TypeError, "a pair of matrices"),
    "map's shape": (mapped(hidden=(EYE[:, :4], EYE[:4])), ValueError, r"M \[m, 5\] and U \[5, m\]"),
    "unmerge": (mapped(hidden=(EYE[:3], EYE[:3])), ValueError, r"\(3, 5\) and \(3, 5\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_wrong(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: invert({"h": [0, 0, 1]}), ValueError, r"permutations\['h'\] is not a permutation"),
        (lambda: invert({"h": [0.0, 1.0]}), TypeError, "must hold integers"),
        (lambda: compose({"h": [1, 0]}, {"h": [0, 2, 1]}), ValueError, r"must have shape \(2,\)"),
        (lambda: compose({}, {"h": [1, 1]}), ValueError, "is not a permutation"),
    ],
)
def test_only_permutations_are_inverted_and_composed(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_integers_cannot_be_mapped():
    with pytest.raises(TypeError, match="int8 at 'a/kernel'"):
        SPEC.apply(tree(np.int8), {"hidden": (EYE, EYE)})


def test_a_known_size_is_checked():
    spec = PermutationSpec(GROUPS, {"hidden": 6})
    with pytest.raises(ValueError, match="group 'hidden' has 5 entries.*but 6"):
        spec.validate(tree())


def test_check_spec_of_infinite_parameters():
    """Infinite before and after is no sign of a symmetry."""
    spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
    net = types.SimpleNamespace(spec=spec, run=lambda p, x: x @ p["w"] @ p["v"])
    tree = {"w": np.full((3, 3), np.inf, np.float32), "v": np.ones((3, 2), np.float32)}
    with pytest.raises(ValueError, match="variables holds 9 NaN or infinite values at 'w'"):
        check_spec(net, tree, np.ones((1, 3), np.float32))


@pytest.mark.parametrize("net", [{"h": [("w", 1, "out")]}, SPEC, network])
def test_check_spec_of_no_network(net):
    with pytest.raises(TypeError, match=rf"net must be a Network.* was a {type(net).__name__}"):
        check_spec(net, tree(), X)


# Two layers side by side, joined, split elsewhere and in heads: places in windows.
JOINED = PermutationSpec(
    {
        "a": [("a", 1, "out"), ("c", 0, "in", 1, 1, ((1, 0, 5, 1),))],
        "b": [("b", 1, "out"), ("c", 0, "in", 1, 1, ((1, 5, 4, 1),))],
        "heads": [("c", 1, "out", 1, 7), ("d", 0, "in")],
        "low": [("c", 1, "out", 1, 1, ((2, 0, 3, 1),)), ("d", 1, "in", 1, 1, ((1, 0, 3, 1),))],
        "high": [("c", 1, "out", 1, 1, ((2, 3, 4, 1),)), ("d", 1, "in", 1, 1, ((1, 3, 4, 1),))],
    }
)
JOINED_SHAPES = {"a": (3, 5), "b": (3, 4), "c": (9, 14), "d": (2, 7, 2)}


def joined_tree():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in JOINED_SHAPES.items()}


def joined(p, x, heads=2):
    h = jnp.concatenate([jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"])], axis=1)
    return jnp.einsum("bhd,hdo->bo", jnp.sin(h @ p["c"]).reshape(len(x), heads, -1), p["d"])


ROWS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def test_places_in_windows():
    v = joined_tree()
    sizes = {"a": 5, "b": 4, "heads": 2, "low": 3, "high": 4}
    assert JOINED.validate(v) == sizes
    net = types.SimpleNamespace(spec=JOINED, run=joined)
    assert check_spec(net, v, ROWS) < 1e-5 * float(jnp.abs(joined(v, ROWS)).max())
    p = {name: np.random.default_rng(2).permutation(n) for name, n in sizes.items()}
    moved = JOINED.permute(v, p)
    assert all(isinstance(leaf, np.ndarray) for leaf in moved.values())
    np.testing.assert_array_equal(
        moved["c"][5:], JOINED.permute(v, p | {"a": np.arange(5)})["c"][5:]
    )
    assert same(JOINED.permute(moved, invert(p)), v)
    assert same(jax.jit(JOINED.permute)(v, p), moved)
    matrices = {n: (np.eye(len(q), dtype=np.float32)[q], np.eye(len(q))[q].T) for n, q in p.items()}
    assert same(jax.tree.map(np.asarray, JOINED.apply(v, matrices)), moved)


def split_unit(n, j):
    """Maps that split a unit into two halves: what writes it is copied, what reads it halved."""
    merge = np.eye(n, dtype=np.float32)[[*range(n), j]]
    return merge, merge.T / merge.sum(0)[:, None]


@pytest.mark.parametrize("order", [1, -1])
def test_groups_may_grow_along_one_axis(order):
    """Segments and blocks of a leaf move as others along its axis get more entries."""
    v = joined_tree()
    spec = PermutationSpec(dict(list(JOINED.groups.items())[::order]))
    maps = {name: split_unit(n, n - 1) for name, n in spec.validate(v).items()}
    grown = spec.apply(v, maps)
    shapes = {"a": (3, 6), "b": (3, 5), "c": (11, 27), "d": (3, 9, 2)}
    assert {k: leaf.shape for k, leaf in grown.items()} == shapes
    np.testing.assert_allclose(joined(grown, ROWS, 3), joined(v, ROWS), rtol=1e-4, atol=1e-5)


def test_windows_are_checked():
    v = joined_tree()
    with pytest.raises(ValueError, match="the window 5:10 ends after them"):
        PermutationSpec({"g": [("c", 0, "in", 1, 1, ((1, 5, 5, 1),))]}).validate(v)
    with pytest.raises(ValueError, match="cannot be viewed as .2, n, 1."):
        PermutationSpec({"g": [("c", 0, "in", 1, 1, ((2, 0, 3, 1),))]}).validate(v)
    with pytest.raises(ValueError, match="sizes of windows are at least 1"):
        PermutationSpec({"g": [("c", 0, "in", 1, 1, ((1, 0, 0, 1),))]})
    with pytest.raises(ValueError, match="a window starts at 0 or later"):
        PermutationSpec({"g": [("c", 0, "in", 1, 1, ((1, -1, 2, 1),))]})
    for windows in (3, ((1, 0, 2),), ((1, 0, 2.0, 1),)):
        with pytest.raises(TypeError, match="a tuple of windows"):
            PermutationSpec({"g": [("c", 0, "in", 1, 1, windows)]})
    whole = ("c", 0, "in")
    for other in (("c", 0, "in", 1, 1, ((1, 2, 3, 1),)), ("c", 0, "in", 1, 3)):
        with pytest.raises(ValueError, match="groups 'g' and 'h' overlap on axis 0 of 'c'"):
            PermutationSpec({"g": [whole], "h": [other]}).validate(v)
    one, two = (("c", 0, "in", 1, 1, ((1, start, 4, 1),)) for start in (0, 3))
    with pytest.raises(ValueError, match="overlap"):
        PermutationSpec({"g": [one], "h": [two]}).validate(v)
