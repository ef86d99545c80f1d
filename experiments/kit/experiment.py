"""What an experiment is, and everything that happens around its measurements.

A script holds what is asked and measured::

    def measure(config, run):
        models = run.setup                        # what `prepare` made: here, edge models
        for cell in run.cells({"remedy": r} for r in REMEDIES):
            with run.watch("REPAIR"):
                yield cell | {"accuracy": ...}    # one row, or several

    EXPERIMENT = Experiment(
        name="cifar_pfm", doc=__doc__, options=Config, prepare=edges.loaded(test="samples"),
        measure=measure, title=..., finding=..., tables=..., figure=..., claims=CLAIMS)
    main = EXPERIMENT.main

A cell is what is measured at once: the rows that follow it are kept as soon as the next one is
asked for. A run that is stopped leaves them beside where the record will be, and the same command
goes on from there; `run.cells` gives what is missing. So what cells share (moments, matchings) is
best made when the first of them needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kit import claims, cli, pages, records, tables, timing
from vfjax import plot
from vfjax.checkpoint import CheckpointError
from vfjax.data import DatasetError

# Seconds between two writes of what was measured so far.
EVERY = 2.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is there before anything is measured."""

    config: Any  # The options, with all settled that depends on data or networks.
    value: Any  # What `measure` works on, as `run.setup`.
    # Data, model, edge_models, seeds; its "config" is merged into the options as recorded.
    record: Mapping[str, Any]
    # What makes measurements of another call valid, beside options and record: digests of networks.
    identity: Sequence[str] = ()


