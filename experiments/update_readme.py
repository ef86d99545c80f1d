r"""Writes what is in `experiments/results/` into the heads of the scripts.

    python experiments/cifar_pfm.py --out experiments/results
    python experiments/cifar_pfm.py --pairs 3 --out experiments/results
    python experiments/cifar_pfm.py --layers 12 13 --out experiments/results
    python experiments/cifar_pfm.py --model resnet20 --out experiments/results
    python experiments/linear_networks.py --out experiments/results
    python experiments/residual_linear.py --out experiments/results
    python experiments/vanishing_feature.py --out experiments/results
    python experiments/vanishing_feature.py --model vgg16-bn --out experiments/results
    python experiments/vanishing_feature.py --model vgg16-bn --match weight \
        --out experiments/results
    python experiments/vanishing_feature.py --model vgg16-ln --out experiments/results
    python experiments/vanishing_feature.py --model resnet20 --out experiments/results
    python experiments/vanishing_feature.py --model resnet20-ln --out experiments/results
    python experiments/normalization.py --out experiments/results
    python experiments/permute_first_layers.py --out experiments/results
    python experiments/permute_first_layers.py --model resnet20 --out experiments/results
    python experiments/training_recipe.py --out experiments/results
    python experiments/cifar_pfm.py --match cca --model vgg16-bn --out experiments/results
    python experiments/cifar_pfm.py --match cca --out experiments/results
    python experiments/cifar_pfm.py --match zipit --out experiments/results
    python experiments/cifar_pfm.py --match zipit --model vgg16-bn --out experiments/results
    python experiments/cifar_pfm.py --match zipit --model resnet20 --out experiments/results
    python experiments/cifar_pfm.py --match transport --out experiments/results
    python experiments/pfm_vs_partial_zip.py --out experiments/results
    python experiments/pfm_vs_partial_zip.py --model vgg16-bn --out experiments/results
    python experiments/zipit_disjoint.py --out experiments/results
    python experiments/vit_transport.py --out experiments/results
    python experiments/multi_dataset.py --out experiments/results
    python experiments/pruning.py --out experiments/results
    python experiments/vanishing_feature_pruned.py --out experiments/results
    python experiments/vanishing_feature_pruned.py --model resnet20 --out experiments/results
    python experiments/update_readme.py

The paragraphs on what came out in the heads of the scripts are written, too. No number in those
places is typed by hand. With `--check` nothing is written, and the exit status says whether all
files are up to date.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import _common
import cifar_pfm
import linear_networks
import multi_dataset
import normalization
import permute_first_layers
import pfm_vs_partial_zip
import pruning
import residual_linear
import training_recipe
import vanishing_feature
import vanishing_feature_pruned
import vit_transport
import zipit_disjoint

README = _common.ROOT / "README.md"
RESULTS = _common.ROOT / "experiments" / "results"
# Which record goes between which markers.
TABLES = {
    "vgg16": "cifar_pfm-cifar10-vgg16-w0.25",
    "pairs": "cifar_pfm-cifar10-vgg16-w0.25-3pairs",
    "late": "cifar_pfm-cifar10-vgg16-w0.25-layers12+13",
    "resnet20": "cifar_pfm-cifar10-resnet20-w0.5",
}
# Which records the head of a script tells of, a paragraph each, by the README's part on them.
MATCHED = (
    "cifar_pfm-cifar10-vgg16-bn-w0.125-cca",
    "cifar_pfm-cifar10-vgg16-w0.25-cca",
    "cifar_pfm-cifar10-vgg16-w0.25-zipit",
    "cifar_pfm-cifar10-vgg16-bn-w0.125-zipit",
    "cifar_pfm-cifar10-resnet20-w0.5-zipit",
    "cifar_pfm-cifar10-vgg16-w0.25-transport",
)
BEYOND = {
    cifar_pfm: MATCHED,
    pfm_vs_partial_zip: (
        "pfm_vs_partial_zip-cifar10-vgg16-w0.25",
        "pfm_vs_partial_zip-cifar10-vgg16-bn-w0.125",
    ),
    zipit_disjoint: ("zipit_disjoint-cifar10-vgg7-bn-w0.5",),
    vit_transport: ("vit_transport-cifar10-vit-w0.125",),
    multi_dataset: ("multi_dataset-digits+mnist+cifar10",),
}
DIAGNOSIS = {
    linear_networks: ("linear_networks-mnist",),
    residual_linear: ("residual_linear-mnist",),
    vanishing_feature: (
        "vanishing_feature-cifar10-vgg16-w0.25",
        "vanishing_feature-cifar10-vgg16-bn-w0.125",
        "vanishing_feature-cifar10-vgg16-bn-w0.125-weight",
        "vanishing_feature-cifar10-vgg16-ln-w0.125",
        "vanishing_feature-cifar10-resnet20-w0.5",
        "vanishing_feature-cifar10-resnet20-ln-w0.25",
    ),
    normalization: ("normalization-cifar10-vgg16-w0.25",),
    permute_first_layers: (
        "permute_first_layers-cifar10-vgg16-w0.25",
        "permute_first_layers-cifar10-resnet20-w0.5",
    ),
    training_recipe: ("training_recipe-mnist",),
}
PRUNING = {
    pruning: (
        "pruning-cifar10-vgg16-bn-w0.125",
        "pruning-cifar10-resnet20-w0.5",
        "pruning-cifar10-resnet20-ln-w0.25",
        "pruning-cifar10-vgg16-ln-w0.125",
        "pruning-cifar10-vgg16-w0.25",
        "pruning-cifar10-convnext-pico-w0.5",
    ),
    vanishing_feature_pruned: (
        "vanishing_feature_pruned-cifar10-vgg16-bn-w0.125",
        "vanishing_feature_pruned-cifar10-resnet20-w0.5",
    ),
}
HEADS = {**DIAGNOSIS, **BEYOND, **PRUNING, cifar_pfm: (TABLES["vgg16"], *MATCHED)}
# What the paper has to compare with, after what was measured here.
PAPER = {
    "vgg16": "In the paper, at full width and with weight decay 1e-4 (here 5e-4), RESCALE leads, "
    "REPAIR is below matching alone, and bias calibration is next to RESCALE: matched 46.5, REPAIR "
    "39.1, RESCALE 84.7 and bias cal. 82.9 at l = 0; 91.2, 87.4, 92.4 and 91.8 at l = 8, with edge "
    "models of 91.8. (It, too, finds REPAIR reliable at large weight decay.)",
    "pairs": "",
    "late": "",
    "resnet20": "In the paper, at full width, RESET gives 64.1 at l = 0.",
}
# What each experiment asks.
ASKED = {
    "linear_networks": "In linear networks the output of each layer is g + h: g is what the input "
    "adds to it, h the offset that the biases make. Which of them survives averaging?",
    "residual_linear": "Do residual connections keep accuracy on the way from one network to "
    "another?",
    "vanishing_feature": "How much is left of the features, layer by layer, in the midpoint of two "
    "networks, relative to the edge models', and what brings them back?",
    "normalization": "Which remedy does best, at every weight of the second network?",
    "permute_first_layers": "How many of the first layers must be matched?",
    "cifar_pfm": "What do matchers give that mix units, where activation matching permutes them?",
    "pfm_vs_partial_zip": "Which end of two networks for one task is better kept apart, the first "
    "layers or the last?",
    "zipit_disjoint": "Can two networks for different classes become one?",
    "vit_transport": "Does optimal transport align vision transformers, and what does keeping "
    "their first blocks apart add?",
    "multi_dataset": "Can networks for different data sets share all layers but the last ones?",
    "pruning": "How much of its accuracy does a pruned network get back by renormalisation?",
    "vanishing_feature_pruned": "Do features vanish in pruned networks as they do in merged ones?",
    "training_recipe": "How must networks be trained to merge well? A barrier is the largest loss "
    "of test accuracy on the way from one network to the other, in points.",
}
# What its results are written in.
LEGENDS = {
    "vanishing_feature": "Matched: units of the second network permuted, by activations (AM) or "
    "weights (WM), before it is averaged with the first; a remedy (REPAIR, RESCALE, RESET, bias "
    "cal.) comes on top of that.",
    "cifar_pfm": "PFM l/L: the first l of L layers kept apart, the others merged (l = 0: all of "
    "them). CCA combines units linearly; AM is activation matching, which permutes them, in the "
    "same run; RESET measures the merged network's BatchNorm statistics anew.",
    "pfm_vs_partial_zip": "l layers are kept apart: the first ones (PFM), the last ones (partial "
    "zip), or half of them at each end; the others are merged.",
    "zipit_disjoint": "ZipIt! l/L: the first l of L layers merged, the others kept apart with a "
    "head for each network; permuted l/L likewise, after a permutation of units. alpha: how much "
    "correlations of a merged feature count; beta: the share of the merges that may pair features "
    "of one network. Accuracies are over all classes.",
    "vit_transport": "k: blocks kept apart, the first ones. OT-acts sends units of the second "
    "network to the first by the transport plans of least total distance between activations, "
    "OT-weights between weights; OT-acts soft (R) adds an entropy of weight R to the plans, which "
    "then mix units, up to the uniform plan, under which every unit becomes the mean of all; AM "
    "permutes units by the correlation of activations.",
    "multi_dataset": "l/L: the first l of L layers merged, the others kept apart with a head for "
    "each data set; accuracies are means over data sets.",
    "pruning": "Sparsity: the share of the weights that are pruned. Global magnitude compares all "
    "weights, layerwise magnitude those of a layer, Wanda those of an output, and both Fisher "
    "matrices, of 400 gradients of single images, all weights. RESET measures the pruned network's "
    "BatchNorm statistics anew, on as many training images as the figure says; by as many, REPAIR "
    "gives units the means and deviations that they had before pruning, RESCALE the deviations.",
    "vanishing_feature_pruned": "Ratios are to the network before pruning, means over seeds.",
}
BENCHMARKS = ("routing", "passes", "tracing", "diagnosis", "zip", "scores")
WAITING = "\n*Not measured yet.*\n"


def findings(marker: str, record: dict[str, Any]) -> str:
    """What came out, in sentences."""
    accuracy = {r["name"]: f"{100 * r['cells']['direct']['mean']:.1f}" for r in record["rows"][:3]}
    rows = [row for row in record["rows"] if row["layers"] is not None]
    first, columns, label = rows[0], record["columns"], cifar_pfm.LABELS
    means = {column: first["cells"][column]["mean"] for column in columns}
    given = [f"{label[column]} {100 * means[column]:.1f}" for column in columns]
    leading = label[max(columns, key=lambda column: means[column])]
    reached: dict[int, list[str]] = {}
    for column, layers in record["summary"]["reaches_edges_at"].items():
        if layers is not None:
            reached.setdefault(layers, []).append(label[column])
    never = [
        label[c] for c, layers in record["summary"]["reaches_edges_at"].items() if layers is None
    ]
    firsts = []
    for layers in sorted(reached):
        (row,) = (row for row in rows if row["layers"] == layers)
        cost = f"{row['params_ratio']:.2f} times the parameters, {row['flops_ratio']:.2f} the FLOPs"
        firsts.append(f"by {_common.joined(reached[layers])} at l = {layers} ({cost})")
    edge = f"The edge models' mean, {100 * record['summary']['edge_mean']:.2f}, is first reached "
    edge += _common.joined(firsts) if firsts else "by no column at these l"
    edge += f", by {_common.joined(never)} at none of these l" if firsts and never else ""
    return (
        f"Models of {accuracy['model 1']} and {accuracy['model 2']}, ensemble "
        f"{accuracy['ensemble']}. At l = {first['layers']}: {_common.joined(given)}, so {leading} "
        f"leads. {edge}. {PAPER[marker]}"
    ).strip()


def table(marker: str, name: str) -> str:
    """The Markdown of a record of `cifar_pfm.py`: table, what it says, how it was made, figure."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return WAITING
    record = json.loads(path.read_text())
    header, lines = cifar_pfm.table_of(record, ("**", "**"))
    notes = (
        "Bold: at or above the mean of the edge models, "
        f"{100 * record['summary']['edge_mean']:.2f}. Made by `{record['command']}` in "
        f"{_common.made_on(record)}, jax {record['versions']['jax']}."
    )
    figure = f"[{record['title']}](experiments/results/{name}.png)"
    # Two points make no picture.
    figure = f"Figure: {figure}" if marker == "late" else f"!{figure}"
    body = _common.markdown_table(header, lines)
    parts = [f"**{record['title']}**", body, findings(marker, record), notes, figure]
    return "\n" + "\n\n".join(parts) + "\n"


