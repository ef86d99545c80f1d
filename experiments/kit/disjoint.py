"""Pairs of networks on disjoint classes: found or trained, and what of them was merged."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kit import cli, edges, heads, joint, records, timing, training
from kit.experiment import Setup
from vfjax import align, checkpoint, data

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


def _usual(record: Mapping[str, Any]) -> tuple[str, float, int, int]:
    return NETWORKS[record["config"]["preset"], record["data"]["name"]]


def _usual_dimensions(record: Mapping[str, Any]) -> int:
    config = record["config"]
    own = config["embeddings"] or config["loss"] != "cosine"
    return config["dimensions"] if own else _usual(record)[2]


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
        metavar="N", part="{}dimensions", usual=_usual_dimensions)
    epochs: int | None = cli.option(
        None, "instead of the recipe's", type=cli.count_of("epochs"),
        part="epochs{}", usual=lambda record: _usual(record)[3])
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
    *default, dimensions, epochs = NETWORKS[config.preset, probe.name]
    retrain = config.retrain or probe.name == "digits"
    if config.epochs and not retrain:
        raise cli.UserError("--epochs is for networks that are trained: give --retrain, too.")
    name, width = config.model or default
    wanted = dataclasses.replace(config, dimensions=config.dimensions or dimensions)
    head = heads.head_of(wanted, probe.classes)
    found = {"model": (name, width or 1.0), "dimensions": head.dimensions, "retrain": retrain}
    return dataclasses.replace(config, **found, epochs=config.epochs or epochs), head


def tasks_of(classes: int, pair: int) -> list[list[int]]:
    """The two halves of the classes: in their order for the first pair, else at random."""
    order = np.random.default_rng(pair).permutation(classes) if pair else np.arange(classes)
    return [sorted(part.tolist()) for part in np.array_split(order, 2)]


def network_of(config: Any, head: heads.Head, dataset: str, task: Sequence[int], seed: int) -> Path:
    """The checkpoint of one network, trained where that was asked for."""
    arch = edges.Architecture(*config.model, dataset)
    if config.retrain:
        options = {key: getattr(config, key) for key in ("loss", "embeddings", "scale", "epochs")}
        options["recipe"] = "paper-zipit" if config.preset == "paper" else None
        if config.loss == "cosine" and not config.embeddings:
            options["dimensions"] = config.dimensions
        return edges.trained(config, arch, seeds=(seed,), classes=tuple(task), **options)[0]
    name = training.checkpoint_name(dataset, arch.name, arch.width, seed, task)
    found = records.ROOT / "checkpoints" / name
    if not found.exists():
        raise cli.UserError(
            f"{name} is needed in checkpoints/ and not there: --retrain trains all networks into "
            "--out, --pairs 1 is what is shipped."
        )
    training.check(found, heads.described(config, head), "--retrain trains others")
    return found


def prepare(config: Any, watch: timing.Stopwatch) -> Setup:
    """Checks options, finds or trains all networks, one pair after the other, reads images."""
    edges.check_shipped(config)
    with watch("data"):
        probe = edges.probed(config.dataset, config.data_dir)
    config, head = completed(config, probe)
    arch = edges.Architecture(*config.model, probe.name)
    with watch("trace"):
        # Its outputs are embeddings of the classes.
        net = edges.traced(training.model_of(arch.name, arch.width, config.dimensions), probe)
    tasks = [tasks_of(probe.classes, pair) for pair in range(config.pairs)]
    with watch("training" if config.retrain else "checkpoints"):
        each = enumerate(task for halves in tasks for task in halves)
        folders = [network_of(config, head, probe.name, task, seed) for seed, task in each]
        trees = [checkpoint.load(folder) for folder in folders]
    with watch("data"):
        dataset = edges.whole(probe, config.data_dir)
    images = edges.images_of(dataset, config.statistics, config.held_out, config.samples)
    found = edges.Edges(arch, dataset, net, folders, trees, images)
    seeds = {"networks": found.seeds, "embeddings": 0, "splits": list(range(config.pairs))}
    return found.setup(config, head=heads.described(config, head), tasks=tasks, seeds=seeds)


def stops_of(depth: int) -> list[int]:
    """How many layers partial zips merge, up to all.

    Example:
      >>> stops_of(5), stops_of(14)
      ([1, 2, 3, 4, 5], [5, 9, 13, 14])
    """
    thirds = sorted({math.ceil(depth / 3), round(0.65 * depth), depth - 1, depth})
    return list(STOPS.get(depth, range(1, depth + 1) if depth <= 8 else thirds))


def features(pair: joint.Networks, zipped: align.Maps) -> Iterator[records.Row]:
    """By group, what was merged: mean correlation, and the share of it within a network."""
    known = {"correlation": zipped, "permuted_correlation": pair.permuted}
    totals = {k: align.merged_correlation(pair.net, pair.moments, v) for k, v in known.items()}
    depths = {layer.group: layer.depth for layer in reversed(pair.net.layers)}
    for group in sorted(zipped.sizes, key=lambda group: depths[group]):
        sizes = zipped.sizes[group]
        # By merged feature, how many of each network's features it is made of.
        parts = np.stack([of[group][1].sum(0) for of in zipped.maps])
        pairs, within = (n * (n - 1) / 2 for n in (parts.sum(0), parts))
        row = {"group": group, "depth": depths[group], "features": len(sizes)}
        row |= {"largest": int(sizes.max()), "within": float(within.sum() / pairs.sum())}
        yield row | {name: float(of[group] / len(sizes)) for name, of in totals.items()}
