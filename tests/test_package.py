"""The package as a whole: what importing it gives, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vfjax


@pytest.mark.parametrize(
    "name",
    [
        *("align", "checkpoint", "data", "diagnose", "merge", "models", "plot", "renorm", "stats"),
        "train",
    ],
)
def test_modules_are_attributes(name):
    code = f"import vfjax; print(vfjax.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"vfjax.{name}", done.stderr
    assert name in dir(vfjax)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        _ = vfjax.merg


def test_core_imports_no_neural_network_library():
    heavy = ("flax", "orbax.checkpoint", "tensorflow_datasets", "matplotlib.pyplot", "equinox")
    code = f"import sys, vfjax; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
