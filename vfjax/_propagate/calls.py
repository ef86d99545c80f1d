"""Rules of primitives that hold jaxprs: calls, loops and branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jax.extend import core as jex

from vfjax._jaxpr import PARAM, open_jaxpr, scan_arity, subjaxpr, union
from vfjax._jaxpr.primitives import CUSTOM, INLINE
from vfjax._propagate.registry import (
    Axes,
    Step,
    Value,
    constant,
    opaque,
    reading,
    rule,
    shape_of,
)
from vfjax._propagate.stacks import apply, tied


def follow(step: Step, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """Applies the rules of all equations of a jaxpr that lies inside `step`."""
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = constant(step.algebra, const, shape_of(var.aval))

    def read(var: Any) -> Value:
        if isinstance(var, jex.Literal):
            return constant(step.algebra, var.val, shape_of(var.aval))
        return reading(step.algebra, env[var])

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        inner = dataclasses.replace(step, eqn=eqn, inputs=operands)
        env.update(zip(eqn.outvars, apply(inner), strict=True))
    return [read(var) for var in jaxpr.outvars]


@rule(*INLINE, *CUSTOM, lazy=True)
def call(step: Step) -> Sequence[Axes | Value]:
    """Evaluates a jaxpr once."""
    inner = subjaxpr(step.eqn)
    if inner is None or len(inner[0].invars) != len(step.inputs):
        return opaque(step)
    return follow(step, *inner, step.inputs)


@rule("scan")
def scan(step: Step) -> list[Value]:
    """Steps over a leading dimension, which is fixed, and ties the carry to itself.

    A rule holds whichever atoms it meets, so a single pass over the body stands for every step of
    the loop, provided that the carry that it returns is tied to the one that it took.
    """
    num_consts, num_carry = scan_arity(step.params)
    jaxpr, closed = open_jaxpr(step.params["jaxpr"])
    own = [tied(step, value) for value in step.inputs[num_consts:]]
    carry, stacked = own[:num_carry], own[num_carry:]
    for value in stacked:
        step.fix(value.axes[0])
    # One stack, of which a step reads one entry; a leaf first, whose cause is then kept for all.
    for first, value in pairwise(sorted(stacked, key=lambda v: v.depends != PARAM)):
        step.unify(first.axes[0], value.axes[0])
    taken, returned = jaxpr.invars[num_consts:][:num_carry], jaxpr.outvars[:num_carry]
    carry = _widen(carry, taken, returned, step.inputs)
    inputs = [*step.inputs[:num_consts], *carry]
    inputs += [Value(v.axes[1:], v.shape[1:], v.depends) for v in stacked]
    outputs = [tied(step, value) for value in follow(step, jaxpr, closed, inputs)]
    _tie_all(step, carry, outputs[:num_carry])
    length = step.params["length"]
    steps = stacked[0].axes[0] if stacked else step.fixed(length)
    emitted = [
        Value([steps, *value.axes], (length, *value.shape), value.depends)
        for value in outputs[num_carry:]
    ]
    return _leaving(step, [*carry, *emitted])


@rule("while")
def while_(step: Step) -> list[Value]:
    """Ties the carry that the body returns to the one that it takes; the condition is a scalar."""
    cond_consts, body_consts = step.params["cond_nconsts"], step.params["body_nconsts"]
    constants, carry = step.inputs[: cond_consts + body_consts], step.inputs[-len(step.shapes) :]
    jaxpr, closed = open_jaxpr(step.params["body_jaxpr"])
    tied_carry = [tied(step, value) for value in carry]
    carry = _widen(tied_carry, jaxpr.invars[body_consts:], jaxpr.outvars, step.inputs)
    condition = [*constants[:cond_consts], *carry]
    body = [*constants[cond_consts:], *carry]
    for value in follow(step, *open_jaxpr(step.params["cond_jaxpr"]), condition):
        step.fix(*tied(step, value).axes)
    _tie_all(step, carry, follow(step, jaxpr, closed, body))
    return _leaving(step, carry)


@rule("cond")
def cond(step: Step) -> list[Axes]:
    """Ties the results of all branches."""
    index, *operands = step.inputs
    step.fix(*tied(step, index).axes)
    branches = [follow(step, *open_jaxpr(b), operands) for b in step.params["branches"]]
    for branch in branches[1:]:
        _tie_all(step, branches[0], branch)
    return [tied(step, value).axes for value in branches[0]]


def _widen(
    carry: Sequence[Value], taken: Sequence[Any], returned: Sequence[Any], entering: Sequence[Value]
) -> list[Value]:
    """Makes a carry depend on everything that enters its loop, as it may after one step.

    Inside, it also counts as dependent on parameters: so that the axes of the carry that the body
    takes remain those that the body's result is tied to in the end. What the body returns as it
    took it stays what it is.
    """
    depends = union([value.depends for value in entering]) | PARAM
    return [
        value if before is after else value._replace(depends=depends, flat=())
        for value, before, after in zip(carry, taken, returned, strict=True)
    ]


def _leaving(step: Step, values: Sequence[Value]) -> list[Value]:
    """Values that leave a loop: they depend on nothing that did not enter it."""
    entering = union([value.depends for value in step.inputs])
    return [value._replace(depends=value.depends & entering) for value in values]


def _tie_all(step: Step, left: Sequence[Value], right: Sequence[Value]) -> None:
    for a, b in zip(left, right, strict=True):
        a, b = tied(step, a), tied(step, b)
        step.tie([a, b], range(len(a.shape)))
