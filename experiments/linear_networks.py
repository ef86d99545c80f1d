"""Do features vanish in averaged linear networks, and does rescaling weights bring them back?

    python experiments/linear_networks.py                        # MNIST, five pairs
    python experiments/linear_networks.py --dataset digits       # needs no data
    python experiments/linear_networks.py --seeds 0 1            # one pair

Two linear networks of 8 layers, 784-32-...-32-10 with biases, that differ in their random seed are
trained with the paper's recipe (Adam at 0.01, 5 epochs, weights of standard deviation 0.002 at the
start) and averaged. The output of layer l is g(x) + h, what the input causes and the offset f(0).

The paper ("Vanishing Feature"): g fades from layer to layer in the midpoint, while h grows and
overtakes it in the last layers, so that the accuracy is at chance (one run of its notebook, per
cent: networks 85.8, direct 8.9, after weight matching 16.1, after activation matching 53.8).
Weights are smaller than in the two networks. Rescaling largely removes the fading.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from kit import claims, figures, grid, tables
from kit.claims import Claim, Decision
from kit.experiment import Run
from kit.records import Record, Row

import vfjax
from vfjax import align, diagnose, merge, models, train

MODEL = models.LinearNetwork(width=32, depth=8, std=0.002)
LABELS = {"direct": "direct", "weight": "weights matched", "activation": "activations matched"}
EDGES = ("model 1", "model 2")
QUANTITIES = ("feature", "feature_std", "offset")


def layers_of(net: vfjax.Network, tree: Any, test: Any) -> Iterator[Row]:
    """By layer g and h, mean absolute values of its parameters, and the stable rank of its weights.

    That is the sum of squared singular values over the largest of them.
    """
    found = diagnose.features(net, [tree], test, sites="layers")
    for layer, site in enumerate(found.names, start=1):
        params = tree["params"][site.split("/")[-2]]
        squares = np.linalg.svd(params["kernel"], compute_uv=False) ** 2
        numbers = {key: getattr(found, key)[site][0] for key in QUANTITIES}
        numbers |= {
            "weight": np.abs(params["kernel"]).mean(),
            "bias": np.abs(params["bias"]).mean(),
        }
        numbers["stable_rank"] = squares.sum() / squares[0]
        yield {"layer": layer, "site": site} | {key: float(x) for key, x in numbers.items()}


def measure(config: Any, run: Run) -> Iterator[Row]:
    """Features, offsets, weights and accuracies, of edge models and midpoints."""
    work = run.setup
    net, pairs = work.nets["plain"], range(len(work.pairs))

    def midpoint(match: str, k: int, first: Any, second: Any) -> Any:
        if match != "direct":
            if match == "weight":
                seed = jax.random.key(work.pairs[k][0])
                found = align.match_weights(net, first, second, key=seed)
            else:
                found = align.match_activations(net, first, second, work.statistics)
            run.note("matching", pair=k, match=match, converged=found.converged, moved=found.moved)
            second = net.spec.permute(second, found.permutations)
        return merge.interpolate([first, second])

    for cell in run.cells({"pair": k, "network": n} for k in pairs for n in (*EDGES, *LABELS)):
        k, name = cell.values()
        trained = dict(zip(EDGES, work.trained("plain", k), strict=True))
        edges, factors, more = [one.variables for one in trained.values()], {}, {}
        if name in EDGES:
            tree = trained[name].variables
            more = {"train_accuracy": trained[name].history[-1]["accuracy"]}
        else:
            with run.watch("matching"):
                tree = midpoint(name, k, *edges)
            # By how much smaller averaging made the weights, the product over layers.
            factors = diagnose.rescale_product(net, tree, edges)
        with run.watch("features"):
            for row in layers_of(net, tree, run.watched(work.test, "features")):
                if factors:
                    row["rescaled_feature"] = row["feature"] * factors[row["site"]]
                yield cell | row
        with run.watch("accuracies"):
            found = train.evaluate(models.apply_fn(MODEL), tree, work.test)
        yield cell | {"accuracy": found.accuracy, "loss": found.loss} | more


def by_layer(record: Record, key: str, network: str | tuple[str, ...] = "direct") -> np.ndarray:
    """A number of each layer, the mean over pairs."""
    return np.array(record.rows.curve("layer", key, network=network)[1])


def left(record: Record, key: str = "feature", of: str = "feature") -> np.ndarray:
    """What the midpoint has of something, relative to what edge models have, by layer."""
    return by_layer(record, key) / by_layer(record, of, EDGES)


def at_the_end(record: Record) -> np.ndarray:
    return np.array([left(record, key)[-1] for key in ("feature", "rescaled_feature")])


def rescaled(ends: np.ndarray) -> bool:
    """Whether about as much as is lost is brought back, in logarithms."""
    lost, still_lost = -np.log(ends)
    return 0.5 < (lost - still_lost) / lost < 1.5


def claim(
    name: str, text: str, paper: str, by: str, what: str, of: Any, holds: Callable[..., Any]
) -> Claim:
    """A claim on some numbers, the means over pairs."""

    def rule(record: Record) -> Decision:
        values = of(record)
        return bool(holds(values)), f"{what}: {', '.join(f'{value:.2g}' for value in values)}"

    by, rule = f"{by} (means over pairs)", partial(grid.over_pairs, rule=rule)
    return Claim(f"vf.linear.{name}", text, paper, rule, by=by)


CLAIMS = [
    claim("fades", "features fade from layer to layer in the midpoint", "it fades",
          "to less than a tenth from the first layer to the last",
          "g over the edge models', by layer", left, lambda found: found[-1] < 0.1 * found[0]),
    claim("offset-grows", "offsets grow from layer to layer in the midpoint", "it grows",
          "larger at the last layer than at the first",
          "h by layer", partial(by_layer, key="offset"), lambda found: found[-1] > found[0]),
    claim("overtakes", "offsets overtake features in the last layers", "it overtakes",
          "h is larger than g from some layer after the first on, to the end", "g / h by layer",
          lambda record: by_layer(record, "feature") / by_layer(record, "offset"),
          lambda found: found[-1] < 1 <= max(found)),
    Claim("vf.linear.near-chance", "direct midpoints are at chance", "8.9 of 85.8 in its notebook",
          claims.AtChance(claims.accuracy("direct midpoint", network="direct"), claims.NEAR)),
    claim("weights-smaller", "weights are smaller in the midpoint than in the edge models",
          "they are smaller", "in every layer", "over the edge models', by layer",
          partial(left, key="weight", of="weight"), lambda found: max(found) < 1),
    claim("weights-rise", "weights rise again in the final layers", "they rise",
          "their mean magnitude is least in a layer after the first, before the last", "by layer",
          partial(by_layer, key="weight"), lambda found: 0 < np.argmin(found) < len(found) - 1),
    claim("rescaled", "rescaling largely removes the fading", "it does largely",
          "more than half of it, in logarithms, and no more than one and a half times it",
          "g over the edge models' at the last layer, and rescaled", at_the_end, rescaled),
]  # fmt: skip


def finding_of(record: Record) -> str:
    left, rescaled = 100 * at_the_end(record)
    text = f"Of the edge models' g {left:.1f}% are left at the last layer of midpoints"
    return f"{text}, rescaled {rescaled:.0f}%"


def tables_of(record: Record) -> list[tables.Table]:
    names = {**dict(zip(EDGES, EDGES, strict=True)), **LABELS}
    lines = {text: {"network": name} for name, text in names.items()}
    last, square = {"layer": MODEL.depth}, {"layer": tuple(range(2, MODEL.depth))}
    columns = [
        tables.Column("test accuracy, %"),
        tables.Column("g, last layer", last, "feature", tables.number()),
        tables.Column("h, last layer", last, "offset", tables.number()),
        tables.Column("g rescaled", last, "rescaled_feature", tables.number()),
        tables.Column("stable rank of square matrices", square, "stable_rank", tables.number()),
    ]
    return [tables.pivot(record.rows, lines, columns, title=record["title"], corner="network")]


def figure_of(record: Record) -> Any:
    """Features and offsets, sizes of parameters, and features rescaled: the paper's panels."""

    def lines(what: str, key: str, colour: int) -> list[figures.Line]:
        return [
            figures.line(record.rows, "layer", key, name=f"{what}, {of}", method=colour, scale=1,
                         dashed=network == EDGES, network=network)
            for of, network in (("midpoint", "direct"), ("edge models", EDGES))
        ]  # fmt: skip

    g, unit = lines("g", "feature", 0), "L2 norm over units (mean over images)"
    sizes = [*lines("weight size", "weight", 2), *lines("bias size", "bias", 3)]
    rescaled = lines("g rescaled", "rescaled_feature", 4)[:1]
    panels = (
        ("input-caused g, offset h", unit, [*g, *lines("h", "offset", 1)]),
        ("magnitude of parameters", "mean absolute value", sizes),
        ("g rescaled by smaller weights", unit, [*g, *rescaled]),
    )
    row = [figures.Panel(title, "layer", y, shown, log=True) for title, y, shown in panels]
    return figures.of_record(record, row, bars=grid.bars(record))


LEGEND = """g: mean norm over test images of what the input causes, f(x) - f(0); h: of the offset
f(0). g rescaled: g times the product over layers of how much smaller averaging made the weights.
The figure is of direct midpoints; the record holds the same numbers after permuting units of the
second network to match weights or activations (of 10,000 training images). Why rescaling can fall
short: the mean magnitude of the average of two unlike matrices falls to about 0.7 of theirs. But if
each passes on few directions (its rank is low) and they share none, averaging halves what is passed
on, at every layer."""
EXPERIMENT = grid.linear(
    train.RECIPES["paper-linear-8"], {"plain": MODEL}, name="linear_networks", doc=__doc__,
    measure=measure, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
