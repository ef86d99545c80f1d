"""Flattening a jaxpr, so that a layer is one equation and a value one integer, whatever wrapped it.

A jaxpr nests: `jit`, rematerialisation, custom derivatives and loops hold jaxprs themselves.

* Products that contract nothing become multiplications, which they are.
* Calls that only delimit (`jit`, `closed_call`, `remat`) are inlined.
* `custom_jvp` and `custom_vjp` stay whole unless a layer hides inside, since inlining them would
  change derivatives (that of `relu` at 0, for one).
* A `scan` over stacked layers is unrolled if it has at most `MAX_UNROLL` steps; any other loop
  stays whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex

from vfjax._jaxpr.calls import (
    INPUT,
    PARAM,
    holds_layer,
    open_jaxpr,
    scan_arity,
    scans_layers,
    subjaxpr,
    union,
)
from vfjax._jaxpr.contractions import as_scale, is_linear
from vfjax._jaxpr.graph import Equation, Graph
from vfjax._jaxpr.primitives import CAST, DOT, INLINE, RESHAPE, SCAN, UNSTACK

# The number of steps up to which a scan over layers is unrolled.
MAX_UNROLL = 64


def flatten(closed_jaxpr: Any, num_leaves: int) -> Graph:
    """Flattens a jaxpr into a `Graph`.

    Args:
        closed_jaxpr: What `jax.make_jaxpr(fn)(*leaves_of_variables, *leaves_of_x)` returns.
        num_leaves: How many of its inputs are leaves of the variables.

    Returns:
        The graph, without the equations that no output depends on.
    """
    jaxpr, consts = open_jaxpr(closed_jaxpr)
    flat = _Flattener()
    inputs = tuple(
        flat.value(v.aval, PARAM if i < num_leaves else INPUT) for i, v in enumerate(jaxpr.invars)
    )
    outputs = tuple(flat.inline(jaxpr, consts, inputs, ""))

    alive = {v for v in outputs if isinstance(v, int)}
    equations = []
    for equation in reversed(flat.equations):
        if any(v in alive for v in equation.outputs):
            alive.update(equation.values)
            equations.append(equation)
    equations.reverse()
    users: dict[int, list[int]] = {}
    producer: dict[int, int] = {}
    for index, equation in enumerate(equations):
        for value in dict.fromkeys(equation.values):
            users.setdefault(value, []).append(index)
        producer.update((v, index) for v in equation.results)
    return Graph(
        equations=tuple(equations),
        inputs=inputs,
        num_leaves=num_leaves,
        outputs=outputs,
        consts={k: v for k, v in flat.consts.items() if k in alive},
        avals=flat.avals,
        depends=flat.depends,
        users={k: tuple(v) for k, v in users.items()},
        producer=producer,
    )


class _Flattener:
    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.avals: dict[int, Any] = {}
        self.depends: dict[int, int] = {}
        self.consts: dict[int, Any] = {}
        self.calls: list[Any] = []  # those that are being inlined

    def value(self, aval: Any, depends: int) -> int:
        index = len(self.avals)
        self.avals[index], self.depends[index] = aval, depends
        return index

    def bits(self, value: Any) -> int:
        return self.depends[value] if isinstance(value, int) else 0

    def inline(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], scope: str) -> list:
        """Emits the equations of a jaxpr; returns what its outputs became."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.value(var.aval, 0)
            self.consts[env[var]] = const

        def read(v: Any) -> Any:
            return v if isinstance(v, jex.Literal) else env[v]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            outputs = self.equation(eqn, operands, scope)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list, scope: str) -> Sequence[Any]:
        name = eqn.primitive.name
        bits = [self.bits(v) for v in operands]
        inner = subjaxpr(eqn)
        if inner is not None and (name in INLINE or holds_layer(eqn, bits)):
            stack = str(eqn.source_info.name_stack)
            self.calls.append(eqn)
            outputs = self.inline(*inner, operands, "/".join(s for s in (scope, stack) if s))
            self.calls.pop()
            return outputs
        if name == SCAN and eqn.params["length"] <= MAX_UNROLL and scans_layers(eqn, bits):
            return self.unroll(eqn, operands, scope)
        if name == RESHAPE and eqn.params["dimensions"] is not None:
            # A reshape in Fortran order, say, hides a transpose.
            how = eqn.params["dimensions"], eqn.params["new_sizes"]
            regrouped = lambda a: a.transpose(how[0]).reshape(how[1])  # noqa: E731
            return [self.call(regrouped, operands, scope, eqn.source_info)]
        if name == DOT and not is_linear(eqn):
            return [self.call(functools.partial(as_scale, eqn), operands, scope, eqn.source_info)]
        if name == UNSTACK:
            # Slices, as jax 0.10 traces it: each entry may then be the kernel of a separate layer.
            pick = functools.partial(lax.index_in_dim, axis=eqn.params["axis"], keepdims=False)
            return [
                self.call(functools.partial(pick, index=k), operands, scope, eqn.source_info)
                for k in range(len(eqn.outvars))
            ]
        if name in CAST and len(operands) > 1:
            # One equation each, or every result would depend on what any of the operands depends
            # on.
            return [
                self.equation(one, [operand], scope)[0]
                for one, operand in zip(_separate(eqn), operands, strict=True)
            ]
        depends = union(bits)
        outputs = tuple(
            None if isinstance(v, jex.DropVar) else self.value(v.aval, depends) for v in eqn.outvars
        )
        self.equations.append(
            Equation(eqn, tuple(operands), outputs, depends, scope, tuple(self.calls))
        )
        return outputs

    def call(
        self, fn: Callable[..., Any], operands: Sequence[Any], scope: str, source: Any = None
    ) -> Any:
        """Emits the equations of a helper function, as if written at the user's line."""
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in map(self.aval, operands)]
        jaxpr, consts = open_jaxpr(jax.make_jaxpr(fn)(*shapes))
        if source is not None:
            jaxpr = jaxpr.replace(eqns=[eqn.replace(source_info=source) for eqn in jaxpr.eqns])
        return self.inline(jaxpr, consts, operands, scope)[0]

    def aval(self, value: Any) -> Any:
        return self.avals[value] if isinstance(value, int) else value.aval

    def unroll(self, eqn: Any, operands: list, scope: str) -> list:
        num_consts, num_carry = scan_arity(eqn.params)
        jaxpr, closed = open_jaxpr(eqn.params["jaxpr"])
        consts, stacked = operands[:num_consts], operands[num_consts + num_carry :]
        carry = operands[num_consts : num_consts + num_carry]
        length = eqn.params["length"]
        steps = range(length)[::-1] if eqn.params["reverse"] else range(length)
        stack = str(eqn.source_info.name_stack)
        scope = "/".join(s for s in (scope, stack) if s)
        emitted: dict[int, list] = {}
        for step in steps:
            pick = functools.partial(lax.index_in_dim, index=step, axis=0, keepdims=False)
            slices = [self.call(pick, [v], scope) for v in stacked]
            outs = self.inline(jaxpr, closed, [*consts, *carry, *slices], scope)
            carry, emitted[step] = outs[:num_carry], outs[num_carry:]
        collected = []
        for k, var in enumerate(eqn.outvars[num_carry:]):
            if isinstance(var, jex.DropVar):
                collected.append(None)
                continue
            parts = [self.materialise(emitted[step][k], scope) for step in range(length)]
            collected.append(self.call(lambda *ys: jax.numpy.stack(ys), parts, scope))
        return [*carry, *collected]

    def materialise(self, value: Any, scope: str) -> int:
        if isinstance(value, int):
            return value
        index = self.value(value.aval, 0)
        self.consts[index] = value.val
        return index


def _separate(eqn: Any) -> list[Any]:
    """Splits an equation that passes several operands through into one equation for each."""

    def own(param: Any, k: int) -> Any:
        # The parameters of `device_put` are tuples with an entry for each operand.
        each = isinstance(param, tuple) and len(param) == len(eqn.invars)
        return param[k : k + 1] if each else param

    return [
        eqn.replace(
            invars=[operand],
            outvars=[result],
            params={name: own(param, k) for name, param in eqn.params.items()},
        )
        for k, (operand, result) in enumerate(zip(eqn.invars, eqn.outvars, strict=True))
    ]
