"""The experiments on pruned networks, in their quickest form, on the digits; their records."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vfjax import data

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
common = importlib.import_module("_common")
shared = importlib.import_module("_pruning")
pruning = importlib.import_module("pruning")
update = importlib.import_module("update_readme")

METHODS = list(pruning.METHODS)
SPARSITIES = [10, 50, 80, 90]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruning")
    options = ["--model", "digits-mlp", "--sparsities", *map(str, reversed(SPARSITIES))]
    options += ["--samples", "all", "64", "--test", "100", "--statistics", "200"]
    options += ["--gradients", "30", "--out", str(folder)]
    path = pruning.main(["--dataset", "digits", *options])
    return path, json.loads(path.read_text())


@pytest.fixture
def record(digits):
    """With the paper's outcome."""
    record = copy.deepcopy(digits[1])
    for found in record["methods"].values():
        found["none"] = [[0.9, 0.8, 0.3, 0.1]] * 2
        found["renormalised"] = [[0.9, 0.85, 0.8, 0.5]] * 2
        found["error"] = [[0.01] * 4] * 2
    record["unpruned"] = {"none": [0.9] * 2, "renormalised": [0.89] * 2, "error": [0.01] * 2}
    record["model"]["name"] = "resnet20"
    few, all_images = [[0.78, 0.5]] * 2, [[0.8, 0.5]] * 2
    for method in record["samples"]:
        record["samples"][method] = {"64": few, "all": all_images}
    return record


# ------------------------------------------------------------------------------ accuracy, sparsity


def test_record_is_complete(digits):
    path, record = digits
    name = "pruning-digits-digits-mlp-at10+50+80+90-samples64+all-test100-statistics200"
    assert path.name == f"{name}-gradients30.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert record["remedy"] == "repair" and record["sparsities"] == SPARSITIES
    assert record["seeds"] == {"edge_models": [0, 1]} and list(record["methods"]) == METHODS
    assert list(record["samples"]) == ["magnitude", "magnitude-layer"]
    assert record["samples_sparsities"] == [80, 90]
    for found in record["methods"].values():
        assert {key: np.shape(rows) for key, rows in found.items()} == {
            "none": (2, 4),
            "renormalised": (2, 4),
            "error": (2, 4),
        }
    for found in record["samples"].values():
        assert {label: np.shape(rows) for label, rows in found.items()} == {
            "64": (2, 2),
            "all": (2, 2),
        }
    assert record["data"]["test_images"] == 100 and record["data"]["statistics_images"] == 200
    assert record["data"]["augmented"] is False
    assert {"unpruned", "woodfisher, scores", "wanda", "64 images", "total"} <= set(
        record["seconds"]
    )


def test_what_the_paper_found(digits):
    """Little is lost where little is pruned, much where much is, and much of that comes back."""
    _, record = digits
    level = np.mean(record["unpruned"]["none"])
    assert abs(level - np.mean(record["unpruned"]["renormalised"])) < 0.02
    for method in METHODS:
        plain = pruning.values(record, method, "none").mean(0)
        assert plain[0] > level - 0.05 and plain[-1] < plain[0]
        assert pruning.gains(record, method).mean(0).min() > -0.05
    assert max(pruning.gains(record, method).mean(0)[-1] for method in METHODS) > 0.1


def test_the_outcome_of_the_paper(record):
    # All but what it has for ConvNeXt alone.
    verdicts = [holds for holds, _ in pruning.claims_of(record)]
    assert verdicts == [True] * 5 + [None] + [True] * 3
    said = common.told(*pruning.outcome(record))
    assert "Unlike" not in said and "Not in the paper: with Wanda per row" in said
    assert "REPAIR takes accuracy from 30.0 to 80.0 at 80% and from 10.0 to 50.0 at 90%" in said
    assert "behind by more than chance explains in 0 of 21 cases" in said
    assert "(the lowest: -1.0 from 90.0 with nothing pruned, in points)" in said
    assert "all images bring 45.0 points on average: 64 bring 98% of what all do" in said


def first_of(record, key, values):
    record["methods"]["fisher"][key] = [values] * 2


@pytest.mark.parametrize(
    "change, flipped, said",
    [
        (
            lambda r: first_of(r, "renormalised", [0.7, 0.85, 0.8, 0.5]),
            0,
            "in 1 of 21 cases, of each method and sparsity and nothing pruned: -20.0 from 90.0",
        ),
        # Three points in all of the cases below HALF are no chance, half a point may be.
        (
            lambda r: r["unpruned"].update(renormalised=[0.87] * 2),
            0,
            "-3.0 from 90.0 with nothing pruned points",
        ),
        (
            lambda r: first_of(r, "renormalised", [0.9, 0.85, 0.8, 0.15]),
            3,
            "diagonal Fisher REPAIR takes accuracy from 30.0 to 80.0 at 80%",
        ),
        (
            lambda r: first_of(r, "none", [0.9, 0.6, 0.75, 0.4]),
            3,
            "diagonal Fisher REPAIR takes accuracy from 75.0 to 80.0 at 80%",
        ),
        (lambda r: first_of(r, "none", [0.2, 0.8, 0.3, 0.1]), 6, "10% (diagonal Fisher, +70.0)"),
        (
            lambda r: r["samples"]["magnitude-layer"].update({"64": [[0.5, 0.3]] * 2}),
            8,
            "64 bring 44%",
        ),
    ],
)
def test_each_claim_can_fail(record, change, flipped, said):
    change(record)
    claims = pruning.claims_of(record)
    failed = [k for k, (holds, _) in enumerate(claims) if holds is False]
    assert flipped in failed and len(failed) <= 2
    assert said in common.told(*pruning.outcome(record)).partition("Unlike the paper: ")[2]


