"""Files are written whole or not at all."""

from __future__ import annotations

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
