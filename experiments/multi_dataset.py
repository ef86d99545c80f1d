"""Can networks of different data sets be zipped into one, with a head for each?

    python experiments/multi_dataset.py                          # digits, MNIST, CIFAR-10 in grey
    python experiments/multi_dataset.py --datasets mnist cifar10
    python experiments/multi_dataset.py --quick                  # seconds, needs no data
    python experiments/multi_dataset.py --preset paper           # full width, on a GPU

One network is trained on each data set, from another initialisation, on grey images of one size.
Then the first l of L layers are merged and the others kept, so that every data set has its own head
("l/L"; the last layer always is one's own): weights averaged as they are; permuted to a shared
universe, which for two networks is the assignment; or zipped with ZipIt!'s default alpha and beta.
All pairs are merged, and all at once. Matching takes as many training images of every data set as
the smallest has, mixed; on these BatchNorm statistics are measured anew in every network, the
ensemble's too, which is each network on its own data set.

The paper ("ZipIt!", ResNet-50s of Stanford Dogs, Oxford Pets, CUB and NABirds, mean accuracy per
cent of pairs): ensemble 75.5, weight averaging 11.3, permutation 35.7, ZipIt! 37.1 at 49 of 50
layers, 62.4 at 22, 68.7 at 10. All four at once: 1.2, 15.3, 16.8, 45.5 and 65.3.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from kit import cli, edges, figures, joint, records, sets, tables
from kit.experiment import Experiment, Run, Setup
from kit.records import Record, Row, Rows, joined
from kit.sets import LABELS
from kit.timing import Stopwatch
from papers.multi_dataset import CLAIMS, GROUPS, METHODS, at, counts_of, means_of, zips

from vfjax import data, merge, models, train

DATASETS, QUICK = ("digits", "mnist", "cifar10"), ("digits", "digits-turned")
MODEL = "vgg11-bn"
LOOKS = {"average": "direct", "permute": "activation", "zip": "zipit"}


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(cli.Options):
    datasets: tuple[str, ...] | None = cli.option(
        None, f"two data sets or more, of {', '.join(sets.NAMES)} (default: {' '.join(DATASETS)}; "
        f"with --quick {' '.join(QUICK)})", nargs="+", choices=sets.NAMES, metavar="NAME")
    preset: str = cli.option(
        "cpu", "cpu is what two cores do in minutes: a quarter of the width, 16x16 pixels; paper "
        "is full width, 32x32 pixels and all images (of these data sets, not the paper's)",
        choices=("cpu", "paper"), part="{}")
    seed: int = cli.option(
        0, "of the first network; the others have the next ones", type=cli.seed_of, part="seed{}")
    work_dir: str | None = cli.option(
        None, "folder in which networks are kept, so that a run that was stopped goes on")
    quick: bool = cli.option(
        False, "tiny MLPs, few images, no data to download: to see that it runs; the numbers mean "
        "nothing", part="quick")
# fmt: on


def prepare(config: Config, watch: Stopwatch) -> Setup:
    """Checks options, reads images, trains a network for each data set."""
    names = config.datasets or (QUICK if config.quick else DATASETS)
    if len(names) < 2 or len(set(names)) != len(names):
        wanted = "--datasets must be two or more different ones"
        raise cli.UserError(f"{wanted}, got {' '.join(names)}; {joined(QUICK)} need no files.")
    if config.quick and config.preset != "cpu":
        raise cli.UserError("--quick has sizes of its own: leave out --preset.")
    preset = sets.PRESETS["quick" if config.quick else config.preset]
    with watch("data"):
        try:
            datasets = [sets.load(name, preset, config.data_dir) for name in names]
        except data.DatasetError as error:
            pair = f"Without files: --quick, or --datasets {' '.join(QUICK)}."
            raise cli.UserError(f"{error} {pair}") from error
    classes, trees, about = max(dataset.classes for dataset in datasets), [], []
    model: Any = models.MLP((16, 16), classes=classes)
    if not config.quick:
        model = models.create(MODEL, width=preset.width, classes=classes)
    for seed, dataset in enumerate(datasets, start=config.seed):
        work = None if config.work_dir is None else Path(config.work_dir) / dataset.name
        recipe = sets.recipe_of(preset, dataset)
        with watch("training"):
            run = train.fit(model, recipe, dataset, seed=seed, work_dir=work)
            trees.append(jax.device_get(run.variables))
        counts = {"train": len(dataset.train_images), "test": len(dataset.test_images)}
        about.append(records.about(dataset, **counts) | {"recipe": dataclasses.asdict(recipe)})
    with watch("trace"):
        net = edges.traced(model, datasets[0])
    name = "mlp" if config.quick else MODEL
    record = {
        "config": {"datasets": list(names)},
        "preset": dataclasses.asdict(preset),
        "data": about,
        "model": {"name": name, "depth": net.depth, "parameters": net.params},
        "seeds": {"networks": [config.seed + place for place in range(len(names))]},
    }
    return Setup(config, (net, datasets, trees), record, tuple(map(edges.digest, trees)))


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Each network as it was trained; then all combinations, by method and layers merged."""
    net, datasets, trees = run.setup
    names = [dataset.name for dataset in datasets]
    layers = sets.PRESETS["quick" if config.quick else config.preset].layers

    @functools.lru_cache(maxsize=1)
    def combination(chosen: str) -> tuple[list[data.Dataset], joint.Networks, Any]:
        places = [names.index(name) for name in chosen.split("+")]
        own = [datasets[place] for place in places]
        parts = [trees[place] for place in places], sets.mixed(own)
        return own, joint.Networks(net, *parts, run.watch), sets.tests_of(own)

    cells = [{"datasets": name, "method": "as trained"} for name in names]
    for chosen in map("+".join, sets.combinations(names)):
        cells.append({"datasets": chosen, "method": "network"})
        cells += [{"datasets": chosen, "method": method, "layers": count}
                  for method, count in itertools.product(METHODS, layers)]  # fmt: skip
    for cell in run.cells(cells):
        chosen, method, count = cell["datasets"], cell["method"], cell.get("layers")
        own, networks, tests = combination(chosen)
        if method == "as trained":
            model = merge.as_merged(net, networks.trees[0])
        else:
            run.note("statistics", datasets=chosen, images=sum(map(len, networks.statistics)))
            maps = networks.maps(method) if count else None
            model = networks.merged(maps, count or 0)
        with run.watch("evaluation"):
            heads = [sets.accuracies(logits, own) for logits in joint.outputs(model, tests)]
        costs = networks.costs(model) if count else {}
        for dataset, found in zip(own, heads, strict=True):
            for tested, value in found.items():
                if tested == dataset.name or method == "network":
                    yield cell | {"head": dataset.name, "tested": tested, "accuracy": value} | costs


