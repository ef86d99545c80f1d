"""Magnitude pruning: the smallest weights go first."""

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
    """Scores weights by their absolute value, `|w|`.

    Args:
        net: The traced network.
        tree: The tree to prune.
        names: Names of layers, as `prunable` gives them; None for all that can be pruned.

    Returns:
        The scores, float32 or better.

    Raises:
        TypeError: If `net` is not a traced network, `names` is not a sequence, or a leaf is not an
            array.
        ValueError: If the tree does not fit, `names` is empty, or a layer's kernel is computed from
            several leaves.

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
