"""What "Vanishing Feature" claims of features in merged networks, and how it is decided."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
    """Whether what is left of features from the first layer to the last is between the two."""
    found = left(record, "direct")
    first, last = found[0], found[-1]
    here = f"{first:.2g} times the edge models' at layer 1, {last:.2g} times at {len(found)}"
    return Decision(bool(least < last / first < most), here)


def logits(record: Record) -> Decision:
    """Whether logits of the direct midpoint hardly depend on the image."""
    rows = record.rows
    edges = np.mean([rows.mean("logit_std", network=name) for name in EDGES])
    varies = float(rows.mean("logit_std", network="direct") / edges)
    mean, zero = (
        np.array(rows.values(key, network="direct")) for key in ("logit", "logit_at_zero")
    )
    away = float(np.linalg.norm(mean - zero) / np.linalg.norm(zero))
    here = f"they vary {varies:.2g} times as much as the edge models', and their mean is "
    here += f"{100 * away:.2g}% of the norm of f(0) away from f(0)"
    return Decision(varies < VARIES and away < AWAY, here)


def kept(relative: np.ndarray) -> str:
    """What is left of features, in words."""
    return f"{over_layers(relative):.2g} times over layers, {relative[-1]:.2g} times at the end"


def mitigates(record: Record, name: str, than: str) -> Decision | None:
    """Whether a network has more of its features than another, over all layers."""
    found, other = left(record, name), left(record, than)
    if not len(found):
        return None
    here = f"{label(name)} {kept(found)}; {label(than)} {kept(other)}"
    return Decision(over_layers(found) > over_layers(other), here)


def against_offsets(record: Record, name: str) -> Decision | None:
    """Whether features end higher against offsets than in the matched midpoint."""
    if not len(left(record, name)):
        return None
    own, other = (shares(record.rows, network=n)[-1] for n in (name, "matched"))
    ends = [float(left(record, n)[-1]) for n in (name, "matched")]
    than = "above matched" if ends[0] > ends[1] else "of themselves below matched"
    here = f"features end at {own:.2g} times the offset (matched: {other:.2g}), and at "
    return Decision(bool(own > other), f"{here}{ends[0]:.2g} times the edge models', {than}")


def grows(record: Record) -> Decision:
    """Whether features end higher the more layers are kept apart, and these are whole."""
    found, whole = {0: left(record, "matched")}, True
    for number in sorted(record.rows.distinct("layers")):
        found[number] = by_layer(record.rows, layers=number)
        whole &= bool(np.allclose(found[number][: number - 1], 1, atol=1e-3))
    ends = np.array([values[-1] for values in found.values()])
    # A first layer kept apart is as good as merged, since the input is one: equal up to rounding.
    rises = bool((np.diff(ends) > -1e-4 * ends[:-1]).all())
    texts = joined(f"{value:.2g}" for value in ends)
    return Decision(whole and rises, f"they end at {texts} times with l = {joined(found)}")


def changed(record: Record, key: str) -> np.ndarray:
    """How many times RESET makes what norms store, by norm."""
    before, after = (record.rows.values(key, network=n) for n in ("matched", "reset"))
    return np.divide(after, before)


def deviations_fall(record: Record) -> Decision | None:
    """Whether those of every norm do."""
    found = changed(record, "std")
    if not len(found):
        return None
    here = f"{np.median(found):.2g} times (median over norms; {found.min():.2g} to "
    return Decision(bool(found.max() < 1), f"{here}{found.max():.2g})")


def means_stay(record: Record) -> Decision | None:
    """Whether the magnitudes of those of most norms do."""
    found = changed(record, "mean")
    if not len(found):
        return None
    median, (first, *rest) = float(np.median(found)), found
    here = f"{median:.2g} times (median over norms; {first:.2g} in the first, {min(rest):.2g} to "
    return Decision(SAME[0] < median < SAME[1], f"{here}{max(rest):.2g} in others)")


def model_in(*names: str) -> Callable[[Record], bool]:
    """Records of some models."""
    return lambda record: record["config"]["model"] in names


def layernorm(record: Record) -> bool:
    """Records of networks with LayerNorm."""
    return record["config"]["model"].endswith("-ln")


def reset_told(record: Record) -> bool:
    """What the paper shows the statistics of."""
    return (record["config"]["model"], record["config"]["match"]) == ("vgg16-bn", "weight")


OVER_LAYERS = "the geometric mean over layers of features is above that "
AT_END = "features over offsets at the last layer are above those of the matched midpoint, for it "
AT_END += "scales down or removes offsets alone"
CLAIMS = [
    Claim("vf.features.direct-fades", "features of direct midpoints fade strongly with depth",
          "in VGG16, VGG16-BN and ResNet20", functools.partial(fades, least=-1, most=FADED),
          lambda record: not layernorm(record),
          by="to less than a tenth from the first layer to the last"),
    Claim("vf.features.layernorm-fades-mildly", "with LayerNorm features fade much more mildly",
          "in ResNet20 with LayerNorm", functools.partial(fades, least=FADED, most=1), layernorm,
          by="they fade, to no less than a tenth from the first layer to the last"),
    Claim("vf.features.direct-logits", "logits of direct midpoints hardly depend on the image",
          "ResNet20: they are close to f(0)", logits, told=model_in(*LOGITS),
          by="they vary by less than a tenth as much as the edge models', and their mean is less "
          "than a quarter of the norm of f(0) away from f(0)"),
    Claim("vf.features.matching-mitigates", "matching mitigates vanishing features", "it does",
          functools.partial(mitigates, name="matched", than="direct"),
          by=OVER_LAYERS + "of the direct midpoint"),
    *(Claim(f"vf.features.{name}-mitigates", f"{label(name)} brings features back", "it does",
            functools.partial(mitigates, name=name, than="matched"),
            by=OVER_LAYERS + "of the matched midpoint")
      for name in ("repair", "rescale", "reset")),
    *(Claim(f"vf.features.{name.replace('_', '-')}-mitigates",
            f"{label(name)} brings features back against offsets", "it mitigates vanishing",
            functools.partial(against_offsets, name=name), by=AT_END)
      for name in ("bias_calibration", "bias_removal")),
    Claim("vf.features.pfm-grows", "the more layers are kept apart the less features vanish",
          "in VGG16, VGG16-BN and ResNet20; the first l - 1 layers are whole", grows,
          told=model_in(*PRESERVED),
          by="features at the end do not fall with l, and before layer l they are the edge "
          "models' within a thousandth"),
    Claim("vf.features.reset-deviations", "RESET lowers the stored standard deviations",
          "a lot, in VGG16-BN after weight matching", deviations_fall, told=reset_told,
          by="in every norm"),
    Claim("vf.features.reset-means", "RESET leaves the stored means about the same",
          "in VGG16-BN after weight matching", means_stay, told=reset_told,
          by="the median over norms of their magnitudes within a fifth"),
]  # fmt: skip
