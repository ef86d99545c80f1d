"""Pairs of networks that an experiment trains itself: options, data, recipes, grids of cells."""

import collections
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kit import cli, edges, records, timing
from kit.claims import Decision, Rule
from kit.experiment import Experiment, Setup
from kit.records import Record
from vfjax import data, models, train

PyTree = Any
BATCH = 500
# --quick: to see that it runs. Nothing is learnt.
QUICK_IMAGES = 300


def seeds(count: int) -> Any:
    text = "seeds of the networks; the first and the second make a pair, the third and the fourth "
    text += "another, and so on"
    return cli.option(tuple(range(count)), text, type=cli.seed_of, metavar="S", part="seeds{}")


# fmt: off
@dataclasses.dataclass(frozen=True)
class PairOptions(cli.Options):
    """The options of experiments that train their pairs."""

    dataset: str = cli.option(
        "auto", "images to train and test on; auto is MNIST where it is found, else, with a "
        "warning and in the figure's title, the digits that come with scikit-learn",
        choices=("auto", "mnist", "digits"))
    seeds: tuple[int, ...] = seeds(10)
    quick: bool = cli.option(
        False, f"one pair, 1 epoch on {QUICK_IMAGES} images: to see that it runs; the "
        "numbers mean nothing")


@dataclasses.dataclass(frozen=True)
class LinearOptions(PairOptions):
    epochs: int | None = cli.option(
        None, "passes over the training images (default: the paper's; for the digits as many as "
        "make equally many steps)", type=cli.count_of("epochs"), part="epochs{}")
    preset: str = cli.option(
        "paper", "networks, recipe and number of models are the paper's, which two cores can train",
        choices=("paper",))
# fmt: on


def pairs_of(config: PairOptions) -> list[tuple[int, int]]:
    """The seeds of each pair: no model is in two of them, so that pairs are independent."""
    seeds = config.seeds
    if len(seeds) % 2 or len(set(seeds)) != len(seeds):
        raise cli.UserError(f"--seeds must be different and come in pairs, got {list(seeds)}.")
    pairs = list(zip(seeds[::2], seeds[1::2], strict=True))
    return pairs[:1] if config.quick else pairs


def load(
    config: PairOptions, watch: timing.Stopwatch, prefer: str = "mnist"
) -> tuple[data.Dataset, dict[str, Any]]:
    """The images, and what records say of them."""
    count = QUICK_IMAGES if config.quick else None
    with watch("data"):
        found = data.load(config.dataset, config.data_dir, train=count, test=count, prefer=prefer)
    counts = {"train": len(found.train_images), "test": len(found.test_images)}
    return found, records.about(found, **counts)


def epochs_factor(config: PairOptions, recipe: train.Recipe, dataset: data.Dataset) -> float:
    """For one epoch of a recipe there are so many: on the digits as many steps as on MNIST."""
    if config.quick:
        return 1 / recipe.epochs
    counts = 60_000, len(dataset.train_images)
    wanted, steps = (math.ceil(count / recipe.batch_size) for count in counts)
    return wanted / steps if dataset.name == "digits" else 1.0


def titled(record: Record, what: str, wanted: str = "mnist") -> str:
    """Data and networks, how many pairs, and whether the numbers mean anything."""
    count = len(record.rows.distinct("pair"))
    title = f"{records.dataset_label(record['data'], wanted)}: {what}"
    title += f", mean of {count} pairs" * (count > 1)
    return title + ", QUICK, MEANS NOTHING" * record["config"]["quick"]


def bars(record: Record) -> str:
    return f"standard deviation over {len(record.rows.distinct('pair'))} pairs"


def quick(record: Mapping[str, Any]) -> bool:
    return record["config"]["quick"]


def stem(record: Mapping[str, Any]) -> list[str]:
    """What names of files begin with after the experiment's: the data set."""
    return [record["data"]["name"], *["quick"] * quick(record)]


def over_pairs(record: Record, rule: Rule) -> Decision | None:
    """A rule on the means over pairs; says of how many pairs it gives the same."""
    (holds, here), rows = rule(record), record.rows
    ones = [rule(Record(record | {"rows": rows.where(pair=k)})) for k in rows.distinct("pair")]
    same = [one for one, _ in ones].count(holds)
    return holds, here if same == len(ones) else f"{here} (so in {same} of {len(ones)} pairs)"


# -------------------------------------------------------------------------------- linear networks


def linear(
    recipe: train.Recipe, networks: Mapping[str, models.LinearNetwork], **parts: Any
) -> Experiment:
    """An experiment on linear networks, by name; `run.setup` has what `prepare` returns here."""

    def prepare(config: LinearOptions, watch: timing.Stopwatch) -> Setup:
        pairs = pairs_of(config)
        dataset, images = load(config, watch)
        with watch("trace"):
            nets = {name: edges.traced(model, dataset) for name, model in networks.items()}
        epochs = round(recipe.epochs * epochs_factor(config, recipe, dataset))
        epochs = epochs if config.quick else config.epochs or epochs
        chosen = dataclasses.replace(recipe, epochs=epochs)

        @functools.lru_cache(maxsize=1)
        def trained(name: str, k: int) -> list[train.Trained]:
            with watch("training"):
                return train.fit_seeds(networks[name], chosen, dataset, seeds=pairs[k])

        work = types.SimpleNamespace(nets=nets, pairs=pairs, trained=trained)
        work.test = dataset.batches("test", batch_size=BATCH)
        work.statistics = dataset.batches("train", batch_size=BATCH, samples=10_000)
        images["statistics_images"] = len(work.statistics.images)
        record = {
            "data": images | {"batch_size": BATCH, "augmented": False},
            "recipe": dataclasses.asdict(chosen),
            "models": {
                name: {"description": repr(networks[name]), "parameters": net.params,
                       "groups": dict(net.spec.sizes)}
                for name, net in nets.items()
            },
            "seeds": {"edge_models": list(itertools.chain(*pairs))},
        }  # fmt: skip
        return Setup(config, work, record)

    def title(record: Record) -> str:
        model, *_ = networks.values()
        return titled(record, f"linear networks of {model.depth} layers, {model.width} wide")

    about = {"options": LinearOptions, "prepare": prepare, "title": title}
    return Experiment(**about, stem=stem, untold=quick, **parts)


