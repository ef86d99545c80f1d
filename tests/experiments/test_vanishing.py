"""The experiment on vanishing features, in its quickest form, on the digits; its records."""

from __future__ import annotations

import copy
import doctest
import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vfjax
from vfjax import diagnose, merge

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, features, records = (
    importlib.import_module(f"kit.{name}") for name in ("claims", "features", "records")
)
vanishing = importlib.import_module("vanishing_feature")
pruned = importlib.import_module("vanishing_feature_pruned")

AS, UNLIKE, OPEN, NEW = claims.VERDICTS
RUN = vanishing.EXPERIMENT
MERGED = ["direct", "matched", "repair", "rescale", "bias_calibration", "bias_removal"]
DEPTH = 6
CLASSES = set(range(10))
RECORDS = {
    "vgg16": "vanishing_feature-cifar10-vgg16-w0.25",
    "vgg16-bn": "vanishing_feature-cifar10-vgg16-bn-w0.125",
    "vgg16-bn, weight": "vanishing_feature-cifar10-vgg16-bn-w0.125-weight",
    "vgg16-ln": "vanishing_feature-cifar10-vgg16-ln-w0.125",
    "resnet20": "vanishing_feature-cifar10-resnet20-w0.5",
    "resnet20-ln": "vanishing_feature-cifar10-resnet20-ln-w0.25",
}
LABELS = ["REPAIR", "RESCALE", "bias cal.", "last 5 biases removed"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vanishing")
    options = ["--model", "digits-mlp", "--samples", "100", "--statistics", "300"]
    path = vanishing.main(["--dataset", "digits", *options, "--out", str(folder)])
    return path, records.read(path)


@pytest.fixture
def record(digits):
    return copy.deepcopy(digits[1])


def read(name):
    return records.read(EXPERIMENTS / "results" / f"{RECORDS[name]}.json")


@pytest.fixture(params=RECORDS)
def shipped(request):
    """The records that the page tells of."""
    return read(request.param)


def left(record, name):
    return features.by_layer(record.rows, network=name)


def end(record, name):
    return left(record, name)[-1]


def scaled(record, name, layer, factor):
    """Changes a record: the features of a layer."""
    row = record.rows.only(network=name, layer=layer)
    row |= {key: row[key] * factor for key in ("feature", "relative")}


def swapped(record, *names):
    """Exchanges two networks."""
    other = dict(zip(names, names[::-1], strict=True))
    layers = {name: record.rows.where(network=name)[0]["layers"] for name in names}
    for row in record["rows"]:
        if row["network"] in names:
            row["network"] = other[row["network"]]
            row["layers"] = layers[row["network"]]


def decided(record):
    return {row["id"].split(".")[-1]: row for row in claims.decided(RUN.claims, record)}


def verdicts(record):
    return {name: row["verdict"] for name, row in decided(record).items()}


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "vanishing_feature-digits-digits-mlp-samples100-statistics300.json"
    assert "--dataset digits" in record["command"]
    assert record["data"]["statistics_images"] == 300 and record["data"]["test_images"] == 100
    assert record["seeds"] == {"edge_models": [0, 1], "matching": 0}
    (note,) = record.notes("matching")
    assert note["method"] == "activation" and note["converged"]
    assert not record.rows.distinct("norm")
    stages = {"data", "trace", "checkpoints", "statistics of edge models", "matching"}
    assert set(record["seconds"]) == stages | {"midpoints", "features", "accuracies", "total"}
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"].startswith("scikit-learn's 8x8 digits: digits-mlp")


def test_numbers_of_every_network(record):
    kept = {f"PFM {layers}/6": layers for layers in (1, 3, 5)}
    names = record.rows.distinct("network")
    assert names == ["model 1", "model 2", *MERGED, *kept]
    for name in names:
        rows = record.rows.where(network=name)
        by_layer, by_class = rows.where(layer=set(range(1, 7))), rows.where(**{"class": CLASSES})
        assert by_layer.distinct("layer") == list(range(1, 7)) and len(by_layer) == 6
        assert len(set(by_layer.distinct("site"))) == 6
        for key in ("feature", "feature_std", "offset", "relative", "bound", "smoothed"):
            assert len(by_layer.values(key)) == 6
        assert by_class.distinct("class") == list(range(10)) and len(by_class) == 10
        for key in ("logit", "logit_std", "logit_at_zero"):
            assert len(by_class.values(key)) == 10
        # The last layer's offset is the norm of the logits at the mean image.
        length = np.linalg.norm(by_class.values("logit_at_zero"))
        assert by_layer[-1]["offset"] == pytest.approx(length, rel=1e-4, abs=1e-6)
        (value,) = rows.values("accuracy")
        assert 0 <= value <= 1 and len(rows.values("loss")) == 1 and len(rows) == 17
        assert {row["layers"] for row in rows} == {kept.get(name)}


def test_bounds_do_not_rise_and_lie_above(record):
    for name in record.rows.distinct("network"):
        relative, bound, smoothed = (
            features.by_layer(record.rows, key, network=name)
            for key in ("relative", "bound", "smoothed")
        )
        assert (np.diff(bound) <= 0).all() and (bound >= relative).all()
        assert (smoothed >= bound).all() and smoothed[-1] == bound[-1]
        line = features.line(record, name, bound=True, name=name)
        assert len(line.x) == len(line.y) == 20 and line.y[-1] == pytest.approx(bound[-1])
    edges = [left(record, name) for name in vanishing.EDGES]
    np.testing.assert_allclose(np.mean(edges, axis=0), 1, rtol=1e-5)


def test_relative_features_are_those_of_the_library():
    """As `vfjax.diagnose` has them with references, in one pass over the images."""
    trees = [
        {"a": jax.random.normal(key, (4, 5)), "b": jax.random.normal(key, (5, 3))}
        for key in jax.random.split(jax.random.key(0), 3)
    ]
    x = jax.random.normal(jax.random.key(1), (8, 4))
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v["a"] + 0.1) @ v["b"], trees[0], x)
    *edges, other = [merge.as_merged(net, tree) for tree in trees]
    rows = records.Rows(features.rows_of(net, {"1": edges[0], "2": edges[1]}, [x]))
    whole = np.mean([features.by_layer(rows, "feature", network=name) for name in "12"], axis=0)
    rows += features.rows_of(net, {"3": other}, [x], whole)
    sites = rows.distinct("site")
    found = diagnose.features(net, [*edges, other], [x], references=edges, sites=sites)
    for gamma, key in ((1, "bound"), (features.GAMMA, "smoothed")):
        expected = diagnose.bound_sequence(found, sites=sites, gamma=gamma)
        for k, name in enumerate("123"):
            rel, bound = (features.by_layer(rows, of, network=name) for of in ("relative", key))
            np.testing.assert_allclose(rel, expected.relative[k], rtol=1e-5)
            np.testing.assert_allclose(bound, expected.bound[k], rtol=1e-5)


