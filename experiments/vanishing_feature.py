"""Where features vanish in merged networks, and what brings them back: "Vanishing Feature".

    python experiments/vanishing_feature.py                      # VGG16, the shipped pair
    python experiments/vanishing_feature.py --model vgg16-bn     # BatchNorm: RESET; resnet20, too
    python experiments/vanishing_feature.py --model vgg16-bn --match weight
    python experiments/vanishing_feature.py --model vgg16-ln     # LayerNorm; resnet20-ln, too
    python experiments/vanishing_feature.py --dataset digits     # seconds, needs no data
    python experiments/vanishing_feature.py --retrain --preset paper    # full width, on a GPU

Edge models are found as by `cifar_pfm.py`: two shipped ones that differ in their random seed.

The feature of a layer is what the input adds to its output, f(x) - f(0), where 0 is the mean image;
the offset is f(0). Shown are mean norms of the features over test images, before norm and
activation, along the main path of the midpoint of two networks, divided by the mean of the two
networks' own, and bounded from above by the least sequence that does not rise (its smoothed form
with gamma = 1.4 is in the record). Midpoints are direct; matched, with the units of the second
network permuted to match those of the first; matched with REPAIR, RESCALE, bias calibration or
without the biases of the last 5 layers (a fixed number), or, for networks with BatchNorm, with
RESET; and matched with the first l layers kept apart ("PFM l/L"), not renormalised. Accuracies are
those on the same test images.

What the paper found: in direct midpoints of VGG16, VGG16-BN and ResNet20, with averaged running
statistics if they have BatchNorm, features fade strongly with depth (taken as: to less than a tenth
from the first layer to the last), so that logits of ResNet20 hardly depend on the image and are
close to f(0); much more mildly in ResNet20 with LayerNorm (taken as: to no less than a tenth, here
for VGG16 with LayerNorm, too). Matching, REPAIR, RESCALE, bias removal and bias calibration all
mitigate this. It is judged by the geometric mean of features over layers, but for bias removal and
calibration by features against offsets at the end, for these scale down or remove offsets alone.
The more layers are kept apart the less features vanish; the first l - 1 are whole, and at the l-th
the networks' outputs are averaged. In VGG16-BN after weight matching RESET lowers the running
standard deviations a lot (taken here as: in every norm; by how much is said below) and leaves the
running means about the same (taken as: the median over norms within a fifth), which amplifies
features. The paper's text takes bounds over training images, its code over test images, as here.

Of the norms' means that of the first changes most. The running one was taken in training, on images
cropped at random with black borders, and RESET's is that of the images as they are. With images
cropped and mirrored as in training a single network's own means come back, as in pruning.py.

The networks with LayerNorm are narrower than the others and were trained for fewer epochs. Those of
ResNet20 are far from trained (their accuracies are below), so that little follows from them. Their
layers have no biases but the classifier's, and those of norms stay: no bias is removed there.

What came out here (CIFAR-10: vgg16 at 0.25 of the width, midpoints, activation matching, 2,000 test
images, 209 s on 2 CPU cores): Edge models of 85.00 and 84.20, midpoints direct 10.35, matched
14.00, REPAIR 73.45, RESCALE 71.50, bias cal. 42.10, last 5 biases removed 65.95, PFM 3/14 15.45,
PFM 6/14 33.80, PFM 8/14 65.60 and PFM 12/14 86.15. As in the paper: features of the direct midpoint
are 0.73 times the edge models' at layer 1 and 0.00037 times at layer 14; matched, features are 0.16
times the edge models' (geometric mean over layers) and end at 0.053 times; with REPAIR features are
1 times the edge models' (geometric mean over layers) and end at 0.97 times; with RESCALE features
are 0.99 times the edge models' (geometric mean over layers) and end at 0.94 times; with bias cal.
features end at 6.3 times the offset (matched: 0.16), and at 0.012 times the edge models', so by
themselves below matched; with last 5 biases removed features end at 2.7 times the offset (matched:
0.16), and at 0.019 times the edge models', so by themselves below matched; matched with the first
0, 3, 6, 8 and 12 of 14 layers kept apart, features end at 0.053, 0.076, 0.15, 0.27 and 0.68 times
the edge models', not renormalised. Not in the paper: its logits vary over images 0.00033 times as
much as theirs, and their mean is 0.13% of the norm of f(0) away from f(0).

What came out here (CIFAR-10: vgg16-bn at 0.125 of the width, midpoints, activation matching, 2,000
test images, 56 s on 2 CPU cores): Edge models of 80.80 and 80.55, midpoints direct 10.35, matched
17.90, RESET 60.40, PFM 3/14 13.70, PFM 6/14 19.40, PFM 8/14 44.40 and PFM 12/14 82.15. As in the
paper: features of the direct midpoint are 0.69 times the edge models' at layer 1 and 0.0035 times
at layer 14; matched, features are 0.35 times the edge models' (geometric mean over layers) and end
at 0.15 times; with RESET features are 0.87 times the edge models' (geometric mean over layers) and
end at 1.3 times; matched with the first 0, 3, 6, 8 and 12 of 14 layers kept apart, features end at
0.15, 0.25, 0.28, 0.34 and 0.7 times the edge models', not renormalised. Not in the paper: its
logits vary over images 0.0017 times as much as theirs, and their mean is 1.2% of the norm of f(0)
away from f(0); RESET takes stored standard deviations to 0.76 times (median over norms; 0.68 to
0.83); RESET takes the magnitudes of stored means to 0.97 times (median over norms; 0.059 in the
first, 0.8 to 1.1 in others).

What came out here (CIFAR-10: vgg16-bn at 0.125 of the width, midpoints, weight matching, 2,000 test
images, 73 s on 2 CPU cores): Edge models of 80.80 and 80.55, midpoints direct 10.35, matched 10.35,
RESET 22.15, PFM 3/14 10.35, PFM 6/14 10.35, PFM 8/14 12.70 and PFM 12/14 81.05. As in the paper:
features of the direct midpoint are 0.69 times the edge models' at layer 1 and 0.0035 times at layer
14; matched, features are 0.17 times the edge models' (geometric mean over layers) and end at 0.029
times; with RESET features are 0.7 times the edge models' (geometric mean over layers) and end at
1.1 times; matched with the first 0, 3, 6, 8 and 12 of 14 layers kept apart, features end at 0.029,
0.039, 0.053, 0.1 and 0.66 times the edge models', not renormalised; RESET takes stored standard
deviations to 0.64 times (median over norms; 0.52 to 0.84); RESET takes the magnitudes of stored
means to 1 times (median over norms; 0.055 in the first, 0.86 to 1.1 in others). Not in the paper:
its logits vary over images 0.0017 times as much as theirs, and their mean is 1.2% of the norm of
f(0) away from f(0).

What came out here (CIFAR-10: vgg16-ln at 0.125 of the width, midpoints, activation matching, 2,000
test images, 85 s on 2 CPU cores): Edge models of 70.45 and 72.05, midpoints direct 16.50, matched
30.75, REPAIR 53.85, RESCALE 43.95, bias cal. 38.00, last 5 biases removed 30.65, PFM 3/14 54.15,
PFM 6/14 58.55, PFM 8/14 63.25 and PFM 12/14 72.00. As in the paper: features of the direct midpoint
are 0.72 times the edge models' at layer 1 and 0.2 times at layer 14; matched, features are 0.65
times the edge models' (geometric mean over layers) and end at 0.51 times; with REPAIR features are
0.95 times the edge models' (geometric mean over layers) and end at 0.79 times; with RESCALE
features are 0.88 times the edge models' (geometric mean over layers) and end at 0.68 times; with
bias cal. features end at 0.73 times the offset (matched: 0.61), and at 0.55 times the edge models',
above matched; with last 5 biases removed features end at 0.63 times the offset (matched: 0.61), and
at 0.51 times the edge models', so by themselves below matched. Not in the paper: its logits vary
over images 0.13 times as much as theirs, and their mean is 98% of the norm of f(0) away from f(0);
matched with the first 0, 3, 6, 8 and 12 of 14 layers kept apart, features end at 0.51, 0.73, 0.67,
0.79 and 0.89 times the edge models', not renormalised.

What came out here (CIFAR-10: resnet20 at 0.5 of the width, midpoints, activation matching, 2,000
test images, 167 s on 2 CPU cores): Edge models of 85.00 and 84.20, midpoints direct 9.75, matched
8.80, RESET 57.40, PFM 6/20 8.85, PFM 10/20 34.50, PFM 13/20 51.35 and PFM 19/20 85.55. As in the
paper: features of the direct midpoint are 0.71 times the edge models' at layer 1 and 0.049 times at
layer 20; its logits vary over images 0.044 times as much as theirs, and their mean is 15% of the
norm of f(0) away from f(0); matched, features are 0.32 times the edge models' (geometric mean over
layers) and end at 0.088 times; with RESET features are 0.79 times the edge models' (geometric mean
over layers) and end at 0.72 times; matched with the first 0, 6, 10, 13 and 19 of 20 layers kept
apart, features end at 0.088, 0.13, 0.45, 0.47 and 0.84 times the edge models', not renormalised.
Not in the paper: RESET takes stored standard deviations to 0.76 times (median over norms; 0.66 to
0.81); RESET takes the magnitudes of stored means to 0.97 times (median over norms; 0.027 in the
first, 0.84 to 1.1 in others).

What came out here (CIFAR-10: resnet20-ln at 0.25 of the width, midpoints, activation matching,
2,000 test images, 242 s on 2 CPU cores): Edge models of 43.90 and 46.45, midpoints direct 10.10,
matched 15.30, REPAIR 32.10, RESCALE 18.35, PFM 6/20 15.85, PFM 10/20 38.30, PFM 13/20 36.85 and PFM
19/20 45.95. As in the paper: features of the direct midpoint are 0.88 times the edge models' at
layer 1 and 0.23 times at layer 20; matched, features are 0.55 times the edge models' (geometric
mean over layers) and end at 0.84 times; with REPAIR features are 1 times the edge models'
(geometric mean over layers) and end at 1.5 times; with RESCALE features are 0.86 times the edge
models' (geometric mean over layers) and end at 0.82 times. Not in the paper: its logits vary over
images 0.13 times as much as theirs, and their mean is 72% of the norm of f(0) away from f(0);
matched with the first 0, 6, 10, 13 and 19 of 20 layers kept apart, features end at 0.84, 0.41, 1.1,
1.3 and 0.84 times the edge models', not renormalised.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import _old_pfm as cifar_pfm
import _pairs
import jax
import jax.numpy as jnp
import numpy as np

import vfjax
from vfjax import diagnose, merge, plot, renorm

PyTree = Any

# By preset, test images and statistics images; None for all.
SAMPLES = {"cpu": 2_000, "paper": None}
STATISTICS = {"cpu": 10_000, "paper": None}
GAMMA = 1.4
POINTS = 20
# How many of the last layers lose their biases: the paper's figure for VGG16 is 5 to 6.
REMOVED = 5
DEPTH = "relative depth (layer / L)"
EDGES = ("model 1", "model 2")
# What the paper has the logits of, and bounds with layers kept apart.
LOGITS = ("resnet20",)
PRESERVED = ("vgg16", "vgg16-bn", "resnet20")
# Features that fade strongly keep less than this from the first layer to the last.
FADED = 0.1
LABELS = cifar_pfm.LABELS | {"bias_removal": f"last {REMOVED} biases removed"}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="vanishing_feature.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(p, examples="vgg16, vgg16-bn, vgg16-ln, resnet20, resnet20-ln, digits-conv")
    p.add_argument(
        "--match",
        default="activation",
        choices=("activation", "weight"),
        help="how units of the second network are matched to those of the first",
    )
    p.add_argument(
        "--samples",
        type=_common.count_of("images"),
        metavar="N",
        help="test images, the first N, that features are measured on (default: "
        f"{SAMPLES['cpu']:,}; all with --preset paper)",
    )
    p.add_argument(
        "--statistics",
        type=_common.count_of("images"),
        metavar="N",
        help="training images, the first N, not augmented, for matching and renormalisation "
        f"(default: {STATISTICS['cpu']:,}; all with --preset paper)",
    )
    _common.folder_options(p)
    return p


# ------------------------------------------------------------------------------------- networks


def midpoints(pair: _pairs.Pair, match: str, matching: _pairs.Matching) -> dict[str, merge.Merged]:
    """All merged networks by name, those of PFM last."""
    net = pair.net
    matched = pair.merged(matching, slice(None))
    found = {"direct": pair.merged(pair.matching("none"), slice(None))}
    # The classifier's bias alone, as where all others are those of norms, is next to nothing.
    biased = sum(layer.bias is not None for layer in net.layers) > 1
    for column in cifar_pfm.columns_of(net, match)[1:]:
        if biased or column != "bias_calibration":
            remedy = cifar_pfm.parts_of(column, match)[1]
            found[column] = pair.renormalised(remedy, matching, matched, pair.statistics)
    if biased and not net.norms:
        found["bias_removal"] = renorm.remove_bias(net, matched, last=removed(net))
    for number in cifar_pfm.default_layers(net.depth):
        if number:
            found[f"PFM {number}/{net.depth}"] = pair.merged(matching, slice(number, None))
    return found


def removed(net: vfjax.Network) -> int:
    """How many layers lose their biases: the first keeps its own in any network."""
    return min(REMOVED, net.depth - 1)


def main_layers(net: vfjax.Network) -> list[vfjax.Layer]:
    """The layers of the main path, by depth."""
    return sorted((layer for layer in net.layers if layer.main), key=lambda layer: layer.depth)


def curves_of(
    net: vfjax.Network,
    networks: Mapping[str, merge.Merged],
    references: Sequence[merge.Merged],
    test: Any,
) -> dict[str, dict[str, Any]]:
    """By network: numbers of every layer, relative to the references', and of the logits."""
    sites = [layer.name for layer in main_layers(net)]
    found = diagnose.features(
        net, list(networks.values()), test, references=list(references), sites=sites
    )
    tight = diagnose.bound_sequence(found, sites=sites)
    smoothed = diagnose.bound_sequence(found, sites=sites, gamma=GAMMA)
    resampled = {"tight": tight.resampled(POINTS), "smoothed": smoothed.resampled(POINTS)}
    zero = jnp.zeros((1, *net.x.shape[1:]), net.x.dtype)
    curves = {}
    for index, (name, network) in enumerate(networks.items()):
        numbers = {
            key: [float(getattr(found, key)[site][index]) for site in sites]
            for key in ("feature", "feature_std", "offset")
        }
        numbers["relative"] = tight.relative[index].tolist()
        numbers["bound"] = tight.bound[index].tolist()
        numbers["smoothed"] = smoothed.bound[index].tolist()
        numbers["resampled"] = {key: rows[index].tolist() for key, rows in resampled.items()}
        last = sites[-1]
        numbers["logits"] = {
            "mean": np.asarray(found.mean[last][index]).tolist(),
            "std": np.asarray(found.std[last][index]).tolist(),
            "at_zero": np.asarray(network.run(zero))[0].tolist(),
        }
        curves[name] = numbers
    return curves


