"""What "Vanishing Feature" claims of which layers to keep apart, and how it is decided."""

from __future__ import annotations

from typing import Any

from kit import pairs
from kit.claims import Claim, Sweep, accuracy
from kit.figures import label
from kit.records import Record

# What layers are kept apart, as it is called in tables.
KINDS = {"pfm": "PFM", "partial": "partial zip", "both": "both ends"}
# Share of the l at which PFM may be behind, as the paper's is.
EXCEPT = 2 / 12
BETTER = "ahead at over half of the l from 2 on and behind at no more than two in twelve, each by "
BETTER += "two standard errors; unlike where behind at more, else undecided"


def mostly(record: Record, found: Any, ahead: list[bool | None]) -> bool | None:
    few = ahead.count(False) <= EXCEPT * len(ahead)
    return few and (2 * ahead.count(True) > len(ahead) or None)


def against(kind: str, other: str, match: str, remedy: str, text: str, holds: Any) -> Sweep:
    """Two kinds at the l from 2 to L - 1: before, all are nearly the fully merged network."""
    both = [accuracy(KINDS[k], kind=k, match=match, remedy=remedy) for k in (kind, other)]
    return Sweep(*both, text, holds, when=lambda there: max(there.rows.distinct("layers")) > 1)


def ahead(match: str, remedy: str) -> Sweep:
    return against("pfm", "partial", match, remedy, BETTER, mostly)


CLAIMS = []
for match, name in pairs.MATCHES.items():
    for remedy in ("none", "rescale", "reset"):
        how = f"with {name} and {label(remedy)} keeping"
        CLAIMS.append(
            Claim(f"vf.partial.{match}-{remedy}",
                  f"{how} the first layers apart is better than keeping the last ones",
                  "for all numbers of unmerged layers except two, before and after RESCALE",
                  ahead(match, remedy)))  # fmt: skip
        if remedy != "none":
            rule = against("both", "pfm", match, remedy, "not decided", lambda *_: None)
            text = f"{how} layers apart at both ends, against PFM"
            CLAIMS.append(Claim(f"vf.new.both-ends-{match}-{remedy}", text, "", rule))
