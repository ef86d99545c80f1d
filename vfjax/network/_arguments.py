"""Networks and trees that a public function takes, checked once: `Models`.

A public function first turns its `net` and `trees` into `Models`. The functions that it calls take
these, and neither check nor flatten a tree again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vfjax._trees import Flat, check_alike, check_finite, check_like, check_sequence, flatten_named
from vfjax._trees.concrete import check_host
from vfjax._types import PyTree
from vfjax.network._checks import check_variances
from vfjax.network._network import Network
from vfjax.network._retrace import origin_of, traces_of
from vfjax.network._sites import locate, source_of


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """Trees that fit their networks, flattened.

    Attributes:
        nets: The network of each tree; the first one represents all.
        trees: The trees.
        flats: The trees, flattened by path.
    """

    nets: tuple[Network, ...]
    trees: tuple[PyTree, ...]
    flats: tuple[Flat, ...]

    def __len__(self) -> int:
        """The number of models."""
        return len(self.trees)

    @property
    def net(self) -> Network:
        """The network of the first model."""
        return self.nets[0]

    @property
    def leaves(self) -> tuple[dict[str, Any], ...]:
        """The leaves of each tree by path."""
        return tuple(flat.leaves for flat in self.flats)

    @property
    def alike(self) -> bool:
        """Whether all trees have the same network and the same shapes."""
        shapes = [_shapes(leaves) for leaves in self.leaves]
        return all(net is self.net for net in self.nets) and all(s == shapes[0] for s in shapes)

    def pick(self, order: Sequence[int]) -> Models:
        """The models with some indices, in that order."""
        nets, trees, flats = self.nets, self.trees, self.flats
        return Models(
            tuple(nets[k] for k in order),
            tuple(trees[k] for k in order),
            tuple(flats[k] for k in order),
        )

    def one_by_one(self) -> list[Models]:
        """Each model as `Models` of one."""
        return [self.pick([k]) for k in range(len(self))]

    def become(self, trees: Sequence[PyTree]) -> Models:
        """Models of the same networks with other trees, such as mapped ones.

        Args:
            trees: One per model; trees that are the same objects are not flattened again.
        """
        flats = tuple(
            old if new is tree else flatten_named(new)
            for new, tree, old in zip(trees, self.trees, self.flats, strict=True)
        )
        return Models(self.nets, tuple(trees), flats)


def model_of(net: Network, tree: PyTree, name: str, *, variances: bool = True) -> Models:
    """One model, checked.

    Args:
        net: The `net` that the caller gave.
        tree: Its tree.
        name: What to call the tree in errors.
        variances: Whether it must have the stored variances, which merging may leave unknown.

    Returns:
        The model.

    Raises:
        TypeError: If `net` is not a traced network, or a leaf is not an array.
        ValueError: If the tree does not fit the network, or holds NaN or infinite values.
    """
    check_net(net)
    return fitting(net, tree, name, variances=variances)


def fitting(net: Network, tree: PyTree, name: str, *, variances: bool = True) -> Models:
    """Like `model_of`, for a `net` that is known to be a network."""
    flat = flatten_named(tree, name=name)
    check_fits(net, flat.leaves, name, variances=variances)
    check_finite(flat.leaves, name=name)
    return Models((net,), (tree,), (flat,))


def models_of(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    *,
    free: Collection[str] = frozenset(),
    name: str = "trees",
    variances: bool = True,
) -> Models:
    """Several models, checked to fit their networks and, except for some leaves, each other.

    Args:
        net: The traced network, or one per tree, as `networks` returns them.
        trees: The trees.
        free: Paths of leaves that may differ in shape between trees of one network.
        name: What to call the trees in errors.
        variances: As in `model_of`.

    Returns:
        The models.

    Raises:
        TypeError: If `trees` is not a sequence of trees, or a leaf is not an array.
        ValueError: If they do not fit, or hold NaN or infinite values.
    """
    check_sequence(trees, name=name)
    nets = (net,) * len(trees) if isinstance(net, Network) else tuple(net)
    flats = _flats(trees, name)
    if all(own is nets[0] for own in nets) and not free:
        check_alike([flat.leaves for flat in flats], name=name)
        check_fits(nets[0], flats[0].leaves, f"{name}[0]", variances=variances)
        return Models(nets, tuple(trees), flats)
    apart = len(set(nets)) > 1
    for k, (own, flat) in enumerate(zip(nets, flats, strict=True)):
        label = f"{name}[{k}]"
        check_finite(flat.leaves, name=label)
        check_fits(own, flat.leaves, label, variances=variances, free=() if apart else free)
        if not apart:
            _check_run(own, flat.leaves, label)
    return Models(nets, tuple(trees), flats)


def comparable(nets: Sequence[Network], trees: Sequence[PyTree], sites: Collection[str]) -> Models:
    """Several models whose values at some sites can be compared, channel by channel.

    The leaves that these values depend on must agree in shape and dtype. Other leaves, such as
    those of heads with different classes, may differ in shape; if the networks differ, in anything.

    Args:
        nets: One network per tree, as `networks` returns them.
        trees: A sequence of trees.
        sites: Names of sites, as in `Network.run`.

    Returns:
        The models.

    Raises:
        TypeError: If a leaf is not an array, or traced.
        ValueError: If they do not fit, or hold NaN or infinite values.
    """
    check_host("values are measured", trees=list(trees))
    models = Models(tuple(nets), tuple(trees), _flats(trees, "trees"))
    if models.alike:
        check_alike(models.leaves)
        return models
    apart = any(own is not models.net for own in nets)
    read = leaves_before(models.net, sites)
    first = models.leaves[0]
    like = {path: leaf for path, leaf in first.items() if path in read}
    for k, (own, flat) in enumerate(zip(nets, models.leaves, strict=True)):
        label = f"trees[{k}]"
        check_finite(flat, name=label)
        seen = read if own is models.net else leaves_before(own, sites)
        mine = {path: leaf for path, leaf in flat.items() if path in seen}
        check_like(mine, like, name=label, other="trees[0]", paths=flat)
        if apart:
            check_fits(own, flat, label)
        else:
            rest = {path: leaf for path, leaf in flat.items() if path not in read}
            check_like(flat, {**first, **rest}, name=label, other="trees[0]")
            _check_run(own, flat, label)
    return models


def check_fits(
    net: Network,
    leaves: Mapping[str, Any],
    name: str,
    *,
    variances: bool = True,
    free: Collection[str] = frozenset(),
) -> None:
    """Checks that leaves by path are those of a traced network's variables.

    Args:
        net: The traced network.
        leaves: The leaves of a tree.
        name: What to call the tree in errors.
        variances: As in `model_of`.
        free: Paths of leaves that may have any shape.

    Raises:
        ValueError: If leaves are missing or added, or differ in shape or dtype.
    """
    like = net.leaves(net.paths)
    like |= {path: leaf for path, leaf in leaves.items() if path in free and path in like}
    if variances:
        check_variances(net, [path for path in like if path not in leaves], name)
    else:
        unknown = {norm.var for norm in net.norms} - leaves.keys()
        like = {path: aval for path, aval in like.items() if path not in unknown}
    check_like(leaves, like, name=name, other="the traced network's variables")


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
    traced = traces_of(net).reference
    sources = {source_of(net, traced, site) for site in sites}
    values = [locate(net, traced, site)[0] for site in sources - {"input", "output"}]
    values += traced.graph.output_ids if "output" in sources else ()
    return traced.leaves_of(traced.graph.needed(values, ()), values)


def _flats(trees: Sequence[PyTree], name: str) -> tuple[Flat, ...]:
    return tuple(flatten_named(tree, name=f"{name}[{k}]") for k, tree in enumerate(trees))


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(leaf) for path, leaf in leaves.items()}


def _check_run(net: Network, leaves: Mapping[str, Any], name: str) -> None:
    """Checks that the traced function accepts leaves of shapes other than those traced."""
    try:
        traces_of(net).at(leaves, net.x)
    except Exception as error:
        raise ValueError(
            f"{name} differs in shape from what net was traced with, and its apply_fn does not "
            f"take that ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Models whose "
            "apply_fn differ, as Flax modules with other numbers of classes do, need a network "
            "each: net=[vfjax.trace(...), ...]"
        ) from error


def check_net(net: Any, *, other: str = "") -> None:
    """Raises a TypeError unless `net` is a `Network`.

    Args:
        net: The argument that the caller gave.
        other: What else it may be, for the error message: "or a PermutationSpec".
    """
    if not isinstance(net, Network):
        raise TypeError(
            f"net must be a Network{f' {other}' if other else ''}; it was a {type(net).__name__}. "
            "Trace the function that applies the model: net = vfjax.trace(apply_fn, variables, x)."
        )


def check_count(nets: Sequence[Network], models: int) -> None:
    """Raises a ValueError unless there is one network per model."""
    if len(nets) != models:
        raise ValueError(f"net has {len(nets)} networks for {models} trees; give one per tree")


def networks(net: Any, models: int) -> tuple[Network, ...]:
    """One network per model, from a `net` argument that may be a single one for all.

    Args:
        net: A `Network`, or a sequence of one per model: networks of one architecture that differ
            in widths or numbers of classes.
        models: The number of models.

    Returns:
        One network per model.

    Raises:
        TypeError: If one is not a `Network`.
        ValueError: If their number is wrong, or their layers, norms, groups or inputs differ.
    """
    if isinstance(net, Network):
        return (net,) * models
    if not isinstance(net, (list, tuple)):
        check_net(net, other="or a sequence of one per model")
    nets = tuple(net)
    for each in nets:
        check_net(each, other="or a sequence of one per model")
    check_count(nets, models)

    def facts(net: Network) -> dict[str, Any]:
        return {
            "layers": [(a.name, a.kind, a.depth, a.main) for a in net.layers],
            "norms": [norm.name for norm in net.norms],
            "groups": list(net.spec.groups),
            "inputs": origin_of(net.x),
        }

    first = facts(nets[0])
    for k, other in enumerate(nets[1:], start=1):
        for what, value in facts(other).items():
            if other is not nets[0] and value != first[what]:
                raise ValueError(
                    f"net[{k}] has other {what} than net[0]: merged models must share one "
                    "architecture, except for widths and classes. They are "
                    f"{value} and {first[what]}."
                )
    return nets
