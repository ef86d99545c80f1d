"""Where do features vanish in merged networks, and what brings them back?

    python experiments/vanishing_feature.py                      # VGG16, the shipped pair
    python experiments/vanishing_feature.py --model vgg16-bn     # BatchNorm: RESET; resnet20, too
    python experiments/vanishing_feature.py --model vgg16-bn --match weight
    python experiments/vanishing_feature.py --model vgg16-ln     # LayerNorm; resnet20-ln, too
    python experiments/vanishing_feature.py --dataset digits     # seconds, needs no data
    python experiments/vanishing_feature.py --retrain --preset paper    # full width, on a GPU

The feature of a layer is what the input adds to its output, f(x) - f(0), where 0 is the mean image;
the offset is f(0). Mean norms over test images, before norm and activation, along the main path of
midpoints of two networks are divided by the mean of the two networks' own.

The paper ("Vanishing Feature"): in direct midpoints of VGG16, VGG16-BN and ResNet20 features fade
strongly with depth, so that logits hardly depend on the image; much more mildly in ResNet20 with
LayerNorm. Matching, REPAIR, RESCALE, bias removal and bias calibration mitigate this; the more
layers are kept apart the less features vanish. In VGG16-BN after weight matching RESET lowers the
running standard deviations a lot and leaves the means, which amplifies features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from kit import cli, edges, features, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, networks
from papers.vanishing_feature import CLAIMS, EDGES, left

import vfjax
from vfjax import merge, renorm

# How many of the last layers lose their biases: the paper's figure for VGG16 is 5 to 6.
REMOVED = 5


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config(edges.EdgeOptions):
    match: str = cli.option(
        "activation", "how units of the second network are matched to those of the first",
        choices=("activation", "weight"), part="{}")
    samples: int | None = features.samples()
    statistics: int | None = cli.images(
        "statistics", "training images, the first N, not augmented, for matching and "
        "renormalisation", features.STATISTICS)
# fmt: on


def removed(depth: int) -> int:
    """How many layers lose their biases: the first keeps its own in any network."""
    return min(REMOVED, depth - 1)


def plan_of(net: vfjax.Network) -> list[dict[str, Any]]:
    """The networks: both edge models, midpoints, and those with layers kept apart."""
    # The classifier's bias alone, as where all others are those of norms, is next to nothing.
    biased = sum(layer.bias is not None for layer in net.layers) > 1
    found = pairs.remedies_of(net)
    if not net.norms:
        found = [*found, "bias_removal"] if biased else ["repair", "rescale"]
    names = ("edge models", "direct", "matched", *found)
    plan = [{"network": name, "layers": None} for name in names]
    kept = [number for number in pairs.default_layers(net.depth) if number]
    return plan + [{"network": f"PFM {n}/{net.depth}", "layers": n} for n in kept]


def stored(net: vfjax.Network, merged: list[merge.Merged]) -> Iterator[Row]:
    """Of each norm, means over channels and networks of stored deviations and absolute means."""
    depths = {layer.name: layer.depth for layer in net.layers}
    trees = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
         for path, leaf in jax.tree_util.tree_leaves_with_path(one.trunk)} for one in merged
    ]  # fmt: skip
    for norm in net.norms:
        yield {
            "norm": norm.name,
            "depth": depths.get(norm.layer),
            "main": norm.layer is None or net.layer(norm.layer).main,
            "std": float(np.mean([np.sqrt(tree[norm.var]).mean() for tree in trees])),
            "mean": float(np.mean([np.abs(tree[norm.mean]).mean() for tree in trees])),
        }


def measure(config: Config, run: Run) -> Iterator[Row]:
    """Features, logits and accuracy of every network; of norms what they store."""
    models, net = run.setup, run.setup.net
    images = models.images

    @functools.cache
    def pair() -> pairs.Pair:
        with run.watch("statistics of edge models"):
            both = images.statistics, images.test
            return pairs.Pair(net, models.trees, (0.5, 0.5), *both, [config.match])

    @functools.cache
    def matching(match: str) -> pairs.Matching:
        given = pair()
        with run.watch("matching"):
            return given.matching(match)

    def merged(name: str, layers: int | None) -> dict[str, merge.Merged]:
        found = matching("none" if name == "direct" else config.match)
        with run.watch("midpoints"):
            if name == "edge models":
                both = (merge.as_merged(net, tree) for tree in found.mapped)
                return dict(zip(EDGES, both, strict=True))
            whole = pair().merged(found, slice(layers, None))
            if name == "bias_removal":
                return {name: renorm.remove_bias(net, whole, last=removed(net.depth))}
            remedy = name if name in pairs.remedies_of(net) else None
            return {name: pair().renormalised(remedy, found, whole, images.statistics)}

    for cell in run.cells(plan_of(net)):
        name = cell["network"]
        several, whole = merged(name, cell["layers"]), None
        run.note("matching", **matching(config.match).record)
        if name != "edge models":
            both = [features.by_layer(run.rows, "feature", network=edge) for edge in EDGES]
            whole = np.mean(both, axis=0)
        with run.watch("features"):
            for row in features.rows_of(net, several, run.watched(images.test, name), whole):
                yield cell | row
        with run.watch("accuracies"):
            for one, network in several.items():
                found = pair().evaluate(network, images.test, one)
                yield cell | {"network": one} | found
        if name in ("edge models", "matched", "reset"):
            for row in stored(net, list(several.values())):
                yield cell | row


def names_of(record: Record) -> dict[str, str]:
    """The networks by their names in tables and figures."""
    known = {"bias_removal": f"last {removed(record['model']['depth'])} biases removed"}
    return {known.get(n, label(n)): n for n in record.rows.distinct("network", layer=1)}


def title_of(record: Record) -> str:
    match, images = record["config"]["match"], record["data"]["test_images"]
    return f"{networks(record)}, midpoints, {match} matching, {images:,} test images"


def finding_of(record: Record) -> str:
    ends = {}
    for text, name in names_of(record).items():
        if name in ("direct", "matched", "repair", "rescale", "reset"):
            end = 100 * left(record, name)[-1]
            ends[text] = f"{end:.0f}%" if end >= 10 else f"{end:.2g}%"
    direct, matched = ends.pop("direct"), ends.pop("matched")
    rest = " and ".join(f"{end} with {text}" for text, end in ends.items())
    text = f"Of the edge models' features {direct} are left at the output of the direct midpoint"
    return f"{text}, {matched} matched, {rest}"


def tables_of(record: Record) -> list[tables.Table]:
    return [features.table(record, names_of(record))]


def figure_of(record: Record) -> Any:
    """Bounds without and with PFM, logits, and what decides them or the norms' statistics."""
    names, depth = names_of(record), record["model"]["depth"]
    edge = {"name": "edge model 1", "method": "edges", "dashed": True}
    plain, kept = ([name for name in names.values() if name not in EDGES
                    and name.startswith("PFM") == apart] for apart in (False, True))  # fmt: skip
    # Colours that no method of the figure has.
    methods = {name: place for place, name in enumerate(kept, start=6)}
    styles = {name: edge if name in EDGES else {"name": text, "method": methods.get(name, name)}
              for text, name in names.items()}  # fmt: skip
    y = "norm of f(x) - f(0), ratio to edge models"
    row = [
        figures.Panel(title, features.DEPTH, y,
                      [features.line(record, n, bound=True, **styles[n]) for n in of], log=True)
        for title, of in (
            (f"upper bounds of features, L = {depth}", plain),
            ("matched, the first l layers kept apart", ["matched", *kept]))
    ]  # fmt: skip
    last = "reset" if "reset" in styles else "rescale"
    shown = {name: styles[name] for name in (EDGES[0], "direct", "matched", last)}
    at_zero = {"name": "direct, at 0", "method": "none", "dashed": True, "at_zero": "direct"}
    row.append(features.logits_panel(record, shown | {"at zero": at_zero}))
    lines = [features.line(record, n, bound=False, **styles[n]) for n in (EDGES[0], *plain)]
    offsets = ("features against offsets", features.DEPTH, features.AGAINST, lines, True)
    normed = record.rows.distinct("norm")
    row.append(norms_panel(record) if normed else figures.Panel(*offsets))
    return figures.of_record(record, row, bars=features.BARS, columns=2)  # fmt: skip


