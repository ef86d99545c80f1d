"""The experiment on disjoint classes, in its quickest form, on the digits; its records."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import vfjax
from vfjax import data, models

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, cli, disjoint, edges, heads, joint, records, timing = (
    importlib.import_module(f"kit.{name}")
    for name in "claims cli disjoint edges heads joint records timing".split()
)
zipit = importlib.import_module("zipit_disjoint")
paper = importlib.import_module("papers.zipit_disjoint")

RUN = zipit.EXPERIMENT
AS, UNLIKE, OPEN, NEW = claims.VERDICTS
TASKS = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
DEPTH, STOPS = 6, (2, 4, 6)
# By far the slowest one is optional.
MATCHERS = {way: name for way, name in zipit.MATCHERS.items() if way != "optimal"}
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
        patch.setattr(zipit, "IMAGES", (100,))
        patch.setattr(zipit, "ALPHAS", (0.1,))
        patch.setattr(zipit, "BETAS", (0.0, 0.5))
        patch.setattr(disjoint, "stops_of", lambda depth: list(STOPS))
        patch.setattr(zipit, "MATCHERS", MATCHERS)
        path = zipit.main([*OPTIONS, "--out", str(folder)])
    return path, records.read(path)


@pytest.fixture
def record(digits):
    return copy.deepcopy(digits[1])


def cells(record, way, **where):
    """The rows of a way with alpha, beta and images as asked for, unless they are given."""
    rows = record.rows if where else paper.asked(record)
    return rows.where(way=way, **where)


def put(way, **values):
    """Changes a record: what rows of a way have, of those with some layers if they are given."""
    layers = values.pop("layers", None)

    def change(record):
        found = cells(record, way)
        found = found if layers is None else found.where(layers=layers)
        assert found
        for row in found:
            row.update(values)

    return change


def whole_sweep(value):
    def change(record):
        for row in record.rows.where(way="zip", layers=DEPTH):
            row["accuracy"] = value

    return change


@pytest.fixture
def as_in_paper(record):
    """The same with the paper's outcome, on many images."""
    record["data"]["test_images"] = 10_000
    whole_sweep(0.79)(record)
    joint = {"average": 0.43, "weights": 0.462, "permutation": 0.584, "ensemble": 0.87}
    joint |= {f"network {name}": 0.48 for name in "AB"}
    for name, value in joint.items():
        put(name, accuracy=value)(record)
    for layers, value in ((2, 0.86), (4, 0.838)):
        put("zip", layers=layers, accuracy=value)(record)
    put("permutation", layers=4, accuracy=0.7)(record)
    (row,) = record.rows.where(way="unbounded")
    record["rows"].append({**row, "way": "optimal"})
    matchers = {"identity": 0.43, "permute": 0.584, "kmeans": 0.291, "unbounded": 0.79}
    for place, (name, value) in enumerate((matchers | {"optimal": 0.796}).items()):
        put(name, accuracy=value, seconds=10.0**place)(record)
    for row in record.rows.where(way="zip", beta=0.0):
        row["accuracy"] = 0.6
    for row in record.rows.where(way="features"):
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
    stages = {"data", "trace", "training", "statistics", "matching"}
    assert set(record["seconds"]) == stages | {"test", "total"}
    assert "5+5 classes, statistics over 300 images" in record["title"]
    names = [model["checkpoint"] for model in record["edge_models"]]
    assert names == ["digits-mlp-classes0to4-seed0", "digits-mlp-classes5to9-seed1"]
    assert record["tasks"] == [TASKS]
    ways = ["network A", "network B", "ensemble", "average", "weights", "permutation", "zip"]
    assert record.rows.distinct("way") == [*ways, *MATCHERS, "features"]
    for way in ("zip", "permutation"):
        assert [row["layers"] for row in cells(record, way)] == list(STOPS)
    zips = record.rows.where(way="zip", layers=DEPTH, images=300)
    assert {(row["alpha"], row["beta"]) for row in zips} == {
        (0.1, 0.125),
        (0.3, 0.0),
        (0.3, 0.125),
        (0.3, 0.5),
    }
    assert list(paper.swept(record, "images")) == [100, 300]
    assert not (path.parent / "checkpoints-cpu" / ".training").exists()


