"""The registry of rules, and the `Step` through which a rule sees and changes axes.

A rule says how the axes of a primitive's results follow from those of its operands. It receives a
`Step` and returns, for each result, one axis per dimension:

    @rule("transpose")
    def transpose(step):
        return [[step.inputs[0].axes[k] for k in step.params["permutation"]]]

Where entries are paired, a rule calls `step.unify`; where they are treated differently, `step.fix`,
and gives the result a fixed axis too (`step.fixed(n)`). The whole contract of a rule: every
permutation of the operands' free atoms must permute the results as their axes say, and change
nothing else.

A rule that ties some dimensions of an operand and keeps others also says so by `step.record.keep`
(see `within`). A rule is `lazy` if it may meet axes that are folded
(see `folds`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from vfjax._jaxpr import INPUT, PARAM, union
from vfjax._jaxpr.primitives import CAST
from vfjax._propagate.atoms import Axis, Cause
from vfjax._propagate.folds import Folds
from vfjax._propagate.within import Record, Use

Axes = list[Axis]
"""One axis per dimension of an array."""


class Stack(NamedTuple):
    """Axes that differ by the entry of an array along some dimensions (see `stacks`).

    Attributes:
        dims: By stack, the dimension that runs over its entries.
        entries: By index along these dimensions, the axes of that entry alone, one per dimension
            of the whole array. Entries that are missing have the axes of the first.
    """

    dims: dict[Any, int]
    entries: dict[tuple[int, ...], Axes]


class Value(NamedTuple):
    """The axes of an array, and what it depends on.

    Attributes:
        axes: One axis per dimension; of a stack, those of its first entry.
        shape: Its shape.
        depends: Bits `PARAM` and `INPUT`.
        stack: The axes of every entry, if they differ.
    """

    axes: Axes
    shape: tuple[int, ...]
    depends: int
    stack: Stack | None = None


@dataclasses.dataclass
class Step:
    """One equation, as a rule sees it.

    Attributes:
        algebra: The atoms.
        eqn: The `JaxprEqn`.
        inputs: Its operands.
        equation: The `Equation` of the graph that it is or that contains it.
        record: Where layers and values are recorded.
    """

    algebra: Folds
    eqn: Any
    inputs: list[Value]
    equation: Any
    record: Record

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters of the primitive."""
        return self.eqn.params

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the results."""
        return [shape_of(var.aval) for var in self.eqn.outvars]

    @property
    def cause(self) -> Cause:
        """This equation, as the reason why an axis is fixed."""
        return Cause(self.primitive, self.equation)

    def free(self, size: int) -> Axis:
        """A new axis whose entries are all equal."""
        return [self.algebra.atom(size)]

    def fixed(self, size: int) -> Axis:
        """A new axis without symmetry."""
        return [self.algebra.atom(size, self.cause)]

    def fix(self, *axes: Axis) -> None:
        """Removes every symmetry of some axes."""
        for axis in axes:
            self.algebra.fix(axis, self.cause)

    def unify(self, left: Axis, right: Axis) -> None:
        """Ties two axes."""
        self.algebra.unify(left, right, self.cause)

    def reshape(self, axes: Axes, shape: Sequence[int]) -> Axes:
        """The axes after a row-major reshape."""
        return self.algebra.reshape(axes, shape, self.cause)

    def cut(self, axes: Axes, dim: int, points: Sequence[int]) -> list[Axes]:
        """The axes of an array's pieces, cut along a dimension at positions inside it."""
        return self.algebra.pick(axes, dim, points, self.cause)

    def joined(self, axes: Axes) -> Axis:
        """The axis in which axes follow one another."""
        return self.algebra.total(axes, self.cause)

    def tie(self, values: Sequence[Value], dims: Iterable[int]) -> None:
        """Ties dimensions of several values of equal rank."""
        for k in dims:
            for value in values[1:]:
                self.unify(values[0].axes[k], value.axes[k])

    def layer(self, kernel: Value, other: Value, contracted: Axes, kept: Axes) -> None:
        """Records `kernel` if it holds parameters alone and meets data that depends on x."""
        if kernel.depends == PARAM and other.depends & INPUT:
            self.record.uses.append(Use(self.primitive, contracted, kept))


Rule = Callable[[Step], Sequence[Axes | Value]]
RULES: dict[str, Rule] = {}
LAZY: set[str] = set()


def rule(*primitives: str, lazy: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives, by name."""

    def register(function: Rule) -> Rule:
        for name in primitives:
            if name in RULES:
                raise ValueError(f"two rules for the primitive {name!r}")
            RULES[name] = function
        LAZY.update(primitives if lazy else ())
        return function

    return register


def opaque(step: Step) -> list[Axes]:
    """The rule of every primitive without one: fixes everything that it touches."""
    for value in step.inputs:
        for axes in [value.axes] if value.stack is None else value.stack.entries.values():
            step.fix(*axes)
    return [[step.fixed(n) for n in shape] for shape in step.shapes]


def apply(step: Step) -> list[Value]:
    """Applies the primitive's rule; a rule that fails costs symmetries, not the trace."""
    function = RULES.get(step.primitive, opaque)
    if step.primitive not in LAZY:
        for value in step.inputs:
            step.algebra.settle(value.axes)
    found: Sequence[Axes | Value] = ()
    try:
        found = function(step)
        results = [of.axes if isinstance(of, Value) else of for of in found]
    except (LookupError, AttributeError, TypeError, ValueError):
        # Another version of jax may have renamed a parameter, say. The ties made before the error
        # only remove symmetries, so the opaque rule can still be applied.
        results = opaque(step)
    if not _consistent(step, results):
        found, results = (), opaque(step)
    bits = [value.depends for value in step.inputs]
    if step.primitive not in CAST:  # a cast passes each operand through as a separate result
        bits = [union(bits)] * len(results)
    for axes, depends in zip(results, bits, strict=True):
        if depends:  # a constant does not vary along what is free in it
            step.record.see(axes)
    stacks = [of.stack if isinstance(of, Value) else None for of in found]
    stacks = stacks or [None] * len(results)
    return [Value(*known) for known in zip(results, step.shapes, bits, stacks, strict=True)]


def shape_of(aval: Any) -> tuple[int, ...]:
    """The shape of an abstract value; `()` for one without a shape, such as a token."""
    return tuple(getattr(aval, "shape", ()))


def constant(algebra: Folds, array: Any, shape: tuple[int, ...]) -> Value:
    """A constant as a `Value`: an axis along which it does not vary breaks no symmetry."""
    cause = Cause("constant")
    try:
        if isinstance(array, Tracer):
            raise TypeError("unknown values")
        entries = np.asarray(array)
        varies = [
            n > 1 and not bool(np.all(entries == np.take(entries, [0], axis=k)))
            for k, n in enumerate(shape)
        ]
    except TypeError:  # also typed random keys
        varies = [True] * len(shape)
    axes = [[algebra.atom(n, cause if v else None)] for n, v in zip(shape, varies, strict=True)]
    return Value(axes, shape, 0)


def _consistent(step: Step, results: list[Axes]) -> bool:
    """Whether a rule returned one axis of the right length per dimension of each result."""
    if len(results) != len(step.shapes):
        return False
    length = step.algebra.length
    return all(
        len(axes) == len(shape)
        and all(length(a) == n for a, n in zip(axes, shape, strict=True) if math.prod(shape))
        for axes, shape in zip(results, step.shapes, strict=True)
    )
