"""Preserve-First Merging of two networks: the tables of "Vanishing Feature".

    python experiments/cifar_pfm.py                              # the shipped pair, CIFAR-10
    python experiments/cifar_pfm.py --pairs 3                    # mean and spread over three pairs
    python experiments/cifar_pfm.py --model resnet20             # BatchNorm: RESET, as in table 7
    python experiments/cifar_pfm.py --match zipit                # ZipIt!, as in table 6
    python experiments/cifar_pfm.py --match cca --model vgg16-bn # CCA and RESET, as in table 4
    python experiments/cifar_pfm.py --dataset digits             # seconds, needs no data
    python experiments/cifar_pfm.py --retrain --preset paper     # full width, 160 epochs, on a GPU

Edge models are loaded from `checkpoints/`. A run that needs more than are there stops before it
measures anything and names the command of `train_edges.py` that trains the missing ones.

Two networks that differ in their random seed are averaged from layer l+1 on; their first l layers
are kept apart and their l-th pre-activations averaged ("PFM l/L"). l = 0 is ordinary merging, l = L
the logit ensemble. Columns say what else was done: nothing (direct), units of the second network
matched with those of the first (matched), and on top of that REPAIR, RESCALE or bias calibration,
or for networks with BatchNorm, RESET.

Units are permuted (by activations or weights), merged in groups that may come from one network
(ZipIt!), combined linearly (CCA), or sent in parts (optimal transport; between networks of one
width the exact plans are permutations). The layers that are kept apart stay as they are; what
crosses to the merged ones is mapped, and parameters and FLOPs of a matching include its map. REPAIR
and RESCALE restore the moments of the two networks' own features after the maps. Beside ZipIt!, CCA
and transport the columns AM show activation matching in the same run.

The variances that a BatchNorm stores are unknown for units that are mixed, so that without RESET
there is nothing to evaluate: a dash stands there, where the paper has chance. The library mixes
units in the scale that they have behind a norm, where they were matched; the paper mixes kernels
and scales apart.

What the paper found (tables 1 and 7; full width, 160 epochs, mean of 3 pairs, per cent): VGG16
models of 91.9 and 91.7, ensemble 92.9. At l = 0 direct averaging is at chance (10.0), matching
gives 46.5, with RESCALE 84.7; at l = 8 RESCALE passes the edge models (92.4 at 1.2 times the
parameters and 1.67 times the FLOPs), at l = 12 it equals the ensemble. ResNet20 with RESET: 64.1 at
l = 0, and the ensemble at l = 19.

With CCA (tables 3 and 4) VGG16 has 81.9 at l = 0 without any normalisation, but with RESCALE, 83.1,
no more than activation matching; REPAIR lowers it to 57.7. VGG16-BN with RESET has 91.2 where
activation matching has 89.9, is ahead at every l, and passes the ensemble at l = 12.

With ZipIt! (tables 6 to 9 and 11) VGG16 is a little lower than with activation matching at l = 0
(42.6), much higher with REPAIR (67.9 against 39.1) and equal with RESCALE (84.7). VGG16-BN with
RESET is equal to activation matching at every l (89.6 at l = 0), ResNet20 lower (62.2 at l = 0) and
below the edge models even at l = 19. On CIFAR-100 (tables 9 to 11, --dataset cifar100, for which no
edge models are shipped) all is lower, and l = 12 is needed to pass the edge models.

What came out here (CIFAR-10, vgg16 at 0.25 of the width, 160 s on 2 CPU cores): Models of 84.2 and
84.1, ensemble 85.7. At l = 0: direct 10.0, matched 13.6, REPAIR 72.9, RESCALE 70.7 and bias cal.
41.6, so REPAIR leads. The edge models' mean, 84.15, is first reached by matched, REPAIR and RESCALE
at l = 12 (1.84 times the parameters, 1.97 the FLOPs), by direct and bias cal. at none of these l.
In the paper, at full width and with weight decay 1e-4 (here 5e-4), RESCALE leads, REPAIR is below
matching alone, and bias calibration is next to RESCALE: matched 46.5, REPAIR 39.1, RESCALE 84.7 and
bias cal. 82.9 at l = 0; 91.2, 87.4, 92.4 and 91.8 at l = 8, with edge models of 91.8. (It, too,
finds REPAIR reliable at large weight decay.)

What came out here (CIFAR-10: vgg16-bn at 0.125 of the width, CCA, statistics over 10,000 images,
232 s on 2 CPU cores): Models of 80.0 and 80.4, ensemble 82.2. At l = 0: direct 10.0, RESET 64.6, AM
16.4 and AM + RESET 59.4. The edge models' mean, 80.18, is first reached by RESET, AM and AM + RESET
at l = 12 and by direct at none of these l. As in the paper: at l = 0 CCA with RESET gives 64.6,
activation matching with RESET 59.4; CCA with RESET gives 64.6 (l = 0), 70.6 (l = 3), 75.7 (l = 6),
79.2 (l = 8) and 81.9 (l = 12), activation matching 59.4 (l = 0), 64.6 (l = 3), 72.0 (l = 6), 76.9
(l = 8) and 82.1 (l = 12); at l = 12 it has 81.9, the ensemble 82.2. Unlike the paper: CCA with
RESET reaches the edge models' mean, 80.2, first at l = 12.

What came out here (CIFAR-10: vgg16 at 0.25 of the width, CCA, statistics over 10,000 images, 377 s
on 2 CPU cores): Models of 84.2 and 84.1, ensemble 85.7. At l = 0: direct 10.0, matched 65.5, REPAIR
71.8, RESCALE 67.6, bias cal. 55.7, AM 13.6, AM + REPAIR 72.9 and AM + RESCALE 70.7. The edge
models' mean, 84.15, is first reached by matched, REPAIR, RESCALE, bias cal., AM, AM + REPAIR and AM
+ RESCALE at l = 12 and by direct at none of these l. As in the paper: at l = 0 and without
normalisation CCA gives 65.5, activation matching 13.6; at l = 12 it has 85.5, the ensemble 85.7.
Unlike the paper: of what is done to CCA, REPAIR leads at l = 0; REPAIR takes CCA from 65.5 to 71.8;
with RESCALE CCA gives 67.6, activation matching 70.7; CCA with RESCALE reaches the edge models'
mean, 84.1, first at l = 12.

What came out here (CIFAR-10: vgg16 at 0.25 of the width, ZipIt!, statistics over 10,000 images, 447
s on 2 CPU cores): Models of 84.2 and 84.1, ensemble 85.7. At l = 0: direct 10.0, matched 17.3,
REPAIR 72.4, RESCALE 70.0, bias cal. 46.2, AM 13.6, AM + REPAIR 72.9 and AM + RESCALE 70.7. The edge
models' mean, 84.15, is first reached by matched, REPAIR, RESCALE, AM, AM + REPAIR and AM + RESCALE
at l = 12 and by direct and bias cal. at none of these l. As in the paper: ZipIt! with RESCALE gives
70.0 (l = 0), 75.0 (l = 3), 79.5 (l = 6), 83.7 (l = 8) and 85.6 (l = 12), activation matching 70.7
(l = 0), 76.4 (l = 3), 80.5 (l = 6), 83.2 (l = 8) and 85.5 (l = 12); at l = 12 it has 85.6, the
ensemble 85.7. Unlike the paper: at l = 0 and without normalisation ZipIt! gives 17.3, activation
matching 13.6; of what is done to ZipIt!, REPAIR leads at l = 0; with REPAIR ZipIt! gives 72.4,
activation matching 72.9; ZipIt! with RESCALE reaches the edge models' mean, 84.1, first at l = 12.

What came out here (CIFAR-10: vgg16-bn at 0.125 of the width, ZipIt!, statistics over 10,000 images,
132 s on 2 CPU cores): Models of 80.0 and 80.4, ensemble 82.2. At l = 0: direct 10.0, RESET 59.1, AM
16.4 and AM + RESET 59.4. The edge models' mean, 80.18, is first reached by RESET, AM and AM + RESET
at l = 12 and by direct at none of these l. As in the paper: ZipIt! with RESET gives 59.1 (l = 0),
64.2 (l = 3), 72.2 (l = 6), 77.2 (l = 8) and 81.8 (l = 12), activation matching 59.4 (l = 0), 64.6
(l = 3), 72.0 (l = 6), 76.9 (l = 8) and 82.1 (l = 12); at l = 12 it has 81.8, the ensemble 82.2.
Unlike the paper: ZipIt! with RESET reaches the edge models' mean, 80.2, first at l = 12.

What came out here (CIFAR-10: resnet20 at 0.5 of the width, ZipIt!, statistics over 10,000 images,
271 s on 2 CPU cores): Models of 84.1 and 83.5, ensemble 85.5. At l = 0: direct 10.6, RESET 58.3, AM
10.0 and AM + RESET 58.5. The edge models' mean, 83.78, is first reached by RESET, AM and AM + RESET
at l = 19 and by direct at none of these l. Unlike the paper: ZipIt! with RESET gives 58.3 (l = 0),
60.3 (l = 6), 70.0 (l = 10), 73.5 (l = 13) and 85.1 (l = 19), activation matching 58.5 (l = 0), 63.7
(l = 6), 70.1 (l = 10), 73.0 (l = 13) and 85.0 (l = 19); ZipIt! with RESET reaches the edge models'
mean, 83.8, first at l = 19.

What came out here (CIFAR-10: vgg16 at 0.25 of the width, optimal transport, statistics over 10,000
images, 508 s on 2 CPU cores): Models of 84.2 and 84.1, ensemble 85.7. At l = 0: direct 10.0,
matched 10.5, REPAIR 72.5, RESCALE 69.9, bias cal. 37.7, AM 13.6, AM + REPAIR 72.9 and AM + RESCALE
70.7. The edge models' mean, 84.15, is first reached by matched, REPAIR, RESCALE, AM, AM + REPAIR
and AM + RESCALE at l = 12 and by direct and bias cal. at none of these l. Not in the paper: optimal
transport with RESCALE gives 69.9 (l = 0), 75.0 (l = 3), 78.9 (l = 6), 81.9 (l = 8) and 85.5 (l =
12), activation matching 70.7 (l = 0), 76.4 (l = 3), 80.5 (l = 6), 83.2 (l = 8) and 85.5 (l = 12).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import _pairs
from _tables import LABELS, claims_of, mean_of
from tqdm import tqdm

import vfjax
from vfjax import plot

PyTree = Any
Cost = dict[str, Any]

# l by L, from tables 1 and 7 of the paper; other depths take the fractions of L = 14.
LAYERS = {14: (0, 3, 6, 8, 12), 20: (0, 6, 10, 13, 19)}
SAMPLES = 10_000
# Of curves in two panels; no network has all of them.
COLOURS = {"direct": 0, "matched": 1, "REPAIR": 2, "RESET": 2, "RESCALE": 3}
COLOURS |= {"bias cal.": 4}


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
        choices=tuple(_pairs.MATCHES),
        help="how units of the second network are matched with those of the first: permuted, by "
        "the correlation of their activations or by their weights, or not at all; or by "
        "activations with ZipIt!, canonical correlation analysis or optimal transport, beside "
        "which the run shows activation matching",
    )
    _pairs.matching_options(p)
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


def columns_of(net: vfjax.Network, match: str) -> list[str]:
    """The columns of the table: the paper's table 1, or 7 and 8 for networks with BatchNorm."""
    repaired = ["reset"] if net.norms else ["repair", "rescale", "bias_calibration"]
    columns = ["direct", *(["matched"] if match != "none" else []), *repaired]
    if match in _pairs.MIXING:
        columns += ["am", *(f"am_{remedy}" for remedy in repaired if f"am_{remedy}" in LABELS)]
    return columns


