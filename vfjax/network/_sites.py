"""The registry of sites: which names a network has, and what each of them stands for.

`Network.run`, `stats`, `renorm`, `diagnose` and `prune` all ask here. The names and the words that
stand for several of them are documented once, in `vfjax.stats.resolve_sites`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vfjax._analysis.taps import axes_at_tap
from vfjax._analysis.traced import Traced
from vfjax._jaxpr.primitives import CONV
from vfjax.network._checks import opaque_hint
from vfjax.network._records import JointTap, Tap

if TYPE_CHECKING:
    from vfjax.network._network import Network

Kind = Literal["input", "output", "layer", "tap", "operand", "norm", "group", "joint"]
Sites = Literal["paper", "layers", "all", "taps"] | Sequence[str]

WORDS = ("paper", "layers", "all", "taps")


class Site(NamedTuple):
    """What the name of a site stands for.

    Attributes:
        name: The name.
        kind: `"input"` and `"output"` of the network; `"layer"`, a pre-activation; `"tap"`, the
            value behind a layer; `"operand"` and `"norm"`, what a layer or a norm reads; `"group"`
            and `"joint"`, the part of a tap that one group, or one within another, shows in.
        of: Name of the layer or the norm; None for the network's ends.
        source: Name of the site that holds the whole value; the name itself but for parts.
        tap: Where in the value a group shows, of parts and of taps that show a single group.
    """

    name: str
    kind: Kind
    of: str | None
    source: str
    tap: Tap | JointTap | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a value of the network, and not a part of one."""
        return self.source == self.name

    @property
    def layer(self) -> str | None:
        """The layer that it belongs to, or that reads it."""
        return None if self.kind == "norm" else self.of

    @property
    def meaning(self) -> str:
        """What it is, for messages."""
        return {
            "input": "the network's input",
            "output": "the network's output",
            "layer": f"the pre-activation of the layer '{self.of}'",
            "tap": f"the value behind the layer '{self.of}'",
            "operand": f"what the layer '{self.of}' reads",
            "norm": f"what the norm '{self.of}' reads",
            "group": f"a part of '{self.source}'",
            "joint": f"a part of '{self.source}'",
        }[self.kind]


def sites_of(net: Network) -> dict[str, Site]:
    """All sites of a network by name: whole values first, then parts of taps."""
    layers, norms = [layer.name for layer in net.layers], [norm.name for norm in net.norms]
    shown = [tap.name for tap in net.taps]
    only = {tap.name: tap for tap in net.taps if shown.count(tap.name) == 1}
    names = ["input", *layers, *(f"{name}:act" for name in layers)]
    names += [f"{name}:in" for name in (*norms, *layers)]
    whole = (whole_site(net._reference, name) for name in (*names, "output"))
    found = {site.name: site for site in whole if site is not None}
    found |= {name: found[name]._replace(tap=tap) for name, tap in only.items()}
    for tap in net.taps:
        if tap.name not in only:
            name = f"{tap.name}[{tap.group}]"
            found[name] = Site(name, "group", tap.name.removesuffix(":act"), tap.name, tap)
    for tap in net.joint_taps:
        found[tap.name] = Site(tap.name, "joint", tap.layer, f"{tap.layer}:act", tap)
    return found


def whole_site(traced: Traced, name: str) -> Site | None:
    """The site of a name that stands for a whole value, as far as a trace alone tells, or None."""
    base, _, what = name.rpartition(":")
    if name in traced.layers:
        return Site(name, "layer", name, name)
    if name in ("input", "output"):
        return Site(name, name, None, name)
    if what == "act" and base in traced.layers:
        return Site(name, "tap", base, name)
    if what == "in" and base in traced.norms:
        return Site(name, "norm", base, name)
    if what == "in" and base in traced.layers:
        return Site(name, "operand", base, name)
    return None


def taps_by_site(net: Network) -> dict[str, Tap]:
    """Taps by the name of their site: `<layer>:act`, with `[group]` added where groups share it."""
    sites = net.sites.values()
    found = {id(site.tap): site.name for site in sites if isinstance(site.tap, Tap)}
    return {found[id(tap)]: tap for tap in net.taps}


