"""Residual networks of bottleneck blocks for ImageNet (He et al., 2016, section 4.1)."""

from __future__ import annotations

from typing import Any, cast

import jax
from flax import linen as nn

from vfjax.models._layers import (
    conv,
    dense,
    normalise,
    scaled,
)

BLOCKS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_EXPANSION = 4


class Block(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and a shortcut: 1x1 if the shape changes."""

    features: int
    stride: int
    norm: str | None
    initialiser: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[N, H, W, C]`` to ``[N, H / stride, W / stride, 4 features]``."""
        options = {"init": self.initialiser, "use_bias": self.norm is None}
        y = conv(x, self.features, name="conv1", size=1, **options)
        y = nn.relu(normalise(y, self.norm, name="norm1", train=train))
        # The stride is here, not in the first convolution: published weights are of this "v1.5".
        y = conv(y, self.features, name="conv2", stride=self.stride, **options)
        y = nn.relu(normalise(y, self.norm, name="norm2", train=train))
        features = _EXPANSION * self.features
        y = conv(y, features, name="conv3", size=1, **options)
        y = normalise(y, self.norm, name="norm3", train=train)
        if self.stride != 1 or x.shape[-1] != features:
            x = conv(x, features, name="shortcut", size=1, stride=self.stride, **options)
            x = normalise(x, self.norm, name="shortcut_norm", train=train)
        return nn.relu(x + y)


class BottleneckResNet(nn.Module):
    """ResNet50, 101 or 152, as in torchvision, and 26, as in timm.

    ``__call__(x, train=False)`` maps images ``[N, H, W, C]`` to logits ``[N, classes]``.  Layers
    are called ``stem``, ``stage1_block1/conv1``, ... and ``head``.  Convolutions have biases only
    if there is no normalisation.

    Attributes:
        depth: 26, 50, 101 or 152.
        width: Multiplier of all channel counts.
        norm: ``"batch"``, ``"layer"`` (over the channels of each pixel) or None.
        classes: Number of classes.
        initialiser: ``"kaiming_normal"`` or ``"uniform"``, see `vfjax.models.init`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        >>> variables = jax.eval_shape(BottleneckResNet(classes=1000).init, jax.random.key(0), x)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        25557032

    Source: "Deep Residual Learning for Image Recognition" (He et al., 2016), table 1, with the
    strides of torchvision, whose weights `vfjax.checkpoint.from_torch` reads.
    """

    depth: int = 50
    width: float = 1.0
    norm: str | None = "batch"
    classes: int = 10
    initialiser: str = "kaiming_normal"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]`` of images ``[N, H, W, C]``."""
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {self.depth!r}.")
        x = conv(
            x,
            scaled(64, self.width),
            name="stem",
            init=self.initialiser,
            size=7,
            stride=2,
            use_bias=self.norm is None,
        )
        x = nn.relu(normalise(x, self.norm, name="stem_norm", train=train))
        # Flax accepts pairs, though its annotation does not.
        x = nn.max_pool(x, (3, 3), (2, 2), padding=cast(Any, ((1, 1), (1, 1))))
        for stage, blocks in enumerate(BLOCKS[self.depth], start=1):
            for block in range(1, blocks + 1):
                x = Block(
                    scaled(64 * 2 ** (stage - 1), self.width),
                    2 if stage > 1 and block == 1 else 1,
                    self.norm,
                    self.initialiser,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        return dense(x.mean((1, 2)), self.classes, name="head", init=self.initialiser)
