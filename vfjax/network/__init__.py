"""A traced network: how to run, cut, edit and fold it, and the records of what is in it."""

from __future__ import annotations

from vfjax.network._crossing import Crossing as Crossing
from vfjax.network._fold import FoldError as FoldError
from vfjax.network._network import Network as Network
from vfjax.network._network import trace as trace
from vfjax.network._records import Layer as Layer
from vfjax.network._records import Norm as Norm
from vfjax.network._records import Tap as Tap
from vfjax.network._run import Edit as Edit

__all__ = [
    "Crossing",
    "Edit",
    "FoldError",
    "Layer",
    "Network",
    "Norm",
    "Tap",
    "trace",
]
