"""Fine-tuning that was stopped at any step continues to the same weights and the same log, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fusechat.data.prepared import PreparedSet
from fusechat.fuse.dataset import FusionData
from fusechat.fuse.lora import with_adapters
from fusechat.fuse.trainer import COMPLETE, last_checkpoint
from fusechat.fuse.training import train
from fusechat.fuse.validation import Validation
from training import StopError, fusion_data, silent, stop_at, trainer_of, weighted

STEPS = 7
PLAIN = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3}
SAVED = PLAIN | {"save_strategy": "steps", "save_steps": 2}
BEST = SAVED | {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "bits_per_byte",
    "save_total_limit": 1,
    "learning_rate": 0.3,  # too much, and more at the end: the last step is not the best
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 7,
}


@pytest.fixture
def work(finished: Path) -> Path:
    return finished / "work"


def student(directory: Path, lora: dict[str, Any] | None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return with_adapters(model, lora, seed=3) if lora else model


WEIGHTED = SAVED | {
    "weight": 1.5
}  # fifteen conversations, four steps an epoch: the last checkpoint is in the middle of the second
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("settings", "lora", "rule"),
    [
        (SAVED, None, {}),
        (SAVED, None, {"against": "student", "level": "response"}),
        (WEIGHTED, None, {}),
        (SAVED | {"train_sampling_strategy": "group_by_length"}, None, {}),
        (WEIGHTED | {"train_sampling_strategy": "group_by_length"}, None, {}),
        (SAVED | {"train_sampling_strategy": "batch_rebalance"}, None, {}),
        (SAVED, LORA, {}),  # dropout: the state of chance is a part of a checkpoint
        (BEST, None, {}),
        (BEST, LORA, {}),
    ],
    ids=["plain", "student", "weighted", "lengths", "lengths-weighted", "rebalanced", "lora", "best", "lora-best"],
)
def test_stopped_at_every_step(
    models: dict[str, Path],
    work: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    lora: dict[str, Any] | None,
    rule: dict[str, str],
) -> None:
    every = settings is SAVED and not lora and not rule
    stops = (
        range(1, STEPS + 1)
        if every
        else (1, 3, 6)
        if settings is BEST
        else (3, STEPS)
        if settings is WEIGHTED
        else (3, 6)
    )
    settings = dict(settings)
    data = weighted(fusion_data(work, "mistral", **rule), settings.pop("weight", 1.0))
    held_out = {"data": Validation(PreparedSet(work / "prepare" / "pivot" / "data-held-out"))}
    if "eval_strategy" not in settings:
        held_out = {}

    def begin(place: str) -> Any:
        return trainer_of(student(models["llama"], lora), data, tmp_path / place, held_out=held_out, **settings)

    whole = begin("whole")
    log = train(whole, silent)
    expected = whole.model.state_dict()
    if "eval_strategy" in settings:
        assert whole.state.best_global_step < 6, "the best is not the last"
    for step in stops:
        stopped = begin(f"{step}")
        stop_at(stopped, step)
        with pytest.raises(StopError):
            train(stopped, silent)
        saved = last_checkpoint(tmp_path / f"{step}")
        assert saved == (tmp_path / f"{step}" / f"checkpoint-{(step - 1) // 2 * 2}" if step > 2 else None)
        again = begin(f"{step}")
        assert train(again, silent) == log, step
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), (step, name)


def test_an_older_checkpoint_goes_only_when_the_new_one_is_complete(
    models: dict[str, Path], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while a checkpoint is being marked, with a limit of one: the one before is still there."""
    from fusechat.fuse import trainer as module

    data: FusionData = fusion_data(work, "mistral")
    settings = SAVED | {"save_total_limit": 1}
    real = module.write_sealed

    def fail_at_four(path: Path, value: Any) -> None:
        if path.parent.name == "checkpoint-4":
            raise StopError
        real(path, value)

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_sealed", fail_at_four)
        with pytest.raises(StopError):
            train(trainer_of(student(models["llama"], None), data, tmp_path, **settings), silent)
    assert (tmp_path / "checkpoint-2" / COMPLETE).is_file()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    train(trainer_of(student(models["llama"], None), data, tmp_path, **settings), silent)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("named", ["relative", "absolute"])
def test_resumed_from_another_directory_or_after_a_move(
    models: dict[str, Path], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Where the best checkpoint lies is written as a path: it is found next to the others, wherever these are and whoever looks."""
    data = fusion_data(work, "mistral")
    held_out = {"data": Validation(PreparedSet(work / "prepare" / "pivot" / "data-held-out"))}

    def begin(place: Path) -> Any:
        return trainer_of(student(models["llama"], None), data, place, held_out=held_out, **BEST | {"max_steps": 9})

    monkeypatch.chdir(tmp_path)
    whole = begin(Path("whole"))
    log = train(whole, silent)
    place = Path("work") if named == "relative" else tmp_path / "work"
    stopped = begin(place)
    stop_at(stopped, 8)
    with pytest.raises(StopError):
        train(stopped, silent)
    kept = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert len(kept) == 2, "the best and the last"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = Path("..") / "work"
    if named == "absolute":
        there = (tmp_path / "work").rename(tmp_path / "elsewhere" / "moved")
    assert last_checkpoint(there) == there / "checkpoint-6"
    assert sorted(path.name for path in there.iterdir()) == kept, "nothing is deleted"
    again = begin(there)
    assert train(again, silent) == log
    assert again.state.best_model_checkpoint == str(there / f"checkpoint-{again.state.best_global_step}")
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
