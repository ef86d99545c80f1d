"""The sites of diagnosis: which there are, what they belong to, and how they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from vfjax import stats
from vfjax.network._checks import opaque_hint
from vfjax.network._network import Network
from vfjax.stats._sites import Site, check_names

Sites = Literal["taps", "layers", "paper"] | Sequence[str]


@dataclasses.dataclass(frozen=True)
class FeatureSite:
    """Where features were measured.

    Attributes:
        name: Name of the site, as in `Network.run`.
        layer: Name of the layer that it is the pre-activation or the tap of, or that a norm
            follows directly; None if there is none.
        depth: Depth of that layer: of the layers on the longest path from the input, how many come
            before the value, its own included. 0 for `input`, L for `output`.
        main: Whether it lies on the main path, and not on a shortcut.
        size: Entries of its value per example; their rounded mean over models where these differ,
            as at the outputs of heads with classes of their own.
    """

    name: str
    layer: str | None
    depth: int
    main: bool
    size: int


def resolve_sites(net: Network, sites: Sites) -> tuple[str, ...]:
    """Names of the sites that a `sites=` argument of this package stands for.

    Args:
        net: The traced network.
        sites: As in `features`.

    Returns:
        Site names in the order of the network, or as listed.

    Raises:
        TypeError: If `sites` is no string and no sequence of strings.
        ValueError: If a name is none of the network's, or the network has no layers.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], v, jnp.ones((1, 3)))
        >>> resolve_sites(net, "taps"), resolve_sites(net, "layers")
        (('a:act', 'b:act'), ('a', 'b'))
    """
    layers = tuple(layer.name for layer in net.layers)
    taps = tuple(layer.tap for layer in net.layers)
    if not isinstance(sites, str):
        norms = (norm.site for norm in net.norms)
        names = check_names(net, sites, ["input", *layers, *taps, *norms, "output"])
    elif sites in ("taps", "layers"):
        names = taps if sites == "taps" else layers
    elif sites == "paper":
        names = stats.resolve_sites(net, "paper")
    else:
        hint = f'; for this one site pass ["{sites}"]' if sites in (*layers, *taps) else ""
        raise ValueError(
            '`sites` must be "taps", "layers", "paper" or a list of site names, got '
            f'"{sites}"{hint}'
        )
    if not names:
        raise ValueError(
            f"`sites` is {sites!r}, which is no site of this network; name some, as in ['output']."
            + opaque_hint(net)
        )
    return names


def unique(net: Network, names: Sequence[str]) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Sites of different values, and by name the one of them that has the same value.

    Where no activation follows a layer, its tap is its pre-activation; a shortcut and the layer
    that it goes around have one tap.
    """
    chosen: dict[Any, Site] = {}
    source = {}
    for name in names:
        keep = _channel_axes(net, name)
        value = value_of(net, name)
        site = chosen.setdefault((value, keep), Site(name, name, None, keep, ()))
        source[name] = site.name
    return tuple(chosen.values()), source


def _layer_of(net: Network, name: str) -> str | None:
    """The layer that a site belongs to."""
    layers = {layer.name for layer in net.layers}
    if name in layers:
        return name
    if name.endswith(":act") and name.removesuffix(":act") in layers:
        return name.removesuffix(":act")
    return None if name in ("input", "output") else net.norm(name.removesuffix(":in")).layer


def _channel_axes(net: Network, name: str) -> tuple[int, ...] | None:
    if name in ("input", "output"):
        return None
    norms = {norm.site: norm for norm in net.norms}
    if name in norms:
        return norms[name].channel_axes
    layer = _layer_of(net, name)
    return None if layer is None else net.layer(layer).channel_axes


def value_of(net: Network, name: str) -> Any:
    """What tells values apart: several names may stand for one value."""
    traced = net._reference
    if name in traced.layers:
        return traced.layers[name].preactivation
    if name in ("input", "output"):
        return name
    if name.endswith(":act"):
        return traced.taps[name.removesuffix(":act")]
    norm = traced.norms[name.removesuffix(":in")]
    return traced.graph.equations[norm.index].values[0]


def describe(net: Network, name: str, size: int) -> FeatureSite:
    """What is known of a site whose value has `size` entries per example."""
    if name in ("input", "output"):
        return FeatureSite(name, None, net.depth if name == "output" else 0, True, int(size))
    found = _layer_of(net, name)
    if found is not None:
        layer = net.layer(found)
        return FeatureSite(name, found, layer.depth, layer.main, int(size))
    # A norm that follows no layer directly, as where it reads a residual stream.
    before = set(net._reference.graph.needed([value_of(net, name)], ()))
    sites = net._reference.layers.values()
    depth = max((net._reference.depth_of(s) for s in sites if s.index in before), default=0)
    return FeatureSite(name, None, depth, True, int(size))
