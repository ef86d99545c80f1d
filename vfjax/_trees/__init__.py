"""Parameter trees by path, and means of trees.

Here belongs what needs a pytree and no network: names of leaves, checks that trees fit each other,
their weighted mean, and the checks of options that many functions take. What needs to know which
leaf is a kernel or a statistic stands in `vfjax.network`.

Read `paths` first: its `flatten_named` and `check_like` are used everywhere.
"""
