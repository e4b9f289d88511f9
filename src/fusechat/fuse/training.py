"""One fine-tuning from beginning to end: arguments, resume, logging."""

import functools
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from fusechat.errors import RecipeError, TrainingError, first_line
from fusechat.fuse.dataset import FusionData, collate_fusion
from fusechat.fuse.epochs import left_out, steps_per_epoch
from fusechat.fuse.part import Part
from fusechat.fuse.trainer import Checkpoints, FusionTrainer, best_of, last_checkpoint
from fusechat.fuse.validation import Validation
from fusechat.run import ranks
from fusechat.run.extras import is_installed, not_installed
from fusechat.run.progress import Advance, log

_PROJECT = "fusechat"  # the default project of Weights & Biases
_REPORTERS = ("tensorboard", "wandb")  # packages, and the extras that install them


class _Watch(TrainerCallback):
    """Draws progress; logs before every save, so that a resumed log continues exactly."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.best: Path | None = None  # of the checkpoint that training continues from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replaces the checkpoint's paths and its log, save and evaluation intervals by the current ones."""
        state.compute_steps(args, state.max_steps)
        if self.best is not None:
            state.best_model_checkpoint = str(self.best)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
        control.should_log |= control.should_save or control.should_evaluate  # after which the best may be saved

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.advance(0, f"loss {logs['loss']:.3f}")


