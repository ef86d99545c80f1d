"""What "Vanishing Feature" claims of which layers to keep apart, and how it is decided."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from kit import claims, pairs
from kit.claims import Claim, Decision
from kit.figures import label
from kit.records import Record, mean_std

# What layers are kept apart, as it is called in tables.
KINDS = {"pfm": "PFM", "partial": "partial zip", "both": "both ends"}
# Share of the l at which PFM may be behind, as the paper's is.
EXCEPT = 2 / 12


def remedy_of(record: Record) -> str:
    return next(remedy for remedy in record.rows.distinct("remedy") if remedy != "none")


class Compared(NamedTuple):
    """PFM against another kind: at how many l it was compared, above and below; points ahead."""

    count: int
    ahead: int
    behind: int
    points: float


def compared_at(record: Record, match: str, remedy: str, other: str) -> Compared:
    """Compares the two kinds at the l from 2 to L - 1, by more than noise and not near chance."""
    rows = record.rows.where(match=match, remedy=remedy)
    found = [[rows.mean(kind=kind, layers=at) for kind in ("pfm", other)]
             for at in rows.distinct("layers") if at > 1]  # fmt: skip
    found = [pair for pair in found if not np.isnan(pair).any()]
    told = [claims.compared(record, *pair) for pair in found]
    mean, _ = mean_std([100 * (pfm - value) for pfm, value in found])
    return Compared(len(found), told.count(True), told.count(False), mean)


def pfm_ahead(record: Record, match: str, remedy: str) -> Decision | None:
    found = compared_at(record, match, remedy, "partial")
    here = f"ahead at {found.ahead} and behind at {found.behind} of {found.count} l, "
    here += f"{found.points:+.1f} points on average"
    few, most = found.behind <= EXCEPT * found.count, 2 * found.ahead > found.count
    return (few and (most or None), here) if found.count else None


def both_ends(record: Record, match: str, remedy: str) -> Decision | None:
    found = compared_at(record, match, remedy, "both")
    return (None, f"{-found.points:+.1f} points against PFM on average") if found.count else None


SETTINGS = [
    (match, remedy, f"with {name} and {label(remedy)}")
    for match, name in pairs.MATCHES.items()
    for remedy in ("none", "rescale", "reset")
]
BETTER = "ahead at over half of the l from 2 on and behind at no more than two in twelve, each by "
BETTER += "two standard errors; unlike where behind at more, else undecided"
CLAIMS = [
    *(Claim(f"vf.partial.{match}-{remedy}",
            f"{text} keeping the first layers apart is better than keeping the last ones",
            "for all numbers of unmerged layers except two, before and after RESCALE",
            partial(pfm_ahead, match=match, remedy=remedy), by=BETTER)
      for match, remedy, text in SETTINGS),
    *(Claim(f"vf.new.both-ends-{match}-{remedy}",
            f"{text} keeping layers apart at both ends, against PFM", "",
            partial(both_ends, match=match, remedy=remedy), by="not decided")
      for match, remedy, text in SETTINGS if remedy != "none"),
]  # fmt: skip
