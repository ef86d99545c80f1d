"""WoodFisher: pruning by the inverse of the empirical Fisher matrix, block by block.

With N gradients g, the matrix of a block of weights is `F = damping * I + 1/N sum g g^T`. By the
Woodbury identity its inverse is

    F^-1 = (I - G^T (N damping I + G G^T)^-1 G) / damping,    G [N, block],

which WoodFisher's recursion reaches too, taking one gradient after the other. This form needs the
gradients and an N x N factor, but no block x block matrix, so that a block can be a whole layer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg

from vfjax._deprecated import renames
from vfjax._trees import check_like, flatten_named, like_leaf, with_leaves
from vfjax._types import PyTree
from vfjax.network._arguments import check_net
from vfjax.network._network import Network
from vfjax.prune._gradients import Loss, check_count, gradients
from vfjax.prune._masks import apply, mask_of
from vfjax.prune._scores import (
    Scores,
    rows_of,
    scores_of,
    weights_of,
)

_log = logging.getLogger(__name__)

# Bytes of the columns of a block that are held in float64 at once.
_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InverseFisher:
    """The inverse of the empirical Fisher matrix of the weights to prune, in blocks.

    Attributes:
        scores: How much the loss rises without each weight, if the others of its block are then set
            to their best values: `w^2 / (2 [F^-1]_ww)`.
        diagonal: By layer, `[F^-1]_ww`, float64 `[outputs, inputs]`.
        gradients: By layer, float32 `[N, outputs * inputs]`.
        factors: By layer, for each block, the lower Cholesky factor of `N damping I + G G^T`, or of
            F where the block has at most as many weights as there are gradients.
        damping: Number added to the diagonal.
        block_size: Number of weights per block.
    """

    scores: Scores
    diagonal: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    factors: Mapping[str, Sequence[np.ndarray]]
    damping: float
    block_size: int

    def __repr__(self) -> str:
        count = len(next(iter(self.gradients.values())))
        options = f"damping={self.damping:g}, block_size={self.block_size}"
        return f"InverseFisher({self.scores}, {count} gradients, {options})"

    def solve(self, layer: str, vector: np.ndarray) -> np.ndarray:
        """Computes `F^-1 v` for one layer.

        Args:
            layer: Its name.
            vector: `[outputs, inputs]`.

        Returns:
            float64 `[outputs, inputs]`.
        """
        flat = np.asarray(vector, np.float64).reshape(-1)
        product = np.empty_like(flat)
        for (start, end), factor in zip(
            _blocks(flat.size, self.block_size), self.factors[layer], strict=True
        ):
            part = self.gradients[layer][:, start:end]
            product[start:end] = _solve(part, factor, self.damping, flat[start:end])
        return product.reshape(np.shape(vector))

    def prune(self, tree: PyTree, mask: PyTree, *, jointly: bool = False) -> PyTree:
        """Prunes a tree, and changes the weights that stay to make up for those that go.

        WoodFisher sums the changes `-w [F^-1]_:w / [F^-1]_ww` over the weights that go, each as if
        all others stayed. `jointly` changes the weights K that stay by `[F_KK]^-1 F_KQ w_Q`, which
        is best when all weights Q go at once, at the same cost.

        Args:
            tree: The tree that was measured.
            mask: A mask that `vfjax.prune.masks` made from the scores.
            jointly: Whether the changes are computed together. The loss on the measured data is
                then lower; on other data it may be lower or higher, so try both.

        Returns:
            A tree of the same dtypes, zero where the mask is False.

        Raises:
            ValueError: If the tree differs from the one that was measured in structure, shape or
                dtype, or the mask from the tree in structure or shape.

        Source: "WoodFisher" (Singh & Alistarh, 2020), section 4, equation 9.
        """
        leaves = flatten_named(tree, name="tree")[0]
        like = flatten_named(self.scores.like)[0]
        check_like(leaves, like, name="tree", other="the measured tree")
        kept = mask_of(tree, mask)
        changed: dict[str, np.ndarray] = {}
        for layer, rows in self.scores.rows.items():
            path = self.scores.paths[layer]
            flat = changed.setdefault(path, np.asarray(leaves[path], np.float64).reshape(-1).copy())
            gone = ~np.broadcast_to(kept[path], np.shape(leaves[path])).reshape(-1)[rows]
            if jointly:
                flat[rows] += self._jointly(layer, flat[rows], gone)
            else:
                flat[rows] -= self.solve(layer, gone * flat[rows] / self.diagonal[layer])
        new = {
            path: like_leaf(flat.reshape(like[path].shape), leaves[path])
            for path, flat in changed.items()
        }
        return apply(with_leaves(tree, new), mask)

    def _jointly(self, layer: str, weights: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """The change of a layer's weights `[outputs, inputs]` that is best when some go at once."""
        change = np.empty(weights.size)
        for start, end in _blocks(weights.size, self.block_size):
            block, out = weights.reshape(-1)[start:end], gone.reshape(-1)[start:end]
            part = self.gradients[layer][:, start:end]
            gram, product = self.damping * len(part) * np.eye(len(part)), np.zeros(len(part))
            for place, piece in _pieces(part):
                stays, goes = piece[:, ~out[place]], piece[:, out[place]]
                gram += stays @ stays.T
                product += goes @ block[place][out[place]]
            # By the Woodbury identity, F_KK^-1 G_K^T / N = G_K^T (N damping I + G_K G_K^T)^-1.
            inner = scipy.linalg.solve(gram, product, assume_a="pos")
            for place, piece in _pieces(part):
                change[start:end][place] = np.where(out[place], -block[place], piece.T @ inner)
        return change.reshape(weights.shape)


