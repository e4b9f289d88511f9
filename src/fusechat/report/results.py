"""The table of results, the same for the page and for the terminal."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Cell:
    """`value` and `difference` as text; `better` is True, False or None (the pivot itself, or nothing to compare)."""

    value: str
    difference: str
    better: bool | None


@dataclass(frozen=True)
class Row:
    role: str
    model: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ResultTable:
    """Bits per byte: a column for each data set (with how many responses it has), a row for each model."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def result_table(results: dict[str, Any]) -> ResultTable:
    """The table of `evaluate/results.json`."""
    sets = list(dict.fromkeys(score["data"] for score in results["scores"]))
    counts = {score["data"]: score["n"] for score in results["scores"]}
    models = list(dict.fromkeys((score["role"], score["model"]) for score in results["scores"]))
    by_place = {(score["data"], score["role"], score["model"]): score for score in results["scores"]}
    rows = tuple(Row(role, model, tuple(_cell(by_place[name, role, model]) for name in sets)) for role, model in models)
    return ResultTable(tuple(f"{name.removesuffix('-held-out')} (n={counts[name]})" for name in sets), rows)


def _cell(score: dict[str, Any]) -> Cell:
    value, difference = score["value"], score["difference_to_pivot"]
    if value is None:
        return Cell("missing", "", None)
    if score["role"] == "pivot" or difference is None:
        return Cell(f"{value:.4f}", "", None)
    return Cell(f"{value:.4f}", f"{difference:+.4f}", difference < 0 if difference else None)


def terminal_table(table: ResultTable, title: str) -> Table:
    """The table for Rich to print."""
    drawn = Table(title=title, caption="bits per byte of held-out responses; less is better; ± against the pivot")
    drawn.add_column("role")
    drawn.add_column("model", overflow="fold")
    for name in table.columns:
        drawn.add_column(name, justify="right")
    for row in table.rows:
        cells = [
            f"{cell.value} [{'green' if cell.better else 'red'}]{cell.difference}[/]"
            if cell.better is not None
            else cell.value
            for cell in row.cells
        ]
        drawn.add_row(row.role, row.model, *cells, style="bold" if row.role == "fused" else None)
    return drawn
