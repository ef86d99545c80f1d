"""Data sets of images, in batches."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vfjax._types import Array

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Facts about a data set, known before it is read; mean and std are of images in [0, 1]."""

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# The CIFAR statistics are those of "Vanishing Feature" and of most CIFAR code, also for CIFAR-100:
# the standard deviations are means of those within single images, slightly below those of all
# pixels.
_CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_FACTS = {
    "cifar10": _Facts(10, *_CIFAR_STATISTICS),
    "cifar100": _Facts(100, *_CIFAR_STATISTICS),
    "mnist": _Facts(10, (0.1307,), (0.3081,)),
    "digits": _Facts(10, (0.3056,), (0.3756,)),
}
_TEST_DIGITS = 497
_READ_AT_ONCE = 1000

NAMES = ("auto", *_FACTS)


class DatasetError(ValueError):
    """A data set is not prepared, or cannot be read."""


class _NotPrepared(DatasetError):
    """The data set was not found and could not be prepared."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Maps uint8 images to float32 with about zero mean and unit deviation in each channel.

    Args:
        images: uint8 ``[N, H, W, C]``.
        mean: C means, for images in [0, 1].
        std: C standard deviations, for images in [0, 1].

    Returns:
        float32 ``[N, H, W, C]``.

    Example:
        >>> x = normalise(jnp.full((1, 2, 2, 1), 255, jnp.uint8), (0.5,), (0.25,))
        >>> round(float(x[0, 0, 0, 0]), 3)
        2.0
    """
    broadcast = (1,) * (images.ndim - 1) + (-1,)
    scale = jnp.asarray([1.0 / (255.0 * s) for s in std], jnp.float32).reshape(broadcast)
    shift = jnp.asarray([-m / s for m, s in zip(mean, std, strict=True)], jnp.float32)
    return images.astype(jnp.float32) * scale + shift.reshape(broadcast)


class Batches:
    """Re-iterable batches ``(x, label)`` of images in order; the last one may be smaller.

    Each is a float32 ``[n, H, W, C]`` on the device and an int32 ``[n]``.

    Args:
        images: uint8 ``[N, H, W, C]``.
        labels: int32 ``[N]``.
        mean: C means, for images in [0, 1].
        std: C standard deviations.
        batch_size: Images per batch.

    Raises:
        ValueError: If `batch_size` is below one, or the numbers of images and labels differ.

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
        """Batches of the first images only.

        Args:
            count: How many images; None, or more than there are, means all.

        Returns:
            New batches of the same size.

        Raises:
            ValueError: If `count` is below one.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count!r}.")
        return Batches(
            self.images[:count], self.labels[:count], self.mean, self.std, self.batch_size
        )

    def __repr__(self) -> str:
        return f"Batches({len(self.images)} images in batches of {self.batch_size})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
        fallback: Whether ``"auto"`` fell back to it because its first choice was not available.
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

    def batches(self, split: str, *, batch_size: int = 500, samples: int | None = None) -> Batches:
        """Batches of a split, in the order of its records and without augmentation.

        Args:
            split: ``"train"`` or ``"test"``.
            batch_size: Images per batch.
            samples: How many images to use, from the first; None for all.

        Returns:
            Re-iterable batches ``(x, label)``, normalised.

        Raises:
            ValueError: If the split is unknown, or a number is below one.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
        images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
        return Batches(images, labels, self.mean, self.std, batch_size).samples(samples)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.train_images.shape[1:]))
        sizes = f"{len(self.train_images)} train, {len(self.test_images)} test"
        return f"Dataset({self.name}: {sizes}, {shape}, {self.classes} classes, from {self.source})"


def load(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    train: int | None = None,
    test: int | None = None,
    prefer: str = "cifar10",
) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: ``"cifar10"``, ``"cifar100"``, ``"mnist"``, ``"digits"``, or ``"auto"``: `prefer`
            if it is available, else the digits, with a warning in the log and ``fallback=True``.
        data_dir: Folder to search first for TFDS data sets, before the one that the environment
            variable ``TFDS_DATA_DIR`` names and TFDS's default.  If the data is in none of them and
            TensorFlow is installed, TFDS downloads and prepares it.
        train: How many training images to read, from the first; None for all.  TFDS stores records
            in random order, so they are a fair sample.
        test: The same for the test split.
        prefer: The first choice of ``"auto"``.

    Returns:
        The `Dataset`.

    Raises:
        DatasetError: If the data set is not prepared and cannot be prepared, or cannot be read.
        ValueError: If a name is unknown or a count is below one.

    Example:
        >>> load("digits")
        Dataset(digits: 1300 train, 497 test, 8x8x1, 10 classes, from scikit-learn)
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
    if prefer not in _FACTS:
        raise ValueError(f"prefer must be one of {', '.join(_FACTS)}, got {prefer!r}.")
    counts = {"train": train, "test": test}
    for argument, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{argument} must be at least 1, got {count!r}.")
    if name == "auto":
        try:
            return load(prefer, data_dir, train=train, test=test)
        except _NotPrepared as error:
            _log.warning("FALLING BACK to the 8x8 digits of scikit-learn: %s", error)
        return dataclasses.replace(load("digits", train=train, test=test), fallback=True)
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if name == "digits":
        source = "scikit-learn"
        for split, (images, labels) in _digits().items():
            arrays[split] = images[: counts[split]], labels[: counts[split]]
    else:
        folder = find(name, data_dir) or _prepare(name, data_dir)
        source = f"TFDS in {folder}"
        for split, count in counts.items():
            arrays[split] = _read(name, split if count is None else f"{split}[:{count}]", folder)
    facts = _FACTS[name]
    return Dataset(
        name, *arrays["train"], *arrays["test"], facts.mean, facts.std, facts.classes, source
    )


def grey(dataset: Dataset, *, size: int) -> Dataset:
    """Converts a data set to grey and another size, so that it fits networks of other data sets.

    Args:
        dataset: A data set of grey or RGB images.
        size: Pixels along each side.

    Returns:
        Images uint8 ``[N, size, size, 1]``: the luma of ITU-R BT.601, resampled bilinearly with
        antialiasing (over all pixels that a new one covers). Mean and standard deviation are those
        of the training images.

    Raises:
        ValueError: If `size` is below one, or images are neither grey nor RGB.

    Example:
        >>> grey(load("digits"), size=16)
        Dataset(digits: 1300 train, 497 test, 16x16x1, 10 classes, from scikit-learn)
    """
    from PIL import Image

    channels = dataset.train_images.shape[-1]
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size!r}.")
    if channels not in (1, 3):
        raise ValueError(f"dataset must have 1 or 3 channels, it has {channels}.")

    def convert(images: np.ndarray) -> np.ndarray:
        resized = np.empty((len(images), size, size, 1), np.uint8)
        for row, image in enumerate(images):
            picture = Image.fromarray(image if channels == 3 else image[..., 0]).convert("L")
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            resized[row, ..., 0] = np.asarray(picture)
        return resized

    train = convert(dataset.train_images)
    return dataclasses.replace(
        dataset,
        train_images=train,
        test_images=convert(dataset.test_images),
        mean=(float(train.mean()) / 255,),
        std=(float(train.std()) / 255,),
    )


def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns scikit-learn's 1,797 digits in a fixed random split."""
    from sklearn.datasets import load_digits

    bunch = cast(Any, load_digits())
    # Pixels range from 0 to 16.
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(labels))  # noqa: NPY002 (frozen by NumPy)
    train, test = order[:-_TEST_DIGITS], order[-_TEST_DIGITS:]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def _places(data_dir: str | os.PathLike[str] | None) -> list[tuple[str, str]]:
    """Returns (label for messages, folder) in the order of the search."""
    places = [
        ("--data-dir", data_dir),
        ("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR")),
        ("TFDS's default", os.path.join("~", "tensorflow_datasets")),
    ]
    return [(label, os.path.expanduser(folder)) for label, folder in places if folder]


