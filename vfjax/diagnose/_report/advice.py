"""The rules by which a report's findings lead to remedies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vfjax.diagnose._report.findings import LayerFinding, NormFinding
from vfjax.network._network import Network
from vfjax.renorm import _bias
from vfjax.stats._sites import resolve_sites

# Standard deviations are off beyond this factor, in either direction.
STD_OFF = 1.25
# Means are off beyond this, in standard deviations of the references.
MEAN_OFF = 0.5
# References count as unrelated if the cosine of their kernels is below this (0 if independent).
UNRELATED = 0.1
# A network counts as a merge of its references if its kernels have at least this cosine with their
# mean; one of two unrelated references would have 0.71.
MERGE = 0.9
# Kernels count as shrunk below this magnitude, relative to the references.
SHRUNK = 0.9


@dataclasses.dataclass(frozen=True)
class Advice:
    """A remedy, and the reason for it.

    Attributes:
        remedy: `"match first"`, `"RESET"`, `"RESCALE"`, `"REPAIR"`, `"bias calibration"`, `"PFM"`,
            `"nothing to do"`, or `"none known"` where no rule applies.
        reason: The numbers that speak for it, in a sentence.
        call: The function call, as code; empty where there is none.
        layers: For `"PFM"`, the number of first layers to keep apart.
    """

    remedy: str
    reason: str
    call: str = ""
    layers: int | None = None

    def __str__(self) -> str:
        """Remedy and reason in one line."""
        return f"{self.remedy}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that advice depends on.

    Attributes:
        net: The traced network.
        span: The layers that are merged; those before and after are already kept apart.
        weights: Weights of the references.
        own_weights: Weights that functions use if they are given the network but no weights.
        trees: Whether all references are trees rather than a `Merged`, which remedies need.
        mapped: Whether maps carry the references into the basis of the merge.
        rows: Findings by depth; the last is the end of the network.
        end: Name of that end: `the output`, or a site.
        norms: Findings of norms.
        masked: Whether a mask says which positions count.
        threshold: Features vanish at or below this share of the references' features.
    """

    net: Network
    span: slice
    weights: tuple[float, ...]
    own_weights: tuple[float, ...]
    trees: bool
    rows: Sequence[LayerFinding]
    norms: Sequence[NormFinding]
    end: str
    threshold: float
    mapped: bool = False
    masked: bool = False

    @property
    def vanishes(self) -> LayerFinding | None:
        """The first finding from which on features are at or below the threshold, up to the end."""
        return next((row for row in self._passed if row.bound <= self.threshold), None)

    @property
    def largest_drop(self) -> LayerFinding:
        """The finding with the smallest step."""
        return min(self._passed, key=lambda row: row.step)

    @property
    def _passed(self) -> list[LayerFinding]:
        """Findings without dead branches, which have no feature while a later site has one."""
        return [row for row in self.rows if row.relative > 0 or row.bound == 0]

    @property
    def biases_dominate(self) -> bool:
        """Whether offsets decide the output, and far more than in the references."""
        last = self.rows[-1]
        # NaN (neither feature nor offset) and infinite ratios both compare as False.
        return last.ratio < 1 and last.ratio <= self.threshold * last.reference_ratio

    @property
    def left(self) -> float:
        """Share of the references' features that is left at the end."""
        return self.rows[-1].relative

    @property
    def layers(self) -> list[LayerFinding]:
        """Findings of layers that a renormalisation can correct, where their moments are known."""
        within = [row for row in self.rows if row.layer is not None and not row.apart]
        return [row for row in within if not np.isnan(row.std_ratio)]


def std_off(row: LayerFinding) -> bool:
    """Whether a site's standard deviations are off, and can be corrected by a scale."""
    return not row.silent and not 1 / STD_OFF <= row.std_ratio <= STD_OFF


def faulty(rows: Sequence[LayerFinding]) -> LayerFinding | None:
    """The first site whose moments are off: everything before it agrees with the references.

    Dead sites are taken only if there are no others, since only their means can be corrected.
    """
    off = [row for row in rows if std_off(row) or row.mean_shift > MEAN_OFF]
    return min(off, key=lambda row: row.silent, default=None)


