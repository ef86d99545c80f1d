"""What "Vanishing Feature" claims of averaged linear networks, and how it is decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from kit import claims
from kit.claims import Claim, Decision
from kit.grid import over_pairs
from kit.records import Record

EDGES = ("model 1", "model 2")


def by_layer(record: Record, key: str, network: str | tuple[str, ...] = "direct") -> np.ndarray:
    """A number of each layer, the mean over pairs."""
    return np.array(record.rows.curve("layer", key, network=network)[1])


def left(record: Record, key: str = "feature", of: str = "feature") -> np.ndarray:
    """What the midpoint has of something, relative to what edge models have, by layer."""
    return by_layer(record, key) / by_layer(record, of, EDGES)


def at_the_end(record: Record) -> np.ndarray:
    return np.array([left(record, key)[-1] for key in ("feature", "rescaled_feature")])


def decide(
    record: Record,
    what: str,
    of: Callable[[Record], np.ndarray],
    holds: Callable[[np.ndarray], bool],
) -> Decision:
    values = of(record)
    return bool(holds(values)), f"{what}: {', '.join(f'{value:.2g}' for value in values)}"


def rescaled(ends: np.ndarray) -> bool:
    """Whether about as much as is lost is brought back, in logarithms."""
    lost, still_lost = -np.log(ends)
    return 0.5 < (lost - still_lost) / lost < 1.5


def claim(name: str, text: str, paper: str, rule: claims.Rule, by: str) -> Claim:
    of_means = partial(over_pairs, rule=rule)
    return Claim(f"vf.linear.{name}", text, paper, of_means, by=f"{by} (means over pairs)")


CLAIMS = [
    claim("fades", "features fade from layer to layer in the midpoint", "it fades",
          partial(decide, what="g over the edge models', by layer", of=left,
                  holds=lambda found: found[-1] < 0.1 * found[0]),
          "to less than a tenth from the first layer to the last"),
    claim("offset-grows", "offsets grow from layer to layer in the midpoint", "it grows",
          partial(decide, what="h by layer", of=partial(by_layer, key="offset"),
                  holds=lambda found: found[-1] > found[0]),
          "larger at the last layer than at the first"),
    claim("overtakes", "offsets overtake features in the last layers", "it overtakes",
          partial(decide, what="g / h by layer",
                  of=lambda record: by_layer(record, "feature") / by_layer(record, "offset"),
                  holds=lambda found: found[-1] < 1 <= max(found)),
          "h is larger than g from some layer after the first on, to the end"),
    claim("near-chance", "direct midpoints are at chance", "8.9 of 85.8 in its notebook",
          claims.AtChance(claims.accuracy("direct midpoint", network="direct"), claims.NEAR),
          "within 10 points of chance; up to two standard errors more are undecided"),
    claim("weights-smaller", "weights are smaller in the midpoint than in the edge models",
          "they are smaller", partial(decide, what="over the edge models', by layer",
                                      of=partial(left, key="weight", of="weight"),
                                      holds=lambda found: max(found) < 1), "in every layer"),
    claim("weights-rise", "weights rise again in the final layers", "they rise",
          partial(decide, what="by layer", of=partial(by_layer, key="weight"),
                  holds=lambda found: 1 <= np.argmin(found) < len(found) - 1),
          "their mean magnitude is least in a layer after the first, before the last"),
    claim("rescaled", "rescaling largely removes the fading", "it does largely",
          partial(decide, what="g over the edge models' at the last layer, and rescaled",
                  of=at_the_end, holds=rescaled),
          "more than half of it, in logarithms, and no more than one and a half times it"),
]  # fmt: skip
