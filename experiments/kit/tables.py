"""Tables, printed and in Markdown; most are rows of a record, spread over lines and columns."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from kit import records


@dataclasses.dataclass(frozen=True)
class Table:
    """What is shown; its fields are kept in records, so it is plain data.

    A cell that begins with an asterisk is marked; the caption says what that means. So many of the
    first columns as `texts` says hold text, and are left-aligned.
    """

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""
    texts: int = 1


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of `pivot`: what is at `key` in the rows of a line that are as `where` says, too.

    `show` makes the text of a cell of its values, one for each repetition; None for `percent`.
    """

    title: str
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: str = "accuracy"
    show: Callable[[Sequence[float]], str] | None = None


def pivot(
    rows: records.Rows,
    lines: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    title: str = "",
    corner: str = "",
    mark: Callable[[str, float], bool] | None = None,
    caption: str = "",
) -> Table:
    """Spreads rows over lines (by name, what their rows have) and columns.

    A cell without rows is empty; one whose rows have None is a dash. Rows that lack what columns
    differ in, such as those of edge models, stand in the first of these. A cell is marked where
    `mark` says so, called with the name of its line and its mean.

    Example:
      >>> rows = records.Rows([{"k": 0, "how": "direct", "accuracy": 0.5},
      ...                      {"k": 0, "how": "REPAIR", "accuracy": None}])
      >>> pivot(rows, {"k = 0": {"k": 0}}, [Column(n, {"how": n}) for n in ("direct", "REPAIR")]
      ...       ).lines
      [['k = 0', '50.00', '-']]
    """
    found = []
    for name, of_line in lines.items():
        cells, line, seen = rows.where(**of_line), [name], set()
        for column in columns:
            # What is not split any further stands in the first column.
            whole = all(row.get(key) is None for row in cells for key in column.where)
            there = cells if whole else cells.where(**column.where)
            there = records.Rows() if whole and column.key in seen else there
            seen.add(column.key)
            text = "-" if any(column.key in row for row in there) else ""
            if values := there.values(column.key):
                text = (column.show or percent)(values)
                if mark and column.show is None and mark(name, there.mean(column.key)):
                    text = f"*{text}"
            line.append(text)
        found.append(line)
    return Table(title, [corner, *(column.title for column in columns)], found, caption)


def percent(values: Sequence[float]) -> str:
    """Accuracies in [0, 1] as a percentage, with their spread if there are several."""
    mean, spread = records.mean_std(values)
    text = f"{100 * mean:.2f}"
    return text if len(values) == 1 else f"{text} ± {100 * spread:.2f}"


def number(digits: int = 3, scale: float = 1.0) -> Callable[[Sequence[float]], str]:
    """A way to show a mean: with so many digits, divided by `scale`."""
    return lambda values: f"{records.mean_std(values)[0] / scale:.{digits}g}"


def show(table: Table) -> None:
    """Prints a table; what is marked is green, too, on a terminal that has colours."""
    style = {"caption": table.caption or None, "box": box.SIMPLE_HEAD, "title_style": "bold"}
    rich = RichTable(title=table.title, **style)
    for index, column in enumerate(table.header):
        # What is all text may be folded, a number may not.
        wide = any(len(line[index]) > 30 for line in table.lines)
        justify = "left" if index < table.texts else "right"
        rich.add_column(column, justify=justify, no_wrap=not wide)
    for line in table.lines:
        rich.add_row(*(f"[bold green]{cell}[/]" if _is_marked(cell) else cell for cell in line))
    Console(width=None if sys.stdout.isatty() else 140).print(rich, markup=True)


def markdown(table: Table) -> str:
    """The same in Markdown, without its title; what is marked is bold."""
    rule = [":--" if k < table.texts else "--:" for k in range(len(table.header))]
    body = [[f"**{c[1:]}**" if _is_marked(c) else c for c in line] for line in table.lines]
    lines = ["| " + " | ".join(line) + " |" for line in (table.header, rule, *body)]
    caption = table.caption.replace("*:", "Bold:").rstrip(".")
    return "\n".join([*lines, *(["", f"{caption}."] if caption else [])])


def _is_marked(cell: str) -> bool:
    # Two asterisks are Markdown's own.
    return cell.startswith("*") and not cell.startswith("**")


def benchmark(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for row in rows:
        numbers = ["" if row.get(k) is None else f"{row[k]:.3g}" for k in ("seconds", "ratio")]
        met = {True: "yes", False: "NO", None: ""}[row.get("met")]
        lines.append([row["what"], *numbers, row.get("target") or "", met])
    return Table(title, ["measured", "seconds", "ratio", "aim", "met"], lines)


def costs(where: Mapping[str, Any], digits: int = 3, giga: bool = True) -> list[Column]:
    """Columns of parameters (millions) and FLOPs (billions or millions), each with its ratio."""
    flops = number(digits, 1e9 if giga else 1e6)
    return [
        Column("params, M", where, "params", number(digits, 1e6)),
        Column("ratio", where, "params_ratio", number(digits)),
        Column("FLOPs, G" if giga else "FLOPs, M", where, "flops", flops),
        Column("ratio", where, "flops_ratio", number(digits)),
    ]


def ratios() -> list[Column]:
    """Columns of the ratios alone."""
    keys = {"params, ratio": "params_ratio", "FLOPs, ratio": "flops_ratio"}
    return [Column(title, key=key, show=number()) for title, key in keys.items()]
