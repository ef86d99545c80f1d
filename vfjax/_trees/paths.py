"""Parameter trees by path: naming leaves, comparing trees, and the errors when they do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from vfjax._trees.leaves import is_known, native
from vfjax._types import PyTree


class Flat(NamedTuple):
    """A tree flattened by path, as returned by `flatten_named`.

    Attributes:
        leaves: The leaves by path, in the tree's own order.
        treedef: The tree's structure.
    """

    leaves: dict[str, Any]
    treedef: Any

    def tree(self) -> PyTree:
        """Rebuilds the tree."""
        return jax.tree.unflatten(self.treedef, list(self.leaves.values()))

    def only(self, paths: Collection[str]) -> PyTree:
        """The tree with None in place of the leaves that are not at some paths."""
        kept = [leaf if path in paths else None for path, leaf in self.leaves.items()]
        return jax.tree.unflatten(self.treedef, kept)

    def part(self, paths: Collection[str]) -> Flat:
        """The same as `only`, flattened."""
        kept = {path: leaf for path, leaf in self.leaves.items() if path in paths}
        return Flat(kept, jax.tree.structure(self.only(paths)))

    def put(self, leaves: Mapping[str, Any]) -> Flat:
        """The same structure with some of its leaves replaced.

        Args:
            leaves: New leaves by path; those at other paths are ignored.
        """
        replaced = {path: leaves.get(path, leaf) for path, leaf in self.leaves.items()}
        return Flat(replaced, self.treedef)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_named(tree: PyTree, *, name: str = "variables", deleted: bool = False) -> Flat:
    """Flattens a tree into a dict from leaf path to leaf.

    Paths read like `params/Conv_0/kernel`. The `/value` that Flax NNX appends is left out, so that
    names agree between APIs. If keys contain slashes and paths would coincide, those paths read
    like `['a/b']` instead.

    Arrays in another byte order than this machine's come back in its own, as JAX has no other.

    Args:
        tree: A pytree of arrays. None counts as an absent subtree, as everywhere in JAX.
        name: What to call the tree in an error.
        deleted: Whether leaves may be deleted, as where only their shapes matter.

    Returns:
        The leaves by path, in the tree's own order, and the tree's structure.

    Raises:
        TypeError: If a leaf is not an array of numbers: a function or a module, for example.
        ValueError: If an array has been deleted.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = _named([path for path, _ in flat])
    leaves = {path: native(leaf) for path, (_, leaf) in zip(names, flat, strict=True)}
    for path, leaf in leaves.items():
        check_leaf(leaf, path, name)
        if not deleted:
            _check_kept(leaf, path, name)
    return Flat(leaves, treedef)


