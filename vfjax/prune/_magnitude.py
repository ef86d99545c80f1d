"""Magnitude pruning: small weights count least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vfjax._deprecated import renames
from vfjax._types import PyTree
from vfjax.network._network import Network
from vfjax.prune._scores import (
    Scores,
    scores_of,
    weights_of,
    widened,
)


@renames(layers="names")
def magnitude(net: Network, tree: PyTree, *, names: Sequence[str] | None = None) -> Scores:
    """Scores of weights by their absolute value, `|w|`.

    Args:
        net: The traced network.
        tree: The tree to prune.
        names: Names of layers, as `prunable` gives them; None for all that can be pruned.

    Returns:
        The scores, float32 or better.

    Raises:
        TypeError: If `net` is not a traced network, `names` not a sequence, or a leaf not an array.
        ValueError: If the tree does not fit, there are no layers, or one has no kernel of its own.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[1.0, -3.0]])}
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, jnp.ones((1, 1)))
        >>> magnitude(net, tree).values["w"].tolist()
        [[1.0, 3.0]]

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """
    leaves, rows, paths = weights_of(net, tree, names)
    values = {path: np.abs(widened(leaf)) for path, leaf in leaves.items()}
    return scores_of(tree, values, rows, paths)
