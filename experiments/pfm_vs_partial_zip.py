"""Which layers to keep apart: the first (Preserve-First Merging) or the last (partial zipping).

    python experiments/pfm_vs_partial_zip.py                      # VGG16, the shipped pair
    python experiments/pfm_vs_partial_zip.py --model vgg16-bn     # BatchNorm: RESET
    python experiments/pfm_vs_partial_zip.py --match cca          # other maps
    python experiments/pfm_vs_partial_zip.py --dataset digits     # seconds, needs no data
    python experiments/pfm_vs_partial_zip.py --retrain --preset paper    # full width, on a GPU

Edge models are found as by `cifar_pfm.py`: two shipped ones that differ in their random seed.

Two networks of the same task are merged in all but l of their L layers. Preserve-First Merging
keeps the first l apart: two stems, whose l-th pre-activations are averaged, and one trunk. Partial
zipping, as ZipIt! has it, keeps the last l apart: one trunk, and two heads, each of which gets the
merged features in its own network's basis; their logits are averaged, since both know the same
classes. A third curve keeps (l + 1) // 2 layers apart in front and l // 2 at the end. At equal l
as many layers are merged, but not at equal cost: the last layers hold most parameters, the first
ones most operations. So accuracy is drawn against both, too, which include the maps between bases.
At l = 0 all three are the fully merged network, and for l = L the ensemble of logits.

Maps are those of ZipIt! and those of activation matching, which permute. Networks without BatchNorm
are shown as they are merged (dashed) and with RESCALE in the merged layers; those with BatchNorm
with RESET, of the merged layers and of the heads.

What the paper found (VGG16 on CIFAR-10, before and after RESCALE): Preserve-First Merging is better
than partial zipping for all numbers of unmerged layers except two. Taken here as: of the l tried
from 2 to L - 1, it is behind at no more than two in twelve, and ahead at over half, each by more
than two standard errors of an accuracy on so many test images. (At l = 1 both are the fully merged
network: the first layer and the last one are affine, so that averages of their results are those of
their kernels.)

What came out here (CIFAR-10: vgg16 at 0.25 of the width, midpoints with l layers apart, 5,000 test
images, 491 s on 2 CPU cores): Edge models of 84.3 and 83.6, ensemble 85.5; fully merged with
RESCALE 70.7 (ZipIt!) and 71.2 (activation matching). With ZipIt! the edge models' mean is first
reached by PFM at l = 10 (1.55 times the parameters, 1.94 the FLOPs), partial zip at none of these l
and both ends at none of these l. As in the paper: with ZipIt! and no normalisation PFM is ahead of
partial zipping at 7 and behind at 0 of 7 l (by over two standard errors), +6.4 points on average;
with ZipIt! and RESCALE PFM is ahead of partial zipping at 7 and behind at 0 of 7 l (by over two
standard errors), +6.4 points on average; with activation matching and no normalisation PFM is ahead
of partial zipping at 7 and behind at 0 of 7 l (by over two standard errors), +6.7 points on
average; with activation matching and RESCALE PFM is ahead of partial zipping at 7 and behind at 0
of 7 l (by over two standard errors), +7.0 points on average. Not in the paper: with ZipIt! and
RESCALE keeping layers apart at both ends gives -4.5 points against PFM; with activation matching
and RESCALE keeping layers apart at both ends gives -4.0 points against PFM.

What came out here (CIFAR-10: vgg16-bn at 0.125 of the width, midpoints with l layers apart, 5,000
test images, 284 s on 2 CPU cores): Edge models of 80.0 and 80.4, ensemble 82.1; fully merged with
RESET 60.6 (ZipIt!) and 59.6 (activation matching). With ZipIt! the edge models' mean is first
reached by PFM at l = 10 (1.55 times the parameters, 1.94 the FLOPs), partial zip at none of these l
and both ends at none of these l. As in the paper: with ZipIt! and RESET PFM is ahead of partial
zipping at 7 and behind at 0 of 7 l (by over two standard errors), +7.0 points on average; with
activation matching and RESET PFM is ahead of partial zipping at 7 and behind at 0 of 7 l (by over
two standard errors), +6.8 points on average. Unlike the paper: with activation matching and no
normalisation PFM is ahead of partial zipping at 4 and behind at 2 of 7 l (by over two standard
errors), +7.1 points on average. Not in the paper: with ZipIt! and RESET keeping layers apart at
both ends gives -5.8 points against PFM; with activation matching and RESET keeping layers apart at
both ends gives -5.8 points against PFM.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import _pairs
import numpy as np
from tqdm import tqdm

from vfjax import plot

# Test and statistics images; None for all.
SAMPLES = {"cpu": 5_000, "paper": None}
MATCHES = ("zipit", "activation")
KINDS = {
    "pfm": "first l apart (PFM)",
    "partial": "last l apart (partial zip)",
    "both": "half of l at each end",
}
# In tables and sentences.
SHORT = {"pfm": "PFM", "partial": "partial zip", "both": "both ends"}
REMEDIES = {"none": "no normalisation", "rescale": "RESCALE", "reset": "RESET"}
# Share of the l at which PFM may be behind, as the paper's is.
EXCEPT = 2 / 12


# -------------------------------------------------------------------------------------- options


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="pfm_vs_partial_zip.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(p, examples="vgg16, vgg16-bn, resnet20, digits-mlp")
    p.add_argument(
        "--match",
        nargs="+",
        default=list(MATCHES),
        choices=tuple(_pairs.MATCHES),
        metavar="M",
        help="how units of the two networks are matched, a panel each: "
        f"{_common.joined(list(_pairs.MATCHES))} (default: {_common.joined(list(MATCHES))})",
    )
    _pairs.matching_options(p)
    p.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="l",
        help="numbers of layers that are kept apart (default: 0, 2, 4 ... and L - 1)",
    )
    p.add_argument(
        "--samples",
        type=_common.count_of("images"),
        metavar="N",
        help=f"test images, the first N (default: {SAMPLES['cpu']:,}; all with --preset paper)",
    )
    p.add_argument(
        "--statistics",
        type=_common.count_of("images"),
        metavar="N",
        help="training images, the first N, not augmented, for matching and renormalisation "
        f"(default: {SAMPLES['cpu']:,}; all with --preset paper)",
    )
    _common.folder_options(p)
    return p


def default_layers(depth: int) -> list[int]:
    """The numbers of layers that are kept apart.

    Example:
      >>> default_layers(14), default_layers(5)
      ([0, 2, 4, 6, 8, 10, 12, 13], [0, 2, 4])
    """
    return sorted({*range(0, depth, 2), depth - 1})


def merged_of(kind: str, layers: int, depth: int) -> slice:
    """Which layers are merged where `layers` are kept apart.

    Example:
      >>> [merged_of(kind, 3, 14) for kind in KINDS]
      [slice(3, 14, None), slice(0, 11, None), slice(2, 13, None)]
    """
    first = {"pfm": layers, "partial": 0, "both": (layers + 1) // 2}[kind]
    return slice(first, first + depth - layers)


# ------------------------------------------------------------------------------------- measuring


def curves_of(
    pair: _pairs.Pair,
    matching: _pairs.Matching,
    layers: Sequence[int],
    remedy: str,
    done: Callable[[], Any],
) -> dict[str, dict[str, Any]]:
    """By kind, cost and accuracies for each l; calls `done` after each merged network.

    What two kinds merge alike, as all do at l = 0, is measured once.
    """
    depth, known = pair.net.depth, {}

    def measured(kind: str, number: int) -> dict[str, Any]:
        part = merged_of(kind, number, depth)
        place = part.start, part.stop
        if place not in known:
            known[place] = cells_of(pair, matching, part, remedy, f"{SHORT[kind]} {number}/{depth}")
            done()
        return known[place]

    curves = {}
    for kind in KINDS:
        cells = [measured(kind, number) for number in layers]
        curves[kind] = {key: [cell[key] for cell in cells] for key in cells[0]}
    return curves


def cells_of(
    pair: _pairs.Pair, matching: _pairs.Matching, part: slice, remedy: str, description: str
) -> dict[str, Any]:
    """Cost of one merged network, and its accuracy and loss before and after the remedy."""
    merged = pair.merged(matching, part)
    test = _pairs.at_cut(merged, pair.test)
    found: dict[str, Any] = {"params": merged.params, "flops": merged.flops}
    for name in ("none", remedy):
        if name == "none" and pair.lacks_variances(matching, merged):
            found[name] = None
            continue
        network = merged
        if name != "none":
            network = pair.renormalised(name, matching, merged, pair.statistics)
        batches = test if network.stems is merged.stems else pair.test
        found[name] = pair.evaluate(network, batches, f"{description} {REMEDIES[name]}")
    return found


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    count = args.statistics or SAMPLES[args.preset]
    samples = args.samples or SAMPLES[args.preset]
    matches = list(dict.fromkeys(args.match))
    _pairs.check(args, matches)
    watch = _common.Stopwatch()
    models = _edges.found(args, watch, train=count, test=samples)
    net = models.net
    layers = default_layers(net.depth) if args.layers is None else sorted(set(args.layers))
    wrong = [number for number in layers if not 0 <= number < net.depth]
    if wrong:
        most = net.depth - 1
        raise _common.UserError(f"--layers must be from 0 to L - 1 = {most}, got {wrong[0]}.")
    remedy = "reset" if net.norms else "rescale"
    statistics, test = models.batches("train", count), models.batches("test", samples)
    with watch("statistics of edge models"):
        pair = _pairs.Pair(net, models.trees, (0.5, 0.5), statistics, test, matches)
    with watch("matching"):
        matchings = {match: pair.matching(match, vars(args)) for match in matches}
    with watch("edge models and ensemble"):
        edges = pair.edges()
    places = {
        (part.start, part.stop)
        for kind, number in itertools.product(KINDS, layers)
        for part in [merged_of(kind, number, net.depth)]
    }
    curves = {}
    with tqdm(total=len(places) * len(matches), unit="network", leave=False) as bar:
        for match, matching in matchings.items():
            bar.set_description(_pairs.MATCHES[match])
            with watch(_pairs.MATCHES[match]):
                curves[match] = curves_of(pair, matching, layers, remedy, bar.update)
    config = vars(args) | {"model": models.arch.name, "width": models.arch.width}
    record: dict[str, Any] = {
        "experiment": "pfm_vs_partial_zip",
        "command": command,
        "config": config | {"match": matches, "layers": layers},
        **models.record(statistics, test),
        "seeds": {"edge_models": models.seeds, "matching": 0},
        "matchings": {match: matching.record for match, matching in matchings.items()},
        "layers": layers,
        "remedy": remedy,
        "edges": edges,
        "edge_mean": float(np.mean([edges[f"model {k}"]["accuracy"] for k in (1, 2)])),
        "curves": curves,
    }
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


# ------------------------------------------------------------------------------ record and figure


def title_of(record: dict[str, Any]) -> str:
    """Data, models, what is compared, images."""
    images = record["data"]["test_images"]
    return f"{_edges.networks(record)}, midpoints with l layers apart, {images:,} test images"


def accuracies(record: Mapping[str, Any], match: str, kind: str, name: str) -> list[float]:
    """A curve in per cent; NaN where nothing could be measured."""
    cells = record["curves"][match][kind][name]
    return [float("nan") if cell is None else 100 * cell["accuracy"] for cell in cells]


def figure_of(record: dict[str, Any]) -> Any:
    """Accuracy against l, a panel for each matching; against cost for the first of them."""
    layers, depth, remedy = record["layers"], record["model"]["depth"], record["remedy"]
    ensemble = 100 * record["edges"]["ensemble"]["accuracy"]

    def levels(ends: Sequence[float]) -> dict[str, plot.Curve]:
        values = {"edge models' mean": 100 * record["edge_mean"], "ensemble": ensemble}
        return {
            name: plot.Curve(ends, [value] * 2, colour=colour, dashed=True)
            for (name, value), colour in zip(values.items(), (6, 5), strict=True)
        }

    row = []
    for match in record["curves"]:
        curves = {}
        for colour, kind in enumerate(KINDS):
            values = accuracies(record, match, kind, remedy)
            curves[f"{SHORT[kind]}, {REMEDIES[remedy]}"] = plot.Curve(layers, values, colour=colour)
        for colour, kind in enumerate(list(KINDS)[:2]):
            values = accuracies(record, match, kind, "none")
            if not np.isnan(values).all():
                plain = plot.Curve(layers, values, colour=colour, dashed=True)
                curves[f"{SHORT[kind]}, without"] = plain
        curves |= levels([layers[0], layers[-1]])
        title = _pairs.title_of(match, record["config"])
        x_label = f"layers kept apart, l (of L = {depth})"
        row.append(plot.Panel(title, x_label, "test accuracy (%)", curves, y_limits=(0, 101)))
    match = next(iter(record["curves"]))
    for key, what in (("params", "parameters"), ("flops", "FLOPs")):
        curves, total = {}, record["model"]["parameters" if key == "params" else "flops"]
        for colour, kind in enumerate(KINDS):
            costs = np.asarray(record["curves"][match][kind][key]) / total
            values = accuracies(record, match, kind, remedy)
            curves[f"{SHORT[kind]}, {REMEDIES[remedy]}"] = plot.Curve(
                costs.tolist(), values, colour=colour
            )
        title = f"{_pairs.title_of(match, record['config'])}: accuracy for {what}"
        x_label = f"{what}, relative to one model"
        # As high as the curves, which are close together once they are renormalised.
        row.append(plot.Panel(title, x_label, "test accuracy (%)", curves | levels([1.0, 2.0])))
    return plot.panels(row, title=record["title"], columns=2)


def claims_of(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """Whether the first layers are the better ones to keep apart, and what else was seen."""
    remedy, depth = record["remedy"], record["model"]["depth"]
    between = [k for k, number in enumerate(record["layers"]) if 1 < number < depth]
    images = record["data"]["test_images"]
    claims: list[tuple[bool | None, str]] = []
    for match in record["curves"]:
        name = _pairs.title_of(match, record["config"])
        for column in ("none", remedy):
            pfm, partial, both = (
                np.asarray(accuracies(record, match, kind, column))[between] for kind in KINDS
            )
            if np.isnan(pfm).all() or not between:
                continue
            margin = np.array([100 * _common.noise(value / 100, images) for value in partial])
            ahead, behind = int((pfm > partial + margin).sum()), int((pfm < partial - margin).sum())
            gap, setting = float((pfm - partial).mean()), f"with {name} and {REMEDIES[column]}"
            text = (
                f"{setting} PFM is ahead of partial zipping at {ahead} and behind at {behind} of "
                f"{len(between)} l (by over two standard errors), {gap:+.1f} points on average"
            )
            holds = behind <= EXCEPT * len(between) and 2 * ahead > len(between)
            claims.append((holds, text))
            if column == remedy:
                text = f"{setting} keeping layers apart at both ends gives "
                text += f"{float((both - pfm).mean()):+.1f} points against PFM"
                claims.append((None, text))
    return claims


def first_reaching(record: Mapping[str, Any], match: str, kind: str) -> int | None:
    """The place of the first l at which a curve reaches the edge models' mean."""
    values = accuracies(record, match, kind, record["remedy"])
    found = (k for k, value in enumerate(values) if value >= 100 * record["edge_mean"])
    return next(found, None)


