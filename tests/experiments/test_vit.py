"""The experiment on transport between vision transformers: its laws, records and options."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import vfjax
from helpers import without
from vfjax import align, data, merge, models, stats, train

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, cli, edges, pairs, records, timing, transformers = (
    importlib.import_module(f"kit.{name}")
    for name in "claims cli edges pairs records timing transformers".split()
)
vit = importlib.import_module("vit_transport")
paper = importlib.import_module("papers.vit_transport")

RUN = vit.EXPERIMENT
AS, UNLIKE, OPEN, NEW = claims.VERDICTS

TINY = models.ViT(blocks=2, patch=4, features=8, heads=2, expansion=2)
# Equal, so that fewer shapes are compiled.
COUNTS = ["--samples", "200", "--held-out", "200", "--test", "200"]
forward = jax.jit(edges.forward)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on networks that are smaller, and learn for shorter, than the script's."""
    folder = tmp_path_factory.mktemp("vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "DIGITS", TINY)
        recipe = dataclasses.replace(transformers.DIGITS_RECIPE, epochs=3)
        patch.setattr(transformers, "DIGITS_RECIPE", recipe)
        options = ["--dataset", "digits", "--regularization", "0.1", *COUNTS, "--out", str(folder)]
        path = vit.main(options)
    return path, records.read(path)


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
    kinds = {group: transformers.kind_of(net, group) for group in net.spec.groups}
    assert set(kinds.values()) == set(vit.KINDS)
    assert [group for group, kind in kinds.items() if kind == "stream"] == ["params/patches"]
    hidden = [group for group, kind in kinds.items() if kind == "hidden"]
    assert hidden == ["params/block1/mlp1", "params/block2/mlp1"]
    assert transformers.layers_of(TINY.blocks) == net.depth - 1


def maps_of(net, trees, moments):
    """By column, but for the soft plans."""
    weights = dict.fromkeys(vit.LABELS, 0.0) | {"uniform": vit.UNIFORM}
    del weights["soft"]
    return {n: transformers.maps_of(net, trees, moments, n, at) for n, at in weights.items()}


def merged_of(net, trees, maps, blocks):
    return merge.partial(net, trees, maps, span=slice(transformers.layers_of(blocks), None))


def test_columns_are_what_they_say(pair):
    net, trees, _, moments = pair
    maps = maps_of(net, trees, moments)
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
    order = {g: p for g, p in order.items() if transformers.kind_of(net, g) != "attention"}
    trees = [tree, net.spec.permute(tree, order)]
    moments = stats.moments(net, trees, [x], sites="taps", covariance="cross")
    expected = np.asarray(forward(merge.as_merged(net, tree), x))
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(expected).max()}
    maps = maps_of(net, trees, moments)
    for k in range(3):
        for name in ("permuted", "exact"):
            found = forward(merged_of(net, trees, maps[name], k), x)
            np.testing.assert_allclose(found, expected, **close)
    # One kind alone does not do, and averaging neither.
    for groups in ([g for g in order if transformers.kind_of(net, g) == "hidden"], []):
        part = pairs.only(maps["exact"], groups)
        merged = forward(merged_of(net, trees, part, 0), x)
        assert np.abs(merged - expected).max() > 0.05 * np.abs(expected).max()


def test_rows_are_preserve_first_merging(pair):
    net, trees, x, _ = pair
    direct = align.Maps.of_permutations([None, None])
    for k in range(3):
        row = merged_of(net, trees, direct, k)
        wanted = merge.preserve_first(net, trees, layers=transformers.layers_of(k))
        np.testing.assert_allclose(forward(row, x), forward(wanted, x), rtol=1e-4, atol=1e-5)
        assert (row.params, row.flops) == (wanted.params, wanted.flops)


@pytest.mark.parametrize("counts", [(2000, 400, 1040, 260), (100, 50, 100, 50)])
def test_images_do_not_overlap(counts, monkeypatch):
    """Those held out come right after the others; a fifth, where there are too few for both."""
    samples, held_out, *given = counts
    monkeypatch.setattr(transformers.train, "fit", lambda *_, **__: train.Trained({}, [], 0.0))
    options = ["--samples", str(samples), "--held-out", str(held_out), "--test", "30"]
    config = cli.parse(vit.Config, "vit_transport.py", "", ["--dataset", "digits", *options])
    setup = vit.prepare(config, timing.Stopwatch())
    images = setup.value.images
    assert [len(images.statistics.images), len(images.held_out.images)] == given
    both = np.concatenate([images.statistics.images, images.held_out.images])
    np.testing.assert_array_equal(both, setup.value.dataset.train_images[: len(both)])
    assert len(images.test.images) == 30


