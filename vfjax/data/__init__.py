"""Data sets of images, in batches.

`load(name)` reads CIFAR-10, CIFAR-100 or MNIST from TensorFlow Datasets' `array_record` files,
without TensorFlow. It searches its argument `data_dir`, `TFDS_DATA_DIR` and
`~/tensorflow_datasets`; if the files are in none of these and TensorFlow is installed, it downloads
and prepares them. The 8x8 images of `"digits"` ship with scikit-learn. `"auto"` takes CIFAR-10 if
it is available, else the digits with a warning in the log. ImageNet is streamed by
`vfjax.imagenet.load`.

    >>> digits = load("digits")
    >>> batches = digits.batches("test", batch_size=100)
    >>> [(x.shape, label.shape) for x, label in batches][0]
    ((100, 8, 8, 1), (100,))

A split is read once into one uint8 array. Batches go to the device as uint8, a quarter of the bytes
of float32, and are normalised there. They can be iterated over again, as matching and
renormalisation do.
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
