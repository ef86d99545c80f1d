"""VGG networks for 32x32 images, in the form used in "Vanishing Feature"."""

from __future__ import annotations

import jax
from flax import linen as nn

from vfjax.models.layers import conv, dense, normalise, scaled

__all__ = ["VGG"]

# Channels of the convolutions between two max-pools.  The last pool of the ImageNet network is left
# out, so that a 32x32 image ends as a 2x2 map, of which the mean is taken.  Seven layers are none
# of the published networks: one convolution for each map size down to 4x4, trained in minutes at
# a width that is still large.
_STAGES = {
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
        depth: 7, 11, 13, 16 or 19, the layers of the original network; this one has two fewer, one
            dense layer in place of three.
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
        if self.depth not in _STAGES:
            raise ValueError(f"depth must be one of {sorted(_STAGES)}, got {self.depth!r}.")
        index = 0
        for stage, channels in enumerate(_STAGES[self.depth]):
            if stage:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for features in channels:
                index += 1
                x = conv(
                    x,
                    scaled(features, self.width),
                    name=f"conv{index}",
                    init=self.initialiser,
                    use_bias=self.use_bias,
                )
                x = nn.relu(normalise(x, self.norm, name=f"norm{index}", train=train))
        return dense(x.mean((1, 2)), self.classes, name="head", init=self.initialiser)
