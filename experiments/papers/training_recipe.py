"""What "Vanishing Feature" claims of how networks were trained, and how it is decided."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from kit import claims
from kit.claims import Claim, Decision
from kit.grid import Cell, Grid
from kit.records import Record, Rows, joined

MATCHES = ("direct", "matched")
# At least so much of the barrier must go from the least rate or decay to the largest; "little";
# accuracies that are alike; "the difference is gone"; "can be merged".
FALLS = {"rate": 0.4, "decay": 0.6}
LITTLE, ALIKE, GONE, MERGES = 0.2, 0.005, 0.25, 0.5


def grid_of(record: Record) -> Grid:
    return Grid(**{k: tuple(v) if isinstance(v, list) else v for k, v in record["grid"].items()})


def where(cell: Cell) -> dict[str, Any]:
    rate, decay = cell.then or (None, None)
    found = {"initialiser": cell.initialiser, "rate": cell.rate, "decay": cell.decay}
    return found | {"then_rate": rate, "then_decay": decay}


def rows_of(record: Record, cell: Cell) -> Rows:
    """Of the pairs that did not diverge."""
    return record.rows.where(**where(cell))


def edges(record: Record, cell: Cell) -> float:
    """Accuracy of the networks; NaN where all diverged."""
    return rows_of(record, cell).mean(network=("model 1", "model 2"))


def barrier(record: Record, cell: Cell, match: str = "matched") -> float:
    """By how much averages fall below the line between the networks."""
    return rows_of(record, cell).mean("barrier", merged=match)


def distance(record: Record, cell: Cell) -> float:
    """Between the two networks, not matched."""
    return rows_of(record, cell).mean("distance", merged="direct", epoch=None)


def sweep(record: Record, name: str) -> list[Cell]:
    """The cells of learning rates, or of weight decays."""
    grid = grid_of(record)
    if name == "rate":
        return [Cell(grid.initialisers[0], rate, grid.decay) for rate in grid.rates]
    return [Cell(grid.initialisers[0], grid.rate, decay) for decay in grid.decays]


def ends(record: Record, name: str) -> list[Cell]:
    """Of a sweep those that are compared: the low rate or decay and the highest."""
    low = grid_of(record).low
    cells = [cell for cell in sweep(record, name) if name == "decay" or cell.rate >= low]
    return [cells[0], cells[-1]] if cells else []


def ablation(record: Record, name: str) -> list[Cell]:
    """Those of the low barrier's recipe, those retrained for an epoch, those of the other one."""
    other, own = ends(record, name)
    return [own, dataclasses.replace(own, then=(grid_of(record).low, other.decay)), other]


def free(record: Record, *cells: Cell, match: str = "matched") -> float:
    """Two standard errors of a barrier: of the accuracy that averages fall to."""
    low = (edges(record, cell) - barrier(record, cell, match) for cell in cells)
    return claims.free(record, min(low))


def points(value: float, digits: int = 1, unit: str = "", scale: float = 100) -> str:
    return "diverged" if math.isnan(value) else f"{scale * value:.{digits}f}{unit}"


def falls(record: Record, name: str, match: str) -> Decision | None:
    if not sweep(record, name):
        return None
    (low, high), rate = ends(record, name), grid_of(record).rate
    start, end = (barrier(record, cell, match) for cell in (low, high))
    margin = (1 - FALLS[name]) * start - end
    if match == "direct":
        margin = LITTLE * max(start, end) - abs(end - start)
    less = f" ({100 * (1 - end / start):.0f}% less)" if start and end < start else ""
    at = f" (all at rate {rate:g})" if name == "decay" else ""
    here = f"{points(start)} points at {name} {getattr(low, name):g}{at}, {points(end)} at "
    here += f"{getattr(high, name):g}{less}"
    return claims.beyond(margin, free(record, low, high, match=match)), here


def alike(record: Record, name: str) -> Decision | None:
    if not sweep(record, name):
        return None
    cells = ablation(record, name)
    values = [edges(record, cell) for cell in cells]
    own, after, other = (points(value, 2, "%") for value in values)
    here = f"from {own} to {after}, those of {getattr(cells[2], name):g} have {other}"
    known = not any(map(math.isnan, values))
    return claims.level(record, values[1:], ALIKE) if known else None, here


def unlike(record: Record, name: str) -> Decision | None:
    """Whether one more epoch does not bring its barrier; open at unlike accuracy."""
    accuracy = alike(record, name)
    if accuracy is None:
        return None
    cells = ablation(record, name)
    own, after, other = (barrier(record, cell) for cell in cells)
    here = f"from {points(own)} to {points(after)} points, that of {getattr(cells[2], name):g} is "
    found = claims.beyond(abs(after - other) - abs(after - own), free(record, *cells))
    # At unlike accuracy it says nothing of what accuracy explains.
    return found if accuracy[0] else None, here + points(other)


