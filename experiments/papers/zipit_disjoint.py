"""What "ZipIt!" claims of networks on disjoint classes, and how it is decided."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from kit import claims
from kit.claims import Above, Claim, Decision, Enough, Level, Quantity, Told, accuracy
from kit.records import Record, Rows, joined

# What claims are decided by: what counts as more, as equal, and as close to the ensemble.
MORE, EQUAL, CLOSE = 0.01, 0.02, 0.05


# What was asked for; rows that do not depend on it have none.
ASKED: dict[str, Callable[[Record], Any]] = {
    "alpha": lambda record: (None, record["config"]["alpha"]),
    "beta": lambda record: (None, record["config"]["beta"]),
    "images": lambda record: (None, record["data"]["statistics_images"]),
}


def asked(record: Record, but: str = "") -> Rows:
    """The rows with the alpha, beta and number of statistics images that were asked for."""
    return record.rows.where(**{key: of(record) for key, of in ASKED.items() if key != but})


def depth_of(record: Record) -> int:
    return record["model"]["depth"]


def middle_of(record: Record) -> int:
    """The partial zip that is compared with the whole one: what 13 is of 20."""
    stops = sorted(asked(record).distinct("layers", way="zip"))
    return min(stops, key=lambda layers: abs(layers - 13 / 20 * depth_of(record)))


def swept(record: Record, by: str) -> dict[float, float]:
    """Accuracies of ZipIt! by alpha, beta or images, all else being as asked for."""
    values, found, _ = asked(record, by).curve(by, way="zip", layers=depth_of(record))
    return dict(zip(values, found, strict=True))


def chosen(record: Record) -> dict[str, float]:
    """The alpha and beta that do best on held-out images, and their test accuracy."""
    images = record["data"]["statistics_images"]
    rows = record.rows.where(way="zip", layers=depth_of(record), images=images)
    tried = sorted({(row["alpha"], row["beta"]) for row in rows})
    alpha, beta = max(tried, key=lambda p: rows.mean("held_out", alpha=p[0], beta=p[1]))
    return {"alpha": alpha, "beta": beta, "accuracy": rows.mean(alpha=alpha, beta=beta)}


def of(label: str, way: str, layers: Any = depth_of, **where: Any) -> Quantity:
    """Joint accuracy of networks merged in some way, all else being as asked for."""
    return accuracy(label, **(ASKED | {"way": way, "layers": layers} | where))


def greedy_is_enough(record: Record) -> Decision | None:
    near = Level((GREEDY, OPTIMAL), EQUAL)(record)
    if near is None:
        return None
    greedy, optimal = (record.rows.mean("seconds", way=way) for way in ("unbounded", "optimal"))
    told = f"{near[1]}, in {greedy:.2g} and {optimal:.2g} s"
    return claims.all_of([near[0], greedy < optimal]), told


def tuned(record: Record) -> Decision:
    found = chosen(record)
    best = f"alpha {found['alpha']:g} and beta {found['beta']:g}"
    return None, f"{best} {100 * found['accuracy']:.1f}"


def correlation_falls(record: Record) -> Decision:
    values = record.rows.curve("depth", "correlation")[1]
    falls = all(a > b for a, b in itertools.pairwise(values))
    return falls, joined(f"{value:.2f}" for value in values)


ZIP, PERMUTED = of("ZipIt!", "zip"), of("permutation", "permutation")
AVERAGE, WEIGHTS = of("weight average", "average"), of("permuted by weights", "weights")
PART_ZIPPED = of("two thirds zipped", "zip", middle_of)
PART_PERMUTED = of("two thirds permuted", "permutation", middle_of)
ENSEMBLE = of("ensemble", "ensemble", 0)
ALONE = Quantity("better network alone", lambda record: max(
    record.rows.mean(way=f"network {name}") for name in "AB"))  # fmt: skip
IDENTITY, KMEANS = of("identity", "identity"), of("k-means", "kmeans")
# Optimal pairs know no budget of merges within a network.
GREEDY, OPTIMAL = of("greedy pairs, no budget", "unbounded"), of("optimal pairs", "optimal")
FEW, NOT_WITHIN = of("100 images", "zip", images=100), of("beta 0", "zip", beta=0.0)
WITHIN = Quantity("best beta", lambda record: max(
    value for beta, value in swept(record, "beta").items() if beta))  # fmt: skip
WORST = Quantity("at worst", lambda record: min(swept(record, "images").values()))
BEST = Quantity("at best", lambda record: max(swept(record, "images").values()))
# fmt: off
CLAIMS = [
    Claim("zip.disjoint.above-permutation", "ZipIt! is above permutation",
          "79.1 and 58.4; in narrow networks no better", Above(ZIP, PERMUTED, MORE)),
    Claim("zip.new.spread", "how far the number of statistics images moves ZipIt!", "",
          Told(WORST, BEST, PERMUTED)),
    Claim("zip.disjoint.permutation-helps", "permutation is above the weight average",
          "58.4 and, of the identity, 43.0", Above(PERMUTED, AVERAGE, MORE)),
    Claim("zip.disjoint.activations-above-weights", "permuting by activations is above by weights",
          "58.4 and, of Git Re-Basin, 46.2", Above(PERMUTED, WEIGHTS, MORE)),
    Claim("zip.disjoint.above-one-alone", "ZipIt! is above the better of the networks alone",
          "79.1; one alone knows half of the classes", Above(ZIP, ALONE, MORE)),
    Claim("zip.disjoint.partial-above-whole", "zipping two thirds of the layers is above all",
          "83.8 at 13/20, 79.1", Above(PART_ZIPPED, ZIP, MORE)),
    Claim("zip.disjoint.partial-near-ensemble", "zipping two thirds is near the ensemble",
          "83.8 at 13/20, ensemble 87.4", Enough(PART_ZIPPED, ENSEMBLE, CLOSE)),
    Claim("zip.new.partial-permuted", "zipping two thirds, against permuting them", "",
          Above(PART_ZIPPED, PART_PERMUTED)),
    Claim("zip.new.tuned", "ZipIt! with alpha and beta that held-out training images choose", "",
          tuned, by="not decided"),
    Claim("zip.disjoint.within-helps", "merges within a network help ZipIt!",
          "the share of them that does best is not 0", Above(WITHIN, NOT_WITHIN, MORE)),
    Claim("zip.disjoint.identity-below", "the identity is below permutation", "43.0 and 58.4",
          Above(PERMUTED, IDENTITY, MORE)),
    Claim("zip.disjoint.kmeans-below", "k-means is below permutation", "29.1 and 58.4",
          Above(PERMUTED, KMEANS, MORE)),
    Claim("zip.disjoint.greedy-as-optimal", "greedy pairs are as good as optimal ones, and sooner",
          "79.0 in 1.1 s, 79.6 in 11 minutes", greedy_is_enough,
          by="within 2 points, up to two standard errors more are undecided; in less time"),
    Claim("zip.disjoint.few-images", "100 images are enough for the statistics",
          "100 are enough", Enough(FEW, ZIP, EQUAL)),
    Claim("zip.disjoint.correlation-falls", "the correlation of what is merged falls with depth",
          "0.50, 0.37, 0.27 by stage (CIFAR-100)",
          correlation_falls, by="lower from layer to layer"),
]
# fmt: on
