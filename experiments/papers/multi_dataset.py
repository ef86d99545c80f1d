"""What "ZipIt!" claims of networks of different data sets, and how it is decided."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from functools import partial

from kit import claims
from kit.claims import Claim, Decision
from kit.records import Record, joined
from kit.sets import LABELS, NAMES

METHODS = {"average": "weights averaged", "permute": "permuted", "zip": "ZipIt!"}
GROUPS = {"pairs": "pairs", "all": "all at once"}
# By how much one mean must be above another, how much may be lost, and which share is closed.
ABOVE, LOST, CLOSED = 0.005, 0.1, 0.5


def sets_of(record: Record, group: str) -> list[str]:
    """The combinations of a group: pairs, or all data sets where they are more."""
    found = record.rows.distinct("datasets", method="network")
    return [name for name in found if (name.count("+") == 1) == (group == "pairs")]


def mean_of(record: Record, names: Iterable[str], method: str, layers: int | None = None) -> float:
    """Mean accuracy over data sets, each with its own head, and over combinations."""
    rows = record.rows.where(method="network" if method == "ensemble" else method, layers=layers)
    own = type(rows)(row for row in rows if row["head"] == row["tested"])
    means = [own.mean(datasets=name) for name in names]
    return sum(means) / len(means) if means else math.nan


def margin_of(record: Record, names: Iterable[str], method: str, layers: int | None) -> float:
    """Two standard errors of that mean; those of combinations, on the same images, add up."""
    images, found = {one["name"]: one["test_images"] for one in record["data"]}, []
    for name in names:
        values = record.rows.where(datasets=name, method=method, layers=layers)
        errors = [claims.noise(row["accuracy"], images[row["tested"]]) for row in values]
        found.append(math.hypot(*errors) / len(errors))
    return sum(found) / len(found)


def decided(record: Record, value: float, other: float, margin: float) -> bool | None:
    """Whether one is above the other; open within the margin and near chance."""
    chance = sum(1 / one["classes"] for one in record["data"]) / len(record["data"])
    near = max(value, other) <= chance + claims.NEAR
    return None if near else claims.beyond(value - other, margin)


def counts_of(record: Record) -> list[int]:
    return sorted(record.rows.distinct("layers"))


def at(record: Record, values: Iterable[float]) -> str:
    """Accuracies by numbers of layers merged."""
    depth = record["model"]["depth"]
    told = zip(values, counts_of(record), strict=True)
    return joined(f"{100 * value:.1f} at {count}/{depth}" for value, count in told)


def zips(record: Record, group: str, method: str = "zip") -> list[float]:
    names = sets_of(record, group)
    return [mean_of(record, names, method, count) for count in counts_of(record)]


def order(record: Record, group: str) -> Decision | None:
    names, most = sets_of(record, group), counts_of(record)[-1]
    if not names:
        return None
    ends = {text: mean_of(record, names, method, most) for method, text in METHODS.items()}
    margin, steps = margin_of(record, names, "permute", most), itertools.pairwise(ends.values())
    told = [decided(record, more, less + ABOVE, margin) for less, more in steps]
    words = joined(f"{text} {100 * value:.1f}" for text, value in ends.items())
    return claims.all_of(told), f"{most}/{record['model']['depth']} layers merged: {words}"


def falls(record: Record, group: str) -> Decision | None:
    names, counts, values = sets_of(record, group), counts_of(record), zips(record, group)
    if not names:
        return None
    margins = [margin_of(record, names, "zip", count) for count in counts[1:]]
    pairs = zip(itertools.pairwise(values), margins, strict=True)
    told = [decided(record, *pair, margin) for pair, margin in pairs]
    return claims.all_of(told), at(record, values)


def pair_ahead(record: Record, pair: set[str]) -> Decision | None:
    names = [name for name in sets_of(record, "pairs") if set(name.split("+")) == pair]
    if not names:
        return None
    counts, depth = counts_of(record), record["model"]["depth"]
    places: dict[bool | None, list[str]] = {True: [], None: [], False: []}
    zipped, permuted = ([mean_of(record, names, method, count) for count in counts]
                        for method in ("zip", "permute"))  # fmt: skip
    for count, *both in zip(counts, zipped, permuted, strict=True):
        margin = margin_of(record, names, "permute", count)
        places[decided(record, *both, margin)].append(f"{count}/{depth}")
    words = {True: "ahead", None: "level", False: "behind"}
    where = ", ".join(f"{words[verdict]} at {joined(of)}" for verdict, of in places.items() if of)
    here = f"ZipIt! {at(record, zipped)}, permuted {at(record, permuted)}: {where}"
    return False if places[False] else True if places[True] else None, here


def near_ensemble(record: Record) -> Decision:
    names, few = sets_of(record, "pairs"), counts_of(record)[0]
    zipped, ensemble = zips(record, "pairs")[0], mean_of(record, names, "ensemble")
    margin, pairs = margin_of(record, names, "zip", few), [(ensemble, zipped)]
    pairs.append((zipped, ensemble - LOST))
    here = f"{few}/{record['model']['depth']} {100 * zipped:.1f}, ensemble {100 * ensemble:.1f}"
    return claims.all_of(decided(record, *pair, margin) for pair in pairs), here


def _gaps(record: Record, group: str) -> list[float]:
    ensemble = mean_of(record, sets_of(record, group), "ensemble")
    return [ensemble - value for value in zips(record, group)]


def all_lose_more(record: Record) -> Decision | None:
    if not sets_of(record, "all"):
        return None
    pairs, every = (_gaps(record, group) for group in GROUPS)
    told = []
    for count, *gaps in zip(counts_of(record), pairs, every, strict=True):
        margins = (margin_of(record, sets_of(record, g), "zip", count) for g in GROUPS)
        told.append(claims.beyond(gaps[1] - gaps[0], math.hypot(*margins)))
    here = f"below the ensemble by {at(record, every)}, pairs {at(record, pairs)}"
    return claims.all_of(told), here


def few_close(record: Record) -> Decision | None:
    names, counts = sets_of(record, "all"), counts_of(record)
    if not names:
        return None
    few, *_, most = _gaps(record, "all")
    closed = 1 - few / most if most > 0 else 0.0
    here = f"{counts[0]} zipped layers instead of {counts[-1]} close {100 * closed:.0f}% of the gap"
    margin = margin_of(record, names, "zip", counts[0])
    return claims.beyond((1 - CLOSED) * most - few, margin), here


def permuted(record: Record) -> Decision:
    group = "all" if sets_of(record, "all") else "pairs"
    return None, f"{GROUPS[group]}, {at(record, zips(record, group, 'permute'))}"


NOISE = "two standard errors of a mean over data sets are level"
CLAIMS = [
    *(claim
      for group, text, ends, counts in (
          ("pairs", "pairs", "37.1, 35.7 and 11.3", "68.7, 62.4 and 37.1"),
          ("all", "all at once", "16.8, 15.3 and 1.2", "65.3, 45.5 and 16.8"))
      for claim in (
          Claim(f"zip.sets.{group}-order", f"{text} of networks of different data sets, merged "
                "nearly whole: zipping is above permuting, and that above averaging", ends,
                partial(order, group=group), by=f"each by over half a point; {NOISE}"),
          Claim(f"zip.sets.{group}-falls", f"{text} of networks of different data sets: accuracy "
                "falls with the layers zipped", f"{counts} at 10, 22 and 49 of 50",
                partial(falls, group=group),
                by=f"from each number of layers to the next; {NOISE}"))),
    *(Claim(f"zip.sets.{'-'.join(sorted(pair))}",
            f"{joined(LABELS[name] for name in pair)}: zipping is ahead of permuting",
            "37.1 and 35.7, the mean of pairs", partial(pair_ahead, pair=set(pair)),
            by=f"at some number of layers, and behind at none; {NOISE}")
      for pair in itertools.combinations(NAMES, 2)),
    Claim("zip.sets.near-ensemble",
          "pairs zipped at a fifth of the layers are below the ensemble, by less than 10 points",
          "68.7 of 75.5", near_ensemble, by=NOISE),
    Claim("zip.sets.all-lose-more", "all at once lose more than pairs",
          "65.3, 45.5 and 16.8; pairs 68.7, 62.4 and 37.1", all_lose_more,
          by=f"at every number of layers; {NOISE}"),
    Claim("zip.sets.few-close", "all at once: a fifth of the layers instead of nearly all closes "
          "over half of the gap to the ensemble", "65.3 for 16.8, of 75.5", few_close, by=NOISE),
    Claim("zip.new.sets-permuted", "networks of different data sets permuted, with heads of their "
          "own", "", permuted, by="not decided"),
]  # fmt: skip
