"""What "Vanishing Feature" claims of features in merged networks, and how it is decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from kit.claims import Claim, Decision
from kit.features import by_layer, over_layers, shares
from kit.figures import label
from kit.records import Record, joined

EDGES = ("model 1", "model 2")
# Features that fade strongly keep less than this from the first layer to the last; of logits, what
# they vary by and how far they are from f(0), at most; and by how much means stay about the same.
FADED, VARIES, AWAY, SAME = 0.1, 0.1, 0.25, (0.8, 1.25)


def left(record: Record, name: str) -> np.ndarray:
    """A network's features by layer, relative to those of the edge models; none if it has none."""
    return by_layer(record.rows, network=name)


def fades(record: Record, least: float, most: float) -> Decision:
    first, *_, last = left(record, "direct")
    return (
        least < last / first < most,
        f"{first:.2g} times at layer 1, {last:.2g} times at the last",
    )


def logits(record: Record) -> Decision:
    rows, direct = record.rows, record.rows.where(network="direct")
    by_edge = [rows.mean("logit_std", network=name) for name in EDGES]
    varies = float(direct.mean("logit_std") / np.mean(by_edge))
    mean, zero = (np.array(direct.values(key)) for key in ("logit", "logit_at_zero"))
    away = float(np.linalg.norm(mean - zero) / np.linalg.norm(zero))
    here = f"they vary {varies:.2g} times as much, their mean is {100 * away:.2g}% away from f(0)"
    return varies < VARIES and away < AWAY, here


def kept(record: Record, name: str) -> float:
    return over_layers(left(record, name))


def share(record: Record, name: str) -> float:
    return float(shares(record.rows, network=name)[-1])


def more(record: Record, of: Callable[..., float], name: str, than: str = "matched") -> Any:
    """Whether a network has more of something than another."""
    if not len(left(record, name)):
        return None
    own, other = of(record, name), of(record, than)
    return own > other, f"{label(name)} {own:.2g}, {label(than)} {other:.2g}"


def grows(record: Record) -> Decision:
    found, whole = {0: left(record, "matched")}, True
    for kept in sorted(record.rows.distinct("layers")):
        found[kept] = by_layer(record.rows, layers=kept)
        whole &= bool(np.allclose(found[kept][: kept - 1], 1, atol=1e-3))
    ends = np.array([values[-1] for values in found.values()])
    # A first layer kept apart is as good as merged, since the input is one: equal up to rounding.
    rises = bool((np.diff(ends) > -1e-4 * ends[:-1]).all())
    texts = joined(f"{value:.2g}" for value in ends)
    return whole and rises, f"they end at {texts} times with l = {joined(found)}"


def changed(record: Record, key: str) -> Decision | None:
    """Whether RESET lowers the deviations that all norms store, or leaves most means alone."""
    before, after = (record.rows.values(key, network=n) for n in ("matched", "reset"))
    if not before:
        return None
    found = np.divide(after, before)
    median, low, high = (float(of(found)) for of in (np.median, np.min, np.max))
    here = f"{median:.2g} times (median over norms; {low:.2g} to {high:.2g})"
    return high < 1 if key == "std" else SAME[0] < median < SAME[1], here


def layernorm(record: Record) -> bool:
    return record["config"]["model"].endswith("-ln")


def of(*models: str) -> Callable[[Record], bool]:
    return lambda record: record["config"]["model"] in models


def by_reset(record: Record) -> bool:
    return of("vgg16-bn")(record) and record["config"]["match"] == "weight"


OVER_LAYERS = "the geometric mean over layers of features is above that of the {} midpoint"
AT_END = "features over offsets at the last layer are above those of the matched midpoint, for it "
AT_END += "scales down or removes offsets alone"
# fmt: off
CLAIMS = [
    Claim("vf.features.direct-fades", "features of direct midpoints fade strongly with depth",
          "in VGG16, VGG16-BN and ResNet20", partial(fades, least=-1, most=FADED),
          lambda record: not layernorm(record),
          by="to less than a tenth from the first layer to the last"),
    Claim("vf.features.layernorm-fades-mildly", "with LayerNorm features fade much more mildly",
          "in ResNet20 with LayerNorm", partial(fades, least=FADED, most=1), layernorm,
          by="they fade, to no less than a tenth from the first layer to the last"),
    Claim("vf.features.direct-logits", "logits of direct midpoints hardly depend on the image",
          "ResNet20: they are close to f(0)", logits, told=of("resnet20"),
          by="they vary by less than a tenth as much as the edge models', and their mean is less "
          "than a quarter of the norm of f(0) away from f(0)"),
    Claim("vf.features.matching-mitigates", "matching mitigates vanishing features", "it does",
          partial(more, of=kept, name="matched", than="direct"), by=OVER_LAYERS.format("direct")),
    *(Claim(f"vf.features.{name}-mitigates", f"{label(name)} brings features back", "it does",
            partial(more, of=kept, name=name), by=OVER_LAYERS.format("matched"))
      for name in ("repair", "rescale", "reset")),
    *(Claim(f"vf.features.{name.replace('_', '-')}-mitigates",
            f"{label(name)} brings features back against offsets", "it mitigates vanishing",
            partial(more, of=share, name=name), by=AT_END)
      for name in ("bias_calibration", "bias_removal")),
    Claim("vf.features.pfm-grows", "the more layers are kept apart the less features vanish",
          "in VGG16, VGG16-BN and ResNet20; the first l - 1 layers are whole", grows,
          told=of("vgg16", "vgg16-bn", "resnet20"), by="features at the end do not fall with l, "
          "and before layer l they are the edge models' within a thousandth"),
    Claim("vf.features.reset-deviations", "RESET lowers the stored standard deviations",
          "a lot, in VGG16-BN after weight matching", partial(changed, key="std"),
          told=by_reset, by="in every norm"),
    Claim("vf.features.reset-means", "RESET leaves the stored means about the same",
          "in VGG16-BN after weight matching", partial(changed, key="mean"), told=by_reset,
          by="the median over norms of their magnitudes within a fifth"),
]
# fmt: on
