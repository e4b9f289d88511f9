"""The section `rounds`: on-policy rounds after the first training. What does not go together is found in `problems`."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from fusechat.recipe.sections import Section
from fusechat.recipe.training_arguments import check_arguments

# Of held-out conversations, which rounds do not measure while they train.
_MEASURING = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
_FOLLOWING = ("reduce_lr_on_plateau", "greedy")  # schedules of the learning rate that follow such measurements


class Teacher(Section):
    """One source that teaches all prompts."""

    source: str


class Rounds(Section):
    """`until_wrong`: rows are learnt up to the first at which the teacher gives the student's token less than this share.
    `training`: what differs from `fuse.training`; its steps are those of all rounds together."""

    count: int = Field(default=3, ge=1)
    prompts: float = Field(default=1.0, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_new_tokens: int = Field(default=512, ge=1)
    teacher: Literal["author", "best"] | Teacher = "author"
    until_wrong: float = Field(default=0.1, ge=0, le=1)
    loss: Literal["cross_entropy", "reverse_kl", "jsd"] = "cross_entropy"
    stop_on_alarm: bool = True
    training: dict[str, Any] = Field(default={})

    @field_validator("teacher", mode="before")
    @classmethod
    def _author_or_a_source(cls, value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"source"} and isinstance(value["source"], str):
            return Teacher(source=value["source"])
        if value in ("author", "best") or isinstance(value, Teacher):
            return value
        raise ValueError(f"should be author, best, or a mapping of source to a name, not {value!r}")

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        wrong = check_arguments(value)
        wrong += [f"{name} cannot be set: rounds measure nothing held-out" for name in value if name in _MEASURING]
        if wrong:
            raise ValueError(*wrong)
        return value


def training_of(recipe: Any) -> dict[str, Any]:
    """The training arguments of all rounds together: those of `fuse.training` where the section says nothing."""
    own = recipe.rounds.training
    taken = {name: value for name, value in recipe.fuse.training.items() if name not in _MEASURING}
    if "num_train_epochs" in own:
        taken.pop("max_steps", None)  # which would count instead
    return {**taken, **own}


def taught_targets(recipe: Any) -> dict[str, list[str]]:
    """The targets that have rounds, each with the sources that may teach in them."""
    rounds = recipe.rounds
    if rounds is None:
        return {}
    own = [rounds.teacher.source] if isinstance(rounds.teacher, Teacher) else list(recipe.models)
    found = {target: [name for name in sources if name in own] for target, sources in recipe.teachers().items()}
    return {target: sources for target, sources in found.items() if sources}


def problems(recipe: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Place and line of what is wrong with the section where each key is right by itself."""
    rounds = recipe.rounds
    if rounds is None:
        return
    teacher, training = rounds.teacher, training_of(recipe)
    place = ("rounds", "teacher")
    if isinstance(teacher, Teacher):
        if teacher.source not in recipe.sources:
            yield place, f"{teacher.source} is no source; the recipe has {', '.join(recipe.sources)}"
        elif teacher.source not in recipe.models:
            yield place, f"{teacher.source} is a server, which answers and cannot teach"
        elif not taught_targets(recipe):
            yield place, f"{teacher.source} teaches no target"
    elif recipe.generate is None:
        yield place, f"{teacher}: answers have authors where the recipe has a section generate; or name a source"
    elif not taught_targets(recipe):
        yield place, f"{teacher}: nobody who answers can teach"
    if recipe.capture.backend == "vllm" and recipe.capture.url is not None:
        yield (
            ("rounds",),
            "capture.url serves the pivot, not the target as it is in a round; give sources their own capture.url",
        )
    where = ("rounds", "training")
    if training.get("train_sampling_strategy") == "batch_rebalance":
        yield where, "train_sampling_strategy: batch_rebalance does not know in which round a conversation is"
    if training.get("lr_scheduler_type") in _FOLLOWING:
        yield (
            where,
            f"lr_scheduler_type: {training['lr_scheduler_type']} follows measurements, which rounds do not make",
        )
