"""A linear map per model and group: what matchers return and merging applies.

Here belongs what a map is and what it does to trees and moments, whoever found it. How maps are
found belongs to `vfjax.align`, whose face offers `Maps`; how one group's axes are permuted or
multiplied belongs to `vfjax.symmetry`.

Read `maps` first. `labels` makes maps of features that are merged, `norm_units` puts layers into
the units of the norm behind them before they are mixed.
"""
