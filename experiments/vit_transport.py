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
from collections.abc import Iterator, Mapping
from typing import Any

from kit import cli, edges, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.records import Record, Row, networks
from kit.transformers import MODELS, kind_of, layers_of, maps_of, prepare
from papers.vit_transport import CLAIMS, KINDS, LABELS, UNIFORM, chosen

from vfjax import align, merge

# Weights of the entropy, in parts of the mean distance: from next to exact to next to uniform.
REGULARIZATIONS = (0.02, 0.05, 0.1, 0.2)


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(edges.EdgeOptions):
    model: tuple[str, float | None] | None = cli.option(
        None, f"architecture of the networks, {' or '.join(MODELS)}; WIDTH multiplies all channel "
        "counts (default: vit, as wide as the shipped ones; with --preset paper 1)",
        type=cli.typed(cli.model_of, lambda model: model[0] in MODELS, "is not a vision "
                       f"transformer: {' or '.join(MODELS)}"), metavar="NAME[-wWIDTH]")
    blocks: tuple[int, ...] | None = cli.option(
        None, "numbers of leading blocks that are kept apart, one row each (default: all)",
        type=cli.whole, nargs="+", metavar="k", part="blocks{}",
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
    net, images, blocks = run.setup.net, run.setup.images, config.blocks or ()
    pair = pairs.Pair(run, config, ["activation"])

    @functools.cache
    def found(plan: str, weight: float) -> align.Maps:
        moments = pair.moments
        with run.watch("matching"):
            return maps_of(net, pair.trees, moments, plan, weight)

    between = [config.regularization] if config.regularization else REGULARIZATIONS
    every = {"network": ["PFM"], "images": ["held_out"], "blocks": blocks, "plan": ["entropy"]}
    soft = pairs.grid(**every, units=["all"], weight=[0.0, *between, UNIFORM])
    columns = [*((plan, "all") for plan in LABELS), *(("exact", kind) for kind in KINDS)]
    cells = [
        {"network": "PFM", "images": "test", "blocks": k, "plan": plan, "units": units}
        for k in blocks
        for plan, units in columns
    ]
    for cell in run.cells([*soft, *pairs.plan(cells)]):
        name, k, plan = cell["network"], cell["blocks"], cell["plan"]
        if name != "PFM":
            yield cell | {"images": "test"} | pair.edge(name)
            continue
        weights = {"soft": chosen(run.rows) if plan == "soft" else 0, "uniform": UNIFORM}
        maps = found(plan, cell.get("weight", weights.get(plan, 0.0)))
        if cell["units"] != "all":
            kinds = {group: kind_of(net, group) for group in net.spec.groups}
            maps = pairs.only(maps, [g for g, kind in kinds.items() if kind == cell["units"]])
        merged = merge.partial(net, pair.trees, maps, span=slice(layers_of(k), None))
        stage = "how soft" if plan == "entropy" else f"PFM {k}/{blocks[-1]}"
        with run.watch(stage):
            tested = pairs.evaluated(merged, getattr(images, cell["images"]), stage)
        cost = {"layers": layers_of(k)} | pairs.cost_of(merged) if plan == "direct" else {}
        yield cell | tested | cost


# Of the columns in figures.
LOOKS = {"direct": "direct", "permuted": "activation", "exact": "transport", "soft": 4}
LOOKS |= {"weights": "weight", "uniform": 0, "stream": 1, "hidden": 2, "attention": 3}


def look_of(name: str, where: Mapping[str, Any]) -> dict[str, Any]:
    units = where["plan"] if where["units"] == "all" else where["units"]
    return {"method": LOOKS[units], "dashed": units == "uniform"}


def columns_of(record: Record) -> pairs.Columns:
    named = LABELS | {"soft": f"{LABELS['soft']} ({chosen(record.rows):g})"}
    return {text: {"images": "test", "plan": n, "units": "all"} for n, text in named.items()}


def summary_of(record: Record) -> Row:
    found = pairs.summary(record, columns_of(record), x="blocks")
    return found | {"chosen": chosen(record.rows)}


def title_of(record: Record) -> str:
    images = f"statistics over {record['data']['statistics_images']:,} images"
    return f"{networks(record)}, {images}, {record['data']['test_images']:,} test images"


def finding_of(record: Record) -> str:
    rows, least = record.rows.where(images="test", units="all"), record["config"]["blocks"][0]
    first = {n: f"{100 * rows.mean(plan=n, blocks=least):.1f}%" for n in LABELS}
    text = f"With k = {least} blocks kept apart OT-acts has {first['exact']}, soft {first['soft']}"
    text += f", direct averaging {first['direct']}; the uniform plan, which matches nothing, "
    return f"{text}{first['uniform']}, the edge models {100 * record['summary']['edge_mean']:.1f}%"


def tables_of(record: Record) -> list[tables.Table]:
    costs = tables.costs({"plan": "direct"}, digits=4, giga=False)
    return [pairs.table(record, columns_of(record), costs, x="blocks")]


def figure_of(record: Record) -> Any:
    """Accuracy against k: by column, with one kind of units matched alone, and by softness."""
    columns, held_out = columns_of(record), record.rows.where(images="held_out")
    exact = {"images": "test", "plan": "exact"}
    some = {"direct": columns["direct"]} | {t: exact | {"units": n} for n, t in KINDS.items()}
    some |= {LABELS["exact"]: columns[LABELS["exact"]]}
    soft = [
        figures.line(held_out, "blocks", name=f"weight {weight:g}", method=at, weight=weight)
        for at, weight in enumerate(held_out.distinct("weight"), start=5)
    ]
    x, limits = f"blocks kept apart, k (of {record['model']['blocks']})", {"y_limits": (0, 101)}
    about, y = {"look": look_of, "x": "blocks"} | limits, "accuracy, held-out training images (%)"
    panels = [
        pairs.panel(record, "by what was matched how", x, columns, **about),
        pairs.panel(record, "exact plans of some units only", x, some, **about),
        figures.Panel("weight of the plans' entropy", x, y, soft, **limits),
    ]
    return figures.of_record(record, panels)


LEGEND = """PFM k/B: the first k of B blocks kept apart, the others merged. AM: permuted by
activations. OT-acts: transported by activations, soft: with an entropy of the weight in brackets,
in parts of the mean distance; OT-weights: by incoming weights. The uniform plan matches nothing,
and what little remains of the second network hardly disturbs the first: only what is above it is
due to matching. Held-out images are training images, which the edge models have seen."""
EXPERIMENT = Experiment(
    name="vit_transport", doc=__doc__, options=Config, prepare=prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    summary=summary_of, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
