"""Files are written whole or not at all."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import pytest

from vfjax._files import write_whole


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failure_leaves_what_was_there(step, tmp_path, monkeypatch):
    path = write_whole(tmp_path / "deep" / "a.txt", b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "write_bytes", fail)
        else:
            patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]
    assert write_whole(path, b"new").read_bytes() == b"new"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_whole("~/a.txt", b"here") == tmp_path / "a.txt"
    assert (tmp_path / "a.txt").read_bytes() == b"here"


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a.txt")
    for content in (b"old", b"new"):
        assert write_whole(tmp_path / "link", content) == tmp_path / "link"
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "a.txt").read_bytes() == content
    assert [item.name for item in (tmp_path / "disk").iterdir()] == ["a.txt"]


def test_threads_write_one_file(tmp_path):
    """All succeed, and the file is what one of them wrote."""
    contents = [bytes([k]) * 100_000 for k in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda content: write_whole(tmp_path / "a", content), contents))
            assert (tmp_path / "a").read_bytes() in contents
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