def parts_of(column: str, match: str) -> tuple[str, str | None]:
    """The matching of a column, and what is done to the merged network.

    Example:
      >>> parts_of("reset", "cca"), parts_of("am_reset", "cca"), parts_of("direct", "cca")
      (('cca', 'reset'), ('activation', 'reset'), ('none', None))
    """
    if column == "direct":
        return "none", None
    first, _, remedy = column.partition("_")
    if first == "am":
        return "activation", remedy or None
    return match, None if column == "matched" else column


class Rows:
    """Measures the cells of a pair's table, one row after another."""

    def __init__(
        self,
        pair: _pairs.Pair,
        matchings: Mapping[str, _pairs.Matching],
        match: str,
        columns: Sequence[str],
    ) -> None:
        self.pair, self.matchings, self.match, self.columns = pair, matchings, match, columns

    def row(self, layers: int, bar: tqdm) -> dict[str, dict[str, float] | None]:
        """The cells of PFM `layers`/L; None for a network that lacks statistics it needs."""
        cells: dict[str, dict[str, float] | None] = {}
        parts = {column: parts_of(column, self.match) for column in self.columns}
        for match in dict.fromkeys(match for match, _ in parts.values()):
            wanted = {column: remedy for column, (of, remedy) in parts.items() if of == match}
            cells |= self.cells(layers, match, wanted, bar)
        return {column: cells[column] for column in self.columns}

    def cells(
        self, layers: int, match: str, wanted: Mapping[str, str | None], bar: tqdm
    ) -> dict[str, dict[str, float] | None]:
        """The cells of one matching."""
        pair, matching = self.pair, self.matchings[match]
        merged = pair.merged(matching, slice(layers, None))
        test = _pairs.at_cut(merged, pair.test) if len(wanted) > 1 else pair.test
        statistics: Any = pair.statistics
        if {"repair", "rescale"} <= set(wanted.values()):
            statistics = _pairs.at_cut(merged, pair.statistics, labelled=False)
        cells: dict[str, dict[str, float] | None] = {}
        for column, remedy in wanted.items():
            description = f"PFM {layers}/{pair.net.depth} {LABELS[column]}"
            bar.set_description(description)
            if remedy is None and pair.lacks_variances(matching, merged):
                cells[column] = None
            else:
                found = pair.renormalised(remedy, matching, merged, statistics)
                # What is stored at the cut serves all that have the very same stems.
                batches = test if found.stems is merged.stems else pair.test
                cells[column] = pair.evaluate(found, batches, description)
            bar.update()
        return cells


