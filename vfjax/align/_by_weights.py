"""Transport by weights: comparing units by the weights that write them, from the input on.

A norm with stored statistics removes the scale of its input, and its stored mean cancels any bias
in front of it. Kernels before such a norm are therefore compared in the units of its output, and
biases there are not compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfjax._maps import in_output_units
from vfjax._trees import flatten_named
from vfjax._types import PyTree
from vfjax.align._ascent import as_real
from vfjax.align._heads import Compared, mapped, problems_of
from vfjax.align._plans import Key, Problem, Solver
from vfjax.align._taps import within
from vfjax.network._network import Network
from vfjax.symmetry._entries import apart
from vfjax.symmetry._places import (
    Axis,
    grid,
    map_axis,
    map_within,
    rows,
)

# Squared distances below this fraction of the norms are rounding errors.
_EQUAL = 1e-14

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]
# By group, the indices of the writers at which it is compared.
Chosen = dict[str, Sequence[int]]


def match_incoming(
    nets: Sequence[Network],
    trees: Sequence[PyTree],
    solver: Solver,
    *,
    marginals: str,
    squared: bool,
    sweeps: int,
) -> list[Pairs]:
    """Maps every model but the first onto the first, group by group.

    A group is compared at those of its writers whose other axes are already mapped, or have no
    group. Groups are taken in the order in which the network writes them. A group that layers write
    waits until one of these layers can be compared, since a bias alone says little. If all groups
    that remain wait, as two groups of one kernel do for each other, the first of them is compared
    at all its writers, by norms along the axes that are not yet mapped. Each further sweep compares
    every group at all its writers. A group and those inside each of its entries, such as heads and
    their dims, are mapped together.

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
    inside = within(nets)
    models = [Incoming(net, tree, inside) for net, tree in zip(nets, trees, strict=True)]
    first = models[0]
    maps: list[Pairs] = [{} for _ in trees[1:]]
    blocks = [
        tuple(name for name in first.groups if name == group or inside.get(name) == group)
        for group in first.groups
        if group not in inside
    ]
    blocks = [tuple(g for g in block if first.writers(g)) for block in blocks]

    def ready(block: tuple[str, ...]) -> Chosen:
        """By group, the indices of those of its writers that can be compared now."""
        return {
            group: [
                k
                for k, writer in enumerate(first.writers(group))
                if all(other in maps[0] for other, _ in first.others(group, writer))
            ]
            for group in block
        }

    def waits(block: tuple[str, ...]) -> bool:
        """Whether some group has layers, or else any writers, of which none can be compared yet."""
        for group, comparable in ready(block).items():
            writers = first.writers(group)
            layers = {k for k, writer in enumerate(writers) if writer.role == "out"}
            if not set(comparable) & (layers or {*range(len(writers))}):
                return True
        return False

    def match(chosen: Chosen) -> bool:
        """Maps the groups of a block, and returns whether that changed anything."""
        orders: list[dict[str, np.ndarray]] = []
        problems: dict[Key, Problem] = {}
        for model, (other, pairs) in enumerate(zip(models[1:], maps, strict=True), start=1):
            compared = {
                group: _compared(first, other, group, writers, pairs, marginals, squared)
                for group, writers in chosen.items()
            }
            order, parts = problems_of(compared, inside, first.sizes, marginals)
            orders.append(order)
            problems |= {(model, part): problem for part, problem in parts.items()}
        plans = solver.plans(problems)
        changes = False
        for model, (order, pairs) in enumerate(zip(orders, maps, strict=True), start=1):
            own = {part: plan for (of, part), plan in plans.items() if of == model}
            new = mapped(order, own)
            changes |= not all(g in pairs and np.array_equal(pairs[g][0], new[g][0]) for g in new)
            pairs.update(new)
        return changes

    order, waiting = [], [block for block in blocks if block]
    while waiting:
        block = next((b for b in waiting if not waits(b)), waiting[0])
        whole: Chosen = {g: range(len(first.writers(g))) for g in block}
        match(whole if waits(block) else ready(block))
        waiting.remove(block)
        order.append(block)
    for _ in range(sweeps):
        changes = [match({g: range(len(first.writers(g))) for g in block}) for block in order]
        if not any(changes):
            break
    return maps


