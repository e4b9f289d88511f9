"""Fine-tuning with low-rank adapters (PEFT), which are merged into the target's weights."""

from collections.abc import Mapping
from typing import Any

import torch

from fusechat.errors import RecipeError, first_line
from fusechat.run.extras import import_extra

_TASK = "CAUSAL_LM"


def lora_config(settings: Mapping[str, Any]) -> Any:
    """PEFT's LoraConfig from the recipe's `fuse.lora`. Raises RecipeError for a value that PEFT refuses."""
    peft = import_extra("peft", "fuse.lora: PEFT", "lora")
    try:
        return peft.LoraConfig(task_type=_TASK, **settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"fuse.lora: {first_line(error)}") from error


def with_adapters(model: Any, settings: Mapping[str, Any], *, seed: int) -> Any:
    """Adds float32 adapters to the model; only these are trained. Raises RecipeError if they do not fit the model."""
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, lora_config(settings))
        except ValueError as error:
            raise RecipeError(f"fuse.lora: {first_line(error)}") from error
