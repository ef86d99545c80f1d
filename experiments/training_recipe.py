"""Does it depend on how networks were trained whether they can be merged?

    python experiments/training_recipe.py                        # MNIST, three pairs
    python experiments/training_recipe.py --dataset digits       # needs no data
    python experiments/training_recipe.py --preset paper --model vgg16 --work-dir runs  # on a GPU

Pairs of networks that differ in their random seed are averaged with weights 1 - alpha and alpha,
directly and after matching the second network's weights to the first's. The barrier is by how much
the accuracy of the average falls below the line between those of the two networks, at most. With
--preset paper, --model is vgg16, vgg16-bn, vgg16-ln, resnet20 or resnet20-ln-w4 on CIFAR-10 (those
with BatchNorm after RESET, those with LayerNorm with both initialisations), or vgg16-ln with
--dataset mnist.

The paper ("Vanishing Feature"): after matching, the barrier falls with the learning rate and with
weight decay, which accuracy does not explain; direct averages change little. The normal
initialisation gives a larger barrier and distance than the uniform one at the low rate alone.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
from kit import cli, edges, figures, grid, records, tables, timing
from kit.experiment import Experiment, Run, Setup
from kit.grid import Cell, Plan, cells_of, sets_of
from kit.records import Record, Row
from papers.training_recipe import CLAIMS, number, told

from vfjax import align, data, diagnose, models, train

PAPER_MODELS = ("vgg16", "vgg16-bn", "vgg16-ln", "resnet20", "resnet20-ln")
CPU = Plan("mlp", models.MLP((128,) * 3), train.Recipe(schedule="cosine", epochs=5), {
    "rates": (0.001, 0.003, 0.01, 0.03, 0.1), "decay": 0.003, "low": 0.01,
    "decays": (0.003, 0.006, 0.009, 0.012, 0.015), "rate": 0.01,
    "initialisers": ("he_normal", "uniform")})  # fmt: skip
# To see that it runs: fewer cells, networks that compile fast.
FEWER = CPU.grid | {"rates": (0.001, 0.01, 0.1), "decays": (0.003, 0.015)}
QUICK = dataclasses.replace(CPU, model=models.MLP((16, 16)), grid=FEWER)
NAMES = {"rate": "learning rate", "decay": "weight decay"}
EDGES, MATCHES = ("model 1", "model 2"), ("direct", "matched")
UNIT = "barrier, points of test accuracy"


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
    seeds: tuple[int, ...] = grid.seeds(6)
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
        plan = QUICK if config.quick else CPU
    return dataclasses.replace(plan, factor=grid.epochs_factor(config, plan.recipe, dataset))


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
    initialisers = list(dict.fromkeys([model.initialiser, "uniform", "kaiming_normal"]))
    chosen = {"rates": (0.01, 0.03, 0.05, 0.07, 0.1), "decay": 1e-4, "low": 0.01, "rate": 0.1,
              "decays": (1e-4, 2e-4, 3e-4, 4e-4, 5e-4),
              "initialisers": initialisers[: 2 if name.endswith("-ln") else 1]}  # fmt: skip
    if dataset.name == "mnist":
        chosen |= {"rates": (0.001, 0.01, 0.1), "decay": recipe.weight_decay, "decays": ()}
        chosen |= {"initialisers": ("uniform",)}
    return Plan(name if width is None else f"{name}-w{width:g}", model, recipe, chosen)


def prepare(config: Config, watch: timing.Stopwatch) -> Setup:
    seeds = grid.pairs_of(config)
    wanted = "cifar10" if config.preset == "paper" else "mnist"
    dataset, images = grid.load(config, watch, wanted)
    plan = plan_of(config, dataset)
    with watch("trace"):
        net = edges.traced(plan.model, dataset)
    model = {"name": plan.name, "description": repr(plan.model), "depth": net.depth}
    record = {
        "config": {"model": plan.name},
        "data": images,
        "model": model | {"parameters": net.params},
        "recipe": dataclasses.asdict(plan.recipe),
        "grid": plan.grid,
        "renormalised": "reset" if net.norms else None,
        "seeds": {"pairs": seeds, "matching": [first for first, _ in seeds]},
    }
    return Setup(config, (plan, net, dataset, seeds), record)


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Each pair of networks, trained in each way of the plan, and merged."""
    plan, net, dataset, seeds = run.setup
    test, train_images = dataset.batches("test"), dataset.batches("train")
    options = {"renormalise": "reset", "data": train_images} if net.norms else {}
    cells = cells_of(plan.grid)

    # Of one pair at a time, for it keeps networks.
    @functools.lru_cache(maxsize=1)
    def trainer_of(k: int) -> Any:
        return grid.trainer(plan, dataset, seeds[k], config.work_dir)

    for key in run.cells({"pair": k} | c._asdict() for k in range(len(seeds)) for c in cells):
        k, *values = key.values()
        cell = Cell(*values)
        run.note("recipes", cell=str(cell), **dataclasses.asdict(plan.recipe_of(cell)))
        try:
            with run.watch("training"):
                networks, snapshots = trainer_of(k)(cell)
        except FloatingPointError as error:
            yield key | {"diverged": str(error)}
            continue
        snapshots[None] = [one.variables for one in networks]
        for epoch in list(snapshots):
            with run.watch("matching"):
                # They are large.
                trees = snapshots.pop(epoch)
                found = align.match_weights(net, *trees, key=jax.random.key(seeds[k][0]))
                matched = [trees[0], net.spec.permute(trees[1], found.permutations)]
            merged = dict(zip(MATCHES, (trees, matched), strict=True))
            for name, ends in merged.items():
                distance = diagnose.distance(*ends, net=net).total
                yield key | {"merged": name, "epoch": epoch, "distance": distance}
        yield key | {"converged": found.converged, "moved": found.moved}
        for name, ends in merged.items():
            with run.watch("interpolation"):
                curve = diagnose.interpolation(net, ends, test, **options)
            yield from records.curve_rows(key | {"merged": name}, curve)
        for name, one, accuracy in zip(EDGES, networks, curve.edge_accuracy, strict=True):
            row = key | {"network": name, "accuracy": float(accuracy)}
            yield row | {"train_accuracy": one.history[-1]["accuracy"]}