def records_of(names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Names and contents of those of some records that are there."""
    paths = {name: RESULTS / f"{name}.json" for name in names}
    return [(name, json.loads(path.read_text())) for name, path in paths.items() if path.exists()]


def outcome(script: ModuleType, record: dict[str, Any]) -> tuple[str, str]:
    """What a record was made with, and what came out."""
    if script is not cifar_pfm or record["config"]["match"] != "activation":
        return record["title"], _common.told(*script.outcome(record))
    title, config = _common.DATASET_LABELS[record["data"]["name"]], record["config"]
    setting = f"{title}, {config['model']} at {config['width']:g} of the width"
    return setting, findings("vgg16", record)


def headed(text: str, script: ModuleType = cifar_pfm) -> str:
    """The text of a script with the last paragraphs of its head brought up to date."""
    records = [record for _, record in records_of(HEADS[script])]
    if not records:
        return text
    paragraphs = []
    for record in records:
        setting, found = outcome(script, record)
        said = f"What came out here ({setting}, {_common.made_on(record)}): {found}"
        paragraphs.append(textwrap.fill(said, 100, break_on_hyphens=False) + "\n")
    paragraph = "\n".join(paragraphs)
    new, count = re.subn(
        r'^What came out here.*?(?=^"""$)', lambda _: paragraph, text, count=1, flags=re.M | re.S
    )
    if not count:
        name = Path(str(script.__file__)).name
        raise ValueError(f'the head of {name} must end with "What came out here ...".')
    return new


