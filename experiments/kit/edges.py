"""Edge models of the experiments: options, where they are found, and what records say of them."""

import dataclasses
import functools
import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from kit import cli, records, timing, training
from kit.experiment import Setup
from vfjax import checkpoint, data, merge, models

PyTree = Any
# Images in a batch.
BATCH = 500
DEFAULT_MODEL = {"mnist": "mlp", "digits": "digits-conv"}
# Channel multipliers of the shipped models, and of what two cores train in half an hour: of some
# models, and of the other ones of a family.
CPU_WIDTH = {"vgg": 0.25, "vgg16-bn": 0.125, "vgg16-ln": 0.125, "resnet": 0.5, "resnet20-ln": 0.25}
CPU_WIDTH |= {"vit": 0.125, "convnext-pico": 0.5}
# Of a training split with too few images for both, at most this share is held out.
SHARE = 0.2


# fmt: off
@dataclasses.dataclass(frozen=True)
class EdgeOptions(cli.Options):
    """The options that say which networks are merged, on which images."""

    dataset: str = cli.option(
        "auto", "images to work and test on; auto is the digits that come with scikit-learn for "
        "the digits models, for others CIFAR-10 where it is found, else, with a warning and in "
        "titles, the digits", choices=data.NAMES)
    model: tuple[str, float | None] | None = cli.option(
        None, "architecture of the networks, for example vgg16, vgg16-w0.5, vgg16-bn, resnet20, "
        "digits-mlp; WIDTH multiplies all channel counts (default: that of the first command "
        "above, digits-conv for the digits, mlp for MNIST; with --preset cpu as wide as the "
        "shipped ones, with --preset paper 1)", type=cli.model_of, metavar="NAME[-wWIDTH]")
    preset: str = cli.option(
        "cpu", "width and recipe of the networks: cpu is what two cores can train (as VGG16 at a "
        "quarter of the width, 24 epochs, about half an hour a model); paper is full width and the "
        "paper's recipe (160 epochs, step decay, weight decay 1e-4), meant for a GPU, where an "
        "epoch is one compiled scan; no such models are shipped, so it needs --retrain",
        choices=("cpu", "paper"), part="{}")
    retrain: bool = cli.option(
        False, "train the networks instead of loading shipped ones; they, and what a run that was "
        "stopped goes on from, are kept in OUT/checkpoints-PRESET; finished ones are reused",
        part="retrained")
