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
from collections.abc import Iterator, Mapping
from typing import Any

from kit import claims, cli, figures, pairs, records, tables
from kit.claims import Above, Claim, Decision, Leads, Level, accuracy
from kit.edges import loaded
from kit.experiment import Experiment, Run
from kit.figures import label

import vfjax

SAMPLES = 10_000
COSTS = (("params, M", "params", 1e6), ("ratio", "params_ratio", 1))
COSTS += (("FLOPs, G", "flops", 1e9), ("ratio", "flops_ratio", 1))
# What claims are decided by: "equal", "a little" and "much".
EQUAL, LITTLE, MUCH = 0.02, 0.05, 0.1


def _match_part(record: Mapping[str, Any]) -> str | None:
    config = record["config"]
    return None if config["match"] == "activation" else pairs.name_of(config["match"], config)


def _layers_part(record: Mapping[str, Any]) -> str | None:
    layers = list(record["config"]["layers"])
    usual = layers == pairs.default_layers(record["model"]["depth"])
    return None if usual else "layers" + "+".join(map(str, layers))


@dataclasses.dataclass(frozen=True)
class Config(pairs.MatchingOptions):
    """The options."""

    match: str = cli.option(
        "activation",
        "how units of the second network are matched with those of the first: permuted, by the "
        "correlation of their activations or by their weights, or not at all; or by activations "
        "with ZipIt!, canonical correlation analysis or optimal transport, beside which the run "
        "shows activation matching",
        choices=tuple(pairs.MATCHES),
        part=_match_part,
    )
    layers: tuple[int, ...] | None = cli.option(
        None,
        "numbers of leading layers that are kept apart, one row each (default: the paper's: 0 3 6 "
        "8 12 of 14, 0 6 10 13 19 of 20; for other depths 0 and the nearest to those fractions)",
        type=int,
        nargs="+",
        metavar="l",
        part=_layers_part,
    )
    alpha: float = cli.option(
        0.5,
        "weight of the second network in all averages, the ensemble's too; the first has 1 - ALPHA",
        type=cli.number_of(0, 1),
        part="alpha{:g}",
    )
    pairs: int = cli.option(
        1,
        "number of pairs of edge models; with more than one, cells hold mean and standard "
        "deviation over the pairs; three models make three pairs",
        type=cli.count_of("pairs"),
        part="{}pairs",
    )
    samples: int | str = cli.option(
        SAMPLES,
        "statistics images: the first N of the training split, not augmented, in batches of 500",
        type=cli.count_or_all,
        metavar="N|all",
        part="samples{}",
    )


# ------------------------------------------------------------------------------------- measuring


def settled(config: Config, net: vfjax.Network, name: str) -> Config:
    """The options with the layers of the network."""
    layers = pairs.default_layers(net.depth) if config.layers is None else config.layers
    wrong = [number for number in layers if not 0 <= number <= net.depth]
    if wrong:
        raise cli.UserError(f"--layers must be from 0 to L = {net.depth}, got {wrong[0]}.")
    return dataclasses.replace(config, layers=tuple(sorted(set(layers))))