def test_numbers_fit_together(record):
    """What is the same network is the same number wherever it is said."""
    (zipped,) = cells(record, "zip").where(layers=DEPTH).values()
    (permuted,) = cells(record, "permutation").where(layers=DEPTH).values()
    # They are merged twice, by maps of other forms: rounding may tell two images differently.
    assert record.rows.values(way="greedy") == pytest.approx([zipped], abs=0.005)
    assert record.rows.values(way="permute") == pytest.approx([permuted], abs=0.005)
    assert record.rows.values(way="identity") == record.rows.values(way="average")
    for found in record.rows:
        if found["way"] != "features":
            mean = np.mean([found["task_a"], found["task_b"]])
            assert 0 <= found["accuracy"] <= found["average"] == pytest.approx(mean)


def test_networks_know_their_half(record):
    keys = ("task_a", "task_b")
    found = [record.rows.only(way=f"network {name}") for name in "AB"]
    own = [row[key] for row, key in zip(found, keys, strict=True)]
    other = [row[key] for row, key in zip(found, keys[::-1], strict=True)]
    assert min(own) > 0.9 and max(other) < 0.7
    # Each head of the ensemble is that network's.
    ensemble = record.rows.only(way="ensemble")
    assert [ensemble[key] for key in keys] == own


def test_costs(record):
    """One network's where all is merged, two where nothing is, and in between."""
    for key in ("params_ratio", "flops_ratio"):
        assert record.rows.values(key, way="average") == [1]
        assert record.rows.values(key, way="ensemble") == [2]
        ratios = cells(record, "zip").values(key)
        assert 2 > ratios[0] > ratios[1] > ratios[2] == 1


def test_what_was_merged(record):
    """Of each layer, some of it within a network."""
    rows = record.rows.where(way="features")
    assert [row["depth"] for row in rows] == list(range(1, DEPTH))
    for row in rows:
        assert row["features"] == 64 and row["largest"] >= 2
        assert 0 < row["within"] < 1
        assert all(-1 <= row[key] <= 1 for key in ("permuted_correlation", "correlation"))


def networks_of(path, *options, shipped=False):
    """The names of the networks that a run with other options would merge."""
    config = cli.parse(zipit.Config, "zipit_disjoint.py", "", [*OPTIONS, *options])
    config = dataclasses.replace(config, out=str(path.parent))
    args = disjoint.training_of(config, data.load("digits"))
    found = []
    for seed, task in enumerate(TASKS):
        one = dataclasses.replace(args, classes=tuple(task), seeds=(seed,))
        found += disjoint.training.shipped(one) if shipped else disjoint.training.run(one)
    return [folder.name for folder in found]


def test_finished_networks_are_reused(digits, monkeypatch):
    path, record = digits
    monkeypatch.setattr(disjoint.training.train, "fit", None)
    assert networks_of(path) == [found["checkpoint"] for found in record["edge_models"]]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        # Towards other embeddings they are others, and after other epochs.
        (["--scale", "5"], r"trained with embeddings scale 10\.0, not 5\.0: choose"),
        (["--epochs", "11"], r"trained with recipe epochs 10, not 11: choose another --out"),
        (["--dimensions", "20"], r"embeddings dimensions 16, not 20: choose"),
        (["--loss", "cross-entropy"], r"loss cosine, not cross-entropy: choose"),
    ],
)
def test_other_networks_are_not_reused(options, difference, digits, monkeypatch):
    monkeypatch.setattr(disjoint.training.train, "fit", None)
    with pytest.raises(cli.UserError, match=difference):
        networks_of(digits[0], *options)


def test_shipped_networks_are_compared(digits, monkeypatch):
    """By their heads; what they were trained with otherwise is not asked for."""
    path, record = digits
    monkeypatch.setattr(records, "ROOT", path.parent)
    (path.parent / "checkpoints").symlink_to(path.parent / "checkpoints-cpu")
    names = [found["checkpoint"] for found in record["edge_models"]]
    assert networks_of(path, "--epochs", "3", shipped=True) == names
    with pytest.raises(cli.UserError, match="scale 10.0, not 5.0: --retrain trains others"):
        networks_of(path, "--scale", "5", shipped=True)


