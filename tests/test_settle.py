"""What a recipe leaves open is settled once for a work directory: commits of the hub, and what `auto` is."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import yaml

import runs
from fusechat.commands.run import run
from fusechat.models import load as core_models
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe import precision
from fusechat.recipe.load import save_recipe
from fusechat.recipe.pinned import pin, recipe_of
from fusechat.run.files import read_json
from fusechat.run.steps import MANIFEST
from hubs import cached, served
from test_kept import heard, states

OLD, NEW, OTHER = "a" * 40, "b" * 40, "c" * 40
__all__ = ["heard"]


@pytest.fixture
def offline(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a source and conversations of the hub, which the client's cache has at the commit OLD of their branches."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "talks").mkdir()
    runs.write_conversations(tmp_path / "talks" / "train.jsonl", 6)
    move(tmp_path, models, OLD)
    return runs.write_recipe(
        tmp_path, models, sources={"teacher": "org/name"}, data={"train": "org/talks", "max_length": 256}
    )


def move(home: Path, models: dict[str, Path], commit: str, branch: str = "main") -> None:
    """The branch goes to another commit, which differs in a file that nobody reads."""
    cached(home, "org/name", models["mistral"], commit, branch)
    (cached(home, "datasets/org/talks", home / "talks", commit, branch) / "README.md").write_text(commit)


def settings(work: Path, step: str) -> dict[str, Any]:
    return dict(read_json(work / step / MANIFEST)["inputs"]["settings"])


def test_a_commit_is_settled_once(
    offline: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    work = tmp_path / "work"
    assert run(load_recipe(offline), work, until="capture") == 4
    written = yaml.safe_load((work / "recipe.yaml").read_text())
    assert (written["sources"]["teacher"]["model"], written["sources"]["teacher"]["commit"]) == ("org/name", OLD)
    assert written["data"]["train"] == {"path": "org/talks", "commit": OLD}
    assert "commit" not in written["pivot"]
    move(tmp_path, models, NEW)
    assert settings(work, "capture/teacher/data")["model"] == f"hub:org/name@{OLD}"

    def newest(self: Any, name: str, *, repo_type: str, revision: str | None, timeout: float) -> Any:
        assert (name, revision) in (("org/name", None), ("org/talks", None))
        return type("Info", (), {"sha": NEW})

    with monkeypatch.context() as online:
        online.setattr(huggingface_hub.HfApi, "repo_info", newest)
        heard.clear()
        assert run(load_recipe(offline), work, until="capture") == 0
    told = [line for line in heard if "newer" in line]
    assert [line.partition(":")[0] for line in told] == ["org/name", "org/talks"], "each once"
    assert all(OLD in line and f"commit: {NEW}" in line for line in told)
    for recipe in (load_recipe(offline), load_recipe(work / "recipe.yaml")):
        assert {state for label, state in states(pin(recipe, work), work).items() if "capture" in label} == {
            ("done", "")
        }
    chosen = load_recipe(offline, [f"sources.teacher.commit={NEW}"])
    assert states(pin(chosen, work), work)["capture teacher/data"] == (
        "stale",
        "settings.model changed; upstream.prepare changed",
    )
    assert run(chosen, work, until="capture") == 2, "the teacher is prepared and captured again, nothing else"
    assert settings(work, "capture/teacher/data")["model"] == f"hub:org/name@{NEW}"
    assert run(load_recipe(offline), work, until="capture") == 0, "what was chosen is what the work directory has now"


def test_another_revision_in_the_recipe_is_honoured(offline: Path, models: dict[str, Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(load_recipe(offline), work, until="prepare")
    move(tmp_path, models, OTHER, "v2")
    other = load_recipe(offline, ["sources.teacher.model=org/name@v2"])
    assert run(other, work, until="prepare") == 1
    assert recipe_of(work).sources["teacher"].commit == OTHER
    assert recipe_of(work).data.train.commit == OLD  # type: ignore[union-attr]
    exact = load_recipe(offline, [f"sources.teacher.model=org/name@{OLD}"])
    run(exact, work, until="prepare")
    assert recipe_of(work).sources["teacher"].commit == OLD


def test_a_run_of_an_older_version_keeps_its_commits(offline: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Its recipe does not name them, its manifests do."""
    work = tmp_path / "work"
    run(load_recipe(offline), work, until="capture")
    save_recipe(load_recipe(offline), work / "recipe.yaml")
    assert OLD not in (work / "recipe.yaml").read_text()
    move(tmp_path, models, NEW)
    assert recipe_of(work).sources["teacher"].commit == OLD
    assert run(load_recipe(offline), work, until="capture") == 0


