"""What an interrupted run has done is kept when something is changed that results do not depend on; what is not kept is told."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import runs
from fusechat.capture.local import Local
from fusechat.commands.run import run
from fusechat.fuse.training import _Watch
from fusechat.merge import engine
from fusechat.merge import standalone as command
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.schema import Recipe
from fusechat.recipe.training_arguments import counted
from fusechat.run.files import digest, read_json
from fusechat.run.integrity import write_checked
from fusechat.run.steps import MANIFEST, Step
from training import StopError

SHARDS = "capture/mistral/data"
CHECKPOINTS = "fuse/mistral/checkpoints"
COSMETIC = [
    *("fuse.training.logging_steps=3", "fuse.training.save_steps=3", "fuse.training.report_to=[]"),
    *("fuse.training.dataloader_num_workers=1", "fuse.training.run_name=again", "fuse.training.save_total_limit=2"),
    *("capture.batch_tokens=200", "evaluate.batch_tokens=300"),
]


@pytest.fixture
def heard() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fusechat")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def work(single: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(single / "work", tmp_path / "work"))


def stopped_training(recipe: Recipe, work: Path, monkeypatch: pytest.MonkeyPatch, at: int = 5) -> None:
    """A run that ends as by a signal in its fine-tuning, once so many steps are done; what is aligned is there."""
    runs.cut(work, "align")
    real = _Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(_Watch, "on_step_end", stop)
        with pytest.raises(StopError):
            run(recipe, work, until="fuse")


def weights(work: Path) -> dict[str, str]:
    return {
        str(file.relative_to(work)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(work.rglob("model*.safetensors"))
    }


def states(recipe: Recipe, work: Path) -> dict[str, tuple[str, str]]:
    return {step.label: step.state() for step in build_steps(recipe, work)}


def test_a_cosmetic_change_keeps_shards_and_checkpoints(
    single: Path, work: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    file = single / "recipe.yaml"
    stopped_training(load_recipe(file), work, monkeypatch)
    kept = {path: path.stat().st_ino for path in (work / SHARDS).glob("shard-*.arrow")}
    assert len(kept) == 3
    last = work / CHECKPOINTS / "checkpoint-4"
    assert last.is_dir()
    changed = load_recipe(file, COSMETIC)
    assert states(changed, work)["fuse mistral"] == ("partial", "begun, not finished")
    resumed: list[int] = []
    begun = _Watch.on_train_begin

    def watch(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begun(self, args, state, control, **kwargs)
        resumed.append(state.global_step)

    monkeypatch.setattr(_Watch, "on_train_begin", watch)
    heard.clear()
    run(changed, work)
    assert resumed == [4]
    assert {path: path.stat().st_ino for path in (work / SHARDS).glob("shard-*.arrow")} == kept
    assert weights(work) == weights(single / "work")
    assert [line for line in heard if "doing it again" in line or "continued from" in line] == []
    losses = [json.loads(line)["step"] for line in (work / "fuse/mistral/losses.jsonl").read_text().splitlines()]
    assert losses == [1, 2, 3, 4, 6], "what was logged before the stop; then every third step, and where is saved"


def test_a_change_that_counts_begins_anew_and_says_what_goes(
    single: Path, work: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    file = single / "recipe.yaml"
    stopped_training(load_recipe(file), work, monkeypatch)
    changes = ["fuse.training.learning_rate=0.02"]
    changed = load_recipe(file, changes)
    why = "begun, not finished; since then settings.training.learning_rate changed"
    assert states(changed, work)["fuse mistral"] == ("absent", why)
    heard.clear()
    run(changed, work, until="fuse")
    [line] = [line for line in heard if "doing it again" in line]
    assert line.startswith(f"fuse mistral cannot be continued ({why}): doing it again; removed: checkpoints (")
    assert line.endswith(" s)")
    made = weights(work)
    run(load_recipe(file, changes), runs.cut(work, "align"), until="fuse")
    assert weights(work) == made
    assert weights(work) != {name: sha for name, sha in weights(single / "work").items() if name.startswith("fuse/")}


def test_a_capture_goes_on_with_batches_of_another_size(
    single: Path, work: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    file = single / "recipe.yaml"
    runs.cut(work, "prepare")
    real, sizes = Local.capture, []

    def capture(self: Any, conversations: Any, advance: Any) -> Any:
        sizes.append(self.batch_tokens)
        if len(sizes) == 2:
            raise StopError
        return real(self, conversations, advance)

    monkeypatch.setattr(Local, "capture", capture)
    with pytest.raises(StopError):
        run(load_recipe(file), work, until="capture")
    [first] = (work / "capture").rglob("shard-*.arrow")
    before = first.stat().st_ino
    run(
        load_recipe(file, ["capture.batch_tokens=200", "sources.mistral.capture.batch_tokens=100"]), work, until="align"
    )
    assert sizes == [300, 300, 100, 100, 200, 200, 200], "three shards of each model, one of them kept"
    assert first.stat().st_ino == before
    run(load_recipe(file), work, until="align")
    assert len(sizes) == 7, "nothing is captured again"
    assert not [line for line in heard if "doing it again" in line]


def test_a_finished_run_of_an_older_version_stays_finished(
    single: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifests have fingerprints of all settings, and of such fingerprints."""
    recipe = load_recipe(single / "recipe.yaml")
    with monkeypatch.context() as older:
        older.setattr(Step, "_counting", property(lambda self: self.inputs))
        for step in build_steps(recipe, work):
            manifest = read_json(step.directory / MANIFEST)
            write_checked(
                step.directory / MANIFEST, {**manifest, "fingerprint": step.fingerprint, "inputs": step.inputs}
            )
    was = read_json(work / SHARDS / MANIFEST)["fingerprint"]
    assert was != read_json(single / "work" / SHARDS / MANIFEST)["fingerprint"]
    assert set(states(recipe, work).values()) == {("done", "")}
    assert run(recipe, work) == 0
    found = states(load_recipe(single / "recipe.yaml", COSMETIC), work)
    assert {label for label, state in found.items() if state[0] != "done"} == {"report"}, "which shows the recipe"
    found = states(load_recipe(single / "recipe.yaml", ["capture.top_k=5"]), work)
    assert found["capture mistral/data"] == ("stale", "settings.top_k changed")
    assert found["align mistral"][1] == "upstream.capture changed"
    assert found["prepare mistral/data"] == ("done", "")


