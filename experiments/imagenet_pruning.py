"""How much of what one-shot pruning costs published ImageNet networks does renormalising return?

    python experiments/imagenet_pruning.py --weights resnet50.safetensors
    python experiments/imagenet_pruning.py --model convnext-base --weights convnext_base.safetensors
    python experiments/imagenet_pruning.py --stand-in       # seconds: random weights and images

`--weights` is a file of PyTorch weights under the names of torchvision or timm: `.safetensors`, as
timm publishes them, or `.npz`, as numpy.savez writes what torch.load reads. ImageNet is what TFDS
prepared of it in `--data-dir`, and is streamed, its shorter side resized to `--resize` pixels
(torchvision's first ResNet50 takes 256, its ConvNeXt-tiny 236 and -base 232) and the centre of 224
taken. All networks of a method are held at once, since decoding is what takes the time: twice as
many times the network's size as there are sparsities.

The paper ("Vanishing Feature"): ResNet50, pruned without its first layer by global and layerwise
magnitude up to 90%, gains most at high sparsity, by RESET; ConvNeXt-B, its linear layers but the
last pruned, at 76% goes from 43.2 to 65.0 with Wanda and from 35.5 to 69.9 with magnitude, and at
80% gains 36 and 55 points, by REPAIR. It prunes layer by layer; whether its Wanda compares the
weights of a layer or, as Wanda's authors do, of an output it does not say: both are here. Not
measured here yet, for want of ImageNet and of weights.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kit import cli, edges, figures, pruned, timing
from kit.experiment import Experiment, Run, Setup
from kit.records import Record, Row
from papers.imagenet_pruning import CLAIMS

import vfjax
from vfjax import checkpoint, imagenet, models

# By family, of the paper: methods, sparsities in per cent, remedy; and what makes a stand-in small.
PRESETS: dict[str, dict[str, Any]] = {
    "resnet50": {"methods": ("magnitude", "magnitude-layer"), "remedy": "reset",
                 "sparsities": (10, 20, 30, 40, 50, 60, 70, 80, 90),
                 "stand_in": {"depth": 26, "width": 0.125}},
    "convnext": {"methods": ("magnitude-layer", "wanda", "wanda-layer"), "remedy": "repair",
                 "sparsities": (50, 60, 70, 76, 80),
                 "stand_in": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}},
}  # fmt: skip
NAMES = ("resnet50", "convnext-tiny", "convnext-base")
METHODS = ("magnitude", "magnitude-layer", "wanda", "wanda-layer")


def preset_of(name: str) -> dict[str, Any]:
    """The paper's settings for a network."""
    return PRESETS[name.partition("-")[0]]


def _usual(key: str) -> Any:
    return lambda record: preset_of(record["config"]["model"])[key]


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(cli.Options):
    model: str = cli.option(NAMES[0], "the network", choices=NAMES)
    weights: str | None = cli.option(
        None, "its PyTorch weights, .safetensors or .npz", metavar="FILE")
    stand_in: bool = cli.option(
        False, "a narrow network with random weights on random images: to see that it runs")
    methods: tuple[str, ...] | None = cli.option(
        None, f"{', '.join(METHODS)} (default: the paper's for the network)", choices=METHODS,
        action=cli.InOrder, nargs="+", metavar="M", part="{}", usual=_usual("methods"))
    sparsities: tuple[float, ...] | None = cli.option(
        None, "per cent of the weights that go (default: the paper's for the network)",
        type=pruned.sparsity_of, action=cli.InOrder, nargs="+", metavar="S", part="at{}",
        usual=_usual("sparsities"))
    test: int | None = cli.option(
        None, "validation images, the first N (default: all 50,000)",
        type=cli.count_of("images"), metavar="N", part="test{}")
    statistics: int = cli.option(
        5_000, "training images, the first N, for renormalisation and Wanda",
        type=cli.count_of("images"), metavar="N", part="statistics{}")
    resize: int = cli.option(
        256, "pixels of the shorter side, of which 224 are taken", type=cli.count_of("pixels"),
        metavar="N", part="resize{}")
    batch_size: int = cli.option(50, "images at once", type=cli.count_of("images"))
# fmt: on


