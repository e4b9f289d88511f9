"""Transformers' Trainer with FuseChat's loss, batches and checkpoints."""

import json
import math
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from fusechat.errors import TrainingError
from fusechat.fuse.dataset import FusionData
from fusechat.fuse.epochs import steps_per_epoch
from fusechat.fuse.loss import fusion_loss_parts
from fusechat.fuse.sampler import FilledSampler, WeightedSampler
from fusechat.fuse.student import source_is_better
from fusechat.fuse.validation import Validation, bits_per_byte
from fusechat.models.forward import Batch, response_logits
from fusechat.models.library_internals import SamplerHooks
from fusechat.run import ranks
from fusechat.run.files import digest, flush
from fusechat.run.integrity import read_sealed, write_sealed
from fusechat.run.progress import log

COMPLETE = "COMPLETE"  # marks a checkpoint as whole: the number of processes, checksums of all files
STUDENT = "student"


class FusionTrainer(SamplerHooks, Trainer):
    """A Trainer whose batches come from `collate_fusion`. `sft_weight`: λ of the first and of the last step, linear in between.
    `loss_settings`: the other keyword arguments of `fusion_loss`. `held_out`: sets to evaluate, as often as the arguments say."""

    train_dataset: FusionData

    def __init__(
        self,
        *args: Any,
        sft_weight: tuple[float, float],
        loss_settings: dict[str, Any],
        held_out: Mapping[str, Validation] | None = None,
        **kwargs: Any,
    ) -> None:
        self.held_out = dict(held_out or {})
        super().__init__(*args, eval_dataset=self.held_out or None, **kwargs)
        self.sft_weight, self.loss_settings = sft_weight, loss_settings
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the global batch …
        self.loss_is_scaled_for_ga = True  # … and not again by the accumulation steps
        self.forget()

    def forget(self) -> None:
        """Resets the sums between two logs: both terms of the loss, and how often each candidate taught."""
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._taught = torch.zeros(len(self.train_dataset.sets), len(self.train_dataset.candidates))
        self._logged_at = self.state.global_step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and its logits if asked for. Raises TrainingError if the loss is not finite."""
        batch = Batch(inputs["input_ids"], inputs["attention_mask"], inputs["rows"])
        logits = response_logits(model, batch)
        comparison = inputs.get("comparison")
        parts = fusion_loss_parts(
            logits,
            inputs["labels"],
            inputs["target_ids"],
            inputs["target_logprobs"],
            target_tail=inputs["target_tail"],
            sft_weight=self._sft_weight(),
            num_items=num_items_in_batch,
            alone=inputs["alone"],
            gate=None if comparison is None else lambda nll: self._gate(nll, comparison),
            **self.loss_settings,
        )
        total, sft, fusion = torch.stack([parts.total, parts.sft, parts.fusion]).detach().double().tolist()
        self._stop_unless_finite(total, inputs["conversation_ids"])
        self._sums += torch.tensor([sft, fusion], dtype=torch.float64)
        loss = parts.total
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # averaging the gradients divides by it
        return (loss, {"logits": logits}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and the number of rows that divides the loss: of all processes, or of each its own. In the
        latter case the mean is over processes that have rows: at the end of an epoch one may have none."""
        batches, together = list(islice(epoch_iterator, num_batches)), self.args.average_tokens_across_devices
        if not batches:
            return batches, None
        rows = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device)
        if together and self.args.world_size > 1:
            rows = self.accelerator.gather(rows).sum()
        same_batch = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()  # devices that share a batch
        found = rows / same_batch
        if together or self.args.world_size == 1:
            return batches, found
        having = (self.accelerator.gather(found) > 0).sum()
        return batches, (found * having / self.args.world_size).clamp(min=torch.finfo(torch.float32).tiny)

    def _sft_weight(self) -> float:
        first, last = self.sft_weight
        steps = max(self.state.max_steps - 1, 1)
        return first if first == last else first + (last - first) * min(self.state.global_step / steps, 1.0)

    def _gate(self, nll: torch.Tensor, comparison: dict[str, torch.Tensor]) -> torch.Tensor:
        """bool [n]: rows where the source is better than the student. Counts who teaches (0 is the student)."""
        better = source_is_better(nll, comparison, level=self.train_dataset.rule.level)
        places = (comparison["set"], torch.where(better, comparison["chosen"], 0))
        ones = torch.ones_like(places[0], dtype=self._taught.dtype)
        self._taught.index_put_(tuple(place.cpu() for place in places), ones.cpu(), accumulate=True)
        return better[comparison["groups"]]

    def _stop_unless_finite(self, total: float, conversations: list[str]) -> None:
        """Raises TrainingError on every process if the loss of one is not finite."""
        finite = math.isfinite(total)
        if self.args.world_size > 1:
            wrong = torch.tensor(0.0 if finite else 1.0, device=self.args.device)
            dist.all_reduce(wrong)
            if wrong.item():
                conversations = [one for found in ranks.gather([] if finite else conversations) for one in found]
                finite = False
        if not finite:
            error = TrainingError(
                f"the loss is not finite at step {self.state.global_step + 1}, conversations "
                f"{', '.join(conversations)}; the last checkpoint is kept"
            )
            error.reported = not ranks.is_first()
            raise error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both terms of the loss, as means over the steps since the last log, and how often each candidate taught."""
        steps = self.state.global_step - self._logged_at
        if "loss" in logs and steps > 0:
            sums, taught = (sum(parts) for parts in zip(*ranks.gather((self._sums, self._taught)), strict=True))
            if not self.args.average_tokens_across_devices:  # each divided by its own tokens
                sums /= self.args.world_size
            terms = ("sft_loss", "fusion_loss") if min(self.sft_weight) < 1 else ("sft_loss",)
            logs.update(zip(terms, (sums / steps).tolist(), strict=False))
            if self.train_dataset.rule.compares_with_student:
                logs.update(self._taught_by(taught.tolist()))
            self.forget()
        super().log(logs, start_time)

    def _taught_by(self, taught: list[list[float]]) -> dict[str, float]:
        names = [STUDENT, *self.train_dataset.candidates[1:]]
        sets = self.train_dataset.sets
        return {
            f"taught/{one.name}/{name}": count
            for one, row in zip(sets, taught, strict=True)
            for name, count in zip(names, row, strict=True)
            if name == STUDENT or name in (one.teachers or {})
        }

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss (nats per response token) and bits per byte of all held-out sets, and of each if there are several."""
        metrics = bits_per_byte(self, self.held_out, metric_key_prefix)
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train_sampler(self, dataset: Any) -> Any:
        """The order of training. Weighted sets have other conversations in each epoch; several processes get equal numbers of
        batches of the same size, the last ones filled up with empty items."""
        seed = self.args.data_seed or 0
        sampler: Any
        if self.train_dataset.is_weighted:
            sampler = WeightedSampler(self.train_dataset, super().train_sampler, seed=seed, epoch=self._epoch)
        else:
            sampler = super().train_sampler(dataset)
        strategy, processes = self.args.train_sampling_strategy, self.args.world_size
        if strategy == "batch_rebalance":  # distributes batches itself
            sampler.set_epoch(self._epoch())
            return sampler
        if processes == 1 and strategy != "group_by_length":
            return sampler
        multiple, drop_last = self.args.train_batch_size * processes, self.args.dataloader_drop_last
        multiple = multiple if processes > 1 else 1
        return FilledSampler(sampler, multiple, seed=self.args.data_seed, epoch=self._epoch, drop_last=drop_last)

    def eval_sampler(self, dataset: Any) -> Any:
        """Each conversation of a set once. Empty items fill up the last batches."""
        sampler = super().eval_sampler(dataset) or SequentialSampler(dataset)
        whole = self.args.world_size > 1 or self.args.dataloader_drop_last
        multiple = self.args.eval_batch_size * self.args.world_size if whole else 1
        return FilledSampler(sampler, multiple, seed=self.args.data_seed, epoch=lambda: 0)

    def _epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.state.global_step // steps_per_epoch(self.args, self.train_dataset.examples_per_epoch)

    def check_resume(self, checkpoint: Path) -> None:
        """Raises TrainingError if the checkpoint's steps have another number of conversations."""
        written, now = read_sealed(checkpoint / COMPLETE) or {}, _shape(self.args)
        if written["conversations_a_step"] != now["conversations_a_step"]:
            raise TrainingError(
                f"{checkpoint}: was written by {written['processes']} processes, {written['conversations_a_step']} "
                f"conversations a step; {now['processes']} would make it {now['conversations_a_step']}: run with as many "
                f"as before, or delete {checkpoint.parent} to begin again"
            )


