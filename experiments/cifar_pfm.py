"""What does Preserve-First Merging of two networks give, and what must be done to the merged part?

    python experiments/cifar_pfm.py                              # the shipped pair, CIFAR-10
    python experiments/cifar_pfm.py --pairs 3                    # mean and spread over three pairs
    python experiments/cifar_pfm.py --model resnet20             # BatchNorm: RESET, as in table 7
    python experiments/cifar_pfm.py --match zipit                # ZipIt!, as in table 6
    python experiments/cifar_pfm.py --match cca --model vgg16-bn # CCA and RESET, as in table 4
    python experiments/cifar_pfm.py --dataset digits             # seconds, needs no data
    python experiments/cifar_pfm.py --retrain --preset paper     # full width, 160 epochs, on a GPU

Two networks that differ in their random seed are averaged from layer l+1 on; their first l layers
are kept apart and their l-th pre-activations averaged ("PFM l/L"). l = 0 is ordinary merging, l = L
the logit ensemble. A run that needs more models than `checkpoints/` has stops before it measures
anything and names the command of `train_edges.py` that trains the missing ones.

The paper ("Vanishing Feature", tables 1 and 7; full width, mean of 3 pairs, per cent): VGG16 models
of 91.9 and 91.7, ensemble 92.9. At l = 0 direct averaging is at chance, matching gives 46.5, with
RESCALE 84.7; at l = 8 RESCALE passes the edge models (92.4 at 1.2 times the parameters), at l = 12
it equals the ensemble. ResNet20 with RESET: 64.1 at l = 0, the ensemble at l = 19. CCA needs no
normalisation (81.9 at l = 0) and is ahead in VGG16-BN (91.2 against 89.9); ZipIt! is about equal.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from kit import claims, cli, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, networks
from papers.cifar_pfm import CLAIMS


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(pairs.MatchingOptions):
    match: str = cli.option(
        "activation", "how units of the second network are matched with those of the first: "
        "permuted, by the correlation of their activations or by their weights, or not at all; or "
        "by activations with ZipIt!, canonical correlation analysis or optimal transport, beside "
        "which the run shows activation matching", choices=tuple(pairs.MATCHES), part="{}")
    layers: tuple[int, ...] | None = cli.option(
        None, "numbers of leading layers that are kept apart, one row each (default: the paper's: "
        "0 3 6 8 12 of 14, 0 6 10 13 19 of 20; for other depths 0 and the nearest to those "
        "fractions of 14)", type=cli.whole, nargs="+", metavar="l", part="layers{}",
        usual=lambda record: pairs.default_layers(record["model"]["depth"]))
    alpha: float = cli.option(
        0.5, "weight of the second network in all averages, the ensemble's too; the first has "
        "1 - ALPHA", type=cli.number_of(0, 1), part="alpha{:g}")
    pairs: int = cli.option(
        1, "number of pairs of edge models; with more than one, cells hold mean and standard "
        "deviation over the pairs; three models make three pairs", type=cli.count_of("pairs"),
        part="{}pairs")
    samples: int | str = cli.option(
        10_000, "statistics images: the first N of the training split, not augmented, in batches "
        "of 500", type=cli.count_or_all, metavar="N|all", part="samples{}")
# fmt: on


def models_of(config: Config) -> int:
    return next(k for k in itertools.count(2) if k * (k - 1) // 2 >= config.pairs)


def columns(match: str, remedies: Sequence[str]) -> dict[str, dict[str, str]]:
    """Matchings and remedies by their names in tables: as in tables 1, 7 and 8 of the paper."""
    found = {"direct": ("none", "none")}
    found |= {"matched": (match, "none")} if match != "none" else {}
    found |= {label(remedy): (match, remedy) for remedy in remedies}
    if match in pairs.MIXING:
        beside = [remedy for remedy in remedies if remedy != "bias_calibration"]
        found |= {"AM": ("activation", "none")}
        found |= {f"AM + {label(remedy)}": ("activation", remedy) for remedy in beside}
    return {name: {"match": match, "remedy": remedy} for name, (match, remedy) in found.items()}


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Edge models, ensemble, and each pair merged from each l on, in each way."""
    methods = columns(config.match, pairs.remedies_of(run.setup.net)).values()
    every = itertools.combinations(range(models_of(config)), 2)
    chosen = sorted(every, key=lambda models: models[::-1])

    @functools.lru_cache(maxsize=1)
    def pair_of(k: int) -> pairs.Pair:
        matches, weights = [of["match"] for of in methods], (1 - config.alpha, config.alpha)
        return pairs.Pair(run, config, matches, weights, chosen[k])

    kept = [{"network": "PFM", "layers": layers} for layers in config.layers or ()]
    cells = pairs.plan([layers | method for layers in kept for method in methods])
    for cell in run.cells({"pair": k} | cell for k in range(config.pairs) for cell in cells):
        pair, layers = pair_of(cell["pair"]), cell["layers"]
        if layers is None:
            yield cell | pair.edge(cell["network"])
        else:
            stage = f"PFM {layers}/{pair.net.depth}"
            yield cell | pair.measured(stage, cell["remedy"], cell["match"], layers)


