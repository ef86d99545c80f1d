"""What the rooms above ask of the inside of a traced network.

They see trees, paths, names of sites and equal or unequal values, never a graph or a trace, so that
how a network keeps these can change here and in `_retrace`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from vfjax._analysis import culprit, separable, view_of
from vfjax._jaxpr import INPUT
from vfjax._jaxpr.primitives import SUMS
from vfjax._trees import leaf_paths
from vfjax._types import Array, PyTree
from vfjax.network._fold import fold
from vfjax.network._retrace import traces_of
from vfjax.network._sites import locate
from vfjax.network._stored import Part as Part

if TYPE_CHECKING:
    from vfjax.network._network import Network

# ------------------------------------------------------------------------------------------- trees


def tree_of(net: Network, leaves: Mapping[str, Any]) -> PyTree:
    """A tree of the network's variables from leaves by path; those that are missing are None."""
    return jax.tree.unflatten(traces_of(net).treedef, [leaves.get(path) for path in net.paths])


def has_structure(net: Network, tree: Any) -> bool:
    """Whether something has the leaves of the network's variables, in whatever containers."""
    return sorted(leaf_paths(tree)) == sorted(net.paths)


def bias_of(net: Network, layer: str) -> Part | None:
    """The bias of a layer, or None if it has none that is a leaf."""
    path, view = net.layer(layer).bias, traces_of(net).reference.layers[layer].bias
    return None if path is None or view is None else Part(path, view.slot)


def folded(
    net: Network, leaves: Mapping[str, Any], layer: str, scale: Array, shift: Array | None
) -> dict[str, Any]:
    """Leaves by path, with a correction of a layer folded in as by `Network.fold`.

    Raises:
        FoldError: If the correction cannot be folded, or the leaf to fold it into is missing.
    """
    return fold(traces_of(net).reference, leaves, layer, scale, shift)


# ------------------------------------------------------------------------------------------ batches


def widest(net: Network, leaves: Mapping[str, Any], x: PyTree) -> int:
    """Bytes of the largest value that depends on the input, for these leaves and this batch."""
    return traces_of(net).at(leaves, x).widest


def may_be_cut(net: Network, leaves: Mapping[str, Any], x: PyTree, size: int) -> bool:
    """Whether pieces of `size` examples of a batch give what the whole batch does."""
    part = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), x)
    try:
        piece = traces_of(net).at(leaves, part)
    except Exception:  # the function may take batches of this size only, and raise anything
        return False
    return separable(traces_of(net).at(leaves, x).graph, piece.graph)


# ------------------------------------------------------------------------------------------- values


def value_of(net: Network, site: str) -> int | Literal["input", "output"]:
    """Identifies the value at a site: several names may stand for one value."""
    if site == "input" or site == "output":
        return site
    return locate(net, traces_of(net).reference, site)[0]


def output_of(net: Network) -> PyTree:
    """The output at the traced input: a tree of `jax.ShapeDtypeStruct`s."""
    traced = traces_of(net).reference
    avals = [traced.graph.avals[v] if isinstance(v, int) else v.val for v in traced.graph.outputs]
    shapes = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in avals]
    return jax.tree.unflatten(traced.out_tree, shapes)


def is_output(net: Network, site: str) -> bool:
    """Whether the value at a site is the network's whole output."""
    return site == "output" or traces_of(net).reference.graph.outputs == (value_of(net, site),)


def ends_stem(net: Network, layer: str, depth: int) -> bool:
    """Whether the stem of a cut ends with a layer: its pre-activation is averaged at the cut."""
    return traces_of(net).reference.ranks.get(layer) == depth


def ranks_of(net: Network, layers: Collection[str], norms: Collection[str]) -> list[list[str]]:
    """Orders layers and norms in ranks: what one rank reads depends on earlier ranks only.

    A norm that directly follows one of the layers has that layer's rank.
    """
    traced = traces_of(net).reference
    graph = traced.graph
    reads, makes = {}, {}
    for name in layers:
        reads[name] = traced.layers[name].preactivation
        makes[name] = graph.producer[reads[name]]
    for name in norms:
        makes[name] = traced.norms[name].index
        reads[name] = traced.norms[name].input
    rank: dict[str, int] = {}
    for name in sorted(makes, key=makes.__getitem__):
        before = net.norm(name).layer if name in norms else None
        if before is not None and before in layers:
            rank[name] = rank[before]
            continue
        needed = set(graph.needed([reads[name]], ()))
        rank[name] = 1 + max((rank[n] for n in rank if makes[n] in needed), default=-1)
    return [[n for n in rank if rank[n] == k] for k in range(1 + max(rank.values(), default=-1))]


# ---------------------------------------------------------------------------------- affine networks


def why_not_affine(net: Network) -> str | None:
    """Why a network is not known to be affine in its input, as a clause; None if it is."""
    graph = traces_of(net).reference.graph
    obstacle = culprit(graph, _inputs(net))
    return None if obstacle is None else obstacle.why


def added_parts(net: Network) -> dict[Part, list[int]]:
    """Leaves that are added to values that depend on the input, and where, for `reaches`.

    A leaf that also multiplies the input somewhere is left out: what it adds cannot be told apart.
    """
    traced = traces_of(net).reference
    graph = traced.graph
    added: dict[Part, list[int]] = {}
    for index, equation in enumerate(graph.equations):
        if equation.primitive not in SUMS or not equation.depends & INPUT:
            continue
        for value in equation.values:
            view = None if graph.depends[value] & INPUT else view_of(graph, value)
            if view is not None:
                added.setdefault(Part(traced.paths[view.leaf], view.slot), []).append(index)
    kept: dict[Part, list[int]] = {}
    for part, places in added.items():
        paths = {other.path for other in (*kept, part)}
        ids = zip(graph.inputs, traced.paths, strict=False)
        leaves = [value for value, path in ids if path in paths]
        if culprit(graph, [*_inputs(net), *leaves]) is None:
            kept[part] = places
    return kept


def reaches(net: Network, places: Sequence[int], site: str) -> bool:
    """Whether the value at a site depends on what is added at one of some places."""
    graph, value = traces_of(net).reference.graph, value_of(net, site)
    wanted = graph.output_ids if value == "output" else () if value == "input" else (value,)
    return not set(graph.needed(wanted, ())).isdisjoint(places)


def _inputs(net: Network) -> list[int]:
    graph = traces_of(net).reference.graph
    return [v for v in graph.inputs if graph.depends[v] & INPUT]
