"""Testing that a spec's groups are symmetries: permuting them must not change the output."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from vfjax._trees import check_finite, flatten_named
from vfjax._trees.concrete import check_host
from vfjax._types import Array, PyTree


def check_spec(net: Any, variables: PyTree, x: PyTree, *, key: Array | None = None) -> float:
    """Permutes every group at random and returns how much the output changes.

    Args:
        net: A `Network`, or anything with `spec` and `run(variables, x)`.
        variables: A parameter tree.
        x: An input.
        key: A random key; a fixed one by default.

    Returns:
        The largest absolute change of an entry of the output. Compare it with the size of the
        output: float32 rounding accounts for about 1e-6 of it. NaN if the output holds NaN.

    Raises:
        TypeError: If `net` has no spec or cannot be run.
        ValueError: If `variables` does not fit the spec, or holds NaN or infinite values.

    Example:
        >>> import types
        >>> from vfjax.symmetry import PermutationSpec
        >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("v", 0, "in")]})
        >>> net = types.SimpleNamespace(spec=spec, run=lambda p, x: x @ p["w"] @ p["v"])
        >>> tree = {"w": np.eye(3, dtype=np.float32), "v": np.ones((3, 2), np.float32)}
        >>> check_spec(net, tree, np.ones((1, 3), np.float32))
        0.0
    """
    if not hasattr(net, "spec") or not hasattr(net, "run"):
        raise TypeError(
            f"net must be a Network, or have spec and run(variables, x); it was a "
            f"{type(net).__name__}. Trace the function that applies the model: "
            "net = vfjax.trace(apply_fn, variables, x)."
        )
    check_host("outputs are compared", variables=variables, x=x)
    key = jax.random.key(0) if key is None else key
    # An infinite leaf could make the output infinite before and after, hiding any change.
    check_finite(flatten_named(variables)[0], name="variables")
    permutations = net.spec.random(key, variables)
    before = jax.tree.leaves(net.run(variables, x))
    after = jax.tree.leaves(net.run(net.spec.permute(variables, permutations, also={}), x))
    worst = np.float64(0)
    for a, b in zip(before, after, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        kind = np.complex128 if np.iscomplexobj(a) else np.float64
        with np.errstate(invalid="ignore"):  # a masked logit is -inf before and after
            change = np.where(a == b, 0, np.abs(a.astype(kind) - b.astype(kind)))
        worst = np.maximum(worst, change.max(initial=0))  # np.maximum keeps NaN
    return float(worst)
