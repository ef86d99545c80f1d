"""The experiment that matches the first layers only: its laws, records and options."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import Compilations
from vfjax import align, data, merge, models, renorm

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, edges, experiment, pairs, records, timing = (
    importlib.import_module(f"kit.{name}")
    for name in "claims edges experiment pairs records timing".split()
)
permute = importlib.import_module("permute_first_layers")
cifar_pfm = importlib.import_module("cifar_pfm")

SIZES = ["--model", "digits-mlp", "--dataset", "digits"]
AS, UNLIKE, OPEN, NEW = claims.VERDICTS
RUN = permute.EXPERIMENT
REMEDIES = ["none", "repair", "rescale"]
RECORDS = ("cifar10-vgg16-w0.25", "cifar10-resnet20-w0.5")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permute")
    path = permute.main([*SIZES, "--statistics", "300", "--out", str(folder)])
    return path, records.read(path)


@pytest.fixture
def record(digits):
    return copy.deepcopy(digits[1])


def curve(record, match, remedy, key="loss"):
    return record.rows.curve("layers", key, match=match, remedy=remedy)[1]


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
    return edges.Edges(None, None, net, [], [tree, other], edges.Images(statistics, None, test))


def run_on(models, folder):
    setup = experiment.Setup(None, models, {})
    return experiment.Run(setup, timing.Stopwatch(), folder / "none", "")


@pytest.fixture
def measured(copies, tmp_path):
    """The rows that a run on the copies has."""
    config, run = permute.Config(match="activation"), run_on(copies, tmp_path)
    for row in permute.measure(config, run):
        run.add(row)
    return records.Record(rows=run.rows)


@pytest.fixture
def pair(copies, tmp_path):
    return pairs.Pair(run_on(copies, tmp_path), permute.Config(), ["activation"])


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
        depths = permute.written_at(net)
        chosen = {group: p for group, p in permutations.items() if depths[group] <= layers}
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


def test_all_layers_are_the_full_matching(pair, measured):
    """Matched in full, a copy is the network itself, and RESET is what it is by hand."""
    net, found = pair.net, align.match_moments(pair.net, pair.moments).permutations

    def evaluated(merged):
        return pairs.evaluated(merged, pair.images.test, "")

    full = net.spec.permute(pair.trees[1], found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), full, pair.trees[0])
    assert measured.rows.where(network=None).distinct("remedy") == ["none", "reset"]
    average = merge.interpolate([pair.trees[0], full])
    reset = renorm.reset(net, average, pair.images.statistics)
    for remedy, tree in (("none", pair.trees[0]), ("reset", reset)):
        expected = evaluated(merge.as_merged(net, tree, weights=(0.5, 0.5)))
        loss = curve(measured, "activation", remedy)
        assert len(loss) == net.depth + 1
        assert loss[-1] == pytest.approx(expected["loss"], rel=1e-5)
        accuracy = curve(measured, "activation", remedy, "accuracy")
        assert accuracy[-1] == expected["accuracy"]
        # The stream comes with layer 1, the block's inside with layer 2, and that is all.
        assert loss[2] == loss[3] == loss[4] and len({round(value, 5) for value in loss}) == 3
    average = merge.as_merged(net, merge.interpolate(pair.trees), weights=(0.5, 0.5))
    assert curve(measured, "activation", "none")[0] == evaluated(average)["loss"]


def test_further_layers_compile_nothing(pair):
    depths = permute.written_at(pair.net)

    def evaluated(layers):
        groups = frozenset(group for group, depth in depths.items() if depth <= layers)
        for remedy in ("none", "reset"):
            pair.measured("", remedy, "activation", 0, None, groups)

    evaluated(1)
    with Compilations() as compiled:
        evaluated(2)
    assert compiled.count == 0


def test_ends_are_those_of_the_table(record, tmp_path):
    """l = 0 is direct, l = L matched in full, as another experiment measures them."""
    path = cifar_pfm.main([*SIZES, "--layers", "0", "--samples", "300", "--out", str(tmp_path)])
    table = records.read(path).rows
    image = 1.01 / record["data"]["test_images"]
    for remedy in REMEDIES:
        expected = table.mean(network="PFM", match="activation", remedy=remedy)
        found = curve(record, "activation", remedy, "accuracy")
        assert found[-1] == pytest.approx(expected, abs=image)
    direct = curve(record, "activation", "none", "accuracy")[0]
    assert direct == pytest.approx(table.mean(network="PFM", match="none"), abs=image)
    for name in ("model 1", "model 2"):
        assert table.mean(network=name) == record.rows.mean(network=name)


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "permute_first_layers-digits-digits-mlp-statistics300.json"
    assert "--dataset digits" in record["command"]
    assert record["data"]["statistics_images"] == 300 and record["data"]["test_images"] == 497
    assert record["seeds"] == {"edge_models": [0, 1], "matching": 0}
    rows = record.rows
    for match in ("weight", "activation"):
        found = rows.where(match=match, remedy="none")
        assert sorted(found.distinct("layers")) == list(range(7)) and len(found) == 7
        assert rows.curve("layers", "groups", match=match)[1] == [0, 1, 2, 3, 4, 5, 5]
    notes = record.notes("matching")
    assert [note["method"] for note in notes] == ["weight", "activation"]
    assert all(note["moved"] and note["objective"] for note in notes)
    assert record.notes("written_at").distinct("layer") == [1, 2, 3, 4, 5]
    edge = [rows.mean(network=name) for name in ("model 1", "model 2")]
    assert record["summary"]["edge_mean"] == np.mean(edge)
    stages = {"data", "trace", "checkpoints", "statistics of edge models", "matching"}
    assert stages | {"edge models", "averages", "total"} == set(record["seconds"])
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"].startswith("scikit-learn's 8x8 digits: digits-mlp, midpoints")


def test_curves(record):
    loss, accuracy = (
        {(m, r): curve(record, m, r, key) for m in ("weight", "activation") for r in REMEDIES}
        for key in ("loss", "accuracy")
    )
    assert record.rows.where(network=None).distinct("remedy") == REMEDIES
    for found in loss.values():
        # The last layer writes no units.
        assert len(found) == 7 and found[-1] == found[-2] != found[0]
    assert all(loss["weight", r][0] == loss["activation", r][0] for r in REMEDIES)
    assert loss["weight", "none"][1] != loss["activation", "none"][1]
    for remedy in REMEDIES:
        found = accuracy["activation", remedy]
        assert found[-1] > found[0] + 0.05


def test_figure_and_table(record):
    figure = permute.figure_of(record)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
        assert "edge models' mean" in axes.get_legend_handles_labels()[1]
    (table,) = permute.tables_of(record)
    named = [f"{match}{more}" for match in ("WM", "AM") for more in ("", " + REPAIR", " + RESCALE")]
    assert table.header == ["test accuracy, %", *named, "groups matched"]
    assert len(table.lines) == 9 and {len(row) for row in table.lines} == {8}
    assert all(cell for row in table.lines[2:] for cell in row)


@pytest.fixture
def changed(record):
    """Sets curves of a record, and gives the verdicts on one of them: rises, saturates, below."""
    record["summary"]["edge_mean"] = 0.9
    record["data"]["test_images"] = 10_000

    def verdicts(values, match="weight", remedy="none"):
        for row in record.rows.where(match=match, remedy=remedy):
            row["accuracy"] = values[row["layers"]]
        found = claims.decided(permute.CLAIMS, record)
        name = next(n for n, of in permute.CURVES.items() if (*of.values(),) == (match, remedy))
        return [row["verdict"] for row in found if row["here"].startswith(f"{name}: ")]

    return verdicts


@pytest.mark.parametrize(
    ("values", "verdicts"),
    [
        ([0.1, 0.2, 0.4, 0.6, 0.79, 0.8, 0.8], [AS, AS, AS]),
        ([0.8, 0.8, 0.7, 0.6, 0.4, 0.2, 0.1], [UNLIKE, UNLIKE, UNLIKE]),
        # To stay at chance is neither to saturate nor to come close to the edge models, nor is it
        # known what would be.
        ([0.1] * 7, [OPEN, OPEN, OPEN]),
        ([0.1, 0.11, 0.12, 0.13, 0.14, 0.14, 0.14], [OPEN, OPEN, OPEN]),
        ([0.1, 0.1, 0.6, 0.6, 0.14, 0.1, 0.1], [UNLIKE, UNLIKE, UNLIKE]),
        # What hardly rises has all of this unlike the paper where it is not near chance.
        ([0.5, 0.5, 0.5, 0.51, 0.51, 0.51, 0.51], [UNLIKE, UNLIKE, UNLIKE]),
        ([0.1, 0.1, 0.1, 0.1, 0.2, 0.8, 0.8], [AS, UNLIKE, AS]),
        ([0.1, 0.2, 0.4, 0.6, 0.79, 0.8, 0.8][::-1], [UNLIKE, UNLIKE, UNLIKE]),
        ([0.1, 0.4, 0.6, 0.7, 0.91, 0.92, 0.92], [AS, AS, UNLIKE]),
        # Within noise: of the rise, of its last part, and of the edge models.
        ([0.5, 0.51, 0.52, 0.53, 0.54, 0.55, 0.555], [OPEN, OPEN, OPEN]),
        ([0.1, 0.2, 0.4, 0.6, 0.69, 0.8, 0.811], [AS, OPEN, AS]),
        ([0.1, 0.4, 0.6, 0.7, 0.88, 0.9, 0.902], [AS, AS, OPEN]),
    ],
)
def test_claims_follow_the_record(changed, values, verdicts):
    """What is said changes with what was measured."""
    assert changed(values) == verdicts
    assert changed(values, "activation", "repair") == verdicts


def test_curves_that_disagree_are_told_apart(changed, record):
    assert changed([0.1, 0.2, 0.4, 0.6, 0.79, 0.8, 0.8], "activation", "repair") == [AS] * 3
    assert changed([0.8, 0.8, 0.7, 0.6, 0.4, 0.2, 0.1]) == [UNLIKE] * 3
    found = claims.decided(permute.CLAIMS, record)
    assert len(found) == 18 and len({row["id"].partition(":")[0] for row in found}) == 3
    here = {row["id"]: row["here"] for row in found}
    first = here["vf.first-layers.rises:weight-none"]
    assert first == "WM: 80.0 to 10.0, rank correlation -0.99"
    assert here["vf.first-layers.rises:activation-repair"].startswith("AM + REPAIR: 10.0 to 80.0")


def test_title_and_name_say_what_is_not_default(record):
    record["config"] |= {"alpha": 0.25, "match": "weight", "statistics": 5000, "samples": 5000}
    assert RUN.file_name(record).endswith("digits-digits-mlp-weight-alpha0.25")
    assert "averages at alpha 0.25" in permute.title_of(record)
    first, second = (record.rows.mean(network=name) for name in ("model 1", "model 2"))
    assert RUN.summary(record)["edge_mean"] == pytest.approx(0.75 * first + 0.25 * second)
    record["config"] |= {"preset": "paper", "width": 0.5, "retrain": True, "samples": None}
    assert RUN.file_name(record).endswith(
        "digits-mlp-w0.5-weight-alpha0.25-statistics5000-paper-retrained"
    )


# ---------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("name", RECORDS)
def test_shipped_records(name):
    record = records.read(EXPERIMENTS / "results" / f"permute_first_layers-{name}.json")
    assert record["seconds"]["total"] < 600 and record["data"]["fallback"] is False
    assert RUN.file_name(record) == f"permute_first_layers-{name}"


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is not a number of images, from 1 on"),
        (["--statistics", "all"], "'all' is not a number of images"),
        (["--alpha", "2"], "'2' is not a number from 0 to 1"),
        (["--match", "none"], "invalid choice: 'none'"),
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
        permute.main([*arguments, "--out", str(tmp_path / "out")])
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "--pairs" not in error
    assert not (tmp_path / "out").exists()


def test_weights_alone_need_no_statistics(copies, tmp_path):
    """Networks with norms and weight matching: nothing is measured that nothing reads."""
    images = dataclasses.replace(copies.images, statistics=SimpleNamespace())
    run = run_on(dataclasses.replace(copies, images=images), tmp_path)
    pair = pairs.Pair(run, permute.Config(), ["weight"], (0.75, 0.25))
    assert pair.moments is None and pair.measured("averages", "none", "weight")["loss"] > 0
    assert [note["method"] for note in run.notes["matching"]] == ["weight"]
    assert set(pair.maps("weight").permutations[1]) == set(copies.net.spec.groups)