def test_bad_options_are_found_before_images_are_read(monkeypatch, capsys, tmp_path):
    probe = edges.probed("digits", None)
    probe = dataclasses.replace(probe, name="cifar10")

    def load(*_, train=None, **__):
        assert train == 1, "all images are read"
        return probe

    monkeypatch.setattr(data, "load", load)
    for options, message in (
        (["--epochs", "2"], "--epochs is for networks that are trained"),
        (["--model", "vgg11"], "are needed in checkpoints/, 0 found"),
        (["--scale", "3"], "was trained with embeddings scale 10.0, not 3.0"),
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
        assert [first, second] == disjoint.tasks_of(10, pair) != TASKS
    assert disjoint.tasks_of(10, 1) != disjoint.tasks_of(10, 2)


def test_stops():
    for depth, stops, middle in (
        (20, [7, 13, 19, 20], 13),
        (5, [1, 2, 3, 4, 5], 3),
        (14, [5, 9, 13, 14], 9),
    ):
        assert disjoint.stops_of(depth) == stops
        rows = [{"way": "zip", "layers": stop} for stop in stops]
        about = {"config": {"alpha": 0.3, "beta": 0.1}, "data": {"statistics_images": 5}}
        found = records.Record(about | {"rows": rows, "model": {"depth": depth}})
        assert paper.middle_of(found) == middle


def test_accuracy_of_one_and_of_two_heads():
    """Against a loop over images."""
    head = heads.of_embeddings(heads.orthonormal(5, 6), 10.0)
    tasks = [(4, 0), (1, 2, 3)]
    rng = np.random.default_rng(0)
    outputs = [rng.normal(size=(40, 6)).astype(np.float32) for _ in range(2)]
    labels = rng.integers(0, 5, 40)
    rows = np.array(head.embeddings)

    def cosines(output, task):
        return 10 * rows[list(task)] @ output / np.linalg.norm(output)

    whole, hits = 0, {task: [] for task in tasks}
    for k, label in enumerate(labels):
        best = {}
        for task, output in zip(tasks, (outputs[0][k], outputs[1][k]), strict=True):
            logits = cosines(output, task)
            share = np.exp(logits) / np.exp(logits).sum()
            best |= dict(zip(task, share, strict=True))
            if label in task:
                hits[task].append(task[int(logits.argmax())] == label)
        whole += max(best, key=best.get) == label
    measured = heads.accuracies(head, tasks, outputs, labels)
    assert measured["accuracy"] == pytest.approx(whole / 40)
    parts = [np.mean(hits[task]) for task in tasks]
    assert [measured["task_a"], measured["task_b"]] == pytest.approx(parts)
    assert measured["average"] == pytest.approx(np.mean(parts))
    # Of a single output, the closest of all.
    single = heads.accuracies(head, tasks, outputs[:1], labels)
    closest = np.array([cosines(output, range(5)).argmax() for output in outputs[0]])
    assert single["accuracy"] == pytest.approx(np.mean(closest == labels))


def test_outputs_are_by_head():
    x = np.arange(12.0).reshape(2, 3, 2)
    double = jax.tree_util.Partial(lambda x: 2 * x)
    (found,) = joint.outputs(double, x)
    np.testing.assert_array_equal(found, 2 * x.reshape(6, 2))
    both = joint.outputs(jax.tree_util.Partial(lambda x: (x, 2 * x)), x)
    np.testing.assert_array_equal(both, [x.reshape(6, 2), 2 * x.reshape(6, 2)])


def test_plain_classifiers_are_compared_by_probability():
    head = heads.of_embeddings(np.eye(4), None)
    # The second task's logits are larger, the first one's are surer.
    outputs = [jnp.array([[3.0, 0.0, 9.0, 8.0]] * 2)]
    found = heads.accuracies(head, [(0, 1), (2, 3)], outputs, np.array([0, 2]))
    assert found == {"accuracy": 0.5, "average": 1.0, "task_a": 1.0, "task_b": 1.0}


def test_statistics_of_norms_are_measured():
    """RESET, of one network and of one head after another."""
    dataset = data.load("digits", train=60, test=20)
    model = SmallBatchNorm()
    x = jnp.zeros((4, 8, 8, 1))
    variables = [model.init(jax.random.key(k), x) for k in range(2)]
    net = vfjax.trace(models.apply_fn(model), variables[0], x)
    images = edges.images_of(dataset, 40, 20, 20)
    pair = joint.Networks(net, variables, images.statistics, timing.Stopwatch())
    stored = pair.alone(0).trunk["batch_stats"]["norm"]
    x = jnp.concatenate([x for x, _ in images.statistics])
    site = net.norms[0].name + ":in"
    _, values = net.run(variables[0], x, capture=[site])
    for name in ("mean", "var"):
        expected = getattr(values[site], name)(0)
        np.testing.assert_allclose(stored[name], expected, rtol=1e-4, atol=1e-5)
    for place, output in enumerate(pair.merged(None, 0)(x)):
        np.testing.assert_allclose(output, pair.alone(place)(x), rtol=1e-4, atol=1e-5)
    whole = pair.merged(pair.maps("zip", alpha=0.3, beta=0.125, images=40), net.depth)
    (outputs,) = joint.outputs(whole, (x for x, _ in images.test))
    head = heads.of_embeddings(heads.orthonormal(10, 12), 10.0)
    found = heads.accuracies(head, TASKS, [outputs], images.test.labels)
    assert np.isfinite(found["accuracy"]) and pair.costs(whole)["params_ratio"] == 1


# ------------------------------------------------------------------------------- what is said of it


def decided(record):
    """Verdicts and numbers, by claim."""
    found = claims.decided(RUN.claims, record)
    return {row["id"].partition(".")[2]: (row["verdict"], row["here"]) for row in found}


def test_the_outcome_of_the_paper(as_in_paper):
    found = decided(as_in_paper)
    assert len(found) == 15
    for name, (verdict, _) in found.items():
        assert verdict == (NEW if name.startswith("new.") else AS), name
    assert found["disjoint.above-permutation"][1] == "ZipIt! 79.0, permutation 58.4"
    assert found["disjoint.partial-above-whole"][1] == "two thirds zipped 83.8, ZipIt! 79.0"
    assert found["new.partial-permuted"][1].endswith("two thirds permuted 70.0")
    assert found["disjoint.kmeans-below"][1] == "permutation 58.4, k-means 29.1"
    text = zipit.finding_of(as_in_paper)
    assert text.startswith("On all classes, per cent: ZipIt! 79.0, permutation 58.4")
    assert text.endswith("two thirds zipped 83.8, ensemble 87.0")


@pytest.mark.parametrize(
    ("change", "flipped", "said"),
    [
        (
            put("permutation", layers=DEPTH, accuracy=0.85),
            ["above-permutation"],
            "ZipIt! 79.0, permutation 85.0",
        ),
        (put("average", accuracy=0.6), ["permutation-helps"], "weight average 60.0"),
        (put("weights", accuracy=0.6), ["activations-above-weights"], "by weights 60.0"),
        (put("network B", accuracy=0.9), ["above-one-alone"], "network alone 90.0"),
        (
            put("zip", layers=4, accuracy=0.78),
            ["partial-above-whole", "partial-near-ensemble"],
            "two thirds zipped 78.0, ensemble 87.0",
        ),
        (put("ensemble", accuracy=0.9), ["partial-near-ensemble"], "ensemble 90.0"),
        (whole_sweep(0.7), ["within-helps", "greedy-as-optimal"], "beta 0 70.0"),
        (put("identity", accuracy=0.6), ["identity-below"], "identity 60.0"),
        (put("kmeans", accuracy=0.6), ["kmeans-below"], "k-means 60.0"),
        (put("optimal", accuracy=0.9), ["greedy-as-optimal"], "optimal pairs 90.0"),
        (
            put("optimal", seconds=1.0),
            ["greedy-as-optimal"],
            "optimal pairs 79.6, in 1e+03 and 1 s",
        ),
    ],
)
def test_each_claim_can_fail(as_in_paper, change, flipped, said):
    change(as_in_paper)
    found = {name.partition(".")[2]: row for name, row in decided(as_in_paper).items()}
    wrong = [name for name, (verdict, _) in found.items() if verdict == UNLIKE]
    assert set(wrong) <= set(flipped) and flipped[0] in wrong
    assert any(said in found[name][1] for name in wrong)


def set_few(value):
    def change(record):
        for row in record.rows.where(way="zip", images=100):
            row["accuracy"] = value

    return change


def test_few_images_and_correlations_can_fail(as_in_paper):
    set_few(0.7)(as_in_paper)
    verdict, here = decided(as_in_paper)["disjoint.few-images"]
    assert verdict == UNLIKE and here == "100 images 70.0, ZipIt! 79.0"
    as_in_paper.rows.where(way="features")[2]["correlation"] = 0.9
    verdict, here = decided(as_in_paper)["disjoint.correlation-falls"]
    assert verdict == UNLIKE and here == "0.50, 0.40, 0.90, 0.20 and 0.10"


def vanished(record):
    put("permutation", layers=DEPTH, accuracy=0.15)(record)
    put("kmeans", accuracy=0.15)(record)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (put("permutation", layers=DEPTH, accuracy=0.785), "above-permutation"),
        (put("average", accuracy=0.58), "permutation-helps"),
        (put("kmeans", accuracy=0.58), "kmeans-below"),
        (put("zip", layers=4, accuracy=0.797), "partial-above-whole"),
        (put("ensemble", accuracy=0.89), "partial-near-ensemble"),
        (set_few(0.765), "few-images"),
        # What has vanished shows nothing.
        (vanished, "kmeans-below"),
    ],
)
def test_what_noise_may_have_made_is_undecided(as_in_paper, change, name):
    change(as_in_paper)
    assert decided(as_in_paper)[f"disjoint.{name}"][0] == OPEN