def test_what_the_paper_found(record):
    """Averaging makes features vanish; everything that is said to help does."""
    assert end(record, "direct") < 0.1
    assert 5 * end(record, "direct") < end(record, "matched") < 0.6
    for name in MERGED[2:4]:
        assert end(record, name) > 1.5 * end(record, "matched")
    share = {name: features.shares(record.rows, network=name)[-1] for name in MERGED}
    for name in MERGED[4:]:
        assert share[name] > 5 * share["matched"]
    # Layers that are kept apart are whole, and more of them keep more, but for the first alone:
    # all networks see the same input.
    for layers in (1, 3, 5):
        np.testing.assert_allclose(left(record, f"PFM {layers}/6")[: layers - 1], 1, rtol=1e-5)
    ends = [end(record, f"PFM {layers}/6") for layers in (1, 3, 5)]
    assert ends[0] == pytest.approx(end(record, "matched"), rel=1e-5)
    assert 1.2 * ends[0] < ends[1] < ends[2] < 1


def test_table_has_every_network(record):
    (table,) = vanishing.tables_of(record)
    names = record.rows.distinct("network")
    assert len(table.lines) == len(names) and {len(r) for r in table.lines} == {len(table.header)}
    assert [line[0] for line in table.lines][4:8] == LABELS
    assert all(cell for line in table.lines for cell in line)


