"""Tests of activation matching: recovery, equivariance, and an oracle in NumPy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import vfjax
from helpers import (
    convnet,
    lively,
    mlp,
    random_permutations,
    resnet,
    same_permutations,
    traced,
)
from vfjax import align, stats
from vfjax.align import match_activations, match_moments
from vfjax.symmetry import compose, invert

SHAPES = {
    mlp: {"w0": (6, 16), "b0": (16,), "w1": (16, 12), "b1": (12,), "w2": (12, 4)},
    convnet: {"k0": (3, 3, 3, 8), "mean": (8,), "var": (8,), "k1": (3, 3, 8, 12)}
    | {"d0": (2 * 2 * 12, 10), "d1": (10, 4)},
    resnet: {"stem": (12, 16), "a0": (16, 24), "b0": (24, 16), "a1": (16, 24), "b1": (24, 16)}
    | {"head": (16, 4)},
}
INPUTS = {mlp: (6,), convnet: (4, 4, 3), resnet: (12,)}
FUNCTIONS = list(SHAPES)


def _tree(apply_fn, seed):
    return lively(SHAPES[apply_fn], seed)


def _net(apply_fn):
    return traced(apply_fn, SHAPES[apply_fn], (2, *INPUTS[apply_fn]))


def _data(apply_fn, n=200, seed=9):
    return np.random.default_rng(seed).normal(size=(n, *INPUTS[apply_fn])).astype(np.float32)


def _batches(apply_fn):
    return np.split(_data(apply_fn), [80, 160])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_a_permuted_copy_is_recovered_exactly(apply_fn, seed):
    net, a = _net(apply_fn), _tree(apply_fn, seed)
    wanted = random_permutations(net.spec, seed + 100)
    b = net.spec.permute(a, wanted)
    found = match_activations(net, a, b, _batches(apply_fn))
    same_permutations(found.permutations, invert(wanted))
    assert found.converged
    assert len(found.objective) == 1
    assert {p.dtype for p in found.permutations.values()} == {np.dtype(np.int32)}
    # All correlations of a perfect match are one.
    units = sum(net.spec.sizes[tap.group] for tap in net.taps)
    assert found.objective[0] == pytest.approx(units, rel=1e-5)


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_a_network_matched_with_itself_stays(apply_fn):
    net, a = _net(apply_fn), _tree(apply_fn, 0)
    found = match_activations(net, a, a, _batches(apply_fn))
    assert found.moved == 0


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_equivariance(apply_fn):
    net, a, b = _net(apply_fn), _tree(apply_fn, 0), _tree(apply_fn, 1)
    found = match_activations(net, a, b, _batches(apply_fn)).permutations
    p, q = random_permutations(net.spec, 4), random_permutations(net.spec, 5)
    moved = net.spec.permute(a, p), net.spec.permute(b, q)
    again = match_activations(net, *moved, _batches(apply_fn)).permutations
    same_permutations(compose(q, again), compose(found, p))


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_the_sum_of_correlations_is_the_largest(apply_fn):
    """Against NumPy's `corrcoef` of all activations and SciPy, group by group."""
    net, a, b = _net(apply_fn), _tree(apply_fn, 0), _tree(apply_fn, 1)
    names = [tap.name for tap in net.taps]
    capture = jax.jit(lambda v, x: net.run(v, x, capture=names)[1])
    values = [capture(tree, _data(apply_fn)) for tree in (a, b)]
    total, best = {}, 0.0
    for tap in net.taps:
        n = net.spec.sizes[tap.group]
        rows = []
        for value in values:
            v = np.asarray(value[tap.name], np.float64)
            shape = v.shape
            v = v.reshape(*shape[: tap.axis], tap.outer, n, tap.inner, *shape[tap.axis + 1 :])
            rows.append(np.moveaxis(v, tap.axis + 1, 0).reshape(n, -1))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.nan_to_num(np.corrcoef(*rows)[:n, n:])
        total[tap.group] = total.get(tap.group, 0) + found
    found = match_activations(net, a, b, _batches(apply_fn))
    for group, gain in total.items():
        rows, columns = linear_sum_assignment(gain, maximize=True)
        best += gain[rows, columns].sum()
        np.testing.assert_array_equal(found.permutations[group], columns)
    assert found.objective[0] == pytest.approx(best, rel=1e-5)


def test_how_the_data_is_cut_does_not_matter():
    net, a, b = _net(convnet), _tree(convnet, 0), _tree(convnet, 1)
    data = _data(convnet)
    one = match_activations(net, a, b, [data])
    for sizes in ([1], [199], [80, 160]):
        same_permutations(
            match_activations(net, a, b, np.split(data, sizes)).permutations, one.permutations
        )


def test_units_that_never_vary_have_correlation_zero():
    net, a = _net(mlp), _tree(mlp, 0)
    # Two units that are never active, and one that is constant.
    a["w0"][:, :3] = 0
    a["b0"][:3] = [-1, -2, 0.3]
    b = net.spec.permute(a, {"w0": np.roll(np.arange(16), 1)})
    found = match_activations(net, a, b, _batches(mlp))
    np.testing.assert_array_equal(found.permutations["w0"][3:], np.roll(np.arange(16), -1)[3:])
    assert found.objective[0] == pytest.approx(16 - 3 + 12, rel=1e-5)
    assert match_activations(net, a, a, _batches(mlp)).moved == 0


