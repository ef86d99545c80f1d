"""What the paper's tables say of ZipIt! and CCA, held against a record of `cifar_pfm.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import _common
import _pairs

LABELS = {
    "direct": "direct",
    "matched": "matched",
    "repair": "REPAIR",
    "rescale": "RESCALE",
    "bias_calibration": "bias cal.",
    "reset": "RESET",
    "am": "AM",
    "am_repair": "AM + REPAIR",
    "am_rescale": "AM + RESCALE",
    "am_reset": "AM + RESET",
}
# What claims are decided by: "equal", "a little" and "much"; what is above or below is so by more
# than noise on the test images.
EQUAL, LITTLE, MUCH = 0.02, 0.05, 0.1


def mean_of(row: Mapping[str, Any], column: str) -> float:
    """The accuracy in a cell, NaN if it is empty."""
    found = row["cells"].get(column)
    return float("nan") if found is None else found["mean"]


def compared(accuracy: float, other: float, images: int) -> int:
    """1 or -1 where an accuracy is above or below another by more than noise, else 0.

    Example:
      >>> compared(0.9, 0.89, 10_000), compared(0.9, 0.89, 100)
      (1, 0)
    """
    found = accuracy - other
    return 0 if abs(found) <= _common.noise(other, images) else 1 if found > 0 else -1


def claims_of(record: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """Each claim of the paper's tables 3, 4, 6 to 9 and 11: whether it holds here, with numbers."""
    match = record["config"]["match"]
    if match not in _pairs.MIXING:
        return []
    rows = {row["layers"]: row for row in record["rows"] if row["layers"] is not None}
    remedy = "reset" if "reset" in record["columns"] else "rescale"
    own, am = (
        {layers: mean_of(row, column) for layers, row in rows.items()}
        for column in (remedy, f"am_{remedy}")
    )
    label = f"{_pairs.MATCHES[match]} with {LABELS[remedy]}"
    last, ensemble = max(rows), record["summary"]["ensemble"]
    images = record["data"]["test_images"]
    against = f"{label} gives {_at(own)}, activation matching {_at(am)}"
    if match == "transport":
        # The paper has it for transformers alone.
        return [(None, against)]
    claims: list[tuple[bool | None, str]] = []
    ahead = {k: compared(own[k], am[k], images) for k in rows}
    if remedy == "rescale":
        claims += _plain_claims(record, rows)
    elif match == "cca" and 0 in rows:
        claims.append(
            (
                ahead[0] > 0,
                f"at l = 0 {label} gives {100 * own[0]:.1f}, activation matching with "
                f"{LABELS[remedy]} {100 * am[0]:.1f}",
            )
        )
    if match == "cca":
        if remedy == "reset":
            # In the paper it is so by more than noise at the first l only.
            claims.append((ahead[min(rows)] > 0 and min(ahead.values()) >= 0, against))
    elif record["model"]["name"].startswith("resnet"):
        claims.append((ahead[min(rows)] < 0 and max(ahead.values()) <= 0, against))
    else:
        claims.append((all(abs(own[k] - am[k]) <= EQUAL for k in rows), against))
    edge, reached = record["summary"]["edge_mean"], record["summary"]["reaches_edges_at"][remedy]
    at = "at none of these l" if reached is None else f"first at l = {reached}"
    text = f"{label} reaches the edge models' mean, {100 * edge:.1f}, {at}"
    if match == "zipit" and record["model"]["name"].startswith("resnet"):
        claims.append((reached is None, text))
    else:
        # At l = 8 of 14 on CIFAR-10, at l = 10 or 12 on CIFAR-100.
        late = 12 if record["data"]["name"] == "cifar100" else 8
        soon = reached is not None and 14 * reached <= late * record["model"]["depth"]
        claims.append((soon, text))
        claims.append(
            (
                # "Equals" it or "passes" it, by less than noise.
                compared(own[last], ensemble, images) == 0,
                f"at l = {last} it has {100 * own[last]:.1f}, the ensemble {100 * ensemble:.1f}",
            )
        )
    return claims


def _plain_claims(
    record: dict[str, Any], rows: Mapping[int, Mapping[str, Any]]
) -> list[tuple[bool | None, str]]:
    """Those at l = 0 on networks without BatchNorm, on CIFAR-10."""
    if 0 not in rows or record["data"]["name"] == "cifar100":
        return []
    name = _pairs.MATCHES[record["config"]["match"]]
    value = {column: mean_of(rows[0], column) for column in record["columns"]}
    text = {column: f"{100 * accuracy:.1f}" for column, accuracy in value.items()}
    remedies = ("repair", "rescale", "bias_calibration")
    best = max(("matched", *remedies), key=lambda column: value[column])
    images = record["data"]["test_images"]
    ahead = value["matched"] - value["am"]
    claims: list[tuple[bool | None, str]] = [
        (
            ahead > MUCH if name == "CCA" else -LITTLE <= ahead < 0,
            f"at l = 0 and without normalisation {name} gives {text['matched']}, activation "
            f"matching {text['am']}",
        ),
        (best == "rescale", f"of what is done to {name}, {LABELS[best]} leads at l = 0"),
    ]
    if name == "CCA":
        return [
            *claims,
            (
                compared(value["repair"], value["matched"], images) < 0,
                f"REPAIR takes CCA from {text['matched']} to {text['repair']}",
            ),
            (
                abs(value["rescale"] - value["am_rescale"]) <= EQUAL,
                f"with RESCALE CCA gives {text['rescale']}, activation matching "
                f"{text['am_rescale']}",
            ),
        ]
    return [
        *claims,
        (
            value["repair"] - value["am_repair"] > MUCH,
            f"with REPAIR {name} gives {text['repair']}, activation matching {text['am_repair']}",
        ),
    ]


def _at(values: Mapping[int, float]) -> str:
    """Accuracies by l.

    Example:
      >>> _at({0: 0.5, 8: 0.75})
      '50.0 (l = 0) and 75.0 (l = 8)'
    """
    return _common.joined([f"{100 * value:.1f} (l = {layers})" for layers, value in values.items()])
