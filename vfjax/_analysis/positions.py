"""Which positions of the input each position of a value stands for.

A mask says which positions of the input count: tokens that are no padding, pixels that are not
ignored. Its axes are followed through the graph, equation by equation, as the batch axis is in
`batch_axis`: through transposes and reshapes, past heads and windows, into smaller maps and pools.

A position of a value stands for the positions of the input that it continues, not for all that it
has seen: a convolution and attention keep positions, however far they look. A pool, a strided layer
and a reduction make one position of several, which stands for all of them. Where this is not
certain, as behind a primitive that is not known here, the answer is `Lost`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

from vfjax._jaxpr import Graph, subjaxpr
from vfjax._jaxpr.primitives import (
    BROADCAST,
    CONCATENATE,
    CONV,
    CUMULATIVE,
    DOT,
    ELEMENTWISE,
    GATHER,
    PAD,
    REDUCTIONS,
    RESHAPE,
    REV,
    SLICE,
    SORT,
    SPLIT,
    SQUEEZE,
    STACK,
    TRANSPOSE,
    UNSTACK,
    WINDOWS,
)

Shape = tuple[int, ...]


class Where(NamedTuple):
    """What the positions of a value stand for.

    Attributes:
        axis: The axis of the examples.
        inner: How many entries of that axis each example has, as after `x.reshape(-1, features)`.
        factors: Arrays of positions of the input, counted row by row: `[*value, several]`, where an
            axis has size 1 if nothing varies along it, that of the examples has `inner` or 1, and
            -1 is no position. A position counts if one of the several does, in every factor: those
            of attention scores are the position that asks and the one that answers.
    """

    axis: int
    inner: int
    factors: tuple[np.ndarray, ...]


class Lost(NamedTuple):
    """Why it is not known what the positions of a value stand for.

    Attributes:
        why: A clause for messages.
        mixed: Whether one position stands for several that differ, so that no mask fits it.
    """

    why: str
    mixed: bool = False


State = Where | Lost | None
"""None: the value has no examples, as parameters and statistics of the batch."""


class _Unknown(Exception):
    """A primitive does what this module does not follow."""


class _Mixed(Exception):
    """Positions or examples that differ meet in one."""


def follow_positions(
    graph: Graph, inputs: Mapping[int, np.ndarray], count: int, wanted: Iterable[int]
) -> dict[int, State]:
    """Follows the positions of a network's input.

    Args:
        graph: The graph.
        inputs: For each array of the input, the positions along it: a factor of `Where`. Those that
            are missing stand for all positions of an example.
        count: The number of positions of an example.
        wanted: Ids of the values that are asked for.

    Returns:
        The answer for each of them.
    """
    everything = np.arange(count)
    states: dict[int, State] = {}
    for value in graph.inputs[graph.num_leaves :]:
        ndim = len(graph.avals[value].shape)
        default = everything.reshape((1,) * ndim + (-1,))
        states[value] = Where(0, 1, (inputs.get(value, default),)) if ndim else None
    wanted = tuple(wanted)
    for index in graph.needed(wanted, states):
        equation = graph.equations[index]
        given = [states.get(v) if isinstance(v, int) else None for v in equation.inputs]
        results = _step(equation.eqn, given, everything)
        for value, state in zip(equation.outputs, results, strict=True):
            if value is not None:
                states[value] = state
    return {value: states.get(value) for value in wanted}


def _step(eqn: Any, given: Sequence[State], everything: np.ndarray) -> list[State]:
    """The states of an equation's results."""
    known = [state for state in given if state is not None]
    lost = next((state for state in known if isinstance(state, Lost)), None)
    if lost is not None or not known:
        return [lost] * len(eqn.outvars)
    name = eqn.primitive.name
    inner = subjaxpr(eqn)
    if inner is not None:
        return _inside(inner[0], given, everything)
    try:
        if name in ELEMENTWISE:
            return [_merged(known, everything)] * len(eqn.outvars)
        rule = _RULES.get(name)
        if rule is None:
            raise _Unknown
        results = rule(eqn, given, everything)
    except _Unknown:
        return [Lost(f"the primitive '{name}' does not say which positions it returns")] * len(
            eqn.outvars
        )
    except _Mixed as error:
        return [Lost(str(error), mixed=True)] * len(eqn.outvars)
    return results if isinstance(results, list) else [results] * len(eqn.outvars)


