"""Checks the record that the main job wrote on the digits: complete, sane, and as the paper found.

Takes the folder that the main job wrote to: ``python .ci/check_record.py FOLDER``.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

COLUMNS = ["direct", "matched", "repair", "rescale", "bias_calibration"]


def check(folder: Path) -> str:
    """Raises a ValueError at the first thing that is wrong; returns a summary."""
    (path,) = folder.glob("*.json")
    record = json.loads(path.read_text())

    def demand(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{path.name}: {what}")

    figure = path.with_suffix(".png")
    demand(figure.exists() and figure.read_bytes()[:4] == b"\x89PNG", "there is no figure")
    for key in ("config", "seeds", "device", "versions", "seconds", "data", "title", "command"):
        demand(bool(record.get(key)), f"{key} is missing")
    demand(record["columns"] == COLUMNS, f"the columns are {record['columns']}")
    demand(record["data"]["name"] == "digits", "it is not of the digits")

    rows = {row["name"]: row for row in record["rows"]}
    others, merged = record["rows"][:3], record["rows"][3:]
    demand([r["name"] for r in others] == ["model 1", "model 2", "ensemble"], "rows are missing")
    demand(len(merged) >= 4 and merged[0]["layers"] == 0, "rows of merged models are missing")
    for row in record["rows"]:
        wanted = COLUMNS if row in merged else ["direct"]
        demand(list(row["cells"]) == wanted, f"{row['name']} has cells {list(row['cells'])}")
        for column, cell in row["cells"].items():
            values = [cell["mean"], *cell["accuracy"], *cell["loss"]]
            # None stands for what is not finite.
            numbers = all(value is not None and math.isfinite(value) for value in values)
            demand(numbers, f"{row['name']}, {column}: {values}")
            demand(0 <= cell["mean"] <= 1, f"{row['name']}, {column}: {cell['mean']}")
        demand(1 <= row["params_ratio"] <= 2, f"{row['name']}: params {row['params_ratio']}")
        demand(1 <= row["flops_ratio"] <= 2, f"{row['name']}: FLOPs {row['flops_ratio']}")

    edge = record["summary"]["edge_mean"]
    first = {column: cell["mean"] for column, cell in merged[0]["cells"].items()}
    demand(edge > 0.95, f"the edge models have {edge}")
    demand(rows["ensemble"]["cells"]["direct"]["mean"] > edge - 0.02, "the ensemble is poor")
    demand(first["direct"] < 0.3, f"direct averaging at l = 0 gives {first['direct']}")
    for column in ("repair", "rescale"):
        demand(first[column] > first["matched"] + 0.2, f"{column} at l = 0 gives {first[column]}")
        last = merged[-1]["cells"][column]["mean"]
        demand(last >= first[column], f"{column} falls with l, from {first[column]} to {last}")
        demand(last > edge - 0.02, f"{column} at the largest l gives {last}")
    seconds = record["seconds"]["total"]
    return f"{path.name}: {len(record['rows'])} rows in {seconds:.0f} s, as it should be"


if __name__ == "__main__":
    try:
        print(check(Path(sys.argv[1])))
    except (ValueError, KeyError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
