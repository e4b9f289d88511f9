"""A model fine-tuned and written to a directory, at once or a part of its steps after the other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.fuse.dataset import FusionData
from fusechat.fuse.part import CHECKPOINTS, LOSSES, MODEL, Part
from fusechat.fuse.validation import Validation
from fusechat.models.chat_files import write_chat_files
from fusechat.models.chat_model import ChatModel
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run import ranks
from fusechat.run.files import atomic_directory, write_text
from fusechat.run.integrity import record
from fusechat.run.progress import progress
from fusechat.run.steps import SEALED


def fine_tune(
    directory: Path,
    recipe: Recipe,
    base: ChatModel,
    data: FusionData,
    *,
    name: str,
    run_name: str,
    training: Mapping[str, Any],
    sft_weight: tuple[float, float],
    loss_settings: dict[str, Any],
    own_prompt: bool,
    held_out: Mapping[str, Validation] | None = None,
    logs: Path | None = None,
    part: Part | None = None,
) -> None:
    """Fine-tunes `base` in float32 and writes the model and the log of its losses; the first process records both in `SEALED`.
    `name`: how messages call it; `run_name`: how those that the arguments report to do. Of a `part` its own steps are
    done. Raises as `train` does."""
    import torch

    from fusechat.fuse.lora import with_adapters
    from fusechat.fuse.training import make_trainer, total_steps, train, trained_weights, training_arguments
    from fusechat.models.load import choose_device, padding

    device, lora = choose_device(recipe.device), recipe.fuse.lora
    if part is not None:
        training = {**training, "num_train_epochs": part.parts, "max_steps": -1}
    output = (directory / CHECKPOINTS).absolute()
    arguments = training_arguments(training, output=output, seed=recipe.seed, device=str(device), name=run_name)

    def student(where: Any) -> Any:
        model = base.model(dtype="float32", device=where)  # master weights
        return with_adapters(model, lora, seed=recipe.seed) if lora is not None else model

    steps = total_steps(arguments, data.examples_per_epoch) if part is None else part.steps
    reported = logs if arguments.report_to else None
    with progress(name, steps, "steps") as advance:
        trainer = make_trainer(
            student(torch.device("cpu") if arguments.fsdp else device),  # FSDP takes each process's share of it
            data,
            arguments,
            loss_settings=loss_settings,
            sft_weight=sft_weight,
            pad=padding(base.tokenizer(), base.vocabulary_size()),
            advance=advance,
            held_out=held_out,
            logs=reported,
        )
        history = train(trainer, advance, logs=reported, part=part)
    weights = trained_weights(trainer)
    if not ranks.is_first():
        return
    model = trainer.model
    if weights is not None:
        model = student("cpu")
        model.load_state_dict(weights)
    if lora is not None:
        model = model.merge_and_unload()  # of the same structure as without adapters
    write_text(directory / LOSSES, "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history))
    with atomic_directory(directory / MODEL) as saved:
        model.save_pretrained(saved)
        write_chat_files(recipe.chat_model(PIVOT), saved, own_prompt=own_prompt, name=name)
        record(directory / SEALED, saved, directory / LOSSES)
