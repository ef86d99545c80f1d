"""Pairs of networks that an experiment trains itself: options, data, recipes, grids of cells."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from kit import cli, edges, records, timing
from kit.claims import Decision, Rule
from kit.experiment import Experiment, Setup
from kit.records import Record
from vfjax import align, data, diagnose, models, train

PyTree = Any
BATCH = 500
# --quick: to see that it runs. Nothing is learnt.
QUICK_IMAGES = 300
ALPHAS = 11


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


def load(config: PairOptions, prefer: str = "mnist") -> tuple[data.Dataset, dict[str, Any]]:
    """The images, and what records say of them."""
    count = QUICK_IMAGES if config.quick else None
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
    parts = [f"{records.dataset_label(record['data'], wanted)}: {what}"]
    parts += [f"mean of {count} pairs"] if count > 1 else []
    parts += ["QUICK, MEANS NOTHING"] if record["config"]["quick"] else []
    return ", ".join(parts)


def bars(record: Record) -> str:
    return f"standard deviation over {len(record.rows.distinct('pair'))} pairs"


def quick(record: Mapping[str, Any]) -> bool:
    return record["config"]["quick"]


def stem(record: Mapping[str, Any]) -> list[str]:
    """What names of files begin with after the experiment's: the data set."""
    return [record["data"]["name"], *(["quick"] if quick(record) else [])]


def over_pairs(record: Record, rule: Rule) -> Decision | None:
    """A rule on the means over pairs; says of how many pairs it gives the same."""
    found, rows = rule(record), record.rows
    if found is None:
        return None
    holds, here = found
    pairs = [Record(record | {"rows": rows.where(pair=k)}) for k in rows.distinct("pair")]
    same = [(rule(pair) or (None,))[0] for pair in pairs].count(holds)
    return holds, here if same == len(pairs) else f"{here} (so in {same} of {len(pairs)} pairs)"


# -------------------------------------------------------------------------------- linear networks


class Linear(NamedTuple):
    """What experiments on linear networks work on."""

    nets: Mapping[str, vfjax.Network]
    pairs: Sequence[tuple[int, int]]
    trained: Callable[[str, int], list[train.Trained]]  # From the name of a network and a pair.
    test: data.Batches
    statistics: data.Batches


def linear(
    recipe: train.Recipe, networks: Mapping[str, models.LinearNetwork], **parts: Any
) -> Experiment:
    """An experiment on linear networks, by name; the setup of its runs is a `Linear`."""

    def prepare(config: LinearOptions, watch: timing.Stopwatch) -> Setup:
        pairs = pairs_of(config)
        with watch("data"):
            dataset, images = load(config)
        with watch("trace"):
            nets = {name: edges.traced(model, dataset) for name, model in networks.items()}
        epochs = round(recipe.epochs * epochs_factor(config, recipe, dataset))
        epochs = epochs if config.quick else config.epochs or epochs
        chosen = dataclasses.replace(recipe, epochs=epochs)

        @functools.lru_cache(maxsize=1)
        def trained(name: str, k: int) -> list[train.Trained]:
            with watch("training"):
                return train.fit_seeds(networks[name], chosen, dataset, seeds=pairs[k])

        test = dataset.batches("test", batch_size=BATCH)
        statistics = dataset.batches("train", batch_size=BATCH, samples=10_000)
        images["statistics_images"] = len(statistics.images)
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
        return Setup(config, Linear(nets, pairs, trained, test, statistics), record)

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


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is trained: learning rates, all with `decay`, and weight decays, all at `rate`."""

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    rate: float
    decay: float
    low: float  # The learning rate that is compared with `rates[-1]`, and that of ablations.
    initialisers: tuple[str, ...]  # Of the sweeps; and, if any, what is compared with it.

    def sweep(self, name: str) -> list[Cell]:
        """The cells of learning rates ("rate"), or of weight decays ("decay")."""
        first = self.initialisers[0]
        if name == "rate":
            return [Cell(first, rate, self.decay) for rate in self.rates]
        return [Cell(first, self.rate, decay) for decay in self.decays]

    def ends(self, name: str) -> list[Cell]:
        """Of a sweep those that are compared: the low rate or decay and the highest."""
        cells = [cell for cell in self.sweep(name) if cell.rate >= self.low]
        return [*cells[:1], *cells[-1:]]

    def ablation(self, name: str) -> list[Cell]:
        """The highest of a sweep, the same with one more epoch as the low one, the low one."""
        if not self.sweep(name):
            return []
        low, high = self.ends(name)
        return [high, high._replace(then_rate=self.low, then_decay=low.decay), low]

    def initialised(self) -> list[Cell]:
        """The normal and the uniform initialisation at the low rate, then both at the highest."""
        names = sorted(self.initialisers, key=lambda name: name == "uniform")
        rates = (self.low, self.rates[-1])
        cells = [Cell(name, rate, self.decay) for rate in rates for name in names]
        return cells if len(names) > 1 else []

    def cells(self) -> list[Cell]:
        """All cells; those that start from others after them."""
        found = [*self.sweep("rate"), *self.sweep("decay"), *self.initialised()]
        return list(dict.fromkeys([*found, *self.ablation("rate"), *self.ablation("decay")]))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A grid with its networks, whose initialiser cells replace, and recipe."""

    name: str
    model: Any
    recipe: train.Recipe
    grid: Grid
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


