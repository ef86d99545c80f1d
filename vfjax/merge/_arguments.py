"""Checks of what functions take as a merged model and the weights of its references."""

from __future__ import annotations

from collections.abc import Sequence

from vfjax._trees import paths
from vfjax._trees.mean import resolve_weights
from vfjax._types import PyTree
from vfjax.merge._merged import Merged
from vfjax.network._arguments import check_fits, check_net, networks
from vfjax.network._network import Network


def check_merged(net: Network | Sequence[Network], merged: PyTree | Merged) -> Network:
    """Checks a `merged` argument: a finite tree of the network's variables, or a `Merged` of it.

    Args:
        net: The traced network, or those of a `Merged`.
        merged: A tree, which may lack stored variances, or a `Merged`.

    Returns:
        The network, of the trunk.

    Raises:
        TypeError: If `net` is no traced network, or a leaf no array.
        ValueError: If it does not fit the network, or holds NaN or infinite values.
    """
    if isinstance(net, (list, tuple)) and isinstance(merged, Merged):
        networks(net, len(merged.weights))
        given = merged.nets or (merged.net,) * len(net)
        if any(own is not of for own, of in zip(net, given, strict=True)):
            raise ValueError("merged was made with other networks than net; pass net=merged.nets")
        return merged.net
    check_net(net)
    assert isinstance(net, Network)
    if not isinstance(merged, Merged):
        leaves, _ = paths.flatten_named(merged, name="merged")
        check_fits(net, merged, "merged", variances=False)
        paths.check_finite(leaves, name="merged")
    elif merged.net is not net:
        raise ValueError("merged was made with another network than net; pass net=merged.net")
    return net


def weights_for(
    merged: PyTree | Merged, weights: Sequence[float] | None, count: int
) -> tuple[float, ...]:
    """Weights of `count` references of a merged model.

    None stands for the weights that a `Merged` of as many models was made with, since goals mixed
    in other proportions are never meant, and for equal ones otherwise.
    """
    if weights is None and isinstance(merged, Merged) and len(merged.weights) == count:
        return merged.weights
    return resolve_weights(weights, count, of="references")
