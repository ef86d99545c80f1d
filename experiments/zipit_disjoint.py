"""ZipIt! on disjoint classes: two networks that know half of the classes each become one.

    python experiments/zipit_disjoint.py                          # the shipped pair, CIFAR-10 5+5
    python experiments/zipit_disjoint.py --dataset digits         # seconds, needs no data
    python experiments/zipit_disjoint.py --loss cross-entropy --retrain    # plain classifiers
    python experiments/zipit_disjoint.py --embeddings clip.npy --retrain   # a text encoder's
    python experiments/zipit_disjoint.py --retrain --preset paper          # on a GPU
    python experiments/zipit_disjoint.py --dataset cifar100 --retrain --preset paper

Two networks are trained from different seeds, each on one half of the classes. Their outputs share
a space: every class has a fixed embedding in it, and the loss is the cross-entropy of the scaled
cosines with the embeddings of the network's own classes. The paper takes CLIP's embeddings of the
class names; here orthonormal ones at random stand in, where --embeddings names no file with a row
for each class in the order of the labels (CIFAR-10: airplane, automobile, bird, cat, deer, dog,
frog, horse, ship, truck).

Merged are: the plain average of the weights, the average after the second network's units are
permuted (by weights, as Git Re-Basin; by the correlation of activations), and ZipIt!, which merges
features that correlate within a network, too: up to a share beta of the merges. A feature that is
merged already counts alpha as much. alpha and beta are those of the paper's code, fixed beforehand.
"ZipIt! l/L" merges the first l layers, and the two networks finish apart, a head each; the ensemble
is l = 0. Networks permuted are merged so, too. Every network's BatchNorm statistics are measured
anew (RESET), those of the two as they are included.

Joint accuracy is over all classes: of one output, the class whose embedding it is closest to; of
two heads, the class of the largest probability, where each head's are among its own classes. With
plain classifiers that is so for one output, too. Accuracy per task is among the classes of the
image's own half, by its own head where there are two; the average is that of both tasks.

Further: sweeps of alpha and beta, and which of them held-out images would choose: training images
that come after those that statistics are measured on, and which the networks have seen in training;
other ways to match (identity, permutation, k-means, the optimal pairs) with the seconds that they
take once the statistics are there (the optimal pairs with networkx alone: pip install
".[matching]"); how many images the statistics need (RESET has them all); and by
layer the correlation of the features merged.

What the paper found (ResNet20, 4 times as wide, joint accuracy in per cent, CIFAR-10 5+5): Git
Re-Basin 46.2, permutation 58.4, ZipIt! 79.1, ZipIt! 13/20 83.8, ensemble 87.4. Identity 43.0 and
k-means 29.1 are below permutation, the optimal matching (79.6, 11 minutes) is as good as the greedy
one (79.0, 1.1 s). 100 images are enough. In narrow networks ZipIt! is no better than permutation;
the correlation of what is merged falls with depth (0.50, 0.37, 0.27 by stage, CIFAR-100).

What came out here (CIFAR-10: vgg7-bn at 0.5 of the width, 5+5 classes, statistics over 5,000
images, 401 s on 2 CPU cores): Networks of 86.3 and 91.2 on their own classes, ensemble 69.2 on all.
As in the paper: ZipIt! 5/5 with beta 0.125 gives 42.8, permutation 40.5; permutation gives 40.5,
the weight average 18.5; permutation by activations gives 40.5, by weights 30.1; ZipIt! 3/5 gives
56.7 (permuted 3/5: 56.1), ZipIt! 5/5 42.8; of all beta 1 does best with 53.8, with no pairs within
a network (beta 0) it is 39.9; identity gives 18.5 (0.0046 s), permutation 40.5 (0.0059 s); greedy
pairs without a budget give 53.8 (0.092 s), the optimal ones 53.9 (2.4 s); 100 images for the
statistics give 41.6, 5,000 give 42.8; features merged correlate with 0.77, 0.41, 0.36 and 0.35 from
layer to layer. Unlike the paper: ZipIt! 5/5 gives 42.8, the better of the networks alone 45.7;
ZipIt! 3/5 gives 56.7, the ensemble 69.2; k-means gives 52.5 (0.94 s), permutation 40.5 (0.0059 s).
Not in the paper: with 10 to 5,000 images for the statistics ZipIt! 5/5 gives 39.5 to 45.0, a range
of 5.5 points, where it is 2.3 above permutation, on a single pair of networks; alpha 0.3 and beta
1, chosen on held-out training images, give 53.8.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _disjoint
import _edges
import _heads
import numpy as np
from kit import cli
from kit import edges as kit_edges
from kit import training as train_edges
from tqdm import tqdm

from vfjax import checkpoint, data, plot

ALPHA, BETA = 0.3, 0.125
# Images, by preset.
DEFAULTS = {
    "cpu": {"samples": 10_000, "statistics": 5_000, "held_out": 2_000},
    "paper": {"samples": 10_000, "statistics": 48_000, "held_out": 2_000},
}
# Networks by preset and data: their names, dimensions of the embeddings, and epochs.
NETWORKS = {
    ("cpu", "cifar10"): ("vgg7-bn", 0.5, 32, 12),
    ("cpu", "cifar100"): ("vgg7-bn", 0.5, 128, 24),
    ("cpu", "digits"): ("vgg7-bn", 0.25, 16, 30),
    ("paper", "cifar10"): ("resnet20", 4.0, 512, 100),
    ("paper", "cifar100"): ("resnet20", 8.0, 512, 100),
}
METHODS = {
    "average": "weight average",
    "weights": "permuted by weights",
    "permutation": "permuted by activations",
    "zip": "ZipIt!",
}
MATCHER_LABELS = {
    "identity": "identity",
    "permute": "permutation",
    "kmeans": "k-means",
    "optimal": "optimal pairs",
    "greedy": "greedy pairs",
    "unbounded": "greedy pairs, no budget",
}
# What claims are decided by: what counts as more, as equal, and as close to the ensemble.
MORE, EQUAL, CLOSE = 0.01, 0.02, 0.05


# -------------------------------------------------------------------------------------- options


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="zipit_disjoint.py", description=__doc__, formatter_class=_common.Help
    )
    p.add_argument(
        "--dataset",
        default="auto",
        choices=("auto", "cifar10", "cifar100", "digits"),
        help="images; auto is CIFAR-10 where it is found, else, with a warning and in titles, the "
        "digits that come with scikit-learn",
    )
    p.add_argument(
        "--model",
        type=_edges.model_of,
        metavar="NAME[-wWIDTH]",
        help="architecture of the networks (default: vgg7-bn-w0.5, for the digits vgg7-bn-w0.25; "
        "with --preset paper resnet20-w4, for CIFAR-100 resnet20-w8)",
    )
    p.add_argument(
        "--preset",
        default="cpu",
        choices=("cpu", "paper"),
        help="networks and recipe: what two cores can train, or the paper's (100 epochs in batches "
        "of 500, all training images for the statistics), on a GPU, with --retrain",
    )
    p.add_argument(
        "--retrain",
        action="store_true",
        help="train the networks instead of loading shipped ones, as is always done on the digits; "
        "they are kept in OUT/checkpoints-PRESET, where finished ones are reused",
    )
    p.add_argument(
        "--pairs",
        type=_common.count_of("pairs"),
        default=1,
        help="number of pairs; the first splits the classes in their order, others at random, and "
        "all have networks of their own; with more than one, numbers are means",
    )
    p.add_argument("--epochs", type=_common.count_of("epochs"), help="instead of the recipe's")
    _heads.embedding_options(p)
    for name, default, what in (
        ("alpha", ALPHA, "how much a merged feature's correlations count"),
        ("beta", BETA, "share of the merges that may be within a network"),
    ):
        p.add_argument(
            f"--{name}", type=_edges.alpha_of, default=default, help=f"of ZipIt!: {what}"
        )
    images = {
        "samples": "test images, the first N",
        "statistics": "statistics images, the first N ",
    }
    images["statistics"] += "of the training split, of all classes, not augmented"
    images["held_out"] = "training images after those, on which alpha and beta are compared"
    for name, text in images.items():
        of = {preset: f"{defaults[name]:,}" for preset, defaults in DEFAULTS.items()}
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=_common.count_of("images"),
            metavar="N",
            help=f"{text} (default: {of['cpu']}; with --preset paper {of['paper']})",
        )
    _common.folder_options(p)
    return p


# ------------------------------------------------------------------------------------- networks


def completed(args: argparse.Namespace, dataset: data.Dataset) -> _heads.Head:
    """Checks the options and fills in what they leave open; returns the head of all classes."""
    if (args.preset, dataset.name) not in NETWORKS:
        label = _common.DATASET_LABELS[dataset.name]
        raise _common.UserError(f"--preset paper is not for {label}; give --dataset cifar10.")
    _heads.check(args)
    name, width, dimensions, epochs = NETWORKS[args.preset, dataset.name]
    args.dataset = dataset.name
    args.retrain |= dataset.name == "digits"
    if args.epochs and not args.retrain:
        raise _common.UserError("--epochs is for networks that are trained: give --retrain, too.")
    if args.model is not None:
        name, given = args.model
        width = 1.0 if given is None else given
    args.model, args.width = name, width
    args.epochs = args.epochs or epochs
    args.dimensions = args.dimensions or dimensions
    for key, default in DEFAULTS[args.preset].items():
        setattr(args, key, getattr(args, key) or default)
    return _heads.head_of(args, dataset.classes)


def networks_of(
    args: argparse.Namespace, head: _heads.Head, tasks: Sequence[Sequence[Sequence[int]]]
) -> list[list[Path]]:
    """The checkpoints of all pairs, trained where that was asked for.

    Args:
      args: The options, completed.
      head: Of all classes.
      tasks: The two halves of the classes, by pair.
    """
    shipped = _common.ROOT / "checkpoints"
    folder = Path(args.out) / f"checkpoints-{args.preset}" if args.retrain else shipped
    found = []
    for pair, halves in enumerate(tasks):
        found.append([])
        for index, task in enumerate(halves):
            seed = 2 * pair + index
            name = train_edges.checkpoint_name(args.dataset, args.model, args.width, seed, task)
            if args.retrain:
                # Finished ones are compared there, by their recipes, too.
                words = [*words_of(args, task, seed), "--out", str(folder)]
                train_edges.run(cli.parse(train_edges.Training, "train_edges.py", None, words))
            elif not (folder / name).exists():
                raise _common.UserError(
                    f"{name} is needed in {folder.name}/ and not there: --retrain trains all "
                    "networks into --out, --pairs 1 is what is shipped."
                )
            else:
                asked = _heads.described(args, head, task)
                other = _heads.different(checkpoint.card(folder / name), asked)
                if other:
                    raise _common.UserError(
                        f"{folder.name}/{name} was trained with {', '.join(other)}: --retrain "
                        "trains others."
                    )
            found[-1].append(folder / name)
    return found


def words_of(args: argparse.Namespace, task: Sequence[int], seed: int) -> list[str]:
    """The command line of `train_edges.py` for one network."""
    words = ["--model", args.model, "--width", str(args.width), "--dataset", args.dataset]
    words += ["--epochs", str(args.epochs), "--seeds", str(seed)]
    words += ["--recipe", "paper-zipit"] if args.preset == "paper" else []
    words += ["--data-dir", args.data_dir] if args.data_dir else []
    return words + _heads.words(args, task)


# ------------------------------------------------------------------------------ record and figure


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    watch = _common.Stopwatch()
    if args.preset == "paper" and not args.retrain:
        raise _common.UserError("no networks of --preset paper are shipped: give --retrain, too.")
    with watch("data"):
        probe = _edges.probed(args.dataset, args.data_dir)
    asked = args.dataset
    head = completed(args, probe)
    with watch("trace"):
        # Its outputs are embeddings of the classes.
        arch = _edges.Architecture(args.model, args.width, probe.name)
        net = _edges.trace(arch, dataclasses.replace(probe, classes=args.dimensions))
    tasks = [_disjoint.tasks_of(probe.classes, pair) for pair in range(args.pairs)]
    with watch("training" if args.retrain else "checkpoints"):
        folders = networks_of(args, head, tasks)
        cards = [[checkpoint.card(folder) for folder in pair] for pair in folders]
        trees = [[checkpoint.load(folder) for folder in pair] for pair in folders]
    with watch("data"):
        dataset = _edges.whole(probe, args.data_dir)
    images = kit_edges.images_of(dataset, args.statistics, args.held_out, args.samples)
    setting = _disjoint.Setting(net, head, images)
    pairs = []
    with tqdm(total=7 * len(trees), unit="part", leave=False, delay=2) as bar:
        for pair, halves in zip(trees, tasks, strict=True):
            pairs.append(_disjoint.Pair(setting, pair, halves, args, watch).found(bar))
    edges = _edges.Edges(
        arch,
        dataset,
        net,
        [folder for pair in folders for folder in pair],
        [card for pair in cards for card in pair],
        [],
    )
    described = _heads.described(args, head, ())
    del described["classes"]
    record: dict[str, Any] = {
        "experiment": "zipit_disjoint",
        "command": command,
        "config": vars(args) | {"dataset": asked},
        **edges.record(images.statistics, images.test),
        "seeds": {"networks": edges.seeds, "embeddings": 0, "splits": list(range(args.pairs))},
        "head": described,
        "classes": dataset.classes,
        "pairs": pairs,
    }
    record["data"]["held_out_images"] = len(images.held_out.images)
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def title_of(record: Mapping[str, Any]) -> str:
    """Data, networks, images."""
    classes = record["classes"]
    parts = [
        f"{_edges.networks(record)}, {classes // 2}+{classes - classes // 2} classes",
        f"statistics over {record['data']['statistics_images']:,} images",
    ]
    parts += ["plain classifiers"] if record["head"]["loss"] == "cross-entropy" else []
    parts += [f"mean of {len(record['pairs'])} pairs"] if len(record["pairs"]) > 1 else []
    return ", ".join(parts)


def percents(values: Sequence[float]) -> list[float]:
    """Accuracies in per cent."""
    return [100 * value for value in values]


def over_pairs(record: Mapping[str, Any], *keys: Any) -> list[float]:
    """The number at some keys, of each pair."""
    return [functools.reduce(lambda found, key: found[key], keys, p) for p in record["pairs"]]


def mean(record: Mapping[str, Any], *keys: Any) -> float:
    """Their mean."""
    return float(np.mean(over_pairs(record, *keys)))


def swept(record: Mapping[str, Any], by: str) -> tuple[list[float], list[float]]:
    """Values of alpha or beta, and the joint accuracies, the other one being as asked for."""
    other = "beta" if by == "alpha" else "alpha"
    rows = record["pairs"][0]["sweep"]
    places = [k for k, row in enumerate(rows) if row[other] == record["config"][other]]
    values = [rows[k][by] for k in places]
    return values, [mean(record, "sweep", k, "joint") for k in places]


def chosen(record: Mapping[str, Any]) -> tuple[float, float, float]:
    """The alpha and beta of the sweep that do best on held-out images, and their test accuracy."""
    rows = range(len(record["pairs"][0]["sweep"]))
    best = max(rows, key=lambda k: mean(record, "sweep", k, "held_out"))
    row = record["pairs"][0]["sweep"][best]
    return row["alpha"], row["beta"], mean(record, "sweep", best, "joint")


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy against layers merged, alpha and beta, statistics images; correlation by layer."""
    depth, y = record["model"]["depth"], "joint test accuracy (%)"
    stops = [0, *map(int, record["pairs"][0]["partial"]["zip"])]

    def partial(name: str, key: str, **style: Any) -> plot.Curve:
        values = [mean(record, "methods", "ensemble", key)]
        values += [mean(record, "partial", name, str(stop), key) for stop in stops[1:]]
        return plot.Curve(stops, percents(values), **style)

    def level(value: float, colour: int) -> plot.Curve:
        return plot.Curve((0, depth), (100 * value,) * 2, colour=colour, dashed=True)

    network = max(mean(record, "networks", f"network {name}", "joint") for name in "AB")
    layers = {
        "ZipIt!": partial("zip", "joint"),
        "permuted": partial("permutation", "joint", colour=1),
        "weight average": level(mean(record, "methods", "average", "joint"), 3),
        "better network alone": level(network, 4),
    }
    tasks = {
        "ZipIt!": partial("zip", "average"),
        "permuted": partial("permutation", "average", colour=1),
        "weight average": level(mean(record, "methods", "average", "average"), 3),
    }
    limits = (0, 101)
    layers_label = f"layers merged l (of L = {depth}; 0: ensemble)"
    row = [
        plot.Panel("all classes", layers_label, y, layers, y_limits=limits),
        plot.Panel(
            "each half by itself", layers_label, "test accuracy, mean (%)", tasks, y_limits=limits
        ),
    ]
    (betas, by_beta), (alphas, by_alpha) = swept(record, "beta"), swept(record, "alpha")
    config = record["config"]
    permuted = 100 * mean(record, "methods", "permutation", "joint")
    curves = {
        f"beta, at alpha {config['alpha']:g}": plot.Curve(betas, percents(by_beta)),
        f"alpha, at beta {config['beta']:g}": plot.Curve(alphas, percents(by_alpha), colour=2),
        "permuted": plot.Curve((0, 1), (permuted,) * 2, colour=1, dashed=True),
    }
    row.append(plot.Panel(f"ZipIt! {depth}/{depth}", "beta or alpha", y, curves))
    counts = list(record["pairs"][0]["images"])
    joint = [100 * mean(record, "images", count, "joint") for count in counts]
    curves = {
        f"ZipIt! {depth}/{depth}": plot.Curve([int(count) for count in counts], joint),
        "permuted, all images": plot.Curve(
            [int(counts[0]), int(counts[-1])], (permuted,) * 2, colour=1, dashed=True
        ),
    }
    label, title = "statistics images", "how many images matching needs"
    row.append(plot.Panel(title, label, y, curves, log_x=True, y_limits=limits))
    depths = [found["depth"] for found in record["pairs"][0]["layers"]]

    def by_layer(key: str, **style: Any) -> plot.Curve:
        values = [mean(record, "layers", k, key) for k in range(len(depths))]
        return plot.Curve(depths, values, **style)

    row.append(matchers_panel(record, y))
    curves = {
        "merged by ZipIt!": by_layer("correlation"),
        "merged permuted": by_layer("permutation", colour=1),
        "share within a network": by_layer("within", colour=5, dashed=True),
    }
    label = "correlation of features, share"
    row.append(plot.Panel("what is merged", "layer", label, curves, y_limits=(0, 1)))
    return plot.panels(row, title=record["title"], columns=3)


