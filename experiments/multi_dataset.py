"""Networks of different data sets zipped into one with a head for each: "ZipIt!" on several sets.

    python experiments/multi_dataset.py                          # digits, MNIST, CIFAR-10 in grey
    python experiments/multi_dataset.py --datasets mnist cifar10
    python experiments/multi_dataset.py --quick                  # seconds, needs no data
    python experiments/multi_dataset.py --preset paper           # full width, on a GPU

One network is trained on each data set, from another initialisation, on grey images of one size.
Then the first l of L layers are merged and the others kept, so that every data set has its own
head ("l/L"; the last layer always is one's own): weights averaged as they are; permuted to a shared
universe, which for two networks is the assignment; or zipped with ZipIt!'s default alpha and beta.
All pairs of data sets are merged, and all at once. Matching takes as many training images of every
data set as the smallest has, mixed; on the same images BatchNorm statistics are measured anew in
every network, the ensemble's too, which is each network on its own data set. Accuracies are by
data set, which is known at test time, and their mean.

What the paper found (ResNet-50s of Stanford Dogs, Oxford Pets, CUB and NABirds, mean accuracy per
cent, of pairs): ensemble 75.5, weight averaging 11.3, permutation 35.7, ZipIt! 37.1 at 49 of 50
layers, 62.4 at 22, 68.7 at 10. All four at once: 1.2, 15.3, 16.8, 45.5 and 65.3. Taken as: merged
nearly whole, zipping is above permuting and that above averaging, for pairs and for all; the
accuracy falls with the number of layers merged; in each pair zipping is ahead of permuting at some
of the numbers of layers and behind at none, by more than two standard errors; at about a fifth of
the layers pairs are below the ensemble, but by less than 10 points; all at once lose more than
pairs, at every number of layers; and for all at once a fifth of the layers instead of nearly all
closes over half of the gap to the ensemble.

What came out here (digits, MNIST and CIFAR-10 in grey: vgg11-bn, 0.25 wide, a head each, 201 s on 2
CPU cores): Networks of digits 99.6, MNIST 98.9 and CIFAR-10 in grey 56.2; with statistics of mixed
images 98.6, 98.2 and 45.8. As in the paper: pairs, 8/9 layers merged: weights averaged 23.9,
permuted 52.0 and ZipIt! 54.1; pairs, zipped: 78.1 at 2/9, 67.2 at 4/9 and 54.1 at 8/9; all at once,
zipped: 71.3 at 2/9, 52.7 at 4/9 and 28.5 at 8/9; digits and CIFAR-10 in grey, at 2/9, 4/9 and 8/9
layers merged: ZipIt! 69.5, 61.4 and 51.0, permuted 68.0, 56.2 and 41.5, so ZipIt! is ahead at 2/9,
4/9 and 8/9; MNIST and CIFAR-10 in grey, at 2/9, 4/9 and 8/9 layers merged: ZipIt! 68.7, 60.7 and
41.6, permuted 66.6, 55.9 and 41.2, so ZipIt! is ahead at 2/9 and 4/9, level at 8/9; pairs zipped at
2/9 are 3.7 points below the ensemble (81.8); all at once, zipped, are below the ensemble by 9.6 at
2/9 (pairs 3.7), 28.2 at 4/9 (pairs 14.6) and 52.4 at 8/9 (pairs 27.7) points; all at once, 2 zipped
layers instead of 8 close 82% of the gap to the ensemble. Unlike the paper: all at once, 8/9 layers
merged: weights averaged 10.9, permuted 28.5 and ZipIt! 28.5; digits and MNIST, at 2/9, 4/9 and 8/9
layers merged: ZipIt! 96.1, 79.5 and 69.6, permuted 94.0, 85.9 and 73.2, so ZipIt! is ahead at 2/9,
behind at 4/9 and 8/9. Not in the paper: permuted, with heads of their own, networks have 68.8 at
2/9, 42.1 at 4/9 and 28.5 at 8/9.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import vfjax
from vfjax import align, data, merge, models, plot, renorm, stats, train

PyTree = Any
Accuracies = dict[str, float]

DATASETS = ("digits", "mnist", "cifar10")
# The digits in two disguises, as data sets that need no files.
DISGUISES = {"digits-turned": lambda x: np.rot90(x, axes=(1, 2)), "digits-negative": np.invert}
NAMES = (*data.NAMES[1:], *DISGUISES)
LABELS = _common.DATASET_LABELS | {
    "cifar10": "CIFAR-10 in grey",
    "cifar100": "CIFAR-100 in grey",
    "digits": "digits",
    "digits-turned": "turned digits",
    "digits-negative": "negative digits",
}
METHODS = {"average": "weights averaged", "permute": "permuted", "zip": "ZipIt!"}
MODEL = "vgg11-bn"
# To see that it runs: networks that compile fast, without BatchNorm.
QUICK_MODEL = models.MLP((16, 16))
# Of 9, and ends of stages, where a partial zip may stop; the paper's are 10, 22 and 49 of 50.
LAYERS = (2, 4, 8)
# Points by which one mean over pairs must be above another to count as above it.
ABOVE = 0.5
BATCH = 500


@dataclasses.dataclass(frozen=True)
class Preset:
    """How large everything is.

    Attributes:
      width: Multiplier of all channel counts.
      size: Pixels along each side of an image.
      images: Training images of a data set, at most; None for all.
      test: Test images of a data set, at most; None for all.
      steps: Training steps, of 128 images, for every network alike.
      layers: Numbers of layers merged.
    """

    width: float
    size: int
    images: int | None
    test: int | None
    steps: int
    layers: tuple[int, ...] = LAYERS


PRESETS = {
    "cpu": Preset(width=0.25, size=16, images=20_000, test=2_000, steps=800),
    "paper": Preset(width=1.0, size=32, images=None, test=None, steps=20_000),
}
QUICK = Preset(width=1.0, size=8, images=300, test=200, steps=3, layers=(1, 2))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="multi_dataset.py", description=__doc__, formatter_class=_common.Help
    )
    p.add_argument(
        "--datasets",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"two data sets or more, of {', '.join(NAMES)} (default: {' '.join(DATASETS)}; with "
        "--quick digits digits-turned)",
    )
    p.add_argument(
        "--preset",
        default="cpu",
        choices=tuple(PRESETS),
        help="cpu is what two cores do in minutes: a quarter of the width, 16x16 pixels; paper is "
        "full width, 32x32 pixels and all images (of these data sets, not the paper's)",
    )
    p.add_argument(
        "--seed",
        type=_common.seed_of,
        default=0,
        help="of the first network; the others have the next ones",
    )
    p.add_argument(
        "--work-dir",
        help="folder in which networks are kept, so that a run that was stopped goes on",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="tiny MLPs, few images, no data to download: to see that it runs; the numbers mean "
        "nothing",
    )
    _common.folder_options(p)
    return p


# ----------------------------------------------------------------------------------- the networks


def load(name: str, preset: Preset, data_dir: str | None) -> data.Dataset:
    """A data set in grey, at the size of all."""
    base = "digits" if name in DISGUISES else name
    dataset = data.load(base, data_dir, train=preset.images, test=preset.test)
    if name in DISGUISES:
        change = DISGUISES[name]
        images = {f"{k}_images": getattr(dataset, f"{k}_images") for k in ("train", "test")}
        changed = {k: np.ascontiguousarray(change(v)) for k, v in images.items()}
        dataset = dataclasses.replace(dataset, name=name, **changed)
    return data.grey(dataset, size=preset.size)


def recipe_of(preset: Preset, dataset: data.Dataset) -> train.Recipe:
    """The recipe of one network: as many steps for all."""
    recipe = train.Recipe(learning_rate=0.05, schedule="cosine", weight_decay=5e-4)
    steps = math.ceil(len(dataset.train_images) / recipe.batch_size)
    return dataclasses.replace(recipe, epochs=max(1, round(preset.steps / steps)))


def mixed(datasets: Sequence[data.Dataset]) -> list[jax.Array]:
    """Batches of training images of all data sets, equally many of each in every batch."""
    count = min(len(d.train_images) for d in datasets)
    batches = max(1, count * len(datasets) // BATCH)
    each = count // batches
    images = [
        np.asarray(data.normalise(jnp.asarray(d.train_images[: each * batches]), d.mean, d.std))
        for d in datasets
    ]
    whole = np.stack(images, 1).reshape(batches, each * len(datasets), *images[0].shape[1:])
    return list(jnp.asarray(whole))


class Tests:
    """The test images of several data sets, in batches of one size."""

    def __init__(self, datasets: Sequence[data.Dataset]) -> None:
        self.datasets = datasets
        images = [
            np.asarray(data.normalise(jnp.asarray(d.test_images), d.mean, d.std)) for d in datasets
        ]
        self.counts = [len(x) for x in images]
        total = sum(self.counts)
        spare = np.zeros((-total % BATCH, *images[0].shape[1:]), np.float32)
        self.batches = np.concatenate([*images, spare]).reshape(-1, BATCH, *images[0].shape[1:])

    def accuracies(self, model: Any) -> list[Accuracies]:
        """By head, accuracies on all data sets with as many classes as its own.

        Args:
          model: A pytree that maps a batch to logits, or to a tuple of them.
        """
        outputs = [jax.device_get(_outputs(model, x)) for x in self.batches]
        heads = zip(*outputs, strict=True) if isinstance(outputs[0], tuple) else [outputs]
        return [self._of_head(np.concatenate(list(parts))) for parts in heads]

    def _of_head(self, logits: np.ndarray) -> Accuracies:
        found, start = {}, 0
        for dataset, count in zip(self.datasets, self.counts, strict=True):
            # A network may have more outputs than a data set has classes.
            own = logits[start : start + count, : dataset.classes]
            found[dataset.name] = float(np.mean(own.argmax(1) == dataset.test_labels))
            start += count
        return found


@jax.jit
def _outputs(model: Any, x: jax.Array) -> Any:
    return model(x)


# ------------------------------------------------------------------------------- one combination


class Combination:
    """Some of the networks, merged in all ways."""

    def __init__(
        self,
        net: vfjax.Network,
        datasets: Sequence[data.Dataset],
        trees: Sequence[PyTree],
        watch: _common.Stopwatch,
    ) -> None:
        self.net, self.datasets, self.trees, self.watch = net, datasets, trees, watch
        self.names = [dataset.name for dataset in datasets]
        self.tests, self.statistics = Tests(datasets), mixed(datasets)

    def maps(self) -> dict[str, align.Maps | None]:
        """What is applied to the networks before they are averaged, by method."""
        with self.watch("statistics"):
            moments = stats.moments(
                self.net, self.trees, self.statistics, sites="taps", covariance=True
            )
        with self.watch("matching"):
            universe = align.match_universe_moments(self.net, moments)
            return {
                "average": None,
                "permute": align.Maps.of_permutations(universe.permutations),
                "zip": align.zip_moments(self.net, moments),
            }

    def measure(self, layers: Sequence[int]) -> dict[str, Any]:
        """All numbers of the record."""
        edges = {}
        for name, tree in zip(self.names, self.trees, strict=True):
            (edges[name],) = self.evaluated(merge.as_merged(self.net, tree))
        ensemble = {name: edges[name][name] for name in self.names}
        rows = []
        jobs = list(itertools.product(self.maps().items(), layers))
        bar = tqdm(jobs, desc=f"merging {', '.join(self.names)}", delay=2, leave=False)
        for (method, maps), count in bar:
            model = merge.partial(self.net, self.trees, maps, merged=slice(None, count))
            heads = self.evaluated(model)
            own = {name: head[name] for name, head in zip(self.names, heads, strict=True)}
            rows.append({"method": method, "layers": count} | self.numbers(own, model))
        return {
            "datasets": self.names,
            "statistics_images": sum(map(len, self.statistics)),
            "edges": edges,
            "ensemble": {"accuracy": ensemble, "mean": float(np.mean(list(ensemble.values())))},
            "rows": rows,
        }

    def evaluated(self, model: merge.Merged) -> list[Accuracies]:
        """Accuracies by head, once BatchNorm's statistics are measured anew."""
        if self.net.norms:
            with self.watch("RESET"):
                model = renorm.reset(self.net, model, self.statistics)
        with self.watch("evaluation"):
            return self.tests.accuracies(model)

    def numbers(self, accuracy: Accuracies, model: merge.Merged) -> dict[str, Any]:
        """What a row of the record holds; sizes are relative to those of one network."""
        return {
            "accuracy": accuracy,
            "mean": float(np.mean(list(accuracy.values()))),
            "params_ratio": model.params / self.net.parameters,
            "flops_ratio": model.flops / self.net.flops,
        }


