"""Preserve-First Merging of two networks: the central table of "Vanishing Feature".

    python experiments/cifar_pfm.py                              # the shipped pair, CIFAR-10
    python experiments/cifar_pfm.py --pairs 3                    # mean and spread over three pairs
    python experiments/cifar_pfm.py --model resnet20             # BatchNorm: RESET, as in table 7
    python experiments/cifar_pfm.py --dataset digits             # seconds, needs no data
    python experiments/cifar_pfm.py --retrain --preset paper     # full width, 160 epochs, on a GPU

Edge models are loaded from `checkpoints/`. A run that needs more than are there stops before it
measures anything and names the command of `train_edges.py` that trains the missing ones.

Two networks that differ in their random seed are averaged from layer l+1 on; their first l layers
are kept apart and their l-th pre-activations averaged ("PFM l/L"). l = 0 is ordinary merging, l = L
the logit ensemble. Columns say what else was done: nothing (direct), units of the second network
permuted to match those of the first (matched), and on top of that REPAIR, RESCALE or bias
calibration, or for networks with BatchNorm, RESET.

What the paper found (tables 1 and 7; full width, 160 epochs, mean of 3 pairs, per cent): VGG16
models of 91.9 and 91.7, ensemble 92.9. At l = 0 direct averaging is at chance (10.0), matching
gives 46.5, with RESCALE 84.7; at l = 8 RESCALE passes the edge models (92.4 at 1.2 times the
parameters and 1.67 times the FLOPs), at l = 12 it equals the ensemble. ResNet20 with RESET: 64.1 at
l = 0, and the ensemble at l = 19.

What came out here (CIFAR-10, vgg16 at 0.25 of the width, 160 s on 2 CPU cores): Models of 84.2 and
84.1, ensemble 85.7. At l = 0: direct 10.0, matched 13.6, REPAIR 72.9, RESCALE 70.7 and bias cal.
41.6, so REPAIR leads. The edge models' mean, 84.15, is first reached by matched, REPAIR and RESCALE
at l = 12 (1.84 times the parameters, 1.97 the FLOPs), by direct and bias cal. at none of these l.
In the paper, at full width and with weight decay 1e-4 (here 5e-4), RESCALE leads, REPAIR is below
matching alone, and bias calibration is next to RESCALE: matched 46.5, REPAIR 39.1, RESCALE 84.7 and
bias cal. 82.9 at l = 0; 91.2, 87.4, 92.4 and 91.8 at l = 8, with edge models of 91.8. (It, too,
finds REPAIR reliable at large weight decay.)
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import jax
from tqdm import tqdm

import vfjax
from vfjax import align, data, merge, plot, renorm, stats, train

PyTree = Any

# l by L, from tables 1 and 7 of the paper; other depths take the fractions of L = 14.
LAYERS = {14: (0, 3, 6, 8, 12), 20: (0, 6, 10, 13, 19)}
SAMPLES = 10_000
# Test images, and statistics images, wait at the cut for the columns of a row, up to so many bytes.
STORE = 1 << 29

LABELS = {
    "direct": "direct",
    "matched": "matched",
    "repair": "REPAIR",
    "rescale": "RESCALE",
    "bias_calibration": "bias cal.",
    "reset": "RESET",
}


# -------------------------------------------------------------------------------------- options


def _samples(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor 'all'")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="cifar_pfm.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(p, examples="vgg16, vgg16-w0.5, vgg16-bn, resnet20, digits-mlp")
    p.add_argument(
        "--match",
        default="activation",
        choices=("activation", "weight", "none"),
        help="how units of the second network are matched to those of the first: by the "
        "correlation of their activations, by their weights, or not at all",
    )
    p.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="l",
        help="numbers of leading layers that are kept apart, one row each (default: the paper's: "
        "0 3 6 8 12 of 14, 0 6 10 13 19 of 20; for other depths 0 and the nearest to those "
        "fractions of 14)",
    )
    p.add_argument(
        "--alpha",
        type=_edges.alpha_of,
        default=0.5,
        help="weight of the second network in all averages, the ensemble's too; the first has "
        "1 - ALPHA",
    )
    p.add_argument(
        "--pairs",
        type=_common.count_of("pairs"),
        default=1,
        help="number of pairs of edge models; with more than one, cells hold mean and standard "
        "deviation over the pairs; three models make three pairs",
    )
    p.add_argument(
        "--samples",
        type=_samples,
        metavar="N|all",
        default=SAMPLES,
        help="statistics images: the first N of the training split, not augmented, in batches of "
        "500",
    )
    _common.folder_options(p)
    return p


def default_layers(depth: int) -> list[int]:
    """The numbers of preserved layers that the table has a row for.

    Example:
      >>> default_layers(20), default_layers(7)
      ([0, 6, 10, 13, 19], [0, 2, 3, 4, 6])
    """
    nearest = {min(int(layers / 14 * depth + 0.5), depth - 1) for layers in LAYERS[14]}
    return list(LAYERS.get(depth, sorted(nearest)))


# ------------------------------------------------------------------------------------- one pair


@jax.jit
def _crossing(merged: merge.Merged, x: jax.Array) -> vfjax.Crossing:
    """What the stems hand to the trunk."""
    return merged.crossing(x)


def columns_of(net: vfjax.Network, match: str) -> list[str]:
    """The columns of the table: the paper's table 1, or 7 and 8 for networks with BatchNorm."""
    repaired = ["reset"] if net.norms else ["repair", "rescale", "bias_calibration"]
    return ["direct", *(["matched"] if match != "none" else []), *repaired]


