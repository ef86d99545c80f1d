"""The cache of compiled programs: where it is, and that it does not grow for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import compilation_cache


def test_the_users_folder_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert compilation_cache.folder() == tmp_path
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.folder().parent == tmp_path / "vfjax-tests"
    # As .ci/run asks for it.
    command = [sys.executable, compilation_cache.__file__]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"{compilation_cache.folder()}\n"


def test_what_was_used_least_recently_goes(tmp_path):
    for k in range(6):
        (tmp_path / f"{k}-cache").write_bytes(bytes(10))
        os.utime(tmp_path / f"{k}-cache", (10 - k, 5))
    (tmp_path / "other").write_bytes(bytes(1000))
    compilation_cache.prune(tmp_path, most=60)
    assert len(list(tmp_path.iterdir())) == 7
    compilation_cache.prune(tmp_path, most=59)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["0-cache", "1-cache", "other"]
    compilation_cache.prune(tmp_path / "absent")


def test_entries_that_are_broken_are_compiled_again(tmp_path):
    """Also where warnings are errors, with the filters that pyproject.toml has."""
    code = "import jax; print(jax.jit(lambda x: 3 * x)(2))"
    options = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache"]
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            **{"env": os.environ | settings, "capture_output": True, "text": True},
        )
        assert done.stdout == "6\n", done.stderr
        entries = list(tmp_path.glob("*-cache"))
        assert entries
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[:20])
