"""One pass over data: batches are checked, placed on devices, streamed and pooled.

Whatever all passes share belongs here: checks of batches, meshes, the loop that measures a batch
and pools it, moments and their unions, accuracy. What a pass measures, and at which sites, is up to
`vfjax.stats`, `vfjax.renorm`, `vfjax.diagnose` and `vfjax.prune`.

Read `streaming` first, then `batching`. Statistics are always merged by `moments`.
"""
