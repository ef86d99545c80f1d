"""Preserve-First Merging of vision transformers that optimal transport has fused: table 5.

    python experiments/vit_transport.py                      # the shipped pair, CIFAR-10
    python experiments/vit_transport.py --samples 200        # as few statistics images as OTFusion
    python experiments/vit_transport.py --dataset digits     # half a minute, needs no data
    python experiments/vit_transport.py --retrain --preset paper    # full size, on a GPU

Edge models are found as by `cifar_pfm.py`: two shipped ones that differ in their random seed. For
the digits two small ones are trained on the spot.

The first k blocks of both networks are kept apart, with what comes before them, and their results
averaged; the rest is merged ("PFM k/B" of B blocks; k = 0 is full merging). Columns say what became
of the units of the second network before: nothing (direct); they were permuted to those of the
first whose activations correlate best (AM); or they were sent to them by the transport plans of
least total distance between activations, exact (OT-acts) or by Sinkhorn's iteration, which mixes
units (OT-acts soft), or of incoming weights (OT-weights). Units are those of the residual stream,
which all layers share, hidden units of the perceptrons, heads, and dimensions inside heads.

Soft plans need a control. The softer they are, the more each unit of the second network becomes the
mean of all, up to the uniform plan, which is the last column: it matches nothing, and what little
remains of the second network hardly disturbs the first. Only what is above it is due to matching.
The second panel shows the exact plans of one kind of units alone, the others being left in place.
The third has all plans from exact to uniform, by the weight of the entropy, on training images that
come after those that statistics are measured on. The weight with the best mean over k, from a few
in between, is that of the soft plans elsewhere. The edge models have seen these images in training.

What the paper found (table 5; 12.4 million parameters, per cent): models of 93.3, ensemble 93.4. At
k = 0 direct averaging gives 7.6, transport 61.5; at k = 3 to 6 direct 28.5, 42.4, 71.3 and 89.4,
transport 73.8, 85.0, 88.5 and 90.8. Taken here as: wherever direct averaging is well below the edge
models, transport is above it; with k the accuracy of transport rises by 5 points or more, and
nowhere falls by more than a point; with all blocks but one kept it is within 3 points of the edge
models, and above direct averaging. Above is by more than two standard errors of an accuracy on so
many test images, and well below by more than four.

What came out here (CIFAR-10: vit at 0.125 of the width, statistics over 2,000 images, 3,000 test
images, 442 s on 2 CPU cores): Edge models of 67.5 and 68.5, ensemble 70.5. As in the paper: from k
= 0 to 7 OT-acts goes from 20.3 to 68.5, its least step being 2.6; at k = 0, 1, 2, 3, 4 and 5
OT-acts soft (0.2) gives 37.6, 44.5, 52.5, 58.7, 62.3 and 65.6, direct averaging 7.3, 18.7, 29.5,
47.9, 58.1 and 63.7: above by over two standard errors everywhere; from k = 0 to 7 OT-acts soft
(0.2) goes from 37.6 to 67.5, its least step being 0.9. Unlike the paper: at k = 0, 1, 2, 3, 4 and 5
OT-acts gives 20.3, 28.3, 39.5, 50.2, 57.8 and 62.4, direct averaging 7.3, 18.7, 29.5, 47.9, 58.1
and 63.7: above by over two standard errors at k = 0, 1, 2 and 3. Not in the paper: with 6 of 7
blocks kept OT-acts gives 65.9, direct averaging 66.3, the edge models 68.0: direct averaging is
near them by itself; with 6 of 7 blocks kept OT-acts soft (0.2) gives 66.7, direct averaging 66.3,
the edge models 68.0: direct averaging is near them by itself; at k = 0, 1, 2, 3, 4 and 5 AM 26.1,
36.4, 46.8, 55.0, 60.2 and 64.1, OT-weights 14.7, 23.3, 34.1, 49.8, 57.3 and 61.7 and uniform plan
37.8, 44.1, 53.2, 58.3, 62.3 and 65.4; of these, over two standard errors above the uniform plan,
which matches nothing, OT-acts nowhere; OT-acts soft (0.2) nowhere; there, exact plans of one kind
of units give: residual stream 12.1, 20.4, 35.5, 48.1, 57.7 and 63.6, hidden units 9.9, 21.5, 30.2,
48.7, 58.9 and 64.7, heads and their dimensions 12.3, 21.0, 34.9, 48.5, 59.1 and 64.0; on held-out
images, mean over all k, exact plans give 50.9, those with entropy of weight 0.02, 0.05, 0.1 and 0.2
give 54.6, 58.6, 59.8 and 60.2, and the uniform plan 60.5.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _edges
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import vfjax
from vfjax import align, data, merge, models, plot, stats, train

PyTree = Any

MODELS = ("vit", "deit-tiny")
# Layers of a block that count: query, key and value together, then out, mlp1 and mlp2.
PER_BLOCK = 4
# By preset: statistics, held-out and test images.
DEFAULTS = {
    "cpu": {"samples": 2_000, "held_out": 1_000, "test": 3_000},
    "paper": {"samples": 10_000, "held_out": 2_000, "test": 10_000},
}
# Weights of the entropy, in parts of the mean distance: from next to exact to next to uniform.
REGULARIZATIONS = (0.02, 0.05, 0.1, 0.2)
UNIFORM = 1e3
LABELS = {
    "direct": "direct",
    "permuted": "AM",
    "exact": "OT-acts",
    "soft": "OT-acts soft",
    "weights": "OT-weights",
    "uniform": "uniform plan",
}
KINDS = {
    "stream": "residual stream",
    "hidden": "hidden units",
    "attention": "heads and their dimensions",
}
# What claims are decided by.
MARGIN, LEAST, NEAR = 0.01, 0.05, 0.03

# Those trained for the digits, in seconds.
DIGITS = models.ViT(blocks=3, patch=4, features=32, heads=4)
DIGITS_RECIPE = train.Recipe(
    optimizer="adamw",
    learning_rate=2e-3,
    schedule="cosine",
    warmup_epochs=2.0,
    epochs=20,
    batch_size=100,
    weight_decay=0.05,
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="vit_transport.py", description=__doc__, formatter_class=_common.Help
    )
    _edges.edge_options(p, examples="vit, vit-w0.25")
    # A pair, so that argparse does not take it for what was typed.
    p.set_defaults(model=("vit", None))
    p.add_argument(
        "--blocks",
        type=int,
        nargs="+",
        metavar="k",
        help="numbers of leading blocks that are kept apart, one row each (default: all)",
    )
    p.add_argument(
        "--regularization",
        type=_regularization,
        metavar="R",
        help="weight of the entropy in soft plans, in parts of the mean distance (default: that of "
        f"{', '.join(map(str, REGULARIZATIONS))} which is best on held-out images)",
    )
    for name, what in (
        ("samples", "statistics images: the first N of the training split, not augmented"),
        (
            "held_out",
            "training images after these that choose how soft plans are; at most a fifth ",
        ),
        ("test", "test images, the first N"),
    ):
        of = {preset: f"{values[name]:,}" for preset, values in DEFAULTS.items()}
        what += "of a split that is too small for both" if name == "held_out" else ""
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=_common.count_of("images"),
            metavar="N",
            help=f"{what} (default: {of['cpu']}; with --preset paper {of['paper']})",
        )
    _common.folder_options(p)
    return p


def _regularization(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


# ---------------------------------------------------------------------------------- edge models


def rows_of(args: argparse.Namespace, dataset: str) -> tuple[list[int], int]:
    """The numbers of blocks kept apart, a row each, and how many blocks there are."""
    model = DIGITS if dataset == "digits" else models.create(args.model[0])
    rows = sorted(set(range(model.blocks + 1) if args.blocks is None else args.blocks))
    if not 0 <= rows[0] <= rows[-1] <= model.blocks:
        wrong = next(k for k in args.blocks if not 0 <= k <= model.blocks)
        raise _common.UserError(f"--blocks must be from 0 to {model.blocks}, got {wrong}.")
    return rows, model.blocks


def probed(args: argparse.Namespace) -> data.Dataset:
    """Finds out which images there are, and whether the options go with them."""
    if args.model[0] not in MODELS:
        raise _common.UserError(f"--model must be a vision transformer: {' or '.join(MODELS)}.")
    if args.preset == "paper" and args.dataset != "digits" and not args.retrain:
        raise _common.UserError("no models of --preset paper are shipped: give --retrain, too.")
    found = _edges.probed(args.dataset, args.data_dir)
    asked = args.preset == "paper" or args.retrain or args.model != ("vit", None)
    if found.name == "digits" and asked:
        why = "--dataset digits"
        if found.fallback:
            why = "CIFAR-10 was not found, give --data-dir; for the digits it"
        raise _common.UserError(
            f"{why} trains its own small networks: leave out --model, --retrain and --preset paper."
        )
    return found


def edges_of(
    args: argparse.Namespace, watch: _common.Stopwatch, probe: data.Dataset
) -> _edges.Edges:
    """The two networks: small ones trained here for the digits, else as the options have it."""
    if probe.name != "digits":
        return _edges.found(args, watch, train=args.samples + args.held_out, test=args.test)
    with watch("data"):
        dataset = _edges.whole(probe, args.data_dir, test=args.test)
    x = jax.ShapeDtypeStruct((_edges.BATCH, *dataset.test_images.shape[1:]), jnp.float32)
    with watch("trace"):
        variables = jax.eval_shape(DIGITS.init, jax.random.key(0), x)
        net = vfjax.trace(models.apply_fn(DIGITS), variables, x)
    with watch("training"):
        trees = [train.fit(DIGITS, DIGITS_RECIPE, dataset, seed=s).variables for s in (0, 1)]
    arch = _edges.Architecture("vit", 1.0, "digits")
    return _edges.Edges(arch, dataset, net, (), (), trees)


@dataclasses.dataclass(frozen=True)
class Images:
    """Batches: to measure statistics on, to choose on, to test on."""

    statistics: data.Batches
    held_out: data.Batches
    test: data.Batches


def images_of(args: argparse.Namespace, dataset: data.Dataset) -> Images:
    """The images; none is in two of the three."""
    images, labels = dataset.train_images, dataset.train_labels
    kept = min(args.held_out, max(len(images) // 5, len(images) - args.samples))

    def training(part: slice) -> data.Batches:
        return data.Batches(images[part], labels[part], dataset.mean, dataset.std, _edges.BATCH)

    first = min(args.samples, len(images) - kept)
    return Images(
        training(slice(first)),
        training(slice(first, first + kept)),
        dataset.batches("test", batch_size=_edges.BATCH, samples=args.test),
    )


# ------------------------------------------------------------------------------------- merging


def layers_of(blocks: int) -> int:
    """How many layers are kept apart with so many blocks.

    Example:
      >>> layers_of(0), layers_of(2)
      (0, 9)
    """
    return 1 + PER_BLOCK * blocks if blocks else 0


def kind_of(net: vfjax.Network, group: str) -> str:
    """What the units of a group are, a key of `KINDS`."""
    paths = {axis.path for axis in net.spec.groups[group]}
    if any(path.endswith("positions") for path in paths):
        return "stream"
    return "attention" if any("attention" in path for path in paths) else "hidden"


def only(found: align.Maps, groups: Callable[[str], bool]) -> align.Maps:
    """The maps of some groups; the others stay in place."""
    maps = tuple({g: pair for g, pair in of.items() if groups(g)} for of in found.maps)
    return dataclasses.replace(found, maps=maps)


def maps_of(
    net: vfjax.Network, trees: Sequence[PyTree], moments: stats.Moments
) -> dict[str, align.Maps]:
    """What becomes of the units, by column, but for the soft plans."""
    permutations = align.match_moments(net, moments).permutations
    return {
        "direct": align.Maps.of_permutations([None, None]),
        "permuted": align.Maps.of_permutations([None, permutations]),
        "exact": align.transport_moments(net, moments),
        "weights": align.transport(net, trees, on="weights"),
        "uniform": align.transport_moments(net, moments, regularization=UNIFORM),
    }


def evaluate(merged: merge.Merged, images: data.Batches) -> dict[str, float]:
    """Accuracy and loss."""
    found = train.evaluate(_edges.forward, merged, images)
    return {"accuracy": found.accuracy, "loss": found.loss}


def merged_of(
    net: vfjax.Network, trees: Sequence[PyTree], maps: align.Maps, blocks: int
) -> merge.Merged:
    """PFM with so many blocks kept apart."""
    return merge.partial(net, trees, maps, merged=slice(layers_of(blocks), None))


def softness_of(
    net: vfjax.Network,
    trees: Sequence[PyTree],
    plans: Mapping[float, align.Maps],
    blocks: Sequence[int],
    images: data.Batches,
) -> dict[float, list[float]]:
    """Accuracies on held-out images by weight of the entropy, a list over `blocks`."""
    found: dict[float, list[float]] = {value: [] for value in plans}
    with tqdm(total=len(plans) * len(blocks), desc="how soft", unit="cell", leave=False) as bar:
        for k in blocks:
            for value, maps in plans.items():
                found[value].append(evaluate(merged_of(net, trees, maps, k), images)["accuracy"])
                bar.update()
    return found


# ------------------------------------------------------------------------------ record and table


def experiment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures everything; returns the record."""
    for name, default in DEFAULTS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    watch = _common.Stopwatch()
    with watch("data"):
        probe = probed(args)
    rows, count = rows_of(args, probe.name)
    found = edges_of(args, watch, probe)
    net, trees, images = found.net, found.trees, images_of(args, found.dataset)
    with watch("statistics of edge models"):
        moments = stats.moments(
            net,
            trees,
            _common.Watched(images.statistics, "statistics of edge models"),
            sites="taps",
            covariance="cross",
        )
    candidates = [args.regularization] if args.regularization else REGULARIZATIONS
    with watch("matching"):
        maps = maps_of(net, trees, moments)
        plans = {r: align.transport_moments(net, moments, regularization=r) for r in candidates}
        plans = {0.0: maps["exact"], **plans, UNIFORM: maps["uniform"]}
    with watch("how soft"):
        softness = softness_of(net, trees, plans, rows, images.held_out)
    # The first of equals: the closest to exact.
    chosen = max(candidates, key=lambda value: float(np.mean(softness[value])))
    maps = {name: plans[chosen] if name == "soft" else maps[name] for name in LABELS}
    with watch("edge models and ensemble"):
        lines = {
            f"model {k}": evaluate(merge.as_merged(net, tree), images.test)
            for k, tree in enumerate(trees, start=1)
        }
        lines["ensemble"] = evaluate(merge.ensemble(net, trees), images.test)
    parts = {
        kind: only(maps["exact"], lambda group, kind=kind: kind_of(net, group) == kind)
        for kind in KINDS
    }
    cells: dict[str, dict[str, list[dict[str, float]]]] = {"columns": {}, "kinds": {}}
    with tqdm(total=len(rows) * (len(maps) + len(parts)), unit="cell", leave=False) as bar:
        for k in rows:
            with watch(f"PFM {k}/{count}"):
                for kind, of in (("columns", maps), ("kinds", parts)):
                    for name, value in of.items():
                        cell = evaluate(merged_of(net, trees, value, k), images.test)
                        cells[kind].setdefault(name, []).append(cell)
                        bar.update()
    costs = [merged_of(net, trees, maps["direct"], k) for k in rows]
    config = vars(args) | {"model": found.arch.name, "width": found.arch.width, "blocks": rows}
    record: dict[str, Any] = {
        "experiment": "vit_transport",
        "command": command,
        "config": config,
        **found.record(images.statistics, images.test),
        "seeds": {"edge_models": found.seeds or [0, 1]},
        "blocks": rows,
        "layers": [layers_of(k) for k in rows],
        "regularization": {
            "chosen": chosen,
            "held_out_accuracy": {f"{value:g}": found for value, found in softness.items()},
        },
        "edges": lines,
        "edge_mean": (lines["model 1"]["accuracy"] + lines["model 2"]["accuracy"]) / 2,
        **cells,
        "params": [merged.params for merged in costs],
        "flops": [merged.flops for merged in costs],
    }
    record["model"]["blocks"] = count
    record["data"]["held_out_images"] = len(images.held_out.images)
    record["title"] = title_of(record)
    record["seconds"] = watch.record()
    return record | _common.environment()


