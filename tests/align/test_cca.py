"""Alignment by canonical correlations: what the maps are, and what they do to networks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA

import vfjax
from vfjax import align, merge, stats

SHAPES = {"a": (5, 4), "b": (4,), "c": (4, 3), "d": (3, 3)}


def apply_fn(v, x):
    hidden = jax.nn.relu(x @ v["a"] + v["b"][None])
    return jax.nn.relu(hidden @ v["c"]) @ v["d"]


def linear_fn(v, x):
    return (x @ v["a"] + v["b"][None]) @ v["c"] @ v["d"]


def tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def net():
    return vfjax.trace(apply_fn, tree(0), np.ones((4, 5), np.float32))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(9)
    return [np.float32(rng.normal(size=(n, 5))) for n in (40, 23)]


@functools.cache
def hidden_layer(n):
    """A network with one hidden group, and the name of its tap."""
    v = {"c": np.ones((2, n), np.float32), "d": np.ones((n, 1), np.float32)}
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["c"]) @ v["d"], v, np.ones((1, 2), np.float32))
    (site,) = stats.resolve_sites(net, "taps")
    return net, site


def measured(features):
    """A network of one hidden group, and moments that say its features are those given.

    `features`: one `[N, n]` per model.
    """
    n = features[0].shape[1]
    net, site = hidden_layer(n)
    whole = np.concatenate([f - f.mean(0) for f in features], axis=1)
    models = len(features)
    block = (whole.T @ whole / len(whole)).reshape(models, n, models, n).transpose(0, 2, 1, 3)
    return net, stats.Moments(
        {site: float(len(whole))},
        {site: np.stack([f.mean(0) for f in features])},
        {site: np.einsum("kkii->ki", block)},
        {site: block},
    )


def root(matrix, power):
    values, basis = np.linalg.eigh(matrix)
    return (basis * values**power) @ basis.T


def definition(block, ridge):
    """The formula as the paper has it, in float64: `T` and the canonical correlations."""
    n = len(block[0, 0])
    sxx, syy = (block[i, i] + ridge[i] * np.eye(n) for i in (0, 1))
    u, s, vt = np.linalg.svd(root(sxx, -0.5) @ block[0, 1] @ root(syy, -0.5))
    return root(sxx, 0.5) @ u @ vt @ root(syy, -0.5), s


def mixed(seed, models=2, samples=200, n=6, noise=0.5):
    """Correlated features of several models, of full rank."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(samples, n))
    return [
        np.maximum(common @ rng.normal(size=(n, n)) + noise * rng.normal(size=(samples, n)), 0)
        for _ in range(models)
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(2, 3), st.integers(2, 7), st.booleans())
def test_maps_are_those_of_the_definition(seed, models, n, relative):
    net, moments = measured(mixed(seed, models, n=n))
    (block,) = moments.covariance.values()
    found = align.cca_moments(net, moments, regularization=0.1, relative=relative)
    correlations = align.canonical_correlations(
        net, moments, regularization=0.1, relative=relative
    )["c"]
    assert not found.maps[0] and correlations.shape == (models - 1, n)
    for k in range(1, models):
        pair = block[np.ix_([0, k], [0, k])]
        ridge = [0.1 * np.trace(pair[i, i]) / n if relative else 0.1 for i in (0, 1)]
        expected, s = definition(pair, ridge)
        to, back = found.maps[k]["c"]
        scale = abs(expected).max()
        np.testing.assert_allclose(to, expected, rtol=1e-7, atol=1e-8 * scale)
        np.testing.assert_allclose(to @ back, np.eye(n), atol=1e-9)
        np.testing.assert_allclose(correlations[k - 1], s, rtol=1e-9)
        # The polar property: of all maps to these covariances, the one closest when whitened.
        sxx = pair[0, 0] + ridge[0] * np.eye(n)
        syy = pair[1, 1] + ridge[1] * np.eye(n)
        np.testing.assert_allclose(to @ syy @ to.T, sxx, atol=1e-9 * abs(sxx).max())
        whitened = root(sxx, -0.5) @ pair[0, 1] @ to.T @ root(sxx, -0.5)
        np.testing.assert_allclose(whitened, whitened.T, atol=1e-9)
        assert np.linalg.eigvalsh(whitened).min() > 0


