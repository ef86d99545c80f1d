"""The magnitude argument: how far smaller weights explain that features vanish.

Averaging shrinks weights whose signs disagree, and pruning sets some to 0. A feature passes through
all layers before it and loses a factor at each; the offset of a late bias passes through few
("Vanishing Feature: Diagnosing Model Merging and Beyond", section on linear networks).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vfjax._trees.concrete import check_host
from vfjax._types import PyTree
from vfjax.merge._arguments import evaluable, merged_of, weights_for
from vfjax.merge._merged import Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._kernels import kernels
from vfjax.network._network import Network
from vfjax.network._records import Layer


def rescale_product(
    net: Network,
    merged: PyTree | Merged,
    references: Sequence[PyTree],
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, float]:
    """The factor that features lose to smaller weights, by the magnitude argument.

    `R^(l) = prod_{j=1..l} mean_k(|W_k^(j)|) / |W^(j)|`, where `|W|` is the mean of the absolute
    values of a kernel, k runs over the references and W is merged. It multiplies the merged
    network's feature after layer l (not its offset, and not the network): if smaller weights are
    the reason why features vanish, the product does not vanish.

    Args:
        net: The traced network.
        merged: A merged tree, or a `Merged`. Inside its stems a layer's magnitude is the weighted
            average of the models'.
        references: The edge models, or the network before pruning.
        weights: One per reference, summing to one, for means over references. None for those of
            `merged`, if that is a `Merged` of as many models, and for 1/R each otherwise.

    Returns:
        R by layer, for the layers of the main path, by depth. Layers of one depth count as one
        layer with all their entries. Kernels are taken as the layers use them, masks and sums
        included.

    Raises:
        TypeError: If `net` is not a traced network, or a leaf is not an array.
        ValueError: If trees do not fit the network or hold NaN or infinite values, if there are no
            references, if weights do not fit, or if a merged kernel is all 0.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> edges = [{"a": jnp.eye(2), "b": jnp.eye(2)}, {"a": jnp.eye(2), "b": -2 * jnp.eye(2)}]
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], edges[0], jnp.ones((1, 2)))
        >>> rescale_product(net, vfjax.merge.interpolate(edges), edges)
        {'a': 1.0, 'b': 3.0}

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", the magnitude argument and its
    figure's rescaled curve.
    """
    model = merged_of(net, merged)
    several = not isinstance(net, Network)
    nets = tuple(net) if several else (net,)
    others = evaluable(nets, references, "references", several=several)
    check_host("magnitudes are measured", merged=model.model, references=references)
    share = weights_for(model, weights, len(others))
    product, factors = 1.0, {}
    main = [layer for layer in net.layers if layer.main]
    for depth in sorted({layer.depth for layer in main}):
        beside = [layer for layer in main if layer.depth == depth]
        goal = sum(w * _magnitude_of(o, beside) for w, o in zip(share, others, strict=True))
        mine = _magnitude_of(model, beside)
        if mine == 0:
            raise ValueError(
                f"the merged kernel of '{beside[0].name}' is all 0, so no factor gives it the "
                "references' magnitude"
            )
        product *= goal / mine
        factors.update((layer.name, product) for layer in beside)
    return factors


def _magnitude_of(network: Unpacked, layers: Sequence[Layer]) -> float:
    """Mean absolute value of the kernels of some layers, as the layers use them."""
    names, total = [layer.name for layer in layers], 0.0
    for net, flat, weight in network.places(names[0]):
        values = kernels(net, flat.leaves, names)
        total += weight * float(np.abs(np.concatenate(values)).mean())
    return total
