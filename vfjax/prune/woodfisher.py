"""WoodFisher: pruning by the inverse of the empirical Fisher matrix, block by block.

With N gradients g, the matrix of a block of weights is `F = damping * I + 1/N sum g g^T`. By the
Woodbury identity its inverse is

    F^-1 = (I - G^T (N damping I + G G^T)^-1 G) / damping,    G [N, block],

which is what WoodFisher's recursion over the gradients arrives at, one after another. It needs the
gradients and an N x N factor, never a block x block matrix, so that a block can be a whole layer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from vfjax import _tree
from vfjax.network import Network
from vfjax.prune._gradients import Loss, gradients
from vfjax.prune._kernels import Scores, rows_of, scores_of, weights_of
from vfjax.prune.masks import apply

PyTree = Any

_log = logging.getLogger(__name__)

# Columns of a block that are solved for at once, in float64.
_COLUMNS = 1 << 14


@dataclasses.dataclass(frozen=True, eq=False)
class InverseFisher:
    """The inverse of the empirical Fisher matrix of the weights to prune, in blocks.

    Attributes:
        scores: By how much the loss rises without each weight if all others are set as is best
            then, `w^2 / (2 [F^-1]_ww)`.
        diagonal: By layer, `[F^-1]_ww`, float64 `[outputs, inputs]`.
        gradients: By layer, float32 `[N, outputs * inputs]`.
        factors: By layer, of each block the lower Cholesky factor of `N damping I + G G^T`, or of F
            where a block has fewer weights than there are gradients.
        damping: What is added to the diagonal.
        block_size: Weights of a block.
    """

    scores: Scores
    diagonal: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    factors: Mapping[str, Sequence[np.ndarray]]
    damping: float
    block_size: int

    def solve(self, layer: str, vector: np.ndarray) -> np.ndarray:
        """`F^-1 v` of one layer.

        Args:
            layer: Its name.
            vector: `[outputs, inputs]`.

        Returns:
            Likewise, float64.
        """
        flat = np.asarray(vector, np.float64).reshape(-1)
        found = np.empty_like(flat)
        for (start, end), factor in zip(
            _blocks(flat.size, self.block_size), self.factors[layer], strict=True
        ):
            part = self.gradients[layer][:, start:end]
            found[start:end] = _solve(part, factor, self.damping, flat[start:end])
        return found.reshape(np.shape(vector))

    def prune(self, tree: PyTree, mask: PyTree) -> PyTree:
        """The pruned tree, with the weights that stay set to make up for those that go.

        The changes for each weight that goes, `-w [F^-1]_:w / [F^-1]_ww`, are summed.

        Args:
            tree: The tree that was measured.
            mask: What `vfjax.prune.masks` made of the scores.

        Returns:
            A tree of the same dtypes, zero where the mask is False.

        Raises:
            ValueError: If the mask has another structure or shape than the tree.

        Source: "WoodFisher" (Singh & Alistarh, 2020), section 4, equation 9.
        """
        kept = _tree.flatten_named(mask, name="mask")[0]
        leaves = _tree.flatten_named(tree, name="tree")[0]
        changed: dict[str, np.ndarray] = {}
        for layer, rows in self.scores.rows.items():
            path = self.scores.paths[layer]
            flat = changed.setdefault(path, np.asarray(leaves[path], np.float64).reshape(-1).copy())
            gone = ~np.asarray(kept[path]).reshape(-1)[rows]
            flat[rows] -= self.solve(layer, gone * flat[rows] / self.diagonal[layer])
        new = {
            path: jnp.asarray(flat.reshape(np.shape(leaves[path])), leaves[path].dtype)
            for path, flat in changed.items()
        }
        return apply(_tree.with_leaves(tree, new), mask)


def inverse_fisher(
    net: Network,
    tree: PyTree,
    data: Iterable[Any],
    *,
    count: int = 400,
    minibatch: int = 1,
    block_size: int | None = None,
    damping: float = 1e-5,
    loss: Loss | None = None,
    layers: Sequence[str] | None = None,
    max_memory: int = 1 << 31,
) -> InverseFisher:
    """The inverse empirical Fisher matrix of the weights to prune, in blocks inside layers.

    Args:
        net: The traced network.
        tree: The tree to prune.
        data: Re-iterable of `(x, label)`.
        count: N, how many gradients.
        minibatch: Of how many examples each is the mean; 1 in the empirical Fisher matrix.
        block_size: Weights of a block, in the order of a layer's outputs; None for whole layers.
        damping: What is added to the diagonal, positive.
        loss: `loss(output, label)` of a batch, its mean over examples; None for the cross-entropy.
        layers: Names of layers, as `prunable` gives them; None for all that can be pruned.
        max_memory: Bytes that gradients and factors may take.

    Returns:
        The inverse, and scores.

    Raises:
        TypeError: As `vfjax.prune.fisher`.
        ValueError: As `vfjax.prune.fisher`; if an option is out of range; or if more memory would
            be needed than `max_memory`. The message says how much, before anything is computed.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[2.0], [1.0]])}
        >>> x, label = jnp.eye(2), jnp.array([0, 0])
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, x)
        >>> loss = lambda z, _: z.sum()
        >>> found = inverse_fisher(net, tree, [(x, label)], count=2, damping=0.5, loss=loss)
        >>> found.diagonal["w"].tolist(), found.scores.values["w"].ravel().tolist()
        ([[1.0, 1.0]], [2.0, 0.5])

    Source: "WoodFisher: Efficient Second-Order Approximation for Neural Network Compression" (Singh
    & Alistarh, 2020), sections 3 and 4.
    """
    for name, value, least in (("count", count, 1), ("minibatch", minibatch, 1)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value!r}")
    if not 0 < damping < np.inf:
        raise ValueError(f"damping must be a positive number, got {damping!r}")
    if block_size is not None and block_size < 1:
        raise ValueError(
            f"block_size must be 1 or more, or None for whole layers, got {block_size}"
        )
    leaves, rows, paths = weights_of(net, tree, layers)
    size = max(r.size for r in rows.values()) if block_size is None else block_size
    needed = memory(net, count=count, block_size=size, layers=layers)
    if needed > max_memory:
        weights = sum(r.size for r in rows.values())
        raise ValueError(
            f"{count} gradients of {weights:,} weights and their factors "
            f"take {needed / 2**30:.1f} GiB, more than max_memory, {max_memory / 2**30:.1f} GiB: "
            "take fewer gradients, smaller blocks or fewer layers, or allow more"
        )
    _log.info("gradients and factors take %.2f GiB", needed / 2**30)
    held = {name: np.empty((count, r.size), np.float32) for name, r in rows.items()}
    done = 0
    options = {"loss": loss, "count": count, "minibatch": minibatch}
    for found in gradients(net, tree, tuple(leaves), data, **options):
        flat = {path: np.asarray(g).reshape(len(g), -1) for path, g in found.items()}
        k = len(next(iter(flat.values())))
        for name, r in rows.items():
            held[name][done : done + k] = flat[paths[name]][:, r.reshape(-1)]
        done += k
    diagonal, factors = {}, {}
    values = {path: np.zeros(np.shape(leaf)) for path, leaf in leaves.items()}
    for name, r in rows.items():
        parts = [held[name][:, start:end] for start, end in _blocks(r.size, size)]
        factors[name] = [_factor(part, damping) for part in parts]
        pairs = zip(parts, factors[name], strict=True)
        diagonal[name] = np.concatenate([_diagonal(*pair, damping) for pair in pairs])
        diagonal[name] = diagonal[name].reshape(r.shape)
        weights = np.asarray(leaves[paths[name]], np.float64).reshape(-1)[r]
        values[paths[name]].reshape(-1)[r] = weights**2 / (2 * diagonal[name])
    return InverseFisher(
        scores_of(tree, values, rows, paths), diagonal, held, factors, damping, size
    )


def woodfisher(net: Network, tree: PyTree, data: Iterable[Any], **options: Any) -> Scores:
    """Scores of weights by how much the loss rises without them, if the others make up for it.

    Args:
        net: The traced network.
        tree: The tree to prune.
        data: Re-iterable of `(x, label)`.
        **options: Those of `inverse_fisher`, which also makes the others do so.

    Returns:
        The scores, `w^2 / (2 [F^-1]_ww)`, float64.

    Raises:
        TypeError: As `inverse_fisher`.
        ValueError: As `inverse_fisher`.

    Source: as `inverse_fisher`.
    """
    return inverse_fisher(net, tree, data, **options).scores


def memory(
    net: Network,
    *,
    count: int = 400,
    block_size: int | None = None,
    layers: Sequence[str] | None = None,
) -> int:
    """Bytes that `inverse_fisher` holds on the host: the gradients, and a factor for each block.

    Args:
        net: The traced network.
        count: As in `inverse_fisher`.
        block_size: As in `inverse_fisher`.
        layers: As in `inverse_fisher`.

    Returns:
        How many; what else scoring takes does not grow with `count`.

    Raises:
        TypeError: If `net` is no traced network.
        ValueError: If a layer is unknown, or has no kernel of its own.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.ones((20, 50))}
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, jnp.ones((1, 20)))
        >>> memory(net, count=10, block_size=100)
        48000
    """
    weights = [rows.size for rows in rows_of(net, layers)[0].values()]
    blocks = (end - start for n in weights for start, end in _blocks(n, block_size or n))
    return 4 * count * sum(weights) + sum(8 * min(count, size) ** 2 for size in blocks)


def _blocks(size: int, block: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + block, size)) for start in range(0, size, block))


def _factor(part: np.ndarray, damping: float) -> np.ndarray:
    """The Cholesky factor of what is to be inverted, of the smaller of the two forms."""
    count, size = part.shape
    part = part.astype(np.float64)
    gram = part @ part.T if size > count else part.T @ part / count
    gram[np.diag_indices_from(gram)] += count * damping if size > count else damping
    return scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=True)


def _diagonal(part: np.ndarray, factor: np.ndarray, damping: float) -> np.ndarray:
    count, size = part.shape
    if size <= count:
        half = scipy.linalg.solve_triangular(factor, np.eye(size), lower=True)
        return (half**2).sum(0)
    found = np.empty(size)
    for start, end in _blocks(size, _COLUMNS):
        half = scipy.linalg.solve_triangular(
            factor, part[:, start:end].astype(np.float64), lower=True
        )
        found[start:end] = (1 - (half**2).sum(0)) / damping
    return found


def _solve(part: np.ndarray, factor: np.ndarray, damping: float, vector: np.ndarray) -> np.ndarray:
    count, size = part.shape
    if size <= count:
        return scipy.linalg.cho_solve((factor, True), vector)
    inner = scipy.linalg.cho_solve((factor, True), part @ vector)
    return (vector - part.T @ inner) / damping
