"""Transport problems of groups inside the entries of others: which heads, and then which dims.

A plan between the dims of two heads costs what sending the one head to the other costs. Heads are
sent one to one, at the least total cost, and the problem of each head's dims is what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vfjax._maps.parts import Part, gather, permuting
from vfjax.align._assignment import PLACE, assign
from vfjax.align._plans import Problem, exact_plan, maps_of, shares_of


class Compared(NamedTuple):
    """The units of a model compared with those of the first one.

    Attributes:
        cost: `[n, m]`; for a group within another of h entries `[h * n, h * m]`, row-major.
        norms: `[n]` and `[m]`, or of as many: what shares are made of.
    """

    cost: np.ndarray
    norms: tuple[np.ndarray, np.ndarray]

    def problem(self, marginals: str) -> Problem:
        """What is to be solved, with shares in proportion to the norms."""
        return Problem(self.cost, *(shares_of(norm, marginals) for norm in self.norms))

    def inside(self, h: int, entry: int, other: int) -> Compared:
        """What is inside one of h entries of the model, and inside another of the first one."""
        rows, columns = (norm.reshape(h, -1) for norm in self.norms)
        cost = self.cost.reshape(*rows.shape, *columns.shape)[entry, :, other]
        return Compared(cost, (rows[entry], columns[other]))


def problems_of(
    compared: Mapping[str, Compared],
    within: Mapping[str, str],
    sizes: Mapping[str, int],
    marginals: str,
) -> tuple[dict[str, np.ndarray], dict[Part, Problem]]:
    """The problems of one model's groups, those inside the entries of others entry by entry.

    Args:
        compared: By group. An owner of others may be compared itself too, which adds to its costs.
        within: By group, the one inside each entry of which it is mapped by itself.
        sizes: How many entries owners have, in all models.
        marginals: See `transport`. Owners are sent one to one by exact plans between equal shares
            of what is inside, whatever the plans that are then made.

    Returns:
        By owner of other groups its permutation, int32 `[h]`; and the problems, by part.
    """
    orders, problems = {}, {}
    for owner in dict.fromkeys(within[group] for group in compared if group in within):
        inside = [found for group, found in compared.items() if within.get(group) == owner]
        alone = compared.get(owner)
        orders[owner] = _order(sizes[owner], inside, None if alone is None else alone.cost)
    for group, found in compared.items():
        if group in within:
            order = orders[within[group]]
            for entry, at in enumerate(order):
                inside = found.inside(len(order), at, entry)
                problems[Part(group, entry)] = inside.problem(marginals)
        elif group not in orders:
            problems[Part(group)] = found.problem(marginals)
    return orders, problems


def _order(h: int, inside: Sequence[Compared], alone: np.ndarray | None) -> np.ndarray:
    """The permutation of h owners at the least cost of exact plans between what is inside."""
    cost = np.zeros((h, h)) if alone is None else alone.copy()
    for found in inside:
        for at, entry in np.ndindex(h, h):
            each = found.inside(h, at, entry).cost
            cost[at, entry] += (exact_plan(each) * each).sum()
    return assign(PLACE * cost.mean() * np.eye(h) - cost.T)


def mapped(
    orders: Mapping[str, np.ndarray], plans: Mapping[Part, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps `(M, U)` by group, of the permutations of owners and the plans of all parts."""
    return {**permuting(orders), **gather({part: maps_of(plan) for part, plan in plans.items()})}
