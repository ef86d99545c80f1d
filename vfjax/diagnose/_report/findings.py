"""What a report rests on: numbers of every layer and norm, next to those of the references."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax._passes.batching import batch_size
from vfjax._passes.moments import alive
from vfjax.diagnose._bounds import Bound
from vfjax.diagnose._features import Features
from vfjax.diagnose._sites import describe, value_of
from vfjax.merge._unpacked import Unpacked
from vfjax.network._kernels import kernels
from vfjax.network._network import Network
from vfjax.network._records import Norm

# Of a site without a kernel to compare: its ratio, and both cosines.
_UNKNOWN = (float("nan"),) * 3


@dataclasses.dataclass(frozen=True)
class LayerFinding:
    """One site of the main path, in a network and in its references' weighted mean.

    Attributes:
        site: Name of the site.
        layer: Name of its layer, or None.
        depth: Depth of that layer; L for the output.
        apart: Whether it lies inside stems or heads of a `Merged`, which no renormalisation
            reaches but for RESET, of heads.
        feature: `E ||f(x) - f(0)||`, L2, in units of the value.
        offset: `||f(0)||`, likewise.
        reference_feature: The references' feature.
        reference_offset: The references' offset.
        relative: Feature over the references' feature.
        step: `relative` over that of the nearest depth before at which features were left
            (geometric mean), 1 before the first layer; 1 where nothing was left to lose.
        bound: Tight upper bound: the largest `relative` from here to the output.
        smoothed: The same with gamma = 1.4.
        std_ratio: Mean standard deviation of the channels that vary over the references' of these
            channels: what scaling can put right. 0 where none varies.
        mean_shift: How far means are from the references', root mean square over channels, in
            the references' root mean square standard deviation. Like `std_ratio` and
            `rescaled_shift` NaN where models have other channels than others.
        rescaled_shift: `mean_shift` if every channel were scaled to the references' standard
            deviation, as RESCALE does.
        dead: Share of channels that do not vary.
        reference_dead: The references' share.
        kernel_ratio: Mean absolute value of the kernel over the references'; NaN without a layer
            and inside stems.
        cosine: Cosine between the references' kernels, mean over pairs; NaN without a layer or
            pair, and inside stems.
        merge_cosine: Cosine between the kernel and the references' weighted mean: 1 for their
            merge; NaN likewise.
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
        """Feature over offset; infinite without an offset, NaN without either."""
        return divided(self.feature, self.offset)

    @property
    def reference_ratio(self) -> float:
        """The references' feature over their offset."""
        return divided(self.reference_feature, self.reference_offset)

    @property
    def silent(self) -> bool:
        """Whether no scale brings features back: none are left, or no channel varies."""
        return self.relative == 0 or self.std_ratio == 0


@dataclasses.dataclass(frozen=True)
class NormFinding:
    """Stored statistics of a norm against the moments of what it reads.

    Attributes:
        name: Name of the norm.
        mean_error: Root mean square over channels of measured less stored means, in measured
            standard deviations (root mean square).
        std_ratio: Measured over stored standard deviation, each the mean over channels.
        reference_mean_error: The references' `mean_error`, the largest.
        reference_std_ratio: The references' `std_ratio`, that furthest from 1.
        stale: Whether they disagree by more than a tolerance beyond the references' own.
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
    """The sites that a report follows, from input to output, and what the last one stands for.

    Those of the main path by depth, and `output`, unless the last of them has its value or it is no
    single array of floating-point numbers with one axis of examples.

    Args:
        net: The traced network.
        names: Names of sites.
    """
    sites = [site for site in (describe(net, name, 0) for name in names) if site.main]
    sites.sort(key=lambda site: (site.depth, site.name == "output"))
    path = tuple(site.name for site in sites if site.name != "input")
    if not path:
        return path, "the output"
    if path[-1] == "output" or net._reference.graph.outputs == (value_of(net, path[-1]),):
        return path, "the output"
    if _output_has_features(net):
        return (*path, "output"), "the output"
    return path, f"'{path[-1]}', the last site"


def _output_has_features(net: Network) -> bool:
    variables = jax.tree.unflatten(net._treedef, list(net._avals.values()))
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
    found: Features,
    bound: Bound,
    smoothed: Bound,
) -> tuple[LayerFinding, ...]:
    """Numbers of the sites of a bound sequence, by depth."""
    layers = tuple(dict.fromkeys(found.site(site).layer for site in bound.sites))
    kernels = _kernels(net, network, references, [n for n in layers if n], found.weights)
    relative, steps = bound.relative[0], _steps(bound)
    rows = []
    for place, name in enumerate(bound.sites):
        site = found.site(name)
        kernel_ratio, cosine, merge_cosine = kernels.get(site.layer or "", _UNKNOWN)
        rows.append(
            LayerFinding(
                site=name,
                layer=site.layer,
                depth=site.depth,
                apart=network.model.apart(name),
                feature=float(found.feature[name][0]),
                offset=float(found.offset[name][0]),
                reference_feature=float(_goal(found, "feature", name)),
                reference_offset=float(_goal(found, "offset", name)),
                relative=float(relative[place]),
                step=float(steps[place]),
                bound=float(bound.bound[0, place]),
                smoothed=float(smoothed.bound[0, place]),
                **_moments(found, name),
                dead=float(found.dead[name][0]),
                reference_dead=float(_goal(found, "dead", name)),
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
    found: Features,
    own: Features,
    *,
    mean_error: float,
    std_ratio: float,
) -> tuple[NormFinding, ...]:
    """Norms of trunk and heads whose input was measured, in the network's order.

    The norms of heads, which share a name, count by their means.

    Args:
        net: The traced network.
        network: What is reported on.
        references: What it is compared with.
        found: Features with the norms' sites among them.
        own: Features of the model in its heads, as they are there.
        mean_error: What a norm's may be beyond the references' own.
        std_ratio: Likewise, a factor either way.
    """
    measured = [norm for norm in net.norms if norm.site in found.names]
    measured = [norm for norm in measured if not network.model.in_stems(norm.site)]
    findings = []
    for norm in measured:
        inside = network.model.in_heads(norm.site)
        mine = _disagreement(norm, network, own if inside else found, 0)
        if mine is None:
            continue
        assert found.references is not None
        others = [_disagreement(norm, r, found.references, k) for k, r in enumerate(references)]
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
        # A branch that died and was gone around is nothing to measure what follows by.
        last = last if lost else float(np.exp(np.log(alive).mean()))
    return steps


def _goal(found: Features, what: str, site: str) -> np.ndarray:
    """The references' weighted mean of a number."""
    assert found.references is not None
    values = np.asarray(getattr(found.references, what)[site], np.float64)
    return np.tensordot(np.asarray(found.weights), values, 1)