def told(scripts: Mapping[ModuleType, Sequence[str]]) -> str:
    """The Markdown of experiments' records: what came out, of each experiment the first in full."""
    parts = []
    for script, names in scripts.items():
        experiment = Path(str(script.__file__)).stem
        for place, (name, record) in enumerate(records_of(names)):
            intro, claims = script.outcome(record)
            label, figure = record["title"], f"experiments/results/{name}.png"
            how = f"`{record['command']}`, {_common.made_on(record)}"
            if not place:
                parts += [f"*{ASKED[experiment]}*", f"**{label}** ({how}). {intro}"]
                parts += [LEGENDS[experiment]] if experiment in LEGENDS else []
                parts.append(_common.bullets(claims))
                parts.append(f"![{label}]({figure})")
                continue
            verdicts = [holds for holds, _ in claims]
            counts = [
                f"{verdicts.count(verdict)} {text.lower()}"
                for verdict, text in _common.VERDICTS.items()
                if verdict in verdicts
            ]
            summary = f"{label}: {_common.joined(counts)}"
            parts.append(f"<details><summary>{summary}</summary>")
            parts += [f"{how}, [figure]({figure}). {intro}", _common.bullets(claims), "</details>"]
    return "\n" + "\n\n".join(parts) + "\n" if parts else WAITING


