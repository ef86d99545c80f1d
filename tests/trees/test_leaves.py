"""A leaf comes back from every operation on trees in its own type, whatever JAX makes of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import vfjax
from vfjax import align, checkpoint, merge, prune
from vfjax.symmetry import PermutationSpec

FINE = 1 + 2.0**-40  # which float32 rounds to 1
FLOATS = {
    "float64": np.array([FINE, -3.0, 0.5]),
    "complex128": np.array([FINE * 1j, 2 - 1j, 3.0]),
    "float32": np.array([1.5, -3.0, 0.5], np.float32),
    "jax": jnp.array([1.5, -3.0, 0.5]),
    "complex64": jnp.array([1.5j, 2.0, 3.0]),
    "float16": np.array([1.5, -3.0, 0.5], np.float16),
    "bfloat16": jnp.array([1.5, -3.0, 0.5], jnp.bfloat16),
    "float8_e4m3fn": jnp.array([1.5, -3.0, 0.5], jnp.float8_e4m3fn),
    "float8_e5m2": np.array([1.5, -3.0, 0.5], ml_dtypes.float8_e5m2),
    "float4": np.array([1.5, -3.0, 0.5], ml_dtypes.float4_e2m1fn),
}
OTHERS = {
    "int64": np.array([2**40, -5, 7]),
    "uint64": np.array([2**63, 5, 7], np.uint64),
    "int32": jnp.array([4, -5, 7]),
    "int8": np.array([4, -5, 7], np.int8),
    "int4": jnp.array([4, -5, 7], jnp.int4),
    "uint4": np.array([4, 5, 7], ml_dtypes.uint4),
    "bool": np.array([True, False, True]),
    "jax bool": jnp.array([True, False, True]),
}
SCALARS = {
    "float": FINE,
    "int": 2**40,
    "bool": True,
    "complex": FINE * 1j,
    "0-d": np.array(FINE),
    "NumPy": np.float64(FINE),
    "0-d integer": np.array(2**40),
    "0-d jax": jnp.float32(1.5),
}
ARRAYS = FLOATS | OTHERS
SPEC = PermutationSpec({"h": [("w", 0)]})
ORDER = np.array([2, 0, 1])


def same(found, wanted, values=None):
    """The same kind of leaf: NumPy's only where JAX would narrow it; and the same bits."""
    values = wanted if values is None else values
    if isinstance(wanted, (bool, int, float, complex)) and not isinstance(wanted, np.generic):
        assert type(found) is type(wanted)
    else:
        assert found.dtype == wanted.dtype
        if isinstance(wanted, jax.Array):
            assert isinstance(found, jax.Array)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(values))


@pytest.mark.parametrize("name", ARRAYS | SCALARS)
def test_a_model_merged_with_itself_is_itself(name):
    leaf = (ARRAYS | SCALARS)[name]
    tree = {"w": leaf}
    for weights in (None, (1.0, 0.0), (0.0, 1.0), (0.25, 0.75)):
        same(merge.interpolate([tree, tree], weights)["w"], leaf)
    same(merge.uniform_soup([tree] * 4)["w"], leaf)
    same(merge.greedy_soup([tree, tree], lambda tree: 0.0).tree["w"], leaf)


@pytest.mark.parametrize("name", FLOATS)
def test_means_are_those_of_the_widest_type(name):
    a = FLOATS[name]
    b = np.asarray(a)[ORDER] if isinstance(a, np.ndarray) else a[ORDER]
    wide = np.complex128 if np.iscomplexobj(np.asarray(a)) else np.float64
    mean = (0.25 * np.asarray(a).astype(wide) + 0.75 * np.asarray(b).astype(wide)).astype(a.dtype)
    same(merge.interpolate([{"w": a}, {"w": b}], alpha=0.75)["w"], a, mean)


def test_means_of_numbers_are_numbers():
    mean = merge.interpolate([{"s": 1.0, "c": 2j}, {"s": FINE, "c": 0j}], alpha=0.5)
    assert mean == {"s": 1 + 2.0**-41, "c": 1j} and type(mean["s"]) is float
    # The first tree says what a leaf is, as it says what the containers are.
    pairs = [(1.0, np.float32(2)), (np.float64(1), jnp.float32(2)), (jnp.float32(1), 2.0)]
    kinds = [type(merge.interpolate([{"s": a}, {"s": b}])["s"]) for a, b in pairs]
    assert kinds[0] is float and kinds[1] is np.ndarray and issubclass(kinds[2], jax.Array)


@pytest.mark.parametrize(("a", "b"), [(1, 2), (True, False), (np.array(2**40), np.array(0))])
def test_whole_numbers_must_agree(a, b):
    with pytest.raises(ValueError, match="leaf 'n' is of dtype .* cannot be averaged, and differs"):
        merge.interpolate([{"n": a}, {"n": b}])


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_permuting_keeps_the_type(name, convert):
    leaf = ARRAYS[name]
    moved = SPEC.permute({"w": leaf}, {"h": convert(ORDER)})["w"]
    same(moved, leaf, np.asarray(leaf)[ORDER])
    back = SPEC.permute({"w": moved}, {"h": convert(np.argsort(ORDER))})["w"]
    same(back, leaf)


