"""What table 5 of "Vanishing Feature" claims of transport between ViTs, and how it is decided."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

from kit import claims
from kit.claims import Claim, Decision
from kit.records import Record, Rows, joined

# What claims are decided by: how far accuracy may fall with k, how much it rises, what is near.
MARGIN, LEAST, NEAR = 0.01, 0.05, 0.03
# fmt: off
LABELS = {"direct": "direct", "permuted": "AM", "exact": "OT-acts", "soft": "OT-acts soft",
          "weights": "OT-weights", "uniform": "uniform plan"}
KINDS = {"stream": "residual stream", "hidden": "hidden units",
         "attention": "heads and their dimensions"}
# fmt: on


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
    return record.rows.mean(network=("model 1", "model 2"))


def column(record: Record, plan: str, units: str = "all") -> list[float]:
    return record.rows.curve("blocks", images="test", plan=plan, units=units)[1]


def low(record: Record) -> list[int]:
    """The places of k at which averages are below the edge models by twice noise or more."""
    edge, values = edge_mean(record), enumerate(column(record, "direct"))
    return [i for i, value in values if value < edge - 2 * claims.free(record, value)]


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


def above(record: Record, plan: str, other: str) -> Decision | None:
    found = low(record)
    if not found:
        return None
    ks = [record["config"]["blocks"][i] for i in found]
    values, others = ([column(record, name)[i] for i in found] for name in (plan, other))
    told = [claims.compared(record, *pair) for pair in zip(values, others, strict=True)]
    over, under = ([k for k, one in zip(ks, told, strict=True) if one is s] for s in (True, False))
    here = f"above by over two standard errors {places(over, ks)}"
    here += f", below {places(under, ks)}" if under else ""
    if other == "direct":
        shown = f"{label_of(record, plan)} {listed(values)}, direct {listed(others)}"
        here = f"at k = {joined(ks)} {shown}: {here}"
    return claims.all_of(told), here


def rises(record: Record, plan: str) -> Decision:
    values, rows = column(record, plan), record["config"]["blocks"]
    least = min((b - a for a, b in itertools.pairwise(values)), default=0)
    free = claims.free(record, values[-1])
    here = f"from k = {rows[0]} to {rows[-1]} {label_of(record, plan)} {listed(values[:1])} to "
    here += f"{listed(values[-1:])}, the least step {100 * least:.1f}"
    parts = ((values[-1] - values[0], LEAST), (least, -MARGIN))
    found = claims.all_of(claims.reached(*part, free) for part in parts)
    return None if claims.near_chance(record, *values) else found, here


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


def shown(record: Record, columns: Sequence[tuple[str, str, str]]) -> Decision | None:
    """What columns (name, plan, units) have where direct averages are low."""
    found = low(record)
    parts = (f"{name} {listed([column(record, *of)[i] for i in found])}" for name, *of in columns)
    at = joined(record["config"]["blocks"][i] for i in found)
    return (None, f"at k = {at} {joined(parts)}") if found else None


def by_entropy(record: Record) -> Decision:
    """What plans from exact to uniform give on held-out images."""
    (_, exact), *between, (_, uniform) = softness(record.rows).items()
    here = f"mean over k: exact {listed([exact])}, entropy of weight "
    here += f"{joined(f'{weight:g}' for weight, _ in between)} "
    return None, f"{here}{listed([v for _, v in between])}, uniform {listed([uniform])}"


ABOVE = "at every k at which direct averages are four standard errors below the edge models, by two"
RISES = "by 5 points or more, and no step is below -1; up to two standard errors less are undecided"
CLOSE = "within 3 points, and above direct by two standard errors; undecided if direct is, too"
OTHERS = [(LABELS[plan], plan, "all") for plan in ("permuted", "weights", "uniform")]
CLAIMS = [
    *(claim for plan, name in list(LABELS.items())[2:4] for claim in (
        Claim(f"vf.t5.{plan}-above-direct",
              f"{name} is above direct averaging of vision transformers",
              "61.5 and 7.6 at k = 0; 73.8 to 90.8 and 28.5 to 89.4 at k = 3 to 6 (table 5)",
              partial(above, plan=plan, other="direct"), by=ABOVE),
        Claim(f"vf.t5.{plan}-rises", f"the accuracy of {name} rises with the blocks kept apart",
              "61.5 at k = 0, 73.8, 85.0, 88.5 and 90.8 at k = 3 to 6 (table 5)",
              partial(rises, plan=plan), by=RISES),
        Claim(f"vf.t5.{plan}-near-edges",
              f"with all blocks but one kept {name} is near the edge models",
              "90.8 of 93.3 (table 5)", partial(near_edges, plan=plan), by=CLOSE),
        Claim(f"vf.new.{plan}-above-uniform", f"{name} against the uniform plan, a control", "",
              partial(above, plan=plan, other="uniform"), by="by two standard errors at every k"))),
    Claim("vf.new.vit-others", "other ways to match vision transformers", "",
          partial(shown, columns=OTHERS), by="not decided"),
    Claim("vf.new.vit-kinds", "exact plans of one kind of units alone", "",
          partial(shown, columns=[(text, "exact", kind) for kind, text in KINDS.items()]),
          by="not decided"),
    Claim("vf.new.vit-entropy", "from exact plans to the uniform one, on held-out images", "",
          by_entropy, by="not decided"),
]  # fmt: skip
