"""Linear networks, in which vanishing features can be followed by hand."""

from __future__ import annotations

import jax
from flax import linen as nn


class LinearNetwork(nn.Module):
    """A chain of dense layers with biases and no activation, optionally residual.

    ``__call__(x, train=False)`` maps ``[N, ...]`` to logits ``[N, classes]``.  Layers are called
    ``dense1`` ... ``dense<depth>``.  In the residual form layers 2 to depth - 1 add their input to
    their output ("Vanishing Feature", section on residual linear networks).

    Attributes:
        width: Units of the hidden layers.
        depth: Number of dense layers, including the last.
        residual: Whether the layers between the first and the last have skips.
        classes: Number of classes.
        std: Standard deviation of the initial weights.  It is unusually small, and the phenomenon
            depends on it: 0.002 for the paper's study of 8 layers, 0.005 for its residual study of
            5 layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
        >>> variables = jax.eval_shape(LinearNetwork(depth=5).init, jax.random.key(0), x)
        >>> variables["params"]["dense1"]["kernel"].shape
        (784, 32)
    """

    width: int = 32
    depth: int = 8
    residual: bool = False
    classes: int = 10
    std: float = 0.002

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]``."""
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth!r}.")
        x = x.reshape(x.shape[0], -1)
        for index in range(1, self.depth + 1):
            features = self.classes if index == self.depth else self.width
            init = nn.initializers.normal(self.std)
            y = nn.Dense(features, kernel_init=init, name=f"dense{index}")(x)
            x = x + y if self.residual and 1 < index < self.depth else y
        return x
