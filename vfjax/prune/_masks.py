"""Masks of exact sparsity from scores, and pruned trees from masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees import flatten_named, like_leaf, on_host, some
from vfjax._trees.concrete import check_one_device, check_values
from vfjax._types import PyTree
from vfjax.prune._scores import Scores

SCOPES = ("global", "layer", "row")


def masks(
    scores: Scores,
    sparsity: float | None = None,
    *,
    scope: str | tuple[int, int] = "global",
) -> PyTree:
    """Masks the weights with the lowest scores; all others stay.

    Of the n weights in each scope exactly `floor(sparsity * n + 1/2)` go: at 0.9 all of a row of 4.
    Among equal scores, weights of layers that are evaluated earlier go first, and within a layer
    those that come first in its leaf, row-major.

    Args:
        scores: The scores from `magnitude`, `fisher`, `wanda` or `woodfisher`.
        sparsity: Share of the weights to prune, from 0 to 1; None with N:M.
        scope: The set of weights that has this sparsity: `"global"`, all weights together;
            `"layer"`, each layer; `"row"`, each output of a layer, as in Wanda; or `(n, m)`: of
            every m consecutive inputs of an output, in the order of the leaf, n stay. In a
            convolution these are channels of one pixel.

    Returns:
        A tree like that of the scores: bool arrays of the leaves' shapes where weights may be
        pruned, `True` everywhere else.

    Raises:
        TypeError: If `scores` is not a `Scores`.
        ValueError: If `sparsity` is not from 0 to 1, is missing, or is given together with N:M, if
            `scope` is unknown, or if m does not divide the inputs of a layer.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> tree = {"w": jnp.array([[1.0], [-3.0], [2.0], [0.5]]), "b": jnp.zeros(1)}
        >>> net = vfjax.trace(lambda v, x: x @ v["w"] + v["b"], tree, jnp.ones((1, 4)))
        >>> scores = vfjax.prune.magnitude(net, tree)
        >>> masks(scores, 0.5)["w"].ravel().tolist(), masks(scores, 0.5)["b"]
        ([False, True, True, False], True)
        >>> masks(scores, scope=(1, 2))["w"].ravel().tolist()
        [False, True, True, False]
    """
    if not isinstance(scores, Scores):
        raise TypeError(
            "scores must be Scores, as vfjax.prune.magnitude returns them (those of an "
            f"InverseFisher are its `.scores`), got {type(scores).__name__}"
        )
    pattern = _pattern(scope)
    if pattern is None and (sparsity is None or not 0 <= sparsity <= 1):
        raise ValueError(f"sparsity must be a share from 0 to 1 (0.8 is 80%), got {sparsity!r}")
    if pattern is not None and sparsity is not None:
        raise ValueError(f"sparsity follows from scope={scope!r}: leave it out, got {sparsity!r}")
    kept = {path: np.ones(value.size, bool) for path, value in scores.values.items()}
    chosen = _global(scores, sparsity) if scope == "global" else _local(scores, sparsity, scope)
    for path, places in chosen:
        kept[path][places] = False
    shaped = {path: mask.reshape(scores.values[path].shape) for path, mask in kept.items()}
    flat, treedef = flatten_named(scores.like)
    return jax.tree.unflatten(treedef, [shaped.get(path, True) for path in flat])


def apply(tree: PyTree, mask: PyTree) -> PyTree:
    """Prunes a tree: sets the masked weights to zero.

    Args:
        tree: The tree to prune.
        mask: A mask from `masks`, for a tree of the same structure.

    Returns:
        A tree of the same dtypes and containers, which in the mask may be others. Works under
        `jit` and `grad`.

    Raises:
        ValueError: If a mask has another structure or shape than the tree.

    Example:
        >>> import jax.numpy as jnp
        >>> apply({"w": jnp.array([1.0, 2.0])}, {"w": np.array([True, False])})["w"].tolist()
        [1.0, 0.0]
    """
    return _masked(tree, mask_of(tree, mask))


def sparsity(mask: PyTree) -> float:
    """The share of weights that a mask prunes, among the leaves that it masks.

    Args:
        mask: A mask from `masks`. If only some layers of a stacked leaf were scored, the others
            count as well, since they lie in the same leaf.

    Returns:
        The share, from 0 to 1.

    Raises:
        TypeError: If a leaf holds anything other than bools.
        ValueError: If no leaf is masked.

    Example:
        >>> sparsity({"w": np.array([True, False]), "b": True})
        0.5
    """
    parts = [np.asarray(kept) for kept in jax.tree.leaves(mask) if np.ndim(kept)]
    if not parts:
        raise ValueError("mask masks no leaf")
    if any(part.dtype != bool for part in parts):
        raise TypeError("mask must hold bools, as vfjax.prune.masks returns them; got other leaves")
    return 1 - sum(int(kept.sum()) for kept in parts) / sum(kept.size for kept in parts)


def keep(mask: PyTree) -> Any:
    """An optax transformation that keeps pruned weights at zero while the others are trained.

    It does not prune: train the tree that `apply` returned.

    Args:
        mask: A mask from `masks`; for Flax variables `mask["params"]`, if only these are trained.

    Returns:
        A stateless `optax.GradientTransformation`, to be put last in a chain. It also works in
        `optax.masked`, with `jax.tree.map(lambda kept: np.ndim(kept) > 0, mask)`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params, mask = {"w": jnp.array([1.0, 0.0])}, {"w": np.array([True, False])}
        >>> optimiser = optax.chain(optax.sgd(0.5), keep(mask))
        >>> updates, _ = optimiser.update({"w": jnp.ones(2)}, optimiser.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].tolist()
        [0.5, 0.0]
    """
    import optax

    by_path = flatten_named(mask, name="mask")[0]

    def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
        del params
        _check_shapes(flatten_named(updates, name="updates")[0], by_path, "updates")
        return _masked(updates, by_path)

    return optax.stateless(update)


def mask_of(tree: PyTree, mask: PyTree) -> dict[str, Any]:
    """The masks of a tree by path.

    Args:
        tree: The tree.
        mask: A mask from `masks`, for a tree of the same structure.

    Returns:
        By path, a bool array of the leaf's shape or a single bool.

    Raises:
        ValueError: If a mask has another structure or shape than the tree.
    """
    by_path, leaves = flatten_named(mask, name="mask")[0], flatten_named(tree, name="tree")[0]
    if differ := sorted(by_path.keys() ^ leaves.keys()):
        raise ValueError(
            "mask must have the structure of the tree: make it from scores of that tree, with "
            f"vfjax.prune.masks. Only one of them has {some(differ)}"
        )
    _check_shapes(leaves, by_path, "tree")
    return by_path


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` lowest of values `[n]`, the first ones among equals; bool `[n]`."""
    if not 0 < count < len(values):
        return np.full(len(values), count > 0)
    limit = np.partition(values, count - 1)[count - 1]
    low = values < limit
    ties = np.flatnonzero(values == limit)[: count - np.count_nonzero(low)]
    low[ties] = True
    return low


