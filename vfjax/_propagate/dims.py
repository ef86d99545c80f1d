"""Where dimensions go: which dimension of a result runs over the same entries as an operand's.

An equation acts entry by entry along a dimension if each entry of its results depends on the same
entry of its operands alone, in the same way: elementwise, say, or as a batch dimension of a
product. It may also combine what it makes of each entry, as a sum over the dimension does. Nothing
here looks at axes, only at shapes and parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from vfjax._jaxpr import open_jaxpr, scan_arity, subjaxpr
from vfjax._jaxpr.primitives import (
    BROADCAST,
    CAST,
    CONCATENATE,
    COND,
    CUMULATIVE,
    CUSTOM,
    DOT,
    ELEMENTWISE,
    INLINE,
    LAYOUT,
    PAD,
    REDUCTIONS,
    REV,
    SCAN,
    SLICE,
    SORT,
    SPLIT,
    SQUEEZE,
    TRANSPOSE,
)
from vfjax._propagate.layout import blocks
from vfjax._propagate.registry import shape_of

Dims = Mapping[Any, int]
"""By name of a stack, the dimension of a value that runs over its entries."""


Ranges = Sequence[tuple[int, int]]
"""By dimension, from where to where a slice goes."""


def through(eqn: Any, operands: Sequence[Dims]) -> list[Dims] | None:
    """The dimensions of an equation's results that run over stacks.

    Args:
        eqn: A `JaxprEqn`.
        operands: The dimensions of each operand that run over stacks.

    Returns:
        Those of each result, without dimensions along which entries are combined; None if the
        equation does not act entry by entry along all of them.
    """
    name = eqn.primitive.name
    if not any(operands):
        return [{} for _ in eqn.outvars]
    if name in CAST:
        return list(operands)
    if name in INLINE | CUSTOM:
        inner = subjaxpr(eqn)
        return None if inner is None else _inside(inner[0], operands)
    if name == SCAN:
        return _scanned(eqn, operands)
    if name == COND:
        branches = [_inside(open_jaxpr(b)[0], operands[1:]) for b in eqn.params["branches"]]
        same = all(branch == branches[0] for branch in branches)
        return branches[0] if same and not operands[0] else None
    merged: dict[Any, int] = {}  # a negative number stands for a dimension that is combined
    for k, dims in enumerate(operands):
        for stack, dim in dims.items():
            target = _target(eqn, k, dim)
            if target is None or merged.setdefault(stack, target) != target:
                return None
    kept = {stack: dim for stack, dim in merged.items() if dim >= 0}
    if len({*kept.values()}) != len(kept):
        return None
    return [kept for _ in eqn.outvars]


def pieces(eqn: Any) -> list[Ranges] | None:
    """What a slice or a split takes: per result and dimension, from where to where; else None."""
    shape, params = shape_of(eqn.invars[0].aval) if eqn.invars else (), eqn.params
    if eqn.primitive.name == SLICE and set(params["strides"] or (1,)) == {1}:
        return [list(zip(params["start_indices"], params["limit_indices"], strict=True))]
    if eqn.primitive.name == SPLIT:
        ends = [0, *accumulate(int(size) for size in params["sizes"])]
        whole = [(0, n) for n in shape]
        dim = params["axis"]
        return [[*whole[:dim], part, *whole[dim + 1 :]] for part in pairwise(ends)]
    return None


def _inside(jaxpr: Any, operands: Sequence[Dims]) -> list[Dims] | None:
    """The dimensions of a jaxpr's results."""
    if len(jaxpr.invars) != len(operands):
        return None
    env = dict(zip(jaxpr.invars, operands, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [_read(env, var) for var in eqn.invars]
        results = through(eqn, inputs)
        if results is None:
            return None
        if not all({*dims} <= {*result} for dims in inputs for result in results):
            return None  # combined entries would have to be tied here
        env.update(zip(eqn.outvars, results, strict=True))
    return [_read(env, var) for var in jaxpr.outvars]


def _read(env: Mapping[Any, Dims], var: Any) -> Dims:
    return {} if hasattr(var, "val") else env.get(var, {})


def _scanned(eqn: Any, operands: Sequence[Dims]) -> list[Dims] | None:
    """Those of a scan that steps over the entries: every step then sees one of them."""
    consts, carry = scan_arity(eqn.params)
    body = open_jaxpr(eqn.params["jaxpr"])[0]
    over = {stack for dims in operands for stack, dim in dims.items() if dim == 0}
    if any(operands[: consts + carry]) or len(over) > 1:
        return None
    inner = [{stack: dim - 1 for stack, dim in dims.items() if dim} for dims in operands]
    results = _inside(body, inner)
    if results is None or any(results[:carry]):
        return None
    emitted = [{stack: dim + 1 for stack, dim in dims.items()} for dims in results[carry:]]
    return [*results[:carry], *({**dict.fromkeys(over, 0), **dims} for dims in emitted)]


def _target(eqn: Any, k: int, dim: int) -> int | None:
    """The result's dimension that a dimension of operand k becomes, entry by entry.

    A negative number, the same for all operands, if entries are combined; None for anything else.
    """
    move = _MOVES.get(eqn.primitive.name)
    return None if move is None else move(eqn, k, dim)


def _elementwise(eqn: Any, k: int, dim: int) -> int | None:
    shape, result = shape_of(eqn.invars[k].aval), shape_of(eqn.outvars[0].aval)
    return dim if len(shape) == len(result) and shape[dim] == result[dim] else None


def _transposed(eqn: Any, k: int, dim: int) -> int | None:
    return eqn.params["permutation"].index(dim)


def _broadcast(eqn: Any, k: int, dim: int) -> int | None:
    return eqn.params["broadcast_dimensions"][dim]


def _regrouped(eqn: Any, k: int, dim: int) -> int | None:
    shapes = shape_of(eqn.invars[0].aval), shape_of(eqn.outvars[0].aval)
    if eqn.params.get("dimensions") is not None and eqn.primitive.name != SQUEEZE:
        return None
    if 0 in shapes[0]:
        return None
    return next((new[0] for old, new in blocks(*shapes) if old == [dim] and len(new) == 1), None)


def _reduced(eqn: Any, k: int, dim: int) -> int | None:
    axes = eqn.params["axes"]
    return -1 if dim in axes else dim - sum(a < dim for a in axes)


def _kept_but(*names: str) -> Callable[[Any, int, int], int | None]:
    """Keeps all dimensions but those that the first known of some parameters names."""

    def move(eqn: Any, k: int, dim: int) -> int | None:
        touched = next(eqn.params[name] for name in names if name in eqn.params)
        return None if dim in (touched if isinstance(touched, tuple) else (touched,)) else dim

    return move


def _padded(eqn: Any, k: int, dim: int) -> int | None:
    return dim if k == 0 and tuple(eqn.params["padding_config"][dim]) == (0, 0, 0) else None


def _contracted(eqn: Any, k: int, dim: int) -> int | None:
    contract, batch = eqn.params["dimension_numbers"]
    if dim in batch[k]:
        return batch[k].index(dim)
    if dim in contract[k]:
        return -1 - contract[k].index(dim)
    kept = [
        [d for d in range(len(var.aval.shape)) if d not in (*contract[side], *batch[side])]
        for side, var in enumerate(eqn.invars[:2])
    ]
    return len(batch[0]) + k * len(kept[0]) + kept[k].index(dim)


def _sliced(eqn: Any, k: int, dim: int) -> int | None:
    taken = pieces(eqn)
    whole = (0, shape_of(eqn.invars[0].aval)[dim])
    return dim if taken is not None and all(each[dim] == whole for each in taken) else None


_MOVES: dict[str, Callable[[Any, int, int], int | None]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(LAYOUT, _regrouped),
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(CUMULATIVE, _kept_but("axis")),
    TRANSPOSE: _transposed,
    BROADCAST: _broadcast,
    DOT: _contracted,
    CONCATENATE: _kept_but("dimension"),
    REV: _kept_but("dimensions"),
    SORT: _kept_but("dimension"),
    PAD: _padded,
    SLICE: _sliced,
    SPLIT: _sliced,
}