class Checkpoints(TrainerCallback):
    """Marks a checkpoint complete when all processes have written their part, and only then deletes older ones, down to `limit`.
    The Trainer itself deletes none, because its arguments have no limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ranks.gather(None)
        if args.should_save:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", _shape(args))
            rotate_checkpoints(
                output_dir=args.output_dir,
                save_total_limit=self.limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )


def _shape(arguments: Any) -> dict[str, int]:
    per_process = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return {"processes": arguments.world_size, "conversations_a_step": per_process * arguments.world_size}


def mark_complete(checkpoint: Path, shape: dict[str, int]) -> None:
    """Writes a checkpoint's last file, after all others are on the disk."""
    files = _files(checkpoint)
    for file in files.values():
        flush(file)
    write_sealed(checkpoint / COMPLETE, {**shape, "files": {name: digest(file) for name, file in files.items()}})


def without_place(checkpoint: Path) -> None:
    """Removes what a complete checkpoint says of where it was written, so that it is the same wherever that was."""
    complete = read_sealed(checkpoint / COMPLETE)
    if complete is not None and TRAINING_ARGS_NAME in complete["files"]:
        del complete["files"][TRAINING_ARGS_NAME]
        write_sealed(checkpoint / COMPLETE, complete)
    (checkpoint / TRAINING_ARGS_NAME).unlink(missing_ok=True)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint. Verifies checksums, and deletes checkpoints that are incomplete, altered, or without their
    best one, which training may end with."""
    sound: dict[int, Path] = {}
    for checkpoint in sorted(directory.glob("checkpoint-*"), key=_step):
        wrong = _wrong(checkpoint, list(sound.values()))
        if wrong is None:
            sound[_step(checkpoint)] = checkpoint
            continue
        if wrong:
            log.warning("%s: %s: training continues from the checkpoint before it", checkpoint, wrong)
        shutil.rmtree(checkpoint)
    return sound[max(sound)] if sound else None


def _wrong(checkpoint: Path, before: list[Path]) -> str | None:
    """What is wrong with a checkpoint, or None. Empty for one that was never complete."""
    if not (checkpoint / COMPLETE).is_file():
        return ""
    complete = read_sealed(checkpoint / COMPLETE)
    if complete is None:
        return f"{COMPLETE} is damaged"
    files, written = _files(checkpoint), complete["files"]
    for name in sorted(written.keys() | files.keys()):
        if name not in files:
            return f"{name} is missing"
        if written.get(name) != digest(files[name]):
            return f"{name} is not what was written (its checksum differs)"
    best = best_of(checkpoint)
    if best is not None and best not in (*before, checkpoint):
        return f"{best}, the best so far, is missing"
    return None


def best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint so far, according to this one. Only its name is used, since the run may have been moved."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    return None if best is None else checkpoint.with_name(Path(best).name)


def _files(checkpoint: Path) -> dict[str, Path]:
    found = {str(file.relative_to(checkpoint)): file for file in sorted(checkpoint.rglob("*")) if file.is_file()}
    return {name: file for name, file in found.items() if name != COMPLETE}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
