"""Published networks, built from small configurations with random weights: what users bring.

A network is left out where its package is not installed: `pip install "vfjax[zoo]"`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A builder gives `fn`, its variables and a batch of inputs, or raises ImportError.
Built = tuple[Callable[[Any, Any], Any], Any, Any]
PUBLISHED: dict[str, Callable[[], Built]] = {}
# By network and law that does not hold, the reason.
FAILS: dict[tuple[str, str], str] = {}

TEXT = {
    "vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3,
    "intermediate_size": 16, "max_position_embeddings": 12,
}  # fmt: skip
GPT = {"vocab_size": 23, "n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 12}
GPT |= {"n_inner": 16, "rotary_dim": 2}
IMAGE = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 8}
IMAGE |= {"intermediate_size": 16, "patch_size": 4, "num_channels": 3}
STAGES = {"hidden_sizes": [4, 8], "depths": [1, 1], "embedding_size": 4, "num_channels": 3}

# Of `transformers`: the configuration, the Flax model, and what differs from the above.
HUGGING_FACE = {
    "bert": ("BertConfig", "FlaxBertModel", TEXT),
    "roberta": ("RobertaConfig", "FlaxRobertaModel", TEXT | {"pad_token_id": 0}),
    "electra": ("ElectraConfig", "FlaxElectraModel", TEXT | {"embedding_size": 12}),
    "albert": ("AlbertConfig", "FlaxAlbertModel", TEXT | {"embedding_size": 12}),
    "roformer": ("RoFormerConfig", "FlaxRoFormerModel", TEXT | {"embedding_size": 12}),
    "distilbert": (
        "DistilBertConfig",
        "FlaxDistilBertModel",
        {"vocab_size": 23, "dim": 12, "n_layers": 1, "n_heads": 3, "hidden_dim": 16},
    ),
    "gpt2": ("GPT2Config", "FlaxGPT2Model", GPT),
    "gptj": ("GPTJConfig", "FlaxGPTJModel", GPT),
    "gpt_neo": (
        "GPTNeoConfig",
        "FlaxGPTNeoModel",
        {"vocab_size": 23, "hidden_size": 12, "num_layers": 1, "num_heads": 3}
        | {"attention_types": [[["global"], 1]], "max_position_embeddings": 12},
    ),
    "opt": ("OPTConfig", "FlaxOPTModel", TEXT | {"ffn_dim": 16, "word_embed_proj_dim": 12}),
    "xglm": (
        "XGLMConfig",
        "FlaxXGLMModel",
        {"vocab_size": 23, "d_model": 12, "ffn_dim": 16, "num_layers": 1, "attention_heads": 3},
    ),
    "llama": ("LlamaConfig", "FlaxLlamaModel", TEXT | {"num_key_value_heads": 3}),
    "mistral": (
        "MistralConfig",
        "FlaxMistralModel",
        TEXT | {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "gemma": (
        "GemmaConfig",
        "FlaxGemmaModel",
        TEXT | {"num_key_value_heads": 1, "head_dim": 4},
    ),
    "vit": ("ViTConfig", "FlaxViTModel", IMAGE),
    "beit": ("BeitConfig", "FlaxBeitModel", IMAGE),
    "dinov2": ("Dinov2Config", "FlaxDinov2Model", IMAGE),
    "resnet": ("ResNetConfig", "FlaxResNetModel", STAGES),
    "regnet": ("RegNetConfig", "FlaxRegNetModel", STAGES | {"groups_width": 4}),
}


def published(fn):
    """Adds a builder under its name."""
    PUBLISHED[fn.__name__] = fn
    return fn


def noisy(tree, seed=0):
    """Random numbers for initial ones, whose constants tell no units apart."""
    rng = np.random.default_rng(seed)

    def leaf(path, value):
        value = np.asarray(value)
        if not np.issubdtype(value.dtype, np.floating):
            return value
        size = 0.2 if value.ndim < 2 else max(float(value.std()), 1e-2)
        noise = size * rng.normal(size=value.shape)
        name = jax.tree_util.keystr(path)
        return np.asarray(value + (np.abs(noise) if "var" in name else noise), value.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _hugging_face(config: str, model: str, options: dict[str, Any]) -> Built:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    settings = {"hidden_dropout": 0.0} | options
    of = getattr(transformers, config)(**settings)
    network = getattr(transformers, model)(of, seed=0, input_shape=_shape(of))
    rng = np.random.default_rng(0)

    def fn(v, x):
        v = v if "batch_stats" in v else v["params"]
        return network(**x, params=v)[0]  # deterministic unless told to train

    params = network.params if "batch_stats" in network.params else {"params": network.params}
    params = jax.tree.map(np.asarray, params)
    if hasattr(of, "vocab_size") and "image_size" not in options:
        return fn, params, {"input_ids": rng.integers(2, 23, (16, 6), np.int32)}
    images = rng.normal(size=(16, 3, *_shape(of)[1:3])).astype(np.float32)
    return fn, params, {"pixel_values": images}


def _shape(of: Any) -> tuple[int, ...]:
    if hasattr(of, "image_size") or hasattr(of, "embedding_size") and hasattr(of, "depths"):
        size = getattr(of, "image_size", 16)
        return 1, size, size, 3
    return 1, 6


for _name, _arguments in HUGGING_FACE.items():
    PUBLISHED[f"hf_{_name}"] = functools.partial(_hugging_face, *_arguments)


def _haiku(build: Callable[[Any], Callable[[Any], Any]], x: Any) -> Built:
    import haiku as hk

    def forward(x, train):
        return build(hk)(x, train)

    # Only training sets averages up.
    network = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = network.init(jax.random.key(0), x[:2], True)
    return lambda v, x: network.apply(*v, x, False)[0], (params, state), x


def _images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@published
def haiku_mlp():
    return _haiku(lambda hk: lambda x, _: hk.nets.MLP([12, 10, 4])(x), _images(16, 6))


@published
def haiku_resnet():
    options = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (4, 8, 8, 8)}
    options |= {"bottleneck": False, "num_classes": 3}

    def build(hk):
        return lambda x, train: hk.nets.ResNet(**options)(x, is_training=train)

    return _haiku(build, _images(8, 16, 16, 3))


@published
def haiku_mobilenet():
    options = {"strides": (1, 2), "channels": (4, 6), "num_classes": 3, "use_bn": True}

    def build(hk):
        return lambda x, train: hk.nets.MobileNetV1(**options)(x, is_training=train)

    return _haiku(build, _images(8, 8, 8, 3))


@published
def haiku_transformer():
    def build(hk):
        def apply(x, _):
            h = hk.Embed(23, 12)(x)
            unit = hk.LayerNorm(-1, True, True)(h)
            heads = hk.MultiHeadAttention(
                3, 4, model_size=12, w_init=hk.initializers.RandomNormal()
            )
            h = h + heads(unit, unit, unit)
            h = h + hk.nets.MLP([16, 12])(hk.LayerNorm(-1, True, True)(h))
            return hk.Linear(4)(h.mean(1))

        return apply

    return _haiku(build, np.random.default_rng(0).integers(0, 23, (16, 5), np.int32))


def _keras(build: Callable[[Any], Any], x: Any) -> Built:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError("Keras runs on another backend here")
    model = build(keras)
    trained, other = model.trainable_variables, model.non_trainable_variables
    tree = [{v.path: np.asarray(v.value) for v in of} for of in (trained, other)]

    def fn(v, x):
        values = ([part[p.path] for p in of] for part, of in zip(v, (trained, other), strict=True))
        return model.stateless_call(*values, x, training=False)[0]

    return fn, tree, x


@published
def keras_sequential():
    def build(keras):
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(6, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.SeparableConv2D(8, 3),
                layers.LayerNormalization(),
                layers.GlobalAveragePooling2D(),
                layers.Dense(10, activation="gelu"),
                layers.Dense(3),
            ]
        )

    return _keras(build, _images(16, 8, 8, 3))


@published
def keras_attention():
    def build(keras):
        layers = keras.layers
        inputs = keras.Input((5, 12))
        h = layers.MultiHeadAttention(3, 4)(inputs, inputs)
        h = layers.LayerNormalization()(inputs + h)
        h = layers.Dense(12)(layers.Dense(16, activation="relu")(h)) + h
        return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(h)))

    return _keras(build, _images(16, 5, 12))


@published
def keras_lstm():
    def build(keras):
        layers = keras.layers
        rows = [keras.Input((3, 4)), layers.LSTM(6, unroll=True), layers.Dense(3)]
        return keras.Sequential(rows)

    return _keras(build, _images(16, 3, 4))


@published
def jraph_convolution():
    import jraph

    rng = np.random.default_rng(0)
    ends = {k: rng.integers(0, 8, (20,), np.int32) for k in ("senders", "receivers")}

    def fn(v, x):
        def one(nodes):
            graph = jraph.GraphsTuple(
                nodes, None, n_node=np.array([8]), n_edge=np.array([20]), globals=None, **ends
            )
            for w in v["layers"]:
                update = jraph.GraphConvolution(lambda h, w=w: jax.nn.relu(h @ w))
                graph = update(graph)
            return graph.nodes.mean(0) @ v["head"]

        return jax.vmap(one)(x)

    tree = {"layers": [_images(4, 10) / 2, _images(10, 8) / 3], "head": _images(8, 3)}
    return fn, tree, _images(16, 8, 4)


@published
def equimo_vit():
    import equinox as eqx
    from equimo.vision.models import VisionTransformer

    options = {"img_size": 8, "in_channels": 3, "dim": 12, "patch_size": 4, "num_heads": [3]}
    model = VisionTransformer(**options, depths=[1], num_classes=3, key=jax.random.key(0))
    params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)

    def fn(v, x):
        one = eqx.combine(v, static)
        return jax.vmap(lambda image: one(image, key=jax.random.key(0)))(x)

    return fn, params, _images(16, 3, 8, 8)


def built(name: str) -> Built:
    """A published network with random numbers in every leaf."""
    with jax.numpy_rank_promotion("allow"):
        fn, variables, x = PUBLISHED[name]()
    return fn, noisy(variables), jax.tree.map(jnp.asarray, x)
