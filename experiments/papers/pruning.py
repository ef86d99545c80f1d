"""What "Vanishing Feature" claims of pruned networks, and how it is decided from a record."""

from __future__ import annotations

import math
import statistics
from functools import partial

from kit import claims
from kit.claims import Claim, Decision
from kit.figures import label
from kit.pruned import METHODS, Case, cases
from kit.records import Record, joined

# Where renormalisation must gain, and how much; "much is pruned", "nearly", and how often chance
# may look like a loss.
HIGH, GAIN, HALF, NEARLY, CHANCE = (80, 90), 0.1, 50, 0.9, 0.05
# Methods that are renormalised by fewer images, too.
BY_SAMPLES = ("magnitude", "magnitude-layer")


def near(record: Record, case: Case) -> bool:
    return claims.near_chance(record, case.plain, case.renormalised)


def of_the_paper(record: Record, method: str) -> bool:
    """Whether it has such a method for such networks: Wanda for ConvNeXt, and that layerwise."""
    if record["model"]["name"].startswith("convnext"):
        return method in ("magnitude-layer", "wanda", "wanda-layer")
    return "wanda" not in method


def never_behind(record: Record) -> Decision:
    """Whether renormalisation never hurts beyond chance; open if near chance alone."""
    found = [c for m in (None, *record.rows.distinct("method")) for c in cases(record, m)]
    limit = statistics.NormalDist().inv_cdf(1 - CHANCE / len(found))
    behind = [case for case in found if case.gain < -limit * case.error]

    def told(case: Case) -> str:
        of = f"{label(case.method)} at {case.sparsity}%" if case.method else "nothing pruned"
        return f"{100 * case.gain:+.1f} from {100 * case.plain:.1f} with {of}"

    here = f"behind in {len(behind)} of {len(found)} cases"
    if not behind:
        return True, f"{here} (lowest, points: {told(min(found, key=lambda case: case.gain))})"
    decided = None if all(near(record, case) for case in behind) else False
    return decided, f"{here}: {joined(map(told, behind))} points"


def gains(record: Record, method: str, high: tuple[float, float] = HIGH) -> Decision | None:
    """Whether it brings back `GAIN` or more wherever, from `high` to `high`, pruning costs that."""
    (unpruned,) = cases(record, None)
    found = [c for c in cases(record, method) if high[0] <= (c.sparsity or 0) <= high[1]]
    return claims.every(
        (
            None if near(record, case) else claims.beyond(case.gain - GAIN, 2 * case.error),
            f"{100 * case.plain:.1f} to {100 * case.renormalised:.1f} at {case.sparsity}%",
        )
        for case in found
        if case.plain <= unpruned.plain - GAIN
    )


def most_at_high(record: Record, least: float = GAIN) -> Decision | None:
    """Whether methods that gain `least` anywhere gain most above `HALF` of the weights."""
    found = []
    for method in record.rows.distinct("method"):
        of = cases(record, method)
        sides = [c for c in of if c.sparsity <= HALF], [c for c in of if c.sparsity > HALF]
        if not all(sides):
            continue
        low, high = (max(side, key=lambda case: case.gain) for side in sides)
        best = max(low, high, key=lambda case: case.gain)
        if best.gain >= least:
            holds = claims.beyond(high.gain - low.gain, 2 * math.hypot(low.error, high.error))
            here = f"{best.sparsity}% ({label(method)}, {100 * best.gain:+.1f})"
            found.append((holds, here))
    return claims.every(found)


def few_are_enough(record: Record, method: str) -> Decision | None:
    """Whether the fewest images bring nearly what all do, where these bring enough."""
    rows, plain = record.rows.where(method=method), {c.sparsity: c for c in cases(record, method)}
    gained = {
        name: {s: rows.mean(samples=name, sparsity=s) - plain[s].plain for s in plain}
        for name in rows.distinct("samples")
    }
    at = sorted(s for s, gain in gained.get("all", {}).items() if gain >= GAIN)
    few = {name: statistics.fmean(of[s] for s in at) for name, of in gained.items() if at}
    first = next(iter(few), "all")
    if first == "all":
        return None
    free = claims.free(record, rows.mean(samples="all", sparsity=at))
    parts = joined(f"{name} images bring {100 * gain:.1f}" for name, gain in few.items())
    here = f"{parts} points at {joined(f'{s}%' for s in at)}: {100 * few[first] / few['all']:.0f}%"
    return claims.reached(few[first], NEARLY * few["all"], free), here


CLAIMS = [
    Claim("vf.pruning.never-behind", "renormalised, pruned networks are never worse",
          "never lower", never_behind,
          by="in the mean over seeds, no method at any sparsity, nor nothing pruned, loses more "
          "than what chance would exceed at any of them once in twenty times, by the images that "
          "only one of the two networks has right; undecided if those that do are near chance"),
    *(Claim(f"vf.pruning.gains-{method}",
            f"pruned by {label(method)}, 80 to 90%, networks regain tens of points",
            "tens of points; ConvNeXt-B 36 by Wanda and 55 by magnitude at 80%",
            partial(gains, method=method), told=partial(of_the_paper, method=method),
            by="ten points or more at each of these sparsities where pruning costs as many; two "
            "standard errors of the difference are level") for method in METHODS),
    Claim("vf.pruning.most-at-high", "most is gained where much is pruned", "at high sparsity",
          most_at_high, by="at over half of the weights, for methods that gain ten points "
          "anywhere; two standard errors of the difference are level"),
    *(Claim(f"vf.pruning.few-images-{method}",
            f"64 images bring {label(method)} nearly what all training images do",
            "one batch of 64 is enough", partial(few_are_enough, method=method),
            told=lambda record: record["model"]["name"].startswith("resnet20"),
            by="the fewest bring nine tenths of what all do, over the sparsities where these bring "
            "ten points; up to two standard errors less are undecided") for method in BY_SAMPLES),
]  # fmt: skip