@renames(layers="names")
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
    names: Sequence[str] | None = None,
    max_memory: int = 1 << 31,
) -> InverseFisher:
    """The inverse empirical Fisher matrix of the weights to prune, in blocks inside layers.

    Args:
        net: The traced network.
        tree: The tree to prune.
        data: Re-iterable of `(x, label)`, with labels as `vfjax.prune.fisher` takes them.
        count: N, the number of gradients.
        minibatch: Number of examples that each gradient is the mean of; 1 in the empirical Fisher
            matrix.
        block_size: Number of weights per block, in the order of a layer's outputs; None for whole
            layers, which takes no longer. Smaller blocks are for comparison with other work.
        damping: Positive number added to the diagonal.
        loss: `loss(output, label)`, the mean over a batch of examples; None for the cross-entropy.
        names: Names of layers, as `prunable` gives them; None for all that can be pruned.
        max_memory: Bytes that gradients and factors may take.

    Returns:
        The inverse, with scores.

    Raises:
        TypeError: As `vfjax.prune.fisher`.
        ValueError: As `vfjax.prune.fisher`; if an option is out of range; if damping is lost in the
            rounding of the matrix; or if more memory is needed than `max_memory`. The message says
            how much, before anything is computed.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[2.0], [1.0]])}
        >>> x, label = jnp.eye(2), jnp.array([0, 0])
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, x)
        >>> loss = lambda z, _: z.sum()
        >>> inverse = inverse_fisher(net, tree, [(x, label)], count=2, damping=0.5, loss=loss)
        >>> inverse.diagonal["w"].tolist(), inverse.scores.values["w"].ravel().tolist()
        ([[1.0, 1.0]], [2.0, 0.5])

    Source: "WoodFisher: Efficient Second-Order Approximation for Neural Network Compression" (Singh
    & Alistarh, 2020), sections 3 and 4.
    """
    check_count("count", count)
    check_count("minibatch", minibatch)
    if block_size is not None:
        check_count("block_size", block_size)
    if not 0 < damping < np.inf:
        raise ValueError(f"damping must be a positive number, got {damping!r}")
    leaves, rows, paths = weights_of(net, tree, names)
    size = max(r.size for r in rows.values()) if block_size is None else block_size
    needed = _bytes_of(rows, count, size)
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
    for batch in gradients(net, tree, leaves, data, **options):
        flat = {path: np.asarray(g).reshape(len(g), -1) for path, g in batch.items()}
        k = len(next(iter(flat.values())))
        for name, r in rows.items():
            held[name][done : done + k] = flat[paths[name]][:, r.reshape(-1)]
        done += k
    diagonal, factors = {}, {}
    values = {path: np.zeros(np.shape(leaf)) for path, leaf in leaves.items()}
    for name, r in rows.items():
        parts = [held[name][:, start:end] for start, end in _blocks(r.size, size)]
        factors[name] = [_factor(part, damping, name) for part in parts]
        pairs = zip(parts, factors[name], strict=True)
        diagonal[name] = np.concatenate([_diagonal(*pair, damping) for pair in pairs])
        diagonal[name] = diagonal[name].reshape(r.shape)
        weights = np.asarray(leaves[paths[name]], np.float64).reshape(-1)[r]
        values[paths[name]].reshape(-1)[r] = weights**2 / (2 * diagonal[name])
    return InverseFisher(
        scores_of(tree, values, rows, paths), diagonal, held, factors, damping, size
    )


