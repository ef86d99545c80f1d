"""The experiment on transport between vision transformers: its laws, records and options."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vfjax
from vfjax import align, data, merge, models, stats

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
common = importlib.import_module("_common")
vit = importlib.import_module("vit_transport")

TINY = models.ViT(blocks=2, patch=4, features=8, heads=2, expansion=2)
RECORD = "vit_transport-cifar10-vit-w0.125"
# Equal, so that fewer shapes are compiled.
COUNTS = ["--samples", "200", "--held-out", "200", "--test", "200"]
forward = jax.jit(vit._edges.forward)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on networks that are smaller, and learn for shorter, than the script's."""
    folder = tmp_path_factory.mktemp("vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "DIGITS", TINY)
        patch.setattr(vit, "DIGITS_RECIPE", dataclasses.replace(vit.DIGITS_RECIPE, epochs=3))
        options = ["--dataset", "digits", "--regularization", "0.1", *COUNTS, "--out", str(folder)]
        path = vit.main(options)
    return path, json.loads(path.read_text())


@pytest.fixture(scope="module")
def pair():
    """The tiny network, two trees of it, images, and moments on them."""
    batches = data.load("digits", train=60, test=1).batches("train", batch_size=60)
    x = next(iter(batches))[0]
    init = jax.jit(TINY.init)
    trees = [init(jax.random.key(seed), x) for seed in (0, 1)]
    net = vfjax.trace(models.apply_fn(TINY), trees[0], x)
    return net, trees, x, stats.moments(net, trees, batches, sites="taps", covariance="cross")


# -------------------------------------------------------------------------------------- matching


def test_every_group_is_of_a_kind(pair):
    net = pair[0]
    kinds = {group: vit.kind_of(net, group) for group in net.spec.groups}
    assert set(kinds.values()) == set(vit.KINDS)
    assert [group for group, kind in kinds.items() if kind == "stream"] == ["params/patches"]
    hidden = [group for group, kind in kinds.items() if kind == "hidden"]
    assert hidden == ["params/block1/mlp1", "params/block2/mlp1"]
    assert vit.layers_of(TINY.blocks) == net.depth - 1


def test_columns_are_what_they_say(pair):
    net, trees, _, moments = pair
    maps = vit.maps_of(net, trees, moments)
    assert {*maps, "soft"} == set(vit.LABELS)
    assert not any(any(of) for of in maps["direct"].maps)
    for name in ("permuted", "exact", "weights"):
        assert set(maps[name].permutations[1]) == set(net.spec.groups)
    heads = set(net.spec.within.values())
    for group, (there, back) in maps["uniform"].maps[1].items():
        # Heads go to heads, whatever becomes of the dims inside.
        assert (group in heads) == (group in maps["uniform"].permutations[1])
        if group not in heads:
            n = net.spec.sizes[group]
            np.testing.assert_allclose(there, np.full_like(there, 1 / n), rtol=1e-2)
        np.testing.assert_allclose(back, np.swapaxes(there, -1, -2), rtol=1e-2)
    assert all(not any(found.maps[0]) for found in maps.values())


def test_a_copy_in_another_order_is_found(pair):
    """Stream and hidden units: the merged network is then the network, for every k."""
    net, (tree, _), x, _ = pair
    order = net.spec.random(jax.random.key(2))
    order = {g: p for g, p in order.items() if vit.kind_of(net, g) != "attention"}
    trees = [tree, net.spec.permute(tree, order)]
    moments = stats.moments(net, trees, [x], sites="taps", covariance="cross")
    expected = np.asarray(forward(merge.as_merged(net, tree), x))
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(expected).max()}
    maps = vit.maps_of(net, trees, moments)
    for k in range(3):
        for name in ("permuted", "exact"):
            np.testing.assert_allclose(
                forward(vit.merged_of(net, trees, maps[name], k), x), expected, **close
            )
    # One kind alone does not do, and averaging neither.
    for groups in (lambda g: vit.kind_of(net, g) == "hidden", lambda g: False):
        part = vit.only(maps["exact"], groups)
        merged = forward(vit.merged_of(net, trees, part, 0), x)
        assert np.abs(merged - expected).max() > 0.05 * np.abs(expected).max()


def test_rows_are_preserve_first_merging(pair):
    net, trees, x, _ = pair
    direct = align.Maps.of_permutations([None, None])
    for k in range(3):
        row = vit.merged_of(net, trees, direct, k)
        wanted = merge.preserve_first(net, trees, layers=vit.layers_of(k))
        np.testing.assert_allclose(forward(row, x), forward(wanted, x), rtol=1e-4, atol=1e-5)
        assert (row.params, row.flops) == (wanted.params, wanted.flops)


