"""Pairs of networks that an experiment trains itself: options, data, recipes, grids of cells."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from kit import cli, edges, records, timing
from kit.experiment import Setup
from vfjax import align, data, diagnose, models, train

PyTree = Any
BATCH = 500
SAMPLES = 10_000
# --quick: to see that it runs. Nothing is learnt.
QUICK_EPOCHS, QUICK_IMAGES = 1, 300
MNIST_IMAGES = 60_000
ALPHAS = 11
# Distances are taken after at most so many epochs, evenly spaced.
POINTS = 20


def seeds(default: Iterable[int], what: str = "edge models") -> Any:
    """The option of which models there are."""
    text = f"seeds of the {what}; the first and the second make a pair, the third and the fourth "
    text += "another, and so on"
    return cli.option(tuple(default), text, type=cli.seed_of, metavar="S", part="seeds{}")


# fmt: off
@dataclasses.dataclass(frozen=True)
class PairOptions(cli.Options):
    """The options of experiments that train their pairs; give `seeds` a default of your own."""

    dataset: str = cli.option(
        "auto", "images to train and test on; auto is MNIST where it is found, else, with a "
        "warning and in the figure's title, the digits that come with scikit-learn",
        choices=("auto", "mnist", "digits"))
    seeds: tuple[int, ...] = seeds((0, 1))
    quick: bool = cli.option(
        False, f"one pair, {QUICK_EPOCHS} epoch on {QUICK_IMAGES} images: to see that it runs; the "
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


def pairs_of(config: Any) -> list[tuple[int, int]]:
    """The seeds of each pair: no model is in two of them, so that pairs are independent.

    Example:
      >>> pairs_of(PairOptions(seeds=(0, 1, 2, 3)))
      [(0, 1), (2, 3)]
    """
    seeds = config.seeds
    if len(seeds) % 2 or len(set(seeds)) != len(seeds):
        raise cli.UserError(f"--seeds must be different and come in pairs, got {list(seeds)}.")
    pairs = list(zip(seeds[::2], seeds[1::2], strict=True))
    return pairs[:1] if config.quick else pairs


def load(config: Any, prefer: str = "mnist") -> data.Dataset:
    count = QUICK_IMAGES if config.quick else None
    return data.load(config.dataset, config.data_dir, train=count, test=count, prefer=prefer)


def recipe_of(config: Any, recipe: train.Recipe, dataset: data.Dataset) -> train.Recipe:
    """The paper's recipe, with the epochs that the options or the number of images ask for."""
    epochs = config.epochs or round(recipe.epochs * steps_factor(dataset, recipe))
    return dataclasses.replace(recipe, epochs=QUICK_EPOCHS if config.quick else epochs)


def steps_factor(dataset: data.Dataset, recipe: train.Recipe) -> float:
    """For one epoch on MNIST there are as many on the digits: as many steps."""
    counts = MNIST_IMAGES, len(dataset.train_images)
    wanted, steps = (math.ceil(count / recipe.batch_size) for count in counts)
    return wanted / steps if dataset.name == "digits" else 1.0


@dataclasses.dataclass(frozen=True)
class Linear:
    """What experiments on linear networks work on: networks by name, and the seeds of each pair."""

    dataset: data.Dataset
    recipe: train.Recipe
    models: Mapping[str, models.LinearNetwork]
    nets: Mapping[str, vfjax.Network]
    pairs: Sequence[tuple[int, int]]

    def batches(self, split: str) -> data.Batches:
        """All test images, or the training images that statistics are of."""
        samples = SAMPLES if split == "train" else None
        return self.dataset.batches(split, batch_size=BATCH, samples=samples)

    def record(self) -> dict[str, Any]:
        counts = {key: len(getattr(self.dataset, f"{key}_images")) for key in ("train", "test")}
        about = records.about(self.dataset, **counts, statistics=len(self.batches("train").images))
        models = {}
        for name, net in self.nets.items():
            model = self.models[name]
            models[name] = {"name": "linear", "initial_std": model.std, "parameters": net.params}
            models[name] |= {key: getattr(model, key) for key in ("width", "depth", "residual")}
            models[name]["groups"] = dict(net.spec.sizes)
        return {
            "data": about | {"batch_size": BATCH, "augmented": False},
            "recipe": dataclasses.asdict(self.recipe),
            "models": models,
            "seeds": {"edge_models": [seed for pair in self.pairs for seed in pair]},
        }


