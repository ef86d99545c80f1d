"""What "Vanishing Feature" claims of features in merged networks, and how it is decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


def mitigates(record: Record, name: str, than: str) -> Decision | None:
    if not len(left(record, name)):
        return None
    kept = {one: over_layers(left(record, one)) for one in (name, than)}
    told = (f"{label(one)} {mean:.2g}" for one, mean in kept.items())
    return kept[name] > kept[than], f"{joined(told)} times the edge models'"


def against_offsets(record: Record, name: str) -> Decision | None:
    if not len(left(record, name)):
        return None
    own, other = (shares(record.rows, network=one)[-1] for one in (name, "matched"))
    return own > other, f"they end at {own:.2g} times the offset, matched at {other:.2g}"


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


def of(*models: str, match: str | None = None) -> Callable[[Record], bool]:
    """Records of some models, and of a matching."""

    def fits(record: Record) -> bool:
        config = record["config"]
        return config["model"] in models and match in (None, config["match"])

    return fits


OVER_LAYERS = "the geometric mean over layers of features is above that of the {} midpoint"
AT_END = "features over offsets at the last layer are above those of the matched midpoint, for it "
AT_END += "scales down or removes offsets alone"
PRESERVED, BY_RESET = of("vgg16", "vgg16-bn", "resnet20"), of("vgg16-bn", match="weight")
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
          partial(mitigates, name="matched", than="direct"), by=OVER_LAYERS.format("direct")),
    *(Claim(f"vf.features.{name}-mitigates", f"{label(name)} brings features back", "it does",
            partial(mitigates, name=name, than="matched"), by=OVER_LAYERS.format("matched"))
      for name in ("repair", "rescale", "reset")),
    *(Claim(f"vf.features.{name.replace('_', '-')}-mitigates",
            f"{label(name)} brings features back against offsets", "it mitigates vanishing",
            partial(against_offsets, name=name), by=AT_END)
      for name in ("bias_calibration", "bias_removal")),
    Claim("vf.features.pfm-grows", "the more layers are kept apart the less features vanish",
          "in VGG16, VGG16-BN and ResNet20; the first l - 1 layers are whole", grows,
          told=PRESERVED, by="features at the end do not fall with l, and before layer l they are "
          "the edge models' within a thousandth"),
    Claim("vf.features.reset-deviations", "RESET lowers the stored standard deviations",
          "a lot, in VGG16-BN after weight matching", partial(changed, key="std"),
          told=BY_RESET, by="in every norm"),
    Claim("vf.features.reset-means", "RESET leaves the stored means about the same",
          "in VGG16-BN after weight matching", partial(changed, key="mean"), told=BY_RESET,
          by="the median over norms of their magnitudes within a fifth"),
]
# fmt: on