def summary_of(record: Record) -> dict[str, Any]:
    """Means by group of combinations: of the ensemble, and by method and layers merged."""
    counts, found = list(map(str, counts_of(record))), {}
    for group in GROUPS:
        if rows := means_of(record).where(group=group):
            merged = {
                how: dict(zip(counts, zips(rows, method=how), strict=True)) for how in METHODS
            }
            found[group] = {"ensemble": rows.mean(method="network")} | merged
    return found


def title_of(record: Record) -> str:
    what = f"{record['model']['name']}, {record['preset']['width']:g} wide"
    what = "MLPs, QUICK, MEANS NOTHING" if record["config"]["quick"] else what
    return f"{joined(LABELS[one['name']] for one in record['data'])}: {what}, a head each"


def finding_of(record: Record) -> str:
    return "; ".join(
        f"{GROUPS[group]}: ensemble {100 * found['ensemble']:.1f}%, zipped "
        f"{at(record, found['zip'].values())}"
        for group, found in record["summary"].items()
    ).capitalize()


def tables_of(record: Record) -> list[tables.Table]:
    depth, counts, found = record["model"]["depth"], counts_of(record), []
    merged = {
        f"{text} {count}/{depth}": {"method": method, "layers": count}
        for (method, text), count in itertools.product(METHODS.items(), counts)
    }
    for chosen in record.rows.distinct("datasets", method="network"):
        labels = {name: LABELS[name] for name in chosen.split("+")}
        lines = {f"network of {labels[n]}": {"method": "network", "head": n} for n in labels}
        lines["ensemble"] = {"own": True, "method": "network"}
        rows = Rows(
            row | {"own": row["head"] == row["tested"], "mean": row["accuracy"]}
            for row in record.rows.where(datasets=chosen)
        )
        columns = [tables.Column(label, {"tested": name}) for name, label in labels.items()]
        columns += [tables.Column("mean", key="mean", show=tables.number(4, 0.01))]
        about = {"title": joined(labels.values()), "corner": "test accuracy, %"}
        found.append(tables.pivot(rows, lines | merged, columns + tables.ratios(), **about))
    return found


def figure_of(record: Record) -> Any:
    """Accuracies against the number of merged layers: pairs, all at once, and by data set."""
    x, y = f"layers merged, of {record['model']['depth']}", "mean test accuracy (%)"
    counts, panels = counts_of(record), []
    more = {"y_limits": (0, 102), "ticks": counts}
    for group, found in record["summary"].items():
        known = {how: [100 * value for value in found[how].values()] for how in METHODS}
        lines = [figures.Line(METHODS[how], counts, known[how], None, LOOKS[how])
                 for how in METHODS]  # fmt: skip
        lines += figures.levels({"ensemble": found["ensemble"]})
        panels.append(figures.Panel(GROUPS[group], x, y, lines, **more))
    lines, last = [], record.rows.distinct("datasets", method="network")[-1]
    for place, name in enumerate(last.split("+")):
        own = record.rows.where(datasets=last, head=name, tested=name)
        zipped, level = own.where(method="zip"), 100 * own.mean(method="network")
        lines.append(figures.line(zipped, "layers", name=f"{LABELS[name]}, ZipIt!", method=place))
        lines.append(figures.Line(f"{LABELS[name]}, ensemble", None, level, None, place, True))
    title = f"{panels[-1].title}, by data set"
    panels.append(figures.Panel(title, x, figures.ACCURACY, lines, **more))
    return figures.of_record(record, panels)


LEGEND = """l/L: the first l of L layers merged, a head for each data set behind them; ensemble:
each network on its own data set. BatchNorm's statistics are those of images of all data sets,
mixed, in the networks, too; network of a data set: tested on the others as well, by its head."""
EXPERIMENT = Experiment(
    name="multi_dataset", doc=__doc__, options=Config, prepare=prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    summary=summary_of, legend=LEGEND, untold=lambda record: record["config"]["quick"],
    stem=lambda record: ["+".join(record["config"]["datasets"])])  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
