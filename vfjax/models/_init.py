"""Initialisers of the edge models: Kaiming normal and the uniform default of PyTorch.

"Vanishing Feature" uses both (section 4 of its appendix on settings): the normal one for the VGG
family, the uniform one for the ResNets.  They treat biases differently, and the biases determine
the initial offset ``f(0)`` that a merged network falls back to, so the choice is part of an
experiment.  The normal one is torchvision's, whose dense kernels are too small for networks of
dense layers only; those use the one of He et al. (2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import jax
from flax import linen as nn

Initialiser = Callable[..., jax.Array]

INITIALISERS = ("kaiming_normal", "he_normal", "uniform")


class Initialisers(TypedDict):
    """Keyword arguments of a layer."""

    kernel_init: Initialiser
    bias_init: Initialiser


def _symmetric_uniform(limit: float) -> Initialiser:
    """Returns an initialiser drawing from U[-limit, limit]."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = "float32") -> jax.Array:
        return jax.random.uniform(key, shape, dtype, minval=-limit, maxval=limit)

    return init


def initialisers(name: str, *, fan_in: int, fan_out: int, dense: bool) -> Initialisers:
    """Returns the ``kernel_init`` and ``bias_init`` of one layer.

    Args:
        name: ``"kaiming_normal"`` draws convolution kernels from N(0, 2 / fan_out), dense kernels
            from N(0, 0.01^2) and sets biases to zero; ``"he_normal"`` draws all kernels from
            N(0, 2 / fan_in) and sets biases to zero; ``"uniform"`` draws kernels and biases from
            U[-1/sqrt(fan_in), 1/sqrt(fan_in)].
        fan_in: Number of inputs that one output sums over, ``height * width * channels``.
        fan_out: ``height * width * output channels``.
        dense: Whether the layer is a dense layer.

    Returns:
        Keyword arguments for ``nn.Dense`` or ``nn.Conv``.

    Raises:
        ValueError: If `name` is not one of `INITIALISERS`.

    Example:
        >>> sorted(initialisers("uniform", fan_in=9, fan_out=18, dense=False))
        ['bias_init', 'kernel_init']
    """
    deviations = {
        "kaiming_normal": 0.01 if dense else math.sqrt(2.0 / fan_out),
        "he_normal": math.sqrt(2.0 / fan_in),
    }
    if name in deviations:
        kernel_init = nn.initializers.normal(deviations[name])
        return {"kernel_init": kernel_init, "bias_init": nn.initializers.zeros}
    if name == "uniform":
        init = _symmetric_uniform(1.0 / math.sqrt(fan_in))
        return {"kernel_init": init, "bias_init": init}
    raise ValueError(f"init must be one of {', '.join(INITIALISERS)}, got {name!r}.")