# ---------------------------------------------------------------------------------------- record


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    names = args.datasets or (("digits", "digits-turned") if args.quick else DATASETS)
    if len(names) < 2 or len(set(names)) != len(names):
        raise _common.UserError(
            f"--datasets must be two or more different ones, got {' '.join(names)}; "
            f"{_common.joined(['digits', *DISGUISES])} need no files."
        )
    if args.quick and args.preset != "cpu":
        raise _common.UserError("--quick has sizes of its own: leave out --preset.")
    preset = QUICK if args.quick else PRESETS[args.preset]
    watch = _common.Stopwatch()
    with watch("data"):
        try:
            datasets = [load(name, preset, args.data_dir) for name in names]
        except data.DatasetError as error:
            # One data set alone, as is advised there, is none to merge.
            said = str(error).replace("The data set 'digits' needs neither.", "").strip()
            raise _common.UserError(
                f"{said} Without files: --quick, or --datasets digits {next(iter(DISGUISES))}."
            ) from error
    classes = max(dataset.classes for dataset in datasets)
    model: Any = models.create(MODEL, width=preset.width, classes=classes)
    if args.quick:
        model = dataclasses.replace(QUICK_MODEL, classes=classes)
    trained = []
    for index, dataset in enumerate(datasets):
        work = None if args.work_dir is None else Path(args.work_dir) / f"{dataset.name}"
        with watch("training"):
            recipe = recipe_of(preset, dataset)
            run = train.fit(model, recipe, dataset, seed=args.seed + index, work_dir=work)
            trained.append(jax.device_get(run.variables))
    with watch("trace"):
        x = jax.ShapeDtypeStruct((BATCH, preset.size, preset.size, 1), jnp.float32)
        net = vfjax.trace(models.apply_fn(model), trained[0], x)
    found = []
    for chosen in combinations(len(names)):
        parts = [datasets[k] for k in chosen], [trained[k] for k in chosen]
        found.append(Combination(net, *parts, watch).measure(preset.layers))
    with watch("evaluation"):
        as_trained = {
            d.name: Tests([d]).accuracies(merge.as_merged(net, tree))[0][d.name]
            for d, tree in zip(datasets, trained, strict=True)
        }
    record: dict[str, Any] = {
        "experiment": "multi_dataset",
        "command": command,
        "config": vars(args) | {"datasets": list(names)},
        "preset": dataclasses.asdict(preset),
        "data": [
            {
                "name": d.name,
                "source": d.source.split(" in ")[0],
                "classes": d.classes,
                "train_images": len(d.train_images),
                "test_images": len(d.test_images),
                "recipe": dataclasses.asdict(recipe_of(preset, d)),
            }
            for d in datasets
        ],
        "model": {
            "name": "mlp" if args.quick else MODEL,
            "depth": net.depth,
            "parameters": net.parameters,
        },
        "as_trained": as_trained,
        "combinations": found,
    }
    record["summary"] = summary_of(record)
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def combinations(count: int) -> list[tuple[int, ...]]:
    """All pairs, and all at once.

    Example:
      >>> combinations(3), combinations(2)
      ([(0, 1), (0, 2), (1, 2), (0, 1, 2)], [(0, 1)])
    """
    pairs: list[tuple[int, ...]] = list(itertools.combinations(range(count), 2))
    return pairs if count == 2 else [*pairs, tuple(range(count))]


