"""Accuracy and loss of a network on labelled batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from vfjax._route import routed

__all__ = ["Evaluation", "evaluate"]

Array = jax.Array
PyTree = Any


class Evaluation(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy in nats over `count` examples."""

    accuracy: float
    loss: float
    count: int


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _add_batch(
    fn: Callable[..., Array], params: PyTree, sums: tuple[Array, Array], x: PyTree, label: Array
) -> tuple[Array, Array]:
    """Adds a batch's number of correct answers and its summed loss to `sums`."""
    logits = routed(fn)(params, x).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = jnp.sum(jnp.argmax(logits, -1) == label, dtype=jnp.int32)
    return sums[0] + correct, sums[1] + loss.sum()


def _pair(batch: Any, index: int) -> tuple[PyTree, np.ndarray | Array]:
    """Returns the input and the label of a batch, checked on the host."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"`data`, batch {index}, must be a pair (x, label), got {type(batch).__name__}; "
            "accuracy needs labels."
        )
    x, label = batch
    if not hasattr(label, "dtype"):
        label = np.asarray(label)
    if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(
            f"`data`, batch {index}: labels must be integers [n], got {label.dtype} "
            f"{list(label.shape)}; for one-hot labels pass label.argmax(-1)."
        )
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if sizes != {label.shape}:
        raise ValueError(
            f"`data`, batch {index}: x and label must be equally many, got {len(label)} labels for "
            f"{', '.join(str(size[0]) if size else 'a scalar' for size in sorted(sizes))}."
        )
    return x, label


def evaluate(
    fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    data: Iterable[tuple[Any, Array]],
    *,
    progress: bool = False,
) -> Evaluation:
    """Measures accuracy and cross-entropy, one compiled call per batch.

    Args:
        fn: Pure function ``(params, x) -> logits [n, classes]``.  Calls with an equal function and
            equal shapes share one compilation, so pass the same function each time, not a new
            ``lambda``.
        params: Its parameters, any pytree.
        data: Batches ``(x, label)`` with integer labels ``[n]``; the last may be smaller.
        progress: Whether a progress bar appears after two seconds.

    Returns:
        The `Evaluation`.

    Raises:
        TypeError: If a batch is no pair, or its labels are not integers.
        ValueError: If `data` yields no example, or not one label per input.

    Example:
        >>> data = [(jnp.eye(3), jnp.arange(3)), (jnp.eye(3)[:1], jnp.array([2]))]
        >>> evaluate(lambda scale, x: scale * x, 50.0, data).accuracy
        0.75
    """
    sums = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    count = 0
    bar = tqdm(data, desc="evaluating", delay=2, leave=False, disable=not progress)
    for index, batch in enumerate(bar):
        x, label = _pair(batch, index)
        if len(label):
            sums = _add_batch(fn, params, sums, x, label)
            count += len(label)
    if not count:
        raise ValueError(
            f"`data` gave no examples: this {type(data).__name__} is empty, or an iterator that "
            "was used up before. Pass what starts over each time, such as a list of batches."
        )
    return Evaluation(int(sums[0]) / count, float(sums[1]) / count, count)
