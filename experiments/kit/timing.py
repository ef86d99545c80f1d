"""Clocks, and progress bars with logs above them."""

import collections
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class Stopwatch:
    """Seconds by stage, as in `with watch("data"): ...`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time that the block takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def go_on(self, before: Mapping[str, float]) -> None:
        """Adds what `record` gave in an earlier call that was stopped."""
        self._start -= before.get("total", 0.0)
        for stage in before.keys() - {"total"}:
            self.seconds[stage] += before[stage]

    def record(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {k: round(v, 2) for k, v in (*self.seconds.items(), ("total", total))}


class Watched:
    """Re-iterable batches with a progress bar that appears when a pass takes over two seconds."""

    def __init__(self, data: Iterable[Any], description: str) -> None:
        self.data, self.description = data, description

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(tqdm(self.data, desc=self.description, delay=2, leave=False, unit="batch"))


@contextlib.contextmanager
def logs_above_bars() -> Iterator[None]:
    """Inside, warnings and what training says go to standard error without tearing the bars."""
    root, own = logging.getLogger(), logging.getLogger("vfjax")
    level, given = own.level, root.handlers
    own.setLevel(level or logging.INFO)
    with logging_redirect_tqdm():
        # Whoever has set up logging keeps how they have it written.
        if not given:
            root.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        try:
            yield
        finally:
            own.setLevel(level)
