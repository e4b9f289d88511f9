"""The trainer: what is divided by what, and what stops it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fusechat.errors import TrainingError
from fusechat.fuse.dataset import FusionData, collate_fusion
from fusechat.fuse.trainer import COMPLETE, Checkpoints, last_checkpoint, mark_complete
from training import fine_tune, fusion_data


@pytest.fixture(scope="module")
def data(finished: Path) -> FusionData:
    return fusion_data(finished / "work", "mistral")


def test_accumulation_changes_nothing_but_rounding(models: dict[str, Path], data: FusionData, tmp_path: Path) -> None:
    """Conversations differ in length, so a mean of means would differ from the mean over all tokens."""
    whole, a = fine_tune(models["llama"], data, tmp_path / "a", per_device_train_batch_size=4)
    parts, b = fine_tune(
        models["llama"], data, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert len(whole) == len(parts) == 3
    for left, right in zip(whole, parts, strict=True):
        for name in ("loss", "sft_loss", "fusion_loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-3), name
        assert left["loss"] == pytest.approx(0.5 * left["sft_loss"] + 0.5 * left["fusion_loss"], rel=1e-4)
    assert torch.allclose(a.lm_head.weight, b.lm_head.weight, atol=2e-3)


def test_the_weight_of_the_gold_tokens_moves_evenly_from_the_first_step_to_the_last(
    models: dict[str, Path], data: FusionData, tmp_path: Path
) -> None:
    log, _ = fine_tune(models["llama"], data, tmp_path / "a", sft_weight=(0.2, 1.0), max_steps=5)
    for entry, weight in zip(log, (0.2, 0.4, 0.6, 0.8, 1.0), strict=True):
        sft, fusion = entry["sft_loss"], entry["fusion_loss"]
        assert entry["loss"] == pytest.approx(weight * sft + (1 - weight) * fusion, rel=1e-4)
    assert log[-1]["fusion_loss"] == 0.0
    assert log[0]["fusion_loss"] > 0


def test_the_first_loss_is_the_mean_over_all_response_tokens(
    models: dict[str, Path], data: FusionData, loaded: dict[str, Any], tmp_path: Path
) -> None:
    """Against a naive loop over tokens with an unpadded forward pass of each conversation, in float64."""
    log, _ = fine_tune(models["llama"], data, tmp_path, per_device_train_batch_size=len(data), max_steps=1)
    sft, fusion, tokens = 0.0, 0.0, 0
    for index in range(len(data)):
        conversation, targets = data[index]["conversation"], data[index]["targets"]
        with torch.inference_mode():
            logits = loaded["llama"](torch.tensor(conversation.input_ids[None].astype("int64"))).logits[0].double()
        logprobs = logits.log_softmax(-1)
        for row, position in enumerate(conversation.position.tolist()):
            sft -= float(logprobs[position - 1, conversation.input_ids[position]])
            kept = [(t, math.exp(p)) for t, p in zip(targets.ids[row], targets.logprobs[row], strict=True) if t >= 0]
            mass = sum(p for _, p in kept)
            fusion -= sum(p / mass * float(logprobs[position - 1, t]) for t, p in kept)
            tokens += 1
    assert log[0]["sft_loss"] == pytest.approx(sft / tokens, rel=1e-4)
    assert log[0]["fusion_loss"] == pytest.approx(fusion / tokens, rel=1e-3)


def test_a_loss_that_is_not_finite_names_the_conversations(
    models: dict[str, Path], data: FusionData, tmp_path: Path
) -> None:
    """The checkpoint of the step before stays, and is whole."""
    with pytest.raises(TrainingError, match=r"not finite at step (\d+), conversations [0-9a-f]{20}") as caught:
        fine_tune(
            models["llama"],
            data,
            tmp_path,
            learning_rate=1e38,
            max_grad_norm=0.0,
            max_steps=5,
            save_strategy="steps",
            save_steps=1,
        )
    named = str(caught.value).split("conversations ")[1].split(";")[0].split(", ")
    assert set(named) <= {data[index]["conversation"].id for index in range(len(data))}
    step = int(str(caught.value).split("step ")[1].split(",")[0])
    assert len(named) == (8 if step % 2 else len(data) - 8)
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step - 1}"


def test_training_that_ends_before_its_last_step_is_not_taken_for_finished(
    models: dict[str, Path], data: FusionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of Transformers asks for it, as its checkpoints at SIGTERM do."""

    def stop(self: Checkpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2

    monkeypatch.setattr(Checkpoints, "on_step_end", stop)
    with pytest.raises(TrainingError, match=r"^training ended after step 2 of 5; the model is not written"):
        fine_tune(models["llama"], data, tmp_path, max_steps=5, save_strategy="steps", save_steps=1)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_only_complete_checkpoints_are_resumed_from(tmp_path: Path) -> None:
    for step, complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        if complete:
            mark_complete(tmp_path / f"checkpoint-{step}", {})
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10", "by number, not by name"
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_checkpoint(tmp_path / "none") is None


def checkpoints(directory: Path, best: dict[int, int]) -> list[Path]:
    """Complete ones by their steps, each with the step of the best so far."""
    made = [directory / f"checkpoint-{step}" for step in best]
    for path, at in zip(made, best.values(), strict=True):
        (path / "shards").mkdir(parents=True)
        (path / "shards" / "optimizer.bin").write_bytes(bytes(range(100)))
        state = {"best_model_checkpoint": str(directory / f"checkpoint-{at}") if at else None}
        (path / "trainer_state.json").write_text(json.dumps(state))
        mark_complete(path, {"processes": 1})
    return made


@pytest.mark.parametrize("name", ["shards/optimizer.bin", "trainer_state.json", COMPLETE])
@pytest.mark.parametrize("how", ["flipped", "cut", "zeros", "removed"])
def test_training_does_not_go_on_from_a_checkpoint_that_was_altered(
    tmp_path: Path, heard: list[str], name: str, how: str
) -> None:
    first, second = checkpoints(tmp_path, {2: 0, 4: 0})
    data = (second / name).read_bytes()
    if how == "removed":
        (second / name).unlink()
    else:
        flipped = data[:9] + bytes([data[9] ^ 4]) + data[10:]
        (second / name).write_bytes({"flipped": flipped, "cut": data[:-2], "zeros": bytes(len(data))}[how])
    assert last_checkpoint(tmp_path) == first
    assert not second.exists()
    if (name, how) != (COMPLETE, "removed"):  # as if it had never been complete
        [said] = heard
        assert said.startswith(f"{second}: {name} is ")


def test_training_does_not_go_on_from_a_checkpoint_whose_best_one_was_altered(tmp_path: Path) -> None:
    """It could not end with the best weights."""
    first, second, third, fourth = checkpoints(tmp_path, {2: 2, 4: 4, 6: 4, 10: 2})
    assert last_checkpoint(tmp_path) == fourth
    (second / "shards" / "optimizer.bin").write_bytes(bytes(100))
    assert last_checkpoint(tmp_path) == fourth, "its best one is another"
    assert [path.exists() for path in (first, second, third, fourth)] == [True, False, False, True]
    shutil.rmtree(first)
    assert last_checkpoint(tmp_path) is None


def test_a_batch_keeps_rows_and_targets_together(data: FusionData) -> None:
    items = [data[index] for index in (0, 3, 1)]
    batch = collate_fusion(items, pad=0)
    begin = 0
    for place, item in enumerate(items):
        n = len(item["conversation"])
        assert (batch["rows"][begin : begin + n, 0] == place).all()
        assert batch["labels"][begin : begin + n].tolist() == item["conversation"].gold.tolist()
        k = item["targets"].ids.shape[1]
        assert batch["target_ids"][begin : begin + n, :k].tolist() == item["targets"].ids.tolist()
        begin += n
    assert begin == len(batch["labels"])
