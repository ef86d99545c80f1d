"""What diagnosis compares: merged networks and their references, checked, in one basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vfjax._maps.maps import Maps
from vfjax._trees.paths import check_finite, flatten_named
from vfjax._types import PyTree
from vfjax.diagnose import _rows
from vfjax.merge._arguments import check_merged
from vfjax.merge._merged import Merged
from vfjax.network._arguments import check_fits, check_models, networks
from vfjax.network._network import Network


def compared(
    net: Network | Sequence[Network], variables: Any, references: Any
) -> tuple[tuple[Network, ...], tuple[PyTree | Merged, ...], tuple[PyTree | Merged, ...]]:
    """Networks to measure and to compare with, checked.

    Args:
        net: As in `features`.
        variables: As in `features`.
        references: As in `features`; may be empty.

    Returns:
        The traced networks, of the references where there are any, and first of all that of the
        variables; the variables; the references.

    Raises:
        TypeError: If `net` is no traced network, or a leaf no array.
        ValueError: If something does not fit, or holds NaN or infinite values.
    """
    nets = networks(net, len(net) if isinstance(net, (list, tuple)) else 1)
    mine = as_networks(net, variables, "variables")
    if not _given(references):
        return nets, mine, ()
    others, labels = _listed(nets[0], references, "references")
    if any(isinstance(other, Merged) for other in others):
        return nets[:1] * len(others), mine, as_networks(net, references, "references")
    merged = [network for network in mine if isinstance(network, Merged)]
    if isinstance(net, Network):
        own = (m.nets for m in merged if len(m.nets) == len(others))
        nets = networks(next(own, net), len(others))
    else:
        nets = networks(net, len(others))
    heads = [nets[0].head_leaves(m.cut, m.end) for m in merged if m.end is not None]
    free = frozenset.intersection(*heads) if heads else frozenset()
    if free or any(own is not nets[0] for own in nets):
        check_models(nets, others, free=free, name="references")
    else:
        _check_trees(nets[0], others, labels)
    return nets, mine, others


def as_networks(
    net: Network | Sequence[Network], given: Any, name: str
) -> tuple[PyTree | Merged, ...]:
    """One network or several, checked: trees of a traced network's variables, or `Merged`s.

    Args:
        net: The traced network, or those of a `Merged`, of which the first is that of trees.
        given: A tree, a `Merged`, or a sequence of such. What has the structure of the traced
            variables is one tree, even if that is a list.
        name: The caller's name for it.

    Raises:
        TypeError: If `net` is no traced network, or a leaf no array.
        ValueError: If a tree does not fit the network or holds NaN or infinite values, or there is
            none.
    """
    first = networks(net, len(net) if isinstance(net, (list, tuple)) else 1)[0]
    found, labels = _listed(first, given, name)
    for label, network in zip(labels, found, strict=True):
        if isinstance(network, Merged):
            check_merged(net, network)
            network.check(label)
        else:
            _check_trees(first, [network], [label])
    return found


def _listed(net: Network, given: Any, name: str) -> tuple[tuple[Any, ...], list[str]]:
    """What is one network or a sequence of such, as a tuple, and what to call each."""
    one = isinstance(given, Merged) or jax.tree.structure(given) == net._treedef
    if one or not isinstance(given, (list, tuple)):
        return (given,), [name]
    if not given:
        raise ValueError(f"{name} is empty; give at least one tree, or a Merged")
    return tuple(given), [f"{name}[{k}]" for k in range(len(given))]


def _check_trees(net: Network, trees: Sequence[PyTree], labels: Sequence[str]) -> None:
    for tree, label in zip(trees, labels, strict=True):
        check_fits(net, tree, label)
        check_finite(flatten_named(tree, name=label)[0], name=label)


def carry(
    nets: Sequence[Network],
    merged: Sequence[PyTree | Merged],
    edges: Sequence[PyTree | Merged],
    maps: Maps | None,
) -> tuple[Any, ...]:
    """Merged networks and edge models, whose values count in the basis of the merge.

    What is the models' own, in edge models and in stems and heads, is mapped there.

    Args:
        nets: The traced network of every edge model, the first that of the merged networks.
        merged: Trees, or `Merged`s.
        edges: Likewise.
        maps: What maps the edge models, as trees; None where they are in that basis already.

    Raises:
        TypeError: If `maps` is no `Maps`.
        ValueError: If there are not as many trees as it maps, or it does not fit the network.
    """
    if maps is None:
        others = (
            edge if own is nets[0] else _rows.Carried(edge, (), own)
            for own, edge in zip(nets, edges, strict=False)
        )
        return (*merged, *others)
    if not isinstance(maps, Maps):
        raise TypeError(f"maps must be a vfjax.align.Maps, got a {type(maps).__name__}")
    if any(isinstance(network, Merged) for network in edges):
        raise ValueError("maps carry edge models, and references has a Merged; give trees")
    maps.check(nets[: len(edges)], len(edges))
    # Stems and heads are permuted already.
    mixing = tuple({g: jnp.asarray(pair[0]) for g, pair in of.items()} for of in maps.mixing)
    merging = [{g: jnp.asarray(m) for g, m in of.items()} for of in maps.merging]
    mine = (
        _rows.Carried(network, mixing, network.net)
        if isinstance(network, Merged) and (network.stems or network.heads)
        else network
        for network in merged
    )
    others = (
        _rows.Carried(maps.in_units(own, edge), (of,), own)
        for own, edge, of in zip(nets, edges, merging, strict=True)
    )
    return (*mine, *others)


def _given(references: Any) -> bool:
    """Whether there are references: an empty list is none, a single tree an error further on."""
    return references is not None and not (
        isinstance(references, (list, tuple)) and len(references) == 0
    )
