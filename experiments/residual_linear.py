"""Residual connections against vanishing features: linear networks with and without them.

    python experiments/residual_linear.py                        # MNIST, five pairs each
    python experiments/residual_linear.py --dataset digits       # needs no data
    python experiments/residual_linear.py --seeds 0 1            # one pair

Linear networks of 5 layers, 784-32-32-32-32-10 with biases, as they are and with skips around
layers 2 to 4, are trained with the paper's recipe (Adam at 0.01, 20 epochs, weights of standard
deviation 0.005 at the start). Pairs that differ in their random seed are averaged with weights
1 - alpha and alpha, directly and after matching the second network's weights to the first's;
accuracy and loss on the test images are shown as mean and standard deviation over the pairs.

Here skips stay exact: what is added to a layer's output is its input. So units of all layers along
the skips are permuted alike, which leaves matching one permutation where the plain network has
four. The paper's code holds the identities of the skips as buffers, permutes each layer's units by
themselves and averages what this makes of the identities, so that after matching its networks have
other skips than the ones that were trained.

What the paper found (mean of 5 runs): networks with skips lose less accuracy between the two ends,
averaged directly as well as after weight matching.

What came out here (MNIST: linear networks of 5 layers, 32 wide, mean of 5 pairs, 167 s on 2 CPU
cores): Edge models of 90.19 ± 0.82 with skips and 89.71 ± 0.75 without. As in the paper: direct,
the midpoint has 24.82 ± 7.95 with skips and 17.21 ± 2.44 without (better with them in 4 of 5 pairs;
mean barriers 65.4 and 72.5 points); weights matched, the midpoint has 82.73 ± 5.28 with skips and
46.07 ± 12.11 without (better with them in 5 of 5 pairs; mean barriers 7.5 and 43.6 points).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
import _linear
import jax
import numpy as np

from vfjax import diagnose, models, plot, train

MODEL = models.LinearNetwork(width=32, depth=5, std=0.005)
RECIPE = train.RECIPES["paper-linear"]
SEEDS = tuple(range(10))
NETWORKS = {"plain": False, "residual": True}
MATCHES = {"direct": None, "weight": "weight"}
LABELS = {"direct": "direct", "weight": "weights matched"}
ALPHAS = 11


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    return _linear.parser("residual_linear", __doc__, seeds=SEEDS, epochs=RECIPE.epochs)


def summary_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over pairs, at each alpha and of the barriers."""
    summary: dict[str, Any] = {}
    for quantity in ("accuracy", "loss", "barrier", "loss_barrier"):
        values = np.array([run[quantity] for run in runs])
        spread = values.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(values[0])
        summary[quantity] = {"mean": values.mean(0).tolist(), "std": spread.tolist()}
    return summary


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    pairs = _linear.pairs_of(args)
    watch = _common.Stopwatch()
    with watch("data"):
        dataset = _linear.load(args)
    recipe = _linear.recipe_of(args, RECIPE, dataset)
    test = dataset.batches("test", batch_size=_linear.BATCH)
    record = _linear.record_of("residual_linear", args, command, dataset, recipe)
    record["models"], record["summary"] = {}, {}
    record["pairs"] = [{"models": list(seeds)} for seeds in pairs]
    for name, residual in NETWORKS.items():
        model = dataclasses.replace(MODEL, residual=residual)
        with watch("trace"):
            net = _linear.trace(model, dataset)
        record["models"][name] = _linear.model_record(model, net)
        record["models"][name]["groups"] = dict(net.spec.sizes)
        for seeds, row in zip(pairs, record["pairs"], strict=True):
            with watch("training"):
                runs = train.fit_seeds(model, recipe, dataset, seeds=seeds)
            row[name] = {}
            for label, match in MATCHES.items():
                with watch(f"interpolation, {label}"):
                    found = diagnose.interpolation(
                        net,
                        [run.variables for run in runs],
                        test,
                        alphas=ALPHAS,
                        match=match,
                        key=None if match is None else jax.random.key(seeds[0]),
                    )
                row[name][label] = _common.measured(found)
                record["alphas"] = found.alphas.tolist()
        record["summary"][name] = {
            label: summary_of([row[name][label] for row in record["pairs"]]) for label in MATCHES
        }
    record["title"] = _linear.titled(record, "linear networks of 5 layers, 32 wide")
    record["seconds"] = watch.record()
    return record | _common.environment()


def middle(record: dict[str, Any], network: str, match: str) -> list[float]:
    """Accuracy at the midpoint, by pair."""
    place = record["alphas"].index(0.5)
    return [pair[network][match]["accuracy"][place] for pair in record["pairs"]]


def ends(record: dict[str, Any], network: str) -> list[float]:
    """Accuracy of all edge models."""
    curves = [pair[network]["direct"]["accuracy"] for pair in record["pairs"]]
    return [curve[end] for curve in curves for end in (0, -1)]


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The accuracies in a sentence, and the paper's claims."""
    count = len(record["pairs"])
    plain, skips = (_common.percent(ends(record, name)) for name in NETWORKS)
    claims = []
    for match, label in LABELS.items():
        without, with_skips = (middle(record, name, match) for name in NETWORKS)
        better = sum(s > p for s, p in zip(with_skips, without, strict=True))
        barriers = [record["summary"][name][match]["barrier"]["mean"] for name in NETWORKS]
        text = (
            f"{label}, the midpoint has {_common.percent(with_skips)} with skips and "
            f"{_common.percent(without)} without (better with them in {better} of {count} pairs; "
            f"mean barriers {100 * barriers[1]:.1f} and {100 * barriers[0]:.1f} points)"
        )
        claims.append((barriers[1] < barriers[0], text))
    return f"Edge models of {skips} with skips and {plain} without.", claims


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy and loss against alpha."""
    count = len(record["pairs"])
    spread = f" (mean, std over {count} pairs)" if count > 1 else ""
    row = []
    for quantity, label, factor in (("accuracy", "test accuracy (%)", 100), ("loss", "nats", 1)):
        curves = {}
        for colour, network in enumerate(NETWORKS):
            for match in MATCHES:
                found = record["summary"][network][match][quantity]
                curves[f"{network}, {LABELS[match]}"] = plot.Curve(
                    record["alphas"],
                    [factor * value for value in found["mean"]],
                    error=[factor * value for value in found["std"]] if count > 1 else None,
                    colour=colour,
                    dashed=match == "direct",
                )
        y_label = label if quantity == "accuracy" else f"test cross-entropy ({label})"
        limits = (0, 101) if quantity == "accuracy" else None
        x_label = "weight of the second network, alpha"
        row.append(plot.Panel(quantity, x_label, y_label, curves, y_limits=limits))
    return plot.panels(row, title=record["title"].split(", mean of")[0] + spread)


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: ends, midpoint and barriers."""
    header = ["network", "edge models, %", "midpoint, %", "barrier, points", "loss barrier, nats"]
    rows = []
    for network in NETWORKS:
        for match, label in LABELS.items():
            found = record["summary"][network][match]
            rows.append(
                [
                    f"{network}, {label}",
                    _common.percent(ends(record, network)),
                    _common.percent(middle(record, network, match)),
                    f"{100 * found['barrier']['mean']:.2f}",
                    f"{found['loss_barrier']['mean']:.3g}",
                ]
            )
    return header, rows


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
        file_name=functools.partial(_linear.file_name, seeds=SEEDS, epochs=RECIPE.epochs),
        figure_of=figure_of,
        show=show,
    )


if __name__ == "__main__":
    main()
