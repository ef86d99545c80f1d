"""Tests of the analysis that tells whether a batch may be computed in pieces."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vfjax import models
from vfjax._analysis import separable
from vfjax._jaxpr import flatten


def _graph_of(fn, v, x, size):
    x = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    with jax.numpy_rank_promotion("allow"):  # these are users' functions
        closed = jax.make_jaxpr(fn)(v, x)
    return flatten(closed, len(jax.tree.leaves(v)))


def apart(fn, v, x, piece=2):
    """The answer for a function of `(variables, x)`."""
    return separable(_graph_of(fn, v, x, x.shape[0]), _graph_of(fn, v, x, piece))


V = {"w": jnp.ones((5, 5)), "b": jnp.ones(5), "slots": jnp.ones((4, 1))}
X = jnp.ones((4, 5))
IMAGES = jnp.ones((4, 6, 6, 3))
KERNEL = {"k": jnp.ones((3, 3, 3, 2))}


def conv(v, x, dims=("NHWC", "HWIO", "NHWC")):
    return lax.conv_general_dilated(x, v["k"], (1, 1), "SAME", dimension_numbers=dims)


def pool(v, x):
    y = conv(v, x)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return y.reshape(x.shape[0], -1)


APART = {
    "dense": (lambda v, x: jax.nn.relu(x @ v["w"] + v["b"]), V, X),
    "einsum, kernel first": (lambda v, x: jnp.einsum("oi,ni->no", v["w"], x), V, X),
    "features first inside": (lambda v, x: (v["w"] @ x.T).T, V, X),
    "normalised": (
        lambda v, x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) + v["b"],
        V,
        X,
    ),
    "softmax by hand": (lambda v, x: jnp.exp(x - x.max(1, keepdims=True)) * v["b"], V, X),
    "outer product": (lambda v, x: x[:, :, None] * x[:, None, :] * v["b"], V, X),
    "per-example vmap": (lambda v, x: jax.vmap(lambda x: v["w"] @ x + v["b"])(x), V, X),
    "convolution and pool": (pool, KERNEL, IMAGES),
    "stacked behind": (lambda v, x: jnp.stack([x, x + v["b"]], 1), V, X),
    "stacked in front": (lambda v, x: jnp.stack([x, x + v["b"]]).max(0), V, X),
    "tiled features": (lambda v, x: jnp.tile(x @ v["w"], (1, 2)), V, X),
    "unstacked features": (lambda v, x: sum(list((x @ v["w"]).T))[:, None], V, X),
    "placed": (lambda v, x: jax.device_put(x) @ jax.device_put(v["w"]), V, X),
    "held together": (lambda v, x: lax.optimization_barrier((x, v["w"]))[0] + v["b"], V, X),
    "integers": (lambda v, x: x @ v["w"] * (lax.clz(x.astype(int)) << 1), V, X),
    "per-example convolution": (
        lambda v, x: jax.vmap(lambda x: conv(v, x[None])[0])(x),
        KERNEL,
        IMAGES,
    ),
    "NCHW": (
        lambda v, x: conv(v, x.transpose(0, 3, 1, 2), ("NCHW", "HWIO", "NCHW")),
        KERNEL,
        IMAGES,
    ),
    "attention within": (
        lambda v, x: (
            jnp.einsum("nij,nkj->nik", x.reshape(len(x), -1, 3), x.reshape(len(x), -1, 3))
            * v["k"].sum()
        ),
        KERNEL,
        IMAGES,
    ),
    "positions flipped, cut, padded, sorted, summed up": (
        lambda v, x: (
            jnp.cumsum(jnp.sort(jnp.pad(x[:, ::-1][:, 1:], ((0, 0), (0, 2)))), 1) * v["b"].sum()
        ),
        V,
        X,
    ),
    "joined by features": (lambda v, x: jnp.concatenate([x, x @ v["w"]], 1), V, X),
}


@jax.custom_vjp
def _plus_places(x):
    return x + jax.jit(lambda y: y * np.arange(4.0, dtype=np.float32)[:, None])(x)


_plus_places.defvjp(lambda x: (x, None), lambda _, g: (g,))


def _hidden(v, x):
    return _plus_places(x @ v["w"]) if len(x) == 4 else x @ v["w"]


@jax.custom_jvp
def _ordered(x):
    y = jnp.tanh(x)
    return x - y if len(x) == 4 else y - x


_ordered.defjvp(lambda x, t: (_ordered(*x), t[0]))


MIXED = {
    "tiled": (lambda v, x: jnp.tile(x, (2, 1)) + v["b"], V, X),
    "stacked and summed": (lambda v, x: jnp.stack([x, x], 1).sum(0) + v["b"], V, X),
    "unstacked": (lambda v, x: sum(list(x)) + jnp.zeros_like(x) + v["b"], V, X),
    "mean over the batch": (lambda v, x: x - x.mean(0, keepdims=True) + v["b"], V, X),
    "all with all": (lambda v, x: x @ v["w"] @ x.T, V, X),
    "contracted": (lambda v, x: (x.T @ x) @ v["w"], V, X),
    "flipped": (lambda v, x: x[::-1] + v["b"], V, X),
    "moved": (lambda v, x: jnp.pad(x, ((1, 0), (0, 0)))[:-1] + v["b"], V, X),
    "moved in one": (
        lambda v, x: lax.pad(x, jnp.zeros((), x.dtype), ((1, -1, 0), (0, 0, 0))) + v["b"],
        V,
        X,
    ),
    "summed up": (lambda v, x: jnp.cumsum(x, 0) + v["b"], V, X),
    "sorted": (lambda v, x: jnp.sort(x, 0) + v["b"], V, X),
    "one example for all": (lambda v, x: x[:1] + v["b"], V, X),
    "merged with positions": (lambda v, x: x.reshape(-1) * v["b"].sum(), V, X),
    "doubled": (lambda v, x: jnp.concatenate([x, x], 0) + v["b"], V, X),
    "a number per place in the batch": (
        lambda v, x: x @ v["w"] + jnp.arange(1.0 * len(x))[:, None],
        V,
        X,
    ),
    "windows over the batch": (
        lambda v, x: lax.reduce_window(x @ v["w"], 0.0, lax.add, (3, 1), (1, 1), "SAME"),
        V,
        X,
    ),
    "windows that move": (
        lambda v, x: lax.reduce_window(x @ v["w"], 0.0, lax.add, (1, 1), (1, 1), ((1, -1), (0, 0))),
        V,
        X,
    ),
    "windows over a dilated batch": (
        lambda v, x: lax.reduce_window(
            x @ v["w"],
            0.0,
            lax.add,
            (1, 1),
            (1, 1),
            ((0, 1 - len(x)), (0, 0)),
            base_dilation=(2, 1),
        ),
        V,
        X,
    ),
    "columns first": (
        lambda v, x: (
            jnp.reshape(x[:, : len(x)] @ v["b"][: len(x), None], (len(x), 1), order="F")
            + jnp.reshape(x[:, : len(x)], (len(x), len(x)), order="F").T
        ),
        V,
        X,
    ),
    "a hidden number per place in the batch": (_hidden, V, X),
    "scaled by the size of the batch": (lambda v, x: (x / len(x)) @ v["w"], V, X),
    "raised to the size of the batch": (lambda v, x: (x @ v["w"]) ** len(x), V, X),
    "as many ones as examples": (lambda v, x: x @ v["w"] * jnp.ones(len(x)).sum(), V, X),
    "as many random numbers as examples": (
        lambda v, x: x @ v["w"] * jax.random.normal(jax.random.key(0), (len(x),)).mean(),
        V,
        X,
    ),
    "repeated as often as there are examples": (
        lambda v, x: (x @ v["w"])[:, None].repeat(len(x), 1).sum(1),
        V,
        X,
    ),
    "as many terms as examples": (
        lambda v, x: jnp.concatenate([x @ v["w"]] * len(x), 1)[:, :2],
        V,
        X,
    ),
    "another order for small batches": (lambda v, x: _ordered(x @ v["w"]), V, X),
    "another branch for small batches": (
        lambda v, x: jnp.tanh(x @ v["w"]) if len(x) > 2 else x @ v["w"],
        V,
        X,
    ),
    "as many parameters as examples": (lambda v, x: x + v["b"][: len(x)].sum(), V, X),
    "output without a batch": (lambda v, x: (x @ v["w"]).sum(), V, X),
    "output laid out another way": (lambda v, x: (x @ v["w"]).T, V, X),
    "what is not known": (lambda v, x: lax.fori_loop(0, 2, lambda i, x: x @ v["w"], x), V, X),
}


@pytest.mark.parametrize("name", APART)
def test_examples_stay_apart(name):
    assert apart(*APART[name])


@pytest.mark.parametrize("name", MIXED)
def test_examples_meet(name):
    assert not apart(*MIXED[name])


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "digits-conv", "digits-mlp"])
def test_the_models_keep_examples_apart(name):
    model = models.create(name)
    x = jax.ShapeDtypeStruct((4, 8, 8, 1) if "digits" in name else (4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert apart(models.apply_fn(model), variables, x)


@pytest.mark.parametrize("running", [True, False])
def test_batch_statistics_meet(running):
    model = nn.BatchNorm(use_running_average=running)
    variables = model.init(jax.random.key(0), X)

    def fn(v, x):
        out = model.apply(v, x, mutable=["batch_stats"])
        return out[0]

    assert apart(fn, variables, X) == running


def test_a_graph_where_none_meet_is_like_itself():
    assert apart(conv, KERNEL, IMAGES, piece=len(IMAGES))


def _batch_as_channels(v, x):
    return conv(v, x[..., :1].transpose(3, 1, 2, 0))


@pytest.mark.parametrize(
    ("fn", "v", "x"), [(_hidden, V, X), (_batch_as_channels, KERNEL, IMAGES[:3])]
)
def test_one_graph_is_enough_to_see_that_examples_meet(fn, v, x):
    assert not apart(fn, v, x, piece=len(x))