def linear(
    recipe: train.Recipe, networks: Mapping[str, models.LinearNetwork]
) -> Callable[[Any, timing.Stopwatch], Setup]:
    """The `prepare` of experiments on linear networks; its setup has `Linear` for a value."""

    def prepare(config: Any, watch: timing.Stopwatch) -> Setup:
        pairs = pairs_of(config)
        with watch("data"):
            dataset = load(config)
        with watch("trace"):
            nets = {name: edges.traced(model, dataset) for name, model in networks.items()}
        found = Linear(dataset, recipe_of(config, recipe, dataset), networks, nets, pairs)
        return Setup(config, found, found.record())

    return prepare


def titled(record: Mapping[str, Any], what: str, count: int, wanted: str = "mnist") -> str:
    parts = [f"{records.dataset_label(record['data'], wanted)}: {what}"]
    parts += [f"mean of {count} pairs"] if count > 1 else []
    parts += ["QUICK, MEANS NOTHING"] if record["config"]["quick"] else []
    return ", ".join(parts)


def stem(record: Mapping[str, Any]) -> list[str]:
    """What names of files begin with after the experiment's: the data set."""
    return [record["data"]["name"], *(["quick"] if record["config"]["quick"] else [])]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is trained: learning rates, all with `decay`, and weight decays, all at `rate`."""

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    rate: float
    decay: float
    low: float  # The learning rate that is compared with `rates[-1]`, and that of ablations.
    initialisers: tuple[str, ...]  # Of the sweeps; and, if any, what is compared with it.


@dataclasses.dataclass(frozen=True)
class Cell:
    """How the two networks of a pair are trained; `then` has rate and decay of one more epoch."""

    initialiser: str
    rate: float
    decay: float
    then: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.initialiser}, rate {self.rate:g}, decay {self.decay:g}"
        return text if self.then is None else f"{text}, then {self.then[0]:g}, {self.then[1]:g}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A grid with its networks, whose initialiser cells replace, and recipe."""

    name: str
    model: Any
    recipe: train.Recipe
    grid: Grid
    factor: float = 1.0  # For one epoch of the recipe there are so many.

    def cells(self) -> list[Cell]:
        """All cells; those that start from others after them."""
        grid, (first, *others) = self.grid, self.grid.initialisers
        found = [Cell(first, rate, grid.decay) for rate in grid.rates]
        found += [Cell(first, grid.rate, decay) for decay in grid.decays]
        for other in others:
            found += [Cell(other, rate, grid.decay) for rate in (grid.low, grid.rates[-1])]
        found += [Cell(first, grid.rates[-1], grid.decay, then=(grid.low, grid.decay))]
        if grid.decays:
            found += [Cell(first, grid.rate, grid.decays[-1], then=(grid.low, grid.decays[0]))]
        return list(dict.fromkeys(found))

    def tracked(self, cell: Cell) -> bool:
        grid, sweep = self.grid, cell.then is None and cell.decay == self.grid.decay
        return sweep and len(grid.initialisers) > 1 and cell.rate in (grid.low, grid.rates[-1])

    def recipe_of(self, cell: Cell) -> train.Recipe:
        """The recipe of a cell."""
        recipe, (rate, decay) = self.recipe, cell.then or (cell.rate, cell.decay)
        changes: dict[str, Any] = {"learning_rate": rate, "weight_decay": decay}
        if cell.then is not None:
            changes |= {"schedule": "constant", "milestones": (), "warmup_epochs": 0.0, "epochs": 1}
        elif self.name.startswith("vgg16") and recipe.schedule == "step":
            # Where the paper has a warm-up, too.
            if cell.decay > 1e-4 or cell.initialiser == "uniform":
                changes["warmup_epochs"] = 1.0
        epochs = round(changes.get("epochs", recipe.epochs) * self.factor)
        return dataclasses.replace(recipe, **changes | {"epochs": max(1, epochs)})


class Diverged(Exception):
    """A pair of networks has no finite parameters to merge."""


