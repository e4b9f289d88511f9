"""fuse/<target>/: `model/` (a plain Hugging Face directory, float32), `losses.jsonl` (one entry for each logged step)."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat.data.distributions import open_distributions
from fusechat.errors import ModelError, RecipeError
from fusechat.fuse.part import CHECKPOINTS, LOSSES, MODEL
from fusechat.fuse.teacher_selection import COMPARING
from fusechat.recipe.rounds import training_of
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.recipe.training_arguments import counted
from fusechat.run import ranks
from fusechat.run.integrity import matches_record
from fusechat.run.manifests import which_device
from fusechat.run.progress import log
from fusechat.run.steps import SEALED, Step

FORMAT = 2
ONE_PROCESS = "fuse.training.fsdp: shards the model over the processes of torchrun, and there is only one"


@dataclass(frozen=True)
class SourceSteps:
    """A source's steps on a set of conversations."""

    prepared: Step
    captured: Step
    aligned: Step


@dataclass(frozen=True)
class SetSteps:
    """The steps on a set of conversations for one target: the pivot's (captured only if needed) and each source's. `weight`: how
    often each conversation is in an epoch."""

    name: str
    pivot: Step
    captured: Step | None = None
    sources: Mapping[str, SourceSteps] = field(default_factory=dict)
    weight: float = 1.0

    def upstream(self) -> dict[str, Step]:
        """All steps that fine-tuning reads, by name."""
        found = {f"{self.name}/pivot": self.pivot}
        if self.captured is not None:
            found[f"{self.name}/pivot_capture"] = self.captured
        for name, steps in self.sources.items():
            for key, step in (("", steps.prepared), ("_capture", steps.captured), ("_aligned", steps.aligned)):
                found[f"{self.name}/source/{name}{key}"] = step
        return found


def is_taught(recipe: Recipe, target: str) -> bool:
    """Whether a target learns from distributions, and not by plain fine-tuning."""
    return bool(recipe.teachers()[target]) and min(_sft_weights(recipe)) < 1


def _sft_weights(recipe: Recipe) -> tuple[float, float]:
    """λ of the first and of the last step."""
    first, last = recipe.fuse.sft_weight, recipe.fuse.sft_weight_end
    return first, first if last is None else last


def needs_pivot(recipe: Recipe, target: str) -> bool:
    """Whether the pivot's own distributions are compared for a target."""
    return is_taught(recipe, target) and recipe.fuse.function in COMPARING and recipe.fuse.against == "pivot"


def measures(recipe: Recipe) -> bool:
    """Whether training evaluates held-out conversations."""
    return recipe.fuse.training.get("eval_strategy", "no") not in ("no", False)


def step(recipe: Recipe, workdir: Path, target: str, sets: Sequence[SetSteps], held_out: Mapping[str, Step]) -> Step:
    """The step that fine-tunes a copy of the pivot. `held_out`: the pivot's prepared sets for evaluation during training."""
    pivot = recipe.chat_model(PIVOT)
    unread = set() if is_taught(recipe, target) else set(type(recipe.fuse).model_fields) - {"training", "lora"}
    settings = {
        **recipe.fuse.model_dump(exclude=unread),
        "pivot": pivot.identity,
        "chat_template": pivot.template_key,
        "seed": recipe.seed,
        "device": recipe.device,
        "teachers": recipe.teachers()[target] if is_taught(recipe, target) else [],
    }
    if is_taught(recipe, target) and (recipe.fuse.function, recipe.fuse.unit) == ("avgce", "byte"):
        settings["weights"] = "per token of the pivot"  # older versions: per byte
    several = any(len(recipe.sets_of(name)) > 1 for name in recipe.teachers()[target] or recipe.sources)
    if several or any(one.weight != 1 for one in sets):
        settings["sets"] = [[one.name, one.weight] for one in sets]
    upstream = {key: one for part in sets for key, one in part.upstream().items()}
    upstream |= {f"{name}/held_out": one for name, one in held_out.items()}

    def work(directory: Path) -> dict[str, Any]:
        return _fuse(directory, workdir / "logs" / target, target, sets, held_out, recipe)

    directory = workdir / "fuse" / target
    return Step("fuse", target, directory, settings, work, upstream, FORMAT, _counted, join=lambda counts: counts[0])


def _counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that change no weight, such as logging and saving."""
    return {**settings, **which_device(settings), "training": counted(settings.get("training", {}))}


def check(recipe: Recipe, *, here: bool = True) -> None:
    """Checks the training arguments with Transformers and PEFT before any work. Raises RecipeError. `here`: this process, and
    those launched with it, will do the fine-tuning."""
    from fusechat.fuse.lora import lora_config
    from fusechat.fuse.training import check_packages, check_reporting, is_sharded_alone, training_arguments
    from fusechat.models.load import choose_device

    device = str(choose_device(recipe.device))
    how: dict[str, Any] = {"output": Path("unused"), "seed": recipe.seed, "device": device}
    arguments = training_arguments(recipe.fuse.training, **how)
    if recipe.rounds is not None:
        check_reporting(training_arguments(training_of(recipe), key="rounds.training", **how))
    check_reporting(arguments)
    if here:
        check_packages(arguments)
    if here and is_sharded_alone(arguments):
        raise RecipeError(
            f"{ONE_PROCESS}: start it as torchrun --nproc-per-node N -m fusechat run …; earlier stages, vLLM's captures too, "
            "run without it by --until align"
        )
    if arguments.train_sampling_strategy == "batch_rebalance" and any(one != 1 for one in recipe.weights().values()):
        raise RecipeError(
            "fuse.training.train_sampling_strategy: batch_rebalance does not support weights of training sets"
        )
    if recipe.fuse.lora is not None:
        lora_config(recipe.fuse.lora)
    for target in recipe.teachers() if measures(recipe) else ():
        if not recipe.validation_sets_of(target):
            raise RecipeError(
                f"fuse.training.eval_strategy: target {target} has no held-out conversations: set data.validation"
            )


def check_pivot(recipe: Recipe) -> None:
    """Raises ModelError if the pivot's weights are quantised, and so can only be run."""
    from fusechat.models.load import quantised

    pivot = recipe.chat_model(PIVOT)
    kind = quantised(pivot.directory)
    if kind:
        raise ModelError(
            f"pivot ({pivot.reference}): its weights are quantised ({kind}), which can be neither fine-tuned nor merged; "
            "take the model that they were made from"
        )


