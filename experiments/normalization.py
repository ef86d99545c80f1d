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
four at the midpoint and the other three are about equal; with activation matching (table 1: none
46.5, REPAIR 39.1, RESCALE 84.7, bias calibration 82.9) RESCALE is best, REPAIR below none. Removing
biases of the first layers hurts; removing the last 5 or 6 is enough. Its networks were trained with
a weight decay of 1e-4, those here with 5e-4; it, too, finds REPAIR reliable at large weight decay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from kit import cli, edges, figures, records, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from papers.normalization import CLAIMS, MATCHES, REMEDIES, chosen, middle, removed

from vfjax import align, diagnose, merge, renorm, stats, train

ALPHAS = 11
SIDES = {"first": "forward", "last": "backward"}


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
        told = {"objective": [float(value) for value in found.objective]}
        told |= {"converged": found.converged, "moved": found.moved}
        run.note("matching", match=match, seed=seed, **told)
        return aligned, known.carried([None, dict(found.permutations)])

    # Most networks with BatchNorm have no biases but those of their norms, which stay.
    removals = () if net.norms else (("held_out", "last"), ("test", "last"), ("test", "first"))
    remedies = ("none", "reset") if net.norms else ("none", *REMEDIES)
    keys = ("match", "seed", "remedy", "images", "side")
    plan = [
        dict(zip(keys, (match, seed, *cell), strict=True))
        for match, seed in (*(("weight", s) for s in seeds_of(config)), ("activation", None))
        for cell in (*(("bias_removal", *one) for one in removals),
                     *((remedy, "test", None) for remedy in remedies))
    ]  # fmt: skip
    for cell in run.cells(plan):
        match, seed, remedy = (cell[key] for key in keys[:3])
        aligned, references = matched(match, seed)
        if cell["side"] is not None:
            midpoint = merge.as_merged(net, merge.interpolate(aligned))
            with run.watch(f"{match} matching, biases removed"):
                for k in range(net.depth + 1):
                    without = renorm.remove_bias(net, midpoint, **{cell["side"]: k})
                    batches = getattr(images, cell["images"])
                    found = train.evaluate(edges.forward, without, batches)
                    yield cell | {"k": k, "accuracy": found.accuracy}
            continue
        k = chosen(run.rows, match, seed) if remedy == "bias_removal" else None
        plain = {"none": None, "bias_removal": ("remove_bias", k)}
        options = {"renormalise": plain.get(remedy, remedy), "references": references}
        options |= {"data": images.statistics, "alphas": ALPHAS}
        with run.watch(f"{match} matching, interpolation"):
            curve = diagnose.interpolation(net, aligned, images.test, **options)
        yield from records.curve_rows(cell | {"removed": k}, curve)
        if remedy == "none":
            for name, value in zip(("model 1", "model 2"), curve.edge_accuracy, strict=True):
                yield {"network": name, "match": match, "seed": seed, "accuracy": float(value)}


def remedies_of(record: records.Record) -> list[str]:
    return record.rows.where(match="weight", side=None).distinct("remedy")


def title_of(record: records.Record) -> str:
    runs, images = record["config"]["runs"], record["data"]["test_images"]
    mean = f", mean of {runs} runs of weight matching" if runs > 1 else ""
    return f"{records.networks(record)}, {images:,} test images{mean}"


def finding_of(record: records.Record) -> str:
    parts = []
    for match, text in MATCHES.items():
        found = {remedy: middle(match, remedy).of(record) for remedy in remedies_of(record)}
        best = max(found, key=lambda remedy: found[remedy])
        values = f"{100 * found[best]:.0f}% at the midpoint, {100 * found['none']:.0f}% as it is"
        parts.append(f"with {text} {label(best)} does best: {values}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


def tables_of(record: records.Record) -> list[tables.Table]:
    lines = {}
    for match in MATCHES:
        for remedy in remedies_of(record):
            text = f"{match}: {label(remedy)}"
            if remedy == "bias_removal":
                text += f" (k = {', '.join(map(str, removed(record, match)))})"
            lines[text] = {"match": match, "remedy": remedy, "side": None}
    columns = [
        tables.Column("midpoint, %", {"alpha": 0.5}),
        tables.Column("lowest, %", key="lowest"),
        tables.Column("barrier, points", key="barrier"),
        tables.Column("in the paper's code", key="reference_barrier"),
        tables.Column("barrier of loss, nats", key="loss_barrier", show=tables.number()),
    ]
    edge = [100 * record.rows.mean(network=name, match="weight") for name in ("model 1", "model 2")]
    caption = f"Edge models: {edge[0]:.2f} and {edge[1]:.2f}. Barriers are relative to them"
    title = record["title"]
    return [tables.pivot(record.rows, lines, columns, title=title, corner="matching: done",
                         caption=caption)]  # fmt: skip


def figure_of(record: records.Record) -> Any:
    """Accuracy against alpha for both matchings, and against the number of biases removed."""
    y, limits, row = "test accuracy (%)", (0, 102), []
    for match, text in MATCHES.items():
        rows = record.rows.where(match=match, side=None)
        lines = []
        for remedy in remedies_of(record):
            plain = remedy == "none"
            style = {"name": label(remedy), "method": "matched" if plain else remedy}
            lines.append(figures.line(rows, "alpha", remedy=remedy, dashed=plain, **style))
        x = "alpha, weight of the second network"
        row.append(figures.Panel(text, x, y, lines, y_limits=limits))
    if record.rows.where(side="last"):
        rows = record.rows.where(images="test")
        lines = [
            figures.line(rows, "k", name=f"{text} removal, {match}", method=match, match=match,
                         dashed=side == "first", side=side)
            for match in MATCHES for side, text in SIDES.items()
        ]  # fmt: skip
        x = f"layers without bias k (of L = {record['model']['depth']})"
        title = "biases removed at the midpoint"
        row.append(figures.Panel(title, x, y, lines, y_limits=limits))
    bars = f"standard deviation over {record['config']['runs']} runs of weight matching"
    return figures.of_record(record, row, bars=bars)


PREPARE = edges.loaded(statistics="statistics", held_out="held_out", test="samples",
                       seeds=lambda config: {"weight_matching": seeds_of(config)})  # fmt: skip
EXPERIMENT = Experiment(
    name="normalization", doc=__doc__, options=Config, prepare=PREPARE, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    claims=CLAIMS)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