def _pattern(scope: Any) -> tuple[int, int] | None:
    """The `(n, m)` of an N:M scope, or None."""
    if isinstance(scope, str) and scope in SCOPES:
        return None
    if (
        isinstance(scope, tuple)
        and len(scope) == 2
        and all(hasattr(k, "__index__") for k in scope)
        and 0 <= scope[0] <= scope[1]
        and scope[1] > 0
    ):
        return scope
    raise ValueError(
        f"scope must be one of {', '.join(SCOPES)}, or (n, m) with 0 <= n <= m, got {scope!r}"
    )


def _global(scores: Scores, sparsity: float | None) -> Iterator[tuple[str, np.ndarray]]:
    """Leaves and places of the weights that go, among all weights together."""
    places = {name: np.sort(rows, axis=None) for name, rows in scores.rows.items()}
    values = [scores.values[scores.paths[name]].reshape(-1)[at] for name, at in places.items()]
    whole = np.concatenate(values)
    pruned = lowest(whole, _count(sparsity, whole.size))
    ends = np.cumsum([at.size for at in places.values()])[:-1]
    for (name, at), gone in zip(places.items(), np.split(pruned, ends), strict=True):
        yield scores.paths[name], at[gone]


def _local(
    scores: Scores, sparsity: float | None, scope: str | tuple[int, int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Leaves and places of the weights that go, in each layer, row or part of a row."""
    for name, rows in scores.rows.items():
        if scope == "layer":
            rows = rows.reshape(1, -1)
        elif not isinstance(scope, str):
            if rows.shape[1] % scope[1]:
                raise ValueError(
                    f"scope={scope!r}: layer '{name}' has {rows.shape[1]} inputs per output, which "
                    f"{scope[1]} does not divide; leave it out of the scores' `names`, as "
                    "`prunable(net, first=False)` does the first"
                )
            rows = rows.reshape(-1, scope[1])
        size = rows.shape[1]
        count = _count(sparsity, size) if isinstance(scope, str) else scope[1] - scope[0]
        places = np.sort(rows, axis=1)  # so that among equals the first in the leaf goes
        values = scores.values[scores.paths[name]].reshape(-1)[places]
        ranked = np.argsort(values, axis=1, kind="stable")[:, :count]
        yield scores.paths[name], np.take_along_axis(places, ranked, 1)


def _count(sparsity: float | None, size: int) -> int:
    assert sparsity is not None
    return math.floor(float(sparsity) * size + 0.5)  # a float32 would round the product


def _check_shapes(leaves: Mapping[str, Any], mask: Mapping[str, Any], name: str) -> None:
    for path, leaf in leaves.items():
        if path not in mask:
            raise ValueError(
                f"{name} has a leaf '{path}', which mask lacks: make it from that tree; "
                "an optimiser of Flax `params` takes mask['params']"
            )
        if np.shape(mask[path]) not in ((), np.shape(leaf)):
            raise ValueError(
                f"mask has shape {np.shape(mask[path])} at '{path}', where {name} has "
                f"{np.shape(leaf)}"
            )


def _masked(tree: PyTree, mask: Mapping[str, Any]) -> PyTree:
    """A tree with zeros where a fitting mask, given by path, is False."""
    flat, treedef = flatten_named(tree)
    check_values("pruning works", tree=tree)

    def masked(leaf: Any, kept: Any) -> Any:
        if kept is True:
            return leaf
        if on_host(leaf, kept):
            return like_leaf(np.where(kept, leaf, 0), leaf)
        return jnp.where(kept, leaf, jnp.zeros_like(leaf))

    try:
        pruned = [masked(leaf, mask[path]) for path, leaf in flat.items()]
    except ValueError:
        check_one_device(tree=tree, mask=dict(mask))
        raise
    return jax.tree.unflatten(treedef, pruned)
