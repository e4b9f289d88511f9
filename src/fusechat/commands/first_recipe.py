"""The recipe that `fusechat init` writes: names of sources, paths relative to the recipe, usual settings."""

import os
import re
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import yaml

from fusechat.data.conversations import DataSet
from fusechat.models.reference import Reference
from fusechat.recipe.sections import COMMON, FUSED, PIVOT
from fusechat.recipe.yaml_file import Dumper

_RECIPE = """\
# {label} learns from {teachers}. `fusechat run` runs this file. docs/recipe.md explains all keys.
name: {name}

pivot: {pivot}  # the fused model has its structure, size and tokenizer

sources:  # models that teach; a copy of the pivot is trained for each, then the copies are merged
{sources}

# targets: {{sft: []}}  # also train a copy without sources, to see what the sources add

data:
  train: {train}
{validation}
  max_length: 2048  # tokens of a conversation; fewer take less memory

{generate}

# auto: bfloat16 where the device has arithmetic for it, else float32, which is several times faster there.
capture: {{dtype: auto}}

fuse:
  sft_weight: {sft_weight}  # the rest is the weight of the sources' distributions
  training:  # any of Transformers' TrainingArguments
    num_train_epochs: 1
    learning_rate: 2.0e-5  # 5.0e-6 for a pivot of 7B parameters
    lr_scheduler_type: cosine
    warmup_steps: 0.03
    per_device_train_batch_size: 2
    gradient_accumulation_steps: 8  # 16 conversations a step on one device
    activation_checkpointing: true  # less memory, more time
    bf16: auto
    save_strategy: steps
    save_steps: 50  # an interrupted run loses at most so many
    save_total_limit: 1

evaluate: {{dtype: auto}}
"""
_HELD_OUT = "  validation: {path}  # all models are measured on it"
_UNMEASURED = "  # validation: held-out.jsonl  # without it, nothing is measured"
_GENERATE = "generate: {max_new_tokens: 512}  # "
_ANSWERED = "the sources answer the prompts; the best answers are learned: docs/answers.md"
_INSTEAD = "the sources answer the prompts, instead of the answers in the file: docs/answers.md"


def recipe_text(
    pivot: Reference,
    sources: Sequence[tuple[str | None, Reference]],
    data: DataSet,
    validation: DataSet | None,
    *,
    name: str | None,
    base: Path,
    prompts: bool = False,
) -> str:
    """The text of a recipe in the directory `base`. Sources and recipes without a name are named after their model. `prompts`: the
    data has no answers, so that the sources answer."""
    teachers = _named_apart(sources)
    return _RECIPE.format(
        label=_derived(pivot.label),
        teachers=" and ".join(teachers),
        name=_scalar(name or _derived(f"{pivot.label}-fused")),
        pivot=_scalar(_model_path(pivot, base)),
        sources="\n".join(f"  {_scalar(one)}: {_scalar(_model_path(model, base))}" for one, model in teachers.items()),
        train=_scalar(_data_path(data, base)),
        generate=_GENERATE + _ANSWERED if prompts else f"# {_GENERATE}{_INSTEAD}",
        sft_weight=0.3 if prompts else 0.9,
        validation=_HELD_OUT.format(path=_scalar(_data_path(validation, base))) if validation else _UNMEASURED,
    )


def _named_apart(sources: Sequence[tuple[str | None, Reference]]) -> dict[str, Reference]:
    """Sources by name: their own, else one derived from the model's label, unique regardless of case."""
    taken = {PIVOT, FUSED, COMMON, *(name.lower() for name, _ in sources if name)}
    found = {}
    for name, reference in sources:
        if name is None:
            stem = _derived(reference.label)
            numbered = (f"{stem}-{number}" for number in count(2))
            name = next(one for one in chain([stem], numbered) if one.lower() not in taken)
            taken.add(name.lower())
        found[name] = reference
    return found


def _derived(label: str) -> str:
    """A name derived from a label; valid on the hub too."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", label)
    return re.sub(r"([.-])[.-]+", r"\1", name).strip("-._") or "model"


def _model_path(reference: Reference, base: Path) -> str:
    path = reference.parts[0]
    if reference.is_hub or reference.is_wheel:
        return path
    found = _seen_from(base, path)
    return found if found.startswith((".", "/")) else f"./{found}"  # not a hub id


def _data_path(data: DataSet, base: Path) -> str:
    return data.path if data.is_hub else _seen_from(base, data.path)


def _seen_from(base: Path, path: str) -> str:
    """A path relative to `base`; an absolute one stays so unless it is inside."""
    whole = Path(path).absolute()
    whole = whole.parent.resolve() / whole.name
    if Path(path).is_absolute() and not whole.is_relative_to(base):
        return path
    return os.path.relpath(whole, base)


def _scalar(text: str) -> str:
    """Text as YAML, quoted only if needed."""
    return yaml.dump(text, Dumper=Dumper, allow_unicode=True, width=float("inf")).removesuffix("...\n").rstrip("\n")
