"""Figures: a title that says the finding, one colour for one method everywhere, one legend."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kit import records
from vfjax import plot

# fmt: off
# Of Okabe and Ito, and of Tol where those do not suffice: apart for the colour-blind.
_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BLACK, _GREY, _INDIGO, _WINE, _TEAL, _OLIVE, _PURPLE = (
    "#000000", "#777777", "#332288", "#882255", "#44AA99", "#999933", "#AA4499")
# Methods: label, colour, marker. Those of one block stand in one figure.
METHODS: dict[str, tuple[str, str, str]] = {
    "direct": ("direct", _GREY, "o"),
    "none": ("no remedy", _GREY, "o"),
    "matched": ("matched", _BLUE, "s"),
    "repair": ("REPAIR", _RED, "D"),
    "rescale": ("RESCALE", _GREEN, "^"),
    "reset": ("RESET", _PINK, "v"),
    "bias_calibration": ("bias cal.", _ORANGE, "X"),
    "bias_removal": ("bias removal", _SKY, "P"),
    # Matchings.
    "activation": ("activation matching", _INDIGO, "s"),
    "weight": ("weight matching", _WINE, "o"),
    "zipit": ("ZipIt!", _TEAL, "D"),
    "cca": ("CCA", _OLIVE, "^"),
    "transport": ("optimal transport", _PURPLE, "v"),
    # Pruning.
    "magnitude": ("global magnitude", _BLUE, "o"),
    "magnitude-layer": ("layerwise magnitude", _RED, "s"),
    "fisher": ("diagonal Fisher", _GREEN, "D"),
    "woodfisher": ("WoodFisher", _PINK, "^"),
    "wanda": ("Wanda per row", _ORANGE, "v"),
    "wanda-layer": ("layerwise Wanda", _SKY, "X"),
    # What all others are held against.
    "edges": ("edge models", _BLACK, "o"),
    "ensemble": ("ensemble", _BLACK, "o"),
}
# fmt: on
# For what has no method of its own: parts of one figure, in this order.
COLOURS = (_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _INDIGO, _OLIVE, _WINE, _TEAL)
MARKERS = "osD^vXP*<>"
_FONT = 14
ACCURACY = "test accuracy (%)"


def label(method: str) -> str:
    """What a method is called in figures, tables and claims."""
    return METHODS[method][0] if method in METHODS else method


@dataclasses.dataclass(frozen=True)
class Line:
    """A `vfjax.plot.Curve` with a name; lines of one name look alike in all panels."""

    name: str
    x: Sequence[float] | None  # None for a level all along the axis.
    y: Sequence[float] | float  # As many numbers, or one for a level; NaN leaves a gap.
    error: Sequence[float] | None = None  # Half the height of bars.
    method: str | int = 0  # Of `METHODS`, which gives the colour; or a number, of `COLOURS`.
    dashed: bool = False  # With hollow markers.

    @property
    def colour(self) -> tuple[str, str]:
        if isinstance(self.method, str):
            return METHODS[self.method][1:]
        return COLOURS[self.method % len(COLOURS)], MARKERS[self.method % len(MARKERS)]


def Panel(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *args: Any, **options: Any
) -> plot.Panel:
    """One of the axes of a figure; what follows is as of `vfjax.plot.Panel`: log, log_x, ticks."""
    return plot.Panel(title, x_label, y_label, {one.name: one for one in lines}, *args, **options)


def line(
    rows: records.Rows,
    x: str,
    y: str = "accuracy",
    *,
    name: str | None = None,
    method: str | int = 0,
    dashed: bool = False,
    scale: float = 100,
    **where: Any,
) -> Line:
    """The mean over repetitions of rows against x, with their standard deviation as bars."""
    xs, *found = rows.curve(x, y, **where)
    mean, spread = (scale * np.array(part) for part in found)
    name = (label(method) if isinstance(method, str) else "") if name is None else name
    error = spread.tolist() if (spread > 0).any() else None
    return Line(name, xs, mean.tolist(), error, method, dashed)


def levels(found: Mapping[str, float]) -> list[Line]:
    """Edge models and ensemble as levels: accuracies by name; the last one, the goal, is solid."""
    goal = list(found)[-1]
    return [Line(n, None, 100 * y, None, "edges", n != goal) for n, y in found.items()]


def draw(
    panels: Sequence[plot.Panel],
    *,
    finding: str,  # The title: what the figure shows, a sentence made from the record.
    subtitle: str = "",  # Data, networks, images.
    bars: str = "",  # What error bars are; said where there are some.
    columns: int | None = None,  # How many panels stand side by side; None for all.
) -> Any:
    """Draws panels with one legend below them; `vfjax.plot.save` writes the figure."""
    columns = min(len(panels), columns or len(panels))
    figure, shown = plot.panels(panels, columns=columns), {}
    for axes in figure.axes:
        axes.get_legend().remove()
        handles, names = axes.get_legend_handles_labels()
        shown |= zip(names, handles, strict=True)
    every = [one for panel in panels for one in panel.curves.values()]
    # Curves before levels.
    names = list(dict.fromkeys(one.name for one in sorted(every, key=lambda one: one.x is None)))
    bars = f"Bars: {bars}." if bars and any(one.error is not None for one in every) else ""
    # In inches, as all lengths here: the legend has as many columns as there is room for.
    width = max(6.0 * columns, 9.0)
    lines = -(-len(names) // max(1, int(width / (0.85 + 0.1 * max(map(len, names))))))
    title, about = textwrap.fill(finding, int(6.9 * width)), textwrap.fill(subtitle, int(9 * width))
    title_height, below = 0.41 + 0.31 * title.count("\n"), 0.3 * bool(bars)
    head = title_height + 0.4 + 0.25 * about.count("\n")
    foot = 0.27 * lines + 0.15 + below
    height = 4.6 * -(-len(panels) // columns) + head + foot
    figure.set_size_inches(width, height)
    rect = (0, foot / height, 1, 1 - (foot + head) / height)
    figure.get_layout_engine().set(rect=rect, w_pad=0.1, h_pad=0.08)
    style = {"x": 0.12 / width, "ha": "left", "va": "top"}
    figure.text(y=1 - 0.08 / height, s=title, fontsize=_FONT + 3, weight="bold", **style)
    figure.text(y=1 - title_height / height, s=about, fontsize=_FONT - 1, color="#444444", **style)
    figure.text(0.5, 0.06 / height, bars, ha="center", va="bottom", fontsize=_FONT - 2)
    style = {"fontsize": _FONT - 1, "frameon": False, "borderaxespad": 0.2, "columnspacing": 1.2}
    style |= {"loc": "lower center", "bbox_to_anchor": (0.5, below / height)}
    figure.legend([shown[n] for n in names], names, ncols=-(-len(names) // lines), **style)
    return figure


def of_record(record: Mapping[str, Any], panels: Sequence[plot.Panel], **options: Any) -> Any:
    """Draws panels with the finding and the title of a record."""
    return draw(panels, finding=record["finding"], subtitle=record["title"], **options)
