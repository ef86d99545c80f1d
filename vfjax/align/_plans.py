"""Transport plans between two sets of units: exact ones, and entropic ones by Sinkhorn's iteration.

A plan `T [n, m]` says how much of each of n units goes to each of m others; its rows sum to the
shares of the former, its columns to those of the latter.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from scipy.optimize import linprog
from scipy.special import softmax

from vfjax.align._record import assign

__all__ = [
    "Entropic",
    "Problem",
    "Solver",
    "exact_plan",
    "maps_of",
    "shares_of",
    "sinkhorn",
]

Array = jax.Array
# Number of a model, and what of it: a group's name or a part of a group.
Key = tuple[int, Any]

# Ties go to units in the same place: a network matched with itself then stays as it is.
_PLACE = 1e-9
# Most pieces that units of equal shares are cut into for an assignment, which takes seconds.
_PIECES = 1 << 12
# Most entries of a cost that go to the linear programme, which takes half a minute and 1.2 GB.
_LARGEST = 1 << 20
# Least share of a unit, in parts of the mean, so that it can be divided by.
_LEAST = 1e-3
# By what the regularization falls in each of the first iterations, from the size of the costs on.
_FALL = 0.9


class Entropic(NamedTuple):
    """What Sinkhorn's iteration found.

    Attributes:
        plan: `[n, m]`; its columns sum to their shares up to rounding.
        error: By how much its rows do not: the sum of the absolute differences.
        iterations: How many it took, int32.
    """

    plan: Array
    error: Array
    iterations: Array


def exact_plan(
    cost: np.ndarray,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
    *,
    name: str = "the cost",
) -> np.ndarray:
    """The plan of least cost.

    Equal shares are assigned: as many units as others one by one, different numbers of them in
    equal pieces, of which there are as many on either side. Ties go to units in the same place.
    Where shares differ, or there would be more than 4096 pieces, the linear programme is solved.

    Args:
        cost: `[n, m]`, finite.
        rows: `[n]`, positive, summing to one; None for equal shares.
        columns: `[m]`, likewise.
        name: What to call the cost in an error.

    Returns:
        float64 `[n, m]`.

    Raises:
        ValueError: If an entry is NaN or infinite, or the linear programme would have more than
            2^20 unknowns.

    Example:
        >>> exact_plan(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])).round(3).tolist()
        [[0.167, 0.167], [0.0, 0.333], [0.333, 0.0]]
    """
    cost = np.asarray(cost, np.float64)
    bad = np.count_nonzero(~np.isfinite(cost))
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite entries: look for diverged models")
    n, m = cost.shape
    pieces = int(np.lcm(n, m))
    if rows is None and columns is None and (n == m or pieces <= _PIECES):
        gain = _PLACE * cost.mean() * np.eye(n, m) - cost
        sent = assign(np.repeat(np.repeat(gain, pieces // n, 0), pieces // m, 1))
        plan = np.zeros((n, m))
        np.add.at(plan, (np.arange(pieces) // (pieces // n), sent // (pieces // m)), 1 / pieces)
        return plan
    if cost.size > _LARGEST:
        raise ValueError(
            f"{name} is {n} x {m}, and the exact plan would be a linear programme of as many "
            f"unknowns, of which {_LARGEST} are the limit: give regularization > 0, such as 0.01, "
            "for Sinkhorn's iteration"
        )
    # The last column's sum follows from the others, and rounding could make it contradict them.
    sums = scipy.sparse.vstack(
        [
            scipy.sparse.kron(scipy.sparse.eye(n), np.ones((1, m))),
            scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye(m - 1, m)),
        ],
        format="csr",
    )
    _, supply, demand = _full(Problem(cost, rows, columns))
    # Shares of about one, and costs up to one, since the solver's tolerances are absolute.
    found = linprog(
        cost.ravel() / (np.abs(cost).max() or 1),
        A_eq=sums,
        b_eq=max(n, m) * np.concatenate([supply, demand])[:-1],
        method="highs-ds",
    )
    if found.x is None:
        raise ValueError(f"{name}: the linear programme was not solved: {found.message}")
    return np.maximum(found.x, 0).reshape(n, m) / max(n, m)


def sinkhorn(
    cost: Array,
    rows: Array,
    columns: Array,
    regularization: float | Array,
    *,
    tolerance: float | Array = 1e-4,
    max_iterations: int | Array = 10_000,
) -> Entropic:
    """The plan of least cost minus its entropy, by Sinkhorn's iteration on logarithms.

    What is minimised is `<T, C> - regularization * mean(C) * H(T)`. The first iterations use a
    larger regularization, falling to this one, which takes far fewer of them than a cold start. In
    float32, or in float64 where the cost is; `jit` and `vmap` go through, and no argument but the
    shapes is compiled in.

    Args:
        cost: `[n, m]`, finite, its mean positive or all of it zero.
        rows: `[n]`, positive, summing to one.
        columns: `[m]`, likewise.
        regularization: Weight of the entropy, in parts of the mean of the cost; positive.
        tolerance: Up to which error of the rows' sums to go on. It ends sooner where rounding does
            not allow for less, which in float32 is about 1e-6 / regularization.
        max_iterations: The most iterations.

    Returns:
        The plan, its error and the number of iterations.

    Example:
        >>> cost, share = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([0.5, 0.5])
        >>> found = sinkhorn(cost, share, share, 0.1)
        >>> found.plan.round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

    Source: "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (Cuturi, 2013), on
    logarithms as in "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport
    Problems" (Schmitzer, 2019), with that paper's falling regularization.
    """
    dtype = jnp.promote_types(cost.dtype, jnp.float32)
    cost, rows, columns = (jnp.asarray(v, dtype) for v in (cost, rows, columns))
    scale = cost.mean()
    cost = cost / jnp.where(scale > 0, scale, 1)
    final = jnp.asarray(regularization, dtype)
    # A potential's rounding is that of the costs, divided by the regularization in the exponent.
    enough = jnp.maximum(tolerance, 4 * jnp.finfo(dtype).eps * jnp.abs(cost).max() / final)
    log_rows, log_columns = jnp.log(rows), jnp.log(columns)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, f, g, _, last = state
        eps = jnp.maximum(final, _FALL ** count.astype(dtype))
        new = eps * (log_rows - jax.nn.logsumexp((g[None, :] - cost) / eps, axis=1))
        # The sums of the rows before this update, in parts of what they should be.
        off = jnp.abs(jnp.expm1((f - new) / eps)) @ rows
        g = eps * (log_columns - jax.nn.logsumexp((new[:, None] - cost) / eps, axis=0))
        return count + 1, new, g, jnp.where(last == final, off, jnp.inf), eps

    def unfinished(state: tuple[Array, ...]) -> Array:
        count, _, _, off, _ = state
        return (off > enough) & (count < max_iterations)

    infinite = jnp.asarray(jnp.inf, dtype)
    start = (jnp.int32(0), jnp.zeros_like(rows), jnp.zeros_like(columns), infinite, infinite)
    count, f, g, _, eps = jax.lax.while_loop(unfinished, step, start)
    plan = jnp.exp((f[:, None] + g[None, :] - cost) / eps)
    return Entropic(plan, jnp.abs(plan.sum(1) - rows).sum(), count)


@jax.jit
def _many(
    costs: Array,
    rows: Array,
    columns: Array,
    regularization: Array,
    tolerance: Array,
    max_iterations: Array,
) -> Entropic:
    """Several problems of one shape, stacked along the first axis."""

    def one(cost: Array, row: Array, column: Array) -> Entropic:
        options = {"tolerance": tolerance, "max_iterations": max_iterations}
        return sinkhorn(cost, row, column, regularization, **options)

    return jax.vmap(one)(costs, rows, columns)


class Problem(NamedTuple):
    """A transport problem.

    Attributes:
        cost: `[n, m]`.
        rows: `[n]`, positive, summing to one; None for equal shares.
        columns: `[m]`, likewise.
    """

    cost: np.ndarray
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Solver:
    """How problems are solved: exactly at regularization 0, else by Sinkhorn's iteration.

    Attributes:
        regularization: See `sinkhorn`; 0 for exact plans.
        tolerance: See `sinkhorn`.
        max_iterations: See `sinkhorn`.

    Raises:
        ValueError: If one is out of range.
    """

    regularization: float = 0.0
    tolerance: float = 1e-4
    max_iterations: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.regularization < np.inf:
            raise ValueError(
                f"regularization must be 0 (exact) or a positive number, got "
                f"{self.regularization!r}"
            )
        if not 0 < self.tolerance < np.inf:
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance!r}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be 1 or more, got {self.max_iterations!r}")

    def plans(self, problems: Mapping[Key, Problem]) -> dict[Key, np.ndarray]:
        """Solves problems; with Sinkhorn's iteration those of one shape together.

        Args:
            problems: By number of the model and name of the group, or of a part of it.

        Returns:
            Likewise, the plan, float64 `[n, m]`.

        Raises:
            ValueError: As `exact_plan`.

        Warns:
            UserWarning: If Sinkhorn's iteration ended before the rows' sums were those wanted.
        """
        if not self.regularization:
            return {key: exact_plan(*given, name=_name(key)) for key, given in problems.items()}
        shapes: dict[tuple[int, ...], list[Key]] = {}
        for key, problem in problems.items():
            shapes.setdefault(problem.cost.shape, []).append(key)
        plans, late = {}, {}
        for keys in shapes.values():
            stacked = [np.stack(v) for v in zip(*(_full(problems[k]) for k in keys), strict=True)]
            costs, rows, columns = stacked
            found = _many(costs, rows, columns, *dataclasses.astuple(self))
            found = jax.tree.map(np.asarray, found)
            plans |= dict(zip(keys, found.plan.astype(np.float64), strict=True))
            stopped = found.iterations >= self.max_iterations
            late |= {key: found.error[k] for k, key in enumerate(keys) if stopped[k]}
        if late:
            worst = max(late, key=late.__getitem__)
            warnings.warn(
                f"Sinkhorn's iteration did not converge in {self.max_iterations} iterations for "
                f"{len(late)} of {len(problems)} plans; {_name(worst)} has rows off by "
                f"{late[worst]:.2g} in sum: raise max_iterations or regularization",
                stacklevel=4,
            )
        return {key: plans[key] for key in problems}


def _name(key: Key) -> str:
    return f"the cost of group '{key[1]}' of trees[{key[0]}]"


def _full(problem: Problem) -> Problem:
    """A problem with equal shares written out."""
    n, m = problem.cost.shape
    rows = np.full(n, 1 / n) if problem.rows is None else problem.rows
    return Problem(
        problem.cost, rows, np.full(m, 1 / m) if problem.columns is None else problem.columns
    )


def shares_of(importance: np.ndarray, kind: str) -> np.ndarray | None:
    """Shares of units by their importance.

    Args:
        importance: `[n]`, non-negative.
        kind: `"uniform"`, `"softmax"` for those in proportion to the exponential, or anything else
            for those in proportion to it.

    Returns:
        `[n]` summing to one, none below a thousandth of their mean; None for equal ones.
    """
    if kind == "uniform":
        return None
    share = softmax(importance) if kind == "softmax" else np.asarray(importance, np.float64)
    if not share.any():
        return None
    share = np.maximum(share, _LEAST * share.mean())
    return share / share.sum()


def maps_of(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge matrix `M [m, n]` and unmerge matrix `U [n, m]` of a plan `[n, m]`; rows sum to one.

    Each of the m units becomes the mean of those sent to it, by what they send; whatever reads one
    of the n units reads the mean of those that it was sent to.
    """
    plan = np.asarray(plan, np.float64)
    merge = plan.T / plan.sum(0)[:, None]
    return merge.astype(np.float32), (plan / plan.sum(1)[:, None]).astype(np.float32)
