"""What "ZipIt!" claims of networks on disjoint classes, and how it is decided."""

from __future__ import annotations

import itertools
from typing import Any

from kit import claims
from kit.claims import Above, Claim, Decision, Enough, Quantity, accuracy
from kit.records import Record, Row, Rows, joined

# What claims are decided by: what counts as more, as equal, and as close to the ensemble.
MORE, EQUAL, CLOSE = 0.01, 0.02, 0.05
# Which share of the layers a partial zip is compared at: 13 of 20.
PART = 0.65
MATCHERS = {"identity": "identity", "permute": "permutation", "kmeans": "k-means",
            "optimal": "optimal pairs", "greedy": "greedy pairs",
            "unbounded": "greedy pairs, no budget"}  # fmt: skip


def settings(record: Record) -> Row:
    """The alpha, beta and number of statistics images that were asked for."""
    config, images = record["config"], record["data"]["statistics_images"]
    return {"alpha": config["alpha"], "beta": config["beta"], "images": images}


def asked(record: Record) -> Rows:
    """The rows with these."""
    return record.rows.where(**{key: (None, value) for key, value in settings(record).items()})


def depth_of(record: Record) -> int:
    return record["model"]["depth"]


def middle_of(record: Record) -> int:
    """The partial zip that is compared with the whole one: what 13 is of 20."""
    stops = sorted(asked(record).distinct("layers", way="zip"))
    return min(stops, key=lambda layers: abs(layers - PART * depth_of(record)))


def swept(record: Record, by: str) -> tuple[list[float], list[float]]:
    """Values of alpha, beta or images, and accuracies, all else being as asked for."""
    known = {key: value for key, value in settings(record).items() if key != by}
    return record.rows.curve(by, way="zip", layers=depth_of(record), **known)[:2]


def chosen(record: Record) -> dict[str, float]:
    """The alpha and beta that do best on held-out images, and their test accuracy."""
    rows = record.rows.where(way="zip", layers=depth_of(record))
    rows = rows.where(images=record["data"]["statistics_images"])
    tried = sorted({(row["alpha"], row["beta"]) for row in rows})
    alpha, beta = max(tried, key=lambda p: rows.mean("held_out", alpha=p[0], beta=p[1]))
    return {"alpha": alpha, "beta": beta, "accuracy": rows.mean(alpha=alpha, beta=beta)}


def of(label: str, way: str, layers: Any = depth_of) -> Quantity:
    """Joint accuracy of networks merged in some way."""
    known = accuracy(label, way=way, layers=layers)
    return Quantity(label, lambda record: known.of(Record(record | {"rows": asked(record)})))


def better_alone(record: Record) -> float:
    return max(record.rows.mean(way=f"network {name}") for name in "AB")


def pairs_within_help(record: Record) -> Decision:
    found = dict(zip(*swept(record, "beta"), strict=True))
    best = max((beta for beta in found if beta > 0), key=lambda beta: found[beta])
    here = f"beta {best:g} {100 * found[best]:.1f}, beta 0 {100 * found[0]:.1f}"
    return claims.compared(record, found[best], found[0], MORE), here


def greedy_is_enough(record: Record) -> Decision | None:
    if not record.rows.where(way="optimal"):
        return None
    # Records from before pairs without a budget have those with one.
    ways = ["unbounded" if record.rows.where(way="unbounded") else "greedy", "optimal"]
    values = [record.rows.mean(way=way) for way in ways]
    seconds = [record.rows.mean("seconds", way=way) for way in ways]
    told = zip(ways, values, seconds, strict=True)
    here = ", ".join(f"{MATCHERS[w]} {100 * v:.1f} ({s:.2g} s)" for w, v, s in told)
    near = claims.level(record, values, EQUAL)
    return claims.all_of([near, seconds[0] < seconds[1]]), here


def few_images(record: Record) -> Decision:
    found = dict(zip(*swept(record, "images"), strict=True))
    few, most = min(found, key=lambda count: abs(count - 100)), max(found)
    here = f"{few} images {100 * found[few]:.1f}, {most:,} images {100 * found[most]:.1f}"
    return claims.enough(record, found[few], found[most], EQUAL), here


