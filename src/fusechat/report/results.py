"""The tables of results, the same for the page and for the terminal. Numbers become text here and nowhere else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusechat.errors import WorkdirError

SCHEMA = 2
MISSING = "missing"
INTERVAL = "± is half of the 95% interval; the second line is the difference to the pivot, over what both have"
_HALF = 1.96  # standard errors in half of a 95% interval
_TITLES = {
    "bits-per-byte": "Bits per byte",
    "mt-bench": "MT-Bench",
    "alpaca-eval": "AlpacaEval",
    "harness": "Evaluation harness",
}
_WHAT = {
    "bits-per-byte": "Bits per byte of held-out responses, the end of turn left out, whatever the tokenizer.",
    "mt-bench": "A judge's scores of 1 to 10, or shares of wins against the pivot in percent.",
    "alpaca-eval": "Wins against the reference answers in percent, by an automatic annotator.",
    "harness": "As the harness itself reports them.",
}
_DECIMALS = {"mt-bench": 2, "alpaca-eval": 2}  # scores and percent; shares and bits have four
_BORDER, _LONGEST_NAME = (
    3,
    21,
)  # columns of a terminal: between two columns of a table, and for a model's name before it folds


@dataclass(frozen=True)
class Cell:
    """`value` and `difference` to the pivot as text, each with its half interval; `better` only where the difference's interval
    excludes 0. `note`: what is missing; `why`: the reason where there is no value."""

    value: str
    difference: str = ""
    better: bool | None = None
    note: str = ""
    why: str = ""


@dataclass(frozen=True)
class Column:
    data: str
    metric: str
    n: str
    direction: str  # "less is better", "more is better" or nothing


@dataclass(frozen=True)
class Row:
    role: str
    model: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ResultTable:
    """One suite: a column for each data set and metric, a row for each model. `settings`: what the values depend on."""

    suite: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str
    settings: tuple[str, ...]


def result_tables(results: Mapping[str, Any]) -> list[ResultTable]:
    """The tables of `evaluate/results.json`, a suite each, in the order met. Raises WorkdirError for another schema."""
    if results.get("schema") != SCHEMA:
        raise WorkdirError(f"results.json: has schema {results.get('schema')}, and this version reads {SCHEMA}")
    suites = dict.fromkeys(score["suite"] for score in results["scores"])
    return [_table(suite, [score for score in results["scores"] if score["suite"] == suite]) for suite in suites]


def _table(suite: str, scores: Sequence[Mapping[str, Any]]) -> ResultTable:
    places = dict.fromkeys((score["data"], score["metric"]) for score in scores)
    models = dict.fromkeys((score["role"], score["model"]) for score in scores)
    found = {(score["data"], score["metric"], score["role"], score["model"]): score for score in scores}
    columns, items = [], []
    for data, metric in places:
        counts = [score["n"] for score in scores if (score["data"], score["metric"]) == (data, metric)]
        better = {score["higher_is_better"] for score in scores if (score["data"], score["metric"]) == (data, metric)}
        items.append(max(counts))
        columns.append(Column(data.removesuffix("-held-out"), _words(metric), str(max(counts)), _direction(better)))
    rows = [
        Row(role, model, tuple(_cell(found.get((*at, role, model)), n) for at, n in zip(places, items, strict=True)))
        for role, model in models
    ]
    directions = {column.direction for column in columns}
    shared = f" {next(iter(directions)).capitalize()}." if len(directions) == 1 and "" not in directions else ""
    caption = _WHAT.get(suite, "") + shared
    return ResultTable(
        suite, _TITLES.get(suite, suite), tuple(columns), tuple(rows), caption.strip(), tuple(_settings(scores))
    )


def _direction(higher_is_better: set[bool | None]) -> str:
    if len(higher_is_better) != 1:
        return ""
    return {True: "more is better", False: "less is better", None: ""}[higher_is_better.pop()]


def _words(metric: str) -> str:
    return metric.replace("_", " ").removesuffix(",none")


def _settings(scores: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """Each setting and version once, as text."""
    return dict.fromkeys(
        f"{key} {value}"
        for score in scores
        for part in (score.get("settings"), score.get("versions"))
        for key, value in sorted((part or {}).items())
    )


def _cell(score: Mapping[str, Any] | None, most: int) -> Cell:
    """A model's cell, in a column whose models have at most `most` items."""
    if score is None:
        return Cell(MISSING, why="not measured")
    gone = score["missing"]
    value, decimals = score["value"], _DECIMALS.get(score["suite"], 4)
    if value is None:
        return Cell(MISSING, note=f"{gone} missing" if gone else "", why=score["why"] or "")
    notes = [f"n={score['n']}"] if score["n"] != most else []
    notes += [f"{gone} missing"] if gone else []
    text = _with_interval(value, score["standard_error"], f".{decimals}f", decimals)
    difference, error = score["difference_to_pivot"], score["difference_standard_error"]
    if score["role"] == "pivot" or difference is None:
        return Cell(text, note=", ".join(notes))
    better = None
    if error is not None and score["higher_is_better"] is not None and abs(difference) > _HALF * error:
        better = (difference > 0) == score["higher_is_better"]
    return Cell(text, _with_interval(difference, error, f"+.{decimals}f", decimals), better, ", ".join(notes))


