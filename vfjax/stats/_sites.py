"""How sites are named and read."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from vfjax._types import Array
from vfjax.network._arguments import check_net
from vfjax.network._checks import opaque_hint
from vfjax.network._network import Network
from vfjax.network._records import JointTap
from vfjax.symmetry._places import Axis, Window, grid, moved, rows


class GroupAxis(NamedTuple):
    """A channel axis that carries a group, as in `vfjax.symmetry.Axis`."""

    group: str
    axis: int
    outer: int
    inner: int
    windows: tuple[Window, ...] = ()
    # Where the group lies that this one moves within, if the channel axes tell its entries apart.
    owner: Axis | None = None

    @property
    def place(self) -> Axis:
        """The same as a place of a value that has the channel axes alone."""
        return Axis("", self.axis, "elementwise", self.outer, self.inner, self.windows)

    def after(self, mapped: GroupAxis, length: int, m: int) -> GroupAxis:
        """Where it lies after another group of an axis of some length has got m entries."""
        move = functools.partial(moved, mapped=mapped.place, length=length, m=m)
        return GroupAxis(
            self.group, self.axis, *move(self.place)[3:], owner=self.owner and move(self.owner)
        )


class Site(NamedTuple):
    """How a site is read: what to capture, and which of its axes are channels."""

    name: str
    source: str
    # Where the channels are, of a value that becomes `[before, n, after]` before `keep` counts its
    # axes; None to leave it as it is.
    split: Axis | None
    # Channel axes; None for all but the first.
    keep: tuple[int, ...] | None
    axes: tuple[GroupAxis, ...]
    # Where the owners lie, of a value that becomes `[owners * n, rest]`; None for one without.
    around: Axis | None = None


def arrange(value: Any, site: Site) -> tuple[Array, tuple[int, ...]]:
    """A site's value in float32 or better, channels as axes of their own, and its sample axes."""
    if not hasattr(value, "dtype"):
        raise TypeError(
            f'site "{site.name}" holds a {type(value).__name__} of arrays; statistics need one '
            "array"
        )
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    if site.split is not None and site.around is not None:
        value = grid(value, site.split, site.around)
        value = value.reshape(-1, value.shape[-1])
    elif site.split is not None:
        value = rows(value, site.split)
    keep = tuple(range(1, value.ndim)) if site.keep is None else site.keep
    return value, tuple(a for a in range(value.ndim) if a not in keep)


Sites = Literal["paper", "all", "taps"] | Sequence[str]


def resolve_sites(net: Network, sites: Sites) -> tuple[str, ...]:
    """Names of the sites that a `sites=` argument stands for.

    Args:
        net: The traced network.
        sites: `"paper"`: the pre-activations that the reference of REPAIR corrects: every main-path
            layer but the last and, where the network has a residual join, not the first. `"all"`:
            every layer, shortcuts, first and last included. `"taps"`: every tap of a group. Else a
            list of names: `<layer>`, `<layer>:act`, `<norm>:in`, `input`, `output`.

    Returns:
        Site names in the order of the network, or as listed.

    Raises:
        ValueError: If a name is none of the network's.
        TypeError: If `net` is no traced network, or `sites` no string and no sequence of strings.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"] @ v["c"], v, jnp.ones((1, 3)))
        >>> resolve_sites(net, "paper")
        ('a', 'b')
    """
    check_net(net)
    if isinstance(sites, str):
        if sites == "paper":
            first = 1 if net.residual else 0
            main = [layer for layer in net.layers if layer.main]
            return tuple(layer.name for layer in main if first < layer.depth < net.depth)
        if sites == "all":
            return tuple(layer.name for layer in net.layers)
        if sites == "taps":
            return (*taps_by_site(net), *joint_taps(net))
        raise ValueError(
            f'`sites` must be "paper", "all", "taps" or a list of site names, got "{sites}"'
            + (f'; for this one site pass ["{sites}"]' if sites in _known(net) else "")
        )
    return check_names(net, sites, _known(net))


