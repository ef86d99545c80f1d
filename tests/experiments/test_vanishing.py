"""The experiment on vanishing features, in its quickest form, on the digits; its records."""

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
common = importlib.import_module("_common")
vanishing = importlib.import_module("vanishing_feature")

MERGED = ["direct", "matched", "repair", "rescale", "bias_calibration", "bias_removal"]
RECORDS = {
    "vgg16": "vanishing_feature-cifar10-vgg16-w0.25",
    "vgg16-bn": "vanishing_feature-cifar10-vgg16-bn-w0.125",
    "vgg16-bn, weight": "vanishing_feature-cifar10-vgg16-bn-w0.125-weight",
    "vgg16-ln": "vanishing_feature-cifar10-vgg16-ln-w0.125",
    "resnet20": "vanishing_feature-cifar10-resnet20-w0.5",
    "resnet20-ln": "vanishing_feature-cifar10-resnet20-ln-w0.25",
}


def said(script, record):
    """What a script says of a record."""
    return common.told(*script.outcome(record))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vanishing")
    options = ["--model", "digits-mlp", "--samples", "100", "--statistics", "300"]
    path = vanishing.main(["--dataset", "digits", *options, "--out", str(folder)])
    return path, json.loads(path.read_text())


@pytest.fixture(params=RECORDS)
def shipped(request):
    """The records that the head of the script tells of."""
    return json.loads((EXPERIMENTS / "results" / f"{RECORDS[request.param]}.json").read_text())


def ends(record):
    return {name: found["relative"][-1] for name, found in record["networks"].items()}


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "vanishing_feature-digits-digits-mlp-samples100-statistics300.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".png"]
    assert record["experiment"] == "vanishing_feature"
    assert "--dataset digits" in record["command"]
    assert record["data"]["statistics_images"] == 300 and record["data"]["test_images"] == 100
    assert record["seeds"] == {"edge_models": [0, 1], "matching": 0}
    assert record["matching"]["method"] == "activation"
    assert record["removed"] == 5 and record["reset"] is None and record["gamma"] == 1.4
    stages = {"data", "trace", "checkpoints", "matching", "midpoints", "features", "accuracies"}
    assert stages | {"total"} <= set(record["seconds"])
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"].startswith("scikit-learn's 8x8 digits: digits-mlp")


def test_numbers_of_every_network(digits):
    _, record = digits
    kept = [f"PFM {layers}/6" for layers in (1, 3, 5)]
    assert list(record["networks"]) == ["model 1", "model 2", *MERGED, *kept]
    assert record["depth"] == list(range(1, 7)) and len(record["layers"]) == 6
    for found in record["networks"].values():
        for key in ("feature", "feature_std", "offset", "relative", "bound", "smoothed"):
            assert len(found[key]) == 6
        assert {key: len(row) for key, row in found["resampled"].items()} == {
            "tight": 20,
            "smoothed": 20,
        }
        assert {key: len(row) for key, row in found["logits"].items()} == dict.fromkeys(
            ("mean", "std", "at_zero"), 10
        )
        # The last layer's offset is the norm of the logits at the mean image.
        length = np.linalg.norm(found["logits"]["at_zero"])
        assert found["offset"][-1] == pytest.approx(length, rel=1e-4, abs=1e-6)
        assert 0 <= found["accuracy"] <= 1


def test_bounds_do_not_rise_and_lie_above(digits):
    _, record = digits
    for found in record["networks"].values():
        bound, smoothed = np.array(found["bound"]), np.array(found["smoothed"])
        assert (np.diff(bound) <= 0).all() and (bound >= found["relative"]).all()
        assert (smoothed >= bound).all() and smoothed[-1] == bound[-1]
        assert found["resampled"]["tight"][-1] == pytest.approx(bound[-1])
    edges = [record["networks"][name]["relative"] for name in vanishing.EDGES]
    np.testing.assert_allclose(np.mean(edges, axis=0), 1, rtol=1e-5)


