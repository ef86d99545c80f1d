"""Networks of sequences: attention in the ways in which packages write it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo.convolutional import layer_norm, pair
from zoo.registry import entry, tokens


def dense(i, o):
    return {"kernel": (i, o), "bias": (o,)}


def linear(p, x):
    return lax.dot_general(x, p["kernel"], (((x.ndim - 1,), (0,)), ((), ()))) + jnp.reshape(
        p["bias"], (1,) * (x.ndim - 1) + (-1,)
    )


@entry(
    {
        "embeddings": {
            "word": (11, 12), "position": (5, 12), "type": (2, 12), "norm": pair(12)
        },
        "layers": [
            {name: dense(12, 12) for name in ("query", "key", "value", "output")}
            | {"norm0": pair(12), "norm1": pair(12)}
            | {"up": dense(12, 16), "down": dense(16, 12)}
            for _ in range(1)
        ],
        "pooler": dense(12, 12),
        "head": dense(12, 3),
    },
    tokens(5),
)  # fmt: skip
def hf_bert(p, x):
    """Embeddings are summed; masks of heads and positions multiply and add."""
    e = p["embeddings"]
    positions = jnp.broadcast_to(jnp.arange(5), x.shape)
    h = jnp.take(e["word"], x, axis=0) + jnp.take(e["position"], positions, axis=0)
    h = layer_norm(e["norm"], h + jnp.take(e["type"], jnp.zeros_like(x), axis=0))
    bias = jnp.where(jnp.ones((len(x), 1, 1, 5)) > 0, 0.0, -1e9)
    for q in p["layers"]:
        query, key, value = (
            linear(q[name], h).reshape(h.shape[:2] + (3, 4)) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("...qhd,...khd->...hqk", query / math.sqrt(4), key) + bias
        scores = jax.nn.softmax(scores, axis=-1) * jnp.ones(3).reshape(1, 3, 1, 1)
        out = jnp.einsum("...hqk,...khd->...qhd", scores, value).reshape(h.shape)
        h = layer_norm(q["norm0"], linear(q["output"], out) + h)
        h = layer_norm(q["norm1"], linear(q["down"], jax.nn.gelu(linear(q["up"], h))) + h)
    return linear(p["head"], jnp.tanh(linear(p["pooler"], h[:, 0])))


@entry(
    {
        "wte": (11, 12),
        "wpe": (5, 12),
        "h": {
            str(k): {
                "ln_1": pair(12),
                "c_attn": {"kernel": (36, 12), "bias": (36,)},
                "c_proj": {"kernel": (12, 12), "bias": (12,)},
                "ln_2": pair(12),
                "c_fc": {"kernel": (16, 12), "bias": (16,)},
                "c_out": {"kernel": (12, 16), "bias": (12,)},
            }
            for k in range(1)
        },
        "ln_f": pair(12),
    },
    tokens(5),
    slow=("report",),
)
def hf_gpt2(p, x):
    """Kernels are transposed, queries, keys and values are one kernel, and the head is tied."""

    def conv1d(q, h):
        return h @ q["kernel"].transpose() + q["bias"]

    h = p["wte"][x] + p["wpe"][None]
    causal = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    for q in p["h"].values():
        parts = jnp.split(conv1d(q["c_attn"], layer_norm(q["ln_1"], h)), 3, axis=2)
        query, key, value = (z.reshape(*z.shape[:2], 3, 4) for z in parts)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2.0
        scores = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(h.dtype).min), -1)
        out = jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(h.shape)
        h = h + conv1d(q["c_proj"], out)
        y = conv1d(q["c_fc"], layer_norm(q["ln_2"], h))
        h = h + conv1d(q["c_out"], jax.nn.gelu(y))
    return layer_norm(p["ln_f"], h) @ p["wte"].T


def rms(scale, x):
    return scale * (x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6))


def rotate(x):
    """Rotary embedding, by halves."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 10.0 ** np.arange(half)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * cos.astype(np.float32) + turned * sin.astype(np.float32)


def llama_shapes(**more):
    block = {"q": (12, 24), "k": (12, 8), "v": (12, 8), "o": (24, 12), "scale0": (12,)}
    block |= {"gate": (12, 16), "up": (12, 16), "down": (16, 12), "scale1": (12,)} | more
    return {"embed": (11, 12), "layers": [block], "scale": (12,), "head": (12, 5)}