def _named(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names of leaves by their paths; see `flatten_named`."""
    names = [_name(path) for path in paths]
    attribute = jax.tree_util.GetAttrKey("value")  # of NNX, unlike a dict's key "value"
    whole = all(n.endswith("/value") for n in names)
    short = [
        n.removesuffix("/value") if whole or path[-1:] == (attribute,) else n
        for n, path in zip(names, paths, strict=True)
    ]
    names = short if len(set(short)) == len(short) else names
    if len(set(names)) < len(names):
        counts = Counter(names)
        full = (jax.tree_util.keystr(path) for path in paths)
        names = [n if counts[n] == 1 else f for n, f in zip(names, full, strict=True)]
    return names


def check_leaf(leaf: Any, path: str, name: str) -> None:
    """Raises a TypeError unless a leaf is an array, a number or a `ShapeDtypeStruct`."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        if isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in "OSUmM":
            raise TypeError(
                f"{name} has an array of dtype {leaf.dtype} at '{path or '.'}'; every leaf must be "
                "an array of numbers."
            )
        if isinstance(leaf, (np.ndarray, np.generic)) and not is_known(leaf.dtype):
            raise TypeError(
                f"{name} has an array of dtype {leaf.dtype} at '{path or '.'}', which JAX does not "
                "have; convert it with `.astype`, or keep it out of the tree."
            )
        return
    if isinstance(leaf, (bool, int, float, complex)):
        return
    if callable(leaf):
        raise TypeError(
            f"{name} has a function at '{path or '.'}': {leaf!r}. Every leaf must be an array; for "
            "an Equinox module, pass its arrays: `params, static = eqx.partition(module, "
            "eqx.is_array)` with `apply_fn = lambda p, x: eqx.combine(p, static)(x)`."
        )
    if not path:
        raise TypeError(
            f"{name} is a {type(leaf).__name__}; it must be a tree of arrays, such as a model's "
            "variables."
        )
    raise TypeError(
        f"{name} has a {type(leaf).__name__} at '{path}'; every leaf must be an array. Keep "
        "configuration out of the tree, in `apply_fn`."
    )


def _check_kept(leaf: Any, path: str, name: str) -> None:
    """Raises a ValueError if an array is gone, as a donated one is."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
        raise ValueError(
            f"{name} has a deleted array at '{path or '.'}': it was donated to a compiled "
            "function, such as a training step, or deleted. Pass the arrays that this function "
            "returned, or a copy made before."
        )


def with_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """The tree with some leaves replaced, or put in place of None.

    Args:
        tree: A parameter tree.
        leaves: New leaves by path.

    Returns:
        A new tree with the same containers.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    names = _named([path for path, _ in flat])
    return jax.tree.unflatten(
        treedef, [leaves.get(name, leaf) for name, (_, leaf) in zip(names, flat, strict=True)]
    )


def leaf_paths(tree: PyTree) -> list[str]:
    """Paths of a tree's leaves, such as `params/Conv_0/kernel`, in the tree's own order."""
    return _named([path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]])


def check_trees(
    trees: Sequence[PyTree], *, name: str = "trees", finite: bool = True
) -> tuple[Flat, ...]:
    """Checks that trees can be merged: same leaves, same shapes and dtypes, finite numbers.

    Args:
        trees: Parameter trees of models of one architecture.
        name: What to call them in an error.
        finite: Whether to look for NaN and infinity too (never in tracers or abstract values).

    Returns:
        The flattened trees.

    Raises:
        TypeError: If `trees` is not a sequence of trees, or a leaf is not an array.
        ValueError: If there are none, they differ, or one holds NaN or infinity.
    """
    check_sequence(trees, name=name)
    flats = tuple(flatten_named(tree, name=f"{name}[{k}]") for k, tree in enumerate(trees))
    check_alike([flat.leaves for flat in flats], name=name, finite=finite)
    return flats


def check_alike(
    flats: Sequence[Mapping[str, Any]], *, name: str = "trees", finite: bool = True
) -> None:
    """Does the checks of `check_trees` on trees that are already leaves by path."""
    for k, flat in enumerate(flats):
        if k:
            check_like(flat, flats[0], name=f"{name}[{k}]", other=f"{name}[0]")
        if finite:
            check_finite(flat, name=f"{name}[{k}]")


def check_sequence(trees: Any, *, name: str) -> None:
    """Raises a TypeError unless `trees` is a sequence, and a ValueError if it is empty."""
    if isinstance(trees, (Mapping, str)) or not isinstance(trees, Sequence):
        raise TypeError(
            f"{name} must be a list or tuple of parameter trees, one per model; it was a "
            f"{type(trees).__name__}."
        )
    if not trees:
        raise ValueError(f"{name} is empty; give at least one parameter tree.")