def find(name: str, data_dir: str | os.PathLike[str] | None) -> str | None:
    """The first folder in which TFDS has prepared a data set.

    Args:
        name: The data set's name in TFDS.
        data_dir: Folder to search first; None for `TFDS_DATA_DIR`, then TFDS's default.

    Returns:
        The folder, or None.
    """
    for _, folder in _places(data_dir):
        versions = Path(folder, name).glob("*/dataset_info.json")
        if any("incomplete" not in path.parent.name for path in versions):
            return folder
    return None


def _can_prepare() -> bool:
    """Whether the packages of the extra `prepare` are installed."""
    return all(importlib.util.find_spec(name) for name in ("tensorflow", "importlib_resources"))


def _prepare(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Lets TFDS download and prepare the data set, or raises with what is missing."""
    places = _places(data_dir)
    searched = ", ".join(f"{folder} ({label})" for label, folder in places)
    missing = f"the data set {name!r} is not prepared; searched {searched}."
    if not _can_prepare():
        raise _NotPrepared(
            f"{missing} Point --data-dir or TFDS_DATA_DIR at a folder that holds it as TFDS writes "
            'it, or let TFDS download and prepare it: install the extra, pip install ".[prepare]". '
            "The data set 'digits' needs neither."
        )
    import tensorflow_datasets as tfds

    folder = places[0][1]
    _log.warning("%s Downloading and preparing it in %s.", missing, folder)
    try:
        # The format must be requested: data_source cannot read TFDS's default.
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    # Anything can fail here, from the network to a full disk.
    except Exception as error:
        raise _NotPrepared(
            f"{missing} TFDS could not download and prepare it: {type(error).__name__}: {error}"
        ) from error
    return folder


def _not_about_opencv(record: logging.LogRecord) -> bool:
    """Drops TFDS's advice to install OpenCV: Pillow decodes to the same pixels, fast enough."""
    return "OpenCV" not in record.getMessage()


def _read(name: str, split: str, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split, or a slice of one, into uint8 images and int32 labels."""
    # Imported here because it takes half a second and the digits do not need it.
    import tensorflow_datasets as tfds

    logging.getLogger("absl").addFilter(_not_about_opencv)
    try:
        source = cast(Any, tfds.data_source(name, split=split, data_dir=folder, download=False))
        images = labels = None
        bar = tqdm(total=len(source), desc=f"reading {name} {split}", delay=2, leave=False)
        with bar:
            for start in range(0, len(source), _READ_AT_ONCE):
                rows = range(start, min(start + _READ_AT_ONCE, len(source)))
                examples = source.__getitems__(rows)
                if images is None or labels is None:
                    images = np.empty((len(source), *examples[0]["image"].shape), np.uint8)
                    labels = np.empty(len(source), np.int32)
                for row, example in zip(rows, examples, strict=True):
                    images[row], labels[row] = example["image"], example["label"]
                bar.update(len(rows))
    # TFDS, array_record and the decoder raise many kinds of exceptions on damaged files.
    except Exception as error:
        summary = str(error).strip().split("\n")[0]
        raise DatasetError(
            f"the data set {name!r} in {folder} cannot be read: {type(error).__name__}: {summary}. "
            "Its files must be whole and of the format array_record; remove the folder "
            f"{os.path.join(folder, name)} and prepare it again."
        ) from error
    if images is None or labels is None:
        raise DatasetError(f"the split {split!r} of {name!r} in {folder} is empty.")
    return images, labels
