"""The experiments on linear networks, in their quickest form, on the digits."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import without

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, grid, records, timing = (
    importlib.import_module(f"kit.{name}") for name in ("claims", "grid", "records", "timing")
)
linear = importlib.import_module("linear_networks")
residual = importlib.import_module("residual_linear")

AS, UNLIKE, OPEN, NEW = claims.VERDICTS
NAMES = ("linear_networks", "residual_linear")
QUANTITIES = ("feature", "feature_std", "offset", "weight", "bias", "stable_rank")
AVERAGES = ["direct", "weight", "activation"]


def quick(script, folder):
    path = script.main(["--quick", "--dataset", "digits", "--out", str(folder)])
    return path, records.read(path)


def shipped_of(name):
    return records.read(EXPERIMENTS / "results" / f"{name}-mnist.json")


def decided(script, record):
    return {row["id"].split(".")[-1]: row for row in claims.decided(script.CLAIMS, record)}


def verdicts(script, record):
    return {name: row["verdict"] for name, row in decided(script, record).items()}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return quick(linear, tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def skips(tmp_path_factory):
    return quick(residual, tmp_path_factory.mktemp("residual"))


@pytest.fixture(scope="module", params=NAMES)
def shipped(request):
    """The record that the page of a script tells of."""
    return importlib.import_module(request.param), shipped_of(request.param)


# ------------------------------------------------------------------------------------- quick runs


@pytest.mark.parametrize("name, fixture", [(NAMES[0], "chain"), (NAMES[1], "skips")])
def test_record_is_complete(name, fixture, request):
    path, record = request.getfixturevalue(fixture)
    assert path.name == f"{name}-digits-quick.json"
    assert record["experiment"] == name and "--quick" in record["command"]
    assert record["data"]["name"] == "digits" and record["data"]["fallback"] is False
    assert record["data"]["train_images"] == 300
    assert record["recipe"]["epochs"] == 1 and record["recipe"]["optimizer"] == "adam"
    assert record["seeds"] == {"edge_models": [0, 1]} and record.rows.distinct("pair") == [0]
    assert {"data", "trace", "training", "total"} <= set(record["seconds"])
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"].endswith("QUICK, MEANS NOTHING") and record["claims"] == []


def test_curves_of_every_network(chain):
    rows = chain[1].rows
    assert rows.distinct("site") == [f"params/dense{k}/kernel" for k in range(1, 9)]
    assert rows.distinct("network") == [*linear.EDGES, *AVERAGES]
    for name in rows.distinct("network"):
        found = rows.where(network=name, layer=set(range(1, 9)))
        assert found.distinct("layer") == list(range(1, 9)) and len(found) == 8
        more = () if name in linear.EDGES else ("rescaled_feature",)
        for row in found:
            assert set(row) == {"pair", "network", "layer", "site", *QUANTITIES, *more}
    names = [row["network"] for row in rows if "accuracy" in row]
    assert names == [*linear.EDGES, *AVERAGES]
    assert len(rows.values("loss")) == 5 and len(rows.values("train_accuracy")) == 2
    notes = chain[1].notes("matching")
    assert [note["match"] for note in notes] == ["weight", "activation"]


def test_rescaling_is_by_the_product_of_magnitudes(chain):
    rows = chain[1].rows

    def found(network, key):
        return rows.curve("layer", key, network=network)[1]

    for name in AVERAGES:
        weights = np.divide(found(linear.EDGES, "weight"), found(name, "weight"))
        rescaled = np.cumprod(weights) * found(name, "feature")
        np.testing.assert_allclose(found(name, "rescaled_feature"), rescaled, rtol=1e-5)


def test_curves_between_the_edge_models(skips):
    record = skips[1]
    for name in ("plain", "residual"):
        for merged in ("direct", "weight"):
            rows = record.rows.where(network=name, merged=merged)
            np.testing.assert_allclose(rows.distinct("alpha"), np.linspace(0, 1, 11), atol=1e-12)
            assert {1.0, 0.5} <= set(rows.distinct("alpha"))
            accuracy = rows.values("accuracy")
            assert len(accuracy) == len(rows.values("loss")) == 11
            (about,) = (row for row in rows if "barrier" in row)
            assert about["lowest"] == min(accuracy) and about["loss_barrier"] is not None
            assert set(rows.curve("alpha", "loss")[2]) == {0.0}
    # Exact skips tie the units of all layers along them.
    sizes = {name: list(model["groups"].values()) for name, model in record["models"].items()}
    assert sizes == {"plain": [32] * 4, "residual": [32]}


def test_matching_keeps_the_ends(skips):
    """The second network is permuted, but computes the same up to rounding."""
    for name in ("plain", "residual"):
        for alpha in (0.0, 1.0):
            direct, matched = skips[1].rows.where(network=name, alpha=alpha)
            assert matched["loss"] == pytest.approx(direct["loss"], rel=1e-4)


def test_figures_name_their_axes(chain, skips):
    assert len(linear.figure_of(chain[1]).axes) == 3
    assert len(residual.figure_of(skips[1]).axes) == 2
    for figure in (linear.figure_of(chain[1]), residual.figure_of(skips[1])):
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()


# --------------------------------------------------------------------------------- shipped records


def test_shipped_records(shipped):
    script, record = shipped
    assert record["seconds"]["total"] < 600
    assert record["data"]["name"] == "mnist" and record.rows.distinct("pair") == list(range(5))
    assert record["title"].endswith("mean of 5 pairs")
    assert script.EXPERIMENT.file_name(record) == f"{record['experiment']}-mnist"


def test_features_vanished():
    record = shipped_of(NAMES[0])
    left = linear.left(record)
    assert left[0] > 0.5 and left[-1] < 0.05 and (np.diff(left) < 0).all()
    offset, feature = (
        record.rows.mean(key, network="direct", layer=8) for key in ("offset", "feature")
    )
    assert offset > feature and record.rows.mean(network="direct") < 0.2


def test_skips_lower_the_barrier():
    rows = shipped_of(NAMES[1]).rows
    for merged in ("direct", "weight"):
        plain, skips = (
            rows.mean("barrier", network=name, merged=merged) for name in ("plain", "residual")
        )
        assert skips < plain


def test_claims_on_skips_follow_the_record():
    """What is said changes with what was measured."""
    record = shipped_of(NAMES[1])
    assert set(verdicts(residual, record).values()) == {AS}
    for row in record["rows"]:
        row["network"] = {"plain": "residual", "residual": "plain"}[row["network"]]
    assert set(verdicts(residual, record).values()) == {UNLIKE}
    # Within noise on test images, and where both midpoints are near chance.
    for row in record.rows.where(merged="weight", network="residual"):
        if "barrier" in row:
            row["barrier"] = record.rows.mean("barrier", merged="weight", network="plain") + 1e-3
    for row in record.rows.where(merged="direct", alpha=0.5):
        row["accuracy"] = 0.15
    assert set(verdicts(residual, record).values()) == {OPEN}


def test_claims_on_linear_networks_can_fail():
    record = shipped_of(NAMES[0])
    before = verdicts(linear, record)
    assert before == dict.fromkeys(before, AS) | {"rescaled": UNLIKE} and len(before) == 7
    assert "(so in 3 of 5 pairs)" in decided(linear, record)["rescaled"]["here"]
    assert "of 5 pairs" not in decided(linear, record)["fades"]["here"]

    def changed(key, layer, value, network="direct"):
        found = copy.deepcopy(record)
        for row in found.rows.where(network=network):
            if row.get("layer") == layer and key in row:
                row[key] = value
        return {k: v for k, v in verdicts(linear, found).items() if v != before[k]}

    assert changed("feature", 8, 15.0) == dict.fromkeys(("fades", "overtakes"), UNLIKE)
    assert changed("offset", 1, 10.0) == {"offset-grows": UNLIKE}
    assert changed("offset", 8, 0.1)["overtakes"] == UNLIKE
    assert changed("weight", 3, 9.0) == {"weights-smaller": UNLIKE}
    assert changed("weight", 8, 1e-3) == {"weights-rise": UNLIKE}
    assert changed("rescaled_feature", 8, 8.0) == {"rescaled": AS}
    assert changed("accuracy", None, 0.5) == {"near-chance": UNLIKE}
    assert changed("accuracy", None, 0.201) == {"near-chance": OPEN}


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds must be different and come in pairs, got [0]"),
        (["--seeds", "1", "1"], "--seeds must be different and come in pairs, got [1, 1]"),
        (["--seeds", "-1", "0"], "'-1' is not a seed, from 0 on"),
        (["--epochs", "0"], "'0' is not a number of epochs"),
        (["--dataset", "cifar10"], "invalid choice: 'cifar10'"),
        (["--dataset", "mnist", "--data-dir", "/nowhere"], "'mnist' is not prepared"),
    ],
)
@pytest.mark.parametrize("script", [linear, residual], ids=NAMES)
def test_bad_options(script, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        script.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_falling_back_to_the_digits_shows(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    without(monkeypatch, "tensorflow")
    setup = residual.EXPERIMENT.prepare(grid.LinearOptions(), timing.Stopwatch())
    images = setup.record["data"]
    assert images["name"] == "digits" and images["fallback"] and "'mnist'" in caplog.text
    # As many steps as on MNIST.
    assert setup.record["recipe"]["epochs"] * 11 == pytest.approx(20 * 469, rel=0.01)
    record = records.Record(setup.record | {"config": {"quick": False}, "rows": []})
    title = grid.titled(record, "x")
    assert title.startswith("MNIST NOT FOUND, SO: scikit-learn's 8x8 digits")


def test_what_auto_looks_for_is_checked():
    with pytest.raises(ValueError, match="prefer must be one of cifar10, .*, got 'auto'"):
        grid.data.load("auto", prefer="auto")


def test_runs_that_differ_have_other_names(chain):
    config = chain[1]["config"] | {"quick": False, "seeds": list(range(10))}
    changes = [{}, {"seeds": [2, 3]}, {"epochs": 7}, {"quick": True}]
    found = [chain[1] | {"config": config | change} for change in changes]
    names = [linear.EXPERIMENT.file_name(record) for record in found]
    assert names[0] == "linear_networks-digits" and len(set(names)) == len(names)
