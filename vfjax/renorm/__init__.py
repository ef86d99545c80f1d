"""What merging broke, repaired: RESET, REPAIR, RESCALE and corrections of biases.

Averaged parameters make features that vanish with depth, while biases stay as large as ever.

- With BatchNorm: `reset` measures stored statistics anew. It needs data and no references.
- Without: `rescale` gives pre-activations the standard deviations of the networks that were merged,
  `repair` their means too. They need data and `references=`, the networks as they were: permuted
  already, or with `maps=` those that a matcher mixed. One batch often does.
- Without data: `calibrate_bias` and `remove_bias` take the biases down with the features.

    >>> import jax, numpy as np, vfjax
    >>> def forward(v, x):
    ...     return jax.nn.relu(x @ v["w"]) @ v["v"]
    >>> a, x = {"w": np.eye(2), "v": np.ones((2, 1))}, np.float32([[0, 1], [2, 5]])
    >>> net = vfjax.trace(forward, a, x)
    >>> rescale(net, a | {"w": a["w"] / 4}, [x], references=[a])["w"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]

All take a merged tree or a `vfjax.merge.Merged` and return a new one; corrections fold into the
parameters where they can. Stems stay, except for a correction at the cut itself, which goes into
all of them; of heads only what norms store changes. `_renorm` has equation 3 of REPAIR and RESCALE
of "Vanishing Feature", `_bias` its bias removal and calibration.
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
