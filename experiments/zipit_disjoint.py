"""Can ZipIt! make one network of two that know half of the classes each?

    python experiments/zipit_disjoint.py                          # the shipped pair, CIFAR-10 5+5
    python experiments/zipit_disjoint.py --dataset digits         # seconds, needs no data
    python experiments/zipit_disjoint.py --loss cross-entropy --retrain    # plain classifiers
    python experiments/zipit_disjoint.py --embeddings clip.npy --retrain   # a text encoder's
    python experiments/zipit_disjoint.py --retrain --preset paper          # on a GPU
    python experiments/zipit_disjoint.py --dataset cifar100 --retrain --preset paper

Two networks are trained from different seeds, each on one half of the classes. Every class has a
fixed embedding, and the loss is the cross-entropy of the scaled cosines of a network's outputs with
those of its own classes. The paper takes CLIP's embeddings of the class names; without --embeddings
orthonormal ones at random stand in. Merged are: the average of the weights; the average after the
second network's units are permuted, by weights or by activations; and ZipIt!, which merges features
that correlate within a network, too, up to a share beta of the merges, where a merged feature
counts alpha as much. All networks' BatchNorm statistics are measured anew (RESET).

The paper ("ZipIt!", ResNet20, 4 times as wide, joint accuracy in per cent, CIFAR-10 5+5): Git
Re-Basin 46.2, permutation 58.4, ZipIt! 79.1, ZipIt! 13/20 83.8, ensemble 87.4. Identity 43.0 and
k-means 29.1 are below permutation; optimal pairs (79.6, 11 minutes) are as good as greedy ones
(79.0, 1.1 s). In narrow networks ZipIt! is no better than permutation; the correlation falls.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from kit import cli, disjoint, figures, tables
from kit.experiment import Experiment, Run
from kit.records import Record, Row, networks
from papers import zipit_disjoint as paper

log = logging.getLogger("vfjax.experiments")
ALPHAS, BETAS = (0.01, 0.1, 0.3, 1.0), (0.0, 0.0375, 0.075, 0.125, 0.25, 0.5, 1.0)
IMAGES = (10, 30, 100, 300, 1_000)
# Optimal pairs know no budget of merges within a network: greedy ones are tried without one, too.
MATCHERS = ("identity", "permute", "kmeans", "greedy", "unbounded", "optimal")


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(disjoint.HalvesOptions):
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
    own = {"alpha": config.alpha, "beta": config.beta}
    grid = {(alpha, config.beta) for alpha in ALPHAS} | {(config.alpha, beta) for beta in BETAS}
    matchers = list(MATCHERS)
    if "optimal" in matchers and importlib.util.find_spec("networkx") is None:
        log.warning('optimal pairs are left out: they need networkx, pip install ".[matching]"')
        matchers.remove("optimal")
    cells = [("network A", None, {}), ("network B", None, {}), ("ensemble", 0, {})]
    cells += [("average", depth, {}), ("weights", depth, {})]
    for way, how in (("permutation", {}), ("zip", own | {"images": most})):
        cells += [(way, stop, how) for stop in disjoint.stops_of(depth)]
    for alpha, beta in sorted(grid - {(config.alpha, config.beta)}):
        cells.append(("zip", depth, {"alpha": alpha, "beta": beta, "images": most}))
    cells += [("zip", depth, own | {"images": count}) for count in IMAGES if count < most]
    cells += [(name, depth, {}) for name in matchers] + [("features", None, {})]
    for pair, (way, layers, how) in itertools.product(range(config.pairs), cells):
        named = {name: how.get(name) for name in ("alpha", "beta", "images")}
        yield {"pair": pair, "way": way, "layers": layers, **named}


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Accuracies of all that the networks are merged to."""
    depth, most = run.setup.edges.net.depth, len(run.setup.edges.images.statistics.images)
    own = {"alpha": config.alpha, "beta": config.beta}
    # What matchers find that other cells have, too.
    same = {"permute": ("permutation", depth), "greedy": ("zip", depth, *own.values(), most)}

    @functools.lru_cache(maxsize=1)
    def pair_of(place: int) -> disjoint.Pair:
        return disjoint.Pair(run.setup, place, run.watch)

    @functools.cache
    def found(place: int, way: str, layers: int | None, *how: float) -> Row:
        pair, named = pair_of(place), dict(zip((*own, "images"), how, strict=False))
        return pair.accuracy(pair.merged(way, layers or 0, named), way)

    for cell in run.cells(plan_of(config, depth, most)):
        place, way, pair = cell["pair"], cell["way"], pair_of(cell["pair"])
        if way == "features":
            yield from (cell | row for row in pair.features(own))
        elif way in MATCHERS:
            how = own | ({"beta": 1.0} if way == "unbounded" else {})
            how["matcher"] = "greedy" if way == "unbounded" else way
            seconds, maps = pair.timed(how)
            known = found(place, *same[way]) if way in same else None
            known = known or pair.accuracy(pair.mapped(maps, depth), way)
            yield cell | {"seconds": seconds} | known
        else:
            how = [cell[name] for name in (*own, "images") if cell[name] is not None]
            yield cell | found(place, way, cell["layers"], *how)


