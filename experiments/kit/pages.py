"""Writes the pages of results from the records, and the index of all claims.

    python experiments/kit/pages.py            # all pages of experiments/results
    python experiments/kit/pages.py --check    # only says whether they are up to date

A page holds a section for each record of an experiment. No script is imported: what tables and
claims say is in the records, which `--redraw` of a script brings up to date.
"""

import argparse
import collections
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import papers

from kit import claims, cli, records, tables
from kit.records import Record

INDEX = "README.md"
BENCHMARKS = "benchmarks"


def found(folder: Path) -> dict[str, list[Record]]:
    """The records in a folder, by experiment; the plainest run first."""
    by_experiment = collections.defaultdict(list)
    read = map(records.read, folder.glob("*.json"))
    for record in sorted(read, key=lambda record: (len(record["command"]), record.name)):
        if "claims" in record:
            by_experiment[record["experiment"]].append(record)
    return dict(sorted(by_experiment.items()))


def anchor(heading: str) -> str:
    """Where a heading is on its page, as GitHub has it."""
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


def contents(runs: Sequence[Record], told: Callable[[Record], str]) -> str:
    return "\n".join(f"- [{run.name}](#{anchor(run.name)}): {told(run)}" for run in runs)


def made_by(record: Record, after: str = "") -> str:
    where = f"{after} on {records.made_on(record)}, on {record['date']}"
    return f"Made by `{record['command']}`{where}, with "


def section(record: Record) -> str:
    name, finding = record.name, record["finding"]
    parts = [f"## {name}", f"{record['title']}.", f"**{finding}.**", f"![{finding}]({name}.png)"]
    for shown in record["tables"]:
        table = tables.Table(**shown)
        heading = [f"*{table.title}*"] if len(record["tables"]) > 1 and table.title else []
        parts += [*heading, tables.markdown(table)]
    if record["claims"]:
        rules = dict.fromkeys(f"- {row['claim']}: {row['rule']}." for row in record["claims"])
        parts.append(tables.markdown(claims.table(record["claims"], "*")))
        parts.append("\n".join(["<details><summary>How claims are decided</summary>", "", *rules]))
        parts.append("</details>")
    versions, seconds = record["versions"], f" in {record['seconds']['total']:.0f} s"
    made = f"{made_by(record, seconds)}Python {versions['python']} and jax {versions['jax']}. "
    return "\n\n".join([*parts, f"{made}All numbers: [{name}.json]({name}.json)."])


def page(experiment: str, runs: Sequence[Record]) -> str:
    head = [f"# {experiment}", f"*{runs[0]['question']}*", runs[0].get("legend")]
    head += [contents(runs, lambda run: run["title"])] if len(runs) > 1 else []
    return "\n\n".join(filter(None, [*head, *map(section, runs)])) + "\n"


def write_page(folder: Path, experiment: str) -> Path:
    path = folder / f"{experiment}.md"
    path.write_text(page(experiment, found(folder)[experiment]), encoding="utf-8")
    return path


def verdicts_of(runs: Sequence[tuple[Record, Mapping[str, Any]]]) -> str:
    """The verdicts on one claim, of which a record may have several, with links to the records."""
    links = dict.fromkeys(claims.VERDICTS, "")
    names = list(dict.fromkeys(record.name for record, _ in runs))
    for record, row in runs:
        link = f" [{names.index(record.name) + 1}]({record['experiment']}.md#{anchor(record.name)})"
        links[row["verdict"]] += link * (link not in links[row["verdict"]])
    words = {claims.UNLIKE: f"**{claims.UNLIKE}**"}
    return "; ".join(words.get(verdict, verdict) + link for verdict, link in links.items() if link)


def not_measured(experiments: Iterable[str]) -> Iterator[tuple[claims.Claim, str]]:
    """Claims of the papers for experiments that have no record, with what these lack."""
    for module in pkgutil.iter_modules(papers.__path__):
        if module.name not in experiments:
            paper = importlib.import_module(f"papers.{module.name}")
            needs = getattr(paper, "NEEDS", "a run")
            for claim in paper.CLAIMS:
                yield claim, f"{claims.OPEN}: `{module.name}.py` is not measured, it needs {needs}"


