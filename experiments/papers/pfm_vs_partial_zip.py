"""What "Vanishing Feature" claims of which layers to keep apart, and how it is decided."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from kit import claims, pairs
from kit.claims import Claim, Decision
from kit.figures import label
from kit.records import Record

# What layers are kept apart, as it is called in tables.
KINDS = {"pfm": "PFM", "partial": "partial zip", "both": "both ends"}
# Share of the l at which PFM may be behind, as the paper's is.
EXCEPT = 2 / 12


def remedy_of(record: Record) -> str:
    """What merged layers are renormalised with."""
    return next(remedy for remedy in record.rows.distinct("remedy") if remedy != "none")


@dataclasses.dataclass(frozen=True)
class Compared:
    """PFM against another kind, at the l from 2 to L - 1.

    Attributes:
      count: How many l.
      ahead: At how many of them PFM is above the other by more than noise, and not near chance.
      behind: At how many it is below.
      points: Points that it is ahead on average; NaN where there is nothing to compare.
    """

    count: int
    ahead: int
    behind: int
    points: float


def compared_at(record: Record, match: str, remedy: str, other: str) -> Compared:
    """Compares the two kinds with a matching and a remedy."""
    rows = record.rows.where(match=match, remedy=remedy)
    between = [at for at in rows.distinct("layers") if at > 1]
    found = [[rows.mean(kind=kind, layers=at) for kind in ("pfm", other)] for at in between]
    found = [pair for pair in found if not np.isnan(pair).any()]
    told = [claims.compared(record, *pair) for pair in found]
    gaps = [100 * (pfm - value) for pfm, value in found]
    mean = float(np.mean(gaps)) if gaps else float("nan")
    return Compared(len(found), told.count(True), told.count(False), mean)


def pfm_ahead(record: Record, match: str, remedy: str) -> Decision | None:
    """Whether PFM is ahead of partial zipping at over half of the l, and behind at few."""
    found = compared_at(record, match, remedy, "partial")
    if not found.count:
        return None
    here = f"ahead at {found.ahead} and behind at {found.behind} of {found.count} l, "
    here += f"{found.points:+.1f} points on average"
    few, most = found.behind <= EXCEPT * found.count, 2 * found.ahead > found.count
    return Decision(few and (most or None), here)


def both_ends(record: Record, match: str, remedy: str) -> Decision | None:
    """How keeping layers apart at both ends compares with PFM."""
    found = compared_at(record, match, remedy, "both")
    here = f"{-found.points:+.1f} points against PFM on average"
    return Decision(None, here) if found.count else None


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
            functools.partial(pfm_ahead, match=match, remedy=remedy), by=BETTER)
      for match, remedy, text in SETTINGS),
    *(Claim(f"vf.new.both-ends-{match}-{remedy}",
            f"{text} keeping layers apart at both ends, against PFM", "",
            functools.partial(both_ends, match=match, remedy=remedy), by="not decided")
      for match, remedy, text in SETTINGS if remedy != "none"),
]  # fmt: skip