def summary_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Mean accuracies over data sets: of the pairs, and of all at once where they are more."""
    groups: dict[str, list[Any]] = {"pairs": [], "all": []}
    for found in record["combinations"]:
        groups["pairs" if len(found["datasets"]) == 2 else "all"].append(found)
    summary = {}
    for name, members in groups.items():
        if members:
            means: dict[str, dict[str, float]] = {method: {} for method in METHODS}
            for row in members[0]["rows"]:
                values = [
                    other["mean"]
                    for found in members
                    for other in found["rows"]
                    if (other["method"], other["layers"]) == (row["method"], row["layers"])
                ]
                means[row["method"]][str(row["layers"])] = float(np.mean(values))
            ensemble = float(np.mean([found["ensemble"]["mean"] for found in members]))
            summary[name] = {"ensemble": ensemble, **means}
    return summary


def title_of(record: Mapping[str, Any]) -> str:
    """Data sets and networks."""
    labels = [LABELS[d["name"]] for d in record["data"]]
    name, width = record["model"]["name"], record["preset"]["width"]
    what = "MLPs, QUICK, MEANS NOTHING" if record["config"]["quick"] else f"{name}, {width:g} wide"
    return f"{_common.joined(labels)}: {what}, a head each"


def file_name(record: Mapping[str, Any]) -> str:
    """Name of record and figure, without suffix: what was asked for and is not default."""
    config, parts = record["config"], ["multi_dataset", "+".join(record["config"]["datasets"])]
    if config["quick"]:
        return "-".join([*parts, "quick"])
    if config["preset"] != "cpu":
        parts.append(config["preset"])
    if config["seed"]:
        parts.append(f"seed{config['seed']}")
    return "-".join(parts)


# -------------------------------------------------------------------------------------- findings


def claims_of(record: Mapping[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper: whether it holds here, and what was measured."""
    summary, depth = record["summary"], record["model"]["depth"]
    few, *_, most = map(str, record["preset"]["layers"])
    claims: list[tuple[bool | None, str]] = []
    for name, found in summary.items():
        which = "pairs" if name == "pairs" else "all at once"
        end = {method: 100 * found[method][most] for method in METHODS}
        told = [f"{METHODS[m]} {end[m]:.1f}" for m in METHODS]
        claims.append(
            (
                end["zip"] - ABOVE > end["permute"] > end["average"] + ABOVE,
                f"{which}, {most}/{depth} layers merged: {_common.joined(told)}",
            )
        )
        zips = [100 * value for value in found["zip"].values()]
        told = [f"{v:.1f} at {count}/{depth}" for v, count in zip(zips, found["zip"], strict=True)]
        falls = all(a > b for a, b in itertools.pairwise(zips))
        claims.append((falls, f"{which}, zipped: {_common.joined(told)}"))
    claims += pair_claims(record)
    pairs = summary["pairs"]
    lost = 100 * (pairs["ensemble"] - pairs["zip"][few])
    claims.append(
        (
            0 < lost < 10,
            f"pairs zipped at {few}/{depth} are {lost:.1f} points below the ensemble "
            f"({100 * pairs['ensemble']:.1f})",
        )
    )
    if "all" in summary:
        found = summary["all"]
        gaps = {
            count: [100 * (s["ensemble"] - s["zip"][count]) for s in (pairs, found)]
            for count in found["zip"]
        }
        told = [f"{b:.1f} at {count}/{depth} (pairs {a:.1f})" for count, (a, b) in gaps.items()]
        claims.append(
            (
                all(b > a for a, b in gaps.values()),
                f"all at once, zipped, are below the ensemble by {_common.joined(told)} points",
            )
        )
        closed = 1 - gaps[few][1] / gaps[most][1] if gaps[most][1] > 0 else 0.0
        claims.append(
            (
                closed > 0.5,
                f"all at once, {few} zipped layers instead of {most} close {100 * closed:.0f}% of "
                "the gap to the ensemble",
            )
        )
    found = summary.get("all", pairs)
    told = [f"{100 * found['permute'][count]:.1f} at {count}/{depth}" for count in found["permute"]]
    claims.append(
        (None, f"permuted, with heads of their own, networks have {_common.joined(told)}")
    )
    return claims


