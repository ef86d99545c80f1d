"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file under a temporary name beside its place, and renames it when complete.

    Args:
        path: The file to write; its folder is created.
        content: All of it.

    Returns:
        The path, with `~` expanded.

    Raises:
        OSError: If that fails; what was there before stays, and nothing else does.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(folder + "/new/a.txt", b"all of it").read_bytes()
        b'all of it'
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
