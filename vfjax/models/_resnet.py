"""Residual networks for 32x32 images (He et al., 2016, section 4.2), with projection shortcuts."""

from __future__ import annotations

import jax
from flax import linen as nn

from vfjax.models._layers import (
    conv,
    dense,
    normalise,
    scaled,
)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: a 1x1 convolution with norm if the shape changes."""

    features: int
    stride: int
    norm: str | None
    initialiser: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[N, H, W, C]`` to ``[N, H / stride, W / stride, features]``."""
        options = {"init": self.initialiser, "use_bias": self.norm is None}
        y = conv(x, self.features, name="conv1", stride=self.stride, **options)
        y = nn.relu(normalise(y, self.norm, name="norm1", train=train))
        y = conv(y, self.features, name="conv2", **options)
        y = normalise(y, self.norm, name="norm2", train=train)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(x, self.features, name="shortcut", size=1, stride=self.stride, **options)
            x = normalise(x, self.norm, name="shortcut_norm", train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet20, 32, 56, ...: three stages of 16, 32 and 64 channels.

    ``__call__(x, train=False)`` maps images ``[N, H, W, C]`` to logits ``[N, classes]``.  Layers
    are called ``stem``, ``stage1_block1/conv1``, ... and ``head``.  Convolutions have biases only
    if there is no normalisation.

    Attributes:
        depth: ``6 n + 2`` with n blocks in each stage; 1x1 shortcuts are not counted.
        width: Multiplier of all channel counts.
        norm: ``"batch"``, ``"layer"`` (over the channels of each pixel) or None.
        classes: Number of classes.
        initialiser: ``"uniform"`` or ``"kaiming_normal"``, see `vfjax.models.init`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        >>> variables = jax.eval_shape(ResNet(20).init, jax.random.key(0), x)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        272474
    """

    depth: int = 20
    width: float = 1.0
    norm: str | None = "batch"
    classes: int = 10
    initialiser: str = "uniform"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]`` of images ``[N, H, W, C]``."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 (20, 32, 56, ...), got {self.depth!r}.")
        x = conv(
            x,
            scaled(16, self.width),
            name="stem",
            init=self.initialiser,
            use_bias=self.norm is None,
        )
        x = nn.relu(normalise(x, self.norm, name="stem_norm", train=train))
        for stage, channels in enumerate((16, 32, 64), start=1):
            for block in range(1, blocks + 1):
                x = Block(
                    scaled(channels, self.width),
                    2 if stage > 1 and block == 1 else 1,
                    self.norm,
                    self.initialiser,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        return dense(x.mean((1, 2)), self.classes, name="head", init=self.initialiser)