def title_of(record: Record) -> str:
    if record["config"]["preset"] == "paper":
        return grid.titled(record, record["model"]["name"], "cifar10")
    return grid.titled(record, "MLPs, 3 x 128")


def finding_of(record: Record) -> str:
    """How far the matched barrier falls in both sweeps."""
    parts, sets = [], sets_of(record["grid"])
    for name, what in NAMES.items():
        if sets[name]:
            low, high = (told(number(record, cell)) for cell in sets[f"{name}, ends"])
            parts.append(f"from {low} to {high} points with the {what}")
    return f"The matched barrier goes {' and '.join(parts)}"


def tables_of(record: Record) -> list[tables.Table]:
    """Accuracies and barriers in per cent, distances; and what diverged."""
    lines = {str(cell): cell._asdict() for cell in cells_of(record["grid"])}
    columns = [tables.Column("accuracy", {"network": EDGES})]
    columns += [tables.Column(f"barrier, {m}", {"merged": m}, "barrier") for m in MATCHES]
    columns += [
        tables.Column(f"distance, {m}", {"merged": m, "epoch": None}, "distance",
                      lambda values: tables.percent([value / 100 for value in values]))
        for m in MATCHES
    ]  # fmt: skip
    pairs = len(record.rows.distinct("pair"))
    lost = {name: len(record.rows.where(**line).values("diverged")) for name, line in lines.items()}
    said = [f"with {name}, {n} of {pairs} pairs diverged" for name, n in lost.items() if n]
    head = {"title": record["title"], "corner": "trained with", "caption": "; ".join(said)}
    return [tables.pivot(record.rows, lines, columns, **head)]


def figure_of(record: Record) -> Any:
    """Barriers against rate and decay, the ablations, distances during training."""
    sets, rows, panels = sets_of(record["grid"]), record.rows, []
    first, *others = record["grid"]["initialisers"]
    kinds = [("direct", first, "direct"), ("matched", first, "matched")]
    kinds += [("matched", other, 2) for other in others]
    swept = [name for name in NAMES if sets[name]]
    for name in swept:
        ticks = [getattr(cell, name) for cell in sets[name]]
        fixed = sets[name][0]._asdict() | {name: ticks}
        lines = [
            figures.line(rows, name, "barrier", name=f"{match}, {initialiser}", method=method,
                         dashed=match == "direct", merged=match,
                         **fixed | {"initialiser": initialiser})
            for match, initialiser, method in kinds
        ]  # fmt: skip
        x, style = NAMES[name], {"ticks": ticks, "log_x": name == "rate"}
        panels.append(figures.Panel(f"by {x}", x, UNIT, lines, **style))
    ablations = [cell for name in swept for cell in sets[f"{name}, one more epoch"]]
    compared = sets.get("initialisers", [])
    points, paths = [], []
    for k, cell in enumerate(dict.fromkeys([*ablations, *compared]), start=3):
        style = {"name": str(cell), "method": k, "dashed": cell != cell.source}
        here = rows.where(**cell._asdict())
        if cell in ablations:
            at = {"networks": 100 * number(record, cell, "accuracy")}
            here = records.Rows(row | at for row in here)
            points.append(figures.line(here, "networks", "barrier", merged="matched", **style))
        if cell in compared:
            paths.append(figures.line(here, "epoch", "distance", scale=1, merged="direct", **style))
    x, y = "test accuracy of the networks (%)", f"{UNIT}, matched"
    panels.append(figures.Panel("one more epoch", x, y, points))
    if paths:
        title, y = "by initialisation, not matched", "L2 distance between the two networks"
        panels.append(figures.Panel(title, "epochs", y, paths))
    return figures.of_record(record, panels, columns=2, bars=grid.bars(record))


LEGEND = """Distances are L2, between the networks of a pair. The default networks are MLPs, with a
cosine to zero; their normal initialisation is that of He et al. Size and grid were chosen on images
held out of training, such that all train, and barriers are neither none nor whole. Weight decays
are 30 times the paper's, by what its rates add up to more over its 160 epochs; they are swept at
the low rate (the paper: at 0.1), for at the high one hardly any barrier is left."""
EXPERIMENT = Experiment(
    name="training_recipe", doc=__doc__, options=Config, prepare=prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    legend=LEGEND, stem=grid.stem, untold=grid.quick)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
