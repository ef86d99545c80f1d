"""Grouping correlated features of K models: ZipIt!'s greedy rule, and those it is compared with.

Every function takes the similarities `[N, N]` of the features of all models, one model after the
other, and returns the group of each feature, int `[N]`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from vfjax.align._assignment import assign

# Correlations are rounded to multiples of this: sums of integers are exact.
_UNIT = 2.0**-40

# No feature may be its own partner: this is worse than any pair, and its sums in float64 are exact.
_NEVER = -(2**44)


def greedy_groups(
    correlation: np.ndarray,
    sizes: Sequence[int],
    count: int,
    *,
    alpha: float,
    beta: float,
) -> np.ndarray:
    """Merges the most correlated features, pair by pair, until `count` are left.

    The correlation of a merged feature with any other is the least of those of its parts, times
    alpha; it counts for the model of its first part. With alpha 0 no feature is merged twice.

    Args:
        correlation: `[N, N]`, symmetric, of the features of all models, one model after another.
        sizes: Number of features of each model, summing to N.
        count: Number of features to keep.
        alpha: Discount of merged features, in [0, 1].
        beta: Share of the merges that may be within a model, in [0, 1], split equally.

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
    # A parent has a lower index than its child, so in this order it already points at its root.
    for feature in range(len(parents)):
        parents[feature] = parents[parents[feature]]
    return np.unique(parents, return_inverse=True)[1]


def identity_groups(similarity: np.ndarray, models: int) -> np.ndarray:
    """Groups features that are in the same place of their models."""
    return np.tile(np.arange(len(similarity) // models), models)


def permute_groups(similarity: np.ndarray, models: int) -> np.ndarray:
    """Groups every model's features with those of the first, by the best assignment."""
    first, *others = np.split(np.arange(len(similarity)), models)
    orders = [np.argsort(assign(similarity[np.ix_(first, other)])) for other in others]
    return np.concatenate([first, *orders])


def optimal_groups(similarity: np.ndarray) -> np.ndarray:
    """Pairs features, within or between two models, for the largest sum of correlations.

    Assigning all features to one another bounds that sum from above. The assignment consists of
    pairs except for a few odd cycles, and its dual prices give a lower bound on what the sum loses
    by using any pair. If a matching among pairs of small loss loses no more in total than the
    largest loss it was allowed, it is optimal; the limit is raised until that holds. Only few
    pairs, in small components, are then left to Edmonds' algorithm, which runs in pure Python.

    Args:
        similarity: `[2 n, 2 n]`, symmetric.
    """
    weight = np.rint(similarity / _UNIT).astype(np.int64)
    np.fill_diagonal(weight, _NEVER)
    partner = linear_sum_assignment(weight, maximize=True)[1]
    pairs, odd = _split(partner)
    if odd:
        pairs += _blossom(weight, itertools.combinations(odd, 2))
        # Prices and losses are doubled, so that they are integers.
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


def kmeans_groups(similarity: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
    """Clusters standardised features by k-means, started by k-means++.

    Only distances between features matter, so any vectors with the same inner products will do:
    here the rows of a square root of the correlations. An empty cluster, as when fewer features are
    distinct, takes the feature that is farthest from its own centre.

    Args:
        similarity: `[N, N]`, symmetric, without negative eigenvalues except by rounding.
        count: Number of clusters.
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


class _Pool:
    """The features that may still be merged, with an upper bound on each one's best partner.

    A merge never raises a similarity, so a bound remains valid, and need only be made exact once it
    is the largest. A merge then costs a few rows instead of the whole matrix.
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
        """Removes a pair; with alpha > 0 the merged feature goes back into the pool, as `first`."""
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


def _split(partner: np.ndarray) -> tuple[list[tuple[int, int]], list[int]]:
    """Splits the cycles of a permutation: even ones into pairs, odd ones into their members.

    In an optimum the two ways to cut an even cycle into pairs weigh the same: otherwise the better
    one, taken twice, would beat the cycle.
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
    """Twice the dual prices: those of any two features sum to at least twice their weight.

    Equality holds for every feature and its partner, so that all of them sum to twice the weight of
    the assignment.
    """
    own = weight[np.arange(len(weight)), partner]
    excess = weight - own[:, None]
    columns, before = np.zeros(len(weight), np.int64), None
    # Longest paths between assigned pairs (Bellman-Ford); they end, since an optimal assignment
    # leaves no cycle of positive weight.
    while before is None or (columns != before).any():
        before = columns
        columns = np.maximum(columns, (columns[partner][:, None] + excess).max(0))
    return own - columns[partner] + columns


def _blossom(weight: np.ndarray, allowed: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """The heaviest perfect matching among the pairs that are allowed."""
    import networkx

    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, int(weight[i, j])) for i, j in allowed)
    pairs: list[tuple[int, int]] = []
    for part in networkx.connected_components(graph):
        component = graph.subgraph(part)
        pairs += networkx.max_weight_matching(component, maxcardinality=True)
    return pairs
