"""Which layers is it best to keep apart, the first (PFM) or the last (partial zipping)?

    python experiments/pfm_vs_partial_zip.py                      # VGG16, the shipped pair
    python experiments/pfm_vs_partial_zip.py --model vgg16-bn     # BatchNorm: RESET
    python experiments/pfm_vs_partial_zip.py --match cca          # other maps
    python experiments/pfm_vs_partial_zip.py --dataset digits     # seconds, needs no data
    python experiments/pfm_vs_partial_zip.py --retrain --preset paper    # full width, on a GPU

Two networks of the same task are merged in all but l of their L layers. Preserve-First Merging
keeps the first l apart: two stems, whose l-th pre-activations are averaged, and one trunk. Partial
zipping, as ZipIt! has it, keeps the last l apart: one trunk and two heads, whose logits are
averaged. A third curve keeps (l + 1) // 2 layers apart in front and l // 2 at the end. At equal l
as many layers are merged, but the last hold most parameters and the first most operations, so
accuracy is drawn against both, too, with all maps between bases. At l = 0 all three are the fully
merged network, for l = L the ensemble. Networks without BatchNorm are shown as they are merged and
with RESCALE, others with RESET.

The paper ("Vanishing Feature", VGG16 on CIFAR-10, before and after RESCALE): Preserve-First Merging
is better than partial zipping for all numbers of unmerged layers except two.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from kit import cli, figures, pairs, tables
from kit.edges import loaded
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, joined, networks
from papers.pfm_vs_partial_zip import CLAIMS, KINDS, compared_at, remedy_of

import vfjax

MATCHES = ("zipit", "activation")
COSTS = {"params": "parameters", "flops": "FLOPs"}
EDGES = ("model 1", "model 2", "ensemble")


def default_layers(depth: int) -> list[int]:
    """The numbers of layers that are kept apart.

    Example:
      >>> default_layers(14), default_layers(5)
      ([0, 2, 4, 6, 8, 10, 12, 13], [0, 2, 4])
    """
    return sorted({*range(0, depth, 2), depth - 1})


def _match_part(record: Record) -> str | None:
    config = record["config"]
    names = [pairs.name_of(match, config) for match in config["match"]]
    return None if tuple(names) == MATCHES else "+".join(names)


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(pairs.MatchingOptions):
    match: tuple[str, ...] = cli.option(
        MATCHES, f"how units are matched, a panel each: {joined(pairs.MATCHES)} (default: "
        f"{joined(MATCHES)})", choices=tuple(pairs.MATCHES), metavar="M", part=_match_part)
    layers: tuple[int, ...] | None = cli.option(
        None, "numbers of layers that are kept apart (default: 0, 2, 4 ... and L - 1)",
        type=int, nargs="+", metavar="l", part="layers{}",
        usual=lambda record: default_layers(record["model"]["depth"]))
    samples: int | None = cli.images("samples", "test images, the first N", 5_000)
    statistics: int | None = cli.images(
        "statistics", "training images, the first N, not augmented, for matching and "
        "renormalisation", 5_000)
# fmt: on


def settled(config: Config, net: vfjax.Network, name: str) -> Config:
    """The options with the layers of the network."""
    layers = default_layers(net.depth) if config.layers is None else config.layers
    wrong, most = [number for number in layers if not 0 <= number < net.depth], net.depth - 1
    if wrong:
        raise cli.UserError(f"--layers must be from 0 to L - 1 = {most}, got {wrong[0]}.")
    matches = tuple(dict.fromkeys(config.match))
    return dataclasses.replace(config, layers=tuple(sorted(set(layers))), match=matches)


def merged_of(kind: str, layers: int, depth: int) -> tuple[int, int]:
    """The first layer that is merged, and the first after it that is not, counted from 0.

    Example:
      >>> [merged_of(kind, 3, 14) for kind in KINDS]
      [(3, 14), (0, 11), (2, 13)]
    """
    first = {"pfm": layers, "partial": 0, "both": (layers + 1) // 2}[kind]
    return first, first + depth - layers


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Edge models and ensemble; each way to keep l layers apart, before and after the remedy."""
    models, net = run.setup, run.setup.net

    @functools.cache
    def pair() -> pairs.Pair:
        batches = models.images.statistics, models.images.test
        with run.watch("statistics of edge models"):
            return pairs.Pair(net, models.trees, (0.5, 0.5), *batches, config.match)

    @functools.cache
    def matching_of(match: str) -> pairs.Matching:
        with run.watch("matching"):
            found = pair().matching(match, dataclasses.asdict(config))
        run.note("matching", match=match, **found.record)
        return found

    @functools.lru_cache(maxsize=1)
    def cut_of(match: str, *merged: int) -> pairs.Cut:
        return pairs.Cut(pair(), matching_of(match), slice(*merged))

    # What two kinds merge alike, as all do at l = 0, is measured once.
    @functools.cache
    def measured(match: str, remedy: str, *merged: int) -> Row:
        cut = cut_of(match, *merged)
        return cut.measured(remedy, f"layers {merged[0]} to {merged[1]}") | cut.cost()

    keys = ("network", "match", "layers", "kind", "remedy")
    remedies = ("none", "reset" if net.norms else "rescale")
    cells = [(name, *[None] * 4) for name in EDGES]
    cells += itertools.product([None], config.match, config.layers or (), KINDS, remedies)
    for cell in run.cells(dict(zip(keys, one, strict=True)) for one in cells):
        name, match, layers, kind, remedy = (cell[key] for key in keys)
        with run.watch(pairs.MATCHES[match] if match else "edge models and ensemble"):
            merged = () if name else merged_of(kind, layers, net.depth)
            yield cell | (pair().edge(name) if name else measured(match, remedy, *merged))


