"""The registry of sites: the names that a network has, and what each of them stands for.

`Network.run`, `stats`, `renorm`, `diagnose` and `prune` all look names up here. The names, and the
words that stand for several of them, are documented once, in `vfjax.stats.resolve_sites`.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vfjax._analysis import Traced, axes_at_tap
from vfjax._jaxpr import contraction
from vfjax.network._checks import opaque_hint
from vfjax.network._records import JointTap, Tap
from vfjax.network._retrace import traces_of
from vfjax.symmetry._places import Axis

if TYPE_CHECKING:
    from vfjax.network._network import Network

Kind = Literal["input", "output", "layer", "tap", "operand", "norm", "loop", "group", "joint"]
Sites = Literal["paper", "layers", "all", "taps"] | Sequence[str]

WORDS = ("paper", "layers", "all", "taps")


class Site(NamedTuple):
    """What the name of a site stands for.

    Attributes:
        name: The name.
        kind: `"input"` and `"output"` of the network; `"layer"`, a pre-activation; `"tap"`, the
            value after a layer; `"operand"` and `"norm"`, the value that a layer or a norm reads;
            `"loop"`, a value that a loop returns which is kept whole;
            `"group"` and `"joint"`, the part of a tap that shows one group, or one group within
            another.
        of: Name of the layer or the norm; None for the network's ends and for loops.
        source: Name of the site that holds the whole value; the name itself unless it is a part.
        tap: Where in the value the group shows, for parts and for taps of a single group.
    """

    name: str
    kind: Kind
    of: str | None
    source: str
    tap: Tap | JointTap | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a whole value of the network, not a part of one."""
        return self.source == self.name

    @property
    def layer(self) -> str | None:
        """The layer that it belongs to or that reads it; None for norms and the network's ends."""
        return None if self.kind == "norm" else self.of

    @property
    def meaning(self) -> str:
        """A description for messages."""
        return {
            "input": "the network's input",
            "output": "the network's output",
            "layer": f"the pre-activation of the layer '{self.of}'",
            "tap": f"the value after the layer '{self.of}'",
            "operand": f"what the layer '{self.of}' reads",
            "norm": f"what the norm '{self.of}' reads",
            "loop": "what a loop returns",
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
    names += traces_of(net).reference.loops
    whole = (whole_site(traces_of(net).reference, name) for name in (*names, "output"))
    by_name = {site.name: site for site in whole if site is not None}
    by_name |= {name: by_name[name]._replace(tap=tap) for name, tap in only.items()}
    for tap in net.taps:
        if tap.name not in only:
            name = f"{tap.name}[{tap.group}]"
            by_name[name] = Site(name, "group", by_name[tap.name].of, tap.name, tap)
    for tap in net.joint_taps:
        by_name[tap.name] = Site(tap.name, "joint", tap.layer, f"{tap.layer}:act", tap)
    return by_name


def whole_site(traced: Traced, name: str) -> Site | None:
    """The site with a name, if a trace shows that it is a whole value; else None."""
    base, _, what = name.rpartition(":")
    if name in traced.layers:
        return Site(name, "layer", name, name)
    if name in ("input", "output"):
        return Site(name, name, None, name)
    if name in traced.loops:
        return Site(name, "loop", None, name)
    if what == "act" and base in traced.layers:
        return Site(name, "tap", base, name)
    if what == "in" and base in traced.norms:
        return Site(name, "norm", base, name)
    if what == "in" and base in traced.layers:
        return Site(name, "operand", base, name)
    return None


def taps_by_site(net: Network) -> dict[str, Tap]:
    """Taps by the name of their site: `<layer>:act`, with `[group]` if several groups share it."""
    sites = net.sites.values()
    site_of = {id(site.tap): site.name for site in sites if isinstance(site.tap, Tap)}
    return {site_of[id(tap)]: tap for tap in net.taps}


def joint_taps(net: Network) -> dict[str, JointTap]:
    """Joint taps by the name of their site."""
    return {tap.name: tap for tap in net.joint_taps}


def crossed_taps(net: Network) -> tuple[str, ...]:
    """Taps whose channels show groups across each other, so that no part shows any of them alone.

    They are whole values, as the heads and dims of an attention whose heads share a scale: a part
    would pair the heads of two models by index. One group within another has its joint tap.
    """
    shown = Counter(tap.name for tap in net.taps)
    return tuple(name for name, count in shown.items() if count > 1 and _crosses(net, name))


def sampled_groups(net: Network) -> frozenset[str]:
    """Groups that lie along the samples of a tap of other groups."""
    return frozenset(
        place.group
        for name in dict.fromkeys(tap.name for tap in net.taps)
        for place in net.places(name)
        if place.at.axis not in (channel_axes(net, name) or ())
    )


def _crosses(net: Network, name: str) -> bool:
    keep = channel_axes(net, name) or ()
    places = [place for place in net.places(name) if place.at.axis in keep]
    return any(
        _overlap(one.at, other.at) and one.owner != other.at and other.owner != one.at
        for one, other in itertools.combinations(places, 2)
    )


def _overlap(one: Axis, other: Axis) -> bool:
    """Whether two places of a value share entries."""
    windows = zip(one.windows, other.windows, strict=False)
    return one.axis != other.axis or all(a == b for a, b in windows)


# ------------------------------------------------------------------------------- places of values


def locate(net: Network, traced: Traced, name: str) -> tuple[int, tuple[int, int] | None]:
    """Finds the value of a site in a trace.

    Args:
        net: The network.
        traced: The trace.
        name: Name of a site that is a whole value of one array.

    Returns:
        Id of the value; and, if the site is one use of it, (equation index, operand index), else
        None.

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
    if site.kind == "loop":
        return traced.loops[name], None
    if site.kind == "norm":
        norm = traced.norms[_base(site)]
        return norm.input, (norm.index, norm.operand)
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
    """Whether the value at a site is computed in the stem of a cut."""
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
    """Name of the site of the whole value: a site itself, or the one that it is a part of."""
    site = whole_site(traced, name) or net.sites.get(name)
    if site is None:
        raise ValueError(unknown(net, "site", name, list(net.sites)))
    return site.source


def depth_of(net: Network, name: str) -> tuple[str | None, int, bool]:
    """The layer of a whole value or None, its depth, and whether it is on the main path.

    The input of a norm belongs to the layer that the norm follows directly. Otherwise, and for the
    input of a layer, the depth is that of the deepest layer before.
    """
    site = _whole(net, name)
    if site.kind in ("input", "output"):
        return None, net.depth if name == "output" else 0, True
    layer = net.norm(_base(site)).layer if site.kind == "norm" else site.layer
    if layer is not None and site.kind != "operand":
        return layer, net.layer(layer).depth, net.layer(layer).main
    traced = traces_of(net).reference
    before = set(traced.graph.needed([locate(net, traced, name)[0]], ()))
    layers = traced.layers.values()
    depth = max((traced.depth_of(s) for s in layers if s.index in before), default=0)
    return None, depth, layer is None or net.layer(layer).main


def channel_axes(net: Network, name: str) -> tuple[int, ...] | None:
    """Axes of a whole value that hold channels; None for all but the first.

    In what a loop returns these are the axes along which groups lie.

    In the input of a layer these are the axes that it shares with the kernel, usually those that
    are contracted.
    """
    site, traced = _whole(net, name), traces_of(net).reference
    if site.kind in ("input", "output"):
        return None
    if site.kind == "loop":
        ats = [place.at for place in net.places(name)]
        return (
            tuple(sorted({at.axis for at in ats} | {d for at in ats for d, _ in at.entries}))
            or None
        )
    if site.kind == "norm":
        return net.norm(_base(site)).channel_axes
    layer = traced.layers[_base(site)]
    if site.kind == "tap":
        return axes_at_tap(traced.graph, layer.preactivation, layer.channel_axes)
    if site.kind == "layer":
        return layer.channel_axes
    equation, side = traced.graph.equations[layer.index], 1 - layer.side
    product = contraction(equation.primitive, equation.params)
    if product is None:
        numbers = equation.params["dimension_numbers"]
        return ((numbers.lhs_spec, numbers.rhs_spec)[side][1],)
    return tuple(sorted((*product.contract[side], *product.batch[side])))


def _whole(net: Network, name: str) -> Site:
    site = whole_site(traces_of(net).reference, name)
    if site is None:
        raise ValueError(no_value(net, name))
    return site


def _base(site: Site) -> str:
    assert site.of is not None
    return site.of


# ------------------------------------------------------------------------------- names from callers


def select(net: Network, sites: Any, *, whole: bool = False) -> tuple[str, ...]:
    """Names of the sites that a `sites=` argument stands for; see `vfjax.stats.resolve_sites`.

    Args:
        net: The network.
        sites: The argument that the caller gave.
        whole: Whether the caller reads only whole values, not parts.

    Raises:
        ValueError: If the network does not have such a site, or with `whole` one is a part.
        TypeError: If `sites` is neither a string nor a sequence of strings.
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
            return (*taps_by_site(net), *joint_taps(net), *crossed_taps(net))
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
    """The error message for a name that does not stand for a whole value."""
    site = net.sites.get(name)
    if site is None:
        return unknown(net, "site", name, [s.name for s in net.sites.values() if s.whole])
    return (
        f"'{name}' is {site.meaning}, the features of the group '{getattr(site.tap, 'group', '')}' "
        f"alone, and whole values are read here: name '{site.source}'. vfjax.stats measures parts."
    )


def no_layer(net: Network, name: str) -> str:
    """The error message for a name that is not a layer's."""
    site = net.sites.get(name) if isinstance(name, str) else None
    if site is None:
        return unknown(net, "layer", name, [layer.name for layer in net.layers])
    hint = f": name '{site.of}'" if site.of in traces_of(net).reference.layers else ""
    return f"'{name}' is {site.meaning}, a site, not a layer{hint}."


def unknown(net: Network, kind: str, name: Any, known: Sequence[str]) -> str:
    """The error message for an unknown name, with the nearest ones that the network has."""
    close = difflib.get_close_matches(str(name), known, 3, 0.5)
    parts = {part for part in str(name).split("/") if part}
    near = close or sorted(known, key=lambda k: -len(parts & set(k.split("/"))))[:6]
    if name in WORDS:
        return f"'{name}' stands for several sites: pass it alone, \"{name}\", not in a list"
    return (
        f"the network has no {kind} '{name}'; "
        + (
            f"did you mean {' or '.join(repr(k) for k in near)}?"
            if close
            else f"it has, among others, {near}; see net.summary()."
        )
        + opaque_hint(net)
    )