def check_names(net: Network, sites: Any, known: Sequence[str]) -> tuple[str, ...]:
    """A list of site names, each once, after checking that they are among the `known` ones.

    Raises:
        ValueError: If a name is unknown.
        TypeError: If `sites` is no sequence of strings.
    """
    names: list[Any] = [*sites] if isinstance(sites, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`sites` must be a string or a sequence of site names, got {sites!r}")
    known = _known(net)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3, 0.4)
            raise ValueError(
                f'`sites`: the network has no site "{name}"'
                + (f"; did you mean {' or '.join(close)}" if close else "; see net.summary()")
                + f".{opaque_hint(net)}"
            )
    return tuple(dict.fromkeys(names))


def taps_by_site(net: Network) -> dict[str, Any]:
    """Taps by the name of their site: `<layer>:act`, with `[group]` added where groups share it."""
    names = [tap.name for tap in net.taps]
    return {
        tap.name if names.count(tap.name) == 1 else f"{tap.name}[{tap.group}]": tap
        for tap in net.taps
    }


def joint_taps(net: Network) -> dict[str, JointTap]:
    """Joint taps by the name of their site."""
    return {tap.name: tap for tap in net.joint_taps}


def _known(net: Network) -> list[str]:
    """All names that a site may have."""
    layers = [layer.name for layer in net.layers]
    taps = taps_by_site(net)
    shared = {tap.name for name, tap in taps.items() if name != tap.name}
    acts = [f"{name}:act" for name in layers if f"{name}:act" not in shared]
    norms = [f"{norm.name}:in" for norm in net.norms]
    joint = joint_taps(net)
    return list(dict.fromkeys(["input", *layers, *acts, *taps, *joint, *norms, "output"]))


def site_of(net: Network, name: str, taps: Mapping[str, Any]) -> Site:
    """How a site is read, by its name; `taps` are `taps_by_site(net)`."""
    if name in taps:
        tap = taps[name]
        return Site(
            name,
            tap.name,
            Axis("", tap.axis, "elementwise", tap.outer, tap.inner, tap.windows),
            (1,),
            (GroupAxis(tap.group, 0, 1, 1),),
        )
    if name in (joint := joint_taps(net)):
        tap = joint[name]
        h, n = net.spec.sizes[tap.owner], net.spec.sizes[tap.group]
        owner = GroupAxis(tap.owner, 0, 1, n)
        axes = owner, GroupAxis(tap.group, 0, h, 1, owner=owner.place)
        return Site(name, f"{tap.layer}:act", tap.place, (0,), axes, tap.around)
    if name in ("input", "output"):
        return Site(name, name, None, None, ())
    if name.endswith(":in") and name not in {layer.name for layer in net.layers}:
        keep = net.norm(name.removesuffix(":in")).channel_axes
    else:
        keep = net.layer(name.removesuffix(":act")).channel_axes
    return Site(name, name, None, keep, _group_axes(net, name, keep))


def _group_axes(net: Network, name: str, keep: tuple[int, ...]) -> tuple[GroupAxis, ...]:
    """Which of a site's channel axes carry which group.

    Groups within others come last: what they do inside the others' entries counts them anew.
    """
    found = []
    for group, place, owner in net.places(name):
        if place.axis not in keep:
            continue
        if owner is not None:
            owner = owner._replace(axis=keep.index(owner.axis)) if owner.axis in keep else None
        found.append(GroupAxis(group, keep.index(place.axis), *place[3:], owner=owner))
    return tuple(found)


def by_example(name: str, value: Array, single: tuple[int, ...], size: int) -> tuple[Array, int]:
    """A value of `size` examples, with an axis of examples alone, and that axis.

    It is the one along which the value of one example is shorter, whatever the network did to
    layouts.

    Args:
        name: Name of the site.
        value: Its value.
        single: The shape of the value of one example.
        size: Number of examples.

    Raises:
        ValueError: If there is no such axis.
    """
    many = value.shape
    if size == 1 and many == single:
        return value[None], 0
    axes = [a for a, (n, m) in enumerate(zip(many, single, strict=False)) if n != m]
    if len(many) != len(single) or len(axes) != 1 or many[axes[0]] != size * single[axes[0]]:
        raise ValueError(
            f'site "{name}" has shape {list(many)} at {size} examples and {list(single)} at one: '
            "no axis of it holds the examples; leave it out of `sites`"
        )
    (axis,) = axes
    if single[axis] > 1:
        # Examples were merged with positions, as by x.reshape(-1, features): they are outermost.
        value = value.reshape(*many[:axis], size, *single[axis:])
    return value, axis
