"""What "Vanishing Feature" claims of how networks were trained, and how it is decided."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
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
    cells, low = sweep(record, name), grid_of(record).low
    cells = [cell for cell in cells if name == "decay" or cell.rate >= low]
    return [cells[0], cells[-1]] if cells else []


def ablation(record: Record, name: str) -> list[Cell]:
    """Those of the low barrier's recipe, those retrained for an epoch, those of the other one."""
    grid, (other, own) = grid_of(record), ends(record, name)
    return [own, dataclasses.replace(own, then=(grid.low, other.decay)), other]


def free(record: Record, *cells: Cell, match: str = "matched") -> float:
    """Two standard errors of a barrier: of the accuracy that averages fall to."""
    low = min(edges(record, cell) - barrier(record, cell, match) for cell in cells)
    return claims.free(record, low)


def decided(margin: float, noise: float, here: str) -> Decision:
    unknown = math.isnan(margin) or abs(margin) <= noise
    return None if unknown else margin > 0, here


def points(value: float, digits: int = 1, unit: str = "", scale: float = 100) -> str:
    """In per cent, or that it diverged."""
    return "diverged" if math.isnan(value) else f"{scale * value:.{digits}f}{unit}"


# ----------------------------------------------------------------------------------------- rules


def falls(record: Record, name: str, match: str) -> Decision | None:
    if not sweep(record, name):
        return None
    (low, high), grid = ends(record, name), grid_of(record)
    start, end = (barrier(record, cell, match) for cell in (low, high))
    margin = (1 - FALLS[name]) * start - end
    if match == "direct":
        margin = LITTLE * max(start, end) - abs(end - start)
    less = f" ({100 * (1 - end / start):.0f}% less)" if start and end < start else ""
    at = f" (all at rate {grid.rate:g})" if name == "decay" else ""
    here = f"{points(start)} points at {name} {getattr(low, name):g}{at}, {points(end)} at "
    here += f"{getattr(high, name):g}{less}"
    return decided(margin, free(record, low, high, match=match), here)


def alike(record: Record, name: str) -> Decision | None:
    if not sweep(record, name):
        return None
    own, after, other = ablation(record, name)
    values = [edges(record, cell) for cell in (own, after, other)]
    to, found = getattr(other, name), [points(value, 2, "%") for value in values]
    here = f"from {found[0]} to {found[1]}, those of {to:g} have {found[2]}"
    known = not any(map(math.isnan, values))
    return claims.level(record, values[1:], ALIKE) if known else None, here


def unlike(record: Record, name: str) -> Decision | None:
    accuracy = alike(record, name)
    if accuracy is None:
        return None
    cells = ablation(record, name)
    own, after, other = (barrier(record, cell) for cell in cells)
    here = f"from {points(own)} to {points(after)} points, that of {getattr(cells[2], name):g} is "
    here += points(other)
    found = decided(abs(after - other) - abs(after - own), free(record, *cells), here)
    # At unlike accuracy it says nothing of what accuracy explains.
    return found if accuracy.holds else (None, here)


def initialised(record: Record, of: Callable[[Record, Cell], float], high: bool) -> Decision | None:
    grid = grid_of(record)
    if len(grid.initialisers) < 2:
        return None
    names = sorted(grid.initialisers, key=lambda name: name == "uniform")
    low, top = ([Cell(name, rate, grid.decay) for name in names]
                for rate in (grid.low, grid.rates[-1]))  # fmt: skip
    gaps = [of(record, a) - of(record, b) for a, b in (low, top)]
    cells, noise = top if high else low, 0.0
    margin = GONE * abs(gaps[0]) - abs(gaps[1]) if high else gaps[0]
    shown = [points(of(record, cell), scale=1) for cell in cells]
    if of is barrier:
        noise, shown = free(record, *cells), [points(of(record, c), 1, " points") for c in cells]
    return decided(margin, noise, f"{shown[0]} with the normal one, {shown[1]} with the uniform")


def merge_from_low_on(record: Record) -> Decision | None:
    grid = grid_of(record)
    if grid.rates[0] >= grid.low:
        return None
    cells = [sweep(record, "rate")[0], *ends(record, "rate")]
    found = []
    for k, cell in enumerate(cells):
        margin = MERGES * edges(record, cell) - barrier(record, cell)
        found.append(decided(margin if k else -margin, free(record, cell), "").holds)
    lost = [barrier(record, cell) / edges(record, cell) for cell in cells]
    shares = joined(points(share, 0, "%") for share in lost)
    here = f"networks of rates {joined(f'{c.rate:g}' for c in cells)} lose {shares}"
    return claims.all_of(found), here


# ---------------------------------------------------------------------------------------- claims

NOISE = "two standard errors are level"
VALUES = {"rate": ("learning rate", "over 40% from 0.01 to 0.1 (VGG16-LN, ResNet20)"),
          "decay": ("weight decay", "over 60% from 1e-4 to 5e-4 (VGG16)")}  # fmt: skip
TEXTS = {"barrier": barrier, "distance": distance}


def of_sweep(name: str, match: str) -> Claim:
    what, paper = VALUES[name]
    text, by = f"the matched barrier falls with the {what}", f"{100 * FALLS[name]:.0f}% or more"
    if match == "direct":
        text = f"the barrier of direct averages changes little with the {what}"
        paper, by = "changes little", f"by less than {100 * LITTLE:.0f}% of the larger"
    rule = functools.partial(falls, name=name, match=match)
    return Claim(f"vf.recipe.{name}-{match}", text, paper, rule, by=f"{by}; {NOISE}")


def of_ablation(name: str) -> Sequence[Claim]:
    what, more = VALUES[name][0], "one more epoch at the low rate"
    if name == "decay":
        more += " and decay"
    return [
        Claim(f"vf.recipe.{name}-epoch-accuracy", f"{more} brings networks of the high {what} to "
              "the accuracy of the low one", "it does", functools.partial(alike, name=name),
              by="within half a point; up to two standard errors more are undecided"),
        Claim(f"vf.recipe.{name}-epoch-barrier", f"{more} does not bring networks of the high "
              f"{what} to the barrier of the low one", "it does not",
              functools.partial(unlike, name=name),
              by="nearer to their own than to that; open where accuracies are not within half a "
              f"point; {NOISE}"),
    ]  # fmt: skip


def of_initialisers(what: str, high: bool) -> Claim:
    rule = functools.partial(initialised, of=TEXTS[what], high=high)
    text = f"at the low rate the normal initialisation has the larger {what}"
    paper = "larger at the low rate; at the high one the difference is gone"
    by, end = "larger than with the uniform one", "low"
    if high:
        text = f"at the high rate both initialisations have the same {what}"
        by, end = "less than a quarter of the difference at the low rate is left", "high"
    by += f"; {NOISE}" if what == "barrier" else ""
    return Claim(f"vf.recipe.initialiser-{what}-{end}", text, paper, rule, by=by)


CLAIMS = [
    *(of_sweep(name, match) for name in FALLS for match in MATCHES),
    *(claim for name in FALLS for claim in of_ablation(name)),
    *(of_initialisers(what, high) for what in TEXTS for high in (False, True)),
    Claim("vf.recipe.merge-from-low-on", "networks trained at the smallest rate cannot be merged, "
          "those of larger ones can", "VGG16-LN on MNIST: not at 0.001, at 0.01 and 0.1",
          merge_from_low_on,
          by=f"matched, no more than half of the accuracy is lost; {NOISE}"),
]  # fmt: skip
