"""How many pieces to cut a batch into, if that saves time."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.sharding import AxisType

from vfjax._passes import batch_size
from vfjax._trees import flatten_named
from vfjax._types import PyTree
from vfjax.network._inside import may_be_cut, widest
from vfjax.network._network import Network

# On CPU, the largest value of a piece in bytes, and the fewest examples in a piece.
_PIECE_BYTES = 4 << 20
_PIECE_MIN = 16


def pieces(models: Mapping[Network, PyTree], x: PyTree) -> int:
    """The number of equal pieces to cut a batch into; 1 if that gains nothing or might differ.

    Pieces pay on CPU: the output of a layer on a large batch has left the caches by the time its
    statistics read it.

    Args:
        models: By network, a tree that it runs; missing leaves count as traced.
        x: The batch.
    """
    counts = {_pieces_of(net, tree, x) for net, tree in models.items()}
    return counts.pop() if len(counts) == 1 else 1


def _pieces_of(net: Network, tree: PyTree, x: PyTree) -> int:
    size, leaves = batch_size(x), jax.tree.leaves(x)
    if jax.default_backend() != "cpu" or size < 2 * _PIECE_MIN:
        return 1
    if any(AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types for a in leaves):
        return 1  # even on one device, the loop would have to specify the sharding of its slices
    named, _ = flatten_named(tree)
    most = max(_PIECE_BYTES * size // max(widest(net, named, x), 1), _PIECE_MIN)
    piece = next(n for n in range(min(size, most), 0, -1) if size % n == 0)
    pays = _PIECE_MIN <= piece < size
    return size // piece if pays and may_be_cut(net, named, x, piece) else 1
