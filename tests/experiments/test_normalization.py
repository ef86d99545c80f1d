"""The experiment on remedies along alpha, in its quickest form, on the digits; its records."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vfjax import checkpoint, data, diagnose

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
common = importlib.import_module("_common")
edges = importlib.import_module("_edges")
normalization = importlib.import_module("normalization")

METHODS = ["none", *normalization.REMEDIES]
MATCHES = list(normalization.MATCHES)
DEPTH = 6


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("normalization")
    options = ["--model", "digits-mlp", "--samples", "100", "--statistics", "300", "--seed", "3"]
    path = normalization.main(["--dataset", "digits", *options, "--out", str(folder)])
    return path, json.loads(path.read_text())


@pytest.fixture
def record(digits):
    return copy.deepcopy(digits[1])


@pytest.fixture
def as_in_paper(record):
    """The same with the paper's outcome."""
    for match in MATCHES:
        (run,) = record["runs"][match]
        repair = 0.5 if match == "weight" else 0.2
        values = dict(zip(METHODS, (0.3, repair, 0.8, 0.79, 0.78), strict=True))
        for name, value in values.items():
            run["curves"][name]["accuracy"][5] = value
        run["removal"]["k"] = 5
        run["removal"]["last"] = [0.3, 0.4, 0.5, 0.6, 0.7, 0.79, 0.8]
        run["removal"]["first"] = [0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.8]
    return record


def middle(run, name):
    return run["curves"][name]["accuracy"][5]


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "normalization-digits-digits-mlp-samples100-statistics300-seed3.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".png"]
    assert record["experiment"] == "normalization" and "--seed 3" in record["command"]
    counts = {key: record["data"][f"{key}_images"] for key in ("statistics", "held_out", "test")}
    assert counts == {"statistics": 300, "held_out": 260, "test": 100}
    assert record["seeds"] == {"edge_models": [0, 1], "weight_matching": [3]}
    stages = {"data", "trace", "checkpoints", "statistics of edge models"}
    parts = ("", ", biases removed", ", interpolation")
    stages |= {f"{match} matching{part}" for match in MATCHES for part in parts}
    assert set(record["seconds"]) == stages | {"total"}
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"] == "scikit-learn's 8x8 digits: digits-mlp, 100 test images"
    assert np.allclose(record["alphas"], np.linspace(0, 1, 11), atol=1e-12)
    assert [len(record["runs"][match]) for match in MATCHES] == [1, 1]
    assert [record["runs"][match][0]["seed"] for match in MATCHES] == [3, None]


@pytest.mark.parametrize("match", MATCHES)
def test_curves_and_their_barriers(record, match):
    (run,) = record["runs"][match]
    assert list(run["curves"]) == METHODS and run["matching"]["converged"]
    ends = record["edge_accuracy"]
    for name, curve in run["curves"].items():
        accuracy = curve["accuracy"]
        assert len(accuracy) == len(curve["loss"]) == 11 and 0 <= min(accuracy) <= 1
        barrier = diagnose.barrier(record["alphas"], accuracy, ends=ends)
        assert curve["barrier"] == pytest.approx(barrier)
        assert curve["reference_barrier"] == pytest.approx(np.mean(ends) - min(accuracy))
        if name in ("none", "bias_calibration"):
            assert [accuracy[0], accuracy[-1]] == ends
    # The two matchings are not the same.
    assert record["runs"]["weight"][0]["curves"] != record["runs"]["activation"][0]["curves"]
    assert middle(run, "repair") > middle(run, "none") + 0.01


@pytest.mark.parametrize("match", MATCHES)
def test_biases_removed(record, match):
    """None removed is none removed; all removed from either end is the same network."""
    (run,) = record["runs"][match]
    found = run["removal"]
    assert {len(found[key]) for key in ("held_out", "first", "last")} == {DEPTH + 1}
    assert found["first"][0] == found["last"][0] == middle(run, "none")
    assert found["first"][-1] == found["last"][-1] != found["last"][0]
    k = found["k"]
    assert k == found["held_out"].index(max(found["held_out"]))
    assert middle(run, "bias_removal") == found["last"][k]


