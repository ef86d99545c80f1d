"""Claims of the papers as data, and how each is decided from a record.

A claim is one entry of a list::

    NONE = accuracy("none", remedy="none", layers=0)
    REPAIR = accuracy("REPAIR", remedy="repair", layers=0)
    Claim("vf.t3.repair-hurts", "REPAIR lowers the accuracy of CCA at l = 0",
          "81.9 to 57.7 (table 3)", Above(NONE, REPAIR), when=of_cca)

What is decided by several accuracies is open where all of them are near chance, for networks whose
features have vanished show nothing, or where they differ by no more than noise. That one is at
chance may be what is claimed: it decides against one that is not, and so does `AtChance` alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from kit import tables
from kit.records import Record, joined, mean_std

AS, UNLIKE, OPEN, NEW = "as in the paper", "unlike", "undecided here", "not in the paper"
VERDICTS = (AS, UNLIKE, OPEN, NEW)
# Accuracies of no more than so much above chance are near it.
NEAR = 0.1
# Whether a claim holds (None where it cannot be told), and what was measured.
Decision = tuple[bool | None, str]
Rule = Callable[[Record], Decision | None]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper; where its rule gives None it is left out."""

    id: str  # The paper and where in it: `vf.t1.rescale-leads`; one id wherever it is tested.
    claim: str  # What is claimed, in some words.
    paper: str  # What the paper has, with numbers; empty where no paper has it.
    rule: Rule  # `Above`, `Level`, `Leads`, `AtChance`, or a function of the record.
    when: Callable[[Record], bool] = lambda record: True  # Which records it is held against.
    # Of which of these the paper says it; of others it is measured, and not in the paper.
    told: Callable[[Record], bool] = lambda record: True
    by: str = ""  # How a rule that is a function decides, and by which margin.


def decided(claims: Iterable[Claim], record: Record) -> list[dict[str, str]]:
    """All claims that apply to a record, with their verdicts."""
    rows = []
    for claim in claims:
        found = claim.rule(record) if claim.when(record) else None
        if found is not None:
            paper, rule = claim.paper if claim.told(record) else "", claim.by or str(claim.rule)
            verdict = {True: AS, False: UNLIKE, None: OPEN}[found[0]] if paper else NEW
            row = {"id": claim.id, "claim": claim.claim, "paper": paper, "here": found[1]}
            rows.append(row | {"verdict": verdict, "rule": rule})
    return rows


def table(verdicts: Sequence[Mapping[str, str]], mark: str = "") -> tables.Table:
    """Claim, paper, here, verdict; before what is unlike the paper stands a mark."""
    keys, lines = ["claim", "paper", "here", "verdict"], []
    for row in verdicts:
        shown = row | {"paper": row["paper"] or "-"}
        shown["verdict"] = mark * (row["verdict"] == UNLIKE) + row["verdict"]
        lines.append([shown[key] for key in keys])
    return tables.Table("", keys, lines, texts=4)


def counts(verdicts: Iterable[Mapping[str, str]]) -> str:
    """How many there are of each verdict, in words."""
    found = [row["verdict"] for row in verdicts]
    return ", ".join(f"{found.count(v)} {v}" for v in VERDICTS if v in found)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number of a record, with a name; NaN where it is not there."""

    label: str
    of: Callable[[Record], float]


def accuracy(label: str, *, key: str = "accuracy", **where: Any) -> Quantity:
    """A mean over rows of a record; `where` as of `Rows.where`, or functions of the record."""

    def of(record: Record) -> float:
        wanted = {k: v(record) if callable(v) else v for k, v in where.items()}
        return record.rows.mean(key, **wanted)

    return Quantity(label, of)


def noise(value: float, images: int) -> float:
    """Two standard errors of an accuracy on so many images: what is closer is level."""
    return 2 * math.sqrt(max(value * (1 - value), 0.0) / images)


def free(record: Record, value: float) -> float:
    """Two standard errors of an accuracy on the test images of a record."""
    return noise(value, record["data"]["test_images"])


def near_chance(record: Record, *values: float) -> bool:
    """Whether all of some accuracies are."""
    return all(value <= record.chance + NEAR for value in values)


def beyond(gap: float, free: float = 0.0) -> bool | None:
    """Whether a gap is above 0; None within noise, and where it was not measured."""
    return None if math.isnan(gap) or abs(gap) <= free else gap > 0


def reached(value: float, least: float, free: float) -> bool | None:
    """Whether a value is `least` or more; open where it is no more than noise below that."""
    return True if value >= least else None if value >= least - free else False


def compared(record: Record, value: float, other: float, by: float = 0.0) -> bool | None:
    """Whether an accuracy is above another by more than `by`; None within noise or near chance."""
    near = near_chance(record, value, other)
    return None if near else beyond(value - other - by, free(record, other))


def enough(record: Record, value: float, other: float, by: float = 0.0) -> bool | None:
    """Whether it is no more than `by` below another; open up to noise below, and near chance."""
    near = near_chance(record, value, other)
    return None if near else reached(value, other - by, free(record, other))


def level(record: Record, values: Sequence[float], by: float) -> bool | None:
    """Whether accuracies lie within `by` (open up to noise on top), or, by 0, within noise."""
    gap, noise = max(values) - min(values), free(record, min(values))
    if near_chance(record, *values):
        return None
    return reached(by, gap, noise) if by else gap <= noise


def leads(record: Record, value: float, *others: float, last: bool = False) -> bool | None:
    """Whether an accuracy is above all others, or, with `last`, below them."""
    return compared(record, min(others), value) if last else compared(record, value, max(others))


def all_of(found: Iterable[bool | None]) -> bool | None:
    """Whether all hold: not if one does not, and open if that is open of one."""
    found = list(found)
    return False if False in found else None if None in found else True


def every(found: Iterable[Decision]) -> Decision | None:
    """What several decisions come to: whether all hold, and what was measured of each."""
    found = list(found)
    here = joined(told for _, told in found)
    return (all_of(holds for holds, _ in found), here) if found else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A rule on some quantities; where one was not measured nothing is decided."""

    quantities: Sequence[Quantity]
    holds: Callable[..., bool | None]  # Called with the record and the numbers.
    text: str
    ranked: bool = False  # Whether the highest is told first.

    def __call__(self, record: Record) -> Decision | None:
        found = [quantity.of(record) for quantity in self.quantities]
        if any(map(math.isnan, found)):
            return None
        shown = [(q.label, value) for q, value in zip(self.quantities, found, strict=True)]
        shown = sorted(shown, key=lambda pair: -pair[1]) if self.ranked else shown
        here = ", ".join(f"{label} {100 * value:.1f}" for label, value in shown)
        return self.holds(record, *found), here

    def __str__(self) -> str:
        return self.text


