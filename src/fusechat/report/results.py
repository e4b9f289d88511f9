"""The tables of results, the same for the page and for the terminal. Numbers become text here and nowhere else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusechat.errors import WorkdirError
from fusechat.report.intervals import half_interval, is_better

SCHEMA = 2
MISSING = "missing"
INTERVAL = (
    "± is half of the 95% interval (Student's t); the second line is the difference to the pivot, over what both have"
)
RIGHT = "right-answers"  # the suite, whose values are shown in percent
TITLES = {
    RIGHT: "Right answers",
    "bits-per-byte": "Bits per byte",
    "mt-bench": "MT-Bench",
    "alpaca-eval": "AlpacaEval",
    "harness": "Evaluation harness",
}
_WHAT = {
    RIGHT: "Answers to held-out prompts that the verifier finds right, in percent, with the 95% interval of the share (Wilson).",
    "bits-per-byte": "Bits per byte of held-out responses, the end of turn left out, whatever the tokenizer.",
    "mt-bench": "A judge's scores of 1 to 10, or shares of wins against a baseline in percent.",
    "alpaca-eval": "Wins against the reference answers in percent, by an automatic annotator.",
    "harness": "As the harness itself reports them.",
}
_USUAL = {
    RIGHT: "right answers",
    "bits-per-byte": "bits per byte",
    "mt-bench": "score",
}  # metrics that go without saying
DECIMALS = {RIGHT: 0, "mt-bench": 2, "alpaca-eval": 2}  # scores and percent; shares and bits have four
_BORDER, _LONGEST_NAME = 3, 21  # of a terminal's columns: between two of a table, and for a name before it folds


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
        columns.append(Column(data.removesuffix("-held-out"), words(metric), str(max(counts)), _direction(better)))
    rows = [
        Row(role, model, tuple(_cell(found.get((*at, role, model)), n) for at, n in zip(places, items, strict=True)))
        for role, model in models
    ]
    directions = {column.direction for column in columns}
    shared = f" {next(iter(directions)).capitalize()}." if len(directions) == 1 and "" not in directions else ""
    caption = _WHAT.get(suite, "") + shared
    return ResultTable(
        suite, TITLES.get(suite, suite), tuple(columns), tuple(rows), caption.strip(), tuple(_settings(scores))
    )


def _direction(higher_is_better: set[bool | None]) -> str:
    if len(higher_is_better) != 1:
        return ""
    return {True: "more is better", False: "less is better", None: ""}[higher_is_better.pop()]


def words(metric: str) -> str:
    """A metric as a person reads it."""
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
    value, decimals = score["value"], DECIMALS.get(score["suite"], 4)
    if value is None:
        return Cell(f"{gone} {MISSING}" if gone else MISSING, why=score["why"] or "")
    notes = [f"n={score['n']}"] if score["n"] != most else []
    notes += [f"{gone} missing"] if gone else []
    items = score.get("items") or score["n"]  # results of older versions do not say of how many items
    text = with_interval(value, half_interval(score["standard_error"], items), decimals)
    difference = score["difference_to_pivot"]
    half = half_interval(score["difference_standard_error"], score["difference_n"])
    if score["suite"] == RIGHT:
        low, high = score["interval"]
        text = f"{100 * value:.0f}% ({100 * low:.0f}–{100 * high:.0f})"
        difference, half = (None if one is None else 100 * one for one in (difference, half))
    if score["role"] == "pivot" or difference is None:
        return Cell(text, note=", ".join(notes))
    better = is_better(difference, half, score["higher_is_better"])
    return Cell(text, with_interval(difference, half, decimals, "+"), better, ", ".join(notes))


def with_interval(value: float, half: float | None, decimals: int, sign: str = "") -> str:
    """`sign`: that of a format, `+` for differences."""
    return f"{value:{sign}.{decimals}f}" + (f" ± {half:.{decimals}f}" if half is not None else "")


def terminal_tables(tables: Sequence[ResultTable], title: str, *, width: int | None = None) -> list[Table]:
    """The tables for Rich to print; one with more columns than fit in `width`, by default the terminal's, is turned on its side
    where that makes it narrower, and else drawn in parts."""
    width = width or Console().width
    drawn = []
    for table in tables:
        heading = f"{title}: {table.title}" if title != table.suite else table.title
        grid = _upright(table)
        if not _fits(grid, width) and len(table.rows) < len(table.columns):
            grid = _on_its_side(table)
        parts = _parts(grid, width)
        drawn += [_draw(grid, heading, part) for part in parts]
        drawn[-1].caption = escape(f"{table.caption} {INTERVAL}.")
    return drawn


@dataclass(frozen=True)
class _Grid:
    """What is drawn: headings of columns, and rows of names and cells; `bold` rows or columns are the fused model's."""

    names: tuple[str, ...]  # headings of the columns of names
    headings: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Cell, ...]], ...]
    bold_rows: frozenset[int] = frozenset()
    bold_columns: frozenset[int] = frozenset()


