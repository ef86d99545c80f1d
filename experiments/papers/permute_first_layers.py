"""What "Vanishing Feature" claims of matching the first layers only, and how it is decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from kit import claims
from kit.claims import Claim, Decision
from kit.figures import label
from kit.records import Record
from scipy.stats import spearmanr

MATCHES = {"weight": "WM", "activation": "AM"}
# By their names in tables and claims.
CURVES = {
    name + ("" if remedy == "none" else f" + {label(remedy)}"): {"match": match, "remedy": remedy}
    for match, name in MATCHES.items()
    for remedy in ("none", "repair", "rescale", "reset")
}
# When accuracy counts as rising with l, and up to which part of the rise may come last.
LEAST, CORRELATION, LAST_PART = 0.05, 0.8, 1 / 6


def correlated(record: Record, values: list[float]) -> Decision:
    rank = spearmanr(range(len(values)), values).statistic if len(set(values)) > 1 else 0.0
    here = f"{100 * values[0]:.1f} to {100 * values[-1]:.1f}, rank correlation {rank:.2f}"
    return bool(rank > CORRELATION), here


def saturates(record: Record, values: list[float]) -> Decision:
    depth, free = record["model"]["depth"], claims.free(record, values[-1])
    late = depth - depth // 3
    rise, last = values[-1] - values[0], values[-1] - values[late]
    here = f"l = {late} to {depth} adds {100 * last:.1f} of {100 * rise:.1f} points"
    return claims.reached(LAST_PART * rise, last, free), here


def stays_below(record: Record, values: list[float]) -> Decision:
    edge, best = record["summary"]["edge_mean"], int(np.argmax(values))
    here = f"{100 * values[best]:.1f} at l = {best}, edge models {100 * edge:.1f}"
    return claims.compared(record, edge, values[best]), here


def of_curve(record: Record, name: str, rule: Callable[..., Decision]) -> Decision | None:
    """A rule on one curve, which has to rise, too; what is all near chance decides nothing."""
    values = record.rows.curve("layers", **CURVES[name])[1]
    if not values:
        return None
    holds, here = rule(record, values)
    rises = claims.beyond(values[-1] - values[0] - LEAST, claims.free(record, values[0]))
    near = claims.near_chance(record, *values)
    return None if near else claims.all_of([rises, holds]), f"{name}: {here}"


# fmt: off
RULES = (
    ("rises", "it rises", "accuracy rises with l, the number of first layers matched", correlated,
     "by more than 5 points (two standard errors are level) from l = 0 to L, with a rank "
     "correlation of accuracy and l above 0.8"),
    ("saturates", "it saturates", "accuracy saturates with the first layers matched", saturates,
     "it rises, and the last third of the layers adds at most a sixth of the rise, half of its "
     "even share; up to two standard errors more are undecided"),
    ("below", "below the edge models", "accuracy stays below the edge models, whatever first "
     "layers are matched", stays_below,
     "it rises, and no l reaches the edge models' mean; two standard errors are level"),
)
# fmt: on
CLAIMS = [
    Claim(
        f"vf.first-layers.{id}:{'-'.join(where.values())}",
        text,
        paper,
        partial(of_curve, name=name, rule=rule),
        by=by,
    )
    for id, paper, text, rule, by in RULES
    for name, where in CURVES.items()
]  # fmt: skip
