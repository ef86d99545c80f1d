"""Primitives that lay the same entries out differently, or repeat them."""

from __future__ import annotations

from vfjax._propagate.registry import Axes, Step, opaque, rule


@rule("reshape")
def reshape(step: Step) -> list[Axes]:
    """Regroups the atoms of the flattened array, splitting those that a boundary cuts."""
    if step.params.get("dimensions") is not None:
        return opaque(step)
    return [step.reshape(step.inputs[0].axes, step.shapes[0])]


@rule("squeeze", "expand_dims")
def squeeze(step: Step) -> list[Axes]:
    """Drops or adds dimensions of size 1."""
    return [step.reshape(step.inputs[0].axes, step.shapes[0])]


@rule("transpose")
def transpose(step: Step) -> list[Axes]:
    """Reorders the axes."""
    return [[step.inputs[0].axes[k] for k in step.params["permutation"]]]


@rule("broadcast_in_dim")
def broadcast_in_dim(step: Step) -> list[Axes]:
    """Places the operand's axes; along the new ones all entries are alike."""
    operand, (shape,) = step.inputs[0], step.shapes
    axes = [step.free(n) for n in shape]
    for source, target in enumerate(step.params["broadcast_dimensions"]):
        if operand.shape[source] == shape[target]:
            axes[target] = operand.axes[source]
    return [axes]


@rule("broadcast_to")
def broadcast_to(step: Step) -> list[Axes]:
    """Broadcasts as numpy does, aligned at the last dimension."""
    operand, (shape,) = step.inputs[0], step.shapes
    axes = [step.free(n) for n in shape]
    skip = len(shape) - len(operand.shape)
    for source, n in enumerate(operand.shape):
        if n == shape[skip + source]:
            axes[skip + source] = operand.axes[source]
    return [axes]


@rule("tile")
def tile(step: Step) -> list[Axes]:
    """Repeats each axis as a whole: a new outer factor along which all entries are alike."""
    operand = step.inputs[0]
    return [
        [
            step.free(count) + axis if count != 1 else axis
            for axis, count in zip(operand.axes, step.params["reps"], strict=True)
        ]
    ]
