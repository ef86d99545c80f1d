"""The laws that hold for every network, as functions of a case."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import vfjax
from vfjax import align, diagnose, merge, prune, renorm, stats
from zoo.registry import orders

KEY = jax.random.key(1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, two models and inputs."""

    fn: Callable[[Any, Any], Any]
    a: Any
    b: Any
    x: Any

    @functools.cached_property
    def net(self) -> vfjax.network.Network:
        """The traced network."""
        return vfjax.trace(self.fn, self.a, self.x)

    @functools.cached_property
    def parts(self) -> tuple[Any, ...]:
        """The network, two models, a permuted copy of the first, and a batch."""
        copy = self.net.spec.permute(self.a, orders(self.net.spec, 1))
        return self.net, self.a, self.b, copy, self.x


def close(actual, expected, tol=2e-5):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=tol * max(abs(other).max(), 1e-3))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def trace(case):
    net, a, _, _, x = case.parts
    assert net.layers and net.depth
    assert jax.eval_shape(net.run, a, x) == jax.eval_shape(case.fn, a, x)


def groups(case):
    assert case.net.spec.groups


def spec(case):
    net, a, _, copy, x = case.parts
    close(net.run(copy, x), net.run(a, x))


def weights(case):
    net, a, _, copy, _ = case.parts
    found = align.match_weights(net, a, copy, key=KEY)
    same(net.spec.permute(copy, found.permutations), a)
    assert found.objective[-1] == pytest.approx(found.bound, rel=1e-5)


def activations(case):
    net, a, _, copy, x = case.parts
    found = align.match_activations(net, a, copy, [x])
    same(net.spec.permute(copy, found.permutations), a)


def limits(case):
    net, a, b, _, x = case.parts
    apart = merge.preserve_first(net, [a, b], layers=net.depth)
    whole = merge.preserve_first(net, [a, b], layers=0)
    outputs = [net.run(tree, x) for tree in (a, b)]
    close(apart(x), jax.tree.map(lambda *o: np.mean(o, axis=0), *outputs))
    close(whole(x), net.run(merge.interpolate([a, b]), x))


def itself(case):
    net, a, _, _, x = case.parts
    same(merge.interpolate([a, a]), a)
    close(merge.preserve_first(net, [a, a], layers=net.depth // 2)(x), net.run(a, x))


def repair(case):
    net, a, b, _, x = case.parts
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


def masks(case):
    """Permuting and pruning commute."""
    net, a, _, copy, _ = case.parts

    def pruned(tree):
        return prune.apply(tree, prune.masks(prune.magnitude(net, tree), 0.5))

    same(net.spec.permute(pruned(a), orders(net.spec, 1)), pruned(copy))


def report(case):
    net, a, b, _, x = case.parts
    found = diagnose.report(net, merge.interpolate([a, b]), [x], references=[a, b])
    assert str(found)


LAWS = (trace, groups, spec, weights, activations, limits, itself, repair, masks, report)