# --------------------------------------------------------------------------------------- records


def test_record_is_complete(digits):
    path, record = digits
    name = "vit_transport-digits-vit-regularization0.1-samples200-heldout200-test200.json"
    assert path.name == name
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".png", ".md"}
    assert record["config"]["blocks"] == [0, 1, 2]
    rows, test = record.rows, record.rows.where(images="test")
    assert rows.values("layers") == [0, 5, 9]
    assert test.where(units="all").distinct("plan") == list(vit.LABELS)
    assert test.where(plan="exact").distinct("units") == ["all", *vit.KINDS]
    for plan, units in [*((p, "all") for p in vit.LABELS), *(("exact", k) for k in vit.KINDS)]:
        found = test.where(plan=plan, units=units)
        assert len(found.values()) == len(found.values("loss")) == 3
    assert record["summary"]["chosen"] == 0.1
    assert rows.where(images="held_out").distinct("weight") == [0.0, 0.1, 1000.0]
    assert len(rows.where(images="held_out")) == 9
    names = ["model 1", "model 2", "ensemble"]
    assert [n for n in rows.distinct("network") if n != "PFM"] == names
    assert record["seeds"] == {"edge_models": [0, 1]}
    images = record["data"]
    counts = [images[f"{name}_images"] for name in ("statistics", "held_out", "test")]
    assert counts == [200, 200, 200]
    base, params = record["model"], rows.values("params", plan="direct")
    assert params[0] == base["parameters"] and base["blocks"] == 2
    assert rows.values("flops", plan="direct")[0] == base["flops"]
    assert sorted(params) == params and params[-1] < 2 * params[0]
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
    weights = ["weight 0", "weight 0.1", "weight 1000"]
    assert figure.axes[2].get_legend_handles_labels()[1] == weights
    (table,) = vit.tables_of(record)
    assert table.header[1:7] == [
        *("direct", "AM", "OT-acts", "OT-acts soft (0.1)", "OT-weights", "uniform plan")
    ]
    names = ["model 1", "model 2", "ensemble"]
    assert [row[0] for row in table.lines] == [*names, "PFM 0/2", "PFM 1/2", "PFM 2/2"]
    assert {len(row) for row in table.lines} == {11}
    marked = [cell.startswith("*") for row in table.lines[3:] for cell in row[1:7]]
    columns = [
        record.rows.curve("blocks", images="test", plan=name, units="all")[1] for name in vit.LABELS
    ]
    assert marked == (np.array(columns).T >= record["summary"]["edge_mean"]).ravel().tolist()