def outcome(record: dict[str, Any]) -> tuple[str, _common.Claims]:
    """The edge models, and where merged networks reach them, in sentences; and the claims."""
    edges = [f"{100 * record['edges'][f'model {k}']['accuracy']:.1f}" for k in (1, 2)]
    intro = (
        f"Edge models of {_common.joined(edges)}, ensemble "
        f"{100 * record['edges']['ensemble']['accuracy']:.1f}; fully merged with "
        f"{REMEDIES[record['remedy']]} "
    )
    if record["layers"][0] == 0:
        merged = [
            f"{accuracies(record, match, 'pfm', record['remedy'])[0]:.1f} "
            f"({_pairs.title_of(match, record['config'])})"
            for match in record["curves"]
        ]
        intro += _common.joined(merged) + "."
    total = record["model"]
    match = next(iter(record["curves"]))
    reached = []
    for kind in KINDS:
        place = first_reaching(record, match, kind)
        if place is None:
            reached.append(f"{SHORT[kind]} at none of these l")
            continue
        curve = record["curves"][match][kind]
        reached.append(
            f"{SHORT[kind]} at l = {record['layers'][place]} "
            f"({curve['params'][place] / total['parameters']:.2f} times the parameters, "
            f"{curve['flops'][place] / total['flops']:.2f} the FLOPs)"
        )
    intro += (
        f" With {_pairs.title_of(match, record['config'])} the edge models' mean is first reached "
        f"by {_common.joined(reached)}."
    )
    return intro, claims_of(record)


