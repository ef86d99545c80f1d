"""Networks merge or do not by how they were trained: the study of recipes in "Vanishing Feature".

    python experiments/training_recipe.py                        # MNIST, three pairs
    python experiments/training_recipe.py --dataset digits       # needs no data
    python experiments/training_recipe.py --preset paper --model vgg16 --work-dir runs  # on a GPU

Pairs of networks that differ in their random seed are trained with several learning rates, several
weight decays and two initialisations, and averaged with weights 1 - alpha and alpha, directly and
after matching the second network's weights to the first's. Measured is the barrier: by how much the
test accuracy of the average falls below the line between those of the two networks, at most, over
11 alphas (its other definition, that of the reference code, is in the record). As ablations,
networks of the highest rate are trained for one more epoch at the low one, and networks of the
largest decay for one with the smallest, at the low rate. Of the two initialisations the L2 distance
between the two networks is followed during training, as they are and matched (in the record).

The default networks are MLPs of 3 hidden layers, 128 wide, trained on MNIST for 5 epochs with a
cosine to zero; their normal initialisation is that of He et al. Size and grid were chosen on
training images that were held out, such that all train, and barriers are neither none nor whole.
Weight decays are 30 times the paper's, by what its rates add up to more over its 160 epochs, so
that at 0.1 weights decay as much in all. Decays are swept at the low rate (the paper: at 0.1), for
at the high one hardly any barrier is left that could fall (on the images held out).

With --preset paper, --model is one of vgg16, vgg16-bn, vgg16-ln, resnet20 and resnet20-ln-w4 on
CIFAR-10 (those with BatchNorm after RESET, those with LayerNorm with both initialisations), or
vgg16-ln with --dataset mnist.

What the paper found: after matching, the barrier falls with the learning rate (VGG16-LN, ResNet20:
by over 40% from 0.01 to 0.1) and with weight decay (VGG16: by over 60% from 1e-4 to 5e-4), while
direct averages change little (taken here as: by less than a fifth). Accuracy does not explain this:
one epoch at the low rate takes networks of the high rate to the accuracy of the low one (taken as:
within half a point), but not to its barrier (taken as: nearer to their own), and so for weight
decay. The normal initialisation gives a larger barrier and distance than the uniform one at the low
rate; at the high one the difference is gone (taken as: less than a quarter is left). VGG16-LN on
MNIST cannot be merged if trained at 0.001, but can at 0.01 and 0.1 (taken as: no more than half
of the accuracy is lost).

What came out here (MNIST: MLPs, 3 x 128, mean of 3 pairs, 240 s on 2 CPU cores): Networks of 93.9
to 98.1%. As in the paper: matched, the barrier goes from 24.3 points at rate 0.01 to 0.3 at 0.1
(99% less); direct, the barrier goes from 50.5 points at decay 0.003 (all at rate 0.01) to 42.7 at
0.015 (15% less); matched, the barrier goes from 24.3 points at decay 0.003 (all at rate 0.01) to
1.2 at 0.015 (95% less); at rate 0.01 the matched barrier is 24.3 points with the normal
initialisation, 0.9 with the uniform one; at rate 0.1 the matched barrier is 0.3 points with the
normal initialisation, 0.2 with the uniform one; at rate 0.01 the distance is 29.4 with the normal
initialisation, 15.3 with the uniform one; at rate 0.1 the distance is 12.7 with the normal
initialisation, 12.6 with the uniform one. Unlike the paper: direct, the barrier goes from 50.5
points at rate 0.01 to 22.7 at 0.1 (55% less); one more epoch at rate 0.01 takes networks of 0.1
from 98.03% to 97.85%, those of 0.01 have 97.23%; one more epoch takes the matched barrier of
networks of rate 0.1 from 0.3 to 0.3 points, that of 0.01 is 24.3; one more epoch at decay 0.003
takes networks of 0.015 from 95.77% to 96.47%, those of 0.003 have 97.23%; one more epoch takes the
matched barrier of networks of decay 0.015 from 1.2 to 0.4 points, that of 0.003 is 24.3; matched,
networks of rates 0.001, 0.01 and 0.1 lose 47%, 25% and 0% of their accuracy.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import _linear
import jax
import jax.numpy as jnp
import numpy as np
from _cells import ALPHAS, Cell, Grid, Pair, Plan

import vfjax
from vfjax import data, models, plot, train

PyTree = Any

SEEDS = tuple(range(6))
MATCHES = ("direct", "matched")
PAPER_MODELS = ("vgg16", "vgg16-bn", "vgg16-ln", "resnet20", "resnet20-ln")

CPU_MODEL = models.MLP((128,) * 3)
CPU_RECIPE = train.Recipe(schedule="cosine", epochs=5)
CPU_GRID = Grid(
    rates=(0.001, 0.003, 0.01, 0.03, 0.1),
    decays=(0.003, 0.006, 0.009, 0.012, 0.015),
    rate=0.01,
    decay=0.003,
    low=0.01,
    initialisers=("he_normal", "uniform"),
)

# To see that it runs: fewer cells, networks that compile fast.
QUICK_MODEL = models.MLP((16, 16))
QUICK_GRID = dataclasses.replace(
    CPU_GRID, rates=(CPU_GRID.rates[0], CPU_GRID.low, CPU_GRID.rates[-1]), decays=(0.003, 0.015)
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="training_recipe.py", description=__doc__, formatter_class=_common.Help
    )
    p.add_argument(
        "--dataset",
        default="auto",
        choices=("auto", "mnist", "digits", "cifar10"),
        help="images to train and test on; auto is MNIST, with --preset paper CIFAR-10, where it "
        "is found, else, with a warning and in the figure's title, the digits that come with "
        "scikit-learn",
    )
    p.add_argument(
        "--model",
        type=_edges.model_of,
        metavar="NAME[-wWIDTH]",
        help="with --preset paper, the networks: " + ", ".join(PAPER_MODELS) + " (default: vgg16)",
    )
    p.add_argument(
        "--preset",
        default="cpu",
        choices=("cpu", "paper"),
        help="cpu is MLPs on MNIST and a small grid; paper the networks, the grid and the 160 "
        "epochs of the paper, meant for a GPU",
    )
    p.add_argument(
        "--seeds",
        type=_common.seed_of,
        nargs="+",
        default=list(SEEDS),
        metavar="S",
        help="seeds of the networks; the first and the second make a pair, the third and the "
        "fourth another, and so on",
    )
    p.add_argument(
        "--work-dir",
        help="folder in which the states of runs are kept, so that those of a call that was "
        "stopped go on; not of the runs during which distances are measured",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help=f"one pair, {_linear.QUICK_EPOCHS} epoch on {_linear.QUICK_IMAGES} images: to see "
        "that it runs; the numbers mean nothing",
    )
    _common.folder_options(p)
    return p


def load(args: argparse.Namespace) -> data.Dataset:
    """The images, as the options have it."""
    count = _linear.QUICK_IMAGES if args.quick else None
    prefer = "cifar10" if args.preset == "paper" else "mnist"
    return data.load(args.dataset, args.data_dir, train=count, test=count, prefer=prefer)


def plan_of(args: argparse.Namespace, dataset: data.Dataset) -> Plan:
    """What is trained, from the options and the data that was found."""
    if args.preset == "cpu":
        if args.model is not None or dataset.name == "cifar10":
            raise _common.UserError("--model and --dataset cifar10 need --preset paper.")
        plan = Plan("mlp", CPU_MODEL, CPU_RECIPE, CPU_GRID)
        if args.quick:
            plan = Plan("mlp", QUICK_MODEL, CPU_RECIPE, QUICK_GRID)
    else:
        plan = paper_plan(*(args.model or ("vgg16", None)), dataset)
    if args.quick:
        recipe = dataclasses.replace(plan.recipe, epochs=_linear.QUICK_EPOCHS)
        return dataclasses.replace(plan, recipe=recipe)
    if dataset.name != "digits":
        return plan
    steps, wanted = (
        -(-count // plan.recipe.batch_size)
        for count in (len(dataset.train_images), _linear.MNIST_IMAGES)
    )
    return dataclasses.replace(plan, factor=wanted / steps)


def paper_plan(name: str, width: float | None, dataset: data.Dataset) -> Plan:
    """The paper's grid for a network."""
    if name not in PAPER_MODELS:
        known = ", ".join(PAPER_MODELS)
        raise _common.UserError(f"--model must be one of {known} with --preset paper, got {name}.")
    if dataset.name == "digits":
        raise _common.UserError(f"--model {name} is not for the digits; give --data-dir.")
    options = {} if width is None else {"width": width}
    model = models.create(name, classes=dataset.classes, **options)
    recipe = train.recipe_for(name, dataset.name, preset="paper")
    both = {"kaiming_normal": "uniform", "uniform": "kaiming_normal"}
    initialisers = (model.initialiser, both[model.initialiser])
    grid = Grid(
        rates=(0.01, 0.03, 0.05, 0.07, 0.1),
        decays=(1e-4, 2e-4, 3e-4, 4e-4, 5e-4),
        rate=0.1,
        decay=1e-4,
        low=0.01,
        initialisers=initialisers if name.endswith("-ln") else initialisers[:1],
    )
    if dataset.name == "mnist":
        grid = Grid((0.001, 0.01, 0.1), (), 0.1, recipe.weight_decay, 0.01, ("uniform",))
    return Plan(name if width is None else f"{name}-w{width:g}", model, recipe, grid)