def pair_claims(record: Mapping[str, Any]) -> list[tuple[bool | None, str]]:
    """For each pair of data sets, whether zipping is ahead of permuting, which their mean hides."""
    depth, claims = record["model"]["depth"], []
    images = {d["name"]: d["test_images"] for d in record["data"]}
    for found in record["combinations"]:
        names = found["datasets"]
        if len(names) > 2:
            continue
        rows = {method: {} for method in METHODS}
        for row in found["rows"]:
            rows[row["method"]][row["layers"]] = row
        places: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
        for count, row in rows["zip"].items():
            other = rows["permute"][count]
            # Of the mean of accuracies on different images.
            errors = [_common.noise(other["accuracy"][name], images[name]) for name in names]
            margin, ahead = math.hypot(*errors) / len(names), row["mean"] - other["mean"]
            verdict = "level" if abs(ahead) <= margin else "ahead" if ahead > 0 else "behind"
            places[verdict].append(f"{count}/{depth}")
        told = [
            f"{METHODS[method]} "
            + _common.joined([f"{100 * row['mean']:.1f}" for row in rows[method].values()])
            for method in ("zip", "permute")
        ]
        counts = _common.joined([f"{count}/{depth}" for count in rows["zip"]])
        where = [f"{verdict} at {_common.joined(at)}" for verdict, at in places.items() if at]
        claims.append(
            (
                bool(places["ahead"]) and not places["behind"],
                f"{_common.joined([LABELS[name] for name in names])}, at {counts} layers merged: "
                f"{', '.join(told)}, so ZipIt! is {', '.join(where)}",
            )
        )
    return claims


