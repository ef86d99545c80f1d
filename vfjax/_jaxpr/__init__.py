"""A jaxpr flattened into a graph of equations, and the graph evaluated.

Whatever holds of any jaxpr belongs here: inlining calls, unrolling scans, dependency sets,
evaluation with values read or replaced, the table of primitives, and faster equivalents of single
primitives. Layers, norms and symmetries do not: they belong in `vfjax._analysis` and
`vfjax._propagate`.

Read `graph` first, then `flattening`. A new primitive starts in `primitives`.
"""