def matchers_panel(record: Mapping[str, Any], y: str) -> plot.Panel:
    """Joint accuracy against time, a point for each way to match."""
    curves = {}
    for colour, name in enumerate(record["pairs"][0]["matchers"]):
        joint = 100 * mean(record, "matchers", name, "joint")
        seconds = mean(record, "matchers", name, "seconds")
        curves[MATCHER_LABELS[name]] = plot.Curve([seconds], [joint], colour=colour)
    return plot.Panel("ways to match", "seconds", y, curves, log_x=True, y_limits=(0, 101))


def spread_of(record: Mapping[str, Any]) -> str:
    """How far the number of statistics images moves ZipIt!, against its lead over permutation."""
    counts = list(record["pairs"][0]["images"])
    joint = [100 * mean(record, "images", count, "joint") for count in counts]
    zipped, permuted = (
        100 * mean(record, "methods", name, "joint") for name in ("zip", "permutation")
    )
    depth, pairs = record["model"]["depth"], len(record["pairs"])
    least, most, lead = min(joint), max(joint), zipped - permuted
    among = "a single pair of networks" if pairs == 1 else f"the mean of {pairs} pairs of networks"
    return (
        f"with {int(counts[0]):,} to {int(counts[-1]):,} images for the statistics ZipIt! "
        f"{depth}/{depth} gives {least:.1f} to {most:.1f}, a range of {most - least:.1f} points, "
        f"where it is {abs(lead):.1f} {'above' if lead >= 0 else 'below'} permutation, on {among}"
    )


