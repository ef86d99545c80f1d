"""Whether the references of a renormalisation are in the order of the merged model.

References that were permuted for merging, but not as references, give each channel another one's
goal. Nothing fails then. But the channels that have large means and deviations in such a reference
are not those that have them in the merged model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vfjax._passes.moments import Pooled
from vfjax.merge._unpacked import Unpacked
from vfjax.stats._moments import Moments

# A rank correlation within this many standard errors of 0 is what chance explains.
_ERRORS = 2.0
# Each of K references explains about 1 / K of a mean's variance. With fewer channels than this
# times K^2 that cannot be told from chance.
_FEWEST = 4
# A reference of less weight than this sets no goals, and has no share in the merged model.
_LEAST = 0.02


class Given(NamedTuple):
    """The references of a renormalisation.

    Attributes:
        moments: Their moments at the layers that are corrected.
        weights: Their weights.
        leaves: The leaves of each, if they are trees.
    """

    moments: Moments
    weights: tuple[float, ...]
    leaves: Sequence[Mapping[str, Any]] = ()


def check_order(merged: Unpacked, measured: Mapping[str, Pooled], given: Given) -> None:
    """Warns of references whose channels are not those of the merged model.

    For each reference, the channels of every layer are ranked by their means and by their standard
    deviations, and the ranks correlated with the merged model's. A reference is doubted if, over
    all layers, the correlation is at most two standard errors of what channels in random order
    would show, and so is the correlation with what the other references leave unexplained of the
    merged model's means and deviations. It is not if the merged model is a weighted sum of the
    references as they are, with any weights in which it has a share: a kernel says so, or the means
    of the layers that read the input, of which moments alone must have one.

    Args:
        merged: The merged model.
        measured: The moments of its layers, as they were before their correction.
        given: The references.
    """
    net, first = merged.net, max(merged.model.cut, 1)
    if not given.leaves and all(net.layer(name).depth != first for name in measured):
        return
    doubted = []
    for k in (k for k, weight in enumerate(given.weights) if weight > _LEAST):
        alone, beside = (_order(measured, given, k, beside=beside) for beside in (False, True))
        if all(of is not None and of.found <= of.chance for of in (alone, beside)):
            doubted.append((k, alone))
    if doubted:
        shares = list(_shares(merged, measured, given))
        doubted = [(k, of) for k, of in doubted if not any(w[k] > _LEAST for w in shares)]
    if doubted:
        k, order = doubted[0]
        names = ", ".join(f"references[{k}]" for k, _ in doubted)
        warnings.warn(
            f"{names} may not be in the order of the merged model: the ranks of its channels' "
            f"means and deviations correlate with the merged model's by {order.found:.2f} "
            f"(references[{k}]), where chance explains {order.chance:.2f}. Each channel then gets "
            "the goal of another. Give the references as they were merged, such as "
            "references=[a, net.spec.permute(b, alignment.permutations)], or the originals with "
            "maps=maps.",
            stacklevel=4,
        )


class _Order(NamedTuple):
    """A correlation over the channels of all layers, and what chance explains."""

    found: float
    chance: float


def _order(measured: Mapping[str, Pooled], given: Given, k: int, *, beside: bool) -> _Order | None:
    """How a reference's means and deviations go with the merged model's; None if that is unknown.

    Args:
        measured: The moments of the merged model's layers.
        given: The references.
        k: Which of them.
        beside: Whether to correlate only what the other references leave unexplained.
    """
    total = count = 0.0
    for site, now in measured.items():
        found = []
        pairs = ((given.moments.mean, now.mean), (given.moments.std, np.sqrt(np.asarray(now.var))))
        for of, mine in pairs:
            rows = [np.ravel(np.asarray(row, np.float64)) for row in (mine, *of[site])]
            if not beside:
                rows = [np.unique(row, return_inverse=True)[1].ravel() for row in rows]
            mine, other = rows.pop(0), rows.pop(k)
            known = np.stack([np.ones(len(mine)), *(rows if beside else [])])
            free = len(mine) - len(known)
            if free > 1 and np.ptp(mine) and np.ptp(other):
                found.append((free, _correlation(*(_without(row, known) for row in (mine, other)))))
        for free, r in found:
            total, count = total + free * r / len(found), count + free / len(found)
    fewest = 2 if beside else _FEWEST * len(given.weights) ** 2
    return _Order(total / count, _ERRORS / count**0.5) if count >= fewest else None


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    """Of what is left of two rows; 0 if nothing is."""
    size = np.linalg.norm(one) * np.linalg.norm(two)
    return float(one @ two / size) if size else 0.0


def _without(row: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What is left of values after a least-squares fit by others, beyond rounding."""
    rest = row - np.linalg.lstsq(known.T, row, rcond=1e-6)[0] @ known
    return rest if np.linalg.norm(rest) > 1e-5 * np.linalg.norm(row) else np.zeros_like(rest)


def _shares(merged: Unpacked, measured: Mapping[str, Pooled], given: Given) -> Iterator[np.ndarray]:
    """The weights with which layers of the merged model are sums of the references', if any are."""
    net, leaves = merged.net, merged.trunk.leaves
    for layer in (net.layer(name) for name in measured):
        kernels: list[Any] = [of.get(str(layer.kernel)) for of in (leaves, *given.leaves)]
        if given.leaves and all(np.shape(k) == np.shape(kernels[0]) != () for k in kernels):
            yield from _fit(*kernels)
        if layer.depth == max(merged.model.cut, 1):
            yield from _fit(measured[layer.name].mean, *given.moments.mean[layer.name])


def _fit(whole: Any, *parts: Any) -> Iterator[np.ndarray]:
    """Weights of a sum that an array is, up to the rounding of half precision, if it is one."""
    row, *rows = (np.ravel(np.asarray(a, np.float32)) for a in (whole, *parts))
    if row.size >= 2 * len(rows):
        weights = np.linalg.lstsq(np.stack(rows).T, row, rcond=1e-5)[0]
        if np.linalg.norm(row - weights @ np.stack(rows)) <= 0.02 * np.linalg.norm(row):
            yield weights
