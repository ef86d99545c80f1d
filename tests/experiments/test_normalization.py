"""The experiment on remedies along alpha, in its quickest form, on the digits; its records."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from vfjax import data, diagnose

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, cli, edges, records = (
    importlib.import_module(f"kit.{name}") for name in ("claims", "cli", "edges", "records")
)
normalization = importlib.import_module("normalization")

RUN = normalization.EXPERIMENT
AS, UNLIKE, OPEN, NEW = claims.VERDICTS
METHODS = ["none", *normalization.REMEDIES]
MATCHES = list(normalization.MATCHES)
DEPTH = 6


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("normalization")
    options = ["--model", "digits-mlp", "--samples", "100", "--statistics", "300", "--seed", "3"]
    path = normalization.main(["--dataset", "digits", *options, "--out", str(folder)])
    return path, records.read(path)


@pytest.fixture
def record(digits):
    return copy.deepcopy(digits[1])


def set_middle(match, remedy, value):
    """Changes a record: the accuracy at the midpoint."""
    return lambda record: curve(record, match, remedy)[5].update(accuracy=value)


def set_removed(record, k):
    """Changes a record: how many biases held-out images choose."""
    for row in record.rows.where(match="weight", remedy="bias_removal", side=None):
        row["removed"] = k


def set_removal(match, images, side, values):
    """Changes a record: accuracies by k."""

    def change(record):
        found = record.rows.where(match=match, images=images, side=side)
        for row, value in zip(found, values, strict=True):
            row["accuracy"] = value

    return change


@pytest.fixture
def as_in_paper(record):
    """The same with the paper's outcome, on many images."""
    record["data"] = record["data"] | {"test_images": 10_000, "held_out_images": 10_000}
    for match in MATCHES:
        repair = 0.5 if match == "weight" else 0.2
        for name, value in zip(METHODS, (0.3, repair, 0.8, 0.77, 0.76), strict=True):
            set_middle(match, name, value)(record)
        last = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.79]
        set_removal(match, "held_out", "last", last)(record)
        set_removal(match, "test", "last", last)(record)
        set_removal(match, "test", "first", [0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.8])(record)
    return record


def curve(record, match, remedy):
    """Its rows, by alpha."""
    rows = record.rows.where(match=match, remedy=remedy, side=None)
    return [row for row in rows if row.get("alpha") is not None]


def about(record, match, remedy):
    """The row of its barriers."""
    (found,) = (r for r in record.rows.where(match=match, remedy=remedy) if "barrier" in r)
    return found


def middle(record, match, remedy):
    return curve(record, match, remedy)[5]["accuracy"]


def removed(record, match, images, side):
    return record.rows.where(match=match, images=images, side=side).values("accuracy")


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "normalization-digits-digits-mlp-samples100-statistics300-seed3.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".png", ".md"}
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
    alphas = record.rows.distinct("alpha")
    assert np.allclose(alphas, np.linspace(0, 1, 11), atol=1e-12)
    notes = record.notes("matching")
    assert [(note["match"], note["seed"]) for note in notes] == [
        ("weight", 3),
        ("activation", None),
    ]


@pytest.mark.parametrize("match", MATCHES)
def test_curves_and_their_barriers(record, match):
    rows = record.rows
    assert rows.where(match=match, side=None).distinct("remedy") == METHODS
    assert record.notes("matching").only(match=match)["converged"]
    ends = [rows.mean(network=name, match=match) for name in ("model 1", "model 2")]
    for name in METHODS:
        found = curve(record, match, name)
        accuracy = [row["accuracy"] for row in found]
        assert len(found) == 11 and 0 <= min(accuracy) <= 1
        assert all(row["loss"] is not None for row in found)
        barrier = diagnose.barrier([row["alpha"] for row in found], accuracy, ends=ends)
        kept = about(record, match, name)
        assert kept["barrier"] == pytest.approx(barrier) and kept["lowest"] == min(accuracy)
        assert kept["reference_barrier"] == pytest.approx(np.mean(ends) - min(accuracy))
        if name in ("none", "bias_calibration"):
            assert [accuracy[0], accuracy[-1]] == ends
    # The two matchings are not the same.
    both = [[row["accuracy"] for row in curve(record, match, "none")] for match in MATCHES]
    assert both[0] != both[1]
    assert middle(record, match, "repair") > middle(record, match, "none") + 0.01


