"""Edge models of the experiments: options, where they are found, and what records say of them."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from kit import cli, records, timing, training
from kit.experiment import Setup
from vfjax import checkpoint, data, merge, models

OfOptions = Callable[[Any], Any]
# Images in a batch.
BATCH = 500
DEFAULT_MODEL = {"mnist": "mlp", "digits": "digits-conv"}
# Channel multipliers of the shipped models, and of what two cores train in half an hour, by what
# names begin with; the first that fits counts.
CPU_WIDTH = {"vgg16-bn": 0.125, "vgg16-ln": 0.125, "vgg": 0.25, "resnet20-ln": 0.25, "resnet": 0.5}
CPU_WIDTH |= {"vit": 0.125, "convnext-pico": 0.5}


# fmt: off
@dataclasses.dataclass(frozen=True)
class EdgeOptions(cli.Options):
    """The options that say which networks are merged, on which images."""

    dataset: str = cli.option(
        "auto", "images to work and test on; auto is the digits that come with scikit-learn for "
        "the digits models, for others CIFAR-10 where it is found, else, with a warning and in "
        "titles, the digits", choices=data.NAMES)
    model: tuple[str, float | None] | None = cli.option(
        None, "architecture of the networks, for example vgg16, vgg16-w0.5, resnet20, digits-mlp; "
        "WIDTH multiplies all channel counts (default: that of the first command above, "
        "digits-conv for the digits, mlp for MNIST; as wide as the shipped ones, with --preset "
        "paper 1)", type=cli.model_of, metavar="NAME[-wWIDTH]")
    preset: str = cli.option(
        "cpu", "width and recipe of the networks: cpu is what two cores can train (VGG16 at a "
        "quarter of the width in half an hour); paper is full width and the paper's recipe, for a "
        "GPU; no such models are shipped: give --retrain", choices=("cpu", "paper"), part="{}")
    retrain: bool = cli.option(
        False, "train the networks instead of loading shipped ones; they, and what a run that was "
        "stopped goes on from, are kept in OUT/checkpoints-PRESET; finished ones are reused",
        part="retrained")
# fmt: on


class Architecture(NamedTuple):
    """Which networks are merged: model as in `vfjax.models.create`, channels times, data set."""

    name: str
    width: float
    dataset: str


def architecture(args: EdgeOptions, dataset: data.Dataset, cifar: str = "vgg16") -> Architecture:
    default = cifar if dataset.name.startswith("cifar") else DEFAULT_MODEL[dataset.name]
    name, width = args.model or (default, None)
    if name.startswith("digits") != (dataset.name == "digits"):
        hint = "give --dataset digits"
        if dataset.name == "digits":
            found = "CIFAR-10 was not found, give --data-dir"
            hint = f"{found if dataset.fallback else 'give --dataset cifar10'}, or another --model"
        raise cli.UserError(f"--model {name} is not for {records.DATASETS[dataset.name]}; {hint}.")
    if width is None and args.preset == "cpu":
        width = next((w for start, w in CPU_WIDTH.items() if name.startswith(start)), None)
    return Architecture(name, width or 1.0, dataset.name)


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


def training_of(args: EdgeOptions, arch: Architecture, **options: Any) -> training.Training:
    """How models are trained into `--out`, as `train_edges.py` does."""
    folder = Path(args.out) / f"checkpoints-{args.preset}"
    options |= {"out": str(folder), "work_dir": str(folder / ".training")}
    options |= {"model": arch.name, "width": arch.width, "dataset": arch.dataset}
    options |= {"preset": args.preset}
    return training.Training(data_dir=args.data_dir, **options)


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
    trees: Sequence[Any]
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

    def setup(self, config: Any, **record: Any) -> Setup:
        """What records say of images and networks; `record` is more, or something else."""
        counts = {name: part and len(part.images) for name, part in vars(self.images).items()}
        about = records.about(self.dataset, **counts) | {"batch_size": BATCH, "augmented": False}
        name, width = self.arch.name, self.arch.width
        costs = {"parameters": self.net.params, "flops": self.net.flops}
        found = {"config": {"model": name, "width": width}, "data": about}
        found["model"] = {"name": name, "width": width, "depth": self.net.depth} | costs
        found["edge_models"] = [
            {"checkpoint": folder.name, "seed": card["seed"], "command": card["command"]}
            | {"test_accuracy": card["test"]["accuracy"]}
            for folder, card in zip(self.folders, self.cards, strict=True)
        ]
        return Setup(config, self, found | record, tuple(map(digest, self.trees)))


def images_of(
    dataset: data.Dataset, statistics: int | None, held_out: int | None, test: int | None
) -> Images:
    """The images, none in two of the three; None for all there are, and for none held out."""
    tested = dataset.batches("test", batch_size=BATCH, samples=test)
    found = dataset.batches("train", batch_size=BATCH)
    if held_out is None:
        return Images(found.samples(statistics), None, tested)
    there = len(found.images)
    if there < (statistics or there) + held_out:
        # Too few for both: at most a fifth is held out.
        held_out = min(held_out, there // 5)
    rest = there - held_out
    last = data.Batches(found.images[rest:], found.labels[rest:], found.mean, found.std, BATCH)
    return Images(found.samples(min(statistics or rest, rest)), last, tested)


def check_shipped(config: EdgeOptions) -> None:
    if config.preset == "paper" and not config.retrain:
        raise cli.UserError("no models of --preset paper are shipped: give --retrain, too.")


def digest(tree: Any) -> str:
    """What tells the variables of a network from others."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def loaded(
    *,
    count: OfOptions = lambda config: 2,  # Models; None for all shipped ones, two with `--retrain`.
    # The options that say how many images there are; without one there are all, or none held out.
    statistics: str | None = None,
    held_out: str | None = None,
    test: str | None = None,
    read: OfOptions | None = None,  # How many training images are read, where these do not say.
    cifar: str = "vgg16",  # The model for CIFAR where `--model` has none.
    checked: OfOptions = lambda config: None,  # Raises what is wrong before anything is read.
    # From options, traced network and its name to options with what depends on these, such as
    # default layers; raises what is wrong before anything is trained.
    settled: Callable[[Any, vfjax.Network, str], Any] = lambda config, net, name: config,
    needs: OfOptions = lambda config: {},  # The least numbers of training images, by option.
    seeds: OfOptions = lambda config: {},  # Those that the record holds beside the models'.
) -> Callable[[Any, timing.Stopwatch], Setup]:
    """The `prepare` of experiments on edge models; the value of its `Setup` is `Edges`."""

    def prepare(config: Any, watch: timing.Stopwatch) -> Setup:
        checked(config)
        check_shipped(config)
        options = (statistics, held_out, test)
        parts = [option and cli.counted(getattr(config, option)) for option in options]
        train = parts[0] and parts[0] + (parts[1] or 0)
        # As training decides.
        digits = config.dataset == "auto" and config.model and config.model[0].startswith("digits")
        name = "digits" if digits else config.dataset
        with watch("data"):
            train = train if read is None else read(config)
            dataset = data.load(name, config.data_dir, train=train, test=parts[2])
        there = len(dataset.train_images)
        for option, needed in needs(config).items():
            if needed > there:
                raise cli.UserError(f"--{option} {needed}: there are {there:,} training images.")
        if config.preset == "paper" and dataset.fallback:
            raise cli.UserError("CIFAR-10 was not found, which --preset paper is for: --data-dir.")
        arch = architecture(config, dataset, cifar)
        with watch("trace"):
            net = traced(training.model_of(arch.name, arch.width, dataset.classes), dataset)
        config = settled(config, net, arch.name)
        wanted = count(config) or (2 if config.retrain else 0)
        args = training_of(config, arch, seeds=tuple(range(wanted)))
        with watch("training" if config.retrain else "checkpoints"):
            folders = training.run(args) if config.retrain else training.shipped(args)
            trees = [checkpoint.load(folder) for folder in folders]
        found = Edges(arch, dataset, net, folders, trees, images_of(dataset, *parts))
        return found.setup(config, seeds={"edge_models": found.seeds} | seeds(config))

    return prepare


def forward(merged: merge.Merged, x: Any) -> jax.Array:
    """One function for all networks, so that those of equal structure share its compilation."""
    return merged.run(x)
