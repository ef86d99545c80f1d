"""Checkpoints that users have: written by earlier versions, and those that ship."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import close
from vfjax import checkpoint, merge

HERE = Path(__file__).resolve().parent
SHIPPED = sorted(p for p in (HERE.parents[1] / "checkpoints").iterdir() if p.is_dir())


def apply_fn(v, x):
    h = jax.nn.relu(x @ v["w0"] + v["b0"][None])
    return jax.nn.relu(h @ v["w1"]) @ v["w2"]


def test_a_merged_model_that_version_0_1_0_saved():
    """Saved by 0.1.0 with what it computed there; its kind names `vfjax.merge`, then a module."""
    folder = HERE / "saved" / "merged-0.1.0"
    assert json.loads((folder / "structure.json").read_text())["kind"] == "vfjax.merge.Merged"
    shapes = {"w0": (3, 4), "b0": (4,), "w1": (4, 4), "w2": (4, 2)}
    variables = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jnp.float32([[0.5, 0.25, -0.5], [-0.5, 0.5, 0.25]])
    net = vfjax.trace(apply_fn, variables, x)
    model = checkpoint.load(folder, net=net)
    assert isinstance(model, merge.Merged) and model.cut == 1 and model.weights == (0.25, 0.75)
    wanted = [[-0.44744873046875, 0.39984130859375], [-1.68927001953125, 1.25701904296875]]
    close(model(x), jnp.float32(wanted))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_what_ships_loads(folder):
    tree = checkpoint.load(folder)
    assert set(tree) <= {"params", "batch_stats"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    assert checkpoint.card(folder)["test"]["accuracy"] > 0.3
