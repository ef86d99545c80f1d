"""Matching to a universe: no order, closed cycles, never below a star, and known permutations."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from vfjax import align, merge, stats
from vfjax.align import _cycles, _universe
from vfjax.symmetry import compose, invert

KEY = jax.random.key(0)


def linear_residual(v, x):
    """One group on both axes of a kernel: its objective is quadratic in each model."""
    h = x @ v["in"]
    for k in range(2):
        h = h + h @ v[f"w{k}"]
    return h @ v["out"]


SHAPES = {
    mlp: {"w0": (6, 9), "b0": (9,), "w1": (9, 7), "b1": (7,), "w2": (7, 4)},
    convnet: {"k0": (3, 3, 2, 6), "mean": (6,), "var": (6,), "k1": (3, 3, 6, 5)}
    | {"d0": (2 * 2 * 5, 8), "d1": (8, 4)},
    resnet: {"stem": (6, 8), "a0": (8, 10), "b0": (10, 8), "a1": (8, 6), "b1": (6, 8)}
    | {"head": (8, 4)},
    linear_residual: {"in": (6, 8), "w0": (8, 8), "w1": (8, 8), "out": (8, 4)},
}
INPUTS = {mlp: (6,), convnet: (4, 4, 2), resnet: (6,), linear_residual: (6,)}
FUNCTIONS = [mlp, convnet, resnet]


def _tree(apply_fn, seed):
    return lively(SHAPES[apply_fn], seed)


def _net(apply_fn):
    return traced(apply_fn, SHAPES[apply_fn], (2, *INPUTS[apply_fn]))


def _data(apply_fn):
    rng = np.random.default_rng(9)
    return [rng.normal(size=(n, *INPUTS[apply_fn])).astype(np.float32) for n in (80, 43)]


@functools.cache
def _moments(apply_fn, seeds):
    trees = [_tree(apply_fn, seed) for seed in seeds]
    return stats.moments(_net(apply_fn), trees, _data(apply_fn), sites="taps", covariance="cross")


def _match(apply_fn, trees, on, **options):
    if on == "activations":
        return align.match_universe(_net(apply_fn), trees, _data(apply_fn), **options)
    return align.match_universe(_net(apply_fn), trees, key=KEY, **options)


def _blocks(models, n, seed, noise):
    """Correlations of noisy copies of the same features, in other orders."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(3 * n + 5, n))
    values = [
        (common + noise * rng.normal(size=common.shape))[:, rng.permutation(n)]
        for _ in range(models)
    ]
    found = np.corrcoef(np.concatenate(values, 1).T).reshape(models, n, models, n)
    return found.transpose(0, 2, 1, 3)


def _starts(blocks):
    """All models as they are, and aligned to each one."""
    models, _, n, _ = blocks.shape
    place = np.arange(n)
    stars = [
        np.stack([place if k == to else _cycles.assign(blocks[to, k]) for k in range(models)])
        for to in range(models)
    ]
    return [{"g": p} for p in (np.tile(place, (models, 1)), *stars)]


