"""Matchers that ZipIt!'s greedy one is compared with: what they find, and in which order."""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vfjax
from helpers import correlations
from vfjax import align, merge, stats
from vfjax.align._grouping import kmeans_groups, optimal_groups

MATCHERS = ["greedy", "optimal", "kmeans", "permute", "identity"]
SHAPES = {"a": (5, 8), "b": (8,), "c": (8, 6), "d": (6, 3)}


def apply_fn(v, x):
    hidden = jax.nn.relu(x @ v["a"] + v["b"][None])
    return jax.nn.relu(hidden @ v["c"]) @ v["d"]


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


def confused(seed, size, samples=40):
    """Of features with few common causes, so that odd cycles occur."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(samples, max(2, size // 4)))
    values = causes @ rng.normal(size=(causes.shape[1], size))
    return values + rng.normal(size=values.shape)


def pair_sum(similarity, labels):
    same = np.equal.outer(labels, labels)
    np.fill_diagonal(same, False)
    return similarity[same].sum() / 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.booleans())
def test_optimal_pairs_are_those_of_the_plain_algorithm(seed, n, ties):
    """Nothing that could be part of the optimum is left out before."""
    similarity = np.corrcoef(confused(seed, 2 * n).T)
    if ties:
        similarity = similarity.round(1)
    labels = optimal_groups(similarity)
    assert (np.bincount(labels, minlength=n) == 2).all() and len(labels) == 2 * n
    graph = networkx.Graph()
    for i, j in itertools.combinations(range(2 * n), 2):
        graph.add_edge(i, j, weight=similarity[i, j])
    best = networkx.max_weight_matching(graph, maxcardinality=True)
    expected = sum(similarity[pair] for pair in best)
    np.testing.assert_allclose(pair_sum(similarity, labels), expected, rtol=1e-9, atol=1e-9)


def test_optimal_leaves_odd_cycles():
    """Two lots of three features alike: the assignment of all runs around each."""
    similarity = np.full((6, 6), -0.5)
    similarity[:3, :3] = similarity[3:, 3:] = 0.9
    similarity[2, 3] = similarity[3, 2] = 0.1
    np.fill_diagonal(similarity, 1)
    labels = optimal_groups(similarity)
    assert labels[0] == labels[1] and labels[2] == labels[3] and labels[4] == labels[5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9))
def test_clusters_are_those_of_the_features_themselves(seed, n):
    """Inner products alone give clusters of standardised features: each is nearest to its own.

    k-means of the features often gives the same, but not where rounding decides how it begins.
    """
    values = confused(seed, 2 * n, samples=60)
    standard = ((values - values.mean(0)) / values.std(0) / np.sqrt(len(values))).T
    key = jax.random.key(seed)
    labels = kmeans_groups(standard @ standard.T, n, key)
    np.testing.assert_array_equal(labels, kmeans_groups(standard @ standard.T, n, key))
    assert set(labels) == set(range(n))
    centres = np.stack([standard[labels == k].mean(0) for k in range(n)])
    distances = np.linalg.norm(standard[:, None] - centres, axis=-1)
    own = distances[np.arange(len(labels)), labels]
    np.testing.assert_array_less(own, distances.min(1) + 1e-9)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_no_cluster_is_empty(distinct):
    """Fewer features are distinct than there are to be, some are dead."""
    values = confused(0, distinct)
    values = values[:, np.arange(12) % distinct]
    similarity = np.corrcoef(values.T)
    similarity[:2] = similarity[:, :2] = 0
    labels = kmeans_groups(similarity, 6, jax.random.key(0))
    assert sorted(set(labels)) == list(range(6))


def test_order_of_the_objectives(net, data):
    """Each matcher is the best of those that have no more freedom than it has."""
    for seed in range(4):
        trees = [tree(2 * seed), tree(2 * seed + 1)]
        moments = stats.moments(net, trees, data, sites="taps", covariance=True)

        def score(matcher, moments=moments, **options):
            key = jax.random.key(0)
            maps = align.zip_moments(net, moments, matcher=matcher, key=key, **options)
            return np.array(list(align.merged_correlation(net, moments, maps).values()))

        optimal, permute = score("optimal"), score("permute")
        assert (optimal >= score("greedy", alpha=0, beta=1) - 1e-6).all()
        assert (optimal >= permute - 1e-6).all()
        assert (permute >= score("greedy", alpha=0, beta=0) - 1e-6).all()
        assert (permute >= score("identity") - 1e-6).all()
        assert (optimal > score("identity")).all()


def test_permute_is_the_matching_of_activations(net, data):
    """To model 0, for every other model; the correlations that pairs have are its objective."""
    trees = [tree(seed) for seed in range(3)]
    moments = stats.moments(net, trees, data, sites="taps", covariance=True)
    found = align.zip_moments(net, moments, matcher="permute")
    for k in (1, 2):
        expected = align.match_moments(net, moments, model=k)
        for group, order in expected.permutations.items():
            merge_matrix, unmerge = found.maps[k][group]
            np.testing.assert_array_equal(merge_matrix, np.eye(len(order))[order])
            np.testing.assert_array_equal(unmerge, merge_matrix.T)
            np.testing.assert_array_equal(found.maps[0][group][0], np.eye(len(order)))
    two = stats.moments(net, trees[:2], data, sites="taps", covariance=True)
    maps = align.zip_moments(net, two, matcher="permute")
    total = sum(align.merged_correlation(net, two, maps).values())
    np.testing.assert_allclose(total, align.match_moments(net, two).objective[-1], rtol=1e-5)


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("models", [2, 3])
def test_maps_undo_each_other(net, data, matcher, models):
    """`mean_k M_k U_k` is the identity, whatever the matcher; n features of all are left."""
    trees = [tree(seed) for seed in range(models)]
    options = {"matcher": matcher, "key": jax.random.key(0)}
    if matcher == "optimal" and models > 2:
        with pytest.raises(ValueError, match='"optimal" merges pairs, which for 3 models'):
            align.zip_features(net, trees, data, **options)
        return
    found = align.zip_features(net, trees, data, **options)
    for group, n in net.spec.sizes.items():
        pairs = [maps[group] for maps in found.maps]
        np.testing.assert_allclose(np.mean([m @ u for m, u in pairs], axis=0), np.eye(n), atol=1e-6)
        assert found.sizes[group].sum() == models * n and len(found.sizes[group]) == n
        # Merged features come in the order of their first parts.
        first = np.concatenate([u for _, u in pairs]).argmax(0)
        assert (np.diff(first) > 0).all()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_a_network_with_itself_stays(net, data, matcher):
    """Of distinct features the two that are one are merged, by every matcher."""
    first, x = tree(0), jnp.concatenate(data)
    found = align.zip_features(net, [first, first], data, matcher=matcher, key=jax.random.key(1))
    if matcher == "kmeans":  # It ends in some local optimum.
        for group, (m, _) in found.maps[0].items():
            np.testing.assert_array_equal(m, found.maps[1][group][0])
        return
    for maps in found.maps:
        for matrix, _ in maps.values():
            np.testing.assert_array_equal(matrix, np.eye(len(matrix)))
    merged = merge.interpolate(found.apply(net, [first, first]))
    np.testing.assert_allclose(net.run(merged, x), apply_fn(first, x), rtol=1e-5, atol=1e-5)


def test_merged_correlation_of_larger_groups(net, data):
    """By its definition, and by what k-means minimises."""
    trees = [tree(0), tree(1)]
    moments = stats.moments(net, trees, data, sites="taps", covariance=True)
    found = align.zip_moments(net, moments, matcher="kmeans", key=jax.random.key(0))
    scores = align.merged_correlation(net, moments, found)
    for group in net.spec.groups:
        similarity = correlations(moments, group)
        member = np.concatenate([maps[group][1] for maps in found.maps])
        expected = 0.0
        for column in member.T:
            parts = np.flatnonzero(column)
            expected += sum(similarity[i, j] for i in parts for j in parts if i != j) / len(parts)
        np.testing.assert_allclose(scores[group], expected, rtol=1e-6)
        within = np.diag(member.T @ similarity @ member) / member.sum(0)
        np.testing.assert_allclose(within.sum(), len(within) + expected, rtol=1e-5)
    dense = align.cca_moments(net, moments)
    with pytest.raises(ValueError, match="each feature to one merged feature, but those of 'a'"):
        align.merged_correlation(net, moments, dense)


def test_errors(net, data, monkeypatch):
    trees = [tree(0), tree(1)]
    with pytest.raises(ValueError, match="matcher must be one of \"greedy\", .*, got 'best'"):
        align.zip_features(net, trees, data, matcher="best")
    with pytest.raises(ValueError, match="give it a random `key`"):
        align.zip_features(net, trees, data, matcher="kmeans")

    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "vfjax\[matching\]"'):
        align.zip_features(net, trees, data, matcher="optimal")
