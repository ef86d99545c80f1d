"""The building blocks that all families share: convolution, dense layer, normalisation.

Each function is called inside a compact Linen method and registers its submodule there, under the
given name.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from vfjax.models._init import initialisers

NORMS = (None, "batch", "layer")


def scaled(channels: int, width: float) -> int:
    """Returns `channels` times the width multiplier, at least one.

    Example:
        >>> scaled(64, 0.25)
        16
    """
    if not width > 0:
        raise ValueError(f"width must be a positive multiplier, got {width!r}.")
    return max(1, round(channels * width))


def conv(
    x: jax.Array,
    features: int,
    *,
    name: str,
    init: str,
    size: int = 3,
    stride: int = 1,
    use_bias: bool = True,
) -> jax.Array:
    """Applies a ``size x size`` convolution with padding ``size // 2`` to ``[N, H, W, C]``."""
    area = size * size
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=use_bias,
        name=name,
        **initialisers(init, fan_in=area * x.shape[-1], fan_out=area * features, dense=False),
    )(x)


def dense(x: jax.Array, features: int, *, name: str, init: str) -> jax.Array:
    """Applies a dense layer with bias to ``[N, C]``."""
    init_fns = initialisers(init, fan_in=x.shape[-1], fan_out=features, dense=True)
    return nn.Dense(features, name=name, **init_fns)(x)


def normalise(x: jax.Array, norm: str | None, *, name: str, train: bool) -> jax.Array:
    """Applies BatchNorm, LayerNorm over the channels of each pixel, or nothing.

    Both use eps 1e-5.  BatchNorm keeps nine tenths of its running statistics at each step; PyTorch
    calls this a momentum of 0.1.
    """
    if norm is None:
        return x
    # The two-pass variance, since E[x^2] - E[x]^2 loses its digits just where features vanish.
    if norm == "batch":
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            name=name,
        )(x)
    if norm == "layer":
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)
    raise ValueError(f"norm must be None, 'batch' or 'layer', got {norm!r}.")