def test_no_image_serves_twice():
    dataset = data.load("digits")

    def numbered(count):
        images = np.arange(count, dtype=np.int32)[:, None]
        return dataclasses.replace(
            dataset, train_images=images, train_labels=np.zeros(count, np.int32)
        )

    # Numbers asked for, and held-out images given: a fifth where there are not enough for both.
    for count, statistics, held_out, given in (
        (100, 50, 30, 30),
        (100, 50, 50, 50),
        (100, 500, 200, 20),
        (100, 95, 10, 10),
    ):
        args = SimpleNamespace(statistics=statistics, held_out=held_out, samples=7)
        found = normalization.images_of(args, numbered(count))
        first, last = (set(b.images[:, 0]) for b in (found.statistics, found.held_out))
        assert not first & last and max(first) < min(last) and max(last) == count - 1
        assert len(last) == given
        assert len(first) == min(statistics, count - len(last))
        np.testing.assert_array_equal(found.test.images, dataset.test_images[:7])


def test_k_does_not_depend_on_test_images(digits):
    """With other labels of test images k stays, with other labels of held-out images it goes."""
    args = SimpleNamespace(statistics=300, held_out=260, samples=100, model=("digits-mlp", None))
    args.dataset, args.preset = "digits", "cpu"
    dataset = data.load("digits")
    images = normalization.images_of(args, dataset)
    arch = edges.architecture(args, dataset)
    net = edges.trace(arch, dataset)
    folders = edges.shipped(args, arch, 2)
    trees = [checkpoint.load(folder) for folder in folders]

    def wrong(batches):
        labels = (batches.labels + 1) % 10
        return data.Batches(batches.images, labels, batches.mean, batches.std, batches.batch_size)

    found = normalization.removal_of(net, trees, images)
    test = dataclasses.replace(images, test=wrong(images.test))
    kept = dataclasses.replace(images, held_out=wrong(images.held_out))
    other = normalization.removal_of(net, trees, test)
    assert other["k"] == found["k"] > 0 and other["held_out"] == found["held_out"]
    assert other["last"] != found["last"] and other["first"] != found["first"]
    assert normalization.removal_of(net, trees, kept)["k"] != found["k"]


def test_the_smallest_of_equal_k(monkeypatch):
    curves = {"last": [0.5, 0.5, 0.4], "first": [0.5, 0.1, 0.4]}
    monkeypatch.setattr(normalization, "removals", lambda net, midpoint, images, side: curves[side])
    monkeypatch.setattr(normalization.merge, "interpolate", lambda trees: trees)
    monkeypatch.setattr(normalization.merge, "as_merged", lambda net, tree: tree)
    images = normalization.Images(None, None, None)
    found = normalization.removal_of(SimpleNamespace(norms=()), [], images)
    assert found == curves | {"held_out": curves["last"], "k": 0}
    assert normalization.removal_of(SimpleNamespace(norms=("bn",)), [], images) is None


# ------------------------------------------------------------------------------- what is said of it


def test_the_outcome_of_the_paper(as_in_paper):
    claims = normalization.claims_of(as_in_paper)
    assert len(claims) == 15 and all(holds for holds, _ in claims)
    found = common.told(*normalization.outcome(as_in_paper))
    assert "Unlike" not in found
    assert "with weight matching none 30.0, REPAIR 50.0, RESCALE 80.0, bias removal 79.0" in found
    assert "REPAIR is the worst of four" in found and "up to 2.0 points apart" in found


def set_middle(name, value):
    def change(run):
        run["curves"][name]["accuracy"][5] = value

    return change


def set_removal(**values):
    return lambda run: run["removal"].update(values)


@pytest.mark.parametrize(
    ("match", "change", "flipped", "said"),
    [
        ("weight", set_middle("repair", 0.785), 0, "REPAIR is the third of four"),
        ("weight", set_middle("repair", 0.9), 0, "REPAIR is the best of four"),
        ("weight", set_middle("bias_calibration", 0.7), 1, "up to 10.0 points apart"),
        ("weight", set_middle("repair", 0.2), 2, "REPAIR gives 20.0, none 30.0"),
        ("activation", set_middle("repair", 0.35), 6, "REPAIR 35.0 stands against none 30.0"),
        ("activation", set_middle("bias_removal", 0.85), 7, "bias removal is the best"),
        (
            "activation",
            set_middle("bias_calibration", 0.7),
            8,
            "bias cal. 70.0 stands against RESCALE 80.0",
        ),
        ("weight", set_removal(first=[0.3] * 7), 9, "give 30.0 on average, none removed 30.0"),
        ("weight", set_removal(k=2), 10, "held-out images choose k = 2"),
        (
            "weight",
            set_removal(last=[0.3] * 5 + [0.6, 0.8]),
            11,
            "75% of the 80.0 that the best k, 6",
        ),
        ("activation", set_removal(first=[0.3] * 7), 12, "with activation matching, 1 to 5"),
        ("activation", set_removal(k=0), 13, "held-out images choose k = 0"),
        ("activation", set_removal(last=[0.9] + [0.8] * 6), 14, "89% of the 90.0"),
    ],
)
def test_each_claim_can_fail(as_in_paper, match, change, flipped, said):
    change(as_in_paper["runs"][match][0])
    claims = normalization.claims_of(as_in_paper)
    assert [k for k, (holds, _) in enumerate(claims) if not holds] == [flipped]
    told = common.told(*normalization.outcome(as_in_paper))
    assert said in told.partition("Unlike the paper: ")[2]


