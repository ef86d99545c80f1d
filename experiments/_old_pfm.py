"""Temporary: what scripts that are not on the kit yet took from `cifar_pfm.py`."""

from __future__ import annotations

from _tables import LABELS  # noqa: F401
from kit.pairs import MIXING, default_layers  # noqa: F401

import vfjax


def columns_of(net: vfjax.Network, match: str) -> list[str]:
    """The columns of the table: the paper's table 1, or 7 and 8 for networks with BatchNorm."""
    repaired = ["reset"] if net.norms else ["repair", "rescale", "bias_calibration"]
    columns = ["direct", *(["matched"] if match != "none" else []), *repaired]
    if match in MIXING:
        columns += ["am", *(f"am_{remedy}" for remedy in repaired if f"am_{remedy}" in LABELS)]
    return columns


def parts_of(column: str, match: str) -> tuple[str, str | None]:
    """The matching of a column, and what is done to the merged network.

    Example:
      >>> parts_of("reset", "cca"), parts_of("am_reset", "cca"), parts_of("direct", "cca")
      (('cca', 'reset'), ('activation', 'reset'), ('none', None))
    """
    if column == "direct":
        return "none", None
    first, _, remedy = column.partition("_")
    if first == "am":
        return "activation", remedy or None
    return match, None if column == "matched" else column
