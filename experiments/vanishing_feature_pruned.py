"""Where do features vanish in pruned networks, and does renormalisation bring them back?

    python experiments/vanishing_feature_pruned.py                      # VGG16 with BatchNorm, 80%
    python experiments/vanishing_feature_pruned.py --model resnet20     # 85%
    python experiments/vanishing_feature_pruned.py --sparsity 95
    python experiments/vanishing_feature_pruned.py --dataset digits     # seconds, needs no data
    python experiments/vanishing_feature_pruned.py --retrain --preset paper    # full width

Networks are shipped ones, of all seeds that there are, pruned in one shot by global magnitude, all
layers but those of shortcuts, and then renormalised as in `pruning.py`: RESET with BatchNorm, else
REPAIR, or RESCALE for VGGs without any norm. The feature of a layer is what the input adds to its
output, f(x) - f(0), where 0 is the mean image; the offset is f(0).

The paper ("Vanishing Feature", VGG16-BN at 80%, ResNet20 at 85%): features vanish in pruned
networks as in merged ones, so that logits hardly depend on the image, and RESET cures it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from kit import cli, features, figures, pruned, records
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, joined
from papers.vanishing_feature_pruned import CLAIMS, measured, remedy_of

import vfjax

# Per cent of the weights that go, by model, and of all others.
SPARSITIES = {"resnet20": 85}
SPARSITY = 80


def default_sparsity(model: str) -> int:
    """The paper's sparsity of a model, or that of VGG16.

    Example:
      >>> default_sparsity("resnet20"), default_sparsity("vgg16-bn")
      (85, 80)
    """
    return SPARSITIES.get(model, SPARSITY)


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(pruned.RemedyOptions):
    sparsity: int | float | None = cli.option(
        None, f"per cent of the weights that go (default: {SPARSITY}; 85 for resnet20)",
        type=pruned.sparsity_of, metavar="S", part="at{}",
        usual=lambda record: default_sparsity(record["config"]["model"]))
    samples: int | None = features.samples()
    statistics: int | None = cli.images(
        "statistics", "training images, the first N, for renormalisation", features.STATISTICS)
# fmt: on


def settled(config: Config, net: vfjax.Network, name: str) -> Config:
    pruned.remedy_of(config, net, name)
    if config.sparsity == 100:
        raise cli.UserError("--sparsity 100 leaves no features to measure; take less.")
    return dataclasses.replace(config, sparsity=config.sparsity or default_sparsity(name))


PREPARE = partial(pruned.prepare, count=lambda config: None, test="samples", settled=settled)


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Features, logits and accuracy, by seed, of the network before, pruned, and renormalised."""
    net, trees, layers, remedy, statistics, test = run.setup
    kinds = ("unpruned", "pruned", remedy)
    for cell in run.cells({"seed": seed, "network": kind} for seed in trees for kind in kinds):
        seed, kind = cell.values()
        tree = found = trees[seed]
        whole = None
        if kind != "unpruned":
            whole = features.by_layer(run.rows, "feature", network="unpruned", seed=seed)
            with run.watch("pruning"):
                found = pruned.pruner("magnitude", net, tree, layers)(config.sparsity / 100)
        if kind == remedy:
            with run.watch("renormalisation"):
                found = pruned.renormaliser(net, tree, remedy, statistics)(found)
        network = pruned.as_network(net, found)
        with run.watch("features"):
            watched = run.watched(test, "features")
            for row in features.rows_of(net, {kind: network}, watched, whole):
                yield cell | row
        with run.watch("accuracies"):
            yield cell | {"accuracy": float(pruned.answers([network], test).mean())}


def names_of(record: Record) -> dict[str, str]:
    """The networks by their names in tables and figures, the unpruned one first."""
    remedy = remedy_of(record)
    return {"unpruned": "unpruned", "pruned": "pruned", f"pruned, {label(remedy)}": remedy}


def title_of(record: Record) -> str:
    what = f"{record['config']['sparsity']}% pruned by global magnitude"
    return records.title(record, what, len(record.rows.distinct("seed")))


def finding_of(record: Record) -> str:
    found = {text: measured(record, name) for text, name in names_of(record).items()}
    _, before, after = found.values()
    shares = joined(f"{numbers['share']:.2g} ({text})" for text, numbers in found.items())
    text = f"Of the unpruned networks' features {100 * before['end']:.0f}% are left at the output, "
    text += f"{100 * after['end']:.0f}% with {label(remedy_of(record))}; "
    return f"{text}features over offsets there are {shares}"


def figure_of(record: Record) -> Any:
    """Bounds before and after, features against offsets, and logits."""
    depth, seeds = record["model"]["depth"], len(record.rows.distinct("seed"))
    styles, looks = {}, {"unpruned": "edges", "pruned": "none"}
    for text, name in names_of(record).items():
        dashed = name == "unpruned"
        styles[name] = {"name": text, "method": looks.get(name, name), "dashed": dashed}
    bounds = [features.line(record, n, bound=True, **styles[n]) for n in list(styles)[1:]]
    # The offset of the first layer is its bias alone, which is next to nothing before BatchNorm.
    shares = [features.line(record, n, bound=False, start=2, **styles[n]) for n in styles]
    y = "norm of f(x) - f(0), ratio to unpruned"
    title = f"upper bounds of features, L = {depth}"
    row = [
        figures.Panel(title, features.DEPTH, y, bounds, log=True),
        figures.Panel("features against offsets", features.DEPTH, features.AGAINST, shares, True),
        features.logits_panel(record, styles),
    ]
    bars = f" (logits, of the first seed), else over {seeds} seeds" if seeds > 1 else ""
    return figures.of_record(record, row, bars=features.BARS + bars)


LEGEND = """Shown are features f(x) - f(0), mean norms over test images, before norm and activation,
along the main path, relative to those of the network before pruning (ratio) and bounded from above
in the figure by the least sequence that does not rise, as for merged networks in
`vanishing_feature.py`; features against offsets f(0); and logits, their mean over images and how
they vary (spread)."""
EXPERIMENT = Experiment(
    name="vanishing_feature_pruned", doc=__doc__, options=Config, prepare=PREPARE, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, claims=CLAIMS, legend=LEGEND,
    tables=lambda record: [features.table(record, names_of(record))])  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