def _moments(found: Features, site: str) -> dict[str, float]:
    """How the moments of a site's channels compare with the references'."""
    assert found.references is not None
    if site not in found.mean or site not in found.references.mean or _other(found, site):
        return dict.fromkeys(("std_ratio", "mean_shift", "rescaled_shift"), float("nan"))
    mean, std = found.mean[site][0], found.std[site][0]
    varies = np.asarray(alive(mean, std**2)).ravel()
    mean, std = (np.asarray(a, np.float64).ravel() for a in (mean, std))
    goal_mean, goal_std = (_goal(found, what, site).ravel() for what in ("mean", "std"))
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


def _other(found: Features, site: str) -> bool:
    """Whether the references have other channels at a site than the network."""
    assert found.references is not None
    return np.shape(found.mean[site])[1:] != np.shape(found.references.mean[site])[1:]


def _disagreement(
    norm: Norm, network: Unpacked, found: Features, k: int
) -> tuple[float, float] | None:
    """Error of stored means and ratio of standard deviations, of network k of a record."""
    heads = network.model.in_heads(norm.site)
    flats = network.heads if heads else (network.trunk,)
    shares = network.model.weights if heads else (1.0,)
    stored_mean = stored_std = np.zeros(())
    for share, (leaves, _) in zip(shares, flats, strict=True):
        if norm.mean not in leaves or norm.var not in leaves:
            return None
        stored, var = (
            np.asarray(leaves[path], np.float64).ravel() for path in (norm.mean, norm.var)
        )
        if stored_mean.shape not in ((), stored.shape):  # heads with widths of their own
            return None
        stored_mean = stored_mean + share * stored
        stored_std = stored_std + share * np.sqrt(np.maximum(var, 0) + norm.eps)
    if norm.site not in found.mean:
        return None
    mean, std = (
        np.asarray(part[norm.site][k], np.float64).ravel() for part in (found.mean, found.std)
    )
    if mean.shape != stored_mean.shape:  # a stack of which a scan takes one
        return None
    unit = np.sqrt((np.square(std) + norm.eps).mean())
    if not unit or not stored_std.any():
        return None
    error = np.sqrt(np.square(mean - stored_mean).mean()) / unit
    return float(error), float(np.sqrt(np.square(std) + norm.eps).mean() / stored_std.mean())


def _kernels(
    net: Network,
    network: Unpacked,
    references: Sequence[Unpacked],
    names: Sequence[str],
    weights: Sequence[float],
) -> dict[str, tuple[float, float, float]]:
    """A kernel's magnitude over the references', the cosine between theirs, and with their mean.

    By layer, but for those inside stems or heads of one of the networks, and those whose kernels
    differ in size.
    """
    networks = (network, *references)
    found = {}
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
            found[name] = (ratio, *_UNKNOWN[1:])
            continue
        cosine = np.mean([_cosine(a, b) for a, b in itertools.combinations(others, 2)])
        found[name] = (ratio, float(cosine), _cosine(mine, np.tensordot(weights, others, 1)))
    return found


def _outside(net: Network, network: Unpacked, name: str) -> bool:
    """Whether a network has a kernel per model at a layer."""
    model = network.model
    return (model.cut > 0 and net.in_stem(name, model.cut)) or model.in_heads(name)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine between two vectors, 0 if one is 0."""
    return float(np.vdot(a, b) / ((np.linalg.norm(a) * np.linalg.norm(b)) or 1.0))