def _inside(jaxpr: Any, given: Sequence[State], everything: np.ndarray) -> list[State]:
    """The states of the results of a call."""
    states = dict(zip(jaxpr.invars, given, strict=True))

    def state(v: Any) -> State:
        return None if isinstance(v, jex.Literal) else states.get(v)

    for eqn in jaxpr.eqns:
        results = _step(eqn, [state(v) for v in eqn.invars], everything)
        states.update(zip(eqn.outvars, results, strict=True))
    return [state(v) for v in jaxpr.outvars]


# ------------------------------------------------------------------------------- parts of the rules


def _merged(states: Iterable[State], everything: np.ndarray) -> State:
    """Of values that meet position by position."""
    known = [state for state in states if isinstance(state, Where)]
    if not known:
        return None
    places = {(state.axis, state.inner) for state in known}
    if len(places) > 1:
        raise _Mixed("examples that lie along different axes meet in it")
    distinct: dict[Any, np.ndarray] = {}
    for factor in (factor for state in known for factor in state.factors):
        distinct.setdefault((factor.shape, factor.tobytes()), factor)
    factors = list(distinct.values())
    varying = [f for f in factors if f.size > f.shape[-1]]
    # What is the same for every position, as a pool that is added to all, does not decide
    # which of them count; nor do all positions beside a chosen one.
    kept = varying or [f for f in factors if not _whole(f, everything)] or factors[:1]
    along: dict[tuple[bool, ...], np.ndarray] = {}
    for f in kept:
        # The fewest positions, where some are among others: a mask that is read at every second
        # position, beside the map of a strided layer.
        other = along.setdefault(tuple(n > 1 for n in f.shape[:-1]), f)
        if not _among(other, f):
            if not _among(f, other):
                raise _Mixed("each of its positions mixes positions of the input that differ")
            along[tuple(n > 1 for n in f.shape[:-1])] = f
    return Where(*places.pop(), tuple(along.values()))


def _among(some: np.ndarray, others: np.ndarray) -> bool:
    """Whether the positions of a factor are everywhere among those of another."""
    found = (some[..., :, None] == others[..., None, :]).any(-1)
    return some.shape[:-1] == others.shape[:-1] and bool((found | (some < 0)).all())


def _whole(factor: np.ndarray, everything: np.ndarray) -> bool:
    return factor.size == everything.size and np.array_equal(np.sort(factor.ravel()), everything)


def _reduced(state: Where, axes: Sequence[int], *, keep: bool = False) -> State:
    """After reducing axes; None if the examples are among them."""
    if state.axis in axes:
        return None
    factors = []
    for f in state.factors:
        rest = [a for a in range(f.ndim - 1) if a not in axes]
        f = f.transpose(*rest, *axes, f.ndim - 1)
        f = f.reshape(*f.shape[: len(rest)], -1)
        factors.append(np.expand_dims(f, tuple(axes)) if keep else f)
    axis = state.axis if keep else state.axis - sum(a < state.axis for a in axes)
    return Where(axis, state.inner, _tidy(factors))


