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

from vfjax._deprecated import renames
from vfjax._trees.paths import check_like, flatten_named, with_leaves
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

# Bytes of the columns of a block that are computed with at once, in float64.
_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InverseFisher:
    """The inverse of the empirical Fisher matrix of the weights to prune, in blocks.

    Attributes:
        scores: By how much the loss rises without each weight if all others of its block are set
            as is best then, `w^2 / (2 [F^-1]_ww)`.
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

    def __repr__(self) -> str:
        count = len(next(iter(self.gradients.values())))
        options = f"damping={self.damping:g}, block_size={self.block_size}"
        return f"InverseFisher({self.scores}, {count} gradients, {options})"

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

    def prune(self, tree: PyTree, mask: PyTree, *, jointly: bool = False) -> PyTree:
        """The pruned tree, with the weights that stay set to make up for those that go.

        WoodFisher sums the changes for each weight that goes, `-w [F^-1]_:w / [F^-1]_ww`, as if all
        others stayed. `jointly` sets the weights K that stay to what is best without all weights Q
        that go, `[F_KK]^-1 F_KQ w_Q` of change, at the same cost.

        Args:
            tree: The tree that was measured.
            mask: What `vfjax.prune.masks` made of the scores.
            jointly: Whether the changes are computed together. The loss that was measured is lower
                then; that of other data may be lower or higher, so try both.

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
            path: jnp.asarray(flat.reshape(like[path].shape), like[path].dtype)
            for path, flat in changed.items()
        }
        return apply(with_leaves(tree, new), mask)

    def _jointly(self, layer: str, weights: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """The change of one layer's weights `[outputs, inputs]` that is best without some."""
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
        data: Re-iterable of `(x, label)`.
        count: N, how many gradients.
        minibatch: Of how many examples each is the mean; 1 in the empirical Fisher matrix.
        block_size: Weights of a block, in the order of a layer's outputs; None for whole layers,
            which takes no longer. Blocks are there to compare with what others use.
        damping: What is added to the diagonal, positive.
        loss: `loss(output, label)` of a batch, its mean over examples; None for the cross-entropy.
        names: Names of layers, as `prunable` gives them; None for all that can be pruned.
        max_memory: Bytes that gradients and factors may take.

    Returns:
        The inverse, and scores.

    Raises:
        TypeError: As `vfjax.prune.fisher`.
        ValueError: As `vfjax.prune.fisher`; if an option is out of range; if damping is lost in the
            rounding of the matrix; or if more memory would be needed than `max_memory`. The message
            says how much, before anything is computed.

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
    for found in gradients(net, tree, leaves, data, **options):
        flat = {path: np.asarray(g).reshape(len(g), -1) for path, g in found.items()}
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


@renames(layers="names")
def memory(
    net: Network,
    *,
    count: int = 400,
    block_size: int | None = None,
    names: Sequence[str] | None = None,
) -> int:
    """Bytes that `inverse_fisher` takes: the gradients, a factor of each block, what it works in.

    Args:
        net: The traced network.
        count: As in `inverse_fisher`.
        block_size: As in `inverse_fisher`.
        names: As in `inverse_fisher`.

    Returns:
        How many; what else scoring takes does not grow with `count`.

    Raises:
        TypeError: If `net` is not a traced network.
        ValueError: If a layer is unknown, or has no kernel of its own.

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
    """The same of weights that lie at some places, by layer."""
    weights = [places.size for places in rows.values()]
    sizes = [end - start for n in weights for start, end in _blocks(n, block_size or n)]
    held = 4 * count * sum(weights) + sum(8 * min(count, size) ** 2 for size in sizes)
    return held + 24 * count * min(max(sizes), _columns(count))


def _blocks(size: int, block: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + block, size)) for start in range(0, size, block))


def _columns(count: int) -> int:
    return max(1, _BYTES // (8 * count))


def _pieces(part: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Columns of gradients in float64, few at a time: a copy of all would be twice as large."""
    count, size = part.shape
    for start, end in _blocks(size, _columns(count)):
        yield slice(start, end), part[:, start:end].astype(np.float64)


def _factor(part: np.ndarray, damping: float, layer: str) -> np.ndarray:
    """The Cholesky factor of what is to be inverted, of the smaller of the two forms."""
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
    found = np.empty(size)
    for place, piece in _pieces(part):
        # Where a weight's own gradients are all there is to it, the difference rounds to nothing;
        # no entry of the inverse is below the inverse of the matrix's.
        least = 1 / (damping + _squares(piece) / count)
        half = scipy.linalg.solve_triangular(factor, piece, lower=True)
        found[place] = np.maximum((1 - _squares(half)) / damping, least)
    return found


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
    found = np.empty_like(vector)
    for place, piece in _pieces(part):
        found[place] = (vector[place] - piece.T @ inner) / damping
    return found
