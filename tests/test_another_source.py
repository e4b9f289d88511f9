"""A source that is added to a finished run, or taken away: its own branch, the merge and what follows are done, nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from fusechat.commands.run import run
from fusechat.pipeline import load_recipe

# mistral teaches on the recipe's conversations; so may another one, or on its own, on which all models are then measured too.
OWN = {"train": "own.jsonl", "validation": "own-held-out.jsonl"}
FOLLOWS = {"merge", "evaluate fused", "evaluate answers fused", "evaluate results", "report"}
SHARED = {
    *("prepare other/data", "prepare other/data-held-out", "capture other/data", "align other", "fuse other"),
    *("evaluate source-other", "evaluate answers source-other", "evaluate target-other"),
}
# The questions that are answered side by side are of all held-out sets.
ANSWERED = {"evaluate answers pivot", "evaluate answers source-mistral"}
MEASURED_TOO = {"evaluate pivot", "evaluate source-mistral", "evaluate target-mistral"}
PREPARED_TOO = {f"prepare {name}/other-held-out" for name in ("pivot", "mistral", "other")}
APART = {
    *("prepare pivot/other", "prepare other/other", "prepare other/data-held-out", "capture pivot/other"),
    *("capture other/other", "align other", "fuse other", *PREPARED_TOO, *MEASURED_TOO, *ANSWERED),
    *("evaluate source-other", "evaluate answers source-other", "evaluate target-other", "prepare overlap"),
}


def snapshot(work: Path) -> dict[str, tuple[bytes, int]]:
    """Every file: its contents, and when they were written."""
    return {
        str(file.relative_to(work)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in work.rglob("*")
        if file.is_file()
    }


def states(work: Path, recipe: Path) -> dict[str, tuple[str, str]]:
    """What `fusechat status` says of the recipe: step → its state and why."""
    told = runs.here("status", work, "--recipe", recipe, "--json")
    assert told.returncode == 0, told.stderr
    return {one["step"]: (one["state"], one["why"]) for one in json.loads(told.stdout)}


def follow(work: Path, recipe: Path) -> tuple[int, set[str], set[str]]:
    """Runs it. How many steps were done; which directories have files that were written or removed; which files are as before,
    inside these."""
    before = snapshot(work)
    done = run(load_recipe(recipe), work)
    after = snapshot(work)
    touched = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    touched -= {"recipe.yaml", ".lock"}
    directories = {str(Path(name).parent).removesuffix("/model") for name in touched}
    return done, directories, {name for name in after if name not in touched and str(Path(name).parent) in directories}


def directory_of(step: str) -> str:
    stage, _, name = step.partition(" ")
    return f"{stage}/{name.replace('answers ', 'answers-')}".rstrip("/").removesuffix("/results")


@pytest.mark.parametrize(("data", "branch"), [(None, SHARED), (OWN, APART)], ids=["the same data", "data of its own"])
def test_a_source_comes_and_goes(
    single: Path, models: dict[str, Path], tmp_path: Path, data: Any, branch: set[str]
) -> None:
    added = {"model": str(models["llama"]), **({"data": data} if data else {})}
    one = runs.write_recipe(tmp_path, models, sources={"mistral": str(models["mistral"])})
    two, work = tmp_path / "two.yaml", tmp_path / "work"
    both = yaml.safe_load(one.read_text())
    both["sources"]["other"] = added
    two.write_text(yaml.safe_dump(both, sort_keys=False))
    shutil.copytree(single / "work", work)

    told = states(work, two)
    assert {step for step, (state, _) in told.items() if state != "done"} == branch | FOLLOWS
    assert told["merge"] == ("stale", "settings.sources.other is new; upstream.other is new")
    assert told["fuse other"] == ("absent", "not begun")
    if data:
        assert told["evaluate pivot"] == ("stale", "upstream.other-held-out is new")
    done, directories, kept = follow(work, two)
    assert done == len(branch | FOLLOWS)
    assert directories == {directory_of(step) for step in branch | FOLLOWS}
    measured = {"evaluate/pivot", "evaluate/source-mistral", "evaluate/target-mistral"}
    assert kept == ({f"{name}/data-held-out.json" for name in measured} if data else set())
    assert {score["model"] for score in scores(work)} >= {"mistral", "other", "tiny"}

    told = states(work, one)
    gone = FOLLOWS | (MEASURED_TOO | ANSWERED | {"prepare overlap"} if data else set())
    assert {step for step, (state, _) in told.items() if state != "done"} == gone
    assert told["merge"] == ("stale", "settings.sources.other is gone; upstream.other is gone")
    done, directories, kept = follow(work, one)
    assert done == len(gone)
    assert directories == {directory_of(step) for step in gone}
    assert kept == ({f"{name}/data-held-out.json" for name in measured} if data else set())
    assert "other" not in {score["model"] for score in scores(work)}


def scores(work: Path) -> list[dict[str, Any]]:
    return list(json.loads((work / "evaluate" / "results.json").read_text())["scores"])