def title_of(record: Mapping[str, Any]) -> str:
    """Data, models, images."""
    images = record["data"]
    parts = [_edges.networks(record), f"statistics over {images['statistics_images']:,} images"]
    return ", ".join([*parts, f"{images['test_images']:,} test images"])


def accuracies(record: Mapping[str, Any], name: str, of: str = "columns") -> list[float]:
    """A column, or a kind of units, by row."""
    return [cell["accuracy"] for cell in record[of][name]]


def label_of(record: Mapping[str, Any], column: str) -> str:
    """A column, as in legends and tables."""
    soft = f" ({record['regularization']['chosen']:g})" if column == "soft" else ""
    return LABELS[column] + soft


def figure_of(record: Mapping[str, Any]) -> Any:
    """Accuracy against k: by column, and with one kind of units matched alone."""
    rows, count = record["blocks"], record["model"]["blocks"]
    ends = [min(rows), max(rows)]

    def curve(values: Sequence[float], colour: int, **style: Any) -> plot.Curve:
        return plot.Curve(rows, [100 * value for value in values], colour=colour, **style)

    def level(value: float, colour: int) -> plot.Curve:
        return plot.Curve(ends, [100 * value] * 2, colour=colour, dashed=True)

    goals = {
        "edge models' mean": level(record["edge_mean"], 6),
        "ensemble": level(record["edges"]["ensemble"]["accuracy"], 7),
    }
    columns = {
        label_of(record, name): curve(accuracies(record, name), colour, dashed=name == "uniform")
        for colour, name in enumerate(LABELS)
    }
    kinds = {"none (direct)": columns[LABELS["direct"]]}
    for colour, (kind, label) in enumerate(KINDS.items(), start=3):
        kinds[label] = curve(accuracies(record, kind, "kinds"), colour)
    kinds["all (OT-acts)"] = columns[LABELS["exact"]]
    x, y = f"blocks kept apart, k (of {count})", "test accuracy (%)"
    held_out = "accuracy on held-out training images (%)"
    softness = record["regularization"]["held_out_accuracy"]
    soft = {
        {"0": "exact", f"{UNIFORM:g}": "uniform"}.get(value, value): curve(
            values, colour, dashed=colour == len(softness) - 1
        )
        for colour, (value, values) in enumerate(softness.items())
    }
    panels = [
        plot.Panel("by what was matched how", x, y, columns | goals, y_limits=(0, 101)),
        plot.Panel("exact plans of some units only", x, y, kinds | goals, y_limits=(0, 101)),
        plot.Panel("weight of the plans' entropy", x, held_out, soft, y_limits=(0, 101)),
    ]
    return plot.panels(panels, title=record["title"])


