"""The experiment that matches the first layers only: its laws, records and options."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import data, merge, models, renorm

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
common = importlib.import_module("_common")
permute = importlib.import_module("permute_first_layers")
cifar_pfm = importlib.import_module("cifar_pfm")

SIZES = ["--model", "digits-mlp", "--dataset", "digits"]
COLUMNS = ["none", "repair", "rescale"]
RECORDS = ("cifar10-vgg16-w0.25", "cifar10-resnet20-w0.5")


class Compilations:
    """Counts compilations in a `with` block."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, *_, **__):
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permute")
    path = permute.main([*SIZES, "--statistics", "300", "--out", str(folder)])
    return path, json.loads(path.read_text())


def normed(v, x):
    """A residual network with BatchNorm: L = 4, and the stream is written by layers 1 and 3."""

    def norm(z, name):
        return (z - v[f"{name}/mean"]) * jax.lax.rsqrt(v[f"{name}/var"] + 1e-5)

    stream = norm(x.reshape(len(x), -1) @ v["first"], "a")
    inner = jax.nn.relu(norm(jax.nn.relu(stream) @ v["inner"], "b"))
    return jax.nn.relu(stream + inner @ v["outer"]) @ v["head"]


@pytest.fixture(scope="module")
def copies():
    """A pair of a network with BatchNorm and its copy with units in another order."""
    sizes = {"first": (64, 12), "inner": (12, 9), "outer": (9, 12), "head": (12, 10)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    tree = {
        name: jax.random.normal(key, size) / np.sqrt(size[0])
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    for name, size in {"a": 12, "b": 9}.items():
        tree |= {f"{name}/mean": jnp.zeros(size), f"{name}/var": jnp.ones(size)}
    dataset = data.load("digits", train=200, test=100)
    statistics = dataset.batches("train", batch_size=100)
    test = dataset.batches("test", batch_size=100)
    net = vfjax.trace(normed, tree, next(iter(test))[0])
    other = net.spec.permute(tree, net.spec.random(jax.random.key(1)))
    return permute.pair_of(net, [tree, other], ["activation"], 0.5, statistics, test)


# -------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("name", ["resnet20", "digits-conv"])
def test_first_layers_permuted_compute_the_same(name):
    model = models.create(name, **({"width": 0.125} if name == "resnet20" else {}))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3 if name == "resnet20" else 1))
    tree = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(1), x))
    net = vfjax.trace(models.apply_fn(model), tree, x)
    run = jax.jit(net.run)
    permutations = {group: np.roll(np.arange(n), 1) for group, n in net.spec.sizes.items()}
    expected, before, counts = np.asarray(run(tree, x)), tree, []
    for layers in range(net.depth + 1):
        chosen = permute.of_first(net, permutations, layers)
        permuted = net.spec.permute(tree, chosen)
        np.testing.assert_allclose(
            run(permuted, x), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
        )
        # Each group that is new changes parameters.
        same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), permuted, before))
        counts.append(len(chosen))
        assert same == (layers == 0 or counts[-1] == counts[-2])
        before = permuted
    assert counts[0] == 0 and counts[-1] == len(permutations)
    if name == "digits-conv":
        assert counts == [0, 1, 2, 3, 4, 5, 6, 6]
    else:
        # Streams come with the stem, 2_1/conv2 and 3_1/conv2, each block's inside with its conv1.
        inner = [1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 7, 8, 8, 9, 10, 11, 11, 12, 12, 12]
        assert counts == [0, *inner]


def test_groups_no_layer_writes_come_last():
    def apply_fn(v, x):
        return jax.nn.relu(x @ jnp.sin(v["a"])) @ v["b"]

    tree = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    net = vfjax.trace(apply_fn, tree, jnp.ones((1, 3)))
    assert net.depth == 2 and set(permute.written_at(net).values()) <= {2}


