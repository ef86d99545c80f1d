"""What does each further layer add when only the first l layers of two networks are matched?

    python experiments/permute_first_layers.py                      # VGG16, the shipped pair
    python experiments/permute_first_layers.py --model resnet20     # BatchNorm: RESET
    python experiments/permute_first_layers.py --dataset digits     # seconds, needs no data
    python experiments/permute_first_layers.py --retrain --preset paper    # full width, on a GPU

Units of the second network are permuted to match those of the first in its first l layers only; the
two are then averaged. The matching is done once, in full, and the permutations of the first l
layers are taken from it. For activations this is what matching these layers alone would give; for
weights it is a part of the joint optimum, in which later layers have a say.

The paper ("Vanishing Feature", left panel of its figure on Preserve-First Merging): accuracy rises
with l and saturates below the edge models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kit import cli, edges, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, networks
from papers.permute_first_layers import CLAIMS, CURVES, MATCHES

import vfjax


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(edges.EdgeOptions):
    match: str = cli.option(
        "both", "how units of the second network are matched to those of the first",
        choices=(*MATCHES, "both"), part="{}")
    alpha: float = cli.option(
        0.5, "weight of the second network in the averages; the first has 1 - ALPHA",
        type=cli.number_of(0, 1), part="alpha{:g}")
    samples: int | None = cli.images("samples", "test images, the first N", 5_000)
    statistics: int | None = pairs.statistics(5_000)
# fmt: on


def written_at(net: vfjax.Network) -> dict[str, int]:
    """By group of units, the first layer on the main path that writes it; else the last layer."""
    main = {layer.kernel: layer.depth for layer in net.layers if layer.main}
    found = {}
    for group, axes in net.spec.groups.items():
        depths = [main[axis.path] for axis in axes if axis.role == "out" and axis.path in main]
        found[group] = min(depths, default=net.depth)
    return found


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Accuracy and loss of edge models, and of averages at each l, matching and remedy."""
    net, depths = run.setup.net, written_at(run.setup.net)
    for group, depth in depths.items():
        run.note("written_at", group=group, layer=depth)
    matches = list(MATCHES) if config.match == "both" else [config.match]
    pair = pairs.Pair(run, config, matches, (1 - config.alpha, config.alpha))
    remedies = ["none", *(name for name in pairs.remedies_of(net) if name != "bias_calibration")]
    every = {"layers": range(net.depth + 1), "match": matches, "remedy": remedies}
    cells = pairs.grid(network=[None], **every)
    for cell in run.cells(pairs.plan(cells, pairs.EDGES[:2])):
        name, layers, match, remedy = cell.values()
        if name:
            yield cell | pair.edge(name, "edge models")
            continue
        groups = frozenset(group for group, depth in depths.items() if depth <= layers)
        # Without permutations all matchings are one.
        cut = (match, 0, None, groups) if groups else ("none",)
        yield cell | {"groups": len(groups)} | pair.measured("averages", remedy, *cut)


def columns_of(record: Record) -> pairs.Columns:
    return {name: where for name, where in CURVES.items() if record.rows.where(**where)}


def title_of(record: Record) -> str:
    alpha, images = record["config"]["alpha"], record["data"]["test_images"]
    what = "midpoints" if alpha == 0.5 else f"averages at alpha {alpha:g}"
    return f"{networks(record)}, {what}, first l layers matched, {images:,} test images"


def finding_of(record: Record) -> str:
    all_layers, none = (record.rows.where(layers=at) for at in (record["model"]["depth"], 0))
    ends = {name: all_layers.mean(**where) for name, where in columns_of(record).items()}
    best = max(ends, key=ends.__getitem__)
    plain = max(ends[name] for name in MATCHES.values() if name in ends)
    text = f"Matching all layers instead of none takes accuracy ({best}) from "
    text += f"{100 * none.mean(**CURVES[best]):.1f}% to {100 * ends[best]:.1f}%, without a remedy "
    text += f"to {100 * plain:.1f}% at most; edge models have "
    return f"{text}{100 * record['summary']['edge_mean']:.1f}%"


def tables_of(record: Record) -> list[tables.Table]:
    groups = tables.Column("groups matched", key="groups", show=tables.number())
    return [pairs.table(record, columns_of(record), [groups], line="first {} of {}")]


def figure_of(record: Record) -> Any:
    """Accuracy against l, a panel for each matching."""
    x, row = f"first layers matched, l (of L = {record['model']['depth']})", []
    columns = columns_of(record)
    for match in record.rows.distinct("match"):
        shown = {label(of["remedy"]): of for of in columns.values() if of["match"] == match}
        row.append(pairs.panel(record, label(match), x, shown, y_limits=(0, 101)))
    return figures.of_record(record, row)


LEGEND = """WM: weights matched; AM: activations matched. Permuted or not, the second network
computes the same function. Statistics that REPAIR and RESCALE restore are measured once and carried
through the permutations. Layers count along the main path. In a residual stage several layers write
the same units, which can only be permuted together: they count as soon as the first of these layers
is among the first l. Where a further layer writes no units of its own the curve is flat; so it is
at l = L, for the units of the last layer are the classes, which keep their order."""
EXPERIMENT = Experiment(
    name="permute_first_layers", doc=__doc__, options=Config,
    prepare=edges.loaded(statistics="statistics", test="samples", seeds=pairs.seeds),
    measure=measure, title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    summary=lambda record: pairs.summary(record, columns_of(record), record["config"]["alpha"]),
    claims=CLAIMS, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
