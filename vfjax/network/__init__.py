"""A traced network: running, cutting, editing and folding it, and records of its parts.

`trace(apply_fn, variables, x)` takes any pure function with dense layers or convolutions: Flax
Linen, NNX (split state), Equinox (partitioned) or plain JAX, in evaluation mode, since random
numbers break symmetries. Axis 0 of every input leaf is the batch, of any size. Shapes
(`jax.ShapeDtypeStruct`) are enough. A `Network` holds no parameters.

    >>> import jax, numpy as np
    >>> v, x = {"w": np.ones((3, 8)), "v": np.ones((8, 2))}, np.ones((5, 3))
    >>> net = trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], v, x)
    >>> [(layer.name, layer.depth) for layer in net.layers], net.flops, list(net.spec.groups)
    ([('w', 1), ('v', 2)], 48, ['w'])

- `net.summary()`: a table of layers, depths, costs and groups. `net.layers`, `net.norms`,
  `net.taps` and `net.spec` hold the same as values.
- `net.run(v, x, ...)`: runs the network with values read or replaced (`Edit`) at named sites, or a
  part of it between cuts; the values that pass a cut are a `Crossing`.
- `net.sites`: every `Site` by its name; `vfjax.stats.resolve_sites` explains the names.
- `net.fold` writes a correction of a layer into its parameters, or raises a `FoldError`.

A `scan` over stacked layers is unrolled up to 64 layers. Layers in other loops and in branches
cannot be cut at or corrected: `net.opaque` lists them.
"""

from __future__ import annotations

from vfjax.network._crossing import Crossing as Crossing
from vfjax.network._fold import FoldError as FoldError
from vfjax.network._network import Network as Network
from vfjax.network._network import trace as trace
from vfjax.network._records import Layer as Layer
from vfjax.network._records import Norm as Norm
from vfjax.network._records import Tap as Tap
from vfjax.network._run import Edit as Edit
from vfjax.network._sites import Site as Site

__all__ = [
    "Crossing",
    "Edit",
    "FoldError",
    "Layer",
    "Network",
    "Norm",
    "Site",
    "Tap",
    "trace",
]