# ------------------------------------------------------------------------------ record and table


def cell(values: Sequence[dict[str, float] | None]) -> dict[str, Any] | None:
    """One cell of the record, from one measurement per pair; None where there is none."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    accuracy = [value["accuracy"] for value in values]
    mean, spread = _common.mean_std(accuracy)
    loss = [value["loss"] for value in values]
    return {"mean": mean, "std": spread, "accuracy": accuracy, "loss": loss}


def rows_of(
    net: vfjax.Network,
    edges: Sequence[dict[str, dict[str, float]]],
    rows: Sequence[dict[int, dict[str, dict[str, float] | None]]],
    costs: Mapping[int, Mapping[str, Cost]],
    match: str,
) -> list[dict[str, Any]]:
    """All rows of the record: models, ensemble, PFM; costs by l and matching, and of `match`."""
    found = []
    for name in edges[0]:
        cost = costs[net.depth][match]
        cost = cost if name == "ensemble" else cost_of(net, net.parameters, net.flops)
        cells = {"direct": cell([pair[name] for pair in edges])}
        found.append({"name": name, "layers": None, **cost, "cells": cells})
    for layers, cells in rows[0].items():
        merged = {column: cell([pair[layers][column] for pair in rows]) for column in cells}
        row = {"name": f"PFM {layers}/{net.depth}", "layers": layers, **costs[layers][match]}
        found.append({**row, "costs": dict(costs[layers]), "cells": merged})
    return found


def cost_of(net: vfjax.Network, params: int, flops: int) -> Cost:
    """Parameters and FLOPs of a network, and relative to one model's."""
    ratios = params / net.parameters, flops / net.flops
    return {"params": params, "params_ratio": ratios[0], "flops": flops, "flops_ratio": ratios[1]}


