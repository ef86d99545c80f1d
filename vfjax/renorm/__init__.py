"""What merging broke, repaired: RESET, REPAIR, RESCALE and corrections of biases.

Averaged parameters make features that vanish with depth, while biases stay as large as ever. The
functions here put the features' scale back, from data (`reset`, `repair`, `rescale`) or without any
(`remove_bias`, `calibrate_bias`).

All take a merged tree, or the `vfjax.merge.Merged` of `preserve_first` or `partial`, and return a
new one. Stems are never touched, except that a correction at the cut, where every stem ends in the
averaged pre-activation, goes into all stems alike. Of heads, what their norms store is measured
anew, since what comes in has changed; else they are never touched.

Trees and models whose features were merged through matrices lack the variances of norms along them
(`vfjax.align.Maps.apply`): `reset` measures them, and so do `repair` and `rescale` on their way.
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
