"""The laws of every network in the zoo; one that does not hold has a reason in the registry."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from vfjax import align, diagnose, merge, prune, renorm, stats
from zoo import attention, convolutional, others
from zoo.registry import ZOO, orders

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

assert attention and convolutional and others  # they fill the registry
KEY = jax.random.key(1)
COUNT = 24


@functools.cache
def case(name):
    """The network, two models, a permuted copy of the first, and a batch."""
    of = ZOO[name]
    with jax.numpy_rank_promotion("allow"):
        net, a = of.net, of.variables(0)
    return net, a, of.variables(1), net.spec.permute(a, orders(net.spec, 1)), of.x(COUNT)


def close(actual, expected, tol=2e-5):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=tol * max(abs(other).max(), 1e-3))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def trace(name):
    net, a, _, _, x = case(name)
    assert net.layers and net.depth
    assert jax.eval_shape(net.run, a, x) == jax.eval_shape(ZOO[name].fn, a, x)


def groups(name):
    assert case(name)[0].spec.groups


def spec(name):
    net, a, _, copy, x = case(name)
    close(net.run(copy, x), net.run(a, x))


def weights(name):
    net, a, _, copy, _ = case(name)
    found = align.match_weights(net, a, copy, key=KEY)
    same(net.spec.permute(copy, found.permutations), a)
    assert found.objective[-1] == pytest.approx(found.bound, rel=1e-5)


def activations(name):
    net, a, _, copy, x = case(name)
    found = align.match_activations(net, a, copy, [x])
    same(net.spec.permute(copy, found.permutations), a)


def limits(name):
    net, a, b, _, x = case(name)
    apart = merge.preserve_first(net, [a, b], layers=net.depth)
    whole = merge.preserve_first(net, [a, b], layers=0)
    outputs = [net.run(tree, x) for tree in (a, b)]
    close(apart(x), jax.tree.map(lambda *o: np.mean(o, axis=0), *outputs))
    close(whole(x), net.run(merge.interpolate([a, b]), x))


def itself(name):
    net, a, _, _, x = case(name)
    same(merge.interpolate([a, a]), a)
    close(merge.preserve_first(net, [a, a], layers=net.depth // 2)(x), net.run(a, x))


def repair(name):
    net, a, b, _, x = case(name)
    sites = "paper" if stats.resolve_sites(net, "paper") else "all"
    goals = stats.moments(net, [a, b], [x], sites=sites)
    new = renorm.repair(net, merge.interpolate([a, b]), [x], references=goals, sites=sites)
    sites = [site for site in goals.sites if net.layer(site).norm is None]
    model = new if isinstance(new, merge.Merged) else merge.as_merged(net, new)
    _, values = model.run(x, capture=sites)
    mean, std = goals.mixed()
    for site in sites:
        value, axes = np.asarray(values[site], np.float64), net.layer(site).sample_axes
        moving = np.asarray(std[site]) > 1e-3 * np.asarray(std[site]).max()
        close(value.std(axes)[moving], np.asarray(std[site])[moving], 1e-4)
        spread = np.asarray(std[site]).max()
        assert abs(value.mean(axes) - np.asarray(mean[site])).max() < 1e-3 * spread


def masks(name):
    """Permuting and pruning commute."""
    net, a, _, copy, _ = case(name)

    def pruned(tree):
        return prune.apply(tree, prune.masks(prune.magnitude(net, tree), 0.5))

    same(net.spec.permute(pruned(a), orders(net.spec, 1)), pruned(copy))


def report(name):
    net, a, b, _, x = case(name)
    found = diagnose.report(net, merge.interpolate([a, b]), [x], references=[a, b])
    assert str(found)


LAWS = (trace, groups, spec, weights, activations, limits, itself, repair, masks, report)


CASES = [
    pytest.param(name, law, id=f"{name}-{law.__name__}", marks=[pytest.mark.slow] * slow)
    for name, of in ZOO.items()
    for law in LAWS
    for slow in [law.__name__ in of.slow]
]


@pytest.mark.parametrize(("name", "law"), CASES)
def test_law(name, law):
    reason = ZOO[name].fails.get(law.__name__)
    with jax.numpy_rank_promotion("allow"):
        if reason is None:
            law(name)
            return
        with pytest.raises(Exception):  # noqa: B017 - whatever it is, it does not hold
            law(name)


def test_reasons_are_of_laws():
    names = {law.__name__ for law in LAWS}
    assert all(of.fails.keys() <= names for of in ZOO.values())
