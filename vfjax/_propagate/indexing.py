"""Rules of primitives that pick, place, join or reorder entries.

Consecutive entries are segments of an axis, which may be picked, joined and padded. Anything else
done to the entries of an axis fixes it; the other axes pass through.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from vfjax._jaxpr import INPUT, PARAM
from vfjax._jaxpr.primitives import OVERWRITES, SCATTERS
from vfjax._propagate.registry import Axes, Step, Value, opaque, rule
from vfjax._propagate.within import Use


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


@rule("slice", lazy=True)
def slice_(step: Step) -> list[Axes]:
    """Takes a segment of every dimension; with a stride, it touches the dimension."""
    value, (shape,) = step.inputs[0], step.shapes
    starts, stops = step.params["start_indices"], step.params["limit_indices"]
    strides = step.params["strides"] or (1,) * len(shape)
    axes = list(value.axes)
    for k, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if strides[k] != 1 and shape[k] != value.shape[k]:
            step.fix(axes[k])
            axes[k] = step.fixed(shape[k])
        else:
            axes = segment(step, axes, k, start, stop)
    return [axes]


def segment(step: Step, axes: Axes, dim: int, start: int, stop: int) -> Axes:
    """The axes of the part between two positions of a dimension."""
    n = step.algebra.length(axes[dim])
    if start == stop:
        return [*axes[:dim], step.free(0), *axes[dim + 1 :]]
    points = [point for point in (start, stop) if 0 < point < n]
    return step.cut(axes, dim, points)[1 if start else 0] if points else axes


@rule("dynamic_slice")
def dynamic_slice(step: Step) -> list[Axes]:
    """Like `slice`; if the whole dimension is taken, the start can only be 0."""
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
    """Adds segments of equal entries, or crops; dilated dimensions are touched."""
    axes, (shape,) = list(step.inputs[0].axes), step.shapes
    for k, (low, high, interior) in enumerate(step.params["padding_config"]):
        n = step.inputs[0].shape[k]
        if interior and n > 1:
            step.fix(axes[k])
            axes[k] = step.fixed(shape[k])
        elif low or high:
            axes = segment(step, axes, k, max(0, -low), n - max(0, -high))
            edges = [step.free(max(0, edge)) for edge in (low, high)]
            axes[k] = step.joined([edges[0], axes[k], edges[1]])
    return [axes]


@rule("concatenate")
def concatenate(step: Step) -> list[Axes]:
    """Makes the operands segments of one dimension, and ties the others."""
    joined = step.params["dimension"]
    step.tie(step.inputs, [k for k in range(len(step.shapes[0])) if k != joined])
    axes = list(step.inputs[0].axes)
    axes[joined] = step.joined([value.axes[joined] for value in step.inputs])
    return [axes]


@rule("stack")
def stack(step: Step) -> list[Axes]:
    """Joins along a new dimension, and ties the others."""
    joined = step.params["axis"]
    step.tie(step.inputs, range(len(step.inputs[0].shape)))
    axes = list(step.inputs[0].axes)
    axes.insert(joined, step.fixed(len(step.inputs)))
    return [axes]


@rule("split", lazy=True)
def split(step: Step) -> list[Axes]:
    """Splits a dimension into segments."""
    dim, sizes = step.params["axis"], step.params["sizes"]
    if not all(sizes):
        step.algebra.settle(step.inputs[0].axes)
        return touch(step, [dim])
    return step.cut(step.inputs[0].axes, dim, [int(end) for end in accumulate(sizes)][:-1])


@rule("unstack", lazy=True)
def unstack(step: Step) -> list[Axes]:
    """Splits a dimension into single entries, and drops it."""
    dim = step.params["axis"]
    pieces = step.cut(step.inputs[0].axes, dim, range(1, len(step.shapes)))
    return [[*axes[:dim], *axes[dim + 1 :]] for axes in pieces]


@rule("gather")
def gather(step: Step) -> list[Axes]:
    """Looks up slices (an embedding): indexed dimensions are fixed, whole ones pass through.

    Dimensions of the result other than the offset ones run over the indices, in order.
    """
    operand, indices = step.inputs
    (shape,) = step.shapes
    dims, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    batch, index_batch = dims.operand_batching_dims, dims.start_indices_batching_dims
    for k, j in zip(batch, index_batch, strict=True):
        step.unify(operand.axes[k], indices.axes[j])
    # A dimension that is taken whole starts at 0, even if it has an index (under vmap): any other
    # index is moved to 0, or the whole slice filled.
    touched = {k for k, n in enumerate(operand.shape) if k not in batch and sizes[k] != n}
    step.fix(*(operand.axes[k] for k in touched), indices.axes[-1])
    sliced = [k for k in range(len(sizes)) if k not in dims.collapsed_slice_dims and k not in batch]
    if len(sliced) != len(dims.offset_dims):
        return opaque(step)
    axes: Axes = [[] for _ in shape]
    for target, k in zip(dims.offset_dims, sliced, strict=True):
        axes[target] = step.fixed(shape[target]) if k in touched else operand.axes[k]
    for value, paired in ((operand, batch), (indices, index_batch)):
        step.record.keep(value.axes, paired)
        others = (k for k in range(len(value.shape)) if k not in paired)
        step.record.keep(value.axes, others, paired)
    rest = iter(indices.axes[:-1])
    for target in range(len(shape)):
        if target not in dims.offset_dims:
            axes[target] = next(rest)
    if operand.depends == PARAM and indices.depends & INPUT:
        # A table writes its rows into the network as a layer writes its outputs.
        kept = [operand.axes[k] for k in sliced if k not in touched]
        step.record.uses.append(Use(step.primitive, [], kept))
    return [axes]


@rule(*SCATTERS)
def scatter(step: Step) -> list[Axes]:
    """Writes slices: indexed dimensions are fixed, whole ones are tied to those of the updates.

    Dimensions of the updates other than those of their slices run over the indices, in order. This
    order does not matter, except where several slices may overwrite each other.
    """
    operand, indices, updates = step.inputs
    dims = step.params["dimension_numbers"]
    batch, index_batch = dims.operand_batching_dims, dims.scatter_indices_batching_dims
    left_out = {*dims.inserted_window_dims, *batch}
    sliced = [k for k in range(len(operand.shape)) if k not in left_out]
    window = dims.update_window_dims
    rows = [k for k in range(len(updates.shape)) if k not in window]
    for row, index in zip(rows, indices.axes[:-1], strict=True):
        step.unify(updates.axes[row], index)
    for k, j in zip(batch, index_batch, strict=True):
        step.unify(operand.axes[k], indices.axes[j])
    whole = {k: j for k, j in zip(sliced, window, strict=True) if _same(operand, k, updates, j)}
    for k, j in whole.items():
        step.unify(operand.axes[k], updates.axes[j])
    shared = [rows[j] for j in index_batch]
    step.fix(*(updates.axes[j] for j in window if j not in whole.values()), indices.axes[-1])
    if step.primitive in OVERWRITES and not step.params["unique_indices"]:
        step.fix(*(updates.axes[row] for row in rows if row not in shared))
    others = [j for j in range(len(indices.shape)) if j not in index_batch]
    for value, paired, kept in (
        (operand, batch, sliced),
        (indices, index_batch, others),
        (updates, shared, window),
    ):
        step.record.keep(value.axes, paired)
        step.record.keep(value.axes, kept, paired)
        rest = [k for k in range(len(value.shape)) if k not in {*paired, *kept}]
        step.record.keep(value.axes, rest, paired)
    return touch(step, [k for k in range(len(operand.shape)) if k not in {*whole, *batch}])


def _same(left: Value, i: int, right: Value, j: int) -> bool:
    return left.shape[i] == right.shape[j]
