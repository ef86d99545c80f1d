"""Groups do not depend on who wrote the network: NNX, Equinox, plain JAX in several styles."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from helpers import change, infer, normal, randomised
from vfjax.symmetry import PermutationSpec

IMAGES = normal(1, 2, 16, 16, 3)


def test_nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    net = Net(nnx.Rngs(0))
    net.eval()
    graphdef, state = nnx.split(net)
    state = randomised(state)

    def apply(state, x):
        return nnx.merge(graphdef, state)(x)

    spec = infer(apply, state, IMAGES)
    norm = [(f"norm/{leaf}", 0) for leaf in ("scale", "bias", "mean", "var")]
    writes = [("conv/kernel", 3, "out"), ("conv/bias", 0)]
    assert spec == PermutationSpec({"h": [*writes, *norm, ("head/kernel", 0, "in")]})
    assert list(spec.groups) == ["conv"]
    assert change(apply, state, IMAGES, spec) < 1e-5


def test_equinox_partition():
    keys = jax.random.split(jax.random.key(0), 3)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(4, 6, 3, key=keys[1]),
            eqx.nn.Lambda(lambda h: jnp.tanh(h).mean((1, 2))),
            eqx.nn.Linear(6, 5, key=keys[2]),
        ]
    )
    params, static = eqx.partition(module, eqx.is_array)

    def apply(params, x):  # per-example NCHW, kernels (out, in), vmapped
        return jax.vmap(eqx.combine(params, static))(x)

    x = jnp.transpose(IMAGES, (0, 3, 1, 2))
    spec = infer(apply, params, x)
    places = {
        "layers/0": [("weight", 0, "out"), ("bias", 0)],
        "layers/2": [("weight", 0, "out"), ("bias", 0)],
    }
    groups = {n: [(f"{n}/{p[0]}", *p[1:]) for p in ps] for n, ps in places.items()}
    groups["layers/0"].append(("layers/2/weight", 1, "in"))
    groups["layers/2"].append(("layers/4/weight", 1, "in"))
    assert spec == PermutationSpec(groups)
    assert change(apply, params, x, spec) < 1e-5


def test_plain_jax_out_in_kernels_per_example_and_bfloat16():
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 6), "b0": (8,), "w1": (7, 8), "w2": (3, 7)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}

    def one(params, x):
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        h = jax.nn.gelu(jnp.einsum("oi,i->o", p["w0"], x.astype(jnp.bfloat16)) + p["b0"])
        h = jnp.tanh(p["w1"] @ h)
        return (p["w2"] @ h).astype(jnp.float32)

    apply = jax.vmap(one, in_axes=(None, 0))
    x = normal(0, 4, 6)
    spec = infer(apply, params, x)
    first = [("w0", 0, "out"), ("b0", 0), ("w1", 1, "in")]
    assert spec == PermutationSpec({"a": first, "b": [("w1", 0, "out"), ("w2", 1, "in")]})
    assert list(spec.groups) == ["w0", "w1"]  # kernels that share a parent keep their own names
    assert change(apply, params, x, spec) < 2e-2  # bfloat16 has 8 bits


def test_plain_jax_nchw():
    params = {
        "k0": jax.ShapeDtypeStruct((4, 3, 3, 3), jnp.float32),  # OIHW
        "k1": jax.ShapeDtypeStruct((6, 4, 3, 3), jnp.float32),
        "head": jax.ShapeDtypeStruct((5, 6 * 4), jnp.float32),
    }
    params = randomised(params)

    def apply(p, x):
        for name in ("k0", "k1"):
            dims = ("NCHW", "OIHW", "NCHW")
            x = lax.conv_general_dilated(x, p[name], (2, 2), "SAME", dimension_numbers=dims)
            x = jax.nn.silu(x)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return x.reshape(x.shape[0], -1) @ p["head"].T

    x = jnp.transpose(IMAGES, (0, 3, 1, 2))
    spec = infer(apply, params, x)
    second = [("k1", 0, "out"), ("head", 1, "in", 1, 4)]
    assert spec == PermutationSpec({"a": [("k0", 0, "out"), ("k1", 1, "in")], "b": second})
    assert change(apply, params, x, spec) < 1e-5
