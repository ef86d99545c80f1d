"""A jaxpr flattened into a graph of equations, and the graph evaluated.

Whatever holds of any jaxpr belongs here: inlining calls, unrolling scans, dependency sets,
evaluation with values read or replaced, the table of primitives, and faster equivalents of single
primitives. Layers, norms and symmetries do not: they belong in `vfjax._analysis` and
`vfjax._propagate`.

Read `graph` first, then `flattening`. A new primitive starts in `primitives`.
"""

from __future__ import annotations

from vfjax._jaxpr import faster as faster
from vfjax._jaxpr import primitives as primitives
from vfjax._jaxpr.calls import INPUT as INPUT
from vfjax._jaxpr.calls import PARAM as PARAM
from vfjax._jaxpr.calls import holds_layer as holds_layer
from vfjax._jaxpr.calls import open_jaxpr as open_jaxpr
from vfjax._jaxpr.calls import scan_arity as scan_arity
from vfjax._jaxpr.calls import scans_layers as scans_layers
from vfjax._jaxpr.calls import subjaxpr as subjaxpr
from vfjax._jaxpr.calls import union as union
from vfjax._jaxpr.contractions import contraction as contraction
from vfjax._jaxpr.contractions import is_linear as is_linear
from vfjax._jaxpr.elementwise import is_elementwise as is_elementwise
from vfjax._jaxpr.faster import routed as routed
from vfjax._jaxpr.flattening import MAX_UNROLL as MAX_UNROLL
from vfjax._jaxpr.flattening import flatten as flatten
from vfjax._jaxpr.graph import Equation as Equation
from vfjax._jaxpr.graph import Graph as Graph
from vfjax._jaxpr.graph import evaluate as evaluate

__all__ = [
    "Equation",
    "Graph",
    "INPUT",
    "MAX_UNROLL",
    "PARAM",
    "contraction",
    "evaluate",
    "faster",
    "flatten",
    "holds_layer",
    "is_elementwise",
    "is_linear",
    "open_jaxpr",
    "primitives",
    "routed",
    "scan_arity",
    "scans_layers",
    "subjaxpr",
    "union",
]