@renames(layers="names")
def woodfisher(net: Network, tree: PyTree, data: Iterable[Any], **options: Any) -> Scores:
    """Scores weights by how much the loss rises without them, if the others make up for it.

    Args:
        net: The traced network.
        tree: The tree to prune.
        data: As in `inverse_fisher`.
        **options: Options of `inverse_fisher`, whose result can also change the other weights.

    Returns:
        The scores, `w^2 / (2 [F^-1]_ww)`, float64.

    Raises:
        TypeError: As `inverse_fisher`.
        ValueError: As `inverse_fisher`.

    Source: as `inverse_fisher`.
    """
    return inverse_fisher(net, tree, data, **options).scores


@renames(layers="names")
def memory(
    net: Network,
    *,
    count: int = 400,
    block_size: int | None = None,
    names: Sequence[str] | None = None,
) -> int:
    """Bytes that `inverse_fisher` takes: gradients, a factor for each block, and working space.

    Args:
        net: The traced network.
        count: As in `inverse_fisher`.
        block_size: As in `inverse_fisher`.
        names: As in `inverse_fisher`.

    Returns:
        The number of bytes; other memory that scoring takes does not grow with `count`.

    Raises:
        TypeError: If `net` is not a traced network.
        ValueError: If a layer is unknown, or its kernel is computed from several leaves.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.ones((20, 50))}
        >>> net = vfjax.trace(lambda v, x: x @ v["w"], tree, jnp.ones((1, 20)))
        >>> memory(net, count=10, block_size=100)
        72000
    """
    check_net(net)
    return _bytes_of(rows_of(net, names)[0], count, block_size)


def _bytes_of(rows: Mapping[str, np.ndarray], count: int, block_size: int | None) -> int:
    """As `memory`, for the weights of layers whose places are given."""
    weights = [places.size for places in rows.values()]
    sizes = [end - start for n in weights for start, end in _blocks(n, block_size or n)]
    held = 4 * count * sum(weights) + sum(8 * min(count, size) ** 2 for size in sizes)
    return held + 24 * count * min(max(sizes), _columns(count))


def _blocks(size: int, block: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + block, size)) for start in range(0, size, block))


def _columns(count: int) -> int:
    return max(1, _BYTES // (8 * count))


def _pieces(part: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Columns of the gradients in float64, a few at a time: all would take twice the gradients."""
    count, size = part.shape
    for start, end in _blocks(size, _columns(count)):
        yield slice(start, end), part[:, start:end].astype(np.float64)


def _factor(part: np.ndarray, damping: float, layer: str) -> np.ndarray:
    """The Cholesky factor of the matrix to invert, in the smaller of its two forms."""
    count, size = part.shape
    if size > count:
        gram = np.zeros((count, count))
        for _, piece in _pieces(part):
            gram += piece @ piece.T
    else:
        whole = part.astype(np.float64)
        gram = whole.T @ whole / count
    if not np.isfinite(gram).all():
        raise ValueError(
            f"the gradients of '{layer}' hold NaN or infinite values: look for them in the model "
            "and the data, or for a loss that is not finite"
        )
    gram[np.diag_indices_from(gram)] += count * damping if size > count else damping
    try:
        return scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise ValueError(
            f"damping={damping!r} is lost in the rounding of the Fisher matrix of '{layer}', which "
            "is singular without it: give more"
        ) from error


def _diagonal(part: np.ndarray, factor: np.ndarray, damping: float) -> np.ndarray:
    count, size = part.shape
    if size <= count:
        half = scipy.linalg.solve_triangular(factor, np.eye(size), lower=True)
        return (half**2).sum(0)
    diagonal = np.empty(size)
    for place, piece in _pieces(part):
        # The difference below is lost in rounding where a weight's gradients are large next to the
        # damping and unlike those of other weights. A diagonal entry of the inverse is at least the
        # inverse of the matrix's entry.
        least = 1 / (damping + _squares(piece) / count)
        half = scipy.linalg.solve_triangular(factor, piece, lower=True)
        diagonal[place] = np.maximum((1 - _squares(half)) / damping, least)
    return diagonal


def _squares(columns: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->j", columns, columns)


def _solve(part: np.ndarray, factor: np.ndarray, damping: float, vector: np.ndarray) -> np.ndarray:
    count, size = part.shape
    if size <= count:
        return scipy.linalg.cho_solve((factor, True), vector)
    product = np.zeros(count)
    for place, piece in _pieces(part):
        product += piece @ vector[place]
    inner = scipy.linalg.cho_solve((factor, True), product)
    solution = np.empty_like(vector)
    for place, piece in _pieces(part):
        solution[place] = (vector[place] - piece.T @ inner) / damping
    return solution