def _learns_after_own_prompt(sets: Sequence[SetSteps]) -> bool:
    """Whether most conversations follow the template's own generation prompt, which plain answers do not."""
    counts = [(one.pivot.manifest() or {}).get("counts", {}) for one in sets]
    own, every = (sum(found.get(key, 0) for found in counts) for key in ("own_prompt", "conversations"))
    return bool(2 * own > every)


def _fuse(
    directory: Path, logs: Path, target: str, sets: Sequence[SetSteps], held_out: Mapping[str, Step], recipe: Recipe
) -> dict[str, Any]:
    data, own_prompt = _data(sets, recipe, target), _learns_after_own_prompt(sets)
    chosen = ranks.from_first(lambda: data.chosen)
    for name, counts in chosen.items():
        log.info("fuse %s: on %s %s", target, name, ", ".join(f"{who} {count:g}" for who, count in counts.items()))
    if data.is_weighted:
        log.info("fuse %s: %d conversations an epoch, of %d", target, data.examples_per_epoch, len(data))
    if not ranks.from_first(lambda: matches_record(directory / SEALED, directory / MODEL, directory / LOSSES)):
        _train(directory, logs, target, data, held_out, recipe, own_prompt=own_prompt)
    if not ranks.is_first():  # the first process returns the counts
        return {}
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    entries = [json.loads(line) for line in (directory / LOSSES).read_text().splitlines()]
    steps = max((entry["step"] for entry in entries), default=0)
    return {
        "conversations": len(data),
        "an_epoch": data.examples_per_epoch,
        "steps": steps,
        "level": data.rule.level,
        "chosen": _against_student(chosen, entries),
        **({"own_prompt": True} if own_prompt else {}),
    }


def _data(sets: Sequence[SetSteps], recipe: Recipe, target: str) -> Any:
    from fusechat.data.prepared import PreparedSet
    from fusechat.fuse.dataset import FusionData, Teacher, TeachingSet
    from fusechat.fuse.teacher_selection import SelectionRule

    fuse = recipe.fuse

    def store(step: Step) -> Any:
        found = open_distributions(step.directory, verify=ranks.is_first())
        if fuse.tail == "bucket" and not found.has_tails and ranks.is_first():
            log.warning("%s: written by an older version, without tails; tails below 0.001 count as 0", step.directory)
        return found

    def teacher(steps: SourceSteps) -> Teacher:
        return Teacher(PreparedSet(steps.prepared.directory), store(steps.captured), store(steps.aligned))

    return FusionData(
        [
            TeachingSet(
                one.name,
                PreparedSet(one.pivot.directory),
                store(one.captured) if one.captured else None,
                {name: teacher(steps) for name, steps in one.sources.items()},
                one.weight,
            )
            for one in sets
        ],
        SelectionRule(function=fuse.function, unit=fuse.unit, level=fuse.level, against=fuse.against)
        if is_taught(recipe, target)
        else SelectionRule(),  # unused
    )


def _train(
    directory: Path,
    logs: Path,
    target: str,
    data: Any,
    held_out: Mapping[str, Step],
    recipe: Recipe,
    *,
    own_prompt: bool,
) -> None:
    from fusechat.data.prepared import PreparedSet
    from fusechat.fuse.fine_tune import fine_tune
    from fusechat.fuse.validation import Validation

    fuse, pivot = recipe.fuse, recipe.chat_model(PIVOT)
    fine_tune(
        directory,
        recipe,
        pivot,
        data,
        name=f"fuse {target}",
        run_name=f"{recipe.name}-{target}",
        training=fuse.training,
        sft_weight=_sft_weights(recipe) if is_taught(recipe, target) else (1.0, 1.0),
        loss_settings={"kind": fuse.loss, "tail": fuse.tail, "temperature": fuse.temperature},
        own_prompt=own_prompt,
        held_out={name: Validation(PreparedSet(one.directory)) for name, one in held_out.items()},
        logs=logs,
    )


def train_part(
    directory: Path, recipe: Recipe, base: Any, *, taught: Mapping[str, Sequence[Path]], **how: Any
) -> dict[str, Any]:
    """See `sampled.train_part`; `taught`: the fields of each `Taught`."""
    from fusechat.fuse.sampled import Taught, train_part

    return train_part(directory, recipe, base, {name: Taught(*places) for name, places in taught.items()}, **how)


def _against_student(
    chosen: dict[str, dict[str, float]], entries: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """How often each candidate taught. If compared with the student, these are the counts of all steps, in place of the
    comparison of sources before training."""
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        for key, count in entry.items():
            if key.startswith("taught/"):
                _, data, who = key.split("/")
                by_set = found.setdefault(data, {})
                by_set[who] = by_set.get(who, 0) + count
    return found or chosen
