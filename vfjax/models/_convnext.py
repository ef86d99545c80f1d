"""ConvNeXt (Liu et al., 2022): residual blocks of a depthwise 7x7 and two pointwise layers."""

from __future__ import annotations

import jax
from flax import linen as nn

from vfjax.models._layers import scaled

# From the published code: the standard deviation of all kernels, eps of all LayerNorms, and hidden
# units per channel of a block.
_STD = 0.02
_EPSILON = 1e-6
_EXPANSION = 4


def _conv(x: jax.Array, features: int, size: int, *, name: str) -> jax.Array:
    """Cuts the map into patches of `size` pixels a side and maps each linearly."""
    init = nn.initializers.normal(_STD)
    side = (size, size)
    layer = nn.Conv(features, side, strides=side, padding="VALID", kernel_init=init, name=name)
    return layer(x)


def _dense(x: jax.Array, features: int, *, name: str) -> jax.Array:
    """Applies a dense layer to the last axis: to each pixel of a map."""
    return nn.Dense(features, kernel_init=nn.initializers.normal(_STD), name=name)(x)


def _norm(x: jax.Array, *, name: str) -> jax.Array:
    """Applies LayerNorm over the channels of each pixel."""
    return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)(x)


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm and a perceptron on each pixel, scaled, with a skip."""

    layer_scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[N, H, W, C]`` to ``[N, H, W, C]``."""
        features = x.shape[-1]
        y = nn.Conv(
            features,
            (7, 7),
            padding=3,
            feature_group_count=features,
            kernel_init=nn.initializers.normal(_STD),
            name="depthwise",
        )(x)
        y = _norm(y, name="norm")
        y = nn.gelu(_dense(y, _EXPANSION * features, name="mlp1"), approximate=False)
        y = _dense(y, features, name="mlp2")
        start = nn.initializers.constant(self.layer_scale)
        scale = self.param("layer_scale", start, (features,))
        return x + y * scale.reshape((1, 1, 1, features))


class ConvNeXt(nn.Module):
    """ConvNeXt; by default the tiny one.

    ``__call__(x, train=False)`` maps images ``[N, H, W, C]`` to logits ``[N, classes]``.  Layers
    are called ``stem``, ``stage1_block1/depthwise``, ``stage1_block1/mlp1``, ``.../mlp2``,
    ``down2`` (the strided convolution before the second stage), ... and ``head``; norms
    ``stem_norm``, ``stage1_block1/norm``, ``down2_norm``, ``head_norm``.  The factors of
    the channels of a block's output are the leaf ``stage1_block1/layer_scale``.  There is no
    stochastic depth.

    Attributes:
        depths: Blocks of each stage.
        dims: Channels of each stage.
        patch: Side of the stem's patches, 4 on ImageNet.  The map is halved before each further
            stage; pixels that do not fill a patch are dropped.
        width: Multiplier of all channel counts.
        classes: Number of classes.
        layer_scale: Initial factor of the blocks' outputs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        >>> variables = jax.eval_shape(ConvNeXt(classes=1000).init, jax.random.key(0), x)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        28589128

    Source: "A ConvNet for the 2020s" (Liu et al., 2022), and torchvision, whose weights
    `vfjax.checkpoint.from_torch` reads.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    patch: int = 4
    width: float = 1.0
    classes: int = 10
    layer_scale: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]`` of images ``[N, H, W, C]``."""
        if not self.depths or len(self.depths) != len(self.dims):
            raise ValueError(
                f"depths and dims must have one entry per stage, got {self.depths} and {self.dims}."
            )
        smallest = self.patch * 2 ** (len(self.dims) - 1)
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"x must have images of {smallest} pixels a side at least, for patch {self.patch} "
                f"and {len(self.dims)} stages, got {x.shape}: lower patch."
            )
        for stage, (blocks, channels) in enumerate(zip(self.depths, self.dims, strict=True), 1):
            channels = scaled(channels, self.width)
            if stage == 1:
                x = _norm(_conv(x, channels, self.patch, name="stem"), name="stem_norm")
            else:
                x = _norm(x, name=f"down{stage}_norm")
                x = _conv(x, channels, 2, name=f"down{stage}")
            for block in range(1, blocks + 1):
                x = Block(self.layer_scale, name=f"stage{stage}_block{block}")(x)
        return _dense(_norm(x.mean((1, 2)), name="head_norm"), self.classes, name="head")
