"""Matching the first l layers only: what each further layer adds, after "Vanishing Feature".

    python experiments/permute_first_layers.py                      # VGG16, the shipped pair
    python experiments/permute_first_layers.py --model resnet20     # BatchNorm: RESET
    python experiments/permute_first_layers.py --dataset digits     # seconds, needs no data
    python experiments/permute_first_layers.py --retrain --preset paper    # full width, on a GPU

Edge models are found as by `cifar_pfm.py`: two shipped ones that differ in their random seed.

Units of the second network are permuted to match those of the first in its first l layers only; the
two are then averaged. Shown is the test accuracy of the average against l, from 0 (direct) to L
(everything matched), for weight matching and for activation matching, without normalisation and
with REPAIR and RESCALE, or for networks with BatchNorm with RESET. Permuted or not, the second
network computes the same function.

The matching is done once, in full, and the permutations of the first l layers are taken from it.
For activations this is what matching these layers alone would give, for each layer's units are
matched by features of the networks as they are; for weights it is a part of the joint optimum, in
which later layers have a say. Statistics that REPAIR and RESCALE restore are measured once, too,
and carried through the permutations.

Layers count along the main path, as in cifar_pfm.py. In a residual stage several layers write the
same units, which can only be permuted together: they count as soon as the first of these layers is
among the first l, since from there on the stage's features are matched. Where a further layer
writes no units of its own the curve is flat; so it is at l = L, for the units of the last layer are
the classes, which keep their order.

What the paper found (left panel of its figure on Preserve-First Merging): accuracy rises with l
and saturates below the edge models. Taken here as: the rank correlation of accuracy and l is above
0.8, and accuracy is higher at L than at 0 by 5 points or more; the last third of the layers adds at
most a sixth of the whole rise, half of its even share; and no l reaches the edge models' mean.
Where accuracy hardly rises, as at chance, nothing of this holds.

What came out here (CIFAR-10: vgg16 at 0.25 of the width, midpoints, first l layers matched, 5,000
test images, 293 s on 2 CPU cores): Edge models of 84.3 and 83.6 (WM: weights matched; AM:
activations matched). As in the paper: from l = 0 to 14 accuracy goes from 22.3 to 62.6 (WM +
REPAIR; rank correlation 0.84), 15.0 to 58.5 (WM + RESCALE; rank correlation 1.00), 22.3 to 73.1 (AM
+ REPAIR; rank correlation 0.96) and 15.0 to 71.2 (AM + RESCALE; rank correlation 1.00); of the
rise, l = 10 to 14 adds 0.0 of 40.3 points (WM + REPAIR), 3.1 of 43.6 points (WM + RESCALE), 1.5 of
50.7 points (AM + REPAIR) and 6.1 of 56.2 points (AM + RESCALE); against 84.0, the edge models'
mean, the best are 16.4 at l = 13 (WM), 63.4 at l = 11 (WM + REPAIR), 58.5 at l = 13 (WM + RESCALE),
73.1 at l = 13 (AM + REPAIR) and 71.2 at l = 13 (AM + RESCALE). Unlike the paper: from l = 0 to 14
accuracy goes from 10.3 to 16.4 (WM; rank correlation 0.59) and 10.3 to 13.6 (AM; rank correlation
0.59); of the rise, l = 10 to 14 adds 6.1 of 6.1 points (WM) and 3.2 of 3.2 points (AM); against
84.0, the edge models' mean, the best are 13.6 at l = 13 (AM).

What came out here (CIFAR-10: resnet20 at 0.5 of the width, midpoints, first l layers matched, 5,000
test images, 312 s on 2 CPU cores): Edge models of 84.0 and 83.3 (WM: weights matched; AM:
activations matched). As in the paper: from l = 0 to 20 accuracy goes from 15.3 to 39.1 (WM + RESET;
rank correlation 0.94) and 15.3 to 57.3 (AM + RESET; rank correlation 0.98); against 83.7, the edge
models' mean, the best are 39.1 at l = 18 (WM + RESET) and 57.3 at l = 18 (AM + RESET). Unlike the
paper: from l = 0 to 20 accuracy goes from 10.3 to 12.1 (WM; rank correlation 0.91) and 10.3 to 9.5
(AM; rank correlation 0.46); of the rise, l = 14 to 20 adds 0.8 of 1.8 points (WM), 14.4 of 23.8
points (WM + RESET), -0.8 of -0.8 points (AM) and 29.0 of 42.0 points (AM + RESET); against 83.7,
the edge models' mean, the best are 13.6 at l = 15 (WM) and 12.4 at l = 10 (AM).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import jax
import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

import vfjax
from vfjax import align, data, merge, plot, renorm, stats, train

PyTree = Any

# Test and statistics images; None for all.
SAMPLES = {"cpu": 5_000, "paper": None}
MATCHES = {"weight": "weights matched", "activation": "activations matched"}
LABELS = {"none": "no normalisation", "repair": "REPAIR", "rescale": "RESCALE", "reset": "RESET"}
# In tables and sentences.
SHORT = {"weight": "WM", "activation": "AM"}
# When accuracy counts as rising with l, and up to which part of the rise may come last. Networks
# that stay at chance neither rise nor saturate.
LEAST = 0.05
CORRELATION = 0.8
LAST_PART = 1 / 6


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="permute_first_layers.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(p, examples="vgg16, vgg16-ln, resnet20, digits-mlp")
    p.add_argument(
        "--match",
        default="both",
        choices=(*MATCHES, "both"),
        help="how units of the second network are matched to those of the first",
    )
    p.add_argument(
        "--alpha",
        type=_edges.alpha_of,
        default=0.5,
        help="weight of the second network in the averages; the first has 1 - ALPHA",
    )
    p.add_argument(
        "--samples",
        type=_common.count_of("images"),
        metavar="N",
        help=f"test images, the first N (default: {SAMPLES['cpu']:,}; all with --preset paper)",
    )
    p.add_argument(
        "--statistics",
        type=_common.count_of("images"),
        metavar="N",
        help="training images, the first N, not augmented, for matching and renormalisation "
        f"(default: {SAMPLES['cpu']:,}; all with --preset paper)",
    )
    _common.folder_options(p)
    return p


# ------------------------------------------------------------------------------------- networks


def written_at(net: vfjax.Network) -> dict[str, int]:
    """By group of units, the depth of the first layer on the main path that writes it.

    A group that no layer on the main path writes comes last, with all layers.

    Example:
      >>> import jax.numpy as jnp
      >>> def apply_fn(v, x):
      ...     stream = x @ v["first"]
      ...     stream = stream + jax.nn.relu(stream @ v["inner"]) @ v["outer"]
      ...     return stream @ v["head"]
      >>> sizes = {"first": (2, 3), "inner": (3, 4), "outer": (4, 3), "head": (3, 2)}
      >>> tree = {name: jnp.ones(size) for name, size in sizes.items()}
      >>> written_at(vfjax.trace(apply_fn, tree, jnp.ones((1, 2))))
      {'first': 1, 'inner': 2}
    """
    main = [layer for layer in net.layers if layer.main]
    return {
        group: min(
            (
                layer.depth
                for layer in main
                if any(axis.role == "out" and axis.path == layer.kernel for axis in axes)
            ),
            default=net.depth,
        )
        for group, axes in net.spec.groups.items()
    }


def of_first(
    net: vfjax.Network, permutations: Mapping[str, np.ndarray], layers: int
) -> dict[str, np.ndarray]:
    """The permutations of units that the first `layers` layers write."""
    depths = written_at(net)
    return {group: p for group, p in permutations.items() if depths[group] <= layers}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two edge models, and their averages.

    Attributes:
      net: The traced network.
      trees: The two models, as they are.
      weights: Their weights in averages.
      statistics: Batches to renormalise on.
      test: Batches to test on.
      moments: Of the two models on the statistics batches; None if nothing needs them.
    """

    net: vfjax.Network
    trees: Sequence[PyTree]
    weights: tuple[float, float]
    statistics: data.Batches
    test: data.Batches
    moments: stats.Moments | None

    @property
    def columns(self) -> list[str]:
        """What averages are renormalised with."""
        return ["none", "reset"] if self.net.norms else ["none", "repair", "rescale"]

    def found(self, match: str) -> align.Alignment:
        """The full matching."""
        if match == "activation":
            return align.match_moments(self.net, self.moments)
        return align.match_weights(self.net, *self.trees, key=jax.random.key(0))

    def second(self, permutations: Mapping[str, Any]) -> PyTree:
        """The second model with some of its units permuted."""
        return self.net.spec.permute(self.trees[1], permutations)

    def evaluate(self, tree: PyTree | merge.Merged) -> dict[str, float]:
        """Accuracy and loss; one compiled function for all networks."""
        model = tree
        if not isinstance(tree, merge.Merged):
            # As what renormalisation returns, so that they share a compilation.
            model = merge.as_merged(self.net, tree, weights=self.weights)
        found = train.evaluate(_edges.forward, model, self.test)
        return {"accuracy": found.accuracy, "loss": found.loss}

    def cells(
        self, permutations: Mapping[str, Any], done: Callable[[], Any]
    ) -> dict[str, dict[str, float]]:
        """By column, accuracy and loss of the average; calls `done` after each."""
        average = merge.interpolate([self.trees[0], self.second(permutations)], self.weights)
        goals: dict[str, Any] = {}
        if self.moments is not None and not self.net.norms:
            moments = self.moments.carried([None, permutations])
            goals = {"references": moments, "weights": self.weights}
        cells = {}
        for column in self.columns:
            tree = average
            if column != "none":
                tree = getattr(renorm, column)(self.net, average, self.statistics, **goals)
            cells[column] = self.evaluate(tree)
            done()
        return cells


