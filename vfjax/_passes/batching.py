"""Checking `data`: what a pass over batches accepts, and the errors for anything else.

Statistics and renormalisation go through `batches` and evaluation through `labelled`, so all of
them accept the same things and fail with the same messages. `data` is a re-iterable of what
`apply_fn` takes as `x`, or of pairs `(x, label)`, from which `batches` drops the labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vfjax._trees.concrete import check_host, check_values
from vfjax._types import Array, PyTree

# The most that `keep` keeps, in bytes: 10,000 images of CIFAR take an eighth of it.
_KEEP_BYTES = 1 << 30


def batches(data: Iterable[Any], *, like: PyTree, name: str = "data") -> Iterator[PyTree]:
    """Iterates over the inputs in `data`, checked against the traced input.

    A batch is `x` if it has the tree structure of `like`, else it is a pair `(x, label)`. Batches
    may differ in size, and one batch is enough; a batch without samples is skipped. Each batch is
    checked on the host before anything is computed with it.

    Args:
        data: Iterable of batches. It is iterated over once per call; a caller that needs several
            passes calls again, and gets an error if `data` cannot start over.
        like: The traced input: a pytree of arrays or `jax.ShapeDtypeStruct`, batch axis first.
        name: The caller's name for the argument, for error messages.

    Yields:
        One `x` per batch, unchanged (NumPy or JAX arrays).

    Raises:
        TypeError: If `data` is not an iterable, or a batch has another structure or dtype.
        ValueError: If a batch does not have shape `[batch, *traced]`, its leaves disagree on the
            batch size, one was traced without a batch axis, or there are no batches: `data` is
            empty or already exhausted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> like = jax.ShapeDtypeStruct((8, 3), jnp.float32)
        >>> data = [(jnp.zeros((4, 3)), jnp.zeros(4, int)), (jnp.zeros((2, 3)), jnp.zeros(2, int))]
        >>> [x.shape for x in batches(data, like=like)]
        [(4, 3), (2, 3)]
    """

    def read(item: Any, where: str, whole: Any) -> PyTree:
        return _input(item, like, where, whole)

    for _, x in _each(data, name, read, form="x or (x, label)", one="[x]"):
        yield x


def labelled(
    data: Iterable[Any],
    *,
    name: str = "data",
    like: PyTree = None,
    reader: str = "accuracy",
    classes: bool = True,
) -> Iterator[tuple[int, PyTree, Any]]:
    """Iterates over the pairs `(x, label)` in `data`, checked on the host, batch by batch.

    Args:
        data: Iterable of pairs of `x`, any pytree, and its label. Batches without samples are
            skipped.
        name: The caller's name for the argument, for error messages.
        like: The traced input, which every `x` must fit, as in `batches`; None skips this check.
        reader: What needs the labels, for error messages.
        classes: Whether labels must be the numbers of classes, integers `[n]`. Otherwise a label is
            what the caller's loss takes: any pytree of numbers, each leaf `[n, ...]`.

    Yields:
        The number of the batch, `x` and the labels.

    Raises:
        TypeError: If `data` is not an iterable, a batch is not a pair, its labels are not integers
            or other numbers, or its `x` has another structure or dtype than was traced.
        ValueError: If a batch does not have one label per input, its `x` has another shape than was
            traced, or there are no batches.

    Example:
        >>> data = [(np.zeros((4, 3)), np.arange(4)), (np.zeros((0, 3)), np.arange(0))]
        >>> [(index, len(label)) for index, x, label in labelled(data)]
        [(0, 4)]
        >>> data = [(np.zeros((4, 3)), {"box": np.zeros((4, 2)), "seen": np.ones(4, bool)})]
        >>> [jax.tree.map(np.shape, label) for _, x, label in labelled(data, classes=False)]
        [{'box': (4, 2), 'seen': (4,)}]
    """

    def read(item: Any, where: str, whole: Any) -> tuple[PyTree, Any]:
        x, label = _pair(item, where, whole, reader)
        label = _class_numbers(label, where) if classes else _targets(label, where)
        _check_as_many(x, label, where)
        return x if like is None else _input(x, like, where, None), label

    for index, (x, label) in _each(data, name, read, form="(x, label)", one="[(x, label)]"):
        yield index, x, label


def _each(
    data: Iterable[Any], name: str, read: Callable[[Any, str, Any], PyTree], *, form: str, one: str
) -> Iterator[tuple[int, PyTree]]:
    """Yields number and `read(item, where, whole)` of batches with samples; raises if none has.

    For error messages, `form` is what a batch may be, and `one` a list of a single batch.
    """
    if isinstance(data, str | bytes | dict) or not isinstance(data, Iterable):
        raise TypeError(
            f"`{name}` must be an iterable of batches, each {form}, got "
            f"{type(data).__name__}; pass a list of batches for a single one: {one}"
        )
    closed = inspect.isgenerator(data) and inspect.getgeneratorstate(data) == inspect.GEN_CLOSED
    one_shot = isinstance(data, Iterator)
    any_samples = False
    for index, item in enumerate(data):
        batch = read(item, f"`{name}`, batch {index}", data if index == 0 else None)
        if batch_size(batch):
            any_samples = True
            yield index, batch
    if any_samples:
        return
    if closed or one_shot:
        raise ValueError(
            f"`{name}` gave no batches: this {type(data).__name__} is "
            f"{'' if closed else 'empty or '}exhausted, as an iterator can be read only once. Pass "
            "something that starts over each time: a list of batches, or an object whose __iter__ "
            "makes a new iterator"
        )
    raise ValueError(
        f"`{name}` gave no batches with samples in them: it is empty, or its __iter__ does not "
        f"start over on a second use. Got {type(data).__name__}"
    )


def batch_size(x: PyTree) -> int:
    """Number of samples in `x`: the length of the first axis of its leaves."""
    return int(np.shape(jax.tree.leaves(x)[0])[0])


def _input(item: Any, like: PyTree, where: str, whole: Any) -> PyTree:
    """The `x` of one batch, after every check."""
    want = jax.tree.structure(like)
    if jax.tree.structure(item) == want:
        x = item
    elif isinstance(item, tuple | list) and len(item) == 2 and jax.tree.structure(item[0]) == want:
        x = item[0]
    else:
        raise TypeError(
            f"{where} must be x or (x, label) with x of the traced structure {want}, got "
            f"{jax.tree.structure(item)}"
        )
    sizes = set()
    for (path, leaf), traced in zip(
        jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(like), strict=True
    ):
        part = f"{where}{', x' + jax.tree_util.keystr(path) if path else ''}"
        if not traced.shape:
            raise ValueError(
                f"{part} is a scalar where the network was traced, but axis 0 of every leaf of x "
                "is the batch: trace again with an array [batch], or with the scalar among the "
                "variables"
            )
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"{part} must be an array, got {type(leaf).__name__}")
        check_values("passes over data measure", **{part: leaf})
        if leaf.dtype != traced.dtype:
            raise TypeError(
                f"{part} has dtype {leaf.dtype}, but the network was traced with {traced.dtype}; "
                f"convert the batches, as in x.astype('{traced.dtype}'), or trace again"
            )
        shape = tuple(leaf.shape)
        if len(shape) != len(traced.shape) or shape[1:] != tuple(traced.shape[1:]):
            hint = ""
            if tuple(getattr(whole, "shape", ())[1:]) == tuple(traced.shape[1:]):
                hint = "; this array looks like one batch: pass a list of batches, [x]"
            elif shape == tuple(traced.shape[1:]):
                hint = "; this looks like a single example: give it its batch axis, x[None]"
            raise ValueError(
                f"{part} has shape {shape}, but the network was traced with "
                f"[{', '.join(map(str, ('batch', *traced.shape[1:])))}]{hint}"
            )
        sizes.add(shape[0])
    if len(sizes) != 1:
        raise ValueError(f"{where}: the leaves of x have different batch sizes: {sorted(sizes)}")
    return x


def _pair(item: Any, where: str, whole: Any, reader: str) -> tuple[PyTree, Any]:
    """The `x` and the labels of one batch; of these it checks only that the host can read them."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        hint = ""
        if isinstance(whole, (tuple, list)) and len(whole) == 2 and _is_pair(*whole):
            hint = "; this looks like one batch: pass a list of batches, [(x, label)]"
        raise TypeError(
            f"{where} must be a pair (x, label), got {type(item).__name__}; {reader} needs "
            f"labels{hint}"
        )
    check_host("passes over data measure", **{where: tuple(item)})
    return item[0], item[1]


