"""What table 5 of "Vanishing Feature" claims of transport between ViTs, and how it is decided."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from kit import claims
from kit.claims import Claim, Decision
from kit.records import Record, Rows, joined

# What claims are decided by: how far accuracy may fall with k, how much it rises, what is near.
MARGIN, LEAST, NEAR = 0.01, 0.05, 0.03
LABELS = {
    "direct": "direct",
    "permuted": "AM",
    "exact": "OT-acts",
    "soft": "OT-acts soft",
    "weights": "OT-weights",
    "uniform": "uniform plan",
}
KINDS = {
    "stream": "residual stream",
    "hidden": "hidden units",
    "attention": "heads and their dimensions",
}


def softness(rows: Rows) -> dict[float, float]:
    """Accuracy on held-out images by weight of the entropy, the mean over k."""
    found = rows.where(images="held_out")
    return {weight: found.mean(weight=weight) for weight in found.distinct("weight")}


def chosen(rows: Rows) -> float:
    """The weight that is best on held-out images, but for exact and uniform plans."""
    means = softness(rows)
    # The first of equals: the closest to exact.
    return max(list(means)[1:-1], key=lambda weight: means[weight])


def label_of(record: Record, plan: str) -> str:
    """A column, as in legends and tables."""
    return LABELS[plan] + (f" ({chosen(record.rows):g})" if plan == "soft" else "")


def edge_mean(record: Record) -> float:
    """The mean of the edge models."""
    return record.rows.mean(network=("model 1", "model 2"))


def column(record: Record, plan: str, units: str = "all") -> list[float]:
    """Accuracies by k."""
    return record.rows.curve("blocks", images="test", plan=plan, units=units)[1]


def low(record: Record) -> list[int]:
    """The places of k at which averages are below the edge models by twice noise or more."""
    images, edge = record["data"]["test_images"], edge_mean(record)
    values = enumerate(column(record, "direct"))
    return [i for i, value in values if value < edge - 2 * claims.noise(value, images)]


def listed(values: Sequence[float]) -> str:
    """Accuracies in a sentence.

    Example:
      >>> listed([0.1, 0.25, 0.5])
      '10.0, 25.0 and 50.0'
    """
    return joined(f"{100 * value:.1f}" for value in values)


def places(at: Sequence[int], all_of: Sequence[int]) -> str:
    """Where something is so, of the k compared.

    Example:
      >>> places([0, 2], [0, 1, 2]), places([], [0, 1]), places([0], [0])
      ('at k = 0 and 2', 'nowhere', 'everywhere')
    """
    if len(at) == len(all_of):
        return "everywhere"
    return f"at k = {joined(at)}" if at else "nowhere"


def _where(record: Record, plan: str, other: str) -> tuple[list[bool | None], str]:
    """At each low k whether a plan is above another; and where, in words."""
    rows, found = record["config"]["blocks"], low(record)
    values, others = column(record, plan), column(record, other)
    told = [claims.compared(record, values[i], others[i]) for i in found]
    ks = [rows[i] for i in found]
    above, below = ([k for k, one in zip(ks, told, strict=True) if one is s] for s in (True, False))
    text = f"above by over two standard errors {places(above, ks)}"
    return told, text + (f", below {places(below, ks)}" if below else "")


def above_direct(record: Record, plan: str) -> Decision | None:
    found = low(record)
    if not found:
        return None
    told, where = _where(record, plan, "direct")
    pair = [listed([column(record, name)[i] for i in found]) for name in (plan, "direct")]
    at = joined(record["config"]["blocks"][i] for i in found)
    here = f"at k = {at} {label_of(record, plan)} {pair[0]}, direct {pair[1]}: {where}"
    return claims.all_of(told), here


def rises(record: Record, plan: str) -> Decision:
    values, rows = column(record, plan), record["config"]["blocks"]
    steps = [b - a for a, b in zip(values, values[1:], strict=False)]
    free = claims.free(record, values[-1])
    here = f"from k = {rows[0]} to {rows[-1]} {label_of(record, plan)} {listed(values[:1])} to "
    here += f"{listed(values[-1:])}, the least step {100 * min(steps, default=0):.1f}"

    def reached(value: float, least: float) -> bool | None:
        return True if value >= least else None if value >= least - free else False

    parts = [reached(values[-1] - values[0], LEAST), reached(min(steps, default=0), -MARGIN)]
    return None if claims.near_chance(record, *values) else claims.all_of(parts), here


def near_edges(record: Record, plan: str) -> Decision | None:
    count, rows, edge = record["model"]["blocks"], record["config"]["blocks"], edge_mean(record)
    if count - 1 not in rows:
        return None
    value, direct = (column(record, name)[rows.index(count - 1)] for name in (plan, "direct"))
    here = f"with {count - 1} of {count} blocks kept {label_of(record, plan)} {listed([value])}, "
    here += f"direct {listed([direct])}, edge models {listed([edge])}"
    if direct > edge - NEAR:
        # Where averaging alone comes near, transport has nothing to show.
        return None, f"{here}: direct averaging is near them, too"
    near = value >= edge - NEAR or claims.compared(record, value, edge, -NEAR)
    return claims.all_of([near, claims.compared(record, value, direct)]), here


def above_uniform(record: Record, plan: str) -> Decision | None:
    told, where = _where(record, plan, "uniform")
    return (claims.all_of(told), where) if told else None


def others(record: Record) -> Decision | None:
    found = low(record)
    names = ("permuted", "weights", "uniform")
    parts = (f"{LABELS[n]} {listed([column(record, n)[i] for i in found])}" for n in names)
    at = joined(record["config"]["blocks"][i] for i in found)
    return (None, f"at k = {at} {joined(parts)}") if found else None


def kinds(record: Record) -> Decision | None:
    found = low(record)
    parts = (
        f"{text} {listed([column(record, 'exact', kind)[i] for i in found])}"
        for kind, text in KINDS.items()
    )
    at = joined(record["config"]["blocks"][i] for i in found)
    return (None, f"at k = {at} {joined(parts)}") if found else None


def by_entropy(record: Record) -> Decision:
    exact, *between, uniform = softness(record.rows).items()
    weights = joined(f"{weight:g}" for weight, _ in between)
    here = f"mean over k: exact {listed([exact[1]])}, entropy of weight {weights} "
    here += f"{listed(np.array([value for _, value in between]))}, uniform {listed([uniform[1]])}"
    return None, here


ABOVE = "at every k at which direct averages are four standard errors below the edge models, by two"
RISES = "by 5 points or more, and no step is below -1; up to two standard errors less are undecided"
CLOSE = "within 3 points, and above direct by two standard errors; undecided if direct is, too"
CLAIMS = [
    claim
    for plan in ("exact", "soft")
    for name, key in [(LABELS[plan], f"vf.t5.{plan}")]
    for claim in (
        Claim(f"{key}-above-direct", f"{name} is above direct averaging of vision transformers",
              "61.5 and 7.6 at k = 0; 73.8 to 90.8 and 28.5 to 89.4 at k = 3 to 6 (table 5)",
              functools.partial(above_direct, plan=plan), by=ABOVE),
        Claim(f"{key}-rises", f"the accuracy of {name} rises with the blocks kept apart",
              "61.5 at k = 0, 73.8, 85.0, 88.5 and 90.8 at k = 3 to 6 (table 5)",
              functools.partial(rises, plan=plan), by=RISES),
        Claim(f"{key}-near-edges", f"with all blocks but one kept {name} is near the edge models",
              "90.8 of 93.3 (table 5)", functools.partial(near_edges, plan=plan), by=CLOSE),
        Claim(f"vf.new.{plan}-above-uniform", f"{name} against the uniform plan, a control", "",
              functools.partial(above_uniform, plan=plan), by="by two standard errors at every k"),
    )
] + [
    Claim("vf.new.vit-others", "other ways to match vision transformers", "", others,
          by="not decided"),
    Claim("vf.new.vit-kinds", "exact plans of one kind of units alone", "", kinds,
          by="not decided"),
    Claim("vf.new.vit-entropy", "from exact plans to the uniform one, on held-out images", "",
          by_entropy, by="not decided"),
]  # fmt: skip
