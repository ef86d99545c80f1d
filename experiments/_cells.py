"""The cells of `training_recipe.py`: how pairs of networks are trained, and what merging gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from vfjax import align, data, diagnose, train

PyTree = Any

ALPHAS = 11
# Distances are taken after at most so many epochs, evenly spaced.
POINTS = 20


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is trained.

    Attributes:
      rates: Learning rates, all with `decay`.
      decays: Weight decays, all at `rate`; none for no such sweep.
      rate: The learning rate of the decays' sweep.
      decay: The weight decay of the rates' sweep.
      low: The learning rate that is compared with `rates[-1]`, and that of ablations.
      initialisers: The first is that of the sweeps; the second, if any, is compared with it.
    """

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    rate: float
    decay: float
    low: float
    initialisers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """How the two networks of a pair are trained.

    Attributes:
      initialiser: Of both networks.
      rate: Learning rate, at its peak.
      decay: Weight decay.
      then: Rate and decay of one more epoch, None for none.
    """

    initialiser: str
    rate: float
    decay: float
    then: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Its name in records and tables."""
        text = f"{self.initialiser}, rate {self.rate:g}, decay {self.decay:g}"
        return text if self.then is None else f"{text}, then {self.then[0]:g}, {self.then[1]:g}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A grid with its networks and recipe.

    Attributes:
      name: Of the architecture, for titles.
      model: The module; cells replace its initialiser.
      recipe: What cells replace rate and decay of.
      grid: The cells.
      factor: Epochs on these data for one on those that the recipe is for: as many steps.
    """

    name: str
    model: Any
    recipe: train.Recipe
    grid: Grid
    factor: float = 1.0

    def cells(self) -> list[Cell]:
        """All cells; those that start from others after them."""
        grid = self.grid
        first = grid.initialisers[0]
        found = [Cell(first, rate, grid.decay) for rate in grid.rates]
        found += [Cell(first, grid.rate, decay) for decay in grid.decays]
        for other in grid.initialisers[1:]:
            found += [Cell(other, rate, grid.decay) for rate in (grid.low, grid.rates[-1])]
        found += [Cell(first, grid.rates[-1], grid.decay, then=(grid.low, grid.decay))]
        if grid.decays:
            found += [Cell(first, grid.rate, grid.decays[-1], then=(grid.low, grid.decays[0]))]
        return list(dict.fromkeys(found))

    def tracked(self, cell: Cell) -> bool:
        """Whether distances are followed while the networks of a cell are trained."""
        grid = self.grid
        rates = (grid.low, grid.rates[-1])
        compared = len(grid.initialisers) > 1 and cell.rate in rates and cell.decay == grid.decay
        return compared and cell.then is None

    def recipe_of(self, cell: Cell) -> train.Recipe:
        """The recipe of a cell."""
        if cell.then is None:
            warm = self.recipe.warmup_epochs
            if self.name.startswith("vgg16") and self.recipe.schedule == "step":
                # Where the paper has a warm-up, too.
                warm = 1.0 if cell.decay > 1e-4 or cell.initialiser == "uniform" else warm
            found = dataclasses.replace(
                self.recipe, learning_rate=cell.rate, weight_decay=cell.decay, warmup_epochs=warm
            )
        else:
            rate, decay = cell.then
            found = dataclasses.replace(
                self.recipe,
                learning_rate=rate,
                weight_decay=decay,
                schedule="constant",
                milestones=(),
                warmup_epochs=0.0,
                epochs=1,
            )
        return dataclasses.replace(found, epochs=max(1, round(found.epochs * self.factor)))


class Diverged(Exception):
    """A pair of networks has no finite parameters to merge."""