# fmt: on


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Which networks are merged: model as in `vfjax.models.create`, channels times, data set."""

    name: str
    width: float
    dataset: str

    @property
    def stem(self) -> str:
        return training.checkpoint_name(self.dataset, self.name, self.width, 0).removesuffix("0")


def architecture(args: EdgeOptions, dataset: data.Dataset, cifar: str = "vgg16") -> Architecture:
    default = cifar if dataset.name.startswith("cifar") else DEFAULT_MODEL[dataset.name]
    name, width = args.model or (default, None)
    if name.startswith("digits") != (dataset.name == "digits"):
        found = "give --data-dir" if dataset.fallback else "give --dataset cifar10"
        missing = "CIFAR-10 was not found, " * dataset.fallback
        hint = f"{missing}{found}, or --model digits-conv"
        hint = hint if dataset.name == "digits" else "give --dataset digits"
        raise cli.UserError(f"--model {name} is not for {records.DATASETS[dataset.name]}; {hint}.")
    if width is None:
        narrow = CPU_WIDTH.get(name, CPU_WIDTH.get(re.sub(r"\d.*", "", name), 1.0))
        width = 1.0 if args.preset == "paper" else narrow
    return Architecture(name, width, dataset.name)


def load(args: EdgeOptions, **counts: int | None) -> data.Dataset:
    """The images, as the options have it; `counts` of them, as in `vfjax.data.load`."""
    # As training decides.
    for_digits = args.dataset == "auto" and args.model and args.model[0].startswith("digits")
    return data.load("digits" if for_digits else args.dataset, args.data_dir, **counts)


def probed(name: str, data_dir: str | None) -> data.Dataset:
    """One image of each split: by this it is known soon which data set a name comes to."""
    return data.load(name, data_dir, train=1, test=1)


def whole(probe: data.Dataset, data_dir: str | None, **counts: int | None) -> data.Dataset:
    """The data set of a probe, as found: all of it, or `counts` as in `vfjax.data.load`."""
    found = data.load(probe.name, data_dir, **counts)
    return dataclasses.replace(found, fallback=probe.fallback)


def traced(model: Any, dataset: data.Dataset) -> vfjax.Network:
    """Traces a network, for which its shapes are enough."""
    x = jax.ShapeDtypeStruct((BATCH, *dataset.test_images.shape[1:]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return vfjax.trace(models.apply_fn(model), variables, x)


def trace(arch: Architecture, dataset: data.Dataset) -> vfjax.Network:
    options = {} if arch.width == 1 else {"width": arch.width}
    try:
        model = models.create(arch.name, classes=dataset.classes, **options)
    except ValueError as error:
        raise cli.UserError(f"--model: {error}") from error
    return traced(model, dataset)


def shipped(args: EdgeOptions, arch: Architecture, count: int | None) -> list[Path]:
    """Finds the first `count` shipped models of an architecture, by seed; None for all."""
    folder = records.ROOT / "checkpoints"
    numbers = {path: path.name.removeprefix(arch.stem) for path in folder.glob(f"{arch.stem}*")}
    found = {int(number): path for path, number in numbers.items() if number.isdigit()}
    count = max(len(found), 1) if count is None else count
    if len(found) < count:
        kinds = sorted({path.name.rpartition("-seed")[0] for path in folder.glob("[!.]*-seed*")})
        seeds = [str(seed) for seed in range(count) if seed not in found][: count - len(found)]
        words = ["python", "experiments/train_edges.py", "--model", arch.name]
        words += ["--width", f"{arch.width:g}"] if arch.width != 1 else []
        words += ["--dataset", arch.dataset]
        words += ["--data-dir", args.data_dir] if args.data_dir else []
        words += ["--seeds", *seeds]
        either = ", --dataset or --pairs" if hasattr(args, "pairs") else " or --dataset"
        raise cli.UserError(
            f"{count} models {arch.stem}* are needed in {folder.name}/, {len(found)} found. To "
            f"train what is missing: {shlex.join(words)} (--retrain trains all {count} into --out)."
            f" Or choose another --model{either}: {folder.name}/ has {', '.join(kinds) or 'none'}."
        )
    return [found[seed] for seed in sorted(found)[:count]]


def trained(args: EdgeOptions, arch: Architecture, **options: Any) -> list[Path]:
    """Trains models as `train_edges.py` does, or finds them trained by an earlier run."""
    folder = Path(args.out) / f"checkpoints-{args.preset}"
    options |= {"out": str(folder), "work_dir": str(folder / ".training")}
    options |= {"model": arch.name, "width": arch.width, "dataset": arch.dataset}
    return training.run(training.Training(data_dir=args.data_dir, **options))


@dataclasses.dataclass(frozen=True)
class Images:
    """Batches: to measure statistics on, to choose on, to test on."""

    statistics: data.Batches
    held_out: data.Batches | None
    test: data.Batches


@dataclasses.dataclass(frozen=True)
class Edges:
    """The edge models of a run: checkpoints, variables, what their cards say; and its images."""

    arch: Architecture
    dataset: data.Dataset
    net: vfjax.Network
    folders: Sequence[Path]
    trees: Sequence[PyTree]
    images: Images

    @functools.cached_property
    def cards(self) -> list[dict[str, Any]]:
        return [checkpoint.card(folder) for folder in self.folders]

    def batches(self, split: str, samples: int | None) -> data.Batches:
        """The first images of a split, not augmented."""
        return self.dataset.batches(split, batch_size=BATCH, samples=samples)

    @property
    def seeds(self) -> list[int]:
        return [card["seed"] for card in self.cards]

    def record(self) -> dict[str, Any]:
        """What records say of images and networks."""
        parts = {key: getattr(self.images, key) for key in ("statistics", "held_out", "test")}
        counts = {key: None if part is None else len(part.images) for key, part in parts.items()}
        about = records.about(self.dataset, **counts) | {"batch_size": BATCH, "augmented": False}
        name, width = self.arch.name, self.arch.width
        net = {"depth": self.net.depth, "parameters": self.net.params, "flops": self.net.flops}
        found = {"config": {"model": name, "width": width}, "data": about}
        found |= {"model": {"name": name, "width": width} | net, "edge_models": []}
        for folder, card in zip(self.folders, self.cards, strict=True):
            told = {"checkpoint": folder.name, "seed": card["seed"]}
            told |= {"test_accuracy": card["test"]["accuracy"], "command": card["command"]}
            found["edge_models"].append(told)
        return found | {"seeds": {"edge_models": self.seeds}}

    def setup(self, config: Any, **record: Any) -> Setup:
        """For experiments whose records say more, or something else."""
        return Setup(config, self, self.record() | record, tuple(map(digest, self.trees)))


def images_of(
    dataset: data.Dataset, statistics: int | None, held_out: int | None, test: int | None
) -> Images:
    """The images, none in two of the three; None for all there are, and for none held out."""
    tested = dataset.batches("test", batch_size=BATCH, samples=test)
    if held_out is None:
        found = dataset.batches("train", batch_size=BATCH, samples=statistics)
        return Images(found, None, tested)
    images, labels = dataset.train_images, dataset.train_labels
    statistics = len(images) if statistics is None else statistics
    if len(images) < statistics + held_out:
        held_out = min(held_out, int(SHARE * len(images)))
    last = len(images) - held_out
    parts, norm = (slice(min(statistics, last)), slice(last, None)), (dataset.mean, dataset.std)
    return Images(*(data.Batches(images[p], labels[p], *norm, BATCH) for p in parts), tested)


def check_shipped(config: EdgeOptions, what: str = "models") -> None:
    if config.preset == "paper" and not config.retrain:
        raise cli.UserError(f"no {what} of --preset paper are shipped: give --retrain, too.")


def digest(tree: PyTree) -> str:
    """What tells the variables of a network from others."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def loaded(
    *,
    # How many models; None for all shipped ones, or two with `--retrain`.
    count: Callable[[Any], int | None] = lambda config: 2,
    # Names of the options of how many images there are, without which there are all, or none held
    # out; and how many training images are read, where these do not say.
    statistics: str | None = None,
    held_out: str | None = None,
    test: str | None = None,
    read: Callable[[Any], int | None] | None = None,
    cifar: str = "vgg16",  # The model for CIFAR where `--model` has none.
    # Called before anything is read, to raise what is wrong.
    checked: Callable[[Any], Any] = lambda config: None,
    # From options, traced network and its name to options with what depends on these, such as
    # default layers; called before anything is trained, to raise what is wrong, too.
    settled: Callable[[Any, vfjax.Network, str], Any] = lambda config, net, name: config,
    # How many training images there must be, by the option that says so.
    needs: Callable[[Any], Mapping[str, int]] = lambda config: {},
    # Those that the record holds beside those of the models.
    seeds: Callable[[Any], Mapping[str, Any]] = lambda config: {},
) -> Callable[[Any, timing.Stopwatch], Setup]:
    """The `prepare` of experiments on edge models; the value of its `Setup` is `Edges`."""

    def prepare(config: Any, watch: timing.Stopwatch) -> Setup:
        checked(config)
        check_shipped(config)
        options = (statistics, held_out, test)
        parts = [None if name is None else cli.counted(getattr(config, name)) for name in options]
        train = None if parts[0] is None else parts[0] + (parts[1] or 0)
        with watch("data"):
            train = train if read is None else read(config)
            dataset = load(config, train=train, test=parts[2])
        there = len(dataset.train_images)
        for option, needed in needs(config).items():
            if needed > there:
                raise cli.UserError(f"--{option} {needed}: there are {there:,} training images.")
        if config.preset == "paper" and dataset.fallback:
            raise cli.UserError("CIFAR-10 was not found, which --preset paper is for: --data-dir.")
        arch = architecture(config, dataset, cifar)
        with watch("trace"):
            net = trace(arch, dataset)
        config = settled(config, net, arch.name)
        with watch("training" if config.retrain else "checkpoints"):
            wanted = count(config)
            options = {"preset": config.preset, "seeds": tuple(range(wanted or 2))}
            made = config.retrain
            folders = trained(config, arch, **options) if made else shipped(config, arch, wanted)
            trees = [checkpoint.load(folder) for folder in folders]
        found = Edges(arch, dataset, net, folders, trees, images_of(dataset, *parts))
        return found.setup(config, seeds={"edge_models": found.seeds} | seeds(config))

    return prepare


def forward(merged: merge.Merged, x: PyTree) -> jax.Array:
    """One function for all networks, so that those of equal structure share its compilation."""
    return merged.run(x)
