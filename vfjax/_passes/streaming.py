"""One pass over data for several models, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes.batching import batch_size
from vfjax._passes.devices import on_meshes, replicate
from vfjax._passes.masking import Mask, masked
from vfjax._types import Array, PyTree


def vmapped() -> bool:
    """Whether models are vmapped; not on CPU, where batched kernels make convolutions slow."""
    return jax.default_backend() != "cpu"


def each(fn: Callable[[Any, PyTree], Any], models: Sequence[Any], x: PyTree) -> tuple[Any, ...]:
    """`fn(model, x)` for every model, compiled once for models of equal types."""
    same_types: dict[Any, list[int]] = {}
    for k, model in enumerate(models):
        leaves, structure = jax.tree.flatten(model)
        types = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        same_types.setdefault((structure, types), []).append(k)
    outputs: list[Any] = [None] * len(models)
    for members in same_types.values():
        if len(members) == 1:  # under vmap, `cond` would run both branches
            outputs[members[0]] = fn(models[members[0]], x)
            continue
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[models[k] for k in members])
        if vmapped():
            results = jax.vmap(fn, (0, None))(stacked, x)
        else:
            results = jax.lax.map(lambda model: fn(model, x), stacked)
        for place, k in enumerate(members):
            outputs[k] = jax.tree.map(lambda a, place=place: a[place], results)
    return tuple(outputs)


def by_pieces(
    fn: Callable[[PyTree], tuple[Any, list[Array]]],
    merge: Callable[[Any, Any, Any], Any],
    parts: int,
    x: PyTree,
) -> tuple[Any, list[Array]]:
    """Reduces a batch piece by piece, in one compiled loop.

    Args:
        fn: Reduces a batch; also returns the number of samples at each site.
        merge: Merges the pooled result and a piece, given the piece's share of both together.
        parts: Number of pieces, which must divide the batch.
        x: The batch.

    Returns:
        What `fn` would return for the whole batch.
    """
    if parts == 1:
        return fn(x)
    xs = _split(x, parts)
    empty, _ = jax.eval_shape(fn, jax.tree.map(lambda a: a[0], xs))
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty)

    def step(pooled: Any, nth: tuple[Array, PyTree]) -> tuple[Any, list[Array]]:
        piece, counts = fn(nth[1])
        merged = merge(pooled, piece, 1 / nth[0])
        # The first piece is taken as it is: merged with zeros, the square of a large mean might
        # overflow, and 0 * inf is NaN.
        first = functools.partial(jnp.where, nth[0] == 1)
        return jax.tree.map(first, piece, merged), counts

    pooled, counts = jax.lax.scan(step, empty, (jnp.arange(1.0, parts + 1), xs))
    return pooled, [n.sum(dtype=n.dtype) for n in counts]


def each_piece(fn: Callable[[PyTree], Any], parts: int, x: PyTree) -> Any:
    """`fn` of every piece of a batch, as many as divide it, stacked along a new first axis."""
    if parts == 1:
        return jax.tree.map(lambda a: a[None], fn(x))
    return jax.lax.map(fn, _split(x, parts))


def _split(x: PyTree, parts: int) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), x)


def stream(
    measure: Callable[[Any, Any, PyTree, Array | None], tuple[Any, list[Array]]],
    pool: Callable[[Any, Any, Any], Any],
    state: PyTree,
    data: Iterable[Any],
    *,
    like: PyTree,
    mask: Mask | None = None,
    host: Callable[[Any], Any] | None = None,
) -> tuple[Any, list[Any]]:
    """Pools a measurement over all batches of `data`, on whichever devices they lie.

    Args:
        measure: `(mesh, state, x, valid) -> (batch, samples)`: the measurement that `pool` takes,
            and the number of samples at each site. The mesh is the one over which the batches are
            sharded, or None; `valid` is None, or with a mask the booleans that it gives.
        pool: `(pooled, batch, share) -> pooled`; `share` is the batch's part of all examples so
            far, or with a mask a list of its part of the samples at each site.
        state: Whatever `measure` needs; placed on the mesh before `measure` receives it.
        data: As `batches` takes it.
        like: The traced input.
        mask: As `masked` takes it.
        host: Where measurements are small, as those of channels are, a program that pools them
            takes longer to compile than NumPy takes for all batches. With this, `measure` returns
            the measurements of equal pieces of the batch, stacked; `host` makes of each, in NumPy,
            what `pool` takes. With a mask there is one piece.

    Returns:
        The pooled measurement of all batches, and the number of samples at each site.

    Raises:
        TypeError: As `masked`.
        ValueError: As `masked`.
    """
    pooled, counts = None, _Counts() if mask is None else _MaskedCounts()

    def measured() -> Iterator[tuple[Any, Any, list[Array], int]]:
        for mesh, placed, (x, valid) in on_meshes(masked(data, mask, like=like), state):
            yield mesh, *measure(mesh, placed, x, valid), batch_size(x)

    for mesh, batch, each, size in measured() if host is None else late(measured()):
        if host is None:
            share = counts.add(each, size)
            if pooled is not None:
                batch = pool(replicate(pooled, mesh), batch, share)
            pooled = batch
            continue
        pieces = _unstacked(batch)
        for piece in pieces:
            # What is not finite is told by those who know what it is of.
            with np.errstate(all="ignore"):
                piece = host(piece)
                share = counts.add(each, size, len(pieces))
                pooled = piece if pooled is None else pool(pooled, piece, share)
    return pooled, counts.totals


class _Counts:
    """The numbers of samples so far: every batch has the same number of them per example."""

    def __init__(self) -> None:
        self._examples = 0
        self._each: list[float] = []

    def add(self, each: list[Array], size: int, pieces: int = 1) -> Any:
        """Adds a piece of a batch, of which `each` counts the samples; returns its share of all."""
        self._each = self._each or [int(n) / size for n in each]
        self._examples += size // pieces
        return size / pieces / self._examples

    @property
    def totals(self) -> list[Any]:
        """The number of samples at each site."""
        return [n * self._examples for n in self._each]


class _MaskedCounts:
    """The numbers of samples so far at each site, where a mask says how many there are."""

    def __init__(self) -> None:
        self.totals: list[Any] = []

    def add(self, each: list[Array], size: int, pieces: int = 1) -> Any:
        """As `_Counts.add`; a list of shares, 0 where there are no samples yet."""
        counts = [np.asarray(n, np.float64) for n in each]
        self.totals = [a + b for a, b in zip(self.totals or [0] * len(counts), counts, strict=True)]
        return [n / np.maximum(t, 1) for n, t in zip(counts, self.totals, strict=True)]


def late(items: Iterable[Any]) -> Iterator[Any]:
    """Each item once the next has been begun: a device works on that while this one is taken."""
    waiting: list[Any] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def wide(tree: PyTree) -> PyTree:
    """As NumPy arrays in float64 or better: what many batches are pooled in."""

    def widened(a: Any) -> np.ndarray:
        a = np.asarray(a)
        return a.astype(np.promote_types(a.dtype, np.float64))

    return jax.tree.map(widened, tree)


def _unstacked(batch: PyTree) -> list[PyTree]:
    """The pieces of a measurement, on the host."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, batch))
    count = len(leaves[0]) if leaves else 1
    return [structure.unflatten([a[k] for a in leaves]) for k in range(count)]
