"""Writing corrections into a model: folded into leaves where possible, explicit elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfjax._types import Array
from vfjax.merge._unpacked import Unpacked
from vfjax.network._fold import FoldError
from vfjax.network._inside import folded
from vfjax.renorm._passes import Found, renewed

# Scale and shift by layer; the scale is applied first.
Corrections = dict[str, tuple[Array, Array]]


def fold_all(model: Unpacked, results: Found, *, shift: bool) -> Unpacked:
    """Puts corrections and statistics into a model.

    Args:
        model: The model that was measured.
        results: Corrections by layer and moments by norm.
        shift: Whether the corrections shift; those that only scale fold in more places.

    Returns:
        A new model.
    """
    # Statistics first: a shift without a bias folds into the mean of the next norm as it is now.
    model = renewed(model, results)
    leaves = model.trunk.leaves
    stems = [flat.leaves for flat in model.stems]
    explicit: Corrections = dict(model.model.corrections)
    for name, (scale, moved) in results.corrections.items():
        if name in explicit:
            old_scale, old_shift = explicit[name]
            explicit[name] = scale * old_scale, scale * old_shift + moved
            continue
        added = moved if shift else None
        try:
            if model.model.cut > 0 and model.net.in_stem(name, model.model.cut):
                leaves, stems = _into_stems(model, leaves, stems, name, scale, added)
            else:
                leaves = folded(model.net, leaves, name, scale, added)
        except FoldError:
            explicit[name] = scale, moved
    return model.put(trunk=leaves, stems=stems, corrections=explicit)


def _into_stems(
    model: Unpacked,
    trunk: Mapping[str, Any],
    stems: list[dict[str, Any]],
    name: str,
    scale: Array,
    shift: Array | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Folds the correction of the averaged pre-activation into every stem.

    Since weights sum to one, correcting each stem in the same way corrects their average. Without a
    bias the shift goes into the mean of the norm that follows, which the trunk holds. Channels that
    matrices map at the cut are in another basis inside the stems, and cannot be folded.

    Returns:
        The leaves of the trunk, and of each stem.
    """
    net = model.net
    carried = {place.group for place in net.places(name)}
    if any(carried & maps.keys() for maps in model.model.merge):
        raise FoldError(f"the channels of '{name}' are mapped at the cut")
    norm = net.layer(name).norm
    lent = () if norm is None else (net.norm(norm).mean,)
    means = {path: trunk[path] for path in lent if path in trunk}
    new = []
    for k, own in enumerate(stems):
        written = folded(model.model.net_of(k), own | means, name, scale, shift)
        new.append({path: written[path] for path in own})
        trunk = {**trunk, **{path: written[path] for path in means}}
    return dict(trunk), new