class Pair:
    """Two edge models, aligned; measures the cells of their table."""

    def __init__(
        self,
        net: vfjax.Network,
        trees: Sequence[PyTree],
        args: argparse.Namespace,
        statistics: data.Batches,
        test: data.Batches,
        watch: _common.Stopwatch,
    ) -> None:
        self.net, self.originals, self.test, self.statistics = net, list(trees), test, statistics
        self.weights = (1 - args.alpha, args.alpha)
        self.match: dict[str, Any] = {"method": args.match}
        # One pass over the statistics images serves the matching and the goals of every REPAIR and
        # RESCALE: moments of the aligned networks are those of the originals, carried along.
        matching = args.match == "activation"
        moments = None
        if matching or not net.norms:
            with watch("statistics of edge models"):
                moments = stats.moments(
                    net,
                    self.originals,
                    _common.Watched(statistics, "statistics of edge models"),
                    sites="taps" if net.norms else "paper",
                    covariance="cross" if matching else False,
                )
        permutations: dict[str, Any] = {}
        with watch("matching"):
            if matching:
                found = align.match_moments(net, moments)
            elif args.match == "weight":
                found = align.match_weights(net, *self.originals, key=jax.random.key(0))
            if args.match != "none":
                permutations = dict(found.permutations)
                self.match |= {
                    "objective": [float(value) for value in found.objective],
                    "converged": found.converged,
                    "moved": found.moved,
                }
            self.aligned = [self.originals[0], net.spec.permute(self.originals[1], permutations)]
        self.references = None if moments is None else moments.carried([None, permutations])

    def evaluate(self, merged: merge.Merged, batches: Any, description: str) -> dict[str, float]:
        """Accuracy and loss on the test images, or on what they are at the cut."""
        found = train.evaluate(_edges.forward, merged, _common.Watched(batches, description))
        return {"accuracy": found.accuracy, "loss": found.loss}

    def edges(self) -> dict[str, dict[str, float]]:
        """Both models and their ensemble."""
        found = {}
        for index, tree in enumerate(self.originals, start=1):
            merged = merge.as_merged(self.net, tree, weights=self.weights)
            found[f"model {index}"] = self.evaluate(merged, self.test, f"model {index}")
        merged = merge.ensemble(self.net, self.originals, self.weights)
        found["ensemble"] = self.evaluate(merged, self.test, "ensemble")
        return found

    def merged(self, layers: int, *, aligned: bool) -> merge.Merged:
        """PFM `layers`/L before any renormalisation."""
        trees = self.aligned if aligned else self.originals
        return merge.preserve_first(self.net, trees, layers=layers, weights=self.weights)

    def renormalised(self, column: str, merged: merge.Merged, statistics: Any) -> merge.Merged:
        """What the column's name says."""
        net = self.net
        if column == "matched":
            return merged
        if column == "bias_calibration":
            return renorm.calibrate_bias(net, merged, references=self.aligned)
        if column == "reset":
            return renorm.reset(net, merged, statistics)
        function = renorm.repair if column == "repair" else renorm.rescale
        return function(net, merged, statistics, references=self.references)

    def row(self, layers: int, columns: Sequence[str], bar: tqdm) -> dict[str, dict[str, float]]:
        """The cells of PFM `layers`/L."""
        aligned = self.merged(layers, aligned=True)
        test = self.at_cut(aligned, self.test) if len(columns) > 1 else self.test
        statistics: Any = self.statistics
        if {"repair", "rescale"} <= set(columns):
            statistics = self.at_cut(aligned, self.statistics, labelled=False)
        cells = {}
        for column in columns:
            description = f"PFM {layers}/{self.net.depth} {LABELS[column]}"
            bar.set_description(description)
            if column == "direct":
                merged = self.merged(layers, aligned=False)
            else:
                merged = self.renormalised(column, aligned, statistics)
            # What is stored at the cut serves all that have the very same stems.
            batches = test if merged.stems is aligned.stems else self.test
            cells[column] = self.evaluate(merged, batches, description)
            bar.update()
        return cells

    def at_cut(self, merged: merge.Merged, batches: data.Batches, *, labelled: bool = True) -> Any:
        """The batches as they cross the cut, if there is one and memory allows; else as given."""
        if merged.cut == 0:
            return batches
        x, _ = next(iter(batches))
        crossing = jax.eval_shape(merged.crossing, x)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(crossing))
        if size * len(batches) > STORE:
            return batches
        watched = _common.Watched(batches, f"first {merged.cut} layers")
        stored = [(_crossing(merged, x), label) for x, label in watched]
        return stored if labelled else [crossing for crossing, _ in stored]


