"""The records of a traced network: layers, norms, taps, and what crosses a cut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._trees.mean import resolve_weights, weighted_mean
from vfjax._types import Array
from vfjax.symmetry._group_maps import check_matrix, contract
from vfjax.symmetry._places import (
    Axis,
    Place,
    Window,
    map_axis,
    map_within,
    moved,
    permute_at,
    size_at,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear or convolution layer: one operand made of parameters only, the other of the input.

    Attributes:
        name: Path of the leaf that is its kernel, such as `params/Conv_0/kernel`; `name#2` for the
            second use of a shared kernel, `layers/kernel[3]` in an unrolled scan.
        kernel: Path of the kernel's leaf; None if more than casts and layout lies between the leaf
            and the layer (a mask, a low-rank sum), in which case corrections stay explicit.
        bias: Path of the bias's leaf, or None.
        kind: `"dense"` or `"conv"`.
        depth: Number of layers on the longest path from the input up to and including this one.
        main: Whether it lies on a longest path from input to output; a shortcut does not.
        shape: Shape of the kernel as the layer uses it.
        output_shape: Shape of the pre-activation; axis 0 is the batch in most networks.
        channel_axes: Axes of the pre-activation that hold channels.
        sample_axes: Its other axes, over which statistics are taken.
        parameters: Number of entries of kernel and bias.
        flops: Operations per example: multiply-accumulates once, and a convolution's bias.
        group: Name of the permutation group of its (last free) output axis, or None.
        norm: Name of the normalisation with stored statistics that follows directly, or None.
        where: Source line, as `file:line`.
    """

    name: str
    kernel: str | None
    bias: str | None
    kind: str
    depth: int
    main: bool
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    sample_axes: tuple[int, ...]
    parameters: int
    flops: int
    group: str | None
    norm: str | None
    where: str

    @property
    def channels(self) -> int:
        """Number of channels of the pre-activation."""
        return int(np.prod([self.output_shape[a] for a in self.channel_axes]))

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Sizes of the pre-activation's channel axes: the shape of a scale or a shift."""
        return tuple(self.output_shape[a] for a in self.channel_axes)

    @property
    def tap(self) -> str:
        """Name of the site after the elementwise region that follows: `<layer>:act`."""
        return f"{self.name}:act"

    def affine(self, scale: Array, shift: Array) -> Callable[[Array], Array]:
        """The function `z -> scale * z + shift` on the pre-activation.

        Args:
            scale: Shaped like the channels.
            shift: Likewise.

        Returns:
            A function that computes in float32 or better and casts back.
        """

        def apply(z: Array) -> Array:
            dtype = jnp.promote_types(z.dtype, jnp.float32)
            a, b = (jnp.expand_dims(v, self.sample_axes).astype(dtype) for v in (scale, shift))
            return (z.astype(dtype) * a + b).astype(z.dtype)

        return apply


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation by stored statistics, `(x - mean) * rsqrt(var + eps) * scale + bias`.

    Attributes:
        name: Path of the leaf of means.
        mean: Path of the leaf of means.
        var: Path of the leaf of variances.
        scale: Path of the leaf of scales, or None.
        bias: Path of the leaf of shifts, or None.
        eps: What is added to the variance.
        input_shape: Shape of its input.
        channel_axes: Axes of its input that the statistics vary along.
        sample_axes: The other axes.
        layer: Name of the layer whose pre-activation it normalises directly, or None.
    """

    name: str
    mean: str
    var: str
    scale: str | None
    bias: str | None
    eps: float
    input_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    sample_axes: tuple[int, ...]
    layer: str | None

    @property
    def site(self) -> str:
        """Name of the site of its input: `<norm>:in`."""
        return f"{self.name}:in"


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where a permutation group shows in the activations.

    Attributes:
        name: Site name, `<layer>:act`.
        group: The group.
        axis: The axis of the value that holds it.
        outer: The axis is a row-major `(outer, n, inner)`; the group's n entries are in the middle.
        inner: See `outer`.
        windows: Segments of the axis to look into first, as in `vfjax.symmetry.Axis`.
    """

    name: str
    group: str
    axis: int
    outer: int = 1
    inner: int = 1
    windows: tuple[Window, ...] = ()


