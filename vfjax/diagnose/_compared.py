"""Networks and their references, checked and brought into one basis for comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from vfjax._maps import Maps, check_is_maps
from vfjax._trees.concrete import check_host
from vfjax.diagnose._rows import Carried
from vfjax.merge._arguments import each_unpacked, evaluable, listed, networks_of
from vfjax.merge._merged import Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._arguments import check_count, fitting, models_of, networks
from vfjax.network._network import Network


class Compared(NamedTuple):
    """Networks to measure and to compare with.

    Attributes:
        mine: The networks to measure.
        others: The references; may be empty.
    """

    mine: tuple[Unpacked, ...]
    others: tuple[Unpacked, ...]

    @property
    def net(self) -> Network:
        """The traced network that sites belong to: that of the references, if there are any."""
        return (*self.others, *self.mine)[0].net


def compared(net: Network | Sequence[Network], variables: Any, references: Any) -> Compared:
    """Checks the networks to measure and their references.

    Args:
        net: As in `features`.
        variables: As in `features`.
        references: As in `features`; may be empty.

    Returns:
        The networks.

    Raises:
        TypeError: If `net` is not a traced network, or a leaf is not an array.
        ValueError: If a tree does not fit, or holds NaN or infinite values.
    """
    check_host("features are measured", variables=variables, references=references)
    nets, mine = networks_of(net, variables, "variables")
    if not _given(references):
        return Compared(mine, ())
    several = not isinstance(net, Network)
    others = listed(nets[0], references, "references")
    if any(isinstance(other, Merged) for _, other in others):
        return Compared(mine, evaluable(nets, references, "references", several=several))
    merged = [network.model for network in mine if not network.plain]
    if several:
        check_count(nets, len(others))
    else:
        own = (model.nets for model in merged if len(model.nets) == len(others))
        theirs = next(own, ())
        nets = networks(theirs, len(others)) if theirs else nets * len(others)
    heads = [nets[0].head_leaves(model.cut, model.end) for model in merged if model.end is not None]
    free = frozenset.intersection(*heads) if heads else frozenset()
    if free or any(own is not nets[0] for own in nets):
        trees = [tree for _, tree in others]
        models = models_of(nets, trees, free=free, name="references")
        return Compared(mine, each_unpacked(models))
    unpacked = (each_unpacked(fitting(nets[0], tree, label)) for label, tree in others)
    return Compared(mine, tuple(one for each in unpacked for one in each))


def carry(given: Compared, maps: Maps | None) -> tuple[Carried, ...]:
    """The networks, with the maps that carry their values into the basis of the merge.

    Values of edge models, and those inside stems and heads, are in the models' own bases.

    Args:
        given: The networks.
        maps: Maps of the edge models, given as trees; None if these are already in that basis.

    Raises:
        TypeError: If `maps` is not a `Maps`.
        ValueError: If there are not as many trees as `maps` has, or it does not fit the network.
    """
    if maps is None:
        return tuple(Carried(network.model) for network in (*given.mine, *given.others))
    check_is_maps(maps)
    if not all(other.plain for other in given.others):
        raise ValueError("maps carry edge models, and references has a Merged; give trees")
    models = [other.model for other in given.others]
    maps.check([model.net for model in models], len(models))
    # Stems and heads are already permuted, so only matrices that mix are left to apply there.
    mixing = tuple({g: jnp.asarray(pair[0]) for g, pair in of.items()} for of in maps.mixing)
    merging = [{g: jnp.asarray(m) for g, m in of.items()} for of in maps.merging]
    mine = (Carried(network.model, apart=mixing) for network in given.mine)
    others = (
        Carried(_in_units(model, maps), whole=of) for model, of in zip(models, merging, strict=True)
    )
    return (*mine, *others)


def mapped(given: Compared, maps: Maps | None) -> tuple[Unpacked, ...]:
    """The references, as trees in the basis of the merge."""
    if maps is None:
        return given.others
    return tuple(
        Unpacked(
            dataclasses.replace(other.model, trunk=maps.map_tree(other.net, other.model.trunk, k)),
            plain=True,
        )
        for k, other in enumerate(given.others)
    )


def _in_units(model: Merged, maps: Maps) -> Merged:
    """An edge model in the units in which the maps mix its features."""
    return dataclasses.replace(model, trunk=maps.in_units(model.net, model.trunk))


def _given(references: Any) -> bool:
    """Whether there are references. An empty list means no; a single tree fails later."""
    return references is not None and not (
        isinstance(references, (list, tuple)) and len(references) == 0
    )
