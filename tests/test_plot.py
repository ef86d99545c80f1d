"""Figures: what they show, and that drawing them changes nothing else."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf

from vfjax import plot

LAYERS = [0, 3, 6]
CURVES = {"direct": [0.1, 0.1, 0.5], "RESCALE": [0.7, 0.8, 0.9]}


def test_curves_are_in_percent_and_named():
    figure = plot.accuracy_against_layers(LAYERS, CURVES, depth=14, lines={"ensemble": 0.92})
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(labels) == {"direct", "RESCALE", "ensemble"}
    drawn = {container.get_label(): container.lines[0] for container in axes.containers}
    np.testing.assert_allclose(drawn["RESCALE"].get_ydata(), [70, 80, 90])
    np.testing.assert_allclose(drawn["RESCALE"].get_xdata(), LAYERS)
    (line,) = [line for line in axes.lines if line.get_label() == "ensemble"]
    np.testing.assert_allclose(line.get_ydata(), 92)


def test_layers_are_drawn_in_order():
    figure = plot.accuracy_against_layers([6, 0, 3], {"a": [0.6, 0.0, 0.3]}, depth=14)
    drawn = figure.axes[0].containers[0].lines[0]
    np.testing.assert_allclose(drawn.get_xdata(), [0, 3, 6])
    np.testing.assert_allclose(drawn.get_ydata(), [0, 30, 60])


def test_spread_is_drawn_where_there_is_any():
    spread = {"direct": [0.0, 0.0, 0.0], "RESCALE": [0.01, 0.02, 0.03]}
    figure = plot.accuracy_against_layers(LAYERS, CURVES, depth=14, errors=spread)
    bars = {container.get_label(): container.has_yerr for container in figure.axes[0].containers}
    assert bars == {"direct": False, "RESCALE": True}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"curves": {}}, "curves must hold at least one"),
        ({"curves": {"a": [0.1]}}, r"curves\['a'\] must have one value for each of the 3"),
        ({"curves": CURVES, "errors": {"direct": [0.1]}}, r"errors\['direct'\] must have"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot.accuracy_against_layers(LAYERS, depth=14, **arguments)


def test_save_writes_a_whole_file_and_no_other(tmp_path):
    figure = plot.accuracy_against_layers(LAYERS, CURVES, depth=14, title="A title")
    path = plot.save(figure, tmp_path / "deep" / "figure.png", dpi=50)
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    plot.save(figure, path, dpi=50)


def test_no_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    figure = plot.accuracy_against_layers(LAYERS, CURVES, depth=14)
    plot.save(figure, tmp_path / "figure.png", dpi=50)
    assert dict(matplotlib.rcParams) == before
    # The figures that pyplot would show.
    assert not Gcf.figs


def panel(**changes):
    curves = {
        "g": plot.Curve([1, 2], [3.0, 0.5], error=[0.1, 0.2]),
        "h": plot.Curve([1, 2], [1, 1]),
    }
    return plot.Panel(**{"title": "t", "x_label": "x", "y_label": "y", "curves": curves} | changes)


def test_panels_stand_side_by_side():
    row = [panel(log=True), panel(y_limits=(0, 5)), panel(curves={"a": plot.Curve([0], [1e-3])})]
    figure = plot.panels(row, title="A title")
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear"]
    assert figure.axes[1].get_ylim() == (0, 5)
    for axes, given in zip(figure.axes, row, strict=True):
        assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("t", "x", "y")
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == list(given.curves)
    bars = [container.has_yerr for container in figure.axes[0].containers]
    assert bars == [True, False]


@pytest.mark.parametrize("x, whole", [(range(21), True), (np.arange(11) / 10, False)])
def test_whole_numbers_have_whole_ticks(x, whole):
    row = [plot.Panel("a", "layer", "y", {"one": plot.Curve(list(x), list(x))})]
    (axes,) = plot.panels(row).axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks()) is whole


def test_panels_in_several_rows():
    figure = plot.panels([panel() for _ in range(3)], columns=2)
    assert [axes.get_subplotspec().get_geometry()[:2] for axes in figure.axes] == [(2, 2)] * 3
    wide = plot.panels([panel() for _ in range(3)])
    assert figure.get_figwidth() < wide.get_figwidth()
    with pytest.raises(ValueError, match="columns must be one or more, got 0"):
        plot.panels([panel()], columns=0)


@pytest.mark.parametrize("top", [5.0, 5e5])
def test_logarithmic_axes_have_numbers(top):
    curves = {"a": plot.Curve([1, 2], [1.5, top])}
    figure = plot.panels([panel(curves=curves, log=True)])
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    shown = [t for t in axes.yaxis.get_major_locator()() if low <= t <= high]
    assert 2 <= len(shown) <= 8


def test_x_may_be_logarithmic():
    figure = plot.panels([panel(curves={"a": plot.Curve([10, 5000], [1.0, 2.0])}, log_x=True)])
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert axes.xaxis.get_major_formatter()(1000, 0) == "1000"


@pytest.mark.parametrize(
    "row, message",
    [
        ([], "row must hold at least one panel"),
        ([panel(curves={})], "the panel 't' must have at least one curve"),
        ([panel(curves={"a": plot.Curve([1, 2], [1])})], r"'a' must be equally long.*\[1, 2\]"),
        ([panel(curves={"a": plot.Curve([1], [1], error=[])})], "'a' must be equally long"),
    ],
)
def test_bad_panels(row, message):
    with pytest.raises(ValueError, match=message):
        plot.panels(row)
