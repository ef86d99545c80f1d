"""Reading a network off its graph: layers, norms, taps, groups, effects, batch axis, cost.

Whatever follows from the graph of `vfjax._jaxpr` and the axes of `vfjax._propagate`, for any
parameters, belongs here. Nothing here evaluates a network or holds a parameter; the public records
(`Layer`, `Norm`, `Tap`) are in `vfjax.network`.

Read `traced` first, which collects the analysis of one trace, then `layers` and `norms`.
"""
