"""What an alignment found, and the one assignment solver behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """Permutations that align one network to another.

    `net.spec.permute(b, found.permutations)` aligns b to a.

    Attributes:
        permutations: By group, int32 `[n]`: the aligned axis is `take(old, permutation)`.
        objective: What was maximised, after each sweep over the groups; never decreasing. One
            entry, the optimum, from a method that needs no sweeps.
        converged: Whether the last sweep found nothing to improve, rather than the limit on sweeps
            ending the search.
    """

    permutations: Mapping[str, np.ndarray]
    objective: tuple[float, ...]
    converged: bool

    @property
    def moved(self) -> int:
        """Number of units that do not stay in place."""
        return sum(
            int(np.count_nonzero(p != np.arange(len(p)))) for p in self.permutations.values()
        )

    def __repr__(self) -> str:
        """How far it moved and how it ended, in one line."""
        count, units = len(self.permutations), sum(map(len, self.permutations.values()))
        last = f"{self.objective[-1]:.6g}" if self.objective else "none"
        sweeps = len(self.objective)
        return (
            f"Alignment({count} group{'' if count == 1 else 's'}, {self.moved} of {units} units "
            f"moved, objective {last} after {sweeps} sweep{'' if sweeps == 1 else 's'}, "
            f"{'converged' if self.converged else 'not converged'})"
        )


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation `p` that maximises `sum_i gain[i, p[i]]`.

    Args:
        gain: `[n, n]`, finite.

    Returns:
        int32 `[n]`.

    Raises:
        ValueError: If an entry is NaN or infinite.

    Example:
        >>> assign(np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])).tolist()
        [2, 0, 1]
    """
    gain = np.asarray(gain, np.float64)
    if not np.isfinite(gain).all():
        raise ValueError(
            f"the matrix to assign holds {np.count_nonzero(~np.isfinite(gain))} NaN or infinite "
            "entries: products of these weights or activations overflow; look for diverged models"
        )
    return linear_sum_assignment(gain, maximize=True)[1].astype(np.int32)
