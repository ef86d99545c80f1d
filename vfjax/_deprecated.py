"""Old names: they work for one more version, with a `DeprecationWarning`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def renamed(old: str, new: str, *, depth: int = 3) -> None:
    """Warns that something has a new name.

    Args:
        old: The old name.
        new: The new one.
        depth: Which caller the warning points at: 3 is the caller of the function that called this.
    """
    message = f"{old} is now {new}; the old name goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=depth)


class OldName:
    """An attribute under its old name; it warns, and returns the attribute of the new name.

    Args:
        new: The new name.

    Example:
        >>> import warnings
        >>> class Box:
        ...     params = 3
        ...     parameters = OldName("params")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     Box().parameters
        3
        >>> str(caught[0].message)
        'Box.parameters is now Box.params; the old name goes with the next version'
    """

    def __init__(self, new: str) -> None:
        """See the class."""
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        """Learns its name and its class."""
        self.owner, self.old = owner.__name__, name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """The attribute of the new name."""
        if instance is None:
            return self
        renamed(f"{self.owner}.{self.old}", f"{self.owner}.{self.new}")
        return getattr(instance, self.new)


def renames(**keywords: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function take keywords by their old names as well, with a warning.

    Args:
        **keywords: New names, by old name.

    Returns:
        A decorator.

    Example:
        >>> import warnings
        >>> @renames(layers="names")
        ... def first(*, names=None):
        ...     return names[0]
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     first(layers=["a", "b"])
        'a'
        >>> str(caught[0].message)
        'first(layers=...) is now first(names=...); the old name goes with the next version'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = getattr(function, "__name__", "function")

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> R:
            for old, new in keywords.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{name}() got both {new} and {old}, its old name; give {new}")
                renamed(f"{name}({old}=...)", f"{name}({new}=...)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        wrapped.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def renamed_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """Lets a dataclass be made, and changed by `dataclasses.replace`, with old names of fields.

    Args:
        **names: New names, by old name.

    Returns:
        A decorator of the dataclass, to stand above `dataclasses.dataclass`.

    Example:
        >>> import dataclasses, warnings
        >>> @renamed_fields(parameters="params")
        ... @dataclasses.dataclass(frozen=True)
        ... class Box:
        ...     params: int
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     dataclasses.replace(Box(parameters=3), parameters=4).params
        4
        >>> str(caught[0].message)
        'Box(parameters=...) is now Box(params=...); the old name goes with the next version'
    """

    def decorate(record: type[T]) -> type[T]:
        make = record.__init__

        @functools.wraps(make)
        def wrapped(self: T, *args: Any, **kwargs: Any) -> None:
            for old, new in names.items():
                if old in kwargs:
                    name = record.__name__
                    renamed(f"{name}({old}=...)", f"{name}({new}=...)")
                    # `dataclasses.replace` adds the present value under the new name.
                    kwargs[new] = kwargs.pop(old)
            make(self, *args, **kwargs)

        record.__init__ = wrapped
        return record

    return decorate
