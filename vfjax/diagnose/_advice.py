"""Which remedy measured numbers ask for: the rules behind a report's advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vfjax import stats
from vfjax.diagnose._findings import LayerFinding, NormFinding
from vfjax.network import Network

# A standard deviation is off beyond this factor, either way.
STD_OFF = 1.25
# Means are off beyond this, in standard deviations of the references.
MEAN_OFF = 0.5
# References whose kernels have a smaller cosine are as unrelated rows (0 for independent ones).
UNRELATED = 0.1
# A network is the references' merge where its kernels have at least this cosine with their mean;
# that of one of two unrelated references is 0.71.
MERGE = 0.9
# Kernels have shrunk below this magnitude, relative to the references.
SHRUNK = 0.9


@dataclasses.dataclass(frozen=True)
class Advice:
    """A remedy, and why.

    Attributes:
        remedy: `"match first"`, `"RESET"`, `"RESCALE"`, `"REPAIR"`, `"bias calibration"`, `"PFM"`,
            `"nothing to do"`, or `"none known"` where no rule applies.
        reason: The numbers that it rests on, in a sentence.
        call: The function to call, as code; empty where there is none.
        layers: For `"PFM"`, how many leading layers to keep apart.
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
    """All that advice is given on.

    Attributes:
        net: The traced network.
        cut: How many layers the network keeps apart already.
        weights: Of the references.
        rows: Findings by depth.
        norms: Findings of norms.
        threshold: Features vanish at or below this share of the references'.
        vanishes: Where they do.
        largest_drop: Where the smallest step is.
        biases_dominate: Whether offsets decide the output, and not the references'.
    """

    net: Network
    cut: int
    weights: tuple[float, ...]
    rows: Sequence[LayerFinding]
    norms: Sequence[NormFinding]
    threshold: float
    vanishes: LayerFinding | None
    largest_drop: LayerFinding
    biases_dominate: bool


def std_off(row: LayerFinding) -> bool:
    """Whether a site's standard deviations differ from the references'."""
    return not 1 / STD_OFF <= row.std_ratio <= STD_OFF


def faulty(rows: Sequence[LayerFinding]) -> LayerFinding | None:
    """The first site whose moments are off: what comes before it is as in the references."""
    return next((row for row in rows if std_off(row) or row.mean_shift > MEAN_OFF), None)


def advise(case: Case) -> tuple[Advice, ...]:
    """Remedies that the numbers ask for, what to do first first."""
    rules = (_match, _reset, _moments, _biases, _preserve_first)
    found = [advice for rule in rules for advice in rule(case)]
    if found:
        return tuple(found)
    last = case.rows[-1]
    if case.vanishes is not None or case.biases_dominate:
        reason = (
            f"only {last.relative:.3g} of the references' features reach the output, yet the "
            "moments of all layers are the references', so no renormalisation changes that"
        )
        return (Advice("none known", reason),)
    worst = max(max(r.std_ratio, _inverse(r.std_ratio)) for r in case.rows)
    reason = (
        f"{last.relative:.3g} of the references' features reach the output; standard deviations "
        f"are within a factor of {worst:.3g} and means within "
        f"{max(r.mean_shift for r in case.rows):.2g} standard deviations of theirs"
    )
    return (Advice("nothing to do", reason),)


def _inverse(value: float) -> float:
    """Its inverse."""
    return 1 / value if value else float("inf")


def _merge(case: Case) -> bool:
    """Whether the network's kernels are averages of several references', up to scales."""
    known = [row.merge_cosine for row in case.rows if not np.isnan(row.merge_cosine)]
    return bool(known) and float(np.median(known)) >= MERGE


def _match(case: Case) -> list[Advice]:
    """Kernels of the references that have nothing in common lose what unrelated rows lose."""
    cosines = [row.cosine for row in case.rows if not np.isnan(row.cosine)]
    if case.vanishes is None or not _merge(case) or not case.net.spec.groups:
        return []
    cosine = float(np.mean(cosines))
    if cosine >= UNRELATED:
        return []
    last = case.rows[-1]
    # Kernels at the cut are averages still, of their outputs.
    step = last.relative ** (1 / max(last.depth - max(case.cut - 1, 0), 1))
    unrelated = float(np.linalg.norm(case.weights))
    magnitude = float(np.mean([row.kernel_ratio for row in case.rows if not np.isnan(row.cosine)]))
    reason = (
        f"the references' kernels have a cosine of {cosine:.2g} with each other, merged ones are "
        f"{magnitude:.2g} of their magnitude (averages of unrelated rows are {unrelated:.2g}), and "
        f"features fall to {step:.2g} per layer; if the networks were matched already, matching "
        "found little"
    )
    return [Advice("match first", reason, "vfjax.align.match_weights(net, a, b, key=key)")]