def _upright(table: ResultTable) -> _Grid:
    """A row for each model. Models by themselves have no role."""
    with_role = any(row.role for row in table.rows)
    return _Grid(
        ("role", "model") if with_role else ("model",),
        tuple(_heading(table, column) for column in table.columns),
        tuple(((row.role, row.model) if with_role else (row.model,), row.cells) for row in table.rows),
        bold_rows=frozenset(number for number, row in enumerate(table.rows) if row.role == "fused"),
    )


def _on_its_side(table: ResultTable) -> _Grid:
    """A column for each model."""
    return _Grid(
        ("",),
        tuple(f"{row.role}\n{row.model}" if row.role else row.model for row in table.rows),
        tuple(
            ((_heading(table, column).replace("\n", ", "),), tuple(row.cells[number] for row in table.rows))
            for number, column in enumerate(table.columns)
        ),
        bold_columns=frozenset(number for number, row in enumerate(table.rows) if row.role == "fused"),
    )


def _heading(table: ResultTable, column: Column) -> str:
    """The metric only where it does not go without saying."""
    metric = f"\n{column.metric}" if {each.metric for each in table.columns} != {_USUAL.get(table.suite)} else ""
    return f"{column.data}{metric}\nn={column.n}"


def _parts(grid: _Grid, width: int) -> list[range]:
    """Which columns are drawn together: as many as fit."""
    names = sum(min(_LONGEST_NAME, max(len(row[0][number]) for row in grid.rows)) for number in range(len(grid.names)))
    cells = [cell for _, cells in grid.rows for cell in cells]
    numbers = max(len(text) for cell in cells for text in (cell.value, cell.difference))
    fit = max(1, (width - names - len(grid.names) * _BORDER - 1) // (numbers + _BORDER))
    return [range(first, min(first + fit, len(grid.headings))) for first in range(0, len(grid.headings), fit)]


def _fits(grid: _Grid, width: int) -> bool:
    return len(_parts(grid, width)) == 1


def _draw(grid: _Grid, title: str, shown: range) -> Table:
    drawn = Table(title=escape(title), caption_justify="left")
    for name in grid.names:
        drawn.add_column(name, overflow="fold", no_wrap=name == "role", min_width=8 if name == "model" else None)
    for number in shown:
        style = "bold" if number in grid.bold_columns else None
        drawn.add_column(escape(grid.headings[number]), justify="right", overflow="fold", style=style)
    for place, (names, cells) in enumerate(grid.rows):
        texts = [_terminal_cell(cells[number]) for number in shown]
        drawn.add_row(*map(escape, names), *texts, style="bold" if place in grid.bold_rows else None)
    return drawn


def _terminal_cell(cell: Cell) -> str:
    colour = {True: "green", False: "red", None: "dim"}[cell.better]
    lines = [escape(cell.value)]
    lines += [f"[{colour}]{escape(cell.difference)}[/]"] if cell.difference else []
    lines += [f"[dim]{escape(cell.note)}[/]"] if cell.note else []
    lines += [f"[dim]{escape(cell.why)}[/]"] if cell.why else []
    return "\n".join(lines)
