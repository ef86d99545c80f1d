"""One pass over data: checked, placed on devices, streamed, pooled.

Here belongs what every pass shares: the checks of batches, meshes, the loop that measures a batch
and pools it, moments and their unions, accuracy. What a pass measures at which sites does not: that
is the business of `vfjax.stats`, `vfjax.renorm`, `vfjax.diagnose` and `vfjax.prune`.

Read `streaming` first, then `batching`. Statistics are always merged by `moments`.
"""