def outcome(record: Mapping[str, Any]) -> tuple[str, _common.Claims]:
    """The networks in a sentence, and the paper's claims."""
    trained = [f"{LABELS[name]} {100 * v:.1f}" for name, v in record["as_trained"].items()]
    last = record["combinations"][-1]
    reset = [f"{100 * value:.1f}" for value in last["ensemble"]["accuracy"].values()]
    return (
        f"Networks of {_common.joined(trained)}; with statistics of mixed images "
        f"{_common.joined(reset)}.",
        claims_of(record),
    )


# ------------------------------------------------------------------------------- figure and table


def figure_of(record: Mapping[str, Any]) -> Any:
    """Accuracies against the number of merged layers: pairs, all at once, and by data set."""
    layers = list(record["preset"]["layers"])
    x, y = f"layers merged, of {record['model']['depth']}", "test accuracy, %"
    last = record["combinations"][-1]
    row = []
    for name, found in record["summary"].items():
        curves = {
            METHODS[method]: plot.Curve(
                layers, [100 * found[method][str(count)] for count in layers], colour=index
            )
            for index, method in enumerate(METHODS)
        }
        level = [100 * found["ensemble"]] * len(layers)
        curves["ensemble"] = plot.Curve(layers, level, colour=len(METHODS), dashed=True)
        title = "mean of pairs" if name == "pairs" else f"all {len(last['datasets'])} at once"
        row.append(plot.Panel(title, x, f"{y}, mean of data sets", curves, y_limits=(0, 102)))
    curves = {}
    for index, name in enumerate(last["datasets"]):
        zipped = [100 * r["accuracy"][name] for r in last["rows"] if r["method"] == "zip"]
        level = [100 * last["ensemble"]["accuracy"][name]] * len(layers)
        curves[f"{LABELS[name]}, ZipIt!"] = plot.Curve(layers, zipped, colour=index)
        curves[f"{LABELS[name]}, ensemble"] = plot.Curve(layers, level, colour=index, dashed=True)
    row.append(plot.Panel(f"{row[-1].title}, by data set", x, y, curves, y_limits=(0, 102)))
    return plot.panels(row, title=record["title"])


