"""Tests of weight matching: recovery, equivariance, monotone objectives, independent oracles."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from helpers import normed_convnet as convnet
from helpers import random_permutations, resnet, same_permutations, traced
from vfjax import PermutationSpec
from vfjax.align import match_weights
from vfjax.symmetry import Axis, compose, invert

KEY = jax.random.key(0)


def mlp(v, x):
    for k in range(3):
        x = jax.nn.relu(x @ v[f"w{k}"] + v[f"b{k}"][None])
    return x @ v["w3"]


def linear_residual(v, x):
    """One group on both axes of a kernel: matching it is a quadratic assignment."""
    h = x @ v["in"]
    for k in range(3):
        h = h + h @ v[f"w{k}"]
    return h @ v["out"]


SHAPES = {
    mlp: {"w0": (6, 16), "b0": (16,), "w1": (16, 20), "b1": (20,), "w2": (20, 12), "b2": (12,)}
    | {"w3": (12, 4)},
    convnet: {"k0": (3, 3, 3, 8), "k1": (3, 3, 8, 12), "d0": (4 * 4 * 12, 10), "d1": (10, 4)}
    | {f"{name}{k}": (8 + 4 * k,) for name in ("mean", "var", "scale", "bias") for k in range(2)},
    resnet: {"stem": (12, 16), "a0": (16, 24), "b0": (24, 16), "a1": (16, 24), "b1": (24, 16)}
    | {"head": (16, 4)},
    linear_residual: {"in": (8, 12), "w0": (12, 12), "w1": (12, 12), "w2": (12, 12)}
    | {"out": (12, 4)},
}
INPUTS = {mlp: (2, 6), convnet: (2, 4, 4, 3), resnet: (2, 12), linear_residual: (2, 8)}
FUNCTIONS = [mlp, convnet, resnet, linear_residual]


def _tree(apply_fn, seed):
    rng = np.random.default_rng(seed)
    tree = {}
    for path, shape in SHAPES[apply_fn].items():
        tree[path] = rng.normal(size=shape).astype(np.float32)
        if len(shape) > 1:
            tree[path] /= np.sqrt(np.prod(shape[:-1]))
        if path.startswith("var"):
            tree[path] = np.abs(tree[path])
    return tree


def _net(apply_fn):
    return traced(apply_fn, SHAPES[apply_fn], INPUTS[apply_fn])


def _objective(spec, a, b, ignore=()):
    """The definition: inner products over all leaves that a group touches."""
    touched = {axis.path for axes in spec.groups.values() for axis in axes} - set(ignore)
    return sum(np.vdot(np.float64(a[p]), np.float64(b[p])) for p in touched)


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_the_examples_have_the_groups_that_they_are_here_for(apply_fn):
    counts = {mlp: 3, convnet: 3, resnet: 3, linear_residual: 1}
    assert len(_net(apply_fn).spec.groups) == counts[apply_fn]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_a_permuted_copy_is_recovered_exactly(apply_fn, seed):
    net, a = _net(apply_fn), _tree(apply_fn, seed)
    wanted = random_permutations(net.spec, seed + 100)
    b = net.spec.permute(a, wanted)
    found = match_weights(net, a, b, key=jax.random.key(seed), restarts=3)
    same_permutations(found.permutations, invert(wanted))
    assert found.converged
    for path, leaf in net.spec.permute(b, found.permutations).items():
        np.testing.assert_array_equal(leaf, a[path])


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_a_network_matched_with_itself_stays(apply_fn):
    net, a = _net(apply_fn), _tree(apply_fn, 0)
    a = {p: np.where(np.arange(v.shape[-1]) < 2, 0, v).astype(v.dtype) for p, v in a.items()}
    found = match_weights(net, a, a, key=KEY)
    assert found.moved == 0
    assert found.converged


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_the_objective_rises_and_is_what_it_says(apply_fn):
    net, a, b = _net(apply_fn), _tree(apply_fn, 0), _tree(apply_fn, 1)
    found = match_weights(net, a, b, key=KEY)
    before = _objective(net.spec, a, b, net.statistics)
    after = _objective(net.spec, a, net.spec.permute(b, found.permutations), net.statistics)
    assert before <= found.objective[0]
    assert list(found.objective) == sorted(found.objective)
    assert found.objective[-1] == pytest.approx(after, rel=1e-9)
    assert found.converged


@pytest.mark.parametrize("apply_fn", [mlp, convnet, resnet])
def test_the_found_optimum_is_one_for_every_group(apply_fn):
    """At the end no group's gain matrix, built here by brute force, has a better assignment."""
    net, a, b = _net(apply_fn), _tree(apply_fn, 0), _tree(apply_fn, 1)
    found = match_weights(net, a, b, key=KEY)
    moved = net.spec.permute(b, found.permutations)
    for group, n in net.spec.sizes.items():
        gain = np.array([[_gain(net, a, moved, group, i, j) for j in range(n)] for i in range(n)])
        _, best = linear_sum_assignment(gain, maximize=True)
        assert gain[np.arange(n), best].sum() <= np.trace(gain) + 1e-6 * np.abs(gain).sum()