def grouped_queries(q, h, turn=lambda z: z, unit=lambda z, name: z):
    """Three queries for each of two keys."""
    query = turn(unit((h @ q["q"]).reshape(*h.shape[:2], 6, 4), "qscale"))
    key = turn(unit((h @ q["k"]).reshape(*h.shape[:2], 2, 4), "kscale"))
    value = (h @ q["v"]).reshape(*h.shape[:2], 2, 4)
    query = query.reshape(*h.shape[:2], 2, 3, 4)
    scores = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", query, key) / 2, -1)
    return jnp.einsum("bgrts,bsgd->btgrd", scores, value).reshape(*h.shape[:2], 24) @ q["o"]


def llama_of(p, x, attend):
    h = p["embed"][x]
    for q in p["layers"]:
        h = h + attend(q, rms(q["scale0"], h))
        y = rms(q["scale1"], h)
        h = h + (jax.nn.silu(y @ q["gate"]) * (y @ q["up"])) @ q["down"]
    return rms(p["scale"], h) @ p["head"]


@entry(llama_shapes(), tokens(5))
def hf_llama(p, x):
    """Queries that share keys, rotary embedding, gated layers."""
    return llama_of(p, x, lambda q, h: grouped_queries(q, h, rotate))


@entry(llama_shapes(qscale=(4,), kscale=(4,)), tokens(5))
def hf_qwen3(p, x):
    """Queries and keys are normalised, by one scale for all heads."""
    return llama_of(p, x, lambda q, h: grouped_queries(q, h, unit=lambda z, name: rms(q[name], z)))


@entry(
    {
        "patch": {"weight": (12, 3, 2, 2), "bias": (12, 1, 1)},
        "token": (1, 12),
        "position": (5, 12),
        "blocks": [
            {"scale0": pair(12), "qkv": (36, 12), "proj": (12, 12), "gamma1": (12,)}
            | {"norm": pair(12), "fc1": (16, 12), "fc2": (12, 16), "gamma2": (12,)}
            for _ in range(1)
        ],
        "norm": pair(12),
        "head": (3, 12),
    },
    (3, 4, 4),
)
def equimo_vit(p, x):
    """For one example: queries, keys and values rearranged from one kernel; LayerScale."""

    def one(x):
        w, names = p["patch"]["weight"], ("NCHW", "OIHW", "NCHW")
        h = lax.conv_general_dilated(x[None], w, (2, 2), "VALID", dimension_numbers=names)[0]
        h = jnp.reshape(h + p["patch"]["bias"], (12, 4)).T
        h = jnp.concatenate([p["token"], h]) + p["position"]
        for q in p["blocks"]:
            y = jax.vmap(lambda z, q=q: q["qkv"] @ z)(layer_norm(q["scale0"], h))
            query, key, value = y.reshape(5, 3, 3, 4).transpose(1, 2, 0, 3)
            scores = jax.nn.softmax(jnp.einsum("hsd,htd->hst", query, key) / 2, -1)
            y = jnp.einsum("hst,htd->hsd", scores, value).transpose(1, 0, 2).reshape(5, 12)
            h = h + q["gamma1"] * jax.vmap(lambda z, q=q: q["proj"] @ z)(y)
            y = jax.vmap(lambda z, q=q: q["fc1"] @ z)(layer_norm(q["norm"], h))
            h = h + q["gamma2"] * jax.vmap(lambda z, q=q: q["fc2"] @ z)(jax.nn.gelu(y))
        return p["head"] @ layer_norm(p["norm"], h)[0]

    return jax.vmap(one)(x)


@entry(
    {
        "embed": (11, 12),
        "layers": [
            {"q": (12, 3, 4), "k": (12, 3, 4), "v": (12, 3, 4), "o": (3, 4, 12)}
            | {"scale0": (12,), "scale1": (12,), "up": (12, 16), "down": (16, 12)}
            for _ in range(1)
        ],
        "head": (12, 5),
    },
    tokens(5),
)
def penzai_transformer(p, x):
    """Named axes: einsums without contraction for scales, and maps over axes by vmap."""

    def unit(scale, h):
        return jnp.einsum(
            "bsd,d->bsd", h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6), scale
        )

    h = jax.vmap(jax.vmap(lambda i: p["embed"][i]))(x)
    for q in p["layers"]:
        y = unit(q["scale0"], h)
        query, key, value = (
            jax.vmap(lambda w, y=y: jnp.tensordot(y, w, (2, 0)), in_axes=1, out_axes=1)(q[name])
            for name in "qkv"
        )
        scores = jax.nn.softmax(jnp.einsum("bhsp,bhtp->bhst", *map(_heads, (query, key))), -1)
        out = jnp.einsum("bhst,bhtp->bshp", scores, _heads(value))
        h = h + jnp.einsum("bshp,hpd->bsd", out, q["o"])
        h = h + jax.nn.relu(unit(q["scale1"], h) @ q["up"]) @ q["down"]
    return h @ p["head"]