def shown_cost(record: Mapping[str, Any], row: Mapping[str, Any], column: str) -> Cost | None:
    """What a cell of a row costs; None where an older record does not say."""
    match = record["config"]["match"]
    method, _ = parts_of(column, match)
    # Models and ensemble have no map, and a permutation costs nothing.
    if row["layers"] is None or method == match or match not in _pairs.MIXING:
        return dict(row)
    return row.get("costs", {}).get(method)


def measured(record: Mapping[str, Any]) -> list[str]:
    """The columns that have a number in some row of merged models."""
    merged = [row["cells"] for row in record["rows"] if row["layers"] is not None]
    return [column for column in record["columns"] if any(cells[column] for cells in merged)]


def reached_at(record: Mapping[str, Any]) -> dict[str, int | None]:
    """Where the merged models first reach the edge models' mean, by column that was measured."""
    found = record["summary"]["reaches_edges_at"]
    return {column: found[column] for column in measured(record)}


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    """Where the merged models reach the edge models' mean, by column."""
    accuracy = {row["name"]: row["cells"]["direct"]["mean"] for row in record["rows"][:3]}
    edge = (accuracy["model 1"] + accuracy["model 2"]) / 2
    merged = [row for row in record["rows"] if row["layers"] is not None]
    reached = {
        column: next((r["layers"] for r in merged if mean_of(r, column) >= edge), None)
        for column in measured(record)
    }
    return {"edge_mean": edge, "ensemble": accuracy["ensemble"], "reaches_edges_at": reached}


