"""Pairs that experiments train themselves, and training that goes on where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vfjax import checkpoint, data, models, train

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
cli, edges, experiment, grid, records, timing, training = (
    importlib.import_module(f"kit.{name}")
    for name in ("cli", "edges", "experiment", "grid", "records", "timing", "training")
)
recipes = importlib.import_module("training_recipe")
GRID = {"rates": (0.01, 0.1), "decays": (0.0, 1e-3), "rate": 0.1, "decay": 0.0, "low": 0.01,
        "initialisers": ("he_normal", "uniform")}  # fmt: skip
RECIPE = train.Recipe(epochs=2, batch_size=100)
PLAN = grid.Plan("mlp", models.MLP((8,)), RECIPE, GRID)
CELL = grid.Cell("he_normal", 0.1, 0.0)


def more(cell, rate, decay):
    """The cell of one more epoch."""
    return cell._replace(then_rate=rate, then_decay=decay)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train=200, test=100)


@pytest.fixture(scope="module")
def net(digits):
    return edges.traced(PLAN.model, digits)


def pair_of(digits, folder=None):
    """What trains a pair for a cell."""
    return grid.trainer(PLAN, digits, (0, 1), folder)


def measured(digits, net, folder, *cells):
    """The rows of each of some cells."""
    setup = experiment.Setup(None, (PLAN, net, digits, [(0, 1)]), {})
    run = experiment.Run(setup, timing.Stopwatch(), folder / "a.partial", "key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "cells_of", lambda grid: cells)
        rows = list(recipes.measure(recipes.Config(), run))
    return [[row for row in rows if cell._asdict().items() <= row.items()] for cell in cells]


def same(tree, other):
    for leaf, found in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, found, atol=1e-6)


# ------------------------------------------------------------------------------ what is trained


def test_cells_are_sweeps_and_what_starts_from_them():
    cells = grid.cells_of(GRID)
    assert len(cells) == len(set(cells)) == len({str(cell) for cell in cells}) == 7
    then = [more(CELL, GRID["low"], 0.0), more(CELL._replace(decay=1e-3), GRID["low"], 0.0)]
    assert [cell for cell in cells if cell != cell.source] == then
    # Those that start from others come after them.
    for place, cell in enumerate(cells):
        assert cell == cell.source or cell.source in cells[:place]
    compared = [(cell.initialiser, cell.rate) for cell in grid.sets_of(GRID)["initialisers"]]
    assert compared == [(name, rate) for rate in GRID["rates"] for name in GRID["initialisers"]]
    one = GRID | {"initialisers": ("he_normal",)}
    assert "initialisers" not in grid.sets_of(one) and len(grid.cells_of(one)) == 5
    assert len(grid.cells_of(GRID | {"decays": ()})) == 5


def test_recipes_of_cells():
    found = PLAN.recipe_of(CELL._replace(decay=1e-3))
    assert found == dataclasses.replace(RECIPE, learning_rate=0.1, weight_decay=1e-3)
    after = PLAN.recipe_of(more(CELL, 0.01, 0.5))
    assert (after.learning_rate, after.weight_decay, after.epochs) == (0.01, 0.5, 1)
    assert after.schedule == "constant" and not after.milestones and not after.warmup_epochs
    longer = dataclasses.replace(PLAN, factor=2.6)
    assert longer.recipe_of(CELL).epochs == 5
    assert longer.recipe_of(more(CELL, 0.01, 0.5)).epochs == 3
    assert dataclasses.replace(PLAN, factor=0.01).recipe_of(CELL).epochs == 1
    # The paper warms VGG16 up where it would not learn otherwise.
    step = dataclasses.replace(RECIPE, schedule="step", milestones=(1,), warmup_epochs=0.0)
    vgg = dataclasses.replace(PLAN, name="vgg16", recipe=step)
    cells = (CELL, CELL._replace(decay=1e-3), grid.Cell("uniform", 0.1, 0.0))
    assert [vgg.recipe_of(cell).warmup_epochs for cell in cells] == [0.0, 1.0, 1.0]


def test_pairs_are_independent():
    options = grid.PairOptions(seeds=(3, 1, 4, 2))
    assert grid.pairs_of(options) == [(3, 1), (4, 2)]
    assert grid.pairs_of(dataclasses.replace(options, quick=True)) == [(3, 1)]
    for seeds in ((0,), (0, 0), (0, 1, 2), (0, 1, 1, 2)):
        with pytest.raises(cli.UserError, match="different and come in pairs"):
            grid.pairs_of(grid.PairOptions(seeds=seeds))


def test_epochs_make_as_many_steps(digits):
    options = grid.LinearOptions()
    recipe = train.Recipe(epochs=4, batch_size=100)
    assert grid.epochs_factor(options, recipe, digits) == 300
    quick = dataclasses.replace(options, quick=True)
    assert grid.epochs_factor(quick, recipe, digits) * recipe.epochs == 1
    mnist = dataclasses.replace(digits, name="mnist")
    assert grid.epochs_factor(options, recipe, mnist) == 1


@pytest.mark.parametrize(
    "given, epochs", [({}, 20), ({"epochs": 3}, 3), ({"epochs": 3, "quick": True}, 1)]
)
def test_epochs_of_linear_networks(given, epochs, digits, monkeypatch):
    mnist = dataclasses.replace(digits, name="mnist")
    monkeypatch.setattr(grid.data, "load", lambda *args, **options: mnist)
    linear = importlib.import_module("residual_linear").EXPERIMENT
    setup = linear.prepare(grid.LinearOptions(**given), timing.Stopwatch())
    assert setup.record["recipe"]["epochs"] == epochs


def test_titles_and_names():
    images, rows = {"name": "digits", "fallback": True}, [{"pair": 0}, {"pair": 1}]
    record = records.Record(data=images, config={"quick": True}, rows=rows)
    title = grid.titled(record, "linear networks")
    assert title.startswith("MNIST NOT FOUND, SO: scikit-learn's 8x8 digits: linear networks")
    assert title.endswith(", mean of 2 pairs, QUICK, MEANS NOTHING")
    assert grid.stem(record) == ["digits", "quick"]
    record["config"]["quick"] = False
    assert grid.stem(record) == ["digits"] and "QUICK" not in grid.titled(record, "x")


# --------------------------------------------------------------------------------- what comes out


def test_rows_of_a_pair(digits, net, tmp_path):
    (rows,) = measured(digits, net, tmp_path, CELL)
    assert all(row["pair"] == 0 for row in rows) and not any("diverged" in row for row in rows)
    for name in ("direct", "matched"):
        own = [row for row in rows if row.get("merged") == name]
        assert len([row for row in own if "alpha" in row]) == 11
        assert len([row for row in own if "barrier" in row]) == 1
        followed = {row["epoch"]: row["distance"] for row in own if "distance" in row}
        assert list(followed) == [0, 1, 2, None]
        assert followed[2] == pytest.approx(followed[None], rel=1e-5)
    networks = [row for row in rows if "network" in row]
    assert [row["network"] for row in networks] == ["model 1", "model 2"]
    ends = [row for row in rows if row.get("merged") == "direct" and row.get("alpha") in (0.0, 1.0)]
    found = [row["accuracy"] for row in networks]
    assert found == pytest.approx([row["accuracy"] for row in ends])


def test_one_more_epoch_starts_from_the_other_cells_networks(digits):
    after = more(CELL, 1e-12, 0.0)
    pair = pair_of(digits)
    for before, then in zip(pair(CELL)[0], pair(after)[0], strict=True):
        same(before.variables, then.variables)
    # A call that goes on with the second cell trains the first one's again.
    for before, then in zip(pair(CELL)[0], pair_of(digits)(after)[0], strict=True):
        same(before.variables, then.variables)


def test_what_diverges_is_one_row(digits, net, tmp_path):
    wild = CELL._replace(rate=1e30)
    # One more epoch has nothing to start from.
    (row,), (after,) = measured(digits, net, tmp_path, wild, more(wild, 0.1, 0.0))
    assert row["diverged"] and after["diverged"] == row["diverged"]


# ------------------------------------------------------------------------------------ stopped runs


@contextlib.contextmanager
def stopped_at(calls, at):
    """Notes which epochs are trained; Ctrl-C is pressed in that of a number, None for never."""

    class Watch(logging.Handler):
        """Reads what training logs of an epoch before it is saved."""

        def emit(self, record):
            epoch = re.match(r"seed (\d+): \{'epoch': (\d+)", record.getMessage())
            if epoch is None:
                return
            if len(calls) == at:
                raise KeyboardInterrupt
            calls.append((int(epoch[1]), int(epoch[2]) - 1))

    logger, watch = logging.getLogger("vfjax.train"), Watch()
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(watch)
        logger.setLevel(logging.NOTSET)


@pytest.mark.slow
def test_a_pair_goes_on_in_training(digits, tmp_path):
    cell = CELL._replace(decay=1e-3)
    assert cell not in grid.sets_of(GRID)["initialisers"]
    calls: list = []
    with pytest.raises(KeyboardInterrupt), stopped_at(calls, 3):
        pair_of(digits, str(tmp_path))(cell)
    assert calls == [(0, 0), (0, 1), (1, 0)]
    folders = {path.name for path in (tmp_path / "mlp" / str(cell).replace(", ", "-")).iterdir()}
    assert folders == {"seed0", "seed1"}
    with stopped_at(calls := [], None):
        runs, snapshots = pair_of(digits, str(tmp_path))(cell)
    assert calls == [(1, 1)] and not snapshots
    whole, _ = pair_of(digits)(cell)
    for run, other in zip(runs, whole, strict=True):
        same(run.variables, other.variables)


@pytest.mark.slow
def test_retraining_goes_on_from_its_state(tmp_path, monkeypatch, capsys):
    """What Ctrl-C stopped in training is not trained again, and leaves no state in the end."""
    pfm = importlib.import_module("cifar_pfm")
    recipe = train.Recipe(epochs=3, batch_size=100)
    monkeypatch.setattr(training.train, "recipe_for", lambda *args, **options: recipe)

    def run(out, calls, at=None):
        options = ["--dataset", "digits", "--model", "digits-mlp", "--retrain", "--layers", "5"]
        with stopped_at(calls, at):
            pfm.main([*options, "--match", "none", "--out", str(tmp_path / out)])
        return tmp_path / out / "checkpoints-cpu"

    calls: list = []
    with pytest.raises(SystemExit, match="130"):
        run("stopped", calls, 2)
    assert calls == [(0, 0), (0, 1)]
    *_, line = capsys.readouterr().err.splitlines()
    assert "cifar_pfm.py: stopped before anything was measured" in line and "training" in line
    folder = tmp_path / "stopped" / "checkpoints-cpu"
    assert [path.name for path in (folder / ".training").iterdir()] == ["digits-mlp-seed0"]
    calls.clear()
    assert run("stopped", calls) == folder
    assert calls == [(0, 2), (1, 0), (1, 1), (1, 2)]
    names = ["digits-mlp-seed0", "digits-mlp-seed1"]
    assert sorted(path.name for path in folder.iterdir()) == names
    whole = run("whole", [])
    for name in names:
        same(*(checkpoint.load(place / name) for place in (folder, whole)))
        assert [row["epoch"] for row in checkpoint.card(folder / name)["history"]] == [1, 2, 3]
    # Finished ones are taken as they are.
    calls.clear()
    run("stopped", calls)
    assert not calls
