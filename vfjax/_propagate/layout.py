"""Rules of primitives that rearrange or repeat entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vfjax._jaxpr.primitives import LAYOUT, RESHAPE, TRANSPOSE
from vfjax._propagate.registry import Axes, Step, Value, opaque, rule


@rule(*(LAYOUT - {TRANSPOSE}), lazy=True)
def reshape(step: Step) -> list[Axes]:
    """Regroups dimensions: joins them, or folds one into several."""
    value, (shape,) = step.inputs[0], step.shapes
    if step.params.get("dimensions") is not None and step.primitive == RESHAPE:
        return opaque(step)
    if not math.prod(shape):
        return [[step.free(n) for n in shape]]
    axes: Axes = [[] for _ in shape]  # dimensions that stay empty have size 1
    for before, after in blocks(value.shape, shape):
        operands, sizes = [value.axes[k] for k in before], [shape[k] for k in after]
        if len(before) == 1:
            regrouped = step.algebra.fold(operands[0], sizes, step.cause)
        elif len(after) == 1:
            regrouped = [[atom for axis in operands for atom in axis]]
        else:
            regrouped = step.reshape(operands, sizes)
        for k, axis in zip(after, regrouped, strict=True):
            axes[k] = axis
    return [axes]


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions, none of size 1, that a reshape turns into one another."""
    left, right = ([k for k, n in enumerate(shape) if n != 1] for shape in (before, after))
    blocks = []
    while left:
        old, new = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(before[k] for k in old)) != (n := math.prod(after[k] for k in new)):
            old.append(left.pop(0)) if m < n else new.append(right.pop(0))
        blocks.append((old, new))
    return blocks


@rule(TRANSPOSE, lazy=True)
def transpose(step: Step) -> list[Axes]:
    """Reorders the axes."""
    return [[step.inputs[0].axes[k] for k in step.params["permutation"]]]


@rule("broadcast_in_dim", lazy=True)
def broadcast_in_dim(step: Step) -> list[Value]:
    """Places the operand's axes; along the new ones all entries are equal."""
    return [_broadcast(step, step.params["broadcast_dimensions"])]


@rule("broadcast_to")
def broadcast_to(step: Step) -> list[Value]:
    """Broadcasts as numpy does, aligned at the last dimension."""
    rank = len(step.shapes[0])
    return [_broadcast(step, range(rank - len(step.inputs[0].shape), rank))]


def _broadcast(step: Step, targets: Sequence[int]) -> Value:
    operand, (shape,) = step.inputs[0], step.shapes
    placed = {
        target: operand.axes[source]
        for source, target in enumerate(targets)
        if operand.shape[source] == shape[target]
    }
    axes = [placed.get(k) or step.free(n) for k, n in enumerate(shape)]
    flat = tuple(k for k, n in enumerate(shape) if k not in placed and n > 1)
    return Value(axes, shape, operand.depends, flat=flat)


@rule("tile")
def tile(step: Step) -> list[Axes]:
    """Repeats each axis as a whole: adds an outer factor along which all entries are equal."""
    operand = step.inputs[0]
    return [
        [
            step.free(count) + axis if count != 1 else axis
            for axis, count in zip(operand.axes, step.params["reps"], strict=True)
        ]
    ]
