"""Tests of upper-bound sequences, resampling, and variance collapse."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

import vfjax
from vfjax import diagnose
from vfjax.diagnose import Features, FeatureSite

SEQUENCES = hnp.arrays(
    np.float64, st.integers(1, 9), elements=st.floats(0, 1e3, allow_subnormal=False)
)
SETTINGS = hypothesis.settings(max_examples=60, deadline=None)

# One rounding per step of the recursion.
RTOL = 1e-12


def record(features, references=None, *, main=None, depth=None, size=1):
    """A record with the given features `[K, L]`, and variances that are their squares."""
    features = np.asarray(features, np.float32)
    length = features.shape[1]
    main = [True] * length if main is None else main
    depth = range(1, length + 1) if depth is None else depth
    names = [f"s{k}" for k in range(length)]

    def made(values, others):
        by_site = {name: jnp.asarray(v) for name, v in zip(names, values.T, strict=True)}
        zero = {name: jnp.zeros(len(values)) for name in names}
        fields = dict.fromkeys(("feature_std", "offset", "mean", "std", "dead"), zero)
        fields |= {"feature": by_site, "variance": {k: v**2 for k, v in by_site.items()}}
        sites = tuple(
            FeatureSite(n, n, d, m, size) for n, d, m in zip(names, depth, main, strict=True)
        )
        count = 0 if others is None else others.models
        shares = ((1 / count,) * count,) * len(values) if count else ()
        return Features(**fields, references=others, sites=sites, depth=max(depth), shares=shares)

    others = None if references is None else made(np.asarray(references, np.float32), None)
    return made(features, others)


@SETTINGS
@hypothesis.given(SEQUENCES)
def test_the_tight_bound_is_the_least_that_does_not_rise(values):
    bound = diagnose.upper_bound(values)
    assert (bound >= values).all() and (np.diff(bound) <= 0).all()
    # Wherever it is above the values, it only repeats what follows.
    assert bound[-1] == values[-1]
    assert all(bound[k] in (values[k], bound[k + 1]) for k in range(len(values) - 1))
    np.testing.assert_array_equal(bound, [values[k:].max() for k in range(len(values))])


@SETTINGS
@hypothesis.given(SEQUENCES, st.floats(1, 3), st.sampled_from(["text", "notebook"]))
def test_the_smoothed_bound_is_the_recursion(values, gamma, index):
    """In the text's own form, with its l from 1."""
    length, eps = len(values), {}
    eps[length] = values[length - 1]
    for level in range(length - 1, 0, -1):
        below = length + (1 if index == "text" else 2) - level
        after = eps[level + 1]
        eps[level] = max(gamma * after + (1 - gamma) * (1 - 1 / below) * after, values[level - 1])
    wanted = [eps[level] for level in range(1, length + 1)]
    found = diagnose.upper_bound(values, gamma=gamma, index=index)
    np.testing.assert_allclose(found, wanted, rtol=RTOL, atol=1e-12)
    assert (found >= diagnose.upper_bound(values)).all()


def test_factors_of_the_text_and_of_the_notebook():
    last = [0.0, 0.0, 0.0, 1.0]
    text = diagnose.upper_bound(last, gamma=1.4)
    np.testing.assert_allclose(text[:-1] / text[1:], [1.1, 1 + 0.4 / 3, 1.2], rtol=RTOL)
    notebook = diagnose.upper_bound(last, gamma=1.4, index="notebook")
    np.testing.assert_allclose(notebook[:-1] / notebook[1:], [1.08, 1.1, 1 + 0.4 / 3], rtol=RTOL)


def test_many_sequences_at_once():
    values = np.random.default_rng(0).uniform(size=(2, 3, 6))
    for gamma in (1.0, 1.4):
        together = diagnose.upper_bound(values, gamma=gamma)
        rows = [[diagnose.upper_bound(row, gamma=gamma) for row in block] for block in values]
        np.testing.assert_array_equal(together, rows)
    rows = [[diagnose.resample(row, 7) for row in block] for block in values]
    np.testing.assert_array_equal(diagnose.resample(values, 7), rows)


