"""Reading a network off its graph: layers, norms, taps, groups, effects, batches, cost.

Whatever follows from the graph of `vfjax._jaxpr` and the axes of `vfjax._propagate`, for any
parameters, belongs here. Nothing here evaluates a network or holds a parameter; the public records
(`Layer`, `Norm`, `Tap`) are in `vfjax.network`.

Read `traced` first, which collects the analysis of one trace, then `layers` and `norms`.
"""

from __future__ import annotations

from vfjax._analysis.affine import culprit as culprit
from vfjax._analysis.batch_axis import separable as separable
from vfjax._analysis.effects import leaf_effects as leaf_effects
from vfjax._analysis.groups import from_propagation as from_propagation
from vfjax._analysis.layers import LinearSite as LinearSite
from vfjax._analysis.outside import listed_statistics as listed_statistics
from vfjax._analysis.outside import report_missing_layers as report_missing_layers
from vfjax._analysis.outside import report_statistics as report_statistics
from vfjax._analysis.positions import Lost as Lost
from vfjax._analysis.positions import State as State
from vfjax._analysis.positions import Where as Where
from vfjax._analysis.positions import follow_positions as follow_positions
from vfjax._analysis.taps import axes_at_tap as axes_at_tap
from vfjax._analysis.traced import Traced as Traced
from vfjax._analysis.training import report_training as report_training
from vfjax._analysis.views import View as View
from vfjax._analysis.views import slot_of as slot_of
from vfjax._analysis.views import view_of as view_of

__all__ = [
    "LinearSite",
    "Lost",
    "State",
    "Traced",
    "View",
    "Where",
    "axes_at_tap",
    "culprit",
    "follow_positions",
    "from_propagation",
    "leaf_effects",
    "listed_statistics",
    "report_missing_layers",
    "report_statistics",
    "report_training",
    "separable",
    "slot_of",
    "view_of",
]
