"""Does it depend on how networks were trained whether they can be merged?

    python experiments/training_recipe.py                        # MNIST, three pairs
    python experiments/training_recipe.py --dataset digits       # needs no data
    python experiments/training_recipe.py --preset paper --model vgg16 --work-dir runs  # on a GPU

Pairs of networks that differ in their random seed are averaged with weights 1 - alpha and alpha,
directly and after matching the second network's weights to the first's. The barrier is by how much
the test accuracy of the average falls below the line between those of the two networks, at most,
over 11 alphas. With --preset paper, --model is vgg16, vgg16-bn, vgg16-ln, resnet20 or
resnet20-ln-w4 on CIFAR-10 (those with BatchNorm after RESET, those with LayerNorm with both
initialisations), or vgg16-ln with --dataset mnist.

The paper ("Vanishing Feature"): after matching, the barrier falls with the learning rate (VGG16-LN,
ResNet20: by over 40% from 0.01 to 0.1) and with weight decay (VGG16: by over 60% from 1e-4 to
5e-4), while direct averages change little. Accuracy does not explain this: one epoch at the low
rate takes networks of the high rate to the accuracy of the low one, but not to its barrier, and so
for weight decay. The normal initialisation gives a larger barrier and distance than the uniform one
at the low rate alone. VGG16-LN on MNIST cannot be merged if trained at 0.001, but can from 0.01 on.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from kit import cli, edges, figures, grid, records, tables, timing
from kit.experiment import Experiment, Run, Setup
from kit.grid import Cell, Grid, Plan
from kit.records import Record, Row
from papers import training_recipe as paper
from papers.training_recipe import MATCHES, grid_of, where

from vfjax import data, models, train

PAPER_MODELS = ("vgg16", "vgg16-bn", "vgg16-ln", "resnet20", "resnet20-ln")
CPU_MODEL = models.MLP((128,) * 3)
CPU_RECIPE = train.Recipe(schedule="cosine", epochs=5)
CPU_GRID = Grid(rates=(0.001, 0.003, 0.01, 0.03, 0.1), decays=(0.003, 0.006, 0.009, 0.012, 0.015),
                rate=0.01, decay=0.003, low=0.01,
                initialisers=("he_normal", "uniform"))  # fmt: skip
# To see that it runs: fewer cells, networks that compile fast.
QUICK_MODEL = models.MLP((16, 16))
QUICK_GRID = dataclasses.replace(CPU_GRID, rates=(0.001, 0.01, 0.1), decays=(0.003, 0.015))
LABELS = {"uniform": "uniform", "he_normal": "normal", "kaiming_normal": "normal"}
NAMES = {"rate": "learning rate", "decay": "weight decay"}
UNIT = "barrier, points of test accuracy"
# Colours: the other initialisation; by ablation what is retrained, and what that is held against;
# rates.
OTHER, ABLATED, BESIDE, RATES = 2, {"rate": 1, "decay": 3}, {"rate": 6, "decay": 7}, (4, 5)


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(grid.PairOptions):
    dataset: str = cli.option(
        "auto", "images to train and test on; auto is MNIST, with --preset paper CIFAR-10, where "
        "it is found, else, with a warning and in the figure's title, the digits that come with "
        "scikit-learn", choices=("auto", "mnist", "digits", "cifar10"))
    model: tuple[str, float | None] | None = cli.option(
        None, f"with --preset paper, the networks: {', '.join(PAPER_MODELS)} (default: vgg16)",
        type=cli.model_of, metavar="NAME[-wWIDTH]",
        part=lambda record: {"paper": record["config"]["model"]}.get(record["config"]["preset"]))
    preset: str = cli.option(
        "cpu", "cpu is MLPs on MNIST and a small grid; paper the networks, the grid and the 160 "
        "epochs of the paper, meant for a GPU", choices=("cpu", "paper"), part="{}")
    seeds: tuple[int, ...] = grid.seeds(range(6), "networks")
    work_dir: str | None = cli.option(
        None, "folder in which the states of runs are kept, so that those of a call that was "
        "stopped go on; not of the runs during which distances are measured")
# fmt: on


def plan_of(config: Config, dataset: data.Dataset) -> Plan:
    """What is trained, from the options and the data that was found."""
    if config.preset == "paper":
        plan = paper_plan(*(config.model or ("vgg16", None)), dataset)
    elif config.model is not None or dataset.name == "cifar10":
        raise cli.UserError("--model and --dataset cifar10 need --preset paper.")
    else:
        small = (QUICK_MODEL, CPU_RECIPE, QUICK_GRID)
        plan = Plan("mlp", *(small if config.quick else (CPU_MODEL, CPU_RECIPE, CPU_GRID)))
    if config.quick:
        recipe = dataclasses.replace(plan.recipe, epochs=grid.QUICK_EPOCHS)
        return dataclasses.replace(plan, recipe=recipe)
    return dataclasses.replace(plan, factor=grid.steps_factor(dataset, plan.recipe))


def paper_plan(name: str, width: float | None, dataset: data.Dataset) -> Plan:
    """The paper's grid for a network."""
    if name not in PAPER_MODELS:
        known = ", ".join(PAPER_MODELS)
        raise cli.UserError(f"--model must be one of {known} with --preset paper, got {name}.")
    if dataset.name == "digits":
        raise cli.UserError(f"--model {name} is not for the digits; give --data-dir.")
    options = {} if width is None else {"width": width}
    model = models.create(name, classes=dataset.classes, **options)
    recipe = train.recipe_for(name, dataset.name, preset="paper")
    initialisers = [model.initialiser, "uniform", "kaiming_normal"]
    names = tuple(dict.fromkeys(initialisers))[: 2 if name.endswith("-ln") else 1]
    rates, decays = (0.01, 0.03, 0.05, 0.07, 0.1), (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
    chosen = Grid(rates, decays, rate=0.1, decay=1e-4, low=0.01, initialisers=names)
    if dataset.name == "mnist":
        chosen = Grid((0.001, 0.01, 0.1), (), 0.1, recipe.weight_decay, 0.01, ("uniform",))
    return Plan(name if width is None else f"{name}-w{width:g}", model, recipe, chosen)


def prepare(config: Config, watch: timing.Stopwatch) -> Setup:
    seeds = grid.pairs_of(config)
    with watch("data"):
        dataset = grid.load(config, "cifar10" if config.preset == "paper" else "mnist")
    plan = plan_of(config, dataset)
    with watch("trace"):
        net = edges.traced(plan.model, dataset)
    counts = {"train": len(dataset.train_images), "test": len(dataset.test_images)}
    about = {"name": plan.name, "description": repr(plan.model), "depth": net.depth}
    record = {
        "config": {"model": plan.name},
        "data": records.about(dataset, **counts),
        "model": about | {"parameters": net.params},
        "recipe": dataclasses.asdict(plan.recipe),
        "grid": dataclasses.asdict(plan.grid),
        "renormalised": "reset" if net.norms else None,
        "seeds": {"pairs": [list(two) for two in seeds], "matching": [two[0] for two in seeds]},
    }
    return Setup(config, (plan, net, dataset, seeds), record)


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Each pair of networks, trained in each way of the plan, and merged."""
    plan, net, dataset, seeds = run.setup
    pairs: dict[int, grid.Pair] = {}
    by_key = {tuple(where(cell).values()): cell for cell in plan.cells()}
    keys = [{"pair": k, **where(cell)} for k in range(len(seeds)) for cell in plan.cells()]
    for key in run.cells(keys):
        k, *values = key.values()
        if k not in pairs:
            pairs = {k: grid.Pair(plan, net, dataset, seeds[k], config.work_dir, run.watch)}
        cell = by_key[tuple(values)]
        run.note("recipes", cell=str(cell), **dataclasses.asdict(plan.recipe_of(cell)))
        yield from pairs[k].measure(cell, key)


def title_of(record: Record) -> str:
    own = {"cpu": ("MLPs, 3 x 128", "mnist"), "paper": (record["model"]["name"], "cifar10")}
    name, wanted = own[record["config"]["preset"]]
    return grid.titled(record, name, len(record["seeds"]["pairs"]), wanted)


def finding_of(record: Record) -> str:
    """How far the matched barrier falls in both sweeps."""
    parts = []
    for name, what in NAMES.items():
        if cells := paper.ends(record, name):
            (low, at), (high, to) = (
                (paper.points(paper.barrier(record, cell)), f"{getattr(cell, name):g}")
                for cell in cells)  # fmt: skip
            parts.append(f"from {low} points at {what} {at} to {high} at {to}")
    return f"The matched barrier goes {' and '.join(parts)}"


def tables_of(record: Record) -> list[tables.Table]:
    """Accuracies and barriers in per cent, distances; and what diverged."""
    cells = Plan("", None, train.Recipe(), grid_of(record)).cells()
    lines = {str(cell): where(cell) for cell in cells}
    columns = [tables.Column("accuracy", {"network": ("model 1", "model 2")})]
    columns += [tables.Column(f"barrier, {m}", {"merged": m}, "barrier") for m in MATCHES]
    columns += [tables.Column(f"distance, {m}", {"merged": m, "epoch": None}, "distance", spread)
                for m in MATCHES]  # fmt: skip
    said, count = [], len(record["seeds"]["pairs"])
    for name, line in lines.items():
        lost = len(record.rows.where(**line).values("diverged"))
        said += [f"with {name}, {lost} of {count} pairs diverged"] if lost else []
    head = {"title": record["title"], "corner": "trained with", "caption": "; ".join(said)}
    return [tables.pivot(record.rows, lines, columns, **head)]


def spread(values: Sequence[float]) -> str:
    mean, error = records.mean_std(values)
    return f"{mean:.2f}" + (f" ± {error:.2f}" if error else "")


def figure_of(record: Record) -> Any:
    """Barriers against rate and decay, the ablations, distances during training."""
    g, row = grid_of(record), []

    def curve(name: str, cells: Any, x: Any, match: str = "matched", **style: Any) -> figures.Line:
        rows = [paper.rows_of(record, cell).where(merged=match) for cell in cells]
        found = 100 * np.array([records.mean_std(here.values("barrier")) for here in rows])
        error = found[:, 1] if (found[:, 1] > 0).any() else None
        return figures.Line(name, [x(cell) for cell in cells], found[:, 0], error, **style)

    for name, what in NAMES.items():
        x, cells = operator.attrgetter(name), paper.sweep(record, name)
        lines = [curve(m, cells, x, m, method=m, dashed=m == "direct") for m in MATCHES]
        rates = (g.low, g.rates[-1]) if name == "rate" else ()
        if rates and g.initialisers[1:]:
            found = [Cell(g.initialisers[1], rate, g.decay) for rate in rates]
            text = f"matched, {LABELS[g.initialisers[1]]} init."
            lines.append(curve(text, found, x, method=OTHER))
        fixed = f"decay {g.decay:g}, {LABELS[g.initialisers[0]]} init."
        label = f"{what} ({fixed if name == 'rate' else f'rate {g.rate:g}'})"
        panel = figures.Panel(f"by {what}", label, UNIT, lines, ticks=[x(c) for c in cells])
        row += [dataclasses.replace(panel, log_x=bool(rates))] if cells else []
    points: dict[Cell, tuple[str, dict[str, Any]]] = {}
    for name in (name for name in NAMES if paper.sweep(record, name)):
        own, after, other = paper.ablation(record, name)
        high, low = (f"{name} {getattr(cell, name):g}" for cell in (own, other))
        points[own] = high, {"method": ABLATED[name]}
        points[after] = f"{high}, then {low}", {"method": ABLATED[name], "dashed": True}
        # Both ablations may compare with the same networks.
        shared = f"{points[other][0]}, " if other in points else ""
        points[other] = shared + low, {"method": BESIDE[name]}
    lines = [curve(name, [cell], lambda cell: 100 * paper.edges(record, cell), **style)
             for cell, (name, style) in points.items()]  # fmt: skip
    x = "test accuracy of the networks (%)"
    row.append(figures.Panel("one more epoch", x, f"{UNIT}, matched", lines))
    lines = []
    if g.initialisers[1:]:
        rates = zip(RATES, (g.low, g.rates[-1]), strict=True)
        for name, (method, rate) in itertools.product(g.initialisers, rates):
            rows = paper.rows_of(record, Cell(name, rate, g.decay)).where(merged="direct")
            text, dashed = f"{LABELS[name]} init., rate {rate:g}", name == "uniform"
            lines.append(figures.line(rows, "epoch", "distance", name=text, method=method,
                                      dashed=dashed, scale=1))  # fmt: skip
        top = 1.1 * max((value for one in lines for value in one.y), default=1.0)
        title, y = "by initialisation, not matched", "L2 distance between the two networks"
        row.append(figures.Panel(title, "epochs", y, lines, y_limits=(0, top)))
    bars = f"standard deviation over {len(record['seeds']['pairs'])} pairs"
    about = {"finding": record["finding"], "subtitle": record["title"], "bars": bars}
    return figures.draw(row, columns=2, **about)


LEGEND = """Distances are L2, between the networks of a pair. The default networks are MLPs, with a
cosine to zero; their normal initialisation is that of He et al. Size and grid were chosen on images
held out of training, such that all train, and barriers are neither none nor whole. Weight decays
are 30 times the paper's, by what its rates add up to more over its 160 epochs; they are swept at
the low rate (the paper: at 0.1), for at the high one hardly any barrier is left."""
EXPERIMENT = Experiment(
    name="training_recipe", doc=__doc__, options=Config, prepare=prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=paper.CLAIMS,
    legend=LEGEND, stem=grid.stem, untold=lambda record: record["config"]["quick"])  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
