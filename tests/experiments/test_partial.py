"""The experiment on which layers to keep apart: its laws, records and options."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
common = importlib.import_module("_common")
partial = importlib.import_module("pfm_vs_partial_zip")

DIGITS = ["--dataset", "digits", "--model", "digits-mlp", "--statistics", "300"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("partial")
    path = partial.main([*DIGITS, "--layers", "0", "1", "3", "4", "--out", str(folder)])
    return path, json.loads(path.read_text())


# ------------------------------------------------------------------------------------- the record


def test_record_is_complete(digits):
    path, record = digits
    name = "pfm_vs_partial_zip-digits-digits-mlp-layers0+1+3+4-statistics300"
    assert path.name == f"{name}.json" and partial.file_name(record) == name
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert record["config"]["match"] == ["zipit", "activation"] == list(record["curves"])
    assert record["data"]["statistics_images"] == 300 and record["remedy"] == "rescale"
    assert {"ZipIt!", "activation matching", "total"} <= set(record["seconds"])
    for kinds in record["curves"].values():
        assert list(kinds) == list(partial.KINDS)
        for curve in kinds.values():
            assert list(curve) == ["params", "flops", "none", "rescale"]
            assert {len(values) for values in curve.values()} == {4}
            assert all(set(cell) == {"accuracy", "loss"} for cell in curve["rescale"])


def test_all_kinds_begin_with_the_fully_merged_network(digits):
    _, record = digits
    model = record["model"]
    for kinds in record["curves"].values():
        for curve in kinds.values():
            first = {key: values[0] for key, values in curve.items()}
            assert first == {key: values[0] for key, values in kinds["pfm"].items()}
            assert (first["params"], first["flops"]) == (model["parameters"], model["flops"])


def test_one_layer_apart_is_none_apart(digits):
    """The first and the last layer are affine: averages of their results are those of kernels."""
    _, record = digits
    for kinds in record["curves"].values():
        for kind in ("pfm", "partial"):
            none, one = (cell["accuracy"] for cell in kinds[kind]["none"][:2])
            assert one == pytest.approx(none, abs=1.5 / 497)


def test_cost_grows_with_the_layers_apart(digits):
    """Never beyond two networks, but for what maps between bases cost."""
    _, record = digits
    model = record["model"]
    for match, kinds in record["curves"].items():
        for curve in kinds.values():
            for key, one in (("params", model["parameters"]), ("flops", model["flops"])):
                assert curve[key] == sorted(curve[key])
                assert match != "activation" or curve[key][-1] < 2 * one


def test_layers_apart_help(digits):
    _, record = digits
    for match in record["curves"]:
        for kind in partial.KINDS:
            values = partial.accuracies(record, match, kind, "rescale")
            assert values[-1] > values[0]


def test_table_and_figure_show_the_record(digits, capsys):
    _, record = digits
    header, rows = partial.table_of(record, "activation")
    assert len(rows) == 4 and {len(row) for row in rows} == {len(header)} == {7}
    found = record["curves"]["activation"]["partial"]["rescale"][3]["accuracy"]
    assert rows[3][header.index("partial zip + RESCALE")] == f"{100 * found:.2f}"
    partial.show(record)
    assert "ZipIt!" in capsys.readouterr().out
    axes = partial.figure_of(record).axes
    assert [a.get_xlabel() for a in axes] == [
        "layers kept apart, l (of L = 6)",
        "layers kept apart, l (of L = 6)",
        "parameters, relative to one model",
        "FLOPs, relative to one model",
    ]
    assert [len(a.containers) for a in axes] == [7, 7, 5, 5]
    # Accuracy for cost is shown where the curves are.
    for place, a in enumerate(axes):
        lowest = min(min(c.lines[0].get_ydata()) for c in a.containers)
        assert a.get_ylim()[0] == 0 if place < 2 else a.get_ylim()[0] > 0.8 * lowest


# ------------------------------------------------------------------------------------- its claims


def with_curves(record, match, column, pfm, other):
    """The record with other accuracies at the l from 3 on."""
    record = copy.deepcopy(record)
    for kind, values in (("pfm", pfm), ("partial", other), ("both", other)):
        cells = record["curves"][match][kind][column]
        for place, value in enumerate(values, start=2):
            cells[place] = {"accuracy": value, "loss": 1.0}
    return record


def verdict(record, start):
    (found,) = (
        (holds, text) for holds, text in partial.claims_of(record) if text.startswith(start)
    )
    return found


def test_claims_go_by_the_numbers(digits):
    record = copy.deepcopy(digits[1])
    start = "with ZipIt! and RESCALE PFM is ahead"
    ahead = with_curves(record, "zipit", "rescale", [0.8, 0.9], [0.7, 0.8])
    holds, text = verdict(ahead, start)
    assert holds and "at 2 and behind at 0 of 2 l" in text and "+10.0 points" in text
    holds, text = verdict(with_curves(record, "zipit", "rescale", [0.8, 0.9], [0.8, 0.8]), start)
    assert not holds and "at 1 and behind at 0 of 2 l" in text and "+5.0 points" in text
    # On 497 images three points are level.
    holds, text = verdict(with_curves(record, "zipit", "rescale", [0.73, 0.83], [0.7, 0.8]), start)
    assert not holds and "at 0 and behind at 0 of 2 l" in text
    record["data"]["test_images"] = 10_000
    holds, text = verdict(with_curves(record, "zipit", "rescale", [0.73, 0.83], [0.7, 0.8]), start)
    assert holds and "at 2 and behind at 0 of 2 l" in text
    record["data"]["test_images"] = 497
    # The other claims are on other curves.
    start = "with activation matching and RESCALE PFM is ahead"
    assert verdict(ahead, start) == verdict(record, start)
    holds, text = verdict(ahead, "with ZipIt! and RESCALE keeping layers apart at both ends")
    assert holds is None and "-10.0 points" in text


def test_two_of_twelve_are_allowed():
    """As many as the paper has, where all l are tried."""
    cells = [{"accuracy": 0.5, "loss": 1.0}] * 14
    better = [{"accuracy": 0.6, "loss": 1.0}] * 14
    best = [{"accuracy": 0.7, "loss": 1.0}] * 14

    def holds(behind):
        curves = {"none": [None] * 14, "reset": better}
        worse = {"none": [None] * 14, "reset": [*cells[behind:], *best[:behind]]}
        kinds = {"pfm": curves, "partial": worse, "both": curves}
        record = {
            "remedy": "reset",
            "model": {"depth": 14},
            "data": {"test_images": 1_000},
            "layers": list(range(14)),
            "config": partial._pairs.DEFAULTS,
            "curves": {"zipit": kinds},
        }
        (first, _), (both, _) = partial.claims_of(record)
        assert both is None
        return first

    assert [holds(behind) for behind in (0, 2, 3)] == [True, True, False]


def test_outcome_says_where_the_edge_models_are_reached(digits):
    _, record = digits
    record = with_curves(record, "zipit", "rescale", [0.5, 1.0], [0.5, 0.6])
    intro, _ = partial.outcome(record)
    assert "reached by PFM at l = 4 (" in intro and "partial zip at none of these l" in intro


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("depth", [2, 3, 7, 14])
def test_equally_many_layers_are_merged(depth):
    for layers in range(depth):
        parts = [range(depth)[partial.merged_of(kind, layers, depth)] for kind in partial.KINDS]
        assert {len(part) for part in parts} == {depth - layers}
        assert parts[0].stop == depth and parts[1].start == 0
        assert abs(parts[2].start - (depth - parts[2].stop)) <= 1
    found = partial.default_layers(depth)
    assert found[0] == 0 and found == sorted(set(found)) and found[-1] == depth - 1


def test_logits_of_heads_are_averaged():
    class Heads:
        heads, weights = ({}, {}), (0.25, 0.75)

        def run(self, x):
            return x, 2 * x

    found = partial._pairs._logits(Heads(), np.float32([4.0]))
    assert found.tolist() == [7.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "6"], "--layers must be from 0 to L - 1 = 5, got 6"),
        (["--layers", "-1"], "--layers must be from 0 to L - 1 = 5, got -1"),
        (["--match", "both"], "invalid choice: 'both'"),
        (["--samples", "0"], "'0' is no number of images"),
        (["--preset", "paper"], "no models of --preset paper are shipped"),
        (["--regularization", "1"], "--regularization does nothing here: it is for --match cca"),
        (["--match", "activation", "--zip-alpha", "1"], "--zip-alpha does nothing here"),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        partial.main([*DIGITS, "--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        partial.main(["--help"])
    printed = capsys.readouterr().out
    for option in ("--match", "--layers", "--samples", "--statistics", "--zip-beta", "--model"):
        assert option in printed
    assert all(action.help for action in partial.parser()._actions)
    options = " ".join(printed.split()).partition("options:")[2].split(" --")
    assert all(option.count("(default: ") <= 1 for option in options)


def test_runs_that_differ_have_other_names(digits):
    _, record = digits
    standard = record["config"] | {"layers": partial.default_layers(6), "statistics": None}
    changes = [{}, {"match": ["zipit"]}, {"match": ["activation", "zipit"]}, {"zip_alpha": 0.1}]
    changes += [{"layers": [0]}, {"samples": 7}, {"statistics": 7}, {"model": "digits-conv"}]
    names = [partial.file_name(record | {"config": standard | change}) for change in changes]
    assert names[0] == "pfm_vs_partial_zip-digits-digits-mlp" and len(set(names)) == len(names)


def test_examples_in_docstrings():
    found = doctest.testmod(partial)
    assert found.attempted and not found.failed