def _tidy(factors: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Factors of one value without repetition, and without those that do not vary beside others."""
    distinct = {(f.shape, f.tobytes()): f for f in factors}
    varying = [f for f in distinct.values() if f.size > f.shape[-1]]
    return tuple(varying or list(distinct.values())[:1])


def _placed(state: Where, places: Sequence[int], ndim: int) -> Where:
    """After moving each axis to its place among `ndim` axes, others new."""
    factors = []
    for f in state.factors:
        order = np.argsort(places)
        new = tuple(a for a in range(ndim) if a not in places)
        factors.append(np.expand_dims(f.transpose(*order, f.ndim - 1), new))
    return Where(places[state.axis], state.inner, tuple(factors))


def _picked(state: Where, axis: int, picks: np.ndarray) -> Where:
    """After picking entries along an axis: `[entries, several]`, -1 for none."""
    if axis == state.axis:
        raise _Unknown
    factors = []
    for f in state.factors:
        if f.shape[axis] > 1:
            moved = np.moveaxis(f, axis, 0)
            found = np.where(
                (picks >= 0).reshape(*picks.shape, *(1,) * (f.ndim - 1)), moved[picks], -1
            )
            found = np.moveaxis(np.moveaxis(found, 1, -2), 0, axis)
            f = found.reshape(*found.shape[:-2], -1)
        factors.append(f)
    return Where(state.axis, state.inner, _tidy(factors))


def _shape(state: Where, shape: Shape) -> Shape:
    """The shape of a value with `inner` in place of the axis of the examples."""
    return (*shape[: state.axis], state.inner, *shape[state.axis + 1 :])


def _windowed(state: Where, axis: int, sizes: tuple[int, int], window: _Window) -> Where:
    """After windows move along an axis."""
    before, after = sizes
    size, stride, low, base = window
    if axis == state.axis:
        if (size, stride, base, before) != (1, 1, 1, after):
            raise _Mixed("examples meet in it")
        return state
    if (size, stride, base) == (1, 1, 1) and before == after:
        return state
    # Entries that were added as padding are no positions.
    real = np.arange(before)
    for f in state.factors:
        if f.shape[axis] > 1:
            some = np.moveaxis(f, axis, 0).reshape(before, -1)
            real = np.flatnonzero((some >= 0).any(1))
    if base > 1:
        if stride != 1 or after != before * base:
            raise _Unknown
        return _picked(state, axis, np.arange(after)[:, None] // base)
    if after == -(-len(real) // stride) or after == len(real) // stride:
        at = np.arange(after)[:, None] * stride + np.arange(stride)
        inside = at < len(real)
        picks = np.where(inside, real[np.where(inside, at, 0)], -1)
    else:  # the middle of each window
        start = np.arange(after)[:, None] * stride - low + max(size - stride, 0) // 2
        at = start + np.arange(stride)
        picks = np.where((at >= 0) & (at < before), at, -1)
    return _picked(state, axis, picks)


_Window = tuple[int, int, int, int]
"""Size with its gaps, stride, padding before the first entry, dilation of the operand."""


# ---------------------------------------------------------------------------------------- the rules

Rule = Callable[[Any, Sequence[State], np.ndarray], Any]
"""`(eqn, states of the operands, all positions) -> state of the results`, or a list of states."""


def _one(given: Sequence[State]) -> Where:
    """The first operand's, if it is the only one that has examples."""
    if not isinstance(given[0], Where) or any(state is not None for state in given[1:]):
        raise _Unknown
    return given[0]


def _broadcast(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    places = eqn.params["broadcast_dimensions"]
    return _placed(_one(given), places, len(eqn.outvars[0].aval.shape))


def _transpose(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state = _one(given)
    return _placed(state, np.argsort(eqn.params["permutation"]).tolist(), len(_before(eqn)))


def _reshape(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state = _one(given)
    before, after = _before(eqn), eqn.outvars[0].aval.shape
    ahead, size = math.prod(before[: state.axis]), before[state.axis] // max(state.inner, 1)
    fits = (
        a
        for a, n in enumerate(after)
        if math.prod(after[:a]) == ahead and size and n % size == 0 and (n or size == 0)
    )
    axis = next(fits, None)
    if axis is None:
        raise _Unknown
    inner = after[axis] // size
    old, new = _shape(state, before), (*after[:axis], inner, *after[axis + 1 :])
    return Where(axis, inner, _tidy(_reshaped(f, old, new) for f in state.factors))


def _reshaped(factor: np.ndarray, old: Shape, new: Shape) -> np.ndarray:
    """A factor of a value that is reshaped."""
    several = factor.shape[-1]
    if factor.size == several:
        return factor.reshape((1,) * len(new) + (several,))
    whole = np.broadcast_to(factor, (*old, several)).reshape(*new, several)
    for axis in range(len(new)):
        first = np.take(whole, [0], axis)
        whole = first if (whole == first).all() else whole
    return whole


def _squeeze(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state, axes = _one(given), eqn.params["dimensions"]
    return _reshape(eqn, given, everything) if state.axis in axes else _reduced(state, axes)


def _reduction(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    return _reduced(_one(given), tuple(eqn.params["axes"]))


def _same(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    return _one(given)


def _sort(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state, axis = _merged(given, everything), eqn.params["dimension"]
    assert isinstance(state, Where)
    return _reduced(state, (axis,), keep=True)


def _slice(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state, params = _one(given), eqn.params
    strides = params["strides"] or (1,) * len(_before(eqn))
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, stop, step) in enumerate(ends):
        if stop - start < _before(eqn)[axis] or step != 1:
            state = _picked(state, axis, np.arange(start, stop, step)[:, None])
    return state


def _rev(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state = _one(given)
    for axis in eqn.params["dimensions"]:
        state = _picked(state, axis, np.arange(_before(eqn)[axis])[::-1, None])
    return state


def _split(eqn: Any, given: Sequence[State], everything: np.ndarray) -> list[State]:
    state, axis, start = _one(given), eqn.params["axis"], 0
    parts: list[State] = []
    for size in map(int, eqn.params["sizes"]):
        parts.append(_picked(state, axis, np.arange(start, start + size)[:, None]))
        start += size
    return parts


def _unstack(eqn: Any, given: Sequence[State], everything: np.ndarray) -> list[State]:
    state, axis = _one(given), eqn.params["axis"]
    parts = (_picked(state, axis, np.array([[k]])) for k in range(len(eqn.outvars)))
    return [_reduced(part, (axis,)) for part in parts]


def _pad(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state = _one(given)
    for axis, (low, high, gap) in enumerate(eqn.params["padding_config"]):
        if (low, high, gap) != (0, 0, 0):
            size = _before(eqn)[axis]
            line = np.full(max((size - 1) * (gap + 1) + 1, 0), -1)
            line[:: gap + 1] = np.arange(size)
            line = np.pad(line, (max(low, 0), max(high, 0)), constant_values=-1)
            line = line[max(-low, 0) : len(line) - max(-high, 0)]
            state = _picked(state, axis, line[:, None])
    return state


def _concatenate(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    return _joined(given, eqn.params["dimension"], [v.aval.shape for v in eqn.invars], everything)


def _stack(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    axis, ndim = eqn.params["axis"], len(_before(eqn)) + 1
    places = [a + (a >= axis) for a in range(ndim - 1)]
    spread = [None if state is None else _placed(state, places, ndim) for state in given]  # type: ignore[arg-type]
    shapes = [(*v.aval.shape[:axis], 1, *v.aval.shape[axis:]) for v in eqn.invars]
    return _joined(spread, axis, shapes, everything)


def _joined(
    given: Sequence[State], axis: int, shapes: Sequence[Shape], everything: np.ndarray
) -> State:
    """Of values that are concatenated; what has no examples belongs to all their positions."""
    known = [state for state in given if isinstance(state, Where)]
    places = {(state.axis, state.inner) for state in known}
    if len(places) > 1 or axis == known[0].axis:
        raise _Mixed("examples meet in it")
    if any(len(state.factors) > 1 for state in known):
        raise _Unknown
    ndim = len(shapes[0])
    default = everything.reshape((1,) * ndim + (-1,))
    parts = [s.factors[0] if isinstance(s, Where) else default for s in given]
    if all(np.array_equal(part, parts[0]) for part in parts) and parts[0].shape[axis] == 1:
        return known[0]
    several = max(part.shape[-1] for part in parts)
    rest = np.broadcast_shapes(*(_without(part.shape[:-1], axis) for part in parts))
    lines = []
    for part, shape in zip(parts, shapes, strict=True):
        part = np.pad(part, [(0, 0)] * ndim + [(0, several - part.shape[-1])], constant_values=-1)
        whole = (*rest[:axis], shape[axis], *rest[axis:], several)
        lines.append(np.broadcast_to(part, whole))
    return Where(*places.pop(), (np.concatenate(lines, axis),))


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def _dot(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    contract, batch = eqn.params["dimension_numbers"]
    shared, states, offset = len(batch[0]), [], len(batch[0])
    ndim = len(eqn.outvars[0].aval.shape)
    for side, state in enumerate(given):
        rank = len(eqn.invars[side].aval.shape)
        kept = [a for a in range(rank) if a not in contract[side]]
        free = [a for a in kept if a not in batch[side]]
        if isinstance(state, Where):
            if state.axis in contract[side]:
                raise _Mixed("examples meet in it")
            places = [
                batch[side].index(a) if a in batch[side] else offset + free.index(a) for a in kept
            ]
            reduced = _reduced(state, tuple(contract[side]))
            assert isinstance(reduced, Where)
            states.append(_placed(reduced, places, ndim))
        offset += len(free)
    assert shared <= ndim
    return _merged(states, everything)


def _convolution(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state, params = _one(given), eqn.params
    numbers, kernel = params["dimension_numbers"], eqn.invars[1].aval.shape
    if params["batch_group_count"] != 1 or state.axis != numbers.lhs_spec[0]:
        raise _Unknown
    before, after = _before(eqn), eqn.outvars[0].aval.shape
    reduced = _reduced(state, (numbers.lhs_spec[1],), keep=True)
    assert isinstance(reduced, Where)
    state = reduced
    for k, axis in enumerate(numbers.lhs_spec[2:]):
        size = (kernel[numbers.rhs_spec[2 + k]] - 1) * params["rhs_dilation"][k] + 1
        window = size, params["window_strides"][k], params["padding"][k][0]
        sizes = before[axis], after[numbers.out_spec[2 + k]]
        state = _windowed(state, axis, sizes, (*window, params["lhs_dilation"][k]))
    places = [numbers.out_spec[numbers.lhs_spec.index(a)] for a in range(len(before))]
    return _placed(state, places, len(after))


def _pool(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    state, params = _one(given), eqn.params
    before, after = _before(eqn), eqn.outvars[0].aval.shape
    for axis, sizes in enumerate(zip(before, after, strict=True)):
        size = (params["window_dimensions"][axis] - 1) * params["window_dilation"][axis] + 1
        window = size, params["window_strides"][axis], params["padding"][axis][0]
        state = _windowed(state, axis, sizes, (*window, params["base_dilation"][axis]))
    return state


def _gather(eqn: Any, given: Sequence[State], everything: np.ndarray) -> State:
    """A lookup: each index picks a slice of a table."""
    table, indices = given
    if table is not None or not isinstance(indices, Where):
        raise _Unknown
    numbers, ndim = eqn.params["dimension_numbers"], len(eqn.outvars[0].aval.shape)
    last = len(eqn.invars[1].aval.shape) - 1
    if numbers.operand_batching_dims or indices.axis == last:
        raise _Unknown
    state = _reduced(indices, (last,))
    assert isinstance(state, Where)
    return _placed(state, [a for a in range(ndim) if a not in numbers.offset_dims], ndim)


def _before(eqn: Any) -> Shape:
    return eqn.invars[0].aval.shape


_RULES: dict[str, Rule] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(CUMULATIVE, _same),
    **dict.fromkeys(WINDOWS, _pool),
    BROADCAST: _broadcast,
    CONCATENATE: _concatenate,
    CONV: _convolution,
    DOT: _dot,
    GATHER: _gather,
    PAD: _pad,
    RESHAPE: _reshape,
    REV: _rev,
    SLICE: _slice,
    SORT: _sort,
    SPLIT: _split,
    SQUEEZE: _squeeze,
    STACK: _stack,
    TRANSPOSE: _transpose,
    UNSTACK: _unstack,
}
