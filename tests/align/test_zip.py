"""ZipIt!'s matching: greedy grouping, its maps, and what they do to networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import vfjax
from helpers import correlations
from vfjax import align, merge, stats
from vfjax.align._grouping import greedy_groups


def apply_fn(v, x):
    hidden = jax.nn.relu(x @ v["a"] + v["b"][None])
    return jax.nn.relu(hidden @ v["c"]) @ v["d"]


SHAPES = {"a": (5, 8), "b": (8,), "c": (8, 6), "d": (6, 3)}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def net():
    return vfjax.trace(apply_fn, tree(0), np.ones((4, 5), np.float32))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(9)
    return [np.float32(rng.normal(size=(n, 5))) for n in (40, 23)]


def naive(correlation, sizes, count, alpha, beta):
    """The definition, looking at all pairs each time."""
    similarity, total = correlation.copy(), len(correlation)
    models = list(np.repeat(np.arange(len(sizes)), sizes))
    budgets = [int((total - count) * beta / len(sizes) + 1e-9)] * len(sizes)
    pool, labels = set(range(total)), np.arange(total)
    for _ in range(total - count):
        pairs = [
            (similarity[i, j], -i, -j)
            for i in pool
            for j in pool
            if i < j and (models[i] != models[j] or budgets[models[i]] > 0)
        ]
        _, i, j = max(pairs)
        i, j = -i, -j
        budgets[models[i]] -= models[i] == models[j]
        pool -= {j} if alpha else {i, j}
        least = np.minimum(similarity[i], similarity[j])
        similarity[i] = similarity[:, i] = np.where(least > 0, alpha * least, least)
        labels[labels == j] = i
    return np.unique(labels, return_inverse=True)[1]


@pytest.mark.parametrize("models, size", [(2, 9), (3, 5), (4, 4)])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_groups_are_those_of_the_definition(models, size, alpha, beta):
    values = np.random.default_rng(models).normal(size=(30, models * size))
    correlation = np.corrcoef(values.T)
    if alpha == 0 and models > 2:
        with pytest.raises(ValueError, match="no pair is left"):
            greedy_groups(correlation, [size] * models, size, alpha=alpha, beta=beta)
        return
    found = greedy_groups(correlation, [size] * models, size, alpha=alpha, beta=beta)
    np.testing.assert_array_equal(found, naive(correlation, [size] * models, size, alpha, beta))
    assert sorted(set(found)) == list(range(size))
    if beta == 0 and alpha == 0:
        assert (np.bincount(found[:size], minlength=size) == 1).all()


def test_chains_join_features_of_one_model_at_beta_zero():
    """A merged feature counts for its first part's model only."""
    similarity = np.eye(4)
    similarity[np.ix_([0, 2, 3], [0, 2, 3])] = 0.9
    found = greedy_groups(similarity, [2, 2], 2, alpha=0.5, beta=0)
    assert found.tolist() == [0, 1, 0, 0]


def test_without_repeats_and_within_no_model_it_is_a_permutation(net, data):
    trees = [tree(0), tree(1)]
    moments = stats.moments(net, trees, data, sites="taps", covariance=True)
    found = align.zip_moments(net, moments, alpha=0, beta=0)
    best = align.match_moments(net, moments)
    for group, (first, _) in found.maps[0].items():
        matrices = [first, found.maps[1][group][0]]
        for matrix in matrices:
            assert (np.sort(matrix, axis=1)[:, :-1] == 0).all() and (matrix.sum(0) == 1).all()
        places = [matrix.argmax(1) for matrix in matrices]
        similarity = correlations(moments, group)
        n = len(similarity) // 2
        mine = similarity[:n, n:][places[0], places[1]].sum()
        rows, columns = linear_sum_assignment(similarity[:n, n:], maximize=True)
        assert mine <= similarity[:n, n:][rows, columns].sum() + 1e-9
        np.testing.assert_array_equal(columns, best.permutations[group])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("alpha, beta", [(0.3, 0.125), (1.0, 1.0)])
def test_merging_undoes_unmerging(net, data, count, alpha, beta):
    """`mean_k M_k U_k` is the identity: U is the pseudo-inverse of the merge."""
    trees = [tree(seed) for seed in range(count)]
    found = align.zip_features(net, trees, data, alpha=alpha, beta=beta)
    for group, n in net.spec.sizes.items():
        pairs = [maps[group] for maps in found.maps]
        np.testing.assert_allclose(np.mean([m @ u for m, u in pairs], axis=0), np.eye(n), atol=1e-6)
        assert found.sizes[group].sum() == count * n
        whole = np.concatenate([m for m, _ in pairs], axis=1) / count
        np.testing.assert_allclose(
            np.linalg.pinv(whole), np.concatenate([u for _, u in pairs]), atol=1e-5
        )


@pytest.mark.parametrize("count", [2, 3])
def test_copies_are_put_together(net, data, count):
    """Permuted copies of a network zip to a network of the same function."""
    first = tree(0)
    copies = [first]
    for seed in range(1, count):
        copies.append(net.spec.permute(first, net.spec.random(jax.random.key(seed))))
    # Discounted, the third copy of a feature would come after pairs that are less alike.
    found = align.zip_features(net, copies, data, alpha=1, beta=0)
    merged = merge.interpolate(found.apply(net, copies))
    x = jnp.concatenate(data)
    np.testing.assert_allclose(net.run(merged, x), apply_fn(first, x), rtol=1e-4, atol=1e-4)


def test_redundant_features_merge_within_a_model(net, data):
    """Two features that are one leave their place to a feature of the other network."""
    trees = [tree(0), tree(1)]
    twin = trees[0]["a"].copy()
    twin[:, 1] = twin[:, 0]
    bias = trees[0]["b"].copy()
    bias[1] = bias[0]
    trees[0] = trees[0] | {"a": twin, "b": bias}
    found = align.zip_features(net, trees, data, alpha=0, beta=1)
    matrix = found.maps[0]["a"][0]
    assert (matrix[:, 0] == matrix[:, 1]).all() and (matrix[:, 0] > 0).sum() == 1
    assert "8 features of 16" not in repr(found) and "14 features of 28" in repr(found)


def test_errors(net, data):
    trees = [tree(0), tree(1)]
    with pytest.raises(ValueError, match="trees must be two or more, got 1"):
        align.zip_features(net, trees[:1], data)
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2"):
        align.zip_features(net, trees, data, alpha=2)
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got None"):
        align.zip_features(net, trees, data, alpha=None)
    with pytest.raises(TypeError, match=r"`key` must be a random key, .* got 3"):
        align.zip_features(net, trees, data, matcher="kmeans", key=3)
    with pytest.raises(ValueError, match="alpha must be positive for 3 models"):
        align.zip_features(net, [*trees, tree(2)], data, alpha=0)
    cross = stats.moments(net, trees, data, sites="taps", covariance="cross")
    with pytest.raises(ValueError, match="lacks some covariances at the tap"):
        align.zip_moments(net, cross)
    found = align.zip_features(net, trees, data)
    with pytest.raises(ValueError, match="must be the 2 models matched, got 1"):
        found.apply(net, trees[:1])
