"""The records of a traced network: layers, norms and taps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfjax._analysis import Traced, View
from vfjax._deprecated import OldName, renamed_fields
from vfjax._jaxpr.primitives import CONV
from vfjax._types import Array
from vfjax.symmetry._places import (
    Axis,
    Window,
)


@renamed_fields(parameters="params")
@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear or convolution layer, of a parameter-only kernel and a value that depends on x.

    Attributes:
        name: Path of the leaf that is its kernel, such as `params/Conv_0/kernel`; `name#2` for the
            second use of a shared kernel, `layers/kernel[3]` in an unrolled scan.
        kernel: Path of the kernel's leaf; None if more than casts and layout lies between the leaf
            and the layer (a mask, a low-rank sum), in which case corrections stay explicit.
        bias: Path of the bias's leaf, or None.
        kind: `"dense"` or `"conv"`.
        depth: Number of layers on the longest path from the input up to and including this one.
        main: Whether it lies on a longest path from input to output; shortcuts and the branches to
            other outputs do not.
        shape: Shape of the kernel as the layer uses it.
        output_shape: Shape of the pre-activation; axis 0 is the batch in most networks.
        channel_axes: Axes of the pre-activation that hold channels.
        sample_axes: Its other axes, over which statistics are taken.
        params: Number of entries of kernel and bias.
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
    params: int
    flops: int
    group: str | None
    norm: str | None
    where: str

    parameters = OldName("params")

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
            scale: Array of shape `channel_shape`.
            shift: The same.

        Returns:
            A function that computes in float32 or better and casts back. It raises a TypeError for
            complex corrections of a real pre-activation.
        """

        def apply(z: Array) -> Array:
            dtype = jnp.promote_types(z.dtype, jnp.float32)
            if jnp.iscomplexobj(scale + shift) and not jnp.iscomplexobj(z):
                raise TypeError(f"'{self.name}' is real, and its correction holds complex numbers")
            a, b = (jnp.expand_dims(v, self.sample_axes).astype(dtype) for v in (scale, shift))
            return (z.astype(dtype) * a + b).astype(z.dtype)

        return apply


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalisation by stored statistics, `(x - mean) * rsqrt(var + eps) * scale + bias`.

    It may be written in any way that computes this, as `x * a + (bias - mean * a)`, and the leaves
    of statistics may be multiplied by scalars of the parameters, as where averages are debiased.

    Attributes:
        name: Path of the leaf of means.
        mean: Path of the leaf of means.
        var: Path of the leaf of variances, or of standard deviations.
        scale: Path of the leaf of scales, or None.
        bias: Path of the leaf of shifts, or None.
        eps: The number added to the variance, or to the standard deviation.
        input_shape: Shape of its input.
        channel_axes: Axes of its input that the statistics vary along.
        sample_axes: The other axes.
        layer: Name of the layer whose pre-activation it normalises directly, or None.
        deviations: Whether `var` holds standard deviations.
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
    deviations: bool = False

    @property
    def site(self) -> str:
        """Name of the site of its input: `<norm>:in`."""
        return f"{self.name}:in"


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where a permutation group shows in the activations.

    Attributes:
        name: Site name, `<layer>:act`, or `<leaf>:loop` for what a loop returns.
        group: The group.
        axis: The axis of the value that holds it.
        outer: The axis is a row-major `(outer, n, inner)`; the group's n entries are in the middle.
        inner: See `outer`.
        windows: Segments of the axis to look into first, as in `vfjax.symmetry.Axis`.
        entries: The entries of a stack in which it shows, as in `vfjax.symmetry.Axis`.
    """

    name: str
    group: str
    axis: int
    outer: int = 1
    inner: int = 1
    windows: tuple[Window, ...] = ()
    entries: tuple[tuple[int, int], ...] = ()

    @property
    def place(self) -> Axis:
        """Where in the value the group lies, as for a leaf."""
        where = self.outer, self.inner, self.windows, self.entries
        return Axis("", self.axis, "elementwise", *where)


@dataclasses.dataclass(frozen=True)
class JointTap:
    """Where a group shows in the activations together with the group that it moves within.

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


Axes = Mapping[int, Sequence[Sequence[Any]]]


