"""Recipes: values that say how a network is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from vfjax._types import Array

# The learning rate at the start of a warm-up, as in the paper's code at its peak of 0.1.
_WARMUP_START = 1e-6


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        optimizer: ``"sgd"`` (with momentum, not Nesterov's), ``"adam"`` or ``"adamw"``.
        learning_rate: Peak of the learning rate.
        schedule: ``"constant"``, ``"cosine"`` or ``"linear"`` (both to zero after the last step) or
            ``"step"`` (times `factor` from each of `milestones` on).
        milestones: Iterations counted from the first one, warm-up included.
        factor: The learning rate is multiplied by this at each milestone.
        warmup_epochs: Epochs over which the rate rises linearly from 1e-6 to its peak.
        epochs: Passes over the training split.
        batch_size: Images per step.
        weight_decay: L2 penalty of all parameters, added to the gradient before the optimizer, as
            in PyTorch's SGD and Adam; ``"adamw"`` decays independently of the gradient.
        momentum: Momentum of SGD.
        crop: Pixels of zero padding before a random crop; 0 for none.
        flip: Whether images are mirrored at random.

    Raises:
        ValueError: If a value is unknown or out of range.

    Example:
        >>> recipe = Recipe(epochs=2, learning_rate=0.5, schedule="cosine")
        >>> [round(float(recipe.rate(4)(step)), 3) for step in (0, 4, 8)]
        [0.5, 0.25, 0.0]
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    warmup_epochs: float = 0.0
    epochs: int = 1
    batch_size: int = 128
    weight_decay: float = 0.0
    momentum: float = 0.9
    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        """Checks the values that are easily mistyped."""
        for name, known in (
            ("optimizer", ("sgd", "adam", "adamw")),
            ("schedule", ("constant", "cosine", "linear", "step")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        for name, least in (("epochs", 1), ("batch_size", 1), ("crop", 0), ("warmup_epochs", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}.")

    def rate(self, steps_per_epoch: int) -> Callable[[Any], Array]:
        """The learning rate as a function of the step.

        Args:
            steps_per_epoch: Steps that one pass over the training split takes.

        Returns:
            A function from the step, counted from 0, to a float32 scalar.
        """
        warmup = round(self.warmup_epochs * steps_per_epoch)
        total = self.epochs * steps_per_epoch
        if self.schedule == "step":
            # Milestones are absolute: a warm-up does not delay them.
            after = optax.piecewise_constant_schedule(
                self.learning_rate, {step: self.factor for step in self.milestones}
            )
        elif self.schedule in ("cosine", "linear"):
            steps = max(1, total - warmup)
            if self.schedule == "cosine":
                fall = optax.cosine_decay_schedule(self.learning_rate, steps)
            else:
                fall = optax.linear_schedule(self.learning_rate, 0.0, steps)

            def delayed(step: Any) -> Any:
                return fall(step - warmup)

            after = delayed
        else:
            after = optax.constant_schedule(self.learning_rate)
        if not warmup:
            return lambda step: jnp.asarray(after(step), jnp.float32)
        rise = optax.linear_schedule(_WARMUP_START, self.learning_rate, warmup)
        return lambda step: jnp.where(step < warmup, rise(step), after(step)).astype(jnp.float32)

    def transformation(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """The optimizer, with its weight decay.

        Args:
            steps_per_epoch: Steps that one pass over the training split takes.

        Returns:
            An optax transformation.
        """
        rate = self.rate(steps_per_epoch)
        if self.optimizer == "adamw":
            return optax.adamw(rate, weight_decay=self.weight_decay)
        if self.optimizer == "adam":
            optimizer = optax.adam(rate)
        else:
            optimizer = optax.sgd(rate, momentum=self.momentum or None)
        if not self.weight_decay:
            return optimizer
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optimizer)


# Table 2 of "Vanishing Feature" and the text around it.
_PAPER_CIFAR = Recipe(
    learning_rate=0.1,
    schedule="step",
    milestones=(32000, 48000),
    epochs=160,
    weight_decay=1e-4,
    crop=4,
    flip=True,
)
_PAPER_LINEAR = Recipe(optimizer="adam", learning_rate=0.01, epochs=20, weight_decay=1e-4)
# For two CPU cores: a fraction of the epochs, hence a cosine.
_CPU_VGG = Recipe(
    learning_rate=0.05,
    schedule="cosine",
    warmup_epochs=1.0,
    epochs=24,
    weight_decay=5e-4,
    crop=4,
    flip=True,
)

RECIPES: dict[str, Recipe] = {
    "paper-cifar": _PAPER_CIFAR,
    "paper-cifar-warmup": dataclasses.replace(_PAPER_CIFAR, warmup_epochs=1.0),
    "paper-linear": _PAPER_LINEAR,
    # The 8-layer networks of the study of vanishing features.
    "paper-linear-8": dataclasses.replace(_PAPER_LINEAR, epochs=5),
    "paper-mnist-vgg": Recipe(
        learning_rate=0.01,
        schedule="cosine",
        warmup_epochs=1.0,
        epochs=25,
        batch_size=100,
        weight_decay=5e-4,
    ),
    # The networks on disjoint classes of "ZipIt!" and its code; neither states the weight decay.
    "paper-zipit": Recipe(
        learning_rate=0.4,
        schedule="linear",
        warmup_epochs=5.0,
        epochs=100,
        batch_size=500,
        weight_decay=5e-4,
        crop=4,
        flip=True,
    ),
    "cpu-vgg": _CPU_VGG,
    "cpu-resnet": dataclasses.replace(_CPU_VGG, learning_rate=0.1, epochs=15),
    # The published weights of transformer fusion come without a recipe; these values are ours.
    "paper-vit": Recipe(
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_epochs=5.0,
        epochs=200,
        weight_decay=0.05,
        crop=4,
        flip=True,
    ),
    "cpu-vit": Recipe(
        optimizer="adamw",
        learning_rate=2e-3,
        schedule="cosine",
        warmup_epochs=1.0,
        epochs=8,
        weight_decay=0.05,
        flip=True,
    ),
    "cpu-mlp": Recipe(learning_rate=0.05, schedule="cosine", epochs=10, weight_decay=1e-4),
    # Rate and decay were chosen on 300 held-out training digits.
    "cpu-digits": Recipe(
        learning_rate=0.1,
        schedule="cosine",
        warmup_epochs=5.0,
        epochs=60,
        batch_size=64,
        weight_decay=1e-3,
    ),
}
PRESETS = ("cpu", "paper")


def recipe_for(model: str, dataset: str, *, preset: str = "cpu") -> Recipe:
    """The recipe of a preset for a named model on a data set.

    Where the paper has no recipe (multi-layer perceptrons, the digits) both presets are the same.
    The long one for vision transformers is ours, since only their weights were published.

    Args:
        model: A name of `vfjax.models.create`.
        dataset: ``"cifar10"``, ``"cifar100"``, ``"mnist"`` or ``"digits"``.
        preset: ``"cpu"``, which two cores finish in minutes, or ``"paper"``, Table 2 of "Vanishing
            Feature".

    Returns:
        The recipe.

    Raises:
        ValueError: If the preset is unknown.

    Example:
        >>> recipe_for("resnet20-ln", "cifar10", preset="paper") == RECIPES["paper-cifar-warmup"]
        True
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    if model.startswith("linear"):
        return RECIPES["paper-linear-8" if model == "linear" else "paper-linear"]
    if dataset == "digits":
        return RECIPES["cpu-digits"]
    # ConvNeXt needs AdamW too: with SGD its layer scales hardly leave their initial 1e-6.
    if model in ("vit", "deit-tiny") or model.startswith("convnext"):
        return RECIPES[f"{preset}-vit"]
    if model.endswith("mlp"):
        return RECIPES["cpu-mlp"]
    if dataset == "mnist":
        return RECIPES["paper-mnist-vgg"]
    if preset == "paper":
        warm = model.startswith("resnet") and model.endswith("-ln")
        return RECIPES["paper-cifar-warmup" if warm else "paper-cifar"]
    return RECIPES["cpu-resnet" if model.startswith("resnet") else "cpu-vgg"]
