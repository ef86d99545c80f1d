"""Transport plans between two sets of units: exact ones, and entropic ones by Sinkhorn's iteration.

A plan `T [n, m]` says how much of each of n units goes to each of m others. Its rows sum to the
shares of the n units, its columns to those of the m others.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from scipy.optimize import linprog
from scipy.special import softmax

from vfjax._trees.options import number, whole
from vfjax.align._assignment import PLACE, assign

# Index of a model, and the name of a group or a part of a group.
Key = tuple[int, Any]

# Units of equal shares are cut into equal pieces, which are then assigned, as long as there are at
# most _FEW pieces, or at most _PIECES pairs of pieces per pair of units: an assignment takes about
# the cube of the number of pieces. Otherwise the linear programme of the whole units is faster:
# 5 ms against 0.1 s for 32 and 31 units, 15 ms against 6 s for 64 and 63; but 150 ms against 50 for
# 256 and 192, 550 against 13 for 512 and 256.
_FEW, _PIECES = 256, 16
# Largest cost matrix given to the linear programme: half a minute and 1.2 GB.
_LARGEST = 1 << 20
# Least share of a unit, relative to the mean share: shares are divided by.
_LEAST = 1e-3
# Factor by which the regularization falls in each of the first iterations, from the mean cost on.
_FALL = 0.9
# A plan is recomputed once its scales exceed the first; entries below the second are set to zero,
# being negligible under any such scale. So no product becomes subnormal, which would be slow.
_EXTREME, _NOTHING = 1e30, 1e-200
# Least regularization: below it, rounding errors of the costs would show in the plans.
_HARDEST = 1e-10


def exact_plan(
    cost: np.ndarray,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
    *,
    name: str = "the cost",
) -> np.ndarray:
    """The plan of least cost.

    Equal shares are assigned: one to one if there are as many units on both sides, with ties going
    to those in the same place; otherwise in equal pieces, as many on either side. Where shares
    differ, or there would be many pieces, a linear programme is solved.

    Args:
        cost: `[n, m]`, finite.
        rows: `[n]`, positive, summing to one; None for equal shares.
        columns: `[m]`, as `rows`.
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
    few = pieces <= _FEW or pieces**2 <= _PIECES * n * m
    if rows is None and columns is None and few:
        gain = PLACE * cost.mean() * np.eye(n, m) - cost
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
    # The sum of the last column follows from the others. It is left out: rounding could make it
    # contradict them.
    sums = scipy.sparse.vstack(
        [
            scipy.sparse.kron(scipy.sparse.eye(n), np.ones((1, m))),
            scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye(m - 1, m)),
        ],
        format="csr",
    )
    _, supply, demand = _full(Problem(cost, rows, columns))
    # Shares of about one, and costs up to one, since the solver's tolerances are absolute.
    solution = linprog(
        cost.ravel() / (np.abs(cost).max() or 1),
        A_eq=sums,
        b_eq=max(n, m) * np.concatenate([supply, demand])[:-1],
        method="highs-ds",
    )
    if solution.x is None:
        raise ValueError(f"{name}: the linear programme was not solved: {solution.message}")
    return np.maximum(solution.x, 0).reshape(n, m) / max(n, m)


def sinkhorn(
    cost: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    regularization: float,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 10_000,
) -> Entropic:
    """The plan of least cost minus its entropy, by Sinkhorn's iteration in float64.

    Minimises `<T, C> - regularization * mean(C) * H(T)`. The first iterations use a larger
    regularization that falls to the one given, which takes far fewer of them than a cold start.
    They work on logarithms; those that follow scale the rows and columns of a plan, which is
    recomputed from the logarithms as soon as a scale becomes extreme.

    Args:
        cost: `[n, m]`, finite, its mean positive or all of it zero.
        rows: `[n]`, positive, summing to one.
        columns: `[m]`, as `rows`.
        regularization: Weight of the entropy, relative to the mean cost; positive.
        tolerance: Iterations go on while the error of the rows' sums exceeds this.
        max_iterations: The largest number of iterations.

    Returns:
        The plan, its error and the number of iterations.

    Example:
        >>> cost, share = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0.5, 0.5])
        >>> sinkhorn(cost, share, share, 0.1).plan.round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

    Source: "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (Cuturi, 2013), with
    the falling regularization and the absorbed scales of "Stabilized Sparse Scaling Algorithms for
    Entropy Regularized Transport Problems" (Schmitzer, 2019).
    """
    cost, rows, columns = (np.asarray(v, np.float64) for v in (cost, rows, columns))
    regularization = float(regularization)
    cost = cost / (cost.mean() or 1)
    log_rows, log_columns = np.log(rows), np.log(columns)
    f, g = np.zeros_like(rows), np.zeros_like(columns)
    plan, off, eps, count = np.outer(rows, columns), np.inf, np.inf, 0
    while (eps != regularization or off > tolerance) and count < max_iterations:
        # The last iteration allowed uses the final regularization, so that `error` is of its plan.
        eps = max(regularization, _FALL**count if count + 1 < max_iterations else 0)
        f = eps * (log_rows - _log_sums((g - cost) / eps, 1))
        g = eps * (log_columns - _log_sums((f[:, None] - cost) / eps, 0))
        plan, count = np.exp((f[:, None] + g - cost) / eps), count + 1
        plan[plan < _NOTHING] = 0
        left, right, sums = np.ones_like(rows), np.ones_like(columns), plan.sum(1)
        off = np.abs(sums - rows).sum()
        while eps == regularization and off > tolerance and count < max_iterations:
            with np.errstate(divide="ignore", invalid="ignore"):
                scales = rows / sums, columns / ((rows / sums) @ plan)
            if not all((1 / _EXTREME < v).all() and (v < _EXTREME).all() for v in scales):
                break
            (left, right), count = scales, count + 1
            sums = plan @ right
            off = np.abs(left * sums - rows).sum()
        plan = left[:, None] * plan * right
        f, g = f + eps * np.log(left), g + eps * np.log(right)
    return Entropic(plan, float(np.abs(plan.sum(1) - rows).sum()), count)


