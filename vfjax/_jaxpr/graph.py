"""A network as a flat list of equations, and its evaluation with values read or replaced.

`flattening` makes a `Graph` of a jaxpr: a layer is one equation there and a value one integer.

Evaluation goes through `jax.core.eval_jaxpr`, one equation at a time: it enters each equation's
context and name stack exactly as evaluating the original jaxpr would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend import core as jex

from vfjax._types import Array

# A user's layer is never written in a frame of an installed package, of JAX or of this package.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_LIBRARIES = (_JAX, *(os.sep + name + os.sep for name in ("site-packages", "dist-packages")))


@functools.cache
def _debug_info() -> Any:
    """Empty debug information: `Jaxpr` demands some."""
    return jax.make_jaxpr(lambda: ())().jaxpr.debug_info


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One primitive applied to values.

    Attributes:
        eqn: The equation as JAX traced it.
        inputs: One entry per operand: the id of a value, or a literal.
        outputs: The ids of its results; None for a result that nothing reads.
        depends: Bits `PARAM` and `INPUT`: what the results depend on.
        scope: Name stack of the calls that it was inlined from.
        calls: Equations of these calls, outermost first.
    """

    eqn: Any
    inputs: tuple[int | jex.Literal, ...]
    outputs: tuple[int | None, ...]
    depends: int
    scope: str
    calls: tuple[Any, ...] = ()

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> Mapping[str, Any]:
        """Parameters of the primitive."""
        return self.eqn.params

    @property
    def values(self) -> tuple[int, ...]:
        """Ids of the operands, leaving out literals."""
        return tuple(v for v in self.inputs if isinstance(v, int))

    @property
    def results(self) -> tuple[int, ...]:
        """Ids of the results, leaving out those that nothing reads."""
        return tuple(v for v in self.outputs if v is not None)

    @property
    def result(self) -> int:
        """Id of the first result; most primitives have only one."""
        return self.results[0]

    @functools.cached_property
    def where(self) -> str:
        """The user's source line, as `file:line`; a library's if no user frame is recorded.

        A function of JAX that is jitted (`jnp.cumsum`) hides the lines that call it: then the line
        of the call counts.
        """
        tracebacks = [eqn.source_info.traceback for eqn in (self.eqn, *reversed(self.calls))]
        frames = [frame for t in tracebacks if t is not None for frame in t.frames]
        outside = [f for f in frames if not f.file_name.startswith((_PACKAGE, _JAX))]
        for frame in [f for f in frames if not _in_library(f.file_name)] + outside:
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
        return "unknown"

    @functools.cached_property
    def _jaxpr(self) -> Any:
        operands = {v: None for v in self.eqn.invars if not isinstance(v, jex.Literal)}
        kept = [v for v, i in zip(self.eqn.outvars, self.outputs, strict=True) if i is not None]
        return jex.Jaxpr(
            [], list(operands), kept, [self.eqn], self.eqn.effects, debug_info=_debug_info()
        )

    def bind(self, *args: Any) -> list[Any]:
        """Applies the equation to one argument per operand; returns the results that have ids."""
        operands = {
            v: a
            for v, a in zip(self.eqn.invars, args, strict=True)
            if not isinstance(v, jex.Literal)
        }
        with _scoped(self.scope):
            return eval_jaxpr(self._jaxpr, (), *operands.values())

    def replace(self, rule: Callable[..., Any], *args: Any) -> list[Any]:
        """Applies another function in the equation's place, in its name stack and context."""
        stack = str(self.eqn.source_info.name_stack)
        with _scoped("/".join(s for s in (self.scope, stack) if s)), self.eqn.ctx.manager:
            results = rule(*args)
        return list(results) if self.eqn.primitive.multiple_results else [results]


def _scoped(scope: str) -> Any:
    return jax.named_scope(scope) if scope else contextlib.nullcontext()


