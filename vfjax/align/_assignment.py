"""What an alignment found, and the one assignment solver behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

# What being in place adds to a gain, in parts of the size of gains and far below their rounding:
# ties, as between units that are dead in both networks, go to the unit in the same place, so that a
# network matched with itself stays as it is.
PLACE = 1e-9


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """Permutations that align one network to another.

    `net.spec.permute(b, found.permutations)` aligns b to a.

    Attributes:
        permutations: By group, int32 `[n]`: the aligned axis is `take(old, permutation)`. For a
            group within another of h entries (the dims of heads), int32 `[h, n]`.
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
            int(np.count_nonzero(p != np.arange(p.shape[-1]))) for p in self.permutations.values()
        )

    def __repr__(self) -> str:
        """How far it moved and how it ended, in one line."""
        count, units = len(self.permutations), sum(map(np.size, self.permutations.values()))
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


def assign_within(
    gain: np.ndarray, inner: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The best assignment of owners (heads), given the best ones of what is within each pair.

    Args:
        gain: `[h, h]`, finite: what pairing two owners gains by itself.
        inner: By group within, `[h, h, n, n]`: what pairing two of its entries gains, for each pair
            of owners.

    Returns:
        The permutation of the owners, int32 `[h]`, and by group the permutations inside owners, in
        their new order, int32 `[h, n]`.

    Raises:
        ValueError: If an entry is NaN or infinite.

    Example:
        >>> inner = np.zeros((2, 2, 2, 2))
        >>> inner[0, 1] = [[0.0, 3.0], [3.0, 0.0]]
        >>> outer, found = assign_within(np.zeros((2, 2)), {"dims": inner})
        >>> outer.tolist(), found["dims"].tolist()
        ([1, 0], [[1, 0], [0, 1]])

    Source: heads are matched by the assignments of their dims as in "Merging Text Transformer
    Models from Different Initializations" (Verma & Elbayad, 2024).
    """
    found = {name: assign_pairs(gains) for name, gains in inner.items()}
    outer = assign(sum((best for _, best in found.values()), np.array(gain, np.float64)))
    return outer, {name: pairs[np.arange(len(outer)), outer] for name, (pairs, _) in found.items()}


def assign_pairs(gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best assignment of what is within each pair of owners, and what it gains.

    Args:
        gains: `[h, h, n, n]`, finite.

    Returns:
        int32 `[h, h, n]` and `[h, h]`.

    Raises:
        ValueError: If an entry is NaN or infinite.
    """
    h, _, n, _ = gains.shape
    pairs = np.stack([assign(each) for each in gains.reshape(h * h, n, n)]).reshape(h, h, n)
    return pairs, np.take_along_axis(gains, pairs[..., None], axis=3).sum((2, 3))


def assign_in_place(
    gain: np.ndarray, inner: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `assign_within`; ties go to what is in place."""
    return assign_within(
        gain + PLACE * np.eye(len(gain)),
        {name: each + PLACE * np.eye(each.shape[-1]) for name, each in inner.items()},
    )
