"""Suites on the models of a run and by themselves: where results go, what stays, what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from fusechat.evaluate.records import About, Measurement, gather, keep, records, write_results
from fusechat.pipeline import load_recipe, run_models
from fusechat.run.lock import exclusive_lock
from fusechat.run.steps import Step
from reporting import students_t

LENGTH = ("--max-length", "256", "--dtype", "float32", "--device", "cpu")
Copy = Callable[[], Path]


@pytest.fixture
def work(copied: Path) -> Path:
    return copied / "work"


def scores(file: Path) -> list[dict[str, Any]]:
    found = json.loads(file.read_text())
    assert found["schema"] == 2
    return list(found["scores"])


def of_suite(workdir: Path) -> list[dict[str, Any]]:
    return [one for one in scores(workdir / "evaluate" / "results.json") if one["data"].endswith(".jsonl")]


def refused(*arguments: str | Path) -> str:
    """The one line with which the command ends."""
    ended = runs.here(*arguments)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("fusechat: error: ")
    return line.removeprefix("fusechat: error: ")


def test_a_run_measured_again_by_itself_gives_the_same(finished: Path, work: Path) -> None:
    before = runs.digests(work)
    ended = runs.here(
        "eval", "bits-per-byte", "--workdir", work, "--data", finished / "held-out.jsonl", *LENGTH, "--json"
    )
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)
    kept = of_suite(work)
    assert kept == printed
    own = [one for one in scores(work / "evaluate" / "results.json") if one["data"] == "data-held-out"]
    assert [(one["role"], one["model"]) for one in kept] == [(one["role"], one["model"]) for one in own]
    for ours, theirs in zip(kept, own, strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-5)
        assert ours["standard_error"] == pytest.approx(theirs["standard_error"], rel=1e-4)
        assert (ours["n"], ours["missing"], ours["compared_with"]) == tuple(
            theirs[key] for key in ("n", "missing", "compared_with")
        )
    after = runs.digests(work)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"evaluate/results.json", "evaluate/manifest.json", "report/index.html", "report/manifest.json"}
    assert "held-out.jsonl" in (work / "report" / "index.html").read_text()
    again = runs.here("run", finished / "recipe.yaml", "--workdir", work)
    assert " 0 steps done now" in f" {again.stderr.splitlines()[-1]}"
    assert runs.digests(work) == after
    assert "held-out.jsonl" in again.stdout


def test_results_of_a_model_that_is_another_now_are_left_out(finished: Path, work: Path) -> None:
    data = finished / "own-held-out.jsonl"
    measured = runs.here("eval", "bits-per-byte", "pivot", "fused", "--workdir", work, "--data", data, *LENGTH)
    assert measured.returncode == 0, measured.stderr
    assert [one["role"] for one in of_suite(work)] == ["pivot", "fused"]
    again = runs.here("run", finished / "recipe.yaml", "--workdir", work, "--set", "merge.select_topk=0.9")
    assert again.returncode == 0, again.stderr
    assert "bits-per-byte measured a fused model that is another now; measure it again" in again.stderr
    assert [one["role"] for one in of_suite(work)] == ["pivot"]
    runs.here("eval", "bits-per-byte", "fused", "--workdir", work, "--data", data, *LENGTH)
    pivot, fused = of_suite(work)
    assert [pivot["role"], fused["role"]] == ["pivot", "fused"], "it is compared with the pivot without a word"
    assert fused["difference_to_pivot"] == pytest.approx(fused["value"] - pivot["value"])


def test_models_by_themselves_are_compared_with_the_first(
    models: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "found" / "all.json", finished / "held-out.jsonl"
    two = (f"one={models['llama']}", f"two={models['mistral']}")
    ended = runs.here("eval", "bits-per-byte", *two, "--data", data, *LENGTH, "--out", out)
    assert ended.returncode == 0, ended.stderr
    first, second = scores(out)
    assert (first["model"], first["compared_with"], first["difference_to_pivot"]) == ("one", None, None)
    assert second["compared_with"] == "one"
    assert second["difference_to_pivot"] == pytest.approx(second["value"] - first["value"])
    assert f"{second['value']:.4f} ± {students_t(second['items']) * second['standard_error']:.4f}" in ended.stdout
    assert first["settings"]["dtype"] == "float32"
    assert {"fusechat", "torch", "transformers"} <= first["versions"].keys()
    three = f"three={models['llama']}"
    more = runs.here("eval", "bits-per-byte", two[0], three, "--data", data, *LENGTH, "--out", out)
    assert more.returncode == 0, more.stderr
    kept = {one["model"]: one for one in scores(out)}
    assert list(kept) == ["one", "two", "three"]
    assert kept["two"] == second, "what is not measured again stays"
    assert kept["three"]["difference_to_pivot"] == 0
    other = runs.here("eval", "bits-per-byte", two[0], "--data", data, "--limit", "2", *LENGTH, "--out", out)
    assert "results of two with other settings or another pivot are left out" in other.stderr
    assert [(one["model"], one["settings"]["limit"]) for one in scores(out)] == [("one", 2)]
    alone = runs.here("eval", "bits-per-byte", two[1], "--data", data, "--limit", "2", *LENGTH, "--out", out)
    assert "results of one with other settings or another pivot are left out" in alone.stderr
    assert not list(out.parent.glob("**/.lock"))


def test_what_some_model_cannot_use_is_missing_for_all(models: dict[str, Path], tmp_path: Path) -> None:
    data = runs.write_conversations(tmp_path / "data.jsonl", 4)
    long = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 120}]
    data.write_text(data.read_text() + json.dumps({"messages": long}) + "\n")
    ended = runs.here(
        *("eval", "bits-per-byte", models["llama"], models["mistral"], "--data", data, "--max-length", "200"),
        *("--device", "cpu", "--json"),
    )
    assert ended.returncode == 0, ended.stderr
    assert [(one["n"], one["missing"]) for one in json.loads(ended.stdout)] == [(6, 1), (6, 1)]
    assert "cannot use 1 of 5 conversations" in ended.stderr
    shutil.rmtree("evaluate")


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_is_refused(models: dict[str, Path], finished: Path, work: Path, tmp_path: Path) -> None:
    data, llama = finished / "held-out.jsonl", models["llama"]
    score = ("eval", "bits-per-byte")
    assert refused(*score, "--data", data) == "names no MODEL: give some, or the --workdir of a run"
    assert refused(*score, llama) == "--data: names no file of conversations"
    assert "two models of this name" in refused(*score, llama, llama, "--data", data)
    assert "neither a directory" in refused(*score, "nothing-here", "--data", data)
    assert refused(*score, llama, "--data", "none.jsonl") == "none.jsonl: no such file"
    assert "needs the model itself, not a server" in refused(*score, "http://127.0.0.1:9/v1#it", "--data", data)
    assert "add its name" in refused(*score, "http://127.0.0.1:9/v1", "--data", data)
    assert "is a directory; name a file in it" in refused(*score, llama, "--data", data, "--out", tmp_path)
    bad_place = refused(*score, llama, "--data", data, "--out", data / "x.json")
    assert bad_place == f"--out {data / 'x.json'}: its directory cannot be made (File exists)"
    both = refused(*score, "pivot", "--workdir", work, "--data", data, "--out", "x.json")
    assert both.startswith("--out: the results of a run are kept in its --workdir")
    assert "no work directory of FuseChat" in refused(*score, "--workdir", tmp_path / "none", "--data", data)
    unknown = refused(*score, "fuse", "--workdir", work, "--data", data)
    assert unknown.startswith("'fuse' is neither a directory")
    assert unknown.endswith("; the run has pivot, source-mistral, source-gemma, target-mistral, target-gemma, fused")
    for secret in ("https://user:sesame@host/v1", "https://host/v1?api_key=sesame"):
        assert "sesame" not in refused(*score, secret, "--workdir", work, "--data", data)
    assert refused("eval", "mt-bench", llama) == "--judge-url and --judge-model: name the judge's server and model"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + "not json\n")
    assert f"{bad}:6: not JSON" in refused(*score, llama, "--data", bad, "--device", "cpu")
    skipped = runs.here(*score, llama, "--data", bad, "--on-error", "skip", "--device", "cpu")
    assert skipped.returncode == 0, skipped.stderr
    assert "left out" in skipped.stderr


def test_a_run_that_is_not_finished(finished: Path, work: Path) -> None:
    """What is there can be measured; the results are told of when the run gets so far."""
    data = finished / "held-out.jsonl"
    shutil.rmtree(work / "merge")
    said = refused("eval", "bits-per-byte", "fused", "--workdir", work, "--data", data, *LENGTH)
    assert said.endswith("not finished: merge is absent (not begun); run the recipe first")
    pivot = runs.here("eval", "bits-per-byte", "pivot", "--workdir", work, "--data", data, *LENGTH)
    assert pivot.returncode == 0, pivot.stderr
    assert "merge is not done: the run's results.json and report will have this when it is" in pivot.stderr
    assert runs.here("run", finished / "recipe.yaml", "--workdir", work).returncode == 0
    assert [one["role"] for one in of_suite(work)] == ["pivot"]


def test_a_run_without_held_out_data_has_the_suites(finished: Path, work: Path) -> None:
    shutil.rmtree(work / "evaluate")
    none = ("--set", "evaluate={bits_per_byte: false}")
    assert runs.here("run", finished / "recipe.yaml", "--workdir", work, *none).returncode == 0
    assert not (work / "evaluate").exists()
    data = finished / "held-out.jsonl"
    ended = runs.here("eval", "bits-per-byte", "pivot", "fused", "--workdir", work, "--data", data, *LENGTH)
    assert ended.returncode == 0, ended.stderr
    assert [one["role"] for one in of_suite(work)] == ["pivot", "fused"]
    assert "held-out.jsonl" in (work / "report" / "index.html").read_text()


def test_models_of_one_name_are_told_apart(models: dict[str, Path], tmp_path: Path) -> None:
    """Two sources in directories that end alike."""
    for name, kind in (("a", "mistral"), ("b", "gemma")):
        shutil.copytree(models[kind], tmp_path / name / "model")
    sources = {"one": "a/model", "two": {"model": "b/model", "chat_template": tiny.TEMPLATE}}
    recipe = load_recipe(runs.write_recipe(tmp_path, models, sources=sources))
    pivot, first, second, *targets = run_models(recipe, {}, Step("merge", "", tmp_path, {}, lambda directory: {}))
    assert (pivot.label, first.label, second.label) == ("llama", "source-one", "source-two")
    assert [model.label for model in targets] == ["tiny"]


def test_one_at_a_time(models: dict[str, Path], finished: Path, work: Path, tmp_path: Path) -> None:
    data = finished / "held-out.jsonl"
    with exclusive_lock(tmp_path / "there" / ".lock", tmp_path):
        said = refused("eval", "bits-per-byte", models["llama"], "--data", data, "--out", "there/results.json")
    assert said == f"there: process {os.getpid()} is using it"
    with exclusive_lock(work / ".lock", work):
        said = refused("eval", "bits-per-byte", "pivot", "--workdir", work, "--data", data)
    assert f"process {os.getpid()} is using it" in said


def test_a_full_disk_is_told_with_the_option(
    models: dict[str, Path], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr("fusechat.evaluate.records.write_json", full)
    said = runs.here("eval", "bits-per-byte", models["llama"], "--data", finished / "held-out.jsonl", *LENGTH)
    assert said.returncode == 2
    assert "free some room or choose another --out, then run again to resume" in said.stderr


def test_records_by_hand(tmp_path: Path) -> None:
    """Means 2 and 4 of the pivot's and the other's items; the pair differs by 1 and 3."""
    measured = {
        "p": [Measurement("all", "score", {"a": (1, 1), "b": (3, 1)}, 1)],
        "q": [
            Measurement("all", "score", {"a": (2, 1), "b": (6, 1)}, 0),
            Measurement("all", "bleu", {}, 0, value=0.5, higher_is_better=None),
            Measurement("all", "none", {}, 4, why="nothing there"),
        ],
    }
    models = {"p": About("pivot", "p", "i")}
    found = records("s", measured, models=models, pivot="p", settings={"x": 1}, versions={})
    assert [(one["model"], one["metric"], one["value"], one["n"], one["missing"]) for one in found] == [
        ("p", "score", 2, 2, 1),
        ("q", "score", 4, 2, 0),
        ("q", "bleu", 0.5, 0, 0),
        ("q", "none", None, 0, 4),
    ]
    assert [one["difference_to_pivot"] for one in found] == [None, 2, None, None]
    assert found[1]["difference_standard_error"] == pytest.approx(1)
    assert (found[1]["difference_n"], found[1]["why"], found[3]["why"]) == (2, None, "nothing there")
    keep(tmp_path / "s", found)
    keep(tmp_path / "s", [{**found[1], "value": 7}])
    keep(tmp_path / "t", [{**found[0], "suite": "t"}])
    assert [one["value"] for one in gather(tmp_path)] == [2, 7, 0.5, None, 2]
    write_results(tmp_path / "results.json", gather(tmp_path))
    assert len(scores(tmp_path / "results.json")) == 5


@pytest.mark.parametrize("content", ["not json", "{}", '[{"suite": "s"}]', "[1]"])
def test_a_damaged_record_file_is_named(content: str, models: dict[str, Path], finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "evaluate" / "bits-per-byte" / "records.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    said = runs.here("eval", "bits-per-byte", models["llama"], "--data", finished / "held-out.jsonl", *LENGTH)
    assert said.returncode == 2
    assert "records.json: holds no results of an evaluation; remove it to start again" in said.stderr
    assert file.read_text() == content


def test_help_needs_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "openai", "pandas")
    code = f"import sys, fusechat.commands.cli; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
