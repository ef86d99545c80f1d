"""vfjax: align, merge, repair and diagnose trained networks, straight from their jaxprs.

After `import vfjax` every module can be reached, as `vfjax.merge` and so on. Modules that only
experiments need (`models`, `train`, `data`, `imagenet`, `checkpoint`, `plot`) are imported on first
use, so that the core does not import Flax, orbax or matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

from vfjax import align as align
from vfjax import diagnose as diagnose
from vfjax import merge as merge
from vfjax import prune as prune
from vfjax import renorm as renorm
from vfjax import stats as stats
from vfjax.network._crossing import Crossing as Crossing
from vfjax.network._fold import FoldError as FoldError
from vfjax.network._network import Network as Network
from vfjax.network._network import trace as trace
from vfjax.network._records import Layer as Layer
from vfjax.network._records import Norm as Norm
from vfjax.network._records import Tap as Tap
from vfjax.symmetry._check import check_spec as check_spec
from vfjax.symmetry._spec import PermutationSpec as PermutationSpec

__all__ = [
    "Crossing",
    "FoldError",
    "Layer",
    "Network",
    "Norm",
    "PermutationSpec",
    "Tap",
    "align",
    "check_spec",
    "diagnose",
    "merge",
    "prune",
    "renorm",
    "stats",
    "trace",
]

__version__ = "0.1.0"
_ON_FIRST_USE = frozenset({"checkpoint", "data", "imagenet", "models", "plot", "train"})


def __getattr__(name: str) -> Any:
    """Imports a module on first use."""
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"vfjax.{name}")
    raise AttributeError(f"module 'vfjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Every public name, including modules that are imported on first use."""
    return sorted({*(n for n in globals() if not n.startswith("_")), *_ON_FIRST_USE})
