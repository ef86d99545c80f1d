"""How much of what pruning costs a network does renormalising bring back, at each sparsity?

    python experiments/pruning.py                       # VGG16 with BatchNorm: RESET
    python experiments/pruning.py --model resnet20      # also vgg16, vgg16-ln, resnet20-ln,
                                                        # convnext-pico
    python experiments/pruning.py --methods magnitude wanda --sparsities 80 90
    python experiments/pruning.py --dataset digits      # under a minute, needs no data
    python experiments/pruning.py --retrain --preset paper    # full width, on a GPU

Each shipped network is pruned in one shot and renormalised with the unpruned one as the only
reference, by the same training images for both; where magnitude pruned it, by fewer images, too.

The paper ("Vanishing Feature"): pruned networks lose their features as merged ones do, and
renormalisation gives them back; accuracy is never lower, and most is gained where much is pruned,
tens of points at 80 to 90%. One batch of 64 images does nearly what all do (ResNet20). It has Wanda
for ConvNeXt alone, on ImageNet (`imagenet_pruning.py`); its networks are wider and can lose more
weights; its code takes 1,000 gradients, and the diagonal Fisher compares the weights of a layer.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from kit import cli, figures, pruned, records, tables, timing
from kit.experiment import Experiment, Run, Setup
from kit.figures import label
from kit.records import Record, Row, Rows, joined
from papers.pruning import BY_SAMPLES, CLAIMS

import vfjax
from vfjax import prune

# Per cent of the weights that go.
SPARSITIES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)
METHODS = ("magnitude", "magnitude-layer", "fisher", "woodfisher", "wanda")
SAMPLES = (64, 128, 256, "all")
# Of the sparsities, those that numbers of images are tried at; all if there is none of them.
SAMPLED = (70, 80, 90)
# Colours from here on are those of no pruner.
FREE = 6


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(pruned.RemedyOptions):
    methods: tuple[str, ...] = cli.option(
        METHODS, f"what is pruned by: {joined(pruned.METHODS)} (default: all but the last)",
        choices=pruned.METHODS, action=cli.InOrder, metavar="M", part="{}")
    sparsities: tuple[float, ...] = cli.option(
        SPARSITIES, "per cent of the weights that go (default: 10, 20 ... 90, 95 and 99)",
        type=pruned.sparsity_of, action=cli.InOrder, metavar="S", part="at{}")
    samples: tuple[int | str, ...] = cli.option(
        SAMPLES, "training images, the first N or all, by which what magnitude pruned is "
        "renormalised in the last panels (default: 64 128 256 all)", type=cli.count_or_all,
        action=cli.InOrder, metavar="N", part="samples{}",
        usual=lambda record: record["config"]["samples"] and SAMPLES)
    runs: int | None = cli.option(
        None, "networks, of different seeds (default: all that are shipped; two with --retrain)",
        type=cli.count_of("networks"), metavar="N", part="runs{}")
    test: int | None = cli.images("test", "test images, the first N", 3_000)
    statistics: int | None = cli.images(
        "statistics", "training images, the first N, for renormalisation and Wanda", 2_000)
    gradients: int = cli.option(
        400, "images, the first N, whose gradients Fisher and WoodFisher take, one by one",
        type=cli.count_of("gradients"), metavar="N", part="gradients{}")
    memory: float = cli.option(
        None, "gigabytes that WoodFisher may take", presets={"cpu": 2.0, "paper": 32.0},
        type=cli.number_of(0), metavar="GB", part="memory{}")
# fmt: on


def needed(config: Config) -> dict[str, int]:
    """By option, how many training images there must be."""
    counts = [count for count in config.samples if count != "all"]
    fisher = {"fisher", "woodfisher"} & {*config.methods}
    return {"samples": max(counts, default=0), "gradients": config.gradients if fisher else 0}


def settled(config: Config, net: vfjax.Network, name: str) -> Config:
    """Raises a `UserError` if the network cannot be renormalised, or pruned, as asked for."""
    pruned.remedy_of(config, net, name)
    layers = pruned.layers_of(net, name)
    gigabytes = prune.memory(net, count=config.gradients, names=layers) / 1e9
    if "woodfisher" in config.methods and gigabytes > config.memory:
        wrong = f"WoodFisher takes {gigabytes:.1f} GB for {config.gradients} gradients, more than "
        wrong += f"--memory {config.memory:g}: allow more, take fewer --gradients, or leave it out"
        raise cli.UserError(f"{wrong} of --methods.")
    return config


def prepare(config: Config, watch: timing.Stopwatch) -> Setup:
    # No numbers of images where none are tried.
    samples = config.samples if {*config.methods} & {*BY_SAMPLES} else ()
    config = dataclasses.replace(config, samples=samples)
    whole = config.statistics is None or "all" in config.samples
    read = None if whole else max(config.statistics, *needed(config).values())
    return pruned.prepare(config, watch, count=lambda config: config.runs, test="test",
                          needs=needed, read=lambda config: read, settled=settled)  # fmt: skip


def plan(config: Config, seeds: Iterable[int]) -> list[Row]:
    """Each network unpruned, by method and sparsity, and renormalised by numbers of images."""
    at = [s for s in config.sparsities if s in SAMPLED] or config.sparsities
    by_samples = [method for method in config.methods if method in BY_SAMPLES]
    cells: list[tuple[Any, ...]] = [(None, None, None)]
    cells += [(method, s, None) for method in config.methods for s in config.sparsities]
    cells += [(m, s, count) for count in config.samples for m in by_samples for s in at]
    keys = ("seed", "method", "sparsity", "samples")
    return [dict(zip(keys, (seed, *cell), strict=True)) for seed in seeds for cell in cells]


def measure(config: Config, run: Run) -> Iterator[Row]:
    net, trees, layers, remedy, training, test = run.setup
    options = {"statistics": training.samples(config.statistics), "gigabytes": config.memory}
    options |= {"gradients": training.samples(config.gradients)}

    @functools.lru_cache(maxsize=1)
    def renormaliser(seed: int, count: int | None) -> Any:
        return pruned.renormaliser(net, trees[seed], remedy, training.samples(count))

    @functools.lru_cache(maxsize=1)
    def pruner(seed: int, method: str) -> Any:
        with run.watch(f"{method}, scores"):
            return pruned.pruner(method, net, trees[seed], layers, **options)

    for cell in run.cells(plan(config, trees)):
        seed, method, sparsity, samples = cell.values()
        tree = pruner(seed, method)(sparsity / 100) if method else trees[seed]
        count = cli.counted(samples) if samples else config.statistics
        with run.watch(f"{samples} images" if samples else method or "unpruned"):
            found = [renormaliser(seed, count)(tree)]
            found += [] if samples else [pruned.as_network(net, tree)]
            images = len(training.samples(count).images)
            answers = pruned.answers(found, test)
            yield from pruned.rows_of(cell, remedy, *answers, images=images)


def title_of(record: Record) -> str:
    return records.title(record, "pruned", len(record["seeds"]["edge_models"]))


def by_samples(record: Record) -> dict[str, Rows]:
    """Rows of what was renormalised by numbers of images, by pruner."""
    rows = record.rows.where(samples=record.rows.distinct("samples"))
    return {method: rows.where(method=method) for method in rows.distinct("method")}


def tables_of(record: Record) -> list[tables.Table]:
    """Accuracies by sparsity and method, as pruned and renormalised; and by images."""
    found = pruned.tables_of(record)
    for method, rows in by_samples(record).items():
        columns = {f"{n} images": {"samples": n} for n in rows.distinct("samples")}
        title = f"{label(method)}, with {label(record['remedy'])}"
        found.append(pruned.table_of(rows, title, columns))
    return found


def figure_of(record: Record) -> Any:
    """Accuracy as pruned and renormalised, what is gained, and by how many images."""
    row, remedy = pruned.panels_of(record), label(record["remedy"])
    for method, rows in by_samples(record).items():
        lines, before = [], record.rows.where(method=method, remedy="none")
        for colour, s in enumerate(sorted(rows.distinct("sparsity")), start=FREE):
            name, level = f"{s}%, {remedy}", 100 * before.mean(sparsity=s)
            lines.append(figures.line(rows, "images", name=name, method=colour, sparsity=s))
            lines.append(figures.Line(f"{s}%, as pruned", None, level, None, colour, True))
        title = f"{label(method)}, images for {remedy}"
        row.append(figures.Panel(title, "training images", figures.ACCURACY, lines, log_x=True,
                                 y_limits=(0, 101)))  # fmt: skip
    bars = f"standard deviation over {len(record['seeds']['edge_models'])} seeds"
    return figures.of_record(record, row, bars=bars, columns=3 if len(row) > 4 else 2)


LEGEND = """Pruned are all convolutions and linear layers but those of shortcuts, of ConvNeXt only
linear ones and not the last. Magnitude compares all weights or those of a layer; diagonal Fisher
and WoodFisher (in blocks of whole layers; its update changes what stays) all; Wanda those of an
output or, layerwise, of a layer. REPAIR and RESCALE are of all layers on the longest path but the
last, and the first where shortcuts begin there. Images for renormalisation, and for Wanda, are
cropped and mirrored at random as in training unless with --plain: running statistics are of such
images. Those of Fisher matrices are the first of them."""
EXPERIMENT = Experiment(
    name="pruning", doc=__doc__, options=Config, prepare=prepare, measure=measure, title=title_of,
    finding=pruned.finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
