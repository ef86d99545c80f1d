"""Settings shared by all tests: strict, many devices, deterministic."""

from __future__ import annotations

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def _strict_rank_promotion():
    """Implicit rank promotion hides shape mistakes, so it raises in every test."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Runs one test in double precision."""
    with jax.enable_x64(True):
        yield


def pytest_collection_modifyitems(items):
    """Skips the tests marked gpu where there is no accelerator."""
    if jax.default_backend() != "cpu":
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
