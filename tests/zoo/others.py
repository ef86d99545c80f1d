"""Networks that are neither of images nor of sequences of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from zoo.registry import entry


@entry(
    {
        "layers": [{"weight": (10, 4), "bias": (10,)}, {"weight": (8, 10), "bias": (8,)}]
        + [{"weight": (3, 8), "bias": (3,)}],
    },
    (4,),
    slow=(),
)
def equinox_mlp(p, x):
    """One example at a time."""

    def one(x):
        for k, layer in enumerate(p["layers"]):
            x = layer["weight"] @ x + layer["bias"]
            x = jax.nn.relu(x) if k < 2 else x
        return x

    return jax.vmap(one)(x)


def graphs(n, rng):
    """Graphs of four nodes each: features, and edges as pairs of nodes."""
    nodes = rng.normal(size=(n, 4, 5)).astype(np.float32)
    return {"nodes": nodes, **{k: rng.integers(0, 4, (n, 6), np.int32) for k in ("from", "to")}}


@entry(
    {
        "embed": (5, 8),
        "steps": [{"edge": (16, 10), "message": (10, 8), "node": (16, 8)} for _ in range(1)],
        "head": (8, 3),
    },
    graphs,
    slow=("report",),
)
def jraph_gnn(p, x):
    """Messages along edges, summed by node."""

    def one(nodes, senders, receivers):
        h = jnp.tanh(nodes @ p["embed"])
        for q in p["steps"]:
            ends = jnp.concatenate([h[senders], h[receivers]], axis=-1)
            messages = jax.nn.relu(ends @ q["edge"]) @ q["message"]
            total = jax.ops.segment_sum(messages, receivers, num_segments=4)
            h = jnp.tanh(jnp.concatenate([h, total], axis=-1) @ q["node"])
        return h.mean(0) @ p["head"]

    return jax.vmap(one)(x["nodes"], x["from"], x["to"])


MASKS = [np.tri(9, 4, 0, np.float32)[:, :4], np.tri(4, 9, 4, np.float32)]


AFTER = "what follows the last layers is not affine, and an ensemble averages these layers"


@entry(
    {"w0": (9, 4), "b0": (9,), "w1": (4, 9), "b1": (4,), "shift": (4,)},
    (4,),
    groups="rows of the masks differ, so that no two units are alike",
    masks="kernels behind masks are not pruned: they are no leaves",
    limits=AFTER,
)
def flowjax_masked(p, x):
    """An autoregressive layer: kernels times masks."""
    h = jnp.tanh((p["w0"] * MASKS[0]) @ x.T + p["b0"][:, None])
    s = jnp.tanh((p["w1"] * MASKS[1]) @ h + p["b1"][:, None]).T
    return x * jnp.exp(s) + p["shift"]


@entry({"w0": (2, 9), "b0": (9,), "scale": (9, 2), "shift": (9, 2)}, (4,), limits=AFTER)
def flowjax_coupling(p, x):
    """Half of the features scale and shift the other half."""
    first, second = jnp.split(x, 2, axis=-1)
    h = jnp.tanh(first @ p["w0"] + p["b0"])
    return jnp.concatenate([first, second * jnp.exp(jnp.tanh(h @ p["scale"])) + h @ p["shift"]], -1)


@entry({"gates": {"w": (11, 32), "b": (32,)}, "head": {"w": (8, 3), "b": (3,)}}, (2, 3), slow=())
def haiku_lstm(p, x):
    """Gates from one kernel over the input and the state; steps are unrolled."""
    h = c = jnp.zeros((len(x), 8))
    for t in range(2):
        gates = jnp.concatenate([x[:, t], h], -1) @ p["gates"]["w"] + p["gates"]["b"]
        i, g, f, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h @ p["head"]["w"] + p["head"]["b"]


@entry({"k0": (5, 4, 6), "b0": (4, 6), "mix": (4, 9), "k1": (9, 6, 3)}, (5,))
def flax_dense_general(p, x):
    """A dense layer that writes a matrix, of which one axis is mixed."""
    h = jax.nn.relu(jnp.einsum("bi,ijk->bjk", x, p["k0"]) + p["b0"])
    h = jax.nn.relu(jnp.einsum("bjk,jl->blk", h, p["mix"]))
    return jnp.einsum("blk,lkm->bm", h, p["k1"])


@entry({"w0": (5, 8), "a": (5, 2), "b": (2, 8), "w1": (8, 3)}, (5,), slow=("report",))
def nnx_lora(p, x):
    """A kernel and the product of two small ones."""
    return jax.nn.relu(x @ p["w0"] + (x @ p["a"]) @ p["b"]) @ p["w1"]
