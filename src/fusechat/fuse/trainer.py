"""Fine-tuning against fused distributions: Transformers' Trainer with FuseChat's loss, exact resume and a progress bar."""

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from fusechat.core.files import atomic_file
from fusechat.core.forward import Batch, response_logits
from fusechat.core.progress import Advance
from fusechat.errors import RecipeError, TrainingError
from fusechat.fuse.dataset import FusionData, collate_fusion
from fusechat.fuse.loss import fusion_loss_parts

_COMPLETE = "COMPLETE"  # in a checkpoint directory: everything is written


class FusionTrainer(Trainer):
    """A Trainer whose batches come from `collate_fusion`. `loss_settings` are the keyword arguments of `fusion_loss`."""

    def __init__(self, *args: Any, loss_settings: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_settings = loss_settings
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the global batch …
        self.loss_is_scaled_for_ga = True  # … and not again by the accumulation steps
        self._loss_shifts_labels = False  # labels are those of the rows, no position is dropped
        self._sums = {"sft_loss": 0.0, "fusion_loss": 0.0}
        self._logged_at = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = Batch(inputs["input_ids"], inputs["attention_mask"], inputs["rows"])
        logits = response_logits(model, batch)
        parts = fusion_loss_parts(
            logits,
            inputs["labels"],
            inputs["target_ids"],
            inputs["target_logprobs"],
            num_items=num_items_in_batch,
            **self.loss_settings,
        )
        if not math.isfinite(parts.total.item()):
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step + 1}, conversations "
                f"{', '.join(inputs['conversation_ids'])}; the last checkpoint is kept"
            )
        if model.training:
            self._sums["sft_loss"] += parts.sft.item()
            self._sums["fusion_loss"] += parts.fusion.item()
        total = parts.total
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            total = total * self.accelerator.num_processes  # what averages the gradients divides by it
        return (total, {"logits": logits}) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the two terms of the loss, each the mean over the steps since the last log."""
        steps = self.state.global_step - self._logged_at
        if "loss" in logs and steps > 0:
            logs.update({name: value / steps for name, value in self._sums.items()})
            self._sums = dict.fromkeys(self._sums, 0.0)
            self._logged_at = self.state.global_step
        super().log(logs, start_time)


class _Watch(TrainerCallback):
    """Draws progress, logs before every save (so that a resumed log goes on exactly), marks complete checkpoints."""

    def __init__(self, advance: Advance, directory: Path) -> None:
        self.advance, self.directory = advance, directory

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.advance(0, f"loss {logs['loss']:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with atomic_file(self.directory / f"checkpoint-{state.global_step}" / _COMPLETE) as marker:
                marker.touch()


def training_arguments(training: dict[str, Any], *, output: Path, seed: int, device: str) -> TrainingArguments:
    """TrainingArguments from the recipe's `fuse.training`. Raises RecipeError for a value that Transformers refuses."""
    defaults = {"report_to": "none", "logging_steps": 1, "dataloader_pin_memory": False}
    given = defaults | training
    try:
        return TrainingArguments(
            output_dir=str(output),
            seed=seed,
            data_seed=seed,
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=torch.device(device).type == "cpu",
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"fuse.training: {str(error).splitlines()[0]}") from error


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint; clears away those that a killed run left incomplete."""
    complete = {}
    for checkpoint in directory.glob("checkpoint-*"):
        if (checkpoint / _COMPLETE).is_file():
            complete[int(checkpoint.name.rpartition("-")[2])] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return complete[max(complete)] if complete else None


def train(
    model: Any,
    data: FusionData,
    arguments: TrainingArguments,
    *,
    loss_settings: dict[str, Any],
    pad: int,
    advance: Advance,
) -> list[dict[str, float]]:
    """Fine-tunes `model` in place, resuming from the last complete checkpoint; returns the log, an entry each logged step."""
    directory = Path(arguments.output_dir)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would split rows and labels as if they were batches
    trainer = FusionTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=functools.partial(collate_fusion, pad=pad),
        loss_settings=loss_settings,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.add_callback(_Watch(advance, directory))
    checkpoint = last_checkpoint(directory)
    if checkpoint is not None:
        step = int(checkpoint.name.rpartition("-")[2])
        trainer._logged_at = step
        advance(step)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def total_steps(arguments: TrainingArguments, conversations: int) -> int:
    """Optimiser steps of the whole training, for the progress bar."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = math.ceil(conversations / (arguments.train_batch_size * max(1, arguments.world_size)))
    return math.ceil(math.ceil(batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)
