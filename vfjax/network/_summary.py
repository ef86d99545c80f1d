"""The table that `Network.summary` prints."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table


def summary(net: Any) -> str:
    """The layers of a network as a text table; notes below it list what could not be followed.

    Args:
        net: A `Network`.

    Returns:
        The table, without a trailing newline.
    """
    table = Table(title=repr(net), title_justify="left", box=None, pad_edge=False)
    for column in ("layer", "depth", "kernel", "output", "parameters", "FLOPs", "group"):
        table.add_column(
            column,
            justify="right" if column in ("depth", "parameters", "FLOPs") else "left",
            no_wrap=True,
        )
    for layer in net.layers:
        table.add_row(
            layer.name,
            str(layer.depth) if layer.main else f"({layer.depth})",
            "x".join(map(str, layer.shape)),
            "x".join(map(str, layer.output_shape[1:])),
            f"{layer.params:,}",
            f"{layer.flops:,}",
            layer.group or "-",
        )
    table.add_row("total", str(net.depth), "", "", f"{net.params:,}", f"{net.flops:,}", "")
    written = io.StringIO()
    # Names may hold brackets and colons, which rich would read as markup and emoji.
    console = Console(file=written, width=400, color_system=None, markup=False, emoji=False)
    console.print(table)
    text = "\n".join(line.rstrip() for line in written.getvalue().splitlines())
    notes = [f"opaque: {primitive} at {where}" for primitive, where in net.opaque]
    outside = "outside of layers, norms and biases"
    notes += [f"{outside}: {path} ({op} at {where})" for path, op, where in net.others]
    notes += [f"of no norm: {path} ({verb} at {where})" for path, verb, where in net.unrecognised]
    if any(not layer.main for layer in net.layers):
        notes.append("(depth): a shortcut or a branch, off every longest path")
    return "\n".join([text, *notes])
