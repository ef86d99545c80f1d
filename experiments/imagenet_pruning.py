"""One-shot pruning of published ImageNet networks, and what renormalising them brings back.

    python experiments/imagenet_pruning.py --weights resnet50.safetensors
    python experiments/imagenet_pruning.py --model convnext-base --weights convnext_base.safetensors
    python experiments/imagenet_pruning.py --stand-in       # seconds: random weights and images

`--weights` is a file of PyTorch weights under the names of torchvision or timm: `.safetensors`, as
timm publishes them, or `.npz`, as numpy.savez writes what torch.load reads. ImageNet is what TFDS
prepared of it in `--data-dir`, and is streamed, its shorter side resized to `--resize` pixels
(torchvision's first ResNet50 takes 256, its ConvNeXt-tiny 236 and -base 232) and the centre of 224
taken. Presets are the paper's: ResNet50 without its
first layer, up to 90% of all weights, by global and layerwise magnitude, with RESET; ConvNeXt's
linear layers but for the last, up to 80%, by layerwise magnitude and by Wanda, with REPAIR. The
paper prunes layer by layer, and whether its Wanda compares the weights of a layer or, as Wanda's
authors do, of an output it does not say: both are here. The unpruned network is the only reference,
by the same training images, resized and cropped as in testing. `--stand-in` takes a narrow
network with random weights and a few random images in their place: it shows that all runs, and
nothing else. All networks of a method are held at once, since decoding is what takes the time:
twice as many times the network's size as there are sparsities.

What the paper found: ResNet50 gains most at high sparsity, by RESET; ConvNeXt-B at 76% goes from
43.2 to 65.0 with Wanda and from 35.5 to 69.9 with magnitude, and at 80% gains 36 and 55 points.

What came out here: not measured, for want of ImageNet and of weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
import _pruning
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import vfjax
from vfjax import checkpoint, imagenet, merge, models, plot

# Per family: methods, sparsities in per cent, remedy.
PRESETS: dict[str, dict[str, Any]] = {
    "resnet50": {
        "methods": ("magnitude", "magnitude-layer"),
        "sparsities": (10, 20, 30, 40, 50, 60, 70, 80, 90),
        "remedy": "reset",
    },
    "convnext": {
        "methods": ("magnitude-layer", "wanda", "wanda-layer"),
        "sparsities": (50, 60, 70, 76, 80),
        "remedy": "repair",
    },
}
NAMES = ("resnet50", "convnext-tiny", "convnext-base")
METHODS = ("magnitude", "magnitude-layer", "wanda", "wanda-layer")
# Training images for the statistics, which the REPAIR paper found to be enough.
STATISTICS, BATCH = 5_000, 50
RESIZE = 256


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="imagenet_pruning.py", description=__doc__, formatter_class=_common.Help
    )
    p.add_argument("--model", default=NAMES[0], choices=NAMES, help="the network")
    p.add_argument("--weights", metavar="FILE", help="its PyTorch weights, .safetensors or .npz")
    p.add_argument(
        "--stand-in",
        action="store_true",
        help="a narrow network with random weights on random images: to see that it runs",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="M",
        help=f"{', '.join(METHODS)} (default: the paper's for the network)",
    )
    p.add_argument(
        "--sparsities",
        nargs="+",
        type=_pruning.sparsity_of,
        metavar="S",
        help="per cent of the weights that go (default: the paper's for the network)",
    )
    p.add_argument(
        "--statistics",
        type=_common.count_of("images"),
        default=STATISTICS,
        metavar="N",
        help="training images, the first N, for renormalisation and Wanda",
    )
    p.add_argument(
        "--test",
        type=_common.count_of("images"),
        metavar="N",
        help="validation images, the first N (default: all 50,000)",
    )
    p.add_argument(
        "--resize",
        type=_common.count_of("pixels"),
        default=RESIZE,
        metavar="N",
        help="pixels of the shorter side, of which 224 are taken",
    )
    p.add_argument(
        "--batch-size", type=_common.count_of("images"), default=BATCH, help="images at once"
    )
    _common.folder_options(p)
    return p


def preset_of(name: str) -> dict[str, Any]:
    """The paper's settings for a network.

    Example:
      >>> preset_of("convnext-tiny")["remedy"]
      'repair'
    """
    return PRESETS[name.partition("-")[0]]


def stand_in_of(name: str) -> dict[str, Any]:
    """Options that make a network small enough to see it run.

    Example:
      >>> stand_in_of("resnet50")
      {'depth': 26, 'width': 0.125}
    """
    if name == "resnet50":
        return {"depth": 26, "width": 0.125}
    return {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}


def network(args: argparse.Namespace) -> tuple[vfjax.Network, Any, dict[str, Any]]:
    """The network, its variables, and what the record says of them.

    Raises:
      UserError: If there are no weights.
    """
    if args.stand_in and (args.weights or args.data_dir):
        raise _common.UserError(
            "--stand-in takes random weights and images: leave out --weights and --data-dir."
        )
    if args.stand_in:
        model, size = models.create(args.model, classes=10, **stand_in_of(args.model)), 32
        images = jnp.zeros((2, size, size, 3))
        tree = jax.jit(model.init)(jax.random.key(0), images)
    elif not args.weights:
        raise _common.UserError(
            "--weights is missing: give a file of PyTorch weights, or try --stand-in"
        )
    else:
        model, size = models.create(args.model, classes=1000), 224
        images = jax.ShapeDtypeStruct((args.batch_size, size, size, 3), jnp.float32)
        tree = checkpoint.from_torch(args.weights, model)
    net = vfjax.trace(models.apply_fn(model), tree, images)
    facts = {"name": args.model, "parameters": net.parameters, "flops": net.flops, "size": size}
    return net, tree, facts


def images_of(
    args: argparse.Namespace, split: str, count: int | None, size: int
) -> imagenet.Streamed:
    """Batches of a split, or of random images in its place."""
    if not args.stand_in:
        options = {"batch_size": args.batch_size, "samples": count, "data_dir": args.data_dir}
        return imagenet.load(split, resize=args.resize, **options)
    rng = np.random.default_rng(len(split))
    source = [
        {"image": rng.integers(0, 256, (40, 48, 3), np.uint8), "label": int(rng.integers(10))}
        for _ in range(24)
    ]
    return imagenet.Streamed(
        source, batch_size=args.batch_size, samples=count, resize=size + 4, crop=size
    )


def accuracies(networks: Sequence[merge.Merged], test: imagenet.Streamed) -> list[float]:
    """Of several networks, by one pass: photographs take long to decode."""
    right = np.zeros(len(networks))
    for x, label in tqdm(test, unit="batch", leave=False):
        right += [int(_pruning.right(network, x, label).sum()) for network in networks]
    return (right / test.count).tolist()


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    preset, watch = preset_of(args.model), _common.Stopwatch()
    methods = list(dict.fromkeys(args.methods or preset["methods"]))
    sparsities = sorted(set(args.sparsities or preset["sparsities"]))
    with watch("weights"):
        net, tree, facts = network(args)
    with watch("data"):
        statistics = images_of(args, "train", args.statistics, facts["size"]).held()
        test = images_of(args, "validation", args.test, facts["size"])
    layers = _pruning.layers_of(net, args.model)
    with watch("statistics of the network"):
        renormalised = _pruning.Renormaliser(net, tree, preset["remedy"], statistics)
    with watch("unpruned"):
        (unpruned,) = accuracies([_pruning.as_network(net, tree)], test)
    found: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        with watch(f"{method}, scores"):
            pruned = _pruning.pruner(method, net, tree, layers, statistics=statistics)
        with watch(f"{method}, renormalisation"):
            trees = [pruned(sparsity / 100) for sparsity in sparsities]
            plain = [_pruning.as_network(net, one) for one in trees]
            better = [renormalised(one) for one in trees]
        with watch(f"{method}, accuracies"):
            values = accuracies([*plain, *better], test)
        count = len(sparsities)
        found[method] = {"none": values[:count], "renormalised": values[count:]}
    record: dict[str, Any] = {
        "experiment": "imagenet_pruning",
        "command": command,
        "config": vars(args) | {"methods": methods, "sparsities": sparsities},
        "data": {
            "name": "random images" if args.stand_in else "imagenet2012",
            "statistics_images": len(statistics.images),
            "test_images": test.count,
        },
        "model": facts,
        "layers": list(layers),
        "remedy": preset["remedy"],
        "sparsities": sparsities,
        "unpruned": unpruned,
        "methods": found,
    }
    what = "random weights and images" if args.stand_in else "ImageNet"
    record["title"] = f"{what}: {args.model}, pruned, {test.count:,} test images"
    record["seconds"] = watch.record()
    return record | _common.environment()


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy against sparsity, as pruned (dashed) and renormalised."""
    x, remedy = record["sparsities"], _pruning.REMEDIES[record["remedy"]]
    curves = {}
    for colour, (method, rows) in enumerate(record["methods"].items()):
        label = _pruning.METHODS[method]
        for key, name in (("renormalised", f"{label}, {remedy}"), ("none", f"{label}, as pruned")):
            values = [100 * value for value in rows[key]]
            curves[name] = plot.Curve(x, values, colour=colour, dashed=key == "none")
    ends = [x[0], x[-1]]
    curves["unpruned"] = plot.Curve(ends, [100 * record["unpruned"]] * 2, colour=6, dashed=True)
    y = "test accuracy (%)"
    panel = plot.Panel(record["title"], "sparsity (%)", y, curves, y_limits=(0, 101))
    return plot.panels([panel])


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, preset = record["config"], preset_of(record["config"]["model"])
    parts = ["imagenet_pruning", config["model"], *(["stand-in"] if config["stand_in"] else [])]
    if config["methods"] != list(preset["methods"]):
        parts.append("+".join(config["methods"]))
    if config["sparsities"] != list(preset["sparsities"]):
        parts.append("at" + "+".join(map(str, config["sparsities"])))
    for option, default in (("test", None), ("statistics", STATISTICS), ("resize", RESIZE)):
        parts += [f"{option}{config[option]}"] if config[option] != default else []
    return "-".join(parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    header, columns = ["sparsity, %"], []
    for method, rows in record["methods"].items():
        header += [method, f"+ {_pruning.REMEDIES[record['remedy']]}"]
        columns += [np.array([rows["none"]]), np.array([rows["renormalised"]])]
    cells = _pruning.rows_of(record["sparsities"], columns)
    _common.print_table(record["title"], header, cells)
    print(f"Unpruned: {100 * record['unpruned']:.2f} %.")


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
