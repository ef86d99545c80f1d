"""Networks of images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from zoo.registry import entry


def conv(x, w, stride=1, groups=1, names=("NHWC", "HWIO", "NHWC")):
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=names, feature_group_count=groups
    )


def norm_of(width):
    return {name: (width,) for name in ("gamma", "beta", "mean", "variance")}


def keras_norm(p, x):
    """As Keras 3 writes it: `x * inv + (beta - mean * inv)`."""
    broadcast = (1,) * (x.ndim - 1) + (-1,)
    mean, variance, gamma, beta = (
        jnp.reshape(p[name], broadcast) for name in ("mean", "variance", "gamma", "beta")
    )
    inv = lax.rsqrt(variance + 1e-3) * gamma
    return x * inv + (beta - mean * inv)


@entry(
    {
        "stem": (3, 3, 3, 8),
        "bn0": norm_of(8),
        "depthwise": (3, 3, 1, 8),
        "bn1": norm_of(8),
        "pointwise": (1, 1, 8, 10),
        "bn2": norm_of(10),
        "dense": {"kernel": (10, 4), "bias": (4,)},
    },
    (6, 6, 3),
    slow=(),
)
def keras_mobilenet(p, x):
    """Depthwise separable convolutions; ReLU6 as a clip."""
    h = jnp.clip(keras_norm(p["bn0"], conv(x, p["stem"], 2)), 0, 6)
    h = jnp.clip(keras_norm(p["bn1"], conv(h, p["depthwise"], groups=8)), 0, 6)
    h = jnp.clip(keras_norm(p["bn2"], conv(h, p["pointwise"])), 0, 6)
    return jnp.mean(h, axis=(1, 2)) @ p["dense"]["kernel"] + p["dense"]["bias"]


@entry(
    {
        "stem": (3, 3, 3, 6),
        **{f"bn{k}": norm_of(6 + 4 * k) for k in range(3)},
        **{f"conv{k}": (3, 3, 6 + 4 * k, 4) for k in range(2)},
        "head": (14, 3),
    },
    (5, 5, 3),
)
def keras_densenet(p, x):
    """Features are concatenated, layer by layer."""
    h = conv(x, p["stem"])
    for k in range(2):
        h = jnp.concatenate(
            [h, conv(jax.nn.relu(keras_norm(p[f"bn{k}"], h)), p[f"conv{k}"])], axis=-1
        )
    return jax.nn.relu(keras_norm(p["bn2"], h)).mean((1, 2)) @ p["head"]


@entry(
    {
        "expand": (1, 1, 3, 12),
        "bn": norm_of(12),
        "reduce": {"kernel": (1, 1, 12, 5), "bias": (5,)},
        "excite": {"kernel": (1, 1, 5, 12), "bias": (12,)},
        "project": (1, 1, 12, 6),
        "head": (6, 3),
    },
    (4, 4, 3),
)
def keras_efficientnet(p, x):
    """Squeeze and excitation: a branch that scales channels."""
    h = jax.nn.silu(keras_norm(p["bn"], conv(x, p["expand"])))
    s = jnp.reshape(h.mean((1, 2)), (-1, 1, 1, 12))
    s = jax.nn.silu(conv(s, p["reduce"]["kernel"]) + p["reduce"]["bias"])
    h = h * jax.nn.sigmoid(conv(s, p["excite"]["kernel"]) + p["excite"]["bias"])
    return jax.nn.silu(conv(h, p["project"])).mean((1, 2)) @ p["head"]


def haiku_norm(params, state, name, x):
    """The average of a running mean, `hidden` and `counter` beside it, and `scale * rsqrt`."""
    p = params[name]
    mean, var = (state[f"{name}/~/{what}_ema"]["average"] for what in ("mean", "var"))
    inv = p["scale"] * lax.rsqrt(var + 1e-5)
    return (x - mean) * inv + p["offset"]


def _averages(name, width):
    return {
        f"{name}/~/{what}_ema": {"average": (width,), "hidden": (width,), "counter": ()}
        for what in ("mean", "var")
    }


@entry(
    {
        "params": {
            "net/~/conv2_d": {"w": (3, 3, 3, 8)},
            "net/~/batch_norm": {"scale": (8,), "offset": (8,)},
            "net/~/linear": {"w": (8, 10), "b": (10,)},
            "net/~/linear_1": {"w": (10, 4), "b": (4,)},
        },
        "state": _averages("net/~/batch_norm", 8),
    },
    (3, 5, 5),
)
def haiku_convnet(v, x):
    """Channels first, transposed on the way to a dense layer."""
    p = v["params"]
    h = conv(x, p["net/~/conv2_d"]["w"], names=("NCHW", "HWIO", "NCHW"))
    h = haiku_norm(p, v["state"], "net/~/batch_norm", jnp.transpose(h, (0, 2, 3, 1)))
    h = jnp.mean(jax.nn.relu(h), axis=(1, 2))
    for name in ("net/~/linear", "net/~/linear_1"):
        h = jnp.dot(h, p[name]["w"]) + jnp.broadcast_to(p[name]["b"], (len(h), p[name]["b"].size))
        h = jax.nn.relu(h) if name.endswith("linear") else h
    return h


@entry(
    {
        "layers": [
            {"weight": (6, 3, 3, 3), "bias": (6, 1, 1)},
            {"weight": (8, 6, 3, 3), "bias": (8, 1, 1)},
            {"weight": (10, 8 * 2 * 2), "bias": (10,)},
            {"weight": (4, 10), "bias": (4,)},
        ]
    },
    (3, 4, 4),
)
def equinox_cnn(p, x):
    """Written for one example, with kernels (out, in), and mapped over the batch."""
    names = ("NCHW", "OIHW", "NCHW")

    def one(x):
        for k in range(2):
            w, b = p["layers"][k]["weight"], p["layers"][k]["bias"]
            x = lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=names)[0]
            x = jax.nn.relu(x + b)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2), (1, 2, 2), "VALID")
        x = jax.nn.relu(p["layers"][2]["weight"] @ jnp.ravel(x) + p["layers"][2]["bias"])
        return p["layers"][3]["weight"] @ x + p["layers"][3]["bias"]

    return jax.vmap(one)(x)


def nnx_norm(p, x):
    """Statistics are reshaped, not broadcast."""
    shape = [1] * (x.ndim - 1) + [x.shape[-1]]
    y = x - p["mean"].reshape(shape)
    mul = lax.rsqrt(p["var"].reshape(shape) + 1e-5) * p["scale"].reshape(shape)
    return y * mul + p["bias"].reshape(shape)


@entry(
    {
        "stem": (3, 3, 3, 8),
        "blocks": [
            {"conv1": (1, 1, 8, 12), "bn1": (12,), "conv2": (3, 3, 3, 12), "conv3": (1, 1, 12, 8)}
            for _ in range(2)
        ],
        "bn": {name: (8,) for name in ("mean", "var", "scale", "bias")},
        "head": {"kernel": (8, 4), "bias": (4,)},
    },
    (4, 4, 3),
)
def jax_resnet_next(p, x):
    """Bottlenecks with grouped convolutions."""
    h = jax.nn.relu(nnx_norm(p["bn"], conv(x, p["stem"])))
    for block in p["blocks"]:
        y = jax.nn.relu(conv(h, block["conv1"]) + block["bn1"])
        h = jax.nn.relu(h + conv(jax.nn.relu(conv(y, block["conv2"], groups=4)), block["conv3"]))
    return h.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


@entry(
    [
        ((3, 3, 3, 6), (1, 1, 1, 6)),
        ((6,), (6,)),
        [((6, 8), (8,)), ((6, 8), (8,))],
        ((8, 3), (3,)),
    ],
    (4, 4, 3),
    slow=("report",),
)
def stax_fan(p, x):
    """Tuples of arrays, BatchNorm by the batch alone, a fan out and a sum."""
    (w, b), (beta, gamma), fan, (v, c) = p
    h = conv(x, w) + b
    mean, var = jnp.mean(h, (0, 1, 2), keepdims=True), jnp.var(h, (0, 1, 2), keepdims=True)
    h = jax.nn.relu((gamma + 1) * (h - mean) / jnp.sqrt(var + 1e-5) + beta).mean((1, 2))
    h = sum(jnp.dot(h, w) + b for w, b in fan)
    return jnp.dot(jax.nn.relu(h), v) + c


def group_norm(p, x, groups):
    y = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    mean = y.mean((1, 2, 4), keepdims=True)
    var = (y * y).mean((1, 2, 4), keepdims=True) - mean * mean
    y = ((y - mean) * lax.rsqrt(jnp.maximum(var, 0) + 1e-5)).reshape(x.shape)
    return y * p["scale"] + p["bias"]


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) * lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)
    return y * p["scale"] + p["bias"]


def pair(width):
    return {"scale": (width,), "bias": (width,)}


def unet_shapes(width, levels, blocks, context=6):
    """The variables of a UNet: its blocks go down, through the middle, and up."""
    shapes = {"in": (3, 3, 3, width), "time": [(4, 16), (16, 16)]}

    def resnet(name, i, o):
        shapes[name] = {"norm1": pair(i), "conv1": (3, 3, i, o), "b1": (o,), "time": (16, o)}
        shapes[name] |= {"norm2": pair(o), "conv2": (3, 3, o, o), "b2": (o,)}
        shapes[name] |= {} if i == o else {"skip": (1, 1, i, o)}

    def attention(name, n):
        block = {"norm": pair(n), "in": (n, n), "out": (n, n)}
        for key, m in (("self", n), ("cross", context)):
            block[key] = {"norm": pair(n), "q": (n, n), "k": (m, n), "v": (m, n), "o": (n, n)}
        shapes[name] = block | {"norm_ff": pair(n), "up": (n, 8 * n), "down": (4 * n, n)}

    skips, now = [width], width
    for level in range(levels):
        for k in range(blocks):
            resnet(f"down{level}{k}", now, now := width * (level + 1))
            if level < levels - 1:
                attention(f"down{level}{k}a", now)
            skips.append(now)
        if level < levels - 1:
            shapes[f"shrink{level}"] = (3, 3, now, now)
            skips.append(now)
    resnet("mid0", now, now)
    attention("mida", now)
    resnet("mid1", now, now)
    for level in reversed(range(levels)):
        for k in range(blocks + 1):
            resnet(f"up{level}{k}", now + skips.pop(), now := width * (level + 1))
            if level < levels - 1:
                attention(f"up{level}{k}a", now)
        if level:
            shapes[f"grow{level}"] = (3, 3, now, now)
    return shapes | {"norm": pair(now), "out": (3, 3, now, 3)}


def unet(p, x, levels, blocks, groups=2, heads=2):
    """As diffusers writes it: time, self and cross attention, GroupNorm, concatenated skips."""
    image, time, context = x["image"], x["time"], x["context"]
    time = jax.nn.silu(jax.nn.silu(time @ p["time"][0]) @ p["time"][1])

    def resnet(q, h):
        y = conv(jax.nn.silu(group_norm(q["norm1"], h, groups)), q["conv1"]) + q["b1"]
        y = y + jnp.expand_dims(jnp.expand_dims(time @ q["time"], 1), 1)
        y = conv(jax.nn.silu(group_norm(q["norm2"], y, groups)), q["conv2"]) + q["b2"]
        return y + (conv(h, q["skip"]) if "skip" in q else h)

    def attend(q, h, other):
        def split(z):
            return z.reshape(*z.shape[:2], heads, -1)

        scores = jnp.einsum("bthd,bshd->bhts", split(h @ q["q"]), split(other @ q["k"]))
        values = split(other @ q["v"])
        out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), values)
        return out.reshape(h.shape) @ q["o"]

    def attention(q, h):
        y = group_norm(q["norm"], h, groups).reshape(h.shape[0], -1, h.shape[-1]) @ q["in"]
        z = layer_norm(q["self"]["norm"], y)
        y = y + attend(q["self"], z, z)
        y = y + attend(q["cross"], layer_norm(q["cross"]["norm"], y), context)
        linear, gate = jnp.split(layer_norm(q["norm_ff"], y) @ q["up"], 2, axis=-1)
        y = y + (linear * jax.nn.gelu(gate)) @ q["down"]
        return h + (y @ q["out"]).reshape(h.shape)

    def block(name, h):
        h = resnet(p[name], h)
        return attention(p[f"{name}a"], h) if f"{name}a" in p else h

    h = conv(image, p["in"])
    skips = [h]
    for level in range(levels):
        for k in range(blocks):
            skips.append(h := block(f"down{level}{k}", h))
        if level < levels - 1:
            skips.append(h := conv(h, p[f"shrink{level}"], 2))
    h = resnet(p["mid1"], attention(p["mida"], resnet(p["mid0"], h)))
    for level in reversed(range(levels)):
        for k in range(blocks + 1):
            h = block(f"up{level}{k}", jnp.concatenate([h, skips.pop()], axis=-1))
        if level:
            h = conv(jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2), p[f"grow{level}"])
    return conv(jax.nn.silu(group_norm(p["norm"], h, groups)), p["out"])


def unet_inputs(n, rng):
    shapes = {"image": (4, 4, 3), "time": (4,), "context": (3, 6)}
    return {name: rng.normal(size=(n, *s)).astype("float32") for name, s in shapes.items()}


@entry(unet_shapes(4, 1, 1), unet_inputs, slow=("activations", "repair", "report"))
def diffusers_unet(p, x):
    return unet(p, x, 1, 1)
