"""How permutation symmetries spread through a network, read off its equations.

Every axis of every leaf starts as one free atom (see `atoms`), every axis of the network's input as
a fixed one. Each equation then ties, refines or fixes the atoms of its operands (see `algebra`) by
the rule of its primitive (see `registry`; the rules are grouped by family), and finally the outputs
are fixed. Atoms that are still free can be permuted without changing what the network computes.

A primitive without a rule fixes the axes that it touches: symmetries may be missed, never invented.
`vfjax._analysis` decides what a group is called and what a layer does with it.

Read `registry` first, which says what a rule is, then `elementwise` and `layout` for short ones.
"""

from __future__ import annotations

from vfjax._propagate.propagation import Atom as Atom
from vfjax._propagate.propagation import Propagation as Propagation
from vfjax._propagate.propagation import Tie as Tie
from vfjax._propagate.propagation import propagate as propagate
from vfjax._propagate.registry import LAZY as LAZY
from vfjax._propagate.registry import RULES as RULES
from vfjax._propagate.registry import Axes as Axes
from vfjax._propagate.registry import Step as Step
from vfjax._propagate.registry import rule as rule

__all__ = [
    "Atom",
    "Axes",
    "LAZY",
    "Propagation",
    "RULES",
    "Step",
    "Tie",
    "propagate",
    "rule",
]
