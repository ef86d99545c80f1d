"""Arguments of functions that take a merged model, checked once.

Public functions first turn a tree or a `Merged` into an `Unpacked`; the functions that they call
take only that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vfjax._trees import flatten_named, resolve_weights
from vfjax._types import PyTree
from vfjax.merge._merged import Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._arguments import (
    Models,
    check_count,
    check_fits,
    check_net,
    fitting,
    model_of,
    networks,
)
from vfjax.network._inside import has_structure
from vfjax.network._network import Network


def as_merged(net: Network, tree: PyTree, *, weights: Sequence[float] | None = None) -> Merged:
    """Wraps one tree as a `Merged` of cut 0.

    Args:
        net: The traced network.
        tree: A tree of the network's variables.
        weights: The weights with which it was averaged; None for a single model.

    Returns:
        A model that computes what the tree does.

    Raises:
        TypeError: If `net` is not a traced network, a leaf is not an array, or `weights` is not a
            sequence.
        ValueError: If the tree does not fit the network, or weights do not sum to one.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> x, tree = jnp.ones((4, 3)), {"kernel": jnp.ones((3, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["kernel"], tree, x)
        >>> as_merged(net, tree)
        Merged(cut=0 of 1, models=1, weights=(1.0,), params=6, flops=6, corrections=[])
    """
    check_net(net)
    check_fits(net, flatten_named(tree, name="tree").leaves, "tree", variances=False)
    weights = (1.0,) if weights is None else resolve_weights(weights, None)
    return Merged(stems=(), trunk=tree, corrections={}, net=net, cut=0, weights=weights)


def each_unpacked(models: Models) -> tuple[Unpacked, ...]:
    """Wraps trees that have been checked as merged models."""
    return tuple(map(Unpacked.of_tree, models.nets, models.trees, models.flats))


def merged_of(net: Network | Sequence[Network], merged: PyTree | Merged) -> Unpacked:
    """Checks a `merged` argument: a finite tree of the network's variables, or a `Merged` of it.

    Args:
        net: The network that the caller gave, or the networks of a `Merged`.
        merged: A tree, which may lack stored variances, or a `Merged`.

    Returns:
        The model.

    Raises:
        TypeError: If `net` is not a traced network, or a leaf is not an array.
        ValueError: If `merged` does not fit the network, or is a tree with NaN or infinite values.
    """
    if not isinstance(merged, Merged):
        models = model_of(net, merged, "merged", variances=False)  # type: ignore[arg-type]
        return each_unpacked(models)[0]
    if isinstance(net, (list, tuple)):
        _check_nets(networks(net, len(merged.weights)), merged)
    else:
        check_net(net)
        _check_nets(net, merged)  # type: ignore[arg-type]
    return Unpacked(merged)


def networks_of(
    net: Network | Sequence[Network], given: Any, name: str
) -> tuple[tuple[Network, ...], tuple[Unpacked, ...]]:
    """Checks one or several networks that can be evaluated: trees of variables, or `Merged`s.

    Args:
        net: The network that the caller gave, or the networks of a `Merged`; trees belong to the
            first of these.
        given: A tree, a `Merged`, or a sequence of these. Anything with the structure of the traced
            variables is one tree, even if it is a list.
        name: The caller's name for `given`.

    Returns:
        The traced networks, and the models.

    Raises:
        TypeError: If `net` is not a traced network, or a leaf is not an array.
        ValueError: If a tree does not fit the network or holds NaN or infinite values, or there are
            no trees.
    """
    nets = networks(net, len(net) if isinstance(net, (list, tuple)) else 1)
    return nets, evaluable(nets, given, name, several=not isinstance(net, Network))


def evaluable(
    nets: Sequence[Network], given: Any, name: str, *, several: bool
) -> tuple[Unpacked, ...]:
    """As `networks_of`, for networks that have been checked.

    Args:
        nets: The networks.
        given: As in `networks_of`.
        name: As in `networks_of`.
        several: Whether the caller gave a sequence of networks.
    """
    models = []
    for label, network in listed(nets[0], given, name):
        if not isinstance(network, Merged):
            models += each_unpacked(fitting(nets[0], network, label))
            continue
        if several:
            check_count(nets, len(network.weights))
        _check_nets(tuple(nets) if several else nets[0], network)
        models.append(Unpacked(network))
        models[-1].check(label)
    return tuple(models)


def listed(net: Network, given: Any, name: str) -> list[tuple[str, Any]]:
    """One network, or the networks of a sequence one by one, each after its name in messages."""
    one = isinstance(given, Merged) or has_structure(net, given)
    if one or not isinstance(given, (list, tuple)):
        return [(name, given)]
    if not given:
        raise ValueError(f"{name} is empty; give at least one tree, or a Merged")
    return [(f"{name}[{k}]", each) for k, each in enumerate(given)]


def _check_nets(net: Network | tuple[Network, ...], merged: Merged) -> None:
    """Checks that a model was made with one network, or with those of its models."""
    if isinstance(net, Network):
        if merged.net is not net:
            raise ValueError("merged was made with another network than net; pass net=merged.net")
        return
    given = merged.nets or (merged.net,) * len(net)
    if any(own is not of for own, of in zip(net, given, strict=True)):
        raise ValueError("merged was made with other networks than net; pass net=merged.nets")


def weights_for(merged: Unpacked, weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights of `count` references of a merged model.

    None stands for the weights of a `Merged` of as many models, since its references are never
    meant to be mixed in other proportions, and for equal weights otherwise.
    """
    own = merged.model.weights
    if weights is None and len(own) == count:
        return own
    return resolve_weights(weights, count, of="references")