def spread(record: Record) -> Decision:
    counts, joint = swept(record, "images")
    lead = 100 * (ZIP.of(record) - PERMUTED.of(record))
    least, most, pairs = 100 * min(joint), 100 * max(joint), record["config"]["pairs"]
    among = "a single pair of networks" if pairs == 1 else f"the mean of {pairs} pairs of networks"
    side = "above" if lead >= 0 else "below"
    here = f"with {counts[0]:,} to {counts[-1]:,} images {least:.1f} to {most:.1f}, a range of "
    here += f"{most - least:.1f} points, where it is {abs(lead):.1f} {side} permutation, on {among}"
    return None, here


def tuned(record: Record) -> Decision:
    found = chosen(record)
    here = f"alpha {found['alpha']:g} and beta {found['beta']:g} {100 * found['accuracy']:.1f}"
    return None, here


def correlation_falls(record: Record) -> Decision:
    values = record.rows.curve("depth", "correlation")[1]
    falls = all(a > b for a, b in itertools.pairwise(values))
    return falls, joined(f"{value:.2f}" for value in values)


ZIP, PERMUTED = of("ZipIt!", "zip"), of("permutation", "permutation")
AVERAGE, WEIGHTS = of("weight average", "average"), of("permuted by weights", "weights")
PART_ZIPPED = of("two thirds zipped", "zip", middle_of)
PART_PERMUTED = of("two thirds permuted", "permutation", middle_of)
ENSEMBLE = accuracy("ensemble", way="ensemble")
ALONE = Quantity("better network alone", better_alone)
PERMUTE, IDENTITY, KMEANS = (of(MATCHERS[w], w) for w in ("permute", "identity", "kmeans"))
# fmt: off
CLAIMS = [
    Claim("zip.disjoint.above-permutation", "ZipIt! is above permutation",
          "79.1 and 58.4; in narrow networks no better", Above(ZIP, PERMUTED, MORE)),
    Claim("zip.new.spread", "how far the number of statistics images moves ZipIt!", "", spread,
          by="not decided"),
    Claim("zip.disjoint.permutation-helps", "permutation is above the weight average",
          "58.4 and, of the identity, 43.0", Above(PERMUTED, AVERAGE, MORE)),
    Claim("zip.disjoint.activations-above-weights", "permuting by activations is above by weights",
          "58.4 and, of Git Re-Basin, 46.2", Above(PERMUTED, WEIGHTS, MORE)),
    Claim("zip.disjoint.above-one-alone", "ZipIt! is above the better of the networks alone",
          "79.1; one alone knows half of the classes", Above(ZIP, ALONE, MORE)),
    Claim("zip.disjoint.partial-above-whole", "zipping two thirds of the layers is above all",
          "83.8 at 13/20, 79.1", Above(PART_ZIPPED, ZIP, MORE)),
    Claim("zip.disjoint.partial-near-ensemble", "zipping two thirds is near the ensemble",
          "83.8 at 13/20, ensemble 87.4", Enough(PART_ZIPPED, ENSEMBLE, CLOSE),
          by="no more than 5 points below it; up to two standard errors more are undecided"),
    Claim("zip.new.partial-permuted", "zipping two thirds, against permuting them", "",
          Above(PART_ZIPPED, PART_PERMUTED)),
    Claim("zip.new.tuned", "ZipIt! with alpha and beta that held-out training images choose", "",
          tuned, by="not decided"),
    Claim("zip.disjoint.within-helps", "merges within a network help ZipIt!",
          "the share of them that does best is not 0", pairs_within_help,
          by="the best beta above beta 0 by more than 1 point; two standard errors are undecided"),
    Claim("zip.disjoint.identity-below", "the identity is below permutation", "43.0 and 58.4",
          Above(PERMUTE, IDENTITY, MORE)),
    Claim("zip.disjoint.kmeans-below", "k-means is below permutation", "29.1 and 58.4",
          Above(PERMUTE, KMEANS, MORE)),
    Claim("zip.disjoint.greedy-as-optimal", "greedy pairs are as good as optimal ones, and sooner",
          "79.0 in 1.1 s, 79.6 in 11 minutes", greedy_is_enough,
          by="within 2 points, up to two standard errors more are undecided; in less time"),
    Claim("zip.disjoint.few-images", "100 images are enough for the statistics",
          "100 are enough", few_images,
          by="no more than 2 points below all; up to two standard errors more are undecided"),
    Claim("zip.disjoint.correlation-falls", "the correlation of what is merged falls with depth",
          "0.50, 0.37, 0.27 by stage (CIFAR-100)",
          correlation_falls, by="lower from layer to layer"),
]
# fmt: on