def test_no_gain_is_asked_for_where_nothing_is_lost(record):
    first_of(record, "none", [0.9, 0.9, 0.85, 0.1])
    first_of(record, "renormalised", [0.9, 0.9, 0.86, 0.5])
    assert pruning.claims_of(record)[3] == (
        True,
        "with diagonal Fisher REPAIR takes accuracy from 10.0 to 50.0 at 90%",
    )


def test_figure_and_tables(digits):
    _, record = digits
    axes = pruning.figure_of(record).axes
    assert [a.get_title() for a in axes] == [
        "as pruned",
        "with REPAIR, 200 images",
        "gained",
        "global magnitude, images for REPAIR",
        "layerwise magnitude, images for REPAIR",
    ]
    assert [a.get_xlabel() for a in axes] == ["sparsity (%)"] * 3 + ["training images"] * 2
    header, rows = pruning.table_of(record, "renormalised")
    assert len(header) == 6 and len(rows) == 4 and "±" in rows[0][1]
    header, rows = pruning.samples_table_of(record, "magnitude")
    assert header[1:] == ["64 images", "all images"] and len(rows) == 2


def test_file_name_has_what_is_not_default(record):
    config = record["config"]
    config |= pruning.DEFAULTS["cpu"] | {"gradients": pruning.GRADIENTS}
    config |= {"sparsities": list(pruning.SPARSITIES), "samples": ["64", "128", "256", "all"]}
    assert pruning.file_name(record) == "pruning-digits-digits-mlp"
    config |= {"methods": ["wanda"], "samples": [], "renorm": "rescale", "plain": True, "runs": 1}
    assert pruning.file_name(record) == "pruning-digits-digits-mlp-wanda-rescale-plain-runs1"


# ----------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize(
    "name, norms, remedy",
    [
        ("vgg16", (), "rescale"),
        ("vgg16-ln", (), "repair"),
        ("vgg16-bn", ("bn",), "reset"),
        ("resnet20", ("bn",), "reset"),
        ("resnet20-plain", (), "repair"),
        ("resnet20-ln", (), "repair"),
    ],
)
def test_remedy_by_network(name, norms, remedy):
    net = SimpleNamespace(norms=norms)
    assert shared.remedy_of(SimpleNamespace(renorm="auto"), net, name) == remedy
    assert shared.remedy_of(SimpleNamespace(renorm="rescale"), net, name) == "rescale"


def test_statistics_are_of_images_as_in_training():
    images = np.random.default_rng(0).integers(1, 256, (40, 8, 8, 3), dtype=np.uint8)
    batches = data.Batches(images, np.arange(40, dtype=np.int32), (0.5,) * 3, (0.2,) * 3)

    def found(crop, flip, plain=False):
        models = SimpleNamespace(
            cards=[{"recipe": {"crop": crop, "flip": flip}}], batches=lambda split, count: batches
        )
        return shared.statistics_of(SimpleNamespace(plain=plain), models)

    assert found(0, False) is batches and found(4, True, plain=True) is batches
    moved = found(2, True)
    assert moved.images.shape == images.shape and (moved.images == 0).any()
    np.testing.assert_array_equal(moved.labels, batches.labels)
    np.testing.assert_array_equal(moved.images, found(2, True).images)


# ------------------------------------------------------------------------------ records, options


@pytest.mark.parametrize("script", [pruning])
def test_head_says_what_came_out(script):
    source = Path(script.__file__).read_text(encoding="utf-8")
    assert update.headed(source, script) == source
    for name in update.PRUNING[script]:
        shipped = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
        assert shipped["data"]["fallback"] is False and shipped["data"]["augmented"] is True
        assert script.file_name(shipped) == name


@pytest.mark.parametrize("module", [pruning, shared])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (pruning, ["--sparsities", "0"], "'0' is no percentage from 1 to 100"),
        (pruning, ["--samples", "some"], "'some' is no number of images, from 1 on"),
        (pruning, ["--methods", "random"], "invalid choice: 'random'"),
        (pruning, ["--model", "vgg16", "--dataset", "digits"], "--model vgg16 is not for"),
        (pruning, ["--dataset", "digits", "--samples", "5000"], "--samples 5000: there are 1,"),
        (pruning, ["--dataset", "digits", "--gradients", "2000"], "--gradients 2000: there are"),
        (pruning, ["--dataset", "digits", "--memory", "0.01"], "GB for 400 gradients, more than"),
        (
            pruning,
            ["--dataset", "digits", "--renorm", "reset", "--retrain"],
            "for networks with BatchNorm",
        ),
    ],
)
def test_bad_options(script, arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        script.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
