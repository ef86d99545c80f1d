"""How permutation symmetries spread through a network, read off its equations.

Every axis of every leaf starts as one free atom (see `atoms`), every axis of the network's input as
a fixed one. Each equation then ties, refines or fixes the atoms of its operands (see `algebra`) by
the rule of its primitive (see `registry`; the rules are grouped by family), and finally the outputs
are fixed. Atoms that are still free can be permuted without changing what the network computes.

A primitive without a rule fixes the axes that it touches: symmetries may be missed, never invented.
`vfjax._analysis` decides what a group is called and what a layer does with it.

Read `registry` first, which says what a rule is, then `elementwise` and `layout` for short ones.
"""
