"""Edge models of the experiments: options, where they are found, and what records say of them."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import jax
import jax.numpy as jnp
from kit import cli, training

import vfjax
from vfjax import checkpoint, data, merge, models

PyTree = Any

# Images in a batch.
BATCH = 500
DEFAULT_MODEL = {
    "mnist": "mlp",
    "digits": "digits-conv",
}
# Channel multipliers of the shipped models, and of what two cores train in half an hour: of some
# models, and of the other ones of a family.
CPU_WIDTH = {
    "vgg": 0.25,
    "vgg16-bn": 0.125,
    "vgg16-ln": 0.125,
    "resnet": 0.5,
    "resnet20-ln": 0.25,
    "vit": 0.125,
    "convnext-pico": 0.5,
}

# -------------------------------------------------------------------------------------- options


def model_of(text: str) -> tuple[str, float | None]:
    """The type of `--model`: a name, and the width if it has one."""
    name, _, width = text.partition("-w")
    if name not in models.NAMES or (width and not re.fullmatch(r"\d*\.?\d+", width)):
        known = ", ".join(models.NAMES)
        raise argparse.ArgumentTypeError(
            f"{text!r} is no model; take one of {known}, with -wFRACTION after it for another width"
        )
    return name, float(width) if width else None


def alpha_of(text: str) -> float:
    """The type of `--alpha`: a weight from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def edge_options(p: argparse.ArgumentParser, *, examples: str, cifar: str = "vgg16") -> None:
    """Adds the options that say which networks are merged, on which images.

    Args:
      p: The parser.
      examples: Names for the help of `--model`.
      cifar: The model for CIFAR where none is asked for, as in `found`.
    """
    p.add_argument(
        "--dataset",
        default="auto",
        choices=data.NAMES,
        help="images to work and test on; auto is the digits that come with scikit-learn for the "
        "digits models, for others CIFAR-10 where it is found, else, with a warning and in titles, "
        "the digits",
    )
    p.add_argument(
        "--model",
        type=model_of,
        metavar="NAME[-wWIDTH]",
        help=f"architecture of the networks, for example {examples}; WIDTH multiplies all "
        f"channel counts (default: {cifar} for CIFAR, mlp for MNIST, digits-conv for the digits; "
        "with --preset cpu as wide as the shipped ones, with --preset paper 1)",
    )
    p.add_argument(
        "--retrain",
        action="store_true",
        help="train the networks instead of loading shipped ones; they are kept in "
        "OUT/checkpoints-PRESET, where a run that was stopped goes on and finished ones are reused",
    )
    p.add_argument(
        "--preset",
        default="cpu",
        choices=("cpu", "paper"),
        help="width and recipe of the networks: cpu is what two cores can train (as VGG16 at a "
        "quarter of the width, 24 epochs, about half an hour a model); paper is full width and the "
        "paper's recipe (160 epochs, step decay, weight decay 1e-4), meant for a GPU, where an "
        "epoch is one compiled scan; no such models are shipped, so it needs --retrain",
    )


