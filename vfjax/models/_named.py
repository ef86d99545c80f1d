"""Models by name, as the experiments and their checkpoints use them."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
from flax import linen as nn

from vfjax._types import PyTree
from vfjax.models._bottleneck import BottleneckResNet
from vfjax.models._convnext import ConvNeXt
from vfjax.models._digits import DigitsConv, DigitsMLP
from vfjax.models._linear import LinearNetwork
from vfjax.models._mlp import MLP
from vfjax.models._resnet import ResNet
from vfjax.models._vgg import VGG, ImageNetVGG
from vfjax.models._vit import ViT


def _families() -> dict[str, tuple[type[nn.Module], dict[str, Any]]]:
    """Returns the class and the fixed options of every named model."""
    table: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        "mlp": (MLP, {}),
        "linear": (LinearNetwork, {}),
        "linear-residual": (LinearNetwork, {"depth": 5, "residual": True, "std": 0.005}),
        "digits-mlp": (DigitsMLP, {}),
        "digits-conv": (DigitsConv, {}),
    }
    for depth in (7, 11, 13, 16, 19):
        table[f"vgg{depth}"] = (VGG, {"depth": depth})
        table[f"vgg{depth}-bn"] = (VGG, {"depth": depth, "norm": "batch"})
        table[f"vgg{depth}-ln"] = (VGG, {"depth": depth, "norm": "layer"})
    for depth in (20, 32, 56):
        # BatchNorm, with which ResNets were published, needs no suffix but may have one.
        table[f"resnet{depth}"] = (ResNet, {"depth": depth, "norm": "batch"})
        table[f"resnet{depth}-bn"] = (ResNet, {"depth": depth, "norm": "batch"})
        table[f"resnet{depth}-ln"] = (ResNet, {"depth": depth, "norm": "layer"})
        table[f"resnet{depth}-plain"] = (ResNet, {"depth": depth, "norm": None})
    # The vision transformer of the transformer fusion paper, and one with DeiT-tiny's shape.
    table["vit"] = (ViT, {})
    table["deit-tiny"] = (ViT, {"blocks": 12, "patch": 16, "features": 192, "heads": 3})
    # The published shapes for ImageNet, at any number of classes; "convnext-pico", for 32x32
    # images, is not a published one.
    table["convnext-tiny"] = (ConvNeXt, {})
    base = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
    table["convnext-base"] = (ConvNeXt, base)
    pico = {"depths": (1, 1, 3, 1), "dims": (32, 64, 128, 256), "patch": 2}
    table["convnext-pico"] = (ConvNeXt, pico)
    table["resnet50"] = (BottleneckResNet, {"depth": 50})
    table["imagenet-vgg16"] = (ImageNetVGG, {"depth": 16})
    table["imagenet-vgg16-bn"] = (ImageNetVGG, {"depth": 16, "norm": "batch"})
    return table


_FAMILIES = _families()
NAMES = tuple(sorted(_FAMILIES))


def create(name: str, **options: Any) -> nn.Module:
    """Creates a model by its name.

    Args:
        name: One of `NAMES`, for example ``"vgg16"``, ``"vgg16-bn"``, ``"resnet20"``,
            ``"resnet20-plain"``, ``"mlp"``, ``"digits-conv"``.
        **options: Fields of the model's class, for example ``width=0.25`` or ``classes=100``.

    Returns:
        The Linen module.

    Raises:
        ValueError: If the name is unknown, or an option is not a field of that model.

    Example:
        >>> create("vgg16-bn", width=0.25).norm
        'batch'
    """
    if name not in _FAMILIES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
    family, fixed = _FAMILIES[name]
    fields = {field.name for field in dataclasses.fields(family)} - {"parent", "name"}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise ValueError(
            f"{name} has no option {unknown[0]!r}; it has {', '.join(sorted(fields - set(fixed)))}."
        )
    return family(**{**fixed, **options})


@dataclasses.dataclass(frozen=True)
class ApplyFn:
    """The pure function ``(variables, x) -> logits`` of a Linen model in evaluation mode.

    Equal models give equal functions, so that a function compiled for one serves the other.

    Attributes:
        model: The Linen module.
    """

    model: nn.Module

    def __call__(self, variables: PyTree, x: jax.Array) -> jax.Array:
        """Returns the logits ``[N, classes]``."""
        return cast(jax.Array, self.model.apply(variables, x, train=False))


def apply_fn(model: nn.Module) -> ApplyFn:
    """The function of a model in evaluation mode, for `vfjax.trace`.

    Args:
        model: A model of this package, or any other that is called as ``model.apply(variables, x,
            train=False)``.

    Returns:
        A function ``(variables, x) -> logits``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = create("digits-mlp")
        >>> x = jax.ShapeDtypeStruct((3, 8, 8, 1), jnp.float32)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> jax.eval_shape(apply_fn(model), variables, x).shape
        (3, 10)
    """
    return ApplyFn(model)
