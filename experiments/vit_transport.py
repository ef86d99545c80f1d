"""Does optimal transport bring vision transformers together, so that they can be merged in part?

    python experiments/vit_transport.py                      # the shipped pair, CIFAR-10
    python experiments/vit_transport.py --samples 200        # as few statistics images as OTFusion
    python experiments/vit_transport.py --dataset digits     # half a minute, needs no data
    python experiments/vit_transport.py --retrain --preset paper    # full size, on a GPU

The first k blocks of both networks are kept apart, with what comes before them, and their results
averaged; the rest is merged ("PFM k/B" of B blocks; k = 0 is full merging). Before, the units of
the second network (of the residual stream, hidden ones, heads, dimensions inside heads) were left
(direct), permuted to those of the first whose activations correlate best (AM), or sent to them by
transport plans of least distance between activations, exact (OT-acts) or by Sinkhorn's iteration,
which mixes units (soft), or of incoming weights (OT-weights). For the digits two small networks are
trained on the spot. Soft plans need a control: the softer, the more each unit becomes the mean of
all, up to the uniform plan, which matches nothing. How soft is chosen on held-out training images.

The paper ("Vanishing Feature", table 5; 12.4 million parameters, per cent): models of 93.3,
ensemble 93.4. At k = 0 direct averaging gives 7.6, transport 61.5; at k = 3 to 6 direct 28.5, 42.4,
71.3 and 89.4, transport 73.8, 85.0, 88.5 and 90.8.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from kit import cli, edges, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.records import Record, Row, networks
from kit.timing import Watched
from kit.transformers import MODELS, UNIFORM, kind_of, layers_of, maps_of, merged_of, only, prepare
from papers.vit_transport import CLAIMS, KINDS, LABELS, chosen, column, edge_mean, label_of

from vfjax import align, merge, stats, train

# Weights of the entropy, in parts of the mean distance: from next to exact to next to uniform.
REGULARIZATIONS = (0.02, 0.05, 0.1, 0.2)
EDGES = ("model 1", "model 2", "ensemble")


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(edges.EdgeOptions):
    model: tuple[str, float | None] | None = cli.option(
        None, f"architecture of the networks, {' or '.join(MODELS)}; WIDTH multiplies all channel "
        "counts (default: vit, as wide as the shipped ones; with --preset paper 1)",
        type=cli.model_of, metavar="NAME[-wWIDTH]")
    blocks: tuple[int, ...] | None = cli.option(
        None, "numbers of leading blocks that are kept apart, one row each (default: all)",
        type=int, nargs="+", metavar="k", part="blocks{}",
        usual=lambda record: [*range(record["model"]["blocks"] + 1)])
    regularization: float | None = cli.option(
        None, "weight of the entropy in soft plans, in parts of the mean distance (default: that "
        f"of {', '.join(map(str, REGULARIZATIONS))} which is best on held-out images)",
        type=cli.positive, metavar="R", part="regularization{:g}")
    samples: int = cli.sized(
        "statistics images: the first N of the training split, not augmented", "samples{}",
        2_000, 10_000)
    held_out: int = cli.sized(
        "training images after these, which the networks have seen, that choose how soft plans "
        "are; at most a fifth of a split that is too small for both", "heldout{}", 1_000, 2_000)
    test: int = cli.sized("test images, the first N", "test{}", 3_000, 10_000)
# fmt: on


def measure(config: Config, run: Run) -> Iterator[Row]:
    """How soft plans are to be; edge models and ensemble; each column, and kind of units, by k."""
    net, trees, images = run.setup.net, run.setup.trees, run.setup.images

    @functools.cache
    def moments() -> stats.Moments:
        batches = Watched(images.statistics, "statistics of edge models")
        with run.watch("statistics of edge models"):
            return stats.moments(net, trees, batches, sites="taps", covariance="cross")

    @functools.cache
    def maps() -> dict[str, align.Maps]:
        known = moments()
        with run.watch("matching"):
            return maps_of(net, trees, known)

    @functools.cache
    def plan_of(weight: float) -> align.Maps:
        if weight in (0, UNIFORM):
            return maps()["exact" if weight == 0 else "uniform"]
        known = moments()
        with run.watch("matching"):
            return align.transport_moments(net, known, regularization=weight)

    between = [config.regularization] if config.regularization else list(REGULARIZATIONS)
    names = ("network", "images", "blocks", "plan", "units", "weight")
    blocks, none = config.blocks or (), [None]
    weights = [0.0, *between, UNIFORM]
    cells = [*itertools.product(["PFM"], ["held_out"], blocks, ["entropy"], ["all"], weights)]
    cells += itertools.product(EDGES, ["test"], *[none] * 4)
    columns = [*((plan, "all") for plan in LABELS), *(("exact", kind) for kind in KINDS)]
    cells += [("PFM", "test", k, plan, units, None) for k in blocks for plan, units in columns]
    for cell in run.cells(dict(zip(names, one, strict=True)) for one in cells):
        network, which, k, plan, units, weight = cell.values()
        more: Row = {}
        if network != "PFM":
            stage, tree = "edge models and ensemble", trees[network == "model 2"]
            both = network == "ensemble"
            merged = merge.ensemble(net, trees) if both else merge.as_merged(net, tree)
            more = pairs.cost_of(net, *((1 + both) * one for one in (net.params, net.flops)))
        else:
            stage = "how soft" if weight is not None else f"PFM {k}/{blocks[-1]}"
            weight = chosen(run.rows) if plan == "soft" else weight
            found = maps()[plan] if weight is None else plan_of(weight)
            if units != "all":
                found = only(found, lambda group, kind=units: kind_of(net, group) == kind)
            merged = merged_of(net, trees, found, k)
            if plan == "direct":
                cost = pairs.cost_of(net, merged.params, merged.flops)
                more = {"layers": layers_of(k)} | cost
        with run.watch(stage):
            tested = train.evaluate(edges.forward, merged, getattr(images, which))
        yield cell | {"accuracy": tested.accuracy, "loss": tested.loss} | more


# Of the columns in figures.
LOOKS = {"direct": "direct", "permuted": "activation", "exact": "transport", "soft": 4}
LOOKS |= {"weights": "weight", "uniform": 5}


def title_of(record: Record) -> str:
    images = f"statistics over {record['data']['statistics_images']:,} images"
    return f"{networks(record)}, {images}, {record['data']['test_images']:,} test images"


def finding_of(record: Record) -> str:
    first = {plan: f"{100 * column(record, plan)[0]:.1f}%" for plan in LABELS}
    text = f"With k = {record['config']['blocks'][0]} blocks kept apart OT-acts has "
    text += f"{first['exact']}, soft {first['soft']}, direct averaging {first['direct']}; the "
    text += f"uniform plan, which matches nothing, {first['uniform']}, the edge models "
    return f"{text}{100 * edge_mean(record):.1f}%"


def tables_of(record: Record) -> list[tables.Table]:
    rows, edge = record.rows.where(images="test"), edge_mean(record)
    lines: dict[str, dict[str, Any]] = {name: {"network": name} for name in EDGES}
    count = record["model"]["blocks"]
    lines |= {f"PFM {k}/{count}": {"blocks": k} for k in record["config"]["blocks"]}
    columns = [tables.Column(label_of(record, p), {"plan": p, "units": "all"}) for p in LABELS]
    columns += tables.costs({"plan": "direct"}, digits=4, giga=False)
    caption = f"*: at or above the mean of the edge models, {100 * edge:.2f}"
    return [tables.marked(rows, lines, columns, edge, title=record["title"], caption=caption)]


def figure_of(record: Record) -> Any:
    """Accuracy against k: by column, with one kind of units matched alone, and by softness."""
    rows, held_out = record.rows.where(images="test"), record.rows.where(images="held_out")
    goals = {"edge models' mean": edge_mean(record), "ensemble": rows.mean(network="ensemble")}

    def line(plan: str) -> figures.Line:
        return figures.line(rows, "blocks", name=label_of(record, plan), method=LOOKS[plan],
                            dashed=plan == "uniform", plan=plan, units="all")  # fmt: skip

    units = [
        figures.line(rows, "blocks", name=f"{text} alone", method=at, plan="exact", units=kind)
        for at, (kind, text) in enumerate(KINDS.items(), start=1)
    ]
    named = {0.0: "exact", chosen(record.rows): "soft", UNIFORM: "uniform"}
    others = iter((0, 7, 9))
    soft = [
        figures.line(held_out, "blocks", weight=weight, dashed=plan == "uniform",
                     name=label_of(record, plan) if plan else f"soft ({weight:g})",
                     method=LOOKS[plan] if plan else next(others))
        for weight in held_out.distinct("weight") for plan in [named.get(weight)]
    ]  # fmt: skip
    x, limits = f"blocks kept apart, k (of {record['model']['blocks']})", {"y_limits": (0, 101)}
    levels, y = figures.levels(goals), "accuracy, held-out training images (%)"
    columns, some = [line(plan) for plan in LABELS], [line("direct"), *units, line("exact")]
    panels = [
        figures.Panel("by what was matched how", x, figures.ACCURACY, columns + levels, **limits),
        figures.Panel("exact plans of some units only", x, figures.ACCURACY, some + levels,
                      **limits),
        figures.Panel("weight of the plans' entropy", x, y, soft, **limits),
    ]  # fmt: skip
    return figures.of_record(record, panels)


LEGEND = """PFM k/B: the first k of B blocks kept apart, the others merged. AM: permuted by
activations. OT-acts: transported by activations, soft: with an entropy of the weight in brackets,
in parts of the mean distance; OT-weights: by incoming weights. The uniform plan matches nothing,
and what little remains of the second network hardly disturbs the first: only what is above it is
due to matching. Held-out images are training images, which the edge models have seen."""
EXPERIMENT = Experiment(
    name="vit_transport", doc=__doc__, options=Config, prepare=prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    summary=lambda record: {"edge_mean": edge_mean(record), "chosen": chosen(record.rows)},
    legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
