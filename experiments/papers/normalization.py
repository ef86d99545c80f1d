"""What "Vanishing Feature" claims of remedies at the midpoint, and how it is decided."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from kit import claims, records
from kit.claims import Above, Claim, Decision, Leads, Level, Quantity, accuracy
from kit.figures import label

REMEDIES = ("repair", "rescale", "bias_removal", "bias_calibration")
MATCHES = {"weight": "weight matching", "activation": "activation matching"}
# What claims are decided by: the paper's k, "about equal", "enough" and "hurts".
LAST, EQUAL, ENOUGH, MARGIN = (5, 6), 0.05, 0.95, 0.01


def chosen(rows: records.Rows, match: str, seed: int | None) -> int:
    """The k that is best on held-out images: the smallest of equals."""
    held_out = rows.where(match=match, seed=seed, images="held_out")
    return max(held_out, key=lambda row: (row["accuracy"], -row["k"]))["k"]


def middle(match: str, remedy: str) -> Quantity:
    return accuracy(label(remedy), match=match, remedy=remedy, alpha=0.5)


def removed(record: records.Record, match: str) -> list[int]:
    """The k that held-out images chose, by run, without repetition."""
    seeds = dict.fromkeys(row["seed"] for row in record.rows.where(match=match))
    return sorted({chosen(record.rows, match, seed) for seed in seeds})


def few(record: records.Record) -> int:
    """The paper's k, or as many layers as there are but the first."""
    return min(LAST[0], record["model"]["depth"] - 1)


def removal(record: records.Record, match: str, side: str) -> np.ndarray:
    """Accuracy by k, the mean over runs."""
    return np.array(record.rows.curve("k", match=match, images="test", side=side)[1])


def early(record: records.Record, match: str) -> float:
    """Its mean with 1 to `few` of the first biases removed."""
    found = removal(record, match, "first")[1 : few(record) + 1]
    return float(found.mean()) if len(found) else math.nan


def chosen_by_paper(record: records.Record, match: str) -> Decision | None:
    rows = record.rows.where(match=match, images="held_out")
    if not rows:
        return None
    ks, by_k = removed(record, match), dict(zip(*rows.curve("k")[:2], strict=True))
    best, paper = max(by_k.values()), max(by_k.get(k, 0.0) for k in LAST)
    close = best - paper <= claims.noise(best, record["data"]["held_out_images"])
    holds = set(ks) <= set(LAST) or (None if close else False)
    here = f"k = {' or '.join(map(str, ks))}"
    return None if claims.near_chance(record, best) else holds, here


def few_are_enough(record: records.Record, match: str) -> Decision | None:
    found, k = removal(record, match, "last").tolist(), few(record)
    if not found:
        return None
    best = max(found)
    here = f"{k} removed: {100 * found[k]:.1f}, {100 * found[k] / max(best, 1e-9):.0f}% of the "
    here += f"{100 * best:.1f} with {found.index(best)} removed"
    holds = found[k] >= ENOUGH * best or claims.compared(record, found[k], ENOUGH * best)
    return None if claims.near_chance(record, best) else holds, here


def removal_claims(match: str, text: str) -> list[Claim]:
    """That forward removal hurts, and that few of the last biases are enough."""
    none = Quantity("none removed", lambda record: [*removal(record, match, "first"), np.nan][0])
    some = Quantity("1 to 5 of the first biases removed, on average", partial(early, match=match))
    return [
        Claim(f"vf.remedies.{match}-forward-hurts", f"{text}, removing the first biases hurts",
              "forward removal hurts", Above(none, some, MARGIN)),
        Claim(f"vf.remedies.{match}-k", f"{text}, held-out images choose to remove 5 or 6 biases",
              "5 or 6 (on test images)", partial(chosen_by_paper, match=match),
              by="k is 5 or 6; open where 5 or 6 are as good within two standard errors"),
        Claim(f"vf.remedies.{match}-enough", f"{text}, removing the last 5 biases is enough",
              "5 or 6 are enough", partial(few_are_enough, match=match),
              by="95% of the best accuracy of all k; open up to two standard errors below"),
    ]  # fmt: skip


W, A = ({remedy: middle(match, remedy) for remedy in ("none", *REMEDIES, "reset")}
        for match in MATCHES)  # fmt: skip
CLAIMS = [
    Claim("vf.remedies.weight-repair-worst", "with weight matching REPAIR is the worst of four",
          "the worst at the midpoint",
          Leads(W["repair"], [W[r] for r in REMEDIES[1:]], last=True)),
    Claim("vf.remedies.weight-others-level", "with weight matching the other three are about equal",
          "about equal", Level([W[r] for r in REMEDIES[1:]], EQUAL)),
    *(Claim(f"vf.remedies.weight-{remedy.replace('_', '-')}-helps",
            f"with weight matching {label(remedy)} helps", "all four do",
            Above(W[remedy], W["none"])) for remedy in REMEDIES),
    Claim("vf.t1.repair-below-matched", "REPAIR is below activation matching alone",
          "39.1 and 46.5 (table 1)", Above(A["none"], A["repair"])),
    Claim("vf.t1.rescale-leads", "RESCALE is the best after activation matching",
          "84.7; bias cal. 82.9 (table 1)",
          Leads(A["rescale"], [A[r] for r in REMEDIES if r != "rescale"])),
    Claim("vf.t1.bias-next-to-rescale", "bias calibration is next to RESCALE",
          "82.9 and 84.7 (table 1)", Level((A["bias_calibration"], A["rescale"]), EQUAL)),
    *(claim for match, text in MATCHES.items() for claim in removal_claims(match, f"with {text}")),
    *(Claim(f"vf.new.{match}-reset", f"with {MATCHES[match]} RESET brings accuracy back at the "
            "midpoint", "", Above(of["reset"], of["none"]))
      for match, of in zip(MATCHES, (W, A), strict=True)),
]  # fmt: skip