def columns_of(record: Record) -> dict[str, dict[str, str]]:
    """Those that a record has rows of."""
    remedies = [remedy for remedy in record.rows.distinct("remedy") if remedy != "none"]
    named = columns(record["config"]["match"], remedies)
    return {name: where for name, where in named.items() if record.rows.where(**where)}


def title_of(record: Record) -> str:
    config, images = record["config"], record["data"]["statistics_images"]
    parts = [networks(record), pairs.title_of(config["match"], config)]
    parts += [f"alpha {config['alpha']:g}"] if config["alpha"] != 0.5 else []
    parts.append(f"statistics over {images:,} image{'' if images == 1 else 's'}")
    several = f"mean ± standard deviation over {config['pairs']} pairs"
    return ", ".join([*parts, *([several] if config["pairs"] > 1 else [])])


def finding_of(record: Record) -> str:
    rows, first = record.rows, min(record.rows.distinct("layers"))
    means = {name: rows.mean(layers=first, **of) for name, of in columns_of(record).items()}
    ranked = sorted((n for n in means if means[n] == means[n]), key=means.__getitem__)
    shown = {name: f"{name}, {100 * means[name]:.1f}%" for name in ranked}
    *_, best = (name for name in ranked if not name.startswith("AM"))
    text = f"With l = {first} layers kept apart {best} leads, {100 * means[best]:.1f}%"
    text += f" (direct: {100 * means['direct']:.1f}%)" if best != "direct" else ""
    for other in [name for name in ranked if name.startswith("AM")][-1:]:
        gap = claims.beyond(means[best] - means[other], claims.free(record, means[other]))
        verb = {True: "is ahead of", None: "is level with", False: "is behind"}[gap]
        match = pairs.MATCHES[record["config"]["match"]]
        text = f"At l = {first} {match} with {shown[best]}, {verb} {shown[other]}"
    return f"{text}; it {pairs.reaches(record, best)}"


def tables_of(record: Record) -> list[tables.Table]:
    columns, parts = columns_of(record), {"": columns_of(record)}
    if "AM" in columns:
        # Permutations cost as little as nothing done.
        beside = {n: of for n, of in columns.items() if n == "direct" or n.startswith("AM")}
        own = {n: of for n, of in columns.items() if n not in beside}
        parts = {"": own, ": activation matching beside it": beside}
    return [
        pairs.table(record, part, tables.costs(list(part.values())[-1]), about=about)
        for about, part in parts.items()
    ]


def figure_of(record: Record) -> Any:
    """Accuracy against l, edge models and ensemble as levels; activation matching beside."""
    config, rows, row = record["config"], record.rows.where(network="PFM"), []
    every = columns_of(record)
    for match in dict.fromkeys([config["match"], *rows.distinct("match", match="activation")]):
        shown = {
            name.removeprefix("AM + ").replace("AM", "matched"): where
            for name, where in every.items()
            if where["match"] in ("none", match)
        }
        title = pairs.title_of(match, config)
        if match != "none" and not rows.values(match=match, remedy="none"):
            title += " (matched alone: no variances to evaluate with)"
        # What is all near the top would be one line.
        limits = (0, 101) if min(rows.values()) < 0.5 else None
        x = f"layers kept apart l (of L = {record['model']['depth']})"
        row.append(pairs.panel(record, title, x, shown, y_limits=limits, ticks=config["layers"]))
    bars = f"standard deviation over {config['pairs']} pairs"
    return figures.of_record(record, row, bars=bars)


LEGEND = """PFM l/L: the first l of L layers kept apart, the others merged (l = 0: all of them).
matched: units of the second network brought together with those of the first; AM is activation
matching, which permutes them, in the same run; CCA combines units linearly. REPAIR, RESCALE, RESET
and bias calibration come on top. The variances that a BatchNorm stores are unknown for units that
are mixed, so that without RESET there is nothing to evaluate: a dash, where the paper has chance.
Parameters and FLOPs include the map of a matching."""
EXPERIMENT = Experiment(
    name="cifar_pfm", doc=__doc__, options=Config,
    prepare=pairs.prepare(pairs.default_layers, count=models_of, statistics="samples"),
    measure=measure, title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    summary=lambda record: pairs.summary(record, columns_of(record)), claims=CLAIMS,
    legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
