"""A part of a training on answers that the student sampled: each taught by one source, at the rows that are kept, and by nothing
else: λ is 0, and what the source leaves out is one more outcome."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.fuse.dataset import FusionData, Teacher, TeachingSet
from fusechat.fuse.fine_tune import fine_tune
from fusechat.fuse.part import CHECKPOINTS, LOSSES, MODEL, Part
from fusechat.fuse.teacher_selection import SelectionRule
from fusechat.fuse.trainer import without_place
from fusechat.fuse.training import total_steps, training_arguments
from fusechat.models.chat_model import ChatModel
from fusechat.models.load import choose_device
from fusechat.recipe.schema import Recipe
from fusechat.run import ranks
from fusechat.run.integrity import matches_record
from fusechat.run.steps import SEALED


@dataclass(frozen=True)
class Taught:
    """What a source has of the answers that it teaches: directories of the kept rows with their targets, and of its own rows and
    distributions."""

    kept: Path
    prepared: Path
    captured: Path


def train_part(
    directory: Path,
    recipe: Recipe,
    base: ChatModel,
    taught: Mapping[str, Taught],
    *,
    name: str,
    training: Mapping[str, Any],
    loss: str,
    place: tuple[int, int, Path | None],
    answers: int,
    own_prompt: bool,
    logs: Path,
) -> dict[str, Any]:
    """Trains from the checkpoint that the part before ended with; writes `model/`, `losses.jsonl` and, but for the last part, the
    checkpoint that the next one begins with. `place`: number of the part, of how many, and the directory of the part before;
    `answers`: how many were asked for, which decides the steps, however many can be learnt. Returns counts."""
    number, parts, before = place
    device = str(choose_device(recipe.device))
    arguments = training_arguments(training, output=directory / CHECKPOINTS, seed=recipe.seed, device=device)
    steps = math.ceil(total_steps(arguments, answers) / parts)
    part = Part(number, parts, steps)
    if before is not None:
        part = Part(number, parts, steps, before / f"checkpoint-{part.span[0]}")
    a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    data = _data(taught, steps * a_step)
    if not ranks.from_first(lambda: _is_trained(directory, part)):
        run_name = f"{recipe.name}-{name.replace('/', '-').replace(' ', '-')}"
        how: dict[str, Any] = {"name": name, "run_name": run_name, "training": training, "own_prompt": own_prompt}
        loss_settings = {"kind": loss, "tail": "bucket", "temperature": 1.0}
        fine_tune(
            directory,
            recipe,
            base,
            data,
            sft_weight=(0.0, 0.0),
            loss_settings=loss_settings,
            logs=logs,
            part=part,
            **how,
        )
    ranks.from_first(lambda: _keep_last(directory, part))
    entries = [json.loads(line) for line in (directory / LOSSES).read_text().splitlines()]
    found = {"conversations": len(data), "steps": steps, "loss": entries[-1]["fusion_loss"] if entries else None}
    return {**found, **({"own_prompt": True} if own_prompt else {})}


def _data(taught: Mapping[str, Taught], an_epoch: int) -> FusionData:
    """The kept conversations as one set, of which an epoch has so many, whatever their number."""
    pivot = PreparedSet(*(one.kept for one in taught.values()))
    first = ranks.is_first()
    teachers = {
        name: Teacher(
            PreparedSet(one.prepared),
            open_distributions(one.captured, verify=first),
            open_distributions(one.kept, verify=first),
        )
        for name, one in taught.items()
    }
    return FusionData(
        [TeachingSet("answers", pivot, None, teachers, an_epoch / len(pivot))], SelectionRule(function="source")
    )


def _is_trained(directory: Path, part: Part) -> bool:
    """Whether a killed run had written all of it."""
    if not matches_record(directory / SEALED, directory / MODEL, directory / LOSSES):
        return False
    name = part.checkpoint
    return name is None or any((place / name).is_dir() for place in (directory, directory / CHECKPOINTS))


def _keep_last(directory: Path, part: Part) -> None:
    """The checkpoint that the next part begins with, of all that there are."""
    name = part.checkpoint
    if name is not None and not (directory / name).is_dir():
        last = directory / CHECKPOINTS / name
        without_place(last)
        last.rename(directory / name)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
