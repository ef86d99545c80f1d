"""The goals of a renormalisation: the moments of the edge models, in the basis of the merge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from vfjax._maps import Maps, check_is_maps
from vfjax._passes import Mask
from vfjax._trees import check_sequence
from vfjax._trees.concrete import check_host
from vfjax._types import Array
from vfjax.merge._arguments import weights_for
from vfjax.merge._merged import Merged
from vfjax.merge._unpacked import Unpacked
from vfjax.network._arguments import Models, models_of, networks
from vfjax.network._crossing import Crossing
from vfjax.network._inside import ends_stem
from vfjax.network._sites import Sites, select
from vfjax.renorm._doubt import Given
from vfjax.stats._moments import Moments, measured


def goals_of(
    merged: Unpacked,
    data: Iterable[Any],
    references: Any,
    maps: Maps | None,
    weights: Sequence[float] | None,
    sites: Sites,
    mask: Mask | None = None,
) -> tuple[dict[str, tuple[Array, Array]], Given]:
    """Mean and standard deviation to reach, by layer; checks the references first.

    Args:
        merged: The merged model.
        data: Batches, on which references that are trees are measured.
        references: Trees, moments of all models, or a sequence of the moments of each.
        maps: Maps into the basis of the merge, or None.
        weights: As in `vfjax.renorm.repair`.
        sites: As in `vfjax.renorm.repair`.
        mask: As in `vfjax.renorm.repair`.

    Returns:
        For each layer to correct, arrays of its channels' shape; and the references, in the basis
        of the merge.

    Raises:
        TypeError: As `vfjax.renorm.repair`.
        ValueError: As `vfjax.renorm.repair`.
    """
    net, model = merged.net, merged.model
    check_host("moments are measured", merged=model.arrays, references=references)
    names = select(net, sites)
    layers = {layer.name: layer for layer in net.layers}
    other = [name for name in names if name not in layers]
    if other:
        what = f"'{other[0]}' is {net.sites[other[0]].meaning}"
        raise ValueError(
            f"sites must be layers, whose pre-activations are corrected, got {other[:3]}: {what}; "
            'name layers, or give "paper" or "all"'
        )
    chosen = [name for name in names if _correctable(model, layers[name])]
    if maps is not None:
        check_is_maps(maps)
    given, leaves = _given(references), ()
    if given is None:
        models = _references(model, references, maps)
        mix = weights_for(merged, weights, len(models))
        if not chosen:
            return {}, Given(Moments({}, {}, {}), mix)
        given, leaves = _measured(models, data, maps, chosen, mask), models.leaves
    else:
        missing = [name for name in chosen if any(name not in m.mean for m in given)]
        if missing:
            raise ValueError(
                f"references holds no moments at {missing[:3]}; measure them with "
                "vfjax.stats.moments(net, trees, data, sites=...) at the sites to correct"
            )
        mix = weights_for(merged, weights, sum(m.models for m in given))
    if maps is not None:
        given = maps.carry(given if len(given) > 1 else given[0])
    joined = _joined(given)
    means, stds = joined.mixed(mix)
    return {name: (means[name], stds[name]) for name in chosen}, Given(joined, mix, leaves)


def _correctable(model: Merged, layer: Any) -> bool:
    """Whether a layer can be corrected: it lies in the trunk, or is averaged at the cut."""
    if model.in_heads(layer.name):
        return False
    if model.cut == 0 or not model.net.in_stem(layer.name, model.cut):
        return True
    return ends_stem(model.net, layer.name, model.cut)


def _given(references: Any) -> list[Moments] | None:
    """References that are moments, or None if they are trees."""
    if isinstance(references, Moments):
        return [references]
    if isinstance(references, (list, tuple)) and any(isinstance(r, Moments) for r in references):
        if all(isinstance(r, Moments) and r.models == 1 for r in references):
            return list(references)
        raise ValueError(
            "references must be moments of all models, or a sequence of moments of one model each"
        )
    return None


def _references(model: Merged, references: Any, maps: Maps | None) -> Models:
    """References that are trees, each with its network."""
    check_sequence(references, name="references")
    count = len(references)
    nets = networks(model.nets, count) if model.nets else (model.net,) * count
    # Leaves that only heads read may differ in shape, as where models have different classes.
    free = model.net.head_leaves(model.cut, model.end)
    models = models_of(nets, references, free=free, name="references")
    if maps is not None:
        maps.check(nets, count)
    return models


def _measured(
    models: Models,
    data: Iterable[Any],
    maps: Maps | None,
    sites: Sequence[str],
    mask: Mask | None,
) -> list[Moments]:
    if isinstance(data, (list, tuple)) and any(isinstance(x, Crossing) for x in data):
        raise ValueError(
            "data holds crossings, which the references cannot be measured on; give references "
            "as vfjax.stats.moments(net, trees, data, sites=...)"
        )
    mixed = frozenset() if maps is None else maps.mixed
    if maps is not None:
        pairs = zip(models.nets, models.trees, strict=True)
        models = models.become([maps.in_units(own, tree) for own, tree in pairs])
    covariance = [s for s in sites if any(at.group in mixed for at in models.net.places(s))]
    # One pass serves all models only if they agree in every shape.
    parts = [models] if models.alike else models.one_by_one()
    return [measured(part, data, sites, covariance, mask=mask) for part in parts]


def _joined(given: Moments | Sequence[Moments]) -> Moments:
    """Joins the moments of several models into one record."""
    if isinstance(given, Moments):
        return given

    def stacked(what: str) -> dict[str, Array]:
        return {
            site: jnp.concatenate([getattr(one, what)[site] for one in given])
            for site in given[0].mean
            if all(site in one.mean for one in given)
        }

    return Moments(given[0].count, stacked("mean"), stacked("var"))
