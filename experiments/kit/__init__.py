"""What the experiments share. No algorithm is here; those are in `vfjax`.

A script says what is measured and hands it to `experiment.Experiment`, whose docstring shows how.
"""

import sys
from typing import Any


def _say_stopped(kind: type[BaseException], error: BaseException, *where: Any) -> None:
    """One line for Ctrl-C while Python still imports; later `experiment.reported` has it."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, *where)
    sys.stderr.write("stopped before anything was measured.\n")
    raise SystemExit(130)


sys.excepthook = _say_stopped
