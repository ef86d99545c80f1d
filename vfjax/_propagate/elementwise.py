"""Rules of elementwise primitives, which pair their operands entry by entry."""

from __future__ import annotations

from vfjax._jaxpr.primitives import CAST, ELEMENTWISE
from vfjax._propagate.registry import Axes, Step, opaque, rule


@rule(*(ELEMENTWISE - CAST), lazy=True)
def tied(step: Step) -> list[Axes]:
    """Ties the operands along every dimension in which they are not broadcast.

    A dimension of size 1 may meet a longer one inside the primitive (jax 0.12), which ties nothing;
    a scalar operand (of `clamp`, `select_n` or a literal) ties nothing either.
    """
    (shape,) = step.shapes
    full = [value for value in step.inputs if value.shape]
    if any(len(value.shape) != len(shape) for value in full):
        return opaque(step)
    axes = []
    for k, n in enumerate(shape):
        parts = [value.axes[k] for value in full if value.shape[k] == n]
        for part in parts[1:]:
            step.unify(parts[0], part)
        axes.append(parts[0] if parts else step.free(n))
    return [axes]


@rule(*CAST, lazy=True)
def cast(step: Step) -> list[Axes]:
    """Passes every operand through: a change of precision or place moves no entry."""
    return [value.axes for value in step.inputs]


@rule("bitcast_convert_type")
def bitcast(step: Step) -> list[Axes]:
    """Elementwise between types of equal width; else the last dimension appears or disappears."""
    (value,), (shape,) = step.inputs, step.shapes
    if value.shape == shape:
        return [value.axes]
    kept = min(len(shape), len(value.shape))
    if value.shape[:kept] != shape[:kept]:
        return opaque(step)
    step.fix(*value.axes[kept:])
    return [value.axes[:kept] + [step.fixed(n) for n in shape[kept:]]]


@rule("debug_callback", "debug_print")
def debug(step: Step) -> list[Axes]:
    """Prints, and so changes no output of the network."""
    return [[step.fixed(n) for n in shape] for shape in step.shapes]
