"""The experiment on disjoint classes, in its quickest form, on the digits; its records."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import vfjax
from vfjax import data, merge, models

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
common = importlib.import_module("_common")
disjoint = importlib.import_module("_disjoint")
edges = importlib.import_module("_edges")
heads = importlib.import_module("_heads")
kit_edges = importlib.import_module("kit.edges")
zipit = importlib.import_module("zipit_disjoint")

TASKS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
DEPTH, STOPS = 6, (2, 4, 6)
MATCHERS = ("identity", "permute", "kmeans", "greedy", "unbounded")
OPTIONS = ["--dataset", "digits", "--model", "digits-mlp", "--epochs", "10", "--statistics", "300"]


class SmallBatchNorm(nn.Module):
    """One hidden layer with BatchNorm, whose statistics are to be measured."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="dense")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(12, name="head")(nn.relu(x))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run without normalisation, which compiles in no time."""
    folder = tmp_path_factory.mktemp("disjoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disjoint, "IMAGES", (100,))
        patch.setattr(disjoint, "ALPHAS", (0.1,))
        patch.setattr(disjoint, "BETAS", (0.0, 0.5))
        patch.setitem(disjoint.STOPS, DEPTH, STOPS)
        # By far the slowest, and optional.
        patch.setattr(disjoint, "MATCHERS", MATCHERS)
        path = zipit.main([*OPTIONS, "--out", str(folder)])
    return path, json.loads(path.read_text())


@pytest.fixture
def record(digits):
    return copy.deepcopy(digits[1])


@pytest.fixture
def as_in_paper(record):
    """The same with the paper's outcome."""
    (pair,) = record["pairs"]
    joint = {"average": 0.43, "weights": 0.462, "permutation": 0.584, "zip": 0.79, "ensemble": 0.87}
    for name, value in joint.items():
        pair["methods"][name]["joint"] = value
    for name in "AB":
        pair["networks"][f"network {name}"]["joint"] = 0.48
    for layers, value in (("2", 0.86), ("4", 0.838)):
        pair["partial"]["zip"][layers]["joint"] = value
    pair["partial"]["permutation"]["4"]["joint"] = 0.7
    matchers = {"identity": 0.43, "permute": 0.584, "kmeans": 0.291, "unbounded": 0.79}
    for place, (name, value) in enumerate((matchers | {"optimal": 0.796}).items()):
        pair["matchers"][name] = {"joint": value, "seconds": 10.0**place}
    for row in pair["sweep"]:
        row["joint"] = 0.6 if row["beta"] == 0 else 0.79
    for found in pair["images"].values():
        found["joint"] = 0.79
    for row in pair["layers"]:
        row["correlation"] = 0.6 - 0.1 * row["depth"]
    return record


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(digits):
    path, record = digits
    assert path.name == "zipit_disjoint-digits-digits-mlp-epochs10-statistics300.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert record["experiment"] == "zipit_disjoint" and "--epochs 10" in record["command"]
    counts = {key: record["data"][f"{key}_images"] for key in ("statistics", "held_out", "test")}
    assert counts == {"statistics": 300, "held_out": 260, "test": 497}
    assert record["seeds"] == {"networks": [0, 1], "embeddings": 0, "splits": [0]}
    assert record["head"]["embeddings"] == {
        "kind": "orthonormal, seed 0",
        "dimensions": 16,
        "scale": 10.0,
    }
    stages = {"data", "trace", "training", "statistics", "statistics of few images"}
    assert set(record["seconds"]) == stages | {"RESET", "test", "total"}
    assert "5+5 classes, statistics over 300 images" in record["title"]
    names = [model["checkpoint"] for model in record["edge_models"]]
    assert names == ["digits-mlp-classes0to4-seed0", "digits-mlp-classes5to9-seed1"]
    (pair,) = record["pairs"]
    assert pair["tasks"] == [list(task) for task in TASKS]
    assert set(pair["methods"]) == {"average", "weights", "permutation", "zip", "ensemble"}
    assert set(pair["partial"]["zip"]) == set(map(str, STOPS))
    assert tuple(pair["matchers"]) == MATCHERS
    assert {(row["alpha"], row["beta"]) for row in pair["sweep"]} == {
        (0.1, 0.125),
        (0.3, 0.0),
        (0.3, 0.125),
        (0.3, 0.5),
    }
    assert list(pair["images"]) == ["100", "300"]


def test_numbers_fit_together(record):
    """What is the same network is the same number wherever it is said."""
    (pair,) = record["pairs"]
    methods, whole = pair["methods"], str(DEPTH)
    for name in ("zip", "permutation"):
        assert pair["partial"][name][whole] == methods[name]
    asked = [row for row in pair["sweep"] if (row["alpha"], row["beta"]) == (0.3, 0.125)]
    joint = methods["zip"]["joint"]
    assert asked[0]["joint"] == pair["images"]["300"]["joint"] == joint
    assert pair["matchers"]["greedy"]["joint"] == joint
    assert pair["matchers"]["identity"]["joint"] == methods["average"]["joint"]
    for part in (pair["networks"], methods, *pair["partial"].values()):
        for found in part.values():
            assert 0 <= found["joint"] <= found["average"] == pytest.approx(np.mean(found["tasks"]))


def test_networks_know_their_half(record):
    (pair,) = record["pairs"]
    own = [pair["networks"][f"network {name}"]["tasks"][k] for k, name in enumerate("AB")]
    other = [pair["networks"][f"network {name}"]["tasks"][1 - k] for k, name in enumerate("AB")]
    assert min(own) > 0.9 and max(other) < 0.7
    # Each head of the ensemble is that network's.
    assert pair["methods"]["ensemble"]["tasks"] == own


def test_costs(record):
    """One network's where all is merged, two where nothing is, and in between."""
    (pair,) = record["pairs"]
    for key in ("params_ratio", "flops_ratio"):
        assert pair["methods"]["zip"][key] == pair["methods"]["average"][key] == 1
        assert pair["methods"]["ensemble"][key] == 2
        ratios = [pair["partial"]["zip"][str(k)][key] for k in STOPS]
        assert 2 > ratios[0] > ratios[1] > ratios[2] == 1


def test_what_was_merged(record):
    """Of each layer, some of it within a network."""
    (pair,) = record["pairs"]
    assert [row["depth"] for row in pair["layers"]] == list(range(1, DEPTH))
    for row in pair["layers"]:
        assert row["features"] == 64 and row["largest"] >= 2
        assert 0 < row["within"] < 1
        assert all(-1 <= row[key] <= 1 for key in ("permutation", "correlation"))


def networks_of(path, *options, shipped=False):
    """The names of the networks that a run with other options would merge."""
    args = zipit.parser().parse_args([*OPTIONS, *options, "--out", str(path.parent)])
    head = zipit.completed(args, data.load("digits"))
    args.retrain = not shipped
    ((first, second),) = zipit.networks_of(args, head, [TASKS])
    return [first.name, second.name]


def test_finished_networks_are_reused(digits, monkeypatch):
    path, record = digits
    monkeypatch.setattr(zipit.train_edges.train, "fit", None)
    assert networks_of(path) == [found["checkpoint"] for found in record["edge_models"]]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        # Towards other embeddings they are others, and after other epochs.
        (["--scale", "5"], r"trained with embeddings' scale 10\.0, not 5\.0: choose"),
        (["--epochs", "11"], r"trained with epochs 10, not 11: choose another --out"),
        (["--dimensions", "20"], r"embeddings' dimensions 16, not 20: choose"),
        (["--loss", "cross-entropy"], r"loss cosine, not cross-entropy: choose"),
    ],
)
def test_other_networks_are_not_reused(options, difference, digits, monkeypatch):
    monkeypatch.setattr(zipit.train_edges.train, "fit", None)
    with pytest.raises(common.UserError, match=difference):
        networks_of(digits[0], *options)


