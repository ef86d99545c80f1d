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
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from kit import cli, edges, features, figures, pairs, tables
from kit.experiment import Experiment, Run
from kit.figures import label
from kit.records import Record, Row, joined, networks
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
    statistics: int | None = pairs.statistics(features.STATISTICS)
# fmt: on


def removed(depth: int) -> int:
    """How many layers lose their biases: the first keeps its own in any network."""
    return min(REMOVED, depth - 1)


def plan_of(net: vfjax.Network) -> list[dict[str, Any]]:
    """The networks: both edge models, midpoints, and those with layers kept apart."""
    found = pairs.remedies_of(net)
    if not net.norms:
        # The classifier's bias alone, as where all others are those of norms, is next to nothing.
        biased = sum(layer.bias is not None for layer in net.layers) > 1
        found = [*found, "bias_removal"] if biased else ["repair", "rescale"]
    plan = [{"network": n, "layers": None} for n in ("edge models", "direct", "matched", *found)]
    kept = [number for number in pairs.default_layers(net.depth) if number]
    return plan + [{"network": f"PFM {n}/{net.depth}", "layers": n} for n in kept]


def stored(net: vfjax.Network, merged: list[merge.Merged]) -> Iterator[Row]:
    """Of each norm, means over channels and networks of stored deviations and absolute means."""
    depths = {layer.name: layer.depth for layer in net.layers}
    trees = [flatten_dict(one.trunk, sep="/") for one in merged]
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
    net, test = run.setup.net, run.setup.images.test
    pair = pairs.Pair(run, config, [config.match])
    for cell in run.cells(plan_of(net)):
        name, whole = cell["network"], None
        cut = pair.cut("none" if name == "direct" else config.match, cell["layers"] or 0)
        with run.watch("midpoints"):
            if name == "edge models":
                models = [merge.as_merged(net, tree) for tree in cut.mapped]
                merged = dict(zip(EDGES, models, strict=True))
            elif name == "bias_removal":
                merged = {name: renorm.remove_bias(net, cut.merged, last=removed(net.depth))}
            else:
                remedy = name if name in pairs.remedies_of(net) else "none"
                merged = {name: cut.renormalised(remedy)}
        if name != "edge models":
            both = [features.by_layer(run.rows, "feature", network=edge) for edge in EDGES]
            whole = np.mean(both, axis=0)
        with run.watch("features"):
            for row in features.rows_of(net, merged, run.watched(test, name), whole):
                yield cell | row
        with run.watch("accuracies"):
            for one, network in merged.items():
                yield cell | {"network": one} | pairs.evaluated(network, test, one)
        if name in ("edge models", "matched", "reset"):
            for row in stored(net, list(merged.values())):
                yield cell | row


def names_of(record: Record) -> dict[str, str]:
    """The networks by their names in tables and figures."""
    known = {"bias_removal": f"last {removed(record['model']['depth'])} biases removed"}
    return {known.get(n, label(n)): n for n in record.rows.distinct("network", layer=1)}


def title_of(record: Record) -> str:
    match, images = record["config"]["match"], record["data"]["test_images"]
    return f"{networks(record)}, midpoints, {match} matching, {images:,} test images"


def finding_of(record: Record) -> str:
    shown = ("direct", "matched", "repair", "rescale", "reset")
    ends = {text: left(record, n)[-1] for text, n in names_of(record).items() if n in shown}
    kept = joined(f"{text} {100 * end:.3g}%" for text, end in ends.items())
    return f"Of the edge models' features the output of midpoints keeps: {kept}"


def tables_of(record: Record) -> list[tables.Table]:
    return [features.table(record, names_of(record))]


def figure_of(record: Record) -> Any:
    """Bounds without and with PFM, logits, and what decides them or the norms' statistics."""
    styles = {name: {"name": text, "method": name} for text, name in names_of(record).items()}
    kept = [name for name in styles if name.startswith("PFM")]
    plain = [name for name in styles if name not in (*EDGES, *kept)]
    # Colours that no method of the figure has.
    styles |= {name: styles[name] | {"method": at} for at, name in enumerate(kept, start=6)}
    styles[EDGES[0]] = {"name": "edge model 1", "method": "edges", "dashed": True}

    def lines(names: Iterable[str], bound: bool = True) -> list[figures.Line]:
        return [features.line(record, name, bound=bound, **styles[name]) for name in names]

    title, y = f"upper bounds of features, L = {record['model']['depth']}", features.RATIO
    apart = "matched, the first l layers kept apart"
    row = [figures.Panel(title, features.DEPTH, y, lines(plain), log=True)]
    row += [figures.Panel(apart, features.DEPTH, y, lines(["matched", *kept]), log=True)]
    last = "reset" if "reset" in styles else "rescale"
    shown = {name: styles[name] for name in (EDGES[0], "direct", "matched", last)}
    at_zero = {"name": "direct, at 0", "method": "none", "dashed": True, "at_zero": "direct"}
    row.append(features.logits_panel(record, shown | {"at zero": at_zero}))
    if record.rows.distinct("norm"):
        stored = [
            figures.line(record.rows, "depth", key, name=f"stored {text}, {label(name)}", scale=1,
                         method=name, dashed=key == "mean", network=name, main=True)
            for name in ("matched", "reset") for key, text in (("std", "std"), ("mean", "|mean|"))
        ]  # fmt: skip
        y = "pre-activation, mean over channels"
        row.append(figures.Panel("what norms store", "layer", y, stored, log=True))
    else:
        about = "features against offsets", features.DEPTH, features.AGAINST
        row.append(figures.Panel(*about, lines((EDGES[0], *plain), bound=False), log=True))
    return figures.of_record(record, row, bars=features.BARS, columns=2)


LEGEND = """Shown are features f(x) - f(0) relative to the edge models' (ratio), bounded from above
in the figure by the least sequence that does not rise (smoothed with gamma = 1.4 in the record), of
midpoints: direct; matched; matched with REPAIR, RESCALE, bias calibration or without the biases of
the last 5 layers, or with RESET where there is BatchNorm; and with the first l layers kept apart
(PFM l/L), whose outputs at the l-th are averaged. Bounds are over test images, as in the paper's
code. Of the means that norms store that of the first changes most with RESET: in training images
were cropped at random with black borders. The networks with LayerNorm are narrower and were trained
for fewer epochs; those of ResNet20 are far from trained, so that little follows from them. Their
layers have no biases but the classifier's, and those of norms stay: no bias is removed there."""
EXPERIMENT = Experiment(
    name="vanishing_feature", doc=__doc__, options=Config,
    prepare=edges.loaded(statistics="statistics", test="samples", seeds=pairs.seeds),
    measure=measure, title=title_of, finding=finding_of, figure=figure_of, tables=tables_of,
    claims=CLAIMS, legend=LEGEND)  # fmt: skip
main = EXPERIMENT.main

if __name__ == "__main__":
    main()
