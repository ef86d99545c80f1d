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
PACKAGE = Path(vfjax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FACES = [path for path in FILES if path.name == "__init__.py"]


def rooms(path: Path) -> tuple[str, ...]:
    """The folders on the way to a file."""
    return path.parent.relative_to(PACKAGE).parts


PUBLIC = [path for path in FACES if not any(part.startswith("_") for part in rooms(path))]


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


@pytest.mark.parametrize("path", PUBLIC, ids=name_of)
def test_a_face_lists_what_it_offers(path):
    module = importlib.import_module(".".join(["vfjax", *rooms(path)]))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)
    assert not [name for name in module.__all__ if name.startswith("_") and name != "__version__"]
    assert len(set(module.__all__)) == len(module.__all__)


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