def test_shipped_networks_are_compared(digits, monkeypatch):
    """By their heads; what they were trained with otherwise is not asked for."""
    path, record = digits
    monkeypatch.setattr(common, "ROOT", path.parent)
    (path.parent / "checkpoints").symlink_to(path.parent / "checkpoints-cpu")
    names = [found["checkpoint"] for found in record["edge_models"]]
    assert networks_of(path, "--epochs", "3", shipped=True) == names
    with pytest.raises(common.UserError, match="scale 10.0, not 5.0: --retrain trains others"):
        networks_of(path, "--scale", "5", shipped=True)


def test_bad_options_are_found_before_images_are_read(monkeypatch, capsys, tmp_path):
    probe = zipit._edges.probed("digits", None)
    probe = dataclasses.replace(probe, name="cifar10")

    def load(*_, train=None, **__):
        assert train == 1, "all images are read"
        return probe

    monkeypatch.setattr(data, "load", load)
    for options, message in (
        (["--epochs", "2"], "--epochs is for networks that are trained"),
        (["--model", "vgg11"], "is needed in checkpoints/"),
        (["--scale", "3"], "was trained with embeddings' scale 10.0, not 3.0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            zipit.main([*options, "--out", str(tmp_path / "out")])
        assert message in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------ measurement


def test_splits():
    assert disjoint.tasks_of(10, 0) == TASKS
    for pair in (1, 2):
        first, second = disjoint.tasks_of(10, pair)
        assert len(first) == len(second) == 5 and set(first) | set(second) == set(range(10))
        assert (first, second) == disjoint.tasks_of(10, pair) != TASKS
    assert disjoint.tasks_of(10, 1) != disjoint.tasks_of(10, 2)


def test_stops():
    assert disjoint.stops_of(20) == [7, 13, 19, 20] and disjoint.middle_of(20) == 13
    assert disjoint.stops_of(5) == [1, 2, 3, 4, 5] and disjoint.middle_of(5) == 3
    assert disjoint.stops_of(14) == [5, 9, 13, 14] and disjoint.middle_of(14) == 9


def test_accuracy_of_one_and_of_two_heads():
    """Against a loop over images."""
    head = heads.of_embeddings(heads.orthonormal(5, 6), 10.0)
    found = heads.Heads(head, ((4, 0), (1, 2, 3)))
    rng = np.random.default_rng(0)
    outputs = [rng.normal(size=(40, 6)).astype(np.float32) for _ in range(2)]
    labels = rng.integers(0, 5, 40)
    rows = np.array(head.embeddings)

    def cosines(output, task):
        return 10 * rows[list(task)] @ output / np.linalg.norm(output)

    joint, hits = 0, {task: [] for task in found.tasks}
    for k, label in enumerate(labels):
        best = {}
        for task, output in zip(found.tasks, (outputs[0][k], outputs[1][k]), strict=True):
            logits = cosines(output, task)
            share = np.exp(logits) / np.exp(logits).sum()
            best |= dict(zip(task, share, strict=True))
            if label in task:
                hits[task].append(task[int(logits.argmax())] == label)
        joint += max(best, key=best.get) == label
    model = tuple(jax.tree_util.Partial(lambda o, x: o[x], jnp.asarray(o)) for o in outputs)
    batches = [(jnp.arange(25), labels[:25]), (jnp.arange(25, 40), labels[25:])]
    measured = heads.accuracy(found, model, batches)
    assert measured["joint"] == pytest.approx(joint / 40)
    assert measured["tasks"] == pytest.approx([np.mean(hits[task]) for task in found.tasks])
    # Of a single output, the closest of all.
    single = heads.accuracy(found, model[0], batches)
    closest = np.array([cosines(output, range(5)).argmax() for output in outputs[0]])
    assert single["joint"] == pytest.approx(np.mean(closest == labels))


def test_plain_classifiers_are_compared_by_probability():
    head = heads.of_embeddings(np.eye(4), None)
    found = heads.Heads(head, ((0, 1), (2, 3)))
    # The second task's logits are larger, the first one's are surer.
    scores = found(jnp.array([[3.0, 0.0, 9.0, 8.0]]))
    np.testing.assert_allclose(scores[0, :2].sum(), 1, rtol=1e-6)
    assert int(scores.argmax()) == 0


def test_statistics_of_norms_are_measured():
    """RESET, of one network and of one head after another."""
    dataset = data.load("digits", train=60, test=20)
    model = SmallBatchNorm()
    x = jnp.zeros((4, 8, 8, 1))
    variables = [model.init(jax.random.key(k), x) for k in range(2)]
    net = vfjax.trace(models.apply_fn(model), variables[0], x)
    head = heads.of_embeddings(heads.orthonormal(10, 12), 10.0)
    args = argparse.Namespace(alpha=0.3, beta=0.125, statistics=40, held_out=20, samples=20)
    images = kit_edges.images_of(dataset, args.statistics, args.held_out, args.samples)
    setting = disjoint.Setting(net, head, images)
    pair = disjoint.Pair(setting, variables, TASKS, args, common.Stopwatch())
    first, second = pair.reset(tuple(variables), "both")
    stored = first.trunk["batch_stats"]["norm"]
    x = jnp.concatenate([x for x, _ in images.statistics])
    site = net.norms[0].name + ":in"
    _, values = net.run(variables[0], x, capture=[site])
    for name in ("mean", "var"):
        expected = getattr(values[site], name)(0)
        np.testing.assert_allclose(stored[name], expected, rtol=1e-4, atol=1e-5)
    assert isinstance(second, merge.Merged) and first.trunk is not second.trunk
    found = pair.merged(pair.zip, "zip")
    assert np.isfinite(found["joint"]) and found["params_ratio"] == 1


# ------------------------------------------------------------------------------- what is said of it


def test_the_outcome_of_the_paper(as_in_paper):
    claims = zipit.claims_of(as_in_paper)
    assert len(claims) == 14 and [holds for holds, _ in claims].count(None) == 2
    assert all(holds is not False for holds, _ in claims)
    found = zipit.findings(as_in_paper)
    assert "Unlike" not in found and "beta 0.125 gives 79.0, permutation 58.4" in found
    assert "ZipIt! 4/6 gives 83.8 (permuted 4/6: 70.0), ZipIt! 6/6 79.0" in found
    assert "k-means gives 29.1 (1e+02 s), permutation 58.4 (10 s)" in found
    assert found == common.told(*zipit.outcome(as_in_paper))


def put(*place, **values):
    def change(pair):
        for key in place:
            pair = pair[key]
        pair.update(values)

    return change


def whole_sweep(value):
    def change(pair):
        for row in pair["sweep"]:
            row["joint"] = value

    return change


@pytest.mark.parametrize(
    ("change", "flipped", "said"),
    [
        (
            put("methods", "permutation", joint=0.785),
            [0],
            "beta 0.125 gives 79.0, permutation 78.5",
        ),
        (put("methods", "average", joint=0.58), [2], "the weight average 58.0"),
        (put("methods", "weights", joint=0.58), [3], "by weights 58.0"),
        (put("networks", "network B", joint=0.9), [4], "networks alone 90.0"),
        (put("partial", "zip", "4", joint=0.795), [5, 6], "ZipIt! 4/6 gives 79.5, the ensemble"),
        (put("methods", "ensemble", joint=0.9), [6], "the ensemble 90.0"),
        (whole_sweep(0.7), [8], "with no pairs within a network (beta 0) it is 70.0"),
        (put("matchers", "identity", joint=0.6), [9], "identity gives 60.0"),
        (put("matchers", "kmeans", joint=0.58), [10], "k-means gives 58.0"),
        (put("matchers", "optimal", joint=0.9), [11], "the optimal ones 90.0"),
        (put("matchers", "optimal", seconds=1.0), [11], "the optimal ones 79.6 (1 s)"),
        (put("images", "100", joint=0.7), [12], "100 images for the statistics give 70.0"),
        (put("layers", 2, correlation=0.9), [13], "0.50, 0.40, 0.90, 0.20 and 0.10"),
    ],
)
def test_each_claim_can_fail(as_in_paper, change, flipped, said):
    change(as_in_paper["pairs"][0])
    claims = zipit.claims_of(as_in_paper)
    assert [k for k, (holds, _) in enumerate(claims) if holds is False] == flipped
    assert said in zipit.findings(as_in_paper).partition("Unlike the paper: ")[2]


def test_without_the_optimal_matching(as_in_paper):
    del as_in_paper["pairs"][0]["matchers"]["optimal"]
    assert len(zipit.claims_of(as_in_paper)) == 13
    assert "optimal" not in zipit.findings(as_in_paper)
    assert zipit.figure_of(as_in_paper).axes


def test_what_the_optimal_matching_needs_is_named(monkeypatch, caplog):
    """Where it is left out."""
    monkeypatch.setattr(disjoint, "MATCHERS", ("optimal",))
    monkeypatch.setattr(disjoint.importlib.util, "find_spec", lambda name: None)
    assert disjoint.Pair.matchers(argparse.Namespace()) == {}
    assert 'needs networkx, pip install ".[matching]"' in caplog.text


def test_records_from_before_pairs_without_a_budget(as_in_paper):
    del as_in_paper["pairs"][0]["matchers"]["unbounded"]
    said = [text for _, text in zipit.claims_of(as_in_paper)]
    assert any(text.startswith("greedy pairs give ") for text in said)
    assert zipit.figure_of(as_in_paper).axes and len(said) == 14


def test_the_spread_over_image_counts_is_told(as_in_paper):
    as_in_paper["pairs"][0]["images"]["100"]["joint"] = 0.7
    (said,) = (text for holds, text in zipit.claims_of(as_in_paper) if "a range of" in text)
    assert said.startswith(
        "with 100 to 300 images for the statistics ZipIt! 6/6 gives 70.0 to 79.0"
    )
    assert "a range of 9.0 points, where it is 20.6 above permutation, on a single pair" in said
    as_in_paper["pairs"] *= 2
    as_in_paper["pairs"][0]["methods"]["permutation"]["joint"] = 0.8
    assert "1.0 below permutation, on the mean of 2 pairs" in zipit.spread_of(as_in_paper)


def test_held_out_images_choose(as_in_paper):
    """By their accuracy alone: that on test images has no say."""
    (pair,) = as_in_paper["pairs"]
    for k, row in enumerate(pair["sweep"]):
        row["held_out"], row["joint"] = k / 10, 1 - k / 10
    last = pair["sweep"][-1]
    expected = (last["alpha"], last["beta"], pytest.approx(last["joint"]))
    assert zipit.chosen(as_in_paper) == expected
    text = f"alpha {last['alpha']:g} and beta {last['beta']:g}, chosen on held-out training images"
    assert any(holds is None and text in said for holds, said in zipit.claims_of(as_in_paper))


def test_several_pairs(record):
    other = copy.deepcopy(record["pairs"][0])
    record["pairs"][0]["methods"]["zip"]["joint"] = 0.5
    other["methods"]["zip"]["joint"] = 0.52
    record["pairs"].append(other)
    assert zipit.mean(record, "methods", "zip", "joint") == pytest.approx(0.51)
    assert zipit.title_of(record).endswith("mean of 2 pairs")
    header, lines = zipit.table_of(record)
    assert {len(line) for line in lines} == {len(header)}
    assert zipit.figure_of(record).axes


def test_figure_names_its_axes(record):
    axes = zipit.figure_of(record).axes
    assert len(axes) == 6 and all(a.get_xlabel() and a.get_ylabel() for a in axes)
    assert axes[0].get_xlabel() == "layers merged l (of L = 6; 0: ensemble)"
    (pair,) = record["pairs"]
    joint = [pair["methods"]["ensemble"]["joint"]]
    joint += [pair["partial"]["zip"][str(k)]["joint"] for k in STOPS]
    np.testing.assert_allclose(axes[0].containers[0].lines[0].get_ydata(), 100 * np.array(joint))


def test_table(record):
    header, lines = zipit.table_of(record)
    assert header[:3] == ["test accuracy, %", "joint", "task A"]
    names = [line[0] for line in lines]
    assert names[:4] == ["network A", "network B", "weight average", "permuted by weights"]
    assert names[4] == "permuted 6/6" and "ZipIt! 2/6" in names and names[-1] == "ensemble"
    found = dict(zip(names, lines, strict=True))["ZipIt! 6/6"]
    assert found[1] == f"{100 * record['pairs'][0]['methods']['zip']['joint']:.2f}"
    assert found[-2:] == ["1.00", "1.00"]


def test_file_name_has_what_is_not_default(record):
    config = record["config"]
    config |= zipit.DEFAULTS["cpu"] | {"epochs": zipit.NETWORKS["cpu", "digits"][3]}
    assert zipit.file_name(record) == "zipit_disjoint-digits-digits-mlp"
    config |= {"alpha": 1.0, "beta": 0.5, "pairs": 2, "samples": 7, "dimensions": 20}
    expected = "zipit_disjoint-digits-digits-mlp-20dimensions-alpha1-beta0.5-2pairs-samples7"
    assert zipit.file_name(record) == expected
    record["head"] = {"loss": "cross-entropy"}
    assert "-cross-entropy-alpha1" in zipit.file_name(record)


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is no number of images, from 1 on"),
        (["--alpha", "2"], "'2' is no number from 0 to 1"),
        (["--model", "vgg99"], "'vgg99' is no model"),
        (["--pairs", "0"], "'0' is no number of pairs"),
        (["--preset", "paper", "--dataset", "digits"], "give --retrain, too"),
        (["--preset", "paper", "--dataset", "digits", "--retrain"], "--preset paper is not for"),
        (["--dataset", "digits", "--dimensions", "4"], "10 orthonormal rows need as many"),
        (["--dataset", "digits", "--embeddings", "/nowhere.npy"], "no array could be read"),
        (["--dataset", "digits", "--scale", "inf"], "'inf' is no finite number above 0"),
        (["--dataset", "digits", "--scale", "-1"], "'-1' is no finite number above 0"),
        (
            ["--dataset", "digits", "--loss", "cross-entropy", "--embeddings", "a.npy"],
            "--embeddings: --loss cross-entropy has no embeddings",
        ),
        (
            ["--dataset", "digits", "--embeddings", "a.npy", "--dimensions", "12"],
            "--dimensions is for orthonormal embeddings",
        ),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        zipit.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_networks_that_are_not_shipped(tmp_path):
    with pytest.raises(common.UserError, match=r"vgg11-classes0to4-seed0 is needed .* --retrain"):
        networks_of(tmp_path / "record", "--model", "vgg11", shipped=True)


def test_defaults_are_shown_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        zipit.main(["--help"])
    options = " ".join(capsys.readouterr().out.split()).partition("options:")[2].split(" --")
    assert options and all(option.count("(default: ") <= 1 for option in options)
    assert any("scale S of the cosines, above 0 (default: 10)" in option for option in options)
