"""Every matcher warns of a layer that nothing can match, once, and at the caller's line."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import of_shapes
from vfjax import align, merge, stats

SHAPES = {"w1": (4, 6), "w2": (6, 5), "w3": (5, 5), "v": (5, 2)}
X = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
TREES = [of_shapes(SHAPES, k) for k in (0, 1)]


def summed(p, x):
    """Running sums look at the order of units, as the last layer's sum does."""
    h = jax.nn.relu(jnp.cumsum(x @ p["w1"], axis=1) @ p["w2"])
    return jnp.cumsum(h @ p["w3"], axis=1) @ p["v"]


def plain(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w1"]) @ p["w2"]) @ p["w3"] @ p["v"]


def by_moments(matcher):
    def match(net, trees):
        with warnings.catch_warnings():  # so that measuring is not what warns
            warnings.simplefilter("error")
            moments = stats.moments(net, trees, [X], sites="taps", covariance=True)
        return matcher(net, moments)

    return match


MATCHERS = {
    "match_weights": lambda n, t: align.match_weights(n, *t, key=jax.random.key(0)),
    "match_activations": lambda n, t: align.match_activations(n, *t, [X]),
    "match_moments": by_moments(align.match_moments),
    "match_universe": lambda n, t: align.match_universe(n, t, None, key=jax.random.key(0)),
    "match_universe_moments": by_moments(align.match_universe_moments),
    "zip_features": lambda n, t: align.zip_features(n, t, [X]),
    "zip_moments": by_moments(align.zip_moments),
    "cca": lambda n, t: align.cca(n, t, [X]),
    "cca_moments": by_moments(align.cca_moments),
    "transport": lambda n, t: align.transport(n, t, on="weights"),
    "transport_moments": by_moments(align.transport_moments),
}


def test_all_matchers_are_tested():
    others = {"canonical_correlations", "merged_correlation", "with_spreads"}
    functions = {n for n in align.__all__ if n[0].islower()}
    assert MATCHERS.keys() == functions - others


@pytest.mark.parametrize("name", MATCHERS)
def test_matchers_warn_once_of_layers_that_nothing_can_match(name):
    net = vfjax.trace(summed, TREES[0], X)
    wanted = r"layer 'w1'.*`cumsum` at test_unaligned.py:\d+ \(nor those of 1 other layers?\)"
    with pytest.warns(UserWarning, match=wanted) as caught:
        MATCHERS[name](net, TREES)
    (warning,) = caught
    assert warning.filename == __file__
    merge.preserve_first(net, TREES, layers=0)  # warnings are errors here
    MATCHERS[name](net, TREES)


@pytest.mark.parametrize("name", ["match_weights", "match_activations", "cca"])
def test_they_are_silent_where_all_layers_can_be_matched(name):
    MATCHERS[name](vfjax.trace(plain, TREES[0], X), TREES)


def test_layers_with_computed_kernels_count():
    def masked(p, x):
        h = jax.nn.relu(jnp.cumsum(x @ (p["w1"] * (p["w1"] > -1)), axis=1) @ p["w2"])
        return h @ p["w3"] @ p["v"]

    net = vfjax.trace(masked, TREES[0], X)
    assert net.layers[0].kernel is None
    with pytest.warns(UserWarning, match=r"layer 'w1'.*`cumsum`"):
        MATCHERS["match_weights"](net, TREES)


def test_a_spec_is_not_warned_of():
    spec = vfjax.trace(summed, TREES[0], X).spec
    align.match_weights(spec, *TREES, key=jax.random.key(0))
