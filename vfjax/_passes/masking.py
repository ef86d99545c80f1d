"""Masks: which positions of the batches count.

What a network itself ignores, such as padding, must not count in any statistic. A network's
equations do not tell what it ignores, so the functions that pass over data take `mask=`: a function
of what the network takes as x that says which positions are valid. It is evaluated here, batch by
batch, outside of any compiled program; `vfjax.network._valid` then follows the positions to a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vfjax._passes.batching import batch_size, batches
from vfjax._passes.devices import mesh_of, replicate
from vfjax._types import Array, PyTree

Mask = Callable[[Any], Any]


def masked(
    data: Iterable[Any], mask: Mask | None, *, like: PyTree, name: str = "data"
) -> Iterator[tuple[PyTree, Array | None]]:
    """Iterates over the inputs in `data` with what is valid of each, checked as by `batches`.

    Args:
        data: As `batches` takes it.
        mask: A function of x to booleans `[batch, ...]`, along the leading axes of an array of x;
            None if everything counts.
        like: The traced input.
        name: The caller's name for the data, for error messages.

    Yields:
        x and the booleans, or None without a mask. Batches without a valid position are left out.

    Raises:
        TypeError: As `batches`; or if `mask` is not a function, or gives something else than
            booleans.
        ValueError: As `batches`; or if what `mask` gives fits no array of x, or no position of any
            batch is valid.
    """
    _check_function(mask)
    found = mask is None
    for index, x in enumerate(batches(data, like=like, name=name)):
        valid = None if mask is None else _checked(mask(x), x, f"`mask` of `{name}`, batch {index}")
        if valid is None or valid.any():
            found = True
            yield x, valid
    if not found:
        raise ValueError(
            f"`mask` says of no position of `{name}` that it is valid, so nothing is left to "
            "measure: it must be True where a position counts"
        )


def _check_function(mask: Any) -> None:
    if mask is not None and not callable(mask):
        raise TypeError(
            f"`mask` must be a function of x to booleans, got {type(mask).__name__}; for a batch "
            'with an array of its own, mask=lambda x: x["mask"] > 0'
        )


def _checked(valid: Any, x: PyTree, where: str) -> Array:
    """What a mask gives for one batch, after every check."""
    dtype = getattr(valid, "dtype", None)
    if dtype is None or dtype != np.dtype(bool):
        what = type(valid).__name__ if dtype is None else f"{dtype} {list(valid.shape)}"
        raise TypeError(
            f"{where} must be an array of booleans, True where a position counts, got {what}; "
            'compare it with a number, as in mask=lambda x: x["mask"] > 0'
        )
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(x)]
    size = batch_size(x)
    if not valid.ndim or valid.shape[0] != size or not any(fits(s, valid.shape) for s in shapes):
        raise ValueError(
            f"{where} must have shape [batch, ...] along the leading axes of an array of x, whose "
            f"shapes are {[list(s) for s in shapes]}, got {list(valid.shape)}; a mask of whole "
            f"examples is [{size}]"
        )
    mesh = mesh_of(x)
    return valid if mesh is None else replicate(valid, mesh)


def fits(shape: tuple[int, ...], mask: tuple[int, ...]) -> bool:
    """Whether a mask lies along the leading axes of an array: with its sizes, or 1 for all."""
    ahead = shape[: len(mask)]
    return len(ahead) == len(mask) and all(n in (1, m) for n, m in zip(mask, ahead, strict=True))


def examples(x: PyTree, valid: Array | None) -> Any:
    """The number of examples of a batch that count: those with a valid position."""
    if valid is None:
        return batch_size(x)
    return valid.any(tuple(range(1, valid.ndim))).sum()


def read_by(mask: Mask, like: PyTree) -> tuple[bool, ...]:
    """Which arrays of x a mask reads, in the order of the leaves.

    Raises:
        TypeError: If the mask cannot be traced.
    """
    _check_function(mask)
    leaves, tree = jax.tree.flatten(like)
    try:
        jaxpr = jax.make_jaxpr(lambda *xs: mask(jax.tree.unflatten(tree, xs)))(*leaves).jaxpr
    except jax.errors.JAXTypeError as error:
        raise TypeError(
            "`mask` must be a function that JAX can trace, of jax.numpy or operators such as "
            f"x > 0: {str(error).splitlines()[0]}"
        ) from error
    needed = set(map(id, jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in eqn.outvars):
            needed.update(map(id, eqn.invars))
    return tuple(id(v) in needed for v in jaxpr.invars)


def check_valid(counts: Mapping[str, Any], *, name: str = "data") -> None:
    """Raises a ValueError if a mask left no samples to a site.

    Args:
        counts: Numbers of samples by site.
        name: The caller's name for the data.
    """
    for site, count in counts.items():
        if not np.max(count, initial=0):
            raise ValueError(
                f"`mask` leaves no valid position of `{name}` at '{site}'; leave it out of `sites`"
            )
