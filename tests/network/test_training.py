"""Traces in training mode are warned about; evaluation that looks a little like it is not."""

from __future__ import annotations

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import vfjax


def S(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


LEAVES = {"w": S(3, 4), "v": S(4, 2)}
X = S(5, 3)


class Net(nn.Module):
    train: bool = False
    drop: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not self.drop)(x).mean((1, 2)))


IMAGES = S(5, 6, 6, 3)


def linen(**options):
    net = Net(**options)
    rngs = {"dropout": jax.random.key(0)}
    apply_fn = lambda v, x: net.apply(v, x, mutable=["batch_stats"], rngs=rngs)[0]  # noqa: E731
    return apply_fn, jax.eval_shape(Net().init, jax.random.key(0), IMAGES), IMAGES


def key_in_x(v, x):
    keys = jax.random.wrap_key_data(x["key"][0])
    return jnp.tanh(x["x"] @ v["w"]) * jax.random.bernoulli(keys, 0.5, (5, 4)) @ v["v"]


def one_mask(v, x):
    """Equinox's dropout with one key for all examples."""
    drop = eqx.nn.Dropout(0.5)
    return jax.vmap(lambda r: drop(jnp.tanh(r @ v["w"]), key=jax.random.key(0)) @ v["v"])(x)


def equinox(train):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="b", mode="batch")
    params, static = eqx.partition((norm, state), eqx.is_array)

    def fn(p, x):
        norm, state = eqx.combine(p["norm"], static)
        norm = norm if train else eqx.nn.inference_mode(norm)
        return jax.vmap(lambda r: norm(r @ p["w"], state)[0], axis_name="b")(x)

    return fn, {"norm": params, "w": S(3, 4)}, X


def keras(v, x):
    """Statistics of the batch, multiplied out."""
    y = x @ v["w"]
    mean = y.mean(0, keepdims=True)
    inv = jax.lax.rsqrt(jnp.square(y).mean(0, keepdims=True) - mean**2 + 1e-3)
    return (y * inv + (-mean * inv)) @ v["v"]


TRAINING = {
    "batch statistics": (*linen(train=True), "deviation over the batch"),
    "dropout": (*linen(drop=True), r"random numbers .* test_training.py:\d+"),
    "both": (*linen(train=True, drop=True), "random .* and .* over the batch"),
    "key in x": (key_in_x, LEAVES, {"x": X, "key": jax.ShapeDtypeStruct((5, 2), "u4")}, "random"),
    "one mask": (one_mask, LEAVES, X, "random numbers"),
    "equinox": (*equinox(True), "over the batch"),
    "keras": (keras, LEAVES, X, "over the batch"),
}


@pytest.mark.parametrize("name", list(TRAINING))
def test_training_mode_is_warned_about(name):
    apply_fn, variables, x, why = TRAINING[name]
    with pytest.warns(UserWarning, match=f"training mode: .*{why}.*evaluation mode"):
        vfjax.trace(apply_fn, variables, x)


def random_features(v, x):
    phases = jax.random.uniform(jax.random.key(1), (4,))
    weights = jax.random.normal(jax.random.key(2), (4, 4))
    return jnp.cos(jnp.tanh(x @ v["w"]) @ weights + phases[None]) @ v["v"]


EVALUATION = {
    "linen": linen(),
    "equinox": equinox(False),
    "random features": (random_features, LEAVES, X),
    "softmax over the batch": (lambda v, x: jax.nn.softmax(x @ v["w"], 0) @ v["v"], LEAVES, X),
    "layer norm": (lambda v, x: jax.nn.standardize(x @ v["w"]) @ v["v"], LEAVES, X),
    # As long as the batch, but an axis of the example.
    "square": (
        lambda v, x: jax.nn.standardize(x @ v["w"], axis=1) @ v["v"], LEAVES, S(5, 5, 3)
    ),
    "standardised kernel": (lambda v, x: x @ jax.nn.standardize(v["w"], 0) @ v["v"], LEAVES, X),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EVALUATION))
def test_evaluation_is_not(name):
    apply_fn, variables, x = EVALUATION[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="apply_fn multiplies by the constant")
        vfjax.trace(apply_fn, variables, x)
