"""The cost of a merged model: parameters and operations of stems, trunk, heads and matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer

from vfjax._trees import flatten_named
from vfjax.network._cost import count, map_flops, part_flops

if TYPE_CHECKING:
    from vfjax.merge._merged import Merged


def params_of(model: Merged) -> int:
    """Number of parameters; see `Merged.params`."""
    parts = [(model.net_of(k), stem) for k, stem in enumerate(model.stems)]
    parts += [(model.net, model.trunk)]
    parts += [(model.net_of(k), head) for k, head in enumerate(model.heads)]
    matrices = [m for maps in (*model.merge, *model.unmerge) for m in maps.values()]
    return sum(count(net, flatten_named(tree).leaves) for net, tree in parts) + sum(
        int(np.prod(np.shape(m))) for m in matrices if not _selects(m)
    )


def flops_of(model: Merged) -> int:
    """Multiply-accumulates per example; see `Merged.flops`."""
    net, cut, end = model.net, model.cut, model.end
    total = part_flops(net, flatten_named(model.trunk).leaves, cut or None, end)
    for k, stem in enumerate(model.stems):
        total += part_flops(model.net_of(k), flatten_named(stem).leaves, None, cut)
    for k, head in enumerate(model.heads):
        total += part_flops(model.net_of(k), flatten_named(head).leaves, end, None)
    for k, maps in enumerate(model.merge):
        total += map_flops(model.net_of(k), cut, _widths(maps))
    for maps in model.unmerge:
        assert end is not None  # there are heads
        total += map_flops(net, end, _widths(maps))
    return total


def _selects(matrix: Any) -> bool:
    """Whether a matrix only selects units: each row holds a single one, and zeros."""
    if isinstance(matrix, (Tracer, jax.ShapeDtypeStruct)):
        return False
    matrix = np.asarray(matrix)
    return bool(((matrix != 0).sum(1) == 1).all() and (matrix.sum(1) == 1).all())


def _widths(maps: Mapping[str, Any]) -> dict[str, int]:
    """The number of entries to which matrices map their groups; selecting ones cost nothing."""
    return {group: len(m) for group, m in maps.items() if not _selects(m)}