def title_of(record: dict[str, Any]) -> str:
    """The table's title: data, models, matching, statistics."""
    config, source = record["config"], record["data"]
    images = source["statistics_images"]
    parts = [
        _edges.networks(record),
        _pairs.title_of(config["match"], config),
        f"statistics over {images:,} image{'' if images == 1 else 's'}",
    ]
    if config["alpha"] != 0.5:
        parts.insert(2, f"alpha {config['alpha']:g}")
    if len(record["pairs"]) > 1:
        parts.append(f"mean ± standard deviation over {len(record['pairs'])} pairs")
    return ", ".join(parts)


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """What was measured in sentences, and the paper's claims on ZipIt!, CCA and transport."""
    accuracy = {row["name"]: 100 * mean_of(row, "direct") for row in record["rows"][:3]}
    first = next(row for row in record["rows"] if row["layers"] is not None)
    given = [
        f"{LABELS[column]} {100 * mean_of(first, column):.1f}"
        for column in record["columns"]
        if first["cells"][column] is not None
    ]
    reached: dict[int | None, list[str]] = {}
    for column, layers in reached_at(record).items():
        reached.setdefault(layers, []).append(LABELS[column])
    where = [
        f"by {_common.joined(names)} at " + ("none of these l" if at is None else f"l = {at}")
        for at, names in sorted(reached.items(), key=lambda item: (item[0] is None, item[0] or 0))
    ]
    intro = (
        f"Models of {accuracy['model 1']:.1f} and {accuracy['model 2']:.1f}, ensemble "
        f"{accuracy['ensemble']:.1f}. At l = {first['layers']}: {_common.joined(given)}. The edge "
        f"models' mean, {100 * record['summary']['edge_mean']:.2f}, is first reached "
        f"{_common.joined(where) if set(reached) != {None} else 'by no column at these l'}."
    )
    return intro, claims_of(record)


