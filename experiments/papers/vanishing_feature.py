"""What "Vanishing Feature" claims of features in merged networks, and how it is decided."""

from __future__ import annotations

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
# What the paper has the logits of, and bounds with layers kept apart.
LOGITS = ("resnet20",)
PRESERVED = ("vgg16", "vgg16-bn", "resnet20")


def left(record: Record, name: str) -> np.ndarray:
    """A network's features by layer, relative to those of the edge models; none if it has none."""
    return by_layer(record.rows, network=name)


def fades(record: Record, least: float, most: float) -> Decision:
    first, *_, last = found = left(record, "direct")
    here = f"{first:.2g} times the edge models' at layer 1, {last:.2g} times at {len(found)}"
    return least < last / first < most, here


def logits(record: Record) -> Decision:
    edges, direct = record.rows.where(network=EDGES), record.rows.where(network="direct")
    by_edge = [edges.mean("logit_std", network=name) for name in EDGES]
    varies = float(direct.mean("logit_std") / np.mean(by_edge))
    mean, zero = (np.array(direct.values(key)) for key in ("logit", "logit_at_zero"))
    away = float(np.linalg.norm(mean - zero) / np.linalg.norm(zero))
    here = f"they vary {varies:.2g} times as much as the edge models', and their mean is "
    here += f"{100 * away:.2g}% of the norm of f(0) away from f(0)"
    return varies < VARIES and away < AWAY, here


def mitigates(record: Record, name: str, than: str) -> Decision | None:
    found = {one: left(record, one) for one in (name, than)}
    if not len(found[name]):
        return None
    kept = {one: over_layers(relative) for one, relative in found.items()}
    told = (f"{label(one)} {kept[one]:.2g} times over layers, {relative[-1]:.2g} times at the end"
            for one, relative in found.items())  # fmt: skip
    return kept[name] > kept[than], "; ".join(told)


def against_offsets(record: Record, name: str) -> Decision | None:
    if not len(left(record, name)):
        return None
    own, other = (shares(record.rows, network=n)[-1] for n in (name, "matched"))
    ends = [float(left(record, n)[-1]) for n in (name, "matched")]
    than = "above matched" if ends[0] > ends[1] else "of themselves below matched"
    here = f"features end at {own:.2g} times the offset (matched: {other:.2g}), and at "
    return own > other, f"{here}{ends[0]:.2g} times the edge models', {than}"


def grows(record: Record) -> Decision:
    found, whole = {0: left(record, "matched")}, True
    for number in sorted(record.rows.distinct("layers")):
        found[number] = by_layer(record.rows, layers=number)
        whole &= bool(np.allclose(found[number][: number - 1], 1, atol=1e-3))
    ends = np.array([values[-1] for values in found.values()])
    # A first layer kept apart is as good as merged, since the input is one: equal up to rounding.
    rises = bool((np.diff(ends) > -1e-4 * ends[:-1]).all())
    texts = joined(f"{value:.2g}" for value in ends)
    return whole and rises, f"they end at {texts} times with l = {joined(found)}"


def changed(record: Record, key: str) -> Decision | None:
    """Whether RESET lowers the deviations that all norms store, or leaves most means alone."""
    before, after = (record.rows.values(key, network=n) for n in ("matched", "reset"))
    found = np.divide(after, before)
    if not len(found):
        return None
    median, (first, *rest) = float(np.median(found)), found
    here = f"{median:.2g} times (median over norms; "
    if key == "std":
        return max(found) < 1, f"{here}{min(found):.2g} to {max(found):.2g})"
    here += f"{first:.2g} in the first, {min(rest):.2g} to {max(rest):.2g} in others)"
    return SAME[0] < median < SAME[1], here


def layernorm(record: Record) -> bool:
    return record["config"]["model"].endswith("-ln")


def reset_told(record: Record) -> bool:
    return (record["config"]["model"], record["config"]["match"]) == ("vgg16-bn", "weight")


OVER_LAYERS = "the geometric mean over layers of features is above that "
AT_END = "features over offsets at the last layer are above those of the matched midpoint, for it "
AT_END += "scales down or removes offsets alone"
CLAIMS = [
    Claim("vf.features.direct-fades", "features of direct midpoints fade strongly with depth",
          "in VGG16, VGG16-BN and ResNet20", partial(fades, least=-1, most=FADED),
          lambda record: not layernorm(record),
          by="to less than a tenth from the first layer to the last"),
    Claim("vf.features.layernorm-fades-mildly", "with LayerNorm features fade much more mildly",
          "in ResNet20 with LayerNorm", partial(fades, least=FADED, most=1), layernorm,
          by="they fade, to no less than a tenth from the first layer to the last"),
    Claim("vf.features.direct-logits", "logits of direct midpoints hardly depend on the image",
          "ResNet20: they are close to f(0)", logits,
          told=lambda record: record["config"]["model"] in LOGITS,
          by="they vary by less than a tenth as much as the edge models', and their mean is less "
          "than a quarter of the norm of f(0) away from f(0)"),
    Claim("vf.features.matching-mitigates", "matching mitigates vanishing features", "it does",
          partial(mitigates, name="matched", than="direct"),
          by=OVER_LAYERS + "of the direct midpoint"),
    *(Claim(f"vf.features.{name}-mitigates", f"{label(name)} brings features back", "it does",
            partial(mitigates, name=name, than="matched"),
            by=OVER_LAYERS + "of the matched midpoint")
      for name in ("repair", "rescale", "reset")),
    *(Claim(f"vf.features.{name.replace('_', '-')}-mitigates",
            f"{label(name)} brings features back against offsets", "it mitigates vanishing",
            partial(against_offsets, name=name), by=AT_END)
      for name in ("bias_calibration", "bias_removal")),
    Claim("vf.features.pfm-grows", "the more layers are kept apart the less features vanish",
          "in VGG16, VGG16-BN and ResNet20; the first l - 1 layers are whole", grows,
          told=lambda record: record["config"]["model"] in PRESERVED,
          by="features at the end do not fall with l, and before layer l they are the edge "
          "models' within a thousandth"),
    Claim("vf.features.reset-deviations", "RESET lowers the stored standard deviations",
          "a lot, in VGG16-BN after weight matching", partial(changed, key="std"),
          told=reset_told, by="in every norm"),
    Claim("vf.features.reset-means", "RESET leaves the stored means about the same",
          "in VGG16-BN after weight matching", partial(changed, key="mean"), told=reset_told,
          by="the median over norms of their magnitudes within a fifth"),
]  # fmt: skip
