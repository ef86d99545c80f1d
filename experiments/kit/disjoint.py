"""Pairs of networks that were trained on disjoint classes: found or trained, merged in any way."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kit import cli, edges, heads, records, timing, training
from kit.experiment import Setup
from vfjax import align, checkpoint, data, merge, renorm, stats

PyTree = Any

# Where partial zips end, by L: the ends of stages; at others each layer, or thirds.
STOPS = {20: (7, 13, 19, 20)}
# Networks by preset and data: their names, widths, dimensions of the embeddings, and epochs.
NETWORKS = {
    ("cpu", "cifar10"): ("vgg7-bn", 0.5, 32, 12),
    ("cpu", "cifar100"): ("vgg7-bn", 0.5, 128, 24),
    ("cpu", "digits"): ("vgg7-bn", 0.25, 16, 30),
    ("paper", "cifar10"): ("resnet20", 4.0, 512, 100),
    ("paper", "cifar100"): ("resnet20", 8.0, 512, 100),
}


def _network(record: Mapping[str, Any]) -> tuple[str, float, int, int]:
    return NETWORKS[record["config"]["preset"], record["data"]["name"]]


def _dimensions(record: Mapping[str, Any]) -> int:
    config = record["config"]
    own = config["embeddings"] or config["loss"] != "cosine"
    return config["dimensions"] if own else _network(record)[2]


# fmt: off
@dataclasses.dataclass(frozen=True)
class HalvesOptions(heads.EmbeddingOptions, edges.EdgeOptions):
    """The options that say which networks of halves of the classes are merged."""

    dataset: str = cli.option(
        "auto", "images; auto is CIFAR-10 where it is found, else, with a warning and in titles, "
        "the digits that come with scikit-learn", choices=("auto", "cifar10", "cifar100", "digits"))
    model: tuple[str, float | None] | None = cli.option(
        None, "architecture of the networks (default: vgg7-bn-w0.5, for the digits vgg7-bn-w0.25; "
        "with --preset paper resnet20-w4, for CIFAR-100 resnet20-w8)", type=cli.model_of,
        metavar="NAME[-wWIDTH]")
    retrain: bool = cli.option(
        False, "train the networks instead of loading shipped ones, as is always done on the "
        "digits; they are kept in OUT/checkpoints-PRESET, where finished ones are reused",
        part="retrained", usual=lambda record: record["data"]["name"] == "digits")
    dimensions: int | None = cli.option(
        None, "of the orthonormal embeddings, at least as many as classes (default: 32 for "
        "CIFAR-10, 128 for CIFAR-100, 16 for the digits; with --preset paper 512)", type=int,
        metavar="N", part="{}dimensions", usual=_dimensions)
    epochs: int | None = cli.option(
        None, "instead of the recipe's", type=cli.count_of("epochs"),
        part="epochs{}", usual=lambda record: _network(record)[3])
    pairs: int = cli.option(
        1, "number of pairs; the first splits the classes in their order, others at random, and "
        "all have networks of their own; with more than one, numbers are means",
        type=cli.count_of("pairs"), part="{}pairs")
# fmt: on


def completed(config: Any, probe: data.Dataset) -> tuple[Any, heads.Head]:
    """The options with what they leave open filled in, and the head of all classes."""
    if (config.preset, probe.name) not in NETWORKS:
        raise cli.UserError(f"--preset paper is not for {probe.name}; give --dataset cifar10.")
    heads.check(config)
    name, width, dimensions, epochs = NETWORKS[config.preset, probe.name]
    retrain = config.retrain or probe.name == "digits"
    if config.epochs and not retrain:
        raise cli.UserError("--epochs is for networks that are trained: give --retrain, too.")
    if config.model is not None:
        name, given = config.model
        width = 1.0 if given is None else given
    wanted = dataclasses.replace(config, dimensions=config.dimensions or dimensions)
    head = heads.head_of(wanted, probe.classes)
    changed = {"model": (name, width), "epochs": config.epochs or epochs, "retrain": retrain}
    return dataclasses.replace(config, dimensions=head.dimensions, **changed), head


def tasks_of(classes: int, pair: int) -> tuple[tuple[int, ...], ...]:
    """The two halves of the classes: in their order for the first pair, else at random."""
    order = np.random.default_rng(pair).permutation(classes) if pair else np.arange(classes)
    return tuple(tuple(sorted(map(int, part))) for part in np.array_split(order, 2))


def network_of(config: Any, head: heads.Head, dataset: str, task: Sequence[int], seed: int) -> Path:
    """The checkpoint of one network, trained where that was asked for."""
    model, width = config.model
    if config.retrain:
        options = {key: getattr(config, key) for key in ("loss", "embeddings", "scale", "epochs")}
        options |= {"seeds": (seed,), "classes": tuple(task)}
        options["recipe"] = "paper-zipit" if config.preset == "paper" else None
        if config.loss == "cosine" and not config.embeddings:
            options["dimensions"] = config.dimensions
        return edges.trained(config, edges.Architecture(model, width, dataset), **options)[0]
    name = training.checkpoint_name(dataset, model, width, seed, task)
    found = records.ROOT / "checkpoints" / name
    if not found.exists():
        raise cli.UserError(
            f"{found.name} is needed in checkpoints/ and not there: --retrain trains all networks "
            "into --out, --pairs 1 is what is shipped."
        )
    other = heads.different(checkpoint.card(found), heads.described(config, head, task))
    if other:
        why = f"checkpoints/{name} was trained with {', '.join(other)}"
        raise cli.UserError(f"{why}: --retrain trains others.")
    return found


@dataclasses.dataclass(frozen=True)
class Setting:
    edges: edges.Edges  # The networks of all pairs, one after the other, and images.
    heads: Sequence[heads.Heads]  # How the classes are told, by pair.


def prepare(config: Any, watch: timing.Stopwatch) -> Setup:
    """Checks options, finds or trains all networks, reads images."""
    edges.check_shipped(config, "networks")
    with watch("data"):
        probe = edges.probed(config.dataset, config.data_dir)
    config, head = completed(config, probe)
    arch = edges.Architecture(*config.model, probe.name)
    with watch("trace"):
        # Its outputs are embeddings of the classes.
        net = edges.trace(arch, dataclasses.replace(probe, classes=config.dimensions))
    tasks = [tasks_of(probe.classes, pair) for pair in range(config.pairs)]
    with watch("training" if config.retrain else "checkpoints"):
        each = enumerate(task for halves in tasks for task in halves)
        folders = [network_of(config, head, probe.name, task, seed) for seed, task in each]
        trees = [checkpoint.load(folder) for folder in folders]
    with watch("data"):
        dataset = edges.whole(probe, config.data_dir)
    parts = edges.images_of(dataset, config.statistics, config.held_out, config.samples)
    found = edges.Edges(arch, dataset, net, folders, trees, parts)
    described = {k: v for k, v in heads.described(config, head, ()).items() if k != "classes"}
    seeds = {"networks": found.seeds, "embeddings": 0, "splits": list(range(config.pairs))}
    setup = found.setup(config, head=described, tasks=tasks, seeds=seeds)
    setting = Setting(found, [heads.Heads(head, halves) for halves in tasks])
    return dataclasses.replace(setup, value=setting)


def stops_of(depth: int) -> list[int]:
    """How many layers partial zips merge, up to all.

    Example:
      >>> stops_of(5), stops_of(14)
      ([1, 2, 3, 4, 5], [5, 9, 13, 14])
    """
    thirds = sorted({math.ceil(depth / 3), round(0.65 * depth), depth - 1, depth})
    return list(STOPS.get(depth, range(1, depth + 1) if depth <= 8 else thirds))


class Pair:
    """Two networks, by the place of the pair; merges them in any way, measures what comes out."""

    def __init__(self, setting: Setting, place: int, watch: timing.Stopwatch) -> None:
        self.net, self.images, self.watch = setting.edges.net, setting.edges.images, watch
        self.heads = setting.heads[place]
        self.trees = list(setting.edges.trees[2 * place : 2 * place + 2])

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def moments(self, count: int | None = None) -> stats.Moments:
        """Correlations of all features, over so many of the statistics images."""
        batches = timing.Watched(self.images.statistics.samples(count), "statistics")
        with self.watch("statistics" if count is None else "statistics of few images"):
            return stats.moments(self.net, self.trees, batches, sites="taps", covariance=True)

    @functools.cached_property
    def permutation(self) -> align.Maps:
        """Units of the second network are permuted to those of the first, by activations."""
        return _permuted(align.match_moments(self.net, self.moments()))

    def zip(self, *, images: int | None = None, matcher: Any = "greedy", **how: float) -> Any:
        """Maps of a matcher with some alpha and beta, from the statistics of so many images."""
        images = None if images == len(self.images.statistics.images) else images
        known = self.moments(images)
        return align.zip_moments(self.net, known, matcher=matcher, key=jax.random.key(0), **how)

    def merged(self, way: str, layers: int, how: Mapping[str, Any]) -> Any:
        """What networks are merged to: a tree, a partial merge, or a tuple of trees.

        Ways are `network A` or `B`, `ensemble`, `average`, `weights`, `permutation`, or `zip`,
        which takes `how`.
        """
        if way in ("network A", "network B"):
            return self.trees["AB".index(way[-1])]
        if way in ("ensemble", "average"):
            return tuple(self.trees) if way == "ensemble" else merge.interpolate(self.trees)
        if way == "weights":
            maps = _permuted(align.match_weights(self.net, *self.trees, key=jax.random.key(0)))
        else:
            maps = self.permutation if way == "permutation" else self.zip(**how)
        return self.mapped(maps, layers)

    def mapped(self, maps: align.Maps, layers: int) -> Any:
        """The average of the mapped networks, in the first layers or in all."""
        if layers < self.net.depth:
            return merge.partial(self.net, self.trees, maps, span=slice(None, layers))
        return merge.interpolate(maps.apply(self.net, self.trees))

    def accuracy(self, model: Any, what: str) -> records.Row:
        """Over all classes and on each half, on test images, and cost relative to one network's.

        The model is as of `merged`; statistics of norms are measured first.
        """
        with self.watch("RESET"):
            model = self.reset(model, what)
        parts = model if type(model) is tuple else (model,)
        with self.watch("test"):
            found = heads.accuracy(self.heads, model, self.images.test)
            held_out = heads.accuracy(self.heads, model, self.images.held_out)
        row = {"accuracy": found["joint"], "average": found["average"]}
        row |= zip(("task_a", "task_b"), found["tasks"], strict=True)
        row |= {"held_out": held_out["joint"]}
        for cost in ("params", "flops"):
            row[f"{cost}_ratio"] = sum(getattr(p, cost) for p in parts) / getattr(self.net, cost)
        return row

    def reset(self, model: Any, what: str) -> Any:
        """What can be called, with the statistics of its norms measured."""
        if type(model) is tuple:
            return tuple(self.reset(tree, what) for tree in model)
        if self.net.norms:
            images = timing.Watched(self.images.statistics, f"RESET of {what}")
            model = renorm.reset(self.net, model, images)
        return model if isinstance(model, merge.Merged) else merge.as_merged(self.net, model)

    def timed(self, how: Mapping[str, Any]) -> tuple[float, align.Maps]:
        """The seconds that a way to match takes once the statistics are there, and its maps."""
        self.moments()
        start = time.perf_counter()
        maps = self.zip(**how)
        return time.perf_counter() - start, maps

    def features(self, how: Mapping[str, float]) -> Iterator[records.Row]:
        """By group, what was merged: mean correlation, and the share of it within a network."""
        zipped = self.zip(**how)
        maps = {"correlation": zipped, "permuted_correlation": self.permutation}
        totals = {k: align.merged_correlation(self.net, self.moments(), v) for k, v in maps.items()}
        depths = {layer.group: layer.depth for layer in reversed(self.net.layers)}
        for group in sorted(zipped.sizes, key=lambda group: depths[group]):
            sizes = zipped.sizes[group]
            # By merged feature, how many of each network's features it is made of.
            parts = np.stack([of[group][1].sum(0) for of in zipped.maps])
            pairs, within = (n * (n - 1) / 2 for n in (parts.sum(0), parts))
            row = {"group": group, "depth": depths[group], "features": len(sizes)}
            row |= {"largest": int(sizes.max()), "within": float(within.sum() / pairs.sum())}
            yield row | {name: float(of[group] / len(sizes)) for name, of in totals.items()}


def _permuted(found: align.Alignment) -> align.Maps:
    """A matching of the second network's units to the first's, as maps of both."""
    return align.Maps.of_permutations([{}, found.permutations])
