"""What table 5 of "Vanishing Feature" claims of transport between ViTs, and how it is decided."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from kit import claims
from kit.claims import Claim, Comparison, Decision, Sweep, Told, accuracy
from kit.records import Record, Rows

# What claims are decided by: how far accuracy may fall with k, how much it rises, what is near.
MARGIN, LEAST, NEAR = 0.01, 0.05, 0.03
# Weight of the entropy, in parts of the mean distance, of plans that are next to uniform.
UNIFORM = 1e3
# fmt: off
LABELS = {"direct": "direct", "permuted": "AM", "exact": "OT-acts", "soft": "OT-acts soft",
          "weights": "OT-weights", "uniform": "uniform plan"}
KINDS = {"stream": "residual stream", "hidden": "hidden units",
         "attention": "heads and their dimensions"}
# fmt: on


def chosen(rows: Rows) -> float:
    """The weight of the entropy that is best on held-out images, but for exact and uniform plans.

    Accuracies are means over k; of equal ones the first counts, which is the closest to exact.
    """
    rows = rows.where(images="held_out")
    _, *between, _ = rows.distinct("weight")
    return max(between, key=lambda weight: rows.mean(weight=weight))


def tested(plan: str, units: str = "all", **where: Any) -> claims.Quantity:
    name = LABELS[plan] if units == "all" else KINDS[units]
    return accuracy(name, images="test", plan=plan, units=units, **where)


EDGE, DIRECT = accuracy("edge models", network=("model 1", "model 2")), tested("direct")


def low(there: Record) -> bool:
    """Whether direct averages are below the edge models by twice noise or more."""
    edge, value = EDGE.of(there), DIRECT.of(there)
    return value < edge - 2 * claims.free(there, value)


def rises(record: Record, plan: str) -> Decision:
    values = record.rows.curve("blocks", images="test", plan=plan, units="all")[1]
    least = min((b - a for a, b in itertools.pairwise(values)), default=0)
    parts, free = (
        ((values[-1] - values[0], LEAST), (least, -MARGIN)),
        claims.free(record, values[-1]),
    )
    found = claims.all_of(claims.reached(*part, free) for part in parts)
    here = f"{100 * values[0]:.1f} to {100 * values[-1]:.1f}, the least step {100 * least:.1f}"
    return None if claims.near_chance(record, *values) else found, here


def near(record: Record, value: float, direct: float, edge: float) -> bool | None:
    # Where averaging alone comes near, transport has nothing to show.
    if direct > edge - NEAR:
        return None
    enough = claims.enough(record, value, edge, NEAR)
    return claims.all_of([enough, claims.compared(record, value, direct)])


BLOCKS = {"when": low, "key": "blocks", "sign": "k"}
ABOVE = "at every k at which direct averages are four standard errors below the edge models, by two"
RISES = "by 5 points or more, and no step is below -1; up to two standard errors less are undecided"
CLOSE = "within 3 points, and above direct by two standard errors; undecided if direct is, too"
LATE = {plan: tested(plan, blocks=lambda r: r["model"]["blocks"] - 1) for plan in LABELS}
FIRST = {"blocks": lambda record: record["config"]["blocks"][0]}
OTHERS = [tested(plan, **FIRST) for plan in ("permuted", "weights", "uniform")]
WEIGHTS = {"exact": 0.0, "soft": lambda record: chosen(record.rows), "uniform": UNIFORM}
SOFTNESS = [accuracy(LABELS[p], images="held_out", weight=of) for p, of in WEIGHTS.items()]
CLAIMS = [
    Claim("vf.new.vit-others", "other ways to match vision transformers, at the least k", "",
          Told(*OTHERS)),
    Claim("vf.new.vit-kinds", "exact plans of one kind of units alone, at the least k", "",
          Told(*(tested("exact", kind, **FIRST) for kind in KINDS))),
    Claim("vf.new.vit-entropy", "plans from exact to uniform on held-out images, the mean over k",
          "", Told(*SOFTNESS)),
]  # fmt: skip
for plan, name in list(LABELS.items())[2:4]:
    CLAIMS += [
        Claim(f"vf.t5.{plan}-above-direct",
              f"{name} is above direct averaging of vision transformers",
              "61.5 and 7.6 at k = 0; 73.8 to 90.8 and 28.5 to 89.4 at k = 3 to 6 (table 5)",
              Sweep(tested(plan), DIRECT, ABOVE, **BLOCKS)),
        Claim(f"vf.t5.{plan}-rises", f"the accuracy of {name} rises with the blocks kept apart",
              "61.5 at k = 0, 73.8, 85.0, 88.5 and 90.8 at k = 3 to 6 (table 5)",
              partial(rises, plan=plan), by=RISES),
        Claim(f"vf.t5.{plan}-near-edges",
              f"with all blocks but one kept {name} is near the edge models",
              "90.8 of 93.3 (table 5)",
              Comparison((LATE[plan], LATE["direct"], EDGE), near, CLOSE)),
        Claim(f"vf.new.{plan}-above-uniform", f"{name} against the uniform plan, a control", "",
              Sweep(tested(plan), tested("uniform"), ABOVE, **BLOCKS)),
    ]  # fmt: skip