def test_a_merge_that_was_killed_does_not_mix_targets(
    single: Path, work: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    """A target that was trained again meanwhile came out with other bits, by one fingerprint."""
    recipe = load_recipe(single / "recipe.yaml")
    shutil.rmtree(work / "merge")
    monkeypatch.setattr(command, "open_job", partial(command.open_job, shard_bytes=12_000))
    real, written = engine._write_shard, []

    def write(job: Any, path: Path, *rest: Any) -> Any:
        written.append(path.name)
        if len(written) == 4:
            raise StopError
        return real(job, path, *rest)

    monkeypatch.setattr(engine, "_write_shard", write)
    with pytest.raises(StopError):
        run(recipe, work, until="merge")
    target = work / "fuse" / "mistral" / "model" / "model.safetensors"
    save_file({name: tensor * 1.001 for name, tensor in load_file(target).items()}, target, {"format": "pt"})
    manifest = read_json(work / "fuse" / "mistral" / MANIFEST)
    manifest["outputs"]["model/model.safetensors"]["sha256"] = digest(target)
    write_checked(work / "fuse" / "mistral" / MANIFEST, manifest)
    why = "begun, not finished; since then fuse mistral was made again and came out different"
    assert states(recipe, work)["merge"] == ("absent", why)
    heard.clear()
    run(recipe, work, until="merge")
    assert any(line.startswith(f"merge cannot be continued ({why}): doing it again; removed: model.") for line in heard)
    after = weights(work / "merge")
    assert len(after) > 4
    shutil.rmtree(work / "merge")
    run(recipe, work, until="merge")
    assert weights(work / "merge") == after, "as of one that nothing interrupted"


def test_training_arguments_that_count() -> None:
    """What decides where training ends with its best checkpoint counts only there."""
    plain = {"learning_rate": 1e-5, "save_steps": 10, "logging_steps": 5, "eval_steps": 10, "bf16": True}
    assert counted(plain) == {"learning_rate": 1e-5, "bf16": True}
    best = plain | {"load_best_model_at_end": True}
    assert counted(best) == {key: value for key, value in best.items() if key != "logging_steps"}
    plateau = plain | {"lr_scheduler_type": "reduce_lr_on_plateau"}
    assert counted(plateau).keys() == plateau.keys() - {"logging_steps"}
    assert counted(plain | {"lr_scheduler_type": "greedy"}).keys() == plateau.keys() - {"logging_steps"}
    # Transformers measures as often as it logs, where nothing else is said.
    often, seldom = ({"load_best_model_at_end": True, "eval_strategy": "steps", "logging_steps": n} for n in (10, 50))
    assert counted(often) != counted(seldom)
    assert counted(often | {"eval_steps": 5}) == counted(seldom | {"eval_steps": 5})
