"""Rules of contractions and convolutions, which tie groups and decide their roles."""

from __future__ import annotations

from vfjax._jaxpr import contraction
from vfjax._jaxpr.primitives import DOT, RAGGED_DOT
from vfjax._propagate.registry import Axes, Step, opaque, rule


@rule(DOT, RAGGED_DOT)
def product(step: Step) -> list[Axes]:
    """Ties contracted and batch dimensions pairwise and keeps the others.

    This also holds if both operands depend on x (attention scores): the dimension that queries and
    keys share is contracted, so it is tied, and permuting both changes nothing.

    If each run of rows meets the kernel of its expert, the order of rows and experts is fixed.
    """
    dims = contraction(step.primitive, step.params)
    assert dims is not None
    left, right, *sizes = step.inputs
    if step.primitive == RAGGED_DOT:
        if not dims.experts:
            return opaque(step)  # a derivative: what is ragged is contracted, or a batch
        (ragged,) = step.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
        step.fix(left.axes[ragged], *(right.axes[k] for k in dims.experts))
        step.fix(*(axis for value in sizes for axis in value.axes))
    for pairs in (dims.contract, dims.batch):
        for i, j in zip(*pairs, strict=True):
            step.unify(left.axes[i], right.axes[j])
    sides = []
    for k, value in enumerate((left, right)):
        kept = dims.kept(k, len(value.shape))
        sides.append([value.axes[dim] for dim in kept])
        step.record.keep(value.axes, set(range(len(value.shape))) - set(kept))
        step.record.keep(value.axes, kept, dims.batch[k])
    for k, (kernel, other) in enumerate(((left, right), (right, left))):
        if dims.contract[k]:  # else it scales
            step.layer(kernel, other, [kernel.axes[d] for d in dims.contract[k]], sides[k])
    return [[left.axes[i] for i in dims.batch[0]] + sides[0] + sides[1]]


@rule("conv_general_dilated")
def conv_general_dilated(step: Step) -> list[Axes]:
    """Ties input channels, keeps output channels and examples, fixes positions.

    With feature groups, input channels are `(group, in)`, output channels `(group, out)` and the
    kernel `(in, group * out)`: groups can be permuted, and channels in the same way within every
    group. A depthwise convolution has `in` 1.
    """
    dims = step.params["dimension_numbers"]
    groups = step.params["feature_group_count"]
    left, right = step.inputs
    if step.params["batch_group_count"] != 1:
        return opaque(step)
    examples, channels = left.axes[dims.lhs_spec[0]], left.axes[dims.lhs_spec[1]]
    outgoing, incoming = (right.axes[k] for k in dims.rhs_spec[:2])
    step.fix(*(left.axes[k] for k in dims.lhs_spec[2:]))
    step.fix(*(right.axes[k] for k in dims.rhs_spec[2:]))
    for dim in dims.lhs_spec[:2]:
        step.record.keep(left.axes, [dim])
    step.record.keep(right.axes, dims.rhs_spec[:1])
    step.record.keep(right.axes, dims.rhs_spec[1:2], dims.rhs_spec[:1])
    kept = [outgoing]
    if groups > 1:
        shared = step.free(groups)
        step.unify(channels, shared + incoming)
        within = step.free(right.shape[dims.rhs_spec[0]] // groups)
        step.unify(outgoing, shared + within)
        # The kernel's own atoms, since only these can be traced back to its leaf. Groups may be in
        # segments.
        count = len(step.algebra.expand(within))
        segments = step.algebra.segments(outgoing)
        kept = [segment[max(0, len(segment) - count) :] for segment in segments]
    else:
        step.unify(channels, incoming)
    step.layer(right, left, [incoming], kept)
    axes = [step.fixed(n) for n in step.shapes[0]]
    axes[dims.out_spec[0]] = examples
    axes[dims.out_spec[1]] = outgoing
    return [axes]
