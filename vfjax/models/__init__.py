"""Flax Linen models of the experiments: VGG, ResNet, ConvNeXt, ViT, MLPs, linear networks, digits.

Call them as `model.apply(variables, x, train=False)` on images `[N, H, W, C]`; they return logits
`[N, classes]`. Only training and the experiments depend on them; the rest of the library works on
any pure function over a pytree.

`create(name, width=..., classes=...)` creates one of `NAMES`; `apply_fn(model)` is the function
for `vfjax.trace`. `vfjax.checkpoint.from_torch` fills `"resnet50"`, `"imagenet-vgg16"`,
`"imagenet-vgg16-bn"`, `"convnext-tiny"` and `"convnext-base"` with published weights.

    >>> import jax, jax.numpy as jnp, vfjax
    >>> model, x = create("vgg16", width=0.125, classes=10), jnp.ones((2, 32, 32, 3))
    >>> v = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    >>> vfjax.trace(apply_fn(model), v, x).depth
    14
"""

from __future__ import annotations

from vfjax.models._bottleneck import BottleneckResNet as BottleneckResNet
from vfjax.models._convnext import ConvNeXt as ConvNeXt
from vfjax.models._digits import DigitsConv as DigitsConv
from vfjax.models._digits import DigitsMLP as DigitsMLP
from vfjax.models._linear import LinearNetwork as LinearNetwork
from vfjax.models._mlp import MLP as MLP
from vfjax.models._named import NAMES as NAMES
from vfjax.models._named import ApplyFn as ApplyFn
from vfjax.models._named import apply_fn as apply_fn
from vfjax.models._named import create as create
from vfjax.models._resnet import ResNet as ResNet
from vfjax.models._vgg import VGG as VGG
from vfjax.models._vgg import ImageNetVGG as ImageNetVGG
from vfjax.models._vit import ViT as ViT

__all__ = [
    "MLP",
    "NAMES",
    "VGG",
    "ApplyFn",
    "BottleneckResNet",
    "ConvNeXt",
    "DigitsConv",
    "DigitsMLP",
    "ImageNetVGG",
    "LinearNetwork",
    "ResNet",
    "ViT",
    "apply_fn",
    "create",
]
