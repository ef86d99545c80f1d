"""Normalisation found by its formula, and leaves outside of layers, norms and biases."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import vfjax


def S(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(fn, variables, x=S(5, 3)):  # noqa: B008
    return vfjax.trace(fn, variables, x)


def linen(model, x):
    return vfjax.trace(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)


def normalised(formula, **leaves):
    shapes = {"w": S(3, 4), "mean": S(4), "var": S(4), **leaves}
    return trace(lambda p, x: jnp.tanh(formula(p, x @ p["w"])), shapes)


def at(p, name):
    return p[name][None]


NORMS = {
    "linen": lambda p, x: (x - at(p, "mean")) * (lax.rsqrt(at(p, "var") + 1e-3) * at(p, "scale"))
    + at(p, "bias"),
    "division": lambda p, x: (x - at(p, "mean")) / jnp.sqrt(at(p, "var") + 1e-3) * at(p, "scale")
    + at(p, "bias"),
    "clamped": lambda p, x: (x - at(p, "mean"))
    / jnp.sqrt(jnp.maximum(p["var"], 0) + 1e-3)[None]
    * at(p, "scale")
    + at(p, "bias"),
    "haiku": lambda p, x: (x - at(p, "mean")) * (p["scale"] * lax.rsqrt(p["var"] + 1e-3))[None]
    + at(p, "bias"),
    "power": lambda p, x: (x - at(p, "mean")) * ((p["var"] + 1e-3) ** -0.5)[None] * at(p, "scale")
    + at(p, "bias"),
    "scale first": lambda p, x: (x - at(p, "mean")) * at(p, "scale")
    / jnp.sqrt(p["var"] + 1e-3)[None]
    + at(p, "bias"),
    "reciprocal": lambda p, x: (x - at(p, "mean")) * (1 / jnp.sqrt(p["var"] + 1e-3))[None]
    * at(p, "scale")
    + at(p, "bias"),
}  # fmt: skip


@pytest.mark.parametrize("formula", NORMS)
def test_formulas_of_norms(formula):
    net = normalised(NORMS[formula], scale=S(4), bias=S(4))
    (norm,) = net.norms
    assert (norm.mean, norm.var, norm.scale, norm.bias) == ("mean", "var", "scale", "bias")
    assert norm.eps == pytest.approx(1e-3) and norm.channel_axes == (1,)
    assert norm.layer == "w" and net.layer("w").norm == "mean"
    assert net.others == () and net.statistics == {"mean", "var"}
    assert net.params == 12 + 8


@pytest.mark.parametrize(
    "formula",
    [
        lambda p, x: (x - at(p, "mean")) * jnp.sqrt(p["var"] + 1e-3)[None],
        lambda p, x: (x - at(p, "mean")) * lax.rsqrt(p["var"] - p["mean"] ** 2)[None],
        lambda p, x: (x - at(p, "mean")) * lax.rsqrt(jnp.exp(p["var"]) + 1e-3)[None],
        lambda p, x: (at(p, "mean") - x) * lax.rsqrt(p["var"] + 1e-3)[None],
        lambda p, x: jnp.tanh(x - at(p, "mean")) * lax.rsqrt(p["var"] + 1e-3)[None],
        lambda p, x: (x - at(p, "mean")) * lax.rsqrt(p["var"].sum() + 1e-3),
    ],
)
def test_what_is_no_norm(formula):
    with pytest.warns(UserWarning, match=r"test_norms.py:\d+.*reset cannot renew") as warned:
        net = normalised(formula)
    assert "'mean' subtracts" in str(warned[0].message) or "'var' divides" in str(warned[0].message)
    assert net.norms == ()
    assert {path for path, _, _ in net.others} == {"mean", "var"}


@pytest.mark.parametrize(("scale", "bias"), [(True, True), (False, True), (False, False)])
def test_norms_of_linen_nnx_and_equinox(scale, bias):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            how = {"use_scale": scale, "use_bias": bias, "epsilon": 1e-4}
            return nn.relu(nn.BatchNorm(use_running_average=True, **how)(x))

    (norm,) = linen(Net(), S(5, 6, 6, 3)).norms
    assert norm.name == "batch_stats/BatchNorm_0/mean" and norm.eps == pytest.approx(1e-4)
    assert (norm.scale is None, norm.bias is None) == (not scale, not bias)

    how = {"use_scale": scale, "use_bias": bias, "rngs": nnx.Rngs(0)}
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, **how))
    module.eval()
    graphdef, state = nnx.split(module)
    net = trace(lambda s, x: nnx.merge(graphdef, s)(x), state)
    assert [n.mean for n in net.norms] == ["layers/1/mean"]
    assert net.layers[0].norm == "layers/1/mean"
    assert (net.norms[0].scale is None, net.norms[0].bias is None) == (not scale, not bias)

    if scale == bias:
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            4, axis_name="b", mode="ema", channelwise_affine=scale
        )
        params, static = eqx.partition((norm, state), eqx.is_array)

        def fn(p, x):
            module, state = eqx.combine(p["norm"], static)
            module = eqx.nn.inference_mode(module)
            return jax.vmap(lambda r: module(p["w"] @ r, state)[0])(x)

        (norm,) = trace(fn, {"norm": params, "w": S(4, 3)}).norms
        assert norm.layer == "w" and (norm.scale is None) == (not scale)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm])
def test_norms_by_the_input_s_own_moments_are_none(norm):
    how = {"num_groups": 2} if norm is nn.GroupNorm else {}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(norm(**how)(nn.Conv(4, (3, 3))(x)))

    net = linen(Net(), S(5, 6, 6, 3))
    assert net.norms == ()
    assert net.others == ()  # yet their scale and bias count as a norm's


def test_the_layer_norm_of_equinox_is_a_norm():
    params, static = eqx.partition(eqx.nn.LayerNorm(3), eqx.is_array)
    fn = lambda p, x: jax.vmap(eqx.combine(p["norm"], static))(x) @ p["w"]  # noqa: E731
    assert trace(fn, {"norm": params, "w": S(3, 4)}).others == ()


def test_layers_of_a_library_s_own_modules_say_where():
    net = linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), S(5, 3))
    assert all(layer.where != "unknown" for layer in net.layers)


def test_leaves_outside_of_layers_are_reported():
    def fn(p, x):
        y = p["embedding"][x] + p["positions"][None]
        y = y + p["gamma"][None, None] * (y @ p["w"])
        return y @ p["embedding"].T, p["output"]

    p = {"embedding": S(9, 4), "positions": S(6, 4), "gamma": S(4), "w": S(4, 4)}
    p |= {"unread": S(3), "output": S(2)}
    net = trace(fn, p, S(5, 6, dtype=jnp.int32))
    assert [(path, op) for path, op, _ in net.others] == [
        ("embedding", "gather"), ("positions", "add"), ("gamma", "mul"), ("output", "output")
    ]  # fmt: skip
    assert all(where.startswith("test_norms.py:") for _, op, where in net.others if op != "output")
    assert "norms and biases: positions (add at test_norms.py" in net.summary()


def test_a_leaf_that_is_only_subtracted_is_a_bias_with_another_sign():
    net = trace(lambda p, x: jnp.tanh(x @ p["w"] - at(p, "b")), {"w": S(3, 4), "b": S(4)})
    assert net.unrecognised == ()


@pytest.mark.parametrize(
    ("fn", "leaves"),
    [
        # Distances to prototypes, a temperature, the scale and shift of a frozen norm, a gain.
        (lambda p, x: jnp.square(x[:, None] - p["c"][None]).sum(-1), {"c": S(6, 3)}),
        (lambda p, x: (x @ p["w"] - 1.0) / p["t"], {"w": S(3, 4), "t": S()}),
        (lambda p, x: (x @ p["w"]) * at(p, "s") + at(p, "b"), {"w": S(3, 4), "s": S(4), "b": S(4)}),
        (lambda p, x: (x @ p["w"]) * (1 - at(p, "s")), {"w": S(3, 4), "s": S(4)}),
        # A temperature per channel, a snake activation, a leaf over an activation.
        (lambda p, x: jax.nn.softmax((x @ p["w"]) / at(p, "t")), {"w": S(3, 4), "t": S(4)}),
        (
            lambda p, x: (
                x @ p["w"] + jnp.sin(x @ p["w"] * at(p, "a")) ** 2 * (1 / (at(p, "a") + 1))
            ),
            {"w": S(3, 4), "a": S(4)},
        ),
        (
            lambda p, x: at(p, "a") / jnp.exp(x @ p["w"]) * at(p, "s"),
            {"w": S(3, 4), "a": S(4), "s": S(4)},
        ),
        # A weight-standardised kernel.
        (
            lambda p, x: x @ ((p["w"] - p["w"].mean(0)[None]) / p["w"].std(0)[None]) + at(p, "b"),
            {"w": S(3, 4), "b": S(4)},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The network has no layers")
def test_what_looks_like_no_statistic_is_not_warned_about(fn, leaves):
    net = trace(fn, leaves)
    assert net.norms == () and net.unrecognised == ()


def test_a_norm_folded_into_its_layer_on_the_fly_is_not_silent():
    def fn(p, x):
        inv = p["scale"] * lax.rsqrt(p["var"] + 1e-3)
        return jnp.tanh(x @ (p["w"] * inv[None]) + at(p, "bias") - (p["mean"] * inv)[None])

    def joined(p, x):
        inv = p["scale"] * lax.rsqrt(p["var"] + 1e-3)
        return jnp.tanh(x @ (p["w"] * inv[None]) + (p["bias"] - p["mean"] * inv)[None])

    leaves = {"w": S(3, 4)} | {name: S(4) for name in ("mean", "var", "scale", "bias")}
    for form in (fn, joined):
        with pytest.warns(UserWarning, match="'mean' subtracts from an activation"):
            net = trace(form, leaves)
        assert net.norms == () and "of no norm: mean (subtracts from" in net.summary()


def test_statistics_that_serve_several_channels_each_are_not_silent():
    """Two means for four channels: what a channel's statistic is cannot be written."""

    def fn(p, x):
        mean, var = (jnp.repeat(p[name], 2)[None] for name in ("mean", "var"))
        return jnp.tanh((x @ p["w"] - mean) * lax.rsqrt(var + 1e-3))

    with pytest.warns(UserWarning, match="'mean' subtracts .*'var' divides"):
        net = trace(fn, {"w": S(3, 4), "mean": S(2), "var": S(2)})
    assert net.norms == ()


@pytest.mark.parametrize("channels", [1, 4])
def test_scalars_are_told_from_statistics(channels):
    """Of one channel, a counter has as many entries as a mean."""

    def fn(p, x):
        left = 1 - 0.9 ** p["count"]
        y = x @ p["w"] - at(p, "mean") / left
        return jnp.tanh(y * lax.rsqrt(at(p, "var") / left + p["eps"]) * p["gain"])

    leaves = {"w": S(3, channels), "mean": S(channels), "var": S(channels), "gain": S()}
    net = trace(fn, leaves | {"count": S(dtype=jnp.int32), "eps": S()})
    assert [(n.mean, n.var, n.bias) for n in net.norms] == [("mean", "var", None)]
