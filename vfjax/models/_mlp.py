"""Multi-layer perceptron with ReLU."""

from __future__ import annotations

import jax
from flax import linen as nn

from vfjax.models._layers import dense


class MLP(nn.Module):
    """Dense layers with ReLU between them, on flattened input.

    ``__call__(x, train=False)`` maps ``[N, ...]`` to logits ``[N, classes]``.  Layers are called
    ``dense1``, ``dense2``, ... and ``head``.

    Attributes:
        features: Widths of the hidden layers.
        classes: Number of classes.
        initialiser: ``"uniform"``, ``"he_normal"`` or ``"kaiming_normal"``, see
            `vfjax.models.init`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1, 4, 4), jnp.float32)
        >>> variables = jax.eval_shape(MLP((8, 8)).init, jax.random.key(0), x)
        >>> variables["params"]["dense1"]["kernel"].shape
        (16, 8)
    """

    features: tuple[int, ...] = (512, 512, 512)
    classes: int = 10
    initialiser: str = "uniform"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits ``[N, classes]``."""
        x = x.reshape(x.shape[0], -1)
        for index, features in enumerate(self.features, start=1):
            x = nn.relu(dense(x, features, name=f"dense{index}", init=self.initialiser))
        return dense(x, self.classes, name="head", init=self.initialiser)
