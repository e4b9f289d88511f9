"""Fine-tuning of tiny models without the pipeline around it: what a test changes, it passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.fuse.dataset import FusionData, Teacher, TeachingSet
from fusechat.fuse.teacher_selection import SelectionRule
from fusechat.fuse.trainer import FusionTrainer
from fusechat.fuse.training import make_trainer, train, training_arguments
from fusechat.fuse.validation import Validation

SETTINGS: dict[str, Any] = {"kind": "cross_entropy", "tail": "renormalise", "temperature": 1.0}


def fusion_data(work: Path, *sources: str, **rule: str) -> FusionData:
    """The recipe's own conversations, taught by sources of a work directory of `runs.write_recipe` that is aligned."""

    def teacher(name: str) -> Teacher:
        stores = (open_distributions(work / place) for place in (f"capture/{name}/data", f"align/{name}"))
        return Teacher(PreparedSet(work / "prepare" / name / "data"), *stores)

    pivot = PreparedSet(work / "prepare" / "pivot" / "data")
    captured = open_distributions(work / "capture" / "pivot" / "data")
    own = captured if SelectionRule(**rule).compares_with_pivot else None
    return FusionData(
        [TeachingSet("data", pivot, own, {name: teacher(name) for name in sources})], SelectionRule(**rule)
    )


def weighted(data: FusionData, weight: float) -> FusionData:
    """The same conversations, seen another number of times in an epoch."""
    return FusionData([replace(one, weight=weight) for one in data.sets], data.rule)


def silent(amount: int = 1, note: str = "") -> None:
    pass


def trainer_of(
    model: Any,
    data: FusionData,
    output: Path,
    *,
    sft_weight: tuple[float, float] = (0.5, 0.5),
    loss: dict[str, Any] | None = None,
    held_out: dict[str, Validation] | None = None,
    logs: Path | None = None,
    seed: int = 0,
    **training: Any,
) -> FusionTrainer:
    arguments = training_arguments(
        {"learning_rate": 1e-2, "max_steps": 3, "save_strategy": "no", **training},
        output=output,
        seed=seed,
        device="cpu",
        name="test",
    )
    return make_trainer(
        model,
        data,
        arguments,
        sft_weight=sft_weight,
        loss_settings=SETTINGS | (loss or {}),
        pad=0,
        advance=silent,
        held_out=held_out,
        logs=logs,
    )


def fine_tune(directory: Path, data: FusionData, output: Path, **changes: Any) -> tuple[list[dict[str, float]], Any]:
    """The log and the model, of a model directory fine-tuned for three steps (or what `changes` says)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    trainer = trainer_of(model, data, output, **changes)
    return train(trainer, silent, logs=changes.get("logs")), model


class StopError(BaseException):
    """As a signal ends a training."""


def stop_at(trainer: FusionTrainer, step: int) -> None:
    """Lets a training end as by a signal once so many steps are done, before it saves."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise StopError

    trainer.add_callback(Stop())
