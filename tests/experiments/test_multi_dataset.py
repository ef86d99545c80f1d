"""The experiment on networks of different data sets, in its quickest form, on the digits."""

from __future__ import annotations

import copy
import dataclasses
import doctest
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
claims, joint, records, sets_, timing = (
    importlib.import_module(f"kit.{name}") for name in "claims joint records sets timing".split()
)
multi = importlib.import_module("multi_dataset")
paper = importlib.import_module("papers.multi_dataset")

RUN = multi.EXPERIMENT
AS, UNLIKE, OPEN, NEW = claims.VERDICTS
COUNTS = (2, 4, 8)
QUICK = sets_.PRESETS["quick"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    path = multi.main(["--quick", "--out", str(folder)])
    return path, records.read(path)


@pytest.fixture(scope="module")
def sets():
    """The digits, and two thirds of their classes turned."""
    digits = sets_.load("digits", QUICK, None)
    turned = sets_.load("digits-turned", QUICK, None)
    kept = {k: getattr(turned, f"{k}_labels") < 6 for k in ("train", "test")}
    fewer = {
        f"{k}_{what}": getattr(turned, f"{k}_{what}")[kept[k]]
        for k in kept
        for what in ("images", "labels")
    }
    return [digits, dataclasses.replace(turned, classes=6, **fewer)]


def rows_of(names, values, ensemble):
    """Rows of a combination with some means by method and number of layers merged."""
    joint, rows = "+".join(names), []
    for place, name in enumerate(names):
        # Accuracies differ, and their mean is what was given.
        apart = 0.1 * (place - (len(names) - 1) / 2)
        row = {"datasets": joint, "head": name, "tested": name}
        rows.append({**row, "method": "network", "layers": None, "accuracy": ensemble})
        rows += [
            {**row, "method": method, "layers": count, "accuracy": value + apart}
            for method, of in values.items()
            for count, value in zip(COUNTS, of, strict=True)
        ]
    return rows


@pytest.fixture
def told():
    """A record in which everything is as in the paper."""
    names = ["digits", "mnist", "cifar10"]
    pair = {"zip": (0.7, 0.6, 0.4), "permute": (0.6, 0.5, 0.35), "average": (0.5, 0.3, 0.1)}
    whole = {"zip": (0.65, 0.45, 0.35), "permute": (0.6, 0.4, 0.3), "average": (0.4, 0.2, 0.1)}
    data = [{"name": name, "classes": 10, "test_images": 10_000} for name in names]
    rows = rows_of(names[:2], pair, 0.75) + rows_of(names, whole, 0.75)
    about = {"model": {"depth": 9}, "config": {"quick": False}, "data": data}
    return records.Record(about | {"rows": rows})


def put(record, group, method, layers, value):
    """Changes a mean."""
    names = record.rows.distinct("datasets", method="network")
    (name,) = [name for name in names if (name.count("+") == 1) == (group == "pairs")]
    rows = record.rows.where(datasets=name, method=method, layers=layers)
    change = value - rows.mean()
    for row in rows:
        row["accuracy"] += change


# -------------------------------------------------------------------------------------- quick run


def test_record_is_complete(quick):
    path, record = quick
    assert path.name == "multi_dataset-digits+digits-turned-quick.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".png", ".md"}
    assert [d["name"] for d in record["data"]] == ["digits", "digits-turned"]
    assert {"data", "training", "trace", "statistics", "matching", "total"} <= set(
        record["seconds"]
    )
    assert {"python", "vfjax", "jax"} <= set(record["versions"]) and record["date"]
    rows, joint = record.rows, "digits+digits-turned"
    names = joint.split("+")
    merged = rows.where(datasets=joint, method=set(multi.METHODS))
    assert [(row["method"], row["layers"], row["head"]) for row in merged] == [
        (method, count, name) for method in multi.METHODS for count in (1, 2) for name in names
    ]
    for row in merged:
        # A trunk and two heads: less than two networks, the less the more is merged.
        assert row["head"] == row["tested"]
        assert 1 < row["params_ratio"] < 2 and 1 < row["flops_ratio"] < 2
    assert merged[0]["params_ratio"] > merged[2]["params_ratio"]
    edges = rows.where(datasets=joint, method="network")
    assert [(r["head"], r["tested"]) for r in edges] == [(a, b) for a in names for b in names]
    for name in names:
        own = edges.values(head=name, tested=name)
        assert own == rows.values(method="as trained", head=name)
    assert record.notes("statistics").only(datasets=joint)["images"] > 0
    assert record["seeds"] == {"networks": [0, 1]}
    assert "QUICK, MEANS NOTHING" in record["title"] and record["claims"] == []
    (table,) = multi.tables_of(record)
    assert len(table.lines) == 2 + 1 + 6 and len(table.header) == 6
    assert all(line[3] for line in table.lines)


def test_the_summary_is_of_the_combinations(told):
    other = rows_of(["digits", "cifar10"], {m: (0.9, 0.8, 0.7) for m in multi.METHODS}, 0.95)
    told["rows"] += other
    summary = multi.summary_of(told)
    assert summary["pairs"]["zip"] == pytest.approx({"2": 0.8, "4": 0.7, "8": 0.55})
    assert summary["all"]["zip"] == pytest.approx({"2": 0.65, "4": 0.45, "8": 0.35})
    assert summary["pairs"]["ensemble"] == pytest.approx(0.85)


def test_figures_name_their_axes(quick):
    figure = multi.figure_of(quick[1])
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert axes.get_xlabel() and "%" in axes.get_ylabel() and axes.get_title()


def test_names_of_records(quick):
    record = copy.deepcopy(quick[1])
    config = record["config"]
    names = [RUN.file_name(record)]
    for change in (
        {"quick": False},
        {"seed": 3},
        {"preset": "paper"},
        {"datasets": ["mnist", "a"]},
    ):
        config |= change
        names.append(RUN.file_name(record))
    assert len(set(names)) == len(names) and names[-1] == "multi_dataset-mnist+a-seed3-paper"


# ------------------------------------------------------------------------------------- its parts


def test_batches_are_mixed_evenly(sets):
    batches = sets_.mixed(sets)
    count = min(len(d.train_images) for d in sets)
    assert len({len(batch) for batch in batches}) == 1
    whole = np.concatenate(batches)
    assert count * 2 * 0.9 < len(whole) <= count * 2
    for k, dataset in enumerate(sets):
        wanted = data.normalise(jnp.asarray(dataset.train_images), dataset.mean, dataset.std)
        np.testing.assert_array_equal(whole[k::2], wanted[: len(whole) // 2])


def test_heads_are_tested_on_their_classes(sets):
    """A model that knows the label of every image by its place, in classes beyond as well."""
    tests = sets_.tests_of(sets)
    counts = [len(d.test_labels) for d in sets]
    total = sum(counts)
    assert tests.shape[1] == sets_.BATCH and len(tests) * sets_.BATCH >= total
    labels = np.concatenate([d.test_labels for d in sets])
    logits = np.zeros((len(tests) * sets_.BATCH, 10), np.float32)
    logits[np.arange(total), labels] = 1
    # What only a data set of ten classes may look at.
    logits[counts[0] : total, 7] = 2
    assert sets_.accuracies(logits, sets) == {"digits": 1.0, "digits-turned": 1.0}
    model = jax.tree_util.Partial(lambda w, x: (x.sum((1, 2)) @ w, -(x.sum((1, 2)) @ w)))
    model = jax.tree_util.Partial(model, jnp.arange(10.0)[None])
    first, second = (sets_.accuracies(part, sets) for part in joint.outputs(model, tests))
    bright = [np.asarray(x).sum((1, 2, 3)) > 0 for x in tests]
    nines = np.where(np.concatenate(bright)[: counts[0]], 9, 0)
    assert first["digits"] == pytest.approx(np.mean(nines == sets[0].test_labels))
    assert second["digits"] == pytest.approx(np.mean(9 - nines == sets[0].test_labels))


class Small(nn.Module):
    """Two layers and a BatchNorm between them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def test_a_network_merged_with_itself_is_itself(sets):
    """In every way, with BatchNorm's statistics measured anew in all of them."""
    model = Small()
    x = jax.ShapeDtypeStruct((sets_.BATCH, 8, 8, 1), jnp.float32)
    tree = jax.jit(model.lazy_init)(jax.random.key(0), x)
    net = vfjax.trace(models.apply_fn(model), tree, x)
    watch = timing.Stopwatch()
    both = joint.Networks(net, [tree, tree], sets_.mixed(sets), watch)
    tests = sets_.tests_of(sets)

    def measured(model):
        return [sets_.accuracies(logits, sets) for logits in joint.outputs(model, tests)]

    first, second = measured(both.merged(None, 0))
    assert first == second and "RESET" in watch.seconds
    for method in multi.METHODS:
        for dataset, found in zip(sets, measured(both.merged(both.maps(method), 1)), strict=True):
            assert found[dataset.name] == pytest.approx(first[dataset.name], abs=0.011)


def test_all_networks_take_as_many_steps(sets):
    preset = dataclasses.replace(QUICK, steps=60)
    for dataset in sets:
        recipe = sets_.recipe_of(preset, dataset)
        steps = recipe.epochs * -(-len(dataset.train_images) // recipe.batch_size)
        assert steps == pytest.approx(60, abs=2)


def test_disguises_are_other_images():
    shown = [sets_.load(n, QUICK, None) for n in ("digits", *sets_.DISGUISES)]
    images = [d.train_images for d in shown]
    np.testing.assert_array_equal(images[1], np.rot90(images[0], axes=(1, 2)))
    np.testing.assert_array_equal(images[2], 255 - images[0])
    assert [d.name for d in shown] == ["digits", "digits-turned", "digits-negative"]


# ---------------------------------------------------------------------------------------- claims


def decided(record):
    """Verdicts and numbers, by claim."""
    found = claims.decided(RUN.claims, record)
    return {row["id"].partition(".")[2]: (row["verdict"], row["here"]) for row in found}


def test_the_papers_numbers_are_as_in_the_paper(told):
    found = decided(told)
    assert len(found) == 9 and found.pop("new.sets-permuted")[0] == NEW
    assert {verdict for verdict, _ in found.values()} == {AS}
    assert found["sets.few-close"][1] == "75% of the gap"
    told["summary"] = multi.summary_of(told)
    text = multi.finding_of(told)
    assert text.startswith("Pairs: ensemble 75.0%, zipped 70.0 at 2/9, 60.0 at 4/9 and 40.0 at 8/9")


@pytest.mark.parametrize(
    # Ahead everywhere; level at one number of layers; behind at one.
    ("value", "verdict"),
    [(0.6, AS), (0.505, AS), (0.44, UNLIKE)],
)
def test_each_pair_is_judged(told, value, verdict):
    """Where one loses and another wins their mean does not tell."""
    put(told, "pairs", "zip", 4, value)
    found, text = decided(told)["sets.digits-mnist"]
    assert found == verdict
    assert text.startswith("ZipIt! 70.0 at 2/9, ")
    assert "permuted 60.0 at 2/9, 50.0 at 4/9 and 35.0 at 8/9" in text


@pytest.mark.parametrize(
    "name, group, method, layers, value, verdict",
    [
        ("pairs-order", "pairs", "permute", 8, 0.45, UNLIKE),
        ("pairs-order", "pairs", "average", 8, 0.4, UNLIKE),
        ("pairs-order", "pairs", "permute", 8, 0.393, OPEN),
        ("pairs-falls", "pairs", "zip", 4, 0.75, UNLIKE),
        ("all-order", "all", "zip", 8, 0.25, UNLIKE),
        ("all-order", "all", "zip", 8, 0.303, OPEN),  # the permuted ones have 0.3
        ("all-falls", "all", "zip", 4, 0.3, UNLIKE),
        ("near-ensemble", "pairs", "zip", 2, 0.6, UNLIKE),
        ("near-ensemble", "pairs", "zip", 2, 0.8, UNLIKE),
        ("near-ensemble", "pairs", "zip", 2, 0.748, OPEN),
        ("all-lose-more", "all", "zip", 4, 0.65, UNLIKE),
        ("all-lose-more", "all", "zip", 4, 0.595, OPEN),
        ("few-close", "all", "zip", 2, 0.46, UNLIKE),
        ("few-close", "all", "zip", 2, 0.55, OPEN),
    ],
)
def test_each_claim_can_fail(told, name, group, method, layers, value, verdict):
    put(told, group, method, layers, value)
    found, here = decided(told)[f"sets.{name}"]
    assert found == verdict
    assert f"{100 * value:.1f}" in here or name in ("all-lose-more", "few-close")


def test_what_has_vanished_shows_nothing(told):
    for method, value in (("zip", 0.19), ("permute", 0.15), ("average", 0.11)):
        put(told, "all", method, 8, value)
    assert decided(told)["sets.all-order"][0] == OPEN


def test_a_pair_alone_has_fewer_claims(told):
    rows = [row for row in told["rows"] if row["datasets"].count("+") == 1]
    found = records.Record(told | {"rows": rows, "data": told["data"][:2]})
    assert len(decided(found)) == 5
    assert decided(found)["new.sets-permuted"][1].startswith("pairs, 60.0 at 2/9")


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--datasets", "digits"], "--datasets must be two or more different ones"),
        (["--datasets", "digits", "digits"], "--datasets must be two or more different ones"),
        (["--datasets", "birds"], "invalid choice: 'birds'"),
        (["--seed", "-1"], "'-1' is not a seed, from 0 on"),
        (["--datasets", "mnist", "digits", "--data-dir", "/nowhere"], "'mnist' is not prepared"),
        (
            ["--data-dir", "/nowhere"],
            "Without files: --quick, or --datasets digits digits-turned.",
        ),
        (["--quick", "--preset", "paper"], "--quick has sizes of its own"),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        multi.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_examples_in_docstrings():
    found = doctest.testmod(sets_)
    assert found.attempted and not found.failed