def models_of(config: Config) -> int:
    """How many models make enough pairs: three make three."""
    return next(k for k in itertools.count(2) if k * (k - 1) // 2 >= config.pairs)


def methods_of(net: vfjax.Network, match: str) -> list[tuple[str, str]]:
    """Matchings and remedies: the columns of the paper's table 1, or 7 and 8 with BatchNorm."""
    remedies = pairs.remedies_of(net)
    found = [("none", "none"), *([(match, "none")] if match != "none" else [])]
    found += [(match, remedy) for remedy in remedies]
    if match in pairs.MIXING:
        beside = [remedy for remedy in remedies if remedy != "bias_calibration"]
        found += [("activation", remedy) for remedy in ("none", *beside)]
    return found


def measure(config: Config, run: Run) -> Iterator[Mapping[str, Any]]:
    """Edge models, ensemble, and each pair merged from each l on, in each way."""
    models = run.setup
    net, methods = models.net, methods_of(models.net, config.match)
    by_second = sorted(itertools.combinations(range(models_of(config)), 2), key=lambda p: p[::-1])
    chosen = by_second[: config.pairs]

    @functools.lru_cache(maxsize=1)
    def pair_of(k: int) -> pairs.Pair:
        with run.watch("statistics of edge models"):
            trees = [models.trees[index] for index in chosen[k]]
            weights = (1 - config.alpha, config.alpha)
            images = models.images
            wanted = [match for match, _ in methods]
            return pairs.Pair(net, trees, weights, images.statistics, images.test, wanted)

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
    networks = [(name, None, None, None) for name in ("model 1", "model 2", "ensemble")]
    # What crosses a cut serves all remedies of a matching.
    ordered = sorted(methods, key=lambda method: [m for m, _ in methods].index(method[0]))
    networks += [("PFM", layers, *method) for layers in config.layers or () for method in ordered]
    plan = [
        dict(zip(keys, (k, *cell), strict=True)) for k in range(config.pairs) for cell in networks
    ]
    for cell in run.cells(plan, lambda cell: f"{named(cell, net.depth)} {cell['remedy'] or ''}"):
        pair, layers = pair_of(cell["pair"]), cell["layers"]
        if layers is None:
            with run.watch("edge models and ensemble"):
                cost = (net.parameters, net.flops)
                if cell["network"] == "ensemble":
                    both = cut_of(cell["pair"], config.match, net.depth).merged
                    cost = (both.params, both.flops)
                found = pair.edge(cell["network"])
                yield cell | found | pairs.cost_of(net, *cost)
            continue
        with run.watch(f"PFM {layers}/{net.depth}"):
            cut = cut_of(cell["pair"], cell["match"], layers)
            remedy = None if cell["remedy"] == "none" else cell["remedy"]
            yield cell | cut.measured(remedy, named(cell, net.depth)) | cut.cost()


# ------------------------------------------------------------------------------- what came of it


def named(row: Mapping[str, Any], depth: int) -> str:
    """The network of a row, as in tables."""
    return row["network"] if row["layers"] is None else f"PFM {row['layers']}/{depth}"


def column_of(match: str, remedy: str, own: str) -> str:
    """A matching and a remedy, as in tables; `own` is the matching of the run."""
    if (match, remedy) == ("none", "none"):
        return "direct"
    found = "matched" if remedy == "none" else label(remedy)
    if match == own:
        return found
    return "AM" if remedy == "none" else f"AM + {found}"


def columns_of(record: records.Record) -> dict[str, dict[str, str]]:
    """By its name in tables, what the rows of a column have."""
    own, merged = record["config"]["match"], record.rows.where(network="PFM")
    found = [(row["match"], row["remedy"]) for row in merged]
    order = [("none", "none")] + [method for method in found if method[0] == own] + found
    return {
        column_of(m, r, own): {"match": m, "remedy": r}
        for m, r in dict.fromkeys(order)
        if (m, r) in found
    }


def summary_of(record: records.Record) -> dict[str, Any]:
    """Where merged models reach the edge models' mean, by column that was measured."""
    rows = record.rows
    edge = (rows.mean(network="model 1") + rows.mean(network="model 2")) / 2
    reached = {}
    for name, where in columns_of(record).items():
        layers, means, _ = rows.curve("layers", network="PFM", **where)
        if not all(mean != mean for mean in means):
            found = zip(layers, means, strict=True)
            reached[name] = next((at for at, mean in found if mean >= edge), None)
    ensemble = rows.mean(network="ensemble")
    return {"edge_mean": edge, "ensemble": ensemble, "reaches_edges_at": reached}


def title_of(record: records.Record) -> str:
    """Data, models, matching, statistics."""
    config = record["config"]
    parts = [records.networks(record), pairs.title_of(config["match"], config)]
    parts += [f"alpha {config['alpha']:g}"] if config["alpha"] != 0.5 else []
    images = record["data"]["statistics_images"]
    parts.append(f"statistics over {images:,} image{'' if images == 1 else 's'}")
    if config["pairs"] > 1:
        parts.append(f"mean ± standard deviation over {config['pairs']} pairs")
    return ", ".join(parts)


def reached_text(record: records.Record) -> str:
    """Where the edge models' mean is first reached, in words."""
    places: dict[int | None, list[str]] = {}
    for column, layers in record["summary"]["reaches_edges_at"].items():
        places.setdefault(layers, []).append(column)
    ordered = sorted(places.items(), key=lambda item: (item[0] is None, item[0] or 0))
    return "; ".join(
        (f"at l = {at}" if at is not None else "at none of these l")
        + f" by {records.joined(names)}"
        for at, names in ordered
    )


def finding_of(record: records.Record) -> str:
    """What leads at the first l, and where edge models are reached."""
    rows, columns = record.rows.where(network="PFM"), columns_of(record)
    first, summary = min(rows.distinct("layers")), record["summary"]
    means = {name: rows.mean(layers=first, **where) for name, where in columns.items()}
    means = {name: mean for name, mean in means.items() if mean == mean}
    own = {name: mean for name, mean in means.items() if not name.startswith("AM")}
    best = max(own, key=lambda name: own[name])
    text = f"With l = {first} layers kept apart {best} leads, {100 * own[best]:.1f}%"
    beside = {name: mean for name, mean in means.items() if name.startswith("AM")}
    if beside:
        other = max(beside, key=lambda name: beside[name])
        text += f" ({other}: {100 * beside[other]:.1f}%)"
    elif best != "direct":
        text += f" (direct: {100 * means['direct']:.1f}%)"
    found = [at for at in summary["reaches_edges_at"].values() if at is not None]
    edge = f"the edge models' {100 * summary['edge_mean']:.1f}%"
    return f"{text}; {edge} " + (
        f"are reached from l = {min(found)} on" if found else "are not reached"
    )


def tables_of(record: records.Record) -> list[tables.Table]:
    """Accuracies by l and column with costs; what has a cost of its own has a table of its own."""
    rows, depth, own = record.rows, record["model"]["depth"], record["config"]["match"]
    edge = record["summary"]["edge_mean"]
    lines = {name: {"network": name} for name in ("model 1", "model 2", "ensemble")}
    layers = sorted(rows.distinct("layers"))
    lines |= {f"PFM {at}/{depth}": {"layers": at} for at in layers}
    columns = columns_of(record)
    # Permutations cost as little as nothing done.
    beside = [name for name in columns if name == "direct" or name.startswith("AM")]
    groups = [list(columns)]
    if own in pairs.MIXING:
        groups = [[name for name in columns if name not in beside], beside]
    found = []
    for names in groups:
        shown = [tables.Column(name, columns[name]) for name in names]
        shown += [
            tables.Column(text, columns[names[-1]], key, tables.number(scale=scale))
            for text, key, scale in COSTS
        ]
        found.append(
            tables.pivot(
                rows,
                lines,
                shown,
                title=record["title"]
                + (": activation matching beside it" if "AM" in names else ""),
                corner="test accuracy, %",
                mark=lambda name, mean: name.startswith("PFM") and mean >= edge,
                caption=f"*: at or above the mean of the edge models, {100 * edge:.2f}, first "
                f"reached {reached_text(record)}",
            )
        )
    return found


def figure_of(record: records.Record) -> Any:
    """Accuracy against l, edge models and ensemble as levels; activation matching beside."""
    config, rows = record["config"], record.rows.where(network="PFM")
    own, depth, summary = config["match"], record["model"]["depth"], record["summary"]
    levels = {"edge models' mean": summary["edge_mean"], "ensemble": summary["ensemble"]}
    row = []
    for match in dict.fromkeys([own, *rows.distinct("match", match="activation")]):
        lines = [
            figures.line(rows, "layers", name=name, method=name, match=m, remedy=r)
            for name, m, r in (
                ("direct", "none", "none"),
                *(("matched", match, "none") for _ in "_" * (match != "none")),
                *((r, match, r) for r in rows.distinct("remedy") if r != "none"),
            )
            if rows.values(match=m, remedy=r)
        ]
        lines = [dataclasses.replace(one, name=label(one.name)) for one in lines]
        title = pairs.title_of(match, config)
        if match != "none" and not rows.values(match=match, remedy="none"):
            title += " (matched alone: no variances to evaluate with)"
        row.append(
            figures.Panel(
                title,
                f"layers kept apart l (of L = {depth})",
                "test accuracy (%)",
                [*lines, *figures.levels(levels)],
                y_limits=(0, 101),
                ticks=sorted(rows.distinct("layers")),
            )
        )
    return figures.draw(
        row,
        finding=record["finding"],
        subtitle=record["title"],
        bars=f"standard deviation over {config['pairs']} pairs",
    )


# ---------------------------------------------------------------------------------------- claims


def own(record: records.Record) -> str:
    """The matching of the run."""
    return record["config"]["match"]


def remedy(record: records.Record) -> str:
    """The remedy that the paper tells of."""
    return "reset" if record.rows.values(remedy="reset") else "rescale"


def at_start(text: str, match: Any, of: str) -> claims.Quantity:
    """Accuracy at l = 0."""
    return accuracy(text, network="PFM", layers=0, match=match, remedy=of)


DIRECT, MATCHED = at_start("direct", "none", "none"), at_start("matched", own, "none")
REPAIR, RESCALE = at_start("REPAIR", own, "repair"), at_start("RESCALE", own, "rescale")
RESET, BIAS = at_start("RESET", own, "reset"), at_start("bias cal.", own, "bias_calibration")
AM, AM_REPAIR = (
    at_start("AM", "activation", "none"),
    at_start("AM + REPAIR", "activation", "repair"),
)
AM_RESCALE = at_start("AM + RESCALE", "activation", "rescale")
AM_RESET = at_start("AM + RESET", "activation", "reset")


def by_layers(record: records.Record) -> dict[int, tuple[float, float]]:
    """By l, accuracy with the remedy, and that of activation matching with it."""
    rows = record.rows.where(network="PFM", remedy=remedy(record))
    return {
        at: (rows.mean(layers=at, match=own(record)), rows.mean(layers=at, match="activation"))
        for at in sorted(rows.distinct("layers"))
    }


def beside(record: records.Record, sign: int) -> Decision:
    """Whether it is ahead of activation matching (sign 1), behind it (-1) or level (0) at all l."""
    found = by_layers(record)
    name = f"{pairs.MATCHES[own(record)]} {{}} against AM {{}}"
    texts = [" ".join(f"{100 * pair[k]:.1f}" for pair in found.values()) for k in (0, 1)]
    here = f"{name.format(*texts)} at l = {' '.join(map(str, found))}"
    if not sign:
        return Decision(claims.all_of(claims.level(record, p, EQUAL) for p in found.values()), here)
    signs = [claims.compared(record, *p) for p in found.values()]
    ahead = [None if holds is None else holds == (sign > 0) for holds in signs]
    # By more than noise at the first l, and never the other way round.
    return Decision(claims.all_of([ahead[0], *(False for holds in ahead if holds is False)]), here)


def reaches(record: records.Record, limit: int | None) -> Decision | None:
    """Whether the edge models' mean is reached by l = `limit` of 14; None for: at no l."""
    edge, depth = record["summary"]["edge_mean"], record["model"]["depth"]
    found = {at: value for at, (value, _) in by_layers(record).items()}
    at = next((layers for layers, value in found.items() if value >= edge), None)
    where = "at none of these l" if at is None else f"first at l = {at}"
    soon = [v - edge for k, v in found.items() if limit is None or 14 * k <= limit * depth]
    if not soon:
        return None
    free, gap = claims.noise(edge, record["data"]["test_images"]), max(soon)
    there = True if gap >= 0 else None if gap >= -free else False
    holds = there if limit is not None or there is None else not there
    return Decision(holds, f"{100 * edge:.1f} {where}")


def with_ensemble(record: records.Record) -> Decision:
    """Whether it is level with the ensemble at the last l."""
    last, (value, _) = list(by_layers(record).items())[-1]
    ensemble = record["summary"]["ensemble"]
    here = f"{100 * value:.1f} at l = {last}, ensemble {100 * ensemble:.1f}"
    return Decision(claims.level(record, [value, ensemble], 0), here)


def a_little_below(record: records.Record) -> Decision | None:
    """Whether matching alone is below activation matching, by 5 points at most."""
    value, other = MATCHED.of(record), AM.of(record)
    if value != value or other != other:
        return None
    lower = claims.compared(record, other, value)
    level = claims.level(record, [value, other], LITTLE)
    return Decision(claims.all_of([lower, level]), f"{MATCHED.told(record)}, {AM.told(record)}")


def runs(match: str, *, of: str | None = None, residual: bool | None = None) -> Any:
    """Which records a claim is of: by matching, remedy, and whether networks are residual."""

    def fits(record: records.Record) -> bool:
        is_residual = record["model"]["name"].startswith("resnet")
        return (
            own(record) == match
            and (of is None or remedy(record) == of)
            and (residual is None or residual == is_residual)
        )

    return fits


def plain(match: str) -> Any:
    """Those on networks without BatchNorm, on CIFAR-10."""
    fits = runs(match, of="rescale")
    return lambda record: fits(record) and record["data"]["name"] != "cifar100"


LEVEL = "within 2 points of activation matching at every l; two standard errors more are level"
LIMITS = "the edge models' mean reached by l = 8 of 14 (12 on CIFAR-100); two standard errors below"
LIMITS += " it are undecided"
NEVER = "the edge models' mean reached at no l; two standard errors below it are undecided"
SAME = "within two standard errors"
AHEAD = "by more than two standard errors at the first l, and at no l the other way round"


def soon(record: records.Record) -> Decision | None:
    """By the paper's l."""
    return reaches(record, 12 if record["data"]["name"] == "cifar100" else 8)


CLAIMS = [
    Claim(
        "vf.t1.direct-at-chance",
        "direct averages of VGG16 are at chance at l = 0",
        "10.0",
        claims.AtChance(DIRECT),
        plain("activation"),
    ),
    Claim(
        "vf.t1.rescale-leads",
        "RESCALE is the best after activation matching",
        "RESCALE 84.7, "
        "bias cal. 82.9, matched 46.5, REPAIR 39.1 (table 1, l = 0; weight decay 1e-4)",
        Leads(RESCALE, (BIAS, MATCHED, REPAIR)),
        plain("activation"),
    ),
    Claim(
        "vf.t1.repair-below-matched",
        "REPAIR is below activation matching alone",
        "39.1 and 46.5 (table 1; the paper finds REPAIR reliable at large weight decay)",
        Above(MATCHED, REPAIR),
        plain("activation"),
    ),
    Claim(
        "vf.t1.bias-next-to-rescale",
        "bias calibration is next to RESCALE",
        "82.9 and 84.7 (table 1)",
        Level((BIAS, RESCALE), LITTLE),
        plain("activation"),
    ),
    Claim(
        "vf.t1.reaches-edges-at-8",
        "RESCALE passes the edge models at l = 8",
        "92.4 of 91.8 (table 1)",
        soon,
        plain("activation"),
        by=LIMITS,
    ),
    Claim(
        "vf.t1.ensemble-at-12",
        "RESCALE equals the ensemble at the last l",
        "92.9 (table 1)",
        with_ensemble,
        plain("activation"),
        by=SAME,
    ),
    Claim(
        "vf.t7.reset-lifts",
        "in ResNet20 RESET brings merged networks far above chance",
        "64.1 at l = 0 (table 7)",
        Above(RESET, DIRECT, MUCH),
        runs("activation", of="reset", residual=True),
    ),
    Claim(
        "vf.t7.ensemble-at-19",
        "ResNet20 with RESET equals the ensemble at l = 19",
        "table 7",
        with_ensemble,
        runs("activation", of="reset", residual=True),
        by=SAME,
    ),
    Claim(
        "vf.t3.cca-alone",
        "CCA without normalisation is far above activation matching",
        "81.9 and 46.5 (table 3, l = 0)",
        Above(MATCHED, AM, MUCH),
        plain("cca"),
    ),
    Claim(
        "vf.t6.zipit-alone",
        "ZipIt! without normalisation is a little below activation matching",
        "42.6 and 46.5 (table 6, l = 0)",
        a_little_below,
        plain("zipit"),
        by="below by more than two standard errors, and by no more than 5 points",
    ),
    Claim(
        "vf.t3.rescale-leads-cca",
        "RESCALE is the best of what is done to CCA",
        "83.1 (table 3, l = 0)",
        Leads(RESCALE, (MATCHED, REPAIR, BIAS)),
        plain("cca"),
    ),
    Claim(
        "vf.t6.rescale-leads-zipit",
        "RESCALE is the best of what is done to ZipIt!",
        "84.7 (table 6, l = 0)",
        Leads(RESCALE, (MATCHED, REPAIR, BIAS)),
        plain("zipit"),
    ),
    Claim(
        "vf.t3.repair-hurts-cca",
        "REPAIR lowers the accuracy of CCA",
        "81.9 to 57.7 (table 3)",
        Above(MATCHED, REPAIR),
        plain("cca"),
    ),
    Claim(
        "vf.t3.rescale-level-cca",
        "with RESCALE CCA has no more than activation matching",
        "83.1 and 84.7 (table 3)",
        Level((RESCALE, AM_RESCALE), EQUAL),
        plain("cca"),
    ),
    Claim(
        "vf.t6.repair-zipit",
        "with REPAIR ZipIt! is far above activation matching",
        "67.9 and 39.1 (table 6)",
        Above(REPAIR, AM_REPAIR, MUCH),
        plain("zipit"),
    ),
    Claim(
        "vf.t4.reset-cca",
        "with RESET CCA is ahead of activation matching at l = 0",
        "91.2 and 89.9 (table 4)",
        Above(RESET, AM_RESET),
        runs("cca", of="reset"),
    ),
    Claim(
        "vf.t4.cca-ahead",
        "with RESET CCA is ahead of activation matching at every l",
        "table 4",
        lambda record: beside(record, 1),
        runs("cca", of="reset"),
        by=AHEAD,
    ),
    Claim(
        "vf.t6.zipit-level",
        "with RESCALE or RESET ZipIt! equals activation matching in VGG16",
        "84.7 and 84.7, 89.6 and 89.9 at l = 0 (tables 6 and 8)",
        lambda record: beside(record, 0),
        runs("zipit", residual=False),
        by=LEVEL,
    ),
    Claim(
        "vf.t7.zipit-below",
        "with RESET ZipIt! is below activation matching in ResNet20",
        "62.2 and 64.1 at l = 0 (table 7)",
        lambda record: beside(record, -1),
        runs("zipit", residual=True),
        by=AHEAD,
    ),
    Claim(
        "vf.t7.zipit-never",
        "ZipIt! stays below the edge models in ResNet20",
        "even at l = 19",
        lambda record: reaches(record, None),
        runs("zipit", residual=True),
        by=NEVER,
    ),
    Claim(
        "vf.t3.cca-reaches",
        "CCA reaches the edge models at l = 8",
        "tables 3 and 4",
        soon,
        runs("cca"),
        by=LIMITS,
    ),
    Claim(
        "vf.t6.zipit-reaches",
        "ZipIt! reaches the edge models at l = 8",
        "tables 6 and 8; at l = 10 or 12 on CIFAR-100",
        soon,
        runs("zipit", residual=False),
        by=LIMITS,
    ),
    Claim(
        "vf.t3.cca-ensemble",
        "CCA equals or passes the ensemble at l = 12",
        "tables 3 and 4",
        with_ensemble,
        runs("cca"),
        by=SAME,
    ),
    Claim(
        "vf.t6.zipit-ensemble",
        "ZipIt! equals the ensemble at l = 12",
        "tables 6 and 8",
        with_ensemble,
        runs("zipit", residual=False),
        by=SAME,
    ),
    Claim(
        "vf.new.transport",
        "optimal transport with RESCALE, beside activation matching",
        "",
        lambda record: beside(record, 0),
        runs("transport"),
        by=LEVEL,
    ),
]

EXPERIMENT = Experiment(
    name="cifar_pfm",
    doc=__doc__,
    options=Config,
    prepare=loaded(
        count=models_of,
        statistics="samples",
        checked=lambda config: pairs.check(config, [config.match]),
        settled=settled,
        seeds=lambda config: {"matching": 0},
    ),
    measure=measure,
    title=title_of,
    finding=finding_of,
    figure=figure_of,
    tables=tables_of,
    claims=CLAIMS,
    summary=summary_of,
    legend="""PFM l/L: the first l of L layers kept apart, the others merged (l = 0: all of them).
    matched: units of the second network brought together with those of the first; AM is activation
    matching, which permutes them, in the same run; CCA combines units linearly. REPAIR, RESCALE,
    RESET and bias calibration come on top. The variances that a BatchNorm stores are unknown for
    units that are mixed, so that without RESET there is nothing to evaluate: a dash, where the
    paper has chance. Parameters and FLOPs include the map of a matching.""",
)
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
