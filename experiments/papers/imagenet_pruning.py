"""What "Vanishing Feature" claims of pruned ImageNet networks, and how it is decided."""

from __future__ import annotations

from functools import partial

from kit.claims import Claim
from kit.figures import label

from papers.pruning import gains, most_at_high

# What there has to be for the experiment to be measured.
NEEDS = "ImageNet and published weights"
# The paper's highest sparsities of ConvNeXt.
HIGH = (76, 80)
WANDA = "Wanda: 43.2 to 65.0 at 76%, 36 points at 80%"
MAGNITUDE = "magnitude: 35.5 to 69.9 at 76%, 55 points at 80%"
CLAIMS = [
    *(Claim(f"vf.imagenet.convnext-{method}",
            f"pruned by {label(method)}, ConvNeXt regains tens of points", text,
            partial(gains, method=method, high=HIGH),
            lambda record: record["model"]["name"].startswith("convnext"),
            lambda record: record["model"]["name"] == "convnext-base",
            by="ten points or more at 76 and at 80% where pruning costs as many; two standard "
            "errors of the difference are level")
      for method, text in (("wanda", WANDA), ("magnitude-layer", MAGNITUDE),
                           ("wanda-layer", WANDA))),
    Claim("vf.imagenet.resnet50-most-at-high", "ResNet50 gains most at high sparsity",
          "at high sparsity, by RESET", partial(most_at_high, least=0),
          lambda record: record["model"]["name"] == "resnet50",
          by="at over half of the weights, for each pruner that gains anywhere; two standard "
          "errors of the difference are level"),
]  # fmt: skip
