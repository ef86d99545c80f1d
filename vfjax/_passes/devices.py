"""Meshes over which batches are sharded: what goes with a batch, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vfjax._types import PyTree


def replicate(tree: PyTree, mesh: Any) -> PyTree:
    """Places every leaf that is not on the mesh yet on all of its devices."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        there = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return leaf if there else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, tree)


def on_meshes(xs: Iterable[PyTree], given: PyTree) -> Iterator[tuple[Any, PyTree, PyTree]]:
    """The mesh of every batch, what is given placed on it, and the batch."""
    mesh, placed = None, given
    for x in xs:
        found = mesh_of(x)
        if found is not None and found != mesh:
            mesh, placed = found, replicate(given, found)
        elif found is None and mesh is not None:
            # A ragged last batch need not divide by the devices.
            x = replicate(x, mesh)
        yield mesh, placed, x


def on_mesh(fn: Any, mesh: Any) -> Any:
    """Makes a function's results whole on every device of a mesh, whatever the mode of its axes."""
    if mesh is None:
        return fn
    everywhere = NamedSharding(mesh, PartitionSpec())
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in types if kind == AxisType.Explicit)
    if explicit:
        # Under explicit axes every contraction over samples, the network's own included, would
        # have to say how its result is sharded.
        return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=everywhere)
    return lambda *args: jax.lax.with_sharding_constraint(fn(*args), everywhere)


def mesh_of(x: PyTree) -> Any:
    """The mesh over which a batch is sharded, or None."""
    for leaf in jax.tree.leaves(x):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None
