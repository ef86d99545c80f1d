"""Which networks are affine in their input, or jointly in other given values.

The graph decides, equation by equation: a function is affine in some values if each of its
equations is linear in the operands that depend on them, or multiplies such an operand by one that
does not. If the answer is no, the equation to blame is named. A primitive that is not known here
counts as not affine, so a yes is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex

from vfjax._jaxpr import Graph, subjaxpr
from vfjax._jaxpr.primitives import CAST, TABLE, Linear

Flags = Sequence[bool]


class Culprit(NamedTuple):
    """The first equation that is not affine, or not known to be.

    Attributes:
        primitive: Name of its primitive.
        where: Source line, as `file:line`, or "unknown".
    """

    primitive: str
    where: str

    @property
    def why(self) -> str:
        """What follows for the network, as a clause for messages."""
        at = "" if self.where == "unknown" else f" at {self.where}"
        if self.primitive in TABLE and TABLE[self.primitive].linear is not Linear.UNKNOWN:
            return f"net is not affine in its input, because of `{self.primitive}`{at}"
        return f"cannot tell whether net is affine in its input: `{self.primitive}`{at} is unknown"


def culprit(graph: Graph, values: Collection[int]) -> Culprit | None:
    """The first equation that makes a graph not affine in some of its inputs, or None.

    Args:
        graph: The graph.
        values: Ids of these inputs, which vary together.
    """
    varying = set(values)
    for equation in graph.equations:
        flags = [isinstance(v, int) and v in varying for v in equation.inputs]
        if not any(flags):
            continue
        primitive = _blame(equation.eqn, flags)
        if primitive is not None:
            return Culprit(primitive, equation.where)
        varying.update(equation.results)
    return None


def _blame(eqn: Any, flags: Flags) -> str | None:
    """The primitive that makes an equation not affine in the flagged operands, or None."""
    name = eqn.primitive.name
    inner = subjaxpr(eqn)
    if inner is not None:
        return _blame_inside(inner[0], flags)
    rule = _RULES.get(TABLE[name].linear) if name in TABLE else None
    if rule is None or not rule(flags):
        return name
    # A cast to integers rounds, unless the operand holds integers already.
    dtypes = [v.aval.dtype for v in eqn.outvars]
    if name in CAST and not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        before = [v.aval.dtype for v in eqn.invars]
        return name if before != dtypes else None
    return None


def _blame_inside(jaxpr: Any, flags: Flags) -> str | None:
    varying = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    for eqn in jaxpr.eqns:
        inside = [not isinstance(v, jex.Literal) and v in varying for v in eqn.invars]
        if not any(inside):
            continue
        primitive = _blame(eqn, inside)
        if primitive is not None:
            return primitive
        varying.update(eqn.outvars)
    return None


# Whether a primitive is affine in the flagged operands, if the others are given.
_RULES: dict[Linear, Callable[[Flags], bool]] = {
    Linear.JOINTLY: lambda flags: True,
    Linear.EACH: lambda flags: sum(flags) == 1,
    Linear.FIRST: lambda flags: not any(flags[1:]),
    Linear.FIRST_TWO: lambda flags: not any(flags[2:]),
    Linear.BUT_FIRST: lambda flags: not any(flags[:1]),
    Linear.BUT_SECOND: lambda flags: not any(flags[1:2]),
}
