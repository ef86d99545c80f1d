"""What "ZipIt!" claims of networks of different data sets, and how it is decided."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable

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


def chance_of(record: Record) -> float:
    """The mean accuracy of guesses."""
    return sum(1 / one["classes"] for one in record["data"]) / len(record["data"])


def decided(record: Record, value: float, other: float, margin: float) -> bool | None:
    """Whether one is above the other; open within the margin and near chance."""
    near = max(value, other) <= chance_of(record) + claims.NEAR
    return None if near or abs(value - other) <= margin else value > other


def counts_of(record: Record) -> list[int]:
    """The numbers of layers merged."""
    return sorted(record.rows.distinct("layers"))


def at(record: Record, values: Iterable[float]) -> str:
    """Accuracies by numbers of layers merged."""
    depth = record["model"]["depth"]
    told = zip(values, counts_of(record), strict=True)
    return joined(f"{100 * value:.1f} at {count}/{depth}" for value, count in told)


def zips(record: Record, group: str, method: str = "zip") -> list[float]:
    """Means by number of layers merged."""
    names = sets_of(record, group)
    return [mean_of(record, names, method, count) for count in counts_of(record)]


def order(record: Record, group: str) -> Decision | None:
    """Whether, merged nearly whole, zipping is above permuting and that above averaging."""
    names, most = sets_of(record, group), counts_of(record)[-1]
    if not names:
        return None
    ends = {method: mean_of(record, names, method, most) for method in METHODS}
    average, permute, zipped = ends.values()
    margin = margin_of(record, names, "permute", most)
    told = [
        decided(record, zipped, permute + ABOVE, margin),
        decided(record, permute, average + ABOVE, margin),
    ]
    words = joined(f"{METHODS[method]} {100 * value:.1f}" for method, value in ends.items())
    here = f"{most}/{record['model']['depth']} layers merged: {words}"
    return Decision(claims.all_of(told), here)


def falls(record: Record, group: str) -> Decision | None:
    """Whether accuracy falls with the number of layers merged."""
    names, counts = sets_of(record, group), counts_of(record)
    if not names:
        return None
    values = zips(record, group)
    margins = [margin_of(record, names, "zip", count) for count in counts[1:]]
    pairs = zip(itertools.pairwise(values), margins, strict=True)
    told = [decided(record, *pair, margin) for pair, margin in pairs]
    return Decision(claims.all_of(told), at(record, values))


def pair_ahead(record: Record, pair: frozenset[str]) -> Decision | None:
    """Whether zipping is ahead of permuting at some numbers of layers, and behind at none."""
    names = [name for name in sets_of(record, "pairs") if frozenset(name.split("+")) == pair]
    if not names:
        return None
    depth, places = record["model"]["depth"], {True: [], None: [], False: []}
    values = {
        method: [mean_of(record, names, method, count) for count in counts_of(record)]
        for method in ("zip", "permute")
    }
    for count, zipped, permuted in zip(counts_of(record), *values.values(), strict=True):
        margin = margin_of(record, names, "permute", count)
        places[decided(record, zipped, permuted, margin)].append(f"{count}/{depth}")
    words = {True: "ahead", None: "level", False: "behind"}
    where = [f"{words[verdict]} at {joined(of)}" for verdict, of in places.items() if of]
    told = [f"{METHODS[m]} {at(record, values[m])}" for m in values]
    here = f"{', '.join(told)}: {', '.join(where)}"
    return Decision(False if places[False] else True if places[True] else None, here)


def near_ensemble(record: Record) -> Decision:
    """Whether pairs zipped at about a fifth of the layers are below the ensemble, by less."""
    names, few = sets_of(record, "pairs"), counts_of(record)[0]
    zipped, ensemble = zips(record, "pairs")[0], mean_of(record, names, "ensemble")
    margin = margin_of(record, names, "zip", few)
    here = f"{few}/{record['model']['depth']} {100 * zipped:.1f}, ensemble {100 * ensemble:.1f}"
    told = [
        decided(record, ensemble, zipped, margin),
        decided(record, zipped, ensemble - LOST, margin),
    ]
    return Decision(claims.all_of(told), here)


def _gaps(record: Record) -> dict[str, list[float]]:
    found = {}
    for group in GROUPS:
        ensemble = mean_of(record, sets_of(record, group), "ensemble")
        found[group] = [ensemble - value for value in zips(record, group)]
    return found


def all_lose_more(record: Record) -> Decision | None:
    """Whether all at once lose more than pairs, at every number of layers."""
    if not sets_of(record, "all"):
        return None
    gaps, told = _gaps(record), []
    for count, pairs, every in zip(counts_of(record), *gaps.values(), strict=True):
        margins = (margin_of(record, sets_of(record, g), "zip", count) for g in GROUPS)
        margin, more = math.hypot(*margins), every - pairs
        told.append(None if abs(more) <= margin else more > 0)
    here = f"below the ensemble by {at(record, gaps['all'])}, pairs {at(record, gaps['pairs'])}"
    return Decision(claims.all_of(told), here)


def few_close(record: Record) -> Decision | None:
    """Whether few layers instead of nearly all close over half of the gap to the ensemble."""
    names = sets_of(record, "all")
    if not names:
        return None
    gaps, counts = _gaps(record)["all"], counts_of(record)
    few, most = gaps[0], gaps[-1]
    closed = 1 - few / most if most > 0 else 0.0
    here = f"{counts[0]} zipped layers instead of {counts[-1]} close {100 * closed:.0f}% of the gap"
    more, margin = (1 - CLOSED) * most - few, margin_of(record, names, "zip", counts[0])
    return Decision(None if abs(more) <= margin else more > 0, here)


def permuted(record: Record) -> Decision:
    """What networks permuted have, with heads of their own."""
    group = "all" if sets_of(record, "all") else "pairs"
    return Decision(None, f"{GROUPS[group]}, {at(record, zips(record, group, 'permute'))}")


NOISE = "two standard errors of a mean over data sets are level"
CLAIMS = [
    *(claim for group, text in GROUPS.items() for claim in (
        Claim(f"zip.sets.{group}-order",
              f"{text} of networks of different data sets, merged nearly whole: zipping is above "
              "permuting, and that above averaging",
              {"pairs": "37.1, 35.7 and 11.3", "all": "16.8, 15.3 and 1.2"}[group],
              functools.partial(order, group=group), by=f"each by over half a point; {NOISE}"),
        Claim(f"zip.sets.{group}-falls",
              f"{text} of networks of different data sets: accuracy falls with the layers zipped",
              {"pairs": "68.7, 62.4 and 37.1", "all": "65.3, 45.5 and 16.8"}[group]
              + " at 10, 22 and 49 of 50", functools.partial(falls, group=group),
              by=f"from each number of layers to the next; {NOISE}"))),
    *(Claim(f"zip.sets.{'-'.join(sorted(pair))}",
            f"{joined(LABELS[name] for name in pair)}: zipping is ahead of permuting",
            "37.1 and 35.7, the mean of pairs",
            functools.partial(pair_ahead, pair=frozenset(pair)),
            by=f"at some number of layers, and behind at none; {NOISE}")
      for pair in itertools.combinations(NAMES, 2)),
    Claim("zip.sets.near-ensemble",
          "pairs zipped at a fifth of the layers are below the ensemble, by less than 10 points",
          "68.7 of 75.5", near_ensemble, by=NOISE),
    Claim("zip.sets.all-lose-more", "all at once lose more than pairs",
          "65.3, 45.5 and 16.8; pairs 68.7, 62.4 and 37.1", all_lose_more,
          by=f"at every number of layers; {NOISE}"),
    Claim("zip.sets.few-close",
          "all at once: a fifth of the layers instead of nearly all closes over half of the gap to "
          "the ensemble", "65.3 for 16.8, of 75.5", few_close, by=NOISE),
    Claim("zip.new.sets-permuted", "networks of different data sets permuted, with heads of their "
          "own", "", permuted, by="not decided"),
]  # fmt: skip
