"""Pruning on ImageNet: all of its path, on a stand-in."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
common = importlib.import_module("_common")
script = importlib.import_module("imagenet_pruning")


@pytest.mark.parametrize("model, remedy", [("resnet50", "reset"), ("convnext-tiny", "repair")])
def test_it_runs_on_a_stand_in(model, remedy, tmp_path):
    options = ["--stand-in", "--model", model, "--sparsities", "50", "--test", "10"]
    path = script.main([*options, "--statistics", "16", "--out", str(tmp_path)])
    record = json.loads(path.read_text())
    assert path.name == f"imagenet_pruning-{model}-stand-in-at50.json"
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert record["remedy"] == remedy and "random weights and images" in record["title"]
    assert record["data"]["statistics_images"] == 16 and record["data"]["test_images"] == 10
    assert list(record["methods"]) == list(script.preset_of(model)["methods"])
    for rows in record["methods"].values():
        assert all(0 <= value <= 1 for key in ("none", "renormalised") for value in rows[key])
    # All but the first: three of each of 8 blocks, 4 shortcuts and the head. Or: the two linear
    # layers of each of 4 blocks.
    assert len(record["layers"]) == (29 if model == "resnet50" else 8)


def test_missing_weights_and_data_say_what_to_do(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path)])
    assert "--weights is missing" in capsys.readouterr().err
