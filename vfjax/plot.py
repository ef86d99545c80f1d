"""Figures of the experiments, as matplotlib `Figure` objects.

No function touches pyplot, a backend or matplotlib's settings, so they work without a display, in
threads and in notebooks, and do not affect the caller's plots.  Matplotlib is imported on use.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vfjax._files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "Panel", "accuracy_against_layers", "panels", "save"]

# Colours that the colour-blind can tell apart (Okabe and Ito 2008), markers for print in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vXP"
# Large, so that the figure can be read at half its size.
_FONT = 15


def accuracy_against_layers(
    layers: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    *,
    depth: int,
    lines: Mapping[str, float] | None = None,
    errors: Mapping[str, Sequence[float]] | None = None,
    title: str = "",
) -> Figure:
    """Draws the accuracy of merged models against the number of layers kept apart.

    Args:
        layers: The numbers of layers l, from 0 to `depth`.
        curves: By name, one accuracy in [0, 1] for each l; NaN leaves a gap.
        depth: L, the network's number of layers.
        lines: By name, accuracies drawn as horizontal lines: edge models, their ensemble.
        errors: By name of a curve, one standard deviation for each l.
        title: Title of the figure.

    Returns:
        The figure; `save` writes it.

    Raises:
        ValueError: If there is no curve, or a curve or its errors do not have one value for each l.

    Example:
        >>> figure = accuracy_against_layers(
        ...     [0, 1, 2], {"RESCALE": [0.4, 0.4, 0.9]}, depth=2, lines={"ensemble": 0.9})
        >>> axes, = figure.axes
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('layers kept apart l (of L = 2)', 'test accuracy (%)')
    """
    if not curves:
        raise ValueError("curves must hold at least one curve, got none.")
    for argument, given in (("curves", curves), ("errors", errors or {})):
        for name, values in given.items():
            if len(values) != len(layers):
                raise ValueError(
                    f"{argument}[{name!r}] must have one value for each of the {len(layers)} "
                    f"entries of layers, got {len(values)}."
                )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(layers)
    xs = np.asarray(layers)[order]
    for index, (name, values) in enumerate(curves.items()):
        style: dict[str, Any] = {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "label": name,
            "linewidth": 2.5,
            "markersize": 9,
        }
        spread = None if errors is None or name not in errors else errors[name]
        if spread is not None and np.any(np.asarray(spread)):
            style |= {"yerr": 100 * np.asarray(spread)[order], "capsize": 4}
        axes.errorbar(xs, 100 * np.asarray(values, float)[order], **style)
    # Thin, since they often lie close together; the last one, the goal, is solid.
    dashes = [(0, (6, 3)), (0, (2, 2)), (0, (6, 2, 1, 2))]
    for index, (name, value) in enumerate((lines or {}).items()):
        last = index == len(lines or {}) - 1
        style = {"linestyle": "-" if last else dashes[index % len(dashes)], "linewidth": 1.5}
        axes.axhline(100 * value, color="#444444", label=name, zorder=1, **style)
    axes.set_xlabel(f"layers kept apart l (of L = {depth})", fontsize=_FONT)
    axes.set_ylabel("test accuracy (%)", fontsize=_FONT)
    axes.set_xticks(sorted(set(map(int, layers))))
    axes.set_ylim(0, 101)
    axes.tick_params(labelsize=_FONT - 1)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=_FONT - 1, wrap=True)
    handles, labels = axes.get_legend_handles_labels()
    # Matplotlib lists error bars after lines; put the curves first.
    shown = sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] not in curves)
    labels, handles = zip(*shown, strict=True)
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False}
    axes.legend(handles, labels, fontsize=_FONT - 2, **place)
    return figure


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve in a panel, or a level all along x.

    Attributes:
        x: `[n]`; None for a level.
        y: `[n]`; NaN leaves a gap. Of a level one number.
        error: `[n]`, one standard deviation, drawn as bars; None draws no bars.
        colour: Number of its colour and marker, equal for curves of one kind; or colour and marker
            as matplotlib has them.
        dashed: Whether it is dashed, with hollow markers.
    """

    x: Sequence[float] | None
    y: Sequence[float] | float
    error: Sequence[float] | None = None
    colour: int | tuple[str, str] = 0
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes in a row of `panels`.

    Attributes:
        title: Title of the panel.
        x_label: Quantity and unit along x.
        y_label: Quantity and unit along y.
        curves: By their names in the legend.
        log: Whether y is logarithmic.
        log_x: Whether x is logarithmic.
        y_limits: Lower and upper limit of y; None to fit the curves.
        ticks: Where x has numbers; None for what suits the curves.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]
    log: bool = False
    log_x: bool = False
    y_limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None