@SETTINGS
@hypothesis.given(SEQUENCES, st.integers(1, 25))
def test_resampling_interpolates_by_relative_depth(values, points):
    found = diagnose.resample(values, points)
    length = len(values)
    assert found.shape == (points,) and found[-1] == values[-1]
    for k in range(1, points + 1):
        place = k * length / points  # in layers
        low = int(np.clip(np.floor(place), 1, length))
        high, part = min(low + 1, length), max(place - low, 0)
        wanted = values[low - 1] * (1 - part) + values[high - 1] * part
        np.testing.assert_allclose(found[k - 1], wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(diagnose.resample(values, length), values)


def test_a_bound_sequence_is_normalised_by_the_references():
    found = record([[4.0, 1.0, 2.0], [2.0, 2.0, 2.0]], [[1.0, 1.0, 3.0], [3.0, 3.0, 5.0]])
    bound = diagnose.bound_sequence(found)
    assert bound.sites == ("s0", "s1", "s2") and bound.depth.tolist() == [1, 2, 3]
    np.testing.assert_allclose(bound.relative, [[2, 0.5, 0.5], [1, 1, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(bound.bound, diagnose.upper_bound(bound.relative))
    smooth = diagnose.bound_sequence(found, gamma=1.4, index="notebook")
    wanted = diagnose.upper_bound(bound.relative, gamma=1.4, index="notebook")
    np.testing.assert_array_equal(smooth.bound, wanted)
    np.testing.assert_array_equal(bound.resampled(5), diagnose.resample(bound.bound, 5))


def test_branches_of_one_depth_are_one_entry():
    """As `a -> {q, k, u} -> o`."""
    values = [[1.0, 0.2, 0.25, 0.1, 0.25], [0.1, 0.5, 0.2, 0.3, 0.1]]
    found = record(values, [[1.0] * 5], depth=[1, 2, 2, 2, 3])
    for gamma in (1.0, 1.4):
        bound = diagnose.bound_sequence(found, gamma=gamma)
        levels = [[1, 0.25, 0.25], [0.1, 0.5, 0.1]]
        wanted = diagnose.upper_bound(np.float32(levels), gamma=gamma)
        np.testing.assert_allclose(bound.bound, wanted[:, [0, 1, 1, 1, 2]], rtol=1e-6)
        np.testing.assert_array_equal(
            bound.resampled(6), diagnose.resample(bound.bound[:, [0, 1, 4]], 6)
        )
    tight = diagnose.bound_sequence(found)
    np.testing.assert_allclose(tight.resampled(6)[0], [1, 1, 0.625, 0.25, 0.25, 0.25])


def test_the_output_follows_the_last_layer():
    """What is added behind it is an entry of its own."""
    v = {"a": jnp.eye(3), "b": jnp.eye(3)}
    net = vfjax.trace(lambda v, x: x @ v["a"] + x @ v["a"] @ v["b"], v, jnp.ones((1, 3)))
    x = jax.random.normal(jax.random.key(0), (5, 3))
    weak = v | {"b": v["b"] / 4}
    found = diagnose.features(net, weak, [x], references=[v], sites=["a", "b", "output"])
    bound = diagnose.bound_sequence(found, sites=["a", "b", "output"])
    assert bound.depth.tolist() == [1, 2, 3]
    np.testing.assert_allclose(bound.bound, [[1, 0.625, 0.625]], rtol=1e-6)
    np.testing.assert_allclose(bound.resampled(3), [[1, 0.625, 0.625]], rtol=1e-6)
    alone = diagnose.bound_sequence(found, sites=["a", "output"])
    assert alone.depth.tolist() == [1, 2]


def test_sites_are_resampled_where_they_are():
    """Those of a residual network's REPAIR leave out the first and the last layer."""
    values = [[4.0, 3.0, 2.0, 1.0]]
    found = record(values, [[1.0] * 4])
    some = diagnose.bound_sequence(found, sites=["s1", "s2"])
    assert some.total == 4
    assert some.resampled(4).tolist() == [[3, 3, 2, 2]]
    chain = diagnose.bound_sequence(found)
    np.testing.assert_array_equal(chain.resampled(7), diagnose.resample(chain.bound, 7))


def test_a_network_bounds_itself_by_one():
    features = np.random.default_rng(0).uniform(1, 2, (1, 5))
    for references in (features, np.repeat(features, 2, axis=0)):
        bound = diagnose.bound_sequence(record(features, references)).bound
        np.testing.assert_array_equal(bound, np.ones((1, 5)))


def test_sites_of_a_sequence():
    """Shortcuts are left out, and sites go by depth."""
    values = [[1.0, 2.0, 3.0, 4.0]]
    found = record(values, values, main=[True, False, True, True], depth=[1, 3, 3, 2])
    assert diagnose.bound_sequence(found).sites == ("s0", "s3", "s2")
    assert diagnose.bound_sequence(found, sites=["s1", "s0"]).sites == ("s1", "s0")
    nothing = record(values, values, main=[False] * 4)
    with pytest.raises(ValueError, match="no sites"):
        diagnose.bound_sequence(nothing)
    with pytest.raises(ValueError, match="nothing was measured at 'x'"):
        diagnose.bound_sequence(found, sites=["x"])
    with pytest.raises(TypeError, match="the string 's0'"):
        diagnose.bound_sequence(found, sites="s0")


def test_variance_collapse_is_its_definition():
    found = record([[3.0, 1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]], size=10)
    collapse = diagnose.variance_collapse(found, eps=0.25)
    np.testing.assert_array_equal(collapse.variance, [[9, 1, 4, 0.25], [1, 1, 1, 1]])
    np.testing.assert_array_equal(collapse.sequence, [[9, 4, 4, 0.25], [1, 1, 1, 1]])
    assert collapse.final.tolist() == [0.25, 1] and collapse.collapsed.tolist() == [True, False]
    assert collapse.eps == 0.25
    trace = diagnose.variance_collapse(found, eps=0.25, reduction="trace")
    np.testing.assert_allclose(trace.variance, 10 * collapse.variance, rtol=1e-6)
    assert trace.collapsed.tolist() == [False, False]


def test_variance_collapse_relative_to_references():
    found = record([[1.0, 0.1]], [[1.0, 1.0], [1.0, 1.0]], size=10)
    for reduction in ("mean", "trace"):
        collapse = diagnose.variance_collapse(found, eps=0.1, relative=True, reduction=reduction)
        np.testing.assert_allclose(collapse.sequence, [[1, 0.01]], rtol=1e-6)
        assert collapse.collapsed.tolist() == [True]


def test_errors():
    found = record([[1.0, 2.0]])
    with pytest.raises(ValueError, match="no references to relate to"):
        diagnose.bound_sequence(found)
    with pytest.raises(ValueError, match=r"references' features are 0 at \['s1'\]"):
        diagnose.bound_sequence(record([[1.0, 2.0]], [[1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"references' variance is 0 at \['s1'\]"):
        diagnose.variance_collapse(record([[1.0, 2.0]], [[1.0, 0.0]]), eps=1, relative=True)
    with pytest.raises(TypeError, match="what vfjax.diagnose.features returns, got list"):
        diagnose.bound_sequence([1.0])
    with pytest.raises(ValueError, match="eps must be"):
        diagnose.variance_collapse(found, eps=-1)
    with pytest.raises(ValueError, match='"mean" or "trace", got \'max\''):
        diagnose.variance_collapse(found, eps=1, reduction="max")
    for bad in ([], 1.0, [1.0, np.nan], [-1.0]):
        with pytest.raises(ValueError, match="values must be"):
            diagnose.upper_bound(bad)
    with pytest.raises(ValueError, match="gamma must be a number of 1 or more"):
        diagnose.upper_bound([1.0], gamma=0.9)
    with pytest.raises(ValueError, match='"text" or "notebook"'):
        diagnose.upper_bound([1.0], index="code")
    for points in (0, 2.5, True):
        with pytest.raises(ValueError, match="points must be a positive whole number"):
            diagnose.resample([1.0], points)
    for at in ([0.5], [0.5, 0.5], [0.5, 1.5]):
        with pytest.raises(ValueError, match="at must hold 2 increasing relative depths"):
            diagnose.resample([1.0, 2.0], at=at)
