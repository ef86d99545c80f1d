"""What "Vanishing Feature" claims of features in pruned networks, and how it is decided."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from kit.claims import Claim, Decision
from kit.features import by_layer, over_layers, shares
from kit.figures import label
from kit.records import Record

# Of the unpruned network's, less than this is "vanished".
VANISHED = 0.3


def remedy_of(record: Record) -> str:
    return next(name for name in record.rows.distinct("network") if "pruned" not in name)


def measured(record: Record, name: str) -> dict[str, float]:
    """What claims are decided by: means over seeds, relative to the unpruned network."""
    found = []
    for seed in record.rows.distinct("seed"):
        rows = record.rows.where(seed=seed)
        relative = by_layer(rows, network=name)
        spread, whole = (rows.mean("logit_std", network=of) for of in (name, "unpruned"))
        ends = relative[0], relative[-1], over_layers(relative)
        found.append((*ends, spread / whole, shares(rows, network=name)[-1]))
    keys = ("first", "end", "layers", "varies", "share")
    return dict(zip(keys, np.mean(found, axis=0).tolist(), strict=True))


def closer(new: float, old: float) -> bool:
    """Whether a ratio is closer to 1 than another.

    Example:
      >>> closer(1.5, 0.5), closer(2.5, 0.5)
      (True, False)
    """
    return abs(math.log(max(new, 1e-30))) < abs(math.log(max(old, 1e-30)))


def vanishes(record: Record) -> Decision:
    found = measured(record, "pruned")
    here = f"{found['first']:.2f} times the unpruned one's at layer 1, {found['end']:.2f} times at "
    return found["end"] < min(VANISHED, found["first"]), f"{here}{record['model']['depth']}"


def hardly_varies(record: Record) -> Decision:
    found = measured(record, "pruned")["varies"]
    return found < VANISHED, f"they vary {found:.2f} times as much"


def cured(record: Record, key: str) -> Decision:
    remedy = remedy_of(record)
    after, before = (measured(record, name)[key] for name in (remedy, "pruned"))
    return closer(after, before), f"{after:.2f} with {label(remedy)}, {before:.2f} pruned"


CLOSER = "the ratio to the unpruned network's is closer to 1, in logarithms: {} (means over seeds)"
CLAIMS = [
    Claim("vf.pruned.vanishes", "features vanish in pruned networks", "VGG16-BN at 80%, ResNet20 "
          "at 85%", vanishes, by="less than three tenths of the unpruned network's are left at the "
          "last layer, and less than at the first (means over seeds)"),
    Claim("vf.pruned.logits", "logits of pruned networks hardly depend on the image",
          "VGG16-BN at 80%, ResNet20 at 85%", hardly_varies,
          by="they vary by less than three tenths of the unpruned network's (mean over seeds)"),
    *(Claim(f"vf.pruned.cured-{key}", f"renormalisation brings back {what}", "RESET cures it",
            partial(cured, key=key), by=CLOSER.format(text))
      for key, what, text in (
          ("end", "features at the output", "at the last layer"),
          ("layers", "features over all layers", "the geometric mean over layers"),
          ("varies", "how much logits vary", "their standard deviation over images"))),
]  # fmt: skip
