"""What "Vanishing Feature" claims of how networks were trained, and how it is decided."""

import math
import operator
from collections.abc import Callable
from functools import partial

from kit import claims
from kit.claims import Claim, Decision
from kit.grid import Cell, sets_of
from kit.records import Record


def number(record: Record, cell: Cell, key: str = "barrier", merged: str = "matched") -> float:
    """Accuracy of networks, barrier or distance of pairs, or what share of the accuracy is lost.

    The mean over pairs that did not diverge; NaN where all did.
    """
    if key == "lost":
        return number(record, cell) / number(record, cell, "accuracy")
    of = None if key == "accuracy" else merged
    return record.rows.mean(key, merged=of, epoch=None, **cell._asdict())


def told(value: float, key: str = "barrier") -> str:
    scale = 1 if key == "distance" else 100
    return "diverged" if math.isnan(value) else f"{scale * value:.2f}"


def decide(
    record: Record,
    of: str,
    margin: Callable[..., float] | None = None,
    key: str = "barrier",
    merged: str = "matched",
) -> Decision | None:
    """Whether a margin of the numbers of a set of cells is above 0; open within noise.

    That is of the accuracy that averages fall to. Without a margin, whether the last two are alike.
    Left out where no such cells are trained, and open where all pairs of one diverged.
    """
    cells = sets_of(record["grid"]).get(of)
    if cells is None:
        return None
    values = [number(record, cell, key, merged) for cell in cells]
    here = "; ".join(f"{told(v, key)} with {c}" for c, v in zip(cells, values, strict=True))
    if any(map(math.isnan, values)):
        return None, here
    if margin is None:
        return claims.level(record, values[-2:], 0.005), here
    lows = [number(record, c, "accuracy") - number(record, c, merged=merged) for c in cells]
    free = 0.0 if key == "distance" else claims.free(record, min(lows))
    return claims.beyond(margin(*values), free), here


def unmoved(record: Record, of: str) -> Decision | None:
    """Whether one more epoch leaves barriers nearer to their own than to that of the other."""
    found = decide(record, of, lambda own, now, other: abs(now - other) - abs(now - own))
    if found is None or decide(record, of, key="accuracy")[0]:
        return found
    # At unlike accuracy it says nothing of what accuracy explains.
    return None, found[1]


def of_sweep(name: str, what: str, falls: float, paper: str, epoch: str) -> list[Claim]:
    """Of learning rates or weight decays: barriers along them, and what one more epoch does."""
    along, ablation = partial(decide, of=f"{name}, ends"), f"{name}, one more epoch"
    return [
        Claim(f"vf.recipe.{name}-direct", f"the barrier of direct averages changes little with the "
              f"{what}", "changes little",
              partial(along, merged="direct", margin=lambda low, high:
                      0.2 * max(low, high) - abs(high - low)),
              by=f"by less than 20% of the larger; {NOISE}"),
        Claim(f"vf.recipe.{name}-matched", f"the matched barrier falls with the {what}", paper,
              partial(along, margin=lambda low, high: (1 - falls) * low - high),
              by=f"{100 * falls:.0f}% or more; {NOISE}"),
        Claim(f"vf.recipe.{name}-epoch-accuracy", f"{epoch} brings networks of the high {what} to "
              "the accuracy of the low one", "it does",
              partial(decide, of=ablation, key="accuracy"),
              by="within half a point; up to two standard errors more are undecided"),
        Claim(f"vf.recipe.{name}-epoch-barrier", f"{epoch} does not bring networks of the high "
              f"{what} to the barrier of the low one", "it does not", partial(unmoved, of=ablation),
              by="nearer to their own than to that; open where accuracies are not within half a "
              f"point; {NOISE}"),
    ]  # fmt: skip


def of_initialisers(key: str, merged: str, noise: str) -> list[Claim]:
    paper = "larger at the low rate; at the high one the difference is gone"
    rule = partial(decide, key=key, merged=merged)
    return [
        Claim(f"vf.recipe.initialiser-{key}-low",
              f"at the low rate the normal initialisation has the larger {key}", paper,
              partial(rule, of="initialisers, low", margin=operator.sub),
              by=f"larger than with the uniform one{noise}"),
        Claim(f"vf.recipe.initialiser-{key}-high",
              f"at the high rate both initialisations have the same {key}", paper,
              partial(rule, of="initialisers", margin=lambda a, b, normal, uniform:
                      0.25 * abs(a - b) - abs(normal - uniform)),
              by=f"less than a quarter of the difference at the low rate is left{noise}"),
    ]  # fmt: skip


NOISE = "two standard errors are level"
CLAIMS = [
    *of_sweep("rate", "learning rate", 0.4, "over 40% from 0.01 to 0.1 (VGG16-LN, ResNet20)",
              "one more epoch at the low rate"),
    *of_sweep("decay", "weight decay", 0.6, "over 60% from 1e-4 to 5e-4 (VGG16)",
              "one more epoch at the low rate and decay"),
    *of_initialisers("barrier", "matched", f"; {NOISE}"),
    *of_initialisers("distance", "direct", ""),
    Claim("vf.recipe.merge-from-low-on", "networks trained at the smallest rate cannot be merged, "
          "those of larger ones can", "VGG16-LN on MNIST: not at 0.001, at 0.01 and 0.1",
          partial(decide, of="smallest rate and ends", key="lost", margin=lambda first, *others:
                  min(first - 0.5, 0.5 - max(others))),
          by=f"matched, no more than half of the accuracy is lost; {NOISE}"),
]  # fmt: skip
