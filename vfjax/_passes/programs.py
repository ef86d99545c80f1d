"""Compiled programs that live as long as the network that they evaluate.

`jax.jit` keeps its programs, and its static arguments with them, as long as the function that it
was given: for a function of a module, for good. A traced network among them would never be freed.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import jax

from vfjax._trees import native

_Result = TypeVar("_Result")


class Owner:
    """What compiled programs are kept with: a traced network."""

    @functools.cached_property
    def programs(self) -> dict[Hashable, Callable[..., Any]]:
        """Compiled functions, by what they compute."""
        return {}


def compiled(
    *, static: int, donate: int | None = None
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """As `jax.jit`, but programs are kept with the first network among the arguments.

    That is a network itself, one in the fields of tuples and data classes, which may be nodes of a
    tree, or one that a function closes over. Calls without a network are those of `jax.jit`.

    Args:
        static: The number of first arguments that are static, and hashable.
        donate: Position of the argument that is donated, or None.

    Returns:
        A decorator of a function of positional arguments.

    Example:
        >>> @compiled(static=1)
        ... def scaled(by, x):
        ...     return by * x
        >>> float(scaled(2.0, 3.0))
        6.0
    """
    donated = () if donate is None else (donate,)

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        plain = jax.jit(function, static_argnums=tuple(range(static)), donate_argnums=donated)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            owner = _owner(args)
            if owner is None:
                return plain(*args)
            # Only leaves are handed to `jit`, whose caches would keep a network in a tree alive.
            flat = [jax.tree.flatten(arg) for arg in args[static:]]
            key = function, args[:static], tuple(structure for _, structure in flat)
            program = owner.programs.get(key)
            if program is None:
                made = jax.jit(_on_leaves(*key), donate_argnums=tuple(n - static for n in donated))
                program = owner.programs.setdefault(key, made)
            return program(*([native(leaf) for leaf in leaves] for leaves, _ in flat))

        return call

    return decorate


def _on_leaves(
    function: Callable[..., Any], static: tuple[Any, ...], structures: tuple[Any, ...]
) -> Callable[..., Any]:
    @functools.wraps(function, assigned=("__name__", "__qualname__"), updated=())
    def on_leaves(*leaves: list[Any]) -> Any:
        return function(*static, *map(jax.tree.unflatten, structures, leaves))

    return on_leaves


def _owner(value: Any, depth: int = 6) -> Owner | None:
    """The first network in what holds values: tuples, data classes, functions and methods.

    It is looked for a few levels deep, as functions may close over themselves.
    """
    if isinstance(value, Owner) or depth == 0:
        return value if isinstance(value, Owner) else None
    if isinstance(value, (tuple, list)):
        parts: Iterable[Any] = value
    elif isinstance(value, types.MethodType):
        parts = (value.__self__,)
    elif isinstance(value, types.FunctionType):
        parts = map(_content, value.__closure__ or ())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name, None) for field in dataclasses.fields(value))
    else:
        return None
    return next((found for part in parts if (found := _owner(part, depth - 1)) is not None), None)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