# ------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("on", ["activations", "weights"])
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_the_order_of_three_models_does_not_matter(apply_fn, on):
    net, trees = _net(apply_fn), [_tree(apply_fn, seed) for seed in range(3)]
    x = _data(apply_fn)[0]
    first = _match(apply_fn, trees, on)
    output = net.run(merge.interpolate(first.apply(net, trees)), x)
    every = list(itertools.permutations(range(3)))
    # Measuring costs a compilation each time.
    for order in every if apply_fn is mlp or on == "weights" else every[3:5]:
        chosen = [trees[k] for k in order]
        found = _match(apply_fn, chosen, on)
        for place, k in enumerate(order):
            same_permutations(found.permutations[place], first.permutations[k])
        assert found.objective == first.objective
        merged = merge.interpolate(found.apply(net, chosen))
        np.testing.assert_allclose(net.run(merged, x), output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_four_models_does_not_matter(seed):
    trees = [_tree(mlp, k) for k in range(4)]
    first = _match(mlp, trees, "activations")
    order = np.random.default_rng(seed).permutation(4)
    found = _match(mlp, [trees[k] for k in order], "activations")
    for place, k in enumerate(order):
        same_permutations(found.permutations[place], first.permutations[k])


@pytest.mark.parametrize("on", ["activations", "weights"])
def test_the_search_itself_has_no_order(monkeypatch, on):
    """Without the canonical order of sums, too: what it fixes is rounding alone."""
    monkeypatch.setattr(_universe, "_canonical", lambda parts: list(range(len(parts))))
    trees = [_tree(mlp, seed) for seed in range(3)]
    first = _match(mlp, trees, on)
    for order in ([1, 2, 0], [0, 2, 1], [2, 1, 0]):
        found = _match(mlp, [trees[k] for k in order], on)
        assert found.objective[-1] == pytest.approx(first.objective[-1], rel=1e-6)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            same_permutations(
                found.pairwise(to=order.index(i), model=order.index(j)),
                first.pairwise(to=i, model=j),
            )


def test_moments_in_another_order_give_the_same():
    first = align.match_universe_moments(_net(mlp), _moments(mlp, (0, 1, 2)))
    found = align.match_universe_moments(_net(mlp), _moments(mlp, (2, 0, 1)))
    for place, k in enumerate((2, 0, 1)):
        same_permutations(found.permutations[place], first.permutations[k])


@pytest.mark.parametrize("on", ["activations", "weights"])
def test_cycles_close(on):
    found = _match(resnet, [_tree(resnet, seed) for seed in range(3)], on)
    around = compose(found.pairwise(to=0, model=1), found.pairwise(to=2, model=0))
    same_permutations(around, found.pairwise(to=2, model=1))
    for group, back in compose(around, found.pairwise(to=1, model=2)).items():
        np.testing.assert_array_equal(back, np.arange(_net(resnet).spec.sizes[group]))


# --------------------------------------------------------------------------------- the objective


@given(
    models=st.integers(2, 5),
    n=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    noise=st.sampled_from([0.1, 1.0, 3.0, 30.0]),
)
@settings(deadline=None, max_examples=60)
def test_nothing_found_is_below_a_star(models, n, seed, noise):
    objective = _cycles.Correlations(_blocks(models, n, seed, noise))
    starts = _starts(objective.blocks)
    found = _cycles.solve(objective, starts, max_steps=100)
    assert found.converged
    best = max(objective.value(start) for start in starts)
    assert found.history[-1] >= best - 1e-9 * objective.scale
    assert found.history == sorted(found.history)
    assert found.history[-1] == objective.value(found.permutations)
    # A local optimum: no model has a better permutation.
    for model in range(models):
        ((group, p),) = found.permutations.items()
        new = p.copy()
        new[model] = objective.respond(model, found.permutations)[group]
        assert objective.value({group: new}) <= found.history[-1] + 1e-9 * objective.scale


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_activations_match_at_least_as_well_as_to_any_one(apply_fn):
    net, moments = _net(apply_fn), _moments(apply_fn, (0, 1, 2))
    found = align.match_universe_moments(net, moments)
    total = _universe._correlations(net, moments)

    def value(permutations):
        return sum(
            blocks[i, j][permutations[i][group], permutations[j][group]].sum()
            for group, blocks in total.items()
            for i, j in ((0, 1), (0, 2), (1, 2))
        )

    assert value(found.permutations) == pytest.approx(found.objective[-1], rel=1e-12)
    for to in range(3):
        star = [
            align.match_moments(net, moments, to=to, model=k).permutations
            for k in (0, 1, 2)
            if k != to
        ]
        star.insert(to, _universe.in_place(net))
        assert found.objective[-1] >= value(star) * (1 - 1e-9)


@pytest.mark.parametrize("apply_fn", [*FUNCTIONS, linear_residual])
def test_weights_match_at_least_as_well_as_to_any_one(apply_fn):
    net, trees = _net(apply_fn), [_tree(apply_fn, seed) for seed in range(3)]
    found = align.match_universe(net, trees, key=KEY)
    touched = {axis.path for axes in net.spec.groups.values() for axis in axes} - net.statistics

    def value(aligned):
        return sum(
            np.vdot(np.float64(aligned[i][path]), np.float64(aligned[j][path]))
            for path in touched
            for i, j in ((0, 1), (0, 2), (1, 2))
        )

    assert value(found.apply(net, trees)) == pytest.approx(found.objective[-1], rel=1e-9)
    assert list(found.objective) == sorted(found.objective) and found.converged
    for to in range(3):
        star = [
            net.spec.permute(
                trees[k], align.match_weights(net, trees[to], trees[k], key=KEY).permutations
            )
            for k in range(3)
        ]
        star[to] = trees[to]
        assert found.objective[-1] >= value(star) - 1e-9 * abs(value(star))


def test_tiny_problems_are_mostly_solved_to_optimality():
    """Against all permutations of three models of four units."""
    every = np.array(list(itertools.permutations(range(4))))
    solved = 0
    for seed in range(20):
        objective = _cycles.Correlations(_blocks(3, 4, seed, 2.0))
        found = _cycles.solve(objective, _starts(objective.blocks), max_steps=100).history[-1]
        best = max(
            objective.value({"g": np.stack([np.arange(4), p, q])}) for p in every for q in every
        )
        assert found <= best + 1e-12
        solved += found > best - 1e-9
    assert solved >= 16


@pytest.mark.parametrize("apply_fn", [None, *FUNCTIONS, linear_residual])
def test_gradients_and_polynomials_are_those_of_the_objective(apply_fn):
    """The relaxed F at permutations is F; on lines it is the polynomial; its slope the gradient."""
    rng = np.random.default_rng(0)
    if apply_fn is None:
        sizes, objective = {"g": 6}, _cycles.Correlations(_blocks(3, 6, 0, 1.0))
    else:
        net = _net(apply_fn)
        sizes, trees = net.spec.sizes, [_tree(apply_fn, seed) for seed in range(3)]
        counted = _universe.counted_axes(net.spec, trees[0], net.statistics)
        leaves = [{p: np.float64(v[p]) for p in counted} for v in trees]
        objective = _cycles.Weights(net.spec, leaves, counted, 0)
    ends = [
        {g: np.stack([rng.permutation(n) for _ in range(3)]) for g, n in sizes.items()}
        for _ in range(2)
    ]
    a, b = ({g: np.eye(p.shape[1])[p] for g, p in end.items()} for end in ends)
    step = {g: b[g] - a[g] for g in a}
    curve = np.polynomial.Polynomial(objective.along(a, ends[1]))
    scale = objective.scale
    assert curve(0.0) == pytest.approx(objective.value(ends[0]), abs=1e-12 * scale)
    assert curve(1.0) == pytest.approx(objective.value(ends[1]), abs=1e-12 * scale)
    middle = {g: a[g] + 0.3 * step[g] for g in a}
    slope = sum(np.vdot(objective.gradient(middle)[g], step[g]) for g in a)
    assert slope == pytest.approx(curve.deriv()(0.3), abs=1e-12 * scale)
    rest = np.polynomial.Polynomial(objective.along(middle, ends[1]))
    for t in (0.0, 0.5, 1.0):
        assert rest(t) == pytest.approx(curve(0.3 + 0.7 * t), abs=1e-12 * scale)


def test_the_relaxation_finds_better_permutations_than_its_start():
    objective = _cycles.Correlations(_blocks(4, 20, 0, 3.0))
    start = max(_starts(objective.blocks), key=objective.value)
    relaxed = objective.value(_cycles.relax(objective, start, max_steps=100))
    assert relaxed > 1.1 * objective.value(start)


def test_synchronisation_recovers_what_all_pairs_agree_on():
    rng = np.random.default_rng(0)
    p = np.stack([rng.permutation(7) for _ in range(4)])
    places = np.eye(7)[p]
    blocks = np.einsum("iua,jub->ijab", places, places)
    for to, found in enumerate(_cycles.synchronised(blocks)):
        for k in range(4):
            np.testing.assert_array_equal(found[k], p[k][np.argsort(p[to])])


# -------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("models", [3, 4])
@pytest.mark.parametrize("on", ["activations", "weights"])
@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_permuted_copies_are_put_together(apply_fn, on, models):
    net, tree = _net(apply_fn), _tree(apply_fn, 0)
    wanted = [random_permutations(net.spec, 50 + k) for k in range(models)]
    copies = [net.spec.permute(tree, p) for p in wanted]
    found = _match(apply_fn, copies, on)
    for i, j in itertools.permutations(range(models), 2):
        same_permutations(found.pairwise(to=i, model=j), compose(invert(wanted[j]), wanted[i]))
    first, *rest = found.apply(net, copies)
    for other in rest:
        jax.tree.map(np.testing.assert_array_equal, other, first)
    # Merging one network's copies gives that network.
    x = _data(apply_fn)[0]
    np.testing.assert_allclose(
        net.run(merge.interpolate([first, *rest]), x), net.run(tree, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("on", ["activations", "weights"])
def test_one_network_stays_as_it_is(on):
    tree = _tree(convnet, 0)
    found = _match(convnet, [tree] * 3, on)
    for permutations in found.permutations:
        for p in permutations.values():
            np.testing.assert_array_equal(p, np.arange(len(p)))


@pytest.mark.parametrize("apply_fn", FUNCTIONS)
def test_two_models_are_the_assignment(apply_fn):
    net, trees = _net(apply_fn), [_tree(apply_fn, 0), _tree(apply_fn, 1)]
    found = align.match_universe(net, trees, _data(apply_fn))
    wanted = align.match_activations(net, *trees, _data(apply_fn))
    same_permutations(found.pairwise(to=0, model=1), wanted.permutations)
    assert found.objective[-1] == pytest.approx(wanted.objective[0], rel=1e-6)


def test_units_that_never_vary_stay_in_place():
    tree = _tree(mlp, 0)
    tree["w0"][:, :3] = 0
    tree["b0"][:3] = [-1, -2, 0.3]
    found = align.match_universe(_net(mlp), [tree] * 3, _data(mlp))
    assert all((p["w0"] == np.arange(9)).all() for p in found.permutations)


# ------------------------------------------------------------------------------------ the record


def test_what_is_returned():
    net, trees = _net(resnet), [_tree(resnet, seed) for seed in range(3)]
    found = align.match_universe(net, trees, _data(resnet))
    assert isinstance(found, align.Universe) and len(found.permutations) == 3
    for permutations in found.permutations:
        assert {g: len(p) for g, p in permutations.items()} == dict(net.spec.sizes)
        assert {p.dtype for p in permutations.values()} == {np.dtype(np.int32)}
    assert "Universe(3 models, 3 groups, objective" in repr(found)
    start = align.match_universe(net, trees, _data(resnet), max_steps=0)
    assert not start.converged and len(start.objective) == 1
    assert start.objective[-1] <= found.objective[-1]


def test_a_network_without_taps_reads_no_data():
    v = {"w": np.eye(3, dtype=np.float32)}
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]), v, np.ones((4, 3), np.float32))
    found = align.match_universe(net, [v, v, v], [])
    assert found.permutations == ({}, {}, {}) and found.converged
    assert align.match_universe(net, [v, v, v], key=KEY).permutations == ({}, {}, {})


