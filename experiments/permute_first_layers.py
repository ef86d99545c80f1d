"""What does each further layer add when only the first l layers of two networks are matched?

    python experiments/permute_first_layers.py                      # VGG16, the shipped pair
    python experiments/permute_first_layers.py --model resnet20     # BatchNorm: RESET
    python experiments/permute_first_layers.py --dataset digits     # seconds, needs no data
    python experiments/permute_first_layers.py --retrain --preset paper    # full width, on a GPU

Units of the second network are permuted to match those of the first in its first l layers only; the
two are then averaged. The matching is done once, in full, and the permutations of the first l
layers are taken from it. For activations this is what matching these layers alone would give; for
weights it is a part of the joint optimum, in which later layers have a say.

The paper ("Vanishing Feature", left panel of its figure on Preserve-First Merging): accuracy rises
with l and saturates below the edge models.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from kit import cli, edges, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, networks
from papers.permute_first_layers import CLAIMS, MATCHES, short

import vfjax
from vfjax import align, merge

# Test and statistics images.
SAMPLES = 5_000


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(edges.EdgeOptions):
    match: str = cli.option(
        "both", "how units of the second network are matched to those of the first",
        choices=(*MATCHES, "both"), part="{}")
    alpha: float = cli.option(
        0.5, "weight of the second network in the averages; the first has 1 - ALPHA",
        type=cli.number_of(0, 1), part="alpha{:g}")
    samples: int | None = cli.images("samples", "test images, the first N", SAMPLES)
    statistics: int | None = cli.images(
        "statistics", "training images, the first N, not augmented, for matching and "
        "renormalisation", SAMPLES)
# fmt: on


def written_at(net: vfjax.Network) -> dict[str, int]:
    """By group of units, the depth of the first layer on the main path that writes it.

    A group that no layer on the main path writes comes last, with all layers.

    Example:
      >>> import jax.numpy as jnp
      >>> def apply_fn(v, x):
      ...     stream = x @ v["first"]
      ...     stream = stream + jax.nn.relu(stream @ v["inner"]) @ v["outer"]
      ...     return stream @ v["head"]
      >>> sizes = {"first": (2, 3), "inner": (3, 4), "outer": (4, 3), "head": (3, 2)}
      >>> tree = {name: jnp.ones(size) for name, size in sizes.items()}
      >>> written_at(vfjax.trace(apply_fn, tree, jnp.ones((1, 2))))
      {'first': 1, 'inner': 2}
    """
    main = {layer.kernel: layer.depth for layer in net.layers if layer.main}
    found = {}
    for group, axes in net.spec.groups.items():
        depths = [main[axis.path] for axis in axes if axis.role == "out" and axis.path in main]
        found[group] = min(depths, default=net.depth)
    return found


def of_first(
    net: vfjax.Network, permutations: Mapping[str, np.ndarray], layers: int
) -> dict[str, np.ndarray]:
    """The permutations of units that the first `layers` layers write."""
    depths = written_at(net)
    return {group: p for group, p in permutations.items() if depths[group] <= layers}


def spans(net: vfjax.Network) -> dict[int, list[int]]:
    """By its first, all l that come to the same groups of units."""
    depths, found = list(written_at(net).values()), {}
    counts = [sum(depth <= number for depth in depths) for number in range(net.depth + 1)]
    for number, count in enumerate(counts):
        found.setdefault(counts.index(count), []).append(number)
    return found


def averaged(
    pair: pairs.Pair, permutations: Mapping[str, np.ndarray]
) -> tuple[merge.Merged, pairs.Matching]:
    """The average with some units of the second network permuted, and the goals of remedies."""
    net, (first, second) = pair.net, pair.trees
    moved = net.spec.permute(second, permutations)
    goals = None
    if pair.moments is not None and not net.norms:
        # Without covariances, which only the matching needed, moments are carried faster.
        plain = dataclasses.replace(pair.moments, covariance=None)
        goals = plain.carried([None, permutations])
    average = merge.interpolate([first, moved], pair.weights)
    merged = merge.as_merged(net, average, weights=pair.weights)
    maps = align.Maps.of_permutations([None, dict(permutations)])
    return merged, pairs.Matching(maps, goals, [first, moved], {})


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Accuracy and loss of edge models, and of averages at each l, matching and remedy."""
    models, net, images = run.setup, run.setup.net, run.setup.images
    matches = list(MATCHES) if config.match == "both" else [config.match]

    @functools.cache
    def pair() -> pairs.Pair:
        with run.watch("statistics of edge models"):
            weights = 1 - config.alpha, config.alpha
            return pairs.Pair(net, models.trees, weights, images.statistics, images.test, matches)

    @functools.cache
    def permutations(match: str) -> Mapping[str, np.ndarray]:
        given = pair()
        with run.watch("matching"):
            if match == "activation":
                found = align.match_moments(net, given.moments)
            else:
                found = align.match_weights(net, *given.trees, key=jax.random.key(0))
        how = {"converged": found.converged, "moved": found.moved}
        run.note("matching", match=match, objective=list(map(float, found.objective)), **how)
        return found.permutations

    @functools.lru_cache(maxsize=1)
    def average(match: str, layers: int) -> tuple[merge.Merged, pairs.Matching]:
        return averaged(pair(), of_first(net, permutations(match), layers))

    equal, depths = spans(net), written_at(net)
    for group, depth in depths.items():
        run.note("written_at", group=group, layer=depth)
    remedies = ["none", *(name for name in pairs.remedies_of(net) if name != "bias_calibration")]
    plan = [{"network": f"model {k}"} for k in (1, 2)]
    plan += [
        {"match": match, "remedy": remedy, "layers": layers}
        for layers in equal
        # Without permutations all matchings are one.
        for match in (matches if layers else matches[:1])
        for remedy in remedies
    ]
    for cell in run.cells(plan):
        if "network" in cell:
            given = pair()
            with run.watch("edge models"):
                yield cell | given.edge(cell["network"])
            continue
        match, remedy, layers = cell.values()
        merged, matching = average(match, layers)
        with run.watch("averages"):
            what = None if remedy == "none" else remedy
            done = pair().renormalised(what, matching, merged, images.statistics)
            found = pair().evaluate(done, images.test, f"l = {layers}")
        groups = sum(depth <= layers for depth in depths.values())
        for one in [match] if layers else matches:
            for number in equal[layers]:
                yield cell | {"match": one, "layers": number, "groups": groups} | found


