"""Findings: numbers of every layer and norm, next to those of the references."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes import batch_size
from vfjax._passes.moments import alive
from vfjax.diagnose._bounds import Bound
from vfjax.diagnose._features import Features
from vfjax.diagnose._sites import describe
from vfjax.merge._unpacked import Unpacked
from vfjax.network._inside import is_output, tree_of
from vfjax.network._kernels import kernels
from vfjax.network._network import Network
from vfjax.network._records import Norm
from vfjax.network._stored import deviation, stored

# The ratio and both cosines of a site without a kernel to compare.
_UNKNOWN = (float("nan"),) * 3


@dataclasses.dataclass(frozen=True)
class LayerFinding:
    """One site of the main path, in a network and in its references' weighted mean.

    Attributes:
        site: Name of the site.
        layer: Name of its layer, or None.
        depth: Depth of that layer; L for the output.
        apart: Whether it lies inside stems or heads of a `Merged`, which no renormalisation
            changes, except RESET in heads.
        feature: `E ||f(x) - f(0)||`, L2, in units of the value.
        offset: `||f(0)||`, L2, in units of the value.
        reference_feature: The references' feature.
        reference_offset: The references' offset.
        relative: Feature over the references' feature.
        step: `relative` divided by that of the last depth before with features left (geometric
            mean over its sites; 1 before the first layer); 1 where nothing was left to lose.
        bound: Tight upper bound: the largest `relative` from here to the output.
        smoothed: The same with gamma = 1.4.
        std_ratio: Mean standard deviation of the channels that vary, divided by the references' for
            the same channels: the error that scaling can correct. 0 where no channel varies.
        mean_shift: Distance of means from the references', root mean square over channels, in
            units of the references' root mean square standard deviation. Like `std_ratio` and
            `rescaled_shift`, NaN where models differ in their channels.
        rescaled_shift: `mean_shift` if every channel were scaled to the references' standard
            deviation, as RESCALE does.
        dead: Share of channels that do not vary.
        reference_dead: The references' share.
        kernel_ratio: Mean absolute value of the kernel, divided by the references'; NaN without a
            layer and inside stems and heads.
        cosine: Cosine between the references' kernels, mean over pairs; NaN without a layer or
            pair, and inside stems and heads.
        merge_cosine: Cosine between the kernel and the references' weighted mean: 1 for their
            merge; NaN where `cosine` is.
    """

    site: str
    layer: str | None
    depth: int
    apart: bool
    feature: float
    offset: float
    reference_feature: float
    reference_offset: float
    relative: float
    step: float
    bound: float
    smoothed: float
    std_ratio: float
    mean_shift: float
    rescaled_shift: float
    dead: float
    reference_dead: float
    kernel_ratio: float
    cosine: float
    merge_cosine: float

    @property
    def ratio(self) -> float:
        """Feature over offset; infinite if the offset is 0, NaN if both are."""
        return divided(self.feature, self.offset)

    @property
    def reference_ratio(self) -> float:
        """The references' feature over their offset."""
        return divided(self.reference_feature, self.reference_offset)

    @property
    def silent(self) -> bool:
        """Whether no scale can bring features back: none are left, or no channel varies."""
        return self.relative == 0 or self.std_ratio == 0


@dataclasses.dataclass(frozen=True)
class NormFinding:
    """Stored statistics of a norm compared with the moments of its input.

    Attributes:
        name: Name of the norm.
        mean_error: Root mean square over channels of measured minus stored means, in units of the
            root mean square of measured standard deviations.
        std_ratio: Measured over stored standard deviation, each averaged over channels.
        reference_mean_error: The largest `mean_error` of the references.
        reference_std_ratio: The references' `std_ratio` that is furthest from 1.
        stale: Whether they disagree by more than a tolerance beyond the references' disagreement.
    """

    name: str
    mean_error: float
    std_ratio: float
    reference_mean_error: float
    reference_std_ratio: float
    stale: bool


def divided(a: float, b: float) -> float:
    """`a / b` of non-negative numbers: infinite over 0, NaN for 0 over 0."""
    if b:
        return a / b
    return float("inf") if a else float("nan")


