"""The README's quickstart on its two real models. They come from the package index; without one these tests are skipped."""

import json
from pathlib import Path

import pytest

import runs

RECIPE = Path(__file__).parents[1] / "examples" / "quickstart.yaml"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("quickstart") / "work"
    done = runs.fusechat("run", RECIPE, "--workdir", workdir)
    if "could not be fetched" in done.stderr:
        pytest.skip("no package index that has the quickstart's models: " + done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    (workdir.parent / "stdout").write_text(done.stdout)
    return workdir


def test_the_fused_model_beats_the_pivot_on_both_held_out_sets(work: Path) -> None:
    scores = json.loads((work / "evaluate" / "results.json").read_text())["scores"]
    fused = {score["data"]: score for score in scores if score["role"] == "fused"}
    assert set(fused) == {"arithmetic-held-out", "knowledge-held-out"}
    assert all(score["difference_to_pivot"] < 0 for score in fused.values())
    assert all(score["missing"] == 0 for score in fused.values())
    assert [score["role"] for score in scores if score["data"] == "arithmetic-held-out"] == [
        "pivot",
        "source",
        "target",
        "target",
        "fused",
    ]


def test_the_sources_really_taught(work: Path) -> None:
    for source in ("arithmetic", "knowledge"):
        counts = json.loads((work / "fuse" / source / "manifest.json").read_text())["counts"]
        assert counts["chosen"][source][source] > 0
        figures = json.loads((work / "align" / source / "figures.json").read_text())
        assert figures["coverage_of_positions"] > 0.5


def test_a_second_run_recomputes_nothing(work: Path) -> None:
    again = runs.fusechat("run", RECIPE, "--workdir", work)
    assert again.returncode == 0
    assert " 0 steps done now" in f" {again.stderr.splitlines()[-1]}"
    assert again.stdout == (work.parent / "stdout").read_text()


def test_the_fused_model_loads_with_plain_transformers_and_answers(work: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = work / "merge" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == "llama"
    assert "<|im_start|>" in tokenizer.chat_template
    answer = runs.fusechat(
        "chat", directory, "--max-new-tokens", "60", stdin="Mia buys 3 books for 4 euros each. How much does she pay?\n"
    )
    assert answer.returncode == 0, answer.stderr
    assert "answer is" in answer.stdout, "it has learnt the form of the training answers"
