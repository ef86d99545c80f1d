"""Running a traced network: the same function, in every style, with values read and replaced."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vfjax
from helpers import close, draw, normal

IMAGES = normal(7, 4, 6, 6, 3)
ROWS = normal(8, 4, 3)


class Pair(NamedTuple):
    w: object
    b: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: object
    bias: object
    name: str = dataclasses.field(default="block", metadata={"static": True})


class Linen(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "mlp":
            return nn.Dense(2)(nn.relu(nn.Dense(5)(x.reshape(x.shape[0], -1))))
        if self.kind == "attention":
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            x = x + nn.MultiHeadDotProductAttention(num_heads=3)(x, x)
            return nn.Dense(2)(nn.gelu(nn.LayerNorm()(x)))
        norm = {
            "conv": lambda: lambda x: x,
            "batch": lambda: nn.BatchNorm(use_running_average=True),
            "layer": lambda: nn.LayerNorm(),
            "group": lambda: nn.GroupNorm(num_groups=2),
        }[self.kind]
        x = nn.max_pool(nn.relu(norm()(nn.Conv(4, (3, 3))(x))), (2, 2), (2, 2))
        y = norm()(nn.Conv(6, (3, 3), use_bias=False)(nn.relu(norm()(x))))
        return nn.Dense(2)(nn.relu(y + nn.Conv(6, (1, 1))(x)).mean((1, 2)))


def linen(kind):
    model = Linen(kind)
    return model.apply, draw(jax.eval_shape(model.init, jax.random.key(0), IMAGES)), IMAGES


def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.drop(nnx.relu(self.norm(self.conv(x)))).mean((1, 2)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    return lambda s, x: nnx.merge(graphdef, s)(x), draw(state), IMAGES


def equinox():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = [
        eqx.nn.Conv2d(3, 4, 3, padding=1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(36, 2, key=keys[1]),
    ]
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    images = jnp.moveaxis(IMAGES, -1, 1)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, images


def plain(kind):
    w, b = ROWS[:2], jnp.arange(2.0)
    square = jnp.linspace(-1, 1, 9).reshape(3, 3)
    if kind == "einsum":
        return lambda p, x: jnp.einsum("oi,bi->bo", p["w"], x) + p["b"][None], {
            "w": w, "b": b
        }, ROWS  # fmt: skip
    if kind == "nchw":
        conv = lambda p, x: lax.conv(x, p, (2, 2), "SAME")  # noqa: E731
        return conv, draw(jax.ShapeDtypeStruct((2, 3, 3, 3), "float32")), jnp.moveaxis(IMAGES, 3, 1)
    if kind == "vmap":
        return lambda p, x: jax.vmap(lambda r: jnp.tanh(p["w"] @ r + p["b"]))(x), {
            "w": w, "b": b
        }, ROWS  # fmt: skip
    if kind == "bfloat16":
        fn = lambda p, x: jax.nn.relu(x @ p[0].T + p[1][None])  # noqa: E731
        return fn, [w.astype("bfloat16"), b.astype("bfloat16")], ROWS.astype("bfloat16")
    if kind == "mixed precision":
        fn = lambda p, x: (x.astype("bfloat16") @ p.astype("bfloat16").T).astype("float32")  # noqa: E731
        return fn, w, ROWS
    if kind == "containers":
        fn = lambda p, x: (  # noqa: E731
            (jnp.tanh(x @ p[0].w + p[0].b[None]) @ p[1]["x"].kernel) * p[2] + p[1]["y"]
        )
        block = {"x": Block(square, None), "y": jnp.float32(2)}
        return fn, (Pair(square, b.sum() + jnp.zeros(3)), block, 0.5, None, []), ROWS
    if kind == "tied":
        return lambda p, x: jnp.tanh(jnp.tanh(x @ p) @ p.T) @ p, square, ROWS
    if kind == "masked":
        fn = lambda p, x: x @ (p["w"] * p["m"]) @ (p["w"] + p["u"] @ p["v"])  # noqa: E731
        return fn, {"w": square, "m": square > 0, "u": w.T, "v": w}, ROWS
    if kind == "outputs":
        fn = lambda p, x: {  # noqa: E731
            "out": x @ p["w"], "input": x, "leaf": p["w"], "number": 3, "constant": jnp.arange(3),
            "none": None, "list": [x + p["s"], jnp.float32(1)],
        }  # fmt: skip
        return fn, {"w": square, "s": 2.0, "unused": b, "gone": None}, ROWS
    if kind == "tree input":
        fn = lambda p, x: x["a"] @ p + x["b"][1]  # noqa: E731
        return fn, square, {"a": ROWS, "b": [jnp.arange(4), 2 * ROWS]}
    if kind == "batch size":
        fn = lambda p, x: (x @ p) / x.shape[0] + x.sum(0, keepdims=True) * len(x)  # noqa: E731
        return fn, square, ROWS
    if kind == "weak":
        return lambda p, x: (x @ p) * jnp.asarray(2) + 1.5 * p.sum(), square, ROWS
    if kind == "numpy":
        return lambda p, x: x @ p, np.asarray(square), np.asarray(ROWS)
    raise KeyError(kind)


STYLES = {
    **{k: functools.partial(linen, k) for k in
       ("mlp", "conv", "batch", "layer", "group", "attention")},
    "nnx": flax_nnx,
    "equinox": equinox,
    **{k: functools.partial(plain, k) for k in (
        "einsum", "nchw", "vmap", "bfloat16", "mixed precision", "containers", "tied", "masked",
        "outputs", "tree input", "batch size", "weak", "numpy")},
}  # fmt: skip


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)


@pytest.mark.parametrize("style", STYLES)
def test_the_network_computes_the_function(style):
    fn, variables, x = STYLES[style]()
    net = vfjax.trace(fn, abstract(variables), abstract(x))
    expected = jax.jit(fn)(variables, x)
    # bfloat16 keeps 8 bits, and sums may be rounded in another order.
    rtol = 0.02 if "bfloat" in style or "mixed" in style else 1e-5
    close(jax.jit(net.run)(variables, x), expected, rtol)
    assert net.layers and net.depth >= 1
    # Another batch size: batch sizes sit in literals of a jaxpr.
    fewer = jax.tree.map(lambda a: a[:3], x)
    close(jax.jit(net.run)(variables, fewer), jax.jit(fn)(variables, fewer), rtol)


@pytest.mark.parametrize("style", ["batch", "nnx", "equinox", "containers"])
def test_eager_and_differentiated(style):
    fn, variables, x = STYLES[style]()
    net = vfjax.trace(fn, variables, x)
    close(net.run(variables, x), jax.jit(fn)(variables, x))
    floats, rest = eqx.partition(variables, eqx.is_inexact_array)
    size = lambda f: lambda p, x: (f(eqx.combine(p, rest), x) ** 2).sum()  # noqa: E731
    ours = jax.jit(jax.grad(size(net.run), (0, 1)))(floats, x)
    # Gradients add a few more roundings of float32.
    close(ours, jax.jit(jax.grad(size(fn), (0, 1)))(floats, x), 1e-4)


def test_vmap_over_models():
    fn, variables, x = linen("batch")
    net = vfjax.trace(fn, variables, x)
    trees = [variables, draw(variables, 1)]
    many = jax.tree.map(lambda *a: jnp.stack(a), *trees)
    out = jax.jit(jax.vmap(net.run, (0, None)))(many, x)
    close(out, jnp.stack([jax.jit(fn)(t, x) for t in trees]))


def test_the_gradient_of_relu_at_zero_is_kept():
    fn = lambda p, x: jax.nn.relu(x @ p).sum()  # noqa: E731
    x, p = jnp.zeros((2, 3)), jnp.ones((3, 3))
    net = vfjax.trace(fn, p, x)
    close(jax.grad(net.run, 1)(p, x), jax.grad(fn, 1)(p, x))
    assert not jax.grad(net.run, 1)(p, x).any()


def test_name_stacks_and_precision_are_those_of_the_function():
    fn, variables, x = linen("batch")

    def precise(v, x):
        with jax.default_matmul_precision("highest"):
            return fn(v, x)

    net = vfjax.trace(precise, variables, x)

    def linear(f):
        jaxpr = jax.make_jaxpr(f)(variables, x).jaxpr
        linear = [e for e in jaxpr.eqns if e.primitive.name.startswith(("dot_general", "conv_gen"))]
        return [(str(e.source_info.name_stack), e.params["precision"]) for e in linear]

    assert linear(net.run) == linear(precise)
    assert "Linen/Dense_0" in [stack for stack, _ in linear(net.run)]


# --------------------------------------------------------------------------------------- retracing


def test_traces_are_cached_by_shape_and_setting():
    calls = []

    def fn(p, x):
        calls.append(x.shape)
        return x @ p / x.shape[0]

    p, x = jnp.ones((3, 3)), jnp.ones((4, 3))
    net = vfjax.trace(fn, p, abstract(x))
    run = jax.jit(net.run)
    for _ in range(3):
        net.run(p, x), run(p, x), net.run(p, 2 * x, stop=1)
        jax.vmap(net.run, (None, 0))(p, x[None])
    assert len(calls) == 1
    assert float(net.run(p, jnp.ones((2, 3)))[0, 0]) == 1.5
    assert len(calls) == 2
    net.run(p, jnp.ones((2, 3), jnp.bfloat16))
    assert len(calls) == 3
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(net.run)(p, x)
    assert jaxpr.jaxpr.eqns[0].params["precision"] is not None and len(calls) == 4


def test_a_first_trace_under_jit_leaks_nothing():
    constant = np.arange(3, dtype="float32")[None]
    fn = lambda p, x: x @ p + jnp.asarray(constant) * jnp.ones(3)[None]  # noqa: E731
    p, x = jnp.ones((3, 3)), jnp.ones((4, 3))
    net = vfjax.trace(fn, p, x)
    with jax.checking_leaks():
        jax.jit(net.run)(p, x[:2])
    close(net.run(p, x[:2]), fn(p, x[:2]))


def test_another_network_at_another_input_is_an_error():
    def fn(p, x):
        return x @ p["a"] if len(x) > 2 else jnp.tanh(x @ p["a"]) @ p["b"]

    p = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
    net = vfjax.trace(fn, p, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="another network at this input"):
        net.run(p, jnp.ones((2, 3)))
    net.run(p, jnp.ones((5, 3)))


def test_double_precision(x64):
    fn = lambda p, x: jnp.tanh(x @ p["w"]) * jnp.arange(3.0)[None]  # noqa: E731
    p, x = {"w": jnp.eye(3, dtype="float64")}, jnp.ones((4, 3), "float64")
    net = vfjax.trace(fn, p, x)
    close(net.run(p, x), fn(p, x), 1e-14)
    single = jax.tree.map(lambda a: a.astype("float32"), (p, x))
    close(net.run(*single), fn(*single))  # float64 outside of the network, as the function has it


def test_double_precision_after_a_trace_in_single():
    fn = lambda p, x: x @ p * jnp.arange(3.0)[None]  # noqa: E731
    p, x = jnp.eye(3), jnp.ones((4, 3))
    net = vfjax.trace(fn, p, x)
    with jax.enable_x64(True):
        assert net.run(p, x).dtype == fn(p, x).dtype == jnp.float64


# ---------------------------------------------------------------------------------- as a value


def test_a_network_is_static():
    fn, variables, x = linen("mlp")
    net = vfjax.trace(fn, variables, x)
    assert hash(net) == hash(net) and net == net and net != vfjax.trace(fn, variables, x)
    run = jax.jit(lambda net, v, x: net.run(v, x), static_argnums=0)
    close(run(net, variables, x), jax.jit(fn)(variables, x))

    @functools.partial(jax.tree_util.register_dataclass, data_fields=["p"], meta_fields=["net"])
    @dataclasses.dataclass(frozen=True, eq=False)
    class Model:
        p: object
        net: object

    close(jax.jit(lambda m, x: m.net.run(m.p, x))(Model(variables, net), x), fn(variables, x))
    assert "2 layers, depth 2" in repr(net)


def test_summary_lists_layers():
    def fn(p, x):
        x = jnp.tanh(x @ p["in"])
        return jnp.tanh(x @ p["a"]) @ p["b"] + x @ p["short"]

    shapes = {"in": (3, 4), "a": (4, 7), "b": (7, 5), "short": (4, 5)}
    net = vfjax.trace(fn, {k: jnp.ones(v) for k, v in shapes.items()}, ROWS)
    text = net.summary()
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["layer"] == ["depth", "kernel", "output", "parameters", "FLOPs", "group"]
    assert lines["a"] == ["2", "4x7", "7", "28", "28", "a"]
    assert lines["short"] == ["(2)", "4x5", "5", "20", "20", "-"]
    assert lines["total"][:2] == ["3", str(net.params)]
    assert "(depth): a shortcut" in text


def test_flops_do_not_depend_on_the_batch():
    fn, variables, x = linen("batch")
    nets = [vfjax.trace(fn, variables, x[:n]) for n in (1, 4)]
    assert nets[0].flops == nets[1].flops
    assert [a.flops for a in nets[0].layers] == [a.flops for a in nets[1].layers]
    net = vfjax.trace(*flax_nnx())
    # Random keys and counts of NNX are no parameters, nor are stored statistics.
    assert net.params == 3 * 3 * 3 * 4 + 4 + 2 * 4 + 4 * 2 + 2


# --------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("within", [False, True])
def test_sharded_batches(kind, within):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    fn, variables, _ = linen("mlp")
    x = normal(0, 8, 6, 6, 3)
    net = vfjax.trace(fn, variables, x)
    expected = jax.jit(fn)(variables, x)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    if within:
        with jax.set_mesh(mesh):
            out = jax.jit(net.run)(everywhere, sharded)
            cut = jax.jit(lambda v, x: net.run(v, net.run(v, x, stop=1), start=1))
            again = cut(everywhere, sharded)
    else:
        out = jax.jit(net.run)(everywhere, sharded)
        again = net.run(everywhere, sharded)
    close(jax.device_get(out), jax.device_get(expected))
    close(jax.device_get(again), jax.device_get(expected))
    assert len(out.sharding.device_set) == 8


def test_inside_a_shard_map():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    fn, variables, _ = linen("mlp")
    x = normal(0, 8, 6, 6, 3)
    net = vfjax.trace(fn, variables, x)
    whole, split = PartitionSpec(), PartitionSpec("batch")
    specs = {"in_specs": (whole, split), "out_specs": split}
    cut = lambda v, x: net.run(v, net.run(v, x, stop=1), start=1)  # noqa: E731
    for run in (net.run, cut):
        out = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(variables, x)
        close(jax.device_get(out), jax.device_get(jax.jit(fn)(variables, x)))


def test_leaves_keep_what_tracing_needs():
    v = {"plain": 2.0, "one": jnp.float32(2), "three": np.ones(3), "key": jax.random.key(0)}

    def apply_fn(v, x):
        noise = jax.random.normal(v["key"], (3, 3))
        return x @ (v["plain"] * v["one"] * jnp.diag(v["three"]) + noise)

    leaves = vfjax.trace(apply_fn, v, jnp.ones((2, 3))).leaves(v)
    assert leaves["plain"].weak_type and not leaves["one"].weak_type
    assert leaves["three"].dtype == jnp.float32
    assert leaves["key"].shape == ()


@pytest.mark.parametrize("name", ["input", "output"])
def test_layers_are_not_called_like_the_ends_of_the_network(name):
    v, x = {name: jnp.eye(2)}, jnp.ones((1, 2))
    with pytest.raises(ValueError, match=f"kernel '{name}' would name a layer like the site"):
        vfjax.trace(lambda v, x: x @ v[name], v, x)
    nested = {name: {"kernel": jnp.eye(2)}}
    net = vfjax.trace(lambda v, x: x @ v[name]["kernel"], nested, x)
    assert net.layers[0].name == f"{name}/kernel"
