"""Saving and loading trees and models."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vfjax._files import write_whole
from vfjax._trees import some
from vfjax.checkpoint import _folders as folders
from vfjax.checkpoint._packed import (
    CheckpointError,
    checksum_of,
    digest_of,
    pack,
    stored_key,
    target_of,
    unpack,
)

# Format 1 stored keys as they are, and had a checksum of its arrays alone.
_FORMAT = 2
_OWN_DIGEST = "sha256 of the rest"
_CARD = "card.json"
_STRUCTURE = "structure.json"
_TREE = "tree"
# Where the classes that `load` makes objects of stand, by kind.
_KINDS = {"vfjax.merge.Merged": "vfjax.merge"}
# Classes of objects that this process has saved, by kind.
_SAVED: dict[str, type] = {}
# More than one writer in turn can replace what is being read.
_TRIES = 10
_AGAIN = "Save it again, or restore the folder from version control."


def save(
    path: str | os.PathLike[str],
    tree: Any,
    meta: Mapping[str, Any] | None = None,
    *,
    storage: Any = None,
) -> Path:
    """Saves a tree of arrays, replacing what was at `path` only once the new one was read back.

    Other threads and processes may save and load the same path meanwhile: the last save stays.

    Args:
        path: Folder of the checkpoint, or a symbolic link to it, which stays. Missing parents are
            created.
        tree: Dictionaries with string keys, lists, tuples and None, with arrays or numbers as
            leaves; or an object with a method ``__checkpoint__() -> (kind, tree, meta)`` and a
            class method ``__from_checkpoint__(tree, meta, *, net)``, such as `vfjax.merge.Merged`.
        meta: JSON values for ``card.json``.
        storage: A floating dtype, such as ``"float16"``, in which to store wider floating leaves.
            They are loaded in their original dtype, rounded; by default nothing is rounded.

    Returns:
        The absolute path.

    Raises:
        TypeError: If a leaf is not an array of numbers, a key is not a string, `meta` holds values
            that JSON does not support, or an object has no `__from_checkpoint__`.
        CheckpointError: If what was written cannot be read back; whatever was at `path` stays.
        ValueError: If there is something at `path` that is not a checkpoint, `storage` is not a
            floating dtype, or a finite value is too large for it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder + "/net", {"kernel": jnp.ones((2, 3))}, {"seed": 0})
        ...     load(path)["kernel"].shape, card(path)["seed"]
        ((2, 3), 0)
    """
    path = _place(path)
    _check_free(path)
    kind, object_meta, saved = None, None, tree
    if hasattr(tree, "__checkpoint__"):
        kind, tree, object_meta = tree.__checkpoint__()
        if not hasattr(saved, "__from_checkpoint__"):
            raise TypeError(
                f"tree is a {type(saved).__name__}, which has `__checkpoint__`, but no class "
                "method `__from_checkpoint__(tree, meta, *, net)` to load it again."
            )
        _SAVED[kind] = type(saved)
    if storage is not None and not jnp.issubdtype(storage := jnp.dtype(storage), jnp.floating):
        raise ValueError(f"storage must be a floating dtype such as 'float16', got {storage.name}.")
    leaves: list[np.ndarray] = []
    packed, description = pack(tree, "", leaves, storage)
    # Serialise first, so that invalid arguments raise before anything is written.
    card_text = json.dumps(dict(meta or {}), indent=2) + "\n"
    structure = {
        "format": _FORMAT,
        "kind": kind,
        "meta": object_meta,
        "sha256": checksum_of(leaves),
        "sha256 of card": digest_of(json.loads(card_text)),
        "tree": description,
    }
    structure = json.loads(json.dumps(structure))
    texts = {
        _STRUCTURE: json.dumps(structure | {_OWN_DIGEST: digest_of(structure)}),
        _CARD: card_text,
    }

    path.parent.mkdir(parents=True, exist_ok=True)
    with folders.temporary(path) as temporary:
        if packed is not None:
            _write_arrays(temporary, packed if isinstance(packed, dict) else {"": packed})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        try:
            _read(temporary, convert=np.asarray)
        except CheckpointError as error:
            raise CheckpointError(
                f"what was written for {path} cannot be read back, so what was there stays: {error}"
            ) from error
        folders.replace(path, temporary)
    return path


def load(
    path: str | os.PathLike[str], net: Any = None, *, kinds: Mapping[str, type] | None = None
) -> Any:
    """Loads what `save` wrote.

    Args:
        path: Folder of the checkpoint.
        net: The traced `Network` that a saved `Merged` belongs to, or those of its models if each
            has one; not needed for trees.
        kinds: Classes of saved objects by the kind that their ``__checkpoint__`` returned; not
            needed for those of vfjax, nor in the process that saved them. A class that only the
            file names is never imported.

    Returns:
        The tree, with its original containers and its leaves as `jax.Array` (as `numpy.ndarray`
        for a dtype that JAX would change, such as float64 by default; Python numbers as such); or
        the saved object.

    Raises:
        CheckpointError: If there is no checkpoint at `path`, it is incomplete or damaged, or its
            object is of an unknown kind.
        ValueError: If the saved object needs `net` and none is given, or `net` is not its network.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tree = load(save(folder + "/net", {"stems": (None, [jnp.ones(2)])}))
        >>> tree["stems"][0], tree["stems"][1][0].shape
        (None, (2,))
    """
    tree, structure = _retried(functools.partial(_read, convert=_as_jax), path)
    kind = structure["kind"]
    if kind is None:
        return tree
    owner = _owner(kind, kinds or {}, path)
    if net is None:
        raise ValueError(
            f"{path} holds a {kind}, which needs its traced network: load(path, net=vfjax.trace("
            "apply_fn, variables, x))."
        )
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

    def read(folder: Path) -> dict[str, Any]:
        return _read_card(folder, _read_structure(folder))

    return _retried(read, path)


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


def _place(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a checkpoint's folder: where a symbolic link points, if it is one."""
    path = Path(path).expanduser().absolute()  # orbax takes absolute paths only
    return path.resolve() if path.is_symlink() else path