def statistics_of(net: vfjax.Network, tree: PyTree) -> dict[str, list[float]]:
    """Of each norm, means over channels of the stored standard deviation and absolute mean."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {
        "std": [float(np.sqrt(leaves[norm.var]).mean()) for norm in net.norms],
        "mean": [float(np.abs(leaves[norm.mean]).mean()) for norm in net.norms],
    }


def resets_of(net: vfjax.Network, networks: Mapping[str, merge.Merged], edges: Any) -> Any:
    """The stored statistics of every norm of the matched midpoint, before and after RESET."""
    if not net.norms:
        return None
    each = [statistics_of(net, edge.trunk) for edge in edges]
    depths = {layer.name: layer.depth for layer in net.layers}
    return {
        "norms": [norm.name for norm in net.norms],
        "depth": [depths.get(norm.layer) for norm in net.norms],
        "main": [norm.layer is None or net.layer(norm.layer).main for norm in net.norms],
        "before": statistics_of(net, networks["matched"].trunk),
        "after": statistics_of(net, networks["reset"].trunk),
        "edge models": {key: np.mean([e[key] for e in each], axis=0).tolist() for key in each[0]},
    }


# ------------------------------------------------------------------------------ record and figure


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    args.samples = args.samples or SAMPLES[args.preset]
    args.statistics = args.statistics or STATISTICS[args.preset]
    watch = _common.Stopwatch()
    models = _edges.found(args, watch, train=args.statistics, test=args.samples)
    net, trees = models.net, models.trees
    statistics = models.batches("train", args.statistics)
    test = models.batches("test", args.samples)
    with watch("statistics of edge models"):
        pair = _pairs.Pair(net, trees, (0.5, 0.5), statistics, test, [args.match])
    with watch("matching"):
        matching = pair.matching(args.match)
    with watch("midpoints"):
        networks = midpoints(pair, args.match, matching)
        edges = [merge.as_merged(net, tree) for tree in matching.mapped]
        everything = dict(zip(EDGES, edges, strict=True)) | networks
    with watch("features"):
        curves = curves_of(net, everything, edges, _common.Watched(test, "features"))
    with watch("accuracies"):
        for name, network in everything.items():
            curves[name] |= pair.evaluate(network, test, name)
    layers = main_layers(net)
    record: dict[str, Any] = {
        "experiment": "vanishing_feature",
        "command": command,
        "config": vars(args) | {"model": models.arch.name, "width": models.arch.width},
        **models.record(statistics, test),
        "seeds": {"edge_models": models.seeds, "matching": 0},
        "matching": matching.record,
        "layers": [layer.name for layer in layers],
        "depth": [layer.depth for layer in layers],
        "relative_depth": [k / POINTS for k in range(1, POINTS + 1)],
        "gamma": GAMMA,
        "removed": removed(net) if "bias_removal" in networks else None,
        "networks": curves,
        "reset": resets_of(net, networks, edges),
    }
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def title_of(record: dict[str, Any]) -> str:
    """Data, models, matching, images."""
    return (
        f"{_edges.networks(record)}, midpoints, {record['config']['match']} matching, "
        f"{record['data']['test_images']:,} test images"
    )


def label_of(name: str) -> str:
    """A network's name in legends and tables."""
    return LABELS.get(name, name)