def main_path(net: Network, names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The sites that a report follows, from input to output, and the name of the last one.

    These are the sites of the main path by depth, and `output`, unless the last of them has its
    value, or it is not a single array of floating-point numbers with one axis of examples.

    Args:
        net: The traced network.
        names: Names of sites.
    """
    sites = [site for site in (describe(net, name, 0) for name in names) if site.main]
    sites.sort(key=lambda site: (site.depth, site.name == "output"))
    path = tuple(site.name for site in sites if site.name != "input")
    if not path:
        return path, "the output"
    if is_output(net, path[-1]):
        return path, "the output"
    if _output_has_features(net):
        return (*path, "output"), "the output"
    return path, f"'{path[-1]}', the last site"


def _output_has_features(net: Network) -> bool:
    """Whether the output is one array of floats with one axis that grows with the batch."""
    variables = tree_of(net, net.leaves(net.paths))
    traced = jax.eval_shape(net.run, variables, net.x)
    if not isinstance(traced, jax.ShapeDtypeStruct):
        return False
    size = 2 if batch_size(net.x) == 1 else 1
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), net.x)
    other = jax.eval_shape(net.run, variables, x)
    if not jnp.issubdtype(traced.dtype, jnp.floating) or traced.ndim != other.ndim:
        return False
    return sum(n != m for n, m in zip(traced.shape, other.shape, strict=True)) == 1


def layer_findings(
    net: Network,
    network: Unpacked,
    references: Sequence[Unpacked],
    features: Features,
    bound: Bound,
    smoothed: Bound,
) -> tuple[LayerFinding, ...]:
    """The findings of the sites of a bound sequence, by depth."""
    layers = tuple(dict.fromkeys(features.site(site).layer for site in bound.sites))
    kernels = _kernels(net, network, references, [n for n in layers if n], features.weights)
    relative, steps = bound.relative[0], _steps(bound)
    rows = []
    for place, name in enumerate(bound.sites):
        site = features.site(name)
        kernel_ratio, cosine, merge_cosine = kernels.get(site.layer or "", _UNKNOWN)
        rows.append(
            LayerFinding(
                site=name,
                layer=site.layer,
                depth=site.depth,
                apart=network.model.apart(name),
                feature=float(np.asarray(features.feature[name])[0]),
                offset=float(np.asarray(features.offset[name])[0]),
                reference_feature=float(_goal(features, "feature", name)),
                reference_offset=float(_goal(features, "offset", name)),
                relative=float(relative[place]),
                step=float(steps[place]),
                bound=float(bound.bound[0, place]),
                smoothed=float(smoothed.bound[0, place]),
                **_moments(features, name),
                dead=float(np.asarray(features.dead[name])[0]),
                reference_dead=float(_goal(features, "dead", name)),
                kernel_ratio=kernel_ratio,
                cosine=cosine,
                merge_cosine=merge_cosine,
            )
        )
    return tuple(rows)


def norm_findings(
    net: Network,
    network: Unpacked,
    references: Sequence[Unpacked],
    features: Features,
    own: Features,
    *,
    mean_error: float,
    std_ratio: float,
) -> tuple[NormFinding, ...]:
    """The findings of norms of trunk and heads whose input was measured, in the network's order.

    Norms of heads that share a name are averaged.

    Args:
        net: The traced network.
        network: The network that is reported on.
        references: The networks that it is compared with.
        features: Features, measured at the norms' sites among others.
        own: Features of the network inside its heads, in the basis of each.
        mean_error: Tolerance of `mean_error` beyond the references' own.
        std_ratio: Tolerance of `std_ratio` beyond the references' own, a factor in either
            direction.
    """
    measured = [norm for norm in net.norms if norm.site in features.names]
    measured = [norm for norm in measured if not network.model.in_stems(norm.site)]
    findings = []
    for norm in measured:
        inside = network.model.in_heads(norm.site)
        mine = _disagreement(norm, network, own if inside else features, 0)
        if mine is None:
            continue
        assert features.references is not None
        others = [_disagreement(norm, r, features.references, k) for k, r in enumerate(references)]
        known = [other for other in others if other is not None] or [(0.0, 1.0)]
        error = max(other[0] for other in known)
        ratio = max((other[1] for other in known), key=lambda r: abs(np.log(r)))
        beyond = abs(np.log(mine[1])) - abs(np.log(ratio))
        stale = mine[0] > mean_error + error or beyond > np.log(std_ratio)
        findings.append(NormFinding(norm.name, *mine, error, ratio, bool(stale)))
    return tuple(findings)


def _steps(bound: Bound) -> np.ndarray:
    """`LayerFinding.step` of every site of the first network."""
    relative, steps = bound.relative[0], np.ones(len(bound.sites))
    ranks = [
        (depth, site == "output") for site, depth in zip(bound.sites, bound.depth, strict=True)
    ]
    last, lost = 1.0, False
    for rank in sorted(set(ranks)):
        here = np.array([other == rank for other in ranks])
        values = relative[here]
        steps[here] = np.where((values == 0) & lost, 1.0, values / last)
        alive = values[values > 0]
        lost = not alive.size
        # The step after a branch that died, but was bypassed, is relative to the live sites.
        last = last if lost else float(np.exp(np.log(alive).mean()))
    return steps


def _goal(features: Features, what: str, site: str) -> np.ndarray:
    """The weighted mean of one of the references' numbers."""
    assert features.references is not None
    values = np.asarray(getattr(features.references, what)[site], np.float64)
    return np.tensordot(np.asarray(features.weights), values, 1)


def _moments(features: Features, site: str) -> dict[str, float]:
    """How the moments of a site's channels compare with the references'."""
    assert features.references is not None
    if site not in features.mean or site not in features.references.mean or _other(features, site):
        return dict.fromkeys(("std_ratio", "mean_shift", "rescaled_shift"), float("nan"))
    mean, std = (np.asarray(of[site])[0] for of in (features.mean, features.std))
    varies = alive(mean, std**2).ravel()
    mean, std = (np.asarray(a, np.float64).ravel() for a in (mean, std))
    goal_mean, goal_std = (_goal(features, what, site).ravel() for what in ("mean", "std"))
    scale = np.ones_like(std)
    np.divide(goal_std, std, out=scale, where=varies)
    unit = float(np.sqrt(np.square(goal_std).mean()))
    shifts = [float(np.sqrt(np.square(m - goal_mean).mean())) for m in (mean, scale * mean)]
    now, rescaled = (0.0 if not shift else divided(shift, unit) for shift in shifts)
    if varies.any():
        ratio = divided(float(std[varies].mean()), float(goal_std[varies].mean()))
    else:
        ratio = 0.0 if unit else 1.0
    return {"std_ratio": ratio, "mean_shift": now, "rescaled_shift": rescaled}


def _other(features: Features, site: str) -> bool:
    """Whether the references have other channels at a site than the network."""
    assert features.references is not None
    return np.shape(features.mean[site])[1:] != np.shape(features.references.mean[site])[1:]


def _disagreement(
    norm: Norm, network: Unpacked, features: Features, k: int
) -> tuple[float, float] | None:
    """Error of stored means and ratio of standard deviations, for network k of a record."""
    heads = network.model.in_heads(norm.site)
    flats = network.heads if heads else (network.trunk,)
    shares = network.model.weights if heads else (1.0,)
    if norm.site not in features.mean:
        return None
    mean, std = (
        np.asarray(part[norm.site], np.float64)[k].ravel() for part in (features.mean, features.std)
    )
    stored_mean = stored_std = divided_by = np.zeros(())
    for j, (share, (leaves, _)) in enumerate(zip(shares, flats, strict=True)):
        net = network.model.net_of(j) if heads else network.net
        if norm.mean not in leaves or norm.var not in leaves:
            return None
        exact = {path: np.asarray(leaves[path], np.float64) for path in (norm.mean, norm.var)}
        own = stored(net, norm.name, leaves | exact)
        if own.mean.size != mean.size:  # heads of different widths
            return None
        var = np.maximum(np.ravel(own.var), 0)
        stored_mean = stored_mean + share * np.ravel(own.mean)
        # Stored and measured variances are compared by what the norm divides by.
        for_stored, for_measured = (
            np.ravel(deviation(net, norm.name, leaves, v)) for v in (var, np.square(std))
        )
        stored_std, divided_by = stored_std + share * for_stored, divided_by + share * for_measured
    unit = np.sqrt(np.square(divided_by).mean())
    if not unit or not stored_std.any():
        return None
    error = np.sqrt(np.square(mean - stored_mean).mean()) / unit
    return float(error), float(divided_by.mean() / stored_std.mean())


def _kernels(
    net: Network,
    network: Unpacked,
    references: Sequence[Unpacked],
    names: Sequence[str],
    weights: Sequence[float],
) -> dict[str, tuple[float, float, float]]:
    """`kernel_ratio`, `cosine` and `merge_cosine` of `LayerFinding`, by layer.

    Without layers inside stems or heads of any of the networks, and layers whose kernels differ in
    size.
    """
    networks = (network, *references)
    numbers = {}
    for name in names:
        if any(_outside(net, each, name) for each in networks):
            continue
        each = [kernels(net, one.trunk.leaves, [name])[0] for one in networks]
        if len({kernel.size for kernel in each}) > 1:
            continue
        mine, *others = each
        goal = sum(w * np.abs(k).mean() for w, k in zip(weights, others, strict=True))
        ratio = divided(float(np.abs(mine).mean()), float(goal))
        if len(others) == 1:
            numbers[name] = (ratio, *_UNKNOWN[1:])
            continue
        cosine = np.mean([_cosine(a, b) for a, b in itertools.combinations(others, 2)])
        numbers[name] = (ratio, float(cosine), _cosine(mine, np.tensordot(weights, others, 1)))
    return numbers


def _outside(net: Network, network: Unpacked, name: str) -> bool:
    """Whether a network has a kernel per model at a layer."""
    model = network.model
    return (model.cut > 0 and net.in_stem(name, model.cut)) or model.in_heads(name)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine between two vectors, 0 if one is 0."""
    return float(np.vdot(a, b).real / ((np.linalg.norm(a) * np.linalg.norm(b)) or 1.0))
