"""What a `Merged` costs: parameters and operations of its parts, and of the maps between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from vfjax import _tree


def parameters(model: Any) -> int:
    """Number of parameters of a `Merged`: of stems, trunk and heads, and of matrices that mix.

    Args:
        model: The model.
    """
    parts = [(model.net_of(k), stem) for k, stem in enumerate(model.stems)]
    parts += [(model.net, model.trunk)]
    parts += [(model.net_of(k), head) for k, head in enumerate(model.heads)]
    matrices = [m for maps in (*model.merge, *model.unmerge) for m in maps.values()]
    return sum(net.count(_tree.flatten_named(tree)[0]) for net, tree in parts) + sum(
        int(np.prod(np.shape(m))) for m in matrices if not _selects(m)
    )


def flops(model: Any) -> int:
    """Operations per example of a `Merged`: of stems, trunk and heads, and of matrices that mix.

    Args:
        model: The model.
    """
    total = model.net.part_flops(_tree.flatten_named(model.trunk)[0], model.cut or None, model.end)
    for k, stem in enumerate(model.stems):
        total += model.net_of(k).part_flops(_tree.flatten_named(stem)[0], None, model.cut)
    for k, head in enumerate(model.heads):
        total += model.net_of(k).part_flops(_tree.flatten_named(head)[0], model.end, None)
    for k, maps in enumerate(model.merge):
        total += model.net_of(k).map_flops(model.cut, _widths(maps))
    for maps in model.unmerge:
        total += model.net.map_flops(model.end, _widths(maps))
    return total


def _selects(matrix: Any) -> bool:
    """Whether a matrix only selects: each row is zero but for a one."""
    if isinstance(matrix, (Tracer, jax.ShapeDtypeStruct)):
        return False
    matrix = np.asarray(matrix)
    return bool(((matrix != 0).sum(1) == 1).all() and (matrix.sum(1) == 1).all())


def _widths(maps: Mapping[str, Any]) -> dict[str, int]:
    """How many entries the matrices make of their groups; those that select cost nothing."""
    return {group: len(m) for group, m in maps.items() if not _selects(m)}
