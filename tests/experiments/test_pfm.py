"""The experiments end to end, on the digits and on small random networks."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from vfjax import checkpoint, data

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
# Experiments are scripts: they import each other as Python finds them when one is run.
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "benchmarks")]
edges = importlib.import_module("_edges")
pfm = importlib.import_module("cifar_pfm")

PLAIN = ["direct", "matched", "repair", "rescale", "bias_calibration"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The record of a quick run on the shipped digits networks."""
    folder = tmp_path_factory.mktemp("digits")
    options = ["--model", "digits-mlp", "--layers", "0", "5", "6", "--out", str(folder)]
    path = pfm.main(["--dataset", "digits", *options])
    return path, json.loads(path.read_text())


def accuracy(record, row, column):
    (found,) = (r for r in record["rows"] if r["name"] == row)
    return found["cells"][column]["mean"]


# ------------------------------------------------------------------------------------ the record


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "cifar_pfm-digits-digits-mlp-layers0+5+6.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".png"]
    assert record["experiment"] == "cifar_pfm"
    assert "--dataset digits" in record["command"]
    assert record["config"]["layers"] == [0, 5, 6]
    assert record["config"]["samples"] == 10_000 and record["config"]["alpha"] == 0.5
    assert record["data"]["statistics_images"] == 1300 and record["data"]["test_images"] == 497
    assert record["seeds"] == {"edge_models": [0, 1], "matching": 0}
    packages = {"python", "vfjax", "jax", "numpy", "scikit-learn", "tensorflow-datasets"}
    assert packages <= set(record["versions"])
    assert record["device"]["platform"] == jax.default_backend()
    stages = set(record["seconds"])
    assert {"data", "trace", "checkpoints", "matching", "PFM 0/6", "PFM 6/6", "total"} <= stages
    assert record["pairs"][0]["matching"]["method"] == "activation"


def test_rows_and_columns(digits):
    _, record = digits
    names = [row["name"] for row in record["rows"]]
    merged = [f"PFM {layers}/6" for layers in (0, 5, 6)]
    assert names == ["model 1", "model 2", "ensemble", *merged]
    assert record["columns"] == PLAIN
    for row in record["rows"]:
        assert list(row["cells"]) == (["direct"] if row["layers"] is None else PLAIN)
        for cell in row["cells"].values():
            assert len(cell["accuracy"]) == len(cell["loss"]) == 1
            assert cell["std"] == 0 and cell["mean"] == cell["accuracy"][0]


def test_cost_grows_from_one_model_to_two(digits):
    _, record = digits
    merged = record["rows"][3:]
    for key in ("params", "flops"):
        values = [row[key] for row in merged]
        assert values == sorted(values)
        assert merged[0][f"{key}_ratio"] == 1 and merged[-1][f"{key}_ratio"] == 2
        assert merged[0][key] == record["model"]["parameters" if key == "params" else "flops"]


def test_limits(digits):
    """With all layers kept apart every column is the ensemble; cards say what models have."""
    _, record = digits
    ensemble = accuracy(record, "ensemble", "direct")
    for column in ("direct", "matched", "bias_calibration"):
        # Permuted networks compute the same to rounding: at most one image may tip.
        assert accuracy(record, "PFM 6/6", column) == pytest.approx(ensemble, abs=1.5 / 497)
    for index, card in enumerate(record["edge_models"], start=1):
        measured = accuracy(record, f"model {index}", "direct")
        assert measured == pytest.approx(card["test_accuracy"], abs=1.5 / 497)


def test_what_the_paper_found(digits):
    _, record = digits
    edge = record["summary"]["edge_mean"]
    assert accuracy(record, "PFM 0/6", "direct") < 0.3
    for column in ("repair", "rescale"):
        assert accuracy(record, "PFM 0/6", column) > accuracy(record, "PFM 0/6", "direct") + 0.5
        assert accuracy(record, "PFM 5/6", column) > edge - 0.01


def test_table_and_figure_show_the_record(digits, capsys):
    _, record = digits
    header, lines = pfm.table_of(record, ("**", "**"))
    assert header[1:6] == ["direct", "matched", "REPAIR", "RESCALE", "bias cal."]
    assert len(lines) == len(record["rows"]) and {len(line) for line in lines} == {len(header)}
    value = record["rows"][3]["cells"]["repair"]["mean"]
    assert lines[3][3].strip("*") == f"{100 * value:.2f}"
    pfm.show(record)
    printed = capsys.readouterr().out
    assert "PFM 5/6" in printed and "scikit-learn" in printed
    # There are no colours here: an asterisk marks what reaches the edge models.
    assert "green" not in printed and "*: at or above the mean" in printed
    marked = [line.count("*") for line in printed.splitlines() if "PFM" in line]
    cells = [row["cells"].values() for row in record["rows"][3:]]
    edge = record["summary"]["edge_mean"]
    assert marked == [sum(cell["mean"] >= edge for cell in row) for row in cells]
    (axes,) = pfm.figure_of(record).axes
    assert len(axes.containers) == len(PLAIN)