def advise(case: Case) -> tuple[Advice, ...]:
    """Remedies that the findings suggest, in the order in which to apply them."""
    rules = (_match, _reset, _moments, _biases, _preserve_first)
    suggested = [advice for rule in rules for advice in rule(case)]
    if suggested:
        return tuple(suggested)
    silent = next((row for row in case.rows if row.silent), None)
    if silent is not None:
        reason = (
            f"what is left at {silent.site} (depth {silent.depth}) does not vary with the input, "
            "and no scale changes that"
        )
        return (Advice("none known", reason),)
    if case.vanishes is not None or case.biases_dominate:
        reason = (
            f"only {case.left:.3g} of the references' features reach {case.end}, yet the moments "
            "of all layers are the references', so no renormalisation changes that"
        )
        return (Advice("none known", reason),)
    worst = max((max(r.std_ratio, _inverse(r.std_ratio)) for r in case.layers), default=1.0)
    means = max((r.mean_shift for r in case.layers), default=0.0)
    reason = (
        f"{case.left:.3g} of the references' features reach {case.end}; standard deviations "
        f"are within a factor of {worst:.3g} and means within {means:.2g} standard deviations of "
        "theirs"
    )
    return (Advice("nothing to do", reason),)


def _inverse(value: float) -> float:
    """The inverse of a number; infinite for 0."""
    return 1 / value if value else float("inf")


def _merge(case: Case) -> bool:
    """Whether the network's kernels are averages of several references', up to scales."""
    known = [row.merge_cosine for row in case.rows if not np.isnan(row.merge_cosine)]
    return case.trees and bool(known) and float(np.median(known)) >= MERGE


def _weights(case: Case, default: Sequence[float]) -> str:
    """The argument that passes the references' weights, if the default would be different."""
    return "" if case.weights == tuple(default) else f", weights={case.weights}"


def _match(case: Case) -> list[Advice]:
    """Matching, if the references' kernels are unrelated: averages of such kernels shrink."""
    cosines = [row.cosine for row in case.rows if not np.isnan(row.cosine)]
    if case.vanishes is None or not _merge(case) or not case.net.spec.groups:
        return []
    cosine = float(np.mean(cosines))
    if cosine >= UNRELATED:
        return []
    last = case.rows[-1]
    # Layers at the cut count as merged: averaging their outputs averages their kernels.
    first, end = max(case.span.start - 1, 0), min(last.depth, case.span.stop)
    step = case.left ** (1 / max(end - first, 1))
    unrelated = float(np.linalg.norm(case.weights))
    magnitude = float(np.mean([row.kernel_ratio for row in case.rows if not np.isnan(row.cosine)]))
    reason = (
        f"the references' kernels have a cosine of {cosine:.2g} with each other, merged ones are "
        f"{magnitude:.2g} of their magnitude (averages of unrelated rows are {unrelated:.2g}), and "
        f"features fall to {step:.2g} per layer; if the networks were matched already, matching "
        "found little"
    )
    if case.mapped:  # by another matcher, and no number tells which to try instead
        return [Advice("match first", reason)]
    # Aligns all to the first, whose alignment with itself is the identity.
    permutations = "vfjax.align.match_weights(net, references[0], b, key=key).permutations"
    return [
        Advice("match first", reason, f"[net.spec.permute(b, {permutations}) for b in references]")
    ]


def _reset(case: Case) -> list[Advice]:
    """RESET, if stored statistics of norms disagree with what the norms read."""
    stale = [norm for norm in case.norms if norm.stale]
    if not stale:
        return []
    first = stale[0]
    reason = (
        f"the stored statistics of {len(stale)} of {len(case.norms)} norms disagree with what they "
        f"read, first at {first.name}: means by {first.mean_error:.2g} standard deviations, "
        f"measured standard deviations are {first.std_ratio:.2g} of the stored ones"
    )
    mask = ", mask=mask" if case.masked else ""
    return [Advice("RESET", reason, f"vfjax.renorm.reset(net, merged, data{mask})")]


def _moments(case: Case) -> list[Advice]:
    """RESCALE or REPAIR, by the first layer that is off: nothing upstream confounds it."""
    row = faulty(case.layers)
    # Moments after stale statistics say nothing about the layers themselves.
    if row is None or any(norm.stale for norm in case.norms):
        return []
    dead = any(r.silent and r.depth < row.depth for r in case.layers)
    first = f"the first layer that is off{', dead ones apart' if dead else ''}"
    at = f"at {row.site} (depth {row.depth}), {first}, "
    deviation = f"standard deviations are {row.std_ratio:.2g} of the references'"
    away = f"means are {row.mean_shift:.2g} standard deviations from the references'"
    if row.silent:
        return [_renormalise(case, row, "REPAIR", f"{at}{away}; only they can be put right there")]
    if not std_off(row):
        reason = f"{at}{away}, while {deviation}, so scaling does not help"
        return [_renormalise(case, row, "REPAIR", reason)]
    if row.rescaled_shift > MEAN_OFF:
        reason = (
            f"{at}{deviation}, and with these put right means would still be "
            f"{row.rescaled_shift:.2g} standard deviations away"
        )
        return [_renormalise(case, row, "REPAIR", reason)]
    reason = (
        f"{at}{deviation}, and with these put right means are within "
        f"{row.rescaled_shift:.2g} standard deviations: no shift is needed"
    )
    return [_renormalise(case, row, "RESCALE", reason)]


