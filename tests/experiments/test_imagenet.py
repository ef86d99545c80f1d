"""Pruning on ImageNet: all of its path, on a stand-in."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vfjax import checkpoint, imagenet, models

ORACLES = Path(__file__).resolve().parent.parent / "oracles"
EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
claims, records, shared = (
    importlib.import_module(f"kit.{name}") for name in ("claims", "records", "pruned")
)
script = importlib.import_module("imagenet_pruning")

RUN = script.EXPERIMENT


@pytest.mark.parametrize("model, remedy", [("resnet50", "reset"), ("convnext-tiny", "repair")])
def test_it_runs_on_a_stand_in(model, remedy, tmp_path):
    options = ["--stand-in", "--model", model, "--sparsities", "50", "--test", "10"]
    path = script.main([*options, "--statistics", "16", "--out", str(tmp_path)])
    record = records.read(path)
    assert path.name == f"imagenet_pruning-{model}-stand-in-at50-test10-statistics16.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert record["remedy"] == remedy and "random weights and images" in record["title"]
    assert record["data"]["statistics_images"] == 16 and record["data"]["test_images"] == 10
    methods = list(script.preset_of(model)["methods"])
    assert record.rows.distinct("method") == methods and record["claims"] == []
    assert [row["remedy"] for row in record.rows] == ["none", remedy] * (1 + len(methods))
    assert all(0 <= row["accuracy"] <= 1 for row in record.rows)
    for table in record["tables"]:
        unpruned, pruned = table["lines"]
        assert unpruned[1] and not any(unpruned[2:]) and all(pruned)
    # All but the first: three of each of 8 blocks, 4 shortcuts and the head. Or: the two linear
    # layers of each of 4 blocks.
    assert len(record["layers"]) == (29 if model == "resnet50" else 8)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file of weights as torchvision names them, and photographs that the network is right on."""
    spec = importlib.util.spec_from_file_location("closed_form", ORACLES / "closed_form.py")
    closed_form = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(closed_form)
    narrow = json.loads((ORACLES / "torch_models.json").read_text())["narrow"]["convnext"]
    file = tmp_path / "convnext.npz"
    np.savez(file, **closed_form.torch_weights(narrow["shapes"]))
    model = models.ConvNeXt(depths=(1, 2), dims=(6, 8), classes=5)
    monkeypatch.setattr(script.models, "create", lambda name, **options: model)
    rng = np.random.default_rng(0)
    source: list = []
    for _ in range(8):
        coarse = rng.integers(0, 256, (7, 7, 3), np.uint8)
        source.append({"image": np.kron(coarse, np.ones((32, 32, 1), np.uint8)), "label": 0})

    def load(split, **options):
        options.pop("data_dir")
        return imagenet.Streamed(source, **options | {"resize": 224})

    ((x, _),) = load("train", batch_size=8, data_dir=None)
    logits = models.apply_fn(model)(checkpoint.from_torch(file, model, image=(224, 224, 3)), x)
    for example, label in zip(source, np.asarray(logits).argmax(-1), strict=True):
        example["label"] = label
    return str(file), load


def test_published_weights_on_photographs(published, tmp_path, monkeypatch):
    file, load = published
    monkeypatch.setattr(script.imagenet, "load", load)
    options = ["--model", "convnext-tiny", "--methods", "magnitude-layer", "--sparsities", "1"]
    options += ["95", "--batch-size", "3", "--statistics", "7", "--out", str(tmp_path)]
    path = script.main(["--weights", file, *options])
    assert path.name == ("imagenet_pruning-convnext-tiny-magnitude-layer-at1+95-statistics7.json")
    record = records.read(path)
    assert record["data"]["name"] == "imagenet2012" and record.chance == 0.001
    assert record.rows.only(method=None, remedy="none")["accuracy"] == 1
    little, much = shared.cases(record, "magnitude-layer")
    assert (little.plain, little.renormalised) == (1, 1) and much.plain < much.renormalised
    assert record["claims"] == []


def made(name, remedy, method, found):
    """A record of a network: by sparsity, accuracy as pruned and renormalised."""
    rows, cases = [], [(method, s, pair) for s, pair in found.items()]
    for of, s, pair in [(None, None, (0.8, 0.8)), *cases]:
        plain, better = ({"method": of, "sparsity": s, "accuracy": value} for value in pair)
        rows += [plain | {"remedy": "none"}, better | {"remedy": remedy, "error": 0.002}]
    about = {"data": {"name": "imagenet2012", "classes": 1000, "test_images": 50_000}}
    about |= {"model": {"name": name}, "remedy": remedy, "rows": rows}
    return records.Record(about)


@pytest.mark.parametrize(
    "name, found, verdict",
    [
        ("convnext-base", {76: (0.43, 0.65), 80: (0.2, 0.56)}, claims.AS),
        ("convnext-base", {76: (0.43, 0.65), 80: (0.2, 0.25)}, claims.UNLIKE),
        ("convnext-base", {76: (0.43, 0.531), 80: (0.2, 0.56)}, claims.OPEN),
        ("convnext-base", {80: (0.01, 0.02)}, claims.OPEN),
        ("convnext-tiny", {76: (0.43, 0.65), 80: (0.2, 0.56)}, claims.NEW),
        ("resnet50", {50: (0.7, 0.72), 80: (0.2, 0.5)}, claims.AS),
        ("resnet50", {50: (0.4, 0.7), 80: (0.2, 0.3)}, claims.UNLIKE),
        ("resnet50", {50: (0.4, 0.5), 80: (0.2, 0.3)}, claims.OPEN),
    ],
)
def test_claims_can_fail(name, found, verdict):
    convnext = name.startswith("convnext")
    remedy, method = ("repair", "wanda") if convnext else ("reset", "magnitude")
    (row,) = claims.decided(RUN.claims, made(name, remedy, method, found))
    assert row["verdict"] == verdict and row["here"]


def test_missing_data_say_what_to_do(published, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(
            ["--weights", published[0], "--data-dir", str(tmp_path), "--out", str(tmp_path)]
        )
    assert "imagenet2012 is not prepared" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--weights is missing"),
        (["--stand-in", "--weights", "net.npz"], "leave out --weights and --data-dir"),
    ],
)
def test_bad_options(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([*options, "--out", str(tmp_path)])
    assert message in " ".join(capsys.readouterr().err.split())
