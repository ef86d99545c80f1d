"""What a flat graph says: layers, norms, taps, groups, effects, batch axis, cost.

Here belongs what is read off the graph of `vfjax._jaxpr` and off the axes of `vfjax._propagate`,
for any parameters. Nothing here evaluates a network or holds a parameter; the public records of
what is found (`Layer`, `Norm`, `Tap`) are in `vfjax.network`.

Read `traced` first, which puts the findings of one tracing together, then `layers` and `norms`.
"""
