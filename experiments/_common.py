"""What the experiments share: command-line habits, clocks, progress, records and tables.

No algorithm lives here or in any other file of this folder; those are in `vfjax`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from kit.cli import UserError
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vfjax import plot
from vfjax.checkpoint import CheckpointError, write_json
from vfjax.data import DatasetError
from vfjax.diagnose import Interpolation

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
PACKAGES += ("scikit-learn", "tensorflow-datasets")
DATASET_LABELS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "mnist": "MNIST",
    "digits": "scikit-learn's 8x8 digits",
}


# --------------------------------------------------------------------------------- command line


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A default of None or False says nothing; where it means something, the text says what.
        if action.default is None or isinstance(action.default, bool):
            return action.help
        if "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


@contextlib.contextmanager
def reported(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns errors that a sentence explains into that sentence, on one line.

    Exit status 2 is for what was asked for: options, data and checkpoints that are not there. What
    only shows on the way (models that hold NaN, training that diverges, a full disk) gives 1.
    """
    try:
        yield
    except (UserError, DatasetError, CheckpointError) as error:
        status, found = 2, error
    except (ValueError, FloatingPointError, OSError) as error:
        status, found = 1, error
    else:
        return
    message = " ".join(str(found).split()) or type(found).__name__
    parser.exit(status, f"{parser.prog}: error: {message}\n")


def output_folder(text: str) -> str:
    """The type of `--out`: a folder that files can be written to, now or once it is made.

    This is tried, and what was made to try it is removed again.

    Example:
      >>> output_folder("/dev/null/x")
      Traceback (most recent call last):
        ...
      argparse.ArgumentTypeError: nothing can be written to '/dev/null/x': /dev/null is no folder
    """
    text = os.path.expanduser(text)
    folder = Path(text).absolute()
    made: list[Path] = []
    try:
        for parent in reversed((folder, *folder.parents)):
            if not parent.is_dir():
                parent.mkdir()
                made.append(parent)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, FileExistsError):
            why = f"{error.filename} is no folder"
        raise argparse.ArgumentTypeError(f"nothing can be written to {text!r}: {why}") from error
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
    return text


def folder_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of where data are and where results go."""
    p.add_argument(
        "--data-dir",
        help="folder of TFDS data sets (default: TFDS_DATA_DIR, then TFDS's own default)",
    )
    p.add_argument(
        "--out",
        type=output_folder,
        default=str(ROOT / "results"),
        help="folder that the JSON record and the PNG are written to",
    )


def count_of(what: str) -> Callable[[str], int]:
    """The type of an option that is a number of things, from 1 on.

    Example:
      >>> count_of("pairs")("0")
      Traceback (most recent call last):
        ...
      argparse.ArgumentTypeError: '0' is no number of pairs, from 1 on
    """

    def count(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of {what}, from 1 on")
        return int(text)

    return count


def seed_of(text: str) -> int:
    """The type of an option that is a seed."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed, from 0 on")
    return int(text)


def run(
    p: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    experiment: Callable[[argparse.Namespace, str], dict[str, Any]],
    file_name: Callable[[dict[str, Any]], str],
    figure_of: Callable[[dict[str, Any]], Any],
    show: Callable[[dict[str, Any]], None],
) -> Path:
    """Runs an experiment from its command line, writes record and figure, and shows the record.

    The record is there before the figure is drawn, so that a figure that fails does not lose it.

    Args:
      p: The parser of the script; its `prog` is the name of the file.
      argv: The command line, None for that of the process.
      experiment: From options and command to the record.
      file_name: Name of record and figure, without suffix.
      figure_of: The figure of a record.
      show: Prints a record.

    Returns:
      The path of the record.
    """
    args = p.parse_args(argv)
    with reported(p):
        record = experiment(args, command(p.prog, argv))
        path = write_record(Path(args.out) / f"{file_name(record)}.json", record)
        figure = plot.save(figure_of(record), path.with_suffix(".png"))
    show(record)
    print(f"{record['seconds']['total']:.0f} s; wrote {path} and {figure}")
    return path


def command(script: str, argv: Sequence[str] | None) -> str:
    """The command line that is running, for the record."""
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", f"experiments/{script}", *words])


# ----------------------------------------------------------------------------- clocks, progress


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


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value).

    Example:
      >>> mean_std([1.0, 3.0])
      (2.0, 1.4142135623730951)
    """
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread


def noise(accuracy: float, images: int) -> float:
    """Two standard errors of an accuracy on so many images: what is closer is level.

    Example:
      >>> noise(0.5, 10_000)
      0.01
    """
    return 2 * math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images)


# -------------------------------------------------------------------------------------- records


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if "vfjax" not in found:
        import vfjax

        found["vfjax"] = vfjax.__version__
    return found


def device() -> dict[str, Any]:
    """What the numbers were computed on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "cores": cores,
        "machine": platform.machine(),
    }


