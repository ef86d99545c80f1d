"""Greedy grouping of correlated features: the matching of ZipIt!, for any number of models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class _Pool:
    """The features that may still be merged, with an upper bound of each one's best partner.

    Entries of the similarity never grow by a merge, so that a bound once found stays one, and is
    made exact only when it is the largest. A merge then costs a few rows, not the whole matrix.
    """

    def __init__(self, similarity: np.ndarray, models: np.ndarray, budgets: np.ndarray) -> None:
        self.similarity, self.models, self.budgets = similarity, models, budgets
        self.active = np.ones(len(models), bool)
        self.best = np.full(len(models), -np.inf)
        self.partner = np.zeros(len(models), int)
        for row in range(len(models)):
            self._look(row)
        self.exact = np.ones(len(models), bool)

    def _look(self, row: int) -> None:
        """Finds the best partner of a feature."""
        allowed = self.active.copy()
        allowed[row] = False
        model = self.models[row]
        if self.budgets[model] <= 0:
            allowed &= self.models != model
        values = np.where(allowed, self.similarity[row], -np.inf)
        self.partner[row] = values.argmax()
        self.best[row] = values[self.partner[row]]

    def top(self) -> tuple[int, int]:
        """The most similar pair that may be merged, the lower index first."""
        while True:
            row = int(self.best.argmax())
            if self.exact[row]:
                if self.best[row] == -np.inf:
                    raise ValueError("no pair is left that may be merged: raise alpha or beta")
                return tuple(sorted((row, int(self.partner[row]))))  # type: ignore[return-value]
            self._look(row)
            self.exact[row] = True

    def merge(self, first: int, second: int, alpha: float) -> None:
        """Takes a pair out; with alpha > 0 what it was merged to goes back, as `first`."""
        if self.models[first] == self.models[second]:
            self.budgets[self.models[first]] -= 1
            if self.budgets[self.models[first]] <= 0:
                self.exact[self.models == self.models[first]] = False
        self.active[second] = False
        self.best[second] = -np.inf
        self.exact[np.isin(self.partner, (first, second))] = False
        if alpha > 0:
            least = np.minimum(self.similarity[first], self.similarity[second])
            # Discounting a negative correlation would make it larger.
            least = np.where(least > 0, alpha * least, least)
            self.similarity[first] = self.similarity[:, first] = least
            self.exact[first] = False
        else:
            self.active[first] = False
            self.best[first] = -np.inf
        self.exact[second] = True


def greedy_groups(
    correlation: np.ndarray,
    sizes: Sequence[int],
    count: int,
    *,
    alpha: float,
    beta: float,
) -> np.ndarray:
    """Merges the most correlated features, pair by pair, until `count` are left.

    A merged feature has with any other the least of the correlations of its parts, times alpha, and
    counts for the model of its first part. With alpha 0 nothing is merged twice.

    Args:
        correlation: `[N, N]`, symmetric, of the features of all models, one model after another.
        sizes: Features of each model, summing to N.
        count: Features to keep.
        alpha: Discount of merged features, in [0, 1].
        beta: Share of the merges that may be inside a model, in [0, 1], split equally.

    Returns:
        int `[N]`: the group of each feature, from 0 to `count - 1`, in the order of first members.

    Raises:
        ValueError: If no pair is left that may be merged, as with alpha 0 and more than two models.

    Source: "ZipIt! Merging Models from Different Tasks without Training" (Stoica et al., 2024),
    section 4.3 and appendix.
    """
    models = np.repeat(np.arange(len(sizes)), sizes)
    removed = len(models) - count
    budgets = np.full(len(sizes), int(removed * beta / len(sizes) + 1e-9))
    similarity = np.array(correlation, np.float64)
    pool = _Pool(similarity, models, budgets)
    parents = np.arange(len(models))
    for _ in range(removed):
        first, second = pool.top()
        pool.merge(first, second, alpha)
        parents[second] = first
    # Lower indices come first, so that each parent is at its root when its turn comes.
    for feature in range(len(parents)):
        parents[feature] = parents[parents[feature]]
    return np.unique(parents, return_inverse=True)[1]
