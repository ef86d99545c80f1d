"""Wanda: weights count by their size times that of what they multiply."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from vfjax._batches import batch_size, batches
from vfjax._inputs import input_squares, spread
from vfjax.network import Network
from vfjax.prune._kernels import Scores, scores_of, weights_of

PyTree = Any


def wanda(
    net: Network, tree: PyTree, data: Iterable[Any], *, layers: Sequence[str] | None = None
) -> Scores:
    """Scores of weights by `|w| * ||x||`, with the norm of the input that a weight multiplies.

    The norm is over all examples and, of convolutions and of layers on sequences, over all
    positions that the weight meets. Wanda compares the weights of every output: prune them with
    `masks(scores, sparsity, scope="row")`, or `scope=(n, m)`.

    Args:
        net: The traced network.
        tree: The tree to prune.
        data: Re-iterable of `x` or `(x, label)`; one pass.
        layers: Names of layers, as `prunable` gives them; None for all that can be pruned.

    Returns:
        The scores, float64. The squares are divided by the number of examples, so that they do not
        grow with the data.

    Raises:
        TypeError: If `net` is no traced network, `layers` no sequence, a leaf no array, or data has
            another dtype.
        ValueError: If the tree does not fit, data is empty, there are no layers, one has no kernel
            of its own, or a score is not finite.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[1.0], [-3.0]])}
        >>> x = jnp.array([[4.0, 1.0], [-4.0, 1.0]])
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, x)
        >>> wanda(net, tree, [x]).values["w"].ravel().tolist()
        [4.0, 3.0]

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
    equation 1.
    """
    leaves, rows, paths = weights_of(net, tree, layers)
    total, count = None, 0
    for x in batches(data, like=net.x):
        found = _pass(net, tuple(rows), tree, x)
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        count += batch_size(x)
    assert total is not None  # there was a batch
    values = {path: np.zeros(np.shape(leaf)) for path, leaf in leaves.items()}
    for (name, places), squares in zip(rows.items(), total, strict=True):
        weights = np.asarray(leaves[paths[name]], np.float64).reshape(-1)[places]
        norms = np.sqrt(spread(net, name, squares) / count)
        values[paths[name]].reshape(-1)[places] = np.abs(weights) * norms
    return scores_of(tree, values, rows, paths)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pass(net: Network, layers: tuple[str, ...], tree: PyTree, x: PyTree) -> list[jax.Array]:
    return input_squares(net, tree, x, layers)
