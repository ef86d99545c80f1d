"""Features vanish in averaged linear networks: the figure of "Vanishing Feature" on them.

    python experiments/linear_networks.py                        # MNIST, five pairs
    python experiments/linear_networks.py --dataset digits       # needs no data
    python experiments/linear_networks.py --seeds 0 1            # one pair

Two linear networks of 8 layers, 784-32-...-32-10 with biases, that differ in their random seed are
trained with the paper's recipe (Adam at 0.01, 5 epochs, weights of standard deviation 0.002 at the
start) and averaged. The output of layer l is g(x) + h, what the input causes and the offset f(0)
that the biases make. Shown are the mean norms of both, over all test images, in the midpoint and in
the edge models (mean of the two); the mean magnitudes of weights and biases; and g times the
product over layers of how much smaller averaging made the weights. All are means over several
pairs. Error bars are the standard deviation over images. The table also has the midpoints after
permuting units of the second network to match weights or activations (of 10,000 training images);
the record holds the same curves for these.

What the paper found: g fades from layer to layer in the midpoint, while h grows and overtakes it in
the last layers, so that the output hardly depends on the input and the accuracy is at chance (one
run of its notebook, per cent: networks 85.8, direct 8.9, after weight matching 16.1, after
activation matching 53.8). Weights are smaller than in the two networks, though they rise again in
the final layers. Rescaling largely removes the fading, which is taken here as: more than half of it
in logarithms.

Why it can fall short: the mean magnitude of the average of two unlike matrices falls to about 0.7
of theirs. But if each passes on few directions (its rank is low) and they share none, averaging
halves what is passed on, at every layer.

What came out here (MNIST: linear networks of 8 layers, 32 wide, mean of 5 pairs, 36 s on 2 CPU
cores): Edge models of 42.6 to 88.5, their midpoints direct 10.16 ± 1.41, weights matched 26.66 ±
12.93 and activations matched 39.42 ± 25.60. As in the paper: g of the midpoint is 0.71 times the
edge models' at layer 1 and 0.011 times at layer 8; its h goes from 0.21 to 3.3; h is larger than g
from layer 6 on (g / h at the end: 0.064); the midpoint is near chance; its weights are 0.71 to 0.79
times the edge models'; they are least at layer 2, and 2.5 times that at the last (edge models:
2.8). Unlike the paper: rescaled, g ends at 0.1 times the edge models' (stable ranks of their 32x32
matrices: 2.9 to 3.4), so 49% of the fading is undone, in logarithms (so in 3 of 5 pairs).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _linear
import jax
import numpy as np

import vfjax
from vfjax import align, data, diagnose, merge, models, plot, train

PyTree = Any
Curves = dict[str, dict[str, list[float]]]

MODEL = models.LinearNetwork(width=32, depth=8, std=0.002)
RECIPE = train.RECIPES["paper-linear-8"]
SEEDS = tuple(range(10))
EDGES = "edge models"
LABELS = {"direct": "direct", "weight": "weights matched", "activation": "activations matched"}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    return _linear.parser("linear_networks", __doc__, seeds=SEEDS, epochs=RECIPE.epochs)


# ------------------------------------------------------------------------------------- one pair


def midpoints(
    net: vfjax.Network, trees: Sequence[PyTree], statistics: data.Batches, seed: int
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """The average of two networks, as they are and matched; and how matching went."""
    first, second = trees
    found = {
        "weight": align.match_weights(net, first, second, key=jax.random.key(seed)),
        "activation": align.match_activations(net, first, second, statistics),
    }
    averages = {"direct": merge.interpolate([first, second])}
    for name, alignment in found.items():
        moved = net.spec.permute(second, alignment.permutations)
        averages[name] = merge.interpolate([first, moved])
    matching = {
        name: {"converged": alignment.converged, "moved": alignment.moved, "seed": seed}
        for name, alignment in found.items()
    }
    return averages, matching


def parameters(net: vfjax.Network, tree: PyTree) -> dict[str, list[float]]:
    """Of each layer, mean absolute values of weights and biases, and the weights' stable rank.

    That is the sum of squared singular values over the largest of them.
    """
    params = [tree["params"][layer.kernel.split("/")[-2]] for layer in net.layers]
    return {
        "weight": [float(np.abs(p["kernel"]).mean()) for p in params],
        "bias": [float(np.abs(p["bias"]).mean()) for p in params],
        "stable_rank": [
            float((np.linalg.norm(p["kernel"]) / np.linalg.norm(p["kernel"], 2)) ** 2)
            for p in params
        ],
    }


def curves_of(
    net: vfjax.Network,
    averages: Mapping[str, PyTree],
    trees: Sequence[PyTree],
    test: Any,
) -> Curves:
    """By network and quantity, one value for each layer."""
    merged = list(averages.values())
    found = diagnose.features(net, merged, test, references=trees, sites="layers")
    quantities = ("feature", "feature_std", "offset")
    curves: Curves = {}
    for index, (name, tree) in enumerate(averages.items()):
        curve = {q: [float(getattr(found, q)[s][index]) for s in found.names] for q in quantities}
        product = diagnose.rescale_product(net, tree, trees)
        curve["rescale_product"] = [product[site] for site in found.names]
        pairs = zip(curve["feature"], curve["rescale_product"], strict=True)
        curve["rescaled_feature"] = [feature * factor for feature, factor in pairs]
        curves[name] = curve | parameters(net, tree)
    edges = {
        q: [float(np.mean(getattr(found.references, q)[s])) for s in found.names]
        for q in quantities
    }
    curves[EDGES] = edges | mean_of([parameters(net, tree) for tree in trees])
    return curves


def mean_of(dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of equal dictionaries of lists, or of dictionaries of such.

    Example:
      >>> mean_of([{"a": [1.0, 2.0]}, {"a": [3.0, 4.0]}])
      {'a': [2.0, 3.0]}
    """
    found = {}
    for key, value in dicts[0].items():
        nested = isinstance(value, Mapping)
        each = [d[key] for d in dicts]
        found[key] = mean_of(each) if nested else np.mean(each, axis=0).tolist()
    return found


