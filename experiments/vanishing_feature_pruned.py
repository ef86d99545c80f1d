"""Where features vanish in pruned networks, and that renormalisation brings them back.

    python experiments/vanishing_feature_pruned.py                      # VGG16 with BatchNorm, 80%
    python experiments/vanishing_feature_pruned.py --model resnet20     # 85%
    python experiments/vanishing_feature_pruned.py --sparsity 95
    python experiments/vanishing_feature_pruned.py --dataset digits     # seconds, needs no data
    python experiments/vanishing_feature_pruned.py --retrain --preset paper    # full width

Networks are shipped ones, of all seeds that there are, pruned in one shot by global magnitude, all
layers but those of shortcuts, and then renormalised as in `pruning.py`: RESET with BatchNorm, else
REPAIR, or RESCALE for VGGs without any norm.

The feature of a layer is what the input adds to its output, f(x) - f(0), where 0 is the mean image;
the offset is f(0). Shown are, as in `vanishing_feature.py`, mean norms of the features over test
images, before norm and activation, along the main path, divided by those of the network before
pruning, and bounded from above by the least sequence that does not rise (means over seeds); the
features against the offsets, from the second layer on; and the logits of the first network, their
mean over images and how they vary.

What the paper found (VGG16-BN at 80%, ResNet20 at 85%): features vanish in pruned networks as in
merged ones, so that logits hardly depend on the image (both taken here as: at the output less than
three tenths are left of what the unpruned network has, in the mean over seeds), and RESET cures it
(taken as: features are closer to the unpruned network's, in the ratio at the output and in the
geometric mean over layers, and so is the logits' variation).

What came out here (CIFAR-10: vgg16-bn at 0.125 of the width, 80% pruned by global magnitude, 2,000
test images, mean of 2 seeds, 30 s on 2 CPU cores): Accuracies: unpruned 80.68 ± 0.18; pruned 10.82
± 0.53; pruned, RESET 76.65 ± 0.71. Features over offsets at the output: 1.7 (unpruned), 0.23
(pruned) and 1.7 (pruned, RESET). As in the paper: features of the pruned network are 1.00 times the
unpruned one's at layer 1 and 0.13 times at layer 14; its logits vary over images 0.11 times as
much; with RESET features end at 0.84 times the unpruned network's; with RESET they are 0.83 times
(geometric mean over layers), without 0.56 times; with RESET logits vary 0.84 times as much as the
unpruned network's.

What came out here (CIFAR-10: resnet20 at 0.5 of the width, 85% pruned by global magnitude, 2,000
test images, mean of 2 seeds, 42 s on 2 CPU cores): Accuracies: unpruned 84.60 ± 0.57; pruned 16.62
± 9.65; pruned, RESET 55.48 ± 9.30. Features over offsets at the output: 1.8 (unpruned), 0.45
(pruned) and 1.3 (pruned, RESET). As in the paper: features of the pruned network are 1.02 times the
unpruned one's at layer 1 and 0.23 times at layer 20; its logits vary over images 0.14 times as
much; with RESET features end at 0.62 times the unpruned network's; with RESET they are 0.75 times
(geometric mean over layers), without 0.56 times; with RESET logits vary 0.52 times as much as the
unpruned network's.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import _pruning
import numpy as np
import vanishing_feature as merged

from vfjax import plot

# Per cent of the weights that go, by model, and of all others.
SPARSITIES = {"resnet20": 85}
SPARSITY = 80
# Of the unpruned network's, less than this is "vanished".
VANISHED = 0.3
DEPTH = merged.DEPTH


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="vanishing_feature_pruned.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(
        p, examples="vgg16, vgg16-bn, vgg16-ln, resnet20, resnet20-ln", cifar=_pruning.DEFAULT
    )
    p.add_argument(
        "--sparsity",
        type=_pruning.sparsity_of,
        metavar="S",
        help=f"per cent of the weights that go (default: {SPARSITY}; 85 for resnet20)",
    )
    _pruning.remedy_options(p)
    for name, defaults, what in (
        ("samples", merged.SAMPLES, "test images, the first N, that features are measured on"),
        (
            "statistics",
            merged.STATISTICS,
            "training images, the first N, for renormalisation",
        ),
    ):
        p.add_argument(
            f"--{name}",
            type=_common.count_of("images"),
            metavar="N",
            help=f"{what} (default: {defaults['cpu']:,}; all with --preset paper)",
        )
    _common.folder_options(p)
    return p


def default_sparsity(model: str) -> int:
    """The paper's sparsity of a model, or that of VGG16.

    Example:
      >>> default_sparsity("resnet20"), default_sparsity("vgg16-bn")
      (85, 80)
    """
    return SPARSITIES.get(model, SPARSITY)


# ------------------------------------------------------------------------------ record and figure


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    if args.sparsity == 100:
        raise _common.UserError("--sparsity 100 leaves no features to measure; take less.")
    args.samples = args.samples or merged.SAMPLES[args.preset]
    args.statistics = args.statistics or merged.STATISTICS[args.preset]
    watch = _common.Stopwatch()
    models = _edges.found(
        args,
        watch,
        count=None,
        train=args.statistics,
        test=args.samples,
        cifar=_pruning.DEFAULT,
        check=functools.partial(_pruning.remedy_of, args),
    )
    net, remedy = models.net, _pruning.remedy_of(args, models.net, models.arch.name)
    sparsity = args.sparsity or default_sparsity(models.arch.name)
    layers = _pruning.layers_of(net, models.arch.name)
    statistics, test = _pruning.statistics_of(args, models), models.batches("test", args.samples)
    runs = []
    for tree in models.trees:
        with watch("pruning"):
            pruned = _pruning.pruner("magnitude", net, tree, layers)(sparsity / 100)
        with watch("renormalisation"):
            renormalised = _pruning.Renormaliser(net, tree, remedy, statistics)(pruned)
        networks = {
            name: _pruning.as_network(net, t)
            for name, t in (("unpruned", tree), ("pruned", pruned))
        }
        networks |= {remedy: renormalised}
        with watch("features"):
            watched = _common.Watched(test, "features")
            found = merged.curves_of(net, networks, [networks["unpruned"]], watched)
        with watch("accuracies"):
            for name, network in networks.items():
                found[name]["accuracy"] = float(_pruning.answers(network, test).mean())
        runs.append(found)
    main = merged.main_layers(net)
    config = vars(args) | {"model": models.arch.name, "width": models.arch.width}
    record: dict[str, Any] = {
        "experiment": "vanishing_feature_pruned",
        "command": command,
        "config": config | {"sparsity": sparsity},
        **models.record(statistics, test),
        "seeds": {"edge_models": models.seeds},
        "remedy": remedy,
        "layers": [layer.name for layer in main],
        "depth": [layer.depth for layer in main],
        "relative_depth": [k / merged.POINTS for k in range(1, merged.POINTS + 1)],
        "gamma": merged.GAMMA,
        "runs": runs,
    }
    record["data"]["augmented"] = _pruning.augmented(args, models)
    record["title"] = _pruning.titled(record, f"{sparsity}% pruned by global magnitude")
    record["seconds"] = watch.record()
    return record | _common.environment()


def label_of(record: Mapping[str, Any], name: str) -> str:
    """A network's name in legends and tables."""
    if name != record["remedy"]:
        return name
    return f"pruned, {_pruning.REMEDIES[name]}"


