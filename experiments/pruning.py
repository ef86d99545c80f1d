"""Pruned networks, and what renormalising them brings back: accuracy against sparsity.

    python experiments/pruning.py                       # VGG16 with BatchNorm: RESET
    python experiments/pruning.py --model resnet20      # also vgg16, vgg16-ln, resnet20-ln,
                                                        # convnext-pico
    python experiments/pruning.py --methods magnitude wanda --sparsities 80 90
    python experiments/pruning.py --dataset digits      # under a minute, needs no data
    python experiments/pruning.py --retrain --preset paper    # full width, on a GPU

Networks are shipped ones, of all seeds that there are. Each is pruned in one shot, all convolutions
and linear layers but those of shortcuts (of ConvNeXt only the linear ones, and not the last, as in
the paper), and nothing is trained afterwards. Methods: the magnitude
of weights, the lowest of all or of each layer; the diagonal of the empirical Fisher matrix;
WoodFisher, in blocks of whole layers, whose update changes the weights that stay; and Wanda, which
compares the weights of an output, or with --methods wanda-layer those of a layer. Both Fisher
matrices are of 400 gradients of single images, and compare all weights; the authors' code takes
1,000, and compares the weights of a layer by the diagonal. The pruned network is renormalised with
the unpruned one as the only reference, by the same training images for both: RESET where there is
BatchNorm, REPAIR else (of all layers on the longest path but the last, and the first where
shortcuts begin there), but for VGGs without any norm RESCALE of these, as in the authors' code. The
images are cropped and mirrored at random as in training: the running statistics are of such images,
and those of images as they are (--plain) cost unpruned networks with BatchNorm accuracy. Fisher
matrices are of the first of them, and Wanda's norms of all that renormalisation takes.

The last panels show global and layerwise magnitude renormalised by fewer images, 64 and on, and by
all there are, at some of the sparsities.

What the paper found: pruned networks lose their features as merged ones do, and renormalisation
gives them back; accuracy is never lower (taken here as: in the mean over seeds, no combination of
method and sparsity, nor the unpruned network, loses more than what chance would exceed at any of
them once in twenty times, by the images that only one of the two networks has right), and most is
gained where much is pruned (taken as: at over half of the weights, for methods that gain ten points
anywhere), tens of points at 80 to 90% (taken as: ten or more, wherever pruning costs as many
there). One batch of 64 images does nearly what the whole training set does (taken as: where that
brings ten points or more, 64 images bring nine tenths of it). The paper has Wanda for ConvNeXt
alone, which it takes from ImageNet, and fewer images for ResNet20 alone; its networks are wider and
can lose more of their weights.

What came out here (CIFAR-10: vgg16-bn at 0.125 of the width, pruned, 3,000 test images, mean of 2
seeds, 310 s on 2 CPU cores): Unpruned 80.90 ± 0.38, with RESET 80.88 ± 0.07. After RESET, of 5
methods the best is at 80% WoodFisher (77.8) and at 90% WoodFisher (61.6). As in the paper: RESET is
behind by more than chance explains in 0 of 56 cases, of each method and sparsity and nothing pruned
(the lowest: -0.5 from 81.1 with diagonal Fisher at 40%, in points); with global magnitude RESET
takes accuracy from 10.9 to 77.1 at 80% and from 10.3 to 60.2 at 90%; with layerwise magnitude RESET
takes accuracy from 10.3 to 49.4 at 80% and from 10.3 to 24.1 at 90%; with diagonal Fisher RESET
takes accuracy from 10.2 to 67.3 at 80% and from 10.3 to 23.9 at 90%; with WoodFisher RESET takes
accuracy from 17.2 to 77.8 at 80% and from 10.3 to 61.6 at 90%; most points are gained at 80%
(global magnitude, +66.3), 70% (layerwise magnitude, +46.8), 80% (diagonal Fisher, +57.1), 80%
(WoodFisher, +60.6) and 70% (Wanda per row, +39.8). Not in the paper: with Wanda per row RESET takes
accuracy from 10.3 to 39.7 at 80% and from 10.3 to 18.1 at 90%; with global magnitude, at 70%, 80%
and 90% sparsity, 64 images bring 50.1 points, 128 images bring 50.3 points, 256 images bring 50.4
points and all images bring 50.8 points on average: 64 bring 99% of what all do; with layerwise
magnitude, at 70%, 80% and 90% sparsity, 64 images bring 33.4 points, 128 images bring 33.2 points,
256 images bring 33.4 points and all images bring 33.2 points on average: 64 bring 100% of what all
do.

What came out here (CIFAR-10: resnet20 at 0.5 of the width, pruned, 3,000 test images, mean of 2
seeds, 747 s on 2 CPU cores): Unpruned 84.42 ± 0.35, with RESET 84.17 ± 0.52. After RESET, of 5
methods the best is at 80% WoodFisher (68.2) and at 90% global magnitude (37.2). As in the paper:
RESET is behind by more than chance explains in 0 of 56 cases, of each method and sparsity and
nothing pruned (the lowest: -0.3 from 84.4 with nothing pruned, in points); with global magnitude
RESET takes accuracy from 21.9 to 66.2 at 80% and from 13.9 to 37.2 at 90%; with layerwise magnitude
RESET takes accuracy from 9.6 to 51.7 at 80% and from 11.5 to 23.8 at 90%; with diagonal Fisher
RESET takes accuracy from 13.5 to 44.2 at 80% and from 10.0 to 24.6 at 90%; with WoodFisher RESET
takes accuracy from 28.0 to 68.2 at 80% and from 16.1 to 36.5 at 90%; most points are gained at 80%
(global magnitude, +44.3), 70% (layerwise magnitude, +57.4), 60% (diagonal Fisher, +49.9), 80%
(WoodFisher, +40.1) and 70% (Wanda per row, +46.0); with global magnitude, at 70%, 80% and 90%
sparsity, 64 images bring 35.7 points, 128 images bring 35.2 points, 256 images bring 35.8 points
and all images bring 36.1 points on average: 64 bring 99% of what all do; with layerwise magnitude,
at 70%, 80% and 90% sparsity, 64 images bring 36.9 points, 128 images bring 36.8 points, 256 images
bring 37.2 points and all images bring 37.6 points on average: 64 bring 98% of what all do. Not in
the paper: with Wanda per row RESET takes accuracy from 13.3 to 42.7 at 80% and from 9.8 to 19.5 at
90%.

What came out here (CIFAR-10: resnet20-ln at 0.25 of the width, pruned, 3,000 test images, mean of 2
seeds, 908 s on 2 CPU cores): Unpruned 45.45 ± 1.81, with REPAIR 45.43 ± 1.84. After REPAIR, of 5
methods the best is at 80% global magnitude (40.3) and at 90% global magnitude (32.7). As in the
paper: with global magnitude REPAIR takes accuracy from 27.9 to 40.3 at 80% and from 22.3 to 32.7 at
90%; most points are gained at 80% (global magnitude, +12.5), 90% (diagonal Fisher, +12.0) and 80%
(WoodFisher, +11.3); with global magnitude, at 80% and 90% sparsity, 64 images bring 11.2 points,
128 images bring 10.8 points, 256 images bring 11.1 points and all images bring 11.5 points on
average: 64 bring 97% of what all do. Unlike the paper: REPAIR is behind by more than chance
explains in 4 of 56 cases, of each method and sparsity and nothing pruned: -4.1 from 14.2 with
global magnitude at 99%, -3.1 from 13.6 with diagonal Fisher at 95%, -3.2 from 13.8 with diagonal
Fisher at 99% and -3.8 from 14.0 with WoodFisher at 99% points; with layerwise magnitude REPAIR
takes accuracy from 17.2 to 26.6 at 80% and from 15.2 to 19.3 at 90%; with diagonal Fisher REPAIR
takes accuracy from 26.0 to 36.0 at 80% and from 16.3 to 28.4 at 90%; with WoodFisher REPAIR takes
accuracy from 28.9 to 40.2 at 80% and from 10.9 to 20.2 at 90%. Not in the paper: with Wanda per row
REPAIR takes accuracy from 17.5 to 25.8 at 80% and from 10.2 to 14.1 at 90%.

What came out here (CIFAR-10: vgg16-ln at 0.125 of the width, pruned, 3,000 test images, mean of 2
seeds, 413 s on 2 CPU cores): Unpruned 71.25 ± 1.34, with REPAIR 71.25 ± 1.34. After REPAIR, of 5
methods the best is at 80% WoodFisher (68.8) and at 90% WoodFisher (61.9). As in the paper: REPAIR
is behind by more than chance explains in 0 of 56 cases, of each method and sparsity and nothing
pruned (the lowest: -1.3 from 11.2 with global magnitude at 99%, in points); with layerwise
magnitude REPAIR takes accuracy from 28.5 to 48.5 at 80% and from 11.8 to 31.0 at 90%; with diagonal
Fisher REPAIR takes accuracy from 30.2 to 55.6 at 90%; most points are gained at 95% (global
magnitude, +19.6), 80% (layerwise magnitude, +20.0), 90% (diagonal Fisher, +25.4), 95% (WoodFisher,
+19.8) and 80% (Wanda per row, +16.8). Unlike the paper: with global magnitude REPAIR takes accuracy
from 50.6 to 59.4 at 90%; with WoodFisher REPAIR takes accuracy from 57.7 to 61.9 at 90%. Not in the
paper: with Wanda per row REPAIR takes accuracy from 22.4 to 39.1 at 80% and from 10.5 to 23.9 at
90%; with layerwise magnitude, at 70%, 80% and 90% sparsity, 64 images bring 17.2 points, 128 images
bring 16.9 points, 256 images bring 17.2 points and all images bring 17.7 points on average: 64
bring 97% of what all do.

What came out here (CIFAR-10: vgg16 at 0.25 of the width, pruned, 3,000 test images, mean of 3
seeds, 983 s on 2 CPU cores): Unpruned 84.52 ± 0.33, with RESCALE 84.51 ± 0.35. After RESCALE, of 5
methods the best is at 80% global magnitude (83.1) and at 90% global magnitude (63.1). As in the
paper: with global magnitude RESCALE takes accuracy from 13.5 to 63.1 at 90%; with layerwise
magnitude RESCALE takes accuracy from 22.7 to 49.8 at 80% and from 10.1 to 21.5 at 90%; with
WoodFisher RESCALE takes accuracy from 24.5 to 59.5 at 90%; most points are gained at 90% (global
magnitude, +49.6), 80% (layerwise magnitude, +27.1), 90% (WoodFisher, +35.0) and 80% (Wanda per row,
+28.9). Unlike the paper: RESCALE is behind by more than chance explains in 3 of 56 cases, of each
method and sparsity and nothing pruned: -0.4 from 84.7 with diagonal Fisher at 40%, -0.5 from 84.5
with diagonal Fisher at 50% and -2.7 from 14.2 with diagonal Fisher at 90% points; with diagonal
Fisher RESCALE takes accuracy from 40.1 to 48.8 at 80% and from 14.2 to 11.4 at 90%. Not in the
paper: with Wanda per row RESCALE takes accuracy from 15.5 to 44.5 at 80% and from 10.2 to 19.6 at
90%; with global magnitude, at 90% sparsity, 64 images bring 51.3 points, 128 images bring 49.6
points, 256 images bring 50.3 points and all images bring 49.6 points: 64 bring 104% of what all do;
with layerwise magnitude, at 70%, 80% and 90% sparsity, 64 images bring 18.5 points, 128 images
bring 17.9 points, 256 images bring 18.7 points and all images bring 18.2 points on average: 64
bring 102% of what all do.

What came out here (CIFAR-10: convnext-pico at 0.5 of the width, pruned, 3,000 test images, mean of
2 seeds, 545 s on 2 CPU cores): Unpruned 68.00 ± 2.73, with REPAIR 68.00 ± 2.73. After REPAIR, of 5
methods the best is at 80% WoodFisher (62.6) and at 90% WoodFisher (54.8). As in the paper: REPAIR
is behind by more than chance explains in 0 of 56 cases, of each method and sparsity and nothing
pruned (the lowest: -0.2 from 68.1 with layerwise magnitude at 20%, in points); with layerwise
magnitude REPAIR takes accuracy from 33.7 to 61.6 at 80% and from 24.5 to 54.4 at 90%; with Wanda
per row REPAIR takes accuracy from 33.5 to 59.6 at 80% and from 25.4 to 51.3 at 90%; most points are
gained at 80% (global magnitude, +28.5), 90% (layerwise magnitude, +29.9), 95% (diagonal Fisher,
+18.0), 90% (WoodFisher, +27.0) and 80% (Wanda per row, +26.1). Not in the paper: with global
magnitude REPAIR takes accuracy from 33.4 to 61.9 at 80% and from 25.4 to 53.5 at 90%; with diagonal
Fisher REPAIR takes accuracy from 53.4 to 60.8 at 80% and from 36.7 to 52.9 at 90%; with WoodFisher
REPAIR takes accuracy from 38.3 to 62.6 at 80% and from 27.8 to 54.8 at 90%; with global magnitude,
at 70%, 80% and 90% sparsity, 64 images bring 26.6 points, 128 images bring 26.9 points, 256 images
bring 26.6 points and all images bring 27.0 points on average: 64 bring 98% of what all do; with
layerwise magnitude, at 70%, 80% and 90% sparsity, 64 images bring 25.3 points, 128 images bring
25.5 points, 256 images bring 25.5 points and all images bring 25.7 points on average: 64 bring 99%
of what all do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import _pruning
import numpy as np
from tqdm import tqdm

import vfjax
from vfjax import plot

# Per cent of the weights that go.
SPARSITIES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)
METHODS = ("magnitude", "magnitude-layer", "fisher", "woodfisher", "wanda")
# By preset: test and statistics images, None for all, and gigabytes that WoodFisher may take.
DEFAULTS = {
    "cpu": {"test": 3_000, "statistics": 2_000, "memory": 2.0},
    "paper": {"test": None, "statistics": None, "memory": 32.0},
}
SAMPLES, ALL = (64, 128, 256, None), "all"
# Of the sparsities, those that different numbers of images are tried at, all if there is none; and
# of the methods.
SAMPLED = (70, 80, 90)
BY_SAMPLES = ("magnitude", "magnitude-layer")
GRADIENTS = 400
# Sparsities at which renormalisation must gain, and how much; "nearly", "much is pruned", and how
# often chance may look like a loss.
HIGH, GAIN, NEARLY, HALF, CHANCE = (80, 90), 0.1, 0.9, 50, 0.05


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="pruning.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(
        p, examples="vgg16, vgg16-bn, vgg16-ln, resnet20, convnext-pico", cifar=_pruning.DEFAULT
    )
    p.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=tuple(_pruning.METHODS),
        metavar="M",
        help=f"what is pruned by: {_common.joined(list(_pruning.METHODS))} (default: all but the "
        "last)",
    )
    p.add_argument(
        "--sparsities",
        nargs="+",
        type=_pruning.sparsity_of,
        default=list(SPARSITIES),
        metavar="S",
        help="per cent of the weights that go (default: 10, 20 ... 90, 95 and 99)",
    )
    p.add_argument(
        "--samples",
        nargs="+",
        type=samples_of,
        default=list(SAMPLES),
        metavar="N",
        help="training images, the first N or all, by which what magnitude pruned is renormalised "
        "in the last panels (default: 64 128 256 all)",
    )
    _pruning.remedy_options(p)
    p.add_argument(
        "--runs",
        type=_common.count_of("networks"),
        metavar="N",
        help="networks, of different seeds (default: all that are shipped; two with --retrain)",
    )
    for name, what in (
        ("test", "test images, the first N"),
        (
            "statistics",
            "training images, the first N, for renormalisation and Wanda",
        ),
    ):
        p.add_argument(
            f"--{name}",
            type=_common.count_of("images"),
            metavar="N",
            help=f"{what} (default: {DEFAULTS['cpu'][name]:,}; all with --preset paper)",
        )
    p.add_argument(
        "--gradients",
        type=_common.count_of("gradients"),
        default=GRADIENTS,
        metavar="N",
        help="images, the first N, whose gradients Fisher and WoodFisher take, one by one",
    )
    p.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help=f"what WoodFisher may take (default: {DEFAULTS['cpu']['memory']:g}; "
        f"{DEFAULTS['paper']['memory']:g} with --preset paper)",
    )
    _common.folder_options(p)
    return p


def samples_of(text: str) -> int | None:
    """The type of `--samples`: a number of images, or None for `all`."""
    return None if text == ALL else _common.count_of("images")(text)


def label_of(samples: int | None) -> str:
    """A number of images as the record has it.

    Example:
      >>> label_of(64), label_of(None)
      ('64', 'all')
    """
    return ALL if samples is None else str(samples)


# ------------------------------------------------------------------------------------- measuring


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    for name, default in DEFAULTS[args.preset].items():
        setattr(args, name, getattr(args, name) or default)
    args.methods = [method for method in _pruning.METHODS if method in args.methods]
    args.sparsities = sorted(set(args.sparsities))
    by_samples = [method for method in args.methods if method in BY_SAMPLES]
    counts = sorted({count for count in args.samples if count is not None})
    counts = [*counts, *([None] if None in args.samples else [])] if by_samples else []
    args.samples = [label_of(count) for count in counts]
    fisher = {"fisher", "woodfisher"} & set(args.methods)
    wanted = [*counts, args.statistics, *([args.gradients] if fisher else [])]
    watch = _common.Stopwatch()

    def check(net: vfjax.Network, name: str) -> None:
        _pruning.remedy_of(args, net, name)
        if "woodfisher" in args.methods:
            layers = _pruning.layers_of(net, name)
            _pruning.check_memory(net, layers, args.gradients, args.memory)

    models = _edges.found(
        args,
        watch,
        count=args.runs,
        train=None if None in wanted else max(wanted),
        test=args.test,
        cifar=_pruning.DEFAULT,
        check=check,
    )
    net, name = models.net, models.arch.name
    remedy, layers = _pruning.remedy_of(args, net, name), _pruning.layers_of(net, name)
    training, test = _pruning.statistics_of(args, models), models.batches("test", args.test)
    there = len(training.images)
    asked = [("samples", count) for count in counts if count is not None]
    for option, count in [("gradients", args.gradients)] * bool(fisher) + asked:
        if count > there:
            raise _common.UserError(f"--{option} {count}: there are {there:,} training images.")
    options = {
        "statistics": training.samples(args.statistics),
        "gradients": training.samples(args.gradients),
        "gigabytes": args.memory,
    }
    at = [s for s in args.sparsities if s in SAMPLED] or args.sparsities
    kinds = ("none", "renormalised", "error")
    found: dict[str, Any] = {method: {kind: [] for kind in kinds} for method in args.methods}
    unpruned: dict[str, list[float]] = {kind: [] for kind in kinds}
    samples: dict[str, Any] = {
        method: {label: [] for label in args.samples} for method in by_samples
    }

    total = len(args.methods) * len(args.sparsities) + len(by_samples) * len(counts) * len(at)
    total *= len(models.trees)
    with tqdm(total=total, unit="network", leave=False) as bar:

        def both(pruned: Any, renormalised: _pruning.Renormaliser) -> tuple[float, float, float]:
            plain = _pruning.answers(_pruning.as_network(net, pruned), test)
            return _pruning.paired(plain, _pruning.answers(renormalised(pruned), test))

        for tree in models.trees:
            with watch("unpruned"):
                renormalised = _pruning.Renormaliser(net, tree, remedy, options["statistics"])
                for kind, value in zip(kinds, both(tree, renormalised), strict=True):
                    unpruned[kind].append(value)
            pruners = {}
            for method in args.methods:
                bar.set_description(_pruning.METHODS[method])
                with watch(f"{method}, scores"):
                    pruned = _pruning.pruner(method, net, tree, layers, **options)
                if method in by_samples:
                    pruners[method] = pruned
                with watch(method):
                    rows = []
                    for sparsity in args.sparsities:
                        rows.append(both(pruned(sparsity / 100), renormalised))
                        bar.update()
                for kind, row in zip(kinds, zip(*rows, strict=True), strict=True):
                    found[method][kind].append(list(row))
            for label, count in zip(args.samples, counts, strict=True):
                bar.set_description(f"{label} images")
                with watch(f"{label} images"):
                    few = _pruning.Renormaliser(net, tree, remedy, training.samples(count))
                    for method, pruned in pruners.items():
                        row = []
                        for sparsity in at:
                            right = _pruning.answers(few(pruned(sparsity / 100)), test)
                            row.append(float(right.mean()))
                            bar.update()
                        samples[method][label].append(row)

    record: dict[str, Any] = {
        "experiment": "pruning",
        "command": command,
        "config": vars(args) | {"model": name, "width": models.arch.width},
        **models.record(options["statistics"], test),
        "seeds": {"edge_models": models.seeds},
        "remedy": remedy,
        "layers": list(layers),
        "sparsities": args.sparsities,
        "unpruned": unpruned,
        "methods": found,
        "samples_sparsities": at,
        "samples_images": [there if count is None else count for count in counts],
        "samples": samples,
    }
    record["data"]["augmented"] = _pruning.augmented(args, models)
    record["title"] = _pruning.titled(record, "pruned")
    record["seconds"] = watch.record()
    return record | _common.environment()


# ------------------------------------------------------------------------------ record and figure


def values(record: Mapping[str, Any], method: str, key: str) -> np.ndarray:
    """Accuracies `[seeds, sparsities]`, as pruned or renormalised."""
    return np.array(record["methods"][method][key])


def gains(record: Mapping[str, Any], method: str) -> np.ndarray:
    """What renormalisation brings, `[seeds, sparsities]`."""
    return values(record, method, "renormalised") - values(record, method, "none")


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy as pruned and renormalised, what is gained, and by how many images."""
    x, remedy = record["sparsities"], _pruning.REMEDIES[record["remedy"]]
    images = record["data"]["statistics_images"]
    methods = {
        method: (colour, label)
        for colour, (method, label) in enumerate(_pruning.METHODS.items())
        if method in record["methods"]
    }
    level = 100 * np.mean(record["unpruned"]["none"])
    unpruned = {"unpruned": plot.Curve([x[0], x[-1]], [level] * 2, colour=6, dashed=True)}

    def panel(title: str, y: str, of: Any, more: Mapping[str, Any], limits: Any) -> plot.Panel:
        curves = {
            label: _pruning.curve_of(100 * of(method), x, colour=colour)
            for method, (colour, label) in methods.items()
        }
        return plot.Panel(title, "sparsity (%)", y, curves | more, y_limits=limits)

    y, limits = "test accuracy (%)", (0, 101)
    row = [
        panel("as pruned", y, lambda m: values(record, m, "none"), unpruned, limits),
        panel(
            f"with {remedy}, {images:,} images",
            y,
            lambda m: values(record, m, "renormalised"),
            unpruned,
            limits,
        ),
        panel("gained", "points of test accuracy", lambda m: gains(record, m), {}, None),
    ]
    for method in record["samples"]:
        title = f"{_pruning.METHODS[method]}, images for {remedy}"
        curves = samples_curves(record, method)
        row.append(plot.Panel(title, "training images", y, curves, log_x=True, y_limits=limits))
    return plot.panels(row, title=record["title"], columns=3 if len(row) > 4 else 2)


