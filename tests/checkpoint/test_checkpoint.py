"""Checkpoints: what goes in comes out, damage is told, and a kill at any moment loses nothing."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import socket
import threading

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
    "dots beside nested keys": {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1), "b.c": jnp.ones(2)}},
    "dots beside lists": {"a.0": jnp.ones(1), "a": [jnp.zeros(1)], "%2E": jnp.ones(3), ".": {}},
    "unprintable keys": {"\x00": jnp.ones(1), "\ud800": jnp.zeros(1), "[1]\\*": jnp.ones(2)},
    "few bits": {"u": jnp.arange(3, dtype=jnp.uint4), "i": jnp.arange(3, dtype=jnp.int4)},
    "wide": {"i": np.array([2**40]), "c": np.array([1e-300j]), "u": np.uint64(2**63)},
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


def test_keys_keep_their_order(tmp_path):
    tree = {"z": jnp.ones(1), "a": {"y": jnp.ones(1), "b": jnp.ones(1)}}
    found = checkpoint.load(checkpoint.save(tmp_path / "net", tree))
    assert [list(found), list(found["a"])] == [["z", "a"], ["y", "b"]]


def test_numbers_and_byte_orders_come_out(tmp_path):
    numbers = {"flag": True, "steps": 2**40, "rate": 0.1, "phase": 1j}
    tree = numbers | {"big": np.array([1, 2], ">i4"), "fine": np.array([0.1], ">f8")}
    found = checkpoint.load(checkpoint.save(tmp_path / "net", tree))
    assert {name: found[name] for name in numbers} == numbers
    assert all(type(found[name]) is type(numbers[name]) for name in numbers)
    assert_same(
        {"b": found["big"], "f": found["fine"]}, {"b": np.int32([1, 2]), "f": np.array([0.1])}
    )


@pytest.mark.parametrize(
    "name", ["net[1]", "a\\b", "a*?", "{b}", "gs:", "100% ü", "[!a]", ".net.tmp"]
)
def test_any_name_of_a_folder_will_do(tmp_path, name):
    for place in (tmp_path / name, tmp_path / name / "net"):
        for value in (0.0, 1.0):
            checkpoint.save(place, {"w": jnp.full(2, value)}, {"value": value})
            assert_same(checkpoint.load(place), {"w": jnp.full(2, value)})
        assert [item.name for item in place.parent.iterdir()] == [place.name]
        shutil.rmtree(place)


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "net")
    for value in (0.0, 1.0):
        path = checkpoint.save(tmp_path / "link", {"w": jnp.full(2, value)})
        assert path == tmp_path / "disk" / "net" and (tmp_path / "link").is_symlink()
        for place in (path, tmp_path / "link"):
            assert_same(checkpoint.load(place), {"w": jnp.full(2, value)})
    assert [item.name for item in path.parent.iterdir()] == ["net"]
    assert [item.name for item in tmp_path.iterdir()].sort() == ["disk", "link"].sort()


def test_what_cannot_be_read_back_replaces_nothing(saved, monkeypatch):
    """A store that loses a bit is found out while the previous checkpoint is still there."""
    before, restore = checkpoint.load(saved), ocp.Checkpointer.restore

    def flip(*args, **options):
        found = restore(*args, **options)
        return jax.tree.map(lambda leaf: leaf + 1, found)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", flip)
        with pytest.raises(CheckpointError, match=r"cannot be read back.*checksum"):
            checkpoint.save(saved, {"w": jnp.ones(2)})
    assert_same(checkpoint.load(saved), before)
    assert [item.name for item in saved.parent.iterdir()] == ["net"]


class Killed(BaseException):
    pass


def killed(path, monkeypatch, between):
    """A save of a process that is killed before or between its renames, and leaves all behind."""
    rename = os.rename

    def die(old, new):
        if path in (old, new) and (path == new or not between):
            raise Killed
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        patch.setattr(os, "rename", die)
        with pytest.raises(Killed):
            checkpoint.save(path, {"w": jnp.ones(2)})


def hidden(folder):
    return [item for item in folder.iterdir() if item.name.startswith(".")]


def test_what_another_host_is_writing_stays_for_a_day(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        killed(saved, monkeypatch, between=False)
    (theirs,) = hidden(saved.parent)
    checkpoint.save(saved, {"w": jnp.ones(2)})
    assert hidden(saved.parent) == [theirs]
    os.utime(theirs, (0, theirs.stat().st_mtime - 2 * 24 * 3600))
    checkpoint.save(saved, {"w": jnp.ones(2)})
    assert not hidden(saved.parent)


def test_a_save_does_not_touch_those_of_longer_names(saved, monkeypatch):
    """`net` is where `net.best` begins; killed halfway, the latter lies under a hidden name."""
    best = saved.with_name("net.best")
    checkpoint.save(best, {"w": jnp.zeros(2)})
    killed(best, monkeypatch, between=True)
    assert not best.exists()
    checkpoint.save(saved, {"w": jnp.ones(2)})
    assert_same(checkpoint.load(best), {"w": jnp.zeros(2)})


def test_a_checkpoint_may_be_replaced_while_it_is_read(saved, monkeypatch):
    restore, calls = ocp.Checkpointer.restore, []

    def late(*args, **options):
        calls.append(args)
        if len(calls) == 1:  # the reader has seen what describes the old tree
            checkpoint.save(saved, {"v": jnp.ones(2)}, {"seed": 1})
        return restore(*args, **options)

    monkeypatch.setattr(ocp.Checkpointer, "restore", late)
    assert_same(checkpoint.load(saved), {"v": jnp.ones(2)})


def test_threads_save_and_load_one_checkpoint(saved):
    """Whoever reads finds one of the trees that were saved, whole."""
    checkpoint.save(saved, {"w": np.zeros(500, np.float32)}, {"k": 0})
    running = threading.Event()

    def write(k):
        for _ in range(4):
            checkpoint.save(saved, {"w": np.full(500, k, np.float32)}, {"k": k})

    def read():
        found = []
        while not running.is_set() or not found:
            found += [
                np.unique(checkpoint.load(saved)["w"]).tolist(),
                [checkpoint.card(saved)["k"]],
            ]
        return found

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for writer in [pool.submit(write, k) for k in range(1, 4)]:
            writer.result()
        running.set()
        found = [values for reader in readers for values in reader.result()]
    assert all(values in ([0], [1], [2], [3]) for values in found)
    assert [item.name for item in saved.parent.iterdir()] == ["net"]


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


@pytest.mark.parametrize("file", ["structure.json", "card.json"])
@pytest.mark.parametrize("change", ["meta", "removed"])
def test_what_describes_a_tree_is_checked_too(tmp_path, file, change):
    path = checkpoint.save(tmp_path / "pair", Pair([jnp.ones(2)], None), {"seed": 0})
    content = json.loads((path / file).read_text())
    if file == "card.json":
        content["seed"] = 1
    elif change == "meta":
        content["meta"]["k"] = 3
    if change == "removed":
        structure = json.loads((path / "structure.json").read_text())
        structure.pop("sha256 of card")
        (path / "structure.json").write_text(json.dumps(structure))
        content = structure if file == "structure.json" else content
    (path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"pair is damaged.*checksum"):
        checkpoint.load(path, net="the net")
    if file == "card.json":
        with pytest.raises(CheckpointError, match="checksum"):
            checkpoint.card(path)


def test_a_file_names_no_class_to_import(tmp_path, monkeypatch):
    """As a checkpoint of format 1, which has no checksum of its structure."""
    path = checkpoint.save(tmp_path / "pair", Pair([jnp.ones(2), None], None))
    content = json.loads((path / "structure.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("evil.Pair", "builtins.list", "vfjax.checkpoint.save"):
        (path / "structure.json").write_text(json.dumps(content | {"format": 1, "kind": kind}))
        with pytest.raises(CheckpointError, match="not a class of vfjax"):
            checkpoint.load(path, "the net")
        found = checkpoint.load(path, "the net", kinds={kind: Pair})
        assert_same(found.tree, [jnp.ones(2), None])


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


def test_an_object_that_cannot_be_loaded_is_not_saved(tmp_path):
    class Half:
        __checkpoint__ = Pair.__checkpoint__
        tree, net = (), None

    with pytest.raises(TypeError, match="tree is a Half, which has .*no class method"):
        checkpoint.save(tmp_path / "half", Half())
    assert not list(tmp_path.iterdir())


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