# ------------------------------------------------------------------------------ record and figure


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    pairs = _linear.pairs_of(args)
    watch = _common.Stopwatch()
    with watch("data"):
        dataset = _linear.load(args)
    recipe = _linear.recipe_of(args, RECIPE, dataset)
    with watch("trace"):
        net = _linear.trace(MODEL, dataset)
    statistics = dataset.batches("train", batch_size=_linear.BATCH, samples=_linear.SAMPLES)
    test = dataset.batches("test", batch_size=_linear.BATCH)
    evaluated, measured = [], []
    for seeds in pairs:
        with watch("training"):
            runs = train.fit_seeds(MODEL, recipe, dataset, seeds=seeds)
            trees = [run.variables for run in runs]
        with watch("matching"):
            averages, matching = midpoints(net, trees, statistics, seeds[0])
        with watch("features"):
            curves = curves_of(net, averages, trees, _common.Watched(test, "features"))
        with watch("accuracies"):
            rows = {f"model {k}": tree for k, tree in enumerate(trees, start=1)} | averages
            function = models.apply_fn(MODEL)
            found = {name: train.evaluate(function, tree, test) for name, tree in rows.items()}
        evaluated.append({name: (f.accuracy, f.loss) for name, f in found.items()})
        measured.append(
            {
                "models": list(seeds),
                "matching": matching,
                "curves": curves,
                "train_accuracy": [run.history[-1]["accuracy"] for run in runs],
            }
        )
    record = _linear.record_of("linear_networks", args, command, dataset, recipe)
    record["model"] = _linear.model_record(MODEL, net)
    record["layers"] = [layer.name for layer in net.layers]
    record["pairs"] = measured
    record["curves"] = mean_of([pair["curves"] for pair in measured])
    record["accuracy"] = {name: [pair[name][0] for pair in evaluated] for name in evaluated[0]}
    record["loss"] = {name: [pair[name][1] for pair in evaluated] for name in evaluated[0]}
    record["title"] = _linear.titled(record, "linear networks of 8 layers, 32 wide")
    record["seconds"] = watch.record()
    return record | _common.environment()


