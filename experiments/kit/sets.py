"""Data sets for networks to be merged across them: grey images of one size, in mixed batches."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax import data, train

BATCH = 500
# The digits in two disguises, as data sets that need no files.
DISGUISES = {"digits-turned": lambda x: np.rot90(x, axes=(1, 2)), "digits-negative": np.invert}
NAMES = (*data.NAMES[1:], *DISGUISES)
LABELS = {name: name for name in NAMES} | {"mnist": "MNIST"}
LABELS |= {"cifar10": "CIFAR-10 in grey", "cifar100": "CIFAR-100 in grey"}


@dataclasses.dataclass(frozen=True)
class Preset:
    """How large everything is."""

    width: float  # Multiplier of all channel counts.
    size: int  # Pixels along each side of an image.
    images: int | None  # Training images of a data set, at most; None for all.
    test: int | None  # Test images of a data set, at most; None for all.
    steps: int  # Training steps, of 128 images, for every network alike.
    # How many are merged: of 9, and ends of stages; the paper's are 10, 22 and 49 of 50.
    layers: tuple[int, ...] = (2, 4, 8)


PRESETS = {
    "cpu": Preset(width=0.25, size=16, images=20_000, test=2_000, steps=800),
    "paper": Preset(width=1.0, size=32, images=None, test=None, steps=20_000),
    "quick": Preset(width=1.0, size=8, images=300, test=200, steps=3, layers=(1, 2)),
}


def load(name: str, preset: Preset, data_dir: str | None) -> data.Dataset:
    base, disguise = ("digits" if name in DISGUISES else name), DISGUISES.get(name, np.asarray)
    dataset = data.load(base, data_dir, train=preset.images, test=preset.test)
    images = {key: getattr(dataset, key) for key in ("train_images", "test_images")}
    changed = {key: np.ascontiguousarray(disguise(found)) for key, found in images.items()}
    return data.grey(dataclasses.replace(dataset, name=name, **changed), size=preset.size)


def recipe_of(preset: Preset, dataset: data.Dataset) -> train.Recipe:
    recipe = train.Recipe(learning_rate=0.05, schedule="cosine", weight_decay=5e-4)
    steps = math.ceil(len(dataset.train_images) / recipe.batch_size)
    return dataclasses.replace(recipe, epochs=max(1, round(preset.steps / steps)))


def normalised(images: np.ndarray, dataset: data.Dataset) -> np.ndarray:
    return np.asarray(data.normalise(jnp.asarray(images), dataset.mean, dataset.std))


def mixed(datasets: Sequence[data.Dataset]) -> list[jax.Array]:
    """Batches of training images of all data sets, equally many of each in every batch."""
    count = min(len(d.train_images) for d in datasets)
    batches = max(1, count * len(datasets) // BATCH)
    each = count // batches
    images = [normalised(d.train_images[: each * batches], d) for d in datasets]
    whole = np.stack(images, 1).reshape(batches, each * len(datasets), *images[0].shape[1:])
    return list(jnp.asarray(whole))


def tests_of(datasets: Sequence[data.Dataset]) -> np.ndarray:
    """The test images of all data sets, one set after the other, in batches of one size."""
    images = np.concatenate([normalised(d.test_images, d) for d in datasets])
    spare = np.zeros((-len(images) % BATCH, *images.shape[1:]), images.dtype)
    return np.concatenate([images, spare]).reshape(-1, BATCH, *images.shape[1:])


def accuracies(logits: np.ndarray, datasets: Sequence[data.Dataset]) -> dict[str, float]:
    """By data set, how often a head is right that has these logits of `tests_of` them."""
    ends = np.cumsum([len(d.test_labels) for d in datasets])
    parts = zip(datasets, np.split(logits, ends)[:-1], strict=True)
    # A network may have more outputs than a data set has classes.
    right = {d.name: own[:, : d.classes].argmax(1) == d.test_labels for d, own in parts}
    return {name: float(np.mean(of)) for name, of in right.items()}


def combinations(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All pairs, and all at once.

    Example:
      >>> combinations("abc"), combinations("ab")
      ([('a', 'b'), ('a', 'c'), ('b', 'c'), ('a', 'b', 'c')], [('a', 'b')])
    """
    return list(dict.fromkeys([*itertools.combinations(names, 2), tuple(names)]))
