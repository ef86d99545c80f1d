"""Folding a correction into leaves equals making it on the pre-activation, in every layout."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from helpers import close
from vfjax import FoldError

KEY = jax.random.key(0)


def normal(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(sum(shape) + len(shape))
    return jnp.asarray(rng.standard_normal(shape), dtype)


ROWS, IMAGES = normal(4, 3), normal(4, 6, 6, 3)


def positive(*shape):
    return jnp.abs(normal(*shape)) + 0.5


def init(model, x):
    """Random variables of a Flax module."""
    shapes = jax.eval_shape(model.init, KEY, x)
    draw = lambda path, a: (positive if "var" in str(path) else normal)(*a.shape)  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, shapes)


def check(net, variables, x, name, *, shift=True, rtol=2e-5):
    """`fold` against `edit`; rtol is a few float32 roundings of sums."""
    layer = net.layer(name)
    scale = 0.5 + jax.random.uniform(KEY, layer.channel_shape)
    offset = jax.random.normal(KEY, layer.channel_shape) if shift else None

    def correct(z):
        wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        new = wide * jnp.expand_dims(scale, layer.sample_axes)
        return (new if offset is None else new + jnp.expand_dims(offset, layer.sample_axes)).astype(
            z.dtype
        )

    expected = jax.jit(lambda v, x: net.run(v, x, edit={name: correct}))(variables, x)
    assert net.can_fold(name, shift=shift)
    folded = net.fold(variables, name, scale, offset)
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(variables), strict=True):
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
    out = jax.jit(net.run)(folded, x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * abs(b).max())
    assert not all(
        jnp.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(folded), strict=True)
    )


def bias(p):
    return p["b"][None]


STYLES = {
    "dense": (lambda p, x: jnp.tanh(x @ p["w"] + bias(p)), (3, 4), (4,)),
    "out, in": (lambda p, x: jnp.einsum("oi,bi->bo", p["w"], x) + bias(p), (4, 3), (4,)),
    "channels first": (lambda p, x: (jnp.einsum("oi,bi->ob", p["w"], x) + p["b"][:, None]),
                       (4, 3), (4,)),
    "transposed": (lambda p, x: (x @ p["w"]).T + p["b"][:, None], (3, 4), (4,)),
    "vmap": (lambda p, x: jax.vmap(lambda r: p["w"] @ r + p["b"])(x), (4, 3), (4,)),
    "heads": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]) + bias(p), (3, 2, 5), (2, 5)),
    "heads, turned": (lambda p, x: jnp.einsum("bi,ihd->bdh", x, p["w"]) + bias(p),
                      (3, 2, 5), (5, 2)),
    "heads by reshape": (
        lambda p, x: (x @ p["w"]).reshape(4, 2, 5).transpose(0, 2, 1) + p["b"].reshape(1, 5, 2),
        (3, 10), (10,)),
    "heads by batch": (lambda p, x: jnp.einsum("bi,hid->hbd", x, p["w"]) + p["b"][:, None],
                       (2, 3, 5), (2, 5)),
    "kernel reshaped": (lambda p, x: x @ p["w"].reshape(3, 4).astype("float32") + bias(p),
                        (3, 2, 2), (4,)),
    "bias cast, reshaped": (
        lambda p, x: x @ p["w"] + jnp.broadcast_to(p["b"].reshape(1, 4), (4, 4)), (3, 4), (2, 2)),
    "no bias, scale": (lambda p, x: jnp.tanh(x @ p["w"]), (3, 4), None),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_dense_layers(style):
    fn, kernel, shape = STYLES[style]
    variables = {"w": normal(*kernel)} | ({} if shape is None else {"b": normal(*shape)})
    net = vfjax.trace(fn, variables, ROWS)
    check(net, variables, ROWS, "w", shift=shape is not None)
    if shape is not None:
        check(net, variables, ROWS, "w", shift=False)


@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions(groups):
    model = nn.Conv(6, (3, 3), feature_group_count=groups)
    variables = init(model, IMAGES)
    check(vfjax.trace(model.apply, variables, IMAGES), variables, IMAGES, "params/kernel")
    dims = ("NCHW", "OIHW", "NCHW")
    images = jnp.moveaxis(IMAGES, 3, 1)
    variables = {"w": normal(6, 3 // groups, 3, 3), "b": normal(6)}
    fn = lambda p, x: (  # noqa: E731
        lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups
        )
        + p["b"][None, :, None, None]
    )
    check(vfjax.trace(fn, variables, images), variables, images, "w")


def test_equinox_and_dense_general():
    module = eqx.nn.Conv2d(3, 4, 3, key=KEY)
    params, static = eqx.partition(module, eqx.is_array)
    images = jnp.moveaxis(IMAGES, 3, 1)
    net = vfjax.trace(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, images)
    check(net, params, images, "weight")
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    x = normal(2, 5, 3)
    variables = init(model, x)
    net = vfjax.trace(lambda v, x: model.apply(v, x, x), variables, x)
    assert len(net.layers) == 4
    for layer in net.layers:
        check(net, variables, x, layer.name, rtol=1e-4)  # softmax magnifies rounding


def stacked(p, x):
    def body(x, layer):
        return jnp.tanh(x @ layer["w"].astype("float32") + layer["b"][None]), None

    return lax.scan(body, x, p)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_slice_of_stacked_layers(dtype):
    variables = {"w": normal(3, 3, 3, dtype=dtype), "b": normal(3, 3)}
    net = vfjax.trace(stacked, variables, ROWS)
    rtol = 0.02 if dtype == jnp.bfloat16 else 2e-5
    check(net, variables, ROWS, "w[1]", rtol=rtol)
    folded = net.fold(variables, "w[1]", jnp.full(3, 2.0), jnp.ones(3))
    for k, factor in enumerate((1, 2, 1)):
        assert jnp.array_equal(folded["w"][k], variables["w"][k] * factor)


def test_bfloat16_leaves_in_float32_arithmetic():
    variables = {"w": normal(3, 4, dtype=jnp.bfloat16), "b": normal(4, dtype=jnp.bfloat16)}
    net = vfjax.trace(
        lambda p, x: x @ p["w"].astype("float32") + p["b"].astype("float32")[None], variables, ROWS
    )
    # The folded leaf is rounded to 8 bits once, after arithmetic in float32.
    check(net, variables, ROWS, "w", rtol=2**-7)
    scale = jnp.full(4, 1 + 2**-9)
    wide = variables["b"].astype("float32") * scale + 0.3
    folded = net.fold(variables, "w", scale, jnp.full(4, 0.3))
    assert jnp.array_equal(folded["b"], wide.astype("bfloat16"))


class Normalised(nn.Module):
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=self.use_bias)(x)
        return nn.relu(nn.BatchNorm(use_running_average=True)(x))


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_shift_goes_into_the_bias_or_the_mean_that_follows(use_bias):
    model = Normalised(use_bias)
    variables = init(model, IMAGES)
    net = vfjax.trace(model.apply, variables, IMAGES)
    check(net, variables, IMAGES, "params/Conv_0/kernel")
    folded = net.fold(variables, "params/Conv_0/kernel", jnp.ones(4), jnp.ones(4))
    means = [t["batch_stats"]["BatchNorm_0"]["mean"] for t in (folded, variables)]
    assert bool((means[0] == means[1]).all()) == use_bias


def norm(p, z):
    return (z - p["m"]) * lax.rsqrt(p["v"] + 1e-3)


def test_a_mean_behind_layout():
    fn = lambda p, x: jnp.tanh(norm(p, jax.vmap(lambda r: p["w"] @ r)(x)[:, None]))  # noqa: E731
    variables = {"w": normal(4, 3), "m": normal(1, 1, 4), "v": positive(1, 1, 4)}
    net = vfjax.trace(fn, variables, ROWS)
    assert net.layers[0].norm == "m"
    check(net, variables, ROWS, "w")


def test_under_jit_and_vmap():
    fn, kernel, shape = STYLES["dense"]
    variables = {"w": normal(*kernel), "b": normal(*shape)}
    net = vfjax.trace(fn, variables, ROWS)
    scale, shift = normal(4), normal(4)
    fold = lambda v, s, t: net.fold(v, "w", s, t)  # noqa: E731
    plain = fold(variables, scale, shift)
    for ours in (
        jax.jit(fold)(variables, scale, shift),
        jax.tree.map(lambda a: a[1], jax.vmap(fold, (None, 0, None))(
            variables, jnp.stack([shift, scale]), shift)),
    ):  # fmt: skip
        for name in plain:
            close(ours[name], plain[name])


def two(p, x):
    return jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"] + p["b"][None]


W, B = normal(3, 3), normal(3)
OBSTACLES = {
    "kernel twice": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": W}, False,
                     "kernel is used more than once"),
    "kernel an output": (lambda p, x: (x @ p["w"], p["w"]), {"w": W}, False,
                         "kernel is used more than once"),
    "kernel computed": (lambda p, x: x @ (p["w"] * 2), {"w": W}, False, "computed from several"),
    "kernel of integers": (lambda p, x: x @ p["w"].astype("float32"), {"w": W.astype("int8")},
                           False, "holds integers"),
    "bias twice": (lambda p, x: jnp.tanh(x @ p["w"] + bias(p)) * bias(p), {"w": W, "b": B}, True,
                   "bias is used more than once"),
    "bias computed": (lambda p, x: x @ p["w"] + (p["b"] * p["c"])[None],
                      {"w": W, "b": B, "c": B}, True, "bias is computed"),
    "bias shared by channels": (lambda p, x: x @ p["w"] + p["b"], {"w": W, "b": B[0]}, True,
                                "bias is shared between channels"),
    "bias shared by heads": (
        lambda p, x: (x @ p["w"]).reshape(4, 3, 1) + jnp.zeros((4, 3, 2)) + p["b"][None, None],
        {"w": W, "b": B[:2]}, True, "no bias and no normalisation"),
    "no bias": (lambda p, x: jnp.tanh(x @ p["w"]), {"w": W}, True, "no bias and no normalisation"),
    "mean shared by norms": (
        lambda p, x: norm(p, jnp.tanh(norm(p, x @ p["w"])) @ p["u"]),
        {"w": W, "u": normal(3, 3), "m": B[None], "v": positive(1, 3)}, True,
        "mean is used more than once"),
    "norm of two readers": (
        lambda p, x: (lambda z: norm(p, z) + z)(x @ p["w"]),
        {"w": W, "m": B[None], "v": positive(1, 3)}, True, "no bias and no normalisation"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles(name):
    fn, variables, shift, message = OBSTACLES[name]
    net = vfjax.trace(fn, variables, ROWS)
    layer = net.layer("w")
    assert not net.can_fold("w", shift=shift)
    ones = jnp.ones(layer.channel_shape)
    with pytest.raises(FoldError, match=f"layer 'w' cannot be folded: .*{message}"):
        net.fold(variables, "w", ones, ones if shift else None)


def test_tied_weights_inside_a_scan_are_shared():
    def fn(p, x):
        body = lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None)  # noqa: E731
        return lax.scan(body, x, p)[0]

    net = vfjax.trace(fn, normal(2, 3, 3), ROWS)
    assert [x.name for x in net.layers] == ["[0]", "[0]#2", "[1]", "[1]#2"]
    assert not any(net.can_fold(x.name, shift=False) for x in net.layers)


def test_bad_arguments():
    fn, kernel, shape = STYLES["dense"]
    variables = {"w": normal(*kernel), "b": normal(*shape)}
    net = vfjax.trace(fn, variables, ROWS)
    with pytest.raises(ValueError, match=r"scale has shape \(3,\).*shape \(4,\)"):
        net.fold(variables, "w", jnp.ones(3), None)
    with pytest.raises(ValueError, match=r"shift has shape \(\)"):
        net.fold(variables, "w", jnp.ones(4), 0.0)
    with pytest.raises(ValueError, match="no layer 'v'"):
        net.fold(variables, "v", jnp.ones(4), None)
    with pytest.raises(FoldError, match="variables lacks 'b'"):
        net.fold({"w": variables["w"], "b": None}, "w", jnp.ones(4), jnp.ones(4))


def test_a_kernel_reshaped_in_fortran_order_is_folded_right():
    keys = jax.random.split(jax.random.key(0), 3)
    v = {"a": jax.random.normal(keys[0], (4, 6)), "b": jax.random.normal(keys[1], (6, 2))}
    x = jax.random.normal(keys[2], (3, 4))

    def fn(v, x):
        return jnp.tanh(x @ jnp.reshape(v["a"].T, (4, 6), order="F")) @ v["b"]

    net = vfjax.trace(fn, v, x)
    scale = jnp.arange(1.0, 7.0)
    folded = net.fold(v, "a", scale, None)
    before, after = (net.run(tree, x, capture=["a"])[1]["a"] for tree in (v, folded))
    np.testing.assert_allclose(after, scale[None] * before, rtol=1e-5, atol=1e-5)
