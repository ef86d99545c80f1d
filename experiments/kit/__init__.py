"""What the experiments share. No algorithm is here; those are in `vfjax`.

A script says what is measured and hands it to `experiment.Experiment`, whose docstring shows how.
"""

import sys

_given = sys.excepthook


def _say_stopped(kind: type[BaseException], *error: object) -> None:
    """One line for Ctrl-C while Python still imports; later `experiment.reported` has it."""
    if not issubclass(kind, KeyboardInterrupt):
        return _given(kind, *error)
    sys.stderr.write("stopped before anything was measured.\n")
    raise SystemExit(130)


sys.excepthook = _say_stopped