def test_what_the_paper_found(digits):
    """Averaging makes features vanish; everything that is said to help does."""
    _, record = digits
    end = ends(record)
    assert end["direct"] < 0.1 and 5 * end["direct"] < end["matched"] < 0.6
    for name in MERGED[2:4]:
        assert end[name] > 1.5 * end["matched"]
    share = {n: v["feature"][-1] / v["offset"][-1] for n, v in record["networks"].items()}
    for name in MERGED[4:]:
        assert share[name] > 5 * share["matched"]
    # Layers that are kept apart are whole, and more of them keep more, but for the first alone:
    # all networks see the same input.
    for layers in (1, 3, 5):
        found = record["networks"][f"PFM {layers}/6"]
        np.testing.assert_allclose(found["relative"][: layers - 1], 1, rtol=1e-5)
    assert end["PFM 1/6"] == pytest.approx(end["matched"], rel=1e-5)
    assert 1.2 * end["PFM 1/6"] < end["PFM 3/6"] < end["PFM 5/6"] < 1


def test_table_has_every_network(digits, capsys):
    header, rows = vanishing.table_of(digits[1])
    assert len(rows) == len(digits[1]["networks"]) and {len(r) for r in rows} == {len(header)}
    assert [row[0] for row in rows][4:8] == [
        "REPAIR",
        "RESCALE",
        "bias cal.",
        "last 5 biases removed",
    ]


def test_sentences_follow_the_record(digits):
    """What is said changes with what was measured."""
    record = json.loads(json.dumps(digits[1]))
    assert "Not in the paper: its logits" in said(vanishing, record)
    record["config"]["model"] = "resnet20"
    assert all(holds for holds, _ in vanishing.claims_of(record))
    assert "Unlike" not in said(vanishing, record) and "Not in" not in said(vanishing, record)
    networks = record["networks"]
    networks["direct"], networks["PFM 5/6"] = networks["PFM 5/6"], networks["direct"]
    claims = vanishing.claims_of(record)
    assert [holds for holds, _ in claims][:3] == [False] * 3 and not claims[-1][0]
    assert "Unlike the paper: features of the direct midpoint" in said(vanishing, record)


def test_layernorm_is_expected_to_fade_mildly(digits):
    record = json.loads(json.dumps(digits[1]))
    plain = vanishing.claims_of(record)
    record["config"]["model"] = "vgg16-ln"
    claims = vanishing.claims_of(record)
    assert plain[0][0] and not claims[0][0] and plain[0][1] == claims[0][1]
    assert plain[1:] == claims[1:]
    record["networks"]["direct"]["relative"][-1] = 0.3
    assert vanishing.claims_of(record)[0][0]


# ---------------------------------------------------------------------------------------- records


def test_head_says_what_came_out(shipped):
    """The sentences are written from the records, by update_readme.py."""
    update = importlib.import_module("update_readme")
    source = Path(vanishing.__file__).read_text(encoding="utf-8")
    assert update.headed(source, vanishing) == source
    assert " ".join(said(vanishing, shipped).split()) in " ".join(vanishing.__doc__.split())
    assert shipped["seconds"]["total"] < 600
    assert shipped["data"]["test_images"] == 2000 and shipped["data"]["fallback"] is False


def test_figure_names_its_axes(shipped):
    figure = vanishing.figure_of(shipped)
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()


def test_norms_before_and_after_reset():
    path = EXPERIMENTS / "results" / f"{RECORDS['resnet20']}.json"
    record = json.loads(path.read_text())
    names = [name for name in record["networks"] if not name.startswith(("PFM", "model"))]
    assert names == ["direct", "matched", "reset"] and record["removed"] is None
    found = record["reset"]
    assert len(found["norms"]) == 21 and found["main"].count(False) == 2
    for part in ("before", "after", "edge models"):
        assert {key: len(values) for key, values in found[part].items()} == {"std": 21, "mean": 21}
    # Averaging shrinks what norms read, so measured anew deviations are smaller.
    assert np.mean(np.divide(found["after"]["std"], found["before"]["std"])) < 0.9
    assert ends(record)["reset"] > ends(record)["matched"]


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is no number of images, from 1 on"),
        (["--statistics", "all"], "'all' is no number of images"),
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
        vanishing.main([*arguments, "--out", str(tmp_path / "out")])
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "--pairs" not in error
    assert not (tmp_path / "out").exists()


def test_examples_in_docstrings():
    found = doctest.testmod(vanishing)
    assert found.attempted and not found.failed


def test_networks_without_biases_have_none_removed():
    """Those of ResNet20 with LayerNorm are of norms, but for the classifier's."""
    path = EXPERIMENTS / "results" / f"{RECORDS['resnet20-ln']}.json"
    record = json.loads(path.read_text())
    assert not {"bias_calibration", "bias_removal"} & set(record["networks"])
    assert record["removed"] is None and {"repair", "rescale"} <= set(record["networks"])
