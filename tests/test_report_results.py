"""The tables of results: intervals, differences, and what is missing, the same for the page and the terminal."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from cases import each
from fusechat.errors import WorkdirError
from fusechat.report.intervals import half_width
from fusechat.report.page import render_page
from fusechat.report.results import MISSING, Cell, result_tables, terminal_tables
from reporting import compared, contents, record, results


def only(*scores: dict[str, Any]) -> list[Cell]:
    """The cells of the second row of the one table."""
    (table,) = result_tables(results(*scores))
    return list(table.rows[1].cells)


def test_half_an_interval_is_students_t() -> None:
    """Against a printed table of t at 0.975, by degrees of freedom, one fewer than items; and against SciPy's, where that is."""
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 19: 2.093, 30: 2.042, 60: 2.000}
    for freedom, value in (printed | {120: 1.980, 10**9: 1.960}).items():
        assert half_width(freedom + 1) == pytest.approx(value, abs=6e-4)
    assert half_width(None) == half_width(0) == pytest.approx(1.96, abs=1e-4)
    student_t = pytest.importorskip("scipy.stats").t
    for items in (*range(2, 200), 1001, 5000):
        assert half_width(items) == pytest.approx(student_t.ppf(0.975, items - 1), rel=1e-9)


def test_an_interval_is_of_what_was_drawn() -> None:
    """Four conversations with 20 responses are four; of older results, which do not say so, what they say is taken."""
    (cell,) = only(record(), compared(-0.25, 0.01, items=4, difference_n=4))
    assert cell == Cell("1.2500 ± 0.3182", "-0.2500 ± 0.0318", better=True)


def test_a_value_has_its_interval_and_its_difference_to_the_pivot() -> None:
    (cell,) = only(record(), compared(-0.25, 0.01))
    assert cell == Cell("1.2500 ± 0.2093", "-0.2500 ± 0.0209", better=True)
    (cell,) = only(record(), compared(-0.25, 0.01, standard_error=None))
    assert cell.value == "1.2500"


@each("difference, error, higher, better", [
    (-0.1, 0.047, False, True), (-0.1, 0.047, True, False), (0.1, 0.047, False, False), (0.1, 0.05, False, None),
    (-0.1, 0.06, True, None), (0.1, None, True, None), (0.1, 0.01, None, None), (0.0, 0.0, True, None),
])  # fmt: skip
def test_it_is_better_only_where_the_interval_excludes_0(
    difference: float, error: float | None, higher: bool | None, better: bool | None
) -> None:
    (cell,) = only(record(), compared(difference, error, higher_is_better=higher))
    assert cell.better is better


def test_what_is_missing_is_counted_and_never_0() -> None:
    (cell,) = only(record(), compared(None, None, value=None, why="no judgement", missing=20, n=0))
    assert cell == Cell("20 missing", why="no judgement")
    (cell,) = only(record(), compared(-0.5, 0.1, missing=2, n=18))
    assert cell.note == "n=18, 2 missing"
    assert [cell.value for cell in only(record(), record(data="b-held-out"), compared(-0.5, 0.1))] == [
        "1.0000 ± 0.2093",
        MISSING,
    ]


def test_each_suite_has_its_table_and_its_decimals() -> None:
    tables = result_tables(
        results(
            record(),
            record(
                suite="mt-bench", data="all", metric="score", value=6.543, standard_error=0.1, higher_is_better=True
            ),
            record(suite="mt-bench", data="all", metric="ties", value=50.0, standard_error=None, higher_is_better=None),
            record(suite="alpaca-eval", data="all", metric="win_rate", value=12.3456, standard_error=1.0),
            record(suite="harness", data="gsm8k", metric="exact_match,none", value=0.125, higher_is_better=True),
        )
    )
    assert [table.title for table in tables] == ["Bits per byte", "MT-Bench", "AlpacaEval", "Evaluation harness"]
    assert [cell.value for table in tables for cell in table.rows[0].cells] == [
        "1.5000 ± 0.2093",
        "6.54 ± 0.21",
        "50.00",
        "12.35 ± 2.09",
        "0.1250 ± 0.2093",
    ]
    assert [column.metric for table in tables for column in table.columns][-1] == "exact match"
    assert "Less is better." in tables[0].caption
    assert "better" not in tables[1].caption
    assert [column.direction for column in tables[1].columns] == ["more is better", ""]
    assert tables[0].columns[0].data == "data"


def test_another_schema_is_refused() -> None:
    with pytest.raises(WorkdirError, match="has schema 1, and this version reads 2"):
        result_tables({"schema": 1, "scores": []})


def drawn(width: int, *scores: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=width)
    for table in terminal_tables(result_tables(results(*scores)), "[red]tiny", width=width):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@each("width", [60, 80, 120])
def test_the_terminal_and_the_page_say_the_same_numbers_whole(width: int) -> None:
    names = ("arithmetic-held-out", "knowledge-held-out", "dialogue-held-out")
    scores = [record(data=name, model="SmolLM2-135M-Instruct") for name in names]
    scores += [compared(-0.1 * place, 0.05, data=name) for place, name in enumerate(names)]
    text = drawn(width, *scores)
    page = render_page(contents(tables=result_tables(results(*scores))))
    assert max(map(len, text.splitlines())) <= width
    for row in result_tables(results(*scores))[0].rows:
        for cell in row.cells:
            assert cell.value in text
            assert cell.difference in text
            assert f">{cell.value}<" in page
            assert f">{cell.difference}<" in page
    assert "[red]tiny" in text


def test_names_are_no_markup_of_the_terminal() -> None:
    text = drawn(100, record(model="[bold]a[/]"), compared(0.1, 0.5, why="[x]", value=None, model="b"))
    assert "[bold]a[/]" in text
    assert "[x]" in text


def test_many_columns_are_turned_on_their_side() -> None:
    """Eleven data sets of two models do not fit in 80 columns; two models do, one column each."""
    names = [f"category {number}" for number in range(11)]
    scores = [one for name in names for one in (record(data=name), compared(-0.5, 0.1, data=name))]
    (table,) = terminal_tables(result_tables(results(*scores)), "tiny", width=80)
    assert len(table.columns) == 3
    assert table.row_count == 11
    console = Console(width=80, file=StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert all(name in text for name in names)
    assert text.count("-0.5000 ± 0.2093") == 11
    assert max(map(len, text.splitlines())) <= 80


def test_models_by_themselves_have_no_column_of_roles() -> None:
    (table,) = terminal_tables(result_tables(results(record(role=""), record(role="", model="b"))), "x", width=80)
    assert table.columns[0].header == "model"
    assert len(table.columns) == 2


def test_a_metric_that_does_not_go_without_saying_is_named() -> None:
    score = record(suite="harness", metric="exact_match,last", data="sums")
    (table,) = terminal_tables(result_tables(results(score)), "x", width=80)
    assert table.columns[-1].header == "sums\nexact match,last\nn=20"
