"""What "ZipIt!" claims of networks of different data sets, and how it is decided."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from statistics import fmean

from kit import claims
from kit.claims import Claim, Decision, Rule
from kit.records import Record, Row, Rows, joined
from kit.sets import LABELS, NAMES

METHODS = {"average": "weights averaged", "permute": "permuted", "zip": "ZipIt!"}
GROUPS = {"pairs": "pairs", "all": "all at once"}
# By how much one mean must be above another, how much may be lost, and which share is closed.
ABOVE, LOST, CLOSED = 0.005, 0.1, 0.5


def means_of(record: Record) -> Rows:
    """By combination, method and layers merged: the mean over data sets, each with its own head.

    The margin is two standard errors of that mean.
    """
    images = {one["name"]: one["test_images"] for one in record["data"]}
    cells: dict[tuple, list[Row]] = {}
    for row in record.rows:
        if row["head"] == row["tested"] and row["method"] != "as trained":
            cells.setdefault((row["datasets"], row["method"], row.get("layers")), []).append(row)
    found = Rows()
    for (names, method, layers), rows in cells.items():
        mean = fmean(row["accuracy"] for row in rows)
        errors = [claims.noise(row["accuracy"], images[row["tested"]]) for row in rows]
        about = {"datasets": "+".join(sorted(names.split("+"))), "method": method, "layers": layers}
        about |= {"group": "pairs" if len(rows) == 2 else "all"}
        found.append(about | {"accuracy": mean, "margin": math.hypot(*errors) / len(errors)})
    return found


def zips(rows: Rows, key: str = "accuracy", method: str = "zip") -> list[float]:
    """Means by numbers of layers merged; margins of pairs, on the same images, add up."""
    return rows.curve("layers", key, method=method)[1]


def counts_of(record: Record) -> list[int]:
    return sorted(record.rows.distinct("layers"))


def at(record: Record, values: Iterable[float]) -> str:
    depth, told = record["model"]["depth"], zip(values, counts_of(record), strict=True)
    return joined(f"{100 * value:.1f} at {count}/{depth}" for value, count in told)


def above(record: Record, value: float, other: float, margin: float) -> bool | None:
    """Whether one is above the other; open within the margin and near chance."""
    chance = fmean(1 / one["classes"] for one in record["data"])
    near = max(value, other) <= chance + claims.NEAR
    return None if near else claims.beyond(value - other, margin)


def of(rule: Callable[[Record, Rows], Decision], **wanted: str) -> Rule:
    """A rule on the means of some combinations, where these were measured."""

    def decide(record: Record) -> Decision | None:
        rows = means_of(record).where(**wanted)
        return rule(record, rows) if rows else None

    return decide


def order(record: Record, rows: Rows) -> Decision:
    ends = {method: zips(rows, method=method)[-1] for method in METHODS}
    margin, steps = zips(rows, "margin", "permute")[-1], itertools.pairwise(ends.values())
    told = [above(record, more, less + ABOVE, margin) for less, more in steps]
    return claims.all_of(told), joined(f"{METHODS[m]} {100 * v:.1f}" for m, v in ends.items())


def falls(record: Record, rows: Rows) -> Decision:
    values, margins = zips(rows), zips(rows, "margin")[1:]
    steps = zip(values, values[1:], margins, strict=False)
    return claims.all_of(above(record, *step) for step in steps), at(record, values)


def ahead(record: Record, rows: Rows) -> Decision:
    known = zips(rows), zips(rows, method="permute"), zips(rows, "margin", "permute")
    told = {above(record, *numbers) for numbers in zip(*known, strict=True)}
    here = f"ZipIt! {at(record, known[0])}; permuted {at(record, known[1])}"
    return False if False in told else True if True in told else None, here


def near_ensemble(record: Record, rows: Rows) -> Decision:
    zipped, margin, ensemble = zips(rows)[0], zips(rows, "margin")[0], rows.mean(method="network")
    steps = [(ensemble, zipped, margin), (zipped, ensemble - LOST, margin)]
    here = f"ZipIt! {100 * zipped:.1f}, ensemble {100 * ensemble:.1f}"
    return claims.all_of(above(record, *step) for step in steps), here


def gaps(rows: Rows) -> list[float]:
    return [rows.mean(method="network") - value for value in zips(rows)]


def all_lose_more(record: Record, rows: Rows) -> Decision:
    pairs = means_of(record).where(group="pairs")
    margins = map(math.hypot, zips(rows, "margin"), zips(pairs, "margin"))
    known = zip(gaps(rows), gaps(pairs), margins, strict=True)
    here = f"below the ensemble by {at(record, gaps(rows))}, pairs {at(record, gaps(pairs))}"
    return claims.all_of(claims.beyond(a - b, margin) for a, b, margin in known), here


def few_close(record: Record, rows: Rows) -> Decision:
    few, *_, most = gaps(rows)
    here = f"{100 * (1 - few / most):.0f}% of the gap" if most > 0 else "there is no gap"
    return claims.beyond((1 - CLOSED) * most - few, zips(rows, "margin")[0]), here


def permuted(record: Record, rows: Rows) -> Decision:
    # All at once come last.
    group = rows[-1]["group"]
    return None, f"{GROUPS[group]}, {at(record, zips(rows.where(group=group), method='permute'))}"


NOISE = "two standard errors of a mean over data sets are level"
CLAIMS = [
    *(claim
      for group, text, ends, counts in (
          ("pairs", "pairs", "37.1, 35.7 and 11.3", "68.7, 62.4 and 37.1"),
          ("all", "all at once", "16.8, 15.3 and 1.2", "65.3, 45.5 and 16.8"))
      for claim in (
          Claim(f"zip.sets.{group}-order", f"{text} of networks of different data sets, merged "
                "nearly whole: zipping is above permuting, and that above averaging", ends,
                of(order, group=group), by=f"each by over half a point; {NOISE}"),
          Claim(f"zip.sets.{group}-falls", f"{text} of networks of different data sets: accuracy "
                "falls with the layers zipped", f"{counts} at 10, 22 and 49 of 50",
                of(falls, group=group),
                by=f"from each number of layers to the next; {NOISE}"))),
    *(Claim(f"zip.sets.{'-'.join(pair)}",
            f"{joined(LABELS[name] for name in pair)}: zipping is ahead of permuting",
            "37.1 and 35.7, the mean of pairs", of(ahead, datasets="+".join(pair), group="pairs"),
            by=f"at some number of layers, and behind at none; {NOISE}")
      for pair in itertools.combinations(sorted(NAMES), 2)),
    Claim("zip.sets.near-ensemble",
          "pairs zipped at a fifth of the layers are below the ensemble, by less than 10 points",
          "68.7 of 75.5", of(near_ensemble, group="pairs"), by=NOISE),
    Claim("zip.sets.all-lose-more", "all at once lose more than pairs",
          "65.3, 45.5 and 16.8; pairs 68.7, 62.4 and 37.1", of(all_lose_more, group="all"),
          by=f"at every number of layers; {NOISE}"),
    Claim("zip.sets.few-close", "all at once: a fifth of the layers instead of nearly all closes "
          "over half of the gap to the ensemble", "65.3 for 16.8, of 75.5",
          of(few_close, group="all"), by=NOISE),
    Claim("zip.new.sets-permuted", "networks of different data sets permuted, with heads of their "
          "own", "", of(permuted), by="not decided"),
]  # fmt: skip
