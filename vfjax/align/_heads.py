"""Transport of groups inside the entries of others: first which heads, then which dims.

The cost of sending one head to another is that of the exact plan between their dims. Heads are sent
one to one, at the least total cost; what remains is one problem for the dims of each head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vfjax._maps import Part, gather, permuting
from vfjax.align._assignment import PLACE, assign
from vfjax.align._plans import Problem, exact_plan, maps_of, shares_of


def problems_of(
    compared: Mapping[str, Compared],
    within: Mapping[str, str],
    sizes: Mapping[str, int],
    marginals: str,
) -> tuple[dict[str, np.ndarray], dict[Part, Problem]]:
    """The transport problems of one model, one per group, or per entry for a group inside another.

    Args:
        compared: Comparisons by group. An owner of others may have one too, which adds to the costs
            of sending its entries.
        within: By group that is mapped separately inside each entry of another, its owner.
        sizes: How many entries owners have, in all models.
        marginals: See `transport`. Owners are always sent one to one, at the costs of exact plans
            between equal shares of the units inside.

    Returns:
        The permutation of every owner of other groups, int32 `[h]`; and the problems, by part.
    """
    orders, problems = {}, {}
    for owner in dict.fromkeys(within[group] for group in compared if group in within):
        inside = [units for group, units in compared.items() if within.get(group) == owner]
        alone = compared.get(owner)
        orders[owner] = _order(sizes[owner], inside, None if alone is None else alone.cost)
    for group, units in compared.items():
        if group in within:
            order = orders[within[group]]
            for entry, at in enumerate(order):
                inside = units.inside(len(order), at, entry)
                problems[Part(group, entry)] = inside.problem(marginals)
        elif group not in orders:
            problems[Part(group)] = units.problem(marginals)
    return orders, problems


def mapped(
    orders: Mapping[str, np.ndarray], plans: Mapping[Part, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps `(M, U)` by group, from the permutations of owners and the plans of all parts."""
    return {**permuting(orders), **gather({part: maps_of(plan) for part, plan in plans.items()})}


class Compared(NamedTuple):
    """Comparison of a model's units with those of the first model.

    Attributes:
        cost: `[n, m]`; for a group within another of h entries `[h * n, h * m]`, row-major.
        norms: `[n]` and `[m]` (`[h * n]` and `[h * m]`), from which shares are computed.
    """

    cost: np.ndarray
    norms: tuple[np.ndarray, np.ndarray]

    def problem(self, marginals: str) -> Problem:
        """The transport problem, with shares computed from the norms."""
        return Problem(self.cost, *(shares_of(norm, marginals) for norm in self.norms))

    def inside(self, h: int, entry: int, other: int) -> Compared:
        """Compares the units inside one of h entries with those inside one of the first model."""
        rows, columns = (norm.reshape(h, -1) for norm in self.norms)
        cost = self.cost.reshape(*rows.shape, *columns.shape)[entry, :, other]
        return Compared(cost, (rows[entry], columns[other]))


def _order(h: int, inside: Sequence[Compared], alone: np.ndarray | None) -> np.ndarray:
    """The permutation of h owners of least cost, by exact plans between the units inside."""
    cost = np.zeros((h, h)) if alone is None else alone.copy()
    for units in inside:
        for at, entry in np.ndindex(h, h):
            each = units.inside(h, at, entry).cost
            cost[at, entry] += (exact_plan(each) * each).sum()
    return assign(PLACE * cost.mean() * np.eye(h) - cost.T)
