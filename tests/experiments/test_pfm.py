"""The experiments end to end, on the digits and on small random networks."""

from __future__ import annotations

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

from helpers import without
from vfjax import checkpoint, data

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
# Experiments are scripts: they import each other as Python finds them when one is run.
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "benchmarks")]
pfm = importlib.import_module("cifar_pfm")
cli, edges, kit, records, tables, training = (
    importlib.import_module(f"kit.{name}")
    for name in ("cli", "edges", "experiment", "records", "tables", "training")
)
claims = importlib.import_module("kit.claims")
RUN = pfm.EXPERIMENT
RECORDS = EXPERIMENTS / "results"

PLAIN = ["direct", "matched", "REPAIR", "RESCALE", "bias cal."]
EDGES = ["model 1", "model 2", "ensemble"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The record of a quick run on the shipped digits networks."""
    folder = tmp_path_factory.mktemp("digits")
    options = ["--model", "digits-mlp", "--layers", "0", "5", "6", "--out", str(folder)]
    path = pfm.main(["--dataset", "digits", *options])
    return path, records.read(path)


def cell(record, network, column="direct", pair=0):
    """The row of a network: an edge model, or `PFM l/L` with the name of its column."""
    name, _, place = network.partition(" ")
    if name != "PFM":
        return record.rows.only(network=network, pair=pair)
    where = pfm.columns_of(record)[column]
    return record.rows.only(network=name, layers=int(place.partition("/")[0]), pair=pair, **where)


def accuracy(record, network, column="direct"):
    return cell(record, network, column)["accuracy"]


def columns_of(record):
    return list(pfm.columns_of(record))


# ------------------------------------------------------------------------------------ the record


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "cifar_pfm-digits-digits-mlp-layers0+5+6.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".png", ".md"}
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
    assert record.notes("matching").only(method="activation")["models"] == [0, 1]
    assert record["question"] in " ".join(pfm.__doc__.split())


def test_rows_and_columns(digits):
    _, record = digits
    rows = record.rows
    assert [row["network"] for row in rows] == [*EDGES, *["PFM"] * 3 * len(PLAIN)]
    assert rows.distinct("layers") == [0, 5, 6] and columns_of(record) == PLAIN
    for row in rows:
        assert row["pair"] == 0 and 0 <= row["accuracy"] <= 1 and row["loss"] > 0
        assert (row["match"] is None) == (row["layers"] is None) == (row["remedy"] is None)
    for layers in (0, 5, 6):
        assert len(rows.where(layers=layers)) == len(PLAIN)


def test_cost_grows_from_one_model_to_two(digits):
    _, record = digits
    for key in ("params", "flops"):
        values = record.rows.where(network="PFM", match="activation").curve("layers", key)[1]
        assert values == sorted(values)
        first, last = cell(record, "PFM 0/6"), cell(record, "PFM 6/6")
        assert first[f"{key}_ratio"] == 1 and last[f"{key}_ratio"] == 2
        assert first[key] == record["model"]["parameters" if key == "params" else "flops"]


def test_limits(digits):
    """With all layers kept apart every column is the ensemble; cards say what models have."""
    _, record = digits
    ensemble = accuracy(record, "ensemble")
    for column in ("direct", "matched", "bias cal."):
        # Permuted networks compute the same to rounding: at most one image may tip.
        assert accuracy(record, "PFM 6/6", column) == pytest.approx(ensemble, abs=1.5 / 497)
    for index, card in enumerate(record["edge_models"], start=1):
        measured = accuracy(record, f"model {index}")
        assert measured == pytest.approx(card["test_accuracy"], abs=1.5 / 497)


def test_what_the_paper_found(digits):
    _, record = digits
    edge = record["summary"]["edge_mean"]
    assert accuracy(record, "PFM 0/6", "direct") < 0.3
    for column in ("REPAIR", "RESCALE"):
        assert accuracy(record, "PFM 0/6", column) > accuracy(record, "PFM 0/6", "direct") + 0.5
        assert accuracy(record, "PFM 5/6", column) > edge - 0.01


def test_table_and_figure_show_the_record(digits, capsys):
    _, record = digits
    (table,) = pfm.tables_of(record)
    assert table.header[1:6] == ["direct", "matched", "REPAIR", "RESCALE", "bias cal."]
    assert [line[0] for line in table.lines] == [*EDGES, "PFM 0/6", "PFM 5/6", "PFM 6/6"]
    assert {len(line) for line in table.lines} == {len(table.header)}
    value = accuracy(record, "PFM 0/6", "REPAIR")
    assert table.lines[3][3].strip("*") == f"{100 * value:.2f}"
    RUN.show(record)
    printed = capsys.readouterr().out
    assert "PFM 5/6" in printed and "scikit-learn" in printed and record["finding"] in printed
    # There are no colours here: an asterisk marks what reaches the edge models.
    assert "green" not in printed and "*: at or above the mean" in printed
    marked = [line.count("*") for line in printed.splitlines() if line.strip().startswith("PFM")]
    edge = record["summary"]["edge_mean"]
    reach = [
        sum(row["accuracy"] >= edge for row in record.rows.where(layers=layers))
        for layers in (0, 5, 6)
    ]
    assert marked == reach
    (axes,) = pfm.figure_of(record).axes
    assert len(axes.containers) == len(PLAIN)


# -------------------------------------------------------------------------- the committed record


def committed(name):
    """A record in the repository, and its accuracies by column and layers."""
    record = records.read(EXPERIMENTS / "results" / f"{name}.json")
    rows = record.rows.where(network="PFM")
    cells = {
        column: dict(zip(*rows.curve("layers", **where)[:2], strict=True))
        for column, where in pfm.columns_of(record).items()
    }
    return record, cells


@pytest.fixture(scope="module")
def cifar10():
    """The shipped VGG16 pair."""
    return committed("cifar_pfm-cifar10-vgg16-w0.25")


def test_cifar10_record_is_of_the_default_run(cifar10):
    record, cells = cifar10
    assert record["data"]["name"] == "cifar10" and record["data"]["test_images"] == 10_000
    assert RUN.file_name(record) == "cifar_pfm-cifar10-vgg16-w0.25"
    assert list(cells["direct"]) == [0, 3, 6, 8, 12] and record["model"]["depth"] == 14
    assert record["summary"] == RUN.summary(record)


def test_features_vanish_at_first(cifar10):
    """Direct averaging is at chance, and REPAIR and RESCALE bring most of the accuracy back."""
    _, cells = cifar10
    assert cells["direct"][0] == pytest.approx(0.1, abs=0.01)
    for column in ("REPAIR", "RESCALE"):
        assert cells[column][0] >= cells["matched"][0] + 0.3


@pytest.mark.parametrize("column", ["REPAIR", "RESCALE", "bias cal."])
def test_accuracy_grows_with_the_layers_kept_apart(cifar10, column):
    values = list(cifar10[1][column].values())
    assert all(after >= before - 0.005 for before, after in zip(values, values[1:], strict=False))


def test_merged_models_reach_the_edge_models_below_two_of_them(cifar10):
    record, cells = cifar10
    edge, ensemble = record["summary"]["edge_mean"], record["summary"]["ensemble"]
    reached = [
        layers
        for layers in cells["REPAIR"]
        if all(edge <= cells[column][layers] <= ensemble + 0.01 for column in ("REPAIR", "RESCALE"))
    ]
    assert reached and min(reached) < record["model"]["depth"]


def test_all_pairs_show_the_same():
    record, cells = committed("cifar_pfm-cifar10-vgg16-w0.25-3pairs")
    assert record.rows.distinct("pair") == [0, 1, 2] and record["summary"] == RUN.summary(record)
    assert cells["direct"][0] == pytest.approx(0.1, abs=0.01)
    for column in ("REPAIR", "RESCALE"):
        assert cells[column][0] >= cells["matched"][0] + 0.3
        assert cells[column][12] >= record["summary"]["edge_mean"]


def test_bias_calibration_reaches_the_edge_models_last():
    record, cells = committed("cifar_pfm-cifar10-vgg16-w0.25-layers12+13")
    assert record["summary"]["reaches_edges_at"]["bias cal."] == 13
    assert all(cells[column][13] >= record["summary"]["edge_mean"] for column in PLAIN)


def test_batchnorm_models_need_reset():
    """Averaged statistics leave even matched networks at chance; RESET gives tens of points."""
    record, cells = committed("cifar_pfm-cifar10-resnet20-w0.5")
    assert columns_of(record) == ["direct", "matched", "RESET"]
    assert record["summary"] == RUN.summary(record)
    assert list(cells["RESET"]) == [0, 6, 10, 13, 19] and record["model"]["depth"] == 20
    assert cells["direct"][0] == pytest.approx(0.1, abs=0.02)
    assert cells["RESET"][0] >= cells["matched"][0] + 0.3
    values = list(cells["RESET"].values())
    assert values == sorted(values) and values[-1] >= record["summary"]["edge_mean"]


def test_page_says_what_came_out(cifar10):
    """The page is written from the record."""
    record, cells = cifar10
    page = (EXPERIMENTS / "results" / "cifar_pfm.md").read_text(encoding="utf-8")
    (section,) = (p for p in page.split("\n## ") if p.startswith("cifar_pfm-cifar10-vgg16-w0.25\n"))
    for column in ("direct", "matched", "REPAIR", "RESCALE"):
        assert f"{100 * cells[column][0]:.2f}" in section
    for text in (record["finding"], record["command"], *(row["here"] for row in record["claims"])):
        assert text in section
    # The head has the question and the paper's numbers; what is measured is on the page alone.
    assert f"{100 * cells['REPAIR'][0]:.1f}" not in Path(pfm.__file__).read_text(encoding="utf-8")


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
        monkeypatch.setattr(records, "ROOT", tmp_path)
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
    without(monkeypatch, "tensorflow")
    options = ["--layers", "0", "--match", "none", "--samples", "100"]
    options += ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    with caplog.at_level(logging.WARNING):
        record = records.read(pfm.main(options))
    title = "CIFAR-10 NOT FOUND, SO: scikit-learn's 8x8 digits: digits-conv, no matching"
    assert record["title"].startswith(title)
    assert record["data"]["fallback"] is True and record["data"]["name"] == "digits"
    assert title in " ".join(capsys.readouterr().out.split())
    assert any(text.get_text().startswith(title) for text in pfm.figure_of(record).texts)
    assert "FALLING BACK" in caplog.text and f"searched {tmp_path} (--data-dir)" in caplog.text
    # The same digits, asked for, are no fall-back.
    record = records.read(pfm.main(["--dataset", "digits", *options]))
    assert record["title"].startswith("scikit-learn's 8x8 digits: digits-conv")
    assert record["data"]["fallback"] is False


def test_batchnorm_gets_reset_and_pairs_get_spreads(tiny):
    path = pfm.main([*tiny("vgg11-bn", 3), "--layers", "2", "0", "2", "--pairs", "3"])
    assert path.name == "cifar_pfm-cifar10-vgg11-bn-w0.25-layers0+2-3pairs.json"
    record = records.read(path)
    assert record["config"]["layers"] == [0, 2] == record.rows.distinct("layers")
    assert columns_of(record) == ["direct", "matched", "RESET"]
    models = [note["models"] for note in record.notes("matching").where(method="activation")]
    assert models == [[0, 1], [0, 2], [1, 2]]
    (table,) = pfm.tables_of(record)
    for column, where in pfm.columns_of(record).items():
        values = record.rows.where(layers=2, **where).values("accuracy")
        assert len(values) == 3
        shown = table.lines[-1][table.header.index(column)].strip("*")
        assert shown == f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"
    assert "over 3 pairs" in record["title"]


def test_weights_and_no_matching(tiny):
    options = tiny("vgg11", 2)
    arguments = [*options, "--layers", "2", "--alpha", "1", "--match", "none"]
    record = records.read(pfm.main(arguments))
    assert columns_of(record) == ["direct", "REPAIR", "RESCALE", "bias cal."]
    # All weight is on the second model.
    second = accuracy(record, "model 2")
    assert accuracy(record, "PFM 2/3") == second == accuracy(record, "ensemble")
    assert "alpha 1" in record["title"] and "no matching" in record["title"]


def test_weight_matching(tiny):
    arguments = [*tiny("vgg11", 2), "--layers", "1", "--match", "weight", "--samples", "10"]
    path = pfm.main(arguments)
    record = records.read(path)
    assert "weight" in path.name and columns_of(record) == PLAIN
    assert record["data"]["statistics_images"] == 10
    assert record.notes("matching").only(method="weight")["converged"] is True


@pytest.mark.parametrize("match", ["zipit", "cca", "transport"])
def test_units_mixed(match, tiny):
    """ZipIt!, CCA and transport stand beside activation matching."""
    path = pfm.main([*tiny("vgg11", 2), "--layers", "0", "3", "--match", match])
    record = records.read(path)
    assert path.stem == f"cifar_pfm-cifar10-vgg11-w0.25-{match}-layers0+3"
    assert columns_of(record) == [*PLAIN, "AM", "AM + REPAIR", "AM + RESCALE"]
    assert record.notes("matching").only(method=match)["models"] == [0, 1]
    # Where nothing is merged the two networks are as they were, whatever the maps.
    for column in ("direct", "matched", "bias cal.", "AM"):
        assert accuracy(record, "PFM 3/3", column) == accuracy(record, "ensemble")
    panels = pfm.figure_of(record).axes
    assert [axes.get_title() for axes in panels][1] == "activation matching"
    assert "l = 0" in record["finding"] and record["claims"]
    verdicts = {row["verdict"] for row in record["claims"]}
    assert (verdicts == {claims.NEW}) == (match == "transport")


def test_ridges_of_cca_are_absolute_or_relative(tiny):
    """The paper's, or the library's default when a relative one of 1 is asked for."""
    options = [*tiny("vgg11", 2), "--layers", "0", "--match", "cca"]
    record = records.read(pfm.main(options))
    found = record.notes("matching").only(method="cca")
    assert (found["regularization"], found["relative"]) == (0.1, False)
    path = pfm.main([*options, "--regularization", "1", "--relative"])
    assert path.stem.endswith("-r1-relative-cca-layers0")
    other = records.read(path)
    assert other.notes("matching").only(method="cca")["relative"] is True
    assert "CCA (regularization 1.0, relative True)" in other["title"]
    losses = [cell(found, "PFM 0/3", "matched")["loss"] for found in (record, other)]
    assert losses[0] != losses[1]


def test_activation_matching_beside_another_is_that_alone(tiny):
    options = [*tiny("vgg11", 2), "--layers", "0", "2"]
    beside = records.read(pfm.main([*options, "--match", "zipit"]))
    alone = records.read(pfm.main(options))
    for layers in (0, 2):
        for column, other in (
            ("AM", "matched"),
            ("AM + REPAIR", "REPAIR"),
            ("AM + RESCALE", "RESCALE"),
        ):
            expected = accuracy(alone, f"PFM {layers}/3", other)
            # One of 20 images may tip by rounding.
            found = accuracy(beside, f"PFM {layers}/3", column)
            assert found == pytest.approx(expected, abs=0.06)


def test_unknown_variances_are_no_accuracy(tiny, capsys):
    """A BatchNorm of mixed units has no variance until RESET measures one: nothing to evaluate."""
    options = [*tiny("vgg11-bn", 2), "--layers", "0", "3", "--match", "zipit"]
    record = records.read(pfm.main(options))
    assert columns_of(record) == ["direct", "matched", "RESET", "AM", "AM + RESET"]
    assert accuracy(record, "PFM 0/3", "matched") is None
    assert accuracy(record, "PFM 0/3", "RESET") is not None
    # With all layers apart no such BatchNorm is left.
    assert accuracy(record, "PFM 3/3", "matched") == accuracy(record, "ensemble")
    own, _ = pfm.tables_of(record)
    shown = [line[own.header.index("matched")] for line in own.lines]
    assert shown[3] == "-" and shown[4] not in ("", "-")
    assert "nan" not in record["finding"] and "matched alone" not in record["finding"]
    left, right = pfm.figure_of(record).axes
    assert " - " in capsys.readouterr().out
    # What no matching gives is of no panel more than of the other.
    for axes in (left, right):
        assert "direct" in axes.get_legend_handles_labels()[1]
    assert "matched alone" not in left.get_title()


def test_columns_that_were_never_measured_are_left_out(tiny, capsys):
    options = [*tiny("vgg11-bn", 2), "--layers", "0", "1", "--match", "cca"]
    record = records.read(pfm.main(options))
    matched = pfm.columns_of(record)["matched"]
    assert record.rows.where(**matched) and not record.rows.where(**matched).values("accuracy")
    assert list(record["summary"]["reaches_edges_at"]) == ["direct", "RESET", "AM", "AM + RESET"]
    assert "matched" not in record["tables"][0]["caption"] + record["finding"]
    left, _ = pfm.figure_of(record).axes
    assert left.get_title() == "CCA (matched alone: no variances to evaluate with)"


def test_costs_are_each_matching_s_own(tiny, capsys):
    """Maps that mix cost something, permutations do not."""
    options = [*tiny("vgg11", 2), "--layers", "0", "1"]
    mixed = records.read(pfm.main([*options, "--match", "cca"]))
    alone = records.read(pfm.main(options))
    capsys.readouterr()
    keys = ["params", "params_ratio", "flops", "flops_ratio"]

    def cost(record, column):
        return {key: cell(record, "PFM 1/3", column)[key] for key in keys}

    row, other = cost(mixed, "matched"), cost(alone, "matched")
    for column in ("direct", "AM", "AM + REPAIR"):
        assert cost(mixed, column) == other == cost(alone, "direct")
    assert row == cost(mixed, "RESCALE")
    assert row["params"] > other["params"] and row["flops"] > other["flops"]
    own, beside = pfm.tables_of(mixed)
    assert "direct" in beside.header and "AM" in beside.header and "matched" in own.header
    ratios = [f"{found['params_ratio']:.3g}" for found in (row, other)]
    assert [table.lines[4][-3] for table in (own, beside)] == ratios and ratios[0] != ratios[1]
    # Models stand in the first column of either table.
    assert own.lines[0][1] == beside.lines[0][1] != ""
    RUN.show(mixed)
    printed = " ".join(capsys.readouterr().out.split())
    assert ratios[1] in printed.split() and printed.count(": activation matching beside it") == 1
    # Older records do not say what activation matching costs beside others.
    for old in mixed["rows"]:
        if old["match"] == "activation":
            [old.pop(key) for key in keys]
    shown = pfm.tables_of(mixed)
    assert shown[1].lines[4][-4:] == [""] * 4 and shown[0].lines[4] == own.lines[4]


AS, UNLIKE, OPEN, NEW = claims.VERDICTS
NAMES = {
    "matched": ("own", "none"),
    "reset": ("own", "reset"),
    "repair": ("own", "repair"),
    "rescale": ("own", "rescale"),
    "bias_calibration": ("own", "bias_calibration"),
    "am": ("activation", "none"),
    "am_reset": ("activation", "reset"),
    "am_repair": ("activation", "repair"),
    "am_rescale": ("activation", "rescale"),
}


def claimed(match, columns, rows, *, model="vgg16", images=10_000):
    """Verdicts of claims on accuracies by l and column; edge models of 0.9, ensemble of 0.93."""
    found = [
        {"pair": 0, "network": name, "accuracy": value, "layers": None}
        for name, value in zip(EDGES, (0.9, 0.9, 0.93), strict=True)
    ]
    for layers, values in rows.items():
        cells = {("none", "none"): 0.1}
        cells |= {NAMES[column]: value for column, value in zip(columns, values, strict=True)}
        for (of, remedy), value in cells.items():
            of = match if of == "own" else of
            row = {"pair": 0, "network": "PFM", "layers": layers, "match": of, "remedy": remedy}
            found.append(row | {"accuracy": value})
    record = {
        "config": {"match": match, "model": model, "width": 1, "alpha": 0.5, "pairs": 1},
        "data": {
            "name": "cifar10",
            "fallback": False,
            "test_images": images,
            "statistics_images": 1,
        },
        "model": {"name": model, "depth": 14},
        "rows": found,
    }
    record = RUN.derived(record)
    assert "the edge models' 90.0%" in record["finding"]
    return [row["verdict"] for row in record["claims"]]


def test_claims_on_the_paper_s_numbers_hold_and_flip():
    """Tables 1, 3, 4, 6 to 8 of the paper as records; then with one thing changed."""
    mixed = ["matched", "reset", "am", "am_reset"]
    cca = {0: [0.1, 0.912, 0.19, 0.899], 8: [0.1, 0.929, 0.9, 0.928], 12: [0.1, 0.931, 0.93, 0.93]}
    assert claimed("cca", mixed, cca) == [AS] * 4
    assert claimed("cca", mixed, cca | {0: [0.1, 0.89, 0.19, 0.899]})[:2] == [UNLIKE, UNLIKE]
    assert claimed("cca", mixed, cca | {8: [0.1, 0.92, 0.9, 0.93]})[:2] == [AS, UNLIKE]
    late = {0: [0.1, 0.88, 0.1, 0.8], 8: [0.1, 0.89, 0.9, 0.8], 12: [0.1, 0.9, 0.9, 0.8]}
    assert claimed("cca", mixed, late) == [AS, AS, UNLIKE, UNLIKE]
    zipped = {0: [0.1, 0.896, 0.19, 0.899], 8: [0.1, 0.93, 0.9, 0.928]}
    assert claimed("zipit", mixed, zipped) == [AS] * 3
    assert claimed("zipit", mixed, zipped | {0: [0.1, 0.85, 0.19, 0.899]})[0] == UNLIKE
    residual = {0: [0.1, 0.62, 0.1, 0.64], 8: [0.1, 0.89, 0.9, 0.93]}
    assert claimed("zipit", mixed, residual, model="resnet20") == [AS, AS]
    # Not below by more than noise.
    assert claimed("zipit", mixed, zipped, model="resnet20") == [OPEN, UNLIKE]
    above = zipped | {0: [0.1, 0.92, 0.19, 0.899]}
    assert claimed("zipit", mixed, above, model="resnet20") == [UNLIKE, UNLIKE]

    plain = ["matched", "repair", "rescale", "bias_calibration", "am", "am_repair", "am_rescale"]
    late = [0.93] * 7
    zipped = {0: [0.43, 0.68, 0.847, 0.83, 0.46, 0.39, 0.847], 8: late}
    assert claimed("zipit", plain, zipped) == [AS] * 6
    worse = {0: [0.5, 0.9, 0.7, 0.83, 0.46, 0.85, 0.847], 8: [0.89] * 7}
    assert claimed("zipit", plain, worse) == [UNLIKE] * 6
    cca = {0: [0.82, 0.58, 0.831, 0.8, 0.46, 0.39, 0.847], 8: late}
    assert claimed("cca", plain, cca) == [AS] * 6
    worse = {0: [0.5, 0.6, 0.55, 0.3, 0.46, 0.39, 0.5], 8: [0.89] * 7}
    assert claimed("cca", plain, worse) == [UNLIKE] * 6
    # Equal is so on either side.
    lower = {0: [0.47, 0.39, 0.483, 0.4, 0.3, 0.39, 0.901], 8: late}
    assert claimed("cca", plain, lower)[3] == UNLIKE
    above = {0: cca[0], 8: [0.96] * 7}
    assert claimed("cca", plain, above) == [AS] * 5 + [UNLIKE]
    assert claimed("transport", plain, cca) == [NEW]

    alone = plain[:4]
    table = {0: [0.465, 0.391, 0.847, 0.829], 8: [0.91, 0.87, 0.924, 0.918], 12: [0.93] * 4}
    assert claimed("activation", alone, table) == [AS] * 6
    other = {0: [0.3, 0.7, 0.68, 0.4], 8: [0.6, 0.8, 0.8, 0.7], 12: [0.85] * 4}
    assert claimed("activation", alone, other) == [AS] + [UNLIKE] * 5
    reset = {0: [0.1, 0.641], 13: [0.5, 0.9], 19: [0.92, 0.93]}
    assert claimed("activation", ["matched", "reset"], reset, model="resnet20") == [AS] * 2
    flat = {0: [0.1, 0.25], 19: [0.1, 0.5]}
    found = claimed("activation", ["matched", "reset"], flat, model="resnet20")
    assert found == [AS, UNLIKE]


def test_what_has_vanished_shows_nothing():
    """Near chance neither of two networks is ahead."""
    plain = ["matched", "repair", "rescale", "bias_calibration", "am", "am_repair", "am_rescale"]
    late = [0.93] * 7
    gone = {0: [0.173, 0.68, 0.847, 0.83, 0.136, 0.39, 0.847], 8: late}
    assert claimed("zipit", plain, gone) == [OPEN] + [AS] * 5
    seen = {0: [0.273, 0.68, 0.847, 0.83, 0.136, 0.39, 0.847], 8: late}
    assert claimed("zipit", plain, seen) == [UNLIKE] + [AS] * 5


def test_what_noise_may_have_made_is_no_lead():
    """On a few test images two accuracies are level that are not on many."""
    mixed = ["matched", "reset", "am", "am_reset"]
    cca = {0: [0.1, 0.912, 0.19, 0.899], 8: [0.1, 0.929, 0.9, 0.928]}
    assert claimed("cca", mixed, cca)[:2] == [AS, AS]
    assert claimed("cca", mixed, cca, images=500)[:2] == [OPEN, OPEN]
    residual = {0: [0.1, 0.62, 0.1, 0.64], 8: [0.1, 0.89, 0.9, 0.93]}
    assert claimed("zipit", mixed, residual, model="resnet20", images=500)[0] == OPEN


@pytest.mark.slow
def test_retrain_trains_what_it_merges(tmp_path, monkeypatch):
    def fit(model, recipe, dataset, *, seed, **options):
        x = np.zeros((1, *dataset.train_images.shape[1:]), np.float32)
        asked.append((recipe.epochs, seed))
        return training.train.Trained(jax.jit(model.init)(jax.random.key(seed), x), (), 1.0)

    asked: list = []
    monkeypatch.setattr(training.train, "fit", fit)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--model", "digits-mlp", "--retrain", "--layers", "5", "--match", "none"]
    path = pfm.main(["--dataset", "digits", *options, "--out", str(tmp_path / "out")])
    record = records.read(path)
    assert asked == [(60, 0), (60, 1)] and path.stem.endswith("-none-layers5-retrained")
    trained = sorted(p.name for p in (tmp_path / "out" / "checkpoints-cpu").iterdir())
    assert trained == ["digits-mlp-seed0", "digits-mlp-seed1"]
    assert [model["checkpoint"] for model in record["edge_models"]] == trained
    assert "training" in record["seconds"]


# --------------------------------------------------------------------------------------- options


def test_layers_of_the_paper():
    assert importlib.import_module("kit.pairs").default_layers(14) == [0, 3, 6, 8, 12]
    assert importlib.import_module("kit.pairs").default_layers(20) == [0, 6, 10, 13, 19]
    for depth in range(2, 60):
        found = importlib.import_module("kit.pairs").default_layers(depth)
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
    for action in RUN.parser()._actions:
        assert action.help


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "9"], "--layers must be from 0 to 7, got 9"),
        (["--layers", "-1"], "--layers: '-1' is not a whole number, from 0 on"),
        (["--model", "vgg16"], "is not for scikit-learn's 8x8 digits; give --dataset cifar10, or"),
        (["--preset", "paper"], "no models of --preset paper are shipped: give --retrain"),
        (
            ["--out", "/dev/null/x"],
            "--out: nothing can be written to '/dev/null/x': /dev/null is not a folder",
        ),
        (["--dataset", "auto", "--model", "vgg16"], "CIFAR-10 was not found, give --data-dir, or"),
        (["--model", "vgg17"], "'vgg17' is not a model; take one of"),
        (["--model", "digits-mlp-w0.5"], "has no option 'width'"),
        (["--model", "digits-conv-w0.5"], "2 models digits-conv-w0.5-seed* are needed"),
        (["--pairs", "50"], "are needed in checkpoints/"),
        (["--pairs", "0"], "'0' is not a number of pairs"),
        (["--alpha", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--alpha", "half"], "'half' is not a number from 0 to 1"),
        (["--samples", "0"], "'0' is neither a number of images nor 'all'"),
        (["--match", "both"], "invalid choice: 'both'"),
        (["--zip-beta", "2"], "--zip-beta: '2' is not a number from 0 to 1"),
        (["--zip-beta", "0.5"], "--zip-beta does nothing here: it is for --match zipit."),
        (
            ["--match", "transport", "--zip-beta", "1", "--regularization", "2", "--relative"],
            "--zip-beta does nothing here: it is for --match zipit.",
        ),
        (
            ["--match", "zipit", "--relative"],
            "--relative does nothing here: it is for --match cca.",
        ),
        (["--regularization", "-1"], "--regularization: '-1' is not a number from 0 on"),
        (["--regularization", "some"], "--regularization: 'some' is not a number from 0 on"),
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
    args = cli.parse(training.Training, "train_edges.py", "", shlex.split(command))
    assert (args.model, args.width, args.dataset) == ("vgg11", 0.25, "cifar10")
    assert (args.seeds, args.data_dir, args.preset) == ((1, 3), "my data", "cpu")
    assert args.out == training.Training.out


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


def test_figure_that_fails_leaves_the_whole_record(tiny, tmp_path, monkeypatch, capsys):
    def fail(figure, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kit.plot, "save", fail)
    with pytest.raises(SystemExit, match="1"):
        pfm.main([*tiny("vgg11", 2), "--layers", "1"])
    assert "error: [Errno 28] No space left" in capsys.readouterr().err
    (path,) = (tmp_path / "out").iterdir()
    assert path.suffix == ".json"
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


def test_runs_that_differ_have_other_names(digits):
    _, record = digits
    changes = [{}, {"layers": [0]}, {"samples": 1}, {"samples": "all"}, {"alpha": 0.25}]
    changes += [{"pairs": 3}, {"match": "none"}, {"match": "weight"}, {"retrain": True}]
    changes += [{"retrain": True, "preset": "paper"}, {"width": 0.5}, {"model": "digits-conv"}]
    changes += [{"match": "zipit"}, {"match": "cca"}, {"match": "transport"}]
    changes += [{"match": "zipit", "zip_alpha": 0.1}, {"match": "zipit", "zip_beta": 0.1}]
    changes += [{"match": "cca", "regularization": 1.0}]
    changes += [{"match": "cca", "regularization": 1.0, "relative": True}]
    standard = record["config"] | {"layers": importlib.import_module("kit.pairs").default_layers(6)}
    names = [RUN.file_name(record | {"config": standard | change}) for change in changes]
    assert names[0] == "cifar_pfm-digits-digits-mlp" and len(set(names)) == len(names)


def test_one_image_is_singular(digits):
    record = records.Record(digits[1])
    record["data"] = record["data"] | {"statistics_images": 1}
    assert pfm.title_of(record).endswith("statistics over 1 image")


# ---------------------------------------------------------------------------------- other programs


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["routing", "passes", "tracing", "diagnosis", "zip", "scores", "published"]
)
def test_benchmarks_run(name, tmp_path):
    benchmark = importlib.import_module(name)
    path = benchmark.main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    record = json.loads(path.read_text())
    assert record["benchmark"] == name and record["quick"] is True
    assert all(row["seconds"] > 0 for row in record["rows"])
    assert any(row.get("target") for row in record["rows"])
    assert record["question"].endswith("?") and record["question"] in " ".join(
        benchmark.__doc__.split()
    )
    assert record["command"].startswith(f"python experiments/benchmarks/{name}.py --quick")


@pytest.mark.slow
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


@pytest.mark.parametrize("path", sorted(RECORDS.glob("cifar_pfm-*.json")), ids=lambda p: p.stem)
def test_the_finding_names_what_is_best(path):
    """What leads has the largest mean, and what is beside it is level where noise may decide."""
    record = records.read(path)
    text, first = record["finding"], min(record["config"]["layers"])
    columns = pfm.columns_of(record)
    means = {name: record.rows.mean(layers=first, **of) for name, of in columns.items()}
    means = {name: mean for name, mean in means.items() if mean == mean}
    if " leads" in text:
        assert f" {max(means, key=means.__getitem__)} leads" in text
        return
    best = max(mean for name, mean in means.items() if not name.startswith("AM"))
    other = max(mean for name, mean in means.items() if name.startswith("AM"))
    noise = claims.noise(other, record["data"]["test_images"])
    verb = "level with" if abs(best - other) <= noise else "ahead" if best > other else "behind"
    assert f"is {verb}" in text and f"{100 * best:.1f}%" in text and f"{100 * other:.1f}%" in text