def initialised(record: Record, of: Callable[[Record, Cell], float], high: bool) -> Decision | None:
    """Whether the normal one has more at the low rate; or (`high`) no more at the high one."""
    grid = grid_of(record)
    if len(grid.initialisers) < 2:
        return None
    names = sorted(grid.initialisers, key=lambda name: name == "uniform")
    low, top = ([Cell(name, rate, grid.decay) for name in names]
                for rate in (grid.low, grid.rates[-1]))  # fmt: skip
    gaps = [of(record, a) - of(record, b) for a, b in (low, top)]
    cells, margin = low, gaps[0]
    if high:
        cells, margin = top, GONE * abs(gaps[0]) - abs(gaps[1])
    noise, *shape = (free(record, *cells), 1, " points") if of is barrier else (0.0, 1, "", 1)
    normal, uniform = (points(of(record, cell), *shape) for cell in cells)
    here = f"{normal} with the normal one, {uniform} with the uniform"
    return claims.beyond(margin, noise), here


def merge_from_low_on(record: Record) -> Decision | None:
    grid = grid_of(record)
    if grid.rates[0] >= grid.low:
        return None
    cells = [sweep(record, "rate")[0], *ends(record, "rate")]
    margins = [MERGES * edges(record, cell) - barrier(record, cell) for cell in cells]
    margins[0] *= -1
    found = (claims.beyond(m, free(record, cell)) for m, cell in zip(margins, cells, strict=True))
    lost = (points(barrier(record, cell) / edges(record, cell), 0, "%") for cell in cells)
    here = f"networks of rates {joined(f'{c.rate:g}' for c in cells)} lose {joined(lost)}"
    return claims.all_of(found), here


NOISE = "two standard errors are level"
VALUES = {"rate": ("learning rate", "over 40% from 0.01 to 0.1 (VGG16-LN, ResNet20)"),
          "decay": ("weight decay", "over 60% from 1e-4 to 5e-4 (VGG16)")}  # fmt: skip
GONE_AT_HIGH = "larger at the low rate; at the high one the difference is gone"
TEXTS = {"barrier": (barrier, f"; {NOISE}"), "distance": (distance, "")}
MORE = {"rate": "one more epoch at the low rate",
        "decay": "one more epoch at the low rate and decay"}  # fmt: skip
CLAIMS = [
    *(claim for name, (what, paper) in VALUES.items() for claim in (
        Claim(f"vf.recipe.{name}-direct", f"the barrier of direct averages changes little with the "
              f"{what}", "changes little", partial(falls, name=name, match="direct"),
              by=f"by less than {100 * LITTLE:.0f}% of the larger; {NOISE}"),
        Claim(f"vf.recipe.{name}-matched", f"the matched barrier falls with the {what}", paper,
              partial(falls, name=name, match="matched"),
              by=f"{100 * FALLS[name]:.0f}% or more; {NOISE}"))),
    *(claim for name, (what, _) in VALUES.items() for claim in (
        Claim(f"vf.recipe.{name}-epoch-accuracy", f"{MORE[name]} brings networks of the high "
              f"{what} to the accuracy of the low one", "it does", partial(alike, name=name),
              by="within half a point; up to two standard errors more are undecided"),
        Claim(f"vf.recipe.{name}-epoch-barrier", f"{MORE[name]} does not bring networks of the "
              f"high {what} to the barrier of the low one", "it does not",
              partial(unlike, name=name), by="nearer to their own than to that; open where "
              f"accuracies are not within half a point; {NOISE}"))),
    *(claim for what, (of, noise) in TEXTS.items() for claim in (
        Claim(f"vf.recipe.initialiser-{what}-low",
              f"at the low rate the normal initialisation has the larger {what}", GONE_AT_HIGH,
              partial(initialised, of=of, high=False),
              by=f"larger than with the uniform one{noise}"),
        Claim(f"vf.recipe.initialiser-{what}-high",
              f"at the high rate both initialisations have the same {what}", GONE_AT_HIGH,
              partial(initialised, of=of, high=True),
              by=f"less than a quarter of the difference at the low rate is left{noise}"))),
    Claim("vf.recipe.merge-from-low-on", "networks trained at the smallest rate cannot be merged, "
          "those of larger ones can", "VGG16-LN on MNIST: not at 0.001, at 0.01 and 0.1",
          merge_from_low_on, by=f"matched, no more than half of the accuracy is lost; {NOISE}"),
]  # fmt: skip
