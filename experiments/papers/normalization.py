"""What "Vanishing Feature" claims of remedies at the midpoint, and how it is decided."""

import math

from kit import claims, records
from kit.claims import Above, Claim, Comparison, Enough, Leads, Level, Quantity, accuracy
from kit.figures import label

REMEDIES = ("repair", "rescale", "bias_removal", "bias_calibration")
MATCHES = {"weight": "weight matching", "activation": "activation matching"}
# "About equal".
EQUAL = 0.05


def chosen(rows: records.Rows, match: str, seed: int | None) -> int:
    """The k that is best on held-out images: the smallest of equals."""
    held_out = rows.where(match=match, seed=seed, images="held_out")
    return max(held_out, key=lambda row: (row["accuracy"], -row["k"]))["k"]


def middle(match: str, remedy: str) -> Quantity:
    return accuracy(label(remedy), match=match, remedy=remedy, alpha=0.5)


def best(name: str, share: float = 1.0, **where: str) -> Quantity:
    """So much of the best accuracy over all k, the mean over runs; NaN without any."""

    def of(record: records.Record) -> float:
        return share * max(record.rows.curve("k", **where)[1], default=math.nan)

    return Quantity(name, of)


def chooses(record: records.Record, of_paper: float, of_all: float) -> bool | None:
    """Whether no other k is better on held-out images; open within noise on these."""
    free = claims.noise(of_all, record["data"]["held_out_images"])
    near = claims.near_chance(record, of_all)
    return None if near else claims.reached(of_paper, of_all, free)


def of_removal(match: str, text: str) -> list[Claim]:
    """That forward removal hurts, and that few of the last biases are enough."""
    held_out = {"match": match, "images": "held_out"}
    first, last = ({"match": match, "images": "test", "side": side} for side in ("first", "last"))
    none = accuracy("none removed", **first, k=0)
    some = accuracy("1 to 5 of the first biases removed, on average", **first,
                    k=(1, 2, 3, 4, 5))  # fmt: skip
    paper = best("5 or 6 removed", **held_out, k=(5, 6))
    return [
        Claim(f"vf.remedies.{match}-forward-hurts", f"{text}, removing the first biases hurts",
              "forward removal hurts", Above(none, some, 0.01)),
        Claim(f"vf.remedies.{match}-k", f"{text}, held-out images choose to remove 5 or 6 biases",
              "5 or 6 (on test images)",
              Comparison((paper, best("any number", **held_out)), chooses,
                         "5 or 6 as good as any; open within two standard errors below")),
        Claim(f"vf.remedies.{match}-enough", f"{text}, removing the last 5 biases is enough",
              "5 or 6 are enough", Enough(accuracy("5 removed", **last, k=5),
                                          best("95% of the best", 0.95, **last), 0.0),
              by="95% of the best accuracy of all k; open up to two standard errors below"),
    ]  # fmt: skip


W, A = ({remedy: middle(match, remedy) for remedy in ("none", *REMEDIES, "reset")}
        for match in MATCHES)  # fmt: skip
OTHERS = [W[remedy] for remedy in REMEDIES[1:]]
CLAIMS = [
    Claim("vf.remedies.weight-repair-worst", "with weight matching REPAIR is the worst of four",
          "the worst at the midpoint", Leads(W["repair"], OTHERS, last=True)),
    Claim("vf.remedies.weight-others-level", "with weight matching the other three are about equal",
          "about equal", Level(OTHERS, EQUAL)),
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
    *(claim for match, text in MATCHES.items() for claim in of_removal(match, f"with {text}")),
    *(Claim(f"vf.new.{match}-reset", f"with {MATCHES[match]} RESET brings accuracy back at the "
            "midpoint", "", Above(of["reset"], of["none"]))
      for match, of in zip(MATCHES, (W, A), strict=True)),
]  # fmt: skip
