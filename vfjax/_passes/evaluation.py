"""Accuracy and loss of a network on labelled batches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from tqdm import tqdm

from vfjax._jaxpr import routed
from vfjax._passes.batching import labelled
from vfjax._passes.programs import compiled
from vfjax._trees import check_finite, flatten_named
from vfjax._types import Array, PyTree


class Evaluation(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy in nats over `count` examples."""

    accuracy: float
    loss: float
    count: int


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
        params: The parameters, any pytree.
        data: Iterable of batches ``(x, label)`` with integer labels ``[n]``, from 0 to classes - 1;
            the last may be smaller.
        progress: Whether to show a progress bar after two seconds.

    Returns:
        The `Evaluation`.

    Raises:
        TypeError: If `data` is not an iterable, a batch is not a pair, or its labels are not
            integers; or if a leaf of `params` is a function.
        ValueError: If `params` holds NaN or infinity, `data` is empty or exhausted, a batch does
            not have one label per input or has a label that is not one of the classes, or `fn` does
            not return logits ``[n, classes]``.

    Example:
        >>> data = [(jnp.eye(3), jnp.arange(3)), (jnp.eye(3)[:1], jnp.array([2]))]
        >>> evaluate(lambda scale, x: scale * x, 50.0, data).accuracy
        0.75
    """
    check_finite(flatten_named(params, name="params")[0], name="params")
    sums = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    count, total = 0, operator.length_hint(data) or None
    bar = tqdm(labelled(data), "evaluating", total, delay=2, leave=False, disable=not progress)
    for index, x, label in bar:
        label_range = _label_range(label)
        sums, empty = _add_batch(fn, params, sums, x, label)
        classes = empty.shape[1]
        # A label out of range would make the loss NaN, or index a class from the end.
        if label_range is not None and (label_range[0] < 0 or label_range[1] >= classes):
            raise ValueError(
                f"`data`, batch {index}: labels must be from 0 to {classes - 1}, as fn returns "
                f"{classes} classes, got labels from {label_range[0]} to {label_range[1]}."
            )
        count += len(label)
    return Evaluation(int(sums[0]) / count, float(sums[1]) / count, count)


@compiled(static=1, donate=2)
def _add_batch(
    fn: Callable[..., Array], params: PyTree, sums: tuple[Array, Array], x: PyTree, label: Array
) -> tuple[tuple[Array, Array], Array]:
    """Adds a batch's number of correct answers and its summed loss to `sums`, which is donated.

    The second result is empty: its shape `[0, classes]` gives the number of classes, and the host
    can read a shape without waiting for the device.
    """
    logits = routed(fn)(params, x)
    shape = getattr(logits, "shape", ())
    if len(shape) != 2 or shape[0] != len(label):
        returned = f"shape {list(shape)}" if hasattr(logits, "shape") else type(logits).__name__
        raise ValueError(
            f"fn must return logits [n, classes]; for {len(label)} inputs it returned {returned}."
        )
    if jnp.iscomplexobj(logits):
        raise TypeError(f"fn must return real logits, got {logits.dtype}")
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    correct = jnp.sum(jnp.argmax(logits, -1) == label, dtype=jnp.int32)
    return (sums[0] + correct, sums[1] + loss.sum()), jnp.zeros((0, logits.shape[1]))


def _label_range(label: np.ndarray | Array) -> tuple[int, int] | None:
    """The lowest and highest label; None if the host cannot read them."""
    if isinstance(label, Tracer) or not getattr(label, "is_fully_addressable", True):
        return None
    values = np.asarray(label)
    return int(values.min()), int(values.max())
