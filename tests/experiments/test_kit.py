"""What the experiments share: rows, tables, claims, pages, errors."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import logging
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from vfjax import data

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
kit = importlib.import_module("kit")
claims, cli, experiment, figures, pages, records, tables, timing = (
    importlib.import_module(f"kit.{name}")
    for name in "claims cli experiment figures pages records tables timing".split()
)
AS, UNLIKE, OPEN, NEW = claims.VERDICTS
MODULES = [f"kit.{module.name}" for module in pkgutil.iter_modules(kit.__path__)]


@pytest.mark.parametrize("name", [*MODULES, "cifar_pfm"])
def test_examples_in_docstrings(name):
    assert not doctest.testmod(importlib.import_module(name)).failed


# --------------------------------------------------------------------------------------- options


def test_folder_is_tried_and_left_as_it_was(tmp_path):
    folder = tmp_path / "new" / "newer"
    assert cli.output_folder(str(folder)) == str(folder)
    assert cli.output_folder(str(tmp_path)) == str(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(argparse.ArgumentTypeError, match="file is not a folder"):
        cli.output_folder(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("a\n  b"), 1),
        (FloatingPointError("a b"), 1),
        (cli.UserError("a b"), 2),
        (data.DatasetError("a b"), 2),
    ],
)
def test_errors_are_one_line(error, status, capsys):
    with pytest.raises(SystemExit, match=str(status)), experiment.reported("cifar_pfm.py"):
        raise error
    assert capsys.readouterr().err == "cifar_pfm.py: error: a b\n"


def test_ctrl_c_while_python_imports_is_one_line():
    code = f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import kit; raise "
    for error, status in (("KeyboardInterrupt", 130), ("ValueError", 1)):
        found = subprocess.run([sys.executable, "-c", code + error], capture_output=True, text=True)
        assert found.returncode == status
        lines = found.stderr.splitlines()
        stopped = ["stopped before anything was measured."]
        assert lines == stopped if status == 130 else lines[-1] == "ValueError"


def test_other_errors_are_not_hidden():
    with pytest.raises(TypeError), experiment.reported("cifar_pfm.py"):
        raise TypeError("a bug")


def test_records_hold_no_nan(tmp_path):
    record = {"loss": [float("nan"), 0.5], "more": {"x": (float("inf"), 1, None, "NaN")}}
    path = records.write(tmp_path / "a.json", record)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"loss": [None, 0.5], "more": {"x": [None, 1, None, "NaN"]}}


# ---------------------------------------------------------------------------------------- claims


def record(images=10_000, **accuracies):
    """A record with a row for each accuracy."""
    rows = [{"remedy": name, "accuracy": value} for name, value in accuracies.items()]
    return records.Record(data={"name": "cifar10", "test_images": images}, rows=rows)


def of(name):
    return claims.accuracy(name, remedy=name)


@pytest.mark.parametrize(
    "rule, found, holds",
    [
        (claims.Above(of("a"), of("b")), {"a": 0.6, "b": 0.5}, True),
        (claims.Above(of("a"), of("b")), {"a": 0.5, "b": 0.6}, False),
        (claims.Above(of("a"), of("b")), {"a": 0.505, "b": 0.5}, None),
        (claims.Above(of("a"), of("b")), {"a": 0.19, "b": 0.1}, None),
        (claims.Above(of("a"), of("b"), 0.2), {"a": 0.6, "b": 0.5}, False),
        (claims.Above(of("a"), of("b"), 0.2), {"a": 0.8, "b": 0.5}, True),
        (claims.Level((of("a"), of("b")), 0.02), {"a": 0.51, "b": 0.5}, True),
        (claims.Level((of("a"), of("b")), 0.02), {"a": 0.5, "b": 0.6}, False),
        (claims.Level((of("a"), of("b")), 0.02), {"a": 0.525, "b": 0.5}, None),
        (claims.Level((of("a"), of("b")), 0), {"a": 0.505, "b": 0.5}, True),
        (claims.Level((of("a"), of("b")), 0), {"a": 0.52, "b": 0.5}, False),
        (claims.Leads(of("a"), (of("b"), of("c"))), {"a": 0.9, "b": 0.5, "c": 0.8}, True),
        (claims.Leads(of("a"), (of("b"), of("c"))), {"a": 0.7, "b": 0.5, "c": 0.8}, False),
        (claims.Leads(of("a"), (of("b"), of("c"))), {"a": 0.8, "b": 0.5, "c": 0.8}, None),
        (claims.Leads(of("a"), (of("b"),), last=True), {"a": 0.5, "b": 0.8}, True),
        (claims.Leads(of("a"), (of("b"),), last=True), {"a": 0.8, "b": 0.5}, False),
        (claims.AtChance(of("a")), {"a": 0.11}, True),
        (claims.AtChance(of("a")), {"a": 0.125}, None),
        (claims.AtChance(of("a")), {"a": 0.3}, False),
    ],
)
def test_rules(rule, found, holds):
    assert rule(record(**found))[0] is holds
    assert str(rule) and "object at" not in str(rule)


def test_what_was_not_measured_has_no_verdict():
    for rule in (
        claims.Above(of("a"), of("b")),
        claims.Level((of("a"), of("b")), 0),
        claims.Leads(of("b"), (of("a"),)),
        claims.AtChance(of("b")),
    ):
        assert rule(record(a=0.5)) is None
        claim = claims.Claim("id", "claim", "paper", rule)
        assert claims.decided([claim], record(a=0.5)) == []


def test_one_side_may_be_at_chance():
    """Where that is claimed it is decided; of two numbers near chance neither is ahead."""
    direct, repair = of("direct"), of("repair")
    found = record(direct=0.1, repair=0.641)
    assert claims.AtChance(direct)(found)[0] is True
    assert claims.Above(repair, direct, 0.1)(found)[0] is True
    assert claims.Above(direct, repair)(found)[0] is False
    assert claims.Leads(direct, [repair], last=True)(found)[0] is True
    assert claims.Level([direct, repair], 0.05)(found)[0] is False
    near = record(direct=0.1, repair=0.19)
    assert claims.AtChance(direct)(near)[0] is True
    for rule in (claims.Above(repair, direct), claims.Leads(repair, [direct])):
        assert rule(near)[0] is None
    assert claims.Level([direct, repair], 0.05)(near)[0] is None


def test_verdicts():
    """As in the paper, unlike, undecided, or nothing the paper has."""
    rule, told = claims.Above(of("a"), of("b")), lambda record: record["data"]["name"] != "cifar10"
    found = record(a=0.6, b=0.5)
    for paper, of_record, numbers, verdict in (
        ("a leads", None, {"a": 0.6, "b": 0.5}, AS),
        ("a leads", None, {"a": 0.5, "b": 0.6}, UNLIKE),
        ("a leads", None, {"a": 0.5, "b": 0.5}, OPEN),
        ("", None, {"a": 0.6, "b": 0.5}, NEW),
        ("a leads", told, {"a": 0.6, "b": 0.5}, NEW),
    ):
        options = {} if of_record is None else {"told": of_record}
        (row,) = claims.decided(
            [claims.Claim("id", "c", paper, rule, **options)], record(**numbers)
        )
        assert row["verdict"] == verdict
        assert (row["paper"] == "") == (verdict == NEW)
    claim = claims.Claim("id", "c", "p", rule, when=lambda record: False)
    assert claims.decided([claim], found) == []


# ------------------------------------------------------------------------------- tables, figures


def test_a_table_in_markdown():
    table = tables.Table("", ["row", "%"], [["a", "*1"], ["b", "**2**"]], "*: best")
    lines = ["| row | % |", "| :-- | --: |", "| a | **1** |", "| b | **2** |", "", "Bold: best."]
    assert tables.markdown(table).splitlines() == lines


def test_a_line_is_the_mean_over_repetitions():
    rows = records.Rows({"k": k, "accuracy": (k + s) / 4} for k in (0, 1) for s in (0, 2))
    line = figures.line(rows, "k", method="repair")
    assert (line.name, line.x, line.y) == ("REPAIR", [0, 1], [25.0, 50.0])
    assert line.error == pytest.approx([35.355, 35.355], rel=1e-4)


def test_logs_do_not_tear_bars(capsys):
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        with timing.logs_above_bars(), tqdm(total=2) as bar:
            bar.update()
            logging.getLogger("vfjax.train").info("epoch 1")
        assert not root.handlers
    finally:
        root.handlers = before
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.endswith(" epoch 1") and "%" not in line for line in lines)


def test_one_method_has_one_look_and_one_place_in_the_legend():
    line = figures.Line("REPAIR", [0, 1], [1.0, 2.0], [0.1, 0.2], method="repair")
    other = figures.Line("ensemble", None, 2.0, method="ensemble")
    panel = figures.Panel("a", "x", "y", [other, line])
    figure = figures.draw([panel, panel], finding="It works", subtitle="digits", bars="spread")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["REPAIR", "ensemble"]
    assert all(axes.get_legend() is None for axes in figure.axes)
    texts = [text.get_text() for text in figure.texts]
    assert {"It works", "digits", "Bars: spread."} <= set(texts)
    colours = [axes.containers[0].lines[0].get_color() for axes in figure.axes]
    assert colours == [figures.METHODS["repair"][1]] * 2
    plain = figures.draw([figures.Panel("a", "x", "y", [other])], finding="It works", bars="spread")
    assert not any("Bars" in text.get_text() for text in plain.texts)


def test_a_row_needs_a_cell(tmp_path):
    setup = experiment.Setup(None, None, {})
    run = experiment.Run(setup, timing.Stopwatch(), tmp_path / "a.partial", "key")
    with pytest.raises(RuntimeError, match="a row belongs to a cell"):
        run.add({"accuracy": 1.0})


def test_what_a_stopped_run_kept_is_for_the_same_run(tmp_path):
    setup, path = experiment.Setup(None, None, {}), tmp_path / "a.partial"

    def run(key):
        return experiment.Run(setup, timing.Stopwatch(), path, key)

    first, plan = run("key"), [{"k": 1}, {"k": 2}]
    cells = first.cells(plan)
    for value in (0.5, 0.6):
        first.add(next(cells) | {"accuracy": value})
    first.note("matching", converged=True)
    first.save()
    again = run("key")
    # The second cell was not finished.
    assert again.count == 1 and again.notes == {"matching": [{"converged": True}]}
    assert [dict(cell) for cell in again.cells(plan)] == [{"k": 2}]
    assert again.rows[0] == {"k": 1, "accuracy": 0.5}
    assert run("other").count == 0
    path.write_text("{")
    assert run("key").count == 0


# ----------------------------------------------------------------------------------------- pages


def test_pages_are_up_to_date():
    for name, text in pages.texts(records.RESULTS).items():
        assert (records.RESULTS / name).read_text(encoding="utf-8") == text, name


def assert_same(found, expected, at):
    """Floats relatively, for versions of Python add them differently; all else exactly."""
    assert type(found) is type(expected), at
    if isinstance(expected, dict):
        assert list(found) == list(expected), at
        for key, value in expected.items():
            assert_same(found[key], value, f"{at}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for place, value in enumerate(expected):
            assert_same(found[place], value, f"{at}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=0), at
    else:
        assert found == expected, at


FOUND = [record for runs in pages.found(records.RESULTS).values() for record in runs]


@pytest.mark.parametrize("record", FOUND, ids=[record.name for record in FOUND])
def test_records_are_those_of_the_scripts(record):
    """Tables, claims and findings follow from the rows, and no script has their numbers."""
    script = importlib.import_module(record["experiment"])
    derived = records.finite(script.EXPERIMENT.derived(record))
    for key in ("question", "title", "finding", "tables", "claims", "legend", "summary"):
        assert_same(json.loads(json.dumps(derived.get(key))), record.get(key), key)
    assert script.EXPERIMENT.file_name(record) == record.name
    # What a script does by default is to be seen soon.
    assert record["seconds"]["total"] < (1200 if "--model" in record["command"] else 600)
    found = record["data"] if isinstance(record["data"], list) else [record["data"]]
    assert not any(one.get("fallback") for one in found)
    assert (records.RESULTS / f"{record.name}.png").exists()
    source = Path(script.__file__).read_text(encoding="utf-8")
    assert "What came out" not in source and record["finding"] not in source


def test_the_index_has_every_claim_once():
    index = pages.index(records.RESULTS)
    for found in FOUND:
        for row in found["claims"]:
            assert index.count(f"| `{row['id'].partition(':')[0]}` |") == 1
    # Of an experiment without a record, too.
    for claim in importlib.import_module("imagenet_pruning").CLAIMS:
        (line,) = (line for line in index.splitlines() if line.startswith(f"| `{claim.id}` |"))
        assert OPEN in line and "needs ImageNet" in line
    ids = [line.split("`")[1] for line in index.splitlines() if line.startswith("| `")]
    assert ids == sorted(set(ids))
    for verdict in claims.VERDICTS:
        assert verdict in index
    assert f"**{UNLIKE}** [" in index and "***" not in index


# What results abbreviate, by experiment.
TERMS = {"cifar_pfm": ("PFM l/L", "AM", "CCA", "RESET")}


@pytest.mark.parametrize("name", TERMS)
def test_pages_explain_their_notation(name):
    """After what is asked, before what came out."""
    page = pages.texts(records.RESULTS)[f"{name}.md"]
    head = page.partition("\n## ")[0]
    legend = importlib.import_module(name).EXPERIMENT.legend
    assert all(term in legend for term in TERMS[name]) and " ".join(legend.split()) in head
    assert head.index(importlib.import_module(name).EXPERIMENT.question) < head.index("PFM l/L")


def test_page_of_benchmarks_says_which_aims_are_missed(tmp_path):
    rows = [{"what": "forward", "seconds": 2.0}]
    rows += [{"what": "slow", "seconds": 3.0, "ratio": 0.7, "target": ">= 0.9", "met": False}]
    rows += [{"what": "fast", "seconds": 2.1, "ratio": 0.95, "target": ">= 0.9", "met": True}]
    record = {"title": "of passes", "question": "How long?", "command": "python p.py"}
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    records.write(folder / "passes.json", record | {"rows": rows} | records.environment())
    assert set(pages.texts(tmp_path)) == {"benchmarks.md", "README.md"}
    page = pages.benchmarks_page(tmp_path)
    for said in ("1 of 2 aims met, 1 missed", "*How long?*", "| slow | 3 | 0.7 | >= 0.9 | NO |"):
        assert said in page
    assert "**Missed: slow.**" in page and "`python p.py`" in page and ".png" not in page
    assert "[Benchmarks](benchmarks.md): 1 of 2 aims met, 1 missed." in pages.index(tmp_path)