def test_correlation(x64):
    """Unit by unit: of the sums that a match scores, each has one pair more than another."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 5))
    a, b = ({"w": rng.normal(size=(5, 4)), "v": np.ones((4, 2))} for _ in range(2))
    a["w"][:, 2] = 0
    net = vfjax.trace(lambda v, x: (x @ v["w"]) @ v["v"], a, x)
    moments = stats.moments(net, [a, b], [x], sites="taps", covariance=True)
    wanted = np.corrcoef(np.delete(x @ a["w"], 2, 1).T, (x @ b["w"]).T)[:3, 3:]
    wanted = np.insert(wanted, 2, 0, axis=0)
    for order in itertools.permutations(range(4)):
        maps = align.Maps.of_permutations([None, {"w": np.array(order)}])
        (found,) = align.merged_correlation(net, moments, maps).values()
        assert found == pytest.approx(wanted[np.arange(4), list(order)].sum(), rel=1e-9)


def test_moments_may_be_measured_before():
    net, a, b = _net(convnet), _tree(convnet, 0), _tree(convnet, 1)
    wanted = match_activations(net, a, b, _batches(convnet))
    for covariance in (True, "cross"):
        measured = stats.moments(
            net, [a, b], _batches(convnet), sites="paper", covariance=covariance
        )
        found = match_activations(net, a, b, None, moments=measured)
        same_permutations(found.permutations, wanted.permutations)


def test_one_pass_serves_several_models():
    net = _net(mlp)
    trees = [_tree(mlp, seed) for seed in range(3)]
    measured = stats.moments(net, trees, _batches(mlp), sites="taps", covariance="cross")
    for to, model in ((0, 1), (0, 2), (2, 1)):
        alone = match_activations(net, trees[to], trees[model], _batches(mlp))
        found = match_moments(net, measured, to=to, model=model)
        same_permutations(found.permutations, alone.permutations)


def test_a_group_without_a_tap_keeps_its_order(monkeypatch):
    """Two layers in a row without anything between them that the tap of the first could be in."""
    net, a, b = _net(mlp), _tree(mlp, 0), _tree(mlp, 1)
    hidden = next(iter(net.spec.groups))

    measured = stats.moments(net, [a, b], _batches(mlp), sites="taps", covariance="cross")
    others = tuple(tap for tap in net.taps if tap.group != hidden)
    monkeypatch.setattr(net, "taps", others)
    found = match_moments(net, measured).permutations
    np.testing.assert_array_equal(found[hidden], np.arange(16))


def test_a_network_without_groups_stays_as_it_is():
    def recurrent(v, x):
        for _ in range(3):
            x = jnp.tanh(x @ v["w"])
        return x

    v, x = {"w": np.eye(3, dtype=np.float32)}, np.ones((4, 3), np.float32)
    for fn in (lambda v, x: jax.nn.relu(x @ v["w"]), recurrent):
        net = vfjax.trace(fn, v, x)
        assert not net.spec.groups
        measured = stats.moments(net, [v, v], [x], sites="taps")
        for found in (match_activations(net, v, v, [x]), match_moments(net, measured)):
            assert found.permutations == {} and found.moved == 0
        with pytest.raises(ValueError, match="have no sites"):
            _ = measured.models


def test_bfloat16_networks():
    net = vfjax.trace(
        mlp,
        {p: jax.ShapeDtypeStruct(s, jnp.bfloat16) for p, s in SHAPES[mlp].items()},
        jax.ShapeDtypeStruct((2, 6), jnp.bfloat16),
    )
    a = {p: jnp.asarray(v, jnp.bfloat16) for p, v in _tree(mlp, 0).items()}
    wanted = random_permutations(net.spec, 1)
    found = match_activations(
        net, a, net.spec.permute(a, wanted), [jnp.asarray(_data(mlp), jnp.bfloat16)]
    )
    same_permutations(found.permutations, invert(wanted))


def test_errors():
    net, a, b = _net(mlp), _tree(mlp, 0), _tree(mlp, 1)
    with pytest.raises(ValueError, match="no batches"):
        match_activations(net, a, b, [])
    with pytest.raises(TypeError, match="dtype float64"):
        match_activations(net, a, b, [_data(mlp).astype(np.float64)])
    with pytest.raises(ValueError, match="`data` is None"):
        match_activations(net, a, b, None)
    with pytest.raises(ValueError, match="NaN"):
        match_activations(net, a, {p: v * np.float32(np.nan) for p, v in b.items()}, _batches(mlp))
    with pytest.raises(ValueError, match="shape"):
        match_activations(net, a, b | {"b0": np.zeros(2, np.float32)}, _batches(mlp))
    bare = stats.moments(net, [a, b], _batches(mlp), sites="taps")
    with pytest.raises(ValueError, match="no covariance between models 0 and 1"):
        match_activations(net, a, b, None, moments=bare)
    alone = stats.moments(net, [a], _batches(mlp), sites="taps", covariance=True)
    with pytest.raises(ValueError, match="it has 1 models"):
        match_activations(net, a, b, None, moments=alone)
    with pytest.raises(ValueError, match="`model` must be in 0..0, got 1"):
        match_moments(net, alone)
    wrong = r"net must be a Network.*; it was a function.*vfjax\.trace\(apply_fn, variables, x\)"
    with pytest.raises(TypeError, match=wrong):
        match_activations(mlp, a, b, _batches(mlp))
    with pytest.raises(TypeError, match=wrong):
        match_moments(mlp, bare)
