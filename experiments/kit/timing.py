"""Clocks, progress bars with logs above them, and the frame of the benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from kit import cli, records, tables


class Stopwatch:
    """Seconds by stage.

    Example:
      >>> watch = Stopwatch()
      >>> with watch("data"):
      ...     pass
      >>> list(watch.seconds)
      ['data']
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time that the block takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def go_on(self, before: Mapping[str, float]) -> None:
        """Adds what `record` gave in an earlier call that was stopped."""
        self._start -= before.get("total", 0.0)
        for stage in before.keys() - {"total"}:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + before[stage]

    def record(self) -> dict[str, float]:
        """Seconds of every stage so far, and since the start."""
        total = time.perf_counter() - self._start
        return {k: round(v, 2) for k, v in (*self.seconds.items(), ("total", total))}


class Watched:
    """Re-iterable batches with a progress bar that appears when a pass takes over two seconds."""

    def __init__(self, data: Iterable[Any], description: str) -> None:
        self.data, self.description = data, description

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(tqdm(self.data, desc=self.description, delay=2, leave=False, unit="batch"))


class _Log(logging.Handler):
    """Writes log lines above progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def logs_above_bars() -> Iterator[None]:
    """Inside, warnings and what training says go to standard error without tearing the bars."""
    root, own, handler = logging.getLogger(), logging.getLogger("vfjax"), _Log()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = own.level
    # Whoever has set up logging keeps what they have.
    if not root.handlers:
        root.addHandler(handler)
    own.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(level)


# ----------------------------------------------------------------------------------- benchmarks


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


def benchmark_parser(doc: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    p = argparse.ArgumentParser(description=doc, formatter_class=cli.Help)
    p.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    p.add_argument("--repeats", type=int, default=7, help="turns; medians over them are reported")
    p.add_argument(
        "--out",
        type=cli.output_folder,
        default=str(records.ROOT / "results" / "benchmarks"),
        help="folder that the JSON record is written to",
    )
    return p


def finish_benchmark(
    name: str, args: argparse.Namespace, title: str, rows: Sequence[Mapping[str, Any]]
) -> Path:
    """Prints the table and writes the record; rows are what, seconds, ratio, target, met."""
    tables.show(tables.benchmark(title, rows))
    about = {"benchmark": name, "title": title, "quick": args.quick, "repeats": args.repeats}
    path = Path(args.out) / f"{name}{'-quick' if args.quick else ''}.json"
    records.write(path, about | {"rows": list(rows)} | records.environment())
    print(f"wrote {path}")
    return path
