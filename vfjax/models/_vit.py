"""Vision transformers (Dosovitskiy et al., 2021), pre-norm, with a class token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfjax.models._layers import scaled

# Both from timm, which publishes the DeiT weights.
_EPSILON = 1e-6
_STD = 0.02


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each after a LayerNorm and with a skip."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens ``[N, T, D]`` to ``[N, T, D]``."""
        y = nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name="norm2")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="mlp1")(y), approximate=False)
        return x + nn.Dense(x.shape[-1], name="mlp2")(y)


class ViT(nn.Module):
    """A vision transformer; by default the one of transformer fusion on CIFAR: 7 blocks, patch 4.

    ``__call__(x, train=False)`` maps images ``[N, H, W, C]`` to logits ``[N, classes]``.  Layers
    are called ``patches``, ``block1/attention/query``, ``block1/mlp1``, ... and ``head``; the class
    token ``token`` and the positions ``positions`` are separate leaves.  There is no dropout.

    Attributes:
        blocks: Number of blocks.
        patch: Side of the square patches, which must divide height and width.
        features: Size of a token.
        heads: Heads of each attention; they must divide the size of a token.
        expansion: Hidden units of the perceptrons per feature.
        width: Multiplier of features and heads.
        classes: Number of classes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        >>> variables = jax.eval_shape(ViT().init, jax.random.key(0), x)
        >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        12470026
    """

    blocks: int = 7
    patch: int = 4
    features: int = 384
    heads: int = 12
    expansion: float = 4.0
    width: float = 1.0
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]`` of images ``[N, H, W, C]``."""
        features, heads = scaled(self.features, self.width), scaled(self.heads, self.width)
        if features % heads:
            raise ValueError(f"heads must divide the features of a token, got {heads}, {features}.")
        count, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"patch must divide height and width, got {self.patch} for {height} x {width}."
            )
        side = (self.patch, self.patch)
        x = nn.Conv(features, side, strides=side, padding="VALID", name="patches")(x)
        x = x.reshape(count, -1, features)
        token = self.param("token", nn.initializers.zeros, (1, 1, features))
        x = jnp.concatenate([jnp.broadcast_to(token, (count, 1, features)), x], axis=1)
        start = nn.initializers.normal(_STD)
        x = x + self.param("positions", start, (1, x.shape[1], features))
        for index in range(1, self.blocks + 1):
            x = Block(heads, round(features * self.expansion), name=f"block{index}")(x)
        x = nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name="norm")(x)
        return nn.Dense(self.classes, name="head")(x[:, 0])
