"""Meshes over which batches are sharded: placing models beside them, and gathering results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vfjax._trees import native
from vfjax._trees.concrete import check_host, check_one_device
from vfjax._types import PyTree


def replicate(tree: PyTree, mesh: Any) -> PyTree:
    """Places every leaf that is not yet on the mesh on all of its devices."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        there = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return leaf if there else jax.device_put(native(leaf), everywhere)

    return jax.tree.map(place, tree)


def on_meshes(xs: Iterable[PyTree], given: PyTree) -> Iterator[tuple[Any, PyTree, PyTree]]:
    """For every batch: its mesh, the given tree placed on that mesh, and the batch.

    Raises:
        TypeError: If a batch, the tree or the call is traced, as inside `jit`, or the tree holds
            shapes alone.
        ValueError: If the tree and the first batch lie on different devices, and on no mesh.
    """
    check_host("passes over data measure", models=given)
    mesh, placed, first = None, given, True
    for x in xs:
        its_mesh = mesh_of(x)
        if first:
            check_host("passes over data measure", data=x)
            if its_mesh is None:
                check_one_device(models=given, data=x)
        first = False
        if its_mesh is not None and its_mesh != mesh:
            mesh, placed = its_mesh, replicate(given, its_mesh)
        elif its_mesh is None and mesh is not None:
            # A ragged last batch may not divide by the number of devices, so every device gets it.
            x = replicate(x, mesh)
        yield mesh, placed, x


def on_mesh(fn: Any, mesh: Any) -> Any:
    """Wraps a function so that its results are replicated over a mesh, in any axis mode."""
    if mesh is None:
        return fn
    everywhere = NamedSharding(mesh, PartitionSpec())
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in types if kind == AxisType.Explicit)
    if explicit:
        # Under explicit axes every contraction over samples, including those inside the network,
        # would have to specify the sharding of its result.
        return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=everywhere)
    return lambda *args: jax.lax.with_sharding_constraint(fn(*args), everywhere)


def mesh_of(x: PyTree) -> Any:
    """The mesh over which a batch is sharded, or None."""
    for leaf in jax.tree.leaves(x):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None