# ------------------------------------------------------------------------ grids of training recipes


class Cell(NamedTuple):
    """How the two networks of a pair are trained; `then_*` are those of one more epoch, if any."""

    initialiser: str
    rate: float
    decay: float
    then_rate: float | None = None
    then_decay: float | None = None

    def __str__(self) -> str:
        text = f"{self.initialiser}, rate {self.rate:g}, decay {self.decay:g}"
        then = "" if self.then_rate is None else f", then {self.then_rate:g}, {self.then_decay:g}"
        return text + then

    @property
    def source(self) -> "Cell":
        """How those were trained that one more epoch starts from."""
        return self._replace(then_rate=None, then_decay=None)


def sets_of(grid: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """What is trained, by what it is compared for; what starts from others comes after them.

    Of a grid `rates` are with its `decay`, `decays` at its `rate`, both of the first of its
    `initialisers`; `low` is the rate that is compared with the highest, and that of more epochs.
    """
    rates, low, decay, names = (grid[key] for key in ("rates", "low", "decay", "initialisers"))
    sets = {
        "rate": [Cell(names[0], rate, decay) for rate in rates],
        "decay": [Cell(names[0], grid["rate"], decay) for decay in grid["decays"]],
    }
    if names[1:]:
        names = sorted(names, key=lambda name: name == "uniform")
        slow, fast = ([Cell(name, rate, decay) for name in names] for rate in (low, rates[-1]))
        sets |= {"initialisers, low": slow, "initialisers": slow + fast}
    for name in ("rate", "decay"):
        if cells := [cell for cell in sets[name] if cell.rate >= low]:
            start, end = cells[0], cells[-1]
            after = end._replace(then_rate=low, then_decay=start.decay)
            sets |= {f"{name}, ends": [start, end], f"{name}, one more epoch": [end, after, start]}
    if rates[0] < low:
        sets["smallest rate and ends"] = [sets["rate"][0], *sets["rate, ends"]]
    return sets


def cells_of(grid: Mapping[str, Any]) -> list[Cell]:
    return list(dict.fromkeys(itertools.chain(*sets_of(grid).values())))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A grid with its networks, whose initialiser cells replace, and recipe."""

    name: str
    model: Any
    recipe: train.Recipe
    grid: Mapping[str, Any]
    factor: float = 1.0  # For one epoch of the recipe there are so many.

    def recipe_of(self, cell: Cell) -> train.Recipe:
        rate, decay, epochs, changes = cell.rate, cell.decay, self.recipe.epochs, {}
        if cell.then_rate is not None:
            rate, decay, epochs = cell.then_rate, cell.then_decay, 1
            changes = {"schedule": "constant", "milestones": (), "warmup_epochs": 0.0}
        elif self.name.startswith("vgg16") and self.recipe.schedule == "step":
            # Where the paper has a warm-up, too.
            if decay > 1e-4 or cell.initialiser == "uniform":
                changes = {"warmup_epochs": 1.0}
        changes |= {"learning_rate": rate, "weight_decay": decay}
        epochs = max(1, round(epochs * self.factor))
        return dataclasses.replace(self.recipe, epochs=epochs, **changes)


def trainer(
    plan: Plan, dataset: data.Dataset, seeds: Sequence[int], work_dir: str | None = None
) -> Callable[[Cell], tuple[list[train.Trained], dict[Any, list[PyTree]]]]:
    """What trains the networks of a pair for a cell, and keeps those that others start from.

    Where initialisations are compared, it gives all networks after some epochs, too.
    """
    compared = sets_of(plan.grid).get("initialisers", ())

    @functools.cache
    def trained(cell: Cell) -> tuple[list[train.Trained], dict[Any, list[PyTree]]]:
        model = dataclasses.replace(plan.model, initialiser=cell.initialiser)
        recipe, starts = plan.recipe_of(cell), [None] * len(seeds)
        if cell != cell.source:
            starts = [run.variables for run in trained(cell.source)[0]]
        snapshots: dict[Any, list[PyTree]] = collections.defaultdict(list)

        def keep(epoch: int, variables: PyTree) -> None:
            # After at most twenty epochs, evenly spaced.
            if epoch % math.ceil(recipe.epochs / 20) == 0 or epoch == recipe.epochs:
                snapshots[epoch].append(jax.device_get(variables))

        runs = []
        for seed, start in zip(seeds, starts, strict=True):
            options: dict[str, Any] = {}
            if cell in compared:
                x = jnp.zeros((1, *dataset.train_images.shape[1:]))
                start, options = jax.jit(model.init)(jax.random.key(seed), x), {"on_epoch": keep}
                keep(0, start)
            elif work_dir is not None:
                folder = Path(work_dir, plan.name, str(cell).replace(", ", "-"), f"seed{seed}")
                options = {"work_dir": folder}
            run = train.fit(model, recipe, dataset, seed=seed, start=start, **options)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables)):
                raise FloatingPointError(f"{cell} left parameters that are not finite.")
            runs.append(run)
        return runs, snapshots

    return trained
