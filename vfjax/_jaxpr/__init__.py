"""A jaxpr made flat, and run.

Here belongs what holds of any jaxpr: inlining calls, unrolling scans, dependency sets, evaluation
with values read or replaced, the table of primitives, and faster equivalents of single primitives.
What a layer, a norm or a symmetry is does not: that is `vfjax._analysis` and `vfjax._propagate`.

Read `graph` first, then `flatten`. A new primitive starts in `primitives`.
"""
