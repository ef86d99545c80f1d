"""Which products are layers: those that contract something, whichever primitive computes them.

The right answer is that of the same network written with other operations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from helpers import close, conv, of_shapes
from vfjax import prune, renorm

X = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


def records(net):
    """What is known of a network's layers, except source lines; and its groups."""
    layers = [
        (k.name, k.kernel, k.bias, k.depth, k.main, k.shape, k.channel_axes, k.flops, k.group)
        for k in net.layers
    ]
    return layers, net.depth, net.spec.groups, net.spec.scaling, dict(net.spec.rigid)


# ---------------------------------------------------------------------------------------- scales

SHAPES = {"a": (4, 6), "scale": (6,), "v": (6, 3)}


def times(h, s):
    return h * s[None]


SCALES = {  # a product, and the multiplication that it is
    "einsum": (lambda h, s: jnp.einsum("bd,d->bd", h, s), times),
    "einsum from the left": (lambda h, s: jnp.einsum("d,bd->bd", s, h), times),
    "transposed": (lambda h, s: jnp.einsum("bd,d->db", h, s).T, times),
    "in a call": (jax.jit(lambda h, s: jnp.einsum("bd,d->bd", h, s)), times),
    "under vmap": (lambda h, s: jax.vmap(jnp.dot, (1, 0), 1)(h, s), times),
    "under two vmaps": (lambda h, s: jax.vmap(lambda r: jax.vmap(jnp.dot)(r, s))(h), times),
    "of heads": (
        lambda h, s: jnp.einsum("bhd,hd->bhd", h.reshape(-1, 2, 3), s.reshape(2, 3)),
        lambda h, s: h.reshape(-1, 2, 3) * s.reshape(1, 2, 3),
    ),
    "outer": (
        lambda h, s: jnp.einsum("bde->bd", jnp.einsum("bd,e->bde", h, s)),
        lambda h, s: jnp.einsum("bde->bd", h[:, :, None] * s[None, None]),
    ),
    "diagonal of an outer": (
        lambda h, s: jnp.einsum("bdd->bd", jnp.einsum("bd,e->bde", h, s)),
        lambda h, s: jnp.einsum("bdd->bd", h[:, :, None] * s[None, None]),
    ),
}


def normed(scale):
    """As an RMSNorm: features over their size, times the scale."""

    def apply(p, x):
        h = x @ p["a"]
        h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-5)
        return jax.nn.relu(scale(h, p["scale"]).reshape(h.shape)) @ p["v"]

    return apply


@pytest.mark.parametrize("name", SCALES)
def test_a_product_that_contracts_nothing_is_a_scale(name):
    variables = of_shapes(SHAPES, 0)
    net, plain = (vfjax.trace(normed(f), variables, X) for f in SCALES[name])
    assert [(k.name, k.depth) for k in net.layers] == [("a", 1), ("v", 2)]
    assert records(net) == records(plain)
    close(net.run(variables, X), plain.run(variables, X))


def test_a_scale_is_no_layer_inside_a_loop():
    def apply(p, x):
        def step(h, row):
            return jnp.einsum("bd,d->bd", jnp.tanh(h), p["scale"]) + row @ p["a"], None

        return lax.scan(step, jnp.zeros((7, 6)), x)[0] @ p["v"]

    net = vfjax.trace(apply, of_shapes(SHAPES, 0), np.tile(X, (70, 1, 1)))
    roles = {place.path: place.role for place in net.spec.groups["a"]}
    assert roles == {"a": "out", "scale": "elementwise", "v": "in"}
    assert not vfjax.trace(
        lambda p, x: lax.map(lambda row: jnp.einsum("d,d->d", row, p["scale"]), x @ p["a"]),
        of_shapes(SHAPES, 0),
        X,
    ).opaque


def test_one_input_feature_is_contracted_all_the_same():
    shapes = {"a": (1, 6), "b": (1, 6), "v": (6, 3)}

    def apply(p, x):
        h = jnp.einsum("bi,id->bd", x[:, :1], p["a"])
        return (h * jnp.einsum("bi,id->bd", x[:, :1], p["b"])) @ p["v"]

    net = vfjax.trace(apply, of_shapes(shapes, 0), X)
    assert [k.depth for k in net.layers] == [1, 1, 2]


def test_products_keep_their_precision():
    def apply(p, x):
        h = (x @ p["a"]).astype(jnp.bfloat16)
        s = p["scale"].astype(jnp.bfloat16)
        return jnp.einsum("bd,d->bd", h, s, preferred_element_type=jnp.float32) @ p["v"]

    variables = of_shapes(SHAPES, 0)
    out = vfjax.trace(apply, variables, X).run(variables, X)
    close(out, apply(variables, X))


# ---------------------------------------------------------------------------------------- experts

MIXTURE = {"a": (4, 6), "up": (3, 6, 5), "down": (3, 5, 6), "v": (6, 2)}


