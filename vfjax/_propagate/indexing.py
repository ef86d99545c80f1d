"""Primitives that pick, place or reorder entries: what they touch is fixed, the other axes pass."""

from __future__ import annotations

from collections.abc import Iterable

from vfjax._graph import INPUT, PARAM
from vfjax._propagate.registry import Axes, Step, Use, opaque, rule


def touch(step: Step, dims: Iterable[int]) -> list[Axes]:
    """Fixes dimensions of the first operand; results keep its other axes."""
    axes, dims = step.inputs[0].axes, set(dims)
    step.fix(*(axes[k] for k in dims))
    return [
        [step.fixed(n) if k in dims else axes[k] for k, n in enumerate(shape)]
        for shape in step.shapes
    ]


@rule("iota")
def iota(step: Step) -> list[Axes]:
    """Counts along one dimension and is constant along the others."""
    counted = step.params["dimension"]
    (shape,) = step.shapes
    return [[step.fixed(n) if k == counted else step.free(n) for k, n in enumerate(shape)]]


@rule("rev")
def rev(step: Step) -> list[Axes]:
    """Reverses dimensions. A permutation of them would have to be reversed too."""
    return touch(step, step.params["dimensions"])


@rule("slice")
def slice_(step: Step) -> list[Axes]:
    """Touches the dimensions of which it leaves something out."""
    (shape,) = step.shapes
    return touch(step, [k for k, n in enumerate(step.inputs[0].shape) if shape[k] != n])


@rule("dynamic_slice")
def dynamic_slice(step: Step) -> list[Axes]:
    """As `slice`; where the whole dimension is taken, the start can only be 0."""
    sizes = step.params["slice_sizes"]
    return touch(step, [k for k, n in enumerate(step.inputs[0].shape) if sizes[k] != n])


@rule("dynamic_update_slice")
def dynamic_update_slice(step: Step) -> list[Axes]:
    """Touches the dimensions that the update does not fill, and ties the others."""
    operand, update = step.inputs[:2]
    touched = [k for k, n in enumerate(operand.shape) if update.shape[k] != n]
    step.fix(*(update.axes[k] for k in touched))
    step.tie([operand, update], [k for k in range(len(operand.shape)) if k not in touched])
    return touch(step, touched)


@rule("pad")
def pad(step: Step) -> list[Axes]:
    """Touches the dimensions that it pads, crops or dilates."""
    config = step.params["padding_config"]
    return touch(step, [k for k, edges in enumerate(config) if tuple(edges) != (0, 0, 0)])


@rule("concatenate")
def concatenate(step: Step) -> list[Axes]:
    """Touches the dimension that it joins along, and ties the others."""
    joined = step.params["dimension"]
    step.fix(*(value.axes[joined] for value in step.inputs))
    step.tie(step.inputs, [k for k in range(len(step.shapes[0])) if k != joined])
    return touch(step, [joined])


@rule("stack")
def stack(step: Step) -> list[Axes]:
    """Joins along a new dimension, and ties the others."""
    joined = step.params["axis"]
    step.tie(step.inputs, range(len(step.inputs[0].shape)))
    axes = list(step.inputs[0].axes)
    axes.insert(joined, step.fixed(len(step.inputs)))
    return [axes]


@rule("split")
def split(step: Step) -> list[Axes]:
    """Touches the dimension that it cuts."""
    return touch(step, [step.params["axis"]])


@rule("unstack")
def unstack(step: Step) -> list[Axes]:
    """Touches the dimension that it takes apart, which no result has."""
    axes, cut = step.inputs[0].axes, step.params["axis"]
    step.fix(axes[cut])
    kept = [axis for k, axis in enumerate(axes) if k != cut]
    return [kept for _ in step.shapes]


@rule("gather")
def gather(step: Step) -> list[Axes]:
    """Looks slices up (an embedding): indexed dimensions are fixed, whole ones pass.

    Dimensions of the result that are no offsets run over the indices, in order.
    """
    operand, indices = step.inputs
    (shape,) = step.shapes
    dims, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    batch, index_batch = dims.operand_batching_dims, dims.start_indices_batching_dims
    for k, j in zip(batch, index_batch, strict=True):
        step.unify(operand.axes[k], indices.axes[j])
    touched = {
        k
        for k, n in enumerate(operand.shape)
        if k not in batch and (sizes[k] != n or k in dims.start_index_map)
    }
    step.fix(*(operand.axes[k] for k in touched), indices.axes[-1])
    sliced = [k for k in range(len(sizes)) if k not in dims.collapsed_slice_dims and k not in batch]
    if len(sliced) != len(dims.offset_dims):
        return opaque(step)
    axes: Axes = [[] for _ in shape]
    for target, k in zip(dims.offset_dims, sliced, strict=True):
        axes[target] = step.fixed(shape[target]) if k in touched else operand.axes[k]
    rest = iter(indices.axes[:-1])
    for target in range(len(shape)):
        if target not in dims.offset_dims:
            axes[target] = next(rest)
    if operand.depends == PARAM and indices.depends & INPUT:
        # A table writes its rows into the network as a layer writes its outputs.
        kept = [operand.axes[k] for k in sliced if k not in touched]
        step.uses.append(Use(step.primitive, [], kept))
    return [axes]
