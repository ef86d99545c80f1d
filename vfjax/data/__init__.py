"""Data sets of images, in batches.

`load(name)` reads CIFAR-10, CIFAR-100 or MNIST from TensorFlow Datasets' `array_record` files,
without TensorFlow: in its argument `data_dir`, in `TFDS_DATA_DIR`, in `~/tensorflow_datasets`. If
they are in none of these, and TensorFlow is installed, it downloads and prepares them. The 8x8
images of `"digits"` ship inside scikit-learn. `"auto"` takes CIFAR-10 if that can be had, else the
digits, and says so. ImageNet is streamed by `vfjax.imagenet.load`.

    >>> found = load("digits")
    >>> batches = found.batches("test", batch_size=100)
    >>> [(x.shape, label.shape) for x, label in batches][0]
    ((100, 8, 8, 1), (100,))

A split is read once into one uint8 array. Batches go to the device as uint8, a quarter of the
bytes, and are normalised there. They can be iterated again, as matching and renormalisation do.
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