# ------------------------------------------------------------------------------ record and table


def cell(values: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One cell of the record, from one measurement per pair."""
    accuracy = [value["accuracy"] for value in values]
    mean, spread = _common.mean_std(accuracy)
    loss = [value["loss"] for value in values]
    return {"mean": mean, "std": spread, "accuracy": accuracy, "loss": loss}


def rows_of(
    net: vfjax.Network,
    edges: Sequence[dict[str, dict[str, float]]],
    rows: Sequence[dict[int, dict[str, dict[str, float]]]],
    costs: dict[int, tuple[int, int]],
) -> list[dict[str, Any]]:
    """All rows of the record: models, ensemble, PFM."""

    def row(name: str, layers: int | None, cost: tuple[int, int], cells: Any) -> dict[str, Any]:
        params, flops = cost
        return {
            "name": name,
            "layers": layers,
            "params": params,
            "params_ratio": params / net.parameters,
            "flops": flops,
            "flops_ratio": flops / net.flops,
            "cells": cells,
        }

    found = []
    for name in edges[0]:
        cost = costs[net.depth] if name == "ensemble" else (net.parameters, net.flops)
        found.append(row(name, None, cost, {"direct": cell([pair[name] for pair in edges])}))
    for layers, cells in rows[0].items():
        merged = {column: cell([pair[layers][column] for pair in rows]) for column in cells}
        found.append(row(f"PFM {layers}/{net.depth}", layers, costs[layers], merged))
    return found


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    """Where the merged models reach the edge models' mean, by column."""
    accuracy = {row["name"]: row["cells"]["direct"]["mean"] for row in record["rows"][:3]}
    edge = (accuracy["model 1"] + accuracy["model 2"]) / 2
    merged = [row for row in record["rows"] if row["layers"] is not None]
    reached = {
        column: next((r["layers"] for r in merged if r["cells"][column]["mean"] >= edge), None)
        for column in record["columns"]
    }
    return {"edge_mean": edge, "ensemble": accuracy["ensemble"], "reaches_edges_at": reached}


def title_of(record: dict[str, Any]) -> str:
    """The table's title: data, models, matching, statistics."""
    config, source = record["config"], record["data"]
    match = "no matching" if config["match"] == "none" else f"{config['match']} matching"
    images = source["statistics_images"]
    parts = [
        _edges.networks(record),
        match,
        f"statistics over {images:,} image{'' if images == 1 else 's'}",
    ]
    if config["alpha"] != 0.5:
        parts.insert(2, f"alpha {config['alpha']:g}")
    if len(record["pairs"]) > 1:
        parts.append(f"mean ± standard deviation over {len(record['pairs'])} pairs")
    return ", ".join(parts)


def table_of(record: dict[str, Any], mark: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table; `mark` goes around what reaches the edge models' mean."""
    header = ["test accuracy, %", *(LABELS[column] for column in record["columns"])]
    header += ["params, M", "ratio", "FLOPs, G", "ratio"]
    lines = []
    for row in record["rows"]:
        line = [row["name"]]
        for column in record["columns"]:
            found = row["cells"].get(column)
            text = "" if found is None else _common.percent(found["accuracy"])
            good = row["layers"] is not None and found is not None
            if good and found["mean"] >= record["summary"]["edge_mean"]:
                text = mark[0] + text + mark[1]
            line.append(text)
        line += [f"{row['params'] / 1e6:.3g}", f"{row['params_ratio']:.3g}"]
        line += [f"{row['flops'] / 1e9:.3g}", f"{row['flops_ratio']:.3g}"]
        lines.append(line)
    return header, lines


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy against l, edge models and ensemble as lines."""
    merged = [row for row in record["rows"] if row["layers"] is not None]
    others = [row for row in record["rows"] if row["layers"] is None]
    by_column = {
        key: {
            LABELS[column]: [row["cells"][column][key] for row in merged]
            for column in record["columns"]
        }
        for key in ("mean", "std")
    }
    return plot.accuracy_against_layers(
        [row["layers"] for row in merged],
        by_column["mean"],
        depth=record["model"]["depth"],
        lines={row["name"]: row["cells"]["direct"]["mean"] for row in others},
        errors=by_column["std"],
        title=record["title"],
    )


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    parts += [config["match"]] if config["match"] != "activation" else []
    if config["layers"] != default_layers(record["model"]["depth"]):
        parts += ["layers" + "+".join(map(str, config["layers"]))]
    parts += [f"alpha{config['alpha']:g}"] if config["alpha"] != 0.5 else []
    parts += [f"{config['pairs']}pairs"] if config["pairs"] != 1 else []
    parts += [f"samples{config['samples']}"] if config["samples"] != SAMPLES else []
    return _edges.file_name(record, parts)


# ----------------------------------------------------------------------------------------- main


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    # Three models make three pairs: the smallest number of models that makes enough.
    count = next(k for k in itertools.count(2) if k * (k - 1) // 2 >= args.pairs)
    by_second = sorted(itertools.combinations(range(count), 2), key=lambda pair: pair[::-1])
    pairs = by_second[: args.pairs]
    watch = _common.Stopwatch()
    models = _edges.found(args, watch, count=count, train=args.samples)
    net, trees = models.net, models.trees
    layers = default_layers(net.depth) if args.layers is None else args.layers
    wrong = [number for number in layers if not 0 <= number <= net.depth]
    if wrong:
        raise _common.UserError(f"--layers must be from 0 to L = {net.depth}, got {wrong[0]}.")
    layers = sorted(set(layers))
    columns = columns_of(net, args.match)
    statistics, test = models.batches("train", args.samples), models.batches("test", None)
    edges, rows, matches, costs = [], [], [], {}
    total = len(pairs) * len(layers) * len(columns)
    with tqdm(total=total, unit="cell", leave=False) as bar:
        for first, second in pairs:
            bar.set_description(f"matching models {first} and {second}")
            pair = Pair(net, [trees[first], trees[second]], args, statistics, test, watch)
            matches.append({"models": [first, second], "matching": pair.match})
            bar.set_description("edge models")
            with watch("edge models and ensemble"):
                edges.append(pair.edges())
            rows.append({})
            for number in layers:
                with watch(f"PFM {number}/{net.depth}"):
                    rows[-1][number] = pair.row(number, columns, bar)
            for number in (*layers, net.depth):
                merged = pair.merged(number, aligned=True)
                costs[number] = merged.params, merged.flops

    config = vars(args) | {"model": models.arch.name, "width": models.arch.width, "layers": layers}
    config["samples"] = "all" if args.samples is None else args.samples
    record: dict[str, Any] = {
        "experiment": "cifar_pfm",
        "command": command,
        "config": config,
        **models.record(statistics, test),
        "seeds": {"edge_models": models.seeds, "matching": 0},
        "pairs": matches,
        "columns": columns,
        "rows": rows_of(net, edges, rows, costs),
    }
    record["summary"] = summary_of(record)
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def show(record: dict[str, Any]) -> None:
    """Prints the table and what it comes to."""
    mark, name = (("[bold green]", "[/]"), "green") if _common.coloured() else (("*", ""), "*")
    header, lines = table_of(record, mark)
    summary = record["summary"]
    edge = f"{100 * summary['edge_mean']:.2f}"
    _common.print_table(
        record["title"],
        header,
        lines,
        caption=f"{name}: at or above the mean of the edge models, {edge}",
    )
    for column, layers in summary["reaches_edges_at"].items():
        where = "at none of these l" if layers is None else f"first at l = {layers}"
        print(f"{LABELS[column]} reaches the edge models' mean {where}")


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
