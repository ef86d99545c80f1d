"""How long the matchers of features take, on the correlations of random features.

    python experiments/benchmarks/zip.py

ZipIt!'s greedy rule looks at all pairs that are left for each merge. `vfjax` looks again only at
the rows that a merge touches; the aim is 5 seconds on two cores, for 4096 features of two models in
all and for two models of 4096 each. A plain implementation of the rule finds the same groups of
1024 features; ratios are to its time. The other matchers, that ZipIt!'s paper compares with, take
the features of two models of 256, as in the widest stage of its ResNet20 at four times the width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _frame

from vfjax.align._grouping import (
    greedy_groups,
    identity_groups,
    kmeans_groups,
    optimal_groups,
    permute_groups,
)

SECONDS = 5
ALPHA, BETA = 0.3, 0.125


def correlations(size: int) -> np.ndarray:
    """Of rectified features that have causes in common."""
    rng = np.random.default_rng(0)
    causes = rng.normal(size=(min(2 * size, 8192), size // 4))
    values = causes @ rng.normal(size=(size // 4, size)) / np.sqrt(size // 4)
    found = np.corrcoef(np.maximum(values + rng.normal(size=values.shape) / 2, 0).T)
    return (found + found.T) / 2


def naive(similarity: np.ndarray, models: np.ndarray, count: int) -> np.ndarray:
    """The rule as it is stated: the largest entry of what is left, row by row and in copies."""
    similarity = similarity.copy()
    np.fill_diagonal(similarity, -np.inf)
    budgets = np.full(2, int(count * BETA / 2))
    parts = [[feature] for feature in range(len(similarity))]
    while len(parts) > count:
        spent = (models[:, None] == models) & (budgets[models] <= 0)
        first, second = divmod(int(np.where(spent, -np.inf, similarity).argmax()), len(parts))
        least = np.minimum(similarity[first], similarity[second])
        least = np.where(least > 0, ALPHA * least, least)
        similarity[first] = similarity[:, first] = least
        similarity[first, first] = -np.inf
        model = models[first]
        if model == models[second]:
            budgets[model] -= 1
        parts[first] += parts.pop(second)
        models = np.delete(models, second)
        similarity = np.delete(np.delete(similarity, second, 0), second, 1)
    labels = np.empty(sum(map(len, parts)), int)
    for label, members in enumerate(parts):
        labels[members] = label
    return labels


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the benchmark; returns the path of the record."""
    args = _frame.parser(__doc__).parse_args(argv)
    sizes = (16, 64, 128, 16) if args.quick else (1024, 4096, 8192, 512)
    small, large, twice, group = sizes
    few, many, most, wide = (correlations(size) for size in sizes)

    def greedy(similarity: np.ndarray) -> np.ndarray:
        n = len(similarity) // 2
        return greedy_groups(similarity, [n, n], n, alpha=ALPHA, beta=BETA)

    def plain() -> np.ndarray:
        return naive(few, np.repeat([0, 1], small // 2), small // 2)

    if (plain() != greedy(few)).any():
        raise AssertionError("the greedy matcher finds other groups than the rule")
    seconds = {
        **_frame.alternate(
            {
                "plain": plain,
                "few": lambda: greedy(few),
                "many": lambda: greedy(many),
                "most": lambda: greedy(most),
            },
            min(args.repeats, 3),
        ),
        **_frame.alternate(others(wide), min(args.repeats, 3)),
    }
    best = {what: min(values) for what, values in seconds.items()}
    rows: list[dict[str, Any]] = [
        {"what": f"greedy, plain, {small} features", "seconds": best.pop("plain")},
        {
            "what": f"greedy, {small} features",
            "seconds": best.pop("few"),
            "ratio": _frame.ratio(seconds, "plain", "few"),
        },
    ]
    for what, size in (("many", large), ("most", twice)):
        took = best.pop(what)
        verdict = {"target": f"<= {SECONDS} s", "met": took <= SECONDS}
        rows.append({"what": f"greedy, {size} features", "seconds": took} | verdict)
    rows += [{"what": f"{what}, {group} features", "seconds": took} for what, took in best.items()]
    title = "matching the features of two models by their correlations"
    return _frame.finish("zip", args, title, rows)


def others(similarity: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The matchers that the greedy one is compared with."""
    count = len(similarity) // 2
    return {
        "optimal": lambda: optimal_groups(similarity),
        "k-means": lambda: kmeans_groups(similarity, count, jax.random.key(0)),
        "permute": lambda: permute_groups(similarity, 2),
        "identity": lambda: identity_groups(similarity, 2),
    }


if __name__ == "__main__":
    main()
