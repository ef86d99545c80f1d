"""Can networks of different data sets be zipped into one, with a head for each?

    python experiments/multi_dataset.py                          # digits, MNIST, CIFAR-10 in grey
    python experiments/multi_dataset.py --datasets mnist cifar10
    python experiments/multi_dataset.py --quick                  # seconds, needs no data
    python experiments/multi_dataset.py --preset paper           # full width, on a GPU

One network is trained on each data set, from another initialisation, on grey images of one size.
Then the first l of L layers are merged and the others kept, so that every data set has its own head
("l/L"; the last layer always is one's own): weights averaged as they are; permuted to a shared
universe, which for two networks is the assignment; or zipped with ZipIt!'s default alpha and beta.
All pairs of data sets are merged, and all at once. Matching takes as many training images of every
data set as the smallest has, mixed; on the same images BatchNorm statistics are measured anew in
every network, the ensemble's too, which is each network on its own data set. Accuracies are by data
set, which is known at test time, and their mean.

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
import jax.numpy as jnp
from kit import cli, edges, figures, sets, tables
from kit.experiment import Experiment, Run, Setup
from kit.records import Record, Row, joined
from kit.sets import LABELS
from kit.timing import Stopwatch
from papers.multi_dataset import CLAIMS, GROUPS, METHODS, counts_of, mean_of, sets_of, zips

import vfjax
from vfjax import data, merge, models, train

DATASETS = ("digits", "mnist", "cifar10")


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(cli.Options):
    datasets: tuple[str, ...] | None = cli.option(
        None, f"two data sets or more, of {', '.join(sets.NAMES)} (default: {' '.join(DATASETS)}; "
        "with --quick digits digits-turned)", nargs="+", choices=sets.NAMES, metavar="NAME")
    preset: str = cli.option(
        "cpu", "cpu is what two cores do in minutes: a quarter of the width, 16x16 pixels; paper "
        "is full width, 32x32 pixels and all images (of these data sets, not the paper's)",
        choices=tuple(sets.PRESETS), part="{}")
    seed: int = cli.option(
        0, "of the first network; the others have the next ones", type=cli.seed_of, part="seed{}")
    work_dir: str | None = cli.option(
        None, "folder in which networks are kept, so that a run that was stopped goes on")
    quick: bool = cli.option(
        False, "tiny MLPs, few images, no data to download: to see that it runs; the numbers mean "
        "nothing")
# fmt: on


def prepare(config: Config, watch: Stopwatch) -> Setup:
    """Checks options, reads images, trains a network for each data set."""
    names = config.datasets or (("digits", "digits-turned") if config.quick else DATASETS)
    if len(names) < 2 or len(set(names)) != len(names):
        raise cli.UserError(
            f"--datasets must be two or more different ones, got {' '.join(names)}; "
            f"{joined(['digits', *sets.DISGUISES])} need no files."
        )
    if config.quick and config.preset != "cpu":
        raise cli.UserError("--quick has sizes of its own: leave out --preset.")
    preset = sets.QUICK if config.quick else sets.PRESETS[config.preset]
    with watch("data"):
        try:
            datasets = [sets.load(name, preset, config.data_dir) for name in names]
        except data.DatasetError as error:
            # One data set alone, as is advised there, is none to merge.
            said = str(error).replace("The data set 'digits' needs neither.", "").strip()
            raise cli.UserError(
                f"{said} Without files: --quick, or --datasets digits {next(iter(sets.DISGUISES))}."
            ) from error
    classes, trees = max(dataset.classes for dataset in datasets), []
    model: Any = models.create(sets.MODEL, width=preset.width, classes=classes)
    model = dataclasses.replace(sets.QUICK_MODEL, classes=classes) if config.quick else model
    recipes = [sets.recipe_of(preset, dataset) for dataset in datasets]
    for index, (dataset, recipe) in enumerate(zip(datasets, recipes, strict=True)):
        work = None if config.work_dir is None else Path(config.work_dir) / dataset.name
        with watch("training"):
            run = train.fit(model, recipe, dataset, seed=config.seed + index, work_dir=work)
            trees.append(jax.device_get(run.variables))
    with watch("trace"):
        x = jax.ShapeDtypeStruct((sets.BATCH, preset.size, preset.size, 1), jnp.float32)
        net = vfjax.trace(models.apply_fn(model), trees[0], x)
    about = [
        {"name": d.name, "source": d.source.split(" in ")[0], "classes": d.classes,
         "train_images": len(d.train_images), "test_images": len(d.test_images),
         "recipe": dataclasses.asdict(recipe)}
        for d, recipe in zip(datasets, recipes, strict=True)
    ]  # fmt: skip
    described = {"name": "mlp" if config.quick else sets.MODEL, "depth": net.depth}
    record = {
        "config": {"datasets": list(names)},
        "preset": dataclasses.asdict(preset),
        "data": about,
        "model": described | {"parameters": net.params},
        "seeds": {"networks": [config.seed + index for index in range(len(names))]},
    }
    found = sets.Trained(net, datasets, trees, preset)
    return Setup(config, found, record, tuple(map(edges.digest, trees)))


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Each network as it was trained; then all combinations, by method and layers merged."""
    net, datasets, trees = run.setup.net, run.setup.datasets, run.setup.trees
    names = [dataset.name for dataset in datasets]

    @functools.lru_cache(maxsize=1)
    def combination(joint: str) -> sets.Combination:
        chosen = [names.index(name) for name in joint.split("+")]
        parts = [datasets[k] for k in chosen], [trees[k] for k in chosen]
        return sets.Combination(net, *parts, run.watch)

    ways = [("network", None), *itertools.product(METHODS, run.setup.preset.layers)]
    cells: list[tuple[str, str, int | None]] = [(name, "as trained", None) for name in names]
    for chosen in sets.combinations(len(names)):
        cells += [("+".join(names[k] for k in chosen), *way) for way in ways]
    keys = ("datasets", "method", "layers")
    for cell in run.cells(dict(zip(keys, one, strict=True)) for one in cells):
        joint, method, layers = cell.values()
        if method == "as trained":
            k = names.index(joint)
            with run.watch("evaluation"):
                (found,) = sets.Tests([datasets[k]]).accuracies(merge.as_merged(net, trees[k]))
            yield cell | {"head": joint, "tested": joint, "accuracy": found[joint]}
            continue
        of = combination(joint)
        run.note("statistics", datasets=joint, images=sum(map(len, of.statistics)))
        yield from (cell | row for row in of.measured(method, layers))


