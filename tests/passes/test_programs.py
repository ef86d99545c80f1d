"""Compiled programs are kept with the network that they evaluate, and go with it."""

from __future__ import annotations

import gc
import logging
import weakref

import jax
import numpy as np
import pytest

import vfjax
from vfjax import align, diagnose, merge, prune, renorm, stats, train

DRAW = np.random.default_rng(0).normal
X = DRAW(size=(8, 3)).astype(np.float32)
LABELS = np.arange(8) % 2
A, B = ({"a": np.float32(DRAW(size=(3, 4))), "b": np.float32(DRAW(size=(4, 2)))} for _ in range(2))


def forward(v, x):
    return jax.nn.relu(x @ v["a"]) @ v["b"]


USES = {
    "moments": lambda net: stats.moments(net, [A, B], [X], sites="taps", covariance="cross"),
    "repair": lambda net: renorm.repair(net, A, [X], references=[A, B]),
    "repair of a merged model": lambda net: renorm.repair(
        net, merge.preserve_first(net, [A, B], layers=1), [X], references=[A, B]
    ),
    "match": lambda net: align.match_activations(net, A, B, [X]),
    "universe": lambda net: align.match_universe(net, [A, B], [X]),
    "features": lambda net: diagnose.features(net, [A, B], [X]),
    "interpolation": lambda net: diagnose.interpolation(net, [A, B], [(X, LABELS)], alphas=2),
    "cka": lambda net: diagnose.cka((net, A), (net, B), [X]),
    "cka of a merged model": lambda net: diagnose.cka(
        merge.preserve_first(net, [A, B], layers=1), (net, A), [X], estimator="minibatch"
    ),
    "wanda": lambda net: prune.wanda(net, A, [X]),
    "fisher": lambda net: prune.fisher(net, A, [(X, LABELS)]),
    "a method": lambda net: train.evaluate(net.run, A, [(X, LABELS)]),
    "a closure": lambda net: train.evaluate(lambda v, x: net.run(v, x), A, [(X, LABELS)]),
    "jit of a merged model": lambda net: jax.jit(merge.preserve_first(net, [A, B], layers=1))(X),
}


@pytest.mark.parametrize("use", USES)
def test_a_network_is_freed_with_its_programs(use):
    net = vfjax.trace(forward, A, X)
    USES[use](net)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


def test_a_function_may_close_over_itself():
    def again(v, x, deep=2):
        return again(v, x, deep - 1) if deep else forward(v, x)

    assert train.evaluate(again, A, [(X, LABELS)]).count == len(X)


@pytest.mark.parametrize("use", ["repair", "match", "features", "fisher", "cka", "a method"])
def test_a_second_call_compiles_nothing(use, caplog):
    net = vfjax.trace(forward, A, X)
    logged = []
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            USES[use](net)
        logged.append([record.message for record in caplog.records if "ompil" in record.message])
    assert logged[0] and not logged[1]
