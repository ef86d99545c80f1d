"""Checks of a `net` argument: one traced network, or one per model."""

from __future__ import annotations

from typing import Any

from vfjax import _retrace
from vfjax.network import Network


def check_net(net: Any, *, other: str = "") -> None:
    """Raises a TypeError unless `net` is a `Network`.

    Args:
        net: What the caller gave.
        other: What else it may be, for the message: "or a PermutationSpec".
    """
    if not isinstance(net, Network):
        raise TypeError(
            f"net must be a Network{f' {other}' if other else ''}; it was a {type(net).__name__}. "
            "Trace the function that applies the model: net = vfjax.trace(apply_fn, variables, x)."
        )


def networks(net: Any, models: int) -> tuple[Network, ...]:
    """One network per model, of a `net` argument that may be one for all of them.

    Args:
        net: A `Network`, or a sequence of one per model: networks of one architecture that differ
            in widths or numbers of classes.
        models: How many models there are.

    Returns:
        As many networks.

    Raises:
        TypeError: If one is no `Network`.
        ValueError: If there are not as many, or their layers, norms, groups or inputs differ.
    """
    if isinstance(net, Network):
        return (net,) * models
    if not isinstance(net, (list, tuple)):
        check_net(net, other="or a sequence of one per model")
    nets = tuple(net)
    for found in nets:
        check_net(found, other="or a sequence of one per model")
    if len(nets) != models:
        raise ValueError(f"net has {len(nets)} networks for {models} trees; give one per tree")

    def facts(net: Network) -> dict[str, Any]:
        return {
            "layers": [(a.name, a.kind, a.depth, a.main) for a in net.layers],
            "norms": [norm.name for norm in net.norms],
            "groups": list(net.spec.groups),
            "inputs": _retrace.origin_of(net.x),
        }

    first = facts(nets[0])
    for k, other in enumerate(nets[1:], start=1):
        for what, value in facts(other).items():
            if other is not nets[0] and value != first[what]:
                raise ValueError(
                    f"net[{k}] has other {what} than net[0]: merged models must share one "
                    f"architecture, but for widths and classes. They are {value} and {first[what]}."
                )
    return nets
