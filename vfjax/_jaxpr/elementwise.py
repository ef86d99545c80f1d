"""Which equations are elementwise, also where a custom derivative such as relu's hides it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from vfjax._jaxpr.calls import subjaxpr
from vfjax._jaxpr.graph import Equation
from vfjax._jaxpr.primitives import BROADCAST, ELEMENTWISE


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
        return False  # a constant array inside may vary from position to position
    for eqn in jaxpr.eqns:
        inner = subjaxpr(eqn)
        if inner is not None and _elementwise_jaxpr(*inner):
            continue
        scalar = eqn.primitive.name == BROADCAST and all(
            isinstance(v, jex.Literal) or not v.aval.shape for v in eqn.invars
        )
        if eqn.primitive.name not in ELEMENTWISE and not scalar:
            return False
    return True
