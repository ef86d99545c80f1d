"""The cost of a network or a part of it, in parameters and operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from vfjax.network._retrace import traces_of

if TYPE_CHECKING:
    from vfjax.network._network import Network


def count(net: Network, leaves: Mapping[str, Any]) -> int:
    """Number of parameters among leaves by path.

    Stored statistics, integers and random keys do not count.
    """
    counted = [np.shape(a) for p, a in leaves.items() if _counts(net, p, a)]
    return sum(int(np.prod(shape)) for shape in counted)


def _counts(net: Network, path: str, leaf: Any) -> bool:
    return path not in net.statistics and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def params_of(net: Network, paths: Iterable[str]) -> int:
    """Number of parameters among the leaves at some paths, as traced."""
    return count(net, net.leaves(paths))


def flops_of(net: Network, equations: Iterable[int]) -> int:
    """Operations per example of some equations of the network, given by their indices."""
    return sum(traces_of(net).reference.flops(i) for i in equations) // traces_of(net).batch


def part_flops(net: Network, leaves: Mapping[str, Any], start: int | None, stop: int | None) -> int:
    """Operations per example from one cut to another, at the shapes of these leaves.

    Args:
        net: The network.
        leaves: Leaves by path; missing ones count as traced.
        start: Depth of the first cut; None for the input.
        stop: Depth of the second; None for the output.
    """
    traced = traces_of(net).at(leaves, net.x)
    return sum(traced.flops(i) for i in traced.part(start, stop)) // traces_of(net).batch


def map_flops(net: Network, depth: int, widths: Mapping[str, int]) -> int:
    """Operations per example of mapping the values that cross a cut by matrices.

    Args:
        net: The network.
        depth: Depth of the cut.
        widths: By group, the number of entries after its matrix.
    """
    total, traced = 0, traces_of(net).reference
    for value in traced.cut(depth).crossing:
        entries = int(np.prod(traced.graph.avals[value].shape))
        for group, *_ in traced.places(value):
            if group in widths:
                size = net.spec.sizes[group]
                entries = entries // size * widths[group]
                total += entries * size
    return total // traces_of(net).batch
