"""What is a layer, its bias and its pre-activation: the rules, one by one."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import vfjax
from helpers import close
from vfjax import models


def S(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(fn, variables, x=S(5, 3)):  # noqa: B008
    return vfjax.trace(fn, variables, x)


def linen(model, x):
    return vfjax.trace(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)


# ------------------------------------------------------------------------------------------ depth


def test_depths_of_the_paper_s_networks():
    for name, depth, shortcuts in (("vgg16", 14, 0), ("resnet20", 20, 2)):
        model = models.create(name)
        x = S(2, 32, 32, 3)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        net = vfjax.trace(models.apply_fn(model), variables, x)
        assert net.depth == depth
        assert sorted(layer.depth for layer in net.layers if layer.main) == list(
            range(1, depth + 1)
        )
        assert sum(not layer.main for layer in net.layers) == shortcuts


@pytest.mark.parametrize(
    ("name", "parameters", "flops"),
    [
        ("vgg16", 14_719_818, 313_879_552),
        ("vgg16-bn", 14_728_266, 314_432_512),
        # 41,214,592 of the paper's tool, and the input of the last mean and activations.
        ("resnet20", 272_474, 41_407_104),
    ],
)
def test_counts(name, parameters, flops):
    model = models.create(name)
    for batch in (1, 7):
        x = S(batch, 32, 32, 3)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        net = vfjax.trace(models.apply_fn(model), variables, x)
        assert (net.params, net.flops) == (parameters, flops)


def test_costs_of_preserving_the_first_layers():
    model = models.create("vgg16")
    x = S(2, 32, 32, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    net = vfjax.trace(models.apply_fn(model), variables, x)
    # PFM8/14 of two models (table 1): 17.64 M and 0.524 G.
    assert round((2 * net.stem_params(8) + net.trunk_params(8)) / 1e6, 2) == 17.64
    assert round((2 * net.stem_flops(8) + net.trunk_flops(8)) / 1e9, 3) == 0.524
    for depth in range(15):
        assert net.stem_flops(depth) + net.trunk_flops(depth) == net.flops
        assert net.stem_params(depth) + net.trunk_params(depth) == net.params


def test_attention_shares_a_depth():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x))

    net = linen(Block(), S(5, 4, 6))
    found = {layer.name.split("/")[-2]: layer for layer in net.layers}
    assert {found[k].depth for k in ("query", "key", "value")} == {1}
    assert (found["out"].depth, found["Dense_0"].depth, net.depth) == (2, 3, 3)
    assert all(layer.main for layer in net.layers)
    assert found["query"].channels == 6 and found["query"].channel_shape == (2, 3)
    assert found["query"].bias.endswith("query/bias") and found["out"].sample_axes == (0, 1)


def test_parallel_branches_and_shortcuts():
    def fn(p, x):
        deep = jnp.tanh(x @ p["a"]) @ p["b"]
        return deep + x @ p["short"] + jnp.tanh(deep @ p["c"])

    p = {"a": S(3, 4), "b": S(4, 4), "c": S(4, 4), "short": S(3, 4)}
    net = trace(fn, p)
    assert {(x.name, x.depth, x.main) for x in net.layers} == {
        ("a", 1, True), ("b", 2, True), ("c", 3, True), ("short", 1, False)
    }  # fmt: skip
    assert net.residual and not trace(lambda p, x: x @ p, S(3, 4)).residual


# ------------------------------------------------------------------------------------------ layers


def test_what_is_no_layer():
    def fn(p, x):
        return (x @ x.T) @ (x @ (p["a"] @ p["b"]))

    net = trace(fn, {"a": S(3, 7), "b": S(7, 2)})
    assert [(x.name, x.kernel, x.shape) for x in net.layers] == [("a", None, (3, 2))]


def test_masked_and_low_rank_kernels_are_named_and_have_no_kernel():
    p = {"kernel": S(3, 4), "a_mask": S(3, 4, dtype=bool), "u": S(3, 2), "v": S(2, 4)}
    net = trace(lambda p, x: x @ (p["kernel"] * p["a_mask"]), p)
    assert [(x.name, x.kernel, x.params) for x in net.layers] == [("kernel", None, 0)]
    net = trace(lambda p, x: x @ (p["kernel"] + p["u"] @ p["v"]), p)
    assert [(x.name, x.kernel) for x in net.layers] == [("kernel", None)]
    assert not net.can_fold("kernel")


def test_kernels_behind_casts_and_layout():
    p = S(2, 4, 3)

    def fn(p, x):
        w = lax.stop_gradient(p).astype(jnp.bfloat16).reshape(8, 3).T
        return x.astype(jnp.bfloat16) @ w

    assert trace(fn, p).layers[0].kernel == ""


def test_sharing_gives_one_entry_per_use():
    net = trace(lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"].T, {"w": S(3, 3)})
    assert [(x.name, x.depth) for x in net.layers] == [("w", 1), ("w#2", 2), ("w#3", 3)]
    assert net.params == 9 and net.trunk_params(0) == 9
    assert not any(net.can_fold(x.name) for x in net.layers)


def test_stacked_layers_of_a_scan():
    def fn(p, x):
        def body(x, layer):
            return jnp.tanh(x @ layer["kernel"] + layer["bias"][None]), None

        return lax.scan(body, x, p["layers"])[0] @ p["head"]

    layers = {"kernel": S(3, 3, 3), "bias": S(3, 3)}
    net = trace(fn, {"layers": layers, "head": S(3, 2)})
    assert [(x.name, x.depth, x.bias) for x in net.layers] == [
        *((f"layers/kernel[{k}]", k + 1, "layers/bias") for k in range(3)), ("head", 4, None)
    ]  # fmt: skip
    assert [x.params for x in net.layers] == [12, 12, 12, 6]
    assert net.opaque == ()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linen_scan(dtype):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(4, dtype=dtype)(x)
            return nn.relu(nn.BatchNorm(use_running_average=True)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            scan = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scan()(x, None)[0]

    net = linen(Net(), S(5, 4))
    assert [x.name.rpartition("/")[2] for x in net.layers] == [f"kernel[{k}]" for k in range(3)]
    assert [x.name.rpartition("/")[2] for x in net.norms] == [f"mean[{k}]" for k in range(3)]
    assert [x.norm for x in net.layers] == [x.name for x in net.norms]
    assert all(net.can_fold(x.name) for x in net.layers)


@pytest.mark.parametrize(
    ("how", "primitive"),
    [
        (lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"]), x), "scan"),
        (lambda p, x: lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ p["w"] - 1, x), "while"),
        (lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x), "cond"),
        (lambda p, x: lax.map(lambda r: r @ p["w"], x), "scan"),
        (lambda p, x: lax.scan(lambda c, w: (c @ w, None), x, p["many"])[0], "scan"),
    ],
)
def test_opaque_layers_are_reported(how, primitive):
    p = {"w": jnp.eye(3), "many": jnp.ones((65, 3, 3)) / 3, "head": jnp.ones((3, 2))}
    x = jnp.ones((5, 3))

    def fn(p, x):
        return how(p, x) @ p["head"]

    net = trace(fn, p, x)
    assert [x.name for x in net.layers] == ["head"] and net.depth == 1
    assert [name for name, _ in net.opaque] == [primitive]
    assert net.opaque[0][1].startswith("test_layers.py:")
    assert f"opaque: {primitive} at test_layers.py" in net.summary()
    close(net.run(p, x), fn(p, x))
    with pytest.raises(ValueError, match=rf"no site 'w'.*inside the opaque {primitive}"):
        net.run(p, x, capture=["w"])
    with pytest.raises(ValueError, match=r"stop was 2.*1 layers.*cannot be reached"):
        net.run(p, x, stop=2)


def test_inlined_wrappers_show_their_layers():
    @jax.custom_vjp
    def dense(w, x):
        return x @ w

    dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))

    def fn(p, x):
        x = jax.checkpoint(lambda x: jnp.tanh(x @ p["remat"]))(x)
        x = jax.jit(lambda x: jax.jit(lambda x: x @ p["jit"])(x))(x)
        return dense(p["custom"], x)

    net = trace(fn, {k: S(3, 3) for k in ("remat", "jit", "custom")})
    assert [x.name for x in net.layers] == ["remat", "jit", "custom"]


# ---------------------------------------------------------------------------------- pre-activation


def layer_of(fn, variables, x=S(5, 3)):  # noqa: B008
    (layer,) = trace(fn, variables, x).layers
    return layer


W, B = S(3, 4), S(4)


@pytest.mark.parametrize(
    "add",
    [
        lambda z, b: z + b[None],
        lambda z, b: b[None] + z,
        lambda z, b: z + jnp.broadcast_to(b, z.shape),
        lambda z, b: z + jnp.broadcast_to(b[:, None], (4, 5)).T,
        lambda z, b: z.astype("float16") + b.astype("float16")[None],
        lambda z, b: (z.reshape(5, 2, 2) + b.reshape(1, 2, 2)).reshape(5, 4),
        lambda z, b: z.T + b[:, None],
        lambda z, b: z[None] + b[None, None],
        lambda z, b: z + 2 * b[None],
    ],
)
def test_biases(add):
    layer = layer_of(lambda p, x: jnp.tanh(add(x @ p[0], p[1])), (W, B))
    computed = layer.bias is None and layer.output_shape == (5, 4)  # 2 * b is no leaf
    assert layer.bias == "1" or computed
    assert layer.channels == 4


@pytest.mark.parametrize(
    "add",
    [
        lambda z, b: z - b[None],
        lambda z, b: z + b[0],
        lambda z, b: jnp.tanh(z) + b[None],
        lambda z, b: z * b[None],
        lambda z, b: z + jnp.tanh(z) + b[None],
        lambda z, b: z + z * b[None],
    ],
)
def test_no_biases(add):
    layer = layer_of(lambda p, x: add(x @ p[0], p[1]), (W, B))
    assert layer.bias is None or not trace(lambda p, x: add(x @ p[0], p[1]), (W, B)).can_fold("0")
    assert layer.output_shape == (5, 4)


def test_an_embedding_of_positions_is_no_bias():
    fn = lambda p, x: x @ p["w"] + p["positions"][None]  # noqa: E731
    net = trace(fn, {"w": S(3, 4), "positions": S(6, 4)}, S(5, 6, 3))
    assert net.layers[0].bias is None
    assert [(path, op) for path, op, _ in net.others] == [("positions", "add")]
    # After a bias, a second sum is no bias either.
    both = lambda p, x: x @ p["w"] + p["b"][None] + p["c"][None]  # noqa: E731
    net = trace(both, {"w": S(3, 4), "b": S(4), "c": S(4)})
    assert net.layers[0].bias == "b" and net.others[0][0] == "c"


def test_a_value_read_twice_ends_the_search():
    fn = lambda p, x: (lambda z: z.sum() + jnp.tanh(z + p["b"][None]))(x @ p["w"])  # noqa: E731
    assert trace(fn, {"w": S(3, 4), "b": S(4)}).layers[0].bias is None


def test_channel_axes_follow_layout():
    fn = lambda p, x: (x @ p).reshape(5, 7, 2, 4).transpose(0, 2, 1, 3) + 0 * 1.0  # noqa: E731
    layer = layer_of(fn, S(3, 8), S(5, 7, 3))
    assert layer.output_shape == (5, 7, 8) and layer.channel_axes == (2,)
    fn = lambda p, x: (x @ p[0]).reshape(5, 7, 2, 4).transpose(0, 2, 1, 3) + p[1]  # noqa: E731
    layer = layer_of(fn, (S(3, 8), S(1, 2, 1, 4)), S(5, 7, 3))
    assert (layer.channel_axes, layer.sample_axes) == ((1, 3), (0, 2))
    assert layer.bias == "1" and layer.channel_shape == (2, 4)


def test_reshapes_that_mix_channels_and_samples_end_the_search():
    fn = lambda p, x: (x @ p[0]).reshape(5, 28) + p[1][None]  # noqa: E731
    layer = layer_of(fn, (S(3, 4), S(28)), S(5, 7, 3))
    assert layer.output_shape == (5, 7, 4) and layer.bias is None


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_and_depthwise_convolutions(groups):
    net = linen(nn.Conv(8, (3, 3), feature_group_count=groups), S(5, 6, 6, 4))
    (layer,) = net.layers
    assert layer.kind == "conv" and layer.channel_axes == (3,) and layer.channels == 8
    assert layer.params == 9 * (4 // groups) * 8 + 8
    assert layer.flops == 36 * layer.params
    assert net.can_fold(layer.name)


def test_layouts_of_equinox_and_einsum():
    conv = eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0))
    params, static = eqx.partition(conv, eqx.is_array)
    fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    net = trace(fn, params, S(5, 3, 8, 8))
    (layer,) = net.layers
    assert (layer.name, layer.bias, layer.channel_axes) == ("weight", "bias", (1,))
    assert layer.output_shape == (5, 4, 6, 6)
    layer = layer_of(lambda p, x: jnp.einsum("oi,bi->bo", p["w"], x), {"w": S(4, 3)})
    assert (layer.kernel, layer.channel_axes, layer.shape) == ("w", (1,), (4, 3))
    layer = layer_of(lambda p, x: jnp.einsum("oi,bi->ob", p["w"], x), {"w": S(4, 3)})
    assert (layer.channel_axes, layer.sample_axes) == ((0,), (1,))
    layer = layer_of(lambda p, x: jnp.einsum("hde,bhd->bhe", p, x), S(2, 3, 4), S(5, 2, 3))
    assert layer.channels == 8
