"""Checkpoints: what goes in comes out, damage is told, and a kill at any moment loses nothing."""

from __future__ import annotations

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vfjax import checkpoint
from vfjax.checkpoint import CheckpointError

TREES = {
    "nested": {"params": {"conv1": {"kernel": np.arange(36.0).reshape(3, 3, 2, 2)}}, "b": {}},
    "containers": {"stems": [None, ({"w": jnp.ones(3)}, None)], "empty": (), "list": []},
    "dtypes": {"b": jnp.ones(2, jnp.bfloat16), "i": np.int32(3), "m": np.array([True, False])},
    "float64": {"w": np.ones(3)},
    "empty array": {"w": jnp.zeros((0, 3)), "v": jnp.ones(1)},
    "integer keys": {"layers": {0: jnp.ones(1), 1: {"w": jnp.zeros(2)}}},
    "odd keys": {"a/b": jnp.ones(1), "a.b": jnp.zeros(1), "": jnp.ones(2)},
    "one leaf": jnp.arange(4),
    "none": None,
    "ten in a row": [jnp.full(1, k) for k in range(12)],
}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(tmp_path):
    tree = {"kernel": np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)}
    return checkpoint.save(tmp_path / "net", tree, {"seed": 0})


@pytest.mark.parametrize("name", TREES)
def test_what_goes_in_comes_out(tmp_path, name):
    path = checkpoint.save(tmp_path / "net", TREES[name], {"name": name})
    assert_same(checkpoint.load(path), TREES[name])
    assert checkpoint.card(path) == {"name": name}
    assert [item.name for item in tmp_path.iterdir()] == ["net"]


def test_relative_paths_and_missing_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("a/b/net", {"w": jnp.ones(2)})
    assert_same(checkpoint.load("a/b/net"), {"w": jnp.ones(2)})


def test_saving_again_replaces(saved):
    checkpoint.save(saved, {"w": jnp.ones(2)}, {"seed": 1})
    assert_same(checkpoint.load(saved), {"w": jnp.ones(2)})
    assert checkpoint.card(saved) == {"seed": 1}
    assert [item.name for item in saved.parent.iterdir()] == ["net"]


@pytest.mark.parametrize(
    "tree",
    [
        {"f": jnp.tanh},
        {("a", "b"): jnp.ones(1)},
        {"key": jax.random.key(0)},
        {"text": "abc"},
        {"e": pytest.approx(1)},
    ],
)
def test_what_is_no_array_is_refused_before_anything_is_written(tmp_path, tree):
    with pytest.raises(TypeError, match="tree has"):
        checkpoint.save(tmp_path / "net", tree)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "net", {"w": jnp.ones(1)}, {"meta": jnp.tanh})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.save(tmp_path / "letters", {"w": jnp.ones(1)})
    assert (tmp_path / "letters" / "a.txt").read_text() == "dear"


@pytest.mark.parametrize("moment", ["arrays", "first rename", "second rename"])
def test_a_save_that_is_killed_leaves_the_previous_one(saved, monkeypatch, moment):
    class Killed(BaseException):
        pass

    before = checkpoint.load(saved)
    calls = []

    def die(*args, **options):
        calls.append(args)
        if moment != "second rename" or len(calls) == 2:
            raise Killed
        shutil.move(*args)

    with monkeypatch.context() as patch:
        # A killed process does not tidy up either.
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)
        target = (ocp.Checkpointer, "save") if moment == "arrays" else (os, "rename")
        patch.setattr(*target, die)
        with pytest.raises(Killed):
            checkpoint.save(saved, {"w": jnp.ones(2)})
    assert_same(checkpoint.load(saved), before)
    # The next save removes what the killed one left behind.
    checkpoint.save(saved, {"w": jnp.ones(2)})
    assert_same(checkpoint.load(saved), {"w": jnp.ones(2)})
    assert [item.name for item in saved.parent.iterdir()] == ["net"]


def test_a_missing_checkpoint_is_told_with_its_neighbours(saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*other.*holds net"):
        checkpoint.load(saved.parent / "other")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.card(saved / "nowhere" / "deep")


def test_a_missing_file_is_told(saved):
    (saved / "structure.json").unlink()
    with pytest.raises(CheckpointError, match=r"structure\.json is missing.*version control"):
        checkpoint.load(saved)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "json", "format", "shape"])
def test_damage_is_told(saved, damage):
    data = max((p for p in saved.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    structure = saved / "structure.json"
    content = json.loads(structure.read_text())
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "flipped":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 255
        data.write_bytes(raw)
    elif damage == "removed":
        shutil.rmtree(saved / "tree")
    elif damage == "json":
        structure.write_text(structure.read_text()[:40])
    elif damage == "format":
        structure.write_text(json.dumps(content | {"format": 99}))
    else:
        content["tree"]["dict"]["kernel"]["shape"] = [40, 50]
        structure.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{saved}.*version control"):
        checkpoint.load(saved)


class Pair:
    """An object that knows how to be saved; found again by its name."""

    def __init__(self, tree, net):
        self.tree, self.net = tree, net

    def __checkpoint__(self):
        return "vfjax.checkpoint.TestPair", {"tree": self.tree}, {"k": 2}

    @classmethod
    def __from_checkpoint__(cls, tree, meta, *, net):
        assert meta == {"k": 2}
        return cls(tree["tree"], net)


def test_objects_come_back_with_their_network(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "TestPair", Pair, raising=False)
    path = checkpoint.save(tmp_path / "pair", Pair([jnp.ones(2), None], net="the net"))
    found = checkpoint.load(path, net="the net")
    assert_same(found.tree, [jnp.ones(2), None])
    assert found.net == "the net"
    with pytest.raises(ValueError, match="net="):
        checkpoint.load(path)


def test_write_json_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "results" / "a.json"
    checkpoint.write_json(path, {"accuracy": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"accuracy": jnp.tanh})
    assert json.loads(path.read_text()) == {"accuracy": 1}
    assert [item.name for item in path.parent.iterdir()] == ["a.json"]


def test_no_path_of_the_writer_stays_in_the_files(tmp_path):
    folder = checkpoint.save(tmp_path / "net", {"kernel": jnp.ones((2, 3))}, {"seed": 0})
    for file in folder.rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    assert checkpoint.load(folder)["kernel"].shape == (2, 3)


def test_half_the_bits_come_back_rounded_and_in_their_own_dtype(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "kernel": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32),
        "half": jnp.ones(3, jnp.bfloat16),
        "steps": jnp.arange(3, dtype=jnp.int32),
    }
    whole, half = (
        checkpoint.save(tmp_path / name, tree, storage=storage)
        for name, storage in (("whole", None), ("half", "float16"))
    )
    found = checkpoint.load(half)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda x: x.dtype, tree)
    np.testing.assert_array_equal(found["kernel"], tree["kernel"].astype("float16"))
    np.testing.assert_array_equal(found["steps"], tree["steps"])
    sizes = [sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in (whole, half)]
    assert sizes[0] - sizes[1] > 1.5 * 64 * 64
    with pytest.raises(ValueError, match="float16 is too narrow for 'kernel', which holds 1e"):
        checkpoint.save(half, {"kernel": 1e6 * tree["half"].astype("float32")}, storage="float16")
    with pytest.raises(ValueError, match="storage must be a floating dtype"):
        checkpoint.save(half, tree, storage="int8")
    np.testing.assert_array_equal(checkpoint.load(half)["steps"], tree["steps"])