@dataclasses.dataclass(frozen=True)
class JointTap:
    """Where a group shows in the activations together with the one that it moves within.

    Attributes:
        name: Site name, `<layer>:act[<group> in <owner>]`.
        layer: Name of the layer.
        group: The group, such as the dims of heads.
        owner: The group that it is within, such as the heads.
        place: Where in the value the group lies, as for a leaf.
        around: Where its owner lies.
    """

    name: str
    layer: str
    group: str
    owner: str
    place: Axis
    around: Axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """The values that cross a cut, from stem to trunk.

    Attributes:
        values: Arrays, in the network's own order.
        depth: Depth of the cut.
        origin: What the network's input was, apart from its batch size.
    """

    values: tuple[Array, ...]
    depth: int = dataclasses.field(metadata={"static": True})
    origin: Hashable = dataclasses.field(default=None, metadata={"static": True}, repr=False)


def average(
    crossings: Sequence[Crossing], averaged: Sequence[bool], weights: Sequence[Any] | None
) -> Crossing:
    """See `Network.average_crossings`; `averaged` tells which values depend on parameters."""
    first = crossings[0]
    if len({c.depth for c in crossings}) > 1:
        raise ValueError(f"crossings are of different cuts: {[c.depth for c in crossings]}.")
    shapes = {tuple((jnp.shape(v), jnp.result_type(v)) for v in c.values) for c in crossings}
    if len({c.origin for c in crossings}) > 1 or len(shapes) > 1:
        raise ValueError(f"crossings are of different inputs; their shapes are {shapes}.")
    weights = resolve_weights(weights, len(crossings), of="crossings")
    values = []
    for mix, *column in zip(averaged, *(c.values for c in crossings), strict=True):
        dtype = column[0].dtype
        if not mix:
            values.append(column[0])
            continue
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"A value of dtype {dtype} that depends on parameters crosses the cut at depth "
                f"{first.depth}; models disagree on it, and it has no average. Cut elsewhere."
            )
        values.append(weighted_mean(column, weights))
    return Crossing(tuple(values), first.depth, first.origin)


def mapped(
    crossing: Crossing, places: Sequence[Sequence[Place]], maps: Mapping[str, Any]
) -> Crossing:
    """See `Network.map_crossing`; `places` are the groups of each value, with their places."""
    values = [
        mapped_value(value, found, maps)
        for value, found in zip(crossing.values, places, strict=True)
    ]
    return Crossing(tuple(values), crossing.depth, crossing.origin)


def mapped_value(value: Array, places: Sequence[Place], maps: Mapping[str, Any]) -> Array:
    """See `Network.map_site`; `places` are the groups of the value, those within others last."""
    todo = [place for place in places if place.group in maps]
    while todo:
        place, *todo = todo
        length, at = value.shape[place.at.axis], place.at
        found = maps[place.group]
        value = _mapped(value, place, found)
        if value.shape[at.axis] != length:
            move = functools.partial(moved, mapped=at, length=length, m=np.shape(found)[-2])
            todo = [Place(group, move(a), owner and move(owner)) for group, a, owner in todo]
    return value


def _mapped(value: Array, place: Place, found: Any) -> Array:
    group, at, owner = place
    if np.issubdtype(found.dtype, np.integer):
        return permute_at(value, at, owner, found)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise ValueError(
            f"A value of dtype {value.dtype} that carries the group {group!r} crosses the cut, and "
            "a matrix cannot map it. Cut elsewhere."
        )
    if owner is not None and np.ndim(found) == 3:
        return map_within(value, at, owner, lambda view, axis, i: contract(found[i], view, axis))
    check_matrix(group, found, size_at(group, at, value.shape))
    return map_axis(value, at, lambda view, axis: contract(found, view, axis))
