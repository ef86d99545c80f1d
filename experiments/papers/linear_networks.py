"""What "Vanishing Feature" claims of averaged linear networks, and how it is decided."""

from __future__ import annotations

import functools

import numpy as np
from kit import claims
from kit.claims import Claim, Decision
from kit.records import Record

EDGES = "edge models"


def by_layer(record: Record, key: str, network: str = "direct") -> np.ndarray:
    """A number of each layer, the mean over pairs."""
    return np.array(record.rows.curve("layer", key, network=network)[1])


def left(record: Record, key: str = "feature") -> np.ndarray:
    """What is left of the edge models' features in the midpoint, by layer."""
    return by_layer(record, key) / by_layer(record, "feature", EDGES)


def overtakes_at(record: Record) -> int:
    """The first layer from which on the offset is larger, to the end; L + 1 if none is."""
    larger = by_layer(record, "offset") > by_layer(record, "feature")
    return len(larger) - int(np.argmin([*larger[::-1], False])) + 1


def undone(record: Record) -> float:
    """How much of the fading rescaling undoes, in logarithms."""
    found, reached = left(record)[-1], left(record, "rescaled_feature")[-1]
    return float(np.log(reached / found) / -np.log(found))


def fades(record: Record) -> Decision:
    """Whether features fade from layer to layer."""
    found = left(record)
    here = f"{found[0]:.2g} times the edge models' at layer 1, {found[-1]:.2g} times at "
    return Decision(bool(found[-1] < 0.1 * found[0]), f"{here}{len(found)}")


def offset_grows(record: Record) -> Decision:
    """Whether the offset does."""
    found = by_layer(record, "offset")
    return Decision(bool(found[-1] > found[0]), f"from {found[0]:.2g} to {found[-1]:.2g}")


def overtakes(record: Record) -> Decision:
    """Whether the offset is larger in the last layers."""
    first, g, h = overtakes_at(record), by_layer(record, "feature"), by_layer(record, "offset")
    where = f"from layer {first} on" if first <= len(h) else "not in the last layer"
    return Decision(1 < first <= len(h), f"{where} (g / h at the end: {g[-1] / h[-1]:.2g})")


def near_chance(record: Record) -> Decision:
    """Whether midpoints are near chance."""
    value = claims.accuracy("direct midpoint", network="direct")
    return claims.AtChance(value, claims.NEAR)(record)


def smaller(record: Record) -> Decision:
    """Whether weights are smaller in the midpoint, in every layer."""
    found = by_layer(record, "weight") / by_layer(record, "weight", EDGES)
    here = f"{found.min():.2g} to {found.max():.2g} times the edge models'"
    return Decision(bool((found < 1).all()), here)


def rise_again(record: Record) -> Decision:
    """Whether weights are least in between, and larger in the last layer."""
    found, edges = by_layer(record, "weight"), by_layer(record, "weight", EDGES)
    lowest = int(np.argmin(found))
    here = f"least at layer {lowest + 1}, and {found[-1] / found[lowest]:.2g} times that at the "
    here += f"last (edge models: {edges[-1] / edges[lowest]:.2g})"
    return Decision(1 <= lowest < len(found) - 1, here)


def rescaled(record: Record) -> Decision:
    """Whether rescaling undoes more than half of the fading."""
    found, ranks = undone(record), by_layer(record, "stable_rank", EDGES)[1:-1]
    here = f"g ends at {left(record, 'rescaled_feature')[-1]:.2g} times the edge models', so "
    here += f"{100 * found:.0f}% of the fading is undone (stable ranks of their square matrices: "
    return Decision(0.5 < found < 1.5, f"{here}{min(ranks):.1f} to {max(ranks):.1f})")


def over_pairs(record: Record, rule: claims.Rule) -> Decision:
    """A rule on the means over pairs; says of how many pairs it gives the same."""
    found, rows = rule(record), record.rows
    ones = [rule(Record(record | {"rows": rows.where(pair=k)})) for k in rows.distinct("pair")]
    each = [one.holds for one in ones]
    if set(each) == {found.holds}:
        return found
    here = f"{found.here} (so in {each.count(found.holds)} of {len(each)} pairs)"
    return Decision(found.holds, here)


RULES = {
    "fades": ("features fade from layer to layer in the midpoint", "it fades", fades,
              "to less than a tenth from the first layer to the last"),
    "offset-grows": ("offsets grow from layer to layer in the midpoint", "it grows", offset_grows,
                     "larger at the last layer than at the first"),
    "overtakes": ("offsets overtake features in the last layers", "it overtakes", overtakes,
                  "h is larger than g from some layer after the first on, to the end"),
    "near-chance": ("direct midpoints are at chance", "8.9 of 85.8 in its notebook", near_chance,
                    "within 10 points of chance; up to two standard errors more are undecided"),
    "weights-smaller": ("weights are smaller in the midpoint than in the edge models",
                        "they are smaller", smaller, "in every layer"),
    "weights-rise": ("weights rise again in the final layers", "they rise", rise_again,
                     "their mean magnitude is least in a layer after the first, before the last"),
    "rescaled": ("rescaling largely removes the fading", "it does largely", rescaled,
                 "more than half of it, in logarithms, and no more than one and a half times it"),
}  # fmt: skip
CLAIMS = [
    Claim(f"vf.linear.{name}", text, paper, functools.partial(over_pairs, rule=rule),
          by=f"{by} (means over pairs)")
    for name, (text, paper, rule, by) in RULES.items()
]  # fmt: skip