def summary_of(record: Record) -> dict[str, Any]:
    first, second = (record.rows.mean(network=name) for name in ("model 1", "model 2"))
    alpha = record["config"]["alpha"]
    return {"edge_mean": (1 - alpha) * first + alpha * second}


def curves_of(record: Record) -> dict[tuple[str, str], list[float]]:
    """Accuracies by l, of each matching and remedy."""
    rows = record.rows
    names = [(m, r) for m in MATCHES if rows.where(match=m) for r in rows.distinct("remedy")]
    return {(m, r): rows.curve("layers", match=m, remedy=r)[1] for m, r in names}


def title_of(record: Record) -> str:
    alpha, images = record["config"]["alpha"], record["data"]["test_images"]
    what = "midpoints" if alpha == 0.5 else f"averages at alpha {alpha:g}"
    return f"{networks(record)}, {what}, first l layers matched, {images:,} test images"


def finding_of(record: Record) -> str:
    curves, edge = curves_of(record), record["summary"]["edge_mean"]
    best, values = max(curves.items(), key=lambda item: item[1][-1])
    plain = max(found[-1] for (_, remedy), found in curves.items() if remedy == "none")
    text = f"Matching all layers instead of none takes accuracy from {100 * values[0]:.1f}% to "
    text += f"{100 * values[-1]:.1f}% ({short(*best)}), without a remedy to {100 * plain:.1f}% at "
    return f"{text}most; edge models have {100 * edge:.1f}%"


def tables_of(record: Record) -> list[tables.Table]:
    lines = {str(number): {"layers": number} for number in sorted(record.rows.distinct("layers"))}
    columns = [tables.Column("groups", key="groups", show=lambda values: str(values[0]))]
    columns += [tables.Column(short(m, r), {"match": m, "remedy": r}) for m, r in curves_of(record)]
    caption = "Accuracy, %; groups of units matched; edge models: "
    about = {"title": record["title"], "corner": "first layers matched, l"}
    about["caption"] = f"{caption}{100 * record['summary']['edge_mean']:.2f}"
    return [tables.pivot(record.rows, lines, columns, **about)]


def figure_of(record: Record) -> Any:
    """Accuracy against l, a panel for each matching."""
    rows, depth, row = record.rows, record["model"]["depth"], []
    for match in rows.distinct("match"):
        lines = [
            figures.line(rows, "layers", name=label(remedy), method=remedy, match=match,
                         remedy=remedy) for remedy in rows.distinct("remedy")
        ] + figures.levels({"edge models' mean": record["summary"]["edge_mean"]})  # fmt: skip
        x = f"first layers matched, l (of L = {depth})"
        row.append(figures.Panel(MATCHES[match], x, figures.ACCURACY, lines, y_limits=(0, 101)))
    return figures.of_record(record, row)


LEGEND = """WM: weights matched; AM: activations matched. Permuted or not, the second network
computes the same function. Statistics that REPAIR and RESCALE restore are measured once and carried
through the permutations. Layers count along the main path. In a residual stage several layers write
the same units, which can only be permuted together: they count as soon as the first of these layers
is among the first l. Where a further layer writes no units of its own the curve is flat; so it is
at l = L, for the units of the last layer are the classes, which keep their order."""
EXPERIMENT = Experiment(
    name="permute_first_layers", doc=__doc__, options=Config,
    prepare=edges.loaded(statistics="statistics", test="samples",
                         seeds=lambda config: {"matching": 0}),
    measure=measure, title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    claims=CLAIMS, summary=summary_of, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
