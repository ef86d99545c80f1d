"""Remedies against vanishing features compared: what to do to the average of two networks.

    python experiments/normalization.py                      # VGG16, the shipped pair
    python experiments/normalization.py --seed 1             # weight matching in another order
    python experiments/normalization.py --model resnet20     # BatchNorm: RESET alone
    python experiments/normalization.py --dataset digits     # seconds, needs no data
    python experiments/normalization.py --retrain --preset paper    # full width, on a GPU

Edge models are found as by `cifar_pfm.py`: two shipped ones that differ in their random seed. The
units of the second are matched to those of the first, by weights or by activations, and the two are
averaged with weights 1 - alpha and alpha. Shown is the accuracy on test images of the average as it
is, with REPAIR, with RESCALE, without the biases of its last k layers, and with bias calibration.
Barriers, by the paper's definition and by that of its code, are relative to the edge models; where
biases are removed the ends of the curve are no edge models, for they lose theirs, too.

The last panel shows the midpoint without the biases of the first k layers (forward), or of the last
k (backward, counting the classifier), k = 0 to L, and nothing else done. k = 0 removes nothing.

k of the bias removal is chosen for each matching, at alpha 0.5, by the accuracy on held-out images,
the smallest of equals, and then kept for all alphas. These are training images that come after
those that statistics are measured on. The edge models have seen them in training: what is held out
is the test split and the statistics images. The record has the accuracies of all k. The paper's
code chooses k on the test images.

What the paper found (VGG16 on CIFAR-10): at the midpoint, with weight matching, REPAIR is the worst
of the four and the other three are about equal (taken here as: within 5 points); all help. With
activation matching (its table 1, per cent: none 46.5, REPAIR 39.1, RESCALE 84.7, bias calibration
82.9) REPAIR is below none, RESCALE is the best, and bias calibration is next to it (taken as:
within 5 points). Its networks were trained with a weight decay of 1e-4, those here with 5e-4; it,
too, finds REPAIR reliable at large weight decay, and with residual connections and on ImageNet it
finds it best. Forward removal hurts (taken as: with 1 to 5 biases removed, accuracy is on average
more than a point below that with none removed), while it is enough to remove the last 5 or 6 biases
(taken as: k is 5 or 6, and 5 have 95% of the best accuracy of all k).

What came out here (CIFAR-10: vgg16 at 0.25 of the width, 2,000 test images, 283 s on 2 CPU cores):
Edge models of 85.0 and 84.2; midpoints with weight matching none 16.1, REPAIR 63.6, RESCALE 58.5,
bias removal 52.2 and bias cal. 45.6; with activation matching none 13.7, REPAIR 74.0, RESCALE 72.2,
bias removal 65.8 and bias cal. 41.9. As in the paper: with weight matching REPAIR gives 63.6, none
16.1; with weight matching RESCALE gives 58.5, none 16.1; with weight matching bias removal gives
52.2, none 16.1; with weight matching bias cal. gives 45.6, none 16.1; with activation matching, 1
to 5 of the first biases removed give 11.1 on average, none removed 13.7; with activation matching
held-out images choose k = 5; with activation matching, 5 of the last biases removed give 65.8, 100%
of the 65.8 that the best k, 5, gives. Unlike the paper: with weight matching REPAIR is the best of
four at the midpoint; with weight matching RESCALE, bias removal and bias cal. are up to 12.9 points
apart; with activation matching REPAIR 74.0 stands against none 13.7; with activation matching
REPAIR is the best; with activation matching bias cal. 41.9 stands against RESCALE 72.2; with weight
matching, 1 to 5 of the first biases removed give 15.1 on average, none removed 16.1; with weight
matching held-out images choose k = 7; with weight matching, 5 of the last biases removed give 41.9,
80% of the 52.2 that the best k, 7, gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import cifar_pfm
import jax
import numpy as np
from tqdm import tqdm

import vfjax
from vfjax import align, data, diagnose, merge, plot, renorm, stats, train

PyTree = Any

ALPHAS = 11
# By preset: test images, statistics images, held-out images, runs of weight matching.
DEFAULTS = {
    "cpu": {"samples": 2_000, "statistics": 5_000, "held_out": 2_000, "runs": 1},
    "paper": {"samples": 10_000, "statistics": 48_000, "held_out": 2_000, "runs": 5},
}
# Of a training split with too few images for both, at most this share is held out.
SHARE = 0.2
REMEDIES = ("repair", "rescale", "bias_removal", "bias_calibration")
LABELS = cifar_pfm.LABELS | {"none": "none", "bias_removal": "bias removal"}
MATCHES = {"weight": "weight matching", "activation": "activation matching"}
SIDES = {"first": "forward", "last": "backward"}
# What claims are decided by: the paper's k, "about equal", "enough" and "hurts".
LAST, EQUAL, ENOUGH, MARGIN = (5, 6), 0.05, 0.95, 0.01


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="normalization.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(p, examples="vgg16, vgg16-ln, resnet20, digits-mlp")

    def count(name: str, what: str, text: str) -> None:
        of = {preset: f"{defaults[name]:,}" for preset, defaults in DEFAULTS.items()}
        text += f" (default: {of['cpu']}; with --preset paper {of['paper']})"
        option = f"--{name.replace('_', '-')}"
        p.add_argument(option, type=_common.count_of(what), metavar="N", help=text)

    count("samples", "images", "test images, the first N")
    count(
        "statistics",
        "images",
        "training images, the first N, not augmented, for activation matching and renormalisation",
    )
    count(
        "held_out",
        "images",
        "training images, those after the statistics images, that choose how many biases are "
        "removed; at most a fifth of a split that is too small for both",
    )
    p.add_argument(
        "--seed",
        type=_common.seed_of,
        default=0,
        metavar="S",
        help="seed of the random order in which weight matching visits layers",
    )
    count("runs", "runs", "runs of weight matching, with seeds from S on")
    _common.folder_options(p)
    return p


# ------------------------------------------------------------------------------------- one matching


@dataclasses.dataclass(frozen=True)
class Images:
    """Batches: to measure statistics on, to choose k on, to test on."""

    statistics: data.Batches
    held_out: data.Batches
    test: data.Batches


def images_of(args: argparse.Namespace, dataset: data.Dataset) -> Images:
    """The images; none is in two of the three."""
    images, labels = dataset.train_images, dataset.train_labels
    kept = args.held_out
    if len(images) < args.statistics + kept:
        kept = min(kept, int(SHARE * len(images)))

    def training(part: slice) -> data.Batches:
        return data.Batches(images[part], labels[part], dataset.mean, dataset.std, _edges.BATCH)

    return Images(
        training(slice(min(args.statistics, len(images) - kept))),
        training(slice(len(images) - kept, None)),
        dataset.batches("test", batch_size=_edges.BATCH, samples=args.samples),
    )


def removals(
    net: vfjax.Network, midpoint: merge.Merged, images: data.Batches, side: str
) -> list[float]:
    """Accuracy without the biases of the first or the last k layers, k = 0 to L."""
    counts = tqdm(range(net.depth + 1), f"removing {side} biases", delay=2, leave=False)
    return [
        train.evaluate(
            _edges.forward, renorm.remove_bias(net, midpoint, **{side: k}), images
        ).accuracy
        for k in counts
    ]


def removal_of(
    net: vfjax.Network, trees: Sequence[PyTree], images: Images
) -> dict[str, Any] | None:
    """Accuracies of the midpoint without biases, and k; None for networks with BatchNorm.

    Most of these have no biases but those of their norms, which stay.
    """
    if net.norms:
        return None
    midpoint = merge.as_merged(net, merge.interpolate(trees))
    held_out = removals(net, midpoint, images.held_out, "last")
    # The first of equals: as few as possible.
    found = {"held_out": held_out, "k": int(np.argmax(held_out))}
    return found | {side: removals(net, midpoint, images.test, side) for side in SIDES}


def curves_of(
    net: vfjax.Network,
    trees: Sequence[PyTree],
    references: stats.Moments,
    images: Images,
    removed: int | None,
) -> dict[str, diagnose.Interpolation]:
    """Accuracy and loss against alpha, by what was done."""
    remedies: dict[str, Any] = {"reset": "reset"}
    if removed is not None:
        remedies = {name: name for name in REMEDIES} | {"bias_removal": ("remove_bias", removed)}
    return {
        name: diagnose.interpolation(
            net,
            trees,
            images.test,
            alphas=ALPHAS,
            renormalise=remedy,
            data=images.statistics,
            references=references,
        )
        for name, remedy in ({"none": None} | remedies).items()
    }


def measured(found: diagnose.Interpolation) -> dict[str, Any]:
    """What the record holds of a curve."""
    return _common.measured(found) | {"reference_barrier": found.reference_barrier}


# ------------------------------------------------------------------------------ record and figure


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    for name, default in DEFAULTS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    watch = _common.Stopwatch()
    read = args.statistics + args.held_out
    models = _edges.found(args, watch, train=read, test=args.samples)
    net, trees, images = models.net, models.trees, images_of(args, models.dataset)
    # One pass serves activation matching and, carried along, the references of all matchings.
    with watch("statistics of edge models"):
        moments = stats.moments(
            net,
            trees,
            _common.Watched(images.statistics, "statistics of edge models"),
            sites="taps" if net.norms else "paper",
            covariance="cross",
        )
    seeds = list(range(args.seed, args.seed + args.runs))
    runs: dict[str, list[dict[str, Any]]] = {match: [] for match in MATCHES}
    for match, seed in (*(("weight", seed) for seed in seeds), ("activation", None)):
        with watch(f"{match} matching"):
            found = (
                align.match_moments(net, moments)
                if seed is None
                else align.match_weights(net, *trees, key=jax.random.key(seed))
            )
            aligned = [trees[0], net.spec.permute(trees[1], found.permutations)]
            references = moments.carried([None, dict(found.permutations)])
        with watch(f"{match} matching, biases removed"):
            removal = removal_of(net, aligned, images)
        with watch(f"{match} matching, interpolation"):
            removed = None if removal is None else removal["k"]
            curves = curves_of(net, aligned, references, images, removed)
        runs[match].append(
            {
                "seed": seed,
                "matching": {
                    "objective": [float(value) for value in found.objective],
                    "converged": found.converged,
                    "moved": found.moved,
                },
                "removal": removal,
                "curves": {name: measured(curve) for name, curve in curves.items()},
            }
        )
    record: dict[str, Any] = {
        "experiment": "normalization",
        "command": command,
        "config": vars(args) | {"model": models.arch.name, "width": models.arch.width},
        **models.record(images.statistics, images.test),
        "seeds": {"edge_models": models.seeds, "weight_matching": seeds},
        "alphas": curves["none"].alphas.tolist(),
        "edge_accuracy": curves["none"].edge_accuracy.tolist(),
        "runs": runs,
    }
    record["data"]["held_out_images"] = len(images.held_out.images)
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def title_of(record: dict[str, Any]) -> str:
    """Data, models, images."""
    parts = [_edges.networks(record), f"{record['data']['test_images']:,} test images"]
    runs = len(record["runs"]["weight"])
    parts += [f"mean of {runs} runs of weight matching"] if runs > 1 else []
    return ", ".join(parts)


def over_runs(record: dict[str, Any], match: str, *keys: str) -> np.ndarray:
    """The numbers at some keys of each run, `[runs, ...]`."""
    return np.array([functools.reduce(lambda d, k: d[k], keys, r) for r in record["runs"][match]])


def middles(record: dict[str, Any], match: str) -> dict[str, float]:
    """Accuracy at the midpoint, the mean over runs, by what was done."""
    place = record["alphas"].index(0.5)
    return {
        name: float(over_runs(record, match, "curves", name, "accuracy")[:, place].mean())
        for name in record["runs"][match][0]["curves"]
    }


def chosen(record: dict[str, Any], match: str) -> list[int]:
    """The k that held-out images chose, by run, without repetition."""
    return sorted(set(over_runs(record, match, "removal", "k").tolist()))


def label_of(record: dict[str, Any], match: str, name: str) -> str:
    """What was done, as in legends and tables."""
    if name != "bias_removal":
        return LABELS[name]
    return f"{LABELS[name]} (k = {', '.join(map(str, chosen(record, match)))})"


def curve_of(values: np.ndarray, x: Sequence[float], **style: Any) -> plot.Curve:
    """Mean of some runs' accuracies, in per cent, with their spread if there are several."""
    error = 100 * values.std(0, ddof=1) if len(values) > 1 else None
    return plot.Curve(x, 100 * values.mean(0), error=error, **style)


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy against alpha for both matchings, and against the number of biases removed."""
    y, limits, row = "test accuracy (%)", (0, 102), []
    for match, title in MATCHES.items():
        curves = {
            label_of(record, match, name): curve_of(
                over_runs(record, match, "curves", name, "accuracy"),
                record["alphas"],
                colour=colour,
                dashed=name == "none",
            )
            for colour, name in enumerate(record["runs"][match][0]["curves"])
        }
        x = "alpha, weight of the second network"
        row.append(plot.Panel(title, x, y, curves, y_limits=limits))
    if record["runs"]["weight"][0]["removal"]:
        depth = record["model"]["depth"]
        curves = {
            f"{label}, {match}": curve_of(
                over_runs(record, match, "removal", side),
                range(depth + 1),
                colour=colour,
                dashed=side == "first",
            )
            for colour, match in enumerate(MATCHES)
            for side, label in SIDES.items()
        }
        x, title = f"layers without bias k (of L = {depth})", "biases removed at the midpoint"
        row.append(plot.Panel(title, x, y, curves, y_limits=limits))
    return plot.panels(row, title=record["title"])


def claims_of(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper: whether it holds here, and what was measured."""
    claims: list[tuple[bool | None, str]] = []
    remedies = [name for name in record["runs"]["weight"][0]["curves"] if name != "none"]
    if "repair" in remedies:
        found = middles(record, "weight")
        others = [found[name] for name in REMEDIES if name != "repair"]
        names = _common.joined([LABELS[name] for name in REMEDIES if name != "repair"])
        better = sum(value > found["repair"] for value in others)
        place = ("best", "second", "third", "worst")[better]
        spread = max(others) - min(others)
        claims += [
            (
                better == len(others),
                f"with weight matching REPAIR is the {place} of four at the midpoint",
            ),
            (
                spread <= EQUAL,
                f"with weight matching {names} are up to {100 * spread:.1f} points apart",
            ),
        ]
        for name in REMEDIES:
            text = f"with weight matching {LABELS[name]} gives {100 * found[name]:.1f}, none "
            claims.append((found[name] > found["none"], f"{text}{100 * found['none']:.1f}"))
        claims += table_claims(middles(record, "activation"))
    else:
        for match, label in MATCHES.items():
            found = {name: 100 * value for name, value in middles(record, match).items()}
            text = f"with {label} RESET gives {found['reset']:.1f}, none {found['none']:.1f}"
            claims.append((None, text))
    if "bias_removal" in remedies:
        claims += [claim for match in MATCHES for claim in removal_claims(record, match)]
    return claims


