"""The report's table: its columns, its cells, and the table as text."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from vfjax.diagnose._report.findings import LayerFinding

COLUMNS = {
    "site": "where: a layer's name stands for its pre-activation",
    "depth": "of the layer",
    "feature": "E||f(x) - f(0)||, in units of the values",
    "offset": "||f(0)||, in units of the values",
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
        table.add_row(*cells(row))
    written = io.StringIO()
    # Names may hold brackets and colons, which rich would read as markup and emoji.
    Console(file=written, width=400, color_system=None, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())