def joint_taps(net: Network) -> dict[str, JointTap]:
    """Joint taps by the name of their site."""
    return {tap.name: tap for tap in net.joint_taps}


# ------------------------------------------------------------------------------- where values are


def locate(net: Network, traced: Traced, name: str) -> tuple[int, tuple[int, int] | None]:
    """Where the value of a site is in a trace.

    Args:
        net: The network.
        traced: The trace.
        name: Name of a site of one array, that is a whole value.

    Returns:
        Id of the value; and, where the site is one use of it, which equation's operand.

    Raises:
        ValueError: If there is no such site, or it is a part of a value.
    """
    site = whole_site(traced, name)
    if site is None:
        raise ValueError(no_value(net, name))
    graph = traced.graph
    if site.kind == "layer":
        return traced.layers[name].preactivation, None
    if site.kind == "tap":
        return traced.taps[_base(site)], None
    if site.kind == "norm":
        index = traced.norms[_base(site)].index
        return graph.equations[index].values[0], (index, 0)
    if site.kind == "operand":
        layer = traced.layers[_base(site)]
        value = graph.equations[layer.index].inputs[1 - layer.side]
        assert isinstance(value, int)  # it depends on the input
        return value, (layer.index, 1 - layer.side)
    ids = inputs_of(traced) if name == "input" else graph.output_ids
    if len(ids) != 1:
        raise ValueError(f"the network's {name} must be one array here; it has {len(ids)}.")
    return ids[0], None


def inputs_of(traced: Traced) -> tuple[int, ...]:
    """Ids of the arrays that make up the input of a trace."""
    return tuple(traced.graph.inputs[traced.graph.num_leaves :])


def in_stem(net: Network, traced: Traced, name: str, depth: int) -> bool:
    """Whether the value at a site is made in the stem of a cut."""
    source = source_of(net, traced, name)
    if source in ("input", "output"):
        return source == "input"
    value, use = locate(net, traced, source)
    index = use[0] if use is not None else traced.graph.producer.get(value)
    return index is None or index in traced.cut(depth).stem


def crosses(net: Network, traced: Traced, name: str, depth: int) -> bool:
    """Whether the value at a site is handed from the stem of a cut to the trunk."""
    source = source_of(net, traced, name)
    if source == "output":
        return False
    ids = inputs_of(traced) if source == "input" else (locate(net, traced, source)[0],)
    return set(ids) <= set(traced.cut(depth).crossing)


def source_of(net: Network, traced: Traced, name: str) -> str:
    """Name of the site that holds the value that a site is, or is a part of."""
    site = whole_site(traced, name) or net.sites.get(name)
    if site is None:
        raise ValueError(unknown(net, "site", name, list(net.sites)))
    return site.source


def depth_of(net: Network, name: str) -> tuple[str | None, int, bool]:
    """What layer a whole value is of, at what depth it is, and whether on the main path.

    A norm counts to the layer that it follows directly. Else, and for what a layer reads, the depth
    is that of the deepest layer before.
    """
    site = _whole(net, name)
    if site.kind in ("input", "output"):
        return None, net.depth if name == "output" else 0, True
    layer = net.norm(_base(site)).layer if site.kind == "norm" else site.layer
    if layer is not None and site.kind != "operand":
        return layer, net.layer(layer).depth, net.layer(layer).main
    traced = net._reference
    before = set(traced.graph.needed([locate(net, traced, name)[0]], ()))
    layers = traced.layers.values()
    depth = max((traced.depth_of(s) for s in layers if s.index in before), default=0)
    return None, depth, layer is None or net.layer(layer).main