@pytest.mark.parametrize("match", MATCHES)
def test_biases_removed(record, match):
    """None removed is none removed; all removed from either end is the same network."""
    held_out = removed(record, match, "held_out", "last")
    first, last = (removed(record, match, "test", side) for side in ("first", "last"))
    assert {len(found) for found in (held_out, first, last)} == {DEPTH + 1}
    assert first[0] == last[0] == middle(record, match, "none")
    assert first[-1] == last[-1] != last[0]
    (k,) = record.rows.distinct("removed", match=match)
    assert k == held_out.index(max(held_out))
    assert curve(record, match, "bias_removal")[0]["removed"] == k
    assert middle(record, match, "bias_removal") == last[k]


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
        found = edges.images_of(numbered(count), statistics, held_out, 7)
        first, last = (set(b.images[:, 0]) for b in (found.statistics, found.held_out))
        assert not first & last and max(first) < min(last) and max(last) == count - 1
        assert len(last) == given
        assert len(first) == min(statistics, count - len(last))
        np.testing.assert_array_equal(found.test.images, dataset.test_images[:7])


def test_k_does_not_depend_on_test_images(digits, tmp_path, monkeypatch):
    """With other labels of test images k stays, with other labels of held-out images it goes."""

    def measured(wrong):
        """Of a run on images of which some have wrong labels."""

        def images_of(*counts):
            found = given(*counts)
            parts = {
                name: data.Batches(b.images, (b.labels + 1) % 10, b.mean, b.std, b.batch_size)
                for name in wrong
                for b in [getattr(found, name)]
            }
            return dataclasses.replace(found, **parts)

        monkeypatch.setattr(edges, "images_of", images_of)
        options = ["--model", "digits-mlp", "--samples", "100", "--statistics", "300"]
        out = str(tmp_path / "-".join(wrong))
        options += ["--seed", "3", "--dataset", "digits", "--out", out]
        return records.read(normalization.main(options))

    given, found = edges.images_of, digits[1]
    test, kept = measured(["test"]), measured(["held_out"])
    (k,) = found.rows.distinct("removed", match="activation")
    held_out = ("activation", "held_out", "last")
    assert test.rows.distinct("removed", match="activation") == [k] and k > 0
    assert removed(test, *held_out) == removed(found, *held_out)
    for side in ("last", "first"):
        other = ("activation", "test", side)
        assert removed(test, *other) != removed(found, *other)
    assert kept.rows.distinct("removed", match="activation") != [k]


def test_the_smallest_of_equal_k():
    rows = records.Rows(
        {"match": "weight", "seed": 0, "images": images, "k": k, "accuracy": value}
        for images, values in (("held_out", [0.5, 0.5, 0.4]), ("test", [0.1, 0.9, 0.4]))
        for k, value in enumerate(values)
    )
    assert normalization.chosen(rows, "weight", 0) == 0
    rows[0]["accuracy"] = 0.45
    assert normalization.chosen(rows, "weight", 0) == 1


# ------------------------------------------------------------------------------- what is said of it


def decided(record):
    return claims.decided(RUN.claims, record)


def test_the_outcome_of_the_paper(as_in_paper):
    found = decided(as_in_paper)
    assert len(found) == 15 and {row["verdict"] for row in found} == {AS}
    said = [row["here"] for row in found]
    assert said[0] == "RESCALE 80.0, bias removal 77.0, bias cal. 76.0, REPAIR 50.0"
    assert said[2] == "REPAIR 50.0, no remedy 30.0"


@pytest.mark.parametrize(
    ("change", "flipped", "said"),
    [
        (set_middle("weight", "repair", 0.78), 0, "RESCALE 80.0, REPAIR 78.0, bias removal"),
        (set_middle("weight", "repair", 0.9), 0, "REPAIR 90.0, RESCALE 80.0"),
        (set_middle("weight", "bias_calibration", 0.7), 1, "bias removal 77.0, bias cal. 70.0"),
        (set_middle("weight", "repair", 0.22), 2, "REPAIR 22.0, no remedy 30.0"),
        (set_middle("activation", "repair", 0.35), 6, "no remedy 30.0, REPAIR 35.0"),
        (set_middle("activation", "bias_removal", 0.85), 7, "bias removal 85.0, RESCALE 80.0"),
        (set_middle("activation", "bias_calibration", 0.7), 8, "bias cal. 70.0, RESCALE 80.0"),
        (
            set_removal("weight", "test", "first", [0.3] * 7),
            9,
            "none removed 30.0, 1 to 5 of the first biases removed, on average 30.0",
        ),
        (
            set_removal("weight", "held_out", "last", [0.3, 0.4, 0.9, 0.6, 0.7, 0.79, 0.8]),
            10,
            "5 or 6 removed 80.0, any number 90.0",
        ),
        (
            set_removal("weight", "test", "last", [0.3] * 5 + [0.6, 0.8]),
            11,
            "5 removed 60.0, 95% of the best 76.0",
        ),
        (set_removal("activation", "test", "first", [0.3] * 7), 12, "none removed 30.0"),
        (
            set_removal("activation", "held_out", "last", [0.9, 0.4, 0.5, 0.6, 0.7, 0.79, 0.8]),
            13,
            "5 or 6 removed 80.0, any number 90.0",
        ),
        (
            set_removal("activation", "test", "last", [0.9] + [0.8] * 6),
            14,
            "5 removed 80.0, 95% of the best 85.5",
        ),
    ],
)
def test_each_claim_can_fail(as_in_paper, change, flipped, said):
    change(as_in_paper)
    found = decided(as_in_paper)
    assert [k for k, row in enumerate(found) if row["verdict"] != AS] == [flipped]
    assert found[flipped]["verdict"] == UNLIKE and said in found[flipped]["here"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (set_middle("weight", "repair", 0.765), 0),
        (set_middle("weight", "bias_calibration", 0.745), 1),
        (set_middle("weight", "repair", 0.305), 2),
        (set_middle("activation", "bias_removal", 0.805), 7),
        (
            set_removal("weight", "held_out", "last", [0.3, 0.4, 0.805, 0.6, 0.7, 0.79, 0.8]),
            10,
        ),
        (set_removal("weight", "test", "last", [0.7] * 5 + [0.755, 0.8]), 11),
        # What has vanished shows nothing.
        (set_removal("activation", "test", "first", [0.14] + [0.15] * 6), 12),
    ],
)
def test_what_noise_may_have_made_is_undecided(as_in_paper, change, place):
    change(as_in_paper)
    assert decided(as_in_paper)[place]["verdict"] == OPEN


