"""Pairs of networks on disjoint classes: found or trained, and what of them was merged."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kit import cli, edges, heads, joint, records, timing, training
from kit.experiment import Setup
from vfjax import align, checkpoint, data

# Networks by preset and data: their names, widths, dimensions of the embeddings, and epochs.
NETWORKS = {
    ("cpu", "cifar10"): ("vgg7-bn", 0.5, 32, 12),
    ("cpu", "cifar100"): ("vgg7-bn", 0.5, 128, 24),
    ("cpu", "digits"): ("vgg7-bn", 0.25, 16, 30),
    ("paper", "cifar10"): ("resnet20", 4.0, 512, 100),
    ("paper", "cifar100"): ("resnet20", 8.0, 512, 100),
}


def usual(record: Mapping[str, Any]) -> tuple[str, float, int, int]:
    return NETWORKS[record["config"]["preset"], record["data"]["name"]]


def tasks_of(classes: int, pair: int) -> list[list[int]]:
    """The two halves of the classes: in their order for the first pair, else at random."""
    order = np.random.default_rng(pair).permutation(classes) if pair else np.arange(classes)
    return [sorted(part.tolist()) for part in np.array_split(order, 2)]


def training_of(config: Any, dataset: data.Dataset) -> training.Training:
    """How all networks are trained, but for their classes and seeds."""
    if (config.preset, dataset.name) not in NETWORKS:
        raise cli.UserError(f"--preset {config.preset} is not for {dataset.name}.")
    heads.check(config)
    *default, dimensions, epochs = NETWORKS[config.preset, dataset.name]
    name, width = config.model or default
    same = {key: getattr(config, key) for key in ("loss", "embeddings", "dimensions", "scale")}
    if config.loss == "cosine" and config.embeddings is None:
        same["dimensions"] = config.dimensions or dimensions
    same["recipe"] = "paper-zipit" if config.preset == "paper" else None
    arch = edges.Architecture(name, width or 1.0, dataset.name)
    return edges.training_of(config, arch, epochs=config.epochs or epochs, **same)


def prepare(config: Any, watch: timing.Stopwatch) -> Setup:
    """Checks options, finds or trains all networks, one pair after the other, reads images."""
    edges.check_shipped(config)
    with watch("data"):
        probe = edges.probed(config.dataset, config.data_dir)
    args, retrain = training_of(config, probe), config.retrain or probe.name == "digits"
    if config.epochs and not retrain:
        raise cli.UserError("--epochs is for networks that are trained: give --retrain, too.")
    head = heads.head_of(args, probe.classes)
    with watch("trace"):
        # Its outputs are embeddings of the classes.
        net = edges.traced(training.model_of(args.model, args.width, head.dimensions), probe)
    tasks = [tasks_of(probe.classes, pair) for pair in range(config.pairs)]
    each = [dataclasses.replace(args, classes=tuple(task), seeds=(seed,))
            for seed, task in enumerate(itertools.chain(*tasks))]  # fmt: skip
    with watch("training" if retrain else "checkpoints"):
        found = [training.run(one) if retrain else training.shipped(one) for one in each]
        folders = list(itertools.chain(*found))
        trees = [checkpoint.load(folder) for folder in folders]
    with watch("data"):
        dataset = edges.whole(probe, config.data_dir)
    images = edges.images_of(dataset, config.statistics, config.held_out, config.samples)
    arch = edges.Architecture(args.model, args.width, args.dataset)
    models = edges.Edges(arch, dataset, net, folders, trees, images)
    seeds = {"networks": models.seeds, "embeddings": 0, "splits": list(range(config.pairs))}
    told = {"head": heads.described(args, head), "tasks": tasks, "seeds": seeds}
    config = dataclasses.replace(config, dimensions=args.dimensions, epochs=args.epochs)
    return dataclasses.replace(models.setup(config, **told), value=(models, head))


def stops_of(depth: int) -> list[int]:
    """How many layers partial zips merge: of 20, as in the paper, the ends of stages.

    Example:
      >>> stops_of(5), stops_of(20)
      ([1, 2, 3, 4, 5], [7, 13, 19, 20])
    """
    if depth <= 8:
        return list(range(1, depth + 1))
    return sorted({math.ceil(depth / 3), round(0.65 * depth), depth - 1, depth})


def features(pair: joint.Networks, zipped: align.Maps) -> Iterator[records.Row]:
    """By group, what was merged: mean correlation, and the share of it within a network."""
    known = {"correlation": zipped, "permuted_correlation": pair.maps("permute")}
    totals = {k: align.merged_correlation(pair.net, pair.moments(), v) for k, v in known.items()}
    depths = {layer.group: layer.depth for layer in reversed(pair.net.layers)}
    for group in sorted(zipped.sizes, key=lambda group: depths[group]):
        sizes = zipped.sizes[group]
        # By merged feature, how many of each network's features it is made of.
        parts = np.stack([of[group][1].sum(0) for of in zipped.maps])
        pairs, within = (n * (n - 1) / 2 for n in (parts.sum(0), parts))
        row = {"group": group, "depth": depths[group], "features": len(sizes)}
        row |= {"largest": int(sizes.max()), "within": float(within.sum() / pairs.sum())}
        yield row | {name: float(of[group] / len(sizes)) for name, of in totals.items()}
