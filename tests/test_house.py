"""The house: rooms that say what they are for, faces that say what they offer, and one way down.

`[tool.importlinter]` in `pyproject.toml` states the floors; what else `CONTRIBUTING.md` says of the
layout is checked here, so that the next file finds its room.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vfjax

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PACKAGE = Path(vfjax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FACES = [path for path in FILES if path.name == "__init__.py"]


def rooms(path: Path) -> tuple[str, ...]:
    """The folders on the way to a file."""
    return path.parent.relative_to(PACKAGE).parts


PUBLIC = [path for path in FACES if not any(part.startswith("_") for part in rooms(path))]
ROOMS = [path for path in FACES if len(rooms(path)) <= 1]

ALGEBRA = {
    "vfjax._propagate.algebra": "the algebra of atoms, step by step",
    "vfjax._propagate.atoms": "what its steps take",
}
# What tests may take from behind a face, by file: where only a look inside can show a fault. All
# other laws are tested through faces, so that what stands behind one can change.
PAST_FACES = {
    "align/test_matchers.py": {"vfjax.align._grouping": "groupings of any numbers, and an oracle"},
    "align/test_plans.py": {"vfjax.align._plans": "solvers and their sizes, and linear programmes"},
    "align/test_transport.py": {"vfjax.align._by_activations": "costs, which plans do not show"},
    "align/test_universe.py": {
        "vfjax.align._cycles": "objectives and searches, and all permutations",
        "vfjax.align._universe": "the search without its canonical order",
    },
    "align/test_within.py": {
        "vfjax.align._heads": "costs of heads in any numbers, and all permutations",
        "vfjax.align._plans": "the plans of these",
    },
    "align/test_zip.py": {"vfjax.align._grouping": "groups of any numbers, and their definition"},
    "checkpoint/test_torch.py": {"vfjax.checkpoint._torch": "names of files too large to write"},
    "diagnose/test_interpolation.py": {"vfjax._passes.batching": "a limit of 1 GiB"},
    "merge/test_partial.py": {
        "vfjax.network._crossing": "places in both orders, of which a network gives one",
        "vfjax.symmetry._places": "these places",
    },
    "propagate/test_rules.py": ALGEBRA,
    "propagate/test_sums.py": ALGEBRA,
    "test_counts.py": {"vfjax.network._arguments": "how often networks are checked"},
}


def name_of(path: Path) -> str:
    """Where a file stands in the package, for the names of tests."""
    return path.relative_to(PACKAGE).as_posix()


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def test_imports_run_down_the_floors():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_few_files_stand_in_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


@pytest.mark.parametrize("path", FACES, ids=name_of)
def test_a_room_opens_with_one_sentence(path):
    first = docstring(path).split("\n\n")[0]
    assert first.endswith(".") and len(re.findall(r"\.(\s|$)", first)) == 1, first


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_a_face_lists_what_it_offers(path):
    module = importlib.import_module(".".join(["vfjax", *rooms(path)]))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)
    assert not [name for name in module.__all__ if name.startswith("_") and name != "__version__"]
    assert len(set(module.__all__)) == len(module.__all__)


def test_only_faces_list_what_they_offer():
    """Behind a face, `__all__` has no reader."""
    listing = {path for path in FILES if "\n__all__ = " in path.read_text(encoding="utf-8")}
    assert {path for path in listing if path not in FACES} == {
        PACKAGE / "imagenet.py",
        PACKAGE / "plot.py",
    }


def modules_behind_faces() -> set[str]:
    """All modules of rooms but those that the room's face offers as they are."""
    behind = set()
    for path in FILES:
        if path not in FACES and rooms(path):
            room = ".".join(["vfjax", *rooms(path)])
            offered = getattr(importlib.import_module(room), "__all__", ())
            if path.stem not in offered:
                behind.add(f"{room}.{path.stem}")
    return behind


BEHIND = modules_behind_faces()


def taken_past_faces(path: Path) -> set[str]:
    """Modules behind faces that a file imports, patches by their name, or reaches by attributes."""
    named = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            named += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.append(node.value)
        elif isinstance(node, ast.Attribute):
            *_, room, module = ("", *ast.unparse(node).split("."))
            named += [name for name in BEHIND if name.endswith(f".{room}.{module}")]
    return {module for name in named for module in BEHIND if f"{name}.".startswith(f"{module}.")}


def test_tests_go_through_faces():
    """And no longer stands in the list what does."""
    taken = {path.relative_to(TESTS).as_posix(): path for path in sorted(TESTS.rglob("*.py"))}
    found = {name: taken_past_faces(path) for name, path in taken.items() if path != Path(__file__)}
    assert {name: each for name, each in found.items() if each} == {
        name: set(modules) for name, modules in PAST_FACES.items()
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_rooms_are_used_through_their_faces(path):
    own = ".".join(["vfjax", *rooms(path)[:1], ""])
    taken = {name for name in taken_past_faces(path) if not name.startswith(own)}
    assert not {name for name in taken if name.startswith("vfjax._")}


def private_attributes_of_networks() -> set[str]:
    """What `Network` keeps and does for itself, by name."""
    body = ast.parse((PACKAGE / "network" / "_network.py").read_text(encoding="utf-8")).body
    (tree,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == "Network")
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if re.match("_[a-z]", name)}


def test_a_network_keeps_its_representation_to_itself():
    """Rooms above see it through `network._inside`, and its own room through one function."""
    private = private_attributes_of_networks()
    assert "_traces" in private
    readers = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in private:
                if ast.unparse(node.value) != "self":
                    readers.add((name_of(path), ast.unparse(node)))
    assert readers == {("network/_retrace.py", "net._traces")}


def test_one_underscore_leads_to_anything_private():
    """A private folder holds plain names; a public one a face and files with an underscore."""
    public = {"imagenet", "plot"}
    for path in FILES:
        parts = [*rooms(path), *([] if path.name == "__init__.py" else [path.stem])]
        underscores = sum(part.startswith("_") for part in parts)
        face = path in PUBLIC or (len(parts) == 1 and path.stem in public)
        assert underscores == (not face), name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_bears_the_name_of_its_module(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert path.stem not in defined


def test_a_module_holds_one_idea():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines > 650}


def test_public_paths():
    """Those that users import; they outlive every move behind them."""
    for name in ("imagenet", "symmetry", "network"):
        importlib.import_module(f"vfjax.{name}")
    for name in ("Crossing", "FoldError", "Layer", "Network", "Norm", "PermutationSpec", "Tap"):
        assert name in vfjax.__all__ and hasattr(vfjax, name)
    from vfjax.imagenet import Streamed
    from vfjax.merge import Merged

    assert Streamed.__name__ == "Streamed" and Merged.__name__ == "Merged"
