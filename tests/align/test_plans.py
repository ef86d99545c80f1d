"""Transport plans against their definition, and against POT and ott-jax (recorded results)."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment

from vfjax.align import _plans
from vfjax.align._plans import Problem, Solver, exact_plan, maps_of, shares_of, sinkhorn

HERE = pathlib.Path(__file__).parent.parent / "oracles"
RECORD = json.loads((HERE / "transport.json").read_text())
_spec = importlib.util.spec_from_file_location("closed_form", HERE / "closed_form.py")
closed_form = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(closed_form)


def problem(n, m, seed, equal=True):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 4)), rng.normal(size=(m, 4))
    cost = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(-1))
    if equal:
        return cost, np.full(n, 1 / n), np.full(m, 1 / m)
    shares = rng.uniform(0.2, 1, n), rng.uniform(0.2, 1, m)
    return cost, *(share / share.sum() for share in shares)


def recorded(entry):
    cost, rows, columns = closed_form.transport_problem(entry["n"], entry["m"])
    if entry["equal"]:
        rows, columns = (np.full(size, 1 / size) for size in cost.shape)
    return cost, rows, columns


def name(entry):
    return f"{entry['n']}x{entry['m']}{'' if entry['equal'] else ' unequal'}"


@pytest.mark.parametrize("entry", RECORD["problems"], ids=name)
def test_exact_cost_is_that_of_pot(entry):
    cost, rows, columns = recorded(entry)
    shares = (None, None) if entry["equal"] else (rows, columns)
    plan = exact_plan(cost, *shares)
    assert (plan * cost).sum() == pytest.approx(entry["exact"], rel=1e-9)


@pytest.mark.parametrize("entry", RECORD["problems"], ids=name)
def test_entropic_plans_are_those_of_pot_and_ott(entry):
    cost, rows, columns = recorded(entry)
    for part, plans in entry["entropic"].items():
        found = sinkhorn(cost, rows, columns, float(part), tolerance=1e-9)
        for library in ("pot", "ott"):
            np.testing.assert_allclose(found.plan, plans[library], atol=2e-8)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 1000), equal=st.booleans())
def test_exact_plans_keep_the_shares_and_are_the_programme_s_optimum(n, m, seed, equal):
    cost, rows, columns = problem(n, m, seed, equal)
    plan = exact_plan(cost, *((None, None) if equal else (rows, columns)))
    assert (plan >= 0).all()
    np.testing.assert_allclose(plan.sum(1), rows, rtol=1e-9)
    np.testing.assert_allclose(plan.sum(0), columns, rtol=1e-9)
    if equal:  # the same shares written out go to the linear programme
        programme = exact_plan(cost, rows, columns)
        assert (plan * cost).sum() == pytest.approx((programme * cost).sum(), rel=1e-9)
    # The dual: no prices of units below their costs are worth more.
    prices = np.random.default_rng(seed).uniform(size=m)
    worth = (cost - prices).min(1) @ rows + prices @ columns
    assert worth <= (plan * cost).sum() + 1e-9


def test_as_many_units_are_permuted():
    cost, rows, columns = problem(8, 8, 0)
    plan = exact_plan(cost)
    places = linear_sum_assignment(cost)
    assert (plan[places] == 1 / 8).all() and np.count_nonzero(plan) == 8
    for matrix in maps_of(plan):
        assert set(np.unique(matrix)) == {0, 1}
    np.testing.assert_array_equal(exact_plan(np.ones((5, 5))), np.eye(5) / 5)


def test_many_pieces_go_to_the_programme(monkeypatch):
    cost, *_ = problem(6, 9, 0)
    pieces = exact_plan(cost)
    monkeypatch.setattr(_plans, "_FEW", 17)
    monkeypatch.setattr(_plans, "_PIECES", 5)
    programme = exact_plan(cost)
    np.testing.assert_allclose(programme, pieces, atol=1e-12)
    monkeypatch.setattr(_plans, "_LARGEST", 53)
    with pytest.raises(ValueError, match=r"6 x 9, .* 53 are the limit: give regularization > 0"):
        exact_plan(cost)


@pytest.mark.parametrize(
    "shape, size", [((64, 63), None), ((32, 31), None), ((40, 24), 120), ((128, 96), 384)]
)
def test_the_faster_solver_is_taken(monkeypatch, shape, size):
    """Units are cut into pieces where that makes few of them."""
    calls, assign = [], _plans.assign

    def counted(gain):
        calls.append(len(gain))
        return assign(gain)

    monkeypatch.setattr(_plans, "assign", counted)
    cost, rows, columns = problem(*shape, 0)
    plan = exact_plan(cost)
    assert calls == ([] if size is None else [size])
    programme = exact_plan(cost, rows, columns)
    assert (plan * cost).sum() == pytest.approx((programme * cost).sum(), rel=1e-9)


@pytest.mark.computes
@settings(deadline=None, max_examples=20)
@given(
    shape=st.sampled_from([(5, 5), (4, 7), (8, 3), (30, 24)]),
    seed=st.integers(0, 1000),
    equal=st.booleans(),
    part=st.sampled_from([1.0, 0.1, 0.01, 0.001, 1e-4]),
    tolerance=st.sampled_from([1e-4, 1e-6]),
)
def test_entropic_plans_keep_the_shares(shape, seed, equal, part, tolerance):
    """However small the regularization is: none is cheaper than the exact plan, then."""
    cost, rows, columns = problem(*shape, seed, equal)
    found = sinkhorn(cost, rows, columns, part, tolerance=tolerance, max_iterations=10**6)
    np.testing.assert_allclose(found.plan.sum(0), columns, rtol=1e-9)
    off = np.abs(found.plan.sum(1) - rows).sum()
    assert off <= tolerance and found.error == pytest.approx(off, abs=1e-12)
    exact = (exact_plan(cost, rows, columns) * cost).sum()
    assert (found.plan * cost).sum() >= exact - tolerance * cost.max()


@pytest.mark.parametrize("shape", [(6, 6), (4, 6)])
def test_entropic_costs_fall_to_the_exact_one(shape):
    cost, rows, columns = problem(*shape, 3)
    exact = (exact_plan(cost) * cost).sum()
    costs = [
        (sinkhorn(cost, rows, columns, part, tolerance=1e-9).plan * cost).sum()
        for part in (1.0, 0.1, 0.01)
    ]
    assert costs[0] > costs[1] > costs[2] > exact * (1 - 1e-9)
    assert costs[2] == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("part", [1e-3, 1e-6])
def test_plans_do_not_depend_on_when_scales_are_absorbed(part, monkeypatch):
    """Units of very unequal shares, at costs that differ by up to a million regularizations."""
    rng = np.random.default_rng(0)
    cost = rng.uniform(size=(12, 9)) ** 8
    rows, columns = (np.exp(rng.uniform(-6, 0, size=size)) for size in cost.shape)
    rows, columns = rows / rows.sum(), columns / columns.sum()
    options = {"tolerance": 1e-8, "max_iterations": 10**5}
    found = sinkhorn(cost, rows, columns, part, **options)
    assert found.error <= 1e-8
    exact = (exact_plan(cost, rows, columns) * cost).sum()
    assert (found.plan * cost).sum() == pytest.approx(exact, abs=5 * part * cost.mean())
    monkeypatch.setattr(_plans, "_EXTREME", 2.0)
    again = sinkhorn(cost, rows, columns, part, **options)
    assert again.iterations == found.iterations
    np.testing.assert_allclose(again.plan, found.plan, rtol=1e-6, atol=1e-12)


def test_the_last_iteration_is_at_the_regularization_asked_for():
    """The error would else be that of a softer plan, which is met long before."""
    cost = np.arange(12.0).reshape(3, 4)
    share = np.full(3, 1 / 3), np.full(4, 1 / 4)
    for steps in (1, 3):
        found = sinkhorn(cost + np.eye(3, 4), *share, 0.01, max_iterations=steps)
        expected = sinkhorn(cost + np.eye(3, 4), *share, 0.01, tolerance=1e-9)
        close = np.abs(found.plan - expected.plan).sum() < 0.05
        assert close or found.error > 1e-4


def test_the_regularization_is_relative():
    cost, rows, columns = problem(5, 6, 0)
    plans = [sinkhorn(cost * scale, rows, columns, 0.1).plan for scale in (1, 1e6, 1e-6)]
    for plan in plans[1:]:
        np.testing.assert_allclose(plan, plans[0], rtol=1e-9)
    zero = sinkhorn(np.zeros((2, 3)), np.full(2, 1 / 2), np.full(3, 1 / 3), 0.1)
    np.testing.assert_allclose(zero.plan, 1 / 6, rtol=1e-6)


def test_what_does_not_converge_is_told():
    problems = {(1, f"g{k}"): Problem(problem(6, 5 + k, k)[0]) for k in range(3)}
    with pytest.warns(UserWarning, match=r"in 3 iterations for 3 of 3 plans; .* of trees\[1\]"):
        Solver(0.01, max_iterations=3).plans(problems)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans = Solver(0.01).plans(problems)
    assert list(plans) == list(problems)


@pytest.mark.parametrize("part", [0.1, 0.01, 0.001, 1e-4])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_what_is_not_told_has_converged(part, tolerance):
    cost, rows, _ = problem(20, 20, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = Solver(part, tolerance, 2000).plans({(1, "h"): Problem(cost)})[1, "h"]
    off = np.abs(plan.sum(1) - rows).sum()
    assert (off > tolerance) == bool(told)
    if told:
        assert "above the tolerance" in str(told[0].message)


def test_maps_have_rows_that_sum_to_one():
    _, rows, columns = problem(5, 7, 0, equal=False)
    plan = exact_plan(problem(5, 7, 0)[0], rows, columns)
    merge, unmerge = maps_of(plan)
    assert merge.shape == (7, 5) and unmerge.shape == (5, 7) and merge.dtype == np.float32
    for matrix in (merge, unmerge):
        np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(merge * columns[:, None], (unmerge * rows[:, None]).T, atol=1e-7)


def test_shares():
    assert shares_of(np.ones(3), "uniform") is None
    np.testing.assert_allclose(shares_of(np.array([1.0, 3.0]), "l2"), [0.25, 0.75])
    np.testing.assert_allclose(shares_of(np.log([1.0, 3.0]), "softmax"), [0.25, 0.75])
    least = shares_of(np.array([0.0, 2.0]), "l1")
    np.testing.assert_allclose(least, [1e-3 / (2 + 1e-3), 2 / (2 + 1e-3)])
    assert shares_of(np.zeros(2), "l1") is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"regularization": -1.0}, "regularization must be 0"),
        ({"regularization": np.nan}, "regularization must be 0"),
        ({"tolerance": 0.0}, "tolerance must be a positive"),
        ({"max_iterations": 0}, "max_iterations must be a whole number of 1 or more, got 0"),
        ({"max_iterations": 2.5}, "max_iterations must be a whole number of 1 or more, got 2.5"),
        ({"regularization": "x"}, "regularization must be 0 .* got 'x'"),
        ({"regularization": 1e-12}, "a number from 1e-10 on, such as 0.01, got 1e-12"),
        ({"tolerance": None}, "tolerance must be a positive number, got None"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Solver(**options)
    with pytest.raises(ValueError, match="the cost holds 1 NaN or infinite"):
        exact_plan(np.array([[np.nan, 1.0]]))
