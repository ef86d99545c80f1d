"""Can ZipIt! make one network of two that know half of the classes each?

    python experiments/zipit_disjoint.py                          # the shipped pair, CIFAR-10 5+5
    python experiments/zipit_disjoint.py --dataset digits         # seconds, needs no data
    python experiments/zipit_disjoint.py --loss cross-entropy --retrain    # plain classifiers
    python experiments/zipit_disjoint.py --embeddings clip.npy --retrain   # a text encoder's
    python experiments/zipit_disjoint.py --retrain --preset paper          # on a GPU
    python experiments/zipit_disjoint.py --dataset cifar100 --retrain --preset paper

Each network is trained on one half of the classes, from a seed of its own. Every class has a fixed
embedding, and the loss is the cross-entropy of the scaled cosines of outputs with those of a half.
The paper takes CLIP's embeddings of the class names; without --embeddings orthonormal ones at
random stand in. Merged are: the average of the weights; that after permuting the second network, by
weights or by activations; and ZipIt!, which merges features that correlate within a network, too,
up to a share beta of the merges, where a merged feature counts alpha as much. BatchNorm statistics
are measured anew in all (RESET).

The paper ("ZipIt!", ResNet20, 4 times as wide, joint accuracy in per cent, CIFAR-10 5+5): Git
Re-Basin 46.2, permutation 58.4, ZipIt! 79.1, ZipIt! 13/20 83.8, ensemble 87.4. Identity 43.0 and
k-means 29.1 are below permutation; optimal pairs (79.6, 11 minutes) are as good as greedy ones
(79.0, 1.1 s). In narrow networks ZipIt! is no better than permutation; the correlation falls.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

from kit import cli, disjoint, edges, figures, heads, joint, tables
from kit.experiment import Experiment, Run
from kit.records import Record, Row, networks
from papers import zipit_disjoint as paper

from vfjax import merge

log = logging.getLogger("vfjax.experiments")
ALPHAS, BETAS = (0.01, 0.1, 0.3, 1.0), (0.0, 0.0375, 0.075, 0.125, 0.25, 0.5, 1.0)
IMAGES = (10, 30, 100, 300, 1_000)
# What is merged in part, and how else features are matched.
PARTS = {"permutation": "permuted", "zip": "ZipIt!"}
MATCHERS = {"identity": "identity", "permute": "permuted", "kmeans": "k-means"}
MATCHERS |= {"optimal": "optimal pairs", "greedy": "ZipIt!", "unbounded": "ZipIt!, no budget"}
# How all of it looks in the figure.
LOOKS = {"permuted": "activation", "ZipIt!": "zipit", "identity": "direct", "k-means": 2}
LOOKS |= {"optimal pairs": 3, "ZipIt!, no budget": 5, "by beta": 1, "by alpha": 4}


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(heads.EmbeddingOptions, edges.EdgeOptions):
    model: tuple[str, float | None] | None = cli.option(
        None, "architecture of the networks (default: vgg7-bn-w0.5, for the digits vgg7-bn-w0.25; "
        "with --preset paper resnet20-w4, for CIFAR-100 resnet20-w8)", type=cli.model_of,
        metavar="NAME[-wWIDTH]")
    dimensions: int | None = cli.option(
        None, "of the orthonormal embeddings, at least as many as classes (default: 32 for "
        "CIFAR-10, 128 for CIFAR-100, 16 for the digits; with --preset paper 512)", type=int,
        metavar="N", part="{}dimensions",
        usual=lambda record: record["config"]["dimensions"] and disjoint.usual(record)[2])
    epochs: int | None = cli.option(
        None, "instead of the recipe's, of networks that are trained, as the digits' always are",
        type=cli.count_of("epochs"), part="epochs{}",
        usual=lambda record: disjoint.usual(record)[3])
    pairs: int = cli.option(
        1, "number of pairs; the first splits the classes in their order, others at random, and "
        "all have networks of their own; with more than one, numbers are means",
        type=cli.count_of("pairs"), part="{}pairs")
    alpha: float = cli.option(
        0.3, "of ZipIt!: how much a merged feature's correlations count", type=cli.number_of(0, 1),
        part="alpha{:g}")
    beta: float = cli.option(
        0.125, "of ZipIt!: share of the merges that may be within a network",
        type=cli.number_of(0, 1), part="beta{:g}")
    samples: int = cli.sized("test images, the first N", "samples{}", 10_000, 10_000)
    statistics: int = cli.sized(
        "statistics images, the first N of the training split, of all classes, not augmented",
        "statistics{}", 5_000, 48_000)
    held_out: int = cli.sized(
        "training images after those, which the networks have seen, on which alpha and beta are "
        "compared", "heldout{}", 2_000, 2_000)
# fmt: on


def plan_of(config: Config, depth: int, most: int) -> Iterator[Row]:
    """The cells: networks, what they are merged to in any way, ways to match, features."""
    matchers, stops = list(MATCHERS), disjoint.stops_of(depth)
    if "optimal" in matchers and importlib.util.find_spec("networkx") is None:
        log.warning('optimal pairs are left out: they need networkx, pip install ".[matching]"')
        matchers.remove("optimal")
    zipped = {"way": "zip", "layers": depth, "alpha": config.alpha, "beta": config.beta}
    zipped["images"] = most
    cells: list[Row] = [{"way": "network A"}, {"way": "network B"}]
    cells += [{"way": "ensemble", "layers": 0}]
    cells += [{"way": way, "layers": depth} for way in ("average", "weights")]
    cells += [{"way": "permutation", "layers": layers} for layers in stops]
    cells += [zipped | {"layers": layers} for layers in stops]
    cells += [zipped | {"alpha": alpha} for alpha in ALPHAS if alpha != config.alpha]
    cells += [zipped | {"beta": beta} for beta in BETAS if beta != config.beta]
    cells += [zipped | {"images": count} for count in IMAGES if count < most]
    cells += [{"way": matcher, "layers": depth} for matcher in matchers] + [{"way": "features"}]
    yield from ({"pair": pair} | cell for pair in range(config.pairs) for cell in cells)


def merged(pair: joint.Networks, config: Config, cell: Row) -> merge.Merged:
    way, how = cell["way"], {}
    if way in ("network A", "network B"):
        return pair.alone("AB".index(way[-1]))
    if way in ("zip", *MATCHERS):
        how = {name: cell.get(name, getattr(config, name)) for name in ("alpha", "beta")}
        how |= {"matcher": way} if way in MATCHERS else {"images": cell["images"]}
        # Optimal pairs know no budget of merges within a network: greedy ones go without it, too.
        how |= {"matcher": "greedy", "beta": 1.0} if way == "unbounded" else {}
    method = {"ensemble": "average", "permutation": "permute"}.get(way, "zip" if how else way)
    return pair.merged(pair.maps(method, **how), cell["layers"])


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Accuracies of all that the networks are merged to."""
    known, head = run.setup
    images = known.images

    @functools.lru_cache(maxsize=1)
    def pair_of(place: int) -> joint.Networks:
        trees = known.trees[2 * place : 2 * place + 2]
        return joint.Networks(known.net, trees, images.statistics, run.watch)

    for cell in run.cells(plan_of(config, known.net.depth, len(images.statistics.images))):
        pair, way, row = pair_of(cell["pair"]), cell["way"], dict(cell)
        if way == "features":
            zipped = pair.maps("zip", alpha=config.alpha, beta=config.beta)
            yield from (cell | found for found in disjoint.features(pair, zipped))
            continue
        before = run.watch.seconds["matching"]
        model = merged(pair, config, cell)
        if way in MATCHERS:
            row["seconds"] = run.watch.seconds["matching"] - before
        tasks = disjoint.tasks_of(known.dataset.classes, cell["pair"])
        with run.watch("test"):
            test, held_out = (
                heads.accuracies(head, tasks, joint.outputs(model, (x for x, _ in of)), of.labels)
                for of in (images.test, images.held_out)
            )
        yield row | test | {"held_out": held_out["accuracy"]} | pair.costs(model)