def _check_free(path: Path) -> None:
    """Raises a ValueError if something other than a checkpoint is at a path."""
    try:
        # Listed once: in between, another process may put another checkpoint there.
        content = os.listdir(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        content = [path.name]
    if content and _STRUCTURE not in content:
        raise ValueError(f"path {path} holds something that is not a checkpoint: choose another.")


def _as_jax(leaf: np.ndarray) -> Any:
    """A NumPy array as a JAX array, unless that would change its type."""
    same = jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype
    return jnp.asarray(leaf) if same else leaf


def _owner(kind: str, kinds: Mapping[str, type], path: Any) -> Any:
    """The class of a saved object: never one that only the file names."""
    if kind in _KINDS:
        return getattr(importlib.import_module(_KINDS[kind]), kind.rpartition(".")[2])
    known = {**_SAVED, **kinds}
    if kind not in known:
        raise CheckpointError(
            f"{path} holds a {kind!r}, which is not a class of vfjax. If you trust the file, give "
            f"its class: load(path, net, kinds={{{kind!r}: ...}})."
        )
    return known[kind]


def _retried(read: Callable[[Path], Any], path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint, and again if another process replaced it meanwhile."""
    path = _place(path)
    for attempt in range(_TRIES):
        folder = folders.current(path, _STRUCTURE)
        before = None if folder is None else _identity(folder)
        try:
            if folder is None:
                raise CheckpointError(_missing(path))
            return read(folder)
        except CheckpointError:
            gone = folder is not None and before is None
            if attempt + 1 == _TRIES or (before == _identity(path) and not gone):
                raise
    raise AssertionError  # not reached


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What changes when a folder is replaced; None if there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def _missing(path: Path) -> str:
    others = sorted(item.parent.name for item in path.parent.glob(f"[!.]*/{_STRUCTURE}"))
    hint = f" {path.parent} holds {', '.join(others)}." if others else ""
    return f"path: there is no checkpoint at {path}: give the folder that `save` was given.{hint}"


def _read(folder: Path, *, convert: Callable[[np.ndarray], Any]) -> tuple[Any, dict[str, Any]]:
    """Reads a folder: the tree, whose arrays are converted, and what describes it."""
    structure = _read_structure(folder)
    _read_card(folder, structure)
    damaged = f"the checkpoint {folder} is damaged:"
    leaves: list[np.ndarray] = []
    key_of = str if structure["format"] == 1 else stored_key
    try:
        description, checksum = structure["tree"], structure["sha256"]
        target, arrays = target_of(description, key_of), None
        if isinstance(target, dict):
            arrays = _read_arrays(folder, target)
        elif target is not None:
            arrays = _read_arrays(folder, {"": target})[""]
        tree = unpack(arrays, description, leaves, key_of, convert)
    # Orbax passes on any exception of its storage layer; whatever fails here is damage.
    except Exception as error:
        summary = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{damaged} {type(error).__name__}: {summary}. {_AGAIN}") from error
    if checksum_of(leaves) != checksum:
        raise CheckpointError(f"{damaged} its arrays do not have the recorded checksum. {_AGAIN}")
    return tree, structure


def _read_structure(folder: Path) -> dict[str, Any]:
    """What describes the tree; its own checksum is checked, which format 1 did not have."""
    structure = _read_json(folder / _STRUCTURE)
    damaged = f"the checkpoint {folder} is damaged:"
    version = structure.get("format") if isinstance(structure, dict) else None
    if version not in (1, _FORMAT):
        raise CheckpointError(
            f"{damaged} {_STRUCTURE} has format {version!r}, this version reads 1 and {_FORMAT}. "
            f"{_AGAIN}"
        )
    lacking = {"kind", "meta", "sha256", "tree"} - structure.keys()
    if lacking:
        raise CheckpointError(f"{damaged} {_STRUCTURE} lacks {some(sorted(lacking))}. {_AGAIN}")
    if version != 1 and structure.pop(_OWN_DIGEST, None) != digest_of(structure):
        raise CheckpointError(f"{damaged} {_STRUCTURE} does not have its own checksum. {_AGAIN}")
    return structure


def _read_card(folder: Path, structure: Mapping[str, Any]) -> dict[str, Any]:
    content = _read_json(folder / _CARD)
    if structure["format"] != 1 and structure.get("sha256 of card") != digest_of(content):
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {_CARD} does not have the recorded checksum. "
            f"{_AGAIN}"
        )
    return content


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


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    with (
        folders.plainly_named(folder) as place,
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(place / _TREE, args=ocp.args.PyTreeSave(arrays))
    # Orbax's completion marker names the temporary folder; here the rename marks completion.
    (folder / _TREE / "commit_success.txt").unlink(missing_ok=True)


def _read_arrays(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with (
        folders.plainly_named(folder) as place,
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        args = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy)
        return checkpointer.restore(place / _TREE, args=args)
