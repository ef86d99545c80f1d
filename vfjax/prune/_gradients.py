"""Gradients of the loss of single examples or small batches, for the weights to prune."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import batch_size, check_classes, compiled, labelled, mesh_of
from vfjax._passes.evaluation import Loss, check_functions, one_number
from vfjax._trees import flatten_named, with_leaves
from vfjax._trees.concrete import check_one_device
from vfjax._types import Array, PyTree
from vfjax.network._inside import output_of
from vfjax.network._network import Network

# Bytes of the gradients that one call computes: on CPU what its caches hold, elsewhere a small part
# of the memory. Measured on 2 cores, per gradient: 1.0 ms one at a time and 0.34 in pieces of 16 or
# more for a convolutional network of 35,000 weights; 1.6 one at a time, 1.4 in pieces of 2 and 3.5
# in pieces of 64 for a dense one of 0.9 million; 10 to 13 ms in pieces of any size for ResNet20.
_CPU_BYTES, _BYTES = 8 << 20, 1 << 30


def cross_entropy(output: Array, label: Array) -> Array:
    """The mean cross-entropy of logits `[n, classes]` and integer labels `[n]`."""
    logs = jax.nn.log_softmax(output.astype(jnp.promote_types(output.dtype, jnp.float32)))
    return -jnp.take_along_axis(logs, label[..., None], axis=-1).mean()


def gradients(
    net: Network,
    tree: PyTree,
    leaves: Mapping[str, Any],
    data: Iterable[Any],
    *,
    loss: Loss | None,
    count: int | None,
    minibatch: int = 1,
) -> Iterator[dict[str, Array]]:
    """Yields gradients of the mean loss of successive groups of examples.

    The gradients of a batch are vmapped in equal pieces, of a size that the backend is fast with,
    which may be one.

    Args:
        net: The traced network.
        tree: Its parameters.
        leaves: The leaves to differentiate with respect to, by path.
        data: Re-iterable of `(x, label)`. Sharded batches are computed on one device.
        loss: `loss(output, label)`, the mean over a batch; None for the cross-entropy. A label is
            whatever the loss takes.
        count: Number of gradients; None for all that the data give.
        minibatch: Number of examples per gradient; the remainder of a batch is dropped.

    Yields:
        By path, `[k, *leaf]`: k gradients.

    Raises:
        TypeError: If a leaf is complex, a batch is not a pair with integer labels (with `loss`,
            numbers), or has another dtype than was traced; or if `loss` is not a function, or
            returns no number.
        ValueError: If data are empty, do not fit the network, or hold too few examples; or, without
            `loss`, if the network's output is not logits, or a label not one of the classes.
    """
    for path, leaf in leaves.items():
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"'{path}' holds complex numbers ({jnp.result_type(leaf)}), of which a gradient "
                "does not say how a loss curves; name real layers, or score by prune.magnitude"
            )
    check_functions(loss=loss)
    classes = None if loss is not None else _classes(net)
    most = _at_once(leaves)
    made = 0
    pairs = labelled(data, like=net.x, reader="the loss", classes=loss is None)
    for index, x, label in pairs:
        if classes is not None:
            check_classes(label, classes, f"`data`, batch {index}", "the network")
        if mesh_of((x, label)) is not None:
            x, label = jax.device_get((x, label))
        if not made:
            check_one_device(tree=tree, data=(x, label))
        size = batch_size(label) // minibatch
        size = size if count is None else min(size, count - made)
        # Equal pieces, so that one program serves all of them.
        step = next((n for n in range(min(size, most), 0, -1) if size % n == 0), 1)
        for start in range(0, size, step):

            def grouped(a: Any, start: int = start, step: int = step) -> Array:
                rows = a[start * minibatch : (start + step) * minibatch]
                return jnp.reshape(rows, (step, minibatch, *np.shape(a)[1:]))

            groups = jax.tree.map(grouped, (x, label))
            yield _vmapped(net, tuple(leaves), loss or cross_entropy, tree, groups)
        made += size
        if made == count:
            return
    if count is not None:
        of = "" if minibatch == 1 else f", each of {minibatch} examples of one batch,"
        raise ValueError(
            f"data gives {made} gradients{of} where {count} are wanted: give more data, or take "
            "fewer gradients"
        )


def check_count(name: str, value: Any) -> None:
    """Checks that an argument is a count: an integer above zero.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is below one.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value!r}")


def _classes(net: Network) -> int:
    """The number of classes of a network whose outputs are logits."""
    out = output_of(net)
    if not isinstance(out, jax.ShapeDtypeStruct) or len(out.shape) != 2:
        shape = jax.tree.map(lambda a: list(a.shape), out)
        raise ValueError(
            "without loss=, the network must return logits [n, classes], whose cross-entropy is "
            f"taken; it returns {shape}: give loss=, a function of the output and the labels"
        )
    return out.shape[1]


def _at_once(leaves: Mapping[str, Any]) -> int:
    """The number of gradients of these leaves that one call computes."""
    each = sum(np.size(leaf) * np.dtype(jnp.result_type(leaf)).itemsize for leaf in leaves.values())
    return max(1, (_CPU_BYTES if jax.default_backend() == "cpu" else _BYTES) // max(each, 1))


@compiled(static=3)
def _vmapped(
    net: Network, paths: tuple[str, ...], loss: Loss, tree: PyTree, groups: Any
) -> dict[str, Array]:
    leaves = flatten_named(tree)[0]

    def value(chosen: dict[str, Array], x: PyTree, label: Array) -> Array:
        return one_number(loss, "loss", net.run(with_leaves(tree, chosen), x), label)

    chosen = {path: leaves[path] for path in paths}
    return jax.vmap(jax.grad(value), (None, 0, 0))(chosen, *groups)