def names_of(record: Mapping[str, Any]) -> list[str]:
    """The networks' names, the unpruned one first."""
    return ["unpruned", "pruned", record["remedy"]]


def over_runs(record: Mapping[str, Any], name: str, of: Any) -> np.ndarray:
    """A number or row of numbers of each run's network, `[runs, ...]`."""
    return np.array([of(run[name]) for run in record["runs"]])


def figure_of(record: dict[str, Any]) -> Any:
    """Bounds before and after, features against offsets, and logits."""
    names, depth = names_of(record), record["model"]["depth"]
    colours = dict(zip(names, (6, 0, 1), strict=True))
    bounds = {
        label_of(record, name): _pruning.curve_of(
            over_runs(record, name, lambda found: found["resampled"]["tight"]),
            record["relative_depth"],
            colour=colours[name],
        )
        for name in names[1:]
    }
    # The offset of the first layer is its bias alone, which is next to nothing before BatchNorm.
    share = {
        label_of(record, name): _pruning.curve_of(
            over_runs(record, name, merged.against_offset)[:, 1:],
            [d / depth for d in record["depth"][1:]],
            colour=colours[name],
            dashed=name == "unpruned",
        )
        for name in names
    }
    logits = {}
    for place, name in enumerate(names):
        found = record["runs"][0][name]["logits"]
        classes = np.arange(len(found["mean"])) + 0.15 * (place - 1)
        logits[label_of(record, name)] = plot.Curve(
            classes,
            found["mean"],
            error=found["std"],
            colour=colours[name],
            dashed=name == "unpruned",
        )
    y = "norm of f(x) - f(0), ratio to unpruned"
    title = f"upper bounds of features, L = {depth}"
    return plot.panels(
        [
            plot.Panel(title, DEPTH, y, bounds, log=True),
            plot.Panel(
                "features against offsets",
                DEPTH,
                "norm of f(x) - f(0) / norm of f(0)",
                share,
                log=True,
            ),
            plot.Panel("logits, first seed", "class", "logit (mean, std over images)", logits),
        ],
        title=record["title"],
    )