def table_of(record: dict[str, Any], match: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a matching: accuracies by l."""
    columns = [
        (kind, name)
        for name in ("none", record["remedy"])
        for kind in KINDS
        if not np.isnan(accuracies(record, match, kind, name)).all()
    ]
    header = [_pairs.title_of(match, record["config"]) + ", l"]
    for kind, name in columns:
        header.append(SHORT[kind] + ("" if name == "none" else f" + {REMEDIES[name]}"))
    values = [accuracies(record, match, *column) for column in columns]
    rows = [
        [str(number), *(f"{curve[place]:.2f}" for curve in values)]
        for place, number in enumerate(record["layers"])
    ]
    return header, rows


def file_name(record: dict[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    if tuple(config["match"]) != MATCHES or any(
        _pairs.name_of(match, config) != match for match in MATCHES
    ):
        parts += ["+".join(_pairs.name_of(match, config) for match in config["match"])]
    if config["layers"] != default_layers(record["model"]["depth"]):
        parts += ["layers" + "+".join(map(str, config["layers"]))]
    for option in ("samples", "statistics"):
        if config[option] not in (None, SAMPLES[config["preset"]]):
            parts += [f"{option}{config[option]}"]
    return _edges.file_name(record, parts)


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    caption = f"accuracy, %; edge models' mean: {100 * record['edge_mean']:.2f}, ensemble: "
    caption += f"{100 * record['edges']['ensemble']['accuracy']:.2f}"
    for match in record["curves"]:
        _common.print_table(record["title"], *table_of(record, match), caption=caption)
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