def describe_layer(
    traced: Traced, name: str, *, batch: int, axes: Axes, groups: Mapping[int, str]
) -> Layer:
    """The record of a layer.

    Args:
        traced: The trace.
        name: The layer.
        batch: Number of examples of the traced input.
        axes: Atoms of every axis, by value id.
        groups: Names of groups, by their id in `axes`.
    """
    graph, site = traced.graph, traced.layers[name]
    equation = graph.equations[site.index]
    shape = graph.avals[site.preactivation].shape
    flops = traced.flops(site.index)
    if site.bias_equation is not None:
        flops += traced.flops(site.bias_equation)
    atoms = axes.get(site.preactivation, ())
    names = [groups.get(t.group) for a in site.channel_axes if a < len(atoms) for t in atoms[a]]
    return Layer(
        name=name,
        kernel=_path(traced, site.kernel),
        bias=_path(traced, site.bias),
        kind="conv" if equation.primitive == CONV else "dense",
        depth=traced.depth_of(site),
        main=traced.is_main(site),
        shape=tuple(graph.avals[equation.values[site.side]].shape),
        output_shape=tuple(shape),
        channel_axes=site.channel_axes,
        sample_axes=tuple(a for a in range(len(shape)) if a not in site.channel_axes),
        params=sum(_size(traced, v) for v in (site.kernel, site.bias) if v is not None),
        flops=flops // batch,
        group=next((n for n in reversed(names) if n is not None), None),
        norm=traced.norm_after(site),
        where=equation.where,
    )


def describe_norm(traced: Traced, name: str) -> Norm:
    """The record of a normalisation with stored statistics."""
    site = traced.norms[name]
    shape = traced.graph.avals[site.input].shape
    before = (n for n, s in traced.layers.items() if traced.norm_after(s) == name)
    return Norm(
        name=name,
        mean=traced.paths[site.mean.leaf],
        var=traced.paths[site.var.leaf],
        scale=_path(traced, site.scale),
        bias=_path(traced, site.bias),
        eps=site.eps,
        input_shape=tuple(shape),
        channel_axes=site.channel_axes,
        sample_axes=tuple(a for a in range(len(shape)) if a not in site.channel_axes),
        layer=next(before, None),
        deviations=not site.deviation.of_variance,
    )


def describe_taps(traced: Traced, *, axes: Axes, groups: Mapping[int, str]) -> tuple[Tap, ...]:
    """Where each group shows: one record per value and group.

    What loops return counts for groups that show after no layer.
    """
    layers = {f"{name}:act": value for name, value in traced.taps.items()}
    taps = _taps(layers, axes, groups)
    shown = {tap.group for tap in taps}
    loops = _taps(traced.loops, axes, groups) if shown < {*groups.values()} else ()
    return (*taps, *(tap for tap in loops if tap.group not in shown))


def _taps(values: Mapping[str, int], axes: Axes, groups: Mapping[int, str]) -> tuple[Tap, ...]:
    taps: dict[tuple[int, str], Tap] = {}
    for name, value in values.items():
        for axis, atoms in enumerate(axes.get(value, ())):
            for atom in atoms:
                group = groups.get(atom.group)
                if group is not None and (value, group) not in taps:
                    where = atom.outer, atom.inner, atom.windows, atom.entries
                    taps[value, group] = Tap(name, group, axis, *where)
    return tuple(taps.values())


def describe_joint_taps(traced: Traced, within: Mapping[str, str]) -> tuple[JointTap, ...]:
    """Where groups show inside the entries of the groups that they are within."""
    taps: dict[tuple[int, Axis], JointTap] = {}
    names: set[str] = set()
    for layer, value in traced.taps.items():
        for group, place, around in traced.places(value):
            if around is None or (value, place) in taps:
                continue
            owner = within[group]
            base = name = f"{layer}:act[{group} in {owner}]"
            count = 1
            while name in names:
                count += 1
                name = f"{base}#{count}"
            names.add(name)
            taps[value, place] = JointTap(name, layer, group, owner, place, around)
    return tuple(taps.values())


def _path(traced: Traced, view: View | None) -> str | None:
    return None if view is None else traced.paths[view.leaf]


def _size(traced: Traced, view: View) -> int:
    shape = traced.graph.avals[traced.graph.inputs[view.leaf]].shape
    return math.prod(shape[view.slot is not None :])
