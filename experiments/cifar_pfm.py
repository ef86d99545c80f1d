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
from collections.abc import Iterator
from typing import Any

from kit import claims, cli, figures, pairs, tables
from kit.edges import loaded
from kit.experiment import Experiment, Run
from kit.records import Record, Row, joined, networks
from papers.cifar_pfm import CLAIMS

import vfjax


def _match_part(record: Record) -> str | None:
    config = record["config"]
    return None if config["match"] == "activation" else pairs.name_of(config["match"], config)


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(pairs.MatchingOptions):
    match: str = cli.option(
        "activation", "how units of the second network are matched with those of the first: "
        "permuted, by the correlation of their activations or by their weights, or not at all; or "
        "by activations with ZipIt!, canonical correlation analysis or optimal transport, beside "
        "which the run shows activation matching", choices=tuple(pairs.MATCHES), part=_match_part)
    layers: tuple[int, ...] | None = cli.option(
        None, "numbers of leading layers that are kept apart, one row each (default: the paper's: "
        "0 3 6 8 12 of 14, 0 6 10 13 19 of 20; for other depths 0 and the nearest to those "
        "fractions of 14)", type=int, nargs="+", metavar="l", part="layers{}",
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


def settled(config: Config, net: vfjax.Network, name: str) -> Config:
    layers = pairs.default_layers(net.depth) if config.layers is None else config.layers
    for number in layers:
        if not 0 <= number <= net.depth:
            raise cli.UserError(f"--layers must be from 0 to L = {net.depth}, got {number}.")
    return dataclasses.replace(config, layers=tuple(sorted(set(layers))))


def models_of(config: Config) -> int:
    return next(k for k in itertools.count(2) if k * (k - 1) // 2 >= config.pairs)


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Edge models, ensemble, and each pair merged from each l on, in each way."""
    models, net = run.setup, run.setup.net
    methods = pairs.methods_of(net, config.match)
    by_second = sorted(itertools.combinations(range(models_of(config)), 2), key=lambda p: p[::-1])
    chosen = by_second[: config.pairs]

    @functools.lru_cache(maxsize=1)
    def pair_of(k: int) -> pairs.Pair:
        trees, weights = [models.trees[i] for i in chosen[k]], (1 - config.alpha, config.alpha)
        batches = models.images.statistics, models.images.test
        with run.watch("statistics of edge models"):
            return pairs.Pair(net, trees, weights, *batches, [match for match, _ in methods])

    @functools.lru_cache(maxsize=len(methods))
    def matching_of(k: int, match: str) -> pairs.Matching:
        with run.watch("matching"):
            found = pair_of(k).matching(match, dataclasses.asdict(config))
        run.note("matching", pair=k, models=list(chosen[k]), **found.record)
        return found

    @functools.lru_cache(maxsize=1)
    def cut_of(k: int, match: str, layers: int) -> pairs.Cut:
        return pairs.Cut(pair_of(k), matching_of(k, match), layers)

    keys = ("pair", "network", "layers", "match", "remedy")
    cells = [(name, None, None, None) for name in ("model 1", "model 2", "ensemble")]
    # What crosses a cut serves all remedies of a matching: its cells follow each other.
    ordered = sorted(methods, key=lambda method: [m for m, _ in methods].index(method[0]))
    cells += [("PFM", layers, *method) for layers in config.layers or () for method in ordered]
    plan = [dict(zip(keys, (k, *c), strict=True)) for k in range(config.pairs) for c in cells]
    for cell in run.cells(plan):
        k, name, layers, match, remedy = (cell[key] for key in keys)
        pair, stage = pair_of(k), f"PFM {layers}/{net.depth}"
        with run.watch(stage if name == "PFM" else "edge models and ensemble"):
            if name == "PFM":
                cut = cut_of(k, match, layers)
                yield cell | cut.measured(remedy, stage) | cut.cost()
                continue
            cost = pairs.cost_of(net, net.params, net.flops)
            if name == "ensemble":
                cost = cut_of(k, config.match, net.depth).cost()
            yield cell | pair.edge(name) | cost


def columns_of(record: Record) -> dict[str, dict[str, str]]:
    """By its name in tables, what the rows of a column have."""
    own, found = record["config"]["match"], record.rows.where(network="PFM")
    names = pairs.columns_of(own, [(row["match"], row["remedy"]) for row in found])
    return {name: {"match": match, "remedy": remedy} for name, (match, remedy) in names.items()}


def summary_of(record: Record) -> dict[str, Any]:
    rows, reached = record.rows, {}
    edge = (rows.mean(network="model 1") + rows.mean(network="model 2")) / 2
    for name, where in columns_of(record).items():
        ats, means, _ = rows.curve("layers", network="PFM", **where)
        if any(mean == mean for mean in means):
            found = (at for at, mean in zip(ats, means, strict=True) if mean >= edge)
            reached[name] = next(found, None)
    ensemble = rows.mean(network="ensemble")
    return {"edge_mean": edge, "ensemble": ensemble, "reaches_edges_at": reached}


def title_of(record: Record) -> str:
    config, images = record["config"], record["data"]["statistics_images"]
    parts = [networks(record), pairs.title_of(config["match"], config)]
    parts += [f"alpha {config['alpha']:g}"] if config["alpha"] != 0.5 else []
    parts.append(f"statistics over {images:,} image{'' if images == 1 else 's'}")
    several = f"mean ± standard deviation over {config['pairs']} pairs"
    return ", ".join([*parts, *([several] if config["pairs"] > 1 else [])])


def finding_of(record: Record) -> str:
    rows, summary, match = record.rows, record["summary"], record["config"]["match"]
    first = min(rows.where(network="PFM").distinct("layers"))
    means = {name: rows.mean(layers=first, **of) for name, of in columns_of(record).items()}
    means = {name: mean for name, mean in means.items() if mean == mean}
    beside = [name for name in means if name.startswith("AM")]
    best = max((name for name in means if name not in beside), key=means.__getitem__)
    shown = {name: f"{100 * mean:.1f}%" for name, mean in means.items()}
    if beside:
        other, method = max(beside, key=means.__getitem__), pairs.MATCHES[match]
        gap = claims.beyond(means[best] - means[other], claims.free(record, means[other]))
        verb = {True: "is ahead of", None: "is level with", False: "is behind"}[gap]
        name = {"direct": best, "matched": method}.get(best, f"{method} + {best}")
        text = f"At l = {first} {name}, {shown[best]}, {verb} {other}, {shown[other]}"
    else:
        text = f"With l = {first} layers kept apart {best} leads, {shown[best]}"
        text += f" (direct: {shown['direct']})" if best != "direct" else ""
    at, edge = summary["reaches_edges_at"].get(best), f"{100 * summary['edge_mean']:.1f}%"
    where = f"from l = {at} on" if at is not None else "at none of these l"
    return f"{text}; it reaches the edge models' {edge} {where}"


def tables_of(record: Record) -> list[tables.Table]:
    rows, edge, columns = record.rows, record["summary"]["edge_mean"], columns_of(record)
    depth, layers = record["model"]["depth"], sorted(rows.distinct("layers"))
    lines = {name: {"network": name} for name in ("model 1", "model 2", "ensemble")}
    lines |= {f"PFM {at}/{depth}": {"layers": at} for at in layers}
    reached, places = [], record["summary"]["reaches_edges_at"]
    for at in sorted(set(places.values()), key=lambda at: (at is None, at or 0)):
        where = f"at l = {at}" if at is not None else "at none of these l"
        reached.append(f"{where} by {joined(name for name in places if places[name] == at)}")
    caption = f"*: at or above the mean of the edge models, {100 * edge:.2f}, first reached "
    caption += "; ".join(reached)
    # Permutations cost as little as nothing done.
    beside = [name for name in columns if name == "direct" or name.startswith("AM")]
    groups, found = [[name for name in columns if name not in beside], beside], []
    for names in groups if "AM" in columns else [list(columns)]:
        shown = [tables.Column(name, columns[name]) for name in names]
        shown += tables.costs(columns[names[-1]])
        title = record["title"] + (": activation matching beside it" if "AM" in names else "")
        found.append(tables.marked(rows, lines, shown, edge, title=title, caption=caption))
    return found


def figure_of(record: Record) -> Any:
    """Accuracy against l, edge models and ensemble as levels; activation matching beside."""
    config, rows = record["config"], record.rows.where(network="PFM")
    summary, depth, row = record["summary"], record["model"]["depth"], []
    levels = {"edge models' mean": summary["edge_mean"], "ensemble": summary["ensemble"]}
    for match in dict.fromkeys([config["match"], *rows.distinct("match", match="activation")]):
        of_panel = [(one["match"], one["remedy"]) for one in rows.where(match=("none", match))]
        lines = [
            figures.line(rows, "layers", name=name, method=method, match=m, remedy=remedy)
            for name, (m, remedy) in pairs.columns_of(match, of_panel).items()
            for method in [remedy if remedy != "none" else name]
            if rows.values(match=m, remedy=remedy)
        ]
        title = pairs.title_of(match, config)
        if match != "none" and not rows.values(match=match, remedy="none"):
            title += " (matched alone: no variances to evaluate with)"
        x, ticks = f"layers kept apart l (of L = {depth})", sorted(rows.distinct("layers"))
        lines += figures.levels(levels)
        # What is all near the top would be one line.
        limits = (0, 101) if min(rows.values()) < 0.5 else None
        row.append(figures.Panel(title, x, figures.ACCURACY, lines, y_limits=limits, ticks=ticks))
    bars = f"standard deviation over {config['pairs']} pairs"
    return figures.of_record(record, row, bars=bars)


PREPARE = loaded(count=models_of, statistics="samples", settled=settled,
                 checked=lambda config: pairs.check(config, [config.match]),
                 seeds=lambda config: {"matching": 0})  # fmt: skip
LEGEND = """PFM l/L: the first l of L layers kept apart, the others merged (l = 0: all of them).
matched: units of the second network brought together with those of the first; AM is activation
matching, which permutes them, in the same run; CCA combines units linearly. REPAIR, RESCALE, RESET
and bias calibration come on top. The variances that a BatchNorm stores are unknown for units that
are mixed, so that without RESET there is nothing to evaluate: a dash, where the paper has chance.
Parameters and FLOPs include the map of a matching."""
EXPERIMENT = Experiment(
    name="cifar_pfm", doc=__doc__, options=Config, prepare=PREPARE, measure=measure, title=title_of,
    finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS, summary=summary_of,
    legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