def _renormalise(case: Case, row: LayerFinding, remedy: str, reason: str) -> Advice:
    """Advice for a renormalisation from data, with sites that include a layer."""
    if not case.trees:
        return Advice(remedy, f"{reason}; it needs the references as trees")
    sites = "" if row.layer in resolve_sites(case.net, "paper") else ', sites="all"'
    weights = _weights(case, case.own_weights)
    maps = ", maps=maps" if case.mapped else ""
    mask = ", mask=mask" if case.masked else ""
    arguments = f"net, merged, data, references=references{maps}{weights}{sites}{mask}"
    return Advice(remedy, reason, f"vfjax.renorm.{remedy.lower()}({arguments})")


def _biases(case: Case) -> list[Advice]:
    """Bias calibration, if kernels shrank but biases did not; it needs no data."""
    ratios = [row.kernel_ratio for row in case.rows if not np.isnan(row.kernel_ratio)]
    if not case.biases_dominate or not _merge(case) or not case.left or min(ratios) <= 0:
        return []
    if any(norm.stale for norm in case.norms) or not _calibrates(case):
        return []
    shrunk = float(np.exp(np.mean(np.log(ratios))))
    if shrunk >= SHRUNK:
        return []
    last = case.rows[-1]
    reason = (
        f"the offset is {_inverse(last.ratio):.3g} times the feature at {case.end} (the "
        f"references': {_inverse(last.reference_ratio):.2g}), and weights are "
        f"{shrunk:.2g} of theirs per layer; it needs no data, where RESCALE or REPAIR do"
    )
    maps = ", maps=maps" if case.mapped else ""
    arguments = f"net, merged, references=references{maps}{_weights(case, case.own_weights)}"
    return [Advice("bias calibration", reason, f"vfjax.renorm.calibrate_bias({arguments})")]


def _calibrates(case: Case) -> bool:
    """Whether there are biases after the first layer, and each serves layers of one depth."""
    end = case.span.stop if case.span.stop < case.net.depth else None
    depths = [set(served) for served in _bias.bias_depths(case.net, case.span.start, end).values()]
    return all(len(served) == 1 for served in depths) and any(max(served) > 1 for served in depths)


def _preserve_first(case: Case) -> list[Advice]:
    """PFM: layers that are kept apart lose nothing, which pays if the loss is late or sudden."""
    total = case.net.depth
    if case.vanishes is None or not _merge(case) or not case.left:
        return []
    drop = case.largest_drop
    share = float(np.log(drop.step) / np.log(case.left))
    late = case.vanishes.depth > total / 2
    if not late and share < 0.5:
        return []
    # Share of features that survives the layers after a depth, from the worst live site there.
    survives = {}
    for row in case.rows:
        if row.relative > 0:
            survives[row.depth] = max(survives.get(row.depth, 0.0), case.left / row.relative)
    # The fewest layers to keep so that features survive the rest.
    kept = min(depth for depth, share_left in survives.items() if share_left >= case.threshold)
    until = case.span.stop
    if not max(1, case.span.start) < kept < until:
        return []
    extra = (len(case.weights) - 1) * case.net.stem_params(kept) / case.net.params
    how = (
        f"{100 * min(share, 1):.0f} % of the loss is at {drop.site} alone"
        if share >= 0.5
        else f"features vanish late, at depth {case.vanishes.depth} of {total}"
    )
    reason = (
        f"{how}; keep the first l = {kept} of {total} layers apart, and {survives[kept]:.2g} of "
        f"the features survive the rest, for {100 * extra:.0f} % more parameters"
    )
    equal = (1 / len(case.weights),) * len(case.weights)
    weights = _weights(case, equal)
    call = f"vfjax.merge.preserve_first(net, references, layers={kept}{weights})"
    if case.mapped or until < total:
        which = f"slice({kept}, {until if until < total else None})"
        maps = ", maps" if case.mapped else ""
        call = f"vfjax.merge.partial(net, references{maps}, span={which}{weights})"
    return [Advice("PFM", reason, call, kept)]