@dataclasses.dataclass(eq=False)
class Pair:
    """Trains the two networks of a pair for one cell after another, and merges them."""

    plan: Plan
    net: vfjax.Network
    dataset: data.Dataset
    seeds: Sequence[int]
    work_dir: str | None
    watch: timing.Stopwatch
    trained: dict[Cell, list[PyTree] | None] = dataclasses.field(default_factory=dict)

    def measure(self, cell: Cell, key: Mapping[str, Any]) -> Iterator[records.Row]:
        """The rows of a cell and a pair, which begin with `key`: of networks, distances, paths.

        Where training diverges that is the only row.
        """
        try:
            with self.watch("training"):
                runs, distances = self.train(cell)
        except (Diverged, FloatingPointError) as error:
            self.trained[cell] = None
            yield {**key, "diverged": str(error)}
            return
        self.trained[cell] = trees = [run.variables for run in runs]
        for name, values in (distances or {}).items():
            for epoch, distance in values:
                yield {**key, "merged": name, "epoch": epoch, "distance": distance}
        with self.watch("matching"):
            matched, alignment = self.matched(trees)
        yield {**key, "converged": alignment.converged, "moved": alignment.moved}
        options: dict[str, Any] = {"alphas": ALPHAS}
        if self.net.norms:
            options |= {"renormalise": "reset", "data": self.dataset.batches("train")}
        test = self.dataset.batches("test")
        for name, ends in (("direct", trees), ("matched", [trees[0], matched])):
            with self.watch("interpolation"):
                curve = diagnose.interpolation(self.net, ends, test, **options)
            yield from records.curve_rows({**key, "merged": name}, curve)
            yield {**key, "merged": name, "epoch": None, "distance": self.between(*ends)}
        for k, run in enumerate(runs):
            row = {**key, "network": f"model {k + 1}", "accuracy": float(curve.edge_accuracy[k])}
            yield row | {"train_accuracy": run.history[-1]["accuracy"]}

    def matched(self, trees: Sequence[PyTree]) -> tuple[PyTree, align.Alignment]:
        found = align.match_weights(self.net, *trees, key=jax.random.key(self.seeds[0]))
        return self.net.spec.permute(trees[1], found.permutations), found

    def between(self, *ends: PyTree) -> float:
        return diagnose.distance(*ends, net=self.net).total

    def train(self, cell: Cell) -> tuple[list[train.Trained], dict[str, list[Any]] | None]:
        """The two networks, and the distances between them during training."""
        model = dataclasses.replace(self.plan.model, initialiser=cell.initialiser)
        starts: Sequence[PyTree | None] | None = (None, None)
        if cell.then is not None:
            source = dataclasses.replace(cell, then=None)
            if source not in self.trained:
                # An earlier call that was stopped has measured them.
                self.trained[source] = [run.variables for run in self.train(source)[0]]
            starts = self.trained[source]
            if starts is None:
                raise Diverged(f"there are no networks of {source} to start from.")
        recipe, tracked = self.plan.recipe_of(cell), self.plan.tracked(cell)
        every = -(-recipe.epochs // POINTS)
        # The first network's, on the host; and after which epochs which distances.
        kept: dict[int, PyTree] = {}
        distances: dict[str, list[tuple[int, float]]] = {"direct": [], "matched": []}

        def keep(epoch: int, variables: PyTree) -> None:
            if epoch % every == 0 or epoch == recipe.epochs:
                kept[epoch] = jax.device_get(variables)

        def compare(epoch: int, variables: PyTree) -> None:
            if epoch not in kept:
                return
            pair = [kept.pop(epoch), jax.device_get(variables)]
            for name, end in (("direct", pair[1]), ("matched", self.matched(pair)[0])):
                distances[name].append((epoch, self.between(pair[0], end)))

        runs = []
        for seed, start, follow in zip(self.seeds, starts, (keep, compare), strict=True):
            if tracked:
                x = jnp.zeros((1, *self.dataset.train_images.shape[1:]))
                start = jax.jit(model.init)(jax.random.key(seed), x)
                follow(0, start)
            folder = Path(self.work_dir or "", self.plan.name, str(cell).replace(", ", "-"))
            kept_in = folder / f"seed{seed}" if self.work_dir else None
            options = {"on_epoch": follow} if tracked else {"work_dir": kept_in}
            run = train.fit(model, recipe, self.dataset, seed=seed, start=start, **options)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables)):
                raise Diverged(f"training with {cell} left parameters that are not finite.")
            runs.append(run)
        return runs, distances if tracked else None
