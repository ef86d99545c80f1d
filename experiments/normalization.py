"""Which remedy against vanishing features does best, at every weight of the second network?

    python experiments/normalization.py                      # VGG16, the shipped pair
    python experiments/normalization.py --seed 1             # weight matching in another order
    python experiments/normalization.py --model resnet20     # BatchNorm: RESET alone
    python experiments/normalization.py --dataset digits     # seconds, needs no data
    python experiments/normalization.py --retrain --preset paper    # full width, on a GPU

The units of the second network are matched to those of the first, by weights or by activations, and
the two are averaged with weights 1 - alpha and alpha: as it is, with REPAIR, with RESCALE, without
the biases of the last k layers, and with bias calibration. k is chosen for each matching at alpha
0.5 on held-out training images, the smallest of equals (the paper's code chooses on test images).

The paper ("Vanishing Feature", VGG16 on CIFAR-10): with weight matching REPAIR is the worst of the
four at the midpoint, with activation matching RESCALE the best; removing the last 5 or 6 biases is
enough. Its networks were trained with a weight decay of 1e-4, those here with 5e-4; it, too, finds
REPAIR reliable at large weight decay.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from kit import cli, edges, figures, records, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from papers.normalization import CLAIMS, MATCHES, REMEDIES, chosen, middle

from vfjax import align, diagnose, merge, renorm, stats, train


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(edges.EdgeOptions):
    samples: int = cli.sized("test images, the first N", "samples{}", 2_000, 10_000)
    statistics: int = cli.sized(
        "training images, the first N, not augmented, for activation matching and renormalisation",
        "statistics{}", 5_000, 48_000)
    held_out: int = cli.sized(
        "training images, those after the statistics images, that choose how many biases are "
        "removed; at most a fifth of a split that is too small for both",
        "heldout{}", 2_000, 2_000)
    runs: int = cli.sized(
        "runs of weight matching, with seeds from S on", "runs{}", 1, 5, "runs")
    seed: int = cli.option(
        0, "seed of the random order in which weight matching visits layers", type=cli.seed_of,
        metavar="S", part="seed{}")
# fmt: on


def seeds_of(config: Config) -> list[int]:
    return list(range(config.seed, config.seed + config.runs))


def measure(config: Config, run: Run) -> Iterator[Mapping[str, Any]]:
    """Accuracy at each k without biases, then against alpha with each remedy."""
    net, trees, images = run.setup.net, run.setup.trees, run.setup.images

    @functools.cache
    def moments() -> stats.Moments:
        # One pass serves activation matching and, carried along, the references of all matchings.
        with run.watch("statistics of edge models"):
            batches = run.watched(images.statistics, "statistics of edge models")
            sites = "taps" if net.norms else "paper"
            return stats.moments(net, trees, batches, sites=sites, covariance="cross")

    @functools.lru_cache(maxsize=1)
    def matched(match: str, seed: int | None) -> tuple[Sequence[Any], stats.Moments]:
        known = moments()
        with run.watch(f"{match} matching"):
            if seed is None:
                found = align.match_moments(net, known)
            else:
                found = align.match_weights(net, *trees, key=jax.random.key(seed))
            aligned = [trees[0], net.spec.permute(trees[1], found.permutations)]
        told = {"objective": list(map(float, found.objective)), "moved": found.moved}
        run.note("matching", match=match, seed=seed, converged=found.converged, **told)
        return aligned, known.carried([None, dict(found.permutations)])

    # Most networks with BatchNorm have no biases but those of their norms, which stay.
    removals = () if net.norms else (("held_out", "last"), ("test", "last"), ("test", "first"))
    kinds = [("bias_removal", *removal) for removal in removals]
    remedies = ["none", "reset"] if net.norms else ["none", *REMEDIES]
    kinds += [(remedy, "test", None) for remedy in remedies]
    plan = (
        {"match": match, "seed": seed, "remedy": remedy, "images": on, "side": side}
        for match, seed in (*(("weight", seed) for seed in seeds_of(config)), ("activation", None))
        for remedy, on, side in kinds
    )
    for cell in run.cells(plan):
        match, seed, remedy, on, side = cell.values()
        aligned, references = matched(match, seed)
        if side is not None:
            midpoint = merge.as_merged(net, merge.interpolate(aligned))
            with run.watch(f"{match} matching, biases removed"):
                for k in range(net.depth + 1):
                    without = renorm.remove_bias(net, midpoint, **{side: k})
                    found = train.evaluate(edges.forward, without, getattr(images, on))
                    yield cell | {"k": k, "accuracy": found.accuracy}
            continue
        k = chosen(run.rows, match, seed) if remedy == "bias_removal" else None
        how = {"none": None, "bias_removal": ("remove_bias", k)}.get(remedy, remedy)
        with run.watch(f"{match} matching, interpolation"):
            options = {"renormalise": how, "data": images.statistics, "references": references}
            curve = diagnose.interpolation(net, aligned, images.test, **options)
        yield from records.curve_rows(cell | {"removed": k}, curve)
        if remedy == "none":
            for name, value in zip(("model 1", "model 2"), curve.edge_accuracy, strict=True):
                yield {"network": name, "match": match, "seed": seed, "accuracy": float(value)}


def remedies_of(record: records.Record) -> list[str]:
    return record.rows.where(match="weight", side=None).distinct("remedy")


def title_of(record: records.Record) -> str:
    return records.title(record, count=record["config"]["runs"], of="runs of weight matching")


def finding_of(record: records.Record) -> str:
    parts = []
    for match, text in MATCHES.items():
        found = {remedy: 100 * middle(match, remedy).of(record) for remedy in remedies_of(record)}
        best = max(found, key=found.__getitem__)
        values = f"{found[best]:.0f}% at the midpoint, {found['none']:.0f}% as it is"
        parts.append(f"{label(best)} does best with {text} ({values})")
    return " and ".join(parts)


def tables_of(record: records.Record) -> list[tables.Table]:
    lines = {}
    for match, remedy in itertools.product(MATCHES, remedies_of(record)):
        where = {"match": match, "remedy": remedy, "side": None}
        removed = sorted(record.rows.distinct("removed", **where))
        k = f" (k = {', '.join(map(str, removed))})" if removed else ""
        lines[f"{match}: {label(remedy)}{k}"] = where
    columns = [
        tables.Column("midpoint, %", {"alpha": 0.5}),
        tables.Column("lowest, %", key="lowest"),
        tables.Column("barrier, points", key="barrier"),
        tables.Column("in the paper's code", key="reference_barrier"),
        tables.Column("barrier of loss, nats", key="loss_barrier", show=tables.number()),
    ]
    edge = [100 * record.rows.mean(network=name, match="weight") for name in ("model 1", "model 2")]
    caption = f"Edge models: {edge[0]:.2f} and {edge[1]:.2f}. Barriers are relative to them"
    about = {"title": record["title"], "corner": "matching: done", "caption": caption}
    return [tables.pivot(record.rows, lines, columns, **about)]


def figure_of(record: records.Record) -> Any:
    """Accuracy against alpha for both matchings, and against the number of biases removed."""
    rows, panels = record.rows, {}
    for match, text in MATCHES.items():
        x = "alpha, weight of the second network"
        panels[text, x] = [
            figures.line(rows, "alpha", name=label(remedy), dashed=remedy == "none", match=match,
                         method="matched" if remedy == "none" else remedy, remedy=remedy)
            for remedy in remedies_of(record)
        ]  # fmt: skip
    if rows.where(side="last"):
        x = f"layers without bias k (of L = {record['model']['depth']})"
        panels["biases removed at the midpoint", x] = [
            figures.line(rows, "k", name=f"{text} removal, {match}", method=match, match=match,
                         dashed=side == "first", side=side, images="test")
            for match in MATCHES for side, text in (("first", "forward"), ("last", "backward"))
        ]  # fmt: skip
    shown = [figures.Panel(title, x, figures.ACCURACY, lines, y_limits=(0, 102))
             for (title, x), lines in panels.items()]  # fmt: skip
    bars = f"standard deviation over {record['config']['runs']} runs of weight matching"
    return figures.of_record(record, shown, bars=bars)


PREPARE = edges.loaded(statistics="statistics", held_out="held_out", test="samples",
                       seeds=lambda config: {"weight_matching": seeds_of(config)})  # fmt: skip
EXPERIMENT = Experiment(
    name="normalization", doc=__doc__, options=Config, prepare=PREPARE, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    claims=CLAIMS)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
