"""Merging a range of layers, with stems before it and heads after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from vfjax._deprecated import renames
from vfjax._maps import Maps, check_is_maps
from vfjax._trees import Flat, average_flats, check_like, check_sequence, flatten_named, resolve_mix
from vfjax._types import PyTree
from vfjax.merge._merged import Matrices, Merged
from vfjax.network._arguments import check_net, models_of, networks
from vfjax.network._checks import check_depth
from vfjax.network._network import Network
from vfjax.network._unaligned import warn_of_fixed


@renames(merged="span")
def partial(
    net: Network | Sequence[Network],
    trees: Sequence[PyTree],
    maps: Maps | None = None,
    *,
    span: slice = slice(None),
    weights: Sequence[float] | None = None,
    alpha: float | None = None,
) -> Merged:
    """Merges a range of layers; every model keeps its own layers before and after it.

    `span` is the merged slice of the list of layers by depth, as in `preserve_first`.
    `slice(l, None)` is Preserve-First Merging, PFM_{l/L}: a stem per model and one trunk.
    `slice(None, l)` is a partial zip: one trunk and a head per model. Any other slice has both.

    Stems and heads are the models' own. The values that cross from the stems are mapped by every
    model's M along the axes that carry groups, and averaged. The trunk is the average of the mapped
    models. The values that cross into the heads are mapped by every model's U. Models that are only
    permuted are permuted beforehand, which costs nothing. The norm or activation after the last
    merged layer belongs to the heads, where it reads merged features in its own model's basis; its
    stored statistics therefore need `vfjax.renorm.reset` as well.

    Args:
        net: The traced network; or one per tree, of one architecture except for widths and numbers
            of classes. The trunk runs on the first.
        trees: K >= 2 trees. Leaves that only heads read may differ in shape, if `apply_fn` takes
            any number of classes.
        maps: The maps that a matcher found (those of `vfjax.align.zip_features`, or
            `Maps.of_permutations` of permutations); None for trees that are already aligned.
        span: Which layers to merge, as a slice of a list of L layers; all by default.
        weights: K numbers that sum to one; None for 1/K each. Maps that merge features within a
            model (`vfjax.align.zip_features`) need equal weights: see `vfjax.align.Maps`.
        alpha: For two trees, short for the weights `(1 - alpha, alpha)`.

    Returns:
        The merged model. With heads, calling it returns a tuple of K outputs, one per model.

    Raises:
        TypeError: If `net` is not a traced network, `maps` is not a `Maps`, `span` is not a slice
            of whole numbers, `trees` is not a sequence of trees, or `weights` is not a sequence of
            numbers.
        ValueError: If `span` has a step or runs backwards; if fewer than two trees are given; if
            they do not fit the networks, the maps or each other, hold NaN or infinite values, or
            have integer leaves that disagree; if weights do not fit; or if an integer value would
            have to be mapped.

    Warns:
        UserWarning: As `preserve_first`.

    Example:
        >>> import jax, jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     return jax.nn.relu(x @ v["w1"]) @ v["w2"]
        >>> a = {"w1": jnp.eye(2), "w2": jnp.ones((2, 1))}
        >>> b = {"w1": jnp.eye(2)[::-1], "w2": jnp.array([[1.0, 0.0, 2.0], [3.0, 4.0, 5.0]])}
        >>> x = jnp.array([[1.0, 2.0]])
        >>> net = vfjax.trace(apply_fn, a, x)
        >>> swap = vfjax.align.Maps.of_permutations([None, {"w1": [1, 0]}])
        >>> model = partial(net, [a, b], swap, span=slice(None, 1))
        >>> model
        Merged(cut=0 of 2, heads after 1, models=2, weights=(0.5, 0.5), params=12, flops=16, \
corrections=[])
        >>> [out.tolist() for out in model(x)]
        [[[3.0]], [[5.0, 4.0, 9.0]]]

    Source: partial zipping of "ZipIt! Merging Models from Different Tasks without Training"
    (Stoica et al., 2024, section 4), and Preserve-First Merging of "Vanishing Feature: Diagnosing
    Model Merging and Beyond" (Qu and Horvath). The reference code of both instead folds U into the
    first layer of a head, and runs stems through merged and unmerged copies. Where U only selects
    units, a head is the same function here; a stem is the original model's.
    """
    check_sequence(trees, name="trees")
    nets = networks(net, len(trees))
    start, stop = _bounds(span, nets[0].depth)
    end = None if stop == nets[0].depth else stop
    if maps is not None:
        check_is_maps(maps)
    weights = resolve_mix(weights, alpha, len(trees))
    return _merge(nets, trees, maps, start, end, weights)


def preserve_first(
    net: Network,
    trees: Sequence[PyTree],
    *,
    layers: int,
    weights: Sequence[float] | None = None,
) -> Merged:
    """Merges all but the first `layers` layers (Preserve-First Merging, PFM_{l/L}).

    Layers count by depth along the main path, without shortcuts and norms: VGG16 has L = 14,
    ResNet20 has L = 20. Every model runs its own stem, up to the pre-activations of its first
    `layers` layers; the values that cross are averaged with the weights; the averaged trunk, which
    begins with the norm or activation after layer l, computes the output. From l = 0 to L the model
    grows from the merged model, of the size and cost of one model, to the logit ensemble. In a
    chain, l = 1 equals l = 0, since averaging affine maps is averaging their results. This is
    `partial` with `span=slice(layers, None)`.

    A branch off the main path, which no layer of a longer path reads (an auxiliary head, an early
    exit, the shorter of two towers), counts from its own end: of its layers, as many are merged as
    of the main path, L - l, and the others are kept apart. So at l = L every output is that of the
    ensemble. A shortcut, which rejoins the main path, is kept with the first layer that reads it.

    Args:
        net: The traced network.
        trees: K >= 2 aligned trees of its variables.
        layers: l, from 0 to `net.depth`.
        weights: K numbers that sum to one; None for 1/K each.

    Returns:
        The merged model.

    Raises:
        TypeError: If `net` is not a traced network, `layers` is not an integer, `trees` is not a
            sequence of trees, or `weights` is not a sequence of numbers.
        ValueError: If `layers` is out of range; if fewer than two trees are given; if they do not
            fit the network or each other, hold NaN or infinite values, or have integer leaves that
            disagree; or if weights do not fit.

    Warns:
        UserWarning: Once per network, if the channels of a merged layer cannot be permuted, since
            no alignment can then have matched them.

    Example: see `help(vfjax.merge)`, where the weights of two models cancel but their logits do
    not; and `Merged`.

    Source: Preserve-First Merging of "Vanishing Feature: Diagnosing Model Merging and Beyond" (Qu
    and Horvath). Inside residual blocks exactly `layers` layers are kept, by the rule for cuts of
    `Network.run`, where the reference code averages the weights of the last one.
    """
    check_net(net)
    check_sequence(trees, name="trees")
    check_depth(net, layers, "layers")
    return _merge((net,) * len(trees), trees, None, int(layers), None, weights)


def ensemble(
    net: Network, trees: Sequence[PyTree], weights: Sequence[float] | None = None
) -> Merged:
    """Averages the last layers' outputs: the logit ensemble, `preserve_first` with all layers.

    Of several outputs, each is averaged at its own last layer.

    Args:
        net: The traced network.
        trees: K >= 2 trees of its variables; they need no alignment.
        weights: K numbers that sum to one; None for 1/K each.

    Returns:
        The ensemble. Anything after the last layer, such as a softmax, acts on the averaged logits.

    Raises:
        TypeError: As `preserve_first`.
        ValueError: As `preserve_first`.

    Example:
        >>> import vfjax
        >>> x, tree = jnp.ones((4, 3)), {"kernel": jnp.ones((3, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["kernel"], tree, x)
        >>> ensemble(net, [tree, tree])(x).shape
        (4, 2)
    """
    check_net(net)
    check_sequence(trees, name="trees")
    return _merge((net,) * len(trees), trees, None, net.depth, None, weights)


def _merge(
    nets: Sequence[Network],
    trees: Sequence[PyTree],
    maps: Maps | None,
    start: int,
    end: int | None,
    weights: Sequence[float] | None,
) -> Merged:
    """Merges layers `start` to `end`, as `partial` does; `end` is None without heads."""
    net, count = nets[0], len(trees)
    if count < 2:
        raise ValueError(f"trees must be at least two, got {count}")
    # Leaves that only heads read may differ in shape, as where models have different classes.
    models = models_of(nets, trees, free=net.head_leaves(start, end))
    weights = resolve_mix(weights, None, count)
    if any(isinstance(w, Tracer) for w in weights):
        raise TypeError(
            "weights must be numbers, since a Merged keeps them static; got a tracer, as inside "
            "jit: make the model outside, or average trees with vfjax.merge.interpolate"
        )
    maps = Maps(({},) * count) if maps is None else maps
    maps.check(nets, count)
    _check_mappable(nets, maps, [depth for depth in (start, end) if depth])
    warn_of_fixed(net, start, end)

    kept = net.trunk_leaves(start, end) if start or end is not None else frozenset(net.paths)
    if start or kept:  # else nothing is merged, and all models stay as they are
        models = models.become(
            [maps.prepare(nets[k], tree, k) for k, tree in enumerate(models.trees)]
        )
    mapped = [flat.part(kept) for flat in models.flats]
    own = any(other is not net for other in nets)
    if maps.mixed or own:
        mapped = [flatten_named(maps.mix(nets[k], flat.tree(), k)) for k, flat in enumerate(mapped)]
        _check_trunks(net, mapped)
    parts = list(zip(models.flats, nets, strict=True))
    return Merged(
        stems=tuple(flat.only(n.stem_leaves(start)) for flat, n in parts) if start else (),
        trunk=average_flats(mapped, weights),
        corrections={},
        net=net,
        cut=start,
        weights=weights,
        heads=() if end is None else tuple(flat.only(n.trunk_leaves(end)) for flat, n in parts),
        merge=_matrices(nets, maps, start, 0) if start else (),
        unmerge=() if end is None else _matrices(nets, maps, end, 1),
        end=end,
        nets=tuple(nets) if own else (),
    )


def _bounds(span: Any, depth: int) -> tuple[int, int]:
    """Where a slice of a list of all layers begins and ends."""
    if not isinstance(span, slice):
        raise TypeError(
            "span must be a slice of the layers, such as slice(2, None) for all but the first two; "
            f"it was {span!r}"
        )
    ends = [n for n in (span.start, span.stop) if n is not None]
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in ends):
        raise TypeError(f"span must be a slice of whole numbers; it was {span!r}")
    if span.step not in (None, 1):
        raise ValueError(f"span must be a slice without a step, got {span!r}")
    start, stop, _ = slice(span.start, span.stop).indices(depth)
    if stop < start:
        raise ValueError(
            f"span was {span!r}, which of {depth} layers begins after {start} and ends after "
            f"{stop}; it must not run backwards"
        )
    return start, stop


def _check_trunks(net: Network, mapped: Sequence[Flat]) -> None:
    """Checks that mapped models have the shapes of the network that the trunk runs on."""
    for k, (leaves, _) in enumerate(mapped):
        check_like(leaves, net.leaves(leaves), name=f"trees[{k}], mapped,", other="net")


def _check_mappable(nets: Sequence[Network], maps: Maps, depths: Sequence[int]) -> None:
    for k, net in enumerate(nets):
        for depth in depths:
            for aval, groups in net.crossing(depth):
                mixed = groups & maps.mixing[k].keys()
                if mixed and not jnp.issubdtype(aval.dtype, jnp.inexact):
                    raise ValueError(
                        f"a value of dtype {aval.dtype} crosses the cut at depth {depth} and "
                        f"carries {sorted(mixed)}, whose features a matrix mixes, and integers "
                        "cannot be mixed; cut elsewhere"
                    )


def _matrices(nets: Sequence[Network], maps: Maps, depth: int, which: int) -> tuple[Matrices, ...]:
    """Every model's matrices of the groups that cross a cut."""
    matrices = []
    for k, net in enumerate(nets):
        crossing = frozenset().union(*(groups for _, groups in net.crossing(depth)))
        matrices.append(
            {
                group: jnp.asarray(pair[which])
                for group, pair in maps.mixing[k].items()
                if group in crossing
            }
        )
    return tuple(matrices) if any(matrices) else ()
