"""What every experiment keeps to, whatever it measures: record, figure, page, help, errors.

A script is held to this by being in the folder and on the kit; all it needs here is its smallest
options.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
if str(EXPERIMENTS) not in sys.path:
    sys.path.insert(0, str(EXPERIMENTS))
kit = importlib.import_module("kit.experiment")
claims, cli, records, tables = (
    importlib.import_module(f"kit.{name}") for name in ("claims", "cli", "records", "tables")
)

DIGITS = "--dataset digits --model digits-mlp"
# What a script measures in seconds.
SMALLEST = {
    "cifar_pfm": f"{DIGITS} --layers 0 5 --match weight --samples 200",
    "imagenet_pruning": "--stand-in --sparsities 50 --test 10 --statistics 16",
    "linear_networks": "--dataset digits --quick",
    "multi_dataset": "--quick",
    "normalization": f"{DIGITS} --samples 100 --statistics 200 --held-out 100",
    "permute_first_layers": f"{DIGITS} --match weight --samples 50 --statistics 100",
    "pfm_vs_partial_zip": f"{DIGITS} --layers 0 4 --match activation --samples 200 --statistics"
    + " 200",
    "pruning": f"{DIGITS} --methods magnitude --sparsities 50 90 --samples 64 --test 100"
    + " --statistics 100 --runs 1",
    "residual_linear": "--dataset digits --quick",
    "training_recipe": "--quick --dataset digits",
    "vanishing_feature": f"{DIGITS} --samples 50 --statistics 100",
    "vanishing_feature_pruned": f"{DIGITS} --samples 50 --statistics 100",
    "vit_transport": "--dataset digits --blocks 0 --regularization 0.1 --samples 200 --held-out 100"
    + " --test 100",
    "zipit_disjoint": f"{DIGITS} --epochs 3 --samples 100 --statistics 200 --held-out 100",
}
SCRIPTS = sorted(
    path.stem for path in EXPERIMENTS.glob("*.py") if "\nEXPERIMENT = " in path.read_text()
)
KEYS = ("experiment", "question", "command", "config", "data", "seeds", "rows", "notes", "title")
KEYS += ("finding", "tables", "claims", "seconds", "versions", "device", "date")


def test_all_are_here():
    assert set(SMALLEST) == set(SCRIPTS)


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Smaller transformers; no optimal pairs of features, which take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        zipit = importlib.import_module("zipit_disjoint")
        matchers = {way: zipit.MATCHERS[way] for way in ("identity", "permute", "greedy")}
        patch.setattr(zipit, "MATCHERS", matchers)
        vits = importlib.import_module("kit.transformers")
        model = {"blocks": 1, "features": 8, "heads": 2, "expansion": 2}
        patch.setattr(vits, "DIGITS", dataclasses.replace(vits.DIGITS, **model))
        recipe = dataclasses.replace(vits.DIGITS_RECIPE, epochs=1, warmup_epochs=0.0)
        patch.setattr(vits, "DIGITS_RECIPE", recipe)
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs a script once for all tests: its path and record."""
    found: dict = {}

    def run(name):
        if name not in found:
            out = tmp_path_factory.mktemp(name) / "out"
            script = importlib.import_module(name)
            path = script.main([*SMALLEST[name].split(), "--out", str(out)])
            found[name] = path, records.read(path)
        return found[name]

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_record_figure_and_page(name, ran):
    path, record = ran(name)
    script = importlib.import_module(name).EXPERIMENT
    assert not [key for key in KEYS if key not in record]
    assert record["experiment"] == name == script.name and path.stem == script.file_name(record)
    assert record["command"].startswith(f"python experiments/{name}.py ")
    assert record["rows"] and record["seconds"]["total"] > 0
    for row in record["rows"]:
        # Flat: one number or name at each key.
        assert all(v is None or isinstance(v, (str, int, float, bool)) for v in row.values()), row
    assert {p.name for p in path.parent.iterdir() if p.is_file()} == {
        path.name,
        f"{path.stem}.png",
        f"{name}.md",
    }
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    for found in record["claims"]:
        assert found["verdict"] in claims.VERDICTS and found["here"] and found["rule"]
        assert (found["verdict"] == claims.NEW) == (found["paper"] == "")
        assert "object at" not in found["rule"]
    assert record["tables"]
    for table in record["tables"]:
        assert {len(line) for line in table["lines"]} == {len(table["header"])}
    page = path.with_name(f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n") and record["question"] in page
    _, _, section = page.partition(f"\n## {path.stem}\n")
    figure = f"]({path.stem}.png)"
    for said in (record["title"], record["finding"], record["command"], figure, "CPU cores"):
        assert said in section
    assert all(row["here"] in section for row in record["claims"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_figure_says_what_was_found(name, ran):
    _, record = ran(name)
    figure = importlib.import_module(name).EXPERIMENT.figure(record)
    texts = [" ".join(text.get_text().split()) for text in figure.texts]
    assert record["finding"] in texts and len(figure.legends) == 1
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() is None
    bars = any(getattr(c, "has_yerr", False) for axes in figure.axes for c in axes.containers)
    assert bars == any(text.startswith("Bars: ") for text in texts)


@pytest.mark.parametrize("name", SCRIPTS)
def test_claims_are_those_of_papers(name):
    found = importlib.import_module(name).EXPERIMENT.claims
    assert len({claim.id for claim in found}) == len(found)
    for claim in found:
        assert claim.id.count(".") >= 2 and claim.claim and str(claim.rule)
        assert claim.by or hasattr(type(claim.rule), "__dataclass_fields__"), claim.id


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_begins_with_the_question(name, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    printed = capsys.readouterr().out
    head = script.__doc__.strip().splitlines()
    # One screen.
    assert len(head) <= 25 and script.EXPERIMENT.question.endswith("?")
    assert head[0] in printed and f"python experiments/{name}.py" in script.__doc__
    assert "paper" in script.__doc__
    for action in script.EXPERIMENT.parser()._actions:
        assert action.help and all(option in printed for option in action.option_strings)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "options",
    [["--no-such-option"], ["--dataset", "nowhere"], ["--data-dir"], ["--redraw", "/nowhere.json"]],
    ids=" ".join,
)
def test_bad_options_are_one_line(name, options, capsys, tmp_path):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit, match="2"):
        script.main(["--out", str(tmp_path / "out"), *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_keeps_what_was_measured(name, ran, tmp_path, monkeypatch, capsys):
    _, whole = ran(name)
    script, out = importlib.import_module(name), tmp_path / "out"
    options = [*SMALLEST[name].split(), "--out", str(out)]
    counted = []

    def press(run):
        counted.append(run.count)
        if run.count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(kit.Run, "cell_done", press)
    with pytest.raises(SystemExit, match="130"):
        script.main(options)
    *_, line = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert line.startswith(f"{name}.py: stopped; 2 cells are kept")
    assert "Run the same command again" in line
    (partial,) = (path for path in out.iterdir() if path.is_file())
    assert partial.suffix == ".partial"
    # The next call measures what is missing, and the record is as of one that was not stopped.
    monkeypatch.setattr(kit.Run, "cell_done", lambda run: counted.append(run.count))
    record = records.read(script.main(options))
    assert counted[:3] == [1, 2, 3] and counted == list(range(1, counted[-1] + 1))
    assert not partial.exists()
    assert len(record["rows"]) == len(whole["rows"])
    for row, other in zip(record["rows"], whole["rows"], strict=True):
        assert list(row) == list(other)
        for key, value in other.items():
            if key == "seconds":
                continue
            near = pytest.approx(value, rel=1e-3, abs=0.02) if isinstance(value, float) else value
            assert row[key] == near, key


def test_what_was_kept_of_another_run_is_not_used(tmp_path, monkeypatch, capsys):
    """Networks that are others make what was measured void; the kit sees to that for all."""
    name = "cifar_pfm"
    script, out = importlib.import_module(name), tmp_path / "out"
    options, given = [*SMALLEST[name].split(), "--out", str(out)], script.EXPERIMENT.prepare
    counted = []

    def press(run):
        counted.append(run.count)
        raise KeyboardInterrupt

    monkeypatch.setattr(kit.Run, "cell_done", press)
    with pytest.raises(SystemExit, match="130"):
        script.main(options)

    def other(config, watch):
        setup = given(config, watch)
        return kit.Setup(setup.config, setup.value, setup.record, ("others",))

    monkeypatch.setitem(script.EXPERIMENT.__dict__, "prepare", other)
    with pytest.raises(SystemExit, match="130"):
        script.main(options)
    assert counted == [1, 1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_drawn_anew_a_record_stays(name, ran):
    path, _ = ran(name)
    before = path.read_text()
    path.with_suffix(".png").unlink()
    importlib.import_module(name).main(["--redraw", str(path)])
    assert path.read_text() == before and path.with_suffix(".png").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_imports_another(name):
    tree = ast.parse((EXPERIMENTS / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    others = {path.stem for path in EXPERIMENTS.glob("*.py")}
    assert not imported & others