# -------------------------------------------------------------------------- the committed record


def committed(name):
    """A record in the repository, and its accuracies by column and layers."""
    record = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
    merged = [row for row in record["rows"] if row["layers"] is not None]
    cells = {c: {r["layers"]: r["cells"][c]["mean"] for r in merged} for c in record["columns"]}
    return record, cells


@pytest.fixture(scope="module")
def cifar10():
    """The shipped VGG16 pair."""
    return committed("cifar_pfm-cifar10-vgg16-w0.25")


def test_cifar10_record_is_of_the_default_run(cifar10):
    record, cells = cifar10
    assert record["data"]["name"] == "cifar10" and record["data"]["test_images"] == 10_000
    assert pfm.file_name(record) == "cifar_pfm-cifar10-vgg16-w0.25"
    assert list(cells["direct"]) == [0, 3, 6, 8, 12] and record["model"]["depth"] == 14
    assert record["summary"] == pfm.summary_of(record)


def test_features_vanish_at_first(cifar10):
    """Direct averaging is at chance, and REPAIR and RESCALE bring most of the accuracy back."""
    _, cells = cifar10
    assert cells["direct"][0] == pytest.approx(0.1, abs=0.01)
    for column in ("repair", "rescale"):
        assert cells[column][0] >= cells["matched"][0] + 0.3


@pytest.mark.parametrize("column", ["repair", "rescale", "bias_calibration"])
def test_accuracy_grows_with_the_layers_kept_apart(cifar10, column):
    values = list(cifar10[1][column].values())
    assert all(after >= before - 0.005 for before, after in zip(values, values[1:], strict=False))


def test_merged_models_reach_the_edge_models_below_two_of_them(cifar10):
    record, cells = cifar10
    edge, ensemble = record["summary"]["edge_mean"], record["summary"]["ensemble"]
    reached = [
        layers
        for layers in cells["repair"]
        if all(edge <= cells[column][layers] <= ensemble + 0.01 for column in ("repair", "rescale"))
    ]
    assert reached and min(reached) < record["model"]["depth"]


def test_all_pairs_show_the_same():
    record, cells = committed("cifar_pfm-cifar10-vgg16-w0.25-3pairs")
    assert len(record["pairs"]) == 3 and record["summary"] == pfm.summary_of(record)
    assert cells["direct"][0] == pytest.approx(0.1, abs=0.01)
    for column in ("repair", "rescale"):
        assert cells[column][0] >= cells["matched"][0] + 0.3
        assert cells[column][12] >= record["summary"]["edge_mean"]


def test_bias_calibration_reaches_the_edge_models_last():
    record, cells = committed("cifar_pfm-cifar10-vgg16-w0.25-layers12+13")
    assert record["summary"]["reaches_edges_at"]["bias_calibration"] == 13
    assert all(cells[column][13] >= record["summary"]["edge_mean"] for column in PLAIN)


def test_batchnorm_models_need_reset():
    """Averaged statistics leave even matched networks at chance; RESET gives tens of points."""
    record, cells = committed("cifar_pfm-cifar10-resnet20-w0.5")
    assert record["columns"] == ["direct", "matched", "reset"] and record[
        "summary"
    ] == pfm.summary_of(record)
    assert list(cells["reset"]) == [0, 6, 10, 13, 19] and record["model"]["depth"] == 20
    assert cells["direct"][0] == pytest.approx(0.1, abs=0.02)
    assert cells["reset"][0] >= cells["matched"][0] + 0.3
    values = list(cells["reset"].values())
    assert values == sorted(values) and values[-1] >= record["summary"]["edge_mean"]


def test_head_says_what_came_out(cifar10):
    """The sentences are written from the record, by update_readme.py."""
    record, cells = cifar10
    update = importlib.import_module("update_readme")
    said = " ".join(update.findings("vgg16", record).split())
    for column in ("direct", "matched", "repair", "rescale"):
        assert f"{100 * cells[column][0]:.1f}" in said
    assert said in " ".join(pfm.__doc__.split())
    source = Path(pfm.__file__).read_text(encoding="utf-8")
    assert update.headed(source) == source


# ------------------------------------------------------------------------------------ variations