def network(config: Config) -> tuple[vfjax.Network, Any, dict[str, Any]]:
    """The network, its variables, and what the record says of them."""
    if config.stand_in and (config.weights or config.data_dir):
        wrong = "takes random weights and images: leave out --weights and --data-dir."
        raise cli.UserError(f"--stand-in {wrong}")
    if not config.stand_in and not config.weights:
        raise cli.UserError("--weights is missing: give PyTorch weights, or try --stand-in")
    small = {"classes": 10, **preset_of(config.model)["stand_in"]}
    model = models.create(config.model, **small if config.stand_in else {"classes": 1000})
    size = 32 if config.stand_in else 224
    images = jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.float32)
    if config.stand_in:
        tree = jax.jit(model.init)(jax.random.key(0), jnp.zeros(images.shape))
    else:
        tree = checkpoint.from_torch(config.weights, model)
    net = vfjax.trace(models.apply_fn(model), tree, images)
    facts = {"name": config.model, "parameters": net.params, "flops": net.flops, "size": size}
    return net, tree, facts


def images_of(config: Config, split: str, count: int | None, size: int) -> imagenet.Streamed:
    """Batches of a split, or of random images in its place."""
    options = {"batch_size": config.batch_size, "samples": count}
    if not config.stand_in:
        return imagenet.load(split, resize=config.resize, data_dir=config.data_dir, **options)
    rng = np.random.default_rng(len(split))
    source = [
        {"image": rng.integers(0, 256, (40, 48, 3), np.uint8), "label": int(rng.integers(10))}
        for _ in range(24)
    ]
    return imagenet.Streamed(source, resize=size + 4, crop=size, **options)


def prepare(config: Config, watch: timing.Stopwatch) -> Setup:
    preset = preset_of(config.model)
    wanted = {key: getattr(config, key) or preset[key] for key in ("methods", "sparsities")}
    config = dataclasses.replace(config, **wanted)
    with watch("weights"):
        net, tree, facts = network(config)
    with watch("data"):
        statistics = images_of(config, "train", config.statistics, facts["size"]).held()
        test = images_of(config, "validation", config.test, facts["size"])
    name, classes = ("random images", 10) if config.stand_in else ("imagenet2012", 1000)
    counts = {"statistics_images": len(statistics.images), "test_images": test.count}
    record = {
        "data": {"name": name, "classes": classes, **counts},
        "model": facts,
        "seeds": {"weights": 0 if config.stand_in else None},
        "layers": pruned.layers_of(net, config.model),
        "remedy": preset["remedy"],
    }
    value = pruned.Subjects(net, {0: tree}, record["layers"], preset["remedy"], statistics, test)
    return Setup(config, value, record, (edges.digest(tree),))


def measure(config: Config, run: Run) -> Iterator[Row]:
    """The network as it is, and by method at all sparsities, as pruned and renormalised."""
    net, trees, layers, remedy, statistics, test = run.setup
    whole = trees[0]
    with run.watch("statistics of the network"):
        renormalise = pruned.renormaliser(net, whole, remedy, statistics)
    for cell in run.cells({"method": method} for method in (None, *config.methods)):
        method, trees = cell["method"], {None: whole}
        if method:
            with run.watch(f"{method}, scores"):
                pruner = pruned.pruner(method, net, whole, layers, statistics=statistics)
                trees = {sparsity: pruner(sparsity / 100) for sparsity in config.sparsities}
        with run.watch(f"{method or 'unpruned'}, renormalisation"):
            found = [pruned.as_network(net, tree) for tree in trees.values()]
            found += map(renormalise, trees.values())
        with run.watch(f"{method or 'unpruned'}, accuracies"):
            # By one pass for all: photographs take long to decode.
            plain, better = np.split(pruned.answers(found, run.watched(test, "accuracies")), 2)
        for k, sparsity in enumerate(trees):
            yield from pruned.rows_of(cell | {"sparsity": sparsity}, remedy, better[k], plain[k])


def title_of(record: Record) -> str:
    what = {True: "random weights and images", False: "ImageNet"}[record["config"]["stand_in"]]
    name, images = record["config"]["model"], record["data"]["test_images"]
    return f"{what}: {name}, pruned, {images:,} test images"


def figure_of(record: Record) -> Any:
    return figures.of_record(record, pruned.panels_of(record))


EXPERIMENT = Experiment(
    name="imagenet_pruning", doc=__doc__, options=Config, prepare=prepare, measure=measure,
    title=title_of, finding=pruned.finding_of, figure=figure_of, tables=pruned.tables_of,
    claims=CLAIMS,
    stem=lambda record: [record["config"]["model"], *["stand-in"] * record["config"]["stand_in"]],
    untold=lambda record: record["config"]["stand_in"])  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