class Pair:
    """Trains the two networks of a pair for one cell after another, and merges them."""

    def __init__(
        self,
        plan: Plan,
        net: vfjax.Network,
        dataset: data.Dataset,
        seeds: Sequence[int],
        work_dir: str | None,
        watch: _common.Stopwatch,
    ) -> None:
        self.plan, self.net, self.dataset, self.seeds = plan, net, dataset, seeds
        self.work_dir, self.watch = work_dir, watch
        self.key = jax.random.key(seeds[0])
        self.trained: dict[Cell, list[PyTree]] = {}

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Trains and merges; what the record holds of a cell and a pair."""
        found: dict[str, Any] = {"models": list(self.seeds), "diverged": None}
        try:
            with self.watch("training"):
                runs, distances = self.train(cell)
        except (Diverged, FloatingPointError) as error:
            return found | {"diverged": str(error)}
        self.trained[cell] = trees = [run.variables for run in runs]
        found["train_accuracy"] = [run.history[-1]["accuracy"] for run in runs]
        if distances is not None:
            found["distances"] = distances
        with self.watch("matching"):
            matched, alignment = self.matched(trees)
        found["matching"] = {"converged": alignment.converged, "moved": alignment.moved}
        statistics = self.dataset.batches("train") if self.net.norms else None
        for name, ends in (("direct", trees), ("matched", [trees[0], matched])):
            with self.watch("interpolation"):
                curve = diagnose.interpolation(
                    self.net,
                    ends,
                    self.dataset.batches("test"),
                    alphas=ALPHAS,
                    renormalise=None if statistics is None else "reset",
                    data=statistics,
                )
            found[name] = _common.measured(curve) | {
                "reference_barrier": curve.reference_barrier,
                "distance": diagnose.distance(*ends, net=self.net).total,
            }
            found["edge_accuracy"] = curve.edge_accuracy.tolist()
        return found

    def matched(self, trees: Sequence[PyTree]) -> tuple[PyTree, align.Alignment]:
        """The second network with its units permuted."""
        found = align.match_weights(self.net, *trees, key=self.key)
        return self.net.spec.permute(trees[1], found.permutations), found

    def train(self, cell: Cell) -> tuple[list[train.Trained], dict[str, list[float]] | None]:
        """The two networks, and the distances between them during training."""
        model = dataclasses.replace(self.plan.model, initialiser=cell.initialiser)
        starts: Sequence[PyTree | None] = (None, None)
        if cell.then is not None:
            source = dataclasses.replace(cell, then=None)
            if source not in self.trained:
                raise Diverged(f"there are no networks of {source} to start from.")
            starts = self.trained[source]
        recipe, tracked = self.plan.recipe_of(cell), self.plan.tracked(cell)
        every = -(-recipe.epochs // POINTS)
        # The first network's, on the host; and after which epochs which distances.
        kept: dict[int, PyTree] = {}
        distances: dict[str, list[float]] = {"epoch": [], "direct": [], "matched": []}

        def keep(epoch: int, variables: PyTree) -> None:
            if epoch % every == 0 or epoch == recipe.epochs:
                kept[epoch] = jax.device_get(variables)

        def compare(epoch: int, variables: PyTree) -> None:
            if epoch not in kept:
                return
            pair = [kept.pop(epoch), jax.device_get(variables)]
            ends = {"direct": pair[1], "matched": self.matched(pair)[0]}
            distances["epoch"].append(epoch)
            for name, end in ends.items():
                distances[name].append(diagnose.distance(pair[0], end, net=self.net).total)

        runs = []
        for seed, start, follow in zip(self.seeds, starts, (keep, compare), strict=True):
            if tracked:
                start = self.initial(model, seed)
                follow(0, start)
            run = train.fit(
                model,
                recipe,
                self.dataset,
                seed=seed,
                start=start,
                on_epoch=follow if tracked else None,
                work_dir=None if tracked else self.folder(cell, seed),
            )
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables)):
                raise Diverged(f"training with {cell} left parameters that are not finite.")
            runs.append(run)
        return runs, distances if tracked else None

    def initial(self, model: Any, seed: int) -> PyTree:
        """The variables that training with a seed begins with."""
        x = jnp.zeros((1, *self.dataset.train_images.shape[1:]))
        return jax.jit(model.init)(jax.random.key(seed), x)

    def folder(self, cell: Cell, seed: int) -> Path | None:
        """Where the states of a run are kept."""
        if self.work_dir is None:
            return None
        return Path(self.work_dir) / self.plan.name / str(cell).replace(", ", "-") / f"seed{seed}"