def channel_axes(net: Network, name: str) -> tuple[int, ...] | None:
    """Axes of a whole value that hold channels; None for all but the first.

    Of what a layer reads these are the axes that the kernel has too, which are mostly those that
    it contracts.
    """
    site, traced = _whole(net, name), net._reference
    if site.kind in ("input", "output"):
        return None
    if site.kind == "norm":
        return net.norm(_base(site)).channel_axes
    layer = traced.layers[_base(site)]
    if site.kind == "tap":
        return axes_at_tap(traced.graph, layer.preactivation, layer.channel_axes)
    if site.kind == "layer":
        return layer.channel_axes
    equation, side = traced.graph.equations[layer.index], 1 - layer.side
    numbers = equation.params["dimension_numbers"]
    if equation.primitive == CONV:
        return ((numbers.lhs_spec, numbers.rhs_spec)[side][1],)
    contract, batch = numbers
    return tuple(sorted((*contract[side], *batch[side])))


def _whole(net: Network, name: str) -> Site:
    site = whole_site(net._reference, name)
    if site is None:
        raise ValueError(no_value(net, name))
    return site


def _base(site: Site) -> str:
    assert site.of is not None
    return site.of


# ------------------------------------------------------------------------------- what callers name


def select(net: Network, sites: Any, *, whole: bool = False) -> tuple[str, ...]:
    """Names of the sites that a `sites=` argument stands for; `vfjax.stats.resolve_sites` says how.

    Args:
        net: The network.
        sites: What the caller gave.
        whole: Whether the caller reads whole values alone, and no parts.

    Raises:
        ValueError: If a name is none of the network's, or one of a part where `whole`.
        TypeError: If `sites` is not a string and no sequence of strings.
    """
    if isinstance(sites, str):
        if sites == "paper":
            first = 1 if net.residual else 0
            main = [layer for layer in net.layers if layer.main]
            return tuple(layer.name for layer in main if first < layer.depth < net.depth)
        if sites in ("layers", "all"):
            return tuple(layer.name for layer in net.layers)
        if sites == "taps" and whole:
            return tuple(layer.tap for layer in net.layers)
        if sites == "taps":
            return (*taps_by_site(net), *joint_taps(net))
        words = ", ".join(f'"{word}"' for word in WORDS)
        raise ValueError(
            f'`sites` must be {words} or a list of site names, got "{sites}"'
            + (f'; for this one site pass ["{sites}"]' if sites in net.sites else "")
        )
    names: list[Any] = [*sites] if isinstance(sites, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`sites` must be a string or a sequence of site names, got {sites!r}")
    for name in names:
        if name not in net.sites:
            raise ValueError(f"`sites`: {unknown(net, 'site', name, list(net.sites))}")
        if whole and not net.sites[name].whole:
            raise ValueError(f"`sites`: {no_value(net, name)}")
    return tuple(dict.fromkeys(names))


def no_value(net: Network, name: str) -> str:
    """The message about a name that stands for no whole value."""
    site = net.sites.get(name)
    if site is None:
        return unknown(net, "site", name, [s.name for s in net.sites.values() if s.whole])
    return (
        f"'{name}' is {site.meaning}, the features of the group '{getattr(site.tap, 'group', '')}' "
        f"alone, and whole values are read here: name '{site.source}'. vfjax.stats measures parts."
    )


def no_layer(net: Network, name: str) -> str:
    """The message about a name that stands for no layer, where one is wanted."""
    site = net.sites.get(name) if isinstance(name, str) else None
    if site is None:
        return unknown(net, "layer", name, [layer.name for layer in net.layers])
    hint = f": name '{site.of}'" if site.of in net._reference.layers else ""
    return f"'{name}' is {site.meaning}, a site and no layer{hint}."


def unknown(net: Network, kind: str, name: Any, known: Sequence[str]) -> str:
    """The message about a name that the network does not have, with the nearest that it has."""
    close = difflib.get_close_matches(str(name), known, 3, 0.5)
    parts = {part for part in str(name).split("/") if part}
    near = close or sorted(known, key=lambda k: -len(parts & set(k.split("/"))))[:6]
    return (
        f"the network has no {kind} '{name}'; "
        + (
            f"did you mean {' or '.join(repr(k) for k in near)}?"
            if close
            else f"it has, among others, {near}; see net.summary()."
        )
        + opaque_hint(net)
    )
