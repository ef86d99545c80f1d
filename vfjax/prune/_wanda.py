"""Wanda: weights count by their size times the norm of their inputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._deprecated import renames
from vfjax._passes import Mask, compiled, on_mesh, stream, wide
from vfjax._passes.masking import examples
from vfjax._types import PyTree
from vfjax.network._arguments import check_net
from vfjax.network._checks import check_batch
from vfjax.network._kernels import (
    input_squares,
    kernel_rows,
    looked_up,
    lookup_squares,
    loop_kernels,
    spread,
)
from vfjax.network._network import Network
from vfjax.prune._scores import Scores, prunable, scores_of, weights_of


@renames(layers="names")
def wanda(
    net: Network,
    tree: PyTree,
    data: Iterable[Any],
    *,
    names: Sequence[str] | None = None,
    mask: Mask | None = None,
) -> Scores:
    """Scores weights by `|w| * ||x||`, with the norm of the input that a weight multiplies.

    The norm is over all examples; in convolutions and layers on sequences, also over all positions
    that the weight meets; for a kernel that several layers share, over the inputs of all of them. A
    lookup is a use as well: for a tied embedding, `emb[ids]` counts as `one_hot(ids) @ emb`.
    Wanda compares the weights of each output with one another: prune with
    `masks(scores, sparsity, scope="row")`, or `scope=(n, m)`.

    Args:
        net: The traced network.
        tree: The tree to prune.
        data: Re-iterable of `x` or `(x, label)`; one pass. Batches may be sharded over devices.
        names: Names of layers, as `prunable` gives them; None for all that can be pruned.
        mask: Which positions of a batch count, such as those that are no padding: a function of x
            to booleans, as `mask=lambda x: x["mask"] > 0`; see `vfjax.stats.moments`. Examples
            without a valid position do not count either.

    Returns:
        The scores, float64. The squares are divided by the number of examples, so that they do not
        grow with the data.

    Raises:
        TypeError: If `net` is not a traced network, `names` is not a sequence, a leaf is not an
            array, or data has another dtype.
        ValueError: If the tree does not fit, data is empty, `names` is empty, a layer's kernel is
            computed from several leaves, or a score is not finite.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[1.0], [-3.0]])}
        >>> x = jnp.array([[4.0, 1.0], [-4.0, 1.0]])
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, x)
        >>> wanda(net, tree, [x]).values["w"].ravel().tolist()
        [4.0, 3.0]

    Warns:
        UserWarning: If `names` is None and kernels inside loops are left out.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
    equation 1.
    """
    check_net(net)
    inside = loop_kernels(net).keys()
    if names is None and inside:
        warnings.warn(
            f"the inputs of kernels inside loops are not measured: {sorted(inside)} are left out; "
            "prune.magnitude and prune.fisher score them",
            stacklevel=3,
        )
        names = [name for name in prunable(net) if name not in inside]
    elif isinstance(names, Sequence) and not isinstance(names, str) and inside & {*names}:
        raise ValueError(
            f"names has {sorted(inside & {*names})}, kernels inside loops, whose inputs are not "
            "measured; prune.magnitude and prune.fisher score them"
        )
    leaves, rows, paths = weights_of(net, tree, names)
    check_batch(net)
    uses = {layer.name: layer.kernel for layer in net.layers if layer.kernel in leaves}
    tables = looked_up(net, leaves)
    measure = functools.partial(_means, net, tuple(uses), tables)
    means, _ = stream(measure, _pool, tree, data, like=net.x, mask=mask, host=wide)
    squares = {path: np.zeros(np.size(leaf)) for path, leaf in leaves.items()}
    for (name, path), mean in zip(uses.items(), means[: len(uses)], strict=True):
        squares[path][kernel_rows(net, name)] += spread(net, name, mean)
    for path, mean in zip(tables, means[len(uses) :], strict=True):
        squares[path] += mean.reshape(-1)
    values = {
        path: np.abs(np.asarray(leaf)).astype(np.float64)
        * np.sqrt(squares[path].reshape(np.shape(leaf)))
        for path, leaf in leaves.items()
    }
    return scores_of(tree, values, rows, paths)


@compiled(static=4)
def _means(
    net: Network,
    layers: tuple[str, ...],
    tables: tuple[str, ...],
    mesh: Any,
    tree: PyTree,
    x: PyTree,
    valid: jax.Array | None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Mean squares over the examples of one batch, and the number of examples that count."""

    def means(tree: PyTree, x: PyTree, valid: jax.Array | None) -> tuple[list[jax.Array], Any]:
        count = examples(x, valid)
        squares = input_squares(net, tree, x, layers, valid)
        squares += lookup_squares(net, tree, x, tables, valid)
        return [s / count for s in squares], jnp.int32(count)

    squares, count = on_mesh(means, mesh)(tree, x, valid)
    return [mean[None] for mean in squares], [count]


def _pool(pooled: list[np.ndarray], batch: list[np.ndarray], share: Any) -> list[np.ndarray]:
    share = share[0] if isinstance(share, list) else share
    return [a + (b - a) * share for a, b in zip(pooled, batch, strict=True)]
