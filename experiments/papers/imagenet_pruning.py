"""What "Vanishing Feature" claims of pruned ImageNet networks, and how it is decided."""

from __future__ import annotations

from functools import partial

from kit import claims
from kit.claims import Claim, Decision
from kit.figures import label
from kit.records import Record, joined

# What there has to be for the experiment to be measured.
NEEDS = "ImageNet and published weights"
# The paper's highest sparsities of ConvNeXt, "tens of points", "high sparsity".
HIGH, GAIN, HALF = (76, 80), 0.1, 50


def pairs(record: Record, method: str) -> dict[float, tuple[float, float]]:
    """By sparsity, accuracy as pruned and renormalised."""
    rows = record.rows.where(method=method)
    found = [rows.curve("sparsity", remedy=remedy)[:2] for remedy in ("none", record["remedy"])]
    return {s: pair for s, *pair in zip(found[0][0], found[0][1], found[1][1], strict=True)}


def regains(record: Record, method: str) -> Decision | None:
    found = {s: pair for s, pair in pairs(record, method).items() if s in HIGH}
    holds = [claims.compared(record, after, before, GAIN) for before, after in found.values()]
    told = [f"{100 * a:.1f} to {100 * b:.1f} at {s}%" for s, (a, b) in found.items()]
    return (claims.all_of(holds), joined(told)) if found else None


def most_at_high(record: Record) -> Decision | None:
    holds, told = [], []
    for method in record.rows.distinct("method"):
        of = pairs(record, method)
        gains = {s: after - before for s, (before, after) in of.items()}
        low, high = ([s for s in gains if (s > HALF) == above] for above in (False, True))
        if low and high:
            best = max(gains, key=lambda s: gains[s])
            gap = max(gains[s] for s in high) - max(gains[s] for s in low)
            holds.append(claims.beyond(gap, claims.free(record, of[best][1])))
            told.append(f"{best}% ({label(method)}, {100 * gains[best]:+.1f})")
    return (claims.all_of(holds), joined(told)) if holds else None


WANDA = "Wanda: 43.2 to 65.0 at 76%, 36 points at 80%"
MAGNITUDE = "magnitude: 35.5 to 69.9 at 76%, 55 points at 80%"
CLAIMS = [
    *(Claim(f"vf.imagenet.convnext-{method}",
            f"pruned by {label(method)}, ConvNeXt regains tens of points", text,
            partial(regains, method=method),
            lambda record: record["model"]["name"].startswith("convnext"),
            lambda record: record["model"]["name"] == "convnext-base",
            by="ten points or more at 76 and at 80%; two standard errors are level")
      for method, text in (("wanda", WANDA), ("magnitude-layer", MAGNITUDE),
                           ("wanda-layer", WANDA))),
    Claim("vf.imagenet.resnet50-most-at-high", "ResNet50 gains most at high sparsity",
          "at high sparsity, by RESET", most_at_high,
          lambda record: record["model"]["name"] == "resnet50",
          by="at over half of the weights, for each pruner; two standard errors are level"),
]  # fmt: skip