def test_networks_with_batchnorm(record):
    """They have RESET alone, and nothing is said of biases."""
    for (run,) in record["runs"].values():
        run["removal"] = None
        run["curves"] = {"none": run["curves"]["none"], "reset": run["curves"]["repair"]}
    assert [holds for holds, _ in normalization.claims_of(record)] == [None, None]
    found = common.told(*normalization.outcome(record))
    assert "with weight matching RESET gives " in found and "bias" not in found
    assert "Not in the paper" in found and "nlike" not in found
    assert len(normalization.figure_of(record).axes) == 2
    assert [row[0] for row in normalization.table_of(record)[1]][:2] == [
        "weight: none",
        "weight: RESET",
    ]


def test_several_runs_of_weight_matching(record):
    (run,) = record["runs"]["weight"]
    other = copy.deepcopy(run)
    run["curves"]["none"]["accuracy"][5], other["curves"]["none"]["accuracy"][5] = 0.5, 0.52
    run["removal"]["k"], other["removal"]["k"] = 6, 5
    record["runs"]["weight"].append(other)
    assert normalization.middles(record, "weight")["none"] == pytest.approx(0.51)
    rows = dict((row[0], row[1]) for row in normalization.table_of(record)[1])
    assert rows["weight: none"] == "51.00 ± 1.41" and "weight: bias removal (k = 5, 6)" in rows
    assert normalization.title_of(record).endswith("mean of 2 runs of weight matching")
    weight, activation, _ = normalization.figure_of(record).axes
    assert [axes.containers[0].has_yerr for axes in (weight, activation)] == [True, False]


def test_figure_names_its_axes(record):
    axes = normalization.figure_of(record).axes
    titles = ["weight matching", "activation matching", "biases removed at the midpoint"]
    assert [a.get_title() for a in axes] == titles
    assert all(a.get_ylabel() == "test accuracy (%)" for a in axes)
    assert axes[0].get_xlabel() == "alpha, weight of the second network"
    assert axes[0].get_xlim()[1] < 1.1 and len(axes[2].containers) == 4
    for curve, name in zip(axes[0].containers, METHODS, strict=True):
        expected = record["runs"]["weight"][0]["curves"][name]["accuracy"]
        np.testing.assert_allclose(curve.lines[0].get_ydata(), 100 * np.array(expected))


def test_file_name_has_what_is_not_default(record):
    config = record["config"]
    config |= normalization.DEFAULTS["cpu"] | {"seed": 0}
    assert normalization.file_name(record) == "normalization-digits-digits-mlp"
    config |= {"held_out": 7, "runs": 2, "width": 0.5, "retrain": True}
    expected = "normalization-digits-digits-mlp-w0.5-heldout7-runs2-retrained"
    assert normalization.file_name(record) == expected
    config |= normalization.DEFAULTS["paper"] | {"preset": "paper"}
    assert normalization.file_name(record).endswith("w0.5-paper-retrained")


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is no number of images, from 1 on"),
        (["--held-out", "all"], "'all' is no number of images"),
        (["--runs", "0"], "'0' is no number of runs"),
        (["--seed", "-1"], "'-1' is no seed"),
        (["--model", "vgg99"], "'vgg99' is no model"),
        (["--model", "vgg16", "--dataset", "digits"], "--model vgg16 is not for scikit-learn's"),
        (["--preset", "paper", "--dataset", "digits"], "give --retrain, too"),
        (
            ["--model", "digits-conv-w0.5", "--dataset", "digits"],
            "2 models digits-conv-w0.5-seed* are needed in checkpoints/, 0 found",
        ),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        normalization.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
