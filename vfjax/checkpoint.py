"""Saving and loading parameter trees: orbax for the arrays, JSON for everything else.

A checkpoint is a folder with

    tree/            the arrays, an ordinary orbax checkpoint of nested dictionaries
    structure.json   which containers were lists, tuples or None, shapes, dtypes and a checksum
    card.json        what the author has to say: recipe, seed, accuracy, command ...

It is written under a temporary name beside its place and renamed when complete, so that a reader
never sees half of one, and a save that is killed leaves the previous checkpoint readable.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

__all__ = ["CheckpointError", "card", "load", "save", "write_json"]

PyTree = Any

_FORMAT = 1
_CARD = "card.json"
_STRUCTURE = "structure.json"
_TREE = "tree"


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged."""


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON under a temporary name and renames it into place.

    Args:
      path: The file to write; its folder is created.
      value: What `json.dumps` takes.

    Example:
      >>> import tempfile, pathlib
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_json(pathlib.Path(folder, "a.json"), {"accuracy": 0.5})
      ...     pathlib.Path(folder, "a.json").read_text().split()
      ['{', '"accuracy":', '0.5', '}']
    """
    path = Path(path)
    text = json.dumps(value, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _pack(tree: PyTree, where: str, leaves: list[np.ndarray]) -> tuple[Any, Any]:
    """Returns (nested dictionaries of arrays, JSON description), appending to `leaves`."""
    if tree is None:
        return None, {"none": True}
    if isinstance(tree, dict) or (hasattr(tree, "items") and hasattr(tree, "keys")):
        items = {}
        for key, value in tree.items():
            if not isinstance(key, str):
                raise TypeError(f"keys of a checkpoint must be strings, got {key!r} in {where!r}.")
            items[key] = value
        kind = "dict"
    elif isinstance(tree, (list, tuple)):
        if hasattr(tree, "_fields"):
            raise TypeError(
                f"{where!r} is a {type(tree).__name__}; save its leaves and give load(..., like=)."
            )
        items = {str(index): value for index, value in enumerate(tree)}
        kind = "list" if isinstance(tree, list) else "tuple"
    else:
        if not isinstance(tree, (jax.Array, np.ndarray, np.generic, bool, int, float)):
            raise TypeError(
                f"leaf {where!r} must be an array, got {type(tree).__name__}; partition the tree "
                "first so that only arrays are saved."
            )
        if isinstance(tree, jax.Array) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
            raise TypeError(f"leaf {where!r} is a random key; save jax.random.key_data(key).")
        leaf = np.asarray(tree)
        leaves.append(leaf)
        return leaf, {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    packed, described = {}, {}
    for key, value in items.items():
        inner, description = _pack(value, f"{where}/{key}" if where else key, leaves)
        described[key] = description
        if inner is not None:
            packed[key] = inner
    return packed or None, {kind: described}


def _unpack(tree: Any, description: Any, leaves: list[np.ndarray]) -> PyTree:
    """Inverts `_pack`, appending the numpy leaves in the order in which they were packed."""
    if "none" in description:
        return None
    if "shape" in description:
        leaf = np.asarray(tree)
        if list(leaf.shape) != description["shape"] or str(leaf.dtype) != description["dtype"]:
            raise CheckpointError(
                f"an array is {leaf.dtype}{list(leaf.shape)}, the structure says "
                f"{description['dtype']}{description['shape']}"
            )
        leaves.append(leaf)
        return jnp.asarray(leaf)
    (kind, items), *_ = description.items()
    values = {
        key: _unpack(None if tree is None else tree.get(key), inner, leaves)
        for key, inner in items.items()
    }
    if kind == "dict":
        return values
    return list(values.values()) if kind == "list" else tuple(values.values())


def _target(description: Any) -> Any:
    """Returns the nested dictionaries of shapes that orbax restores into."""
    if "none" in description:
        return None
    if "shape" in description:
        return np.empty(description["shape"], jnp.dtype(description["dtype"]))
    (_, items), *_ = description.items()
    packed = {key: _target(inner) for key, inner in items.items()}
    return {key: value for key, value in packed.items() if value is not None} or None


def _checksum(leaves: list[np.ndarray]) -> str:
    """Returns a digest of all leaves' bytes."""
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _previous(path: Path) -> Path:
    """Where the last checkpoint waits while a new one takes its place."""
    return path.with_name(f".{path.name}.previous")


def _recover(path: Path) -> Path:
    """Returns the folder to read: a save killed between its two renames left the previous one."""
    previous = _previous(path)
    return previous if not path.exists() and previous.exists() else path