def test_without_the_optimal_matching(as_in_paper):
    rows = [row for row in as_in_paper["rows"] if row["way"] != "optimal"]
    found = records.Record(as_in_paper | {"rows": rows})
    assert len(decided(found)) == 14 and "disjoint.greedy-as-optimal" not in decided(found)
    assert zipit.figure_of(found).axes


def test_what_the_optimal_matching_needs_is_named(monkeypatch, caplog):
    """Where it is left out."""
    monkeypatch.setattr(zipit, "MATCHERS", {"optimal": "optimal pairs"})
    monkeypatch.setattr(zipit.importlib.util, "find_spec", lambda name: None)
    config = cli.parse(zipit.Config, "zipit_disjoint.py", "", [])
    plan = list(zipit.plan_of(config, 5, 300))
    assert plan and not [cell for cell in plan if cell["way"] == "optimal"]
    assert 'need networkx, pip install ".[matching]"' in caplog.text


def test_the_spread_over_image_counts_is_told(as_in_paper):
    set_few(0.7)(as_in_paper)
    verdict, said = decided(as_in_paper)["new.spread"]
    assert verdict == NEW and said == "at worst 70.0, at best 79.0, permutation 58.4"


def test_held_out_images_choose(as_in_paper):
    """By their accuracy alone: that on test images has no say."""
    zips = as_in_paper.rows.where(way="zip", layers=DEPTH, images=300)
    for k, row in enumerate(zips):
        row["held_out"], row["accuracy"] = k / 10, 1 - k / 10
    last = zips[-1]
    expected = {key: last[key] for key in ("alpha", "beta")}
    assert paper.chosen(as_in_paper) == expected | {"accuracy": pytest.approx(last["accuracy"])}
    verdict, said = decided(as_in_paper)["new.tuned"]
    assert verdict == NEW
    assert said.startswith(f"alpha {last['alpha']:g} and beta {last['beta']:g} ")


