"""Copies of stored statistics that only training reads, such as an average before debiasing."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfjax._trees import some
from vfjax.merge._unpacked import Unpacked
from vfjax.network._network import Network
from vfjax.network._stored import statistics_of
from vfjax.symmetry._also import Also, followed


def with_copies(
    old: Unpacked, new: Unpacked, norms: Collection[str], also: Also | None
) -> Unpacked:
    """The model with the copies of renewed statistics renewed too.

    Each copy keeps its proportion to the statistic; one that was no multiple of it is set to it.

    Args:
        old: The model before its statistics were renewed.
        new: The model afterwards.
        norms: Names of the norms of the trunk whose statistics were renewed.
        also: As in `vfjax.renorm.reset`; None warns of leaves that look like copies.

    Raises:
        TypeError: As `vfjax.renorm.reset`.
        ValueError: As `vfjax.renorm.reset`.
    """
    net, leaves = new.net, new.trunk.leaves
    unread = leaves.keys() - net.trunk_leaves(0)
    renewed = {part.path for name in norms for part in statistics_of(net, name)}
    if also is None:
        _warn(old.trunk.leaves, unread, renewed)
    if not also:
        return new
    pairs = followed(leaves, unread, also)
    before = old.trunk.leaves
    copies = {
        path: _scaled(before[path], before[of], leaves[of])
        for path, of in pairs.items()
        if of in renewed
    }
    return new.put(trunk={**leaves, **copies})


def _scaled(copy: Any, old: Any, new: Any) -> Any:
    """The new statistic in the proportion that the copy had to the old one."""
    a, b = (np.asarray(leaf, np.float64) for leaf in (copy, old))
    square = (b * b).sum()
    ratio = (a * b).sum() / square if square else 1.0
    if abs(a - ratio * b).max(initial=0) > 1e-3 * abs(a).max(initial=0):
        ratio = 1.0
    dtype = jnp.result_type(copy)
    return (jnp.asarray(new).astype(jnp.promote_types(dtype, jnp.float32)) * ratio).astype(dtype)


def _warn(leaves: Mapping[str, Any], unread: Collection[str], renewed: set[str]) -> None:
    alike = {}
    for path in sorted(unread):
        if jnp.issubdtype(jnp.result_type(leaves[path]), jnp.inexact):
            for of in renewed & leaves.keys():
                if np.shape(leaves[path]) == np.shape(leaves[of]) and _beside(path, of):
                    if path.split("/")[-1] == of.split("/")[-1] or _multiple(leaves, path, of):
                        alike[path] = of
    if alike:
        path, of = next(iter(alike.items()))
        warnings.warn(
            f"reset leaves {some(list(alike))} as {'it was' if len(alike) == 1 else 'they were'}, "
            f"since the traced function does not read them; '{path}' has the shape of the "
            f"statistic '{of}' beside it. If training reads copies of statistics, say which, as "
            f"also={{'{path}': '{of}'}} or also={{\"hidden\": \"average\"}} (the leaf with "
            '"average" in place of "hidden" in its path); else also={}.',
            stacklevel=4,
        )


def _multiple(leaves: Mapping[str, Any], path: str, of: str) -> bool:
    """Whether a leaf is a multiple of another, and not a constant, as initial values are."""
    a, b = (np.asarray(leaves[p], np.float64).ravel() for p in (path, of))
    square = (b * b).sum()
    if not square or not np.ptp(a):
        return False
    return bool(abs(a - (a * b).sum() / square * b).max() <= 1e-3 * abs(a).max())


def _beside(path: str, other: str) -> bool:
    """Whether two paths differ in one component, or one ends with the other."""
    one, two = path.split("/"), other.split("/")
    if len(one) == len(two):
        return sum(a != b for a, b in zip(one, two, strict=True)) == 1
    return one[-len(two) :] == two


def warn_of_unrecognised(net: Network, listed: str) -> None:
    """Warns that statistics of norms that are not recognised stay as they are."""
    if net.unrecognised:
        warnings.warn(
            f"reset renews the statistics of net.norms only. {listed}: if these are stored "
            "statistics, they stay as they were. Write their norm as (x - mean) * rsqrt(var + eps) "
            "* scale + bias, with leaves or multiples of leaves as mean and var.",
            stacklevel=4,
        )
