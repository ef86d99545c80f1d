"""Where tests keep compiled programs from run to run; prints the folder when run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import warnings
from pathlib import Path

# The largest it gets, in bytes. JAX's own limit needs another package and lists the whole folder at
# every write.
MOST_BYTES = 2 * 2**30


def folder() -> Path:
    """The user's choice, or one for each version of jax and each kind of CPU."""
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # JAX's keys do not tell one CPU from another, and a program for a larger one may not run here.
    cpu = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        cpu += "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    name = f"jax-{importlib.metadata.version('jax')}-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"
    return Path(base, "vfjax-tests", name)


def prune(where: Path, most: int = MOST_BYTES) -> None:
    """Halves a cache that has become too large, by what was used least recently.

    Only ever removes what JAX calls its entries, also where the folder is one that a user chose.
    """
    try:
        found = [(entry, entry.stat()) for entry in where.glob("*-cache")]
        size = sum(stat.st_size for _, stat in found)
        if size <= most:
            return
        for entry, stat in sorted(found, key=lambda pair: max(pair[1].st_atime, pair[1].st_mtime)):
            entry.unlink(missing_ok=True)
            size -= stat.st_size
            if size <= most // 2:
                return
    except OSError as error:
        warnings.warn(f"the compilation cache could not be made smaller: {error}", stacklevel=2)


if __name__ == "__main__":
    print(folder())
