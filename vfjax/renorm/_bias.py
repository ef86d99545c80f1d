"""Removing and calibrating the biases of merged layers, without data."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from vfjax._maps import Maps, check_is_maps
from vfjax._trees import (
    changed,
    check_finite,
    check_like,
    check_sequence,
    flatten_named,
    resolve_weights,
)
from vfjax._trees.concrete import check_one_device, check_values
from vfjax._types import Array, PyTree
from vfjax.merge._arguments import merged_of, weights_for
from vfjax.merge._merged import Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._arguments import models_of, networks
from vfjax.network._checks import opaque_hint
from vfjax.network._inside import Part, bias_of
from vfjax.network._network import Network


def remove_bias(
    net: Network | Sequence[Network],
    merged: PyTree | Merged,
    *,
    last: int | str | None = None,
    first: int | str | None = None,
) -> PyTree | Merged:
    """Sets the biases of the last layers, or of the first ones, to zero.

    In a merged network features fade with depth while biases do not; without the late biases the
    features decide the output again. Layers count by depth from the network's input: the first k
    layers have depth 1 to k, and the last k are those deeper than `net.depth - k`. The classifier
    is the last layer; a shortcut layer has the depth of the main layer beside it, and is treated
    with it. Biases of norms, and biases in the stems and heads of a `Merged`, are kept.

    Args:
        net: The traced network, or those that `merged` was made with.
        merged: A merged tree, or a `Merged`.
        last: How many of the last layers lose their biases, from 0 to `net.depth`, or "all".
        first: How many of the first layers lose their biases, from 0 to `net.depth`, or "all".
            Layers in stems and heads count, though they keep their biases.

    Returns:
        A tree or a `Merged`, as given. Layers without a bias are skipped.

    Raises:
        TypeError: If `last` or `first` is neither an integer nor "all".
        ValueError: If not exactly one of `last` and `first` is given, if it is out of range, if
            `merged` does not fit the network, or if one bias leaf serves layers of which only some
            would lose it.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> def apply_fn(v, x):
        ...     return jnp.maximum(x @ v["w1"] + v["b1"], 0) @ v["w2"] + v["b2"]
        >>> tree = {"w1": jnp.eye(2), "b1": jnp.ones(2), "w2": jnp.eye(2), "b2": jnp.ones(2)}
        >>> net = vfjax.trace(apply_fn, tree, jnp.ones((1, 2)))
        >>> new = remove_bias(net, tree, last=1)
        >>> new["b1"].tolist(), new["b2"].tolist()
        ([1.0, 1.0], [0.0, 0.0])
        >>> new = remove_bias(net, tree, first=1)
        >>> new["b1"].tolist(), new["b2"].tolist()
        ([0.0, 0.0], [1.0, 1.0])

        Calibration halves the bias of layer 2 in a merge of two models, instead of removing it:

        >>> new = calibrate_bias(net, tree)
        >>> new["b1"].tolist(), new["b2"].tolist()
        ([1.0, 1.0], [0.5, 0.5])

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", bias removal, forward (first)
    and backward (last).
    """
    model = merged_of(net, merged)
    depths = model.net.depth
    if (last is None) == (first is None):
        given = "neither" if last is None else f"last={last!r} and first={first!r}"
        raise ValueError(f"exactly one of last and first must be given, got {given}")
    name, count = ("last", last) if first is None else ("first", first)
    if count == "all":
        count = depths
    if isinstance(count, (bool, str)) or not hasattr(count, "__index__"):
        raise TypeError(f'{name} must be an integer or "all", got {count!r}')
    number = operator.index(count)  # type: ignore[arg-type]
    if not 0 <= number <= depths:
        raise ValueError(f"{name} must be from 0 to {depths}, the network's depth, got {count}")

    def loses(depth: int) -> bool:
        return depth > depths - number if first is None else depth <= number

    def zero(bias: Array, index: Part, depth: int) -> Array:
        return jnp.zeros_like(bias) if loses(depth) else bias

    return _map_biases(model, zero, same=lambda a, b: loses(a) == loses(b))


def calibrate_bias(
    net: Network | Sequence[Network],
    merged: PyTree | Merged,
    *,
    references: Sequence[PyTree] | None = None,
    maps: Maps | None = None,
    weights: Sequence[float] | None = None,
) -> PyTree | Merged:
    """Bias calibration: scales biases down layer by layer, as merging scales down features.

    `b^(l) = sum_k w_k^l b_k^(l)`, where l is the depth of the layer from the network's input,
    preserved layers included. Without references the weights must be equal, and the result is the
    merged bias times `K^(1-l)`. A single weight of 1 restores the biases of that edge model.
    Kernels, the biases of norms, and stems and heads of a `Merged` do not change.

    Args:
        net: The traced network, or those that `merged` was made with.
        merged: A merged tree, or a `Merged`.
        references: The K edge models: aligned (by `vfjax.align.Maps.apply`, where features were
            mixed), or with `maps` the originals. None to calibrate the merged biases themselves; K
            is then 2 for a tree, and the number of models for a `Merged`.
        maps: Maps of the references into the basis of the merge.
        weights: One per model, summing to one. None for those of a `Merged` of as many models, else
            equal weights.

    Returns:
        A tree or a `Merged`, as given. Layers without a bias are skipped.

    Raises:
        TypeError: If `maps` is not a `Maps`, or `references` is not a sequence of trees.
        ValueError: If weights are unequal or maps are given without references, if references, maps
            or weights do not fit, or if one bias leaf serves layers of several depths.

    Example: see `remove_bias`.

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", bias calibration. The
    reference code counts every tensor named "weight", so that shortcuts and norms raise l there.
    """
    model = merged_of(net, merged)
    if references is None:
        if maps is not None:
            raise ValueError("maps map references, and there are none; give references=[...]")
        models = _equal_models(model, weights)

        def scaled(bias: Array, index: Part, depth: int) -> Array:
            return bias * float(models) ** (1 - depth)

        return _map_biases(model, scaled, same=lambda a, b: models == 1 or a == b)

    leaves = _in_basis(model, references, maps)
    check_values("biases are mixed", references=leaves)
    check_one_device(merged=model.model.trunk, references=leaves)
    mix = weights_for(model, weights, len(leaves))

    def mixed(bias: Array, index: Part, depth: int) -> Array:
        parts = (w**depth * _read(b, index) for w, b in zip(mix, leaves, strict=True))
        return sum(parts, start=jnp.zeros_like(bias))

    return _map_biases(model, mixed, same=lambda a, b: a == b)


def _in_basis(
    merged: Unpacked, references: Sequence[PyTree], maps: Maps | None
) -> list[dict[str, Any]]:
    """The leaves of the references, with those of the trunk mapped into the basis of the merge."""
    check_sequence(references, name="references")
    model, count = merged.model, len(references)
    net, cut, end = model.net, model.cut, model.end
    if maps is not None:
        check_is_maps(maps)
        nets = networks(model.nets, count) if model.nets else (net,) * count
        free = net.head_leaves(cut, end)
        models = models_of(nets, references, free=free, name="references", variances=False)
        maps.check(nets, count)
        given = zip(nets, models.trees, strict=True)
        flats = models.become([maps.map_tree(*of, k) for k, of in enumerate(given)]).leaves
    elif not cut and end is None:
        flats = models_of(net, references, name="references", variances=False).leaves
    else:
        # Stems and heads keep their biases, so their widths and classes may differ.
        flats = [
            flatten_named(tree, name=f"references[{k}]").leaves for k, tree in enumerate(references)
        ]
        for k, leaves in enumerate(flats):
            check_finite(leaves, name=f"references[{k}]")
    kept = net.trunk_leaves(cut, end) - {norm.var for norm in net.norms}
    for k, leaves in enumerate(flats):
        name = f"references[{k}]"
        mine = {path: leaf for path, leaf in leaves.items() if path in kept}
        try:
            check_like(mine, net.leaves(kept), name=name, other="the merged trunk")
        except ValueError as error:
            raise ValueError(
                f"{error} Biases are added up in the basis of the merge: give the models as they "
                "were matched and maps=maps, or what maps.apply returns of them."
            ) from error
    return list(flats)


def _equal_models(merged: Unpacked, weights: Sequence[float] | None) -> int:
    """The number of models that were averaged with equal weights; weights of 0 do not count."""
    if weights is not None:
        weights = resolve_weights(weights, None)
    else:
        weights = (0.5, 0.5) if merged.plain else merged.model.weights
    given = [w for w in weights if w != 0]
    if max(given) - min(given) > 1e-6:
        raise ValueError(
            f"weights are unequal, {tuple(weights)}, and then calibration needs the edge models' "
            "own biases; give references=[...], the aligned trees"
        )
    return len(given)


def _map_biases(
    merged: Unpacked,
    change: Callable[[Array, Part, int], Array],
    *,
    same: Callable[[int, int], bool],
) -> PyTree | Merged:
    """Replaces every layer's bias outside of stems and heads by `change(bias, which, depth)`.

    Computes in float32 or better and casts back. `same` says whether two depths get the same
    treatment: a bias that several layers share cannot take two values.
    """
    net, model = merged.net, merged.model
    check_values("biases are changed", merged=model.trunk)
    if net.opaque:
        warnings.warn(
            f"biases are changed in the layers of net.layers only.{opaque_hint(net)}",
            UserWarning,
            stacklevel=3,
        )
    depths = bias_depths(net, model.cut, model.end)
    leaves = dict(merged.trunk.leaves)
    for index, served in depths.items():
        if not all(same(depth, served[0]) for depth in served):
            raise ValueError(
                f"the bias '{index[0]}' serves layers of depths {served}, which need different "
                "values; give each layer its own bias"
            )
        bias = _read(leaves, index)
        new = change(bias, index, served[0])
        path, slot = index
        leaves[path] = changed(leaves[path], slot, lambda _, new=new: new)
    return merged.put(trunk=leaves).given_back()


def bias_depths(net: Network, cut: int, end: int | None = None) -> dict[Part, list[int]]:
    """The depths of the layers of the trunk that add each bias."""
    depths: dict[Part, list[int]] = {}
    for layer in net.layers:
        bias = bias_of(net, layer.name)
        if bias is None or (cut and net.in_stem(layer.name, cut)):
            continue
        if end is not None and not net.in_stem(layer.name, end):
            continue
        depths.setdefault(bias, []).append(layer.depth)
    return depths


def _read(leaves: dict[str, Any], index: Part) -> Array:
    path, slot = index
    leaf = jnp.asarray(leaves[path])
    leaf = leaf if slot is None else leaf[slot]
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
