"""Sites at which diagnosis measures: their names, their layers, and how they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vfjax.merge._merged import Merged
from vfjax.network._checks import opaque_hint
from vfjax.network._inside import value_of
from vfjax.network._layout import Layout, whole_layout
from vfjax.network._network import Network
from vfjax.network._sites import Sites, depth_of, select


@dataclasses.dataclass(frozen=True)
class FeatureSite:
    """Where features were measured.

    Attributes:
        name: Name of the site, as in `Network.run`.
        layer: Name of the layer whose pre-activation or tap it is, or which its norm directly
            follows; None if there is none, as at `<layer>:in`.
        depth: Depth of that layer: the number of layers up to and including it, on the longest
            path from the input. 0 for `input`, L for `output`.
        main: Whether it lies on the main path rather than on a shortcut; for `<layer>:in`, whether
            the layer does.
        size: Number of entries of its value per example; the rounded mean over models where these
            differ, as at the outputs of heads with different classes.
    """

    name: str
    layer: str | None
    depth: int
    main: bool
    size: int


def resolve_sites(net: Network, sites: Sites) -> tuple[str, ...]:
    """Names of the sites that a `sites=` argument of this package stands for, at least one.

    Args:
        net: The traced network.
        sites: As in `vfjax.stats.resolve_sites`, of whole values.

    Returns:
        Site names in the order of the network, or as listed.

    Raises:
        TypeError: If `sites` is neither a string nor a sequence of strings.
        ValueError: If a name is not a site of the network, or stands for a part of a value, or if
            the network has no layers.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], v, jnp.ones((1, 3)))
        >>> resolve_sites(net, "taps"), resolve_sites(net, "layers")
        (('a:act', 'b:act'), ('a', 'b'))
    """
    names = select(net, sites, whole=True)
    if not names:
        raise ValueError(
            f"`sites` is {sites!r}, which names no site; name some of this network, as ['output']."
            + opaque_hint(net)
        )
    return names


def unique(
    net: Network, names: Sequence[str], cuts: Sequence[Merged]
) -> tuple[tuple[Layout, ...], dict[str, str]]:
    """Layouts of the distinct values among sites, and for every site the name of its layout.

    Several sites may have one value: where no activation follows a layer, its tap is its
    pre-activation; a shortcut and the layer that it bypasses share a tap. At a cut of a `Merged`,
    the same value of the network differs before and after the cut, and counts as two.
    """
    chosen: dict[Any, Layout] = {}
    source = {}
    for name in names:
        layout = whole_layout(net, name)
        sides = tuple((cut.in_stems(name), cut.in_heads(name)) for cut in cuts)
        layout = chosen.setdefault((value_of(net, name), layout.keep, sides), layout)
        source[name] = layout.name
    return tuple(chosen.values()), source


def describe(net: Network, name: str, size: int) -> FeatureSite:
    """Describes a site whose value has `size` entries per example."""
    layer, depth, main = depth_of(net, name)
    return FeatureSite(name, layer, depth, main, int(size))