def check_like(
    flat: Mapping[str, Any],
    like: Mapping[str, Any],
    *,
    name: str,
    other: str,
    paths: Iterable[str] = (),
) -> None:
    """Checks that two named trees have the same leaves, shapes and dtypes.

    Args:
        flat: Leaves by path.
        like: Leaves by path, to compare with.
        name: What to call the first in an error.
        other: What to call the second.
        paths: All paths of the tree, if `flat` is a part of it.

    Raises:
        ValueError: If they differ; the message names the first leaf that does.
    """
    missing, extra = sorted(like.keys() - flat.keys()), sorted(flat.keys() - like.keys())
    if missing or extra:
        parts = [f"lacks {missing[:3]}"] if missing else []
        parts += [f"has the extra {extra[:3]}"] if extra else []
        raise ValueError(
            f"{name} differs in structure from {other}: it {' and '.join(parts)}"
            f"{' and more' if len(missing) > 3 or len(extra) > 3 else ''}. Merged models must "
            f"share one architecture.{structure_hint(name, {*flat, *paths}, like)}"
        )
    for path, leaf in flat.items():
        a, b = np.shape(leaf), np.shape(like[path])
        if a != b:
            raise ValueError(
                f"{name} has shape {a} at '{path}' where {other} has {b}. Merged models must share "
                "one architecture."
            )
        p, q = jax.numpy.result_type(leaf), jax.numpy.result_type(like[path])
        if p != q:
            raise ValueError(
                f"{name} has dtype {p} at '{path}' where {other} has {q}; cast one of them first, "
                "e.g. `jax.tree.map(lambda a, b: a.astype(b.dtype), tree, other)`."
            )


def structure_hint(name: str, flat: Iterable[str], like: Iterable[str]) -> str:
    """A sentence on which part of a tree has the paths that it should have, if one has.

    Example:
        >>> structure_hint("tree", ["params/w", "opt_state/count"], ["w"])
        " Its part 'params' has the right structure: pass that."
        >>> structure_hint("tree", ["w"], ["params/w"])
        " It has the structure of the part 'params': pass {'params': tree}."
    """
    have, want = set(flat), set(like)
    if not want or not have:
        return ""
    for head in sorted({path.partition("/")[0] for path in have if "/" in path}):
        inside = {path.removeprefix(f"{head}/") for path in have if path.startswith(f"{head}/")}
        if want <= inside:
            return f" Its part '{head}' has the right structure: pass that."
        if want <= {f"{head}/{path}" for path in inside}:
            return f" It has more than it should: pass its '{head}' alone, as {{'{head}': ...}}."
    for head in sorted({path.partition("/")[0] for path in want if "/" in path}):
        if want <= {f"{head}/{path}" for path in have}:
            return f" It has the structure of the part '{head}': pass {{'{head}': {name}}}."
    return ""


def check_finite(flat: Mapping[str, Any], *, name: str) -> None:
    """Raises a ValueError if a concrete leaf holds NaN or infinity."""
    for path, leaf in flat.items():
        if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)):
            continue
        dtype = jax.numpy.result_type(leaf)
        if not jax.numpy.issubdtype(dtype, jax.numpy.inexact):
            continue
        if isinstance(leaf, jax.Array) and any(d.platform != "cpu" for d in leaf.devices()):
            # Under a trace, operations on a concrete leaf would be staged out; evaluate them now.
            with jax.ensure_compile_time_eval():
                finite = np.asarray(jax.numpy.isfinite(leaf))
        else:
            # In the host's memory: nothing to copy, and nothing to compile for each shape.
            finite = np.isfinite(np.asarray(leaf))
        bad = finite.size - np.count_nonzero(finite)
        if bad:
            raise ValueError(
                f"{name} holds {bad} NaN or infinite value{'s' if bad > 1 else ''} at '{path}' (of "
                f"{np.size(leaf)}). Did its training diverge?"
            )


def some(names: Iterable[str]) -> str:
    """The first few of many names, quoted, for a message.

    Example:
        >>> some("abcdefgh")
        "'a', 'b', 'c', 'd', 'e' and 3 more"
    """
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:5])
    return (shown or "none") + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def without(tree: PyTree, paths: Collection[str]) -> PyTree:
    """The tree with None in place of the leaves at some paths."""
    flat = flatten_named(tree)
    return flat.only(flat.leaves.keys() - paths)