def _gain(net, a, b, group, i, j):
    """What putting unit j of b at place i of a adds to the objective."""
    total = 0.0
    for axis in net.spec.groups[group]:
        if axis.path not in net.statistics:
            total += np.vdot(_unit(a[axis.path], axis, i), _unit(b[axis.path], axis, j))
    return total


def _unit(leaf, axis, i):
    entries = np.arange(leaf.shape[axis.axis])
    chosen = entries // axis.inner % (len(entries) // (axis.outer * axis.inner)) == i
    return np.compress(chosen, np.float64(leaf), axis=axis.axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5,), Axis("", 0)),
        ((7, 5), Axis("", 1)),
        ((5, 7), Axis("", 0)),
        ((3, 3, 5, 4), Axis("", 2)),
        ((6, 5, 3), Axis("", 1)),
        ((4, 30), Axis("", 1, "in", 3, 2)),
        ((30, 4), Axis("", 0, "in", 6, 1)),
        ((10, 2, 3), Axis("", 0, "out", 1, 2)),
    ],
)
def test_gain_matrices_are_inner_products_of_units(shape, axis):
    """With one leaf, the search is the assignment of this matrix."""
    spec = PermutationSpec({"h": [axis._replace(path="w")]})
    for seed in range(5):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=shape), rng.normal(size=shape)
        gain = np.array(
            [[np.vdot(_unit(a, axis, i), _unit(b, axis, j)) for j in range(5)] for i in range(5)]
        )
        found = match_weights(spec, {"w": a}, {"w": b}, key=KEY)
        rows, columns = linear_sum_assignment(gain, maximize=True)
        np.testing.assert_array_equal(found.permutations["h"], columns)
        assert found.objective[-1] == pytest.approx(gain[rows, columns].sum(), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_tiny_problems_are_solved_to_optimality(seed):
    """With one group the search is one assignment: compared with all permutations."""
    rng = np.random.default_rng(seed)
    spec = PermutationSpec({"h": [("w", 1, "out"), ("b", 0), ("v", 0, "in")]})
    a, b = (
        {"w": rng.normal(size=(3, 5)), "b": rng.normal(size=5), "v": rng.normal(size=(5, 2))}
        for _ in range(2)
    )
    found = match_weights(spec, a, b, key=KEY)
    best = max(
        _objective(spec, a, spec.permute(b, {"h": np.array(p)}))
        for p in itertools.permutations(range(5))
    )
    assert found.objective[-1] == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_quadratic_groups_never_lose(seed):
    """A kernel with the group on both axes and nothing else: the linear part alone may mislead."""
    rng = np.random.default_rng(seed)
    spec = PermutationSpec({"h": [("w", 0, "in"), ("w", 1, "out")]})
    a, b = ({"w": rng.normal(size=(6, 6)).astype(np.float32)} for _ in range(2))
    found = match_weights(spec, a, b, key=KEY, restarts=2)
    assert found.objective[0] >= _objective(spec, a, b)
    after = _objective(spec, a, spec.permute(b, found.permutations))
    assert found.objective[-1] == pytest.approx(after, rel=1e-9)
    assert list(found.objective) == sorted(found.objective)


@pytest.mark.parametrize("apply_fn", [mlp, convnet, resnet])
def test_equivariance(apply_fn):
    """Permuting a moves what is found along; the optimum found does not depend on b's own order.

    Random networks have many local optima, so b is a noisy copy, whose optimum is clear.
    """
    net, a = _net(apply_fn), _tree(apply_fn, 0)
    noise = _tree(apply_fn, 1)
    b = net.spec.permute(
        {p: a[p] + np.float32(0.1) * noise[p] for p in a}, random_permutations(net.spec, 3)
    )
    found = match_weights(net, a, b, key=KEY, restarts=3).permutations
    p, q = random_permutations(net.spec, 4), random_permutations(net.spec, 5)
    again = match_weights(
        net, net.spec.permute(a, p), net.spec.permute(b, q), key=KEY, restarts=3
    ).permutations
    same_permutations(compose(q, again), compose(found, p))


def test_a_key_decides_and_another_may_differ():
    net, a, b = _net(mlp), _tree(mlp, 0), _tree(mlp, 1)
    one, two = (match_weights(net, a, b, key=KEY, restarts=1) for _ in range(2))
    same_permutations(one.permutations, two.permutations)
    assert one.objective == two.objective
    others = {match_weights(net, a, b, key=jax.random.key(k)).objective[-1] for k in range(6)}
    assert len(others) > 1


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_restarts_are_never_worse(apply_fn):
    net, a, b = _net(apply_fn), _tree(apply_fn, 0), _tree(apply_fn, 1)
    last = [match_weights(net, a, b, key=KEY, restarts=n).objective[-1] for n in (0, 2, 6)]
    assert last == sorted(last)


def test_the_search_may_be_cut_short():
    net, a, b = _net(mlp), _tree(mlp, 0), _tree(mlp, 1)
    found = match_weights(net, a, b, key=KEY, max_sweeps=1)
    assert len(found.objective) == 1
    assert not found.converged
    assert "not converged" in repr(found)
    assert match_weights(net, a, b, key=KEY, tol=1.0).moved == 0


def test_running_statistics_do_not_count_unless_asked_for():
    net, a, b = _net(convnet), _tree(convnet, 0), _tree(convnet, 1)
    assert net.statistics == {"mean0", "mean1", "var0", "var1"}
    found = match_weights(net, a, b, key=KEY)
    swamped = {p: 1e3 * v if p in net.statistics else v for p, v in b.items()}
    same_permutations(match_weights(net, a, swamped, key=KEY).permutations, found.permutations)
    counted = match_weights(net, a, swamped, key=KEY, norm_statistics=True)
    assert any((counted.permutations[g] != p).any() for g, p in found.permutations.items())
    by_hand = match_weights(net.spec, a, swamped, key=KEY, ignore=net.statistics)
    same_permutations(by_hand.permutations, found.permutations)


def test_integer_leaves_are_permuted_and_do_not_count():
    spec = PermutationSpec({"h": [("w", 1, "out"), ("order", 0)]})
    a = {"w": np.eye(4, dtype=np.float32), "order": np.arange(4)}
    found = match_weights(spec, a, spec.permute(a, {"h": [3, 1, 0, 2]}), key=KEY)
    assert found.permutations["h"].tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    net = _net(mlp)
    a = {p: jnp.asarray(v, dtype) for p, v in _tree(mlp, 0).items()}
    wanted = random_permutations(net.spec, 1)
    found = match_weights(net, a, net.spec.permute(a, wanted), key=KEY, restarts=2)
    same_permutations(found.permutations, invert(wanted))


def test_units_of_tiny_weights_are_matched_too():
    spec = PermutationSpec({"h": [("w", 1, "out")]})
    rng = np.random.default_rng(0)
    a = {"w": (rng.normal(size=(9, 8)) * 10.0 ** -np.arange(8)).astype(np.float32)}
    p = rng.permutation(8)
    found = match_weights(spec, a, spec.permute(a, {"h": p}), key=KEY, tol=0)
    np.testing.assert_array_equal(found.permutations["h"], np.argsort(p))


def test_permutations_are_int32_of_every_group():
    net, a, b = _net(resnet), _tree(resnet, 0), _tree(resnet, 1)
    found = match_weights(net, a, b, key=jax.random.PRNGKey(0))
    assert {g: len(p) for g, p in found.permutations.items()} == dict(net.spec.sizes)
    assert {p.dtype for p in found.permutations.values()} == {np.dtype(np.int32)}
    assert "3 groups" in repr(found) and "converged" in repr(found)


def test_errors():
    net, a, b = _net(mlp), _tree(mlp, 0), _tree(mlp, 1)
    with pytest.raises(ValueError, match="b holds 1 NaN or infinite value at 'w0'"):
        bad = b | {"w0": b["w0"].copy()}
        bad["w0"][0, 0] = np.inf
        match_weights(net, a, bad, key=KEY)
    with pytest.raises(ValueError, match="b differs in structure from a: it lacks"):
        match_weights(net, a, {p: v for p, v in b.items() if p != "w3"}, key=KEY)
    with pytest.raises(ValueError, match="b has shape .* at 'b0'"):
        match_weights(net, a, b | {"b0": np.zeros(3, np.float32)}, key=KEY)
    with pytest.raises(ValueError, match="dtype"):
        match_weights(net, a, b | {"b0": b["b0"].astype(np.float16)}, key=KEY)
    with pytest.raises(TypeError, match="a has a function"):
        match_weights(net, a | {"b0": jax.nn.relu}, b, key=KEY)
    with pytest.raises(TypeError, match="`key` must be a random key"):
        match_weights(net, a, b, key=0)
    with pytest.raises(ValueError, match="`restarts`"):
        match_weights(net, a, b, key=KEY, restarts=-1)
    with pytest.raises(ValueError, match="`max_sweeps`"):
        match_weights(net, a, b, key=KEY, max_sweeps=0)
    with pytest.raises(ValueError, match="`tol`"):
        match_weights(net, a, b, key=KEY, tol=float("nan"))
    with pytest.raises(ValueError, match="`ignore` names leaves"):
        match_weights(net, a, b, key=KEY, ignore=["w9"])
    with pytest.raises(TypeError, match="`ignore`"):
        match_weights(net, a, b, key=KEY, ignore="w0")
    with pytest.raises(TypeError, match=r"net must be a Network or a Perm.*function.*vfjax\.trace"):
        match_weights(mlp, a, b, key=KEY)


def test_overflow_is_an_error():
    spec = PermutationSpec({"h": [("w", 1, "out")]})
    a = {"w": np.full((2, 3), 3e38, np.float32)}
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(ValueError, match="overflow"):
        match_weights(spec, a, a, key=KEY)


def test_assignment_agrees_with_brute_force():
    rng, spec = np.random.default_rng(0), PermutationSpec({"h": [("w", 1, "out")]})
    for n in (1, 2, 5):
        gain = rng.normal(size=(n, n))
        totals = {p: gain[np.arange(n), list(p)].sum() for p in itertools.permutations(range(n))}
        # Units whose inner products are the gains.
        found = match_weights(spec, {"w": np.eye(n)}, {"w": gain}, key=KEY)
        assert tuple(found.permutations["h"]) == max(totals, key=totals.get)
