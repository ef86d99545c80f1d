"""VGG networks: in the form used in "Vanishing Feature" for 32x32 images, and for ImageNet."""

from __future__ import annotations

import jax
from flax import linen as nn

from vfjax.models._layers import (
    conv,
    dense,
    normalise,
    scaled,
)

# Channels of the convolutions between two max-pools.  For 32x32 images the last pool of the
# ImageNet network is left out, so that they end as a 2x2 map, which is averaged.  The one of seven
# layers is not a published network: it has one convolution for each map size down to 4x4, and
# trains in minutes at a width that is still large.
STAGES = {
    7: ((64,), (128,), (256,), (256,)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """VGG7, 11, 13, 16 or 19 with one linear classifier.

    ``__call__(x, train=False)`` maps images ``[N, H, W, C]`` to logits ``[N, classes]``.  Layers
    are called ``conv1``, ``conv2``, ... and ``head``; the norm after ``conv3`` is ``norm3``.

    Attributes:
        depth: 7, 11, 13, 16 or 19, the layers of the original network; this one has two fewer,
            since one dense layer replaces three.
        width: Multiplier of all channel counts.
        norm: None, ``"batch"`` or ``"layer"`` (over the channels of each pixel).
        classes: Number of classes.
        use_bias: Whether the convolutions have biases.
        initialiser: ``"kaiming_normal"`` or ``"uniform"``, see `vfjax.models.init`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = VGG(depth=11, width=0.125)
        >>> x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        >>> jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], x).shape
        (2, 10)
    """

    depth: int = 16
    width: float = 1.0
    norm: str | None = None
    classes: int = 10
    use_bias: bool = True
    initialiser: str = "kaiming_normal"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]`` of images ``[N, H, W, C]``."""
        x = _convolutions(self, x, train, use_bias=self.use_bias)
        return dense(x.mean((1, 2)), self.classes, name="head", init=self.initialiser)


class ImageNetVGG(nn.Module):
    """VGG11, 13, 16 or 19 with a last max-pool and three dense layers, as in torchvision.

    ``__call__(x, train=False)`` maps images ``[N, H, W, C]`` to logits ``[N, classes]``.  Layers
    are called ``conv1``, ``conv2``, ..., ``dense1``, ``dense2`` and ``head``.  ``dense1`` reads the
    last map flattened as ``[H, W, C]``: 7x7 pixels for images of 224x224; initialisation fixes
    this size.  There is no dropout.

    Attributes:
        depth: 11, 13, 16 or 19.
        width: Multiplier of all channel counts and of the hidden units.
        norm: None, ``"batch"`` or ``"layer"`` (over the channels of each pixel), after
            convolutions only.
        hidden: Units of ``dense1`` and ``dense2``.
        classes: Number of classes.
        initialiser: ``"kaiming_normal"`` or ``"uniform"``, see `vfjax.models.init`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        >>> variables = jax.eval_shape(ImageNetVGG(classes=1000).init, jax.random.key(0), x)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        138357544

    Source: "Very Deep Convolutional Networks for Large-Scale Image Recognition" (Simonyan &
    Zisserman, 2015), table 1, and torchvision, whose weights `vfjax.checkpoint.from_torch` reads.
    """

    depth: int = 16
    width: float = 1.0
    norm: str | None = None
    hidden: int = 4096
    classes: int = 10
    initialiser: str = "kaiming_normal"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]`` of images ``[N, H, W, C]``."""
        x = nn.max_pool(_convolutions(self, x, train), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for index in (1, 2):
            hidden = scaled(self.hidden, self.width)
            x = nn.relu(dense(x, hidden, name=f"dense{index}", init=self.initialiser))
        return dense(x, self.classes, name="head", init=self.initialiser)


def _convolutions(
    model: VGG | ImageNetVGG, x: jax.Array, train: bool, use_bias: bool = True
) -> jax.Array:
    """Applies the convolutions and the max-pools between them, up to the last activation."""
    if model.depth not in STAGES:
        raise ValueError(f"depth must be one of {sorted(STAGES)}, got {model.depth!r}.")
    index = 0
    for stage, channels in enumerate(STAGES[model.depth]):
        if stage:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for features in channels:
            index += 1
            x = conv(
                x,
                scaled(features, model.width),
                name=f"conv{index}",
                init=model.initialiser,
                use_bias=use_bias,
            )
            x = nn.relu(normalise(x, model.norm, name=f"norm{index}", train=train))
    return x
