"""What "Vanishing Feature" claims of averaged linear networks, and how it is decided."""

from __future__ import annotations

from functools import partial

import numpy as np
from kit import claims
from kit.claims import Claim, Decision
from kit.records import Record

EDGES = "edge models"
NEAR_CHANCE = claims.AtChance(claims.accuracy("direct midpoint", network="direct"), claims.NEAR)


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


def fades(record: Record) -> Decision:
    first, *_, last = found = left(record)
    here = f"{first:.2g} times the edge models' at layer 1, {last:.2g} times at {len(found)}"
    return last < 0.1 * first, here


def offset_grows(record: Record) -> Decision:
    first, *_, last = by_layer(record, "offset")
    return last > first, f"from {first:.2g} to {last:.2g}"


def overtakes(record: Record) -> Decision:
    first, g, h = overtakes_at(record), by_layer(record, "feature"), by_layer(record, "offset")
    where = f"from layer {first} on" if first <= len(h) else "not in the last layer"
    return 1 < first <= len(h), f"{where} (g / h at the end: {g[-1] / h[-1]:.2g})"


def smaller(record: Record) -> Decision:
    found = by_layer(record, "weight") / by_layer(record, "weight", EDGES)
    return max(found) < 1, f"{min(found):.2g} to {max(found):.2g} times the edge models'"


def rise_again(record: Record) -> Decision:
    found, edges = by_layer(record, "weight"), by_layer(record, "weight", EDGES)
    lowest = int(np.argmin(found))
    here = f"least at layer {lowest + 1}, and {found[-1] / found[lowest]:.2g} times that at the "
    here += f"last (edge models: {edges[-1] / edges[lowest]:.2g})"
    return 1 <= lowest < len(found) - 1, here


def rescaled(record: Record) -> Decision:
    found, reached = left(record)[-1], left(record, "rescaled_feature")[-1]
    undone, ranks = np.log(reached / found) / -np.log(found), by_layer(record, "stable_rank", EDGES)
    here = f"g ends at {reached:.2g} times the edge models', so {100 * undone:.0f}% of the fading "
    here += f"is undone (stable ranks of their square matrices: {min(ranks[1:-1]):.1f} to "
    return 0.5 < undone < 1.5, f"{here}{max(ranks[1:-1]):.1f})"


def over_pairs(record: Record, rule: claims.Rule) -> Decision:
    """A rule on the means over pairs; says of how many pairs it gives the same."""
    (holds, here), rows = rule(record), record.rows
    ones = [rule(Record(record | {"rows": rows.where(pair=k)})) for k in rows.distinct("pair")]
    same = sum(one == holds for one, _ in ones)
    return holds, here if same == len(ones) else f"{here} (so in {same} of {len(ones)} pairs)"


CLAIMS = [
    Claim(f"vf.linear.{name}", text, paper, partial(over_pairs, rule=rule),
          by=f"{by} (means over pairs)")
    for name, text, paper, rule, by in (
        ("fades", "features fade from layer to layer in the midpoint", "it fades", fades,
         "to less than a tenth from the first layer to the last"),
        ("offset-grows", "offsets grow from layer to layer in the midpoint", "it grows",
         offset_grows, "larger at the last layer than at the first"),
        ("overtakes", "offsets overtake features in the last layers", "it overtakes", overtakes,
         "h is larger than g from some layer after the first on, to the end"),
        ("near-chance", "direct midpoints are at chance", "8.9 of 85.8 in its notebook",
         NEAR_CHANCE, "within 10 points of chance; up to two standard errors more are undecided"),
        ("weights-smaller", "weights are smaller in the midpoint than in the edge models",
         "they are smaller", smaller, "in every layer"),
        ("weights-rise", "weights rise again in the final layers", "they rise", rise_again,
         "their mean magnitude is least in a layer after the first, before the last"),
        ("rescaled", "rescaling largely removes the fading", "it does largely", rescaled,
         "more than half of it, in logarithms, and no more than one and a half times it"))
]  # fmt: skip
