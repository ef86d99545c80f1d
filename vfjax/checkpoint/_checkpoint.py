"""Saving and loading trees and models."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vfjax._files import write_whole
from vfjax.checkpoint._packed import (
    CheckpointError,
    checksum_of,
    pack,
    target_of,
    unpack,
)

_FORMAT = 1
_CARD = "card.json"
_STRUCTURE = "structure.json"
_TREE = "tree"
_AGAIN = "Save it again, or restore the folder from version control."


def save(
    path: str | os.PathLike[str],
    tree: Any,
    meta: Mapping[str, Any] | None = None,
    *,
    storage: Any = None,
) -> Path:
    """Saves a tree of arrays, replacing what was at `path` only once everything is written.

    Args:
        path: Folder of the checkpoint.  Missing parents are created.
        tree: Dictionaries with string keys, lists, tuples and None, with arrays or numbers as
            leaves; or an object with a method ``__checkpoint__() -> (kind, tree, meta)``, such as
            `vfjax.merge.Merged`.
        meta: JSON values for ``card.json``.
        storage: A floating dtype, such as ``"float16"``, in which to store wider floating leaves.
            They are loaded in their original dtype, rounded; by default nothing is rounded.

    Returns:
        The absolute path.

    Raises:
        TypeError: If a leaf is not an array, a key is not a string, or `meta` holds values that
            JSON does not support.
        ValueError: If there is something at `path` that is not a checkpoint, `storage` is not a
            floating dtype, or a finite value is too large for it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder + "/net", {"kernel": jnp.ones((2, 3))}, {"seed": 0})
        ...     load(path)["kernel"].shape, card(path)["seed"]
        ((2, 3), 0)
    """
    path = _absolute(path)
    if (
        path.exists()
        and not (path / _STRUCTURE).exists()
        and (path.is_file() or any(path.iterdir()))
    ):
        raise ValueError(f"path {path} holds something that is not a checkpoint: choose another.")
    kind, object_meta = None, None
    if hasattr(tree, "__checkpoint__"):
        kind, tree, object_meta = tree.__checkpoint__()
    if storage is not None and not jnp.issubdtype(storage := jnp.dtype(storage), jnp.floating):
        raise ValueError(f"storage must be a floating dtype such as 'float16', got {storage.name}.")
    leaves: list[np.ndarray] = []
    packed, description = pack(tree, "", leaves, storage)
    structure = {
        "format": _FORMAT,
        "kind": kind,
        "meta": object_meta,
        "sha256": checksum_of(leaves),
        "tree": description,
    }
    # Serialise first, so that invalid arguments raise before anything is written.
    texts = {
        _STRUCTURE: json.dumps(structure),
        _CARD: json.dumps(dict(meta or {}), indent=2) + "\n",
    }

    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        if packed is not None:
            _write_arrays(temporary / _TREE, packed if isinstance(packed, dict) else {"": packed})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _replace(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def load(path: str | os.PathLike[str], net: Any = None) -> Any:
    """Loads what `save` wrote.

    Args:
        path: Folder of the checkpoint.
        net: The traced `Network` that a saved `Merged` belongs to, or those of its models if each
            has one; not needed for trees.

    Returns:
        The tree, with its original containers and its leaves as `jax.Array` (as `numpy.ndarray`
        for a dtype that JAX would change, such as float64 by default); or the saved object.

    Raises:
        CheckpointError: If there is no checkpoint at `path`, or it is incomplete or damaged.
        ValueError: If the saved object needs `net` and none is given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tree = load(save(folder + "/net", {"stems": (None, [jnp.ones(2)])}))
        >>> tree["stems"][0], tree["stems"][1][0].shape
        (None, (2,))
    """
    folder = _folder(path)
    structure = _read_json(folder / _STRUCTURE)
    damaged = f"the checkpoint {folder} is damaged:"
    if not isinstance(structure, dict) or structure.get("format") != _FORMAT:
        version = structure.get("format") if isinstance(structure, dict) else None
        raise CheckpointError(
            f"{damaged} {_STRUCTURE} has format {version!r}, this version reads {_FORMAT}. {_AGAIN}"
        )
    leaves: list[np.ndarray] = []
    try:
        kind, description, checksum = structure["kind"], structure["tree"], structure["sha256"]
        target, arrays = target_of(description), None
        if isinstance(target, dict):
            arrays = _read_arrays(folder / _TREE, target)
        elif target is not None:
            arrays = _read_arrays(folder / _TREE, {"": target})[""]
        tree = unpack(arrays, description, leaves)
    # Orbax passes on any exception of its storage layer; whatever fails here is damage.
    except Exception as error:
        summary = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{damaged} {type(error).__name__}: {summary}. {_AGAIN}") from error
    if checksum_of(leaves) != checksum:
        raise CheckpointError(f"{damaged} its arrays do not have the recorded checksum. {_AGAIN}")
    if kind is None:
        return tree
    if net is None:
        raise ValueError(
            f"{folder} holds a {kind}, which needs its traced network: load(path, net=vfjax.trace("
            "apply_fn, variables, x))."
        )
    module, _, name = kind.rpartition(".")
    owner = getattr(importlib.import_module(module), name)
    return owner.__from_checkpoint__(tree, structure["meta"], net=net)


def card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the card of a checkpoint.

    Args:
        path: Folder of the checkpoint.

    Returns:
        The `meta` that `save` was given.

    Raises:
        CheckpointError: If there is no checkpoint, or its card cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     card(save(folder + "/net", {"w": jnp.ones(2)}, {"accuracy": 0.9}))
        {'accuracy': 0.9}
    """
    return _read_json(_folder(path) / _CARD)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON under a temporary name and renames it into place.

    Args:
        path: The file to write; its folder is created.
        value: What `json.dumps` takes.

    Raises:
        TypeError: If `value` holds values that JSON does not support.
        OSError: If the file cannot be written; whatever was at `path` stays.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(pathlib.Path(folder, "a.json"), {"accuracy": 0.5})
        ...     pathlib.Path(folder, "a.json").read_text().split()
        ['{', '"accuracy":', '0.5', '}']
    """
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def _absolute(path: str | os.PathLike[str]) -> Path:
    # Orbax takes absolute paths only.
    return Path(path).expanduser().absolute()


def _previous(path: Path) -> Path:
    """Where the previous checkpoint waits while a new one takes its place."""
    return path.with_name(f".{path.name}.previous")


def _replace(path: Path, complete: Path) -> None:
    """Renames a complete checkpoint into place; if killed halfway, `_folder` finds the old one."""
    previous = _previous(path)
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(path, previous)
    os.rename(complete, path)
    shutil.rmtree(previous, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary folders of killed saves to the same path."""
    for folder in path.parent.glob(f".{path.name}.*.tmp"):
        pid = folder.name.split(".")[-2]
        if pid == str(os.getpid()) or not _is_running(pid):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: str) -> bool:
    """Whether a process on this machine has this id."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        pass  # it runs, as another user
    return True


def _folder(path: str | os.PathLike[str]) -> Path:
    """Returns the folder to read, or raises if there is none."""
    path = _absolute(path)
    if path.is_dir():
        return path
    if _previous(path).is_dir():
        return _previous(path)
    others = sorted(item.parent.name for item in path.parent.glob(f"[!.]*/{_STRUCTURE}"))
    hint = f" {path.parent} holds {', '.join(others)}." if others else ""
    raise CheckpointError(
        f"path: there is no checkpoint at {path}: give the folder that `save` was given.{hint}"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a complete checkpoint: {path.name} is missing. {_AGAIN}"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"the checkpoint {path.parent} is damaged: {path.name}: {error}. {_AGAIN}"
        ) from None


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))
    # Orbax's completion marker names the temporary folder; here the rename marks completion.
    (path / "commit_success.txt").unlink(missing_ok=True)


def _read_arrays(path: Path, target: dict[str, Any]) -> dict[str, Any]:
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy)
        return checkpointer.restore(path, args=args)
