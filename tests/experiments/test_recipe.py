"""The experiment on training recipes, in its quickest form, on the digits."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from vfjax import data, train

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
recipe = importlib.import_module("training_recipe")
paper = importlib.import_module("papers.training_recipe")
claims, cli, edges, experiment, grid, records, timing = (
    importlib.import_module(f"kit.{name}")
    for name in ("claims", "cli", "edges", "experiment", "grid", "records", "timing")
)

RUN = recipe.EXPERIMENT
AS, UNLIKE, OPEN, NEW = claims.VERDICTS


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    path = recipe.main(["--quick", "--dataset", "digits", "--out", str(folder)])
    return path, records.read(path)


@pytest.fixture
def record(quick):
    return copy.deepcopy(quick[1])


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train=200, test=100)


@pytest.fixture(scope="module")
def plan():
    options = train.Recipe(epochs=2, batch_size=100)
    return dataclasses.replace(recipe.QUICK, recipe=options)


@pytest.fixture
def measured(plan, digits, tmp_path, monkeypatch):
    """The rows of cells that a pair is trained for."""
    net = edges.traced(plan.model, digits)

    def rows_of(*cells):
        setup = experiment.Setup(None, (plan, net, digits, [(0, 1)]), {})
        run = experiment.Run(setup, timing.Stopwatch(), tmp_path / "a.partial", "key")
        monkeypatch.setattr(recipe, "cells_of", lambda grid: cells)
        rows = records.Rows(recipe.measure(recipe.Config(), run))
        monkeypatch.undo()
        return [rows.where(**cell._asdict()) for cell in cells]

    return rows_of


def cells_of(record):
    """Cells of a record with their rows."""
    cells = grid.cells_of(record["grid"])
    return {cell: record.rows.where(**cell._asdict()) for cell in cells}


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(quick):
    path, record = quick
    assert path.name == "training_recipe-digits-quick.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".png", ".md"}
    assert record["data"]["name"] == "digits" and record["data"]["train_images"] == 300
    assert record["seeds"]["pairs"] == [[0, 1]] and record["title"].endswith("MEANS NOTHING")
    assert record["claims"] == []
    assert {"data", "trace", "training", "matching", "interpolation"} <= set(record["seconds"])
    assert {"python", "vfjax", "jax"} <= set(record["versions"]) and record["date"]
    # Three rates, two decays (one of them both), two of the other initialisation, two ablations.
    cells = cells_of(record)
    assert len(cells) == len(set(map(str, cells))) == len(record.notes("recipes")) == 8
    assert sum(map(len, cells.values())) == len(record.rows)
    for cell, rows in cells.items():
        assert rows.distinct("pair") == [0] and not rows.values("diverged")
        found = rows.where(network=["model 1", "model 2"])
        assert len(found) == 2 and all(row["train_accuracy"] > 0 for row in found)
        used = record.notes("recipes").only(cell=str(cell))
        plain = cell == cell.source
        rate, decay = cell[1:3] if plain else cell[3:]
        assert (used["learning_rate"], used["weight_decay"]) == (rate, decay)
        assert used["schedule"] == ("cosine" if plain else "constant")
        for match in recipe.MATCHES:
            alphas, values, _ = rows.where(merged=match).curve("alpha")
            assert len(alphas) == 11 and values[0] == found[0]["accuracy"]
            (about,) = (row for row in rows.where(merged=match) if "barrier" in row)
            assert about["lowest"] == min(values)
            assert paper.number(record, cell, merged=match) == about["barrier"]


def test_barriers_are_those_of_the_curves(quick):
    """By the definition in the paper and by that of its code, from accuracies alone."""
    for rows in cells_of(quick[1]).values():
        for match in recipe.MATCHES:
            here = rows.where(merged=match)
            alphas, values = map(np.array, here.curve("alpha")[:2])
            (found,) = (row for row in here if "barrier" in row)
            line = (1 - alphas) * values[0] + alphas * values[-1]
            assert found["barrier"] == pytest.approx((line - values).max(), abs=1e-9)
            reference = (values[0] + values[-1]) / 2 - values.min()
            assert found["reference_barrier"] == pytest.approx(reference, abs=1e-9)


def test_distances_are_followed_where_initialisations_are_compared(quick):
    record = quick[1]
    followed = {cell: rows for cell, rows in cells_of(record).items() if rows.values("epoch")}
    kinds = {(cell.initialiser, cell.rate) for cell in followed}
    assert kinds == {(name, r) for name in record["grid"]["initialisers"] for r in (0.01, 0.1)}
    for rows in followed.values():
        distances = {}
        for match in recipe.MATCHES:
            here = rows.where(merged=match)
            epochs, distances[match], _ = here.curve("epoch", "distance")
            assert epochs == [0, 1]
            (last,) = here.where(epoch=None).values("distance")
            assert distances[match][-1] == pytest.approx(last, rel=1e-5)
        assert all(np.less(distances["matched"], distances["direct"]))


def test_figure_names_its_axes(record):
    figure = RUN.figure(record)
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
    assert figure.axes[0].get_xscale() == "log"
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["0.001", "0.01", "0.1"]


# -------------------------------------------------------------------------------------- one pair


def test_one_more_epoch_starts_from_the_networks_of_the_other_recipe(measured):
    first = grid.Cell("uniform", 0.1, 0.003)
    low, high = (first._replace(then_rate=rate, then_decay=0.0) for rate in (1e-12, 0.1))
    before, after, moved = measured(first, low, high)
    direct = {"merged": "direct"}
    assert after.curve("alpha", **direct) == before.curve("alpha", **direct)

    def between(rows):
        return rows.mean("distance", epoch=None, **direct)

    assert between(after) == pytest.approx(between(before))
    assert between(moved) != pytest.approx(between(before))


def test_runs_with_and_without_distances_are_the_same(plan, digits):
    cell = grid.Cell("uniform", 0.1, 0.003)
    assert cell in grid.sets_of(plan.grid)["initialisers"]
    runs, snapshots = grid.trainer(plan, digits, (0, 1))(cell)
    assert {epoch: len(trees) for epoch, trees in snapshots.items()} == {0: 2, 1: 2, 2: 2}
    for seed, run in enumerate(runs):
        plain = train.fit(plan.model, plan.recipe_of(cell), digits, seed=seed)
        np.testing.assert_allclose(
            run.variables["params"]["head"]["kernel"],
            plain.variables["params"]["head"]["kernel"],
            atol=1e-5,
        )


def test_divergence_is_recorded_and_told(measured, record):
    cell = grid.Cell("uniform", 1e30, 0.0)
    more = cell._replace(then_rate=0.01, then_decay=0.0)
    (found,), (after,) = measured(cell, more)
    assert "diverged in epoch 1" in found["diverged"] and "merged" not in found
    assert after["diverged"] == found["diverged"]
    lost = {"initialiser": "he_normal", "rate": 0.1, "decay": 0.003}
    kept = [row for row in record["rows"] if lost.items() - row.items()]
    gone = [{**c._asdict(), "pair": 0, "diverged": "so"} for c in cells_of(record)
            if lost.items() <= c._asdict().items()]  # fmt: skip
    assert len(gone) == 2
    record["config"]["quick"], record["rows"] = False, kept + gone
    record = RUN.derived(record)
    (table,) = record["tables"]
    assert "rate 0.1, decay 0.003, 1 of 1 pairs diverged" in table["caption"]
    assert "diverged" in record["finding"]
    # No claim holds of what is not there.
    told = [row for row in record["claims"] if "diverged" in row["here"]]
    assert len(told) == 7 and {row["verdict"] for row in told} == {OPEN}
    assert not any("nan" in row["here"] for row in record["claims"])
    assert len(RUN.figure(record).axes) == 4


def test_pairs_that_diverged_do_not_count(quick, record):
    cell = next(iter(cells_of(record)))
    record["rows"] = [*record["rows"], {**cell._asdict(), "pair": 1, "diverged": "so"}]
    for key in ("accuracy", "barrier", "distance"):
        assert paper.number(record, cell, key) == paper.number(quick[1], cell, key)


# ---------------------------------------------------------------------------------------- claims


def numbers(record, values):
    """Sets numbers of cells by (initialiser, rate, decay, whether retrained)."""
    for cell, rows in cells_of(record).items():
        found = values[cell.initialiser, cell.rate, cell.decay, cell != cell.source]
        for row in rows:
            if "train_accuracy" in row:
                row["accuracy"] = found["edge_accuracy"]
            if "barrier" in row:
                row["barrier"] = found[f"{row['merged']}_barrier"]
            if "distance" in row and row["epoch"] is None and row["merged"] == "direct":
                row["distance"] = found["direct_distance"]


def decided(record):
    """Verdicts of claims, and what was measured, by id."""
    record["data"]["test_images"] = 10_000
    found = claims.decided(RUN.claims, record)
    return {row["id"].removeprefix("vf.recipe."): row for row in found}


def cell(accuracy, matched, distance=10.0, direct=0.7):
    return {
        "edge_accuracy": accuracy,
        "matched_barrier": matched,
        "direct_barrier": direct,
        "direct_distance": distance,
    }


def as_in_the_paper(record):
    normal, uniform = record["grid"]["initialisers"]
    return {
        (normal, 0.001, 0.003, False): cell(0.8, 0.7),
        (normal, 0.01, 0.003, False): cell(0.95, 0.3, 20.0),
        (normal, 0.1, 0.003, False): cell(0.97, 0.1, 15.0),
        (normal, 0.01, 0.015, False): cell(0.98, 0.02),
        (uniform, 0.01, 0.003, False): cell(0.95, 0.1, 10.0),
        (uniform, 0.1, 0.003, False): cell(0.97, 0.1, 15.0),
        (normal, 0.1, 0.003, True): cell(0.951, 0.12),
        (normal, 0.01, 0.015, True): cell(0.951, 0.05),
    }


def test_claims_follow_the_numbers(record):
    first, other = record["grid"]["initialisers"]
    values = as_in_the_paper(record)
    numbers(record, values)
    found = decided(record)
    assert len(found) == len(RUN.claims) == 13
    assert {row["verdict"] for row in found.values()} == {AS}
    rates, decays = (first, 0.1, 0.003, False), (first, 0.01, 0.015, False)
    after, after_decay = (first, 0.1, 0.003, True), (first, 0.01, 0.015, True)
    low, end = (first, 0.01, 0.003, False), (other, 0.1, 0.003, False)
    first_rate = (first, 0.001, 0.003, False)
    changes = {
        "rate-matched": (rates, "matched_barrier", 0.2, "30.00 20.00"),
        "decay-matched": (decays, "matched_barrier", 0.15, "30.00 15.00"),
        "rate-epoch-barrier": (after, "matched_barrier", 0.25, "10.00 25.00 30.00"),
        "decay-epoch-barrier": (after_decay, "matched_barrier", 0.25, "2.00 25.00 30.00"),
        "merge-from-low-on": (first_rate, "matched_barrier", 0.2, "25.00 31.58 10.31"),
        "initialiser-barrier-high": (end, "matched_barrier", 0.9, "30.00 10.00 10.00 90.00"),
        "rate-direct": (low, "direct_barrier", 0.5, "50.00 70.00"),
        "rate-epoch-accuracy": (after, "edge_accuracy", 0.97, "97.00 97.00 95.00"),
        "decay-epoch-accuracy": (after_decay, "edge_accuracy", 0.98, "98.00 98.00 95.00"),
        "initialiser-distance-high": (end, "direct_distance", 25.0, "20.00 10.00 15.00 25.00"),
    }
    for name, (key, what, value, told) in changes.items():
        numbers(record, values | {key: values[key] | {what: value}})
        row = decided(record)[name]
        assert row["verdict"] == UNLIKE, (name, row)
        assert [part.split(" with ")[0] for part in row["here"].split("; ")] == told.split()
        assert row["here"].startswith(f"{told.split()[0]} with he_normal, rate 0.")
    keys = [(name, 0.01, 0.003, False) for name in (first, other)]
    numbers(record, values | {keys[0]: values[keys[1]], keys[1]: values[keys[0]]})
    found = decided(record)
    for name in ("initialiser-barrier-low", "initialiser-distance-low"):
        assert found[name]["verdict"] == UNLIKE


def test_what_is_undecided(record):
    """What differs by no more than noise; barriers at unlike accuracy say nothing."""
    first, _ = record["grid"]["initialisers"]
    values = as_in_the_paper(record)
    after, rates = (first, 0.1, 0.003, True), (first, 0.1, 0.003, False)
    changes = {
        "rate-matched": (rates, {"matched_barrier": 0.179}),
        "rate-epoch-accuracy": (after, {"edge_accuracy": 0.957}),
        "rate-epoch-barrier": (after, {"edge_accuracy": 0.97}),
        "merge-from-low-on": ((first, 0.001, 0.003, False), {"matched_barrier": 0.405}),
    }
    for name, (key, change) in changes.items():
        numbers(record, values | {key: values[key] | change})
        assert decided(record)[name]["verdict"] == OPEN, name


def test_record_is_of_real_data():
    shipped = records.read(EXPERIMENTS / "results" / "training_recipe-mnist.json")
    assert shipped["data"]["name"] == "mnist" and shipped["data"]["fallback"] is False
    assert RUN.file_name(shipped) == "training_recipe-mnist" and shipped == RUN.derived(shipped)
    assert len(shipped["claims"]) == 13


# ----------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", recipe.PAPER_MODELS)
def test_the_paper_s_grid(name, digits):
    cifar = dataclasses.replace(digits, name="cifar10")
    plan = recipe.paper_plan(name, None, cifar)
    cells = grid.cells_of(plan.grid)
    both = name.endswith("-ln")
    # Five rates and five decays, of which one is both; ablations of each; initialisations.
    assert len(cells) == 9 + 2 + 2 * both
    assert plan.recipe.epochs == 160 and plan.recipe.milestones == (32000, 48000)
    assert {cell.rate for cell in cells} == {0.01, 0.03, 0.05, 0.07, 0.1}
    for cell in cells:
        found = plan.recipe_of(cell)
        if cell != cell.source:
            assert (found.epochs, found.schedule, found.learning_rate) == (1, "constant", 0.01)
            assert found.crop == 4 and found.weight_decay == 1e-4
            continue
        assert (found.learning_rate, found.weight_decay) == (cell.rate, cell.decay)
        vgg = name.startswith("vgg16") and (cell.decay > 1e-4 or cell.initialiser == "uniform")
        assert found.warmup_epochs == float(vgg or name == "resnet20-ln")
        assert (cell in grid.sets_of(plan.grid).get("initialisers", [])) == (
            both and cell.decay == 1e-4 and cell.rate in (0.01, 0.1)
        )


def test_mnist_of_the_paper_has_rates_alone(digits):
    plan = recipe.paper_plan("vgg16-ln", None, dataclasses.replace(digits, name="mnist"))
    cells = [grid.Cell("uniform", rate, 5e-4) for rate in (0.001, 0.01, 0.1)]
    assert grid.cells_of(plan.grid) == [*cells, cells[-1]._replace(then_rate=0.01, then_decay=5e-4)]


def test_the_digits_get_as_many_steps_as_mnist():
    plan = recipe.plan_of(recipe.Config(dataset="digits"), data.load("digits"))
    for cell in grid.cells_of(plan.grid):
        epochs = 1 if cell != cell.source else recipe.CPU.recipe.epochs
        assert plan.recipe_of(cell).epochs * 11 == pytest.approx(epochs * 469, rel=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds must be different and come in pairs, got [0]"),
        (["--seeds", "x", "0"], "'x' is not a seed, from 0 on"),
        (["--model", "vgg"], "'vgg' is not a model"),
        (["--dataset", "digits", "--model", "vgg16"], "--model and --dataset cifar10 need --pres"),
        (["--dataset", "digits", "--preset", "paper"], "--model vgg16 is not for the digits"),
        (
            ["--dataset", "digits", "--preset", "paper", "--model", "vgg11"],
            "--model must be one of vgg16, vgg16-bn, vgg16-ln, resnet20, resnet20-ln with",
        ),
        (["--dataset", "mnist", "--data-dir", "/nowhere"], "'mnist' is not prepared"),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        recipe.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_that_differ_have_other_names(record):
    config = record["config"] | {"quick": False, "seeds": list(recipe.Config.seeds)}
    changes = [{}, {"seeds": [8, 9]}, {"preset": "paper"}, {"quick": True}]
    changes += [{"preset": "paper", "model": "vgg16-ln"}]
    names = [RUN.file_name(record | {"config": config | change}) for change in changes]
    assert names[0] == "training_recipe-digits" and len(set(names)) == len(names)
    assert names[-1] == "training_recipe-digits-vgg16-ln-paper"


def test_a_fall_back_shows(record):
    record["data"]["fallback"] = True
    assert recipe.title_of(record).startswith("MNIST NOT FOUND, SO: scikit-learn's 8x8 digits")
    record["config"]["preset"] = "paper"
    assert recipe.title_of(record).startswith("CIFAR-10 NOT FOUND")
