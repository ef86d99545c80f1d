"""Gradients of the loss of single examples, or of small batches, by the weights to prune."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax import _tree
from vfjax._batches import labelled
from vfjax._streaming import vmapped
from vfjax.network import Network

Array = jax.Array
PyTree = Any
Loss = Callable[[PyTree, Array], Array]


def cross_entropy(output: Array, label: Array) -> Array:
    """The mean cross-entropy of logits `[n, classes]` and integer labels `[n]`."""
    logs = jax.nn.log_softmax(output)
    return -jnp.take_along_axis(logs, label[..., None], axis=-1).mean()


def gradients(
    net: Network,
    tree: PyTree,
    paths: Sequence[str],
    data: Iterable[Any],
    *,
    loss: Loss | None,
    count: int | None,
    minibatch: int = 1,
) -> Iterator[dict[str, Array]]:
    """Gradients of the mean loss of successive groups of examples.

    On CPU each is a compiled call of its own, since a convolution with a gradient per example is
    slow there; elsewhere those of a batch are vmapped.

    Args:
        net: The traced network.
        tree: Its parameters.
        paths: Leaves to differentiate by.
        data: Re-iterable of `(x, label)`.
        loss: `loss(output, label)`, the mean over a batch; None for the cross-entropy.
        count: How many gradients to take, None for all that data give.
        minibatch: How many examples make one; what is left of a batch is dropped.

    Yields:
        By path, `[k, *leaf]`: k gradients.

    Raises:
        ValueError: If data are empty, or hold too few examples.
    """
    loss = cross_entropy if loss is None else loss
    left = count
    for _, x, label in labelled(data):
        size = np.shape(label)[0] // minibatch
        size = size if left is None else min(size, left)
        if size:
            groups = jax.tree.map(
                lambda a, n=size: jnp.reshape(a[: n * minibatch], (n, minibatch, *np.shape(a)[1:])),
                (x, label),
            )
            if vmapped():
                yield _all(net, tuple(paths), loss, tree, groups)
            else:
                for k in range(size):
                    one = jax.tree.map(lambda a, k=k: a[k], groups)
                    found = _one(net, tuple(paths), loss, tree, *one)
                    yield {path: leaf[None] for path, leaf in found.items()}
        if left is not None:
            left -= size
            if not left:
                return
    if count is not None and left:
        raise ValueError(
            f"data has examples for {count - left} gradients of {count}, at {minibatch} each: give "
            "more data, or take fewer gradients"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _one(
    net: Network, paths: tuple[str, ...], loss: Loss, tree: PyTree, x: PyTree, label: Array
) -> dict[str, Array]:
    leaves = _tree.flatten_named(tree)[0]

    def value(chosen: dict[str, Array]) -> Array:
        return loss(net.run(_tree.with_leaves(tree, chosen), x), label)

    return jax.grad(value)({path: leaves[path] for path in paths})


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _all(
    net: Network, paths: tuple[str, ...], loss: Loss, tree: PyTree, groups: Any
) -> dict[str, Array]:
    return jax.vmap(lambda one: _one(net, paths, loss, tree, *one))(groups)
