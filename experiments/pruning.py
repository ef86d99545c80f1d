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
from collections.abc import Iterator
from typing import Any

from kit import cli, edges, figures, pruned, tables, timing
from kit.experiment import Experiment, Run, Setup
from kit.figures import label
from kit.records import Record, Row, Rows, joined, networks
from papers.pruning import BY_SAMPLES, CLAIMS, HIGH, cases

import vfjax

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
        choices=pruned.METHODS, metavar="M", part="{}")
    sparsities: tuple[float, ...] = cli.option(
        SPARSITIES, "per cent of the weights that go (default: 10, 20 ... 90, 95 and 99)",
        type=pruned.sparsity_of, metavar="S", part="at{}")
    samples: tuple[int | str, ...] = cli.option(
        SAMPLES, "training images, the first N or all, by which what magnitude pruned is "
        "renormalised in the last panels (default: 64 128 256 all)", type=cli.count_or_all,
        metavar="N", part="samples{}", usual=lambda record: record["config"]["samples"] and SAMPLES)
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


def tidied(config: Config) -> Config:
    """The same with everything once and in order; no numbers of images where none are tried."""
    methods = tuple(method for method in pruned.METHODS if method in config.methods)
    samples = sorted(set(config.samples), key=lambda n: float("inf" if n == "all" else n))
    samples = tuple(samples) if {*methods} & {*BY_SAMPLES} else ()
    sparsities = tuple(sorted(set(config.sparsities)))
    return dataclasses.replace(config, methods=methods, samples=samples, sparsities=sparsities)


def needed(config: Config) -> dict[str, int]:
    """By option, how many training images there must be."""
    counts = [count for count in config.samples if count != "all"]
    fisher = {"fisher", "woodfisher"} & {*config.methods}
    return {"samples": max(counts, default=0), "gradients": config.gradients if fisher else 0}


def settled(config: Config, net: vfjax.Network, name: str) -> Config:
    """Raises a `UserError` if the network cannot be renormalised, or pruned, as asked for."""
    pruned.remedy_of(config, net, name)
    if "woodfisher" in config.methods:
        layers = pruned.layers_of(net, name)
        pruned.check_memory(net, layers, config.gradients, config.memory)
    return config