def table_claims(found: Mapping[str, float]) -> list[tuple[bool, str]]:
    """Those of the paper's table 1, with activation matching."""
    value = {name: f"{LABELS[name]} {100 * accuracy:.1f}" for name, accuracy in found.items()}
    best = max(REMEDIES, key=lambda name: found[name])
    return [
        (
            found["repair"] < found["none"],
            f"with activation matching {value['repair']} stands against {value['none']}",
        ),
        (best == "rescale", f"with activation matching {LABELS[best]} is the best"),
        (
            abs(found["rescale"] - found["bias_calibration"]) <= EQUAL,
            f"with activation matching {value['bias_calibration']} stands against "
            f"{value['rescale']}",
        ),
    ]


def removal_claims(record: dict[str, Any], match: str) -> list[tuple[bool, str]]:
    """That forward removal hurts, and that few of the last biases are enough."""
    forward, backward = (over_runs(record, match, "removal", side).mean(0) for side in SIDES)
    few = min(LAST[0], record["model"]["depth"] - 1)
    early, share = forward[1 : few + 1].mean(), backward[few] / backward.max()
    ks = chosen(record, match)
    return [
        (
            bool(early < forward[0] - MARGIN),
            f"with {MATCHES[match]}, 1 to {few} of the first biases removed give "
            f"{100 * early:.1f} on average, none removed {100 * forward[0]:.1f}",
        ),
        (
            set(ks) <= set(LAST),
            f"with {MATCHES[match]} held-out images choose k = {' or '.join(map(str, ks))}",
        ),
        (
            bool(share >= ENOUGH),
            f"with {MATCHES[match]}, {few} of the last biases removed give "
            f"{100 * backward[few]:.1f}, {100 * share:.0f}% of the {100 * backward.max():.1f} that "
            f"the best k, {int(backward.argmax())}, gives",
        ),
    ]


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The accuracies in a sentence, and the paper's claims."""
    parts = []
    for match, label in MATCHES.items():
        found = middles(record, match)
        rows = [f"{LABELS[name]} {100 * value:.1f}" for name, value in found.items()]
        parts.append(f"with {label} {_common.joined(rows)}")
    edges = _common.joined([f"{100 * value:.1f}" for value in record["edge_accuracy"]])
    return f"Edge models of {edges}; midpoints {'; '.join(parts)}.", claims_of(record)


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: midpoints, lowest points, and barriers by both definitions."""
    header = ["matching: done", "midpoint, %", "lowest, %", "barrier, points"]
    header += ["in the paper's code", "barrier of loss, nats"]
    place, rows = record["alphas"].index(0.5), []
    for match, runs in record["runs"].items():
        for name in runs[0]["curves"]:
            accuracy, paper, code, loss = (
                over_runs(record, match, "curves", name, key)
                for key in ("accuracy", "barrier", "reference_barrier", "loss_barrier")
            )
            columns = accuracy[:, place], accuracy.min(1), paper, code
            cells = [_common.percent(column.tolist()) for column in columns]
            cells.append(f"{loss.mean():.3g}")
            rows.append([f"{match}: {label_of(record, match, name)}", *cells])
    return header, rows


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    for name, default in (DEFAULTS[config["preset"]] | {"seed": 0}).items():
        parts += [f"{name.replace('_', '')}{config[name]}"] if config[name] != default else []
    return _edges.file_name(record, parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    _common.print_table(record["title"], *table_of(record))
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
