"""Tests of the report on networks of all kinds: residual ends, dead branches, shared layers."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vfjax
from helpers import initial
from vfjax import diagnose, merge

# Rounding of float32 through a few layers.
RTOL = 1e-4


def _x(shape=(60, 6), seed=9):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def _tree(shapes, seed=0, scale=None):
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.normal(size=shape) * (scale or np.sqrt(2 / shape[0])))
        for name, shape in shapes.items()
    }


def _remedies(found):
    return [advice.remedy for advice in found.advice]


# ------------------------------------------------------------------------------------- the output


def _residual_end(v, x):
    h = jax.nn.relu(x @ v["a"] + v["p"][None])
    return h + (h @ v["b"] + v["q"][None])


def test_the_output_is_measured_where_something_joins_after_the_last_layer():
    x, tree = _x(), _tree({"a": (6, 8), "b": (8, 8)}) | _tree({"p": (8,), "q": (8,)}, 1, 0.5)
    net = vfjax.trace(_residual_end, tree, x[:4])
    small = tree | {"b": tree["b"] / 10}
    found = diagnose.report(net, small, [x], references=[tree])
    measured = diagnose.features(net, small, [x], references=[tree], sites=["b", "output"])
    assert [row.site for row in found.layers] == ["a", "b", "output"]
    assert found.layers[1].relative == pytest.approx(0.1, rel=RTOL)
    left, ratio = (float(v["output"][0]) for v in (measured.relative, measured.ratio))
    assert found.left == pytest.approx(left, rel=RTOL) and left > 0.5
    assert found.layers[-1].ratio == pytest.approx(ratio, rel=RTOL)
    assert found.collapse.final[0] == pytest.approx(
        float(measured.variance_ratio["output"][0]), rel=RTOL
    )
    # The branch is weak and the stream whole: nothing vanishes, and nothing of b is the output's.
    assert found.vanishes is None and not found.biases_dominate
    assert f"at the output {left:.3g} of them is left" in str(found)
    assert f"||f(x) - f(0)|| is {ratio:.3g} of ||f(0)||" in str(found)
    assert "bias calibration" not in _remedies(found) and "PFM" not in _remedies(found)
    assert found.advice[0].remedy in ("RESCALE", "REPAIR") and "at b " in found.advice[0].reason
    (axes,) = found.figure().axes
    assert axes.get_lines()[0].get_xdata().tolist() == [0.5, 1, 1.25]
    assert "and the output" in axes.get_xlabel()
    steps = [row.step for row in found.layers]
    np.testing.assert_allclose(np.cumprod(steps), [row.relative for row in found.layers], rtol=RTOL)


def test_what_is_lost_after_the_last_layer_is_lost_at_the_output():
    x, tree = _x(), _tree({"a": (6, 8), "b": (8, 3)}) | {"gain": np.ones(3, np.float32)}
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a"]) @ v["b"] * v["gain"][None], tree, x[:4])
    found = diagnose.report(net, tree | {"gain": tree["gain"] / 5}, [x], references=[tree])
    assert found.vanishes.site == found.largest_drop.site == "output"
    assert found.left == pytest.approx(0.2, rel=RTOL)
    # No layer is off, so that no renormalisation of layers helps.
    assert _remedies(found) == ["none known"]


def test_outputs_that_have_no_features_leave_the_last_layer():
    x, tree = _x(), _tree({"a": (6, 8), "b": (8, 3)})

    def logits(v, x):
        return jax.nn.relu(x @ v["a"]) @ v["b"]

    several = (
        lambda v, x: (2 * logits(v, x), x),
        lambda v, x: logits(v, x).argmax(-1),
        lambda v, x: (logits(v, x) ** 2).mean(),
    )
    for apply_fn in several:
        net = vfjax.trace(apply_fn, tree, x[:4])
        found = diagnose.report(net, tree, [x], references=[tree])
        assert found.end == "'b', the last site" and found.layers[-1].site == "b"
        assert "at 'b', the last site 1 of them is left" in str(found)
    # The only array of an output that holds one, which is the last layer's.
    net = vfjax.trace(lambda v, x: {"logits": logits(v, x)}, tree, x[:4])
    assert diagnose.report(net, tree, [x], references=[tree]).end == "the output"
    # A network that was traced at one example.
    net = vfjax.trace(lambda v, x: jax.nn.softmax(logits(v, x)), tree, x[:1])
    found = diagnose.report(net, tree, [x], references=[tree], sites=["a"])
    assert [row.site for row in found.layers] == ["a", "output"]


# --------------------------------------------------------------------------------- dead branches


@pytest.mark.filterwarnings("error")
def test_a_dead_branch_is_named_and_the_loss_is_where_it_is():
    def apply_fn(v, x):
        h = x @ v["a"]
        return (h + jax.nn.relu(h @ v["b"])) @ v["c"]

    x, tree = _x(), _tree({"a": (6, 8), "b": (8, 8), "c": (8, 3)})
    net = vfjax.trace(apply_fn, tree, x[:4])
    dead = tree | {"b": 0 * tree["b"], "c": tree["c"] * np.float32(0.3)}
    found = diagnose.report(net, dead, [x], references=[tree, tree])
    assert [row.silent for row in found.layers] == [False, True, False]
    # What follows the branch is measured by what came before it.
    assert found.layers[2].step == pytest.approx(found.layers[2].relative, rel=RTOL)
    assert found.vanishes.site == found.largest_drop.site == "c"
    assert "100 % of the loss" in str(found)
    assert "What is left at b (depth 2 of 3) does not vary with the input" in str(found)
    (first, *others) = found.advice
    assert first.remedy in ("RESCALE", "REPAIR") and "at c (depth 3)" in first.reason
    assert "dead ones apart" in first.reason
    assert {"PFM"}.isdisjoint(one.remedy for one in others)
    mended = eval(
        first.call,
        {"vfjax": vfjax, "net": net, "merged": dead, "data": [x], "references": [tree, tree]},
    )
    after = diagnose.report(net, mended, [x], references=[tree, tree])
    assert after.layers[2].std_ratio == pytest.approx(1, rel=RTOL)
    assert "nothing to do" not in _remedies(after)


@pytest.mark.filterwarnings("error")
def test_a_merge_without_any_feature_left():
    def apply_fn(v, x):
        return jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"] + v["p"][None]) @ v["c"] + v["q"][None]

    shapes = {"a": (6, 8), "b": (8, 8), "c": (8, 3)}
    x, tree = _x(), _tree(shapes) | _tree({"p": (8,), "q": (3,)}, 1, 0.5)
    net = vfjax.trace(apply_fn, tree, x[:4])
    found = diagnose.report(net, tree | {"p": tree["p"] - 99}, [x], references=[tree, tree])
    assert found.left == 0 and found.vanishes.site == found.largest_drop.site == "c"
    assert found.layers[2].step == 0 and "0 of ||f(0)||" in str(found)
    # The first layer that is off is the one before; no numbers speak for any number of layers.
    assert _remedies(found) == ["REPAIR"] and "at b " in found.advice[0].reason


def test_channels_that_are_dead_are_not_for_scaling():
    x, tree = _x(), _tree({"a": (6, 8), "b": (8, 3)})
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a"]) @ v["b"], tree, x[:4])
    half = tree | {"a": tree["a"] * (np.arange(8) < 5)[None]}
    found = diagnose.report(net, half, [x], references=[tree])
    row = found.layers[0]
    assert row.std_ratio == pytest.approx(1, rel=RTOL) and row.dead == pytest.approx(3 / 8)
    assert row.relative < 1 and not any("at a " in one.reason for one in found.advice)


# --------------------------------------------------------------------------------------- wording


def test_biases_that_dominate_the_references_as_well():
    x, tree = _x(), _tree({"a": (6, 8)}) | {"p": np.full(8, 30, np.float32)}
    net = vfjax.trace(lambda v, x: x @ v["a"] + v["p"][None], tree, x[:4])
    for factor, words in (
        (1.0, "Biases dominate the output, but no more than in the references"),
        (0.8, "Biases dominate the output, somewhat more than in the references"),
        (0.2, "Biases dominate the output, and far more than in the references"),
    ):
        found = diagnose.report(
            net, tree | {"a": tree["a"] * np.float32(factor)}, [x], references=[tree]
        )
        assert words in str(found)
        assert found.biases_dominate == (factor == 0.2)
    plain = diagnose.report(net, tree | {"p": 0 * tree["p"]}, [x], references=[tree])
    assert "Biases do not dominate the output: there is no offset, in the references it is" in str(
        plain
    )
    assert "inf of" not in str(plain)


# ------------------------------------------------------------------------------ kinds of networks


def _same_and_half(net, tree, half, x):
    """Reports on a network next to itself, and on one that is damaged."""
    whole = diagnose.report(net, tree, [x], references=[tree, tree])
    assert _remedies(whole) == ["nothing to do"]
    np.testing.assert_allclose([row.relative for row in whole.layers], 1, rtol=RTOL)
    found = diagnose.report(net, half, [x], references=[tree])
    assert found.vanishes is not None
    return found


def test_layers_of_an_unrolled_scan():
    def apply_fn(v, x):
        def body(x, p):
            return jax.nn.relu(x @ p["w"] + p["b"][None]), None

        x, _ = jax.lax.scan(body, x @ v["a"], v["layers"])
        return x @ v["head"]

    rng = np.random.default_rng(0)
    layers = {"w": rng.normal(size=(3, 8, 8)) * 0.5, "b": rng.normal(size=(3, 8)) * 0.2}
    tree = _tree({"a": (6, 8), "head": (8, 2)}) | {"layers": jax.tree.map(np.float32, layers)}
    x = _x()
    net = vfjax.trace(apply_fn, tree, x[:4])
    kernel = tree["layers"]["w"].copy()
    kernel[1] /= 8
    found = _same_and_half(net, tree, tree | {"layers": tree["layers"] | {"w": kernel}}, x)
    assert len(found.layers) == 5 and "[1]" in found.largest_drop.site
    ratios = [row.kernel_ratio for row in found.layers]
    np.testing.assert_allclose(ratios, [1, 1, 1 / 8, 1, 1], rtol=RTOL)
    # Stacked biases serve a layer each.
    near = [jax.tree.map(lambda a, s=s: a + np.float32(1e-3 * s), tree) for s in (1, -1)]
    weak = jax.tree.map(lambda a, b: a / 3 if a.ndim == b.ndim and a.ndim > 1 else a, tree, tree)
    weak["layers"]["b"] = tree["layers"]["b"] + 3
    found = diagnose.report(net, weak, [x], references=near)
    (one,) = [one for one in found.advice if one.remedy == "bias calibration"]
    names = {"vfjax": vfjax, "net": net, "merged": weak, "references": near}
    after = diagnose.report(net, eval(one.call, names), [x], references=near)
    assert after.layers[-1].ratio > found.layers[-1].ratio


def test_equinox_and_nnx():
    x = _x()
    model = eqx.nn.MLP(6, 3, 8, 2, key=jax.random.key(0))
    tree, static = eqx.partition(model, eqx.is_array)
    net = vfjax.trace(lambda v, x: jax.vmap(eqx.combine(v, static))(x), tree, x[:4])
    half = eqx.tree_at(lambda t: t.layers[1].weight, tree, tree.layers[1].weight / 8)
    found = _same_and_half(net, tree, half, x)
    assert found.largest_drop.depth == 2
    mended = eval(
        found.advice[0].call,
        {"vfjax": vfjax, "net": net, "merged": half, "data": [x], "references": [tree]},
    )
    assert jax.tree.structure(mended) == jax.tree.structure(tree)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.first(x)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    net = vfjax.trace(lambda s, x: nnx.merge(graphdef, s)(x), state, x[:4])
    found = _same_and_half(net, state, jax.tree.map(lambda a: a / 8, state), x)
    assert found.end == "the output" and found.advice[0].remedy == "RESCALE"


def test_inputs_that_hold_integers():
    def apply_fn(v, x):
        return jax.nn.relu(v["table"][x["token"]] + x["value"] @ v["a"]) @ v["b"]

    tree = _tree({"table": (5, 8), "a": (6, 8), "b": (8, 3)})
    x = {"token": np.random.default_rng(1).integers(0, 5, 60).astype(np.int32), "value": _x()}
    net = vfjax.trace(apply_fn, tree, jax.tree.map(lambda a: a[:4], x))
    found = _same_and_half(net, tree, tree | {"b": tree["b"] / 8}, x)
    assert found.vanishes.site == "b" and found.left == pytest.approx(1 / 8, rel=RTOL)


class Normed(nn.Module):
    """A bfloat16 network with BatchNorm, whose output is float32."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv", dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=True, name="norm", dtype=jnp.bfloat16)(x)
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(3, name="head", dtype=jnp.bfloat16)(x).astype(jnp.float32)


def test_bfloat16_networks_with_norms():
    x = _x((40, 5, 5, 3))
    model = Normed()
    tree = initial(model, x[:4])
    net = vfjax.trace(lambda v, x: model.apply(v, x), tree, x[:4])
    tree = vfjax.renorm.reset(net, tree, [x], sweeps="layer")
    head = tree["params"]["head"]
    half = tree | {
        "params": tree["params"] | {"head": head | {"kernel": head["kernel"] / np.float32(8)}}
    }
    found = _same_and_half(net, tree, half, x)
    assert found.end == "the output" and found.layers[-1].site == "output"
    # bfloat16 has 8 bits.
    assert found.left == pytest.approx(1 / 8, rel=0.02)
    model = merge.preserve_first(net, [tree, tree], layers=1)
    whole = diagnose.report(net, model, [x], references=[tree, tree])
    assert _remedies(whole) == ["nothing to do"] and not any(norm.stale for norm in whole.norms)