def _class_numbers(label: Any, where: str) -> np.ndarray | Array:
    """Labels that are the numbers of classes, as an array."""
    try:
        label = _as_array(label)
    except (TypeError, ValueError) as error:  # ragged lists, say
        raise TypeError(
            f"{where}: labels must be integers [n], got {type(label).__name__}: {error}"
        ) from error
    if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(
            f"{where}: labels must be integers [n], got {label.dtype} {list(label.shape)}; for "
            "one-hot labels pass label.argmax(-1), for other targets give loss="
        )
    return label


def _targets(label: Any, where: str) -> PyTree:
    """Labels for a caller's loss: a pytree of arrays of numbers, each `[n, ...]`."""
    leaves = jax.tree.leaves(label)
    if isinstance(label, (list, tuple)) and all(isinstance(a, (int, float)) for a in leaves):
        label = np.asarray(label)  # numbers, one per example
    if not leaves:
        raise TypeError(f"{where}: label must hold arrays, got {label!r}")

    def target(path: Any, leaf: Any) -> np.ndarray | Array:
        part = f"{where}: label{jax.tree_util.keystr(path)}"
        array = _as_array(leaf)
        if not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)):
            raise TypeError(
                f"{part} must be an array of numbers, got {type(leaf).__name__} {leaf!r}"
            )
        if not array.ndim:
            raise ValueError(
                f"{part} must have one entry per input, got the single number {leaf!r}"
            )
        return array

    return jax.tree_util.tree_map_with_path(target, label)


