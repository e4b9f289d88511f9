"""`fusechat clean`: what it frees, what stays, and what comes back when it is needed."""

import shutil
from pathlib import Path
from typing import Any

import runs
from fusechat.commands.clean import free, parts
from fusechat.commands.run import run
from fusechat.pipeline import build_steps, load_recipe
from fusechat.run.files import read_json
from fusechat.run.integrity import write_checked


def states(copied: Path, *changes: str) -> dict[str, str]:
    steps = build_steps(load_recipe(copied / "recipe.yaml", list(changes)), copied / "work")
    return {step.label: step.state()[0] for step in steps}


def outputs(step: Path) -> dict[str, Any]:
    return dict(read_json(step / "manifest.json")["outputs"])


def weights(copied: Path) -> bytes:
    return (copied / "work" / "merge" / "model" / "model.safetensors").read_bytes()


def disk(copied: Path) -> int:
    return sum(file.stat().st_size for file in (copied / "work").rglob("*") if file.is_file())


def test_it_says_how_much_and_frees_that_and_the_run_stays_finished(copied: Path) -> None:
    before, fused = disk(copied), weights(copied)
    asked = runs.here("clean", copied / "work")
    assert asked.returncode == 0
    assert "nothing was removed; --yes removes without asking" in asked.stdout
    assert disk(copied) == before
    size = sum(part.size for part in parts(copied / "work"))
    done = runs.here("clean", copied / "work", "--yes")
    assert f"{size / 1e6:,.1f} MB  in all" in done.stdout
    assert {line.split("  ")[1] for line in done.stdout.splitlines()} == {
        *(f"capture {name}" for name in ("pivot/data", "pivot/gemma", "mistral/data", "gemma/gemma")),
        *("align mistral", "align gemma", "in all"),
    }
    assert 0 <= disk(copied) - (before - size) < 1000, "what the manifests say of it comes on top"
    found = states(copied)
    assert {label.split()[0] for label, state in found.items() if state == "freed"} == {"capture", "align"}
    assert set(found.values()) == {"done", "freed"}
    assert run(load_recipe(copied / "recipe.yaml"), copied / "work") == 0
    assert weights(copied) == fused
    assert "there is nothing to free" in runs.here("clean", copied / "work", "--yes").stdout
    assert runs.here("report", copied / "work").returncode == 0, "the page needs none of it"


def test_what_a_step_needs_comes_back_and_nothing_else(copied: Path, finished: Path) -> None:
    """A merge needs no distributions; a fine-tuning those of its own branch; and the outcome is that of a run never freed."""
    free(copied / "work")
    run(load_recipe(copied / "recipe.yaml", ["merge.select_topk=0.2"]), copied / "work")
    assert states(copied, "merge.select_topk=0.2")["align gemma"] == "freed"
    shutil.rmtree(copied / "work" / "fuse" / "gemma")
    run(load_recipe(copied / "recipe.yaml"), copied / "work")
    found = {label for label, state in states(copied).items() if state == "freed"}
    assert found == {"capture mistral/data", "align mistral", "capture pivot/data"}
    assert weights(copied) == weights(finished)


def test_a_stage_that_is_named_is_made_again(copied: Path) -> None:
    before = {step: outputs(copied / "work" / step) for step in ("align/gemma", "capture/gemma/gemma")}
    free(copied / "work")
    shown = runs.here("tokens", "pivot", "gemma", "--workdir", copied / "work", "--conversation", "0")
    assert shown.returncode == 2
    assert "was cleared away; fusechat run RECIPE --until align makes it again" in shown.stderr
    run(load_recipe(copied / "recipe.yaml"), copied / "work", until="align")
    found = states(copied)
    assert {label for label, state in found.items() if state == "freed"} == {
        "capture pivot/data",
        "capture pivot/gemma",
    }
    assert set(found.values()) == {"done", "freed"}, "what was made of it is as it was"
    assert {step: outputs(copied / "work" / step) for step in before} == before
    assert runs.here("tokens", "pivot", "gemma", "--workdir", copied / "work", "--conversation", "0").returncode == 0


def test_what_was_killed_while_it_freed_is_freed_by_the_next(copied: Path) -> None:
    manifest = copied / "work" / "align" / "gemma" / "manifest.json"
    write_checked(manifest, {**read_json(manifest), "freed": ["aligned.arrow"]})
    assert states(copied)["align gemma"] == "freed"
    assert any(part.label == "align gemma" and part.size for part in parts(copied / "work"))
    free(copied / "work")
    assert parts(copied / "work") == []


def test_what_no_step_names_any_more_goes_whole(copied: Path) -> None:
    """Of a source that the recipe no longer has, its distributions go and its fine-tuned target stays."""
    text = (copied / "recipe.yaml").read_text()
    begin, end = text.index("  gemma:\n"), text.index("\ndata:\n") + 1
    (copied / "recipe.yaml").write_text(text[:begin] + text[end:])
    run(load_recipe(copied / "recipe.yaml"), copied / "work")
    labels = {part.label for part in parts(copied / "work")}
    assert {"align/gemma (left over)", "capture/gemma/gemma (left over)", "capture/pivot/gemma (left over)"} <= labels
    free(copied / "work")
    assert not (copied / "work" / "align" / "gemma").exists()
    assert (copied / "work" / "fuse" / "gemma" / "model" / "model.safetensors").is_file()
    assert (copied / "work" / "align" / "mistral" / "manifest.json").is_file()


def test_what_is_not_finished_or_no_run_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "work" / "merge" / "manifest.json").unlink()
    before = disk(copied)
    refused = runs.here("clean", copied / "work", "--yes")
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("not finished: merge is absent; run the recipe first")
    assert disk(copied) == before
    nothing = runs.here("clean", tmp_path, "--yes")
    assert nothing.returncode == 2
    assert "no work directory of FuseChat" in nothing.stderr
