"""Pruning by the diagonal of the empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vfjax._deprecated import renames
from vfjax._types import PyTree
from vfjax.network._network import Network
from vfjax.prune._gradients import Loss, check_count, gradients
from vfjax.prune._scores import Scores, scores_of, weights_of


@renames(layers="names")
def fisher(
    net: Network,
    tree: PyTree,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    examples: int | None = None,
    names: Sequence[str] | None = None,
) -> Scores:
    """Scores weights by how much the loss rises without them, `w^2 F / 2`.

    F is the diagonal of the empirical Fisher matrix: the mean over examples of the squared
    derivative of the loss, at the true labels.

    Args:
        net: The traced network.
        tree: The tree to prune.
        data: Re-iterable of `(x, label)`. A label is what the loss takes: integers `[n]` or, with
            `loss`, any pytree of arrays `[n, ...]`.
        loss: `loss(output, label)`, the mean over a batch of examples; None for the cross-entropy
            of logits `[n, classes]` and integer labels.
        examples: Number of examples to use; None for all.
        names: Names of layers, as `prunable` gives them; None for all that can be pruned.

    Returns:
        The scores, float64.

    Raises:
        TypeError: If `net` is not a traced network, `names` is not a sequence, a leaf is not an
            array, `examples` is not an integer, a batch is not a pair with integer labels (with
            `loss`, numbers) or has another dtype than was traced, or `loss` is not a function that
            returns a number.
        ValueError: If the tree or data do not fit, data are empty or too few, `examples` is below
            one, `names` is empty, a layer's kernel is computed from several leaves, or a gradient
            is not finite; without `loss`, if the output is not logits, or a label no class.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[2.0], [1.0]])}
        >>> x, label = jnp.array([[1.0, 3.0]]), jnp.array([0])
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, x)
        >>> fisher(net, tree, [(x, label)], loss=lambda z, _: z.sum()).values["w"].ravel().tolist()
        [2.0, 4.5]

    Source: LeCun et al., "Optimal Brain Damage", 1989, with the empirical Fisher matrix in place of
    the Hessian, as in "WoodFisher" (Singh & Alistarh, 2020), section 3.
    """
    if examples is not None:
        check_count("examples", examples)
    leaves, rows, paths = weights_of(net, tree, names)
    total = {path: np.zeros(np.shape(leaf)) for path, leaf in leaves.items()}
    count = 0
    for batch in gradients(net, tree, leaves, data, loss=loss, count=examples):
        for path, each in batch.items():
            total[path] += (np.asarray(each, np.float64) ** 2).sum(0)
        count += len(next(iter(batch.values())))
    values = {
        path: np.asarray(leaf, np.float64) ** 2 * total[path] / (2 * count)
        for path, leaf in leaves.items()
    }
    return scores_of(tree, values, rows, paths)