def test_moments_without_a_tap_move_nothing():
    def fixed(v, x):  # what a softmax reads is no group
        return jax.nn.softmax(x @ v["w"])

    trees = [{"w": np.float32(np.random.default_rng(k).normal(size=(3, 2)))} for k in range(3)]
    x = np.float32(np.random.default_rng(9).normal(size=(5, 3)))
    net = vfjax.trace(fixed, trees[0], x)
    assert not net.taps
    moments = stats.moments(net, trees, [x], sites=["input"])
    found = align.match_universe_moments(net, moments)
    assert found.permutations == ({}, {}, {}) and found.objective == (0.0,) and found.converged
    for of in (align.zip_moments, align.cca_moments, align.transport_moments):
        assert of(net, moments).maps == ({}, {}, {})
    assert align.match_moments(net, moments).permutations == {}


def test_errors():
    net, trees = _net(mlp), [_tree(mlp, seed) for seed in range(3)]
    with pytest.raises(ValueError, match="trees must be two or more, got 1"):
        align.match_universe(net, trees[:1], _data(mlp))
    with pytest.raises(ValueError, match="needs a random `key`"):
        align.match_universe(net, trees)
    with pytest.raises(TypeError, match="`key` must be a random key"):
        align.match_universe(net, trees, key=0)
    with pytest.raises(ValueError, match="`max_steps` must be a whole number >= 0, got -1"):
        align.match_universe(net, trees, _data(mlp), max_steps=-1)
    with pytest.raises(ValueError, match="no batches"):
        align.match_universe(net, trees, [])
    with pytest.raises(TypeError, match="net must be a Network"):
        align.match_universe(mlp, trees, _data(mlp))
    with pytest.raises(ValueError, match="NaN"):
        bad = {p: v * np.float32(np.nan) for p, v in trees[1].items()}
        align.match_universe(net, [trees[0], bad], _data(mlp))
    bare = stats.moments(net, trees, _data(mlp), sites="taps")
    with pytest.raises(ValueError, match="no covariance between models 0 and 1 at the tap"):
        align.match_universe_moments(net, bare)
    alone = stats.moments(net, trees[:1], _data(mlp), sites="taps", covariance=True)
    with pytest.raises(ValueError, match="two models or more, got 1"):
        align.match_universe_moments(net, alone)
    found = align.match_universe(net, trees, _data(mlp))
    with pytest.raises(ValueError, match="must be the 3 models matched, got 2"):
        found.apply(net, trees[:2])
    with pytest.raises(ValueError, match=r"`model` must be in 0\.\.2, got 3"):
        found.pairwise(model=3)
