"""Matchers of networks with attention: dims move by themselves inside every head."""

from __future__ import annotations

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import initial
from vfjax import align, merge, models, stats
from vfjax.align._heads import Compared, problems_of
from vfjax.align._plans import exact_plan

MODELS = 3
VIT = {"blocks": 2, "features": 24, "heads": 3}


@pytest.fixture(scope="module")
def x():
    return np.float32(np.random.default_rng(0).normal(size=(40, 8, 8, 3)))


@pytest.fixture(scope="module")
def variables(x):
    plain = initial(models.create("vit", **VIT), x)
    # Initial biases and scales are constants, which tell no units apart.
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: v + np.float32(0.3 * rng.normal(size=v.shape)), plain)


@pytest.fixture(scope="module")
def net(variables, x):
    model = models.create("vit", **VIT)
    return vfjax.trace(models.apply_fn(model), variables, x)


@pytest.fixture(scope="module")
def copies(net, variables):
    """The network and copies of it, permuted at random: heads, and the dims of each."""
    orders = [net.spec.random(jax.random.key(seed)) for seed in range(1, MODELS)]
    assert net.spec.within and all(orders[0][group].ndim == 2 for group in net.spec.within)
    return [variables, *(net.spec.permute(variables, order) for order in orders)]


@pytest.fixture(scope="module")
def moments(net, copies, x):
    return stats.moments(net, copies, [x], sites="taps", covariance=True)


def two(moments):
    """The same of the first two models."""
    take = functools.partial(jax.tree.map, lambda v: v[:2])
    covariance = {site: block[:2, :2] for site, block in moments.covariance.items()}
    return stats.Moments(
        moments.count, take(moments.mean), take(moments.var), covariance, moments.axes
    )


def assert_restored(net, variables, x, mapped, rtol=2e-5):
    """The merge computes the function of the network that all models are copies of."""
    out, expected = net.run(merge.interpolate(mapped), x), net.run(variables, x)
    assert float(jnp.abs(out - expected).max() / jnp.abs(expected).max()) < rtol


ZIPS = {
    "greedy": {},
    "greedy between models": {"alpha": 0, "beta": 0},
    "permute": {"matcher": "permute"},
    "optimal": {"matcher": "optimal"},
    "kmeans": {"matcher": "kmeans", "key": jax.random.key(0)},
}


@pytest.mark.parametrize("name", ZIPS)
def test_zip_restores_a_permuted_copy(net, variables, copies, moments, x, name):
    if name == "optimal":
        pytest.importorskip("networkx")
    if name == "kmeans":
        pytest.importorskip("sklearn")
    found = align.zip_moments(net, two(moments), **ZIPS[name])
    assert_restored(net, variables, x, found.apply(net, copies[:2]))
    scores = align.merged_correlation(net, two(moments), found)
    for group, owner in net.spec.within.items():
        units = net.spec.sizes[owner] * net.spec.sizes[group]
        assert scores[group] == pytest.approx(units, rel=1e-3)
        assert owner not in scores


def test_zip_of_three_models(net, variables, copies, moments, x):
    found = align.zip_moments(net, moments, alpha=1, beta=0)
    assert_restored(net, variables, x, found.apply(net, copies))
    units = sum(np.size(order) for order in net.spec.random(jax.random.key(0)).values())
    assert f"{units} features of {MODELS * units}, at most {MODELS} in one" in repr(found)


def test_identity_pairs_heads_in_place(net, moments):
    found = align.zip_moments(net, moments, matcher="identity")
    assert all(
        (p == np.arange(p.shape[-1])).all() for of in found.permutations for p in of.values()
    )
    assert net.spec.within.keys() <= found.permutations[1].keys()


def test_cca_restores_a_permuted_copy(net, variables, copies, moments, x):
    found = align.cca_moments(net, moments, regularization=1e-6, dtype=np.float64)
    assert_restored(net, variables, x, found.apply(net, copies), rtol=1e-3)
    correlations = align.canonical_correlations(net, moments, regularization=0)
    for group, owner in net.spec.within.items():
        h, n = net.spec.sizes[owner], net.spec.sizes[group]
        assert correlations[group].shape == (MODELS - 1, h, n)
        np.testing.assert_allclose(correlations[group], 1, rtol=1e-3)