def _check_as_many(x: PyTree, label: PyTree, where: str) -> None:
    """Checks that inputs and labels are equally many."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(label):
        if sizes == {leaf.shape[:1]}:
            continue
        lengths = ", ".join(str(size[0]) if size else "a scalar" for size in sorted(sizes))
        raise ValueError(
            f"{where}: x and label{jax.tree_util.keystr(path)} must be equally many, got "
            f"{len(leaf)} labels for {lengths or 'nothing'}"
        )


def check_classes(label: Any, classes: int, where: str, fn: str) -> None:
    """Checks that class numbers are from 0 to `classes - 1`, where the host can read them.

    A label out of range would index a class from the end, or make the loss NaN or its gradient 0.

    Args:
        label: Integers `[n]`.
        classes: Number of classes.
        where: Names the batch.
        fn: What returns logits of so many classes.

    Raises:
        ValueError: If one is out of range.
    """
    if isinstance(label, Tracer) or not getattr(label, "is_fully_addressable", True):
        return
    values = np.asarray(label)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{where}: labels must be from 0 to {classes - 1}, as {fn} returns {classes} classes, "
            f"got labels from {low} to {high}."
        )


def _as_array(values: Any) -> np.ndarray | Array:
    """Returns arrays of NumPy and JAX unchanged, anything else as a NumPy array."""
    return values if isinstance(values, np.ndarray | jax.Array) else np.asarray(values)


def _is_pair(x: Any, label: Any) -> bool:
    """Whether these are an input and its labels rather than two inputs."""
    try:
        label = _as_array(label)
        if label.ndim == 1 and jnp.issubdtype(label.dtype, jnp.integer):
            return True
        return _as_array(x).ndim != label.ndim
    except (TypeError, ValueError):  # not arrays
        return False


def keep(items: Iterable[Any], again: Iterable[Any]) -> Iterable[Any]:
    """Reads items once and keeps their arrays on the device, unless they are too large.

    Args:
        items: Pytrees of arrays, already checked.
        again: The iterable to return if they are too large, from which they can be read again.

    Returns:
        A list of the items, or `again`.

    Example:
        >>> import numpy as np
        >>> kept = keep((np.ones(2) for _ in range(3)), again=())
        >>> len(kept), isinstance(kept[0], jax.Array)
        (3, True)
    """
    kept, size = [], 0
    for item in items:
        kept.append(jax.tree.map(jnp.asarray, item))
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(kept[-1]))
        if size > _KEEP_BYTES:
            return again
    return kept


def check_finite_means(means: Mapping[str, Any], *, name: str = "data") -> None:
    """Raises a ValueError if a pass over data met NaN or infinity at a site.

    Args:
        means: Means by site, whatever their shapes; on the host or on a device.
        name: The caller's name for the data, for the error message.
    """
    for site, mean in means.items():
        bad = int(np.size(mean) - np.count_nonzero(np.isfinite(np.asarray(mean))))
        if bad:
            raise ValueError(
                f"{name} gives NaN or infinite values in {bad} of {np.size(mean)} channels of "
                f"'{site}': look for them in the batches, or for values that overflow the network"
            )