class Tiny(nn.Module):
    """Three dense layers, compiled in no time."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.Dense(6)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x) if self.norm else x)
        return nn.Dense(10)(x)


@pytest.fixture
def ship(monkeypatch, tmp_path):
    """Makes a random model pass for the shipped ones of a name."""

    def make(model, name, shape, count):
        monkeypatch.setattr(edges.models, "create", lambda *args, **kwargs: model)
        monkeypatch.setattr(pfm._common, "ROOT", tmp_path)
        for seed in range(count):
            meta = {"seed": seed, "test": {"accuracy": 0.1}, "command": "none"}
            variables = model.init(jax.random.key(seed), np.zeros((1, *shape), np.float32))
            checkpoint.save(tmp_path / "checkpoints" / f"{name}-seed{seed}", variables, meta)

    return make


@pytest.fixture
def tiny(monkeypatch, tmp_path, ship):
    """Random networks as edge models, under the names of others, on random images."""
    rng = np.random.default_rng(0)
    images = {n: rng.integers(0, 256, (n, 2, 2, 1), np.uint8) for n in (25, 20)}
    labels = {n: rng.integers(0, 10, n).astype(np.int32) for n in (25, 20)}
    arrays = images[25], labels[25], images[20], labels[20]
    dataset = data.Dataset("cifar10", *arrays, (0.5,), (0.25,), 10, "random")
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: dataset)
    monkeypatch.setattr(edges, "BATCH", 10)

    def make(name, count):
        ship(Tiny(norm=name.endswith("bn")), f"cifar10-{name}-w0.25", (2, 2, 1), count)
        return ["--model", name, "--out", str(tmp_path / "out")]

    return make


def test_falling_back_to_the_digits_shows(ship, tmp_path, monkeypatch, capsys, caplog):
    """CIFAR-10 is nowhere: the run goes on with what scikit-learn has, and says so everywhere."""
    ship(Tiny(), "digits-conv", (8, 8, 1), 2)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(data._data, "_can_prepare", lambda: False)
    options = ["--layers", "0", "--match", "none", "--samples", "100"]
    options += ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    with caplog.at_level(logging.WARNING):
        record = json.loads(pfm.main(options).read_text())
    title = "CIFAR-10 NOT FOUND, SO: scikit-learn's 8x8 digits: digits-conv, no matching"
    assert record["title"].startswith(title)
    assert record["data"]["fallback"] is True and record["data"]["name"] == "digits"
    assert title in " ".join(capsys.readouterr().out.split())
    (axes,) = pfm.figure_of(record).axes
    assert axes.get_title().startswith(title)
    assert "FALLING BACK" in caplog.text and f"searched {tmp_path} (--data-dir)" in caplog.text
    # The same digits, asked for, are no fall-back.
    record = json.loads(pfm.main(["--dataset", "digits", *options]).read_text())
    assert record["title"].startswith("scikit-learn's 8x8 digits: digits-conv")
    assert record["data"]["fallback"] is False


def test_batchnorm_gets_reset_and_pairs_get_spreads(tiny):
    path = pfm.main([*tiny("vgg11-bn", 3), "--layers", "2", "0", "2", "--pairs", "3"])
    assert path.name == "cifar_pfm-cifar10-vgg11-bn-w0.25-layers0+2-3pairs.json"
    record = json.loads(path.read_text())
    assert record["config"]["layers"] == [0, 2]
    assert [row["layers"] for row in record["rows"]] == [None, None, None, 0, 2]
    assert record["columns"] == ["direct", "matched", "reset"]
    assert [pair["models"] for pair in record["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    for row in record["rows"]:
        for cell in row["cells"].values():
            assert cell["mean"] == pytest.approx(np.mean(cell["accuracy"]))
            assert cell["std"] == pytest.approx(np.std(cell["accuracy"], ddof=1))
            assert len(cell["accuracy"]) == 3
    assert "over 3 pairs" in record["title"]


def test_weights_and_no_matching(tiny):
    options = tiny("vgg11", 2)
    arguments = [*options, "--layers", "2", "--alpha", "1", "--match", "none"]
    record = json.loads(pfm.main(arguments).read_text())
    assert record["columns"] == ["direct", "repair", "rescale", "bias_calibration"]
    # All weight is on the second model.
    second = accuracy(record, "model 2", "direct")
    assert accuracy(record, "PFM 2/3", "direct") == second == accuracy(record, "ensemble", "direct")
    assert "alpha 1" in record["title"] and "no matching" in record["title"]


def test_weight_matching(tiny):
    arguments = [*tiny("vgg11", 2), "--layers", "1", "--match", "weight", "--samples", "10"]
    path = pfm.main(arguments)
    record = json.loads(path.read_text())
    assert "weight" in path.name and record["columns"] == PLAIN
    assert record["data"]["statistics_images"] == 10
    assert record["pairs"][0]["matching"]["converged"] is True


@pytest.mark.parametrize("match", ["zipit", "cca", "transport"])
def test_units_mixed(match, tiny):
    """ZipIt!, CCA and transport stand beside activation matching."""
    path = pfm.main([*tiny("vgg11", 2), "--layers", "0", "3", "--match", match])
    record = json.loads(path.read_text())
    assert path.stem == f"cifar_pfm-cifar10-vgg11-w0.25-{match}-layers0+3"
    assert record["columns"] == [*PLAIN, "am", "am_repair", "am_rescale"]
    assert record["pairs"][0]["matching"]["method"] == match
    # Where nothing is merged the two networks are as they were, whatever the maps.
    for column in ("direct", "matched", "bias_calibration", "am"):
        ensemble = accuracy(record, "ensemble", "direct")
        assert accuracy(record, "PFM 3/3", column) == ensemble
    panels = pfm.figure_of(record).axes
    assert [axes.get_title() for axes in panels][1] == "activation matching"
    intro, claims = pfm.outcome(record)
    assert "At l = 0: direct" in intro and claims
    assert all(verdict is None for verdict, _ in claims) == (match == "transport")


def test_ridges_of_cca_are_absolute_or_relative(tiny):
    """The paper's, or the library's default when a relative one of 1 is asked for."""
    options = [*tiny("vgg11", 2), "--layers", "0", "--match", "cca"]
    record = json.loads(pfm.main(options).read_text())
    assert record["pairs"][0]["matching"] == {
        "method": "cca",
        "regularization": 0.1,
        "relative": False,
    }
    path = pfm.main([*options, "--regularization", "1", "--relative"])
    assert path.stem.endswith("-cca-r1-relative-layers0")
    other = json.loads(path.read_text())
    assert other["pairs"][0]["matching"]["relative"] is True
    assert "CCA (ridge 1, times the mean variance)" in other["title"]
    losses = [found["rows"][3]["cells"]["matched"]["loss"] for found in (record, other)]
    assert losses[0] != losses[1]


def test_activation_matching_beside_another_is_that_alone(tiny):
    options = [*tiny("vgg11", 2), "--layers", "0", "2"]
    beside = json.loads(pfm.main([*options, "--match", "zipit"]).read_text())
    alone = json.loads(pfm.main(options).read_text())
    for layers in (0, 2):
        for column in ("am", "am_repair", "am_rescale"):
            _, remedy = pfm.parts_of(column, "zipit")
            expected = accuracy(alone, f"PFM {layers}/3", remedy or "matched")
            # One of 20 images may tip by rounding.
            found = accuracy(beside, f"PFM {layers}/3", column)
            assert found == pytest.approx(expected, abs=0.06)


def test_unknown_variances_are_no_accuracy(tiny, capsys):
    """A BatchNorm of mixed units has no variance until RESET measures one: nothing to evaluate."""
    options = [*tiny("vgg11-bn", 2), "--layers", "0", "3", "--match", "zipit"]
    record = json.loads(pfm.main(options).read_text())
    assert record["columns"] == ["direct", "matched", "reset", "am", "am_reset"]
    first, last = record["rows"][3:]
    assert first["cells"]["matched"] is None and first["cells"]["reset"]["accuracy"]
    # With all layers apart no such BatchNorm is left.
    assert last["cells"]["matched"]["mean"] == accuracy(record, "ensemble", "direct")
    _, lines = pfm.table_of(record, ("", ""))
    assert [line[2] for line in lines] == ["", "", "", "-", lines[4][3]]
    assert "matched nan" not in pfm.outcome(record)[0]
    left, right = pfm.figure_of(record).axes
    assert " - " in capsys.readouterr().out
    # What no matching gives is of no panel more than of the other.
    for axes in (left, right):
        assert "direct (no matching)" in axes.get_legend_handles_labels()[1]
    assert "matched alone" not in left.get_title()


def test_columns_that_were_never_measured_are_left_out(tiny, capsys):
    options = [*tiny("vgg11-bn", 2), "--layers", "0", "1", "--match", "cca"]
    record = json.loads(pfm.main(options).read_text())
    assert all(row["cells"]["matched"] is None for row in record["rows"][3:])
    assert list(record["summary"]["reaches_edges_at"]) == ["direct", "reset", "am", "am_reset"]
    assert "matched reaches" not in capsys.readouterr().out
    # Older records hold it as one that reaches nothing.
    old = record | {"summary": pfm.summary_of(record)}
    old["summary"]["reaches_edges_at"]["matched"] = None
    assert "matched" not in pfm.outcome(old)[0]
    pfm.show(old)
    assert "matched reaches" not in capsys.readouterr().out
    left, _ = pfm.figure_of(record).axes
    assert left.get_title() == "CCA (matched alone: no variances to evaluate with)"


def test_costs_are_each_matching_s_own(tiny, capsys):
    """Maps that mix cost something, permutations do not."""
    options = [*tiny("vgg11", 2), "--layers", "0", "1"]
    mixed = json.loads(pfm.main([*options, "--match", "cca"]).read_text())
    alone = json.loads(pfm.main(options).read_text())
    capsys.readouterr()
    keys = ["params", "params_ratio", "flops", "flops_ratio"]
    row, other = mixed["rows"][4], alone["rows"][4]
    assert list(row["costs"]) == ["none", "cca", "activation"]
    assert row["costs"]["cca"] == {key: row[key] for key in keys}
    for method in ("none", "activation"):
        assert row["costs"][method] == other["costs"][method] == {key: other[key] for key in keys}
    assert row["params"] > other["params"] and row["flops"] > other["flops"]
    own, beside = pfm.tables_of(mixed)
    assert "direct" in beside and "am" in beside and "matched" in own
    shown = [pfm.table_of(mixed, ("", ""), columns)[1] for columns in (own, beside)]
    ratios = [f"{found['params_ratio']:.3g}" for found in (row, other)]
    assert [lines[4][-3] for lines in shown] == ratios and ratios[0] != ratios[1]
    # Models stand in the first column of either table.
    assert shown[0][0][1] == shown[1][0][1] != ""
    pfm.show(mixed)
    printed = " ".join(capsys.readouterr().out.split())
    assert ratios[1] in printed.split() and printed.count(": activation matching beside it") == 1
    # Older records do not say what activation matching costs beside others.
    for old in mixed["rows"]:
        old.pop("costs", None)
    assert pfm.table_of(mixed, ("", ""), beside)[1][4][-4:] == [""] * 4
    assert pfm.table_of(mixed, ("", ""), own)[1][4] == shown[0][4]


def claimed(match, columns, rows, *, model="vgg16", images=10_000):
    """Verdicts of claims on accuracies by l and column; edge models of 0.9, ensemble of 0.93."""
    names = ["direct", *columns]
    merged = [
        {
            "name": f"PFM {layers}/14",
            "layers": layers,
            "cells": {
                column: {"mean": value, "accuracy": [value], "std": 0.0}
                for column, value in zip(names, [0.1, *values], strict=True)
            },
        }
        for layers, values in rows.items()
    ]
    record = {
        "config": {"match": match, "zip_alpha": 0.3, "zip_beta": 0.125, "regularization": 0.1},
        "data": {"name": "cifar10", "test_images": images},
        "model": {"name": model, "depth": 14},
        "columns": names,
        "rows": [
            {"name": name, "layers": None, "cells": {"direct": {"mean": value}}}
            for name, value in (("model 1", 0.9), ("model 2", 0.9), ("ensemble", 0.93))
        ]
        + merged,
    }
    record["summary"] = pfm.summary_of(record)
    assert "models' mean, 90.00" in pfm.outcome(record)[0]
    return [holds for holds, _ in pfm.claims_of(record)]


def test_claims_on_the_paper_s_numbers_hold_and_flip():
    """Tables 3, 4, 6 to 8 of the paper as records; then with one thing changed."""
    mixed = ["matched", "reset", "am", "am_reset"]
    cca = {0: [0.1, 0.912, 0.19, 0.899], 8: [0.1, 0.929, 0.9, 0.928], 12: [0.1, 0.931, 0.93, 0.93]}
    assert claimed("cca", mixed, cca) == [True] * 4
    assert claimed("cca", mixed, cca | {0: [0.1, 0.89, 0.19, 0.899]})[:2] == [False, False]
    assert claimed("cca", mixed, cca | {8: [0.1, 0.92, 0.9, 0.93]})[:2] == [True, False]
    late = {0: [0.1, 0.88, 0.1, 0.8], 8: [0.1, 0.89, 0.9, 0.8], 12: [0.1, 0.9, 0.9, 0.8]}
    assert claimed("cca", mixed, late) == [True, True, False, False]
    zipped = {0: [0.1, 0.896, 0.19, 0.899], 8: [0.1, 0.93, 0.9, 0.928]}
    assert claimed("zipit", mixed, zipped) == [True] * 3
    assert claimed("zipit", mixed, zipped | {0: [0.1, 0.85, 0.19, 0.899]})[0] is False
    residual = {0: [0.1, 0.62, 0.1, 0.64], 8: [0.1, 0.89, 0.9, 0.93]}
    assert claimed("zipit", mixed, residual, model="resnet20") == [True, True]
    assert claimed("zipit", mixed, zipped, model="resnet20") == [False, False]

    plain = ["matched", "repair", "rescale", "bias_calibration", "am", "am_repair", "am_rescale"]
    late = [0.93] * 7
    zipped = {0: [0.43, 0.68, 0.847, 0.83, 0.46, 0.39, 0.847], 8: late}
    assert claimed("zipit", plain, zipped) == [True] * 6
    worse = {0: [0.5, 0.9, 0.7, 0.83, 0.46, 0.85, 0.847], 8: [0.89] * 7}
    assert claimed("zipit", plain, worse) == [False] * 6
    cca = {0: [0.82, 0.58, 0.831, 0.8, 0.46, 0.39, 0.847], 8: late}
    assert claimed("cca", plain, cca) == [True] * 6
    worse = {0: [0.5, 0.6, 0.55, 0.3, 0.46, 0.39, 0.5], 8: [0.89] * 7}
    assert claimed("cca", plain, worse) == [False] * 6
    # Equal is so on either side.
    lower = {0: [0.47, 0.39, 0.483, 0.4, 0.3, 0.39, 0.901], 8: late}
    assert claimed("cca", plain, lower)[3] is False
    above = {0: cca[0], 8: [0.96] * 7}
    assert claimed("cca", plain, above) == [True] * 5 + [False]
    assert claimed("transport", plain, cca) == [None]


def test_what_noise_may_have_made_is_no_lead():
    """On a few test images two accuracies are level that are not on many."""
    mixed = ["matched", "reset", "am", "am_reset"]
    cca = {0: [0.1, 0.912, 0.19, 0.899], 8: [0.1, 0.929, 0.9, 0.928]}
    assert claimed("cca", mixed, cca)[:2] == [True, True]
    assert claimed("cca", mixed, cca, images=500)[:2] == [False, False]
    residual = {0: [0.1, 0.62, 0.1, 0.64], 8: [0.1, 0.89, 0.9, 0.93]}
    assert claimed("zipit", mixed, residual, model="resnet20", images=500)[0] is False


def test_retrain_trains_what_it_merges(tmp_path, monkeypatch):
    def fit(model, recipe, dataset, *, seed, **options):
        x = np.zeros((1, *dataset.train_images.shape[1:]), np.float32)
        asked.append((recipe.epochs, seed))
        return edges.train_edges.train.Trained(
            jax.jit(model.init)(jax.random.key(seed), x), (), 1.0
        )

    asked: list = []
    monkeypatch.setattr(edges.train_edges.train, "fit", fit)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--model", "digits-mlp", "--retrain", "--layers", "5", "--match", "none"]
    path = pfm.main(["--dataset", "digits", *options, "--out", str(tmp_path / "out")])
    record = json.loads(path.read_text())
    assert asked == [(60, 0), (60, 1)] and path.stem.endswith("-none-layers5-retrained")
    trained = sorted(p.name for p in (tmp_path / "out" / "checkpoints-cpu").iterdir())
    assert trained == ["digits-mlp-seed0", "digits-mlp-seed1"]
    assert [model["checkpoint"] for model in record["edge_models"]] == trained
    assert "training" in record["seconds"]


# --------------------------------------------------------------------------------------- options


def test_layers_of_the_paper():
    assert pfm.default_layers(14) == [0, 3, 6, 8, 12]
    assert pfm.default_layers(20) == [0, 6, 10, 13, 19]
    for depth in range(2, 60):
        found = pfm.default_layers(depth)
        assert found[0] == 0 and found == sorted(set(found)) and found[-1] < depth


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        pfm.main(["--help"])
    printed = capsys.readouterr().out
    for option in (
        "--dataset {auto,cifar10,cifar100,mnist,digits}",
        "--model",
        "--match {activation,weight,none,zipit,cca,transport}",
        "--zip-alpha A",
        "--zip-beta B",
        "--regularization R",
        "--relative",
        "--layers",
        "--alpha",
        "--pairs",
        "--samples N|all",
        "--data-dir",
        "--retrain",
        "--preset {cpu,paper}",
        "--out",
    ):
        assert option in printed
    for action in pfm.parser()._actions:
        assert action.help


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "9"], "--layers must be from 0 to L = 7, got 9"),
        (["--layers", "-1"], "--layers must be from 0 to L = 7, got -1"),
        (["--model", "vgg16"], "is not for scikit-learn's 8x8 digits; give --dataset cifar10, or"),
        (["--preset", "paper"], "no models of --preset paper are shipped: give --retrain"),
        (
            ["--out", "/dev/null/x"],
            "--out: nothing can be written to '/dev/null/x': /dev/null is no folder",
        ),
        (["--dataset", "auto", "--model", "vgg16"], "CIFAR-10 was not found, give --data-dir, or"),
        (["--model", "vgg17"], "'vgg17' is no model; take one of"),
        (["--model", "digits-mlp-w0.5"], "has no option 'width'"),
        (["--model", "digits-conv-w0.5"], "2 models digits-conv-w0.5-seed* are needed"),
        (["--pairs", "50"], "are needed in checkpoints/"),
        (["--pairs", "0"], "'0' is no number of pairs"),
        (["--alpha", "1.5"], "'1.5' is no number from 0 to 1"),
        (["--alpha", "half"], "'half' is no number from 0 to 1"),
        (["--samples", "0"], "'0' is neither a number of images nor 'all'"),
        (["--match", "both"], "invalid choice: 'both'"),
        (["--zip-beta", "2"], "--zip-beta: '2' is no number from 0 to 1"),
        (["--zip-beta", "0.5"], "--zip-beta does nothing here: it is for --match zipit."),
        (
            ["--match", "transport", "--zip-beta", "1", "--regularization", "2", "--relative"],
            "--zip-beta does nothing here: it is for --match zipit.",
        ),
        (
            ["--match", "zipit", "--relative"],
            "--relative does nothing here: it is for --match cca.",
        ),
        (["--regularization", "-1"], "--regularization: '-1' is no number from 0 on"),
        (["--regularization", "some"], "--regularization: 'some' is no number from 0 on"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "is not prepared"),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path, monkeypatch):
    # No data set is to be found, whatever is prepared on this machine.
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        pfm.main(["--dataset", "digits", "--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint(tiny, capsys, tmp_path):
    arguments = tiny("vgg11", 2)
    (tmp_path / "checkpoints" / "cifar10-vgg11-w0.25-seed1" / "structure.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        pfm.main(arguments)
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_models_are_named_with_the_command_that_trains_them(tiny, capsys, tmp_path):
    options = tiny("vgg11", 3)
    (tmp_path / "checkpoints" / "cifar10-vgg11-w0.25-seed1").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="2"):
        pfm.main([*options, "--pairs", "4", "--data-dir", "my data"])
    error = capsys.readouterr().err
    assert "4 models cifar10-vgg11-w0.25-seed* are needed in checkpoints/, 2 found" in error
    command = re.search(r"python experiments/train_edges.py (.*) \(--retrain", error)[1]
    args = edges.train_edges.parser().parse_args(shlex.split(command))
    assert (args.model, args.width, args.dataset) == ("vgg11", 0.25, "cifar10")
    assert (args.seeds, args.data_dir, args.preset) == ([1, 3], "my data", "cpu")
    assert args.out == edges.train_edges.parser().get_default("out")


def test_digits_models_are_of_the_digits(tiny, monkeypatch, capsys):
    """As train_edges.py decides, even where CIFAR-10 is found; where asked for that, it is told."""
    options, load, asked = tiny("vgg11", 2), data.load, []
    monkeypatch.setattr(data, "load", lambda name, *args, **more: asked.append(name) or load())
    for dataset in ("auto", "cifar10"):
        with pytest.raises(SystemExit, match="2"):
            pfm.main([*options, "--model", "digits-mlp", "--dataset", dataset])
        assert "--model digits-mlp is not for CIFAR-10; give --dataset digits" in (
            capsys.readouterr().err
        )
    assert asked == ["digits", "cifar10"]


def test_folder_is_tried_and_left_as_it_was(tmp_path):
    folder = tmp_path / "new" / "newer"
    assert pfm._common.output_folder(str(folder)) == str(folder)
    assert pfm._common.output_folder(str(tmp_path)) == str(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(argparse.ArgumentTypeError, match="file is no folder"):
        pfm._common.output_folder(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


def test_figure_that_fails_leaves_the_whole_record(tiny, tmp_path, monkeypatch, capsys):
    def fail(figure, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pfm.plot, "save", fail)
    with pytest.raises(SystemExit, match="1"):
        pfm.main([*tiny("vgg11", 2), "--layers", "1"])
    assert "error: [Errno 28] No space left" in capsys.readouterr().err
    (path,) = (tmp_path / "out").iterdir()
    assert json.loads(path.read_text())["experiment"] == "cifar_pfm"


@pytest.mark.parametrize("match", ["activation", "weight", "none", "cca"])
def test_models_with_nan_are_reported(match, tiny, capsys, tmp_path):
    options = tiny("vgg11", 2)
    folder = tmp_path / "checkpoints" / "cifar10-vgg11-w0.25-seed1"
    tree, card = checkpoint.load(folder), checkpoint.card(folder)
    kernel = tree["params"]["Dense_1"]["kernel"]
    tree["params"]["Dense_1"]["kernel"] = kernel.at[0, 0].set(np.nan)
    shutil.rmtree(folder)
    checkpoint.save(folder, tree, {k: card[k] for k in ("seed", "test", "command")})
    with pytest.raises(SystemExit, match="1"):
        pfm.main([*options, "--match", match])
    # The progress bar, which ends in carriage returns, is wiped before.
    *_, blank, error = capsys.readouterr().err.splitlines()
    assert not blank.strip() and error.startswith("cifar_pfm.py: error: ") and "NaN" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("a\n  b"), 1),
        (FloatingPointError("a b"), 1),
        (pfm._common.UserError("a b"), 2),
        (data.DatasetError("a b"), 2),
    ],
)
def test_errors_are_one_line(error, status, capsys):
    with pytest.raises(SystemExit, match=str(status)), pfm._common.reported(pfm.parser()):
        raise error
    assert capsys.readouterr().err == "cifar_pfm.py: error: a b\n"


def test_other_errors_are_not_hidden():
    with pytest.raises(TypeError), pfm._common.reported(pfm.parser()):
        raise TypeError("a bug")


def test_records_hold_no_nan(tmp_path):
    record = {"loss": [float("nan"), 0.5], "more": {"x": (float("inf"), 1, None, "NaN")}}
    path = pfm._common.write_record(tmp_path / "a.json", record)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"loss": [None, 0.5], "more": {"x": [None, 1, None, "NaN"]}}


def test_runs_that_differ_have_other_names(digits):
    _, record = digits
    changes = [{}, {"layers": [0]}, {"samples": 1}, {"samples": "all"}, {"alpha": 0.25}]
    changes += [{"pairs": 3}, {"match": "none"}, {"match": "weight"}, {"retrain": True}]
    changes += [{"retrain": True, "preset": "paper"}, {"width": 0.5}, {"model": "digits-conv"}]
    changes += [{"match": "zipit"}, {"match": "cca"}, {"match": "transport"}]
    changes += [{"match": "zipit", "zip_alpha": 0.1}, {"match": "zipit", "zip_beta": 0.1}]
    changes += [{"match": "cca", "regularization": 1.0}]
    changes += [{"match": "cca", "regularization": 1.0, "relative": True}]
    standard = record["config"] | {"layers": pfm.default_layers(6)}
    names = [pfm.file_name(record | {"config": standard | change}) for change in changes]
    assert names[0] == "cifar_pfm-digits-digits-mlp" and len(set(names)) == len(names)
    # Settings of other matchings change nothing.
    other = standard | {"zip_beta": 0.5, "regularization": 2.0}
    assert pfm.file_name(record | {"config": other}) == names[0]


def test_one_image_is_singular(digits):
    record = json.loads(json.dumps(digits[1]))
    record["data"]["statistics_images"] = 1
    assert pfm.title_of(record).endswith("statistics over 1 image")


# --------------------------------------------------------------------------------- other scripts


def test_heads_and_readme_say_what_is_in_the_records():
    update = importlib.import_module("update_readme")
    update.main(["--check"])
    for script, names in update.HEADS.items():
        found = update.records_of(names)
        assert [name for name, _ in found] == list(names)
        for name, record in found:
            # What a script does by default is to be seen soon.
            limit = 1200 if "--model" in record["command"] else 600
            assert record["seconds"]["total"] < limit
            data = record["data"]  # of several data sets, one record each
            assert not any(d.get("fallback") for d in ([data] if "name" in data else data))
            assert (EXPERIMENTS / "results" / f"{name}.png").exists()
            if hasattr(script, "file_name"):
                assert script.file_name(record) == name


@pytest.mark.parametrize(
    "name", ["_common", "_heads", "_pairs", "_tables", "cifar_pfm", "train_edges"]
)
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


@pytest.mark.parametrize("name", ["routing", "passes", "tracing", "diagnosis", "zip", "scores"])
def test_benchmarks_run(name, tmp_path):
    benchmark = importlib.import_module(name)
    path = benchmark.main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    record = json.loads(path.read_text())
    assert record["benchmark"] == name and record["quick"] is True
    assert all(row["seconds"] > 0 for row in record["rows"])
    assert any(row.get("target") for row in record["rows"])


def test_notebook_runs(capsys):
    """The notebook's cells in turn, save for the installation."""
    path = EXPERIMENTS / "notebooks" / "vfjax_colab.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "pip install" in sources[0]
    names: dict = {}
    for source in sources[1:]:
        exec(compile(source.replace("steps=400", "steps=40"), path.name, "exec"), names)
    assert "PFM 4/5" in capsys.readouterr().out
