"""Folders that appear whole: a temporary one beside the place, and the exchange of the two.

A folder cannot replace another one in a single step. The old one is moved aside and the new one
into place; whoever reads in between, or after a kill in between, finds the old one aside. All names
are random, so that threads, processes and other hosts on a shared disk do not meet in one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# After this time a temporary folder of another host is taken to be abandoned.
_DAY = 24 * 3600
_TRIES = 100
# Temporary folders that threads of this process are writing.
_MINE: set[str] = set()


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A new folder beside a path, which is gone afterwards; abandoned ones are removed.

    Args:
        path: The place of the complete folder.
    """
    token = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    folder = path.with_name(f".{path.name}.{token}.tmp")
    _MINE.add(token)
    try:
        folder.mkdir()
        yield folder
        for leftover in _beside(path):
            if _abandoned(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _MINE.discard(token)


def replace(path: Path, complete: Path) -> None:
    """Renames a complete folder into place, whatever other savers do at the same time.

    Args:
        path: The place.
        complete: The folder that `temporary` gave.

    Raises:
        OSError: If that is not possible; what was at the place stays there.
    """
    aside: list[Path] = []
    for attempt in range(_TRIES):
        old = complete.with_name(f"{complete.name.removesuffix('.tmp')}{attempt}.previous")
        if path.exists():
            with contextlib.suppress(FileNotFoundError):  # another saver was faster
                os.rename(path, old)
                aside.append(old)
        try:
            os.rename(complete, path)
            break
        except OSError:
            if path.exists() and attempt + 1 < _TRIES:
                continue
            if aside and not path.exists():
                os.rename(aside.pop(), path)
            raise
    for old in aside:
        shutil.rmtree(old, ignore_errors=True)


def current(path: Path, mark: str) -> Path | None:
    """The folder to read: the one at a path, else the one that a killed saver moved aside.

    Args:
        path: The place.
        mark: Name of a file that complete folders have.

    Returns:
        A folder, or None if there is none.
    """
    if path.is_dir():
        return path
    aside = [folder for folder in _beside(path) if folder.name.endswith(".previous")]
    if path.is_dir():  # put there while we looked aside
        return path
    times = {folder: _modified(folder / mark) for folder in aside}
    return max((f for f in aside if times[f]), key=lambda folder: times[folder], default=None)


@contextlib.contextmanager
def plainly_named(folder: Path) -> Iterator[Path]:
    """A path of the same folder in which no character has a meaning to orbax.

    It takes brackets for patterns, a backslash for a slash, and `://` for a protocol.

    Args:
        folder: An existing folder.
    """
    if re.fullmatch(r"[\w/. +,=@~-]*", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vfjax-") as around:
        link = Path(around, "link")
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _beside(path: Path) -> list[Path]:
    """All temporary folders of a path, and those moved aside."""
    pattern = re.compile(
        # The last two are how versions before 0.2 named theirs.
        rf"\.{re.escape(path.name)}\.([0-9a-f]{{8}}-\d+-[0-9a-f]{{8,}}\.(tmp|previous)|\d+\.tmp|previous)"
    )
    try:
        return [path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    except OSError:
        return []


def _abandoned(folder: Path) -> bool:
    """Whether whoever made a temporary folder, or moved one aside, is gone."""
    token = folder.name.split(".")[-2]
    host, _, rest = token.partition("-")
    if host == _host():
        pid, _, _ = rest.partition("-")
        if int(pid) == os.getpid():
            return not any(token.startswith(mine) for mine in tuple(_MINE))
        if not _is_running(int(pid)):
            return True
    modified = _modified(folder)
    return 0 < modified < time.time() - _DAY


def _modified(path: Path) -> float:
    """When a file changed last; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _host() -> str:
    """A short name of this host, of the same length on all."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    """Whether a process on this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs, as another user
    return True