def prepare(config: Config, watch: timing.Stopwatch) -> Setup:
    config = tidied(config)
    counts = [config.statistics, *needed(config).values()]
    whole = config.statistics is None or "all" in config.samples
    setup = edges.loaded(
        count=lambda config: config.runs, statistics="statistics", test="test", needs=needed,
        read=lambda config: None if whole else max(counts), cifar=pruned.DEFAULT,
        settled=settled)(config, watch)  # fmt: skip
    net, name, record = setup.value.net, setup.value.arch.name, dict(setup.record)
    record["data"] |= {"augmented": pruned.augmented(config, setup.value)}
    record |= {"remedy": pruned.remedy_of(config, net, name)}
    return dataclasses.replace(setup, record=record | {"layers": pruned.layers_of(net, name)})


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Each network: unpruned, by method and sparsity, and renormalised by numbers of images."""
    models, net = run.setup, run.setup.net
    remedy = pruned.remedy_of(config, net, models.arch.name)
    layers = pruned.layers_of(net, models.arch.name)
    trees = dict(zip(models.seeds, models.trees, strict=True))
    training = pruned.statistics_of(config, models)
    options = {"statistics": training.samples(config.statistics), "gigabytes": config.memory}
    options |= {"gradients": training.samples(config.gradients)}

    @functools.lru_cache(maxsize=1)
    def renormaliser(seed: int, count: int | None) -> pruned.Renormaliser:
        return pruned.Renormaliser(net, trees[seed], remedy, training.samples(count))

    @functools.lru_cache(maxsize=1)
    def pruner(seed: int, method: str) -> Any:
        with run.watch(f"{method}, scores"):
            return pruned.pruner(method, net, trees[seed], layers, **options)

    at = [s for s in config.sparsities if s in SAMPLED] or config.sparsities
    by_samples = [method for method in config.methods if method in BY_SAMPLES]
    keys = ("seed", "method", "sparsity", "samples")
    cells: list[tuple[Any, ...]] = [(None, None, None)]
    cells += [(method, s, None) for method in config.methods for s in config.sparsities]
    cells += [(m, s, count) for count in config.samples for m in by_samples for s in at]
    plan = [dict(zip(keys, (seed, *cell), strict=True)) for seed in trees for cell in cells]
    for cell in run.cells(plan):
        seed, method, sparsity, samples = (cell[key] for key in keys)
        tree = pruner(seed, method)(sparsity / 100) if method else trees[seed]
        count = cli.counted(samples) if samples else config.statistics
        row = cell | {"remedy": remedy, "images": len(training.samples(count).images)}
        with run.watch(f"{samples} images" if samples else method or "unpruned"):
            better = pruned.answers(renormaliser(seed, count)(tree), models.images.test)
            if samples is None:
                plain = pruned.answers(pruned.as_network(net, tree), models.images.test)
                before, after, error = pruned.paired(plain, better)
                yield cell | {"remedy": "none", "accuracy": before}
                yield row | {"accuracy": after, "error": error}
            else:
                yield row | {"accuracy": float(better.mean())}


def title_of(record: Record) -> str:
    seeds, images = len(record["seeds"]["edge_models"]), record["data"]["test_images"]
    several = f", mean of {seeds} seeds" if seeds > 1 else ""
    return f"{networks(record)}, pruned, {images:,} test images{several}"


def finding_of(record: Record) -> str:
    """Where most comes back, and which pruner is best after it."""
    found = [case for method in record.rows.distinct("method") for case in cases(record, method)]
    most, (unpruned,) = max(found, key=lambda case: case.gain), cases(record, None)
    before, after, whole = (100 * n for n in (most.plain, most.renormalised, unpruned.plain))
    text = f"{label(record['remedy'])} brings back most with {label(most.method)} at "
    text += f"{most.sparsity}%, from {before:.0f}% to {after:.0f}% (unpruned {whole:.0f}%)"
    last = [case for case in found if case.sparsity == HIGH[-1]]
    best = max(last, key=lambda case: case.renormalised, default=most)
    more = f"; at {HIGH[-1]}% {label(best.method)} is best after it"
    return text + (f"{more} ({100 * best.renormalised:.0f}%)" if len(last) > 1 else "")


def by_samples(record: Record) -> dict[str, Rows]:
    """Rows of what was renormalised by numbers of images, by pruner."""
    rows = record.rows.where(samples=record.rows.distinct("samples"))
    return {method: rows.where(method=method) for method in rows.distinct("method")}


def tables_of(record: Record) -> list[tables.Table]:
    """Accuracies by sparsity and method, as pruned and renormalised; and by images."""
    rows, name, found = record.rows.where(samples=None), label(record["remedy"]), []

    def add(here: Rows, title: str, columns: list[tables.Column], **more: Any) -> None:
        lines = more | {str(s): {"sparsity": s} for s in sorted(here.distinct("sparsity"))}
        found.append(tables.pivot(here, lines, columns, title=title, corner="sparsity, %"))

    pruners = [tables.Column(label(m), {"method": m}) for m in rows.distinct("method")]
    whole = {"unpruned": {"method": None}}
    add(rows.where(remedy="none"), f"{record['title']}: as pruned", pruners, **whole)
    add(rows.where(remedy=record["remedy"]), f"with {name}", pruners, **whole)
    for method, here in by_samples(record).items():
        columns = [tables.Column(f"{n} images", {"samples": n}) for n in here.distinct("samples")]
        add(here, f"{label(method)}, with {name}", columns)
    return found


def figure_of(record: Record) -> Any:
    """Accuracy as pruned and renormalised, what is gained, and by how many images."""
    rows, remedy, x = record.rows.where(samples=None), record["remedy"], "sparsity (%)"
    level, limits = 100 * rows.mean(method=None, remedy="none"), (0, 101)
    unpruned = [figures.Line("unpruned", None, level, method="edges")]
    plain, better = (rows.where(remedy=how) for how in ("none", remedy))
    both = zip(plain, better, strict=True)
    gains = Rows(b | {"accuracy": b["accuracy"] - a["accuracy"]} for a, b in both)
    title, row = f"with {label(remedy)}, {record['data']['statistics_images']:,} images", []
    for name, here in (("as pruned", plain), (title, better), ("gained", gains)):
        lines = [figures.line(here.where(method=m), "sparsity", method=m)
                 for m in here.distinct("method")]  # fmt: skip
        whole = here is not gains
        y = figures.ACCURACY if whole else "points of test accuracy"
        y_limits = limits if whole else None
        row.append(figures.Panel(name, x, y, lines + unpruned * whole, y_limits=y_limits))
    for method, here in by_samples(record).items():
        lines, before = [], plain.where(method=method)
        for colour, s in enumerate(sorted(here.distinct("sparsity")), start=FREE):
            name, level = f"{s}%, {label(remedy)}", 100 * before.mean(sparsity=s)
            lines.append(figures.line(here, "images", name=name, method=colour, sparsity=s))
            lines.append(figures.Line(f"{s}%, as pruned", None, level, None, colour, True))
        title = f"{label(method)}, images for {label(remedy)}"
        panel = figures.Panel(title, "training images", figures.ACCURACY, lines, y_limits=limits)
        row.append(dataclasses.replace(panel, log_x=True))
    bars = f"standard deviation over {len(record['seeds']['edge_models'])} seeds"
    return figures.draw(row, finding=record["finding"], subtitle=record["title"], bars=bars,
                        columns=3 if len(row) > 4 else 2)  # fmt: skip


LEGEND = """Pruned are all convolutions and linear layers but those of shortcuts, of ConvNeXt only
linear ones and not the last. Magnitude compares all weights or those of a layer; diagonal Fisher
and WoodFisher (in blocks of whole layers; its update changes what stays) all; Wanda those of an
output or, layerwise, of a layer. REPAIR and RESCALE are of all layers on the longest path but the
last, and the first where shortcuts begin there. Images for renormalisation, and for Wanda, are
cropped and mirrored at random as in training unless with --plain: running statistics are of such
images. Those of Fisher matrices are the first of them."""
EXPERIMENT = Experiment(
    name="pruning", doc=__doc__, options=Config, prepare=prepare, measure=measure, title=title_of,
    finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
