"""Which entries of a site's value count, given which positions of the network's input do."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._analysis import Lost, State, Traced, Where, follow_positions
from vfjax._passes.masking import fits
from vfjax._types import Array
from vfjax.network import _sites
from vfjax.network._layout import Layout, arrange_valid, sample_axes, whole_layout
from vfjax.network._retrace import traces_of

if TYPE_CHECKING:
    from vfjax.network._network import Network


def valid_at(net: Network, layouts: Collection[Layout], valid: Array) -> dict[str, Array]:
    """Which entries of sites' values count.

    Positions are followed from the input to each site. Where that is not possible, behind an opaque
    loop for instance, the mask must have the shape of the site's leading sample axes, or fewer axes
    may be left, as after a pool: then an entry counts if any of its positions does.

    Args:
        net: The traced network.
        layouts: How the sites are read.
        valid: Which positions of the input count: booleans `[batch, ...]`, along the leading axes
            of the arrays of x that have them.

    Returns:
        By name of the layout, booleans of the rank of the value as `arrange` gives it, of size 1
        along axes where nothing varies.

    Raises:
        ValueError: If it is not known which positions of the input those of a site stand for.
    """
    traced = _trace(net, len(valid))
    values = [_sites.locate(net, traced, each.source)[0] for each in layouts]
    states, found = _states(traced, values, valid), {}
    for each, value in zip(layouts, values, strict=True):
        state, shape = states[value], traced.graph.avals[value].shape
        if isinstance(state, Where):
            here = _spread(state, valid)
        else:
            here = _by_shape(net, each.source, shape, valid, state)
        found[each.name] = arrange_valid(here, each, shape)
    return found


def valid_results(net: Network, layers: Sequence[str], valid: Array) -> dict[str, Array]:
    """As `valid_at`, of what layers compute before anything is added or reshaped.

    Raises:
        ValueError: If it is not known which positions of the input those of a result stand for.
    """
    traced = _trace(net, len(valid))
    equations = {name: traced.graph.equations[traced.layers[name].index] for name in layers}
    states = _states(traced, [equation.result for equation in equations.values()], valid)
    found = {}
    for name, equation in equations.items():
        state = states[equation.result]
        if not isinstance(state, Where):
            raise ValueError(
                "mask does not tell what counts in the result of the layer "
                f"'{name}': {state.why if state else 'it has no axis of examples'}"
            )
        found[name] = _spread(state, valid)
    return found


def _trace(net: Network, size: int) -> Traced:
    """The trace at a batch size."""
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), net.x)
    return traces_of(net).at({}, x)


def _states(traced: Traced, values: Sequence[int], valid: Array) -> dict[int, State]:
    """What the positions of values stand for among those of a mask."""
    graph, count = traced.graph, math.prod(valid.shape[1:])
    along: dict[int, np.ndarray] = {}
    for value in _sites.inputs_of(traced):
        shape = graph.avals[value].shape
        if fits(shape, valid.shape):
            beside = len(shape) - valid.ndim
            along[value] = np.arange(count).reshape((1, *valid.shape[1:], *(1,) * (beside + 1)))
    return follow_positions(graph, along, count, values)


def _spread(state: Where, valid: Array) -> Array:
    """Booleans of a value's rank, from those of the positions of the input."""
    flat = valid.reshape(len(valid), -1)
    result: Any = None
    for factor in state.factors:
        rest, several = factor.shape[:-1], factor.shape[-1]
        if factor.size == several and several == flat.shape[1] and factor.min(initial=0) >= 0:
            counts = flat.any(1)  # all positions
        else:
            at = factor.reshape(-1, several)
            counts = (flat[:, np.maximum(at, 0)] & (at >= 0)[None]).any(-1)
        counts = jnp.moveaxis(counts.reshape(-1, *rest), 0, state.axis)
        if state.inner > 1:
            shape = list(counts.shape)
            shape[state.axis + 1] = state.inner
            counts = jnp.broadcast_to(counts, shape)
        joined = (*counts.shape[: state.axis], -1, *counts.shape[state.axis + 2 :])
        counts = counts.reshape(joined)
        result = counts if result is None else result & counts
    return result


def _by_shape(
    net: Network, name: str, shape: tuple[int, ...], valid: Array, state: Lost | None
) -> Array:
    """Takes the mask's axes for the leading sample axes of a site, if their sizes agree."""
    samples = sample_axes(whole_layout(net, name), len(shape))
    sizes = tuple(shape[a] for a in samples)
    both = min(len(sizes), valid.ndim)
    if state is None or state.mixed or not both or sizes[:both] != valid.shape[:both]:
        why = "it has no axis of examples" if state is None else state.why
        raise ValueError(
            f"mask gives booleans {list(valid.shape)}, which do not tell what counts at the site "
            f"'{name}', of shape {list(shape)} with sample axes {list(sizes)}: {why}; leave it out "
            "of `sites`"
        )
    kept = valid.any(tuple(range(both, valid.ndim)))
    others = tuple(a for a in range(len(shape)) if a not in samples[:both])
    return jnp.expand_dims(kept, others)