def norms_panel(record: Record) -> figures.Panel:
    """Stored statistics of the norms along the main path, before and after RESET."""
    lines, depth = [], record["model"]["depth"]
    for name in ("matched", "reset"):
        rows = [r for r in record.rows.where(network=name, main=True) if r["depth"] is not None]
        x = [row["depth"] / depth for row in rows]
        for key, text in (("std", "stored std"), ("mean", "stored |mean|")):
            y, dashed = [row[key] for row in rows], key == "mean"
            lines.append(figures.Line(f"{text}, {label(name)}", x, y, None, name, dashed))
    y = "pre-activation, mean over channels"
    return figures.Panel("what norms store", features.DEPTH, y, lines, log=True)


LEGEND = """Shown are features f(x) - f(0) relative to the edge models' (ratio), bounded from above
in the figure by the least sequence that does not rise (smoothed with gamma = 1.4 in the record).
Midpoints are direct; matched; matched with REPAIR, RESCALE, bias calibration or without the biases
of the last 5 layers (a fixed number), or with RESET where there is BatchNorm; and matched with the
first l layers kept apart (PFM l/L), not renormalised: their first l - 1 layers are whole, and at
the l-th the outputs are averaged. The paper's text takes bounds over training images, its code over
test images, as here. Of the means that norms store that of the first changes most with RESET: it
was taken in training, on images cropped at random with black borders, and RESET's is that of the
images as they are. The networks with LayerNorm are narrower than the others and were trained for
fewer epochs; those of ResNet20 are far from trained, so that little follows from them. Their layers
have no biases but the classifier's, and those of norms stay: no bias is removed there."""
EXPERIMENT = Experiment(
    name="vanishing_feature", doc=__doc__, options=Config,
    prepare=edges.loaded(statistics="statistics", test="samples",
                         seeds=lambda config: {"matching": 0}),
    measure=measure, title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    claims=CLAIMS, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
