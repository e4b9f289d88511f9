"""The command line, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from fusechat import __version__
from fusechat.report.results import result_tables
from reporting import students_t


@pytest.fixture(scope="module")
def recipe(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside a work directory `work` that the command line finished."""
    directory = tmp_path_factory.mktemp("cli")
    path = runs.write_recipe(directory, models)
    done = runs.fusechat("run", path, "--workdir", directory / "work")
    assert done.returncode == 0, done.stderr
    (directory / "stdout").write_text(done.stdout)
    return path


def test_help_and_version_need_nothing_heavy() -> None:
    """What makes `--help` fast: none of the slow libraries is imported."""
    code = "import sys\nfrom fusechat.commands.cli import main\nsys.argv = ['fusechat', '--help']\ntry:\n main()\nfinally:\n"
    heavy = ["torch", "transformers", "numpy", "pyarrow", "pydantic", "rich.table", "plotly"]
    done = subprocess.run(
        [sys.executable, "-c", code + f" print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "run" in done.stdout
    assert "chat" in done.stdout
    assert [name for name in eval(done.stderr) if name != "rich.table"] == []
    assert runs.fusechat("--version").stdout == f"fusechat {__version__}\n"


def test_run_prints_the_table_on_stdout_and_progress_on_stderr(recipe: Path) -> None:
    printed = (recipe.parent / "stdout").read_text()
    for expected in (
        "pivot",
        "llama",
        "source",
        "mistral",
        "gemma",
        "target",
        "fused",
        "tiny",
        "merge/model",
        "index.html",
    ):
        assert expected in printed
    scores = json.loads((recipe.parent / "work" / "evaluate" / "results.json").read_text())["scores"]
    for score in scores:
        assert f"{score['value']:.4f}" in printed
    again = runs.fusechat("run", recipe, "--workdir", recipe.parent / "work")
    assert again.returncode == 0
    assert "0 steps done now, 32 were done before" in again.stderr
    assert again.stdout == printed


def test_the_page_says_the_same_numbers_as_the_terminal(recipe: Path) -> None:
    page = (recipe.parent / "work" / "report" / "index.html").read_text(encoding="utf-8")
    results = json.loads((recipe.parent / "work" / "evaluate" / "results.json").read_text())
    printed = (recipe.parent / "stdout").read_text()
    for table in result_tables(results):
        for cell in (cell for row in table.rows for cell in row.cells):
            for text in (cell.value, cell.difference):
                assert text in printed
                assert f">{text}<" in page
    for score in results["scores"]:
        assert f"<td>{score['value']:.4f} ± {students_t(score['items']) * score['standard_error']:.4f}<" in page


def test_status_says_what_is_done_and_what_is_stale(recipe: Path) -> None:
    work = recipe.parent / "work"
    states = json.loads(runs.fusechat("status", work, "--json").stdout)
    assert len(states) == 32
    assert {state["state"] for state in states} == {"done"}
    manifest = work / "merge" / "manifest.json"
    kept = manifest.read_text()
    manifest.unlink()
    try:
        by_step = {
            state["step"]: state["state"] for state in json.loads(runs.fusechat("status", work, "--json").stdout)
        }
        assert by_step["merge"] == "absent"
        assert "merge" in runs.fusechat("status", work).stdout
    finally:
        manifest.write_text(kept)
    assert "no work directory" in runs.fusechat("status", recipe.parent.parent).stderr


def test_report_writes_the_page_again(recipe: Path) -> None:
    page = recipe.parent / "work" / "report" / "index.html"
    before = page.read_bytes()
    page.write_text("spoilt")
    done = runs.fusechat("report", recipe.parent / "work")
    assert done.returncode == 0, done.stderr
    assert page.read_bytes() == before
    assert done.stdout == (recipe.parent / "stdout").read_text()


def test_chat_answers_each_line_and_keeps_the_conversation(recipe: Path) -> None:
    model = recipe.parent / "work" / "merge" / "model"
    one = runs.fusechat("chat", model, "--max-new-tokens", "5", stdin="What is 1 + 2?\n")
    two = runs.fusechat("chat", model, "--max-new-tokens", "5", stdin="What is 1 + 2?\n\nAnd twice that?\n")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout.strip()
    assert two.stdout.startswith(one.stdout)
    assert len(two.stdout) > len(one.stdout)


def test_progress_bars_are_drawn_on_a_terminal(models: dict[str, Path], tmp_path: Path) -> None:
    """Every long step shows a bar with its name on a terminal of 100 columns."""
    recipe = runs.write_recipe(tmp_path, models)
    text = runs.on_a_terminal(100, "run", recipe, "--workdir", tmp_path / "work")
    for name in (
        "prepare pivot/data",
        "capture pivot",
        "transfer gemma",
        "fuse mistral",
        "merge (sce)",
        "evaluate fused",
    ):
        assert name in text, name
    assert "━" in text