def samples_curves(record: dict[str, Any], method: str) -> dict[str, plot.Curve]:
    """Accuracy against the images that a method's networks are renormalised by, by sparsity."""
    images, curves = record["samples_images"], {}
    rows = np.array(list(record["samples"][method].values()))  # [images, seeds, sparsities]
    for colour, (place, sparsity) in enumerate(enumerate(record["samples_sparsities"])):
        found = 100 * rows[:, :, place].T
        remedy = _pruning.REMEDIES[record["remedy"]]
        curves[f"{sparsity}%, {remedy}"] = _pruning.curve_of(found, images, colour=colour)
        before = values(record, method, "none")[:, [record["sparsities"].index(sparsity)]]
        curves[f"{sparsity}%, as pruned"] = _pruning.curve_of(
            np.repeat(100 * before, len(images), 1), images, colour=colour, dashed=True
        )
    return curves


def claims_of(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper: whether it holds here, and what was measured."""
    sparsities = record["sparsities"]
    remedy, claims = _pruning.REMEDIES[record["remedy"]], [never_behind(record)]
    level, most = np.mean(record["unpruned"]["none"]), {}
    for method in record["methods"]:
        plain, gain = values(record, method, "none").mean(0), gains(record, method).mean(0)
        name = _pruning.METHODS[method]
        high = [
            place
            for place, s in enumerate(sparsities)
            if HIGH[0] <= s <= HIGH[1] and plain[place] <= level - GAIN
        ]
        if high:
            shown = [
                f"from {100 * plain[k]:.1f} to {100 * (plain[k] + gain[k]):.1f} at {sparsities[k]}%"
                for k in high
            ]
            text = f"with {name} {remedy} takes accuracy {_common.joined(shown)}"
            holds = bool((gain[high] >= GAIN).all())
            claims.append((holds if of_the_paper(record, method) else None, text))
        place = int(gain.argmax())
        if gain[place] >= GAIN:
            found = f"{sparsities[place]}% ({name}, {100 * gain[place]:+.1f})"
            most[name] = sparsities[place], found
    if most and min(sparsities) <= HALF < max(sparsities):
        text = f"most points are gained at {_common.joined([text for _, text in most.values()])}"
        claims.append((all(sparsity > HALF for sparsity, _ in most.values()), text))
    return claims + samples_claims(record)


def of_the_paper(record: dict[str, Any], method: str) -> bool:
    """Whether it has such a method for such networks."""
    convnext = record["model"]["name"].startswith("convnext")
    return (
        method in ("magnitude-layer", "wanda", "wanda-layer") if convnext else "wanda" not in method
    )


def never_behind(record: dict[str, Any]) -> tuple[bool, str]:
    """That renormalisation never hurts beyond noise."""
    seeds = len(record["seeds"]["edge_models"])
    cells = []
    for method, found in ({"": record["unpruned"]} | record["methods"]).items():
        plain, new, error = (np.array(found[key]) for key in ("none", "renormalised", "error"))
        gain, before = (np.atleast_1d(rows.mean(0)) for rows in (new - plain, plain))
        # Of a mean over seeds.
        error = np.atleast_1d(np.sqrt((error**2).sum(0)) / seeds)
        at = [f" at {s}%" for s in record["sparsities"]] if method else [""]
        name = _pruning.METHODS[method] if method else "nothing pruned"
        for k, where in enumerate(at):
            text = f"{100 * gain[k]:+.1f} from {100 * before[k]:.1f} with {name}{where}"
            cells.append((gain[k], error[k], text))
    limit = statistics.NormalDist().inv_cdf(1 - CHANCE / len(cells))
    behind = [text for gain, error, text in cells if gain < -limit * error]
    *_, least = min(cells, key=lambda cell: cell[0])
    text = f"{_pruning.REMEDIES[record['remedy']]} is behind by more than chance explains in "
    text += f"{len(behind)} of {len(cells)} cases, of each method and sparsity and nothing pruned"
    told = f": {_common.joined(behind)} points" if behind else f" (the lowest: {least}, in points)"
    return not behind, text + told


def samples_claims(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """That the fewest images do nearly what all do, by method."""
    sparsities, at = record["sparsities"], record["samples_sparsities"]
    claims: list[tuple[bool | None, str]] = []
    for method, by_label in record["samples"].items():
        first = next(iter(by_label))
        plain = values(record, method, "none").mean(0)[[sparsities.index(s) for s in at]]
        gained = {label: np.mean(rows, axis=0) - plain for label, rows in by_label.items()}
        if first == ALL or ALL not in gained or not (counted := gained[ALL] >= GAIN).any():
            continue
        few = {label: float(gain[counted].mean()) for label, gain in gained.items()}
        parts = [f"{label} images bring {100 * gain:.1f} points" for label, gain in few.items()]
        share = few[first] / few[ALL]
        where = [f"{s}%" for s, here in zip(at, counted, strict=True) if here]
        text = f"with {_pruning.METHODS[method]}, at {_common.joined(where)} sparsity, "
        text += f"{_common.joined(parts)}{' on average' * (len(where) > 1)}: {first} bring "
        text += f"{100 * share:.0f}% of what all do"
        theirs = record["model"]["name"].startswith("resnet20")
        claims.append((share >= NEARLY if theirs else None, text))
    return claims


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The unpruned networks and the best pruner in a sentence or two; and the claims."""
    remedy, found = _pruning.REMEDIES[record["remedy"]], record["unpruned"]
    percent = {key: _common.percent(row) for key, row in found.items()}
    intro = f"Unpruned {percent['none']}, with {remedy} {percent['renormalised']}."
    parts = []
    for place, sparsity in enumerate(record["sparsities"]):
        if sparsity not in HIGH:
            continue
        ends = {
            method: 100 * values(record, method, "renormalised").mean(0)[place]
            for method in record["methods"]
        }
        best = max(ends, key=lambda method: ends[method])
        parts.append(f"at {sparsity}% {_pruning.METHODS[best]} ({ends[best]:.1f})")
    if parts and len(record["methods"]) > 1:
        intro += f" After {remedy}, of {len(record['methods'])} methods the best is "
        intro += f"{_common.joined(parts)}."
    return intro, claims_of(record)


def table_of(record: dict[str, Any], key: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracies by sparsity and method, as pruned or renormalised."""
    columns = [values(record, method, key) for method in record["methods"]]
    header = [_pruning.METHODS[method] for method in record["methods"]]
    return ["sparsity, %", *header], _pruning.rows_of(record["sparsities"], columns)


def samples_table_of(record: dict[str, Any], method: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a method's networks renormalised by so many images, by sparsity."""
    by_label = record["samples"][method]
    columns = [np.array(rows) for rows in by_label.values()]
    header = ["sparsity, %", *(f"{label} images" for label in by_label)]
    return header, _pruning.rows_of(record["samples_sparsities"], columns)


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    if config["methods"] != list(METHODS):
        parts += ["+".join(config["methods"])]
    if config["sparsities"] != list(SPARSITIES):
        parts += ["at" + "+".join(map(str, config["sparsities"]))]
    if config["samples"] not in ([], [label_of(count) for count in SAMPLES]):
        parts += ["samples" + "+".join(config["samples"])]
    parts += [config["renorm"]] if config["renorm"] != "auto" else []
    parts += ["plain"] if config["plain"] else []
    parts += [f"runs{config['runs']}"] if config["runs"] is not None else []
    defaults = DEFAULTS[config["preset"]] | {"gradients": GRADIENTS}
    parts += [f"{name}{config[name]}" for name in defaults if config[name] != defaults[name]]
    return _edges.file_name(record, parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    remedy = _pruning.REMEDIES[record["remedy"]]
    _common.print_table(f"{record['title']}: as pruned", *table_of(record, "none"))
    _common.print_table(f"with {remedy}", *table_of(record, "renormalised"))
    for method in record["samples"]:
        title = f"{_pruning.METHODS[method]}, with {remedy}"
        _common.print_table(title, *samples_table_of(record, method))
    print(_common.told(*outcome(record)))


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