def table_of(found: Mapping[str, Any], depth: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one combination."""
    header = ["test accuracy, %", *(LABELS[name] for name in found["datasets"]), "mean"]
    header += ["params, ratio", "FLOPs, ratio"]

    def line(name: str, accuracy: Accuracies, sizes: Sequence[float]) -> list[str]:
        values = [accuracy[dataset] for dataset in found["datasets"]]
        cells = [f"{100 * value:.1f}" for value in (*values, float(np.mean(values)))]
        return [name, *cells, *(f"{size:.2f}" for size in sizes)]

    count = len(found["datasets"])
    lines = [line(f"network of {LABELS[n]}", a, (1, 1)) for n, a in found["edges"].items()]
    lines.append(line("ensemble", found["ensemble"]["accuracy"], (count, count)))
    for row in found["rows"]:
        name = f"{METHODS[row['method']]} {row['layers']}/{depth}"
        lines.append(line(name, row["accuracy"], (row["params_ratio"], row["flops_ratio"])))
    return header, lines


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    for found in record["combinations"]:
        labels = _common.joined([LABELS[name] for name in found["datasets"]])
        _common.print_table(labels, *table_of(found, record["model"]["depth"]))
    if not record["config"]["quick"]:
        print(_common.told(*outcome(record)))


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the experiment; returns the path of the record."""
    return _common.run(
        parser(),
        argv,
        experiment=experiment,
        file_name=file_name,
        figure_of=figure_of,
        show=show,
    )


if __name__ == "__main__":
    main()
