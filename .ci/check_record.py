"""Checks the record that the main job wrote on the digits: complete, sane, and as the paper found.

Takes the folder that the main job wrote to: ``python .ci/check_record.py FOLDER``.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

COLUMNS = {
    "direct": ("none", "none"),
    "matched": ("activation", "none"),
    "repair": ("activation", "repair"),
    "rescale": ("activation", "rescale"),
    "bias_calibration": ("activation", "bias_calibration"),
}
EDGES = ["model 1", "model 2", "ensemble"]
VERDICTS = {"as in the paper", "unlike", "undecided here", "not in the paper"}


def check(folder: Path) -> str:
    """Raises a ValueError at the first thing that is wrong; returns a summary."""
    (path,) = folder.glob("*.json")
    record = json.loads(path.read_text())

    def demand(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{path.name}: {what}")

    figure, page = path.with_suffix(".png"), folder / "cifar_pfm.md"
    demand(figure.exists() and figure.read_bytes()[:4] == b"\x89PNG", "there is no figure")
    demand(page.exists() and f"## {path.stem}" in page.read_text(), "there is no page")
    demand(not list(folder.glob("*.partial")), "there is still a partial record")
    keys = ("config", "seeds", "device", "versions", "seconds", "data", "title", "command")
    for key in (*keys, "rows", "question", "finding", "tables", "claims"):
        demand(bool(record.get(key)), f"{key} is missing")
    demand(record["data"]["name"] == "digits", "it is not of the digits")
    for claim in record["claims"]:
        demand(claim["verdict"] in VERDICTS, f"{claim['id']} is {claim['verdict']}")

    rows = record["rows"]
    demand([row["network"] for row in rows[:3]] == EDGES, "rows are missing")
    merged = rows[3:]
    layers = sorted({row["layers"] for row in merged})
    demand(len(layers) >= 4 and layers[0] == 0, "rows of merged models are missing")
    cells = {(row["layers"], row["match"], row["remedy"]): row for row in merged}
    wanted = {(number, *column) for number in layers for column in COLUMNS.values()}
    demand(set(cells) == wanted and len(merged) == len(wanted), f"the cells are {list(cells)}")
    for row in rows:
        name = f"{row['network']}, {row['layers']}, {row['match']}, {row['remedy']}"
        # None stands for what is not finite.
        for key in ("accuracy", "loss"):
            number = row[key] is not None and math.isfinite(row[key])
            demand(number, f"{name}: {key} {row[key]}")
        demand(0 <= row["accuracy"] <= 1, f"{name}: {row['accuracy']}")
        demand(1 <= row["params_ratio"] <= 2, f"{name}: params {row['params_ratio']}")
        demand(1 <= row["flops_ratio"] <= 2, f"{name}: FLOPs {row['flops_ratio']}")

    def accuracy(number: int, column: str) -> float:
        return cells[number, *COLUMNS[column]]["accuracy"]

    edge, last = record["summary"]["edge_mean"], layers[-1]
    mean = (rows[0]["accuracy"] + rows[1]["accuracy"]) / 2
    demand(math.isclose(edge, mean), f"the edge models have {mean}, not {edge}")
    first = {column: accuracy(0, column) for column in COLUMNS}
    demand(edge > 0.95, f"the edge models have {edge}")
    demand(rows[2]["accuracy"] > edge - 0.02, "the ensemble is poor")
    demand(first["direct"] < 0.3, f"direct averaging at l = 0 gives {first['direct']}")
    for column in ("repair", "rescale"):
        demand(first[column] > first["matched"] + 0.2, f"{column} at l = 0 gives {first[column]}")
        end = accuracy(last, column)
        demand(end >= first[column], f"{column} falls with l, from {first[column]} to {end}")
        demand(end > edge - 0.02, f"{column} at the largest l gives {end}")
    seconds = record["seconds"]["total"]
    return f"{path.name}: {len(rows)} rows in {seconds:.0f} s, as it should be"


if __name__ == "__main__":
    try:
        print(check(Path(sys.argv[1])))
    except (ValueError, KeyError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