def _with_interval(value: float, error: float | None, form: str, decimals: int) -> str:
    half = f" ± {_HALF * error:.{decimals}f}" if error is not None else ""
    return f"{value:{form}}{half}"


def terminal_tables(tables: Sequence[ResultTable], title: str, *, width: int | None = None) -> list[Table]:
    """The tables for Rich to print; one with more columns than fit in `width`, by default the terminal's, is drawn in parts."""
    width = width or Console().width
    drawn = []
    for table in tables:
        fit = _columns_that_fit(table, width)
        for first in range(0, len(table.columns), fit):
            shown = range(first, min(first + fit, len(table.columns)))
            drawn.append(_terminal_table(table, f"{title}: {table.title}", shown))
    return drawn


def _columns_that_fit(table: ResultTable, width: int) -> int:
    names = max(len(row.role) for row in table.rows) + min(_LONGEST_NAME, max(len(row.model) for row in table.rows))
    numbers = max(len(text) for row in table.rows for cell in row.cells for text in (cell.value, cell.difference))
    return max(1, (width - names - 2 * _BORDER - 1) // (numbers + _BORDER))


def _terminal_table(table: ResultTable, title: str, shown: range) -> Table:
    last = shown.stop == len(table.columns)
    caption = f"{table.caption} {INTERVAL}." if last else None
    drawn = Table(title=escape(title), caption=escape(caption) if caption else None, caption_justify="left")
    drawn.add_column("role", no_wrap=True)
    drawn.add_column("model", overflow="fold", min_width=8)
    one_metric = len({column.metric for column in table.columns}) == 1
    for column in (table.columns[number] for number in shown):
        name = column.data if one_metric else f"{column.data}\n{column.metric}"
        drawn.add_column(f"{escape(name)}\nn={column.n}", justify="right", overflow="fold")
    for row in table.rows:
        cells = [_terminal_cell(row.cells[number]) for number in shown]
        drawn.add_row(row.role, escape(row.model), *cells, style="bold" if row.role == "fused" else None)
    return drawn


def _terminal_cell(cell: Cell) -> str:
    colour = {True: "green", False: "red", None: "dim"}[cell.better]
    lines = [escape(cell.value)]
    lines += [f"[{colour}]{escape(cell.difference)}[/]"] if cell.difference else []
    lines += [f"[dim]{escape(cell.note)}[/]"] if cell.note else []
    lines += [f"[dim]{escape(cell.why)}[/]"] if cell.why else []
    return "\n".join(lines)
