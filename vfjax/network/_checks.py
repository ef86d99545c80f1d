"""Checks of the arguments of `Network`'s methods, and their error messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vfjax._analysis import Traced
from vfjax._jaxpr import MAX_UNROLL
from vfjax._trees import flatten_named, structure_hint
from vfjax._types import PyTree
from vfjax.network._crossing import Crossing
from vfjax.network._retrace import traces_of

if TYPE_CHECKING:
    from vfjax.network._network import Network


def check_depth(net: Network, depth: Any, argument: str) -> None:
    """Checks that the network can be cut at a depth.

    Args:
        net: The network.
        depth: The argument that the caller gave.
        argument: The caller's name for it, for the error message.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is not from 0 to `net.depth`.
    """
    if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)):
        raise TypeError(f"{argument} must be a whole number of layers; it was {depth!r}.")
    if not 0 <= depth <= net.depth:
        raise ValueError(
            f"{argument} was {depth}; this network has {net.depth} layers from input to "
            f"output, so give 0 to {net.depth}.{opaque_hint(net)}"
        )


def check_part(net: Network, start: Any, stop: Any) -> None:
    """Checks that the network can be run from one depth to another; None stands for an end.

    Raises:
        TypeError: If a depth is not a whole number.
        ValueError: If it is not from 0 to `net.depth`, or the second is less than the first.
    """
    for depth, argument in ((start, "start"), (stop, "stop")):
        if depth is not None:
            check_depth(net, depth, argument)
    if start is not None and stop is not None and stop < start:
        raise ValueError(f"stop was {stop}, before start, {start}; a part runs forwards.")


def check_crossing(x: Any, start: int | None) -> None:
    """Checks that `x` is an input, or with `start` a `Crossing` of a cut at that depth."""
    if start is None:
        if isinstance(x, Crossing):
            raise ValueError(f"x is a Crossing of a cut at {x.depth}; run it with start={x.depth}.")
    elif not isinstance(x, Crossing) or x.depth != start:
        given = f"a cut at {x.depth}" if isinstance(x, Crossing) else type(x).__name__
        raise ValueError(
            f"start={start} takes the Crossing that run(..., stop={start}) returns in place of x; "
            f"it was {given}."
        )


def check_batch(net: Network) -> None:
    """Checks that a network was traced with a batch, which passes over data pool.

    Raises:
        ValueError: If no layer has an axis of samples, as after tracing with a single example.
    """
    layers = net.layers
    if layers and not any(layer.sample_axes for layer in layers):
        first = layers[0]
        raise ValueError(
            f"net was traced with a single example: the layer '{first.name}' gives "
            f"{list(first.channel_shape)}, with no axis of examples. Axis 0 of every array of x "
            "must be the batch: trace again with a batch, as vfjax.trace(apply_fn, variables, "
            "x[None]), of a function that takes one, such as jax.vmap(apply_fn, (None, 0))"
        )


def named_leaves(net: Network, variables: PyTree) -> dict[str, Any]:
    """The leaves of variables by path; raises a ValueError if some were not traced."""
    named, _ = flatten_named(variables)
    unknown = [path for path in named if path not in traces_of(net).avals]
    if unknown:
        raise ValueError(
            f"variables has leaves {unknown[:3]} that the traced network does not have; pass "
            "a tree of the structure that was traced."
            + structure_hint("variables", named, traces_of(net).avals)
        )
    return named


def check_present(
    net: Network, traced: Traced, wanted: Sequence[int], env: Mapping[int, Any], name: str
) -> None:
    """Checks that all leaves that are read to compute some values are present."""
    graph = traced.graph
    read = {v for i in graph.needed(wanted, env) for v in graph.equations[i].values}
    given = graph.inputs[: len(traces_of(net).avals)]
    leaves = zip(given, traces_of(net).avals, strict=True)
    missing = [p for v, p in leaves if v in read | set(wanted) and v not in env]
    check_variances(net, missing, name)
    if missing:
        raise ValueError(
            f"{name} lacks {missing[:3]}{' and more' if len(missing) > 3 else ''}, which this "
            "part of the network reads; pass a tree of the structure that was traced."
        )


def check_variances(net: Network, missing: Iterable[str], name: str) -> None:
    """Raises a ValueError if only variances are missing, since merging left them unknown.

    Args:
        net: The network.
        missing: Paths of the leaves that a tree lacks.
        name: What to call the tree in errors.
    """
    missing = list(missing)
    if missing and set(missing) <= {norm.var for norm in net.norms}:
        raise ValueError(
            f"{name} lacks {missing[:3]}{' and more' if len(missing) > 3 else ''}, stored "
            "variances: merged through a matrix they are unknown, since the variance of a "
            "mixture of features does not follow from theirs. Measure them on data: "
            "vfjax.renorm.reset(net, merged, data) returns all."
        )


def opaque_hint(net: Network) -> str:
    """A sentence for messages about layers hidden in an opaque primitive, or an empty string."""
    if not net.opaque:
        return ""
    primitive, where = net.opaque[0]
    return (
        f" Layers inside the opaque {primitive} at {where} cannot be reached: write it as a "
        f"Python loop, or as a scan over at most {MAX_UNROLL} stacked layers."
    )
