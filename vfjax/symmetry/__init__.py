"""Permutation symmetries of a network's parameters: which axes of which leaves move together.

Permuting the output channels of one layer, and the input channels of whatever reads them, leaves
the network's function unchanged. A `PermutationSpec` lists the axes that move together in such a
group. `vfjax.trace` reads it off the network (`net.spec`); it can also be written by hand, and
`check_spec` tests it: it permutes at random and returns the largest change of the output.

    >>> import numpy as np
    >>> spec = PermutationSpec({"h": [("w", 1, "out"), ("b", 0), ("v", 0, "in")]})
    >>> tree = {"w": np.array([[1, 2]]), "b": np.array([3, 4]), "v": np.array([[5], [6]])}
    >>> spec.permute(tree, {"h": [1, 0]})["v"].tolist()
    [[6], [5]]

- `spec.fixed`: axes that could not be followed, each with the primitive and the source line. A
  symmetry may be missed, never invented. Scalings of ReLU units and rotations are not considered.
- `spec.within`: groups that may move independently inside each entry of another, as the dims of
  attention heads do. Such a permutation is `[n]`, or `[h, n]` with the owners in their new order.
- Where layers, experts or whole networks are stacked in one leaf, each entry of the stack has
  groups of its own, `layers/kernel[3]`; the `entries` of their places say which entry that is.
- `spec.rigid`: groups that only permutations can map, and the leaf that forbids other maps.
- `spec.apply` takes other maps, such as the merge and unmerge matrices of ZipIt!; `compose` and
  `invert` take permutations.
"""

from __future__ import annotations

from vfjax.symmetry._check import check_spec as check_spec
from vfjax.symmetry._group_maps import compose as compose
from vfjax.symmetry._group_maps import invert as invert
from vfjax.symmetry._places import Axis as Axis
from vfjax.symmetry._places import FixedAxis as FixedAxis
from vfjax.symmetry._spec import PermutationSpec as PermutationSpec

__all__ = [
    "Axis",
    "FixedAxis",
    "PermutationSpec",
    "check_spec",
    "compose",
    "invert",
]
