"""Do features vanish in averaged linear networks, and does rescaling weights bring them back?

    python experiments/linear_networks.py                        # MNIST, five pairs
    python experiments/linear_networks.py --dataset digits       # needs no data
    python experiments/linear_networks.py --seeds 0 1            # one pair

Two linear networks of 8 layers, 784-32-...-32-10 with biases, that differ in their random seed are
trained with the paper's recipe (Adam at 0.01, 5 epochs, weights of standard deviation 0.002 at the
start) and averaged. The output of layer l is g(x) + h, what the input causes and the offset f(0)
that the biases make.

The paper ("Vanishing Feature"): g fades from layer to layer in the midpoint, while h grows and
overtakes it in the last layers, so that the output hardly depends on the input and the accuracy is
at chance (one run of its notebook, per cent: networks 85.8, direct 8.9, after weight matching 16.1,
after activation matching 53.8). Weights are smaller than in the two networks, though they rise
again in the final layers. Rescaling largely removes the fading.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from kit import figures, grid, tables
from kit.experiment import Experiment, Run
from kit.records import Record, Row
from papers.linear_networks import CLAIMS, EDGES, left, overtakes_at

import vfjax
from vfjax import align, diagnose, merge, models, train

PyTree = Any

MODEL = models.LinearNetwork(width=32, depth=8, std=0.002)
RECIPE = train.RECIPES["paper-linear-8"]
LABELS = {"direct": "direct", "weight": "weights matched", "activation": "activations matched"}
QUANTITIES = ("feature", "feature_std", "offset")


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(grid.LinearOptions):
    seeds: tuple[int, ...] = grid.seeds(range(10))
# fmt: on


def parameters(net: vfjax.Network, tree: PyTree) -> dict[str, list[float]]:
    """Of each layer, mean absolute values of weights and biases, and the weights' stable rank.

    That is the sum of squared singular values over the largest of them.
    """
    params = [tree["params"][layer.kernel.split("/")[-2]] for layer in net.layers]
    norms = [(np.linalg.norm(p["kernel"]), np.linalg.norm(p["kernel"], 2)) for p in params]
    return {
        "weight": [float(np.abs(p["kernel"]).mean()) for p in params],
        "bias": [float(np.abs(p["bias"]).mean()) for p in params],
        "stable_rank": [float((whole / largest) ** 2) for whole, largest in norms],
    }


def layers_of(
    net: vfjax.Network, trees: Sequence[PyTree], test: Any, edges: Sequence[PyTree] = ()
) -> Iterator[Row]:
    """Numbers of every layer, the mean of some networks; of a midpoint also g rescaled.

    `edges` are what a midpoint is one of: g is multiplied with the product over layers of how much
    smaller averaging made the weights.
    """
    found = diagnose.features(net, list(trees), test, sites="layers")
    each = [parameters(net, tree) for tree in trees]
    factors = diagnose.rescale_product(net, trees[0], edges) if edges else {}
    for place, site in enumerate(found.names):
        row: Row = {"layer": place + 1, "site": site}
        row |= {key: float(np.mean(getattr(found, key)[site])) for key in QUANTITIES}
        if edges:
            row["rescale_product"] = factors[site]
            row["rescaled_feature"] = row["feature"] * factors[site]
        yield row | {key: float(np.mean([one[key][place] for one in each])) for key in each[0]}


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Features, offsets, weights and accuracies, of edge models and midpoints."""
    work: grid.Linear = run.setup
    net, test = work.nets["plain"], work.batches("test")

    @functools.lru_cache(maxsize=1)
    def trained(k: int) -> list[train.Trained]:
        with run.watch("training"):
            return train.fit_seeds(MODEL, work.recipe, work.dataset, seeds=work.pairs[k])

    def midpoint(k: int, match: str, first: PyTree, second: PyTree) -> PyTree:
        if match == "direct":
            return merge.interpolate([first, second])
        seed = work.pairs[k][0]
        if match == "weight":
            found = align.match_weights(net, first, second, key=jax.random.key(seed))
        else:
            found = align.match_activations(net, first, second, work.batches("train"))
        how = {"converged": found.converged, "moved": found.moved, "seed": seed}
        run.note("matching", pair=k, match=match, **how)
        return merge.interpolate([first, net.spec.permute(second, found.permutations)])

    plan = [{"pair": k, "network": n} for k in range(len(work.pairs)) for n in (EDGES, *LABELS)]
    for cell in run.cells(plan):
        k, name = cell["pair"], cell["network"]
        runs = trained(k)
        edges = [one.variables for one in runs]
        rows = {f"model {n}": {"train_accuracy": one.history[-1]["accuracy"]}
                for n, one in enumerate(runs, start=1)}  # fmt: skip
        networks = edges
        if name != EDGES:
            with run.watch("matching"):
                networks, rows = [midpoint(k, name, *edges)], {name: {}}
        with run.watch("features"):
            watched = run.watched(test, "features")
            for row in layers_of(net, networks, watched, () if name == EDGES else edges):
                yield cell | row
        for (one, more), tree in zip(rows.items(), networks, strict=True):
            with run.watch("accuracies"):
                found = train.evaluate(models.apply_fn(MODEL), tree, test)
            yield cell | {"network": one, "accuracy": found.accuracy, "loss": found.loss} | more