def test_all_layers_are_the_full_matching(copies):
    """Matched in full, a copy is the network itself, and RESET is what it is by hand."""
    net, found = copies.net, copies.found("activation")
    full = net.spec.permute(copies.trees[1], found.permutations)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), full, copies.trees[0])
    curves = permute.curves_of(copies, {"activation": found})["activation"]
    assert list(curves) == ["none", "reset"] and len(curves["none"]["loss"]) == net.depth + 1
    average = merge.interpolate([copies.trees[0], full])
    reset = renorm.reset(net, average, copies.statistics)
    for column, tree in (("none", copies.trees[0]), ("reset", reset)):
        expected = copies.evaluate(tree)
        assert curves[column]["loss"][-1] == pytest.approx(expected["loss"], rel=1e-5)
        assert curves[column]["accuracy"][-1] == expected["accuracy"]
        # The stream comes with layer 1, the block's inside with layer 2, and that is all.
        assert curves[column]["loss"][2] == curves[column]["loss"][3] == curves[column]["loss"][4]
        assert len({round(loss, 5) for loss in curves[column]["loss"]}) == 3
    direct = copies.evaluate(merge.interpolate(copies.trees))
    assert curves["none"]["loss"][0] == direct["loss"]


def test_further_layers_compile_nothing(copies):
    found = copies.found("activation").permutations
    copies.cells(permute.of_first(copies.net, found, 1), lambda: None)
    with Compilations() as compiled:
        copies.cells(permute.of_first(copies.net, found, 2), lambda: None)
    assert compiled.count == 0


def test_ends_are_those_of_the_table(digits, tmp_path):
    """l = 0 is direct, l = L matched in full, as another experiment measures them."""
    _, record = digits
    path = cifar_pfm.main([*SIZES, "--layers", "0", "--samples", "300", "--out", str(tmp_path)])
    table = importlib.import_module("kit.records").read(path)
    rows = table.rows.where(network="PFM", layers=0)
    cells = {
        name: rows.where(**where).values("accuracy")
        for name, where in cifar_pfm.columns_of(table).items()
    }
    curves = {name: c["accuracy"] for name, c in record["curves"]["activation"].items()}
    image = 1.01 / record["data"]["test_images"]
    assert [curves["none"][0]] == pytest.approx(cells["direct"], abs=image)
    assert [curves["none"][-1]] == pytest.approx(cells["matched"], abs=image)
    assert [curves["repair"][-1]] == pytest.approx(cells["REPAIR"], abs=image)
    assert [curves["rescale"][-1]] == pytest.approx(cells["RESCALE"], abs=image)
    for row, edge in zip(table["rows"], record["edges"].values(), strict=False):
        assert row["accuracy"] == edge["accuracy"]


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "permute_first_layers-digits-digits-mlp-statistics300.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".png"]
    assert record["experiment"] == "permute_first_layers"
    assert "--dataset digits" in record["command"]
    assert record["data"]["statistics_images"] == 300 and record["data"]["test_images"] == 497
    assert record["seeds"] == {"edge_models": [0, 1], "matching": 0}
    assert record["layers"] == list(range(7)) and record["groups"] == [0, 1, 2, 3, 4, 5, 5]
    assert list(record["matchings"]) == list(record["curves"]) == ["weight", "activation"]
    assert all(found["moved"] for found in record["matchings"].values())
    assert record["edge_mean"] == np.mean([edge["accuracy"] for edge in record["edges"].values()])
    stages = {"data", "trace", "checkpoints", "statistics of edge models", "matching"}
    assert stages | {"edge models", "averages", "total"} <= set(record["seconds"])
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"].startswith("scikit-learn's 8x8 digits: digits-mlp, midpoints")


def test_curves(digits):
    _, record = digits
    weight, activation = record["curves"].values()
    for curves in (weight, activation):
        assert list(curves) == record["columns"] == COLUMNS
        for found in curves.values():
            assert {key: len(values) for key, values in found.items()} == {"accuracy": 7, "loss": 7}
            # The last layer writes no units.
            assert found["loss"][-1] == found["loss"][-2] != found["loss"][0]
    assert all(weight[c]["loss"][0] == activation[c]["loss"][0] for c in COLUMNS)
    assert weight["none"]["loss"][1] != activation["none"]["loss"][1]
    for column in COLUMNS:
        assert activation[column]["accuracy"][-1] > activation[column]["accuracy"][0] + 0.05


