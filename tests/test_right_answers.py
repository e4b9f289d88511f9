"""The share of right answers to held-out prompts, as a verifier finds them: of which prompts, with which intervals, where shown."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import fusechat
import runs
from fusechat.commands.run import run
from fusechat.evaluate.statistics import wilson
from fusechat.pipeline import load_recipe
from fusechat.report.results import result_tables
from fusechat.report.summary import summarise

MODULE = """
def even(asked):
    assert asked["record"]["messages"][-1]["content"] == asked["reference"]
    assert asked["messages"][-1]["role"] == "user"
    return len(asked["answer"]) % 2 == 0
"""
MODELS = {"pivot", "source-mistral", "source-gemma", "target-mistral", "target-gemma", "fused"}


@pytest.fixture(scope="module")
def verified(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose recipe then has a verifier, in a module next to it, and another target of plain fine-tuning."""
    root = tmp_path_factory.mktemp("verified")
    shutil.copytree(finished, root, dirs_exist_ok=True)
    (root / "mine.py").write_text(MODULE)
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe["evaluate"] |= {"verifier": "mine:even", "verifier_seconds": 60}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        merged = (root / "work/merge/manifest.json").read_bytes()
        run(load_recipe(root / "recipe.yaml"), root / "work")
        assert (root / "work/merge/manifest.json").read_bytes() == merged
    return root


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_model_answers_every_prompt_and_shares_are_counted(
    verified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(verified)
    judged = lines(verified / "work/evaluate/right.jsonl")
    assert len(judged) == 5 + 4
    for one in judged:
        assert set(one["answers"]) == MODELS
        assert one["prompt"][-1]["role"] == "user"
        for answer in one["answers"].values():
            assert answer["right"] == (len(answer["text"]) % 2 == 0)
    results = json.loads((verified / "work/evaluate/results.json").read_text())
    shares = [one for one in results["scores"] if one["suite"] == "right-answers"]
    assert [one["data"] for one in results["scores"][:6]] == ["data-held-out"] * 6  # first of all
    assert len(shares) == 6 * 2
    labels = {"pivot": ("pivot", None), "fused": ("fused", None), "target-gemma": ("target", "gemma")}
    for name, (role, label) in labels.items():
        for data, size in (("data-held-out", 5), ("gemma-held-out", 4)):
            (found,) = (
                one for one in shares if (one["role"], one["data"]) == (role, data) and label in (None, one["model"])
            )
            right = [one["answers"][name]["right"] for one in judged if one["data"] == data]
            base = [one["answers"]["pivot"]["right"] for one in judged if one["data"] == data]
            assert found["value"] == pytest.approx(sum(right) / size)
            assert found["n"] == size
            if role != "pivot":
                assert found["difference_to_pivot"] == pytest.approx((sum(right) - sum(base)) / size)
    flat = fusechat.Run(verified / "work", load_recipe(verified / "recipe.yaml")).results
    assert sum(one["suite"] == "right-answers" for one in flat) == 12


def test_the_report_shows_them_first_and_nothing_is_asked_again(
    verified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (verified / "work/report/index.html").read_text(encoding="utf-8")
    assert page.index("<h3>Right answers</h3>") < page.index("<h3>Bits per byte</h3>")
    shutil.copytree(verified, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODULE.replace("== 0", "== 1"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(verified), str(tmp_path)))
    before = {one["id"]: one["answers"] for one in lines(tmp_path / "work/evaluate/right.jsonl")}
    assert run(load_recipe(recipe), tmp_path / "work") == 2  # results and report
    for one in lines(tmp_path / "work/evaluate/right.jsonl"):
        for model, answer in one["answers"].items():
            assert answer == {"text": before[one["id"]][model]["text"], "right": 1 - before[one["id"]][model]["right"]}
    assert run(load_recipe(recipe, ["evaluate.verifier_limit=2"]), tmp_path / "work") == 6 + 2
    assert len(lines(tmp_path / "work/evaluate/right.jsonl")) == 2 + 2
    assert not list(tmp_path.glob("work/evaluate/answers-*/journals"))
    told = runs.here("plan", recipe, "--workdir", tmp_path / "work", "--json")
    assert told.returncode == 0, told.stderr
    steps = {(one["stage"], one["name"]): one for one in json.loads(told.stdout)["steps"]}
    assert ("evaluate", "answers target-gemma") in steps


def test_references_verifiers_and_keys_that_do_not_fit(finished: Path, tmp_path: Path, heard: list[str]) -> None:
    """Each a line that names the key."""
    for changes, line in (
        (["evaluate.verifier_seconds=3"], "evaluate.verifier_seconds: goes with evaluate.verifier"),
        (["evaluate.verifier=a 'half"], "evaluate.verifier: No closing quotation"),
        (["evaluate.verifier=' '"], "evaluate.verifier: is empty"),
        (["evaluate.verifier=no_such:thing"], "evaluate.verifier: no_such:thing: cannot be imported (ModuleNotFound"),
        (["evaluate.verifier=no-such-command"], "evaluate.verifier: no-such-command: no such command"),
        (["evaluate.verifier=exact", "evaluate.verifier_limit=0"], "evaluate.verifier_limit"),
        (
            ["data.validation={path: h.jsonl, name: Gemma}"],
            "data.validation.name: a source is called Gemma: choose another",
        ),
    ):
        arguments = [word for change in changes for word in ("--set", change)]
        told = runs.here("run", finished / "recipe.yaml", "--workdir", tmp_path / "new", *arguments)
        assert told.returncode == 2, line
        assert line in told.stderr, told.stderr
    named = load_recipe(finished / "recipe.yaml", ["data.validation={path: held-out.jsonl, name: words}"])
    assert [data.name for data in named.validation_sets()] == ["words-held-out", "gemma-held-out"]
    assert named.validation_set("mistral").name == "words-held-out"
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    del recipe["data"]["validation"], recipe["sources"]["gemma"]["data"]["validation"]
    recipe["evaluate"]["verifier"] = "exact"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = runs.here("run", tmp_path / "recipe.yaml", "--workdir", tmp_path / "new")
    assert "evaluate.verifier: needs held-out conversations: set data.validation" in told.stderr


def test_wilson() -> None:
    """Against the roots of (p - q)² = z² q (1 - q) / n, and a published example: 10 of 20 are 0.299 to 0.701."""
    for right, n in ((0, 50), (50, 50), (38, 50), (1, 3)):
        low, high = wilson(right, n)
        for bound in (low, high):
            assert (right / n - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, abs=1e-12)
        assert low <= right / n <= high
    assert wilson(10, 20) == pytest.approx((0.299, 0.701), abs=5e-4)


def scores(fused: float, pivot: float, n: int) -> dict[str, Any]:
    shared = {
        "suite": "right-answers",
        "data": "words-held-out",
        "metric": "right_answers",
        "n": n,
        "items": n,
        "missing": 0,
    }
    shared |= {"why": None, "higher_is_better": True, "standard_error": 0.05, "compared_with": "P", "settings": {}}
    nothing = {"difference_to_pivot": None, "difference_standard_error": None, "difference_n": 0}
    rows = [{**shared, "role": "pivot", "model": "P", "value": pivot, "interval": [0.0, 0.0714], **nothing}]
    found = {"difference_to_pivot": fused - pivot, "difference_standard_error": 0.06, "difference_n": n}
    rows.append({**shared, "role": "fused", "model": "F", "value": fused, "interval": [0.6259, 0.857], **found})
    return {"schema": 2, "scores": rows}


def test_shares_are_shown_in_percent_and_points() -> None:
    (table,) = result_tables(scores(0.76, 0.0, 50))
    assert [row.cells[0].value for row in table.rows] == ["0% (0–7)", "76% (63–86)"]
    assert table.rows[1].cells[0].difference == "+76 ± 12"  # 2.01 · 0.06
    assert table.rows[1].cells[0].better is True
    worked, much, _ = summarise(scores(0.76, 0.0, 50), None)
    assert worked.headline == "Yes: better than the pivot"
    assert worked.lines[0].text == "words: +76 ± 12 points of right answers"
    assert much.headline == "76 points more right answers"
    assert much.lines[0].text == "words: 76 points more, 0 → 76"
    worked, much, _ = summarise(scores(0.0, 0.76, 50), None)
    assert (worked.headline, much.headline) == ("No: worse than the pivot", "76 points fewer right answers")
