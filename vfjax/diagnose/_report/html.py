"""The report's page: one HTML document with its words, advice, figure and table."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vfjax.diagnose._report.advice import Advice
from vfjax.diagnose._report.findings import LayerFinding
from vfjax.diagnose._report.table import COLUMNS, cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """The report as one self-contained HTML document."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    source = base64.b64encode(picture.getvalue()).decode("ascii")

    def remedy(one: Advice) -> str:
        call = f"<br><code>{html.escape(one.call)}</code>" if one.call else ""
        return f"<li><b>{html.escape(one.remedy)}</b>: {html.escape(one.reason)}.{call}</li>"

    def line(row: LayerFinding) -> str:
        row_cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row))
        return f"<tr{' class=vanishes' if row is vanishes else ''}>{row_cells}</tr>"

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