def against_offset(found: Mapping[str, Any]) -> list[float]:
    """Features over offsets, by layer; infinite where there is no offset.

    Example:
      >>> against_offset({"feature": [1.0, 1.0], "offset": [2.0, 0.0]})
      [0.5, inf]
    """
    pairs = zip(found["feature"], found["offset"], strict=True)
    return [feature / offset if offset else float("inf") for feature, offset in pairs]


def figure_of(record: dict[str, Any]) -> Any:
    """Bounds without and with PFM, logits, and what decides them or the norms' statistics."""
    networks, depth = record["networks"], record["model"]["depth"]
    merged = [name for name in networks if name not in EDGES]
    plain = {name: k for k, name in enumerate(n for n in merged if not n.startswith("PFM"))}
    kept = {name: k for k, name in enumerate((n for n in merged if n.startswith("PFM")), 2)}

    def bounds(colours: Mapping[str, int]) -> dict[str, plot.Curve]:
        return {
            label_of(name): plot.Curve(
                record["relative_depth"], networks[name]["resampled"]["tight"], colour=colour
            )
            for name, colour in colours.items()
        }

    # Matching has one colour in both.
    kept = {"matched": plain["matched"]} | kept
    y = "norm of f(x) - f(0), ratio to edge models"
    row = [
        plot.Panel(f"upper bounds of features, L = {depth}", DEPTH, y, bounds(plain), log=True),
        plot.Panel("with the first l layers kept apart", DEPTH, y, bounds(kept), log=True),
        plot.Panel("logits", "class", "logit (mean, std over images)", logits(networks)),
    ]
    if record["reset"] is None:
        share = {
            label_of(name): plot.Curve(
                [d / depth for d in record["depth"]],
                against_offset(networks[name]),
                colour=colour,
                dashed=name in EDGES,
            )
            for name, colour in ({EDGES[0]: 6} | plain).items()
        }
        y = "norm of f(x) - f(0) / norm of f(0)"
        row.append(plot.Panel("features against offsets", DEPTH, y, share, log=True))
    else:
        row.append(reset_panel(record))
    return plot.panels(row, title=record["title"], columns=2)


