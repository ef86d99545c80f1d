"""The experiments on linear networks, in their quickest form, on the digits."""

from __future__ import annotations

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
shared = importlib.import_module("_linear")
linear = importlib.import_module("linear_networks")
common = importlib.import_module("_common")
residual = importlib.import_module("residual_linear")

NAMES = ("linear_networks", "residual_linear")
QUANTITIES = ("feature", "feature_std", "offset", "weight", "bias", "stable_rank")


def quick(script, folder):
    path = script.main(["--quick", "--dataset", "digits", "--out", str(folder)])
    return path, json.loads(path.read_text())


def said(script, record):
    """What a script says of a record."""
    return common.told(*script.outcome(record))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return quick(linear, tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def skips(tmp_path_factory):
    return quick(residual, tmp_path_factory.mktemp("residual"))


@pytest.fixture(scope="module", params=NAMES)
def shipped(request):
    """The record that the head of a script tells of."""
    path = EXPERIMENTS / "results" / f"{request.param}-mnist.json"
    return importlib.import_module(request.param), json.loads(path.read_text())


# ------------------------------------------------------------------------------------- quick runs


@pytest.mark.parametrize("name, fixture", [(NAMES[0], "chain"), (NAMES[1], "skips")])
def test_record_is_complete(name, fixture, request):
    path, record = request.getfixturevalue(fixture)
    assert path.name == f"{name}-digits-quick.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".png"]
    assert record["experiment"] == name and "--quick" in record["command"]
    assert record["data"]["name"] == "digits" and record["data"]["fallback"] is False
    assert record["data"]["train_images"] == 300
    assert record["config"]["epochs"] == record["recipe"]["epochs"] == 1
    assert record["recipe"]["optimizer"] == "adam"
    assert [pair["models"] for pair in record["pairs"]] == [[0, 1]]
    assert {"data", "trace", "training", "total"} <= set(record["seconds"])
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"].endswith("QUICK, MEANS NOTHING")


def test_curves_of_every_network(chain):
    _, record = chain
    assert record["layers"] == [f"params/dense{k}/kernel" for k in range(1, 9)]
    averages = ["direct", "weight", "activation"]
    assert list(record["curves"]) == [*averages, "edge models"]
    for name, curves in record["curves"].items():
        more = () if name == "edge models" else ("rescale_product", "rescaled_feature")
        assert sorted(curves) == sorted((*QUANTITIES, *more))
        assert all(len(values) == 8 for values in curves.values())
    assert list(record["accuracy"]) == ["model 1", "model 2", *averages]
    assert record["curves"] == record["pairs"][0]["curves"]


def test_rescaling_is_by_the_product_of_magnitudes(chain):
    _, record = chain
    edges = record["curves"]["edge models"]
    for name in ("direct", "weight", "activation"):
        curves = record["curves"][name]
        product = np.cumprod(np.divide(edges["weight"], curves["weight"]))
        np.testing.assert_allclose(curves["rescale_product"], product, rtol=1e-5)
        rescaled = product * curves["feature"]
        np.testing.assert_allclose(curves["rescaled_feature"], rescaled, rtol=1e-5)


def test_curves_between_the_edge_models(skips):
    _, record = skips
    assert record["alphas"] == [k / 10 for k in range(11)]
    for name in ("plain", "residual"):
        for match in ("direct", "weight"):
            pair = record["pairs"][0][name][match]
            assert len(pair["accuracy"]) == len(pair["loss"]) == 11
            summary = record["summary"][name][match]
            assert set(summary) == {"accuracy", "loss", "barrier", "loss_barrier"}
            assert summary["accuracy"]["mean"] == pair["accuracy"]
            assert set(summary["loss"]["std"]) == {0.0}
    # Exact skips tie the units of all layers along them.
    sizes = {name: list(model["groups"].values()) for name, model in record["models"].items()}
    assert sizes == {"plain": [32] * 4, "residual": [32]}


def test_matching_keeps_the_ends(skips):
    """The second network is permuted, but computes the same up to rounding."""
    _, record = skips
    for name in ("plain", "residual"):
        direct, matched = (record["pairs"][0][name][match] for match in ("direct", "weight"))
        for end in (0, -1):
            assert matched["loss"][end] == pytest.approx(direct["loss"][end], rel=1e-4)


def test_figures_name_their_axes(chain, skips):
    assert len(linear.figure_of(chain[1]).axes) == 3
    assert len(residual.figure_of(skips[1]).axes) == 2
    for figure in (linear.figure_of(chain[1]), residual.figure_of(skips[1])):
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()


# --------------------------------------------------------------------------------- shipped records


def test_heads_say_what_came_out(shipped):
    """The sentences are written from the record, by update_readme.py."""
    script, record = shipped
    update = importlib.import_module("update_readme")
    source = Path(script.__file__).read_text(encoding="utf-8")
    assert update.headed(source, script) == source
    assert " ".join(said(script, record).split()) in " ".join(script.__doc__.split())
    assert record["seconds"]["total"] < 600
    assert record["data"]["name"] == "mnist" and len(record["pairs"]) == 5


def test_features_vanished():
    record = json.loads((EXPERIMENTS / "results" / "linear_networks-mnist.json").read_text())
    midpoint, edges = record["curves"]["direct"], record["curves"]["edge models"]
    left = np.divide(midpoint["feature"], edges["feature"])
    assert left[0] > 0.5 and left[-1] < 0.05 and (np.diff(left) < 0).all()
    assert midpoint["offset"][-1] > midpoint["feature"][-1]
    assert np.mean(record["accuracy"]["direct"]) < 0.2


def test_skips_lower_the_barrier():
    record = json.loads((EXPERIMENTS / "results" / "residual_linear-mnist.json").read_text())
    for match in ("direct", "weight"):
        plain, skips = (record["summary"][n][match]["barrier"] for n in ("plain", "residual"))
        assert skips["mean"] < plain["mean"]


def test_sentences_follow_the_record():
    """What the head says changes with what was measured."""
    record = json.loads((EXPERIMENTS / "results" / "residual_linear-mnist.json").read_text())
    assert "Unlike" not in said(residual, record)
    for entry in (record["summary"], *record["pairs"]):
        entry["plain"], entry["residual"] = entry["residual"], entry["plain"]
    assert "As in" not in said(residual, record)


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds must be different and come in pairs, got [0]"),
        (["--seeds", "1", "1"], "--seeds must be different and come in pairs, got [1, 1]"),
        (["--seeds", "-1", "0"], "'-1' is no seed, from 0 on"),
        (["--epochs", "0"], "'0' is no number of epochs"),
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
    monkeypatch.setattr(shared.data._data, "_can_prepare", lambda: False)
    args = residual.parser().parse_args([])
    dataset = shared.load(args)
    assert dataset.name == "digits" and dataset.fallback and "'mnist'" in caplog.text
    # As many steps as on MNIST.
    recipe = shared.recipe_of(args, residual.RECIPE, dataset)
    assert recipe.epochs * 11 == pytest.approx(20 * 469, rel=0.01)
    record = shared.record_of("residual_linear", args, "", dataset, recipe) | {"pairs": []}
    assert shared.titled(record, "x").startswith("MNIST NOT FOUND, SO: scikit-learn's 8x8 digits")


def test_what_auto_looks_for_is_checked():
    with pytest.raises(ValueError, match="prefer must be one of cifar10, .*, got 'auto'"):
        shared.data.load("auto", prefer="auto")


def test_runs_that_differ_have_other_names(chain):
    config = chain[1]["config"] | {"quick": False, "seeds": [0, 1]}
    changes = [{}, {"seeds": [2, 3]}, {"asked_epochs": 7}, {"quick": True}]
    records = [chain[1] | {"config": config | change} for change in changes]
    names = [shared.file_name(record, seeds=(0, 1), epochs=5) for record in records]
    assert names[0] == "linear_networks-digits" and len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["_linear", "linear_networks"])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