class Entropic(NamedTuple):
    """What Sinkhorn's iteration found.

    Attributes:
        plan: float64 `[n, m]`; its columns sum to their shares up to rounding.
        error: Sum of the absolute differences between the sums of its rows and their shares.
        iterations: Number of iterations.
    """

    plan: np.ndarray
    error: float
    iterations: int


class Problem(NamedTuple):
    """A transport problem.

    Attributes:
        cost: `[n, m]`.
        rows: `[n]`, positive, summing to one; None for equal shares.
        columns: `[m]`, as `rows`.
    """

    cost: np.ndarray
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Solver:
    """Solves transport problems: exactly at regularization 0, else by Sinkhorn's iteration.

    Attributes:
        regularization: See `sinkhorn`; 0 for exact plans.
        tolerance: See `sinkhorn`.
        max_iterations: See `sinkhorn`.
        rigid: Groups that can only be permuted, with the reason. Their plans are exact and between
            equal shares.

    Raises:
        ValueError: If one is out of range.
    """

    regularization: float = 0.0
    tolerance: float = 1e-4
    max_iterations: int = 10_000
    rigid: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        part = number(self.regularization)
        if part != 0 and not _HARDEST <= part < np.inf:
            raise ValueError(
                f"regularization must be 0 (exact) or a number from {_HARDEST} on, such as 0.01, "
                f"got {self.regularization!r}"
            )
        if not 0 < number(self.tolerance) < np.inf:
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance!r}")
        if whole(self.max_iterations) < 1:
            raise ValueError(
                f"max_iterations must be a whole number of 1 or more, got {self.max_iterations!r}"
            )

    def plans(self, problems: Mapping[Key, Problem]) -> dict[Key, np.ndarray]:
        """Solves problems.

        Args:
            problems: Problems by index of the model and name of the group, or part of a group.

        Returns:
            The plans by the same keys, float64 `[n, m]`.

        Raises:
            ValueError: As `exact_plan`.

        Warns:
            UserWarning: If the row sums of a plan are off by more than the tolerance.
        """
        plans = {}
        for key, problem in problems.items():
            group = getattr(key[1], "group", key[1])
            if group in self.rigid:
                n, m = problem.cost.shape
                if n != m:
                    raise ValueError(
                        f"group '{group}' has {n} entries in trees[{key[0]}] and {m} in trees[0], "
                        f"and can only be permuted: {self.rigid[group]}"
                    )
                problem = Problem(problem.cost)
            if not self.regularization or group in self.rigid:
                plans[key] = exact_plan(*problem, name=_name(key))
        limits = {"tolerance": self.tolerance, "max_iterations": self.max_iterations}
        entropic = {
            key: sinkhorn(*_full(problem), self.regularization, **limits)
            for key, problem in problems.items()
            if key not in plans
        }
        late = {key: one.error for key, one in entropic.items() if one.error > self.tolerance}
        if late:
            worst = max(late, key=late.__getitem__)
            warnings.warn(
                f"Sinkhorn's iteration did not converge in {self.max_iterations} iterations for "
                f"{len(late)} of {len(problems)} plans; {_name(worst)} has rows off by "
                f"{late[worst]:.2g} in sum, above the tolerance {self.tolerance:.2g}: raise "
                "max_iterations, regularization or tolerance",
                stacklevel=4,
            )
        plans |= {key: one.plan for key, one in entropic.items()}
        return {key: plans[key] for key in problems}


def maps_of(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge matrix `M [m, n]` and unmerge matrix `U [n, m]` of a plan `[n, m]`; rows sum to one.

    Each of the m units becomes the mean of the units sent to it, weighted by how much they send;
    whatever reads one of the n units reads the weighted mean of the units that it was sent to.
    """
    plan = np.asarray(plan, np.float64)
    merge = plan.T / plan.sum(0)[:, None]
    return merge.astype(np.float32), (plan / plan.sum(1)[:, None]).astype(np.float32)


def shares_of(importance: np.ndarray, kind: str) -> np.ndarray | None:
    """Shares of units, computed from their importance.

    Args:
        importance: `[n]`, non-negative.
        kind: `"uniform"` for equal shares, `"softmax"` for shares in proportion to the exponential
            of the importance, anything else for shares in proportion to the importance itself.

    Returns:
        `[n]` summing to one, none below a thousandth of their mean; None for equal shares.
    """
    if kind == "uniform":
        return None
    share = softmax(importance) if kind == "softmax" else np.asarray(importance, np.float64)
    if not share.any():
        return None
    share = np.maximum(share, _LEAST * share.mean())
    return share / share.sum()


def _log_sums(logs: np.ndarray, axis: int) -> np.ndarray:
    """Logarithms of sums of exponentials; scipy's `logsumexp` takes several times as long."""
    top = logs.max(axis, keepdims=True)
    return np.log(np.exp(logs - top).sum(axis)) + np.squeeze(top, axis)


def _name(key: Key) -> str:
    return f"the cost of group '{key[1]}' of trees[{key[0]}]"


def _full(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cost, and the shares of rows and columns with equal ones written out."""
    cost, rows, columns = problem
    n, m = cost.shape
    rows = np.full(n, 1 / n) if rows is None else rows
    return cost, rows, np.full(m, 1 / m) if columns is None else columns
