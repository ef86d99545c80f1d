"""Writes the pages of results from the records, and the index of all claims.

    python experiments/kit/pages.py            # all pages of experiments/results
    python experiments/kit/pages.py --check    # only says whether they are up to date

A page holds a section for each record of an experiment. No script is imported: what tables and
claims say is in the records, which `--redraw` of a script brings up to date.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit import claims, cli, records, tables

INDEX = "README.md"
BENCHMARKS = "benchmarks"


def found(folder: Path) -> dict[str, list[tuple[str, records.Record]]]:
    """Names and contents of the records in a folder, by experiment; the plainest run first."""
    read = [(path.stem, records.read(path)) for path in folder.glob("*.json")]
    by_experiment: dict[str, list[tuple[str, records.Record]]] = {}
    for run in sorted(read, key=lambda run: (len(run[1]["command"]), run[0])):
        if "claims" in run[1]:
            by_experiment.setdefault(run[1]["experiment"], []).append(run)
    return dict(sorted(by_experiment.items()))


def section(name: str, record: records.Record) -> str:
    parts = [f"## {name}", f"{record['title']}.", f"**{record['finding']}.**"]
    parts.append(f"![{record['finding']}]({name}.png)")
    for shown in record["tables"]:
        table = tables.Table(**shown)
        heading = [f"*{table.title}*"] if len(record["tables"]) > 1 and table.title else []
        parts += [*heading, tables.markdown(table)]
    if record["claims"]:
        rules = dict.fromkeys(f"- {row['claim']}: {row['rule']}." for row in record["claims"])
        parts.append(tables.markdown(claims.table(record["claims"], "*")))
        parts.append("\n".join(["<details><summary>How claims are decided</summary>", "", *rules]))
        parts.append("</details>")
    versions, seconds = record["versions"], record["seconds"]["total"]
    parts.append(f"Made by `{record['command']}` in {seconds:.0f} s on {records.made_on(record)}, "
                 f"on {record['date']}, with Python {versions['python']} and jax {versions['jax']}."
                 f" All numbers: [{name}.json]({name}.json).")  # fmt: skip
    return "\n\n".join(parts)


def page(experiment: str, runs: Sequence[tuple[str, records.Record]]) -> str:
    plainest = runs[0][1]
    head = [f"# {experiment}", f"*{plainest['question']}*"]
    head += [plainest["legend"]] if plainest.get("legend") else []
    if len(runs) > 1:
        head.append("\n".join(f"- [{n}](#{anchor(n)}): {record['title']}" for n, record in runs))
    return "\n\n".join([*head, *(section(*run) for run in runs)]) + "\n"


def anchor(heading: str) -> str:
    """Where a heading is on its page.

    Example:
      >>> anchor("cifar_pfm-w0.25-layers12+13")
      'cifar_pfm-w025-layers1213'
    """
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


def write_page(folder: Path, experiment: str) -> Path:
    path = folder / f"{experiment}.md"
    path.write_text(page(experiment, found(folder)[experiment]), encoding="utf-8")
    return path


def verdicts_of(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """The verdicts on one claim, which may have several of a record, with links to the records."""
    links: dict[str, str] = {verdict: "" for verdict in claims.VERDICTS}
    names = list(dict.fromkeys(name for _, name, _ in runs))
    for experiment, name, row in runs:
        link = f" [{names.index(name) + 1}]({experiment}.md#{anchor(name)})"
        links[row["verdict"]] += link * (link not in links[row["verdict"]])
    words = {verdict: verdict for verdict in links} | {claims.UNLIKE: f"**{claims.UNLIKE}**"}
    return "; ".join(words[verdict] + found for verdict, found in links.items() if found)


def index(folder: Path) -> str:
    by_claim: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    lines, listed = [], []
    for experiment, runs in found(folder).items():
        rows = [(experiment, name, row) for name, record in runs for row in record["claims"]]
        for run in rows:
            # After a colon stands what of a record it was held against.
            by_claim.setdefault(run[2]["id"].partition(":")[0], []).append(run)
        count = claims.counts([row for *_, row in rows]) or "no claims"
        question = runs[0][1]["question"]
        lines.append([f"[{experiment}]({experiment}.md)", question, str(len(runs)), count])
    table = tables.Table("", ["experiment", "question", "records", "claims"], lines, texts=4)
    for name, runs in sorted(by_claim.items()):
        said = next((row["paper"] for *_, row in runs if row["paper"]), "-")
        listed.append([f"`{name}`", runs[0][2]["claim"], said, verdicts_of(runs)])
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
        counted = f"[Benchmarks]({BENCHMARKS}.md): {aims([record for _, record in measured])}."
        parts += ["## Benchmarks", counted]
    return "\n\n".join(parts) + "\n"


def benchmarks(folder: Path) -> list[tuple[str, records.Record]]:
    return [(path.stem, records.read(path)) for path in sorted(folder.glob(f"{BENCHMARKS}/*.json"))]


def aims(runs: Sequence[records.Record]) -> str:
    met = [row["met"] for record in runs for row in record["rows"] if row.get("target")]
    return f"{sum(met)} of {len(met)} aims met, {len(met) - sum(met)} missed"


def benchmarks_page(folder: Path) -> str:
    """The page of the benchmarks: what each measures, its table, and which aims are met."""
    runs = benchmarks(folder)
    parts = ["# Benchmarks", "*What do passes, training, matching and scores of weights cost?*"]
    parts.append(f"{aims([record for _, record in runs])}. A ratio is how many times faster than "
                 "what is compared with: the median over turns.")  # fmt: skip
    parts.append("\n".join(f"- [{n}](#{anchor(n)}): {aims([record])}" for n, record in runs))
    for name, record in runs:
        table, figure = tables.benchmark(record["title"], record["rows"]), f"{name}.png"
        parts += [f"## {name}", f"*{record['question']}*", f"{table.title}:"]
        parts.append(tables.markdown(table))
        missed = [row["what"] for row in record["rows"] if row.get("met") is False]
        parts += [f"**Missed: {records.joined(missed)}.**"] if missed else []
        shown = (folder / BENCHMARKS / figure).exists()
        parts += [f"![{name}]({BENCHMARKS}/{figure})"] if shown else []
        parts.append(f"Made by `{record['command']}` on {records.made_on(record)}, on "
                     f"{record['date']}, with jax {record['versions']['jax']}.")  # fmt: skip
    return "\n\n".join(parts) + "\n"


def texts(folder: Path) -> dict[str, str]:
    written = {f"{name}.md": page(name, runs) for name, runs in found(folder).items()}
    if benchmarks(folder):
        written[f"{BENCHMARKS}.md"] = benchmarks_page(folder)
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