def Above(value: Quantity, other: Quantity, by: float = 0.0) -> Comparison:
    """That one accuracy is above another, by more than `by`, see `compared`."""
    more = f" by more than {100 * by:g} points" if by else ""
    text = f"{value.label} above {other.label}{more}; two standard errors are level"
    return Comparison((value, other), partial(compared, by=by), text)


def Level(values: Sequence[Quantity], by: float) -> Comparison:
    """That accuracies lie within `by` of each other, see `level`."""
    points = f"{100 * by:g} points; unlike from two standard errors more on"
    labels = ", ".join(value.label for value in values)
    text = f"{labels} within {points if by else 'two standard errors'}"
    return Comparison(values, lambda record, *found: level(record, found, by), text)


def Leads(value: Quantity, others: Sequence[Quantity], last: bool = False) -> Comparison:
    """That one accuracy is above all others, or, with `last`, below them."""
    labels = ", ".join(other.label for other in others)
    side = "below" if last else "above"
    text = f"{value.label} {side} all of {labels}; two standard errors are level"
    return Comparison((value, *others), partial(leads, last=last), text, ranked=True)


def AtChance(value: Quantity, by: float = 0.02) -> Comparison:
    """That an accuracy is no more than `by` from that of a guess."""

    def holds(record: Record, found: float) -> bool | None:
        return reached(by, abs(found - record.chance), free(record, record.chance))

    return Comparison((value,), holds, f"{value.label} within {100 * by:g} points of chance")


def Enough(value: Quantity, other: Quantity, by: float) -> Comparison:
    """That one accuracy is no more than `by` below another, see `enough`."""
    text = f"{value.label} no more than {100 * by:g} points below {other.label}"
    return Comparison((value, other), partial(enough, by=by), text)


def Both(first: Comparison, second: Comparison) -> Comparison:
    """That two rules hold, of which the first has all quantities of the second, in its order."""

    def holds(record: Record, *found: float) -> bool | None:
        return all_of([first.holds(record, *found), second.holds(record, *found)])

    return Comparison(first.quantities, holds, f"{first}, and {second}")


def Told(*quantities: Quantity) -> Comparison:
    """Nothing: the numbers are there to be seen."""
    return Comparison(quantities, lambda record, *found: None, "not decided")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A rule on two accuracies at each value of a key that rows have of both.

    `holds` decides by the record, by the pairs of accuracies, and by whether the first of each is
    ahead, which is None within noise or near chance; by default it has to be everywhere.
    """

    value: Quantity
    other: Quantity
    text: str
    holds: Callable[..., bool | None] = lambda record, pairs, ahead: all_of(ahead)
    key: str = "layers"
    sign: str = "l"  # What the key is called.
    # At which values to compare, by the record with their rows alone.
    when: Callable[[Record], bool] = lambda record: True

    def pairs(self, record: Record) -> dict[Any, tuple[float, float]]:
        found = {}
        for at in sorted(record.rows.distinct(self.key)):
            there = Record(record | {"rows": record.rows.where(**{self.key: (at, None)})})
            pair = self.value.of(there), self.other.of(there)
            if not any(map(math.isnan, pair)) and self.when(there):
                found[at] = pair
        return found

    def points(self, record: Record) -> float:
        """How far the first is ahead on average."""
        return mean_std([100 * (a - b) for a, b in self.pairs(record).values()])[0]

    def __call__(self, record: Record) -> Decision | None:
        pairs = self.pairs(record)
        if not pairs:
            return None
        ahead = [compared(record, *pair) for pair in pairs.values()]
        ends = {at: [f"{100 * one:.1f}" for one in pairs[at]] for at in (min(pairs), max(pairs))}
        shown = [f"{' and '.join(both)} at {self.sign} = {at}" for at, both in ends.items()]
        names = f"{self.value.label} and {self.other.label}"
        here = f"{names} {', '.join(shown)}; ahead at {ahead.count(True)} and "
        here += f"behind at {ahead.count(False)} of {len(ahead)} {self.sign}, "
        here += f"{self.points(record):+.1f} points on average"
        return self.holds(record, list(pairs.values()), ahead), here

    def __str__(self) -> str:
        return self.text
