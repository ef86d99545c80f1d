"""Settings shared by all tests: strict, many devices, deterministic."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Every compiled program maps memory of its own, and past 65,530 maps of a process, Linux's default,
# XLA crashes in the next compilation.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), 30_000


@pytest.fixture(autouse=True)
def _few_compiled_programs(request):
    """Frees compiled programs between tests when there are very many."""
    yield
    request.config.tests_run = getattr(request.config, "tests_run", 0) + 1
    if request.config.tests_run % 20 == 0 and _MAPS.exists():
        if len(_MAPS.read_bytes().splitlines()) > _MOST_MAPS:
            jax.clear_caches()


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