def summary_of(record: Record) -> dict[str, Any]:
    keys, found = list(map(str, counts_of(record))), {}
    for group, names in ((group, sets_of(record, group)) for group in GROUPS):
        if names:
            means = {m: dict(zip(keys, zips(record, group, m), strict=True)) for m in METHODS}
            found[group] = {"ensemble": mean_of(record, names, "ensemble")} | means
    return found


def title_of(record: Record) -> str:
    labels = [LABELS[one["name"]] for one in record["data"]]
    what = f"{record['model']['name']}, {record['preset']['width']:g} wide"
    what = "MLPs, QUICK, MEANS NOTHING" if record["config"]["quick"] else what
    return f"{joined(labels)}: {what}, a head each"


def finding_of(record: Record) -> str:
    parts, counts, depth = [], counts_of(record), record["model"]["depth"]
    for group, found in record["summary"].items():
        few, most = ([f"{100 * found[method][str(counts[k])]:.1f}%" for method in METHODS]
                     for k in (0, -1))  # fmt: skip
        parts.append(
            f"{GROUPS[group]}: ensemble {100 * found['ensemble']:.1f}%, {counts[0]}/{depth} layers "
            f"zipped {few[2]} (permuted {few[1]}), {counts[-1]}/{depth} {most[2]} ({most[1]})"
        )
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def tables_of(record: Record) -> list[tables.Table]:
    rows, depth, found = record.rows, record["model"]["depth"], []
    for joint in rows.distinct("datasets", method="network"):
        names, lines = joint.split("+"), {}
        for head in names:
            lines[f"network of {LABELS[head]}"] = {"method": "network", "head": head}
        lines["ensemble"] = {"own": True, "method": "network"}
        for method, text in METHODS.items():
            for count in counts_of(record):
                lines[f"{text} {count}/{depth}"] = {"method": method, "layers": count}
        known = type(rows)(
            row | {"own": row["head"] == row["tested"], "mean": row["accuracy"]}
            for row in rows.where(datasets=joint)
        )
        columns = [tables.Column(LABELS[name], {"tested": name}) for name in names]
        columns += [tables.Column("mean", key="mean", show=tables.number(4, 0.01))]
        columns += tables.ratios()
        about = {"title": joined(LABELS[name] for name in names), "corner": "test accuracy, %"}
        found.append(tables.pivot(known, lines, columns, **about))
    return found


def figure_of(record: Record) -> Any:
    """Accuracies against the number of merged layers: pairs, all at once, and by data set."""
    x, y = f"layers merged, of {record['model']['depth']}", "mean test accuracy (%)"
    counts, limits, panels = counts_of(record), {"y_limits": (0, 102)}, []
    looks = {"average": "direct", "permute": "activation", "zip": "zipit"}
    last = record.rows.distinct("datasets", method="network")[-1]
    for group, found in record["summary"].items():
        title = "mean of pairs" if group == "pairs" else f"all {len(record['data'])} at once"
        lines = [
            figures.Line(text, counts, [100 * v for v in found[method].values()],
                         method=looks[method])
            for method, text in METHODS.items()
        ]  # fmt: skip
        lines += figures.levels({"ensemble": found["ensemble"]})
        panels.append(figures.Panel(title, x, y, lines, ticks=counts, **limits))
    lines = []
    for place, name in enumerate(last.split("+")):
        own = record.rows.where(datasets=last, head=name, tested=name)
        zipped, level = own.where(method="zip"), 100 * own.mean(method="network")
        lines.append(figures.line(zipped, "layers", name=f"{LABELS[name]}, ZipIt!", method=place))
        lines.append(figures.Line(f"{LABELS[name]}, ensemble", None, level, None, place, True))
    title = f"{panels[-1].title}, by data set"
    panels.append(figures.Panel(title, x, figures.ACCURACY, lines, ticks=counts, **limits))
    return figures.of_record(record, panels)


LEGEND = """l/L: the first l of L layers merged, a head for each data set behind them; ensemble:
each network on its own data set. BatchNorm's statistics are those of images of all data sets,
mixed, in the networks, too; network of a data set: tested on the others as well, by its head."""
EXPERIMENT = Experiment(
    name="multi_dataset", doc=__doc__, options=Config, prepare=prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    summary=summary_of, legend=LEGEND, untold=lambda record: record["config"]["quick"],
    stem=lambda record: ["+".join(record["config"]["datasets"]),
                         *(["quick"] if record["config"]["quick"] else [])])  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
