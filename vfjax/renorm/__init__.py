"""Repairing what merging broke: RESET, REPAIR, RESCALE and corrections of biases.

Averaging parameters makes features vanish with depth, while biases stay as large as they were.

- With BatchNorm: `reset` measures stored statistics again. It needs data, but no references.
- Without BatchNorm: `rescale` gives pre-activations the standard deviations of the networks that
  were merged, `repair` their means too. Both need data and `references=`, those networks: already
  aligned, or as they were before a matcher mapped them by `maps=`. One batch is often enough.
- Without data: `calibrate_bias` and `remove_bias` reduce the biases along with the features.

    >>> import jax, numpy as np, vfjax
    >>> def forward(v, x):
    ...     return jax.nn.relu(x @ v["w"]) @ v["v"]
    >>> a, x = {"w": np.eye(2), "v": np.ones((2, 1))}, np.float32([[0, 1], [2, 5]])
    >>> net = vfjax.trace(forward, a, x)
    >>> rescale(net, a | {"w": a["w"] / 4}, [x], references=[a])["w"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]

All take a merged tree or a `vfjax.merge.Merged` and return a new one; corrections fold into the
parameters where possible. Stems do not change, except by a correction at the cut itself, which goes
into all of them; in heads only stored statistics change. `_renorm` implements equation 3 of REPAIR
and the RESCALE of "Vanishing Feature", `_bias` its bias removal and calibration.
"""

from __future__ import annotations

from vfjax.renorm._bias import calibrate_bias as calibrate_bias
from vfjax.renorm._bias import remove_bias as remove_bias
from vfjax.renorm._renorm import repair as repair
from vfjax.renorm._renorm import rescale as rescale
from vfjax.renorm._renorm import reset as reset

__all__ = [
    "calibrate_bias",
    "remove_bias",
    "repair",
    "rescale",
    "reset",
]