def title_of(record: Record) -> str:
    classes, config = record["data"]["classes"], record["config"]
    plain = ", plain classifiers" * (config["loss"] == "cross-entropy")
    pairs = f", mean of {config['pairs']} pairs" * (config["pairs"] > 1)
    images = f"statistics over {record['data']['statistics_images']:,} images"
    halves = f"{classes // 2}+{classes - classes // 2} classes"
    return f"{networks(record)}, {halves}, {images}{plain}{pairs}"


def finding_of(record: Record) -> str:
    known = (paper.ZIP, paper.PERMUTED, paper.ALONE, paper.PART_ZIPPED, paper.ENSEMBLE)
    shown = (f"{one.label} {100 * one.of(record):.1f}" for one in known)
    return f"On all classes, per cent: {', '.join(shown)}"


def tables_of(record: Record) -> list[tables.Table]:
    rows, depth = paper.asked(record), paper.depth_of(record)
    lines: dict[str, Row] = {name: {"way": name} for name in ("network A", "network B")}
    lines |= {"weight average": {"way": "average"}, "permuted by weights": {"way": "weights"}}
    for way, text in PARTS.items():
        stops = sorted(rows.distinct("layers", way=way), reverse=True)
        lines |= {f"{text} {at}/{depth}": {"way": way, "layers": at} for at in stops}
    lines["ensemble"] = {"way": "ensemble"}
    keys = {"joint": "accuracy", "task A": "task_a", "task B": "task_b", "mean of tasks": "average"}
    columns = [tables.Column(text, key=key) for text, key in keys.items()]
    ways = {name: {"way": way} for way, name in MATCHERS.items() if rows.where(way=way)}
    found = [columns[0], tables.Column("seconds", key="seconds", show=tables.number())]
    whole = [*columns, *tables.ratios()]
    return [
        tables.pivot(rows, lines, whole, title=record["title"], corner="test accuracy, %"),
        tables.pivot(rows, ways, found, title="how features are matched", corner="matching"),
    ]


