"""`fusechat clean`: what it frees, what stays, and what comes back when it is needed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fusechat.commands.run import run

import runs
from fusechat.commands.clean import free, parts
from fusechat.pipeline import build_steps, load_recipe
from fusechat.run.files import read_json
from fusechat.run.integrity import write_checked


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    run(load_recipe(runs.write_recipe(directory, models)), directory / "work")
    return directory


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, of its own recipe; its page says where that lies."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    assert run(load_recipe(copy / "recipe.yaml"), copy / "work") == 1
    return copy


def states(place: Path, *changes: str) -> dict[str, str]:
    steps = build_steps(load_recipe(place / "recipe.yaml", list(changes)), place / "work")
    return {step.label: step.state()[0] for step in steps}


def outputs(step: Path) -> dict[str, Any]:
    return dict(read_json(step / "manifest.json")["outputs"])


def weights(place: Path) -> bytes:
    return (place / "work" / "merge" / "model" / "model.safetensors").read_bytes()


def disk(place: Path) -> int:
    return sum(file.stat().st_size for file in (place / "work").rglob("*") if file.is_file())


def test_it_says_how_much_and_frees_that_and_the_run_stays_finished(place: Path) -> None:
    before, fused = disk(place), weights(place)
    asked = runs.fusechat("clean", place / "work")
    assert asked.returncode == 0
    assert "nothing was removed; --yes removes without asking" in asked.stdout
    assert disk(place) == before
    size = sum(part.size for part in parts(place / "work"))
    done = runs.fusechat("clean", place / "work", "--yes")
    assert f"{size / 1e6:,.1f} MB  in all" in done.stdout
    assert {line.split("  ")[1] for line in done.stdout.splitlines()} == {
        *(f"capture {name}" for name in ("pivot/data", "pivot/gemma", "mistral/data", "gemma/gemma")),
        *("align mistral", "align gemma", "in all"),
    }
    assert 0 <= disk(place) - (before - size) < 1000, "what the manifests say of it comes on top"
    found = states(place)
    assert {label.split()[0] for label, state in found.items() if state == "freed"} == {"capture", "align"}
    assert set(found.values()) == {"done", "freed"}
    assert run(load_recipe(place / "recipe.yaml"), place / "work") == 0
    assert weights(place) == fused
    assert "there is nothing to free" in runs.fusechat("clean", place / "work", "--yes").stdout
    assert runs.fusechat("report", place / "work").returncode == 0, "the page needs none of it"


def test_what_a_step_needs_comes_back_and_nothing_else(place: Path, finished: Path) -> None:
    """A merge needs no distributions; a fine-tuning those of its own branch; and the outcome is that of a run never freed."""
    free(place / "work")
    run(load_recipe(place / "recipe.yaml", ["merge.select_topk=0.2"]), place / "work")
    assert states(place, "merge.select_topk=0.2")["align gemma"] == "freed"
    shutil.rmtree(place / "work" / "fuse" / "gemma")
    run(load_recipe(place / "recipe.yaml"), place / "work")
    found = {label for label, state in states(place).items() if state == "freed"}
    assert found == {"capture mistral/data", "align mistral", "capture pivot/data"}
    assert weights(place) == weights(finished)


def test_a_stage_that_is_named_is_made_again(place: Path) -> None:
    before = {step: outputs(place / "work" / step) for step in ("align/gemma", "capture/gemma/gemma")}
    free(place / "work")
    shown = runs.fusechat("tokens", "pivot", "gemma", "--workdir", place / "work", "--conversation", "0")
    assert shown.returncode == 2
    assert "was cleared away; fusechat run RECIPE --until align makes it again" in shown.stderr
    run(load_recipe(place / "recipe.yaml"), place / "work", until="align")
    found = states(place)
    assert {label for label, state in found.items() if state == "freed"} == {
        "capture pivot/data",
        "capture pivot/gemma",
    }
    assert set(found.values()) == {"done", "freed"}, "what was made of it is as it was"
    assert {step: outputs(place / "work" / step) for step in before} == before
    assert runs.fusechat("tokens", "pivot", "gemma", "--workdir", place / "work", "--conversation", "0").returncode == 0


def test_what_was_killed_while_it_freed_is_freed_by_the_next(place: Path) -> None:
    manifest = place / "work" / "align" / "gemma" / "manifest.json"
    write_checked(manifest, {**read_json(manifest), "freed": ["aligned.arrow"]})
    assert states(place)["align gemma"] == "freed"
    assert any(part.label == "align gemma" and part.size for part in parts(place / "work"))
    free(place / "work")
    assert parts(place / "work") == []


def test_what_no_step_names_any_more_goes_whole(place: Path) -> None:
    """Of a source that the recipe no longer has, its distributions go and its fine-tuned target stays."""
    text = (place / "recipe.yaml").read_text()
    begin, end = text.index("  gemma:\n"), text.index("data:\n  train: train")
    (place / "recipe.yaml").write_text(text[:begin] + text[end:])
    run(load_recipe(place / "recipe.yaml"), place / "work")
    labels = {part.label for part in parts(place / "work")}
    assert {"align/gemma (left over)", "capture/gemma/gemma (left over)", "capture/pivot/gemma (left over)"} <= labels
    free(place / "work")
    assert not (place / "work" / "align" / "gemma").exists()
    assert (place / "work" / "fuse" / "gemma" / "model" / "model.safetensors").is_file()
    assert (place / "work" / "align" / "mistral" / "manifest.json").is_file()


def test_what_is_not_finished_or_no_run_is_refused(place: Path, tmp_path: Path) -> None:
    (place / "work" / "merge" / "manifest.json").unlink()
    before = disk(place)
    refused = runs.fusechat("clean", place / "work", "--yes")
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("not finished: merge is absent; run the recipe first")
    assert disk(place) == before
    nothing = runs.fusechat("clean", tmp_path, "--yes")
    assert nothing.returncode == 2
    assert "no work directory of FuseChat" in nothing.stderr
