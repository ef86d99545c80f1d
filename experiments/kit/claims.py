"""Claims of the papers as data, and how each is decided from a record.

A claim is one entry of a list::

    NONE = accuracy("none", remedy="none", layers=0)
    REPAIR = accuracy("REPAIR", remedy="repair", layers=0)
    Claim("vf.t3.repair-hurts", "REPAIR lowers the accuracy of CCA at l = 0",
          "81.9 to 57.7 (table 3)", Above(NONE, REPAIR), when=of_cca)

What is decided by two accuracies is open where both are near chance, for a network whose features
have vanished shows nothing, or where they differ by no more than noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kit import tables
from kit.records import Record

AS, UNLIKE, OPEN, NEW = "as in the paper", "unlike", "undecided here", "not in the paper"
VERDICTS = (AS, UNLIKE, OPEN, NEW)
# Accuracies of no more than so much above chance are near it.
NEAR = 0.1


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a rule says of a record.

    Attributes:
      holds: Whether the claim does; None where it cannot be told.
      here: What was measured.
    """

    holds: bool | None
    here: str


Rule = Callable[[Record], Decision | None]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
      id: The paper and where in it: `vf.t1.rescale-leads`. One claim has one id, wherever it is
        tested.
      claim: What is claimed, in some words; those of an index of all claims.
      paper: What the paper has, with numbers; empty where no paper has it.
      rule: How it is decided; where it gives None the claim is left out. Rules of this file are
        data; a function serves where none of them does.
      when: Which records it is held against.
      told: Of which of these the paper says it; of others it is measured, and not in the paper.
      by: How a rule that is a function decides, and by which margin.
    """

    id: str
    claim: str
    paper: str
    rule: Rule
    when: Callable[[Record], bool] = lambda record: True
    told: Callable[[Record], bool] = lambda record: True
    by: str = ""

    def verdict(self, record: Record) -> dict[str, str] | None:
        """What the record of a run holds of it."""
        found = self.rule(record) if self.when(record) else None
        if found is None:
            return None
        known = bool(self.paper) and self.told(record)
        verdict = {True: AS, False: UNLIKE, None: OPEN}[found.holds] if known else NEW
        return {
            "id": self.id,
            "claim": self.claim,
            "paper": self.paper if known else "",
            "here": found.here,
            "verdict": verdict,
            "rule": self.by or str(self.rule),
        }


def decided(claims: Iterable[Claim], record: Record) -> list[dict[str, str]]:
    """All claims that apply to a record, with their verdicts."""
    found = (claim.verdict(record) for claim in claims)
    return [row for row in found if row is not None]


def table(verdicts: Sequence[Mapping[str, str]], mark: str = "") -> tables.Table:
    """Claim, paper, here, verdict; before what is unlike the paper stands a mark."""
    lines = [
        [row["claim"], row["paper"] or "-", row["here"], mark * (v == UNLIKE) + v]
        for row in verdicts
        for v in [row["verdict"]]
    ]
    return tables.Table("", ["claim", "paper", "here", "verdict"], lines, texts=4)


def counts(verdicts: Iterable[Mapping[str, str]]) -> str:
    """How many there are of each verdict.

    Example:
      >>> counts([{"verdict": AS}, {"verdict": AS}, {"verdict": UNLIKE}])
      '2 as in the paper, 1 unlike'
    """
    found = [row["verdict"] for row in verdicts]
    return ", ".join(f"{found.count(v)} {v}" for v in VERDICTS if v in found)


# ------------------------------------------------------------------------------------ quantities


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number of a record, with a name; NaN where it is not there."""

    label: str
    of: Callable[[Record], float]

    def told(self, record: Record) -> str:
        """The name, and the number in per cent."""
        return f"{self.label} {100 * self.of(record):.1f}"


def accuracy(label: str, *, key: str = "accuracy", **where: Any) -> Quantity:
    """A mean over rows of a record; `where` as of `Rows.where`, or functions of the record."""

    def of(record: Record) -> float:
        wanted = {k: v(record) if callable(v) else v for k, v in where.items()}
        return record.rows.mean(key, **wanted)

    return Quantity(label, of)


def noise(value: float, images: int) -> float:
    """Two standard errors of an accuracy on so many images: what is closer is level.

    Example:
      >>> noise(0.5, 10_000)
      0.01
    """
    return 2 * math.sqrt(max(value * (1 - value), 0.0) / images)


def near_chance(record: Record, *values: float) -> bool:
    """Whether all of some accuracies are."""
    return all(value <= record.chance + NEAR for value in values)


