"""ImageNet as published networks take it: streamed, resized, cropped at the centre, normalised.

The 1.2 million photographs of the training split do not fit into memory and differ in size, so
several threads decode batches on demand, one batch ahead. `vfjax.data` is for data sets that fit.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from vfjax._types import Array
from vfjax.data._data import Batches, DatasetError, find, normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""By channel, of images in [0, 1]: the statistics that torchvision's and timm's networks use."""

_NAME = "imagenet2012"
_THREADS = min(16, os.cpu_count() or 1)


def centre(image: np.ndarray, *, resize: int = 256, crop: int = 224) -> np.ndarray:
    """Resizes an image to a given length of its shorter side and crops its centre.

    Args:
        image: uint8 `[H, W, 3]`, or grey `[H, W]` or `[H, W, 1]`, which is repeated to 3 channels.
        resize: Pixels of the shorter side, by bilinear interpolation with antialiasing.
        crop: Pixels along each side of the crop; at most `resize`.

    Returns:
        uint8 `[crop, crop, 3]`.

    Raises:
        ValueError: If `crop` is above `resize`, or below one.

    Example:
        >>> centre(np.zeros((30, 40, 3), np.uint8), resize=16, crop=12).shape
        (12, 12, 3)

    Source: the evaluation of torchvision's networks: `Resize(256)`, `CenterCrop(224)`.
    """
    if not 1 <= crop <= resize:
        raise ValueError(f"crop must be from 1 to resize = {resize}, got {crop!r}")
    shown = Image.fromarray(np.squeeze(image, -1) if image.shape[-1:] == (1,) else image)
    shown = shown.convert("RGB")
    width, height = shown.size
    # Rounded as in torchvision: the longer side down, the crop's corner half to even.
    if width <= height:
        size = resize, int(resize * height / width)
    else:
        size = int(resize * width / height), resize
    shown = shown.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((n - crop) / 2) for n in shown.size)
    return np.asarray(shown.crop((left, top, left + crop, top + crop)))


class Streamed:
    """Re-iterable batches `(x, label)`, decoded on demand; the last one may be smaller.

    Each is a float32 `[n, crop, crop, 3]` on the device and an int32 `[n]`.

    Args:
        source: A sequence of examples, dictionaries with `image` (uint8 `[H, W, C]`) and `label`:
            the result of `tfds.data_source`, or a list.
        batch_size: Images per batch.
        samples: How many examples to use, from the first; None for all.
        resize: See `centre`.
        crop: See `centre`.

    Raises:
        ValueError: If `batch_size` or `samples` is below one, or `crop` does not fit `resize`.

    Example:
        >>> source = [{"image": np.zeros((20, 30, 3), np.uint8), "label": k} for k in range(5)]
        >>> batches = Streamed(source, batch_size=2, resize=16, crop=8)
        >>> [(x.shape, label.tolist()) for x, label in batches][-1]
        ((1, 8, 8, 3), [4])
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        batch_size: int = 100,
        samples: int | None = None,
        resize: int = 256,
        crop: int = 224,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("samples", samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if not 1 <= crop <= resize:
            raise ValueError(f"crop must be from 1 to resize = {resize}, got {crop!r}")
        self.source, self.batch_size, self.resize, self.crop = source, batch_size, resize, crop
        self.count = len(source) if samples is None else min(samples, len(source))

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for images, labels in self._decoded():
            yield normalise(jnp.asarray(images), MEAN, STD), jnp.asarray(labels)

    def _decoded(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:

            def begun(start: int) -> list[concurrent.futures.Future[tuple[np.ndarray, int]]]:
                rows = range(start, min(start + self.batch_size, self.count))
                return [pool.submit(self._read, row) for row in rows]

            ahead = begun(0)
            for start in range(self.batch_size, self.count + self.batch_size, self.batch_size):
                now, ahead = ahead, begun(start)
                images, labels = zip(*(one.result() for one in now), strict=True)
                yield np.stack(images), np.asarray(labels, np.int32)

    def _read(self, row: int) -> tuple[np.ndarray, int]:
        example = self.source[row]
        image = centre(np.asarray(example["image"]), resize=self.resize, crop=self.crop)
        return image, int(example["label"])

    def samples(self, count: int | None) -> Streamed:
        """Batches of the first examples only.

        Args:
            count: How many; None, or more than there are, means all.

        Returns:
            New batches of the same size.
        """
        options = {"batch_size": self.batch_size, "resize": self.resize, "crop": self.crop}
        return Streamed(self.source, samples=count, **options)

    def held(self) -> Batches:
        """The same batches, decoded once and held in memory as uint8.

        Returns:
            Batches `(x, label)` equal to these; 5,000 images of 224 x 224 take 0.75 GB.

        Example:
            >>> source = [{"image": np.zeros((20, 30, 3), np.uint8), "label": k} for k in range(5)]
            >>> Streamed(source, batch_size=2, resize=16, crop=8).held()
            Batches(5 images in batches of 2)
        """
        images = np.empty((self.count, self.crop, self.crop, 3), np.uint8)
        labels = np.empty(self.count, np.int32)
        for number, batch in enumerate(self._decoded()):
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            images[rows], labels[rows] = batch
        return Batches(images, labels, MEAN, STD, self.batch_size)

    def __repr__(self) -> str:
        """The numbers of images and of images per batch."""
        return f"Streamed({self.count} images in batches of {self.batch_size})"


def load(
    split: str = "validation",
    *,
    batch_size: int = 100,
    samples: int | None = None,
    resize: int = 256,
    crop: int = 224,
    data_dir: str | os.PathLike[str] | None = None,
) -> Streamed:
    """Streams a split of ImageNet (`imagenet2012`) that TFDS has prepared.

    Args:
        split: A split in TFDS's notation: `"validation"`, `"train"`, `"train[:1%]"` ...
        batch_size: Images per batch.
        samples: How many examples to use, from the first; None for all. TFDS has shuffled the
            training split.
        resize: See `centre`.
        crop: See `centre`.
        data_dir: Folder that TFDS wrote to; None for `TFDS_DATA_DIR`, then TFDS's default.

    Returns:
        The batches.

    Raises:
        DatasetError: If the data set is not prepared: its archives must be fetched from
            image-net.org and prepared by TFDS.
        ValueError: As `Streamed`.

    Example:
        >>> load("validation", data_dir="/nowhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        DatasetError: ...
    """
    folder = find(_NAME, data_dir)
    if folder is None:
        raise DatasetError(
            f"{_NAME} is not prepared in {data_dir or 'TFDS_DATA_DIR or its default'}. Fetch "
            "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org into "
            "downloads/manual there, and let TFDS prepare it: tfds.builder('imagenet2012', "
            "file_format='array_record').download_and_prepare()"
        )
    import tensorflow_datasets as tfds

    source: Any = tfds.data_source(_NAME, split=split, data_dir=folder, download=False)
    options = {"batch_size": batch_size, "samples": samples, "resize": resize, "crop": crop}
    return Streamed(source, **options)
