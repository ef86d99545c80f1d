"""Two small networks for scikit-learn's 8x8 digits, deep enough that merging them breaks them."""

from __future__ import annotations

import jax
from flax import linen as nn

from vfjax.models._layers import conv, dense, scaled
from vfjax.models._mlp import MLP


class DigitsMLP(MLP):
    """Five hidden layers of 64 units, no normalisation: L = 6.

    Attributes:
        features: Units of the hidden layers; for the rest see `MLP`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        >>> variables = jax.eval_shape(DigitsMLP().init, jax.random.key(0), x)
        >>> sorted(variables["params"])
        ['dense1', 'dense2', 'dense3', 'dense4', 'dense5', 'head']
    """

    features: tuple[int, ...] = (64, 64, 64, 64, 64)


class DigitsConv(nn.Module):
    """Six convolutions in three stages and one dense layer, no normalisation: L = 7.

    ``__call__(x, train=False)`` maps images ``[N, 8, 8, 1]`` to logits ``[N, classes]``.

    Attributes:
        width: Multiplier of all channel counts.
        classes: Number of classes.
        initialiser: ``"kaiming_normal"`` or ``"uniform"``, see `vfjax.models.init`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        >>> variables = jax.eval_shape(DigitsConv().init, jax.random.key(0), x)
        >>> variables["params"]["conv6"]["kernel"].shape
        (3, 3, 32, 32)
    """

    width: float = 1.0
    classes: int = 10
    initialiser: str = "kaiming_normal"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]``."""
        for index, features in enumerate((16, 16, 32, 32, 32, 32), start=1):
            if index in (3, 5):
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = conv(x, scaled(features, self.width), name=f"conv{index}", init=self.initialiser)
            x = nn.relu(x)
        return dense(x.mean((1, 2)), self.classes, name="head", init=self.initialiser)