def listed(values: Sequence[float]) -> str:
    """Accuracies in a sentence.

    Example:
      >>> listed([0.1, 0.25, 0.5])
      '10.0, 25.0 and 50.0'
    """
    return _common.joined([f"{100 * value:.1f}" for value in values])


def _places(at: Sequence[str], all_of: Sequence[int]) -> str:
    """Where something is so, of the k compared.

    Example:
      >>> _places(["0", "2"], [0, 1, 2]), _places([], [0, 1]), _places(["0"], [0])
      ('at k = 0 and 2', 'nowhere', 'everywhere')
    """
    if len(at) == len(all_of):
        return "everywhere"
    return f"at k = {_common.joined(at)}" if at else "nowhere"


def claims_of(record: Mapping[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper, for exact and soft plans, and what the paper has nothing on."""
    rows, edge = record["blocks"], record["edge_mean"]
    table = {name: accuracies(record, name) for name in LABELS}
    count = record["model"]["blocks"]
    images = record["data"]["test_images"]
    noise = [_common.noise(value, images) for value in table["direct"]]
    # With room for more than noise on either side.
    low = [i for i, value in enumerate(table["direct"]) if value < edge - 2 * noise[i]]
    at = f"k = {_common.joined([str(rows[i]) for i in low])}"
    claims: list[tuple[bool | None, str]] = []
    for name in ("exact", "soft"):
        values, label = table[name], label_of(record, name)
        if low:
            pair = [listed([table[column][i] for i in low]) for column in (name, "direct")]
            ahead = [values[i] - table["direct"][i] for i in low]
            above = [str(rows[i]) for i, by in zip(low, ahead, strict=True) if by > noise[i]]
            below = [str(rows[i]) for i, by in zip(low, ahead, strict=True) if by < -noise[i]]
            where = f"above by over two standard errors {_places(above, low)}"
            where += f", below {_places(below, low)}" if below else ""
            claims.append(
                (
                    len(above) == len(low),
                    f"at {at} {label} gives {pair[0]}, direct averaging {pair[1]}: {where}",
                )
            )
        rise = values[-1] - values[0]
        steps = [b - a for a, b in zip(values, values[1:], strict=False)]
        claims.append(
            (
                rise >= LEAST and min(steps) >= -MARGIN,
                f"from k = {rows[0]} to {rows[-1]} {label} goes from {listed([values[0]])} to "
                f"{listed([values[-1]])}, its least step being {100 * min(steps, default=0):.1f}",
            )
        )
        if count - 1 in rows:
            place = rows.index(count - 1)
            value, direct = values[place], table["direct"][place]
            # Where averaging alone comes near, transport has nothing to show.
            near = None if direct > edge - NEAR else value > max(edge - NEAR, direct + noise[place])
            claims.append(
                (
                    near,
                    f"with {count - 1} of {count} blocks kept {label} gives {listed([value])}, "
                    f"direct averaging {listed([direct])}, the edge models {listed([edge])}"
                    f"{': direct averaging is near them by itself' if near is None else ''}",
                )
            )
    if low:
        others = ("permuted", "weights", "uniform")
        found = [f"{LABELS[name]} {listed([table[name][i] for i in low])}" for name in others]
        claims.append((None, f"at {at} {_common.joined(found)}"))
        found = []
        for name in ("exact", "soft"):
            above = [
                str(rows[i])
                for i in low
                if table[name][i] - table["uniform"][i] > _common.noise(table[name][i], images)
            ]
            found.append(f"{label_of(record, name)} {_places(above, low)}")
        text = "of these, over two standard errors above the uniform plan, which matches nothing"
        claims.append((None, f"{text}, {'; '.join(found)}"))
        found = [
            f"{label} {listed([accuracies(record, kind, 'kinds')[i] for i in low])}"
            for kind, label in KINDS.items()
        ]
        claims.append((None, f"there, exact plans of one kind of units give: {', '.join(found)}"))
    means = {
        value: f"{100 * np.mean(values):.1f}"
        for value, values in record["regularization"]["held_out_accuracy"].items()
    }
    exact, *between, uniform = means.values()
    names = _common.joined([value for value in means][1:-1])
    claims.append(
        (
            None,
            f"on held-out images, mean over all k, exact plans give {exact}, those with entropy of "
            f"weight {names} give {_common.joined(between)}, and the uniform plan {uniform}",
        )
    )
    return claims


def outcome(record: Mapping[str, Any]) -> tuple[str, _common.Claims]:
    """The edge models in a sentence, and the paper's claims."""
    values = [edge["accuracy"] for edge in record["edges"].values()]
    intro = f"Edge models of {listed(values[:-1])}, ensemble {listed(values[-1:])}."
    return intro, claims_of(record)


def table_of(
    record: Mapping[str, Any], mark: tuple[str, str] = ("", "")
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table; `mark` goes around what reaches the edge models' mean."""
    header = ["test accuracy, %", *(label_of(record, name) for name in LABELS)]
    header += ["params, M", "ratio", "FLOPs, M", "ratio"]
    base, count = record["model"], record["model"]["blocks"]

    def line(name: str, cells: list[str], params: int, flops: int) -> list[str]:
        cells += [""] * (len(LABELS) - len(cells))
        cells += [f"{params / 1e6:.3g}", f"{params / base['parameters']:.2f}"]
        return [name, *cells, f"{flops / 1e6:.4g}", f"{flops / base['flops']:.2f}"]

    lines = []
    for name, edge in record["edges"].items():
        factor = 2 if name == "ensemble" else 1
        cost = factor * base["parameters"], factor * base["flops"]
        lines.append(line(name, [_common.percent([edge["accuracy"]])], *cost))
    for i, k in enumerate(record["blocks"]):
        cells = []
        for name in LABELS:
            value = accuracies(record, name)[i]
            text = _common.percent([value])
            cells.append(mark[0] + text + mark[1] if value >= record["edge_mean"] else text)
        lines.append(line(f"PFM {k}/{count}", cells, record["params"][i], record["flops"][i]))
    return header, lines


def file_name(record: Mapping[str, Any]) -> str:
    """Name of record and figure, without suffix."""
    config, parts = record["config"], []
    if config["blocks"] != list(range(record["model"]["blocks"] + 1)):
        parts += ["blocks" + "+".join(map(str, config["blocks"]))]
    if config["regularization"]:
        parts += [f"regularization{config['regularization']:g}"]
    for name, default in DEFAULTS[config["preset"]].items():
        if config[name] != default:
            parts += [f"{name.replace('_', '')}{config[name]}"]
    return _edges.file_name(dict(record), parts)


def show(record: Mapping[str, Any]) -> None:
    """Prints a record."""
    mark, name = (("[bold green]", "[/]"), "green") if _common.coloured() else (("*", ""), "*")
    edge = f"{100 * record['edge_mean']:.2f}"
    caption = f"{name}: at or above the mean of the edge models, {edge}"
    _common.print_table(record["title"], *table_of(record, mark), caption=caption)
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
