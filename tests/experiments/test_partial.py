"""The experiment on which layers to keep apart: its laws, records and options."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, cli, pairs, records = (
    importlib.import_module(f"kit.{name}") for name in ("claims", "cli", "pairs", "records")
)
partial = importlib.import_module("pfm_vs_partial_zip")

RUN = partial.EXPERIMENT
AS, UNLIKE, OPEN, NEW = claims.VERDICTS
DIGITS = ["--dataset", "digits", "--model", "digits-mlp", "--statistics", "300"]
MATCHES, LAYERS = ("zipit", "activation"), (0, 1, 3, 4)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("partial")
    path = partial.main([*DIGITS, "--layers", "0", "1", "3", "4", "--out", str(folder)])
    return path, records.read(path)


@pytest.fixture
def record(digits):
    return copy.deepcopy(digits[1])


def curve(record, match, kind, remedy, key="accuracy"):
    """A column by l."""
    return record.rows.where(match=match, kind=kind, remedy=remedy).values(key)


# ------------------------------------------------------------------------------------- the record


def test_record_is_complete(digits):
    path, record = digits
    name = "pfm_vs_partial_zip-digits-digits-mlp-layers0+1+3+4-statistics300"
    assert path.name == f"{name}.json" and RUN.file_name(record) == name
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert record["config"]["match"] == list(MATCHES) == record.rows.distinct("match")
    assert record["data"]["statistics_images"] == 300
    assert record.rows.distinct("remedy") == ["none", "rescale"]
    assert {"ZipIt!", "activation matching", "total"} <= set(record["seconds"])
    assert [note["method"] for note in record.notes("matching")] == list(MATCHES)
    for match in MATCHES:
        assert record.rows.where(match=match).distinct("kind") == list(partial.KINDS)
        for kind in partial.KINDS:
            for remedy in ("none", "rescale"):
                rows = record.rows.where(match=match, kind=kind, remedy=remedy)
                assert [row["layers"] for row in rows] == list(LAYERS)
                for key in ("accuracy", "loss", "params", "flops"):
                    assert len(rows.values(key)) == 4


def test_all_kinds_begin_with_the_fully_merged_network(digits):
    _, record = digits
    model = record["model"]
    for match in MATCHES:
        for remedy in ("none", "rescale"):
            first = [
                {k: v for k, v in row.items() if k != "kind"}
                for row in record.rows.where(match=match, layers=0, remedy=remedy)
            ]
            assert len(first) == 3 and first[0] == first[1] == first[2]
            assert first[0]["params"] == model["parameters"]
            assert first[0]["flops"] == model["flops"] and first[0]["flops_ratio"] == 1


def test_one_layer_apart_is_none_apart(digits):
    """The first and the last layer are affine: averages of their results are those of kernels."""
    _, record = digits
    for match in MATCHES:
        for kind in ("pfm", "partial"):
            none, one = curve(record, match, kind, "none")[:2]
            assert one == pytest.approx(none, abs=1.5 / 497)


def test_cost_grows_with_the_layers_apart(digits):
    """Never beyond two networks, but for what maps between bases cost."""
    _, record = digits
    model = record["model"]
    for match in MATCHES:
        for kind in partial.KINDS:
            for key, one in (("params", model["parameters"]), ("flops", model["flops"])):
                found = curve(record, match, kind, "rescale", key)
                assert found == sorted(found)
                assert match != "activation" or found[-1] < 2 * one


def test_layers_apart_help(digits):
    _, record = digits
    for match in MATCHES:
        for kind in partial.KINDS:
            values = curve(record, match, kind, "rescale")
            assert values[-1] > values[0]


def test_table_and_figure_show_the_record(digits, capsys):
    _, record = digits
    table, costs = partial.tables_of(record)[2:]
    assert table.title.endswith(", activation matching") and len(table.header) == 7
    assert len(table.lines) == 7 and len(costs.lines) == 4 and len(costs.header) == 7
    (found,) = record.rows.where(layers=4, kind="partial", remedy="rescale").values(
        match="activation"
    )
    shown = table.lines[6][table.header.index("partial zip + RESCALE")]
    assert shown.removeprefix("*") == f"{100 * found:.2f}"
    RUN.show(record)
    assert "ZipIt!" in capsys.readouterr().out
    axes = partial.figure_of(record).axes
    assert [a.get_xlabel() for a in axes] == [
        "layers kept apart, l (of L = 6)",
        "layers kept apart, l (of L = 6)",
        "parameters, relative to one model",
        "FLOPs, relative to one model",
    ]
    assert [len(a.containers) for a in axes] == [6, 6, 3, 3]
    # Accuracy for cost is shown where the curves are.
    for place, a in enumerate(axes):
        lowest = min(min(c.lines[0].get_ydata()) for c in a.containers)
        assert a.get_ylim()[0] == 0 if place < 2 else a.get_ylim()[0] > 0.8 * lowest


# ------------------------------------------------------------------------------------- its claims


def with_curves(record, match, remedy, pfm, other):
    """The record with other accuracies at the l from 3 on."""
    record = copy.deepcopy(record)
    for kind, values in (("pfm", pfm), ("partial", other), ("both", other)):
        rows = record.rows.where(match=match, kind=kind, remedy=remedy)
        for row, value in zip(rows[2:], values, strict=True):
            row["accuracy"] = value
    return record


def verdict(record, name):
    """Verdict and numbers of a claim."""
    (found,) = (row for row in claims.decided(RUN.claims, record) if row["id"] == f"vf.{name}")
    return found["verdict"], found["here"]


def test_claims_go_by_the_numbers(record):
    name = "partial.zipit-rescale"
    ahead = with_curves(record, "zipit", "rescale", [0.8, 0.9], [0.7, 0.8])
    found, text = verdict(ahead, name)
    assert found == AS and "at 2 and behind at 0 of 2 l" in text and "+10.0 points" in text
    found, text = verdict(with_curves(record, "zipit", "rescale", [0.8, 0.9], [0.8, 0.8]), name)
    assert found == OPEN and "at 1 and behind at 0 of 2 l" in text and "+5.0 points" in text
    found, text = verdict(with_curves(record, "zipit", "rescale", [0.8, 0.7], [0.7, 0.8]), name)
    assert found == UNLIKE and "at 1 and behind at 1 of 2 l" in text
    # On 497 images three points are level.
    found, text = verdict(with_curves(record, "zipit", "rescale", [0.73, 0.83], [0.7, 0.8]), name)
    assert found == OPEN and "at 0 and behind at 0 of 2 l" in text
    # What has vanished shows nothing.
    found, text = verdict(with_curves(record, "zipit", "rescale", [0.19, 0.1], [0.1, 0.19]), name)
    assert found == OPEN and "at 0 and behind at 0 of 2 l" in text
    record["data"]["test_images"] = 10_000
    found, text = verdict(with_curves(record, "zipit", "rescale", [0.73, 0.83], [0.7, 0.8]), name)
    assert found == AS and "at 2 and behind at 0 of 2 l" in text
    record["data"]["test_images"] = 497
    # The other claims are on other curves.
    other = "partial.activation-rescale"
    assert verdict(ahead, other) == verdict(record, other)
    found, text = verdict(ahead, "new.both-ends-zipit-rescale")
    assert found == NEW and "-10.0 points" in text


def test_two_of_twelve_are_allowed():
    """As many as the paper has, where all l are tried."""

    def found(behind):
        values = {
            "pfm": [0.6] * 14,
            "partial": [*[0.5] * (14 - behind), *[0.7] * behind],
            "both": [0.6] * 14,
        }
        rows = [
            {"match": "zipit", "remedy": "reset", "kind": kind, "layers": at, "accuracy": value}
            for kind, of in values.items()
            for at, value in enumerate(of)
        ]
        # What BatchNorm's variances are unknown for.
        rows += [{**row, "remedy": "none", "accuracy": None} for row in rows]
        data = {"name": "cifar10", "test_images": 1_000}
        first, both = claims.decided(RUN.claims, records.Record(data=data, rows=rows))
        assert both["verdict"] == NEW
        return first["verdict"]

    assert [found(behind) for behind in (0, 2, 3)] == [AS, AS, UNLIKE]


def test_finding_says_where_the_edge_models_are_reached(record):
    record = with_curves(record, "zipit", "rescale", [0.5, 1.0], [0.5, 0.6])
    found = RUN.derived(record)
    reached = found["summary"]["reaches_edges_at"]
    kinds = ("PFM", "partial zip", "both ends")
    assert [reached[f"{kind} + RESCALE"] for kind in kinds] == [4, None, None]
    assert found["finding"].endswith("% from l = 4 on")
    record = with_curves(record, "zipit", "rescale", [0.5, 0.5], [0.5, 0.6])
    assert RUN.derived(record)["finding"].endswith("% at none of these l")


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("depth", [2, 3, 7, 14])
def test_equally_many_layers_are_merged(depth):
    for layers in range(depth):
        parts = [range(*partial.merged_of(kind, layers, depth)) for kind in partial.KINDS]
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

    found = pairs._logits(Heads(), np.float32([4.0]))
    assert found.tolist() == [7.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "6"], "--layers must be from 0 to 5, got 6"),
        (["--layers", "-1"], "--layers: '-1' is not a whole number, from 0 on"),
        (["--match", "both"], "invalid choice: 'both'"),
        (["--samples", "0"], "'0' is not a number of images"),
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
    assert all(action.help for action in RUN.parser()._actions)
    options = " ".join(printed.split()).partition("options:")[2].split(" --")
    assert all(option.count("(default: ") <= 1 for option in options)


def test_runs_that_differ_have_other_names(digits):
    _, record = digits
    usual = cli.defaults(partial.Config, {"preset": "cpu"})
    standard = record["config"] | {"layers": partial.default_layers(6)}
    standard["statistics"] = usual["statistics"]
    changes = [{}, {"match": ["zipit"]}, {"match": ["activation", "zipit"]}, {"zip_alpha": 0.1}]
    changes += [{"layers": [0]}, {"samples": 7}, {"statistics": 7}, {"model": "digits-conv"}]
    names = [RUN.file_name(record | {"config": standard | change}) for change in changes]
    assert names[0] == "pfm_vs_partial_zip-digits-digits-mlp" and len(set(names)) == len(names)
