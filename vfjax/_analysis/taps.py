"""Taps: the last value of the elementwise region that follows a layer, and what loops return."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from vfjax._jaxpr import INPUT, PARAM, Graph, is_elementwise
from vfjax._jaxpr.primitives import LOOPS, REDUCTIONS, SPREAD, TRANSPOSE


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


def loop_results(graph: Graph) -> Iterator[tuple[int, int]]:
    """What loops return that are kept whole and read parameters, such as a recurrent cell's states.

    Yields:
        The index of the leaf that the loop reads first, a kernel if there is one, and the id of a
        result: of real numbers, with axes, and depending on the input.
    """
    leaves = graph.inputs[: graph.num_leaves]
    for equation in graph.equations:
        if equation.primitive not in LOOPS or equation.depends != PARAM | INPUT:
            continue
        params = [v for v in equation.values if graph.depends[v] == PARAM]
        params.sort(key=lambda v: len(graph.avals[v].shape) < 2)
        read = [leaf for v in params for leaf in _leaves_behind(graph, v) if leaf in leaves]
        for value in equation.results if read else ():
            aval = graph.avals[value]
            if aval.shape and jnp.issubdtype(aval.dtype, jnp.floating):
                yield leaves.index(read[0]), value


def _leaves_behind(graph: Graph, value: int) -> list[int]:
    """The inputs of the network that a value is computed from."""
    made = graph.needed([value], ())
    return [value, *(v for i in made for v in graph.equations[i].values)]


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