@pytest.mark.parametrize("squared", [False, True])
def test_transport_restores_a_permuted_copy(net, variables, copies, moments, x, squared):
    found = align.transport_moments(net, moments, squared=squared)
    assert not found.mixed
    assert_restored(net, variables, x, found.apply(net, copies))


def test_transport_of_networks_that_differ(net, variables, copies, x):
    again = vfjax.trace(models.apply_fn(models.create("vit", **VIT)), variables, x)
    found = align.transport([net, again], copies[:2], [x])
    assert_restored(net, variables, x, found.apply([net, again], copies[:2]))


def test_transport_of_other_widths_gives_those_of_the_first(net, variables, x):
    model = models.create("vit", **{**VIT, "features": 48})
    other = initial(model, x, seed=3)
    nets = [net, vfjax.trace(models.apply_fn(model), other, x)]
    found = align.transport(nets, [variables, other], [x])
    assert all(found.maps[1][group][0].shape == (3, 8, 16) for group in net.spec.within)
    merged = merge.interpolate(found.apply(nets, [variables, other]))
    assert jnp.isfinite(net.run(merged, x)).all()


def test_transport_of_other_numbers_of_heads_is_by_weights(net, variables, x):
    model = models.create("vit", **{**VIT, "heads": 6})
    other = initial(model, x, seed=3)
    nets = [net, vfjax.trace(models.apply_fn(model), other, x)]
    with pytest.raises(ValueError, match='numbers of heads, be compared on="weights" only'):
        align.transport(nets, [variables, other], [x])


@pytest.mark.parametrize("sweeps", [0, 1])
def test_transport_by_weights_restores_a_permuted_copy(net, variables, copies, x, sweeps):
    found = align.transport(net, copies, on="weights", sweeps=sweeps)
    assert not found.mixed
    assert_restored(net, variables, x, found.apply(net, copies))
    still = align.transport(net, [variables, variables], on="weights", sweeps=sweeps)
    for p in still.permutations[1].values():
        assert (p == np.arange(p.shape[-1])).all()


@pytest.mark.parametrize("options", [{"features": 48}, {"heads": 6}])
def test_transport_by_weights_of_other_widths(net, variables, x, options):
    model = models.create("vit", **{**VIT, **options})
    other = initial(model, x, seed=3)
    nets = [net, vfjax.trace(models.apply_fn(model), other, x)]
    found = align.transport(nets, [variables, other], on="weights", sweeps=1)
    merged = merge.interpolate(found.apply(nets, [variables, other]))
    assert jnp.isfinite(net.run(merged, x)).all()
    for owner in net.spec.within.values():
        assert (owner in found.mixed) == ("heads" in options)


def test_soft_transport_keeps_heads_apart(net, copies, moments):
    found = align.transport_moments(net, moments, regularization=0.5)
    for group, owner in net.spec.within.items():
        assert owner in found.permutations[1]
        merged, unmerge = found.maps[1][group]
        assert merged.shape == (3, 8, 8) and group in found.mixed
        np.testing.assert_allclose(merged.sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(unmerge.sum(-1), 1, rtol=1e-3)


def assert_universe(net, variables, trees, x, match):
    expected = net.run(variables, x)
    merges = []
    for order in itertools.permutations(range(MODELS)):
        ordered = [trees[k] for k in order]
        found = match(ordered)
        mapped = found.apply(net, ordered)
        assert_restored(net, variables, x, mapped)
        merges.append(net.run(merge.interpolate(mapped), x))
        assert found.converged and (np.diff(found.objective) >= 0).all()
        for to, model in itertools.permutations(range(MODELS), 2):
            moved = net.spec.permute(ordered[model], found.pairwise(to=to, model=model))
            for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(ordered[to]), strict=True):
                np.testing.assert_array_equal(a, b)
    for out in merges[1:]:
        assert float(jnp.abs(out - merges[0]).max() / jnp.abs(expected).max()) < 2e-5


