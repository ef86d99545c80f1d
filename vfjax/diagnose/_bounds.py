"""Upper-bound sequences: from the features of every layer to a curve over depth.

A network's features vanish if a non-increasing sequence lies above them that ends close to zero
("Vanishing Feature: Diagnosing Model Merging and Beyond", definitions of variance collapse and of
the vanishing feature). The least such sequence is the tight bound; normalised by the edge models
and resampled by relative depth, the bounds of different networks fit in one plot. All of this is
small, and computed on the host in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vfjax.diagnose._features import Features

# Offset of the denominators of `upper_bound` from those of the text.
_INDEX = {"text": 0, "notebook": 1}


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """Relative features along the depth of K networks, and their upper bounds.

    Attributes:
        sites: Names of the L sites, from input to output.
        depth: `[L]` integers, depth of each site's layer; `output`, if the last layer has a site
            too, is one deeper.
        relative: `[K, L]` float64, features divided by the references' mean.
        bound: `[K, L]` float64, their upper bounds; equal at sites of one depth.
        total: Depth of the network, by which depths are divided to be relative.
    """

    sites: tuple[str, ...]
    depth: np.ndarray
    relative: np.ndarray
    bound: np.ndarray
    total: int

    def resampled(self, points: int = 20) -> np.ndarray:
        """The bounds at `points` relative depths, `[K, points]`: see `resample`.

        A site is at its depth divided by the network's. Beyond the last site its value is kept.

        Raises:
            ValueError: If `points` is not positive.
        """
        levels, first = np.unique(self.depth, return_index=True)
        return resample(self.bound[:, first], points, at=levels / max(self.total, levels[-1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Collapse:
    """Whether the variances of K networks collapse; made by `variance_collapse`.

    Attributes:
        sites: Names of the L sites, from input to output.
        variance: `[K, L]` float64, variance of every site's value.
        sequence: `[K, L]` float64, the least non-increasing sequence that is nowhere below it.
        final: `[K]` float64, last entries of the sequence.
        eps: Threshold to which they are compared.
        collapsed: `[K]` booleans, whether `final <= eps`.
    """

    sites: tuple[str, ...]
    variance: np.ndarray
    sequence: np.ndarray
    final: np.ndarray
    eps: float
    collapsed: np.ndarray


def upper_bound(values: Any, *, gamma: float = 1.0, index: str = "text") -> np.ndarray:
    """Bounds a sequence from above, working from its end to its beginning.

    `eps^(L) = r^(L)` and, for l = L-1 to 1, `eps^(l) = max(c_l eps^(l+1), r^(l))` with
    `c_l = 1 + (gamma - 1) / (L + 1 - l)`. With gamma = 1 it is the least non-increasing sequence
    above the values. A larger gamma lets it grow towards the input (by 1.2, 1.133, 1.1 ... for
    1.4), which smooths curves for comparison; single values then say little.

    Args:
        values: r, `[L]` non-negative numbers, first layer first; or several sequences, `[..., L]`.
        gamma: 1 for the tight bound; the paper's detailed plots use 1.4.
        index: `"text"`, or `"notebook"` for the denominators `L + 2 - l` of the reference notebook,
            which differ by one from the text's.

    Returns:
        The bounds, float64, shaped like the values.

    Raises:
        ValueError: If there are no values, or negative, NaN or infinite ones, if gamma is below 1
            or not finite, or if `index` is neither of the two.

    Example:
        >>> upper_bound([1.0, 0.2, 0.5, 0.25]).tolist()
        [1.0, 0.5, 0.5, 0.25]
        >>> [round(v, 3) for v in upper_bound([0, 0, 0, 1], gamma=1.4).tolist()]
        [1.496, 1.36, 1.2, 1.0]

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", the upper-bound sequence and
    its smoothed form.
    """
    values = _sequence(values, "values")
    if not np.isfinite(gamma) or gamma < 1:
        raise ValueError(f"gamma must be a number of 1 or more, got {gamma!r}")
    if index not in _INDEX:
        raise ValueError(f'index must be "text" or "notebook", got {index!r}')
    bound = values.copy()
    length = values.shape[-1]
    for place in range(length - 2, -1, -1):
        # With l = place + 1, the denominator is L + 1 - l.
        factor = 1 + (gamma - 1) / (length - place + _INDEX[index])
        bound[..., place] = np.maximum(factor * bound[..., place + 1], values[..., place])
    return bound


def resample(values: Any, points: int = 20, *, at: Any = None) -> np.ndarray:
    """Reads a sequence at equally spaced relative depths.

    Entry l of L is at the relative depth l/L, or where `at` says. The k-th entry of the result is
    the value at k/points, by linear interpolation; before the first entry it is the first value,
    and after the last entry the last value.

    Args:
        values: `[L]`, first layer first; or many sequences, `[..., L]`.
        points: Number of points; the last is at the output.
        at: `[L]`, the increasing relative depths of the entries, in [0, 1]; None for l/L.

    Returns:
        float64 `[..., points]`.

    Raises:
        ValueError: If there are no values, if one is NaN or infinite, if `points` is not positive,
            or if `at` does not increase from entry to entry within [0, 1].

    Example:
        >>> resample([4.0, 2.0], points=4).tolist()
        [4.0, 4.0, 3.0, 2.0]
    """
    values = _sequence(values, "values", negative=True)
    if isinstance(points, bool) or not isinstance(points, (int, np.integer)) or points < 1:
        raise ValueError(f"points must be a positive whole number, got {points!r}")
    length = values.shape[-1]
    known = np.arange(1, length + 1) / length if at is None else np.asarray(at, np.float64)
    inside = known.shape == (length,) and known.min() >= 0 and known.max() <= 1
    if not inside or not (np.diff(known) > 0).all():
        raise ValueError(
            f"at must hold {length} increasing relative depths from 0 to 1, got {known.tolist()}"
        )
    wanted = np.arange(1, points + 1) / points
    rows = [np.interp(wanted, known, row) for row in values.reshape(-1, length)]
    return np.reshape(rows, (*values.shape[:-1], points))


def bound_sequence(
    found: Features,
    *,
    sites: Sequence[str] | None = None,
    gamma: float = 1.0,
    index: str = "text",
) -> Bound:
    """Bounds features over depth from above, in units of the references' features.

    Sites of one depth, as in parallel branches, form one entry of the sequence: the largest of
    their features, with one bound. `output` follows the last layer.

    Args:
        found: The result of `features(..., references=...)`.
        sites: Names of sites; None for all on the main path, by depth, without `input`, which is
            not a feature.
        gamma: As in `upper_bound`.
        index: As in `upper_bound`.

    Returns:
        Relative features and bounds; 1 where features are as large as the references' mean.

    Raises:
        TypeError: If `found` is not a `Features`, or `sites` is a string.
        ValueError: If there are no references, if a site was not measured, if no site is left, or
            if the references' features are 0 somewhere.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> edge = {"a": jnp.eye(2), "b": jnp.eye(2)}
        >>> weak = {"a": jnp.eye(2), "b": jnp.eye(2) / 4}
        >>> x = jnp.ones((3, 2))
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], edge, x)
        >>> measured = vfjax.diagnose.features(net, [edge, weak], [x], references=[edge])
        >>> bound_sequence(measured).bound.tolist()
        [[1.0, 1.0], [1.0, 0.25]]

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", the upper-bound sequence.
    """
    names = _ordered(found, sites)
    values = found.relative
    relative = np.stack([np.asarray(values[name], np.float64) for name in names], axis=-1)
    bad = [name for name, r in zip(names, relative.T, strict=True) if not np.isfinite(r).all()]
    if bad:
        raise ValueError(
            f"the references' features are 0 at {bad[:3]}, so nothing can be relative to them; "
            "leave these out of `sites`"
        )
    depth = np.array([found.site(name).depth for name in names])
    last = np.array([name == "output" for name in names])
    # What follows the last layer may lose features as well, so `output` is a depth of its own.
    depth[last] += found.depth in depth[~last]
    levels, level = np.unique(depth, return_inverse=True)
    largest = np.stack([relative[:, depth == d].max(1) for d in levels], axis=-1)
    return Bound(
        sites=names,
        depth=depth,
        relative=relative,
        bound=upper_bound(largest, gamma=gamma, index=index)[:, level],
        total=found.depth,
    )


def variance_collapse(
    found: Features,
    *,
    eps: float,
    sites: Sequence[str] | None = None,
    reduction: str = "mean",
    relative: bool = False,
) -> Collapse:
    """Decides variance collapse by its definition.

    The variance of a network of L layers collapses over the data if a non-increasing sequence
    `eps^(1..L)` has `Var[f^(l)(x)] <= eps^(l)` for every l and `eps^(L) <= eps`. The least such
    sequence decides: the tight `upper_bound` of the variances. The definition leaves open how the
    variance of a vector becomes a number, and how small eps is.

    Args:
        found: The result of `features`.
        eps: Threshold that the last variance must not exceed; in squared units of the output, or
            with `relative` a fraction.
        sites: Names of sites, from input to output; None for all on the main path, by depth.
        reduction: `"mean"` of the variances of all units, or `"trace"` for their sum.
        relative: Whether to divide by the references' variances, as `Features.variance_ratio`;
            `reduction` then makes no difference.

    Returns:
        Variances, the sequence, its end, and whether that is at most eps.

    Raises:
        TypeError: If `found` is not a `Features`, or `sites` is a string.
        ValueError: If eps is negative, if `reduction` is neither of the two, if a site was not
            measured, if no site is left, or, with `relative`, if there are no references or their
            variance is 0 somewhere.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.eye(1), "b": jnp.eye(1) / 10, "bias": jnp.ones(1)}
        >>> x = jnp.array([[-1.0], [1.0]])
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"] + v["bias"], v, x)
        >>> collapse = variance_collapse(vfjax.diagnose.features(net, v, [x]), eps=0.1)
        >>> collapse.sequence.round(3).tolist(), collapse.collapsed.tolist()
        ([[1.0, 0.01]], [True])

    Source: "Vanishing Feature: Diagnosing Model Merging and Beyond", definition of variance
    collapse.
    """
    names = _ordered(found, sites)
    if not eps >= 0:
        raise ValueError(f"eps must be a number of 0 or more, got {eps!r}")
    if reduction not in ("mean", "trace"):
        raise ValueError(f'reduction must be "mean" or "trace", got {reduction!r}')
    values = found.variance_ratio if relative else found.variance
    variance = np.stack([np.asarray(values[name], np.float64) for name in names], axis=-1)
    bad = [name for name, v in zip(names, variance.T, strict=True) if not np.isfinite(v).all()]
    if bad:
        raise ValueError(
            f"the references' variance is 0 at {bad[:3]}, so nothing can be relative to it; "
            "leave these out of `sites`"
        )
    if reduction == "trace" and not relative:
        variance = variance * np.array([found.site(name).size for name in names], np.float64)
    sequence = upper_bound(variance)
    final = sequence[:, -1]
    return Collapse(names, variance, sequence, final, float(eps), final <= eps)


def _ordered(found: Features, sites: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the sites of a sequence, from input to output."""
    if not isinstance(found, Features):
        raise TypeError(
            f"found must be what vfjax.diagnose.features returns, got {type(found).__name__}"
        )
    if isinstance(sites, str):
        raise TypeError(f"sites must be a sequence of names, got the string {sites!r}")
    if sites is None:
        # The sort is stable: sites of one depth stay in the network's order.
        main = [site for site in found.sites if site.main and site.name != "input"]
        sites = [site.name for site in sorted(main, key=lambda site: site.depth)]
    names = tuple(found.site(name).name for name in sites)
    if not names:
        raise ValueError("no sites: none of the main path was measured, or `sites` is empty")
    return names


def _sequence(values: Any, name: str, *, negative: bool = False) -> np.ndarray:
    """Numbers `[..., L]` in float64, checked."""
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or values.size == 0:
        raise ValueError(f"{name} must be a sequence of numbers, got shape {list(values.shape)}")
    if not np.isfinite(values).all() or (not negative and (values < 0).any()):
        kind = "finite" if negative else "finite and not negative"
        raise ValueError(f"{name} must be {kind}, got {values.min():g} to {values.max():g}")
    return values