def panels(row: Sequence[Panel], *, title: str = "", columns: int | None = None) -> Figure:
    """Draws panels of curves side by side.

    Args:
        row: The panels, from left to right.
        title: Title of the figure.
        columns: How many stand side by side before the next row begins; None for all.

    Returns:
        The figure; `save` writes it.

    Raises:
        ValueError: If there is no panel, a panel has no curve, the arrays of a curve differ in
            length, or `columns` is below one.

    Example:
        >>> curve = Curve([1, 2], [3.0, 0.5], error=[0.1, 0.1])
        >>> figure = panels([Panel("features", "layer", "norm", {"midpoint": curve}, log=True)])
        >>> figure.axes[0].get_yscale()
        'log'
    """
    if not row:
        raise ValueError("row must hold at least one panel, got none.")
    for panel in row:
        if not panel.curves:
            raise ValueError(f"the panel {panel.title!r} must have at least one curve, got none.")
        for name, curve in panel.curves.items():
            sizes = {np.size(v) for v in (curve.x, curve.y, curve.error) if v is not None}
            if len(sizes) != 1:
                raise ValueError(
                    f"x, y and error of the curve {name!r} must be equally long, got lengths "
                    f"{sorted(sizes)}."
                )
    columns = len(row) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be one or more, got {columns}.")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(row) // columns)
    figure = Figure(figsize=(6.5 * columns, 6.6 * rows), layout="constrained")
    for place, panel in enumerate(row, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for name, curve in panel.curves.items():
            _draw(axes, name, curve)
        if panel.log:
            _log_scale(axes, "y")
        if panel.log_x:
            _log_scale(axes, "x")
        elif all(np.all(np.mod(c.x, 1) == 0) for c in panel.curves.values() if c.x is not None):
            # Layers and epochs are whole numbers.
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.ticks is not None:
            axes.set_xticks(list(panel.ticks))
        if panel.y_limits is not None:
            axes.set_ylim(*panel.y_limits)
        axes.set_xlabel(panel.x_label, fontsize=_FONT)
        axes.set_ylabel(panel.y_label, fontsize=_FONT)
        axes.set_title(panel.title, fontsize=_FONT if len(panel.title) < 48 else _FONT - 2)
        axes.tick_params(labelsize=_FONT - 1)
        axes.grid(alpha=0.3)
        # Below the axes, where it does not hide a curve.
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
        axes.legend(fontsize=_FONT - 2, frameon=False, **below)
    if title:
        figure.suptitle(title, fontsize=_FONT)
    return figure


def _draw(axes: Any, name: str, curve: Curve) -> None:
    if isinstance(curve.colour, int):
        style = _COLOURS[curve.colour % len(_COLOURS)], _MARKERS[curve.colour % len(_MARKERS)]
    else:
        style = curve.colour
    colour, marker = style
    if curve.x is None:
        dashes = (0, (6, 3)) if curve.dashed else "-"
        axes.axhline(curve.y, color=colour, linestyle=dashes, linewidth=1.6, zorder=1, label=name)
        return
    axes.errorbar(
        curve.x,
        np.asarray(curve.y, float),
        None if curve.error is None else np.asarray(curve.error, float),
        label=name,
        color=colour,
        linestyle="--" if curve.dashed else "-",
        linewidth=2.5,
        marker=marker,
        markersize=8,
        markerfacecolor="white" if curve.dashed else None,
        capsize=4,
        elinewidth=1.5,
    )


def _log_scale(axes: Any, which: str) -> None:
    """Makes x or y logarithmic, with enough tick labels even over few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Writes a figure as PNG, under a temporary name until it is complete.

    Args:
        figure: The figure.
        path: The file to write; its folder is created.
        dpi: Dots per inch.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written; whatever was at `path` stays.

    Example:
        >>> import tempfile
        >>> figure = accuracy_against_layers([0, 1], {"direct": [0.1, 0.5]}, depth=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(figure, folder + "/figure.png").read_bytes()[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return write_whole(path, buffer.getvalue())