def test_several_pairs(record):
    other = [{**row, "pair": 1} for row in copy.deepcopy(record["rows"])]
    record["config"]["pairs"] = 2
    put("zip", layers=DEPTH, accuracy=0.5)(record)
    for row in other:
        if row["way"] == "zip":
            row["accuracy"] = 0.52
    record["rows"] += other
    assert paper.ZIP.of(record) == pytest.approx(0.51)
    assert zipit.title_of(record).endswith("mean of 2 pairs")
    table, _ = zipit.tables_of(record)
    assert {line[0]: line[1] for line in table.lines}["ZipIt! 6/6"] == "51.00 ± 1.41"
    figure = zipit.figure_of(record)
    texts = [text.get_text() for text in figure.texts]
    assert len(figure.axes) == 6 and "Bars: standard deviation over 2 pairs." in texts


def test_figure_names_its_axes(record):
    axes = zipit.figure_of(record).axes
    assert len(axes) == 6 and all(a.get_xlabel() and a.get_ylabel() for a in axes)
    assert axes[0].get_xlabel() == "layers merged l (of L = 6; 0: ensemble)"
    joint = record.rows.values(way="ensemble") + cells(record, "zip").values()
    np.testing.assert_allclose(axes[0].containers[1].lines[0].get_ydata(), 100 * np.array(joint))