class Incoming:
    """The weights that write each group of a model: kernels, biases, norms' scales and shifts.

    Args:
        net: The traced network.
        tree: The model.
        within: By group that is mapped separately inside each entry of another, its owner.
    """

    def __init__(self, net: Network, tree: PyTree, within: Mapping[str, str]) -> None:
        self.within = within
        self.sizes = net.spec.sizes
        leaves = flatten_named(in_output_units(net, tree, {norm.var for norm in net.norms}))[0]
        without, biases = ({a.bias for a in net.layers if bool(a.norm) is w} for w in (False, True))
        ignored = net.statistics | (biases - without)
        counted = {
            path: as_real(leaf)
            for path, leaf in leaves.items()
            if path not in ignored and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        }
        self.spec, self.leaves = apart(net.spec, counted)
        self.groups = {
            group: tuple(axis for axis in axes if axis.path in self.leaves)
            for group, axes in self.spec.groups.items()
        }
        self.places: dict[str, list[tuple[str, Axis]]] = {}
        for group, axes in self.groups.items():
            for axis in axes:
                self.places.setdefault(axis.path, []).append((group, axis))

    def owner(self, group: str, place: Axis) -> Axis | None:
        """The place of a group's owner on a leaf; None for a group that is mapped as a whole."""
        return self.spec.owner(group, place) if group in self.within else None

    def writers(self, group: str) -> tuple[Axis, ...]:
        """Places where a group is written; if it is written nowhere (a tied embedding), all places.

        Places of groups inside its entries are left out: those groups are compared separately.
        """
        inside = [name for name, owner in self.within.items() if owner == group]
        around = {self.owner(name, axis) for name in inside for axis in self.groups[name]}
        axes = tuple(axis for axis in self.groups[group] if axis not in around)
        return tuple(axis for axis in axes if axis.role != "in") or axes

    def others(self, group: str, writer: Axis) -> list[tuple[str, Axis]]:
        """The other places on a writer's leaf, with their groups, owners first."""
        owner = self.owner(group, writer)
        own = {(group, writer), (self.within.get(group), owner)}
        others = [place for place in self.places[writer.path] if place not in own]
        return sorted(others, key=lambda place: place[0] in self.within)

    def rows(
        self,
        group: str,
        writer: Axis,
        sizes: Mapping[str, int],
        known: Collection[str],
        maps: Mapping[str, Any] | None,
    ) -> np.ndarray:
        """The weights that a writer holds for each unit of a group.

        Args:
            group: The group, of n units.
            writer: One of its writers.
            sizes: Sizes of the groups in the model that is mapped to.
            known: Groups that are already mapped. Along others only the norm counts, since it does
                not depend on their order.
            maps: Maps of these groups, or None for the model that is mapped to.

        Returns:
            float64 `[n, d]`, or `[h * n, d]` for a group inside each of h entries.
        """
        leaf = np.asarray(self.leaves[writer.path], np.float64)
        for other, axis in self.others(group, writer):
            if other not in known:
                leaf = map_axis(leaf, axis, lambda v, k, n=sizes[other]: _norms(v, k, n))
            elif maps is not None:
                merge, unmerge = maps[other]
                leaf = _mapped(
                    leaf,
                    axis,
                    self.owner(other, axis),
                    unmerge.swapaxes(-1, -2) if axis.role == "in" else merge,
                )
        owner = self.owner(group, writer)
        if owner is not None:
            entries = grid(leaf, writer, owner)
            return entries.reshape(-1, entries.shape[-1])
        units = np.moveaxis(rows(leaf, writer), 1, 0)
        return units.reshape(len(units), -1)


def _compared(
    first: Incoming,
    other: Incoming,
    group: str,
    writers: Sequence[int],
    maps: Pairs,
    marginals: str,
    squared: bool,
) -> Compared:
    """Compares the units of one group by distances between their rows, joined over writers."""
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
        for side, matrix in zip(sides, pair, strict=True):
            side.append(matrix)
    units, others = (np.concatenate(side, axis=1) for side in sides)
    norms = (units**2).sum(1)[:, None] + (others**2).sum(1)
    cost = norms - 2 * units @ others.T
    cost = np.where(cost > _EQUAL * norms, cost, 0)
    order = 1 if marginals == "l1" else 2
    sizes = (np.linalg.norm(units, order, axis=1), np.linalg.norm(others, order, axis=1))
    return Compared(cost if squared else np.sqrt(cost), sizes)


def _norms(view: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Norms along an axis, spread over `size` entries of it: the number of axes does not change."""
    norms = np.linalg.norm(view, axis=axis, keepdims=True) / np.sqrt(size)
    return np.repeat(norms, size, axis)


def _mapped(leaf: np.ndarray, axis: Axis, owner: Axis | None, matrix: np.ndarray) -> np.ndarray:
    """Maps a place of a leaf; under an owner, by one matrix for each of its entries."""
    if owner is None:
        return map_axis(leaf, axis, lambda v, k: _contract(matrix, v, k))
    return map_within(leaf, axis, owner, lambda v, k, i: _contract(matrix[i], v, k))


def _contract(matrix: np.ndarray, view: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix.astype(np.float64), view, axes=(1, axis)), 0, axis)