def pair_of(
    net: vfjax.Network,
    trees: Sequence[PyTree],
    matches: Sequence[str],
    alpha: float,
    statistics: data.Batches,
    test: data.Batches,
) -> Pair:
    """Measures the moments that matching, REPAIR and RESCALE need, in one pass."""
    moments = None
    if "activation" in matches or not net.norms:
        moments = stats.moments(
            net,
            trees,
            _common.Watched(statistics, "statistics of edge models"),
            sites="taps" if net.norms else "paper",
            covariance="cross" if "activation" in matches else False,
        )
    return Pair(net, trees, (1 - alpha, alpha), statistics, test, moments)


def curves_of(
    pair: Pair, matchings: Mapping[str, align.Alignment]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By matching and column, accuracy and loss for each l from 0 to L."""
    # Without covariances, which only the matching needed, moments are carried faster.
    if pair.moments is not None:
        pair = dataclasses.replace(pair, moments=dataclasses.replace(pair.moments, covariance=None))
    numbers = range(pair.net.depth + 1)
    wanted: dict[tuple[str, ...], Mapping[str, Any]] = {}
    places: dict[str, list[tuple[str, ...]]] = {}
    for match, found in matchings.items():
        places[match] = []
        for layers in numbers:
            chosen = of_first(pair.net, found.permutations, layers)
            # Without permutations all matchings are one; equal neighbours are measured once.
            key = (match, *chosen) if chosen else ()
            wanted[key] = chosen
            places[match].append(key)
    with tqdm(total=len(wanted) * len(pair.columns), unit="cell", leave=False) as bar:
        cells = {key: pair.cells(chosen, bar.update) for key, chosen in wanted.items()}
    return {
        match: {
            column: {
                quantity: [cells[key][column][quantity] for key in keys]
                for quantity in ("accuracy", "loss")
            }
            for column in pair.columns
        }
        for match, keys in places.items()
    }


# ------------------------------------------------------------------------------ record and figure


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    count = args.statistics or SAMPLES[args.preset]
    samples = args.samples or SAMPLES[args.preset]
    matches = list(MATCHES) if args.match == "both" else [args.match]
    watch = _common.Stopwatch()
    models = _edges.found(args, watch, train=count, test=samples)
    net, trees = models.net, models.trees
    statistics, test = models.batches("train", count), models.batches("test", samples)
    with watch("statistics of edge models"):
        pair = pair_of(net, trees, matches, args.alpha, statistics, test)
    with watch("matching"):
        matchings = {match: pair.found(match) for match in matches}
    with watch("edge models"):
        edges = {f"model {k}": pair.evaluate(tree) for k, tree in enumerate(trees, start=1)}
    with watch("averages"):
        curves = curves_of(pair, matchings)
    depths = written_at(net)
    numbers = range(net.depth + 1)
    record: dict[str, Any] = {
        "experiment": "permute_first_layers",
        "command": command,
        "config": vars(args) | {"model": models.arch.name, "width": models.arch.width},
        **models.record(statistics, test),
        "seeds": {"edge_models": models.seeds, "matching": 0},
        "matchings": {
            match: {
                "objective": [float(value) for value in found.objective],
                "converged": found.converged,
                "moved": found.moved,
            }
            for match, found in matchings.items()
        },
        "written_at": depths,
        "layers": list(numbers),
        "groups": [sum(depth <= number for depth in depths.values()) for number in numbers],
        "columns": pair.columns,
        "edges": edges,
        "edge_mean": float(np.dot(pair.weights, [edge["accuracy"] for edge in edges.values()])),
        "curves": curves,
    }
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def title_of(record: dict[str, Any]) -> str:
    """Data, models, what is averaged, images."""
    alpha, images = record["config"]["alpha"], record["data"]["test_images"]
    what = "midpoints" if alpha == 0.5 else f"averages at alpha {alpha:g}"
    return f"{_edges.networks(record)}, {what}, first l layers matched, {images:,} test images"


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy against l, a panel for each matching."""
    layers, mean = record["layers"], 100 * record["edge_mean"]
    row = []
    for match, found in record["curves"].items():
        curves = {
            LABELS[column]: plot.Curve(
                layers, [100 * value for value in found[column]["accuracy"]], colour=colour
            )
            for colour, column in enumerate(record["columns"])
        }
        curves["edge models' mean"] = plot.Curve([0, layers[-1]], [mean] * 2, colour=6, dashed=True)
        x_label = f"first layers matched, l (of L = {layers[-1]})"
        row.append(
            plot.Panel(MATCHES[match], x_label, "test accuracy (%)", curves, y_limits=(0, 101))
        )
    return plot.panels(row, title=record["title"])


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's rank correlation of values with their place; 0 if all are equal.

    Example:
      >>> rank_correlation([0.1, 0.2, 0.4]), rank_correlation([0.1, 0.1])
      (1.0, 0.0)
    """
    if len(set(values)) == 1:
        return 0.0
    return round(float(spearmanr(range(len(values)), values).statistic), 6)


def short(match: str, column: str) -> str:
    """The name of a curve.

    Example:
      >>> short("weight", "none"), short("activation", "repair")
      ('WM', 'AM + REPAIR')
    """
    return SHORT[match] + ("" if column == "none" else f" + {LABELS[column]}")


def claims_of(record: dict[str, Any]) -> list[tuple[bool, str]]:
    """Each claim of the paper: for which curves it holds here and for which not."""
    depth, edge = record["model"]["depth"], record["edge_mean"]
    late = depth - depth // 3
    rises, saturates, below = [], [], []
    for match, found in record["curves"].items():
        for column in record["columns"]:
            name = short(match, column)
            values = found[column]["accuracy"]
            rise, last = values[-1] - values[0], values[-1] - values[late]
            rank = rank_correlation(values)
            ends = f"{100 * values[0]:.1f} to {100 * values[-1]:.1f}"
            rises.append(
                (
                    rise > LEAST and rank > CORRELATION,
                    f"{ends} ({name}; rank correlation {rank:.2f})",
                )
            )
            saturates.append(
                (
                    rise > LEAST and last <= LAST_PART * rise,
                    f"{100 * last:.1f} of {100 * rise:.1f} points ({name})",
                )
            )
            best = int(np.argmax(values))
            at = f"{100 * values[best]:.1f} at l = {best} ({name})"
            below.append((rise > LEAST and values[best] < edge, at))
    claims = []
    for text, cases in (
        (f"from l = 0 to {depth} accuracy goes from", rises),
        (f"of the rise, l = {late} to {depth} adds", saturates),
        (f"against {100 * edge:.1f}, the edge models' mean, the best are", below),
    ):
        for holds in (True, False):
            which = [case for verdict, case in cases if verdict == holds]
            if which:
                claims.append((holds, f"{text} {_common.joined(which)}"))
    return claims


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The edge models in a sentence, and the paper's claims."""
    edges = _common.joined([f"{100 * edge['accuracy']:.1f}" for edge in record["edges"].values()])
    names = "; ".join([f"{SHORT[match]}: {MATCHES[match]}" for match in record["curves"]])
    return f"Edge models of {edges} ({names}).", claims_of(record)


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracies by l."""
    curves = [(match, column) for match in record["curves"] for column in record["columns"]]
    header = [
        "first layers matched, l",
        "groups",
        *(short(match, column) for match, column in curves),
    ]
    rows = []
    for layers, groups in zip(record["layers"], record["groups"], strict=True):
        cells = [
            _common.percent([record["curves"][match][column]["accuracy"][layers]])
            for match, column in curves
        ]
        rows.append([str(layers), str(groups), *cells])
    return header, rows


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    parts += [config["match"]] if config["match"] != "both" else []
    parts += [f"alpha{config['alpha']:g}"] if config["alpha"] != 0.5 else []
    for option in ("samples", "statistics"):
        if config[option] not in (None, SAMPLES[config["preset"]]):
            parts += [f"{option}{config[option]}"]
    return _edges.file_name(record, parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    caption = f"accuracy, %; groups of units matched; edge models: {100 * record['edge_mean']:.2f}"
    _common.print_table(record["title"], *table_of(record), caption=caption)
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