def compared(record: Record, value: float, other: float, by: float = 0.0) -> bool | None:
    """Whether an accuracy is above another by more than `by`; None within noise or near chance.

    Example:
      >>> record = Record(data={"name": "cifar10", "test_images": 10_000})
      >>> [compared(record, value, 0.5) for value in (0.52, 0.505, 0.4)]
      [True, None, False]
      >>> compared(record, 0.17, 0.13)
    """
    if math.isnan(value - other) or near_chance(record, value, other):
        return None
    gap = value - other - by
    return None if abs(gap) <= noise(other, record["data"]["test_images"]) else gap > 0


def all_of(found: Iterable[bool | None]) -> bool | None:
    """Whether all hold: not if one does not, and open if that is open of one.

    Example:
      >>> all_of([True, None]), all_of([False, None]), all_of([])
      (None, False, True)
    """
    found = list(found)
    return False if False in found else None if None in found else True


# ----------------------------------------------------------------------------------------- rules


def _told(record: Record, *quantities: Quantity) -> str:
    return ", ".join(quantity.told(record) for quantity in quantities)


def _missing(record: Record, quantities: Iterable[Quantity]) -> bool:
    return any(math.isnan(quantity.of(record)) for quantity in quantities)


@dataclasses.dataclass(frozen=True)
class Above:
    """That one accuracy is above another, by more than `by`."""

    value: Quantity
    other: Quantity
    by: float = 0.0

    def __call__(self, record: Record) -> Decision | None:
        """Decides; nothing where one of the two was not measured."""
        if _missing(record, (self.value, self.other)):
            return None
        holds = compared(record, self.value.of(record), self.other.of(record), self.by)
        return Decision(holds, _told(record, self.value, self.other))

    def __str__(self) -> str:
        more = f" by more than {100 * self.by:g} points" if self.by else ""
        return f"{self.value.label} above {self.other.label}{more}; two standard errors are level"


@dataclasses.dataclass(frozen=True)
class Level:
    """That accuracies lie within so much of each other; unlike only beyond noise on top of it.

    With `by` of 0 they are to be equal up to noise.
    """

    values: Sequence[Quantity]
    by: float

    def __call__(self, record: Record) -> Decision | None:
        """Decides; nothing where one was not measured."""
        if _missing(record, self.values):
            return None
        found = [quantity.of(record) for quantity in self.values]
        text = f"{_told(record, *self.values)}"
        return Decision(level(record, found, self.by), text)

    def __str__(self) -> str:
        names = ", ".join(quantity.label for quantity in self.values)
        if not self.by:
            return f"{names} within two standard errors"
        return f"{names} within {100 * self.by:g} points; unlike from two standard errors more on"


def level(record: Record, values: Sequence[float], by: float) -> bool | None:
    """Whether accuracies lie within `by`, or, with `by` of 0, within noise.

    Example:
      >>> record = Record(data={"name": "cifar10", "test_images": 10_000})
      >>> [level(record, [0.5, other], 0.02) for other in (0.51, 0.525, 0.6)]
      [True, None, False]
      >>> [level(record, [0.5, other], 0) for other in (0.505, 0.525)]
      [True, False]
    """
    if near_chance(record, *values):
        return None
    gap, free = max(values) - min(values), noise(min(values), record["data"]["test_images"])
    if not by:
        return gap <= free
    return True if gap <= by else None if gap <= by + free else False


@dataclasses.dataclass(frozen=True)
class Leads:
    """That one accuracy is above all others (or, with `last`, below them)."""

    value: Quantity
    others: Sequence[Quantity]
    last: bool = False

    def __call__(self, record: Record) -> Decision | None:
        """Decides; nothing where one was not measured."""
        everyone = (self.value, *self.others)
        if _missing(record, everyone):
            return None
        value, others = self.value.of(record), [other.of(record) for other in self.others]
        if self.last:
            holds = compared(record, min(others), value)
        else:
            holds = compared(record, value, max(others))
        found = sorted(everyone, key=lambda quantity: -quantity.of(record))
        return Decision(holds, _told(record, *found))

    def __str__(self) -> str:
        names = ", ".join(quantity.label for quantity in self.others)
        side = "below" if self.last else "above"
        return f"{self.value.label} {side} all of {names}; two standard errors are level"


@dataclasses.dataclass(frozen=True)
class AtChance:
    """That an accuracy is no more than `by` from that of a guess."""

    value: Quantity
    by: float = 0.02

    def __call__(self, record: Record) -> Decision | None:
        """Decides; nothing where it was not measured."""
        found = self.value.of(record)
        if math.isnan(found):
            return None
        free = noise(record.chance, record["data"]["test_images"])
        gap = abs(found - record.chance)
        holds = True if gap <= self.by else None if gap <= self.by + free else False
        return Decision(holds, self.value.told(record))

    def __str__(self) -> str:
        return f"{self.value.label} within {100 * self.by:g} points of chance"