def test_networks_with_batchnorm(record):
    """They have RESET alone, and nothing is said of biases."""
    kept = [r for r in record["rows"] if r.get("remedy") in (None, "none", "repair")]
    for row in kept:
        row["remedy"] = "reset" if row.get("remedy") == "repair" else row.get("remedy")
    found = RUN.derived(record | {"rows": kept})
    assert [row["verdict"] for row in found["claims"]] == [NEW, NEW]
    said = " ".join(row["here"] + row["claim"] for row in found["claims"])
    assert "RESET" in said and "bias" not in said + found["finding"]
    assert len(normalization.figure_of(found).axes) == 2
    (table,) = normalization.tables_of(found)
    assert [line[0] for line in table.lines][:2] == ["weight: no remedy", "weight: RESET"]


def test_several_runs_of_weight_matching(record):
    other = [copy.deepcopy(row) for row in record.rows.where(match="weight")]
    for row in other:
        row["seed"] = 4
    set_middle("weight", "none", 0.5)(record)
    set_removed(record, 6)
    found = records.Record(record | {"rows": other})
    set_middle("weight", "none", 0.52)(found)
    set_removed(found, 5)
    record["rows"] = [*record["rows"], *other]
    record["config"] = record["config"] | {"runs": 2}
    assert normalization.middle("weight", "none").of(record) == pytest.approx(0.51)
    (table,) = normalization.tables_of(record)
    rows = {line[0]: line[1] for line in table.lines}
    assert rows["weight: no remedy"] == "51.00 ± 1.41"
    assert "weight: bias removal (k = 5, 6)" in rows
    assert normalization.title_of(record).endswith("mean of 2 runs of weight matching")
    figure = normalization.figure_of(record)
    assert [a.containers[0].has_yerr for a in figure.axes[:2]] == [True, False]
    said = [text.get_text() for text in figure.texts]
    assert "Bars: standard deviation over 2 runs of weight matching." in said


def test_figure_names_its_axes(record):
    axes = normalization.figure_of(record).axes
    titles = ["weight matching", "activation matching", "biases removed at the midpoint"]
    assert [a.get_title() for a in axes] == titles
    assert all(a.get_ylabel() == "test accuracy (%)" for a in axes)
    assert axes[0].get_xlabel() == "alpha, weight of the second network"
    assert axes[0].get_xlim()[1] < 1.1 and len(axes[2].containers) == 4
    for drawn, name in zip(axes[0].containers, METHODS, strict=True):
        expected = [100 * row["accuracy"] for row in curve(record, "weight", name)]
        np.testing.assert_allclose(drawn.lines[0].get_ydata(), expected)


def test_file_name_has_what_is_not_default(record):
    config = record["config"]
    usual = cli.defaults(normalization.Config, {"preset": "cpu"})
    config |= usual | {"model": "digits-mlp", "width": 1}
    assert RUN.file_name(record) == "normalization-digits-digits-mlp"
    config |= {"held_out": 7, "runs": 2, "width": 0.5, "retrain": True}
    expected = "normalization-digits-digits-mlp-w0.5-heldout7-runs2-retrained"
    assert RUN.file_name(record) == expected
    paper = cli.defaults(normalization.Config, {"preset": "paper"})
    config |= {name: paper[name] for name in ("samples", "statistics", "held_out", "runs")}
    config |= {"preset": "paper"}
    assert RUN.file_name(record).endswith("w0.5-paper-retrained")


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is not a number of images, from 1 on"),
        (["--held-out", "all"], "'all' is not a number of images"),
        (["--runs", "0"], "'0' is not a number of runs"),
        (["--seed", "-1"], "'-1' is not a seed"),
        (["--model", "vgg99"], "'vgg99' is not a model"),
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
