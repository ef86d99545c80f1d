"""Where the arrays of trees are: numbers at hand, outside of any trace, on one device."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from vfjax._types import PyTree


def check_host(what: str, **trees: PyTree) -> None:
    """Checks that arguments hold numbers that the host can read.

    Args:
        what: What is done on the host, as "passes over data measure".
        **trees: By name, arguments of any kind.

    Raises:
        TypeError: If one holds traced values, as inside `jit`, `grad` or `vmap`, or shapes alone;
            or if a trace is under way in which whatever is computed has no value yet.
    """
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)):
                raise TypeError(_no_number(leaf, name + jax.tree_util.keystr(path), what))
    # Inside `jit` even a sum of numbers is traced.
    if isinstance(jax.lax.add(0, 0), Tracer):
        raise TypeError(
            f"{what} on the host, with numbers, which there are not inside a function that jit or "
            f"scan traces: call it outside ({', '.join(trees)})"
        )


def check_values(what: str, **trees: PyTree) -> None:
    """As `check_host`, but traced values may pass."""
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise TypeError(_no_number(leaf, name + jax.tree_util.keystr(path), what))


def _no_number(leaf: Any, where: str, what: str) -> str:
    if isinstance(leaf, Tracer):
        return (
            f"{where} is a traced value ({leaf.aval.str_short()}), as inside jit, grad or vmap, "
            f"but {what} on the host, with numbers: call the function outside, on arrays"
        )
    return (
        f"{where} is a jax.ShapeDtypeStruct, a shape without numbers, and {what} with numbers: "
        "pass arrays, or call the function under jax.eval_shape"
    )


def check_one_device(**trees: PyTree) -> None:
    """Checks that arrays which are computed with together can be.

    Arrays that are committed to no device follow the others, and arrays on several devices are left
    to JAX.

    Args:
        **trees: By name, arguments of any kind.

    Raises:
        ValueError: If two arrays are committed to two devices.
    """
    first = None
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
                continue
            if not getattr(leaf, "committed", False) or len(leaf.devices()) != 1:
                continue
            (device,) = leaf.devices()
            where = name + jax.tree_util.keystr(path)
            if first is None:
                first = device, where
            elif device != first[0]:
                raise ValueError(
                    f"{first[1]} lies on {first[0]} and {where} on {device}, and arrays on "
                    "different devices cannot be computed with together: move one of them, with "
                    "jax.device_put"
                )