WAYS = {"average": "weight average", "weights": "permuted by weights"}
PARTS = {"permutation": "permuted", "zip": "ZipIt!"}
# Names and looks of the ways to match in the figure.
POINTS = {"permute": ("permuted", "activation"), "greedy": ("ZipIt!", "zipit"),
          "identity": ("identity", "direct"), "kmeans": ("k-means", 5), "optimal": ("optimal", 1),
          "unbounded": ("no budget", 0)}  # fmt: skip


def title_of(record: Record) -> str:
    classes, config = record["data"]["classes"], record["config"]
    parts = [networks(record), f"{classes // 2}+{classes - classes // 2} classes"]
    parts.append(f"statistics over {record['data']['statistics_images']:,} images")
    parts += ["plain classifiers"] if config["loss"] == "cross-entropy" else []
    return ", ".join(parts + ([f"mean of {config['pairs']} pairs"] if config["pairs"] > 1 else []))


def finding_of(record: Record) -> str:
    depth, middle = paper.depth_of(record), paper.middle_of(record)
    known = (paper.ZIP, paper.PERMUTED, paper.PART_ZIPPED, paper.ALONE, paper.ENSEMBLE)
    whole, permuted, part, alone, ensemble = (f"{100 * one.of(record):.1f}%" for one in known)
    text = f"ZipIt! of all {depth} layers has {whole} on all classes, permutation {permuted}, the "
    text += f"better network alone {alone}; ZipIt! of {middle} layers has {part}, the ensemble "
    return text + ensemble


def tables_of(record: Record) -> list[tables.Table]:
    rows, depth = paper.asked(record), paper.depth_of(record)
    lines: dict[str, dict[str, Any]] = {f"network {n}": {"way": f"network {n}"} for n in "AB"}
    lines |= {text: {"way": way} for way, text in WAYS.items()}
    for way, text in PARTS.items():
        stops = sorted(rows.distinct("layers", way=way), reverse=True)
        lines |= {f"{text} {at}/{depth}": {"way": way, "layers": at} for at in stops}
    lines["ensemble"] = {"way": "ensemble"}
    keys = {"joint": "accuracy", "task A": "task_a", "task B": "task_b", "mean of tasks": "average"}
    columns = [tables.Column(text, key=key, show=tables.percent) for text, key in keys.items()]
    columns += tables.ratios()
    ways = {name: {"way": way} for way, name in paper.MATCHERS.items() if rows.where(way=way)}
    found = [columns[0], tables.Column("seconds", key="seconds", show=tables.number())]
    return [
        tables.pivot(rows, lines, columns, title=record["title"], corner="test accuracy, %"),
        tables.pivot(rows, ways, found, title="how features are matched", corner="matching"),
    ]