# ---------------------------------------------------------------------------------- edge models


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Which networks are merged.

    Attributes:
      name: Name of the model, as in `vfjax.models.create`.
      width: Multiplier of all channel counts.
      dataset: Name of the data set that they are trained on.
    """

    name: str
    width: float
    dataset: str

    @property
    def stem(self) -> str:
        """Names of checkpoints, up to the seed."""
        name = training.checkpoint_name(self.dataset, self.name, self.width, 0)
        return name.removesuffix("0")

    def __str__(self) -> str:
        """For titles."""
        return self.name + ("" if self.width == 1 else f" at {self.width:g} of the width")


def architecture(
    args: argparse.Namespace, dataset: data.Dataset, cifar: str = "vgg16"
) -> Architecture:
    """Decides which networks, from the options and the data that was found."""
    default = cifar if dataset.name.startswith("cifar") else DEFAULT_MODEL[dataset.name]
    name, width = args.model or (default, None)
    if name.startswith("digits") != (dataset.name == "digits"):
        if dataset.name != "digits":
            hint = "give --dataset digits"
        elif dataset.fallback:
            hint = "CIFAR-10 was not found, give --data-dir, or --model digits-conv"
        else:
            hint = "give --dataset cifar10, or --model digits-conv"
        label = _common.DATASET_LABELS[dataset.name]
        raise _common.UserError(f"--model {name} is not for {label}; {hint}.")
    if width is None:
        family = re.sub(r"\d.*", "", name)
        narrow = CPU_WIDTH.get(name, CPU_WIDTH.get(family, 1.0))
        width = 1.0 if args.preset == "paper" else narrow
    return Architecture(name, width, dataset.name)


def load(args: argparse.Namespace, **counts: int | None) -> data.Dataset:
    """The images, as the options have it; `counts` of them, as in `vfjax.data.load`."""
    # As train_edges.py decides.
    for_digits = args.dataset == "auto" and args.model and args.model[0].startswith("digits")
    return data.load("digits" if for_digits else args.dataset, args.data_dir, **counts)


def probed(name: str, data_dir: str | None) -> data.Dataset:
    """One image of each split: by this it is known soon which data set a name comes to."""
    return data.load(name, data_dir, train=1, test=1)


def whole(probe: data.Dataset, data_dir: str | None, **counts: int | None) -> data.Dataset:
    """The data set of a probe, as found: all of it, or `counts` as in `vfjax.data.load`."""
    found = data.load(probe.name, data_dir, **counts)
    return dataclasses.replace(found, fallback=probe.fallback)


def trace(arch: Architecture, dataset: data.Dataset) -> vfjax.Network:
    """Traces the network, for which its shapes are enough."""
    options: dict[str, Any] = {"classes": dataset.classes}
    if arch.width != 1:
        options["width"] = arch.width
    try:
        model = models.create(arch.name, **options)
    except ValueError as error:
        raise _common.UserError(f"--model: {error}") from error
    x = jax.ShapeDtypeStruct((BATCH, *dataset.test_images.shape[1:]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return vfjax.trace(models.apply_fn(model), variables, x)


def shipped(args: argparse.Namespace, arch: Architecture, count: int | None) -> list[Path]:
    """Finds the first `count` shipped models of an architecture, by seed; None for all."""
    folder = _common.ROOT / "checkpoints"
    numbers = {path: path.name.removeprefix(arch.stem) for path in folder.glob(f"{arch.stem}*")}
    found = {int(number): path for path, number in numbers.items() if number.isdigit()}
    count = max(len(found), 1) if count is None else count
    if len(found) < count:
        kinds = sorted({path.name.rpartition("-seed")[0] for path in folder.glob("[!.]*-seed*")})
        seeds = (seed for seed in itertools.count() if seed not in found)
        words = ["python", "experiments/train_edges.py", "--model", arch.name]
        words += ["--width", f"{arch.width:g}"] if arch.width != 1 else []
        words += ["--dataset", arch.dataset]
        words += ["--data-dir", args.data_dir] if args.data_dir else []
        words += ["--seeds", *map(str, itertools.islice(seeds, count - len(found)))]
        other = ("--model", "--dataset", *(["--pairs"] if hasattr(args, "pairs") else []))
        raise _common.UserError(
            f"{count} models {arch.stem}* are needed in {folder.name}/, {len(found)} found. To "
            f"train what is missing: {shlex.join(words)} (--retrain trains all {count} into --out)."
            f" Or choose another {', '.join(other[:-1])} or {other[-1]}: {folder.name}/ has "
            f"{', '.join(kinds) or 'none'}."
        )
    return [found[seed] for seed in sorted(found)[:count]]


def trained(args: argparse.Namespace, arch: Architecture, count: int) -> list[Path]:
    """Trains `count` models as `train_edges.py` does, or finds them trained by an earlier run."""
    words = ["--model", arch.name, "--dataset", arch.dataset, "--preset", args.preset]
    words += ["--seeds", *map(str, range(count)), "--width", str(arch.width)]
    words += ["--out", str(Path(args.out) / f"checkpoints-{args.preset}")]
    words += ["--data-dir", args.data_dir] if args.data_dir else []
    return training.run(cli.parse(training.Training, "train_edges.py", None, words))


@dataclasses.dataclass(frozen=True)
class Edges:
    """The edge models of a run.

    Attributes:
      arch: Which networks.
      dataset: The images.
      net: The traced network.
      folders: Their checkpoints.
      cards: What these say.
      trees: Their variables.
    """

    arch: Architecture
    dataset: data.Dataset
    net: vfjax.Network
    folders: Sequence[Path]
    cards: Sequence[Mapping[str, Any]]
    trees: Sequence[PyTree]

    def batches(self, split: str, samples: int | None) -> data.Batches:
        """The first images of a split, not augmented."""
        return self.dataset.batches(split, batch_size=BATCH, samples=samples)

    def record(self, statistics: data.Batches, test: data.Batches) -> dict[str, Any]:
        """What records say of images and networks."""
        return {
            "data": {
                "name": self.dataset.name,
                "source": self.dataset.source.split(" in ")[0],
                "fallback": self.dataset.fallback,
                "statistics_images": len(statistics.images),
                "test_images": len(test.images),
                "batch_size": BATCH,
                "augmented": False,
            },
            "model": {
                "name": self.arch.name,
                "width": self.arch.width,
                "depth": self.net.depth,
                "parameters": self.net.parameters,
                "flops": self.net.flops,
            },
            "edge_models": [
                {
                    "checkpoint": folder.name,
                    "seed": card["seed"],
                    "test_accuracy": card["test"]["accuracy"],
                    "command": card["command"],
                }
                for folder, card in zip(self.folders, self.cards, strict=True)
            ],
        }

    @property
    def seeds(self) -> list[int]:
        """Their seeds."""
        return [card["seed"] for card in self.cards]


def found(
    args: argparse.Namespace,
    watch: _common.Stopwatch,
    *,
    count: int | None = 2,
    train: int | None = None,
    test: int | None = None,
    cifar: str = "vgg16",
    check: Callable[[vfjax.Network, str], Any] | None = None,
) -> Edges:
    """Reads the images, traces the network, and loads or trains the edge models.

    Args:
      args: The options of `edge_options`.
      watch: The run's clock.
      count: How many models; None for all that are shipped, or two with `--retrain`.
      train: Training images to read; None for all.
      test: Test images to read; None for all.
      cifar: The model for CIFAR where `--model` has none.
      check: Called with the traced network and its name before anything is trained, to raise what
        the options have against it.

    Raises:
      UserError: If what was asked for is not there, or does not go together.
    """
    if args.preset == "paper" and not args.retrain:
        raise _common.UserError("no models of --preset paper are shipped: give --retrain, too.")
    with watch("data"):
        dataset = load(args, train=train, test=test)
    if args.preset == "paper" and dataset.fallback:
        raise _common.UserError("CIFAR-10 was not found, which --preset paper is for: --data-dir.")
    arch = architecture(args, dataset, cifar)
    with watch("trace"):
        net = trace(arch, dataset)
    if check is not None:
        check(net, arch.name)
    with watch("training" if args.retrain else "checkpoints"):
        folders = trained(args, arch, count or 2) if args.retrain else shipped(args, arch, count)
        cards = [checkpoint.card(folder) for folder in folders]
        trees = [checkpoint.load(folder) for folder in folders]
    return Edges(arch, dataset, net, folders, cards, trees)


# ------------------------------------------------------------------------------------ in records


def networks(record: Mapping[str, Any]) -> str:
    """Data and networks, as titles begin."""
    config, images = record["config"], record["data"]
    arch = Architecture(config["model"], config["width"], images["name"])
    return f"{_common.dataset_label(images, 'cifar10')}: {arch}"


def file_name(record: Mapping[str, Any], middle: Sequence[str]) -> str:
    """Name of record and figure, without suffix: what was asked for and is not default.

    So runs that differ in what they measure do not overwrite each other's results.
    """
    config = record["config"]
    width = "" if config["width"] == 1 else f"-w{config['width']:g}"
    parts = [record["experiment"], record["data"]["name"], config["model"] + width, *middle]
    parts += [config["preset"]] if config["preset"] != "cpu" else []
    parts += ["retrained"] if config["retrain"] else []
    return "-".join(parts)


def forward(merged: merge.Merged, x: PyTree) -> jax.Array:
    """One function for all networks, so that those of equal structure share its compilation."""
    return merged.run(x)