def _reset(case: Case) -> list[Advice]:
    stale = [norm for norm in case.norms if norm.stale]
    if not stale:
        return []
    first = stale[0]
    reason = (
        f"the stored statistics of {len(stale)} of {len(case.norms)} norms disagree with what they "
        f"read, first at {first.name}: means by {first.mean_error:.2g} standard deviations, "
        f"measured standard deviations are {first.std_ratio:.2g} of the stored ones"
    )
    return [Advice("RESET", reason, "vfjax.renorm.reset(net, merged, data)")]


def _moments(case: Case) -> list[Advice]:
    """RESCALE or REPAIR, by the first site that is off: upstream nothing confounds it."""
    row = faulty(case.rows)
    # Moments behind stale statistics say nothing of the layers themselves.
    if row is None or any(norm.stale for norm in case.norms):
        return []
    sites = ""
    if row.layer is not None and row.layer not in stats.resolve_sites(case.net, "paper"):
        sites = ', sites="all"'
    call = "vfjax.renorm.{}(net, merged, data, references=references" + sites + ")"
    at = f"at {row.site} (depth {row.depth}), the first layer that is off, "
    deviation = f"standard deviations are {row.std_ratio:.2g} of the references'"
    if not std_off(row):
        reason = (
            f"{at}means are {row.mean_shift:.2g} standard deviations from the references', while "
            f"{deviation}, so scaling does not help"
        )
        return [Advice("REPAIR", reason, call.format("repair"))]
    if row.rescaled_shift > MEAN_OFF:
        reason = (
            f"{at}{deviation}, and with these put right means would still be "
            f"{row.rescaled_shift:.2g} standard deviations away"
        )
        return [Advice("REPAIR", reason, call.format("repair"))]
    reason = (
        f"{at}{deviation}, and with these put right means are within "
        f"{row.rescaled_shift:.2g} standard deviations: no shift is needed"
    )
    return [Advice("RESCALE", reason, call.format("rescale"))]


def _biases(case: Case) -> list[Advice]:
    """What biases that stayed as they were ask for, without data."""
    ratios = [row.kernel_ratio for row in case.rows if not np.isnan(row.kernel_ratio)]
    if not case.biases_dominate or not ratios or min(ratios) <= 0:
        return []
    if any(norm.stale for norm in case.norms):
        return []
    shrunk = float(np.exp(np.mean(np.log(ratios))))
    if shrunk >= SHRUNK:
        return []
    last = case.rows[-1]
    reason = (
        f"the offset is {_inverse(last.ratio):.3g} times the feature at the output (the "
        f"references': {_inverse(last.reference_ratio):.2g}), and weights are "
        f"{shrunk:.2g} of theirs per layer; it needs no data, where RESCALE or REPAIR do"
    )
    return [Advice("bias calibration", reason, "vfjax.renorm.calibrate_bias(net, merged)")]


def _preserve_first(case: Case) -> list[Advice]:
    """Layers that are kept apart lose nothing; worth it where the loss is late or at once."""
    rows, last, total = case.rows, case.rows[-1], case.net.depth
    if case.vanishes is None or not _merge(case):
        return []
    drop = case.largest_drop
    lost = -np.log(max(last.relative, np.finfo(float).tiny))
    share = -np.log(max(drop.step, np.finfo(float).tiny)) / lost
    late = case.vanishes.depth > total / 2
    if not late and share < 0.5:
        return []
    # The fewest layers to keep, such that features survive the rest.
    depths = sorted({row.depth for row in rows})
    kept = next(
        depth
        for depth in depths
        if last.relative >= case.threshold * min(r.relative for r in rows if r.depth == depth)
    )
    if not max(1, case.cut) < kept < total:
        return []
    extra = (len(case.weights) - 1) * case.net.stem_parameters(kept) / case.net.parameters
    how = (
        f"{100 * min(share, 1):.0f} % of the loss is at {drop.site} alone"
        if share >= 0.5
        else f"features vanish late, at depth {case.vanishes.depth} of {total}"
    )
    left = last.relative / min(r.relative for r in rows if r.depth == kept)
    reason = (
        f"{how}; keep the first l = {kept} of {total} layers apart, and {left:.2g} of the "
        f"features survive the rest, for {100 * extra:.0f} % more parameters"
    )
    call = f"vfjax.merge.preserve_first(net, references, layers={kept})"
    return [Advice("PFM", reason, call, kept)]
