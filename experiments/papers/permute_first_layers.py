"""What "Vanishing Feature" claims of matching the first layers only, and how it is decided."""

from __future__ import annotations

from functools import partial

import numpy as np
from kit import claims
from kit.claims import Claim, Decision
from kit.figures import label
from kit.records import Record
from scipy.stats import spearmanr

MATCHES = {"weight": "weights matched", "activation": "activations matched"}
REMEDIES = ("none", "repair", "rescale", "reset")
# In tables and claims.
SHORT = {"weight": "WM", "activation": "AM"}
# When accuracy counts as rising with l, and up to which part of the rise may come last.
LEAST, CORRELATION, LAST_PART = 0.05, 0.8, 1 / 6


def rank_correlation(values: np.ndarray) -> float:
    """Spearman's rank correlation of values with their place; 0 if all are equal.

    Example:
      >>> rank_correlation([0.1, 0.2, 0.4]), rank_correlation([0.1, 0.1])
      (1.0, 0.0)
    """
    if len(set(values)) == 1:
        return 0.0
    return round(float(spearmanr(range(len(values)), values).statistic), 6)


def short(match: str, remedy: str) -> str:
    """The name of a curve.

    Example:
      >>> short("weight", "none"), short("activation", "repair")
      ('WM', 'AM + REPAIR')
    """
    return SHORT[match] + ("" if remedy == "none" else f" + {label(remedy)}")


def rising(record: Record, values: list[float]) -> bool | None:
    """Whether accuracy rises by enough; open within noise, and where all of it is near chance."""
    gap, near = values[-1] - values[0] - LEAST, claims.near_chance(record, *values)
    return None if near else claims.beyond(gap, claims.free(record, values[0]))


def rises(record: Record, values: list[float]) -> Decision:
    rank, found = rank_correlation(values), rising(record, values)
    if not claims.near_chance(record, *values):
        found = claims.all_of([found, rank > CORRELATION])
    return found, f"{100 * values[0]:.1f} to {100 * values[-1]:.1f}, rank correlation {rank:.2f}"


def saturates(record: Record, values: list[float]) -> Decision:
    depth, free = record["model"]["depth"], claims.free(record, values[-1])
    late = depth - depth // 3
    rise, last = values[-1] - values[0], values[-1] - values[late]
    found = rising(record, values) and claims.reached(LAST_PART * rise, last, free)
    return found, f"l = {late} to {depth} adds {100 * last:.1f} of {100 * rise:.1f} points"


def stays_below(record: Record, values: list[float]) -> Decision:
    edge, best = record["summary"]["edge_mean"], int(np.argmax(values))
    found = rising(record, values) and claims.compared(record, edge, values[best])
    return found, f"{100 * values[best]:.1f} at l = {best}, edge models {100 * edge:.1f}"


def of_curve(record: Record, match: str, remedy: str, rule: claims.Rule) -> Decision | None:
    """A rule on one curve, if it was measured."""
    values = record.rows.curve("layers", match=match, remedy=remedy)[1]
    return rule(record, values) if values else None


CLAIMS = [
    Claim(f"vf.first-layers.{name}-{match}-{remedy}", f"{short(match, remedy)}: {text}", paper,
          partial(of_curve, match=match, remedy=remedy, rule=rule), by=by)
    for name, text, paper, rule, by in (
        ("rises", "accuracy rises with l", "it rises", rises,
         "by more than 5 points (two standard errors are level) from l = 0 to L, with a rank "
         "correlation of accuracy and l above 0.8"),
        ("saturates", "accuracy saturates", "it saturates", saturates,
         "it rises, and the last third of the layers adds at most a sixth of the rise, half of "
         "its even share; up to two standard errors more are undecided"),
        ("below", "accuracy stays below the edge models", "below the edge models", stays_below,
         "it rises, and no l reaches the edge models' mean; two standard errors are level"))
    for match in MATCHES for remedy in REMEDIES
]  # fmt: skip
