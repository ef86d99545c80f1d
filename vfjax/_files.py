"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file under a temporary name beside its place, and renames it when complete.

    The temporary name is random, so that threads, processes and hosts may write one path at a time.

    Args:
        path: The file to write, or a symbolic link to it, which stays; its folder is created.
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
    target = path.resolve() if path.is_symlink() else path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return path