def test_images_do_not_overlap():
    dataset = data.load("digits", test=30)
    args = vit.parser().parse_args(["--samples", "2000", "--held-out", "400", "--test", "30"])
    images = vit.images_of(args, dataset)
    # A fifth, since there are too few for both.
    assert len(images.held_out.images) == 260 and len(images.statistics.images) == 1040
    both = np.concatenate([images.statistics.images, images.held_out.images])
    np.testing.assert_array_equal(both, dataset.train_images)
    args = vit.parser().parse_args(["--samples", "100", "--held-out", "50", "--test", "30"])
    images = vit.images_of(args, dataset)
    both = np.concatenate([images.statistics.images, images.held_out.images])
    np.testing.assert_array_equal(both, dataset.train_images[:150])
    assert len(images.held_out.images) == 50 and len(images.test.images) == 30


# --------------------------------------------------------------------------------------- records


def test_record_is_complete(digits):
    path, record = digits
    name = "vit_transport-digits-vit-regularization0.1-samples200-heldout200-test200.json"
    assert path.name == name
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert [p.suffix for p in sorted(path.parent.iterdir())] == [".json", ".png"]
    assert record["blocks"] == [0, 1, 2] and record["layers"] == [0, 5, 9]
    assert list(record["columns"]) == list(vit.LABELS) and list(record["kinds"]) == list(vit.KINDS)
    for found in (*record["columns"].values(), *record["kinds"].values()):
        assert [set(cell) for cell in found] == [{"accuracy", "loss"}] * 3
    assert record["regularization"]["chosen"] == 0.1
    assert list(record["regularization"]["held_out_accuracy"]) == ["0", "0.1", "1000"]
    assert list(record["edges"]) == ["model 1", "model 2", "ensemble"]
    assert record["seeds"] == {"edge_models": [0, 1]}
    images = record["data"]
    counts = [images[f"{name}_images"] for name in ("statistics", "held_out", "test")]
    assert counts == [200, 200, 200]
    base = record["model"]
    assert record["params"][0] == base["parameters"] and record["flops"][0] == base["flops"]
    assert (
        sorted(record["params"]) == record["params"]
        and record["params"][-1] < 2 * record["params"][0]
    )
    stages = {"data", "trace", "training", "statistics of edge models", "matching", "how soft"}
    assert stages | {"edge models and ensemble", "PFM 0/2", "total"} <= set(record["seconds"])
    assert {"python", "vfjax", "jax", "numpy"} <= set(record["versions"])
    assert record["title"].startswith("scikit-learn's 8x8 digits: vit, statistics over 200 images")


def test_figure_and_table(digits):
    record = digits[1]
    figure = vit.figure_of(record)
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
    assert figure.axes[2].get_legend_handles_labels()[1] == ["exact", "0.1", "uniform"]
    header, rows = vit.table_of(record, ("<", ">"))
    assert header[1:7] == [
        *("direct", "AM", "OT-acts", "OT-acts soft (0.1)", "OT-weights", "uniform plan")
    ]
    assert [row[0] for row in rows] == [*record["edges"], "PFM 0/2", "PFM 1/2", "PFM 2/2"]
    assert {len(row) for row in rows} == {11}
    marked = [cell.startswith("<") for row in rows[3:] for cell in row[1:7]]
    columns = [vit.accuracies(record, name) for name in vit.LABELS]
    assert marked == (np.array(columns).T >= record["edge_mean"]).ravel().tolist()