def figure_of(record: Record) -> Any:
    """Accuracy against layers merged, alpha and beta, statistics images; correlation by layer."""
    rows, every, config = paper.asked(record), record.rows, record["config"]
    depth, y, limits = paper.depth_of(record), "joint test accuracy (%)", (0, 101)
    looks = {"ZipIt!": "zipit", "permuted": "activation"}

    def line(name: str, x: str, of: Any, key: str = "accuracy", **more: Any) -> figures.Line:
        return figures.line(of, x, key, name=name, **({"method": looks.get(name, 0)} | more))

    def level(name: str, value: float, method: str) -> figures.Line:
        return figures.Line(name, None, 100 * value, method=method, dashed=True)

    def by_layers(key: str) -> list[figures.Line]:
        found = [line(text, "layers", rows.where(way=(way, "ensemble")), key)
                 for way, text in list(PARTS.items())[::-1]]  # fmt: skip
        return [*found, level("weight average", rows.mean(key, way="average"), "direct")]

    alone = level("better network alone", paper.ALONE.of(record), "edges")
    permuted = level("permuted, all layers", paper.PERMUTED.of(record), "activation")
    zips = every.where(way="zip", layers=depth)
    swept = [
        line(f"{by}, at {other} {config[other]:g}", by, method=place + 3, of=zips.where(
            **{other: config[other], "images": record["data"]["statistics_images"]}))
        for place, (by, other) in enumerate((("beta", "alpha"), ("alpha", "beta")))
    ]  # fmt: skip
    few = line("ZipIt!", "images", zips.where(alpha=config["alpha"], beta=config["beta"]))
    points = [
        figures.Line(name, [rows.mean("seconds", way=way)], [100 * rows.mean(way=way)], method=how)
        for way, (name, how) in POINTS.items() if rows.where(way=way)
    ]  # fmt: skip
    features = {"ZipIt!": "correlation", "permuted": "permuted_correlation"}
    merged = [line(name, "depth", every, key, scale=1) for name, key in features.items()]
    merged.append(line("share within a network", "depth", every, "within", scale=1, method=2,
                       dashed=True))  # fmt: skip
    x, whole = f"layers merged l (of L = {depth}; 0: ensemble)", f"ZipIt! {depth}/{depth}"
    panels = [
        figures.Panel("all classes", x, y, [*by_layers("accuracy"), alone], y_limits=limits),
        figures.Panel("each half alone", x, "test accuracy, mean (%)", by_layers("average"),
                      y_limits=limits),
        figures.Panel(f"{whole} by alpha and beta", "beta or alpha", y, [*swept, permuted]),
        figures.Panel(f"{whole} by images", "statistics images", y, [few, permuted], log_x=True,
                      y_limits=limits),
        figures.Panel("ways to match", "seconds", y, points, log_x=True, y_limits=limits),
        figures.Panel("what is merged", "layer", "correlation of features, share", merged,
                      y_limits=(0, 1)),
    ]  # fmt: skip
    bars = f"standard deviation over {config['pairs']} pairs"
    return figures.of_record(record, panels, bars=bars, columns=3)


LEGEND = """ZipIt! l/L: the first l of L layers merged, and the two networks finish apart, a head
each; the ensemble is l = 0. Joint accuracy is over all classes: of one output, the class whose
embedding it is closest to; of two heads, and of plain classifiers, the class of the largest
probability, where each head's are among its own classes. Accuracy per task is among the classes of
the image's own half, by its own head where there are two. Ways to match take as long as they do
once the statistics are there. alpha and beta are those of the paper's code, fixed beforehand."""
EXPERIMENT = Experiment(
    name="zipit_disjoint", doc=__doc__, options=Config, prepare=disjoint.prepare, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=paper.CLAIMS,
    summary=lambda record: {"chosen": paper.chosen(record)}, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
