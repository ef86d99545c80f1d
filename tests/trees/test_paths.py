"""Names of leaves, and the errors for trees that cannot be merged."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vfjax._trees import check_trees, flatten_named, leaf_paths


class Pair(NamedTuple):
    w: object
    b: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: object
    bias: object


A = jnp.ones(2)


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"params": {"Dense_0": {"kernel": A}}}, ["params/Dense_0/kernel"]),
        ([A, (A, {"x": A})], ["0", "1/0", "1/1/x"]),
        (Pair(A, None), ["w"]),
        (Block(A, A), ["kernel", "bias"]),
        (A, [""]),
        ({}, []),
        ({"a": {"value": A}, "b": {"value": A}}, ["a", "b"]),
        ({"a": {"value": A}, "b": {"other": A}}, ["a/value", "b/other"]),
        ({"value": A, "a": {"value": A}}, ["a/value", "value"]),
    ],
)
def test_paths(tree, paths):
    assert leaf_paths(tree) == paths


def test_paths_that_would_coincide_are_told_apart():
    tree = {"a/b": 1 * A, "a": {"b": 2 * A}}
    named, treedef = flatten_named(tree)
    assert len(named) == 2
    assert jax.tree.unflatten(treedef, list(named.values()))["a"]["b"] is tree["a"]["b"]


def test_nnx_paths_have_no_value():
    state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[1]
    assert sorted(leaf_paths(state)) == ["bias", "kernel"]
    mixed = {"backbone": state, "head": {"w": A}}
    assert sorted(leaf_paths(mixed)) == ["backbone/bias", "backbone/kernel", "head/w"]


def test_a_function_leaf_names_the_remedy():
    module = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"'activation'.*eqx\.partition"):
        flatten_named(module)
    with pytest.raises(TypeError, match=r"variables has a str at 'name'"):
        flatten_named({"name": "vgg"})


@pytest.mark.parametrize("leaf", [1, 2.0, True, np.float32(3), jax.ShapeDtypeStruct((2,), "int8")])
def test_numbers_and_shapes_are_leaves(leaf):
    assert flatten_named({"x": leaf})[0] == {"x": leaf}


def test_trees_that_fit():
    trees = [{"w": k * A, "n": 3, "key": jax.random.key(k)} for k in range(3)]
    check_trees(trees)
    check_trees(tuple(jax.eval_shape(lambda t: t, t) for t in trees))
    jax.jit(lambda ts: [flat.leaves for flat in check_trees(ts)])(trees)


@pytest.mark.parametrize(
    ("trees", "error", "message"),
    [
        ({"w": A}, TypeError, "must be a list or tuple"),
        ("ab", TypeError, "must be a list or tuple"),
        (iter([{"w": A}]), TypeError, "must be a list or tuple"),
        ([], ValueError, "trees is empty"),
        ([{"w": A}, {"v": A}], ValueError, r"trees\[1\] differs.*lacks \['w'\].*extra \['v'\]"),
        ([{"w": A}, {"w": A, "b": A}], ValueError, r"extra \['b'\]"),
        ([{"w": A}, {"w": None}], ValueError, r"lacks \['w'\]"),
        ([{"w": A}, {"w": jnp.ones(3)}], ValueError, r"trees\[1\] has shape \(3,\) at 'w'"),
        ([{"w": A}, {"w": A.astype("bfloat16")}], ValueError, "dtype bfloat16 at 'w'"),
        ([{"w": A}, {"w": A * jnp.nan}], ValueError, r"trees\[1\] holds 2 NaN or infinite values"),
        ([{"w": jnp.asarray([1, jnp.inf])}], ValueError, "holds 1 NaN or infinite value at 'w'"),
        ([{"w": np.asarray([np.nan])}], ValueError, "NaN"),
        ([{"w": jnp.asarray([jnp.nan], jnp.bfloat16)}], ValueError, "NaN"),
        ([{"w": jnp.abs}], TypeError, r"trees\[0\] has a function"),
    ],
)
def test_trees_that_do_not_fit(trees, error, message):
    with pytest.raises(error, match=message):
        check_trees(trees)


def test_finite_is_optional_and_skips_tracers():
    bad = {"w": A * jnp.nan}
    check_trees([bad], finite=False)
    jax.jit(lambda t: check_trees([t])[0].leaves)(bad)
    with pytest.raises(ValueError, match="NaN"):  # a concrete tree is looked at under a trace too
        jax.jit(lambda x: (check_trees([bad]), x)[1])(A)
