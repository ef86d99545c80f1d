"""Trees as checkpoints store them: nested dictionaries of arrays, and JSON that describes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees import as_numpy
from vfjax._types import PyTree

_NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float, "complex": complex}


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged."""


def stored_key(key: str) -> str:
    """A key as orbax stores it: it joins keys by dots, so that a dot in a key could be either.

    Example:
        >>> stored_key("Conv_0"), stored_key("a.b"), stored_key("a/b")
        ('Conv_0', 'a%2Eb', 'a%2Fb')
    """
    return quote(key, safe="", errors="surrogatepass").replace(".", "%2E")


def pack(
    tree: PyTree, where: str, leaves: list[np.ndarray], storage: np.dtype | None
) -> tuple[Any, Any]:
    """Returns (nested dictionaries of arrays or None, JSON description), appending to `leaves`."""
    if tree is None:
        return None, {"none": True}
    if isinstance(tree, Mapping):
        # NNX numbers the entries of lists; the kind records that the keys were integers.
        kind = "intdict" if tree and all(type(key) is int for key in tree) else "dict"
        for key in tree:
            if not isinstance(key, str) and kind == "dict":
                raise TypeError(
                    f"tree has the key {key!r} at {where or 'its root'!r}; keys must be strings."
                )
        items = {str(key): value for key, value in tree.items()}
    elif isinstance(tree, (list, tuple)):
        if hasattr(tree, "_fields"):
            raise TypeError(
                f"tree has a {type(tree).__name__} at {where or 'its root'!r}, a type that would "
                "not be found again when loading; save jax.tree.leaves(tree) instead."
            )
        kind = "list" if isinstance(tree, list) else "tuple"
        items = {str(index): value for index, value in enumerate(tree)}
    else:
        leaf = _leaf(tree, where)
        description = {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        if type(tree) in _NUMBERS.values():
            description["number"] = type(tree).__name__
        if jnp.issubdtype(leaf.dtype, jnp.integer) and jnp.iinfo(leaf.dtype).bits < 8:
            # Tensorstore does not know all types of less than a byte.
            leaf = leaf.astype(np.int8 if jnp.iinfo(leaf.dtype).min else np.uint8)
            description["stored"] = leaf.dtype.name
        if storage is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            if storage.itemsize < leaf.dtype.itemsize:
                leaf = _narrowed(leaf, where, storage)
                description["stored"] = storage.name
        leaves.append(leaf)
        # Orbax cannot store empty arrays; their description is enough to restore them.
        return leaf if leaf.size else None, description
    packed, described = {}, {}
    for key, value in items.items():
        inner, described[key] = pack(value, f"{where}/{key}" if where else key, leaves, storage)
        if inner is not None:
            packed[stored_key(key)] = inner
    return packed or None, {kind: described}


def _leaf(value: Any, where: str) -> np.ndarray:
    """Returns a leaf as a NumPy array of this machine's byte order, or raises if it is not one."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, *_NUMBERS.values())):
        raise TypeError(
            f"tree has a {type(value).__name__} at {where or 'its root'!r}; leaves must be arrays: "
            "partition modules first (eqx.partition, nnx.split), turn states into "
            "dictionaries (nnx.to_pure_dict)."
        )
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"tree has a random key at {where or 'its root'!r}; save jax.random.key_data(key)."
        )
    try:
        return as_numpy(value)
    except TypeError as error:
        raise TypeError(
            f"tree has an array at {where or 'its root'!r} that is not of numbers or booleans: "
            f"{error}. Convert it, or put it into `meta`."
        ) from None


def _narrowed(leaf: np.ndarray, where: str, storage: np.dtype) -> np.ndarray:
    """Rounds a leaf to a narrower dtype, or raises if a finite value overflows."""
    with np.errstate(over="ignore"):
        rounded = leaf.astype(storage)
    if not np.array_equal(np.isfinite(rounded), np.isfinite(leaf)):
        raise ValueError(
            f"storage {storage.name} is too narrow for {where or 'the root'!r}, which holds "
            f"{np.abs(leaf[np.isfinite(leaf)]).max():.3g}: store it in bfloat16 or as it is."
        )
    return rounded


def target_of(description: Mapping[str, Any], key_of: Callable[[str], str]) -> Any:
    """Returns the nested dictionaries of arrays that orbax restores into, or None if empty.

    `key_of` is `stored_key`, or `str` for a checkpoint that stores keys as they are.
    """
    if "none" in description:
        return None
    if "shape" in description:
        array = _stored(description)
        return array if array.size else None
    (items,) = description.values()
    packed = {key_of(key): target_of(inner, key_of) for key, inner in items.items()}
    return {key: value for key, value in packed.items() if value is not None} or None


def _stored(description: Mapping[str, Any]) -> np.ndarray:
    """Returns an empty array of the shape and dtype in which a described leaf is stored."""
    dtype = description.get("stored", description["dtype"])
    return np.empty(description["shape"], jnp.dtype(dtype))


def unpack(
    tree: Any,
    description: Mapping[str, Any],
    leaves: list[np.ndarray],
    key_of: Callable[[str], str],
    convert: Callable[[np.ndarray], Any],
) -> PyTree:
    """Inverts `pack`, appending to `leaves` in the same order.

    `key_of` is as in `target_of`; `convert` makes what is returned of an array.
    """
    if "none" in description:
        return None
    if "shape" in description:
        expected = _stored(description)
        leaf = np.asarray(tree) if expected.size else expected
        if leaf.shape != expected.shape or leaf.dtype != expected.dtype:
            raise CheckpointError(
                f"an array is {leaf.dtype}{list(leaf.shape)}, not {expected.dtype}"
                f"{description['shape']}"
            )
        leaves.append(leaf)
        leaf = leaf.astype(jnp.dtype(description["dtype"]), copy=False)
        if "number" in description:
            return _NUMBERS[description["number"]](leaf[()])
        return convert(leaf)
    ((kind, items),) = description.items()
    values = {
        key: unpack(tree.get(key_of(key)) if tree else None, inner, leaves, key_of, convert)
        for key, inner in items.items()
    }
    if kind == "dict":
        return values
    if kind == "intdict":
        return {int(key): value for key, value in values.items()}
    return list(values.values()) if kind == "list" else tuple(values.values())


def checksum_of(leaves: list[np.ndarray]) -> str:
    """Returns a digest of all leaves' bytes."""
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Returns a digest of JSON values, however their file is laid out."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