def routed(p, x):
    """Experts of each example by its first features: the rows of an expert follow one another."""
    h = jnp.tanh(x @ p["a"])
    expert = jnp.argmax(x[:, :3], axis=1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3)
    inner = jax.nn.relu(lax.ragged_dot(h[order], p["up"], sizes))
    back = lax.ragged_dot(inner, p["down"], sizes)
    return (h + jnp.zeros_like(h).at[order].set(back, unique_indices=True)) @ p["v"]


def chosen(p, x):
    """The same, with all experts computed."""
    h = jnp.tanh(x @ p["a"])
    one = jax.nn.one_hot(jnp.argmax(x[:, :3], axis=1), 3)
    inner = jax.nn.relu(jnp.einsum("bi,eio->ebo", h, p["up"]))
    return (h + jnp.einsum("ebi,eio,be->bo", inner, p["down"], one)) @ p["v"]


@pytest.fixture(scope="module")
def mixture():
    variables = of_shapes(MIXTURE, 1)
    return vfjax.trace(routed, variables, X), variables


def test_ragged_products_are_layers(mixture):
    net, variables = mixture
    assert [(k.name, k.depth, k.channels) for k in net.layers] == [
        ("a", 1, 6),
        ("up", 2, 5),
        ("down", 3, 6),
        ("v", 4, 2),
    ]
    assert [k.flops for k in net.layers] == [24, 30, 30, 12]
    assert net.spec.sizes == {"a": 6, "up": 5}
    roles = {(p.path, p.axis): p.role for p in net.spec.groups["up"]}
    assert roles == {("up", 2): "out", ("down", 1): "in"}
    permuted = net.spec.permute(variables, {"a": [3, 1, 0, 2, 5, 4], "up": [4, 0, 1, 3, 2]})
    close(routed(permuted, X), chosen(variables, X), 1e-4)


def test_inputs_of_ragged_layers_count_for_their_expert(mixture):
    net, variables = mixture
    scores = prune.wanda(net, variables, [X]).values["up"]
    h, expert = np.tanh(X @ variables["a"]), np.argmax(X[:, :3], axis=1)
    squares = np.stack([np.square(h[expert == k]).sum(0) for k in range(3)]) / len(X)
    wanted = np.abs(variables["up"]) * np.sqrt(squares)[..., None]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_corrections_fold_into_all_experts(mixture):
    net, variables = mixture
    faded = {**variables, "up": 0.5 * variables["up"], "down": 3 * variables["down"]}
    back = renorm.rescale(net, faded, [X], references=[variables] * 2, sites="layers")
    close(back["up"], variables["up"], 1e-4)
    close(back["down"], variables["down"], 1e-4)


# ---------------------------------------------------------------------------------------- flipped

KERNELS = {"a": (3, 3, 2, 4), "t": (3, 3, 4, 5), "bias": (5,), "v": (5, 2)}
IMAGES = np.random.default_rng(2).normal(size=(2, 4, 4, 2)).astype(np.float32)


def transposed(flip):
    def apply(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        kernel = jnp.swapaxes(p["t"], 2, 3) if flip else p["t"]
        dims = ("NHWC", "HWIO", "NHWC")
        h = lax.conv_transpose(
            h, kernel, (2, 2), "SAME", dimension_numbers=dims, transpose_kernel=flip
        )
        return jax.nn.relu(h + p["bias"][None, None, None]).mean((1, 2)) @ p["v"]

    return apply


def flipped(p):
    return {**p, "t": p["t"][::-1, ::-1]}


def test_flipped_kernels_are_kernels():
    variables = of_shapes(KERNELS, 3)
    net, plain = (vfjax.trace(transposed(flip), variables, IMAGES) for flip in (True, False))
    assert net.layers[1].kernel == "t"
    assert records(net) == records(plain)
    other = flipped(variables)
    close(net.run(variables, IMAGES), plain.run(other, IMAGES), 1e-4)
    scale, shift = np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5)
    one, two = (n.fold(v, "t", scale, shift) for n, v in ((net, variables), (plain, other)))
    close(flipped(one), two)
    scores = [prune.wanda(n, v, [IMAGES]).values for n, v in ((net, variables), (plain, other))]
    np.testing.assert_allclose(flipped(scores[0])["t"], scores[1]["t"], rtol=1e-5)


def test_flipped_channels_are_fixed_and_their_corrections_fold():
    def apply(p, x):
        return (jnp.flip(x @ jnp.flip(p["a"], 1), 1)) @ p["v"]

    variables = of_shapes(SHAPES, 0)
    net = vfjax.trace(apply, variables, X)
    assert net.layers[0].kernel == "a" and net.layers[0].group is None
    assert ("a", 1, "rev") in {tuple(f)[:3] for f in net.spec.fixed}
    scale = np.linspace(0.5, 2, 6).astype(np.float32)
    folded = net.fold(variables, "a", scale, None)
    close(folded["a"], variables["a"] * scale[::-1][None])