def test_sentences_follow_the_record(digits):
    """What is said changes with what was measured."""
    record = json.loads(json.dumps(digits[1]))
    record["edge_mean"], record["data"]["test_images"] = 0.9, 10_000

    def verdicts(direct, transport):
        for name in vit.LABELS:
            values = {"direct": direct, "exact": transport, "soft": transport}.get(name, direct)
            record["columns"][name] = [{"accuracy": value, "loss": 1.0} for value in values]
        found = [holds for holds, _ in vit.claims_of(record)]
        decided, others = found[:-4], found[-4:]
        assert others == [None] * 4 and decided[: len(decided) // 2] * 2 == decided
        return decided[: len(decided) // 2]

    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.88, 0.9]) == [True, True, True]
    assert "Unlike" not in common.told(*vit.outcome(record))
    assert "at k = 0 and 1 OT-acts gives 60.0 and 88.0, direct averaging 10.0 and 50.0" in (
        common.told(*vit.outcome(record))
    )
    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.4, 0.9]) == [False, False, False]
    # The uniform plan is as direct averaging here.
    assert "which matches nothing, OT-acts at k = 0; OT-acts soft (0.1) at k = 0." in (
        common.told(*vit.outcome(record)).replace("; there", ".")
    )
    assert verdicts([0.1, 0.5, 0.9], [0.1, 0.6, 0.9]) == [False, True, False]
    assert verdicts([0.1, 0.5, 0.9], [0.88, 0.88, 0.9]) == [True, False, True]
    # Direct averaging that loses nothing at some k is not held against transport there.
    assert verdicts([0.1, 0.895, 0.9], [0.6, 0.89, 0.9]) == [True, True, None]
    assert "the edge models 90.0: direct averaging is near them by itself" in (
        common.told(*vit.outcome(record))
    )
    # Nor is what noise may have made an advantage; with ten times as many images it is one.
    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.507, 0.9]) == [False] * 3
    assert "direct averaging 10.0 and 50.0: above by over two standard errors at k = 0;" in (
        common.told(*vit.outcome(record))
    )
    record["data"]["test_images"] = 100_000
    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.507, 0.9])[0] is True
    assert verdicts([0.1, 0.5, 0.9], [0.05, 0.6, 0.9])[0] is False
    assert "above by over two standard errors at k = 1, below at k = 0" in (
        common.told(*vit.outcome(record))
    )


def test_head_says_what_came_out():
    """The sentences are written from the record, by update_readme.py."""
    path = EXPERIMENTS / "results" / f"{RECORD}.json"
    head = " ".join(vit.__doc__.split())
    assert head.endswith("What came out here: not measured yet.") == (not path.exists())
    if path.exists():
        record = json.loads(path.read_text())
        assert " ".join(common.told(*vit.outcome(record)).split()) in head
        assert record["seconds"]["total"] < 600 and record["data"]["fallback"] is False


def test_name_says_what_is_not_default(digits):
    record = json.loads(json.dumps(digits[1]))
    config = record["config"]
    config |= vit.DEFAULTS["cpu"] | {"regularization": None}
    assert vit.file_name(record) == "vit_transport-digits-vit"
    config |= vit.DEFAULTS["paper"] | {"preset": "paper", "retrain": True, "blocks": [0, 2]}
    assert vit.file_name(record) == "vit_transport-digits-vit-blocks0+2-paper-retrained"


# ---------------------------------------------------------------------------------------- options


def nowhere(monkeypatch, tmp_path):
    """CIFAR-10 is not there."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(data._data, "_can_prepare", lambda: False)


def test_without_cifar10_the_digits_have_their_own_networks(monkeypatch, tmp_path, caplog):
    nowhere(monkeypatch, tmp_path)
    monkeypatch.setattr(vit, "DIGITS", TINY)
    monkeypatch.setattr(vit, "DIGITS_RECIPE", dataclasses.replace(vit.DIGITS_RECIPE, epochs=1))
    options = ["--blocks", "0", "--regularization", "0.1", *COUNTS, "--out", str(tmp_path / "out")]
    record = json.loads(vit.main(options).read_text())
    assert record["data"]["name"] == "digits" and record["data"]["fallback"] is True
    assert record["title"].startswith("CIFAR-10 NOT FOUND, SO: scikit-learn's 8x8 digits: vit")
    assert caplog.text.count("FALLING BACK") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is no number of images, from 1 on"),
        (["--regularization", "0"], "'0' is no positive number"),
        (["--regularization", "much"], "'much' is no positive number"),
        (["--model", "vgg16"], "--model must be a vision transformer: vit or deit-tiny"),
        (["--preset", "paper", "--dataset", "digits"], "--dataset digits trains its own small"),
        (["--model", "vit-w0.5", "--dataset", "digits"], "--dataset digits trains its own small"),
        (["--preset", "paper"], "give --retrain, too"),
        (
            ["--model", "vit-w0.5"],
            "CIFAR-10 was not found, give --data-dir; for the digits it trai",
        ),
    ],
)
def test_bad_options(arguments, message, capsys, tmp_path, monkeypatch):
    nowhere(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        vit.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_wrong_blocks_stop_before_anything_is_trained(capsys, tmp_path):
    options = ["--dataset", "digits", "--blocks", "0", "4", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        vit.main(options)
    assert "--blocks must be from 0 to 3, got 4" in " ".join(capsys.readouterr().err.split())


def test_examples_in_docstrings():
    found = doctest.testmod(vit)
    assert found.attempted and not found.failed
