"""Which layers is it best to keep apart, the first (PFM) or the last (partial zipping)?

    python experiments/pfm_vs_partial_zip.py                      # VGG16, the shipped pair
    python experiments/pfm_vs_partial_zip.py --model vgg16-bn     # BatchNorm: RESET
    python experiments/pfm_vs_partial_zip.py --match cca          # other maps
    python experiments/pfm_vs_partial_zip.py --dataset digits     # seconds, needs no data
    python experiments/pfm_vs_partial_zip.py --retrain --preset paper    # full width, on a GPU

Two networks of the same task are merged in all but l of their L layers. Preserve-First Merging
keeps the first l apart: two stems, whose l-th pre-activations are averaged, and one trunk. Partial
zipping, as ZipIt! has it, keeps the last l apart: one trunk and two heads, whose logits are
averaged. A third curve keeps (l + 1) // 2 layers apart in front and l // 2 at the end. At equal l
as many layers are merged, but the last hold most parameters and the first most operations, so
accuracy is drawn against both, too, with all maps between bases. At l = 0 all three are the fully
merged network, for l = L the ensemble. Networks without BatchNorm are shown as they are merged and
with RESCALE, others with RESET.

The paper ("Vanishing Feature", VGG16 on CIFAR-10, before and after RESCALE): Preserve-First Merging
is better than partial zipping for all numbers of unmerged layers except two.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from kit import cli, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, joined, networks
from papers.pfm_vs_partial_zip import CLAIMS, KINDS, ahead

COSTS = {"params_ratio": "parameters", "flops_ratio": "FLOPs"}


def default_layers(depth: int) -> list[int]:
    return sorted({*range(0, depth, 2), depth - 1})


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(pairs.MatchingOptions):
    match: tuple[str, ...] = cli.option(
        ("zipit", "activation"), f"how units are matched, a panel each: {joined(pairs.MATCHES)} "
        "(default: zipit and activation)", choices=tuple(pairs.MATCHES), metavar="M", part="{}")
    layers: tuple[int, ...] | None = cli.option(
        None, "numbers of layers that are kept apart (default: 0, 2, 4 ... and L - 1)",
        type=cli.whole, nargs="+", metavar="l", part="layers{}",
        usual=lambda record: default_layers(record["model"]["depth"]))
    samples: int | None = cli.images("samples", "test images, the first N", 5_000)
    statistics: int | None = pairs.statistics(5_000)
# fmt: on


def merged_of(kind: str, layers: int, depth: int) -> tuple[int, int]:
    """The first layer that is merged, and the first after it that is not, counted from 0."""
    first = {"pfm": layers, "partial": 0, "both": (layers + 1) // 2}[kind]
    return first, first + depth - layers


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Edge models and ensemble; each way to keep l layers apart, before and after the remedy."""
    net, pair = run.setup.net, pairs.Pair(run, config, config.match)
    remedies = ("none", "reset" if net.norms else "rescale")
    every = {"match": config.match, "layers": config.layers, "kind": KINDS, "remedy": remedies}
    cells = pairs.grid(network=[None], **every)
    for cell in run.cells(pairs.plan(cells)):
        name, match, kept, kind, remedy = cell.values()
        if name:
            yield cell | pair.edge(name)
        else:
            merged = merged_of(kind, kept, net.depth)
            yield cell | pair.measured(pairs.MATCHES[match], remedy, match, *merged)


def columns_of(record: Record, match: str) -> pairs.Columns:
    """Kinds without and with the remedy, but where there is nothing to evaluate."""
    rows, found = record.rows.where(match=match), {}
    for remedy, (kind, name) in itertools.product(rows.distinct("remedy"), KINDS.items()):
        if rows.values(remedy=remedy):
            name += f" + {label(remedy)}" if remedy != "none" else ""
            found[name] = {"match": match, "kind": kind, "remedy": remedy}
    return found


def titles_of(record: Record) -> dict[str, str]:
    """Of panels and tables, by matching."""
    matches = record.rows.distinct("match")
    return {match: pairs.title_of(match, record["config"]) for match in matches}


def summary_of(record: Record) -> Row:
    first, *_ = titles_of(record)
    return pairs.summary(record, columns_of(record, first))


def title_of(record: Record) -> str:
    images = record["data"]["test_images"]
    return f"{networks(record)}, midpoints with l layers apart, {images:,} test images"


def finding_of(record: Record) -> str:
    """How far PFM is ahead of partial zipping, and where it reaches the edge models."""
    remedy, titles = record.rows.distinct("remedy")[-1], titles_of(record)
    points = {title: ahead(match, remedy).points(record) for match, title in titles.items()}
    words = [f"{gap:+.1f} points with {title}" for title, gap in points.items() if gap == gap]
    text = f"PFM against partial zipping, with {label(remedy)}: {joined(words)} on average over l"
    text = text if words else "With fewer than two layers apart there is nothing to compare"
    reached = pairs.reaches(record, f"PFM + {label(remedy)}")
    return f"{text}; PFM with {next(iter(titles.values()))} {reached}"


def tables_of(record: Record) -> list[tables.Table]:
    """Accuracies and costs by l, a table each for each matching."""
    found, depth = [], record["model"]["depth"]
    for match, title in titles_of(record).items():
        columns = columns_of(record, match)
        found.append(pairs.table(record, columns, line="{} of {} apart", about=f", {title}"))
        costs = [
            tables.Column(f"{name}: {what}", {"kind": kind}, key, tables.number())
            for kind, name in KINDS.items()
            for key, what in COSTS.items()
        ]
        layers = record.rows.distinct("layers")
        lines = {f"{at} of {depth} apart": {"match": match, "layers": at} for at in layers}
        title = f"{title}: cost relative to one model"
        found.append(tables.pivot(record.rows, lines, costs, title=title))
    return found


def look_of(name: str, where: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": list(KINDS).index(where["kind"]), "dashed": where["remedy"] == "none"}


def figure_of(record: Record) -> Any:
    """Accuracy against l, a panel for each matching; against cost for the first of them."""
    titles, panel = titles_of(record), functools.partial(pairs.panel, record, look=look_of)
    x, limits = f"layers kept apart, l (of L = {record['model']['depth']})", (0, 101)
    row = [panel(titles[m], x, columns_of(record, m), y_limits=limits) for m in titles]
    match, title = next(iter(titles.items()))
    last = {n: of for n, of in columns_of(record, match).items() if of["remedy"] != "none"}
    # As high as the curves, which are close together once they are renormalised.
    row += [panel(title, f"{text}, relative to one model", last, x=x) for x, text in COSTS.items()]
    return figures.of_record(record, row, columns=2)


LEGEND = """PFM l: the first l layers are kept apart; partial zip: the last l; both ends: half of l
at each end. The other layers are merged, by the maps that a matching finds: those of ZipIt! mix
units, activation matching permutes them. RESCALE and RESET renormalise what is merged."""
EXPERIMENT = Experiment(
    name="pfm_vs_partial_zip", doc=__doc__, options=Config,
    prepare=pairs.prepare(default_layers, 1, statistics="statistics", test="samples"),
    measure=measure, title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    summary=summary_of, claims=CLAIMS, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
