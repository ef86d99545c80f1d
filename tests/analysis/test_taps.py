"""Taps: the last value of the elementwise region behind a layer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax


def tap_value(fn, variables, x, layer):
    net = vfjax.trace(fn, variables, x)
    return jax.jit(lambda v, x: net.run(v, x, capture=[f"{layer}:act"])[1][f"{layer}:act"])(
        variables, x
    )


TAPS = {
    "relu": lambda p, z: (jax.nn.relu(z),) * 2,
    "swish": lambda p, z: (jax.nn.swish(z),) * 2,
    "gelu": lambda p, z: (jax.nn.gelu(z, approximate=False),) * 2,
    "tanh gelu": lambda p, z: (jax.nn.gelu(z),) * 2,
    "norm, relu": lambda p, z: (jax.nn.relu((z - p["m"]) * lax.rsqrt(p["v"] + 1e-3)),) * 2,
    "layer norm": lambda p, z: (
        (z - z.mean(-1, keepdims=True)) * lax.rsqrt(z.var(-1, keepdims=True) + 1e-3) * p["m"],
    ) * 2,
    "softmax": lambda p, z: (jax.nn.softmax(z),) * 2,
    "residual": lambda p, z: (jax.nn.relu(z + p["r"]),) * 2,
    "pool": lambda p, z: (jax.nn.relu(z), nn.max_pool(jax.nn.relu(z), (2, 2), (2, 2))),
    "smoothing": lambda p, z: (z, z + nn.avg_pool(z, (3, 3), padding="SAME")),
    "mean": lambda p, z: (jax.nn.relu(z), jax.nn.relu(z).mean((1, 2))),
    "reshape": lambda p, z: (jax.nn.relu(z), jnp.tanh(jax.nn.relu(z).reshape(5, -1))),
    "squeeze and excite": lambda p, z: (
        jax.nn.relu(z),
        jax.nn.relu(z) * jax.nn.sigmoid(jax.nn.relu(z).mean((1, 2)) @ p["se"])[:, None, None],
    ),
    "nothing": lambda p, z: (z, z[:, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAPS)
def test_taps(name):
    key = jax.random.key(0)
    p = {"w": jax.random.normal(key, (3, 4)), "se": jax.random.normal(key, (4, 4))}
    p |= {"m": jnp.ones((1, 1, 1, 4)), "v": jnp.ones((1, 1, 1, 4)), "r": jnp.ones((1, 2, 2, 4))}
    x = jax.random.normal(key, (5, 2, 2, 3))
    value = tap_value(lambda p, x: TAPS[name](p, x @ p["w"])[1], p, x, "w")
    expected = jax.jit(lambda p, x: TAPS[name](p, x @ p["w"])[0])(p, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_the_tap_of_a_residual_block_is_after_the_join():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
            y = nn.Conv(4, (3, 3), name="b")(y)
            y = nn.relu(nn.BatchNorm(use_running_average=True)(y) + x)
            self.sow("intermediates", "join", y)
            return nn.Conv(2, (1, 1), name="c")(y) + y[..., :2]

    x = jax.random.normal(jax.random.key(0), (5, 4, 4, 4))
    model = Block()
    variables = {k: v for k, v in model.init(jax.random.key(1), x).items() if k != "intermediates"}
    expected = model.apply(variables, x, mutable="intermediates")[1]["intermediates"]["join"][0]
    value = tap_value(model.apply, variables, x, "params/b/kernel")
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_vmapped_layers_without_bias_have_the_tap_of_others():
    """`vmap` leaves a transpose between such a layer and its activation."""
    rng = np.random.default_rng(0)
    v = {"w": rng.normal(size=(6, 5)), "u": rng.normal(size=(6, 3))}
    v, x = jax.tree.map(np.float32, v), np.float32(rng.normal(size=(8, 5)))

    def vmapped(v, x):
        hidden = jnp.tanh(jax.vmap(lambda row: v["w"] @ row)(x))
        return hidden @ v["u"]

    net = vfjax.trace(vmapped, v, x)
    assert net.run(v, x, capture=["w"])[1]["w"].shape == (6, 8)
    np.testing.assert_allclose(
        tap_value(vmapped, v, x, "w"), np.tanh(x @ v["w"].T), rtol=1e-5, atol=1e-6
    )
    b = net.spec.permute(v, net.spec.random(jax.random.key(1)))
    found = vfjax.align.match_activations(net, v, b, [x])
    back = net.spec.permute(b, found.permutations)
    np.testing.assert_array_equal(back["w"], v["w"])
