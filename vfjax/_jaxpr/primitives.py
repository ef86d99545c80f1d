"""The one table of what each primitive is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from vfjax._jaxpr.calls import subjaxpr
from vfjax._jaxpr.graph import Equation

CAST = frozenset(
    """convert_element_type copy copy_p name optimization_barrier pvary reduce_precision reshard
    sharding_constraint stop_gradient""".split()
)
"""Primitives that hand a value on, at another precision, place or name at most."""


LAYOUT = frozenset({"reshape", "transpose", "squeeze", "expand_dims"})

SPREAD = CAST | LAYOUT | {"broadcast_in_dim"}
"""Primitives that only lay values out."""


REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax"}
)

ELEMENTWISE = CAST | frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma
    log log1p logistic lt max min mul ne neg nextafter not or pow real rem round rsqrt select_n sign
    sin sinh sqrt square sub tan tanh xor""".split()
)
"""Primitives that map each position of their operands to the same position of the result."""


def is_elementwise(equation: Equation) -> bool:
    """Whether an equation is elementwise, looking into custom derivatives such as relu's."""
    if equation.primitive in ELEMENTWISE:
        return True
    inner = subjaxpr(equation.eqn)
    return inner is not None and _elementwise_jaxpr(*inner)


def _elementwise_jaxpr(jaxpr: Any, consts: Sequence[Any]) -> bool:
    literals = [v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, jex.Literal)]
    shapes = [v.aval.shape for v in jaxpr.constvars] + [np.shape(v.val) for v in literals]
    if any(shapes) or any(map(np.ndim, consts)):
        return False  # an array that is no operand: nobody could tell where it varies
    for eqn in jaxpr.eqns:
        inner = subjaxpr(eqn)
        if inner is not None and _elementwise_jaxpr(*inner):
            continue
        scalar = eqn.primitive.name == "broadcast_in_dim" and all(
            isinstance(v, jex.Literal) or not v.aval.shape for v in eqn.invars
        )
        if eqn.primitive.name not in ELEMENTWISE and not scalar:
            return False
    return True
