"""Parameter trees by path, and means of trees.

Whatever needs a pytree but not a network belongs here: names of leaves, checks that trees fit each
other, their weighted mean, and checks of options that many functions take. Code that must know
which leaf is a kernel or a statistic belongs in `vfjax.network`.

Read `paths` first: its `flatten_named` and `check_like` are used everywhere.
"""
