"""What the benchmarks share: turns, ratios, command lines, records."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from kit import cli, records, tables
from tqdm import tqdm


def timed(fn: Callable[[], Any]) -> float:
    """Seconds that a call takes, including what it left running on the device."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def alternate(rivals: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every rival, taking turns, so that a busy spell of the machine hits all alike.

    Each is called once before, to compile.
    """
    for fn in rivals.values():
        jax.block_until_ready(fn())
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in tqdm(range(repeats), desc=", ".join(rivals), delay=2, leave=False):
        for name, fn in rivals.items():
            seconds[name].append(timed(fn))
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], base: str, other: str) -> float:
    """How many times faster `other` is than `base`: the median over turns of the quotient."""
    return float(np.median(np.asarray(seconds[base]) / np.asarray(seconds[other])))


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    p = argparse.ArgumentParser(description=doc, formatter_class=cli.Help)
    p.set_defaults(question=" ".join(doc.split("\n\n")[0].split()))
    p.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    p.add_argument("--repeats", type=int, default=7, help="turns; medians over them are reported")
    p.add_argument(
        "--out",
        type=cli.output_folder,
        default=str(records.ROOT / "results" / "benchmarks"),
        help="folder that the JSON record is written to",
    )
    return p


def finish(
    name: str,
    args: argparse.Namespace,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    table: tables.Table | None = None,
) -> Path:
    """Prints the table and writes the record; rows are what, seconds, ratio, target, met.

    A `table` stands for the one of these.
    """
    tables.show(table or tables.benchmark(title, rows))
    options = "".join([" --quick" * args.quick, f" --repeats {args.repeats}"])
    about = {"benchmark": name, "question": args.question, "title": title}
    about |= {"command": f"python experiments/benchmarks/{name}.py{options}"}
    about |= {"quick": args.quick, "repeats": args.repeats}
    about |= {"table": dataclasses.asdict(table)} if table else {}
    path = Path(args.out) / f"{name}{'-quick' if args.quick else ''}.json"
    records.write(path, about | {"rows": list(rows)} | records.environment())
    print(f"wrote {path}")
    return path