def test_a_second_process_and_a_machine_without_a_network(models: dict[str, Path], tmp_path: Path) -> None:
    """By a hub that is there, moves on, and is gone."""
    home, work = tmp_path / "home", tmp_path / "work"
    runs.write_conversations(tmp_path / "talks.jsonl", 4)
    recipe = runs.write_recipe(tmp_path, models, sources={"teacher": "org/name"}, data={"train": "talks.jsonl"})
    repository = shutil.copytree(models["mistral"], tmp_path / "repository")
    command = ("run", recipe, "--workdir", work, "--until", "prepare")
    with served() as hub:
        hub.files["org/name"], hub.commits["org/name"] = repository, OLD
        online = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        ended = runs.fusechat(*command, **online)
        assert ended.returncode == 0, ended.stderr
        (repository / "README.md").write_text("More words.")
        hub.commits["org/name"] = NEW
        ended = runs.fusechat(*command, **online)
        assert ended.returncode == 0, ended.stderr
        assert "0 steps done now" in ended.stderr
        assert (
            f"org/name: the hub has a newer commit than the one that this work directory continues with ({OLD})"
            in ended.stderr
        )
    told = runs.fusechat("status", work, "--json", HF_HOME=str(home), HF_HUB_OFFLINE="1")
    found = {one["step"]: one["state"] for one in json.loads(told.stdout)}
    assert {state for step, state in found.items() if step.startswith("prepare")} == {"done"}


def test_one_id_in_two_places_of_a_recipe(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit for both where none is named, though the branch moves; a commit that one names is not the other's."""
    from fusechat.recipe import pinned as settle

    moved = iter([NEW, OTHER])
    monkeypatch.setattr(settle, "current_commit", lambda kind, asked: next(moved))
    monkeypatch.setattr(settle, "newest_commit", lambda kind, asked: None)
    named = {"model": "org/name", "commit": OLD}
    for sources in (
        {"one": "org/name", "two": "org/name"},
        {"one": "org/name", "old": named},
        {"old": named, "one": "org/name"},
    ):
        moved = iter([NEW, OTHER])
        recipe, work = runs.write_recipe(tmp_path, models, sources=sources), tmp_path / "-".join(sources)
        work.mkdir()
        found = pin(load_recipe(recipe), work, begin=True)
        commits = {name: spec.commit for name, spec in found.sources.items()}
        assert commits == {name: OLD if name == "old" else NEW for name in sources}
        save_recipe(found, work / "recipe.yaml")
        again = pin(load_recipe(recipe), work, begin=True)
        assert {name: spec.commit for name, spec in again.sources.items()} == commits


def test_a_commit_of_what_is_not_the_hubs_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from fusechat.errors import DataError, RecipeError

    recipe = runs.write_recipe(tmp_path, models)
    with pytest.raises(RecipeError, match="commit goes with a model of the hub"):
        load_recipe(recipe, [f"sources.mistral.commit={OLD}"])
    with pytest.raises(DataError, match="is a file, which has no commit"):
        build_steps(load_recipe(recipe, [f"data.train.commit={OLD}"]), tmp_path / "work")


def test_what_auto_is_is_settled_once(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    """A run that begins where bfloat16 is fast continues in it where it is not, and says so."""
    recipe, work = runs.write_recipe(tmp_path, models, capture={"dtype": "auto", "top_k": 4}), tmp_path / "work"
    monkeypatch.setattr(core_models, "fast_dtype", lambda device: "bfloat16")
    run(load_recipe(recipe), work, until="capture")
    monkeypatch.setattr(core_models, "fast_dtype", lambda device: "float32")
    assert load_recipe(recipe).capture.dtype == "float32"
    heard.clear()
    assert run(load_recipe(recipe), work, until="capture") == 0
    said = "capture.dtype: auto is bfloat16 in this work directory, as its recipe.yaml says; this machine would take float32"
    assert said in heard
    assert settings(work, "capture/pivot/data")["dtype"] == "bfloat16"
    named = load_recipe(recipe, ["capture.dtype=float32"])
    assert states(pin(named, work), work)["capture pivot/data"] == ("stale", "settings.dtype changed"), (
        "what is named counts"
    )
    assert precision.automatic({"capture": {"dtype": "auto"}}) == (("capture", "dtype"),)