@pytest.mark.parametrize("name", FLOATS)
def test_mapping_keeps_the_type(name):
    leaf = FLOATS[name]
    pair = np.eye(3, dtype=np.float32)[ORDER], np.eye(3, dtype=np.float32)[:, ORDER]
    same(SPEC.apply({"w": leaf}, {"h": pair})["w"], leaf, np.asarray(leaf)[ORDER])
    half = np.full((1, 3), 0.5, np.float32), np.ones((3, 1), np.float32)
    total = SPEC.apply({"w": leaf}, {"h": half})["w"]
    wide = np.complex128 if np.iscomplexobj(np.asarray(leaf)) else np.float64
    wanted = (np.asarray(leaf).astype(wide).sum(keepdims=True) / 2).astype(leaf.dtype)
    same(total, leaf[:1], wanted)


def test_within_blocks_and_entries():
    """The same bits where a group is one block of an axis, or moves inside another group."""
    within = PermutationSpec(
        {"heads": [("w", 0, "out", 1, 2)], "units": [("w", 0, "out", 2, 1)]},
        within={"units": "heads"},
    )
    leaf = np.array([2**40, 1, 2, 3])
    for convert in (np.asarray, jnp.asarray):
        orders = {"heads": convert([1, 0]), "units": convert([[0, 1], [1, 0]])}
        same(within.permute({"w": leaf}, orders)["w"], leaf, np.array([2, 3, 1, 2**40]))


@pytest.mark.parametrize("name", ARRAYS)
def test_pruning_keeps_the_type(name):
    leaf, mask = ARRAYS[name], np.array([True, False, True])
    zero = np.zeros((), leaf.dtype)
    same(prune.apply({"w": leaf}, {"w": mask})["w"], leaf, np.where(mask, np.asarray(leaf), zero))
    same(prune.apply({"w": leaf}, {"w": True})["w"], leaf)


def test_random_keys_must_agree_and_come_back():
    a, b = jax.random.key(0), jax.random.key(1)
    assert merge.interpolate([{"k": a}, {"k": a}])["k"] == a
    with pytest.raises(ValueError, match="differs between trees"):
        merge.interpolate([{"k": a}, {"k": b}])
    x = np.float32(np.random.default_rng(0).normal(size=(6, 3)))
    tree = {"w": x[:3], "v": x[3:5].T.copy(), "key": a}
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], tree, x)
    found = align.match_universe(net, [tree, tree], [x])
    assert len(found.permutations) == 2


@pytest.mark.parametrize("order", [">f4", ">f8", ">i4", ">i8", ">c8", ">f2"])
def test_another_byte_order_is_that_of_the_machine(order):
    leaf = np.array([3, 1, 2], order)
    native = leaf.astype(leaf.dtype.newbyteorder("="))
    same(merge.interpolate([{"w": leaf}, {"w": native}])["w"], native)
    same(SPEC.permute({"w": leaf}, {"h": ORDER})["w"], native, native[ORDER])
    same(prune.apply({"w": leaf}, {"w": native > 1})["w"], native, native * (native > 1))


def test_a_network_of_big_endian_and_wide_leaves(tmp_path):
    """Traced, run, matched, merged, saved and loaded as one of float32 would be."""
    draw = np.random.default_rng(0).normal
    x = draw(size=(6, 3)).astype(np.float32)
    plain = {"w": np.float32(draw(size=(3, 4))), "v": np.float32(draw(size=(4, 2)))}
    tree = {"w": plain["w"].astype(">f4"), "v": plain["v"].astype(np.float64), "n": np.array(2**40)}

    def forward(v, x):
        return jax.nn.relu(x @ v["w"]) @ v["v"]

    net = vfjax.trace(forward, tree, x)
    np.testing.assert_allclose(net.run(tree, x), forward(plain, x), atol=1e-6)
    b = net.spec.permute(tree, {"w": [3, 1, 0, 2]})
    moved = net.spec.permute(b, align.match_activations(net, tree, b, [x]).permutations)
    for found in (moved, merge.interpolate([tree, moved]), merge.greedy_soup([tree], id).tree):
        assert found["v"].dtype == np.float64 and found["n"] == 2**40
        np.testing.assert_array_equal(found["v"], tree["v"])
    model = merge.preserve_first(net, [tree, moved], layers=1)
    again = checkpoint.load(checkpoint.save(tmp_path / "merged", model), net)
    assert again.trunk["v"].dtype == np.float64
    np.testing.assert_allclose(again(x), forward(plain, x), atol=1e-6)


@pytest.mark.parametrize("dtype", ["U3", "O", "M8[D]", np.longdouble])
def test_a_type_that_jax_does_not_have_is_named(dtype, tmp_path):
    leaf = np.array([1, 2], dtype)
    if leaf.dtype == np.float64:
        pytest.skip("a long double of this machine is a double")
    with pytest.raises(TypeError, match=r"trees\[0\] has an array of dtype .* at 'w'"):
        merge.interpolate([{"w": leaf}, {"w": leaf}])
    with pytest.raises(TypeError, match=r"tree has an array at 'w' that is not of numbers"):
        checkpoint.save(tmp_path / "net", {"w": leaf})
    assert not list(tmp_path.iterdir())


def test_under_jit_jax_casts_as_ever():
    a, b = {"w": FLOATS["float64"]}, {"w": np.zeros(3)}
    found = jax.jit(lambda alpha: merge.interpolate([a, b], [1 - alpha, alpha]))(0.5)["w"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, a["w"] / 2, rtol=1e-7)
    moved = jax.jit(lambda order: SPEC.permute(a, {"h": order}))(ORDER)["w"]
    np.testing.assert_array_equal(moved, np.float32(a["w"][ORDER]))
    first = jax.jit(lambda a: merge.interpolate([a, a]))({"s": 0.5, "n": 3, "b": True})
    assert first == {"s": 0.5, "n": 3, "b": True}