def table_of(
    record: dict[str, Any], mark: tuple[str, str], columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table; `mark` goes around what reaches the edge models' mean.

    Args:
      record: The record.
      mark: What goes before and after such a cell.
      columns: Those to show, None for all. Costs are those of the last one.
    """
    columns = record["columns"] if columns is None else columns
    header = ["test accuracy, %", *(LABELS[column] for column in columns)]
    header += ["params, M", "ratio", "FLOPs, G", "ratio"]
    lines = []
    for row in record["rows"]:
        line = [row["name"]]
        for place, column in enumerate(columns):
            # What has no columns of its own stands in the first.
            name = "direct" if row["layers"] is None and not place else column
            found = row["cells"].get(name)
            empty = "-" if name in row["cells"] else ""
            text = empty if found is None else _common.percent(found["accuracy"])
            good = row["layers"] is not None and found is not None
            if good and found["mean"] >= record["summary"]["edge_mean"]:
                text = mark[0] + text + mark[1]
            line.append(text)
        cost = shown_cost(record, row, columns[-1])
        if cost is None:
            line += [""] * 4
        else:
            line += [f"{cost['params'] / 1e6:.3g}", f"{cost['params_ratio']:.3g}"]
            line += [f"{cost['flops'] / 1e9:.3g}", f"{cost['flops_ratio']:.3g}"]
        lines.append(line)
    return header, lines


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy against l, edge models and ensemble as lines; activation matching beside."""
    merged = [row for row in record["rows"] if row["layers"] is not None]
    others = [row for row in record["rows"] if row["layers"] is None]
    layers, depth = [row["layers"] for row in merged], record["model"]["depth"]
    drawn = measured(record)
    means = {column: [mean_of(row, column) for row in merged] for column in drawn}
    spreads = {
        column: [
            0.0 if row["cells"][column] is None else row["cells"][column]["std"] for row in merged
        ]
        for column in drawn
    }
    lines = {row["name"]: row["cells"]["direct"]["mean"] for row in others}
    beside = [column for column in drawn if column.startswith("am")]
    if not beside:
        return plot.accuracy_against_layers(
            layers,
            {LABELS[column]: means[column] for column in drawn},
            depth=depth,
            lines=lines,
            errors={LABELS[column]: spreads[column] for column in drawn},
            title=record["title"],
        )
    found = []
    for match, columns in (
        (record["config"]["match"], [column for column in drawn if column not in beside]),
        ("activation", ["direct", *beside]),
    ):
        curves = {}
        for column in columns:
            remedy = parts_of(column, match)[1] or ("direct" if column == "direct" else "matched")
            label = LABELS[remedy]
            # Of no matching, so in both panels.
            name = "direct (no matching)" if column == "direct" else label
            curves[name] = plot.Curve(
                layers,
                [100 * value for value in means[column]],
                error=[100 * value for value in spreads[column]]
                if len(record["pairs"]) > 1
                else None,
                colour=COLOURS[label],
            )
        title = _pairs.title_of(match, record["config"])
        if "matched" not in drawn and match == record["config"]["match"]:
            title += " (matched alone: no variances to evaluate with)"
        edge = record["summary"]["edge_mean"]
        for colour, (name, value) in (
            (6, ("edge models' mean", edge)),
            (5, ("ensemble", lines["ensemble"])),
        ):
            curves[name] = plot.Curve(
                [0, layers[-1]], [100 * value] * 2, colour=colour, dashed=True
            )
        found.append(
            plot.Panel(
                title,
                f"layers kept apart l (of L = {depth})",
                "test accuracy (%)",
                curves,
                y_limits=(0, 101),
            )
        )
    return plot.panels(found, title=record["title"])


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    match = config["match"]
    parts += [_pairs.name_of(match, config)] if match != "activation" else []
    if config["layers"] != default_layers(record["model"]["depth"]):
        parts += ["layers" + "+".join(map(str, config["layers"]))]
    parts += [f"alpha{config['alpha']:g}"] if config["alpha"] != 0.5 else []
    parts += [f"{config['pairs']}pairs"] if config["pairs"] != 1 else []
    parts += [f"samples{config['samples']}"] if config["samples"] != SAMPLES else []
    return _edges.file_name(record, parts)


# ----------------------------------------------------------------------------------------- main


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    _pairs.check(args, [args.match])
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
    methods = list(dict.fromkeys(parts_of(column, args.match)[0] for column in columns))
    statistics, test = models.batches("train", args.samples), models.batches("test", None)
    edges, rows, matches, costs = [], [], [], {}
    total = len(pairs) * len(layers) * len(columns)
    with tqdm(total=total, unit="cell", leave=False) as bar:
        for chosen in pairs:
            bar.set_description(f"matching models {chosen[0]} and {chosen[1]}")
            with watch("statistics of edge models"):
                pair = _pairs.Pair(
                    net,
                    [trees[k] for k in chosen],
                    (1 - args.alpha, args.alpha),
                    statistics,
                    test,
                    methods,
                )
            with watch("matching"):
                matchings = {method: pair.matching(method, vars(args)) for method in methods}
            matches.append({"models": list(chosen), "matching": matchings[args.match].record})
            bar.set_description("edge models")
            with watch("edge models and ensemble"):
                edges.append(pair.edges())
            measured = Rows(pair, matchings, args.match, columns)
            rows.append({})
            for number in layers:
                with watch(f"PFM {number}/{net.depth}"):
                    rows[-1][number] = measured.row(number, bar)
            for number in (*layers, net.depth):
                costs[number] = {}
                for method, matching in matchings.items():
                    merged = pair.merged(matching, slice(number, None))
                    costs[number][method] = cost_of(net, merged.params, merged.flops)

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
        "rows": rows_of(net, edges, rows, costs, args.match),
    }
    record["summary"] = summary_of(record)
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def tables_of(record: Mapping[str, Any]) -> list[list[str]]:
    """The columns of each table: those of one cost, for one table would be too wide besides."""
    columns = record["columns"]
    # Permutations cost as little as nothing done.
    beside = [column for column in columns if column == "direct" or column.startswith("am")]
    if record["config"]["match"] not in _pairs.MIXING:
        return [columns]
    return [[column for column in columns if column not in beside], beside]


def show(record: dict[str, Any]) -> None:
    """Prints the table and what it comes to."""
    mark, name = (("[bold green]", "[/]"), "green") if _common.coloured() else (("*", ""), "*")
    summary = record["summary"]
    caption = f"{name}: at or above the mean of the edge models, {100 * summary['edge_mean']:.2f}"
    for columns in tables_of(record):
        header, lines = table_of(record, mark, columns)
        title = record["title"]
        if "am" in columns:
            title += ": activation matching beside it"
        _common.print_table(title, header, lines, caption=caption)
    for column, layers in reached_at(record).items():
        where = "at none of these l" if layers is None else f"first at l = {layers}"
        print(f"{LABELS[column]} reaches the edge models' mean {where}")
    if record["config"]["match"] in _pairs.MIXING:
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