# ------------------------------------------------------------------------------------- one cell


def traced(model: Any, dataset: data.Dataset) -> vfjax.Network:
    """Traces the network, for which its shapes are enough; initialisers make no difference."""
    x = jax.ShapeDtypeStruct((500, *dataset.test_images.shape[1:]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return vfjax.trace(models.apply_fn(model), variables, x)


# ------------------------------------------------------------------------------ record and figure


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    seeds = _linear.pairs_of(args)
    watch = _common.Stopwatch()
    with watch("data"):
        dataset = load(args)
    plan = plan_of(args, dataset)
    with watch("trace"):
        net = traced(plan.model, dataset)
    cells = plan.cells()
    found: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    for two in seeds:
        pair = Pair(plan, net, dataset, two, args.work_dir, watch)
        for cell in cells:
            found[cell].append(pair.measure(cell))
    record: dict[str, Any] = {
        "experiment": "training_recipe",
        "command": command,
        "config": vars(args) | {"model": plan.name},
        "data": {
            "name": dataset.name,
            "source": dataset.source.split(" in ")[0],
            "fallback": dataset.fallback,
            "train_images": len(dataset.train_images),
            "test_images": len(dataset.test_images),
        },
        "model": {
            "name": plan.name,
            "description": repr(plan.model),
            "depth": net.depth,
            "parameters": net.parameters,
        },
        "recipe": dataclasses.asdict(plan.recipe),
        "grid": dataclasses.asdict(plan.grid),
        "alphas": (np.arange(ALPHAS) / (ALPHAS - 1)).tolist(),
        "renormalised": "reset" if net.norms else None,
        "seeds": {"pairs": [list(two) for two in seeds], "matching": [two[0] for two in seeds]},
        "cells": [
            {
                "name": str(cell),
                **dataclasses.asdict(cell),
                "recipe": dataclasses.asdict(plan.recipe_of(cell)),
                "summary": summary_of(found[cell]),
                "pairs": found[cell],
            }
            for cell in cells
        ],
    }
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def summary_of(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means and standard deviations over the pairs that did not diverge; None if all did."""
    pairs = [pair for pair in pairs if pair["diverged"] is None]
    if not pairs:
        return None
    numbers = {"edge_accuracy": [float(np.mean(pair["edge_accuracy"])) for pair in pairs]}
    for match in MATCHES:
        for key in ("barrier", "reference_barrier", "loss_barrier", "distance"):
            numbers[f"{match}_{key}"] = [pair[match][key] for pair in pairs]
    summary: dict[str, Any] = {
        key: dict(zip(("mean", "std"), _common.mean_std(values), strict=True))
        for key, values in numbers.items()
    }
    summary["pairs"] = len(pairs)
    return summary


def title_of(record: dict[str, Any]) -> str:
    """Data, networks, number of pairs."""
    config = record["config"]
    wanted = "cifar10" if config["preset"] == "paper" else "mnist"
    label = _common.dataset_label(record["data"], wanted)
    name = "MLPs, 3 x 128" if config["preset"] == "cpu" else record["model"]["name"]
    parts = [f"{label}: {name}"]
    count = len(record["seeds"]["pairs"])
    parts += [f"mean of {count} pairs"] if count > 1 else []
    parts += ["QUICK, MEANS NOTHING"] if config["quick"] else []
    return ", ".join(parts)


class Results:
    """The cells of a record, by how they were trained."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.cells = {
            (c["initialiser"], c["rate"], c["decay"], tuple(c["then"] or ()) or None): c
            for c in record["cells"]
        }
        self.grid = Grid(**{k: _tupled(v) for k, v in record["grid"].items()})

    def cell(self, rate: float, decay: float, then: Any = None, initialiser: str = "") -> Any:
        """One cell; by default of the initialiser of the sweeps."""
        return self.cells[initialiser or self.grid.initialisers[0], rate, decay, then]

    def value(self, cell: Mapping[str, Any], key: str, what: str = "mean") -> float:
        """A number of a cell's summary, NaN if it diverged; accuracies and barriers in points."""
        if cell["summary"] is None:
            return float("nan")
        factor = 100 if key.endswith("accuracy") or key in BARRIERS else 1
        return factor * cell["summary"][key][what]

    def rates(self) -> list[Any]:
        """The cells of the sweep of learning rates."""
        return [self.cell(rate, self.grid.decay) for rate in self.grid.rates]

    def decays(self) -> list[Any]:
        """The cells of the sweep of weight decays."""
        return [self.cell(self.grid.rate, decay) for decay in self.grid.decays]

    def ablations(self) -> Iterator[tuple[str, list[Any]]]:
        """What is compared: those of the low barrier's recipe, those retrained, the other's."""
        grid = self.grid
        then = grid.low, grid.decay
        cells = [self.cell(grid.rates[-1], grid.decay, then=t) for t in (None, then)]
        yield "rate", [*cells, self.cell(grid.low, grid.decay)]
        if grid.decays:
            then = grid.low, grid.decays[0]
            cells = [self.cell(grid.rate, grid.decays[-1], then=t) for t in (None, then)]
            yield "decay", [*cells, self.cell(grid.rate, grid.decays[0])]


BARRIERS = ("direct_barrier", "matched_barrier", "direct_reference_barrier")
BARRIERS += ("matched_reference_barrier",)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# At least so much of the barrier must go from the least to the largest: by rate, by decay.
FALLS = {"rate": 0.4, "decay": 0.6}


def claims_of(record: dict[str, Any]) -> list[tuple[bool, str]]:
    """Each claim of the paper: whether it holds here, and what was measured.

    What diverged compares as NaN, so that no claim on it holds.
    """
    results = Results(record)
    grid = results.grid
    sweeps = {"rate": [results.cell(rate, grid.decay) for rate in (grid.low, grid.rates[-1])]}
    if grid.decays:
        sweeps["decay"] = [results.decays()[end] for end in (0, -1)]
    claims = []
    for name, ends in sweeps.items():
        low, high = (f"{cell[name]:g}" for cell in ends)
        for match in MATCHES:
            start, end = (results.value(cell, f"{match}_barrier") for cell in ends)
            drop = 1 - end / start if start else float("nan")
            holds = drop > FALLS[name]
            if match == "direct":
                holds = abs(end - start) < 0.2 * max(start, end)
            less = f" ({100 * drop:.0f}% less)" if drop > 0 else ""
            at = f" (all at rate {grid.rate:g})" if name == "decay" else ""
            text = f"{match}, the barrier goes from {start:.1f} points at {name} {low}{at} to "
            claims.append((holds, f"{text}{end:.1f} at {high}{less}"))
    for name, (own, after, other) in results.ablations():
        claims += ablation_claims(results, name, own, after, other)
    if len(grid.initialisers) > 1:
        claims += initialiser_claims(results)
    if grid.rates[0] < grid.low:
        claims.append(merging_claim(results))
    return claims


def ablation_claims(
    results: Results, name: str, own: Any, after: Any, other: Any
) -> list[tuple[bool, str]]:
    """That one more epoch brings the accuracy of another recipe, and not its barrier."""
    accuracy, barrier = (
        [results.value(cell, key) for cell in (own, after, other)]
        for key in ("edge_accuracy", "matched_barrier")
    )
    to = after["then"][0 if name == "rate" else 1]
    alike = abs(accuracy[1] - accuracy[2]) <= 0.5
    return [
        (
            alike,
            f"one more epoch at {name} {to:g} takes networks of {own[name]:g} from "
            f"{accuracy[0]:.2f}% to {accuracy[1]:.2f}%, those of {to:g} have {accuracy[2]:.2f}%",
        ),
        (
            # At unlike accuracy it says nothing of what accuracy explains.
            alike and abs(barrier[1] - barrier[0]) < abs(barrier[1] - barrier[2]),
            f"one more epoch takes the matched barrier of networks of {name} {own[name]:g} from "
            f"{barrier[0]:.1f} to {barrier[1]:.1f} points, that of {to:g} is {barrier[2]:.1f}",
        ),
    ]


def initialiser_claims(results: Results) -> list[tuple[bool, str]]:
    """That the normal one has larger barrier and distance, at the low rate only."""
    grid, claims = results.grid, []
    normal, uniform = sorted(grid.initialisers, key=lambda name: name == "uniform")
    for key, what, unit in (
        ("matched_barrier", "matched barrier", " points"),
        ("direct_distance", "distance", ""),
    ):
        at_low, at_high = (
            [
                results.value(results.cell(rate, grid.decay, initialiser=initialiser), key)
                for initialiser in (normal, uniform)
            ]
            for rate in (grid.low, grid.rates[-1])
        )
        low, high = at_low[0] - at_low[1], at_high[0] - at_high[1]
        claims.append(
            (
                low > 0,
                f"at rate {grid.low:g} the {what} is {at_low[0]:.1f}{unit} with the normal "
                f"initialisation, {at_low[1]:.1f} with the uniform one",
            )
        )
        claims.append(
            (
                abs(high) < 0.25 * abs(low),
                f"at rate {grid.rates[-1]:g} the {what} is {at_high[0]:.1f}{unit} with the normal "
                f"initialisation, {at_high[1]:.1f} with the uniform one",
            )
        )
    return claims


def merging_claim(results: Results) -> tuple[bool, str]:
    """That networks of the smallest rate cannot be merged, those from the low one on can."""
    lost = {
        cell["rate"]: results.value(cell, "matched_barrier") / results.value(cell, "edge_accuracy")
        for cell in results.rates()
    }
    grid = results.grid
    compared = (grid.rates[0], grid.low, grid.rates[-1])
    merges = [lost[rate] <= 0.5 for rate in compared]
    shares = [f"{100 * lost[rate]:.0f}%" for rate in compared]
    rates = [f"{rate:g}" for rate in compared]
    return (
        merges == [False, True, True] and lost[compared[0]] > 0.5,
        f"matched, networks of rates {_common.joined(rates)} lose {_common.joined(shares)} of "
        "their accuracy",
    )


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The networks in a sentence, and the paper's claims."""
    results = Results(record)
    values = [results.value(cell, "edge_accuracy") for cell in record["cells"]]
    known = [value for value in values if np.isfinite(value)]
    text = f"Networks of {min(known):.1f} to {max(known):.1f}%. " if known else ""
    for cell in record["cells"]:
        lost = sum(pair["diverged"] is not None for pair in cell["pairs"])
        if lost:
            text += f"With {cell['name']}, {lost} of {len(cell['pairs'])} pairs diverged. "
    return text.strip(), claims_of(record)


def label_of(initialiser: str) -> str:
    """An initialisation's name in legends."""
    return "uniform" if initialiser == "uniform" else "normal"


def figure_of(record: dict[str, Any]) -> Any:
    """Barriers against rate and decay, the ablations, distances during training."""
    results = Results(record)
    grid = results.grid

    def curve(cells: Sequence[Any], x: Callable[[Any], float], key: str, **style: Any) -> Any:
        return plot.Curve(
            [x(cell) for cell in cells],
            [results.value(cell, key) for cell in cells],
            error=[results.value(cell, key, "std") for cell in cells],
            **style,
        )

    unit = "barrier, points of test accuracy"
    sweeps = {}
    for k, match in enumerate(MATCHES):
        sweeps[match] = curve(
            results.rates(), lambda c: c["rate"], f"{match}_barrier", colour=k, dashed=k == 0
        )
    for name in grid.initialisers[1:]:
        others = [
            results.cell(rate, grid.decay, initialiser=name) for rate in (grid.low, grid.rates[-1])
        ]
        sweeps[f"matched, {label_of(name)} init."] = curve(
            others, lambda c: c["rate"], "matched_barrier", colour=2
        )
    rates = f"learning rate (decay {grid.decay:g}, {label_of(grid.initialisers[0])} init.)"
    row = [plot.Panel("by learning rate", rates, unit, sweeps)]
    if grid.decays:
        sweeps = {
            match: curve(
                results.decays(), lambda c: c["decay"], f"{match}_barrier", colour=k, dashed=k == 0
            )
            for k, match in enumerate(MATCHES)
        }
        row.append(
            plot.Panel("by weight decay", f"weight decay (rate {grid.rate:g})", unit, sweeps)
        )
    points: dict[str, tuple[str, plot.Curve]] = {}
    for group, (name, cells) in enumerate(results.ablations()):
        to = cells[1]["then"][0 if name == "rate" else 1]
        labels = [f"{name} {cells[0][name]:g}", f"then {to:g}, 1 epoch", f"{name} {to:g}"]
        for k, (label, cell) in enumerate(zip(labels, cells, strict=True)):
            if k == 1:
                label = f"{labels[0]}, {label}"
            if cell["name"] in points:
                # Both ablations may compare with the same networks.
                label = f"{points[cell['name']][0]}, {label}"
            found = curve(
                [cell],
                lambda c: results.value(c, "edge_accuracy"),
                "matched_barrier",
                colour=3 * group + k,
                dashed=k == 1,
            )
            points[cell["name"]] = label, found
    row.append(
        plot.Panel(
            "one more epoch",
            "test accuracy of the networks, %",
            unit + ", matched",
            dict(points.values()),
        )
    )
    if any("distances" in pair for cell in record["cells"] for pair in cell["pairs"]):
        row.append(distance_panel(results))
    figure = plot.panels(row, title=record["title"], columns=2)
    axes = figure.axes[0]
    axes.set_xscale("log")
    axes.set_xticks(grid.rates, [f"{rate:g}" for rate in grid.rates])
    axes.set_xticks([], minor=True)
    if grid.decays:
        figure.axes[1].set_xticks(grid.decays, [f"{decay:g}" for decay in grid.decays])
    return figure


def distance_panel(results: Results) -> plot.Panel:
    """Distances during training, by initialisation and rate."""
    grid, curves = results.grid, {}
    for colour, rate in enumerate((grid.low, grid.rates[-1])):
        for name in grid.initialisers:
            cell = results.cell(rate, grid.decay, initialiser=name)
            found = [pair["distances"] for pair in cell["pairs"] if pair["diverged"] is None]
            if found:
                values = [pair["direct"] for pair in found]
                curves[f"{label_of(name)}, rate {rate:g}"] = plot.Curve(
                    found[0]["epoch"],
                    np.mean(values, axis=0).tolist(),
                    error=np.std(values, axis=0, ddof=1).tolist() if len(values) > 1 else None,
                    colour=colour,
                    dashed=name == "uniform",
                )
    y = "L2 distance between the two networks"
    top = 1.1 * max(max(curve.y) for curve in curves.values())
    return plot.Panel("by initialisation, not matched", "epochs", y, curves, y_limits=(0, top))


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracies and barriers in per cent, distances."""
    header = ["trained with", "accuracy", "barrier", "matched", "distance", "matched"]
    results, rows = Results(record), []
    keys = ("edge_accuracy", "direct_barrier", "matched_barrier")
    for cell in record["cells"]:
        row = [cell["name"]]
        for key in (*keys, "direct_distance", "matched_distance"):
            mean, spread = (results.value(cell, key, what) for what in ("mean", "std"))
            text = f"{mean:.2f}" if np.isfinite(mean) else "diverged"
            row.append(f"{text} ± {spread:.2f}" if spread > 0 else text)
        rows.append(row)
    return header, rows


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix: what was asked for and is not default."""
    config = record["config"]
    parts = [record["experiment"], record["data"]["name"]]
    parts += [config["model"], "paper"] if config["preset"] == "paper" else []
    if config["quick"]:
        return "-".join([*parts, "quick"])
    if list(config["seeds"]) != list(SEEDS):
        parts.append("seeds" + "+".join(map(str, config["seeds"])))
    return "-".join(parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    _common.print_table(record["title"], *table_of(record))
    if not record["config"]["quick"]:
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
