"""What a value is, as JSON that is the same in every process: how runs are told apart.

A `repr` will not do: that of a function holds an address, so that no second process would resume
its run, and that of a large array leaves out the middle, so that another run would be resumed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vfjax._trees import as_numpy, flatten_named


def identity_of(value: Any) -> Any:
    """Describes a value by what it computes: classes and fields, functions by their code.

    Args:
        value: Numbers, strings, arrays and containers of these, data classes (so Flax modules),
            functions with what they close over, partial functions, methods, and other objects with
            their attributes.

    Returns:
        JSON. Arrays are digests.

    Example:
        >>> def scaled(by):
        ...     return lambda x: by * x
        >>> identity_of(scaled(2)) == identity_of(scaled(2)) != identity_of(scaled(3))
        True
    """
    return _Describer().of(value)


def digest(tree: Any) -> str:
    """A digest of a tree's leaves: their paths, dtypes, shapes and values."""
    total = hashlib.sha256()
    for path, leaf in flatten_named(tree).leaves.items():
        leaf = as_numpy(leaf)
        total.update(f"{path}:{leaf.dtype.name}{leaf.shape}:".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


# Of their functions and classes the name says what they compute.
_LIBRARIES = ("flax", "jax", "jaxlib", "numpy", "optax", "vfjax")


class _Describer:
    """Describes values, and each object once: functions may refer to each other in circles."""

    def __init__(self) -> None:
        # The values too: an id is free again once its object is gone.
        self._seen: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (bytes, complex, np.dtype, range, slice, type(...))):
            return repr(value)
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return {"array": digest(value)}
        if isinstance(value, type) or isinstance(value, types.ModuleType):
            return _name(value)
        if id(value) in self._seen:
            return "seen"
        self._seen[id(value)] = value
        if isinstance(value, Mapping):
            return [[self.of(key), self.of(item)] for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted(map(repr, map(self.of, value)))
        return self._of_object(value)

    def _of_object(self, value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return [value.co_code.hex(), self.of(value.co_consts), list(value.co_names)]
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return [self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, functools.partial):
            return [self.of(part) for part in (value.func, value.args, value.keywords)]
        if isinstance(getattr(value, "__wrapped__", None), types.FunctionType):  # by jax.jit, say
            return self.of(value.__wrapped__)
        if type(value) is object or (callable(value) and hasattr(value, "__name__")):
            return _name(value)
        if dataclasses.is_dataclass(value):
            # `parent` is where Flax keeps the module around another, which has it as a field.
            names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
            fields = {name: getattr(value, name, None) for name in names}
        elif hasattr(value, "__dict__"):
            kind = type(value)
            fields = {
                name: item
                for name, item in vars(value).items()
                if not isinstance(getattr(kind, name, None), functools.cached_property)
            }
        else:
            return [_name(type(value)), repr(value)]
        return [_name(type(value)), self.of(fields)]

    def _of_function(self, fn: types.FunctionType) -> Any:
        code = fn.__code__
        cells = [self._of_cell(cell) for cell in fn.__closure__ or ()]
        if fn.__globals__.get("__name__", "").partition(".")[0] in _LIBRARIES:
            return [_name(fn), *cells]
        read = {name: fn.__globals__[name] for name in code.co_names if name in fn.__globals__}
        return [
            _name(fn),
            self.of(code),
            self.of(fn.__defaults__),
            self.of(fn.__kwdefaults__),
            cells,
            {name: self._of_global(value, fn) for name, value in read.items()},
        ]

    def _of_cell(self, cell: Any) -> Any:
        try:
            return self.of(cell.cell_contents)
        except ValueError:  # not yet assigned
            return None

    def _of_global(self, value: Any, fn: types.FunctionType) -> Any:
        """Of what is defined elsewhere the name alone, or a library would be described whole."""
        elsewhere = getattr(value, "__module__", None) not in (None, fn.__module__)
        return _name(value) if elsewhere and callable(value) else self.of(value)


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return f"{module or ''}.{name or type(value).__qualname__}"