def index(folder: Path) -> str:
    by_claim, lines, experiments = collections.defaultdict(list), [], found(folder)
    for experiment, runs in experiments.items():
        rows = [(record, row) for record in runs for row in record["claims"]]
        for run in rows:
            # After a colon stands what of a record it was held against.
            by_claim[run[1]["id"].partition(":")[0]].append(run)
        count = claims.counts(row for _, row in rows) or "no claims"
        link = f"[{experiment}]({experiment}.md)"
        lines.append([link, runs[0]["question"], str(len(runs)), count])
    table = tables.Table("", ["experiment", "question", "records", "claims"], lines, texts=4)
    listed = [[f"`{c.id}`", c.claim, c.paper, why] for c, why in not_measured(experiments)]
    for name, runs in by_claim.items():
        said = next((row["paper"] for _, row in runs if row["paper"]), "-")
        listed.append([f"`{name}`", runs[0][1]["claim"], said, verdicts_of(runs)])
    listed.sort(key=lambda line: line[0].strip("`"))
    verdicts = tables.Table("", ["id", "claim", "paper", "here"], listed, texts=4)
    parts = [
        "# Results",
        "A page for each experiment, with a section for each record: one JSON file and one figure "
        "of a run. A record says by which command it was made, from which checkpoints, data and "
        "seeds, on which device, with which versions, and how long each stage took. Pages and this "
        "index are written from the records by `python experiments/kit/pages.py`.",
        tables.markdown(table),
        "## Claims of the papers",
        "Each claim once; numbers lead to the records that it was held against. A claim is "
        "undecided where what it compares is near chance or differs by no more than noise, and not "
        "in the paper where the paper makes none, or makes it of other networks.",
        tables.markdown(verdicts),
    ]
    if measured := benchmarks(folder):
        parts += ["## Benchmarks", f"[Benchmarks]({BENCHMARKS}.md): {aims(*measured)}."]
    return "\n\n".join(parts) + "\n"


def benchmarks(folder: Path) -> list[Record]:
    return [records.read(path) for path in sorted(folder.glob(f"{BENCHMARKS}/*.json"))]


def aims(*runs: Record) -> str:
    met = [row["met"] for record in runs for row in record["rows"] if row.get("target")]
    return f"{sum(met)} of {len(met)} aims met, {len(met) - sum(met)} missed"


def benchmarks_page(folder: Path) -> str:
    """The page of the benchmarks: what each measures, its table, and which aims are met."""
    runs = benchmarks(folder)
    parts = ["# Benchmarks", "*What do passes, training, matching and scores of weights cost?*"]
    ratios = "A ratio is how many times faster than what is compared with: the median over turns."
    parts += [f"{aims(*runs)}. {ratios}", contents(runs, aims)]
    for record in runs:
        table, figure = tables.benchmark(record["title"], record["rows"]), f"{record.name}.png"
        table = tables.Table(**record["table"]) if "table" in record else table
        parts += [f"## {record.name}", f"*{record['question']}*", f"{table.title}:"]
        parts.append(tables.markdown(table))
        missed = [row["what"] for row in record["rows"] if row.get("met") is False]
        parts += [f"**Missed: {records.joined(missed)}.**"] if missed else []
        shown = (folder / BENCHMARKS / figure).exists()
        parts += [f"![{record.name}]({BENCHMARKS}/{figure})"] if shown else []
        parts.append(f"{made_by(record)}jax {record['versions']['jax']}.")
    return "\n\n".join(parts) + "\n"


def texts(folder: Path) -> dict[str, str]:
    written = {f"{name}.md": page(name, runs) for name, runs in found(folder).items()}
    written |= {f"{BENCHMARKS}.md": benchmarks_page(folder)} if benchmarks(folder) else {}
    return written | {INDEX: index(folder)}


def main(argv: Sequence[str] | None = None) -> Path:
    p = argparse.ArgumentParser(prog="pages.py", description=__doc__, formatter_class=cli.Help)
    p.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = p.parse_args(argv)
    late = []
    for name, text in texts(records.RESULTS).items():
        path = records.RESULTS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            late.append(name)
            if not args.check:
                path.write_text(text, encoding="utf-8")
    if args.check and late:
        p.exit(1, f"not up to date: {', '.join(late)}\n")
    return records.RESULTS / INDEX


if __name__ == "__main__":
    main()
