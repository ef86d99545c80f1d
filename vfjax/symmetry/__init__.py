"""Which axes move together, as values: permutation symmetries of a network's parameters.

Permuting the output channels of one layer, and the input channels of whatever reads them, leaves
the network's function unchanged. A `PermutationSpec` lists which axes of which leaves move
together. `vfjax.trace` reads it off the network (`net.spec`); it can also be written by hand:

    PermutationSpec({
        "hidden": [("dense_0/kernel", 1, "out"), ("dense_0/bias", 0), ("dense_1/kernel", 0, "in")],
    })

A group may move by itself inside each entry of another, as the dims of an attention head inside
their head: `spec.within` says so. Its permutation is then one for all, `[n]`, or one for each,
`[h, n]`, where the owners count in their new order: entry k of owner i is what was entry `p[i, k]`
of owner `q[i]`, if the owners are permuted by q.

More general maps of a group, such as the merge and unmerge matrices of ZipIt! or transport plans,
go through the same description: see `PermutationSpec.apply`.
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