def finite(value: Any) -> Any:
    """The same with None in place of NaN and infinities, which JSON does not have.

    Example:
      >>> finite({"loss": [0.5, float("nan")]})
      {'loss': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_record(path: Path, record: Mapping[str, Any]) -> Path:
    """Writes a JSON record, whole or not at all."""
    write_json(path, finite(record))
    return path


def measured(found: Interpolation) -> dict[str, Any]:
    """What the record holds of the way from one network to another."""
    return {
        "accuracy": found.accuracy.tolist(),
        "loss": found.loss.tolist(),
        "barrier": found.barrier,
        "loss_barrier": found.loss_barrier,
    }


def dataset_label(source: Mapping[str, Any], wanted: str) -> str:
    """The data of a record as in titles, where a fall-back from what was wanted shows.

    Example:
      >>> dataset_label({"name": "digits", "fallback": True}, "mnist")
      "MNIST NOT FOUND, SO: scikit-learn's 8x8 digits"
    """
    label = DATASET_LABELS[source["name"]]
    return f"{DATASET_LABELS[wanted]} NOT FOUND, SO: {label}" if source["fallback"] else label


def made_on(record: Mapping[str, Any]) -> str:
    """How long a record took, and on what."""
    device = record["device"]
    where = f"{device['cores']} CPU cores" if device["platform"] == "cpu" else device["kind"]
    return f"{record['seconds']['total']:.0f} s on {where}"


def joined(words: Sequence[str]) -> str:
    """Words as in a sentence.

    Example:
      >>> joined(["a", "b", "c"])
      'a, b and c'
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


# Whether what was measured is as in the paper, or None where the paper has nothing on it.
Claims = Sequence[tuple[bool | None, str]]
VERDICTS = {True: "As in the paper", False: "Unlike the paper", None: "Not in the paper"}


def sentences(claims: Claims) -> str:
    """What agrees with the paper and what does not, plainly.

    Example:
      >>> sentences([(True, "a"), (False, "b"), (True, "c"), (None, "d")])
      'As in the paper: a; c. Unlike the paper: b. Not in the paper: d.'
    """
    found = {
        label: "; ".join(text for holds, text in claims if holds is verdict)
        for verdict, label in VERDICTS.items()
    }
    return " ".join(f"{label}: {texts}." for label, texts in found.items() if texts)


def told(intro: str, claims: Claims) -> str:
    """What came out, in sentences, and whether the paper has it so."""
    return f"{intro} {sentences(claims)}".strip()


def bullets(claims: Claims) -> str:
    """The same as a list in Markdown.

    Example:
      >>> print(bullets([(True, "a"), (False, "b")]))
      - as in the paper: a
      - **unlike the paper**: b
    """
    words = {verdict: label.lower() for verdict, label in VERDICTS.items()}
    words[False] = f"**{words[False]}**"
    return "\n".join(f"- {words[holds]}: {text}" for holds, text in claims)


def environment() -> dict[str, Any]:
    """The parts of a record that say where and when it was made."""
    return {
        "versions": versions(),
        "device": device(),
        "date": time.strftime("%Y-%m-%d"),
    }


# --------------------------------------------------------------------------------------- tables

Rows = Sequence[Sequence[str]]


def coloured() -> bool:
    """Whether tables are printed in colours: on a terminal that has some."""
    console = Console()
    return console.color_system is not None and not console.no_color


def print_table(title: str, columns: Sequence[str], rows: Rows, *, caption: str = "") -> None:
    """Prints a table; the first column is text, the others are numbers."""
    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(table)


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """The same table in Markdown.

    Example:
      >>> print(markdown_table(["row", "%"], [["a", "1"]]))
      | row | % |
      | :-- | --: |
      | a | 1 |
    """
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(values: Sequence[float]) -> str:
    """Accuracies in [0, 1] as a percentage, with their spread if there are several.

    Example:
      >>> percent([0.5]), percent([0.5, 0.52])
      ('50.00', '51.00 ± 1.41')
    """
    mean, spread = mean_std(values)
    text = f"{100 * mean:.2f}"
    return text if len(values) == 1 else f"{text} ± {100 * spread:.2f}"


def fill(text: str, marker: str, content: str) -> str:
    """Replaces what stands between `<!-- marker -->` and `<!-- /marker -->`.

    Raises:
      ValueError: If the text does not have the two markers once, in this order.

    Example:
      >>> fill("a <!-- t -->old<!-- /t --> b", "t", "new")
      'a <!-- t -->new<!-- /t --> b'
    """
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the text must hold {start} and then {end}, once each.")
    head, rest = text.split(start)
    return f"{head}{start}{content}{end}{rest.split(end)[1]}"


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
    p = argparse.ArgumentParser(description=doc, formatter_class=Help)
    p.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    p.add_argument("--repeats", type=int, default=7, help="turns; medians over them are reported")
    p.add_argument(
        "--out",
        type=output_folder,
        default=str(ROOT / "results" / "benchmarks"),
        help="folder that the JSON record is written to",
    )
    return p


def finish_benchmark(
    name: str, args: argparse.Namespace, title: str, rows: Sequence[Mapping[str, Any]]
) -> Path:
    """Prints the table and writes the record; rows are what, seconds, ratio, target, met."""
    shown = []
    for row in rows:
        numbers = ["" if row.get(k) is None else f"{row[k]:.3g}" for k in ("seconds", "ratio")]
        met = row.get("met")
        verdict = "" if met is None else "yes" if met else "NO"
        shown.append([row["what"], *numbers, row.get("target") or "", verdict])
    print_table(title, ["", "seconds", "ratio", "target", "met"], shown)
    record = {
        "benchmark": name,
        "title": title,
        "quick": args.quick,
        "repeats": args.repeats,
        "rows": list(rows),
    }
    quick = "-quick" if args.quick else ""
    path = write_record(Path(args.out) / f"{name}{quick}.json", record | environment())
    print(f"wrote {path}")
    return path