@dataclasses.dataclass(eq=False)
class Pair:
    """Trains the two networks of a pair for one cell after another, and merges them."""

    plan: Plan
    net: vfjax.Network
    dataset: data.Dataset
    seeds: Sequence[int]
    work_dir: str | None
    watch: timing.Stopwatch
    trained: dict[Cell, list[PyTree]] = dataclasses.field(default_factory=dict)

    def measure(self, cell: Cell, key: Mapping[str, Any]) -> Iterator[records.Row]:
        """The rows of a cell and a pair, which begin with `key`: of distances, paths, networks.

        Where training diverges that is the only row.
        """
        try:
            with self.watch("training"):
                runs, snapshots = self.train(cell)
        except FloatingPointError as error:
            yield {**key, "diverged": str(error)}
            return
        # Those after training come last, with None for an epoch.
        for epoch, trees in [*snapshots.items(), (None, self.trained[cell])]:
            with self.watch("matching"):
                seed = jax.random.key(self.seeds[0])
                found = align.match_weights(self.net, *trees, key=seed)
                matched = [trees[0], self.net.spec.permute(trees[1], found.permutations)]
            merged = {"direct": trees, "matched": matched}
            for name, ends in merged.items():
                distance = diagnose.distance(*ends, net=self.net).total
                yield {**key, "merged": name, "epoch": epoch, "distance": distance}
        yield {**key, "converged": found.converged, "moved": found.moved}
        options: dict[str, Any] = {"alphas": ALPHAS}
        if self.net.norms:
            options |= {"renormalise": "reset", "data": self.dataset.batches("train")}
        for name, ends in merged.items():
            with self.watch("interpolation"):
                test = self.dataset.batches("test")
                curve = diagnose.interpolation(self.net, ends, test, **options)
            yield from records.curve_rows({**key, "merged": name}, curve)
        for k, run in enumerate(runs):
            row = {**key, "network": f"model {k + 1}", "accuracy": float(curve.edge_accuracy[k])}
            yield row | {"train_accuracy": run.history[-1]["accuracy"]}

    def train(self, cell: Cell) -> tuple[list[train.Trained], dict[int, list[PyTree]]]:
        """The two networks; and, where initialisations are compared, both after some epochs."""
        model = dataclasses.replace(self.plan.model, initialiser=cell.initialiser)
        recipe = self.plan.recipe_of(cell)
        starts: Sequence[PyTree | None] = (None, None)
        if cell != cell.source:
            if cell.source not in self.trained:
                # They diverged, or an earlier call that was stopped has measured them.
                self.train(cell.source)
            starts = self.trained[cell.source]
        snapshots: dict[int, list[PyTree]] = collections.defaultdict(list)

        def keep(epoch: int, variables: PyTree) -> None:
            # After at most twenty epochs, evenly spaced.
            if epoch % math.ceil(recipe.epochs / 20) == 0 or epoch == recipe.epochs:
                snapshots[epoch].append(jax.device_get(variables))

        runs = []
        for seed, start in zip(self.seeds, starts, strict=True):
            options: dict[str, Any] = {}
            if cell in self.plan.grid.initialised():
                x = jnp.zeros((1, *self.dataset.train_images.shape[1:]))
                start, options = jax.jit(model.init)(jax.random.key(seed), x), {"on_epoch": keep}
                keep(0, start)
            elif self.work_dir is not None:
                folder = Path(self.work_dir, self.plan.name, str(cell).replace(", ", "-"))
                options = {"work_dir": folder / f"seed{seed}"}
            run = train.fit(model, recipe, self.dataset, seed=seed, start=start, **options)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables)):
                raise FloatingPointError(f"{cell} left parameters that are not finite.")
            runs.append(run)
        self.trained[cell] = [run.variables for run in runs]
        return runs, snapshots