class Run:
    """A run as `measure` sees it: `run.setup` (what `prepare` made), `run.watch` (the clock)."""

    watched = staticmethod(timing.Watched)

    def __init__(self, setup: Setup, watch: timing.Stopwatch, partial: Path, key: str) -> None:
        self.setup, self.watch, self.path = setup.value, watch, partial
        self._saved = time.monotonic()
        self._order: list[str] = []
        self._pending: list[records.Row] | None = None
        self._kept: dict[str, Any] = {"key": key, "cells": {}, "notes": {}}
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(partial.read_text(encoding="utf-8"))
            if found["key"] == key:
                watch.go_on(found["seconds"])
                self._kept = found
        self.notes: dict[str, list[records.Row]] = self._kept["notes"]

    def cells(self, plan: Iterable[Mapping[str, Any]]) -> Iterator[records.Row]:
        """Gives each cell of a plan, plain values by name, that is not measured yet."""
        cells = {json.dumps(records.finite(cell), sort_keys=True): dict(cell) for cell in plan}
        self._order += cells
        done = self._kept["cells"]
        missing = [name for name in cells if name not in done]
        there = len(cells) - len(missing)
        with tqdm(total=len(cells), initial=there, unit="cell", leave=False) as bar:
            for name in missing:
                values = [str(value) for value in cells[name].values() if value is not None]
                bar.set_description(", ".join(values))
                self._pending = []
                yield cells[name]
                done[name], self._pending = self._pending, None
                self.cell_done()
                bar.update()

    def note(self, name: str, **values: Any) -> None:
        """Keeps what is found on the way and belongs to no cell: whether a matching converged."""
        found = self.notes.setdefault(name, [])
        if (values := records.finite(values)) not in found:
            found.append(values)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes a row that `measure` yields."""
        if self._pending is None:
            raise RuntimeError("a row belongs to a cell: yield it after one that `run.cells` gave.")
        self._pending.append(records.finite(row))

    @property
    def count(self) -> int:
        return len(self._kept["cells"])

    @property
    def rows(self) -> records.Rows:
        """The rows of all finished cells, in the order of the plans."""
        names = dict.fromkeys(self._order)
        return records.Rows(row for name in names for row in self._kept["cells"].get(name, ()))

    def cell_done(self) -> None:
        if time.monotonic() - self._saved > EVERY:
            self.save()

    def save(self) -> None:
        """Writes what was measured so far, if anything."""
        self._saved = time.monotonic()
        if self.count:
            records.write(self.path, self._kept | {"seconds": self.watch.record()})


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is asked, what is measured, and how it is shown."""

    name: str  # Of the script, without suffix.
    doc: str | None  # Its head: first the question; `--help` begins with it.
    options: type[cli.Options]
    # From options and clock to what `measure` works on; `kit.edges.loaded` for edge models.
    # Whatever speaks against the options is raised here, before anything is trained.
    prepare: Callable[[Any, timing.Stopwatch], Setup]
    measure: Callable[[Any, Run], Iterator[Mapping[str, Any]]]
    title: Callable[[records.Record], str]  # Data, networks, what was done.
    finding: Callable[[records.Record], str]  # What came out, one sentence; the figure's title.
    figure: Callable[[records.Record], Any]  # Made with `kit.figures.draw`.
    tables: Callable[[records.Record], Sequence[tables.Table]]
    claims: Sequence[claims.Claim] = ()
    # Numbers derived from rows that what is above needs, if any.
    summary: Callable[[records.Record], Mapping[str, Any]] | None = None
    legend: str = ""  # How the words of tables and figures are to be read.
    # What names of files begin with after the experiment's; None for data set and network.
    stem: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    # Whether the numbers mean nothing, so that claims are left out.
    untold: Callable[[Mapping[str, Any]], bool] = lambda record: False

    @property
    def question(self) -> str:
        return " ".join((self.doc or "").split("\n\n")[0].split())

    def parser(self) -> cli.Parser:
        p = cli.parser(self.options, f"{self.name}.py", self.doc)
        text = "measure nothing: write tables, claims, figures and page of these records anew"
        p.add_argument("--redraw", nargs="+", metavar="RECORD", type=Path, help=text)
        return p

    def file_name(self, record: Mapping[str, Any]) -> str:
        return records.file_name(record, self.options, self.stem and self.stem(record))

    def main(self, argv: Sequence[str] | None = None) -> Path:
        """Runs the experiment from a command line; returns the path of the record."""
        p = self.parser()
        values = vars(p.parse_args(argv))
        redraw = values.pop("redraw")
        with reported(p.prog), timing.logs_above_bars():
            for path in redraw or ():
                self.present(records.write(path, self.derived(records.read(path))))
            if not redraw:
                words = sys.argv[1:] if argv is None else argv
                command = shlex.join(["python", f"experiments/{p.prog}", *words])
                path = self.run(cli.settled(self.options, values), command)
                self.present(path)
        return path

    def run(self, config: Any, command: str) -> Path:
        """Measures everything and writes the record."""
        watch = timing.Stopwatch()
        setup = self.prepare(config, watch)
        config = dataclasses.asdict(setup.config) | setup.record.get("config", {})
        about = {"experiment": self.name, "question": self.question, "command": command}
        head = records.Record(records.finite(about | setup.record | {"config": config}))
        path = Path(setup.config.out) / f"{self.file_name(head)}.json"
        run = Run(setup, watch, path.with_suffix(".partial"), key_of(head, setup.identity))
        try:
            for row in self.measure(setup.config, run):
                run.add(row)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"; {run.count} cells are kept" * bool(run.count)) from None
        finally:
            run.save()
        measured = {"rows": run.rows, "notes": run.notes, "seconds": watch.record()}
        records.write(path, self.derived(head | measured | records.environment()))
        run.path.unlink(missing_ok=True)
        return path

    def derived(self, record: Mapping[str, Any]) -> records.Record:
        """The record with all that follows from its rows."""
        record = records.Record(record)
        record |= {"question": self.question, "legend": " ".join(self.legend.split())}
        if self.summary is not None:
            record["summary"] = records.finite(self.summary(record))
        record["title"] = self.title(record)
        record["finding"] = self.finding(record)
        record["tables"] = [dataclasses.asdict(table) for table in self.tables(record)]
        record["claims"] = claims.decided(() if self.untold(record) else self.claims, record)
        return record

    def present(self, path: Path) -> None:
        """Draws a record, writes its page, and prints it.

        The record is there before: a figure that fails does not lose it.
        """
        record = records.read(path)
        figure = plot.save(self.figure(record), path.with_suffix(".png"))
        page = pages.write_page(path.parent, self.name)
        self.show(record)
        print(f"{record['seconds']['total']:.0f} s; wrote {path}, {figure} and {page}")

    def show(self, record: Mapping[str, Any]) -> None:
        for table in record["tables"]:
            tables.show(tables.Table(**table))
        print(f"{record['finding']}.")
        if record["claims"]:
            tables.show(claims.table(record["claims"]))
            print(f"Claims: {claims.counts(record['claims'])}.")


@contextlib.contextmanager
def reported(prog: str) -> Iterator[None]:
    """Turns errors that a sentence explains into that sentence, on one line.

    Exit status 2 is for what was asked for: options, data and checkpoints that are not there. What
    only shows on the way (models that hold NaN, training that diverges, a full disk) gives 1, and
    Ctrl-C 130.
    """
    try:
        yield
        return
    except (ValueError, FloatingPointError, OSError) as error:
        asked = isinstance(error, (cli.UserError, DatasetError, CheckpointError))
        why = " ".join(str(error).split()) or type(error).__name__
        status, text = 1 + asked, f"error: {why}"
    except KeyboardInterrupt as error:
        kept = str(error) or " before anything was measured"
        status, text = 130, f"stopped{kept}. Run the same command again to go on from there."
    sys.stderr.write(f"{prog}: {text}\n")
    raise SystemExit(status)


def key_of(head: Mapping[str, Any], identity: Sequence[str]) -> str:
    """What measurements are valid for: options, data, networks, versions."""
    config = {k: v for k, v in head["config"].items() if k not in ("out", "data_dir")}
    known = {k: v for k, v in head.items() if k not in ("command", "config", "question")}
    text = json.dumps([config, known, list(identity), records.versions()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