def _heads(z):
    """From the axes in which vmap leaves heads: batch, head, position, projection."""
    return z.swapaxes(1, 1) if z.shape[1] == 3 else z.swapaxes(1, 2)


@entry(
    {
        "mha/query": {"w": (6, 12), "b": (12,)},
        "mha/key": {"w": (6, 12), "b": (12,)},
        "mha/value": {"w": (6, 12), "b": (12,)},
        "mha/linear": {"w": (12, 6), "b": (6,)},
        "mlp/~/linear_0": {"w": (6, 10), "b": (10,)},
        "mlp/~/linear_1": {"w": (10, 3), "b": (3,)},
    },
    (5, 6),
)
def haiku_attention(p, x):
    def apply(name, h):
        return jnp.dot(h, p[name]["w"]) + jnp.broadcast_to(
            p[name]["b"], (*h.shape[:-1], p[name]["b"].size)
        )

    def project(name):
        return apply(name, x).reshape(*x.shape[:-1], 3, 4)

    logits = jnp.einsum("...thd,...Thd->...htT", project("mha/query"), project("mha/key"))
    weights = jax.nn.softmax(logits * 0.5)
    out = jnp.einsum("...htT,...Thd->...thd", weights, project("mha/value"))
    h = apply("mha/linear", jnp.reshape(out, (*x.shape[:-1], 12)))
    return apply("mlp/~/linear_1", jax.nn.relu(apply("mlp/~/linear_0", h))).mean(1)


@entry(
    {
        "stem": dense(6, 8),
        "blocks": [
            {"norm0": pair(8), "t1": dense(5, 7), "t2": dense(7, 5)}
            | {"norm1": pair(8), "c1": dense(8, 10), "c2": dense(10, 8)}
            for _ in range(1)
        ],
        "norm": pair(8),
        "head": dense(8, 3),
    },
    (5, 6),
)
def flax_mixer(p, x):
    """Tokens are mixed for every channel, between two transposes."""
    h = linear(p["stem"], x)
    for q in p["blocks"]:
        y = jnp.swapaxes(layer_norm(q["norm0"], h), 1, 2)
        y = linear(q["t2"], jax.nn.gelu(linear(q["t1"], y)))
        h = h + jnp.swapaxes(y, 1, 2)
        h = h + linear(q["c2"], jax.nn.gelu(linear(q["c1"], layer_norm(q["norm1"], h))))
    return linear(p["head"], layer_norm(p["norm"], h).mean(1))


@entry(
    {
        "embed": (6, 8),
        "router": (8, 3),
        "up": (3, 8, 10),
        "down": (3, 10, 8),
        "head": (8, 4),
    },
    (5, 6),
)
def soft_experts(p, x):
    """Every token goes to all experts, by the softmax of a router."""
    h = jnp.tanh(x @ p["embed"])
    gates = jax.nn.softmax(h @ p["router"], -1)
    y = jax.nn.relu(jnp.einsum("btd,edf->btef", h, p["up"]))
    h = h + jnp.einsum("btef,efd,bte->btd", y, p["down"], gates)
    return h.mean(1) @ p["head"]


@entry(
    {"embed": (11, 8), "stack": {"up": (2, 8, 10), "down": (2, 10, 8), "scale": (2, 8)}}
    | {"head": (8, 4)},
    tokens(4),
    slow=("report",),
)
def scanned_stack(p, x):
    """Layers in one scan, their kernels stacked."""

    def layer(h, q):
        return h + jax.nn.gelu(rms(q["scale"], h) @ q["up"]) @ q["down"], None

    h, _ = lax.scan(layer, p["embed"][x], p["stack"])
    return h.mean(1) @ p["head"]
