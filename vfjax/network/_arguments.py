"""Whether parameter trees fit a traced network, and each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vfjax._trees import paths
from vfjax._types import PyTree
from vfjax.network import _retrace
from vfjax.network._checks import check_variances
from vfjax.network._network import Network
from vfjax.network._sites import locate, source_of


def check_fits(
    net: Network,
    tree: PyTree,
    name: str,
    *,
    variances: bool = True,
    free: Collection[str] = frozenset(),
) -> None:
    """Checks that a tree has the leaves of a traced network's variables.

    Args:
        net: The traced network.
        tree: The tree.
        name: What to call it.
        variances: Whether it must have the stored variances, which merging may leave unknown.
        free: Paths of leaves that may have any shape.

    Raises:
        TypeError: If `net` is no traced network, or a leaf no array.
        ValueError: If leaves are missing or added, or differ in shape or dtype.
    """
    check_net(net)
    leaves, _ = paths.flatten_named(tree, name=name)
    like = {path: leaves.get(path, a) if path in free else a for path, a in net._avals.items()}
    if variances:
        check_variances(net, [path for path in like if path not in leaves], name)
    else:
        unknown = {norm.var for norm in net.norms} - leaves.keys()
        like = {path: aval for path, aval in like.items() if path not in unknown}
    paths.check_like(leaves, like, name=name, other="the traced network's variables")


def check_models(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    *,
    free: Collection[str] = frozenset(),
    name: str = "trees",
    variances: bool = True,
) -> None:
    """Checks that trees fit their networks and, but for some leaves, each other.

    Args:
        net: The traced network, or one per tree.
        trees: The trees.
        free: Paths of leaves that may differ in shape between trees of one network.
        name: What to call the trees.
        variances: Whether they must have all stored variances; see `check_fits`.

    Raises:
        TypeError: If there is no sequence of trees, or a leaf is no array.
        ValueError: If they do not fit, or hold NaN or infinite values.
    """
    paths.check_sequence(trees, name=name)
    nets = networks(net, len(trees))
    if all(own is nets[0] for own in nets) and not free:
        as_trees(trees, name=name)
        check_fits(nets[0], trees[0], f"{name}[0]", variances=variances)
        return
    apart = len(set(nets)) > 1
    for k, (own, tree) in enumerate(zip(nets, trees, strict=True)):
        label = f"{name}[{k}]"
        leaves, _ = paths.flatten_named(tree, name=label)
        paths.check_finite(leaves, name=label)
        check_fits(own, tree, label, variances=variances, free=() if apart else free)
        if not apart:
            _check_run(own, leaves, label)


def check_comparable(
    net: Network | Sequence[Network], trees: Sequence[PyTree], sites: Collection[str]
) -> None:
    """Checks that the values of models at some sites can be compared, channel by channel.

    What these depend on must be alike. Other leaves, such as those of heads with classes of their
    own, may differ in shape, and with networks of their own in all.

    Args:
        net: The traced network, or one per tree.
        trees: The trees.
        sites: Names of sites, as in `Network.run`.

    Raises:
        TypeError: If there is no sequence of trees, or a leaf is no array.
        ValueError: If they do not fit, or hold NaN or infinite values.
    """
    paths.check_sequence(trees, name="trees")
    nets = networks(net, len(trees))
    flats = [paths.flatten_named(tree, name=f"trees[{k}]")[0] for k, tree in enumerate(trees)]
    shapes = [{path: np.shape(leaf) for path, leaf in flat.items()} for flat in flats]
    apart = any(own is not nets[0] for own in nets)
    if not apart and all(found == shapes[0] for found in shapes):
        paths.check_trees(trees)
        return
    read = leaves_before(nets[0], sites)
    like = {path: leaf for path, leaf in flats[0].items() if path in read}
    for k, (own, flat) in enumerate(zip(nets, flats, strict=True)):
        label = f"trees[{k}]"
        paths.check_finite(flat, name=label)
        seen = read if own is nets[0] else leaves_before(own, sites)
        mine = {path: leaf for path, leaf in flat.items() if path in seen}
        paths.check_like(mine, like, name=label, other="trees[0]")
        if apart:
            check_fits(own, trees[k], label)
        else:
            rest = {path: leaf for path, leaf in flat.items() if path not in read}
            paths.check_like(flat, {**flats[0], **rest}, name=label, other="trees[0]")
            _check_run(own, flat, label)


def leaves_before(net: Network, sites: Collection[str]) -> frozenset[str]:
    """Paths of the leaves that the values at some sites depend on.

    Args:
        net: The traced network.
        sites: Names of sites, as in `Network.run`.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], v, jnp.ones((1, 3)))
        >>> [sorted(leaves_before(net, [site])) for site in ("input", "a", "output")]
        [[], ['a'], ['a', 'b']]
    """
    traced = net._reference
    sources = {source_of(net, traced, site) for site in sites}
    values = [locate(net, traced, site)[0] for site in sources - {"input", "output"}]
    values += traced.graph.output_ids if "output" in sources else ()
    return traced.leaves_of(traced.graph.needed(values, ()), values)


def _check_run(net: Network, leaves: Mapping[str, Any], name: str) -> None:
    """Checks that the traced function takes leaves of other shapes than it was traced with."""
    try:
        net._traces.at(leaves, net.x)
    except Exception as error:
        raise ValueError(
            f"{name} differs in shape from what net was traced with, and its apply_fn does not "
            f"take that ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Models whose "
            "apply_fn differ, as Flax modules with other numbers of classes do, need a network "
            "each: net=[vfjax.trace(...), ...]"
        ) from error


def as_trees(trees: Sequence[PyTree], *, name: str = "trees") -> tuple[PyTree, ...]:
    """Checks that an argument is a sequence of alike trees; returns it as a tuple.

    Args:
        trees: What the caller gave.
        name: How the caller calls it.

    Returns:
        The trees.

    Raises:
        TypeError: If it is no list or tuple, such as one tree by itself.
        ValueError: If it is empty, or the trees are not alike, or hold NaN or infinite values.
    """
    paths.check_trees(trees, name=name)
    return tuple(trees)


def check_net(net: Any, *, other: str = "") -> None:
    """Raises a TypeError unless `net` is a `Network`.

    Args:
        net: What the caller gave.
        other: What else it may be, for the message: "or a PermutationSpec".
    """
    if not isinstance(net, Network):
        raise TypeError(
            f"net must be a Network{f' {other}' if other else ''}; it was a {type(net).__name__}. "
            "Trace the function that applies the model: net = vfjax.trace(apply_fn, variables, x)."
        )


def networks(net: Any, models: int) -> tuple[Network, ...]:
    """One network per model, of a `net` argument that may be one for all of them.

    Args:
        net: A `Network`, or a sequence of one per model: networks of one architecture that differ
            in widths or numbers of classes.
        models: How many models there are.

    Returns:
        As many networks.

    Raises:
        TypeError: If one is no `Network`.
        ValueError: If there are not as many, or their layers, norms, groups or inputs differ.
    """
    if isinstance(net, Network):
        return (net,) * models
    if not isinstance(net, (list, tuple)):
        check_net(net, other="or a sequence of one per model")
    nets = tuple(net)
    for found in nets:
        check_net(found, other="or a sequence of one per model")
    if len(nets) != models:
        raise ValueError(f"net has {len(nets)} networks for {models} trees; give one per tree")

    def facts(net: Network) -> dict[str, Any]:
        return {
            "layers": [(a.name, a.kind, a.depth, a.main) for a in net.layers],
            "norms": [norm.name for norm in net.norms],
            "groups": list(net.spec.groups),
            "inputs": _retrace.origin_of(net.x),
        }

    first = facts(nets[0])
    for k, other in enumerate(nets[1:], start=1):
        for what, value in facts(other).items():
            if other is not nets[0] and value != first[what]:
                raise ValueError(
                    f"net[{k}] has other {what} than net[0]: merged models must share one "
                    f"architecture, but for widths and classes. They are {value} and {first[what]}."
                )
    return nets