class _Until(TrainerCallback):
    """Ends training after a step, with a checkpoint unless that is the last one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = control.should_log = True
            control.should_save |= state.global_step < state.max_steps


class PlacedArguments(TrainingArguments):
    """TrainingArguments that train on the device of the recipe."""

    place: torch.device | None = None  # None leaves it to Transformers

    def put_on(self, place: torch.device) -> None:
        """Makes a single process train on `place`. Of several processes each has its own GPU. Transformers would take the first
        GPU, and DataParallel all of them, which would split rows and labels like batches."""
        if self.parallel_mode == ParallelMode.DISTRIBUTED or place.type == "cpu":
            return
        if place.type == "cuda":
            place = torch.device("cuda", place.index or 0)
            torch.cuda.set_device(place)
        self.place = place
        if self.distributed_state is not None:
            self.distributed_state.device = place  # Accelerate's

    @property
    def device(self) -> Any:
        return super().device if self.place is None else self.place

    @property
    def n_gpu(self) -> int:
        return super().n_gpu if self.place is None else 1


def training_arguments(
    training: Mapping[str, Any], *, output: Path, seed: int, device: str, name: str = "", key: str = "fuse.training"
) -> TrainingArguments:
    """TrainingArguments from the recipe's `key`. Raises RecipeError for a value that Transformers refuses."""
    given: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "run_name": name or None,
    }
    given |= training
    if str(given.get("metric_for_best_model")).endswith("bits_per_byte"):
        given.setdefault("greater_is_better", False)
    try:
        found = PlacedArguments(
            output_dir=str(output),
            seed=seed,
            data_seed=seed,
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=torch.device(device).type == "cpu",
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{key}: {first_line(error)}") from error
    found.put_on(torch.device(device))
    return found


def is_sharded_alone(arguments: TrainingArguments) -> bool:
    """Whether FSDP is set for a single process, which the Trainer refuses."""
    inside = bool((arguments.fsdp_config or {}).get("xla"))  # which shards in one process
    return bool(arguments.fsdp) and not inside and arguments.parallel_mode != ParallelMode.DISTRIBUTED


def check_reporting(arguments: TrainingArguments) -> None:
    """Raises RecipeError, with a line for each package of `report_to` that is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    key, problems = "fuse.training.report_to", []
    for name in arguments.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError) as error:
            ours = name in _REPORTERS and not is_installed(name)
            problems.append(not_installed(f"{key}: {name}", name) if ours else f"{key}: {first_line(error)}")
    if problems:
        raise RecipeError(*problems)


def check_packages(arguments: TrainingArguments) -> None:
    """Raises RecipeError if the optimiser, or the kernels, need a package that is not installed."""
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise RecipeError("fuse.training.use_liger_kernel: it is not installed (pip install liger-kernel)")
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        ours = "bitsandbytes" in str(error)
        what = f"fuse.training.optim: {arguments.optim.value}"
        line = not_installed(f"{what}: bitsandbytes", "bitsandbytes") if ours else f"{what}: {first_line(error)}"
        raise RecipeError(line) from error
    except ValueError:  # of arguments that need the model, which there is not yet
        pass


def make_trainer(
    model: Any,
    data: FusionData,
    arguments: TrainingArguments,
    *,
    sft_weight: tuple[float, float],
    loss_settings: dict[str, Any],
    pad: int,
    advance: Advance,
    held_out: Mapping[str, Validation] | None = None,
    logs: Path | None = None,
) -> FusionTrainer:
    """A trainer of `model` on `data`. `logs`: the directory of TensorBoard and W&B, if the arguments report to them."""
    lost = left_out(arguments, data.examples_per_epoch)
    if lost == data.examples_per_epoch:
        raise TrainingError(
            f"fuse.training.dataloader_drop_last: the {lost} conversations of an epoch make no whole batch, so that nothing would "
            "be learnt: leave it out, or set a smaller per_device_train_batch_size"
        )
    if lost and ranks.is_first():
        log.warning(
            "fuse: dataloader_drop_last leaves %d of %d conversations out of every epoch", lost, data.examples_per_epoch
        )
    limit, arguments.save_total_limit = arguments.save_total_limit, None  # see `Checkpoints`
    with _logging_to(logs):
        trainer = FusionTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=functools.partial(collate_fusion, pad=pad),
            sft_weight=sft_weight,
            loss_settings=loss_settings,
            held_out=held_out,
        )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.add_callback(_Watch(advance))
    trainer.add_callback(Checkpoints(limit))
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        log.warning("fuse: FSDP is unavailable on this device: every process holds the whole model")
    return trainer


def train(
    trainer: FusionTrainer, advance: Advance, *, logs: Path | None = None, part: Part | None = None
) -> list[dict[str, float]]:
    """Fine-tunes in place and resumes from the last complete checkpoint. Returns one log entry for each logged step and
    evaluation. `logs`: as for `make_trainer`. With a `part`, only its steps are done. Raises TrainingError if the Trainer ends
    before its last step."""
    first, last = (0, None) if part is None else part.span
    checkpoint = ranks.from_first(lambda: last_checkpoint(Path(trainer.args.output_dir)))
    if part is not None:
        checkpoint = checkpoint or part.begin
        trainer.add_callback(_Until(part.span[1]))
    if checkpoint is not None:
        ranks.from_first(lambda: trainer.check_resume(checkpoint))
        step = int(checkpoint.name.rpartition("-")[2])
        trainer.state.global_step = step
        trainer.forget()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, _Watch):
                callback.best = best_of(checkpoint)
        advance(step - first)
    with _logging_to(logs):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        if "wandb" in trainer.args.report_to and ranks.is_first():
            import wandb

            wandb.finish()  # the next target is a run of its own …
            wandb.teardown()  # … in a directory of its own, which is asked for once
    done, last = trainer.state.global_step, last or trainer.state.max_steps
    if done < last:
        raise TrainingError(
            f"training ended after step {done} of {last}; the model is not written, and the last checkpoint is kept"
        )
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return [entry for entry in history if entry["step"] > first]


def trained_weights(trainer: FusionTrainer) -> dict[str, torch.Tensor] | None:
    """All weights of a model that FSDP sharded, on the first process; None without sharding."""
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


def total_steps(arguments: TrainingArguments, conversations: int) -> int:
    """Optimiser steps of the whole training, for this many conversations in an epoch."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    return math.ceil(steps_per_epoch(arguments, conversations) * arguments.num_train_epochs)


@contextmanager
def _logging_to(directory: Path | None) -> Iterator[None]:
    """Sets the directory of the reporters' files, unless the user's environment does."""
    ours = {"WANDB_PROJECT": _PROJECT}
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        ours |= {"TENSORBOARD_LOGGING_DIR": str(directory), "WANDB_DIR": str(directory)}
    new = {key: value for key, value in ours.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key, None)
