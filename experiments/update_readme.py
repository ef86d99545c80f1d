"""Writes the tables of `experiments/results/` into the README, between its markers.

    python experiments/cifar_pfm.py --out experiments/results
    python experiments/cifar_pfm.py --model resnet20 --out experiments/results
    python experiments/update_readme.py

No number in those places is typed by hand. With `--check` nothing is written, and the exit status
says whether the README is up to date.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
import cifar_pfm

README = _common.ROOT / "README.md"
RESULTS = _common.ROOT / "experiments" / "results"
# Which record goes between which markers.
TABLES = {
    "vgg16": "cifar_pfm-cifar10-vgg16-w0.25",
    "resnet20": "cifar_pfm-cifar10-resnet20-w0.5",
}
BENCHMARKS = ("routing", "passes", "tracing")
WAITING = "\n*Not measured yet.*\n"


def table(name: str) -> str:
    """The Markdown of a record of `cifar_pfm.py`: table, how it was made, figure."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return WAITING
    record = json.loads(path.read_text())
    header, lines = cifar_pfm.table_of(record, ("**", "**"))
    summary, device, versions = record["summary"], record["device"], record["versions"]
    where = f"{device['cores']} CPU cores" if device["platform"] == "cpu" else device["kind"]
    reached = [
        f"{cifar_pfm.LABELS[column]} at l = {layers}"
        for column, layers in summary["reaches_edges_at"].items()
        if layers is not None
    ]
    notes = (
        f"Bold: at or above the mean of the edge models, {100 * summary['edge_mean']:.2f} "
        f"(first reached by {', '.join(reached) or 'no column'}). "
        f"Made by `{record['command']}` in {record['seconds']['total']:.0f} s on {where}, "
        f"jax {versions['jax']}."
    )
    figure = f"![{record['title']}](experiments/results/{name}.png)"
    body = _common.markdown_table(header, lines)
    return f"\n**{record['title']}**\n\n{body}\n\n{notes}\n\n{figure}\n"


def benchmarks() -> str:
    """The Markdown of the benchmarks' records."""
    lines = []
    for name in BENCHMARKS:
        path = RESULTS / "benchmarks" / f"{name}.json"
        if not path.exists():
            continue
        for row in json.loads(path.read_text())["rows"]:
            if row.get("target"):
                ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
                verdict = "yes" if row["met"] else "no"
                lines.append([row["what"], f"{row['seconds']:.3g}", ratio, row["target"], verdict])
    if not lines:
        return WAITING
    columns = ["measured", "seconds", "ratio", "aim", "met"]
    return f"\n{_common.markdown_table(columns, lines)}\n"


def filled(text: str) -> str:
    """The README's text with all generated parts brought up to date."""
    for marker, name in TABLES.items():
        text = _common.fill(text, marker, table(name))
    return _common.fill(text, "benchmarks", benchmarks())


def main(argv: Sequence[str] | None = None) -> Any:
    """Writes the README, or checks it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=_common.Help)
    p.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = p.parse_args(argv)
    old = Path(README).read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        p.exit(0 if old == new else 1, "" if old == new else "README.md is not up to date\n")
    README.write_text(new, encoding="utf-8")
    return README


if __name__ == "__main__":
    main()