def test_universe_by_activations_restores_permuted_copies(net, variables, copies, x):
    assert_universe(net, variables, copies, x, lambda trees: align.match_universe(net, trees, [x]))


def test_universe_by_weights_restores_permuted_copies(net, variables, copies, x):
    key = jax.random.key(0)
    assert_universe(
        net, variables, copies, x, lambda trees: align.match_universe(net, trees, key=key)
    )


@pytest.fixture(scope="module")
def unrelated(net, x):
    model = models.create("vit", **VIT)
    trees = [initial(model, x, seed) for seed in range(MODELS)]
    return stats.moments(net, trees, [x], sites="taps", covariance=True)


def in_common(net, moments, permutations):
    """The sum of the correlations of all pairs of units that permutations bring together."""
    scores = align.merged_correlation(net, moments, align.Maps.of_permutations(permutations))
    within = net.spec.within
    # Heads and their dims are matched at joint taps, dim by dim.
    matched = [tap for tap in net.taps if tap.group not in {*within, *within.values()}]
    matched += [tap for tap in net.joint_taps if tap.group in within]
    taps = collections.Counter(tap.group for tap in matched)
    # Scores are means over taps, and for K models 2 / K of the sum over pairs.
    return sum(score * taps[group] for group, score in scores.items()) * len(permutations) / 2


def test_universes_match_at_least_as_well_as_to_any_one(net, unrelated):
    found = align.match_universe_moments(net, unrelated)
    value = in_common(net, unrelated, found.permutations)
    assert value == pytest.approx(found.objective[-1], rel=1e-6)
    for to in range(MODELS):
        star = [
            {} if k == to else align.match_moments(net, unrelated, to=to, model=k).permutations
            for k in range(MODELS)
        ]
        assert found.objective[-1] >= in_common(net, unrelated, star) * (1 - 1e-6)


def test_a_universe_of_two_is_the_matching_of_one_to_the_other(net, unrelated):
    found = align.match_universe_moments(net, two(unrelated))
    matched = align.match_moments(net, two(unrelated))
    assert found.objective[-1] == pytest.approx(matched.objective[-1], rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 4, 2), (4, 2, 3)])
def test_entries_are_sent_one_to_one_at_the_least_cost(shape):
    h, n, m = shape
    rng = np.random.default_rng(0)
    compared = {
        name: Compared(rng.uniform(size=(h * n, h * m)), (np.ones(h * n), np.ones(h * m)))
        for name in ("one", "other")
    }
    compared["owner"] = Compared(rng.uniform(size=(h, h)), (np.ones(h), np.ones(h)))
    inside = {"one": "owner", "other": "owner"}
    orders, problems = problems_of(compared, inside, {"owner": h}, "uniform")

    def cost(order):
        total = sum(compared["owner"].cost[at, entry] for entry, at in enumerate(order))
        for name in inside:
            blocks = compared[name].cost.reshape(h, n, h, m)
            each = [blocks[at, :, entry] for entry, at in enumerate(order)]
            total += sum((exact_plan(block) * block).sum() for block in each)
        return total

    best = min(itertools.permutations(range(h)), key=cost)
    assert cost(orders["owner"]) == pytest.approx(cost(best))
    assert len(problems) == 2 * h
    for (name, entry), problem in problems.items():
        blocks = compared[name].cost.reshape(h, n, h, m)
        np.testing.assert_array_equal(problem.cost, blocks[orders["owner"][entry], :, entry])


def test_a_universe_of_one_model_stays(net, variables, x):
    for options in ({"data": [x]}, {"key": jax.random.key(0)}):
        found = align.match_universe(net, [variables] * 2, **options)
        for of in found.permutations:
            assert all((p == np.arange(p.shape[-1])).all() for p in of.values())