def logits(networks: Mapping[str, Any]) -> dict[str, plot.Curve]:
    """Mean logits of some networks, and of the direct midpoint also those at the mean image."""
    last = "reset" if "reset" in networks else "rescale"
    curves = {}
    names = [EDGES[0], "direct", "matched", last]
    for k, name in enumerate(names):
        found = networks[name]["logits"]
        classes = np.arange(len(found["mean"])) + 0.12 * (k - 1.5)
        curves[label_of(name)] = plot.Curve(
            classes, found["mean"], error=found["std"], colour=(6, 0, 1, 3)[k], dashed=k == 0
        )
    zero = networks["direct"]["logits"]["at_zero"]
    curves["direct, at 0"] = plot.Curve(np.arange(len(zero)), zero, colour=4, dashed=True)
    return curves


def reset_panel(record: dict[str, Any]) -> plot.Panel:
    """Stored statistics of the norms along the main path."""
    found, curves = record["reset"], {}
    places = [k for k, main in enumerate(found["main"]) if main and found["depth"][k] is not None]
    x = [found["depth"][k] / record["model"]["depth"] for k in places]
    for colour, (name, label) in enumerate(
        {"before": "before RESET", "after": "after RESET"}.items()
    ):
        for key, word in (("std", "std"), ("mean", "|mean|")):
            values = [found[name][key][k] for k in places]
            dashed = key == "mean"
            curves[f"{word}, {label}"] = plot.Curve(x, values, colour=colour, dashed=dashed)
    title = "stored statistics of norms, midpoint matched"
    y = "pre-activation, mean over channels"
    return plot.Panel(title, DEPTH, y, curves, log=True)


