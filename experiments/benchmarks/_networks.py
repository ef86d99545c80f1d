"""Networks that others published, built from small configurations, with random weights.

Each entry gives `(fn, variables, x)`, as `vfjax.trace` takes them. Frameworks are imported when a
network is built, so that those that are not installed cost nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Built = tuple[Callable[..., Any], Any, Any]
# By the first word of a network's name, the package that it is of.
PACKAGES = {"hf": "transformers"}
NETWORKS: dict[str, Callable[[], Built]] = {}
# By network and law that does not hold of it, the reason.
EXCEPTIONS: dict[str, dict[str, str]] = {}


def entry(title: str, builder: Callable[..., Built], /, *args: Any, **options: Any) -> None:
    NETWORKS[title] = functools.partial(builder, *args, **options)


def installed(name: str) -> bool:
    """Whether the package of a network is."""
    first = name.split()[0]
    return importlib.util.find_spec(PACKAGES.get(first, first)) is not None


def images(side: int, channels: int = 3, batch: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, side, side, channels)).astype(np.float32)


def tokens(length: int = 6, batch: int = 32, most: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(3, most, (batch, length)).astype(np.int32)


# -------------------------------------------------------------------------- Keras 3 on JAX
def keras_model(make: Callable[[Any], Any], x: Any) -> Built:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    keras.utils.set_random_seed(0)
    model = make(keras)
    model(x)
    kinds = {"trainable": model.trainable_variables, "state": model.non_trainable_variables}
    variables = {
        # Numbered: names need not differ, and the order is what `stateless_call` goes by.
        kind: {f"{i:03d} {v.path}": jnp.asarray(v.value) for i, v in enumerate(of)}
        for kind, of in kinds.items()
    }

    def fn(variables: Any, x: Any) -> Any:
        parts = [list(variables[kind].values()) for kind in ("trainable", "state")]
        return model.stateless_call(*parts, x, training=False)[0]

    return fn, variables, x


def application(module: str, function: str, /, *args: Any, **options: Any) -> Built:
    def make(keras: Any) -> Any:
        apps = importlib.import_module(f"keras.src.applications.{module}")
        common = {"weights": None, "input_shape": (32, 32, 3), "classes": 5}
        common |= {"classifier_activation": None}
        given = [one(apps) if callable(one) else one for one in args]
        return getattr(apps, function)(*given, **common | options)

    return keras_model(make, images(32))


def stack(version: int) -> Callable[[Any], Any]:
    """Two stages of residual blocks, as `ResNet` of Keras takes them."""

    def of(apps: Any) -> Any:
        blocks = getattr(apps, f"stack_residual_blocks_v{version}")
        return lambda x: blocks(blocks(x, 4, 2, stride1=1, name="conv2"), 8, 2, name="conv3")

    return of


# fmt: off
entry("keras MobileNet", application, "mobilenet", "MobileNet", alpha=0.125)
entry("keras MobileNetV2", application, "mobilenet_v2", "MobileNetV2", alpha=0.1)
entry("keras MobileNetV3Small", application, "mobilenet_v3", "MobileNetV3Small", alpha=0.25,
      include_preprocessing=False)
entry("keras EfficientNet", application, "efficientnet", "EfficientNet", 0.25, 0.3, 32)
entry("keras EfficientNetV2", application, "efficientnet_v2", "EfficientNetV2", 0.125, 0.2, 32,
      name="efficientnetv2-b0", include_preprocessing=False)
entry("keras DenseNet", application, "densenet", "DenseNet", [1, 1, 1, 1])
entry("keras ResNet", application, "resnet", "ResNet", stack(1), False, True)
entry("keras ResNetV2", application, "resnet", "ResNet", stack(2), True, True)
entry("keras ConvNeXt", application, "convnext", "ConvNeXt", [1, 1, 2, 1], [8, 12, 16, 16],
      include_preprocessing=False)
entry("keras NASNet", application, "nasnet", "NASNet", penultimate_filters=96, num_blocks=1,
      stem_block_filters=4, skip_reduction=False, default_size=32)
# fmt: on


def keras_recurrent(kind: str) -> Built:
    def make(keras: Any) -> Any:
        layers = keras.layers
        return keras.Sequential(
            [layers.Embedding(40, 6), getattr(layers, kind)(8), layers.Dense(3)]
        )

    return keras_model(make, tokens())


entry("keras LSTM", keras_recurrent, "LSTM")
entry("keras GRU", keras_recurrent, "GRU")


# -------------------------------------------------------------------------- Haiku
def haiku_model(make: Callable[[Any], Any], x: Any) -> Built:
    import haiku as hk

    model = hk.transform_with_state(lambda x, training=False: make(hk, training)(x))
    # In training mode, without which BatchNorm has no averages.
    params, state = model.init(jax.random.key(0), x, True)
    variables = {"params": params, "state": state} if jax.tree.leaves(state) else {"params": params}

    def fn(variables: Any, x: Any) -> Any:
        return model.apply(variables["params"], variables.get("state", {}), None, x)[0]

    return fn, variables, x


def haiku_resnet(hk: Any, training: bool, v2: bool, bottleneck: bool) -> Any:
    net = hk.nets.ResNet(
        (1, 2, 1, 1),
        5,
        resnet_v2=v2,
        bottleneck=bottleneck,
        channels_per_group=(8, 8, 16, 16),
        use_projection=(True, True, True, True),
        initial_conv_config={"output_channels": 8},
    )
    return lambda x: net(x, is_training=training)


# fmt: off
entry("haiku MLP", haiku_model, lambda hk, _: lambda x: hk.nets.MLP((8, 8, 5))(hk.Flatten()(x)),
      images(4))
entry("haiku ResNet", haiku_model, functools.partial(haiku_resnet, v2=False, bottleneck=True),
      images(32))
entry("haiku ResNetV2", haiku_model, functools.partial(haiku_resnet, v2=True, bottleneck=True),
      images(32))
entry("haiku ResNet, basic blocks", haiku_model,
      functools.partial(haiku_resnet, v2=False, bottleneck=False), images(32))
entry("haiku MobileNetV1", haiku_model,
      lambda hk, training: lambda x: hk.nets.MobileNetV1(
          (1, 2), (8, 12), num_classes=5, use_bn=True)(x, is_training=training), images(16))
entry("haiku VectorQuantizer", haiku_model,
      lambda hk, _: lambda x: hk.Linear(5)(
          hk.nets.VectorQuantizer(6, 8, 0.25)(hk.Linear(6)(x), is_training=False)["quantize"]),
      images(4))
# fmt: on


def haiku_recurrent(hk: Any, _: bool, kind: str) -> Any:
    def apply(x: Any) -> Any:
        h = jnp.swapaxes(hk.Embed(40, 6)(x), 0, 1)
        core = getattr(hk, kind)(8)
        out, _ = hk.dynamic_unroll(core, h, core.initial_state(x.shape[0]))
        return hk.Linear(3)(out[-1])

    return apply


def haiku_attention(hk: Any, _: bool) -> Any:
    def apply(x: Any) -> Any:
        h = hk.Embed(40, 8)(x)
        for _ in range(2):
            n = hk.LayerNorm(-1, True, True)(h)
            h = h + hk.MultiHeadAttention(
                2, 4, model_size=8, w_init=hk.initializers.VarianceScaling(1.0)
            )(n, n, n)
            n = hk.LayerNorm(-1, True, True)(h)
            h = h + hk.Linear(8)(jax.nn.gelu(hk.Linear(16)(n)))
        return hk.Linear(3)(h.mean(1))

    return apply


def haiku_stack(hk: Any, _: bool) -> Any:
    def apply(x: Any) -> Any:
        def block(h: Any) -> Any:
            return h + hk.Linear(8)(jax.nn.relu(hk.Linear(12)(h)))

        return hk.Linear(3)(hk.experimental.layer_stack(3)(block)(hk.Linear(8)(hk.Flatten()(x))))

    return apply


entry("haiku LSTM", haiku_model, functools.partial(haiku_recurrent, kind="LSTM"), tokens())
entry("haiku GRU", haiku_model, functools.partial(haiku_recurrent, kind="GRU"), tokens())
entry("haiku MultiHeadAttention", haiku_model, haiku_attention, tokens())
entry("haiku layer_stack", haiku_model, haiku_stack, images(4))


# -------------------------------------------------------------------------- Hugging Face Flax
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 5,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def hugging_face(model: str, config: str, x: Any, **options: Any) -> Built:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**options), seed=0)
    variables = made.params

    # OPT has the name of the training flag of its own modules.
    evaluation = {"deterministic": True} if model.startswith("FlaxOPT") else {"train": False}

    def fn(variables: Any, x: Any) -> Any:
        given = x if isinstance(x, dict) else {"input_ids": x}
        return made(**given, params=variables, **evaluation)[0]

    return fn, variables, x


def pixels(side: int = 8) -> dict[str, np.ndarray]:
    return {"pixel_values": np.moveaxis(images(side), -1, 1)}


CLASSES = {"num_labels": 3}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
# fmt: off
entry("hf Bert", hugging_face, "FlaxBertForSequenceClassification", "BertConfig", tokens(), **TEXT)
entry("hf Roberta", hugging_face, "FlaxRobertaForSequenceClassification", "RobertaConfig", tokens(),
      **TEXT)
entry("hf RobertaPreLayerNorm", hugging_face, "FlaxRobertaPreLayerNormForSequenceClassification",
      "RobertaPreLayerNormConfig", tokens(), **TEXT)
entry("hf Electra", hugging_face, "FlaxElectraForSequenceClassification", "ElectraConfig",
      tokens(), embedding_size=12, **TEXT)
entry("hf Albert", hugging_face, "FlaxAlbertForSequenceClassification", "AlbertConfig", tokens(),
      embedding_size=12, **TEXT)
entry("hf RoFormer", hugging_face, "FlaxRoFormerForSequenceClassification", "RoFormerConfig",
      tokens(), **TEXT)
entry("hf BigBird", hugging_face, "FlaxBigBirdForSequenceClassification", "BigBirdConfig", tokens(),
      attention_type="original_full", **TEXT)
entry("hf DistilBert", hugging_face, "FlaxDistilBertForSequenceClassification", "DistilBertConfig",
      tokens(), dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40,
      max_position_embeddings=16)
entry("hf GPT2", hugging_face, "FlaxGPT2LMHeadModel", "GPT2Config", tokens(), **GPT2)
entry("hf GPTJ", hugging_face, "FlaxGPTJForCausalLM", "GPTJConfig", tokens(), rotary_dim=4, **GPT2)
entry("hf GPTNeo", hugging_face, "FlaxGPTNeoForCausalLM", "GPTNeoConfig", tokens(),
      hidden_size=16, num_layers=2, num_heads=2, vocab_size=40, max_position_embeddings=16,
      attention_types=[[["global", "local"], 1]], intermediate_size=24, window_size=4)
entry("hf OPT", hugging_face, "FlaxOPTForCausalLM", "OPTConfig", tokens(), hidden_size=16,
      num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, vocab_size=40,
      max_position_embeddings=16, word_embed_proj_dim=16)
entry("hf Bloom", hugging_face, "FlaxBloomForCausalLM", "BloomConfig", tokens(), hidden_size=16,
      n_layer=2, n_head=2, vocab_size=40)
entry("hf XGLM", hugging_face, "FlaxXGLMForCausalLM", "XGLMConfig", tokens(), d_model=16,
      num_layers=2, attention_heads=2, ffn_dim=24, vocab_size=40, max_position_embeddings=16)
entry("hf Llama", hugging_face, "FlaxLlamaForCausalLM", "LlamaConfig", tokens(), **TEXT)
entry("hf Mistral", hugging_face, "FlaxMistralForCausalLM", "MistralConfig", tokens(),
      num_key_value_heads=1, **TEXT)
entry("hf Gemma", hugging_face, "FlaxGemmaForCausalLM", "GemmaConfig", tokens(),
      num_key_value_heads=1, head_dim=8, **TEXT)
entry("hf ViT", hugging_face, "FlaxViTForImageClassification", "ViTConfig", pixels(), **VISION)
entry("hf Beit", hugging_face, "FlaxBeitForImageClassification", "BeitConfig", pixels(), **VISION)
entry("hf Dinov2", hugging_face, "FlaxDinov2ForImageClassification", "Dinov2Config", pixels(),
      mlp_ratio=2, **VISION)
entry("hf CLIP text", hugging_face, "FlaxCLIPTextModel", "CLIPTextConfig", tokens(), **TEXT)
entry("hf CLIP vision", hugging_face, "FlaxCLIPVisionModel", "CLIPVisionConfig", pixels(), **VISION)
entry("hf ResNet", hugging_face, "FlaxResNetForImageClassification", "ResNetConfig", pixels(32),
      embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5)
entry("hf ResNet, bottleneck", hugging_face, "FlaxResNetForImageClassification", "ResNetConfig",
      pixels(32), embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5)
entry("hf RegNet", hugging_face, "FlaxRegNetForImageClassification", "RegNetConfig", pixels(32),
      embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4, num_labels=5)
# fmt: on


# -------------------------------------------------------------------------- Equimo (Equinox)
def equimo_model(module: str, make: str, side: int = 32, **options: Any) -> Built:
    import equinox as eqx

    cls = getattr(importlib.import_module(f"equimo.vision.models.{module}"), make)
    model = cls(key=jax.random.key(0), **options)
    params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)

    def fn(params: Any, x: Any) -> Any:
        whole = eqx.combine(params, static)
        return jax.vmap(lambda one: whole(one, key=jax.random.key(0)))(x)

    return fn, params, np.moveaxis(images(side), -1, 1)


# fmt: off
entry("equimo VisionTransformer", equimo_model, "vit", "VisionTransformer", 8, img_size=8,
      in_channels=3, dim=16, patch_size=4, num_heads=[2], depths=[2], num_classes=5,
      reg_tokens=1)
entry("equimo VisionTransformer, q and k normed", equimo_model, "vit", "VisionTransformer", 8,
      img_size=8, in_channels=3, dim=16, patch_size=4, num_heads=[2], depths=[2], num_classes=5,
      qk_norm=True, init_values=0.5)
entry("equimo ConvNeXt", equimo_model, "convnext", "ConvNeXt", depths=[1, 1, 2, 1],
      dims=[8, 12, 16, 16], num_classes=5)
entry("equimo ConvNeXt V2", equimo_model, "convnext", "ConvNeXt", depths=[1, 1, 2, 1],
      dims=[8, 12, 16, 16], num_classes=5, use_grn=True)
entry("equimo ReduceFormer", equimo_model, "reduceformer", "ReduceFormer", in_channels=3,
      widths=[8, 8, 8, 16, 16], depths=[1, 1, 1, 1, 1],
      block_types=["conv", "conv", "conv", "attention", "attention"], head_dim=4, num_classes=5)
entry("equimo Mlla", equimo_model, "mlla", "Mlla", img_size=32, in_channels=3, dim=8,
      depths=[1, 1], num_heads=[2, 2], num_classes=5)
# fmt: on


def equinox_mlp() -> Built:
    import equinox as eqx

    mlp = eqx.nn.MLP(4, 3, 8, 3, key=jax.random.key(0))
    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, x


entry("equinox MLP", equinox_mlp)


# -------------------------------------------------------------------------- penzai
def penzai_transformer(kind: str) -> Built:
    from penzai import pz
    from penzai.models.transformer import variants

    common = {
        "num_decoder_blocks": 2,
        "vocab_size": 40,
        "embedding_dim": 16,
        "mlp_hidden_dim": 24,
        "projection_dim": 8,
        "parameter_dtype": jnp.float32,
        "activation_dtype": jnp.float32,
    }
    if kind == "gptneox":
        config = variants.gpt_neox.GPTNeoXTransformerConfig(
            num_attention_heads=2,
            activation_fn="gelu_exact",
            rope_subset_size=4,
            rope_wavelength=100.0,
            layernorm_epsilon=1e-5,
            **common,
        )
        model = variants.gpt_neox.build_gpt_neox_transformer(config, jax.random.key(0))
    else:
        config = variants.llamalike_common.LlamalikeTransformerConfig(
            num_kv_heads=1,
            query_head_multiplier=2,
            tie_embedder_and_logits=kind == "gemma",
            mlp_variant="geglu_approx" if kind == "gemma" else "swiglu",
            rope_wavelength=100.0,
            attention_type=variants.llamalike_common.AttentionTypeGlobalCausal(),
            **common,
        )
        model = variants.llamalike_common.build_llamalike_transformer(config, jax.random.key(0))
    unbound, bound = pz.unbind_params(model)
    variables = {p.label: p.value.unwrap(*p.value.named_shape) for p in bound}
    axes = {p.label: tuple(p.value.named_shape) for p in bound}

    def fn(variables: Any, x: Any) -> Any:
        values = [
            type(p)(value=pz.nx.wrap(variables[p.label]).tag(*axes[p.label]), label=p.label)
            for p in bound
        ]
        whole = pz.bind_variables(unbound, values)
        out = whole(pz.nx.wrap(x).tag("batch", "seq"))
        return out.unwrap("batch", "seq", "vocabulary")

    return fn, variables, tokens()


# -------------------------------------------------------------------------- jraph
def graph_network(kind: str) -> Built:
    import haiku as hk
    import jraph

    rng = np.random.default_rng(0)
    senders, receivers = rng.integers(0, 10, (2, 24))

    def mlp(*sizes: int) -> Any:
        return lambda *a: hk.nets.MLP(sizes)(
            jnp.concatenate([jax.tree.leaves(p)[0] for p in a if jax.tree.leaves(p)], axis=-1)
        )

    def apply(x: Any) -> Any:
        graph = jraph.GraphsTuple(
            nodes=x["nodes"],
            edges=x["edges"],
            senders=senders,
            receivers=receivers,
            globals=x["globals"],
            n_node=jnp.array([10]),
            n_edge=jnp.array([24]),
        )
        if kind == "GraphConvolution":
            graph = graph._replace(
                nodes=jax.nn.relu(jraph.GraphConvolution(hk.Linear(8))(graph).nodes)
            )
            graph = jraph.GraphConvolution(hk.Linear(8))(graph)
        elif kind == "GAT":
            graph = jraph.GAT(
                hk.Linear(8), lambda s, r, e: hk.Linear(1)(jnp.concatenate([s, r], axis=1))
            )(graph)
        elif kind == "InteractionNetwork":
            graph = jraph.InteractionNetwork(mlp(8, 8), mlp(8, 8))(graph)
        else:
            graph = jraph.GraphNetwork(mlp(8, 8), mlp(8, 8), mlp(8, 8))(graph)
        return hk.Linear(3)(graph.nodes)

    model = hk.without_apply_rng(hk.transform(apply))
    shapes = {"nodes": (10, 4), "edges": (24, 2), "globals": (1, 2)}
    x = {k: rng.normal(size=(16, *shape)).astype(np.float32) for k, shape in shapes.items()}
    variables = model.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], x))
    return jax.vmap(model.apply, (None, 0)), variables, x


for _kind in ("GraphConvolution", "GAT", "InteractionNetwork", "GraphNetwork"):
    entry(f"jraph {_kind}", graph_network, _kind)
for _kind in ("llama", "gemma", "gptneox"):
    entry(f"penzai {_kind}", penzai_transformer, _kind)