def test_figure_and_table(digits):
    record = digits[1]
    figure = permute.figure_of(record)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
        assert "edge models' mean" in axes.get_legend_handles_labels()[1]
    header, rows = permute.table_of(record)
    named = [f"{match}{more}" for match in ("WM", "AM") for more in ("", " + REPAIR", " + RESCALE")]
    assert header == ["first layers matched, l", "groups", *named]
    assert len(rows) == 7 and {len(row) for row in rows} == {8}


def test_sentences_follow_the_record(digits):
    """What is said changes with what was measured."""
    record = json.loads(json.dumps(digits[1]))

    def verdicts(curve):
        for found in record["curves"].values():
            for column in found.values():
                column["accuracy"] = curve
        return [holds for holds, _ in permute.claims_of(record)]

    record["edge_mean"] = 0.9
    assert verdicts([0.1, 0.2, 0.4, 0.6, 0.79, 0.8, 0.8]) == [True, True, True]
    assert "Unlike" not in common.told(*permute.outcome(record))
    assert verdicts([0.8, 0.8, 0.7, 0.6, 0.4, 0.2, 0.1]) == [False, False, False]
    # To stay at chance is neither to saturate nor to come close to the edge models.
    assert verdicts([0.1] * 7) == [False, False, False]
    assert verdicts([0.1, 0.11, 0.12, 0.13, 0.14, 0.14, 0.14]) == [False, False, False]
    assert verdicts([0.1, 0.1, 0.1, 0.1, 0.2, 0.8, 0.8]) == [True, False, True]
    assert verdicts([0.1, 0.2, 0.4, 0.6, 0.79, 0.8, 0.8][::-1]) == [False, False, False]
    assert verdicts([0.1, 0.4, 0.6, 0.7, 0.91, 0.92, 0.92]) == [True, True, False]
    # Curves that disagree are told apart.
    record["curves"]["weight"]["none"]["accuracy"] = [0.1] * 7
    assert [holds for holds, _ in permute.claims_of(record)] == [True, False] * 2 + [False]
    assert "Unlike the paper: from l = 0 to 6 accuracy goes from 10.0 to 10.0 (WM;" in (
        common.told(*permute.outcome(record))
    )


def test_title_and_name_say_what_is_not_default(digits):
    record = json.loads(json.dumps(digits[1]))
    record["config"] |= {"alpha": 0.25, "match": "weight", "statistics": 5000, "samples": None}
    assert permute.file_name(record).endswith("digits-digits-mlp-weight-alpha0.25")
    assert "averages at alpha 0.25" in permute.title_of(record)
    record["config"] |= {"preset": "paper", "width": 0.5, "retrain": True}
    assert permute.file_name(record).endswith(
        "digits-mlp-w0.5-weight-alpha0.25-statistics5000-paper-retrained"
    )


# ---------------------------------------------------------------------------------------- records


def test_head_says_what_came_out():
    """The sentences are written from the records, by update_readme.py."""
    paths = [EXPERIMENTS / "results" / f"permute_first_layers-{name}.json" for name in RECORDS]
    records = [json.loads(path.read_text()) for path in paths if path.exists()]
    head = " ".join(permute.__doc__.split())
    assert head.endswith("What came out here: not measured yet.") == (not records)
    for record in records:
        assert " ".join(common.told(*permute.outcome(record)).split()) in head
        assert record["seconds"]["total"] < 600 and record["data"]["fallback"] is False


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is no number of images, from 1 on"),
        (["--statistics", "all"], "'all' is no number of images"),
        (["--alpha", "2"], "'2' is no number from 0 to 1"),
        (["--match", "none"], "invalid choice: 'none'"),
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
        permute.main([*arguments, "--out", str(tmp_path / "out")])
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "--pairs" not in error
    assert not (tmp_path / "out").exists()


def test_weights_alone_need_no_statistics(copies):
    """Networks with norms and weight matching: nothing is measured that nothing reads."""
    args = (copies.net, copies.trees, ["weight"], 0.25, argparse.Namespace(), copies.test)
    pair = permute.pair_of(*args)
    assert pair.moments is None and pair.weights == (0.75, 0.25)
    assert set(pair.found("weight").permutations) == set(copies.net.spec.groups)


def test_examples_in_docstrings():
    found = doctest.testmod(permute)
    assert found.attempted and not found.failed
