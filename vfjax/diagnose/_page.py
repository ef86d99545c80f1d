"""How a report looks: its table, its figure and its page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vfjax.diagnose._advice import Advice
from vfjax.diagnose._findings import LayerFinding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONT = 15
_FEATURE, _OFFSET = "#0072B2", "#D55E00"

COLUMNS = {
    "site": "where: a layer's name stands for its pre-activation",
    "depth": "of the layer",
    "feature": "E||f(x) - f(0)||, in units of the values",
    "offset": "||f(0)||, likewise",
    "f/o": "feature over offset",
    "refs' f/o": "the same of the references",
    "relative": "feature over the references' feature",
    "step": "relative, over that of the last depth before with features left",
    "bound": "largest relative from here to the output",
    "smooth": "the same with gamma = 1.4",
    "std": "standard deviation over the references', of the channels that vary",
    "mean off": "distance of means from the references', in their standard deviations",
    "dead": "share of channels that do not vary",
}


def cells(row: LayerFinding) -> tuple[str, ...]:
    """The cells of a row of the table, in the order of `COLUMNS`."""
    numbers = (
        row.feature,
        row.offset,
        row.ratio,
        row.reference_ratio,
        row.relative,
        row.step,
        row.bound,
        row.smoothed,
        row.std_ratio,
    )
    shown = [_shown(v, ".3g") for v in numbers]
    return (
        row.site,
        str(row.depth),
        *shown,
        _shown(row.mean_shift, ".2f"),
        f"{100 * row.dead:.0f} %",
    )


def _shown(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else ("inf" if value > 0 else "-")


def text_table(rows: Sequence[LayerFinding]) -> str:
    """The table as text, without a trailing newline."""
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    for row in rows:
        # As text: names may hold brackets, which are markup to rich.
        table.add_row(*(cell.replace("[", r"\[") for cell in cells(row)))
    written = io.StringIO()
    Console(file=written, width=400, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def draw(
    rows: Sequence[LayerFinding],
    sizes: Sequence[int],
    depth: int,
    vanishes: LayerFinding | None,
    title: str,
) -> Figure:
    """Features and offsets of a network and its references over relative depth.

    An output beside the last layer, which it shares its depth with, is drawn half a layer further.

    Args:
        rows: Findings by depth.
        sizes: Entries of each site's value.
        depth: L, the network's number of layers.
        vanishes: Where features vanish; marked.
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
        # A logarithmic axis has no 0: a gap, and a label that says so where nothing is left.
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
    # Over few decades powers of ten alone are too few numbers.
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
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


_STYLE = """
body { font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 1.6em; }
img { max-width: 48em; width: 100%; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85em; }
th, td { padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; font-family: monospace; }
tr.vanishes { background: #fdeedd; }
code { background: #f3f3f3; padding: 0.1em 0.3em; }
dt { font-weight: bold; float: left; clear: left; width: 6em; font-size: 0.85em; }
dd { margin-left: 6em; font-size: 0.85em; }
td { white-space: nowrap; }
tr, img { break-inside: avoid; }
@media print { body { font-size: 10px; margin: 0; } td, th { padding: 0.2em 0.4em; } }
"""


def page(
    title: str,
    words: Sequence[str],
    advice: Sequence[Advice],
    rows: Sequence[LayerFinding],
    vanishes: LayerFinding | None,
    figure: Figure,
) -> str:
    """The report as one HTML document that needs nothing else."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    source = base64.b64encode(picture.getvalue()).decode("ascii")

    def remedy(one: Advice) -> str:
        call = f"<br><code>{html.escape(one.call)}</code>" if one.call else ""
        return f"<li><b>{html.escape(one.remedy)}</b>: {html.escape(one.reason)}.{call}</li>"

    def line(row: LayerFinding) -> str:
        found = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
        return f"<tr{' class=vanishes' if row is vanishes else ''}>{found}</tr>"

    name = html.escape(title)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    legend = [f"<dt>{html.escape(c)}</dt><dd>{html.escape(t)}</dd>" for c, t in COLUMNS.items()]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>",
        "<h2>What happens to the features</h2>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in words),
        "<h2>Likely remedy</h2>\n<ol>",
        *map(remedy, advice),
        "</ol>\n<h2>Features and offsets over depth</h2>",
        "<p>A feature is what the input adds to a layer's value, f(x) - f(0); the offset is the "
        "value at the input 0.</p>",
        f'<img alt="features and offsets over depth" src="data:image/png;base64,{source}">',
        f"<h2>Every layer</h2>\n<div><table>\n<thead><tr>{head}</tr></thead>\n<tbody>",
        *map(line, rows),
        "</tbody></table></div>\n<dl>",
        *legend,
        "</dl>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)
