"""Taps: the last value of the elementwise region that follows a layer."""

from __future__ import annotations

from vfjax._jaxpr import Graph, is_elementwise
from vfjax._jaxpr.primitives import REDUCTIONS, SPREAD, TRANSPOSE


def tap_of(graph: Graph, value: int) -> int:
    """The tap after a pre-activation: the last value of the elementwise region that follows it.

    A reduction whose result returns to the region, such as a LayerNorm's moments, belongs to it;
    the region ends at the first value that a layer, a pool, a reshape or another reduction reads.
    Transposes between the pre-activation and the region, which `vmap` leaves after a layer without
    bias, are skipped.
    """
    value, _ = _transposed(graph, value, ())
    shape = graph.avals[value].shape
    region = {value}
    order = [value]
    while order:
        current = min(order)
        order.remove(current)
        if current in graph.output_ids:
            return current
        following = []
        for index in graph.users.get(current, ()):
            equation = graph.equations[index]
            inside = is_elementwise(equation) and all(
                graph.avals[v].shape == shape for v in equation.results
            )
            if inside:
                following += [v for v in equation.results if v not in region]
            elif not _returns(graph, index, region, shape):
                return current
        region.update(following)
        order += [v for v in following if v not in order]
    return max(region)


def axes_at_tap(graph: Graph, value: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes at a tap that axes of its pre-activation become."""
    return _transposed(graph, value, axes)[1]


def _transposed(graph: Graph, value: int, axes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The value after transposes that are its only readers, and its axes there."""
    while value not in graph.output_ids:
        users = graph.users.get(value, ())
        if len(users) != 1 or graph.equations[users[0]].primitive != TRANSPOSE:
            break
        permutation = graph.equations[users[0]].params["permutation"]
        axes = tuple(sorted(permutation.index(axis) for axis in axes))
        value = graph.equations[users[0]].result
    return value, axes


def _returns(graph: Graph, index: int, region: set[int], shape: tuple[int, ...]) -> bool:
    """Whether an equation starts a statistic of the region that comes back to it elementwise.

    A statistic is computed by reductions and by equations that map positions to positions: layout,
    broadcasts and elementwise equations. With a pool, a layer or an attention on the way it is not
    a statistic.
    """
    todo, seen = [(index, False)], set()
    while todo:
        current, reduced = todo.pop()
        equation = graph.equations[current]
        name = equation.primitive
        if name in REDUCTIONS:
            reduced = True
        elif not (name in SPREAD or is_elementwise(equation)):
            continue
        for value in equation.results:
            for user in graph.users.get(value, ()):
                target = graph.equations[user]
                if reduced and is_elementwise(target) and region & set(target.values):
                    result = graph.avals[target.result].shape
                    if result == shape:
                        return True
                if (user, reduced) not in seen:
                    seen.add((user, reduced))
                    todo.append((user, reduced))
    return False
