"""The report's figure: features and offsets over depth, next to those of the references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vfjax.diagnose._report.findings import LayerFinding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONT = 15

_FEATURE, _OFFSET = "#0072B2", "#D55E00"


def draw(
    rows: Sequence[LayerFinding],
    sizes: Sequence[int],
    depth: int,
    vanishes: LayerFinding | None,
    title: str,
) -> Figure:
    """Draws features and offsets of a network and its references over relative depth.

    An output that has the depth of the last layer is drawn half a layer further to the right.

    Args:
        rows: Findings by depth.
        sizes: Number of entries of each site's value.
        depth: L, the network's number of layers.
        vanishes: The finding where features vanish, which is marked; or None.
        title: Title of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    further = rows[-1].site == "output" and rows[-1].depth in [row.depth for row in rows[:-1]]
    xs = np.array([row.depth for row in rows]) / depth
    xs[-1] += further * 0.5 / depth
    units = np.sqrt(np.maximum(sizes, 1))
    curves = (
        ("feature, this network", "feature", _FEATURE, "o", "-"),
        ("feature, references", "reference_feature", _FEATURE, "o", "--"),
        ("offset, this network", "offset", _OFFSET, "s", "-"),
        ("offset, references", "reference_offset", _OFFSET, "s", "--"),
    )
    for label, what, colour, marker, line in curves:
        values = np.array([getattr(row, what) for row in rows]) / units
        # A logarithmic axis has no 0: zeros are gaps, and the label of a curve of zeros says so.
        shown = np.where(values > 0, values, np.nan)
        if not (values > 0).any():
            label += " (0)"
        face = colour if line == "-" else "white"
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line}
        style["markerfacecolor"] = face
        axes.plot(xs, shown, label=label, linewidth=2.5, markersize=9, **style)
    if vanishes is not None:
        style = {"color": "#444444", "linewidth": 1.5, "linestyle": (0, (2, 2)), "zorder": 1}
        axes.axvline(xs[list(rows).index(vanishes)], label="features vanish", **style)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Over a few decades, powers of ten alone would give too few tick labels.
    subs = (1, 2, 5) if high < 50 * low else (1, 3) if high < 3000 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, xs.max() + 0.04)
    then = ", and the output" if further else ""
    axes.set_xlabel(f"relative depth l/L (L = {depth} layers){then}", fontsize=_FONT)
    axes.set_ylabel("root mean square per unit\n(units of the layer's values)", fontsize=_FONT)
    axes.tick_params(labelsize=_FONT - 1)
    axes.grid(alpha=0.3)
    axes.set_title(_plain(title), fontsize=_FONT, wrap=True)
    axes.legend(
        fontsize=_FONT - 1, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False
    )
    return figure


def _plain(text: str) -> str:
    """Escapes text, so that matplotlib does not read it as mathematics."""
    return text.replace("$", r"\$")
