"""The command line, as a user types it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from forks import Command
from fusechat import __version__
from fusechat.report.results import result_tables
from reporting import students_t


@pytest.fixture
def work(copied: Path) -> Path:
    return copied / "work"


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


def test_a_run_prints_the_table_on_stdout_and_progress_on_stderr(finished: Path, work: Path, tmp_path: Path) -> None:
    whole = Command("run", finished / "recipe.yaml", "--workdir", tmp_path / "again").ended()
    assert whole.returncode == 0, whole.stderr
    assert "32 steps done now, 0 were done before" in whole.stderr
    names = ("pivot", "llama", "source", "mistral", "gemma", "target", "fused", "tiny", "merge/model", "index.html")
    assert [name for name in names if name not in whole.stdout] == []
    scores = json.loads((tmp_path / "again" / "evaluate" / "results.json").read_text())["scores"]
    assert [score["value"] for score in scores if f"{score['value']:.4f}" not in whole.stdout] == []
    again = runs.here("run", finished / "recipe.yaml", "--workdir", work)
    assert again.returncode == 0
    assert "0 steps done now, 32 were done before" in again.stderr
    assert again.stdout == whole.stdout.replace(str(tmp_path / "again"), str(work))


def test_the_page_says_the_same_numbers_as_the_terminal(work: Path) -> None:
    page = (work / "report" / "index.html").read_text(encoding="utf-8")
    results = json.loads((work / "evaluate" / "results.json").read_text())
    printed = runs.here("report", work).stdout
    for table in result_tables(results):
        for cell in (cell for row in table.rows for cell in row.cells):
            for text in (cell.value, cell.difference):
                assert text in printed
                assert f">{text}<" in page
    for score in results["scores"]:
        assert f"<td>{score['value']:.4f} ± {students_t(score['items']) * score['standard_error']:.4f}<" in page


def test_status_says_what_is_done_and_what_is_stale(work: Path, tmp_path: Path) -> None:
    def states() -> dict[str, str]:
        return {one["step"]: one["state"] for one in json.loads(runs.here("status", work, "--json").stdout)}

    assert len(states()) == 32
    assert set(states().values()) == {"done"}
    (work / "merge" / "manifest.json").unlink()
    assert states()["merge"] == "absent"
    assert "merge" in runs.here("status", work).stdout
    assert "no work directory" in runs.here("status", tmp_path).stderr


def test_report_writes_the_page_again(work: Path) -> None:
    page = work / "report" / "index.html"
    before = page.read_bytes()
    page.write_text("spoilt")
    done = runs.here("report", work)
    assert done.returncode == 0, done.stderr
    assert page.read_bytes() == before
    assert str(page) in done.stdout


def test_chat_answers_each_line_and_keeps_the_conversation(finished: Path) -> None:
    model = finished / "work" / "merge" / "model"
    one = runs.here("chat", model, "--max-new-tokens", "5", stdin="What is 1 + 2?\n")
    two = runs.here("chat", model, "--max-new-tokens", "5", stdin="What is 1 + 2?\n\nAnd twice that?\n")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout.strip()
    assert two.stdout.startswith(one.stdout)
    assert len(two.stdout) > len(one.stdout)


def test_chat_runs_code_of_a_model_only_where_it_is_trusted(models: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(models["mistral"], tmp_path / "model")
    (model / "code.py").write_text(
        "from transformers import MistralConfig, MistralForCausalLM\n\n\n"
        "class Config(MistralConfig):\n    model_type = 'of-its-own'\n\n\n"
        "class Model(MistralForCausalLM):\n    config_class = Config\n"
    )
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "of-its-own", "auto_map": own}))
    arguments = ("chat", model, "--max-new-tokens", "5")
    refused = runs.here(*arguments, stdin="What is 1 + 2?\n")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "needs custom code" in refused.stderr
    plain = runs.here("chat", models["mistral"], "--max-new-tokens", "5", stdin="What is 1 + 2?\n")
    trusted = runs.here(*arguments, "--trust-remote-code", stdin="What is 1 + 2?\n")
    assert (trusted.returncode, trusted.stdout) == (0, plain.stdout), trusted.stderr


def test_progress_bars_are_drawn_on_a_terminal(single: Path, tmp_path: Path) -> None:
    """Every long step shows a bar with its name on a terminal of 100 columns."""
    text = runs.on_a_terminal(100, "run", single / "recipe.yaml", "--workdir", tmp_path / "work")
    steps = ("prepare pivot/data", "capture pivot", "transfer mistral", "fuse mistral", "merge (sce)", "evaluate fused")
    assert [name for name in steps if name not in text] == []
    assert "━" in text