@pytest.mark.parametrize("method", [align.zip_moments, align.cca_moments, align.transport_moments])
def test_a_model_with_itself_stays(net, variables, moments, x, method):
    one = jax.tree.map(lambda v: v[:1], (moments.mean, moments.var))
    twice = [{site: jnp.concatenate([v, v]) for site, v in of.items()} for of in one]
    covariance = {
        site: jnp.tile(block[:1, :1], (2, 2, 1, 1)) for site, block in moments.covariance.items()
    }
    found = method(net, stats.Moments(moments.count, *twice, covariance, moments.axes))
    for of in found.maps:
        for group, pair in of.items():
            for matrix in pair:
                eye = np.broadcast_to(np.eye(matrix.shape[-1]), matrix.shape)
                np.testing.assert_allclose(matrix, eye, atol=1e-3, err_msg=group)


@pytest.mark.parametrize(
    "method",
    [
        align.zip_moments,
        align.cca_moments,
        align.transport_moments,
        align.match_universe_moments,
    ],
)
def test_missing_joint_taps_are_an_error(net, copies, moments, method):
    plain = tuple(site for site in stats.resolve_sites(net, "taps") if " in " not in site)
    covariance = {site: moments.covariance[site] for site in plain}
    lacking = stats.Moments(moments.count, moments.mean, moments.var, covariance, moments.axes)
    with pytest.raises(ValueError, match=r'at the tap ".* in .*"; measure with sites="taps"'):
        method(net, lacking)


def test_moments_are_carried_through_maps_of_each_head(net, variables, x):
    """Those of mapped models, where nothing but a layer's own groups is mapped."""
    trees = [variables, net.spec.permute(variables, net.spec.random(jax.random.key(8)))]
    rng = np.random.default_rng(0)
    site = "params/block1/attention/value/kernel"
    owner, group = "params/block1/attention/query:heads", "params/block1/attention/value:dims"
    order = rng.permutation(3)
    each = np.float32(rng.normal(size=(3, 5, 8)))
    maps = [{owner: order, group: each}, None]
    found = stats.moments(net, trees, [x], sites=[site], covariance=[site])
    with pytest.raises(ValueError, match="must agree in m"):
        found.carried(maps)
    maps[1] = {group: np.float32(rng.normal(size=(5, 8)))}
    carried = found.carried(maps)
    for k, tree in enumerate(trees):
        _, values = net.run(tree, x, capture=[site])
        value = np.asarray(values[site]).reshape(-1, 3, 8)
        value = value[:, order] if k == 0 else value
        matrices = each if k == 0 else np.stack([maps[1][group]] * 3)
        value = np.einsum("bhn,hmn->bhm", value, matrices)
        np.testing.assert_allclose(carried.mean[site][k], value.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(carried.var[site][k], value.var(0), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"must be a matrix \[m, 8\] or \[3, m, 8\]"):
        found.carried([{group: each[:2]}, None])


@pytest.mark.parametrize("cut", [(5, None), (None, 5)])
def test_partial_merges_and_repair_with_maps_of_each_head(net, variables, copies, moments, x, cut):
    """A zip of copies is the network wherever it is cut, and leaves REPAIR nothing to do."""
    found = align.zip_moments(net, two(moments), alpha=0, beta=0)
    soft = align.transport_moments(net, two(moments), regularization=0.3)
    model = merge.partial(net, copies[:2], found, span=slice(*cut))
    expected = net.run(variables, x)
    for out in jax.tree.leaves(model(x)):
        assert float(jnp.abs(out - expected).max() / jnp.abs(expected).max()) < 2e-5
    mixed = merge.partial(net, copies[:2], soft, span=slice(*cut))
    assert all(jnp.isfinite(out).all() for out in jax.tree.leaves(mixed(x)))
    if cut[0] is None:
        return
    merged = merge.interpolate(soft.apply(net, copies[:2]))
    repaired = vfjax.renorm.repair(
        net, merged, [x], references=copies[:2], maps=soft, sites="all", sweeps="layer"
    )
    run = net.run(repaired, x) if not callable(repaired) else repaired(x)
    assert jnp.isfinite(run).all()