def test_claims_follow_the_record(digits):
    """What is said changes with what was measured."""
    record = copy.deepcopy(digits[1])
    record["data"]["test_images"] = 10_000
    for row in record.rows.where(network=("model 1", "model 2")):
        row["accuracy"] = 0.9
    said: dict = {}

    def verdicts(direct, transport):
        for name in vit.LABELS:
            values = transport if name in ("exact", "soft") else direct
            rows = record.rows.where(images="test", plan=name, units="all")
            for row, value in zip(rows, values, strict=True):
                row["accuracy"] = value
        found = {row["id"]: row for row in claims.decided(RUN.claims, record)}
        assert all(row["verdict"] == NEW for name, row in found.items() if ".new." in name)
        said.clear()
        said.update({name.partition("exact-")[2]: row["here"] for name, row in found.items()})
        of = [
            [found[f"vf.t5.{plan}-{n}"]["verdict"] for n in ("above-direct", "rises", "near-edges")]
            for plan in ("exact", "soft")
        ]
        assert of[0] == of[1]
        return of[0]

    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.88, 0.9]) == [AS, AS, AS]
    here = "OT-acts and direct 60.0 and 10.0 at k = 0, 88.0 and 50.0 at k = 1; ahead at 2 and "
    assert said["above-direct"].startswith(here)
    # The uniform plan is as direct averaging here.
    assert "ahead at 2 and behind at 0 of 2 k, +44.0 points on average" in said["above-uniform"]
    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.4, 0.9]) == [UNLIKE, UNLIKE, UNLIKE]
    assert "ahead at 1 and behind at 1 of 2 k" in said["above-direct"]
    assert verdicts([0.3, 0.5, 0.9], [0.1, 0.6, 0.9]) == [UNLIKE, AS, UNLIKE]
    assert verdicts([0.1, 0.5, 0.9], [0.88, 0.88, 0.9]) == [AS, UNLIKE, AS]
    # What has vanished shows nothing.
    assert verdicts([0.1, 0.5, 0.9], [0.1, 0.6, 0.9])[0] == OPEN
    # Direct averaging that loses nothing at some k is not held against transport there.
    assert verdicts([0.1, 0.895, 0.9], [0.6, 0.89, 0.9]) == [AS, AS, OPEN]
    assert said["near-edges"] == "OT-acts 89.0, direct 89.5, edge models 90.0"
    # Nor is what noise may have made an advantage; with ten times as many images it is one.
    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.507, 0.9]) == [OPEN, UNLIKE, UNLIKE]
    assert "ahead at 1 and behind at 0 of 2 k" in said["above-direct"]
    record["data"]["test_images"] = 100_000
    assert verdicts([0.1, 0.5, 0.9], [0.6, 0.507, 0.9])[0] == AS
    assert verdicts([0.25, 0.5, 0.9], [0.05, 0.6, 0.9])[0] == UNLIKE
    assert "ahead at 1 and behind at 1 of 2 k" in said["above-direct"]


def test_held_out_images_choose_how_soft_plans_are():
    values = {0.0: [0.9, 0.9], 0.1: [0.5, 0.6], 0.2: [0.6, 0.5], 1000.0: [0.9, 0.9]}
    rows = records.Rows(
        {"images": images, "blocks": k, "weight": weight, "accuracy": value}
        for images in ("held_out", "test")
        for weight, of in values.items()
        for k, value in enumerate(of)
    )
    assert paper.chosen(rows) == 0.1
    rows[4]["accuracy"] = 0.61
    assert paper.chosen(rows) == 0.2


def test_name_says_what_is_not_default(digits):
    record = copy.deepcopy(digits[1])
    config, images = record["config"], ("samples", "held_out", "test")
    usual = cli.defaults(vit.Config, {"preset": "cpu"})
    config |= {name: usual[name] for name in images} | {"regularization": None}
    assert RUN.file_name(record) == "vit_transport-digits-vit"
    usual = cli.defaults(vit.Config, {"preset": "paper"})
    config |= {name: usual[name] for name in images}
    config |= {"preset": "paper", "retrain": True, "blocks": [0, 2]}
    assert RUN.file_name(record) == "vit_transport-digits-vit-blocks0+2-paper-retrained"


# ---------------------------------------------------------------------------------------- options


def nowhere(monkeypatch, tmp_path):
    """CIFAR-10 is not there."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    without(monkeypatch, "tensorflow")


def test_without_cifar10_the_digits_have_their_own_networks(monkeypatch, tmp_path, caplog):
    nowhere(monkeypatch, tmp_path)
    monkeypatch.setattr(transformers, "DIGITS", TINY)
    recipe = dataclasses.replace(transformers.DIGITS_RECIPE, epochs=1)
    monkeypatch.setattr(transformers, "DIGITS_RECIPE", recipe)
    options = ["--blocks", "0", "--regularization", "0.1", *COUNTS, "--out", str(tmp_path / "out")]
    record = records.read(vit.main(options))
    assert record["data"]["name"] == "digits" and record["data"]["fallback"] is True
    assert record["title"].startswith("CIFAR-10 NOT FOUND, SO: scikit-learn's 8x8 digits: vit")
    assert caplog.text.count("FALLING BACK") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "'0' is not a number of images, from 1 on"),
        (["--regularization", "0"], "'0' is not a finite number above 0"),
        (["--regularization", "much"], "'much' is not a finite number above 0"),
        (["--model", "vgg16"], "'vgg16' is not a vision transformer: vit or deit-tiny"),
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
