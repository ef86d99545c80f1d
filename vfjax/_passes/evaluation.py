"""Score and loss of a network on labelled batches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from vfjax._jaxpr import routed
from vfjax._passes.batching import batch_size, check_classes, labelled
from vfjax._passes.programs import compiled
from vfjax._trees import check_finite, flatten_named
from vfjax._trees.concrete import check_host, check_one_device
from vfjax._types import Array, PyTree

# Of an output and its labels, the mean over the batch.
Loss = Callable[[PyTree, Any], Array]


class Evaluation(NamedTuple):
    """Score and mean loss over `count` examples.

    Attributes:
        accuracy: Accuracy in [0, 1], or the mean of the caller's `score`; None with a `loss` whose
            labels are not the numbers of classes.
        loss: Mean cross-entropy in nats, or the mean of the caller's `loss`.
        count: Number of examples.
    """

    accuracy: float | None
    loss: float
    count: int


def evaluate(
    fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    data: Iterable[tuple[Any, Any]],
    *,
    loss: Loss | None = None,
    score: Loss | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measures accuracy and cross-entropy, or another score and loss, one compiled call per batch.

    Args:
        fn: Pure function ``(params, x) -> logits [n, classes]``, or with `loss` to any output.
            Calls with equal functions and equal shapes share one compilation, so pass the same
            functions each time, not a new ``lambda``.
        params: The parameters, any pytree.
        data: Iterable of batches ``(x, label)``; the last may be smaller. Labels are integers
            ``[n]``, from 0 to classes - 1, or with `loss` what that takes: any pytree of arrays
            ``[n, ...]``.
        loss: ``loss(output, label)``, the mean over a batch; None for the cross-entropy.
        score: ``score(output, label)``, the mean over a batch of what is to be high; None for the
            accuracy, where labels are integers ``[n]`` and outputs are logits ``[n, classes]``.
        progress: Whether to show a progress bar after two seconds.

    Returns:
        The `Evaluation`.

    Raises:
        TypeError: If `data` is not an iterable, a batch is not a pair, or its labels are not
            integers (with `loss`, not numbers); if `loss` or `score` is not a function, or does not
            return a number; or if a leaf of `params` is a function.
        ValueError: If `params` holds NaN or infinity, `data` is empty or exhausted, or a batch does
            not have one label per input; and without `loss` if a label is not one of the classes,
            or `fn` does not return logits ``[n, classes]``.

    Example:
        >>> data = [(jnp.eye(3), jnp.arange(3)), (jnp.eye(3)[:1], jnp.array([2]))]
        >>> evaluate(lambda scale, x: scale * x, 50.0, data).accuracy
        0.75
        >>> mse = lambda y, target: jnp.square(y - target).mean()
        >>> data = [(jnp.ones((4, 1)), jnp.ones((4, 1)))]
        >>> evaluate(lambda scale, x: scale * x, 2.0, data, loss=mse)
        Evaluation(accuracy=None, loss=1.0, count=4)
    """
    check_host("evaluation measures", params=params)
    check_finite(flatten_named(params, name="params")[0], name="params")
    check_functions(loss=loss, score=score)
    scored = jnp.zeros((), jnp.int32 if score is None else jnp.float32)
    sums = scored, jnp.zeros((), jnp.float32)
    count, known, total = 0, True, operator.length_hint(data) or None
    reader = "accuracy" if loss is None else "the loss"
    pairs = labelled(data, reader=reader, classes=loss is None)
    bar = tqdm(pairs, "evaluating", total, delay=2, leave=False, disable=not progress)
    for index, x, label in bar:
        if not index:
            check_one_device(params=params, data=(x, label))
        sums, empty = _add_batch(fn, loss, score, params, sums, x, label)
        if loss is None:
            check_classes(label, empty.shape[1], f"`data`, batch {index}", "fn")
        known = known and (score is not None or empty.shape[1] > 0)
        count += batch_size(label)
    return Evaluation(float(sums[0]) / count if known else None, float(sums[1]) / count, count)


@compiled(static=3, donate=4)
def _add_batch(
    fn: Callable[..., PyTree],
    loss: Loss | None,
    score: Loss | None,
    params: PyTree,
    sums: tuple[Array, Array],
    x: PyTree,
    label: Any,
) -> tuple[tuple[Array, Array], Array]:
    """Adds a batch's score and loss, times its examples, to `sums`, which is donated.

    The second result is empty: its shape `[0, classes]` gives the number of classes, and the host
    can read a shape without waiting for the device. Outputs that are not logits have none.
    """
    out, count = routed(fn)(params, x), batch_size(label)
    classes = _classes(out, label)
    if loss is None:
        if not classes:
            raise ValueError(
                f"fn must return logits [n, classes]; for {count} inputs it returned "
                f"{described(out)}. With other outputs, give loss=."
            )
        if jnp.iscomplexobj(out):
            raise TypeError(f"fn must return real logits, got {out.dtype}")
        logits = out.astype(jnp.float32)
        missed = optax.softmax_cross_entropy_with_integer_labels(logits, label).sum()
    else:
        missed = one_number(loss, "loss", out, label).astype(jnp.float32) * count
    if score is not None:
        hit = one_number(score, "score", out, label).astype(jnp.float32) * count
    elif classes:
        hit = jnp.sum(jnp.argmax(out.astype(jnp.float32), -1) == label, dtype=jnp.int32)
    else:
        hit = 0
    return (sums[0] + hit, sums[1] + missed), jnp.zeros((0, classes))


def _classes(out: PyTree, label: Any) -> int:
    """Number of classes, if outputs are logits and labels numbers of classes; else 0."""
    plain = hasattr(label, "shape") and jnp.issubdtype(label.dtype, jnp.integer)
    if not plain or not hasattr(out, "shape") or label.ndim != 1 or len(out.shape) != 2:
        return 0
    return out.shape[1] if out.shape[0] == len(label) else 0


def described(value: Any) -> str:
    """What was returned in place of an array of a given shape, for messages."""
    return f"shape {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def check_functions(**functions: Any) -> None:
    """Raises a TypeError unless `loss=` or `score=` is a function or None."""
    for name, fn in functions.items():
        if fn is not None and not callable(fn):
            raise TypeError(
                f"{name} must be a function {name}(output, label), the mean over a batch, or None; "
                f"it was {fn!r}"
            )


def one_number(fn: Loss, name: str, out: PyTree, label: Any) -> Array:
    """What a caller's loss or score makes of an output: one real number.

    Args:
        fn: The loss or the score.
        name: Its name, for error messages.
        out: The output.
        label: The labels.

    Raises:
        TypeError: If it returns anything else, or cannot be traced.
    """
    try:
        value = fn(out, label)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(
            f"{name}(output, label) reads numbers while it is compiled: write it in jax.numpy, "
            "without NumPy functions or branches on values"
        ) from error
    shape = getattr(value, "shape", ())
    number = isinstance(value, (int, float)) or hasattr(value, "dtype")
    if number and not shape and not jnp.iscomplexobj(value):
        return jnp.asarray(value)
    raise TypeError(
        f"{name}(output, label) must return one real number, the mean over the batch; it returned "
        f"{described(value) if shape or not number else value.dtype}"
        + ("; take its mean" if shape else "")
    )
