"""Data sets of images, in batches.

A split is read once into one uint8 array.  Batches go to the device as uint8, a quarter of the
bytes, and are normalised there.  Where there is no prepared data set, ``"auto"`` falls back to the
8x8 handwritten digits that ship inside scikit-learn, and says so.
"""

from __future__ import annotations

from vfjax.data._data import NAMES as NAMES
from vfjax.data._data import Batches as Batches
from vfjax.data._data import Dataset as Dataset
from vfjax.data._data import DatasetError as DatasetError
from vfjax.data._data import grey as grey
from vfjax.data._data import load as load
from vfjax.data._data import normalise as normalise

__all__ = [
    "NAMES",
    "Batches",
    "Dataset",
    "DatasetError",
    "grey",
    "load",
    "normalise",
]