# ------------------------------------------------------------------------------- what is said of it


def test_claims_follow_the_record(record):
    """What is said changes with what was measured."""
    found = verdicts(record)
    assert found["direct-logits"] == found["pfm-grows"] == NEW
    record["config"]["model"] = "resnet20"
    assert set(verdicts(record).values()) == {AS} and len(verdicts(record)) == 8
    swapped(record, "direct", "PFM 5/6")
    found = verdicts(record)
    unlike = ("direct-fades", "direct-logits", "matching-mitigates", "pfm-grows")
    assert [name for name, verdict in found.items() if verdict == UNLIKE] == list(unlike)


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("repair", "repair-mitigates"),
        ("rescale", "rescale-mitigates"),
        ("bias_calibration", "bias-calibration-mitigates"),
        ("bias_removal", "bias-removal-mitigates"),
    ],
)
def test_remedies_can_fail(record, name, claim):
    before = verdicts(record)
    for layer in range(1, DEPTH + 1):
        scaled(record, name, layer, 1e-3)
    assert verdicts(record) == before | {claim: UNLIKE}
    record["rows"] = [row for row in record["rows"] if row["network"] != name]
    assert claim not in verdicts(record)


@pytest.mark.parametrize(("layer", "factor"), [(6, 0.1), (3, 1.01)])
def test_layers_that_are_kept_apart_can_fail(record, layer, factor):
    record["config"]["model"] = "vgg16"
    assert verdicts(record)["pfm-grows"] == AS
    scaled(record, "PFM 5/6", layer, factor)
    assert verdicts(record)["pfm-grows"] == UNLIKE


def test_layernorm_is_expected_to_fade_mildly(record):
    plain = decided(record)
    record["config"]["model"] = "vgg16-ln"
    found = decided(record)
    fades, mildly = plain.pop("direct-fades"), found.pop("layernorm-fades-mildly")
    assert (fades["verdict"], mildly["verdict"]) == (AS, UNLIKE)
    assert fades["here"] == mildly["here"] and plain == found
    for value, verdict in ((0.3, AS), (0.01, UNLIKE), (2.0, UNLIKE)):
        record.rows.only(network="direct", layer=DEPTH)["relative"] = value
        assert verdicts(record)["layernorm-fades-mildly"] == verdict


def test_reset_claims_can_fail():
    """Which the paper has for one network and one matching; of others they are measured."""
    record = read("vgg16-bn, weight")
    names = ("reset-deviations", "reset-means")
    assert [verdicts(record)[name] for name in names] == [AS, AS]
    assert [verdicts(read("vgg16-bn"))[name] for name in names] == [NEW, NEW]
    assert not set(names) & set(verdicts(read("vgg16")))
    rows = [row for row in record.rows.where(network="reset") if "norm" in row]
    rows[0]["std"] = 10
    assert [verdicts(record)[name] for name in names] == [UNLIKE, AS]
    for row in rows:
        row["mean"] *= 2
    assert [verdicts(record)[name] for name in names] == [UNLIKE, UNLIKE]


# ---------------------------------------------------------------------------------------- records


def test_shipped_records(shipped):
    assert shipped["seconds"]["total"] < 600
    assert shipped["data"]["test_images"] == 2000 and shipped["data"]["fallback"] is False
    assert UNLIKE not in verdicts(shipped).values()


def test_figure_names_its_axes(shipped):
    figure = vanishing.figure_of(shipped)
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()


def test_norms_before_and_after_reset():
    record = read("resnet20")
    names = [n for n in record.rows.distinct("network") if not n.startswith(("PFM", "model"))]
    assert names == ["edge models", "direct", "matched", "reset"]
    found = {
        name: [row for row in record.rows.where(network=name) if "norm" in row]
        for name in ("edge models", "matched", "reset")
    }
    for rows in found.values():
        assert len(rows) == 21 and [row["main"] for row in rows].count(False) == 2
        assert all({"std", "mean"} <= set(row) for row in rows)
    # Averaging shrinks what norms read, so measured anew deviations are smaller.
    before, after = ([row["std"] for row in found[name]] for name in ("matched", "reset"))
    assert np.mean(np.divide(after, before)) < 0.9
    assert end(record, "reset") > end(record, "matched")