def test_correlations_are_those_of_scikit_learn():
    x, y = mixed(3, n=3, samples=400)
    net, moments = measured([x, y])
    found = align.canonical_correlations(net, moments, regularization=0)["c"][0]
    model = CCA(n_components=3, scale=False, max_iter=5000, tol=1e-12)
    one, other = model.fit(x, y).transform(x, y)
    expected = [np.corrcoef(one[:, i], other[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["full", "dead", "twin", "few", "constant"]))
def test_a_model_mapped_onto_itself_stays(seed, kind):
    (x,) = mixed(seed, 1)
    if kind == "dead":
        x[:, [1, 4]] = 0
    if kind == "twin":
        x[:, 2] = 3 * x[:, 0]
        x[:, 5] = x[:, 0]
    if kind == "few":
        x = x[:4]
    if kind == "constant":
        x[:] = 1
    for regularization in (0, 1e-2, 10):
        net, moments = measured([x, x])
        to, back = align.cca_moments(net, moments, regularization=regularization).maps[1]["c"]
        np.testing.assert_allclose(to, np.eye(6), atol=1e-6)
        np.testing.assert_allclose(back, np.eye(6), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["full", "dead", "twin", "both"]))
def test_permuted_copies_are_mapped_by_the_permutation(seed, kind):
    (x,) = mixed(seed, 1)
    if kind in ("dead", "both"):
        x[:, [1, 4]] = 0
    if kind in ("twin", "both"):
        x[:, 2] = x[:, 0]
    order = np.random.default_rng(seed).permutation(6)
    net, moments = measured([x, x[:, order]])
    to, back = align.cca_moments(net, moments).maps[1]["c"]
    # Among dead units, and among twins, any order will do, but it is one.
    np.testing.assert_allclose(to @ to.T, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(to, to.round(), atol=1e-6)
    np.testing.assert_allclose(back, to.T, atol=1e-6)
    np.testing.assert_allclose(x[:, order] @ to.T, x, atol=1e-6)
    if kind == "full":
        np.testing.assert_array_equal(to.round(), np.eye(6)[order].T)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(-3, 3))
def test_a_relative_ridge_is_blind_to_scale(seed, exponent):
    x, y = mixed(seed)
    scale = 10**exponent
    found = [
        align.cca_moments(*measured([a, b])).maps[1]["c"][0]
        for a, b in ((x, y), (scale * x, y), (x, scale * y), (scale * x, scale * y))
    ]
    size = abs(found[0]).max()
    np.testing.assert_allclose(found[1], found[0] * scale, atol=1e-6 * size * scale)
    np.testing.assert_allclose(found[2], found[0] / scale, atol=1e-6 * size / scale)
    np.testing.assert_allclose(found[3], found[0], atol=1e-6 * size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("measured_in", [np.float32, np.float64])
@pytest.mark.parametrize("regularization", [0, 1e-4, 1e-1])
def test_maps_are_bounded_at_rank_deficiency(dtype, measured_in, regularization):
    """Dead, duplicate and nearly duplicate units, not the same in both models; few samples."""
    x, y = mixed(5, n=30, samples=20)
    x[:, :4], y[:, 8:11] = 0, 0
    x[:, 7], y[:, 3] = x[:, 6], y[:, 2] * (1 + 1e-7)
    net, moments = measured([x, y])
    moments = jax.tree.map(lambda leaf: np.asarray(leaf, measured_in), moments)
    found = align.cca_moments(net, moments, regularization=regularization, dtype=dtype)
    to, back = found.maps[1]["c"]
    assert to.dtype == back.dtype == dtype
    eps = max(np.finfo(dtype).eps, np.finfo(measured_in).eps)
    (block,) = moments.covariance.values()
    values = [np.linalg.eigvalsh(block[i, i].astype(float)) for i in (0, 1)]
    # What the docstring states, the rounding of the covariances being the least of all ridges.
    ridge = [max(30 * eps * v.max(), regularization * v.mean()) for v in values]
    large = [v.max() * 1.1 + r for v, r in zip(values, ridge, strict=True)]
    assert np.linalg.norm(to, 2) <= np.sqrt(large[0] / ridge[1])
    assert np.linalg.norm(back, 2) <= np.sqrt(large[1] / ridge[0])
    if regularization:
        np.testing.assert_allclose(to @ back, np.eye(30), atol=1e3 * eps / regularization)


def test_dead_units_stay_dead():
    """What no model varies in is placed, unit by unit, and neither turned around nor blown up."""
    x, y = mixed(7)
    x[:, [0, 3]], y[:, [2, 3]] = 0, 0
    net, moments = measured([x, y])
    to, back = align.cca_moments(net, moments).maps[1]["c"]
    live = [1, 2, 4, 5], [0, 1, 4, 5]
    for matrix, rows, columns in ((to, *live), (back, *live[::-1])):
        dead = [np.setdiff1d(np.arange(6), some) for some in (rows, columns)]
        np.testing.assert_allclose(matrix[np.ix_(dead[0], columns)], 0, atol=1e-6)
        np.testing.assert_allclose(matrix[np.ix_(rows, dead[1])], 0, atol=1e-6)
        block = matrix[np.ix_(*dead)]
        assert (block > -1e-6).all() and 0.1 < abs(np.linalg.det(block)) < 10
    assert to[3, 3] > 0.1


def test_a_linear_network_is_recovered_from_any_basis(data):
    """Merged with itself in other coordinates, a linear network keeps its function."""
    shapes = {"a": (5, 4), "b": (4,), "c": (4, 3), "d": (3, 2)}
    first, x = tree(1, shapes), jnp.concatenate(data)
    net = vfjax.trace(linear_fn, first, x)
    rng = np.random.default_rng(2)
    basis = {g: rng.normal(size=(n, n)) + 2 * np.eye(n) for g, n in net.spec.sizes.items()}
    assert len(basis) == 2
    second = net.spec.apply(first, {g: (m, np.linalg.inv(m)) for g, m in basis.items()})
    np.testing.assert_allclose(net.run(second, x), net.run(first, x), atol=1e-4)
    # No ridge: these features are of full rank, and it would be another in each basis.
    found = align.cca(net, [first, second], data, regularization=0, dtype=np.float64)
    for group, matrix in basis.items():
        np.testing.assert_allclose(found.maps[1][group][1], matrix, atol=1e-3)
    merged = merge.interpolate(found.apply(net, [first, second]))
    np.testing.assert_allclose(net.run(merged, x), net.run(first, x), atol=1e-3)
    straight = merge.interpolate([first, second])
    assert abs(net.run(straight, x) - net.run(first, x)).max() > 1


@pytest.mark.parametrize("dtype", [None, np.float64])
def test_copies_of_a_network_merge_to_it(net, data, dtype):
    """Three copies in orders of their own: all are mapped back."""
    first, x = tree(0), jnp.concatenate(data)
    copies = [first]
    for seed in (1, 2):
        copies.append(net.spec.permute(first, net.spec.random(jax.random.key(seed))))
    found = align.cca(net, copies, data, dtype=dtype)
    mapped = found.apply(net, copies)
    assert mapped[0]["a"] is first["a"] or np.array_equal(mapped[0]["a"], first["a"])
    for other in mapped:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other, first)
    merged = merge.interpolate(mapped)
    np.testing.assert_allclose(net.run(merged, x), apply_fn(first, x), atol=1e-3)
    same = align.cca(net, [first, first], data, dtype=dtype)
    for to, back in same.maps[1].values():
        np.testing.assert_allclose(to, np.eye(len(to)), atol=1e-5)
        np.testing.assert_allclose(back, np.eye(len(to)), atol=1e-5)


