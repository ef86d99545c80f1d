"""Tests of what a report advises: calls run as printed and improve the number that they cite."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import initial
from vfjax import diagnose, merge, renorm

# Rounding of float32 through a few layers.
RTOL = 1e-4
DEPTH = 4


def _mlp(v, x):
    for k in range(DEPTH - 1):
        x = jax.nn.relu(x @ v[f"w{k}"] + v[f"b{k}"][None])
    return x @ v[f"w{DEPTH - 1}"] + v[f"b{DEPTH - 1}"][None]


def _draw(seed):
    rng = np.random.default_rng(seed)
    sizes = [6, *[40] * (DEPTH - 1), 4]
    tree = {}
    for k, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        tree[f"w{k}"] = np.float32(rng.normal(size=(n, m)) * np.sqrt(2 / n))
        tree[f"b{k}"] = np.float32(rng.normal(size=m) * 0.3)
    return tree


@functools.cache
def mlp():
    x = np.float32(np.random.default_rng(9).normal(size=(200, 6)))
    return vfjax.trace(_mlp, _draw(0), x[:4]), x


def _follow(advice, net, merged, x, references):
    """Evaluates a printed call."""
    names = {"a": references[0], "b": references[-1], "key": jax.random.key(0)}
    names |= {"net": net, "merged": merged, "data": [x], "references": references}
    return eval(advice.call, {"vfjax": vfjax} | names)


def _by_remedy(found):
    return {advice.remedy: advice for advice in found.advice}


def _row(found, site):
    return next(row for row in found.layers if row.site == site)


def _faulty(found, advice):
    """The layer that a renormalisation was advised for."""
    return next(row for row in found.layers if f"at {row.site} (depth" in advice.reason)


# ------------------------------------------------------------------------- calls run as printed


@pytest.mark.parametrize("weights", [None, (0.4, 0.6), (0.3, 0.3, 0.4), (1 / 3,) * 3])
def test_advice_for_a_merge_of_unrelated_networks_does_what_it_says(weights):
    net, x = mlp()
    references = [_draw(seed) for seed in range(len(weights or (1, 1)))]
    merged = merge.interpolate(references, weights)
    again = functools.partial(diagnose.report, net, data=[x], weights=weights, threshold=0.7)
    found = again(variables=merged, references=references)
    advice = _by_remedy(found)
    assert {"match first", "bias calibration"} < set(advice)
    unequal = weights is not None and len(set(weights)) > 1
    share = found.features.weights

    for remedy, one in advice.items():
        assert (f"weights={weights}" in one.call) == (unequal and remedy != "match first")
        after = _follow(one, net, merged, x, references)
        if remedy == "match first":
            after = again(variables=merge.interpolate(after, weights), references=after)
            cosines = [np.mean([row.cosine for row in f.layers]) for f in (found, after)]
            assert cosines[1] > cosines[0] + 0.05
        elif remedy in ("RESCALE", "REPAIR"):
            after = again(variables=after, references=references)
            row = _row(after, _faulty(found, one).site)
            assert row.std_ratio == pytest.approx(1, rel=RTOL)
            assert remedy == "RESCALE" or row.mean_shift < RTOL
        elif remedy == "bias calibration":
            for k in range(DEPTH):
                wanted = sum(
                    w ** (k + 1) * r[f"b{k}"] for w, r in zip(share, references, strict=True)
                )
                np.testing.assert_allclose(after[f"b{k}"], wanted, rtol=RTOL, atol=1e-7)
            after = again(variables=after, references=references)
            assert after.layers[-1].ratio > 2 * found.layers[-1].ratio
        else:
            assert remedy == "PFM" and after.weights == share
            assert again(variables=after, references=references).left > found.left


@pytest.mark.parametrize("weights", [None, (0.25, 0.75), (0.3, 0.3, 0.4)])
def test_layers_to_keep_apart_are_kept_with_the_weights(weights):
    net, x = mlp()
    count = len(weights or (1, 1))
    near = [
        {k: v + 0.01 * n for (k, v), n in zip(_draw(0).items(), _draw(s).values(), strict=True)}
        for s in range(1, count + 1)
    ]
    merged = merge.interpolate(near, weights)
    merged["w2"] = merged["w2"] / 10
    found = diagnose.report(net, merged, [x], references=near, weights=weights)
    advice = _by_remedy(found)
    model = _follow(advice["PFM"], net, merged, x, near)
    assert model.weights == found.features.weights and model.cut == advice["PFM"].layers == 3
    whole = diagnose.report(net, model, [x], references=near)
    assert whole.left > 0.9 and "PFM" not in _by_remedy(whole)


def test_one_reference_gets_no_advice_that_is_for_merges():
    net, x = mlp()
    tree = _draw(0)
    small = {k: v * np.float32(0.5) if k[0] == "w" else v for k, v in tree.items()}
    found = diagnose.report(net, small, [x], references=[tree])
    assert found.biases_dominate
    (one,) = found.advice
    assert one.remedy in ("RESCALE", "REPAIR") and "weights" not in one.call
    after = _follow(one, net, small, x, [tree])
    after = diagnose.report(net, after, [x], references=[tree])
    assert _row(after, _faulty(found, one).site).std_ratio == pytest.approx(1, rel=RTOL)


def test_calls_on_a_merged_pass_weights_that_are_not_its_own():
    net, x = mlp()
    references = [_draw(0), _draw(1)]
    merged = merge.preserve_first(net, references, layers=0, weights=(0.2, 0.8))
    for weights, printed in ((None, ""), ((0.2, 0.8), ""), ((0.5, 0.5), ", weights=(0.5, 0.5)")):
        found = diagnose.report(net, merged, [x], references=references, weights=weights)
        advice = _by_remedy(found)
        (one,) = (a for name, a in advice.items() if name in ("RESCALE", "REPAIR"))
        assert one.call.count("weights") == bool(printed) and printed in one.call
        after = _follow(one, net, merged, x, references)
        after = diagnose.report(net, after, [x], references=references, weights=weights)
        row = _row(after, _faulty(found, one).site)
        assert row.std_ratio == pytest.approx(1, rel=RTOL)
        # What is merged anew has equal weights unless told.
        kept = [a for a in found.advice if a.remedy == "PFM"]
        assert all(("weights" in a.call) == (found.features.weights != (0.5, 0.5)) for a in kept)


def test_a_bias_that_serves_several_depths_is_not_to_be_calibrated():
    def apply_fn(v, x):
        for _ in range(3):
            x = jax.nn.relu(x @ v["w"] + v["b"][None])
        return x

    rng = np.random.default_rng(0)
    references = [
        {"w": np.float32(rng.normal(size=(30, 30)) / 4), "b": np.full(30, 0.5, np.float32)}
        for _ in range(2)
    ]
    x = np.float32(rng.normal(size=(50, 30)))
    net = vfjax.trace(apply_fn, references[0], x[:4])
    merged = merge.interpolate(references)
    found = diagnose.report(net, merged, [x], references=references, threshold=0.9)
    assert [row.site for row in found.layers] == ["w", "w#2", "w#3", "output"]
    assert found.biases_dominate and "bias calibration" not in _by_remedy(found)
    for row in found.layers[:3]:
        wanted = np.abs(merged["w"]).mean() / np.mean([np.abs(r["w"]).mean() for r in references])
        assert row.kernel_ratio == pytest.approx(wanted, rel=RTOL)
    for one in found.advice:
        after = _follow(one, net, merged, x, references)
        if one.remedy in ("RESCALE", "REPAIR"):
            after = diagnose.report(net, after, [x], references=references)
            row = _row(after, _faulty(found, one).site)
            assert row.std_ratio == pytest.approx(1, rel=RTOL)


def test_references_that_are_no_trees_are_compared_with_and_not_called_with():
    net, x = mlp()
    whole = merge.preserve_first(net, [_draw(0), _draw(0)], layers=2)
    small = {k: v / 2 for k, v in _draw(0).items()}
    found = diagnose.report(net, small, [x], references=[whole, whole])
    assert all(not one.call for one in found.advice)
    assert "needs the references as trees" in found.advice[0].reason


class Normed(nn.Module):
    """Two BatchNorm layers, and a head."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        for k in range(2):
            x = nn.Dense(12, name=f"d{k}", dtype=self.dtype)(x)
            x = nn.BatchNorm(use_running_average=True, name=f"n{k}", dtype=self.dtype)(x)
            x = nn.relu(x)
        return nn.Dense(3, name="head", dtype=self.dtype)(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stale_statistics_are_reset_as_printed(dtype):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(60, 5)), dtype)
    model = Normed(dtype)
    tree = initial(model, x[:4])
    net = vfjax.trace(lambda v, x: model.apply(v, x), tree, x[:4])
    tree = renorm.reset(net, tree, [x], sweeps="layer")
    stale = {**tree, "batch_stats": jax.tree.map(lambda leaf: 9 * leaf, tree["batch_stats"])}
    found = diagnose.report(net, stale, [x], references=[tree])
    assert found.norms[0].stale and found.end == "the output"
    (one,) = found.advice
    after = _follow(one, net, stale, x, [tree])
    after = diagnose.report(net, after, [x], references=[tree])
    assert not any(norm.stale for norm in after.norms)
    assert [a.remedy for a in after.advice] == ["nothing to do"]