def claims_of(curves: Curves, accuracy: Mapping[str, float]) -> list[tuple[bool, str]]:
    """Each claim of the paper: whether it holds here, and what was measured."""
    merged, edges = curves["direct"], curves[EDGES]
    g, h, rescaled, weight = (
        np.array(merged[key]) for key in ("feature", "offset", "rescaled_feature", "weight")
    )
    left, reached = g / edges["feature"], rescaled / edges["feature"]
    ranks = edges["stable_rank"][1:-1]
    undone = float(np.log(reached[-1] / left[-1]) / -np.log(left[-1]))
    smaller, last = weight / edges["weight"], len(g)
    # The first layer from which on h is larger, to the end.
    first = last - int(np.argmin([*(h > g)[::-1], False])) + 1
    overtakes = f"from layer {first} on" if first <= last else "not in the last layer"
    lowest = int(np.argmin(weight))
    return [
        (
            bool(left[-1] < 0.1 * left[0]),
            f"g of the midpoint is {left[0]:.2g} times the edge models' at layer 1 and "
            f"{left[-1]:.2g} times at layer {last}",
        ),
        (bool(h[-1] > h[0]), f"its h goes from {h[0]:.2g} to {h[-1]:.2g}"),
        (
            1 < first <= last,
            f"h is larger than g {overtakes} (g / h at the end: {g[-1] / h[-1]:.2g})",
        ),
        (accuracy["direct"] < 0.2, "the midpoint is near chance"),
        (
            bool((smaller < 1).all()),
            f"its weights are {smaller.min():.2g} to {smaller.max():.2g} times the edge models'",
        ),
        (
            1 <= lowest < last - 1,
            f"they are least at layer {lowest + 1}, and {weight[-1] / weight[lowest]:.2g} times "
            f"that at the last (edge models: {edges['weight'][-1] / edges['weight'][lowest]:.2g})",
        ),
        (
            0.5 < undone < 1.5,
            f"rescaled, g ends at {reached[-1]:.2g} times the edge models' (stable ranks of their "
            f"32x32 matrices: {min(ranks):.1f} to {max(ranks):.1f}), so {100 * undone:.0f}% of the "
            "fading is undone, in logarithms",
        ),
    ]


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The accuracies in a sentence, and the paper's claims."""
    edges = [value for k in (1, 2) for value in record["accuracy"][f"model {k}"]]
    means = {name: float(np.mean(values)) for name, values in record["accuracy"].items()}
    by_pair = []
    for k, pair in enumerate(record["pairs"]):
        accuracy = {name: values[k] for name, values in record["accuracy"].items()}
        by_pair.append([holds for holds, _ in claims_of(pair["curves"], accuracy)])
    claims = []
    for (holds, text), each in zip(
        claims_of(record["curves"], means), zip(*by_pair, strict=True), strict=True
    ):
        if not all(value == holds for value in each):
            text += f" (so in {each.count(holds)} of {len(each)} pairs)"
        claims.append((holds, text))
    rows = [f"{LABELS[name]} {_common.percent(record['accuracy'][name])}" for name in LABELS]
    intro = f"Edge models of {100 * min(edges):.1f} to {100 * max(edges):.1f}, their midpoints "
    return f"{intro}{_common.joined(rows)}.", claims


def figure_of(record: dict[str, Any]) -> Any:
    """The paper's three panels."""
    layers = list(range(1, len(record["layers"]) + 1))
    merged, edges = record["curves"]["direct"], record["curves"][EDGES]

    def curve(values: dict[str, Any], what: str, colour: int, dashed: bool, bars: bool = False):
        error = values["feature_std"] if bars else None
        return plot.Curve(layers, values[what], error=error, colour=colour, dashed=dashed)

    norms = {
        "g, midpoint": curve(merged, "feature", 0, False, bars=True),
        "h, midpoint": curve(merged, "offset", 1, False),
        "g, edge models": curve(edges, "feature", 0, True, bars=True),
        "h, edge models": curve(edges, "offset", 1, True),
    }
    sizes = {
        "weights, midpoint": curve(merged, "weight", 2, False),
        "biases, midpoint": curve(merged, "bias", 3, False),
        "weights, edge models": curve(edges, "weight", 2, True),
        "biases, edge models": curve(edges, "bias", 3, True),
    }
    rescaled = {
        "g, midpoint": norms["g, midpoint"],
        "g rescaled, midpoint": curve(merged, "rescaled_feature", 4, False),
        "g, edge models": norms["g, edge models"],
    }
    x, unit = "layer", "L2 norm over units (mean, std over images)"
    row = [
        plot.Panel("input-caused g, offset h", x, unit, norms, log=True),
        plot.Panel("magnitude of parameters", x, "mean absolute value", sizes, log=True),
        plot.Panel("g rescaled by smaller weights", x, unit, rescaled, log=True),
    ]
    return plot.panels(row, title=record["title"] + ", direct midpoint")


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracies, and what is left of features at the end."""
    header = ["network", "test accuracy, %", "g, last layer", "h, last layer", "g rescaled"]
    rows = []
    for name, values in record["accuracy"].items():
        row = [LABELS.get(name, name), _common.percent(values)]
        curves = record["curves"].get(name, {})
        for quantity in ("feature", "offset", "rescaled_feature"):
            row.append(f"{curves[quantity][-1]:.3g}" if curves else "")
        rows.append(row)
    edges = record["curves"][EDGES]
    rows.append(
        ["mean of models", "", f"{edges['feature'][-1]:.3g}", f"{edges['offset'][-1]:.3g}", ""]
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