def test_table(record):
    table, matchers = zipit.tables_of(record)
    assert table.header[:3] == ["test accuracy, %", "joint", "task A"]
    names = [line[0] for line in table.lines]
    assert names[:4] == ["network A", "network B", "weight average", "permuted by weights"]
    assert names[4] == "permuted 6/6" and "ZipIt! 2/6" in names and names[-1] == "ensemble"
    found = dict(zip(names, table.lines, strict=True))["ZipIt! 6/6"]
    assert found[1] == f"{100 * paper.ZIP.of(record):.2f}"
    assert found[-2:] == ["1", "1"]
    assert [line[0] for line in matchers.lines] == [
        "identity",
        "permuted",
        "k-means",
        "ZipIt!",
        "ZipIt!, no budget",
    ]


def test_file_name_has_what_is_not_default(record):
    config = record["config"]
    usual = cli.defaults(zipit.Config, {"preset": "cpu"})
    config |= {name: usual[name] for name in ("samples", "statistics", "held_out")}
    config["epochs"] = disjoint.NETWORKS["cpu", "digits"][3]
    assert RUN.file_name(record) == "zipit_disjoint-digits-digits-mlp"
    config |= {"alpha": 1.0, "beta": 0.5, "pairs": 2, "samples": 7, "dimensions": 20}
    name = RUN.file_name(record)
    parts = {"alpha1", "beta0.5", "2pairs", "samples7", "20dimensions"}
    assert set(name.removeprefix("zipit_disjoint-digits-digits-mlp-").split("-")) == parts
    config |= {"loss": "cross-entropy", "dimensions": None}
    name = RUN.file_name(record)
    assert "-cross-entropy-" in name and "dimensions" not in name
    config |= {"loss": "cosine", "embeddings": "a/clip.npy", "scale": 5.0}
    assert "-clip-scale5-" in RUN.file_name(record)


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is not a number of images, from 1 on"),
        (["--alpha", "2"], "'2' is not a number from 0 to 1"),
        (["--model", "vgg99"], "'vgg99' is not a model"),
        (["--pairs", "0"], "'0' is not a number of pairs"),
        (["--preset", "paper", "--dataset", "digits"], "give --retrain, too"),
        (["--preset", "paper", "--dataset", "digits", "--retrain"], "--preset paper is not for"),
        (["--dataset", "digits", "--dimensions", "4"], "--dimensions must be 10 or more"),
        (["--dataset", "digits", "--embeddings", "/nowhere.npy"], "no array could be read"),
        (["--dataset", "digits", "--scale", "inf"], "'inf' is not a finite number above 0"),
        (["--dataset", "digits", "--scale", "-1"], "'-1' is not a finite number above 0"),
        (
            ["--dataset", "digits", "--loss", "cross-entropy", "--embeddings", "a.npy"],
            "--embeddings does nothing here: it is for --loss cosine",
        ),
        (
            ["--dataset", "digits", "--embeddings", "a.npy", "--dimensions", "12"],
            "--dimensions does nothing here: it is for embeddings that are orthonormal",
        ),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        zipit.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_networks_that_are_not_shipped(tmp_path):
    with pytest.raises(
        cli.UserError,
        match=r"vgg11-classes0to4-seed.* are needed .* --classes 0 1 2 3 4 .*--retrain",
    ):
        networks_of(tmp_path / "record", "--model", "vgg11", shipped=True)


def test_defaults_are_shown_once(capsys):
    with pytest.raises(SystemExit, match="0"):
        zipit.main(["--help"])
    options = " ".join(capsys.readouterr().out.split()).partition("options:")[2].split(" --")
    assert options and all(option.count("(default: ") <= 1 for option in options)
    assert any("scale S of the cosines, above 0 (default: 10.0)" in option for option in options)
