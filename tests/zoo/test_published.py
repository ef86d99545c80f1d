"""The laws on networks that others published: `pip install ".[test,zoo]" && pytest -m zoo`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import jax
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "benchmarks")]
networks, published = map(importlib.import_module, ("_networks", "published"))

pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.zoo
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_all_laws_hold(name):
    if not networks.installed(name):
        pytest.skip(f"{name.split()[0]} is not installed")
    with jax.numpy_rank_promotion("allow"):
        found = published.checked(networks.NETWORKS[name]())
    failed = {law: found[law] for law in published.LAWS if found[law]}
    assert failed.keys() == networks.EXCEPTIONS.get(name, {}).keys(), failed


def test_there_are_enough():
    assert len(networks.NETWORKS) >= 40
