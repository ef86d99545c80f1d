"""Rules of primitives that combine the entries along dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from vfjax._jaxpr.primitives import CHOICES, CUMULATIVE, REDUCTIONS, WINDOWS
from vfjax._propagate.registry import Axes, Step, Value, rule


@rule(*(REDUCTIONS - CHOICES))
def reduction(step: Step) -> list[Axes]:
    """Drops dimensions; the order of the entries along them does not matter."""
    dropped = step.params["axes"]
    return [[axis for k, axis in enumerate(step.inputs[0].axes) if k not in dropped]]


@rule(*CHOICES)
def arg_reduction(step: Step) -> list[Axes]:
    """Drops dimensions and fixes them: the result is a position along them."""
    axes, dropped = step.inputs[0].axes, step.params["axes"]
    step.fix(*(axes[k] for k in dropped))
    return [[axis for k, axis in enumerate(axes) if k not in dropped]]


@rule("reduce")
def general_reduction(step: Step) -> list[Axes]:
    """A reduction by the user's function, which need not be commutative."""
    dropped = step.params["dimensions"]
    values = step.inputs[: len(step.shapes)]  # the scalar initial values follow
    kept = [k for k in range(len(values[0].shape)) if k not in dropped]
    for value in values:
        step.fix(*(value.axes[k] for k in dropped))
    step.tie(values, kept)
    return [[value.axes[k] for k in kept] for value in values]


@rule(*CUMULATIVE)
def cumulative(step: Step) -> list[Axes]:
    """Depends on the order along its axis."""
    axes = list(step.inputs[0].axes)
    step.fix(axes[step.params["axis"]])
    return [axes]


@rule("sort")
def sort(step: Step) -> list[Axes]:
    """Moves the operands' entries along one dimension together."""
    sorted_dim = step.params["dimension"]
    rank = len(step.inputs[0].shape)
    for value in step.inputs:
        step.fix(value.axes[sorted_dim])
    step.tie(step.inputs, [k for k in range(rank) if k != sorted_dim])
    return [list(value.axes) for value in step.inputs]


@rule("top_k", "approx_top_k")
def top_k(step: Step) -> list[Axes]:
    """Values and indices of the largest entries along one dimension."""
    (value,) = step.inputs
    dim = step.params.get("reduction_dimension", step.params.get("axis", -1)) % len(value.shape)
    return _fixed_along(step, value.axes, [dim])


@rule("fft")
def fft(step: Step) -> list[Axes]:
    """Transforms the last dimensions."""
    axes = step.inputs[0].axes
    rank = len(axes)
    return _fixed_along(step, axes, range(rank - len(step.params["fft_lengths"]), rank))


@rule(*WINDOWS)
def reduce_window(step: Step) -> list[Axes]:
    """Pools: positions that share windows, or are padded or strided over, are fixed."""
    return _pooled(step, step.inputs[: len(step.shapes)])  # the scalar initial values follow


@rule("select_and_gather_add", "select_and_scatter", "select_and_scatter_add")
def selected(step: Step) -> list[Axes]:
    """Derivatives of a max pool, which pass along what windows leave alone."""
    return _pooled(step, step.inputs[:2])


def _pooled(step: Step, values: Sequence[Value]) -> list[Axes]:
    get = step.params.get
    rank = len(values[0].shape)
    plain = (
        (get("window_dimensions"), 1),
        (get("window_strides"), 1),
        (get("padding"), (0, 0)),
        (get("base_dilation"), 1),
        (get("window_dilation"), 1),
    )
    pooled = [
        k
        for k in range(rank)
        if any(setting is not None and _entry(setting[k]) != rest for setting, rest in plain)
    ]
    kept = [k for k in range(rank) if k not in pooled]
    step.tie(values, kept)
    for value in values[1:]:
        step.fix(*(value.axes[k] for k in pooled))
    return _fixed_along(step, values[0].axes, pooled)


def _entry(setting: int | Sequence[int]) -> int | tuple[int, ...]:
    return tuple(setting) if isinstance(setting, Sequence) else setting


def _fixed_along(step: Step, axes: Axes, dims: Sequence[int]) -> list[Axes]:
    """Axes of results whose dimensions `dims` are new and fixed; the others are the operand's."""
    step.fix(*(axes[k] for k in dims))
    return [
        [step.fixed(n) if k in dims else axes[k] for k, n in enumerate(shape)]
        for shape in step.shapes
    ]
