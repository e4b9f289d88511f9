"""What the training arguments of a recipe say of the size of a fine-tuning."""

from pathlib import Path
from typing import Any

from fusechat.plan.estimate import Training


def training_of(given: dict[str, Any], *, seed: int, processes: int) -> Training:
    """The size of a fine-tuning by `processes` processes. Raises RecipeError for what Transformers refuses."""
    from fusechat.fuse.training import training_arguments

    found = training_arguments(given, output=Path("unused"), seed=seed, device="cpu")
    apart = found.per_device_train_batch_size
    sharded = bool(found.fsdp)
    inside = bool((found.fsdp_config or {}).get("activation_checkpointing")) if sharded else False
    return Training(
        epochs=float(found.num_train_epochs),
        apart=apart,
        together=apart * found.gradient_accumulation_steps * processes,
        steps=found.max_steps if found.max_steps > 0 else None,
        saved=_when(found.save_strategy, found.save_steps),
        measured=_when(found.eval_strategy, found.eval_steps),
        kept=found.save_total_limit,
        dtype="bfloat16" if found.bf16 else "float16" if found.fp16 else "float32",
        recompute=bool(found.activation_checkpointing) or inside,
        sharded=sharded and processes > 1,
        grouped=found.train_sampling_strategy == "group_by_length",
    )


def _when(strategy: Any, steps: float | None) -> float | str | None:
    """As `Training` has it, of one of Transformers' strategies."""
    return {"steps": steps, "epoch": "epoch"}.get(str(strategy.value))