def matches_of(record: Record) -> dict[str, str]:
    return {match: pairs.title_of(match, record["config"]) for match in record["config"]["match"]}


def remedies_of(record: Record, match: str) -> list[str]:
    """What there are accuracies with: of mixed units a BatchNorm's variances may be unknown."""
    found = record.rows.where(match=match)
    return [remedy for remedy in found.distinct("remedy") if found.values(remedy=remedy)]


def summary_of(record: Record) -> dict[str, Any]:
    """The edge models' mean, and by matching and kind the first l that reaches it."""
    rows, edge, reached = record.rows, record.rows.mean(network=EDGES[:2]), {}
    for match in record["config"]["match"]:
        known = rows.where(match=match, remedy=remedy_of(record))
        curves = {kind: zip(*known.curve("layers", kind=kind)[:2], strict=True) for kind in KINDS}
        found = {kind: [at for at, mean in curve if mean >= edge] for kind, curve in curves.items()}
        reached[match] = {kind: next(iter(places), None) for kind, places in found.items()}
    return {"edge_mean": edge, "ensemble": rows.mean(network="ensemble"), "reached": reached}


def title_of(record: Record) -> str:
    images = record["data"]["test_images"]
    return f"{networks(record)}, midpoints with l layers apart, {images:,} test images"


def finding_of(record: Record) -> str:
    """How far PFM is ahead of partial zipping, and where the edge models are reached."""
    remedy, titles = remedy_of(record), matches_of(record)
    gaps = {name: compared_at(record, m, remedy, "partial").points for m, name in titles.items()}
    words = [f"{gap:+.1f} points with {title}" for title, gap in gaps.items() if gap == gap]
    text = f"PFM against partial zipping, with {label(remedy)}: {joined(words)} on average over l"
    text = text if words else "With fewer than two layers apart there is nothing to compare"
    first, reached = next(iter(record["summary"]["reached"].items()))
    words = [f"{KINDS[kind]} (from l = {at} on)" for kind, at in reached.items() if at is not None]
    there = f"{joined(words) or 'nothing'} reaches the edge models"
    return f"{text}; {there} with {titles[first]}"


def tables_of(record: Record) -> list[tables.Table]:
    """Accuracies and costs by l, a table each for each matching."""
    edge, found = record["summary"]["edge_mean"], []
    caption = f"*: at or above the mean of the edge models, {100 * edge:.2f}; ensemble: "
    caption += f"{100 * record['summary']['ensemble']:.2f}"
    for match, title in matches_of(record).items():
        lines = {str(at): {"match": match, "layers": at} for at in record["config"]["layers"]}
        values = [
            tables.Column(name + (f" + {label(remedy)}" if remedy != "none" else ""),
                          {"kind": kind, "remedy": remedy})
            for remedy in remedies_of(record, match) for kind, name in KINDS.items()
        ]  # fmt: skip
        costs = [
            tables.Column(f"{name}: {what}", {"kind": kind}, f"{key}_ratio", tables.number())
            for kind, name in KINDS.items() for key, what in COSTS.items()
        ]  # fmt: skip
        about = {"title": f"{record['title']}, {title}", "corner": "test accuracy, %; l"}
        about |= {"mark": lambda _, mean: mean >= edge, "caption": caption}
        found.append(tables.pivot(record.rows, lines, values, **about))
        about = {"title": f"{title}: cost relative to one model", "corner": "l"}
        found.append(tables.pivot(record.rows, lines, costs, **about))
    return found


def figure_of(record: Record) -> Any:
    """Accuracy against l, a panel for each matching; against cost for the first of them."""
    summary, titles = record["summary"], matches_of(record)
    goals = {"edge models' mean": summary["edge_mean"], "ensemble": summary["ensemble"]}

    def panel(match: str, title: str, x: str, x_label: str, of: list[str], **limits: Any) -> Any:
        lines = [
            figures.line(record.rows, x, method=place, dashed=remedy == "none", match=match,
                         name=name + (f", {label(remedy)}" if remedy != "none" else ", without"),
                         kind=kind, remedy=remedy)
            for remedy in of for place, (kind, name) in enumerate(KINDS.items())
            if remedy != "none" or kind != "both"
        ]  # fmt: skip
        lines += figures.levels(goals)
        return figures.Panel(title, x_label, figures.ACCURACY, lines, **limits)

    x, limits = f"layers kept apart, l (of L = {record['model']['depth']})", (0, 101)
    row = [
        panel(match, title, "layers", x, remedies_of(record, match)[::-1], y_limits=limits)
        for match, title in titles.items()
    ]
    match, title = next(iter(titles.items()))
    for key, what in COSTS.items():
        # As high as the curves, which are close together once they are renormalised.
        told = f"{title}: accuracy for {what}", f"{key}_ratio", f"{what}, relative to one model"
        row += [panel(match, *told, [remedy_of(record)])]
    return figures.draw(row, finding=record["finding"], subtitle=record["title"], columns=2)


LEGEND = """PFM l: the first l layers are kept apart; partial zip: the last l; both ends: half of l
at each end. The other layers are merged, by the maps that a matching finds: those of ZipIt! mix
units, activation matching permutes them. RESCALE and RESET renormalise what is merged; "without" is
as it is merged."""
PREPARE = loaded(statistics="statistics", test="samples", settled=settled,
                 checked=lambda config: pairs.check(config, config.match),
                 seeds=lambda config: {"matching": 0})  # fmt: skip
EXPERIMENT = Experiment(
    name="pfm_vs_partial_zip", doc=__doc__, options=Config, prepare=PREPARE, measure=measure,
    title=title_of, finding=finding_of, figure=figure_of, tables=tables_of, claims=CLAIMS,
    summary=summary_of, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