def _in_library(file: str) -> bool:
    if file.startswith(_PACKAGE):
        return not file.startswith(_PACKAGE + "models" + os.sep)
    return any(part in file for part in _LIBRARIES)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A flattened jaxpr in static single assignment form.

    Attributes:
        equations: In an order in which they can be evaluated; every one is needed for an output.
        inputs: Ids of the inputs: first the leaves of the variables, then those of x.
        num_leaves: How many of the inputs are leaves of the variables.
        outputs: Ids of the outputs (or literals).
        consts: Values closed over, by id.
        avals: The abstract value of each id.
        depends: The dependency bits of each id.
        users: Indices of the equations that read an id, in order.
        producer: Index of the equation that computes an id; inputs and consts have none.
    """

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    num_leaves: int
    outputs: tuple[int | jex.Literal, ...]
    consts: Mapping[int, Any]
    avals: Mapping[int, Any]
    depends: Mapping[int, int]
    users: Mapping[int, tuple[int, ...]]
    producer: Mapping[int, int]

    @property
    def output_ids(self) -> tuple[int, ...]:
        """Ids of the outputs, leaving out literals."""
        return tuple(v for v in self.outputs if isinstance(v, int))

    def output_values(self, values: Mapping[int, Any]) -> list[Any]:
        """The outputs, literals as arrays, given the values of `output_ids`."""
        return [values[v] if isinstance(v, int) else _array(v) for v in self.outputs]

    def needed(self, wanted: Iterable[int], have: Iterable[int]) -> list[int]:
        """Indices of the equations that compute `wanted` from `have`, in order."""
        have, todo, chosen = set(have), list(wanted), set()
        while todo:
            value = todo.pop()
            index = self.producer.get(value)
            if value in have or index is None or index in chosen:
                continue
            chosen.add(index)
            todo.extend(self.equations[index].values)
        return sorted(chosen)


def _array(literal: Any) -> Array:
    return jax.numpy.asarray(literal.val, literal.aval.dtype)


def evaluate(
    graph: Graph,
    env: Mapping[int, Any],
    wanted: Sequence[int],
    *,
    edits: Mapping[int, Callable[[Any], Any]] | None = None,
    operand_edits: Mapping[tuple[int, int], Callable[[Any], Any]] | None = None,
    rules: Callable[[Equation, Sequence[Any]], Callable[..., Any] | None] | None = None,
) -> dict[int, Any]:
    """Computes values of a graph, running only the equations that they need.

    Args:
        graph: The graph.
        env: Known values by id: leaves, inputs, or values further down. Not modified.
        wanted: Ids to compute.
        edits: By id, a function that replaces the value once computed, for every reader.
        operand_edits: By (equation index, operand index), a function that replaces the operand for
            that one equation.
        rules: `rules(equation, args)` may return a function of the operands to use in place of the
            primitive (it returns one result, or a list where the primitive has several). It runs
            in the equation's name stack and context.

    Returns:
        The wanted values, by id.

    Raises:
        KeyError: If a needed input is missing from `env`; its argument is the id.
    """
    edits, operand_edits = edits or {}, operand_edits or {}
    env = {**graph.consts, **env}
    order = graph.needed(wanted, env)
    # Drop each value after its last use, so that an eager run holds no more than a jitted one.
    last_use = {v: i for i in order for v in graph.equations[i].values}
    keep = set(wanted)
    for index in order:
        equation = graph.equations[index]
        args = [env[v] if isinstance(v, int) else v.val for v in equation.inputs]
        for k in range(len(args)):
            if (index, k) in operand_edits:
                args[k] = operand_edits[index, k](args[k])
        rule = rules(equation, args) if rules is not None else None
        if rule is None:
            results = equation.bind(*args)
        else:
            results = equation.replace(rule, *args)
            results = [r for r, v in zip(results, equation.outputs, strict=True) if v is not None]
        for value, result in zip(equation.results, results, strict=True):
            env[value] = edits[value](result) if value in edits else result
        for value in equation.values:
            if last_use[value] == index and value not in keep:
                env.pop(value, None)
    return {v: env[v] for v in wanted}