def measured(record: Mapping[str, Any], name: str) -> dict[str, float]:
    """What claims are decided by: means over seeds, relative to the unpruned network."""
    relative = over_runs(record, name, lambda found: found["relative"])

    def spread(of: str) -> np.ndarray:
        return over_runs(record, of, lambda found: np.mean(found["logits"]["std"]))

    return {
        "first": float(relative[:, 0].mean()),
        "end": float(relative[:, -1].mean()),
        "layers": float(np.mean([merged.over_layers(row) for row in relative])),
        "varies": float((spread(name) / spread("unpruned")).mean()),
        "share": float(over_runs(record, name, lambda f: merged.against_offset(f)[-1]).mean()),
    }


def closer(new: float, old: float) -> bool:
    """Whether a ratio is closer to 1 than another.

    Example:
      >>> closer(1.5, 0.5), closer(2.5, 0.5)
      (True, False)
    """
    return abs(math.log(max(new, 1e-30))) < abs(math.log(max(old, 1e-30)))


def claims_of(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper: whether it holds here, and what was measured."""
    remedy = _pruning.REMEDIES[record["remedy"]]
    before, after = (measured(record, name) for name in names_of(record)[1:])
    return [
        (
            before["end"] < min(VANISHED, before["first"]),
            f"features of the pruned network are {before['first']:.2f} times the unpruned one's at "
            f"layer 1 and {before['end']:.2f} times at layer {len(record['layers'])}",
        ),
        (
            before["varies"] < VANISHED,
            f"its logits vary over images {before['varies']:.2f} times as much",
        ),
        (
            closer(after["end"], before["end"]),
            f"with {remedy} features end at {after['end']:.2f} times the unpruned network's",
        ),
        (
            closer(after["layers"], before["layers"]),
            f"with {remedy} they are {after['layers']:.2f} times (geometric mean over layers), "
            f"without {before['layers']:.2f} times",
        ),
        (
            closer(after["varies"], before["varies"]),
            f"with {remedy} logits vary {after['varies']:.2f} times as much as the unpruned "
            "network's",
        ),
    ]


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The accuracies and what decides the output in sentences; and the claims."""
    parts, shares = [], []
    for name in names_of(record):
        accuracy = over_runs(record, name, lambda found: found["accuracy"])
        parts.append(f"{label_of(record, name)} {_common.percent(accuracy.tolist())}")
        shares.append(f"{measured(record, name)['share']:.2g} ({label_of(record, name)})")
    intro = f"Accuracies: {'; '.join(parts)}. Features over offsets at the output: "
    return f"{intro}{_common.joined(shares)}.", claims_of(record)


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracy, features at half depth and at the output, logits."""
    header = ["network", "accuracy, %", "feature at L/2, ratio", "at L", "feature of logits"]
    header += ["offset of logits", "spread of logits"]
    half, rows = record["model"]["depth"] // 2 - 1, []
    for name in names_of(record):
        of = [
            lambda found: found["relative"][half],
            lambda found: found["relative"][-1],
            lambda found: found["feature"][-1],
            lambda found: found["offset"][-1],
            lambda found: np.mean(found["logits"]["std"]),
        ]
        numbers = [f"{over_runs(record, name, number).mean():.3g}" for number in of]
        accuracy = over_runs(record, name, lambda found: found["accuracy"]).tolist()
        rows.append([label_of(record, name), _common.percent(accuracy), *numbers])
    return header, rows


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    if config["sparsity"] != default_sparsity(config["model"]):
        parts += [f"at{config['sparsity']}"]
    parts += [config["renorm"]] if config["renorm"] != "auto" else []
    parts += ["plain"] if config["plain"] else []
    for option, defaults in (("samples", merged.SAMPLES), ("statistics", merged.STATISTICS)):
        count = config[option]
        parts += [f"{option}{count}"] if count != defaults[config["preset"]] else []
    return _edges.file_name(record, parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    _common.print_table(record["title"], *table_of(record))
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