def save(path: str | os.PathLike[str], tree: Any, meta: dict[str, Any] | None = None) -> Path:
    """Saves a tree of arrays, replacing what was at `path` only when all is written.

    Args:
      path: Folder of the checkpoint.  Missing parents are created.
      tree: Dictionaries, lists, tuples and None with arrays as leaves, or an object with a method
        ``__checkpoint__() -> (kind, tree, meta)`` such as `vfjax.merge.Merged`.
      meta: JSON values for ``card.json``.

    Returns:
      The absolute path.

    Raises:
      TypeError: If a leaf is no array, or `meta` holds what JSON does not.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = save(folder + "/net", {"kernel": jnp.ones((2, 3))}, {"seed": 0})
      ...     load(path)["kernel"].shape, card(path)["seed"]
      ((2, 3), 0)
    """
    path = Path(path).expanduser().absolute()
    kind, inner_meta = None, None
    if hasattr(tree, "__checkpoint__"):
        kind, tree, inner_meta = tree.__checkpoint__()
    leaves: list[np.ndarray] = []
    packed, description = _pack(tree, "", leaves)
    structure = {
        "format": _FORMAT,
        "kind": kind,
        "meta": inner_meta,
        "sha256": _checksum(leaves),
        "tree": description,
    }
    structure_text, card_text = json.dumps(structure), json.dumps(meta or {}, indent=2) + "\n"

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        if packed is not None:
            packed = packed if isinstance(packed, dict) else {"": packed}
            _write_arrays(temporary / _TREE, packed)
        (temporary / _STRUCTURE).write_text(structure_text, encoding="utf-8")
        (temporary / _CARD).write_text(card_text, encoding="utf-8")
        previous = _previous(path)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)
        os.rename(temporary, path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _write_arrays(path: Path, packed: dict[str, Any]) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(packed))


def _read_arrays(path: Path, target: dict[str, Any]) -> dict[str, Any]:
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a complete checkpoint: {path.name} is missing. Save it again, or "
            "restore the folder from version control."
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"the checkpoint {path.parent} is damaged: {path.name} cannot be read ({error}). Save it "
            "again, or restore the folder from version control."
        ) from None


def _folder(path: str | os.PathLike[str]) -> Path:
    """Returns the folder to read, or says that there is none."""
    path = Path(path).expanduser().absolute()
    folder = _recover(path)
    if not folder.is_dir():
        siblings = sorted(
            item.parent.name for item in path.parent.glob(f"*/{_STRUCTURE}") if item.name[0] != "."
        )
        hint = f" {path.parent} holds {', '.join(siblings)}." if siblings else ""
        raise CheckpointError(f"path: there is no checkpoint at {path}.{hint}")
    return folder


def card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the card of a checkpoint: what `save` was given as `meta`.

    Args:
      path: Folder of the checkpoint.

    Raises:
      CheckpointError: If there is no checkpoint, or its card cannot be read.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     card(save(folder + "/net", {"w": jnp.ones(2)}, {"accuracy": 0.9}))
      {'accuracy': 0.9}
    """
    return _read_json(_folder(path) / _CARD)


def load(path: str | os.PathLike[str], net: Any = None) -> Any:
    """Loads what `save` wrote.

    Args:
      path: Folder of the checkpoint.
      net: The traced `Network` that a saved `Merged` belongs to; not needed for trees.

    Returns:
      The tree, its containers as they were and its leaves as `jax.Array`; or the saved object.

    Raises:
      CheckpointError: If there is no checkpoint at `path`, or it is incomplete or damaged.
      ValueError: If an object was saved that needs `net`, and none is given.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     tree = load(save(folder + "/net", {"stems": (None, [jnp.ones(2)])}))
      >>> tree["stems"][0], tree["stems"][1][0].shape
      (None, (2,))
    """
    folder = _folder(path)
    structure = _read_json(folder / _STRUCTURE)
    damaged = f"the checkpoint {folder} is damaged: "
    advice = " Save it again, or restore the folder from version control."
    if not isinstance(structure, dict) or structure.get("format") != _FORMAT:
        raise CheckpointError(
            f"{damaged}{_STRUCTURE} is of format "
            f"{structure.get('format') if isinstance(structure, dict) else None!r}, this version "
            f"reads {_FORMAT}.{advice}"
        )
    leaves: list[np.ndarray] = []
    try:
        description = structure["tree"]
        target = _target(description)
        arrays = None
        if target is not None:
            is_leaf = not isinstance(target, dict)
            arrays = _read_arrays(folder / _TREE, {"": target} if is_leaf else target)
            arrays = arrays[""] if is_leaf else arrays
        tree = _unpack(arrays, description, leaves)
    # Orbax raises whatever its storage layer does: any failure to read these bytes is damage.
    except Exception as error:
        logging.getLogger(__name__).debug("cannot read %s", folder, exc_info=True)
        summary = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{damaged}{type(error).__name__}: {summary}.{advice}"
        ) from error
    if _checksum(leaves) != structure["sha256"]:
        raise CheckpointError(f"{damaged}its arrays do not have the checksum on record.{advice}")

    kind = structure["kind"]
    if kind is None:
        return tree
    if net is None:
        raise ValueError(f"{folder} holds a {kind}: give load(path, net=...) its traced Network.")
    module, _, name = kind.rpartition(".")
    return getattr(importlib.import_module(module), name).__from_checkpoint__(
        tree, structure["meta"], net=net
    )
