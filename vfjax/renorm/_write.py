"""Writing what a renormalisation found into a model: folded where it can be, else explicit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from vfjax._trees import paths
from vfjax._types import Array, PyTree
from vfjax.merge._merged import Merged
from vfjax.network._fold import FoldError
from vfjax.renorm._passes import Found, renewed


def fold_all(model: Merged, found: Found, *, shift: bool) -> Merged:
    """Puts corrections and statistics into a model.

    Args:
        model: The model that was measured.
        found: Corrections by layer and moments by norm.
        shift: Whether the corrections shift; those that only scale fold in more places.

    Returns:
        A new model.
    """
    # Statistics first: a shift without a bias goes into the mean that they have now.
    model = renewed(model, found)
    for name, (scale, moved) in found.corrections.items():
        model = _fold(model, name, scale, moved, shift)
    return model


def _fold(model: Merged, name: str, scale: Array, moved: Array, shift: bool) -> Merged:
    if name in model.corrections:
        old_scale, old_shift = model.corrections[name]
        return _explicit(model, name, scale * old_scale, scale * old_shift + moved)
    at_cut = model.cut > 0 and model.net.in_stem(name, model.cut)
    try:
        if at_cut:
            return _fold_into_stems(model, name, scale, moved if shift else None)
        trunk = model.net.fold(model.trunk, name, scale, moved if shift else None)
        return dataclasses.replace(model, trunk=trunk)
    except FoldError:
        return _explicit(model, name, scale, moved)


def _explicit(model: Merged, name: str, scale: Array, shift: Array) -> Merged:
    return dataclasses.replace(model, corrections={**model.corrections, name: (scale, shift)})


def _fold_into_stems(model: Merged, name: str, scale: Array, shift: Array | None) -> Merged:
    """Folds the correction of the averaged pre-activation into every stem alike.

    Since weights sum to one, correcting each stem corrects their average. Without a bias the shift
    goes into the mean of the norm that follows, which the trunk holds. What is mapped by matrices
    on its way is in another basis inside the stems.
    """
    net = model.net
    carried = {place.group for place in net.places(name)}
    if any(carried & maps.keys() for maps in model.merge):
        raise FoldError(f"the channels of '{name}' are mapped at the cut")
    norm = net.layer(name).norm
    lent = net.norm(norm).mean if norm is not None else None
    trunk, trunk_def = paths.flatten_named(model.trunk)
    means = {lent: trunk[lent]} if lent in trunk else {}
    stems = []
    for k, stem in enumerate(model.stems):
        net, own = model.net_of(k), paths.flatten_named(stem)[0]
        whole = net.fold(_tree_of(net, own | means), name, scale, shift)
        folded = paths.flatten_named(whole)[0]
        stems.append(_tree_of(net, {p: v for p, v in folded.items() if p in own}))
        trunk |= {p: folded[p] for p in means}
    return dataclasses.replace(
        model, stems=tuple(stems), trunk=jax.tree.unflatten(trunk_def, list(trunk.values()))
    )


def _tree_of(net: Any, leaves: dict[str, Array]) -> PyTree:
    """A tree of the network's structure, with None in place of leaves that are not given."""
    return jax.tree.unflatten(net._treedef, [leaves.get(path) for path in net.paths])
