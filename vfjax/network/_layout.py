"""How the value of a site is laid out: which axes hold channels, samples and examples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from vfjax._types import Array
from vfjax.network import _sites
from vfjax.network._records import JointTap, Tap
from vfjax.network._retrace import traces_of
from vfjax.symmetry._places import Axis, Place, grid, rows

if TYPE_CHECKING:
    from vfjax.network._network import Network


class Layout(NamedTuple):
    """How a site is read: what to capture, and which of its axes are channels.

    Hashable, so that it can be a static argument of `jit`, and equal for networks that lay out
    their values in the same way.
    """

    name: str
    source: str
    # Where the channels lie, if the value is first viewed as `[before, n, after]`, whose axes
    # `keep` then counts; None leaves the value as it is.
    split: Axis | None
    # Channel axes; None for all but the first.
    keep: tuple[int, ...] | None
    # Which group lies along which channel axis, counted among the channel axes only.
    groups: tuple[Place, ...]
    # Where the owners lie, if the value is first viewed as `[owners * n, rest]`; else None.
    around: Axis | None = None


def layout_of(net: Network, name: str) -> Layout:
    """The layout of a site by its name; a tap of one group, or part of a tap, is read by group.

    Raises:
        ValueError: If the network has no such site.
    """
    site = net.sites.get(name)
    if site is None:
        raise ValueError(_sites.unknown(net, "site", name, list(net.sites)))
    tap = site.tap
    if isinstance(tap, Tap):
        return Layout(name, site.source, tap.place, (1,), (Place(tap.group, Axis("", 0)),))
    if isinstance(tap, JointTap):
        h, n = net.spec.sizes[tap.owner], net.spec.sizes[tap.group]
        owner = Place(tap.owner, Axis("", 0, inner=n))
        groups = owner, Place(tap.group, Axis("", 0, outer=h), owner.at)
        return Layout(name, site.source, tap.place, (0,), groups, tap.around)
    keep = _sites.channel_axes(net, name)
    return Layout(name, name, None, keep, () if keep is None else _groups(net, name, keep))


def whole_layout(net: Network, name: str) -> Layout:
    """The layout of a whole value by its channel axes, whichever groups it shows."""
    return Layout(name, name, None, _sites.channel_axes(net, name), ())


def _groups(net: Network, name: str, keep: tuple[int, ...]) -> tuple[Place, ...]:
    """Which of a site's channel axes carry which group.

    Groups within others come last, since maps inside the others' entries count these in their new
    order.
    """
    places = []
    for group, at, owner in net.places(name):
        if at.axis not in keep:
            continue
        if not {dim for dim, _ in at.entries} <= {*keep}:
            continue  # samples of several entries of a stack, each with units in another order
        if owner is not None:
            owner = _among(owner, keep) if owner.axis in keep else None
        places.append(Place(group, _among(at, keep), owner))
    return tuple(places)


def _among(at: Axis, keep: tuple[int, ...]) -> Axis:
    """A place with its dimensions counted among the channel axes."""
    entries = tuple((keep.index(dim), index) for dim, index in at.entries)
    return at._replace(axis=keep.index(at.axis), entries=entries)


def as_float(value: Any, name: str) -> Array:
    """A site's value in float32 or better.

    Raises:
        TypeError: If it is not one array, or holds complex numbers.
    """
    if not hasattr(value, "dtype"):
        raise TypeError(
            f'site "{name}" holds a {type(value).__name__} of arrays; statistics need one array'
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(
            f'site "{name}" holds complex numbers ({value.dtype}), and statistics are of real '
            "ones: name real sites in `sites`, or match weights (vfjax.align.match_weights), which "
            "may be complex"
        )
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def arrange(value: Any, layout: Layout) -> tuple[Array, tuple[int, ...]]:
    """A site's value in float32 or better, with separate channel axes, and its sample axes."""
    value = as_float(value, layout.name)
    if layout.split is not None and layout.around is not None:
        value = grid(value, layout.split, layout.around)
        value = value.reshape(-1, value.shape[-1])
    elif layout.split is not None:
        value = rows(value, layout.split)
    return value, sample_axes(layout, value.ndim)


def arrange_valid(valid: Array, layout: Layout, shape: tuple[int, ...]) -> Array:
    """What counts of a site's value, laid out as `arrange` lays out the value.

    Args:
        valid: Booleans of the value's rank, of size 1 along axes where nothing varies.
        layout: The layout.
        shape: Shape of the value before it is arranged.

    Returns:
        Booleans of the arranged value's rank, of size 1 along channel axes unless what counts
        varies from channel to channel.
    """
    if layout.split is None:
        return valid
    whole = jnp.broadcast_to(valid, shape)
    varies = valid.shape[layout.split.axis] > 1
    if layout.around is not None:
        whole = grid(whole, layout.split, layout.around)
        whole = whole.reshape(-1, whole.shape[-1])
        return whole if varies or valid.shape[layout.around.axis] > 1 else whole[:1]
    whole = rows(whole, layout.split)
    return whole if varies else whole[:, :1]


def sample_axes(layout: Layout, ndim: int) -> tuple[int, ...]:
    """The sample axes of an arranged value."""
    keep = range(1, ndim) if layout.keep is None else layout.keep
    return tuple(a for a in range(ndim) if a not in keep)


def by_channel(value: Array, samples: tuple[int, ...]) -> Array:
    """A value as `[samples, channels]`, given its sample axes."""
    channels = [a for a in range(value.ndim) if a not in samples]
    width = math.prod(value.shape[a] for a in channels)
    count = math.prod(value.shape[a] for a in samples)
    return value.transpose(*samples, *channels).reshape(count, width)


def by_example(name: str, value: Array, single: tuple[int, ...], size: int) -> tuple[Array, int]:
    """A value of `size` examples with a separate axis of examples, and that axis.

    Whatever the network did to layouts, it is the axis along which the value of one example is
    shorter.

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
        # Examples and positions share an axis, as after x.reshape(-1, features); examples are
        # outermost.
        value = value.reshape(*many[:axis], size, *single[axis:])
    return value, axis


def check_operand(net: Network, name: str) -> None:
    """Checks that the array that a layer reads has its examples along a sample axis.

    A function that takes batches of one size only passes unchecked.

    Raises:
        ValueError: If the layer contracts the examples, or none of its axes holds them.
    """
    site, traced = net.sites[name], traces_of(net).reference
    if site.kind != "operand":
        return

    def shape(traced: Any) -> tuple[int, ...]:
        return traced.graph.avals[_sites.locate(net, traced, name)[0]].shape

    longer = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((a.shape[0] + 1, *a.shape[1:]), a.dtype), net.x
    )
    try:
        other = shape(traces_of(net).at(traces_of(net).avals, longer))
    except Exception:  # the function may take batches of one size only, and raise anything
        return
    keep = _sites.channel_axes(net, name) or ()
    varying = [a for a, (n, m) in enumerate(zip(shape(traced), other, strict=True)) if n != m]
    if not varying or set(varying) & set(keep):
        raise ValueError(
            f"site '{name}' cannot be measured: the layer '{site.of}' reads an array of shape "
            f"{list(shape(traced))} whose axes {list(keep)} it contracts, and "
            + ("the examples are among them" if varying else "no axis of it holds the examples")
            + f"; measure its pre-activation, '{site.of}'"
        )
