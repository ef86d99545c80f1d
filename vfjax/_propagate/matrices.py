"""Rules of primitives that factorise or invert matrices: batches of them pass, matrices are fixed.

`solve(P A P^T, P b)` is `P solve(A, b)`, but the factors that it is computed from are not so.
"""

from __future__ import annotations

from vfjax._jaxpr import open_jaxpr
from vfjax._jaxpr.primitives import FACTORISATIONS, VECTORS
from vfjax._propagate.calls import follow
from vfjax._propagate.registry import Axes, Step, rule


@rule(*FACTORISATIONS)
def factorisation(step: Step) -> list[Axes]:
    """Passes leading dimensions and fixes those of the matrices."""
    first = step.inputs[0]
    batch = len(first.shape) - (1 if step.primitive in VECTORS else 2)
    step.tie(step.inputs, range(batch))
    for value in step.inputs:
        step.fix(*value.axes[batch:])
    return [[*first.axes[:batch], *map(step.fixed, shape[batch:])] for shape in step.shapes]


@rule("triangular_solve")
def triangular_solve(step: Step) -> list[Axes]:
    """Solves for each right-hand side by itself; along the others, entries depend on the order."""
    matrix, right = step.inputs
    batch = len(matrix.shape) - 2
    solved = batch if step.params["left_side"] else batch + 1
    step.tie(step.inputs, range(batch))
    step.fix(*matrix.axes[batch:], right.axes[solved])
    return [right.axes]


@rule("custom_linear_solve")
def custom_linear_solve(step: Step) -> list[Axes]:
    """Evaluates the function that solves; what else it holds is for derivatives."""
    lengths, jaxprs = step.params["const_lengths"], step.params["jaxprs"]
    start = lengths.matvec + lengths.vecmat
    right = step.inputs[sum(lengths) :]
    inputs = [*step.inputs[start : start + lengths.solve], *right]
    return [value.axes for value in follow(step, *open_jaxpr(jaxprs.solve), inputs)]
