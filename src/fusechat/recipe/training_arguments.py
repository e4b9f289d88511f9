"""`fuse.training` and `fuse.lora`: Transformers' TrainingArguments and PEFT's LoraConfig, checked without importing them."""

import ast
import difflib
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusechat.run.extras import not_installed

# Arguments that FuseChat sets itself, and why.
RESERVED = {
    "output_dir": "checkpoints live in the work directory",
    "overwrite_output_dir": "checkpoints live in the work directory",
    "resume_from_checkpoint": "FuseChat resumes by itself",
    "remove_unused_columns": "the batches are FuseChat's own",
    "label_names": "the batches are FuseChat's own",
    "seed": "set seed at the top of the recipe",
    "data_seed": "set seed at the top of the recipe",
    "use_cpu": "set device at the top of the recipe",
    "do_train": "FuseChat decides what runs",
    "do_eval": "FuseChat decides what runs",
    "do_predict": "FuseChat decides what runs",
    "label_smoothing_factor": "the loss is FuseChat's own",
    "disable_tqdm": "the progress bar is FuseChat's own",
    "save_only_model": "an interrupted run could not resume exactly",
    "enable_jit_checkpoint": "training would end as if it were finished; FuseChat writes a checkpoint by save_strategy",
}


POSITIVE = (
    *("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "logging_steps", "save_steps"),
)
_ALSO = {"fsdp": bool}  # types that Transformers accepts besides its annotations
_PLAIN = {"int", "float", "bool", "str", "list", "dict", "None"}


# Arguments that change no weight: logging, saving, and data loading.
_WRITING = (
    *("log_*", "logging_*", "report_to", "run_name", "project", "trackio_*", "push_to_hub", "hub_*"),
    "skip_memory_metrics",
)
_SERVING = (
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "torch_empty_cache_steps", "ddp_timeout", "include_num_input_tokens_seen"),
)
_BY_MEASURES = ("reduce_lr_on_plateau", "greedy")  # learning rate schedules that depend on evaluations
# Arguments that change no weight if training ends with the last step and no evaluation changes the learning rate.
_BETWEEN = (
    *("save_*", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
    *("per_device_eval_batch_size", "metric_for_best_model", "greater_is_better"),
)


def counted(training: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the trained weights depend on."""
    measured = training.get("load_best_model_at_end") or training.get("lr_scheduler_type") in _BY_MEASURES
    patterns = (*_WRITING, *_SERVING, *(() if measured else _BETWEEN))
    found = {name: value for name, value in training.items() if not any(fnmatch(name, one) for one in patterns)}
    if measured and training.get("eval_strategy") == "steps" and not training.get("eval_steps"):
        found["eval_steps"] = training.get("logging_steps")  # Transformers' default
    return found


def known_arguments() -> dict[str, str]:
    """The fields of TrainingArguments and their annotations."""
    return _fields("transformers", "training_args.py", "TrainingArguments")


@lru_cache(maxsize=4)
def _fields(package: str, file: str, name: str) -> dict[str, str]:
    """The fields of a dataclass and their annotations, from its source: importing it takes seconds."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                field.target.id: ast.unparse(field.annotation)
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
    return {}


def check_arguments(training: dict[str, Any]) -> list[str]:
    """A line for each name that cannot be set, and each value of the wrong type."""
    problems = []
    for name, value in training.items():
        if name in RESERVED:
            problems.append(f"{name} cannot be set: {RESERVED[name]}")
            continue
        found = _check(name, value, known_arguments(), "training argument")
        if not found and name in POSITIVE and isinstance(value, int | float) and value <= 0:
            found = [f"{name} should be more than 0, not {value!r}"]
        problems += found
    return problems


def check_lora(settings: dict[str, Any]) -> list[str]:
    """As `check_arguments`, for `fuse.lora`."""
    known = _fields("peft", "tuners/lora/config.py", "LoraConfig")
    if not known:
        return [not_installed("PEFT", "lora")]
    return [line for name, value in settings.items() for line in _check(name, value, known, "LoRA argument")]


def _check(name: str, value: Any, known: dict[str, str], what: str) -> list[str]:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        return [f"unknown {what} {name}" + (f"; did you mean {close[0]}?" if close else "")]
    return (
        []
        if _fits(value, known[name]) or type(value) is _ALSO.get(name)
        else [f"{name} should be {known[name]}, not {value!r}"]
    )


def _fits(value: Any, annotation: str) -> bool:
    """Whether a YAML value has the annotated type. Types of Transformers' own are left to it."""
    kinds = set(re.findall(r"\w+", annotation))
    if value is None or not kinds <= _PLAIN | {"Optional", "Union"}:
        return True
    return type(value).__name__ in kinds or (type(value) is int and "float" in kinds)
