"""Turns what a trace found into the public records: layers, norms and taps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vfjax._analysis.traced import Traced
from vfjax._analysis.views import View
from vfjax._records import JointTap, Layer, Norm, Tap
from vfjax.symmetry._places import Axis

Axes = Mapping[int, Sequence[Sequence[Any]]]


def describe_layer(
    traced: Traced, name: str, *, batch: int, axes: Axes, groups: Mapping[int, str]
) -> Layer:
    """The record of a layer.

    Args:
        traced: The trace.
        name: The layer.
        batch: Number of examples of its input.
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
        kind="conv" if equation.primitive == "conv_general_dilated" else "dense",
        depth=traced.depth_of(site),
        main=traced.is_main(site),
        shape=tuple(graph.avals[equation.values[site.side]].shape),
        output_shape=tuple(shape),
        channel_axes=site.channel_axes,
        sample_axes=tuple(a for a in range(len(shape)) if a not in site.channel_axes),
        parameters=sum(_size(traced, v) for v in (site.kernel, site.bias) if v is not None),
        flops=flops // batch,
        group=next((n for n in reversed(names) if n is not None), None),
        norm=traced.norm_after(site),
        where=equation.where,
    )


def describe_norm(traced: Traced, name: str) -> Norm:
    """The record of a normalisation with stored statistics."""
    site = traced.norms[name]
    shape = traced.graph.avals[traced.graph.equations[site.index].values[0]].shape
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
    )


def describe_taps(traced: Traced, *, axes: Axes, groups: Mapping[int, str]) -> tuple[Tap, ...]:
    """Where each group shows: one record per value and group."""
    found: dict[tuple[int, str], Tap] = {}
    for name, value in traced.taps.items():
        for axis, atoms in enumerate(axes.get(value, ())):
            for atom in atoms:
                group = groups.get(atom.group)
                if group is not None and (value, group) not in found:
                    where = atom.outer, atom.inner, atom.windows
                    found[value, group] = Tap(f"{name}:act", group, axis, *where)
    return tuple(found.values())


def describe_joint_taps(traced: Traced, within: Mapping[str, str]) -> tuple[JointTap, ...]:
    """Where groups show inside the entries of those that they are within."""
    found: dict[tuple[int, Axis], JointTap] = {}
    names: set[str] = set()
    for layer, value in traced.taps.items():
        for group, place, around in traced.places(value):
            if around is None or (value, place) in found:
                continue
            owner = within[group]
            base = name = f"{layer}:act[{group} in {owner}]"
            count = 1
            while name in names:
                count += 1
                name = f"{base}#{count}"
            names.add(name)
            found[value, place] = JointTap(name, layer, group, owner, place, around)
    return tuple(found.values())


def _path(traced: Traced, view: View | None) -> str | None:
    return None if view is None else traced.paths[view.leaf]


def _size(traced: Traced, view: View) -> int:
    shape = traced.graph.avals[traced.graph.inputs[view.leaf]].shape
    return math.prod(shape[view.slot is not None :])