def claims_of(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper: whether it holds here, and what was measured.

    None where the paper has no figure of such networks.
    """
    networks = record["networks"]
    left = {name: np.array(found["relative"]) for name, found in networks.items()}
    share = {name: against_offset(found)[-1] for name, found in networks.items()}
    spreads = {name: np.mean(found["logits"]["std"]) for name, found in networks.items()}
    direct, matched = left["direct"], float(left["matched"][-1])
    found = {key: np.array(value) for key, value in networks["direct"]["logits"].items()}
    varies = float(spreads["direct"] / np.mean([spreads[name] for name in EDGES]))
    away = float(
        np.linalg.norm(found["mean"] - found["at_zero"]) / np.linalg.norm(found["at_zero"])
    )
    fades = float(direct[-1] / direct[0])
    model, over = record["config"]["model"], {name: over_layers(r) for name, r in left.items()}
    mildly = model.endswith("-ln")
    claims: list[tuple[bool | None, str]] = [
        (
            FADED < fades < 1 if mildly else fades < FADED,
            f"features of the direct midpoint are {direct[0]:.2g} times the edge models' at layer "
            f"1 and {direct[-1]:.2g} times at layer {len(direct)}",
        ),
        (
            (varies < 0.1 and away < 0.25) if model in LOGITS else None,
            f"its logits vary over images {varies:.2g} times as much as theirs, and their mean is "
            f"{100 * away:.2g}% of the norm of f(0) away from f(0)",
        ),
        (over["matched"] > over["direct"], f"matched, features {kept(left['matched'])}"),
    ]
    for name in ("repair", "rescale", "reset"):
        if name in networks:
            text = f"with {LABELS[name]} features {kept(left[name])}"
            claims.append((over[name] > over["matched"], text))
    for name in ("bias_calibration", "bias_removal"):
        if name in networks:
            end = float(left[name][-1])
            than = "above matched" if end > matched else "so by themselves below matched"
            text = (
                f"with {LABELS[name]} features end at {share[name]:.2g} times the offset (matched: "
                f"{share['matched']:.2g}), and at {end:.2g} times the edge models', {than}"
            )
            claims.append((share[name] > share["matched"], text))
    return claims + pfm_claims(record) + reset_claims(record)


def over_layers(relative: np.ndarray) -> float:
    """Geometric mean over layers.

    Example:
      >>> round(over_layers(np.array([1.0, 0.25])), 6)
      0.5
    """
    return float(np.exp(np.log(np.maximum(relative, np.finfo(float).tiny)).mean()))


def kept(relative: np.ndarray) -> str:
    """What is left of features, in words."""
    return (
        f"are {over_layers(relative):.2g} times the edge models' (geometric mean over layers) and "
        f"end at {relative[-1]:.2g} times"
    )


def pfm_claims(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """That features vanish less the more layers are kept apart."""
    depth, ends, whole = record["model"]["depth"], {0: record["networks"]["matched"]}, True
    for name, found in record["networks"].items():
        if name.startswith("PFM"):
            number = int(name.removeprefix("PFM ").partition("/")[0])
            ends[number] = found
            whole &= bool(np.allclose(found["relative"][: number - 1], 1, atol=1e-3))
    values = np.array([found["relative"][-1] for found in ends.values()])
    # A first layer kept apart is as good as merged, since the input is one: equal up to rounding.
    grows = bool((np.diff(values) > -1e-4 * values[:-1]).all())
    words = [f"{value:.2g}" for value in values]
    return [
        (
            (whole and grows) if record["config"]["model"] in PRESERVED else None,
            f"matched with the first {_common.joined([str(n) for n in ends])} of {depth} layers "
            f"kept apart, features end at {_common.joined(words)} times the edge models', not "
            "renormalised",
        )
    ]


def reset_claims(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """That RESET makes stored standard deviations smaller and leaves means."""
    if record["reset"] is None:
        return []
    found, config = record["reset"], record["config"]
    ratios = {key: np.divide(found["after"][key], found["before"][key]) for key in ("std", "mean")}
    std, mean = (float(np.median(ratios[key])) for key in ("std", "mean"))
    first, rest = ratios["mean"][0], ratios["mean"][1:]
    told = (config["model"], config["match"]) == ("vgg16-bn", "weight")
    return [
        (
            bool(ratios["std"].max() < 1) if told else None,
            f"RESET takes stored standard deviations to {std:.2g} times (median over norms; "
            f"{ratios['std'].min():.2g} to {ratios['std'].max():.2g})",
        ),
        (
            0.8 < mean < 1.25 if told else None,
            f"RESET takes the magnitudes of stored means to {mean:.2g} times (median over norms; "
            f"{first:.2g} in the first, {rest.min():.2g} to {rest.max():.2g} in others)",
        ),
    ]


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The accuracies in a sentence, and the paper's claims."""
    networks = record["networks"]
    rows = {name: _common.percent([found["accuracy"]]) for name, found in networks.items()}
    merged = [f"{label_of(name)} {rows[name]}" for name in rows if name not in EDGES]
    edges = _common.joined([rows[name] for name in EDGES])
    return f"Edge models of {edges}, midpoints {_common.joined(merged)}.", claims_of(record)


def table_of(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: accuracy and features at half depth and at the output."""
    header = ["network", "accuracy, %", "feature at L/2, ratio", "at L", "feature of logits"]
    header += ["offset of logits", "spread of logits"]
    rows = []
    for name, found in record["networks"].items():
        half = found["relative"][record["model"]["depth"] // 2 - 1]
        numbers = [half, found["relative"][-1], found["feature"][-1], found["offset"][-1]]
        numbers += [float(np.mean(found["logits"]["std"]))]
        cells = [f"{number:.3g}" for number in numbers]
        rows.append([label_of(name), _common.percent([found["accuracy"]]), *cells])
    return header, rows


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    parts += [config["match"]] if config["match"] != "activation" else []
    for option, defaults in (("samples", SAMPLES), ("statistics", STATISTICS)):
        count = config[option]
        parts += [f"{option}{count}"] if count != defaults[config["preset"]] else []
    return _edges.file_name(record, parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    _common.print_table(record["title"], *table_of(record))
    print(_common.told(*outcome(record)))


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the experiment; returns the path of the record."""
    return _common.run(
        parser(),
        argv,
        experiment=experiment,
        file_name=file_name,
        figure_of=figure_of,
        show=show,
    )


if __name__ == "__main__":
    main()
