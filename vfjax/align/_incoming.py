"""Transport by weights: comparing the units of networks by what writes them, from the input on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfjax._axes import Axis, map_axis
from vfjax._tree import flatten_named
from vfjax.align._plans import Problem, Solver, maps_of, shares_of
from vfjax.network import Network

PyTree = Any

# Squared distances up to this part of the norms are rounding.
_EQUAL = 1e-14

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


class Incoming:
    """What writes the units of each group of one model: kernels, biases, norms' scales and shifts.

    Args:
        net: The traced network.
        tree: The model.
    """

    def __init__(self, net: Network, tree: PyTree) -> None:
        self.sizes = net.spec.sizes
        leaves = flatten_named(tree)[0]
        self.leaves = {
            path: leaf
            for path, leaf in leaves.items()
            if path not in net.statistics and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        }
        self.groups = {
            group: tuple(axis for axis in axes if axis.path in self.leaves)
            for group, axes in net.spec.groups.items()
        }
        self.places: dict[str, list[tuple[str, Axis]]] = {}
        for group, axes in self.groups.items():
            for axis in axes:
                self.places.setdefault(axis.path, []).append((group, axis))

    def writers(self, group: str) -> tuple[Axis, ...]:
        """Places where a group is written; all its places where none is, as in a tied embedding."""
        axes = self.groups[group]
        return tuple(axis for axis in axes if axis.role != "in") or axes

    def others(self, group: str, writer: Axis) -> list[tuple[str, Axis]]:
        """The places on a writer's leaf that are not its own, with their groups."""
        return [place for place in self.places[writer.path] if place != (group, writer)]

    def rows(
        self,
        group: str,
        writer: Axis,
        sizes: Mapping[str, int],
        known: Collection[str],
        maps: Mapping[str, Any] | None,
    ) -> np.ndarray:
        """What a writer holds for each unit of a group.

        Args:
            group: The group, of n units.
            writer: One of its writers.
            sizes: Sizes of the groups in the model that is mapped to.
            known: Groups that are mapped; along others only the norm counts, which does not depend
                on their order.
            maps: Maps of these groups, or None for the model that is mapped to.

        Returns:
            float64 `[n, d]`.
        """
        leaf = np.asarray(self.leaves[writer.path], np.float64)
        for other, axis in self.others(group, writer):
            if other not in known:
                leaf = map_axis(leaf, axis, lambda v, k, n=sizes[other]: _norms(v, k, n))
            elif maps is not None:
                matrix = maps[other][1].T if axis.role == "in" else maps[other][0]
                leaf = map_axis(leaf, axis, lambda v, k, m=matrix: _contract(m, v, k))
        found: list[np.ndarray] = []

        def keep(view: np.ndarray, k: int) -> np.ndarray:
            found.append(np.moveaxis(view, k, 0).reshape(view.shape[k], -1))
            return view

        map_axis(leaf, writer, keep)
        return found[0]


def match_incoming(
    nets: Sequence[Network],
    trees: Sequence[PyTree],
    solver: Solver,
    *,
    marginals: str,
    squared: bool,
    sweeps: int,
) -> list[Pairs]:
    """Maps of all models but the first onto it, group by group.

    A group is compared at those of its writers whose other axes are mapped already, or have no
    group. Groups come in the order in which the network writes them, but one that has layers and
    none such among them waits for the others, since a bias alone tells little. If all that are left
    wait, as the heads and dimensions of one kernel do for each other, the first of them is compared
    at all its writers, by norms along the axes that are not mapped yet. A further sweep compares
    every group at all its writers.

    Args:
        nets: One per tree.
        trees: The models.
        solver: Solves for the plans.
        marginals: See `transport`.
        squared: See `transport`.
        sweeps: Number of further sweeps.

    Returns:
        For every model but the first, by group, `(M, U)`.
    """
    models = [Incoming(net, tree) for net, tree in zip(nets, trees, strict=True)]
    first = models[0]
    maps: list[Pairs] = [{} for _ in trees[1:]]
    waiting = [group for group, axes in first.groups.items() if axes]

    def ready(group: str) -> list[int]:
        """Numbers of the writers of a group that can be compared as they are."""
        return [
            k
            for k, writer in enumerate(first.writers(group))
            if all(other in maps[0] for other, _ in first.others(group, writer))
        ]

    def waits(group: str) -> bool:
        """Whether none of the layers that write a group can be compared, or else no writer."""
        writers = first.writers(group)
        layers = {k for k, writer in enumerate(writers) if writer.role == "out"}
        return not set(ready(group)) & (layers or {*range(len(writers))})

    def match(group: str, writers: Sequence[int]) -> bool:
        """Maps a group; whether that changes anything."""
        problems = {
            (model, group): _problem(first, other, group, writers, found, marginals, squared)
            for model, (other, found) in enumerate(zip(models[1:], maps, strict=True), start=1)
        }
        new = [maps_of(plan) for plan in solver.plans(problems).values()]
        same = all(
            group in found and np.array_equal(found[group][0], pair[0])
            for found, pair in zip(maps, new, strict=True)
        )
        for found, pair in zip(maps, new, strict=True):
            found[group] = pair
        return not same

    order = []
    while waiting:
        group = next((group for group in waiting if not waits(group)), waiting[0])
        match(group, range(len(first.writers(group))) if waits(group) else ready(group))
        waiting.remove(group)
        order.append(group)
    for _ in range(sweeps):
        changes = [match(group, range(len(first.writers(group)))) for group in order]
        if not any(changes):
            break
    return maps


def _problem(
    first: Incoming,
    other: Incoming,
    group: str,
    writers: Sequence[int],
    maps: Pairs,
    marginals: str,
    squared: bool,
) -> Problem:
    """The problem of one group: distances between rows over several writers put together."""
    sides: list[list[np.ndarray]] = [[], []]
    for k in writers:
        writer = first.writers(group)[k]
        pair = (
            other.rows(group, other.writers(group)[k], first.sizes, maps, maps),
            first.rows(group, writer, first.sizes, maps, None),
        )
        if pair[0].shape[1] != pair[1].shape[1]:
            raise ValueError(
                f"trees differ in shape at '{writer.path}' along an axis that has no group; "
                "networks may differ in widths and classes only"
            )
        for side, rows in zip(sides, pair, strict=True):
            side.append(rows)
    rows, columns = (np.concatenate(side, axis=1) for side in sides)
    norms = (rows**2).sum(1)[:, None] + (columns**2).sum(1)
    cost = norms - 2 * rows @ columns.T
    cost = np.where(cost > _EQUAL * norms, cost, 0)
    order = 1 if marginals == "l1" else 2
    shares = [shares_of(np.linalg.norm(v, order, axis=1), marginals) for v in (rows, columns)]
    return Problem(cost if squared else np.sqrt(cost), *shares)


def _norms(view: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Norms along an axis, spread over `size` entries, so that other axes are where they were."""
    norms = np.linalg.norm(view, axis=axis, keepdims=True) / np.sqrt(size)
    return np.repeat(norms, size, axis)


def _contract(matrix: np.ndarray, view: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix.astype(np.float64), view, axes=(1, axis)), 0, axis)
