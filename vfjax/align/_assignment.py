"""Linear assignment, which every matcher solves in the end, and the `Alignment` it results in."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

# Bonus for a unit that stays in place, relative to the size of the gains and far below any real
# difference: ties, as between units that are dead in both networks, go to the unit in the same
# place, so that a network matched with itself does not change.
PLACE = 1e-9


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """Permutations that align one network to another.

    `net.spec.permute(b, found.permutations)` aligns b to a. If b is a permuted copy of a, this is a
    again, by weights and by activations, but for these:

    - Units that nothing tells apart have any order: weights that are equal but for the order of
      other units, as after pruning or rounding to few values; activations that are constant, or
      equal up to scale and shift, on the data.
    - By activations, groups without a tap keep their order, and so do units inside each entry of a
      group (the dims of heads) that no tap shows together with the entries.
    - Where groups cross at a tap (heads, and dims that are the same for all heads),
      `match_activations` and `match_moments` decide them together. `match_universe` with data,
      `zip_features`, `cca` and `transport` compare the units of one in the order of the others.
    - Where another group lies along the samples of a tap, as when tokens are mixed channel by
      channel, `match_activations` measures again after permuting. From moments alone,
      `match_moments` cannot.
    - By weights, a copy with noise almost as large as the weights looks like another network, and
      an ordinary one is then searched once only; `optimistic=True` searches further in any case.

    Attributes:
        permutations: By group, int32 `[n]`: the aligned axis is `take(old, permutation)`. For a
            group within another of h entries (the dims of heads), int32 `[h, n]`.
        objective: The maximised quantity after each sweep over the groups; never decreasing. A
            method without sweeps gives one entry, the optimum.
        converged: Whether the search ended because the last sweep found nothing to improve, rather
            than at the limit on sweeps. It may have ended in a local optimum.
        bound: What no permutations can exceed and a permuted copy reaches, if it is known: how far
            the objective is from it says how far the networks differ, or the search fell short.
        by_weights: Groups that show in no activations and were matched by weights instead.
        unmatched: Groups that show in no activations and were left in their order.
    """

    permutations: Mapping[str, np.ndarray]
    objective: tuple[float, ...]
    converged: bool
    bound: float | None = None
    by_weights: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()

    @property
    def moved(self) -> int:
        """Number of units that do not stay in place."""
        return sum(
            int(np.count_nonzero(p != np.arange(p.shape[-1]))) for p in self.permutations.values()
        )

    def __repr__(self) -> str:
        """How many units moved and how the search ended, in one line."""
        count, units = len(self.permutations), sum(map(np.size, self.permutations.values()))
        last = f"{self.objective[-1]:.6g}" if self.objective else "none"
        last += "" if self.bound is None else f" of at most {self.bound:.6g}"
        sweeps = len(self.objective)
        return (
            f"Alignment({count} group{'' if count == 1 else 's'}, {self.moved} of {units} units "
            f"moved, objective {last} after {sweeps} sweep{'' if sweeps == 1 else 's'}, "
            f"{'converged' if self.converged else 'not converged'}"
            + _noted(self.by_weights, "by weights")
            + _noted(self.unmatched, "not matched")
            + ")"
        )


def _noted(groups: Collection[str], how: str) -> str:
    count = len(groups)
    return f", {count} group{'' if count == 1 else 's'} {how}" if groups else ""


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
    """Assigns owners (heads), given the best assignment of the entries within each pair of them.

    Args:
        gain: `[h, h]`, finite: the gain of pairing two owners, apart from the entries within them.
        inner: By group within, `[h, h, n, n]`: the gain of pairing two of its entries, for each
            pair of owners.

    Returns:
        The permutation of the owners, int32 `[h]`; and by group the permutations inside each owner,
        with owners in their new order, int32 `[h, n]`.

    Raises:
        ValueError: If an entry is NaN or infinite.

    Example:
        >>> inner = np.zeros((2, 2, 2, 2))
        >>> inner[0, 1] = [[0.0, 3.0], [3.0, 0.0]]
        >>> outer, within = assign_within(np.zeros((2, 2)), {"dims": inner})
        >>> outer.tolist(), within["dims"].tolist()
        ([1, 0], [[1, 0], [0, 1]])

    Source: heads are matched by the assignments of their dims as in "Merging Text Transformer
    Models from Different Initializations" (Verma & Elbayad, 2024).
    """
    best = {name: assign_pairs(gains) for name, gains in inner.items()}
    outer = assign(sum((value for _, value in best.values()), np.array(gain, np.float64)))
    return outer, {name: pairs[np.arange(len(outer)), outer] for name, (pairs, _) in best.items()}


def assign_pairs(gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best assignment of the entries within each pair of owners, and its gain.

    Args:
        gains: `[h, h, n, n]`, finite.

    Returns:
        The assignments, int32 `[h, h, n]`, and their gains, `[h, h]`.

    Raises:
        ValueError: If an entry is NaN or infinite.
    """
    h, _, n, _ = gains.shape
    pairs = np.stack([assign(each) for each in gains.reshape(h * h, n, n)]).reshape(h, h, n)
    return pairs, np.take_along_axis(gains, pairs[..., None], axis=3).sum((2, 3))


def assign_in_place(
    gain: np.ndarray, inner: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `assign_within`, with ties going to entries that stay in place."""
    return assign_within(
        gain + PLACE * np.eye(len(gain)),
        {name: each + PLACE * np.eye(each.shape[-1]) for name, each in inner.items()},
    )