def figure_of(record: Record) -> Any:
    """Accuracy against layers merged, alpha and beta, statistics images; correlation by layer."""
    rows, every, depth = paper.asked(record), record.rows, paper.depth_of(record)
    y, limits, whole = "joint test accuracy (%)", {"y_limits": (0, 101)}, {"way": "zip"}
    whole["layers"] = depth

    def line(name: str, x: str, key: str = "accuracy", of: Any = rows, **more: Any) -> figures.Line:
        return figures.line(of, x, key, name=name, method=LOOKS.get(name, 0), **more)

    def level(name: str, value: float, method: str) -> figures.Line:
        return figures.Line(name, None, 100 * value, method=method, dashed=True)

    def by_layers(key: str) -> list[figures.Line]:
        found = [line(n, "layers", key, way=(way, "ensemble")) for way, n in PARTS.items()]
        return [*found, level("weight average", rows.mean(key, way="average"), "direct")]

    def by(option: str, name: str) -> figures.Line:
        return line(name, option, of=paper.asked(record, option), **whole)

    alone = level("better network alone", paper.ALONE.of(record), "edges")
    permuted = level("permuted, all layers", paper.PERMUTED.of(record), "activation")
    features = {"ZipIt!": "correlation", "permuted": "permuted_correlation"}
    features["share within a network"] = "within"
    merged = [line(name, "depth", key, every, scale=1) for name, key in features.items()]
    points = [line(n, "seconds", way=way) for way, n in MATCHERS.items() if rows.where(way=way)]
    x, title = f"layers merged l (of L = {depth}; 0: ensemble)", f"ZipIt! {depth}/{depth}"
    panels = [
        figures.Panel("all classes", x, y, [*by_layers("accuracy"), alone], **limits),
        figures.Panel("each half alone", x, "test accuracy, mean (%)", by_layers("average"),
                      **limits),
        figures.Panel(f"{title} by alpha and beta", "beta or alpha", y,
                      [by("beta", "by beta"), by("alpha", "by alpha"), permuted]),
        figures.Panel(f"{title} by images", "statistics images", y,
                      [by("images", "ZipIt!"), permuted], log_x=True, **limits),
        figures.Panel("ways to match", "seconds", y, points, log_x=True, **limits),
        figures.Panel("what is merged", "layer", "correlation of features, share", merged,
                      y_limits=(0, 1)),
    ]  # fmt: skip
    bars = f"standard deviation over {record['config']['pairs']} pairs"
    return figures.of_record(record, panels, bars=bars, columns=3)


LEGEND = """ZipIt! l/L: the first l of L layers merged, and the two networks finish apart, a head
each; the ensemble is l = 0; two thirds are what 13 is of 20. Joint accuracy is over all classes: of
one output, the class whose embedding it is closest to; of two heads, and of plain classifiers, the
class of the largest probability, where each head's are among its own classes. Accuracy per task is
among the classes of the image's own half, by its own head where there are two. Seconds are of the
matching alone. alpha and beta are those of the paper's code, fixed beforehand."""
EXPERIMENT = Experiment(
    name="zipit_disjoint", doc=__doc__, options=Config, prepare=disjoint.prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=paper.CLAIMS,
    summary=lambda record: {"chosen": paper.chosen(record)}, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
