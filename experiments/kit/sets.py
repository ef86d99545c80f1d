"""Networks of several data sets: grey images of one size, mixed batches, tests by head."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from kit import records, timing
from vfjax import align, data, merge, models, renorm, stats, train

PyTree = Any
Accuracies = dict[str, float]

BATCH = 500
MODEL = "vgg11-bn"
# To see that it runs: networks that compile fast, without BatchNorm.
QUICK_MODEL = models.MLP((16, 16))
# Of 9, and ends of stages, where a partial zip may stop; the paper's are 10, 22 and 49 of 50.
LAYERS = (2, 4, 8)
# The digits in two disguises, as data sets that need no files.
DISGUISES = {"digits-turned": lambda x: np.rot90(x, axes=(1, 2)), "digits-negative": np.invert}
NAMES = (*data.NAMES[1:], *DISGUISES)
LABELS = records.DATASETS | {
    "cifar10": "CIFAR-10 in grey",
    "cifar100": "CIFAR-100 in grey",
    "digits": "digits",
    "digits-turned": "turned digits",
    "digits-negative": "negative digits",
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """How large everything is."""

    width: float  # Multiplier of all channel counts.
    size: int  # Pixels along each side of an image.
    images: int | None  # Training images of a data set, at most; None for all.
    test: int | None  # Test images of a data set, at most; None for all.
    steps: int  # Training steps, of 128 images, for every network alike.
    layers: tuple[int, ...] = LAYERS  # How many are merged.


PRESETS = {
    "cpu": Preset(width=0.25, size=16, images=20_000, test=2_000, steps=800),
    "paper": Preset(width=1.0, size=32, images=None, test=None, steps=20_000),
}
QUICK = Preset(width=1.0, size=8, images=300, test=200, steps=3, layers=(1, 2))


@dataclasses.dataclass(frozen=True)
class Trained:
    """The networks, by data set, and how large everything is."""

    net: vfjax.Network
    datasets: Sequence[data.Dataset]
    trees: Sequence[PyTree]
    preset: Preset


def load(name: str, preset: Preset, data_dir: str | None) -> data.Dataset:
    base = "digits" if name in DISGUISES else name
    dataset = data.load(base, data_dir, train=preset.images, test=preset.test)
    if name in DISGUISES:
        images = {key: getattr(dataset, key) for key in ("train_images", "test_images")}
        changed = {k: np.ascontiguousarray(DISGUISES[name](v)) for k, v in images.items()}
        dataset = dataclasses.replace(dataset, name=name, **changed)
    return data.grey(dataset, size=preset.size)


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


class Tests:
    """The test images of several data sets, in batches of one size."""

    def __init__(self, datasets: Sequence[data.Dataset]) -> None:
        self.datasets = datasets
        images = [normalised(d.test_images, d) for d in datasets]
        self.counts = [len(x) for x in images]
        spare = np.zeros((-sum(self.counts) % BATCH, *images[0].shape[1:]), np.float32)
        self.batches = np.concatenate([*images, spare]).reshape(-1, BATCH, *images[0].shape[1:])

    def accuracies(self, model: Any) -> list[Accuracies]:
        """By head, accuracies on all data sets; the model maps a batch to logits, or to several."""
        outputs = [jax.device_get(_outputs(model, x)) for x in self.batches]
        heads = zip(*outputs, strict=True) if isinstance(outputs[0], tuple) else [outputs]
        return [self._of_head(np.concatenate(list(parts))) for parts in heads]

    def _of_head(self, logits: np.ndarray) -> Accuracies:
        found, parts = {}, np.split(logits, np.cumsum(self.counts))
        for dataset, own in zip(self.datasets, parts[:-1], strict=True):
            # A network may have more outputs than a data set has classes.
            right = own[:, : dataset.classes].argmax(1) == dataset.test_labels
            found[dataset.name] = float(np.mean(right))
        return found


@jax.jit
def _outputs(model: Any, x: jax.Array) -> Any:
    return model(x)


def combinations(count: int) -> list[tuple[int, ...]]:
    """All pairs, and all at once.

    Example:
      >>> combinations(3), combinations(2)
      ([(0, 1), (0, 2), (1, 2), (0, 1, 2)], [(0, 1)])
    """
    pairs: list[tuple[int, ...]] = list(itertools.combinations(range(count), 2))
    return pairs if count == 2 else [*pairs, tuple(range(count))]


@dataclasses.dataclass(eq=False)
class Combination:
    """Some of the networks, merged in all ways."""

    net: vfjax.Network
    datasets: Sequence[data.Dataset]
    trees: Sequence[PyTree]
    watch: timing.Stopwatch

    def __post_init__(self) -> None:
        self.tests, self.statistics = Tests(self.datasets), mixed(self.datasets)

    @functools.cached_property
    def maps(self) -> dict[str, align.Maps | None]:
        """What is applied to the networks before they are averaged, by method."""
        with self.watch("statistics"):
            how = {"sites": "taps", "covariance": True}
            known = stats.moments(self.net, self.trees, self.statistics, **how)
        with self.watch("matching"):
            universe = align.match_universe_moments(self.net, known)
            permuted = align.Maps.of_permutations(universe.permutations)
            return {"average": None, "permute": permuted, "zip": align.zip_moments(self.net, known)}

    def measured(self, method: str, layers: int | None) -> Iterator[records.Row]:
        """Accuracies by head and data set: of each network, or of what the first layers are."""
        names, sizes = [dataset.name for dataset in self.datasets], {}
        if method == "network":
            merged = [merge.as_merged(self.net, tree) for tree in self.trees]
            heads = [head for one in merged for head in self.evaluated(one)]
        else:
            maps = self.maps[method]
            one = merge.partial(self.net, self.trees, maps, span=slice(None, layers))
            heads = self.evaluated(one)
            sizes = {"params_ratio": one.params / self.net.params}
            sizes["flops_ratio"] = one.flops / self.net.flops
        for name, found in zip(names, heads, strict=True):
            for tested, value in found.items():
                if method == "network" or tested == name:
                    yield {"head": name, "tested": tested, "accuracy": value} | sizes

    def evaluated(self, model: merge.Merged) -> list[dict[str, float]]:
        """Accuracies by head, once BatchNorm's statistics are measured anew."""
        if self.net.norms:
            with self.watch("RESET"):
                model = renorm.reset(self.net, model, self.statistics)
        with self.watch("evaluation"):
            return self.tests.accuracies(model)
