"""Image data sets, read by TensorFlow Datasets without TensorFlow, kept as uint8 in memory.

A split is read once into one uint8 array.  Batches go to the device as uint8, a quarter of the bytes,
and are normalised there.  Where there is no prepared data set, ``"auto"`` falls back to the 8x8
handwritten digits that ship inside scikit-learn, and says so.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

__all__ = ["NAMES", "Batches", "Dataset", "DatasetError", "load", "normalise"]

Array = jax.Array

_log = logging.getLogger(__name__)

# Mean and standard deviation that images in [0, 1] are normalised with.  Those of CIFAR are the ones
# of "Vanishing Feature" (and of most CIFAR code): its standard deviations are means over images of
# the standard deviation within one image, a little smaller than that of all pixels.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "mnist": ((0.1307,), (0.3081,)),
    "digits": ((0.3056,), (0.3756,)),
}
_CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "digits": 10}
_DIGITS_TEST = 497

NAMES = ("auto", "cifar10", "cifar100", "mnist", "digits")


class DatasetError(ValueError):
    """A data set is not prepared, or cannot be read."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Maps uint8 images to float32, zero mean and unit deviation by channel.

    Args:
      images: uint8 ``[N, H, W, C]``.
      mean: C means, for images in [0, 1].
      std: C standard deviations, likewise.

    Returns:
      float32 ``[N, H, W, C]``.

    Example:
      >>> float(normalise(jnp.full((1, 2, 2, 1), 255, jnp.uint8), (0.5,), (0.25,))[0, 0, 0, 0])
      2.0
    """
    scale = jnp.asarray([1.0 / (255.0 * s) for s in std], jnp.float32)
    shift = jnp.asarray([-m / s for m, s in zip(mean, std, strict=True)], jnp.float32)
    broadcast = (1,) * (images.ndim - 1) + (-1,)
    return images.astype(jnp.float32) * scale.reshape(broadcast) + shift.reshape(broadcast)


class Batches:
    """Re-iterable batches ``(x, label)`` of a split, in its order, the last one ragged.

    Args:
      images: uint8 ``[N, H, W, C]``.
      labels: int32 ``[N]``.
      mean: C means, for images in [0, 1].
      std: C standard deviations.
      batch_size: Images per batch.

    Each batch is a float32 ``[n, H, W, C]`` on the device and an int32 ``[n]``.

    Example:
      >>> batches = load("digits").batches("test", batch_size=200)
      >>> [x.shape[0] for x, label in batches]
      [200, 200, 97]
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 500,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
        if len(images) != len(labels):
            raise ValueError(
                f"images and labels must be equally many, got {len(images)} and {len(labels)}."
            )
        self.images, self.labels = images, labels
        self.mean, self.std = tuple(mean), tuple(std)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for start in range(0, len(self.images), self.batch_size):
            stop = start + self.batch_size
            x = normalise(jnp.asarray(self.images[start:stop]), self.mean, self.std)
            yield x, jnp.asarray(self.labels[start:stop])

    def samples(self, count: int | None) -> Batches:
        """Returns batches of the first `count` images, all of them if None or more than there are."""
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count!r}.")
        return Batches(
            self.images[:count], self.labels[:count], self.mean, self.std, self.batch_size
        )

    def __repr__(self) -> str:
        return f"Batches({len(self.images)} images in batches of {self.batch_size})"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
      name: ``"cifar10"``, ``"cifar100"``, ``"mnist"`` or ``"digits"``.
      train_images: uint8 ``[N, H, W, C]``.
      train_labels: int32 ``[N]``.
      test_images: uint8 ``[M, H, W, C]``.
      test_labels: int32 ``[M]``.
      mean: C means of images in [0, 1], for normalisation.
      std: C standard deviations.
      classes: Number of classes.
      source: Where it was read from.
      fallback: Whether ``"auto"`` fell back to it because the wanted one was not found.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    source: str
    fallback: bool = False

    def batches(
        self, split: str, *, batch_size: int = 500, samples: int | None = None
    ) -> Batches:
        """Returns the re-iterable batches of ``"train"`` (not augmented) or ``"test"``.

        Args:
          split: ``"train"`` or ``"test"``.
          batch_size: Images per batch.
          samples: Only the first so many images.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
        images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
        return Batches(images, labels, self.mean, self.std, batch_size).samples(samples)


def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns scikit-learn's 1,797 digits, split at random once and for all."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Pixels count 0..16.
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(labels))
    train, test = order[:-_DIGITS_TEST], order[-_DIGITS_TEST:]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def _folders(data_dir: str | os.PathLike[str] | None) -> list[tuple[str, str | None]]:
    """Returns (where it is named, folder) in the order of the search."""
    if data_dir is not None:
        return [("data_dir", os.fspath(data_dir))]
    folders: list[tuple[str, str | None]] = []
    if os.environ.get("TFDS_DATA_DIR"):
        folders.append(("TFDS_DATA_DIR", os.environ["TFDS_DATA_DIR"]))
    return [*folders, ("the default folder of TFDS", os.path.join("~", "tensorflow_datasets"))]


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> str | None:
    """Returns the folder under which TFDS finds the prepared data set, or None."""
    for _, folder in _folders(data_dir):
        folder = os.path.expanduser(folder)
        if any(Path(folder, name).glob("*/dataset_info.json")):
            return folder
    return None


def _has_tensorflow() -> bool:
    import importlib.util

    return all(
        importlib.util.find_spec(module) for module in ("tensorflow", "importlib_resources")
    )


def _prepare(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Lets TFDS download and prepare the data set, or says what is missing to do so."""
    searched = "; ".join(f"{where} ({folder})" for where, folder in _folders(data_dir))
    if not _has_tensorflow():
        raise DatasetError(
            f"the data set {name!r} is not prepared in {searched}. Point --data-dir or TFDS_DATA_DIR "
            f"at a folder that holds {name}/ as TensorFlow Datasets writes it, or install what "
            'downloads and prepares it: pip install "vfjax[prepare]". The data set '
            "'digits' needs neither."
        )
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(_folders(data_dir)[0][1])
    _log.warning("downloading and preparing %s in %s", name, folder)
    try:
        # The file format must be asked for: TFDS's default is one that data_source cannot read.
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        raise DatasetError(
            f"the data set {name!r} is not prepared in {searched}, and TFDS could not download and "
            f"prepare it: {type(error).__name__}: {error}"
        ) from error
    return folder


