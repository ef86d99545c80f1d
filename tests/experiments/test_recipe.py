"""The experiment on training recipes, in its quickest form, on the digits."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vfjax import data, train

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
recipe = importlib.import_module("training_recipe")
common = importlib.import_module("_common")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    path = recipe.main(["--quick", "--dataset", "digits", "--out", str(folder)])
    return path, json.loads(path.read_text())


@pytest.fixture
def record(quick):
    return copy.deepcopy(quick[1])


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", train=200, test=100)


@pytest.fixture(scope="module")
def pair(digits):
    plan = recipe.Plan(
        "mlp", recipe.QUICK_MODEL, train.Recipe(epochs=2, batch_size=100), recipe.QUICK_GRID
    )
    net = recipe.traced(plan.model, digits)
    return recipe.Pair(plan, net, digits, (0, 1), None, common.Stopwatch())


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(quick):
    path, record = quick
    assert path.name == "training_recipe-digits-quick.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".png"]
    assert record["data"]["name"] == "digits" and record["data"]["train_images"] == 300
    assert record["seeds"]["pairs"] == [[0, 1]] and record["title"].endswith("MEANS NOTHING")
    assert {"data", "trace", "training", "matching", "interpolation"} <= set(record["seconds"])
    assert {"python", "vfjax", "jax"} <= set(record["versions"]) and record["date"]
    # Three rates, two decays (one of them both), two of the other initialisation, two ablations.
    assert len(record["cells"]) == len({cell["name"] for cell in record["cells"]}) == 8
    for cell in record["cells"]:
        (found,) = cell["pairs"]
        assert found["diverged"] is None and len(found["edge_accuracy"]) == 2
        rate, decay = cell["then"] or (cell["rate"], cell["decay"])
        used = (cell["recipe"]["learning_rate"], cell["recipe"]["weight_decay"])
        assert used == (rate, decay)
        assert cell["recipe"]["schedule"] == ("constant" if cell["then"] else "cosine")
        for match in recipe.MATCHES:
            assert len(found[match]["accuracy"]) == len(record["alphas"]) == 11
            summary = cell["summary"][f"{match}_barrier"]
            assert summary == {"mean": found[match]["barrier"], "std": 0.0}


def test_barriers_are_those_of_the_curves(quick):
    """By the definition in the paper and by that of its code, from accuracies alone."""
    alphas = np.array(quick[1]["alphas"])
    for cell in quick[1]["cells"]:
        for match in recipe.MATCHES:
            found = cell["pairs"][0][match]
            values = np.array(found["accuracy"])
            line = (1 - alphas) * values[0] + alphas * values[-1]
            assert found["barrier"] == pytest.approx((line - values).max(), abs=1e-9)
            reference = (values[0] + values[-1]) / 2 - values.min()
            assert found["reference_barrier"] == pytest.approx(reference, abs=1e-9)


def test_distances_are_followed_where_initialisations_are_compared(quick):
    record = quick[1]
    followed = [cell for cell in record["cells"] if "distances" in cell["pairs"][0]]
    kinds = {(cell["initialiser"], cell["rate"]) for cell in followed}
    assert kinds == {(name, r) for name in record["grid"]["initialisers"] for r in (0.01, 0.1)}
    for cell in followed:
        found = cell["pairs"][0]
        distances = found["distances"]
        assert distances["epoch"] == [0, 1]
        for match in recipe.MATCHES:
            assert distances[match][-1] == pytest.approx(found[match]["distance"], rel=1e-5)
        assert all(np.less(distances["matched"], distances["direct"]))


def test_figure_names_its_axes(record):
    figure = recipe.figure_of(record)
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
    assert figure.axes[0].get_xscale() == "log"
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["0.001", "0.01", "0.1"]


# -------------------------------------------------------------------------------------- one pair


def test_one_more_epoch_starts_from_the_networks_of_the_other_recipe(pair):
    first = recipe.Cell("uniform", 0.1, 0.003)
    before = pair.measure(first)
    after = pair.measure(dataclasses.replace(first, then=(1e-12, 0.0)))
    assert after["direct"]["accuracy"] == before["direct"]["accuracy"]
    assert after["direct"]["distance"] == pytest.approx(before["direct"]["distance"])
    moved = pair.measure(dataclasses.replace(first, then=(0.1, 0.0)))
    assert moved["direct"]["distance"] != pytest.approx(before["direct"]["distance"])


def test_runs_with_and_without_distances_are_the_same(pair):
    cell = recipe.Cell("uniform", 0.1, 0.003)
    assert pair.plan.tracked(cell)
    runs, distances = pair.train(cell)
    assert distances["epoch"] == [0, 1, 2]
    for seed, run in enumerate(runs):
        plain = train.fit(pair.plan.model, pair.plan.recipe_of(cell), pair.dataset, seed=seed)
        np.testing.assert_allclose(
            run.variables["params"]["head"]["kernel"],
            plain.variables["params"]["head"]["kernel"],
            atol=1e-5,
        )


def test_divergence_is_recorded_and_told(pair, record):
    cell = recipe.Cell("uniform", 1e30, 0.0)
    found = pair.measure(cell)
    assert "diverged in epoch 1" in found["diverged"] and "direct" not in found
    after = pair.measure(dataclasses.replace(cell, then=(0.01, 0.0)))
    assert "there are no networks of uniform, rate 1e+30" in after["diverged"]
    assert recipe.summary_of([found, after]) is None
    for entry in record["cells"]:
        if entry["rate"] == 0.1 and entry["decay"] == 0.003:
            entry["pairs"], entry["summary"] = [found], None
    assert "rate 0.1, decay 0.003, 1 of 1 pairs diverged" in common.told(*recipe.outcome(record))
    # No claim holds of what is not there.
    assert all("nan" not in text for holds, text in recipe.claims_of(record) if holds)
    assert "diverged" in str(recipe.table_of(record)[1])
    assert len(recipe.figure_of(record).axes) == 4


def test_pairs_that_diverged_do_not_count(quick):
    found = quick[1]["cells"][0]["pairs"][0]
    summary = recipe.summary_of([found, {"diverged": "so"}])
    assert (
        summary["pairs"] == 1
        and summary["matched_barrier"]["mean"] == (found["matched"]["barrier"])
    )


# ---------------------------------------------------------------------------------------- claims


def numbers(record, values):
    """Sets numbers of cells by (initialiser, rate, decay, whether retrained)."""
    for cell in record["cells"]:
        key = (cell["initialiser"], cell["rate"], cell["decay"], cell["then"] is not None)
        for name, value in values[key].items():
            cell["summary"][name] = {"mean": value, "std": 0.0}


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
    assert all(holds for holds, _ in recipe.claims_of(record)) and recipe.claims_of(record)
    assert "Unlike" not in common.told(*recipe.outcome(record))
    count = len(recipe.claims_of(record))
    rates, decays = (first, 0.1, 0.003, False), (first, 0.01, 0.015, False)
    after, after_decay = (first, 0.1, 0.003, True), (first, 0.01, 0.015, True)
    changes = {
        "goes from 30.0 points at rate 0.01 to 20.0 at 0.1 (33% less)": (rates, 0.2),
        "30.0 points at decay 0.003 (all at rate 0.01) to 15.0 at 0.015 (50% less)": (decays, 0.15),
        "from 10.0 to 25.0 points, that of 0.01 ": (after, 0.25),
        "from 2.0 to 25.0 points, that of 0.003 ": (after_decay, 0.25),
        "lose 25%, 32% and 10%": ((first, 0.001, 0.003, False), 0.2),
        "at rate 0.1 the matched barrier is": ((other, 0.1, 0.003, False), 0.9),
    }
    changes = {text: (key, {"matched_barrier": value}) for text, (key, value) in changes.items()}
    low, end = (first, 0.01, 0.003, False), (other, 0.1, 0.003, False)
    changes["direct, the barrier goes from 50.0 points at rate 0.01 to 70.0"] = (
        low,
        {"direct_barrier": 0.5},
    )
    changes["to 97.00%, those of 0.01 have 95.00%"] = after, {"edge_accuracy": 0.97}
    changes["to 98.00%, those of 0.003 have 95.00%"] = after_decay, {"edge_accuracy": 0.98}
    changes["at rate 0.1 the distance is"] = end, {"direct_distance": 25.0}
    for text, (key, change) in changes.items():
        numbers(record, values | {key: values[key] | change})
        claims = recipe.claims_of(record)
        wrong = [words for holds, words in claims if not holds]
        assert len(claims) == count and any(text in words for words in wrong), (text, wrong)
        assert text in common.told(*recipe.outcome(record)).partition("Unlike the paper: ")[2]
    keys = [(name, 0.01, 0.003, False) for name in (first, other)]
    swapped = values | {keys[0]: values[keys[1]], keys[1]: values[keys[0]]}
    numbers(record, swapped)
    wrong = common.told(*recipe.outcome(record)).partition("Unlike the paper: ")[2]
    assert (
        "at rate 0.01 the matched barrier is" in wrong and "at rate 0.01 the distance is" in wrong
    )


# ----------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", recipe.PAPER_MODELS)
def test_the_paper_s_grid(name, digits):
    cifar = dataclasses.replace(digits, name="cifar10")
    plan = recipe.paper_plan(name, None, cifar)
    cells = plan.cells()
    both = name.endswith("-ln")
    # Five rates and five decays, of which one is both; ablations of each; initialisations.
    assert len(cells) == 9 + 2 + 2 * both
    assert plan.recipe.epochs == 160 and plan.recipe.milestones == (32000, 48000)
    assert {cell.rate for cell in cells} == {0.01, 0.03, 0.05, 0.07, 0.1}
    for cell in cells:
        found = plan.recipe_of(cell)
        if cell.then is not None:
            assert (found.epochs, found.schedule, found.learning_rate) == (1, "constant", 0.01)
            assert found.crop == 4 and found.weight_decay == 1e-4
            continue
        assert (found.learning_rate, found.weight_decay) == (cell.rate, cell.decay)
        vgg = name.startswith("vgg16") and (cell.decay > 1e-4 or cell.initialiser == "uniform")
        assert found.warmup_epochs == float(vgg or name == "resnet20-ln")
        assert plan.tracked(cell) == (both and cell.decay == 1e-4 and cell.rate in (0.01, 0.1))


def test_mnist_of_the_paper_has_rates_alone(digits):
    plan = recipe.paper_plan("vgg16-ln", None, dataclasses.replace(digits, name="mnist"))
    kinds = [(cell.initialiser, cell.rate, cell.decay) for cell in plan.cells()]
    assert kinds[:3] == [("uniform", rate, 5e-4) for rate in (0.001, 0.01, 0.1)]
    assert [cell.then for cell in plan.cells()[3:]] == [(0.01, 5e-4)]


def test_the_digits_get_as_many_steps_as_mnist():
    args = recipe.parser().parse_args(["--dataset", "digits"])
    plan = recipe.plan_of(args, data.load("digits"))
    for cell in plan.cells():
        epochs = 1 if cell.then else recipe.CPU_RECIPE.epochs
        assert plan.recipe_of(cell).epochs * 11 == pytest.approx(epochs * 469, rel=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds must be different and come in pairs, got [0]"),
        (["--seeds", "x", "0"], "'x' is no seed, from 0 on"),
        (["--model", "vgg"], "'vgg' is no model"),
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
    config = record["config"] | {"quick": False, "seeds": list(recipe.SEEDS)}
    changes = [{}, {"seeds": [8, 9]}, {"preset": "paper"}, {"quick": True}]
    changes += [{"preset": "paper", "model": "vgg16-ln"}]
    names = [recipe.file_name(record | {"config": config | change}) for change in changes]
    assert names[0] == "training_recipe-digits" and len(set(names)) == len(names)


def test_a_fall_back_shows(record):
    record["data"]["fallback"] = True
    assert recipe.title_of(record).startswith("MNIST NOT FOUND, SO: scikit-learn's 8x8 digits")
    record["config"]["preset"] = "paper"
    assert recipe.title_of(record).startswith("CIFAR-10 NOT FOUND")