def test_taps_of_a_group_are_averaged(data):
    """A residual stream is seen where its layers write to it."""
    shapes = {"a": (5, 4), "b": (4, 4), "d": (4, 2)}

    def residual(v, x):
        stream = jax.nn.relu(x @ v["a"])
        return jax.nn.relu(stream + stream @ v["b"]) @ v["d"]

    trees = [tree(seed, shapes) for seed in (0, 1)]
    net = vfjax.trace(residual, trees[0], data[0])
    moments = stats.moments(net, trees, data, sites="taps", covariance=True)
    assert len(net.spec.sizes) == 1 and len(moments.covariance) == 2
    block = np.mean([np.asarray(c, float) for c in moments.covariance.values()], axis=0)
    found = align.cca(net, trees, data, regularization=0.1, relative=False, dtype=np.float64)
    ((to, _),) = found.maps[1].values()
    np.testing.assert_allclose(to, definition(block, [0.1, 0.1])[0], atol=1e-5)


def test_a_network_without_taps_stays(data):
    v = {"a": np.ones((5, 2), np.float32)}
    net = vfjax.trace(lambda v, x: x @ v["a"], v, data[0])
    found = align.cca(net, [v, v], data)
    assert [dict(m) for m in found.maps] == [{}, {}]


def test_errors(net, data):
    trees = [tree(0), tree(1)]
    with pytest.raises(ValueError, match="trees must be two or more, got 1"):
        align.cca(net, trees[:1], data)
    with pytest.raises(ValueError, match="regularization must be 0 or more and finite, got -1"):
        align.cca(net, trees, data, regularization=-1)
    with pytest.raises(ValueError, match="regularization must be 0 or more and finite, got 'x'"):
        align.cca(net, trees, data, regularization="x")
    with pytest.raises(TypeError, match="dtype must be np.float32 or np.float64, got int32"):
        align.cca(net, trees, data, dtype=np.int32)
    with pytest.raises(TypeError, match="net"):
        align.cca(apply_fn, trees, data)
    cross = stats.moments(net, trees, data, sites="taps", covariance="cross")
    with pytest.raises(ValueError, match="lacks some covariances at the tap"):
        align.cca_moments(net, cross)
    one = stats.moments(net, trees[:1], data, sites="taps", covariance=True)
    with pytest.raises(ValueError, match="moments must be of two models or more, got 1"):
        align.cca_moments(net, one)
