"""The rule of primitives that draw numbers, which differ from unit to unit."""

from __future__ import annotations

from vfjax._jaxpr.primitives import DRAWS
from vfjax._propagate.registry import opaque, rule

rule(*DRAWS)(opaque)