def benchmarks() -> str:
    """The Markdown of the benchmarks' records."""
    lines = []
    for name in BENCHMARKS:
        path = RESULTS / "benchmarks" / f"{name}.json"
        if not path.exists():
            continue
        for row in json.loads(path.read_text())["rows"]:
            ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
            verdict = {True: "yes", False: "no", None: ""}[row.get("met")]
            cells = [f"{row['seconds']:.3g}", ratio, row.get("target") or "", verdict]
            lines.append([row["what"], *cells])
    if not lines:
        return WAITING
    columns = ["measured", "seconds", "ratio", "aim", "met"]
    figures = [
        f"\n![{name}](experiments/results/benchmarks/{name}.png)\n"
        for name in BENCHMARKS
        if (RESULTS / "benchmarks" / f"{name}.png").exists()
    ]
    return f"\n{_common.markdown_table(columns, lines)}\n{''.join(figures)}"


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes the heads of the scripts, or checks them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=_common.Help)
    p.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = p.parse_args(argv)
    late = []
    heads = [(Path(str(s.__file__)), functools.partial(headed, script=s)) for s in HEADS]
    for path, bring in heads:
        old = path.read_text(encoding="utf-8")
        new = bring(old)
        if new != old:
            late.append(path.name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check and late:
        p.exit(1, f"not up to date: {', '.join(late)}\n")
    return README


if __name__ == "__main__":
    main()