def claims_of(record: Mapping[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper: whether it holds here, and what was measured."""
    depth = record["model"]["depth"]
    joint = {name: mean(record, "methods", name, "joint") for name in record["pairs"][0]["methods"]}
    alone = max(mean(record, "networks", f"network {name}", "joint") for name in "AB")
    value = {name: f"{100 * accuracy:.1f}" for name, accuracy in joint.items()}
    zipped, config = f"ZipIt! {depth}/{depth}", record["config"]
    middle = _disjoint.middle_of(depth)
    half = mean(record, "partial", "zip", str(middle), "joint")
    permuted = f"{100 * mean(record, 'partial', 'permutation', str(middle), 'joint'):.1f}"
    claims: list[tuple[bool | None, str]] = [
        (
            joint["zip"] > joint["permutation"] + MORE,
            f"{zipped} with beta {config['beta']:g} gives {value['zip']}, permutation "
            f"{value['permutation']}",
        ),
        (None, spread_of(record)),
        (
            joint["permutation"] > joint["average"] + MORE,
            f"permutation gives {value['permutation']}, the weight average {value['average']}",
        ),
        (
            joint["permutation"] > joint["weights"] + MORE,
            f"permutation by activations gives {value['permutation']}, by weights "
            f"{value['weights']}",
        ),
        (
            joint["zip"] > alone + MORE,
            f"{zipped} gives {value['zip']}, the better of the networks alone {100 * alone:.1f}",
        ),
        (
            half > joint["zip"] + MORE,
            f"ZipIt! {middle}/{depth} gives {100 * half:.1f} (permuted {middle}/{depth}: "
            f"{permuted}), {zipped} {value['zip']}",
        ),
        (
            half > joint["ensemble"] - CLOSE,
            f"ZipIt! {middle}/{depth} gives {100 * half:.1f}, the ensemble {value['ensemble']}",
        ),
    ]
    betas, by_beta = swept(record, "beta")
    none = by_beta[betas.index(0)]
    best = max((k for k, beta in enumerate(betas) if beta > 0), key=lambda k: by_beta[k])
    alpha, beta, tuned = chosen(record)
    text = f"alpha {alpha:g} and beta {beta:g}, chosen on held-out training images, give"
    claims.append((None, f"{text} {100 * tuned:.1f}"))
    claims.append(
        (
            by_beta[best] > none + MORE,
            f"of all beta {betas[best]:g} does best with {100 * by_beta[best]:.1f}, with no pairs "
            f"within a network (beta 0) it is {100 * none:.1f}",
        )
    )
    names = record["pairs"][0]["matchers"]
    matched = {name: mean(record, "matchers", name, "joint") for name in names}
    seconds = {name: mean(record, "matchers", name, "seconds") for name in names}
    told = {name: f"{100 * matched[name]:.1f} ({seconds[name]:.2g} s)" for name in names}
    claims += [
        (
            matched[name] < matched["permute"] - MORE,
            f"{MATCHER_LABELS[name]} gives {told[name]}, permutation {told['permute']}",
        )
        for name in ("identity", "kmeans")
    ]
    if "optimal" in names:
        # Records from before pairs without a budget have those with one.
        greedy = "unbounded" if "unbounded" in names else "greedy"
        budget = " without a budget" if greedy == "unbounded" else ""
        near = abs(matched[greedy] - matched["optimal"]) <= EQUAL
        text = f"greedy pairs{budget} give {told[greedy]}, the optimal ones {told['optimal']}"
        claims.append((near and seconds[greedy] < seconds["optimal"], text))
    counts = list(record["pairs"][0]["images"])
    few = min(counts, key=lambda count: abs(int(count) - 100))
    by_count = [mean(record, "images", count, "joint") for count in (few, counts[-1])]
    claims.append(
        (
            by_count[0] >= by_count[1] - EQUAL,
            f"{few} images for the statistics give {100 * by_count[0]:.1f}, {int(counts[-1]):,} "
            f"give {100 * by_count[1]:.1f}",
        )
    )
    correlations = [
        mean(record, "layers", k, "correlation") for k in range(len(record["pairs"][0]["layers"]))
    ]
    falls = all(a > b for a, b in zip(correlations, correlations[1:], strict=False))
    listed = _common.joined([f"{value:.2f}" for value in correlations])
    claims.append((falls, f"features merged correlate with {listed} from layer to layer"))
    return claims


def outcome(record: Mapping[str, Any]) -> tuple[str, _common.Claims]:
    """The accuracies in a sentence, and the paper's claims."""
    own = [mean(record, "networks", f"network {n}", "tasks", k) for k, n in enumerate("AB")]
    intro = (
        f"Networks of {_common.joined([f'{100 * accuracy:.1f}' for accuracy in own])} on their own "
        f"classes, ensemble {100 * mean(record, 'methods', 'ensemble', 'joint'):.1f} on all."
    )
    return intro, claims_of(record)


def findings(record: Mapping[str, Any]) -> str:
    """What came out, in sentences."""
    return _common.told(*outcome(record))


def rows_of(record: Mapping[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    """Names of the table's rows, and where their numbers are."""
    depth = record["model"]["depth"]
    rows: list[tuple[str, tuple[Any, ...]]] = [
        (f"network {name}", ("networks", f"network {name}")) for name in "AB"
    ]
    rows += [(METHODS[name], ("methods", name)) for name in ("average", "weights")]
    for name, label in (("permutation", "permuted"), ("zip", "ZipIt!")):
        stops = sorted(map(int, record["pairs"][0]["partial"][name]), reverse=True)
        rows += [(f"{label} {stop}/{depth}", ("partial", name, str(stop))) for stop in stops]
    return [*rows, ("ensemble", ("methods", "ensemble"))]


def table_of(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: joint accuracy, that on each task, and their mean."""
    header = ["test accuracy, %", "joint", "task A", "task B", "mean of tasks"]
    keys: list[tuple[Any, ...]] = [("joint",), ("tasks", 0), ("tasks", 1), ("average",)]
    lines = []
    for label, place in rows_of(record):
        cells = [_common.percent(over_pairs(record, *place, *key)) for key in keys]
        costs = [f"{mean(record, *place, f'{key}_ratio'):.2f}" for key in ("params", "flops")]
        lines.append([label, *cells, *costs])
    return [*header, "params, ratio", "FLOPs, ratio"], lines


def file_name(record: Mapping[str, Any]) -> str:
    """Name of record and figure, without suffix: what was asked for and is not default."""
    config, parts = dict(record["config"]), []
    name, width, dimensions, epochs = NETWORKS[config["preset"], record["data"]["name"]]
    head = record["head"]
    if head["loss"] != "cosine":
        parts.append(head["loss"])
    elif config["embeddings"]:
        parts.append(Path(config["embeddings"]).stem)
    elif config["dimensions"] != dimensions:
        parts.append(f"{config['dimensions']}dimensions")
    defaults = {"scale": _heads.SCALE, "alpha": ALPHA, "beta": BETA, "epochs": epochs}
    for key, default in defaults.items():
        parts += [f"{key}{config[key]:g}"] if config[key] != default else []
    parts += [f"{config['pairs']}pairs"] if config["pairs"] != 1 else []
    for key, default in DEFAULTS[config["preset"]].items():
        parts += [f"{key.replace('_', '')}{config[key]}"] if config[key] != default else []
    # The digits are always trained.
    config["retrain"] &= record["data"]["name"] != "digits"
    return _edges.file_name({**record, "config": config}, parts)


def show(record: Mapping[str, Any]) -> None:
    """Prints a record."""
    _common.print_table(record["title"], *table_of(record))
    _common.print_table(
        "how features are matched",
        ["matching", "joint, %", "seconds"],
        [
            [
                MATCHER_LABELS[name],
                _common.percent(over_pairs(record, "matchers", name, "joint")),
                f"{mean(record, 'matchers', name, 'seconds'):.3g}",
            ]
            for name in record["pairs"][0]["matchers"]
        ],
    )
    print(findings(record))


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the experiment; returns the path of the record."""
    return _common.run(
        parser(),
        argv,
        experiment=experiment,
        file_name=file_name,
        figure_of=figure_of,
        show=show,
    )


if __name__ == "__main__":
    main()