def _read(name: str, split: str, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads (a slice of) a split into uint8 images and int32 labels."""
    # Imported here: it takes half a second, and the digits do not need it.
    import tensorflow_datasets as tfds

    # Absl warns once that OpenCV would decode faster; Pillow gives the same pixels.
    logging.getLogger("absl").addFilter(lambda record: "OpenCV" not in record.getMessage())
    try:
        source = tfds.data_source(name, split=split, data_dir=folder, download=False)
        images = labels = None
        with tqdm(total=len(source), desc=f"reading {name} {split}", delay=2, leave=False) as bar:
            for start in range(0, len(source), 1000):
                indices = range(start, min(start + 1000, len(source)))
                examples = source.__getitems__(indices)
                if images is None:
                    images = np.empty((len(source), *examples[0]["image"].shape), np.uint8)
                    labels = np.empty(len(source), np.int32)
                for index, example in zip(indices, examples, strict=True):
                    images[index], labels[index] = example["image"], example["label"]
                bar.update(len(indices))
    except Exception as error:
        raise DatasetError(
            f"the data set {name!r} in {folder} cannot be read: {type(error).__name__}: {error}. It "
            "must be prepared as array_record files; see the README for how to prepare it again."
        ) from error
    if images is None or labels is None:
        raise DatasetError(f"the split {split!r} of {name!r} in {folder} is empty.")
    return images, labels


def load(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    train: int | None = None,
    test: int | None = None,
) -> Dataset:
    """Loads a data set into memory.

    Args:
      name: ``"cifar10"``, ``"cifar100"``, ``"mnist"``, ``"digits"``, or ``"auto"``: CIFAR-10 where it
        is prepared, else the digits, with a warning in the log and ``fallback=True``.
      data_dir: Folder that TFDS data sets are in.  Without one, ``TFDS_DATA_DIR`` and TFDS's default
        folder are searched; where the data is in neither and TensorFlow is installed, TFDS downloads
        and prepares it.
      train: Read only the first so many training images.  Records are stored in random order, so
        that these are a fair sample.
      test: Likewise for the test split.

    Returns:
      The `Dataset`.

    Raises:
      DatasetError: If the data set is not prepared and cannot be, or cannot be read.
      ValueError: If `name` is unknown or a count is below one.

    Example:
      >>> digits = load("digits")
      >>> digits.train_images.shape, digits.train_images.dtype, digits.classes
      ((1300, 8, 8, 1), dtype('uint8'), 10)
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
    counts = {"train": train, "test": test}
    for argument, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{argument} must be at least 1, got {count!r}.")
    fallback = False
    if name == "auto":
        name = "cifar10"
        if _find(name, data_dir) is None:
            places = ", ".join(folder or "" for _, folder in _folders(data_dir))
            _log.warning(
                "CIFAR-10 was not found in %s: FALLING BACK to the 8x8 digits of scikit-learn. "
                "Give --data-dir or TFDS_DATA_DIR to use CIFAR-10.",
                places,
            )
            name, fallback = "digits", True
    if name == "digits":
        arrays = {split: tuple(a[: counts[split]] for a in both) for split, both in _digits().items()}
        source = "scikit-learn"
    else:
        folder = _find(name, data_dir) or _prepare(name, data_dir)
        arrays = {}
        for split, count in counts.items():
            arrays[split] = _read(name, split if count is None else f"{split}[:{count}]", folder)
        source = f"TFDS in {folder}"
    mean, std = _STATISTICS[name]
    extra: dict[str, Any] = {"fallback": fallback}
    return Dataset(
        name, *arrays["train"], *arrays["test"], mean, std, _CLASSES[name], source, **extra
    )
