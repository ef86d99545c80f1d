"""Greedy grouping of correlated features: the matching of ZipIt!, for any number of models."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from vfjax.align._assignment import assign


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


# Correlations count in these units: sums of integers are exact.
_UNIT = 2.0**-40

# No feature is its own partner: worse than any two others, and still exact in sums of float64.
_NEVER = -(2**44)


def identity_groups(similarity: np.ndarray, models: int) -> np.ndarray:
    """Features in the same place of their models."""
    return np.tile(np.arange(len(similarity) // models), models)


def permute_groups(similarity: np.ndarray, models: int) -> np.ndarray:
    """Every model's features with those of the first, by the assignment that correlates best."""
    first, *others = np.split(np.arange(len(similarity)), models)
    found = [np.argsort(assign(similarity[np.ix_(first, other)])) for other in others]
    return np.concatenate([first, *found])


def optimal_groups(similarity: np.ndarray) -> np.ndarray:
    """The pairs of features, within or between two models, of the largest sum of correlations.

    The assignment of all features to one another bounds that sum from above. It consists of pairs
    but for a few odd cycles, and its dual prices tell what the sum loses at least by any pair. A
    matching of the pairs that lose no more than some bound is the best of all if as a whole it
    loses no more than that; the bound is raised until it is. Few pairs are left by then, in small
    components, to Edmonds' algorithm, which is in pure Python.

    Args:
        similarity: `[2 n, 2 n]`, symmetric.
    """
    weight = np.rint(similarity / _UNIT).astype(np.int64)
    np.fill_diagonal(weight, _NEVER)
    partner = linear_sum_assignment(weight, maximize=True)[1]
    pairs, odd = _split(partner)
    if odd:
        pairs += _blossom(weight, itertools.combinations(odd, 2))
        # All losses are twice what they are, to be integers.
        prices = _prices(weight, partner)
        losses = prices[:, None] + prices - 2 * weight
        loss = sum(int(losses[pair]) for pair in pairs)
        bound = loss // 64
        while True:
            near = np.argwhere(np.triu(losses <= bound, 1)).tolist()
            pairs = _blossom(weight, itertools.chain(near, pairs))
            loss = sum(int(losses[pair]) for pair in pairs)
            if loss <= bound:
                break
            bound = min(4 * bound + 1, loss)
    labels = np.empty(len(weight), int)
    for label, pair in enumerate(pairs):
        labels[list(pair)] = label
    return labels


def _split(partner: np.ndarray) -> tuple[list[tuple[int, int]], list[int]]:
    """The even cycles of a permutation as pairs, and the members of its odd cycles.

    Both halves of an even cycle of an optimum weigh the same, or twice the better were better.
    """
    pairs: list[tuple[int, int]] = []
    odd: list[int] = []
    left = set(range(len(partner)))
    while left:
        cycle = [min(left)]
        while (following := int(partner[cycle[-1]])) != cycle[0]:
            cycle.append(following)
        left -= set(cycle)
        if len(cycle) % 2:
            odd += cycle
        else:
            pairs += zip(cycle[::2], cycle[1::2], strict=True)
    return pairs, odd


def _prices(weight: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Twice the dual prices: of any two features they sum to twice their weight or more.

    With equality for every feature and its partner, they sum to twice the assignment's weight.
    """
    own = weight[np.arange(len(weight)), partner]
    excess = weight - own[:, None]
    columns, before = np.zeros(len(weight), np.int64), None
    # The longest paths from assigned pair to assigned pair; optimality leaves no gainful cycle.
    while before is None or (columns != before).any():
        before = columns
        columns = np.maximum(columns, (columns[partner][:, None] + excess).max(0))
    return own - columns[partner] + columns


def _blossom(weight: np.ndarray, allowed: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """The heaviest perfect matching among the pairs that are allowed."""
    import networkx

    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, int(weight[i, j])) for i, j in allowed)
    found: list[tuple[int, int]] = []
    for part in networkx.connected_components(graph):
        component = graph.subgraph(part)
        found += networkx.max_weight_matching(component, maxcardinality=True)
    return found


def kmeans_groups(similarity: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
    """Clusters of standardised features, by k-means from k-means++.

    Features enter by their distances alone, and any vectors of the same inner products will do:
    here the rows of a root of the correlations. A cluster that runs empty, as where fewer features
    are distinct, takes the feature that is farthest from its own.

    Args:
        similarity: `[N, N]`, symmetric, of no negative eigenvalue but by rounding.
        count: Clusters.
        key: A random key.
    """
    from sklearn.cluster import KMeans

    values, basis = np.linalg.eigh((similarity + similarity.T) / 2)
    rows = basis * np.sqrt(np.maximum(values, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        seed = int(jax.random.bits(key))
        labels = np.array(KMeans(count, n_init="auto", random_state=seed).fit_predict(rows))
    sizes = np.bincount(labels, minlength=count)
    centres = np.stack([rows[labels == c].mean(0) if n else rows[0] for c, n in enumerate(sizes)])
    far = np.square(rows - centres[labels]).sum(1)
    for empty in np.flatnonzero(sizes == 0):
        taken = int(np.where(sizes[labels] > 1, far, -1).argmax())
        sizes[labels[taken]] -= 1
        labels[taken], sizes[empty], far[taken] = empty, 1, 0
    return labels