def title_of(record: Record) -> str:
    what = f"linear networks of {MODEL.depth} layers, {MODEL.width} wide"
    return grid.titled(record, what, len(record.rows.distinct("pair")))


def finding_of(record: Record) -> str:
    found, rescaled = left(record), left(record, "rescaled_feature")
    first = overtakes_at(record)
    where = f"from layer {first} on" if first <= len(found) else "not in the last layer"
    text = f"Of the edge models' g {100 * found[-1]:.1f}% are left at the last layer of midpoints"
    return f"{text}, where h is larger {where}; rescaled {100 * rescaled[-1]:.0f}%"


def tables_of(record: Record) -> list[tables.Table]:
    last, number = {"layer": max(record.rows.distinct("layer"))}, tables.number()
    lines = {name: {"network": name} for name in ("model 1", "model 2")}
    lines |= {text: {"network": name} for name, text in LABELS.items()}
    lines["mean of models"] = {"network": EDGES}
    columns = [
        tables.Column("test accuracy, %"),
        tables.Column("g, last layer", last, "feature", number),
        tables.Column("h, last layer", last, "offset", number),
        tables.Column("g rescaled", last, "rescaled_feature", number),
    ]
    return [tables.pivot(record.rows, lines, columns, title=record["title"], corner="network")]


def figure_of(record: Record) -> Any:
    """Features and offsets, sizes of parameters, and features rescaled: the paper's panels."""

    def line(what: str, key: str, network: str, colour: int, bars: bool = False) -> figures.Line:
        rows = record.rows.where(network=network)
        x, y, _ = rows.curve("layer", key)
        error = rows.curve("layer", "feature_std")[1] if bars else None
        name = f"{what}, {'midpoint' if network == 'direct' else network}"
        return figures.Line(name, x, y, error, colour, dashed=network == EDGES)

    g, of = [line("g", "feature", n, 0, bars=True) for n in ("direct", EDGES)], ("direct", EDGES)
    h = [line("h", "offset", name, 1) for name in of]
    sizes = [line(f"{key} size", key, name, colour)
             for colour, key in ((2, "weight"), (3, "bias")) for name in of]  # fmt: skip
    x, unit = "layer", "L2 norm over units (mean over images)"
    rescaled = [*g, line("g rescaled", "rescaled_feature", "direct", 4)]
    row = [
        figures.Panel("input-caused g, offset h", x, unit, [*g, *h], log=True),
        figures.Panel("magnitude of parameters", x, "mean absolute value", sizes, log=True),
        figures.Panel("g rescaled by smaller weights", x, unit, rescaled, log=True),
    ]
    return figures.draw(row, finding=record["finding"], bars="standard deviation over test images",
                        subtitle=f"{record['title']}, direct midpoint")  # fmt: skip


LEGEND = """g: mean norm over test images of what the input causes, f(x) - f(0); h: of the offset
f(0). g rescaled: g times the product over layers of how much smaller averaging made the weights.
The record holds the same numbers after permuting units of the second network to match weights or
activations (of 10,000 training images). Why rescaling can fall short: the mean magnitude of the
average of two unlike matrices falls to about 0.7 of theirs. But if each passes on few directions
(its rank is low) and they share none, averaging halves what is passed on, at every layer."""
EXPERIMENT = Experiment(
    name="linear_networks", doc=__doc__, options=Config, measure=measure,
    prepare=grid.linear(RECIPE, {"plain": MODEL}), title=title_of, finding=finding_of,
    figure=figure_of, tables=tables_of, claims=CLAIMS, legend=LEGEND, stem=grid.stem,
    untold=lambda record: record["config"]["quick"])  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
