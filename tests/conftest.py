"""Settings shared by all tests: strict, many devices, deterministic, and little to compile."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

import compilation_cache

# Through the environment, so that processes that tests start do the same; what was set already
# stays. Most of the suite's time would go into compiling small programs that run once: each is kept
# on disk, shared by all workers and by the next run, and few optimisations are made.
for _name, _value in {
    "JAX_COMPILATION_CACHE_DIR": str(compilation_cache.folder()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # A worker has one core: threads of BLAS, which wait by spinning, would take it from others.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# Every compiled program maps memory of its own, and past 65,530 maps of a process, Linux's default,
# XLA crashes in the next compilation.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), 30_000


def pytest_configure(config):
    """Bounds the cache, once per run, and lets the garbage collector run less often.

    Traces are many small objects that live long, so that collections cost much and free little.
    """
    if not hasattr(config, "workerinput"):
        compilation_cache.prune(compilation_cache.folder())
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Compiles what tests marked `computes` run, fixtures included, as well as XLA can.

    Few optimisations save compilation, and slow down what then runs for seconds.
    """
    few = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() in ("1", "true")
    if not few or item.get_closest_marker("computes") is None:
        return (yield)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return (yield)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


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


def pytest_collection_modifyitems(config, items):
    """Skips the tests marked gpu where there is no accelerator, and zoo unless asked for."""
    if "zoo" not in config.option.markexpr:
        zoo = pytest.mark.skip(reason="half an hour: pytest -m zoo")
        for item in items:
            if item.get_closest_marker("zoo") and "equinox MLP" not in item.name:
                item.add_marker(zoo)
    if jax.default_backend() != "cpu":
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
