"""One pass over data, batch by batch, for several models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vfjax._passes.batching import batch_size, batches
from vfjax._passes.devices import on_meshes, replicate
from vfjax._types import Array, PyTree


def vmapped() -> bool:
    """Whether models are vmapped; on CPU that makes their convolutions slow, so it loops."""
    return jax.default_backend() != "cpu"


def each(fn: Callable[[Any, PyTree], Any], models: Sequence[Any], x: PyTree) -> tuple[Any, ...]:
    """`fn(model, x)` of every model; vmapped over those that are alike where that is fast."""
    if not vmapped():
        return tuple(fn(model, x) for model in models)
    alike: dict[Any, list[int]] = {}
    for k, model in enumerate(models):
        leaves, structure = jax.tree.flatten(model)
        types = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        alike.setdefault((structure, types), []).append(k)
    found: list[Any] = [None] * len(models)
    for members in alike.values():
        if len(members) == 1:  # under vmap, `cond` would take both of its branches
            found[members[0]] = fn(models[members[0]], x)
            continue
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[models[k] for k in members])
        results = jax.vmap(fn, (0, None))(stacked, x)
        for place, k in enumerate(members):
            found[k] = jax.tree.map(lambda a, place=place: a[place], results)
    return tuple(found)


def by_pieces(
    fn: Callable[[PyTree], tuple[Any, list[Array]]],
    merge: Callable[[Any, Any, Any], Any],
    parts: int,
    x: PyTree,
) -> tuple[Any, list[Array]]:
    """Reduces a batch piece by piece, one after the other in one loop.

    Args:
        fn: From a batch to what it is reduced to, and the number of samples at each site.
        merge: Merges what was pooled and a piece, given the piece's share of both together.
        parts: Number of pieces, which divides the batch.
        x: The batch.

    Returns:
        What `fn` returns, of the whole batch.
    """
    if parts == 1:
        return fn(x)
    xs = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), x)
    empty, _ = jax.eval_shape(fn, jax.tree.map(lambda a: a[0], xs))
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty)

    def step(pooled: Any, nth: tuple[Array, PyTree]) -> tuple[Any, list[Array]]:
        piece, counts = fn(nth[1])
        merged = merge(pooled, piece, 1 / nth[0])
        # Not merged with nothing: the square of a large mean may overflow.
        first = functools.partial(jnp.where, nth[0] == 1)
        return jax.tree.map(first, piece, merged), counts

    pooled, counts = jax.lax.scan(step, empty, (jnp.arange(1.0, parts + 1), xs))
    return pooled, [n.sum(dtype=n.dtype) for n in counts]


def stream(
    measure: Callable[[Any, Any, PyTree], tuple[Any, list[Array]]],
    pool: Callable[[Any, Any, float], Any],
    state: PyTree,
    data: Iterable[Any],
    *,
    like: PyTree,
) -> tuple[Any, list[float]]:
    """Pools what a measurement gives over all batches of `data`, wherever they lie.

    Args:
        measure: `(mesh, state, x)` to what `pool` takes and the number of samples at each site; the
            mesh is the one that the batches are sharded over, or None.
        pool: `(pooled, batch, share)` to what is pooled then; `share` is the batch's part of all
            examples so far.
        state: What `measure` needs, placed on the mesh before it gets it.
        data: As `batches` takes it.
        like: The traced input.

    Returns:
        What was pooled over all batches, and the number of samples at each site.

    Raises:
        TypeError: As `batches`.
        ValueError: As `batches`.
    """
    pooled, samples, counts = None, 0, []
    for mesh, placed, x in on_meshes(batches(data, like=like), state):
        size = batch_size(x)
        batch, each = measure(mesh, placed, x)
        samples += size
        if pooled is not None:
            pooled = pool(replicate(pooled, mesh), batch, size / samples)
            continue
        # Every batch has the same number of positions per example.
        pooled, counts = batch, [int(n) / size for n in each]
    assert pooled is not None  # `batches` gives one or raises
    return pooled, [n * samples for n in counts]
