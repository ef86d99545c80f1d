"""Signs of a trace in training mode: random numbers, or moments of the batch, in activations.

Both make a network's output depend on more than its parameters and the example: moments, matches
and repairs then differ with every key or batch.
"""

from __future__ import annotations

import warnings

from vfjax._analysis.batch_axis import Mixed, axis_after
from vfjax._analysis.views import varying_axes
from vfjax._jaxpr import INPUT, Equation, Graph
from vfjax._jaxpr.primitives import ELEMENTWISE, PRODUCTS, RANDOM, ROOTS, SPREAD, TOTALS


def report_training(graph: Graph) -> None:
    """Warns if a graph shows signs of training mode.

    Args:
        graph: The graph.
    """
    signs = (
        ("random numbers meet activations, as in dropout, at", random_values(graph)),
        ("activations are divided by a deviation over the batch at", batch_statistics(graph)),
    )
    seen = [f"{what} {where}" for what, where in signs if where]
    if seen:
        warnings.warn(
            f"apply_fn looks like a network in training mode: {' and '.join(seen)}. Moments, "
            "matches and repairs then change with every key or batch. Trace it in evaluation mode: "
            "train=False, deterministic=True, use_running_average=True, is_training=False, "
            "model.eval() or eqx.nn.inference_mode(model).",
            stacklevel=4,
        )


def random_values(graph: Graph) -> str | None:
    """Where random numbers meet a value that depends on the input, as `file:line`, or None.

    They must be a mask (booleans), or differ between examples: random weights, or the phases of
    random features, are the same for all and do not count.
    """
    if not any(e.primitive in RANDOM for e in graph.equations):
        return None
    drawn: dict[int, bool] = {}  # whether a value made of random numbers only is a mask
    of_input = set(graph.inputs[graph.num_leaves :])
    for equation in graph.equations:
        if equation.primitive in RANDOM:
            drawn.update(dict.fromkeys(equation.results, False))
            continue
        random = [v for v in equation.values if v in drawn]
        if of_input.isdisjoint(equation.values):
            if random:
                for value in equation.results:
                    is_mask = graph.avals[value].dtype == bool
                    drawn[value] = is_mask or any(drawn[v] for v in random)
            continue
        of_input.update(equation.results)
        if equation.primitive in ELEMENTWISE:
            if any(drawn[v] or 0 in varying_axes(graph, v) for v in random):
                return equation.where
    return None


def batch_statistics(graph: Graph) -> str | None:
    """Where an activation is scaled by a root of a sum over the batch, as `file:line`, or None.

    Centring on the mean of the batch alone does not count, nor does a softmax over the batch.
    """
    axes = dict.fromkeys(graph.inputs[graph.num_leaves :], 0)
    sizes = {graph.avals[v].shape[0] for v in axes if graph.avals[v].shape}
    sums = (e for e in graph.equations if e.primitive in TOTALS and e.depends & INPUT)
    if not any(sizes & _lengths(graph, equation) for equation in sums):
        return None  # the usual case, which takes no time
    over_batch: dict[int, bool] = {}  # whether a value made of sums over the batch is under a root
    for equation in graph.equations:
        if not equation.depends & INPUT:
            continue
        moments = [v for v in equation.values if v in over_batch]
        rest = [v for v in equation.values if graph.depends[v] & INPUT and v not in over_batch]
        rooted = any(over_batch[v] for v in moments)
        if moments and not rest and equation.primitive in ELEMENTWISE | SPREAD:
            rooted = rooted or equation.primitive in ROOTS
            over_batch.update(dict.fromkeys(equation.results, rooted))
            continue
        if rooted and equation.primitive in PRODUCTS and any(v in axes for v in rest):
            return equation.where
        try:
            axis = axis_after(graph, equation, axes)
        except Mixed:
            if equation.primitive in TOTALS and equation.values[0] in axes:
                over_batch.update(dict.fromkeys(equation.results, False))
            continue
        axes.update(dict.fromkeys(equation.results, axis))
    return None


def _lengths(graph: Graph, equation: Equation) -> set[int]:
    """Lengths of the axes that an equation sums over; those of a mesh have names."""
    shape = graph.avals[equation.values[0]].shape
    return {shape[a] for a in equation.params["axes"] if isinstance(a, int)}