def test_networks_without_biases_have_none_removed():
    """Those of ResNet20 with LayerNorm are of norms, but for the classifier's."""
    names = set(read("resnet20-ln").rows.distinct("network"))
    assert not {"bias_calibration", "bias_removal"} & names
    assert {"repair", "rescale"} <= names


# ----------------------------------------------------------------------------------------- pruned


@pytest.fixture(scope="module")
def pruned_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vanishing_pruned")
    options = ["--model", "digits-mlp", "--sparsity", "95", "--samples", "100"]
    options += ["--statistics", "200", "--out", str(folder)]
    path = pruned.main(["--dataset", "digits", *options])
    return path, records.read(path)


def test_features_before_and_after(pruned_digits):
    path, record = pruned_digits
    assert path.name == (
        "vanishing_feature_pruned-digits-digits-mlp-at95-samples100-statistics200.json"
    )
    names, rows = ["unpruned", "pruned", "repair"], record.rows
    assert rows.distinct("seed") == [0, 1] and record["config"]["sparsity"] == 95
    for seed in (0, 1):
        assert rows.where(seed=seed).distinct("network") == names
        relative, bound = (
            {n: features.by_layer(rows, key, seed=seed, network=n) for n in names}
            for key in ("relative", "bound")
        )
        np.testing.assert_allclose(relative["unpruned"], 1, rtol=1e-5)
        for name in names:
            assert (np.diff(bound[name]) <= 0).all() and (bound[name] >= relative[name]).all()
    before, after = (pruned.measured(record, name) for name in names[1:])
    assert before["end"] < 0.5 < after["end"] and before["varies"] < after["varies"]
    assert len(pruned.figure_of(record).axes) == 3
    (table,) = pruned.EXPERIMENT.tables(record)
    assert [line[0] for line in table.lines] == ["unpruned", "pruned", "pruned, REPAIR"]
    assert all(cell for line in table.lines for cell in line)


def test_claims_of_pruned_networks_can_fail(pruned_digits):
    record = copy.deepcopy(pruned_digits[1])

    def found():
        return [row["verdict"] for row in claims.decided(pruned.CLAIMS, record)]

    assert found() == [AS] * 5
    names = {"pruned": "repair", "repair": "pruned"}
    for row in record["rows"]:
        row["network"] = names.get(row["network"], row["network"])
    assert found()[2:] == [UNLIKE] * 3
    for row in record["rows"]:
        if row["network"] == "pruned":
            row |= {key: 1.0 for key in ("relative", "logit_std") if key in row}
        elif row["network"] == "unpruned" and "logit_std" in row:
            row["logit_std"] = 1.0
    assert found()[:2] == [UNLIKE] * 2


def test_shipped_records_of_pruned_networks():
    for name in ("vgg16-bn-w0.125", "resnet20-w0.5"):
        stem = f"vanishing_feature_pruned-cifar10-{name}"
        record = records.read(EXPERIMENTS / "results" / f"{stem}.json")
        assert record["data"]["fallback"] is False and record["data"]["augmented"] is True
        assert pruned.EXPERIMENT.file_name(record) == stem
        assert [row["verdict"] for row in claims.decided(pruned.CLAIMS, record)] == [AS] * 5


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sparsity", "100", "--dataset", "digits"], "leaves no features"),
        (["--sparsity", "101"], "'101' is not a percentage from 1 to 100"),
        (["--dataset", "digits", "--renorm", "reset"], "for networks with BatchNorm"),
    ],
)
def test_bad_options_of_pruning(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        pruned.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vanishing_feature_pruned", "papers.vanishing_feature_pruned"])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is not a number of images, from 1 on"),
        (["--statistics", "all"], "'all' is not a number of images"),
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
        vanishing.main([*arguments, "--out", str(tmp_path / "out")])
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "--pairs" not in error
    assert not (tmp_path / "out").exists()
