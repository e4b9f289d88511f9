"""The sections of a recipe, each checked by itself. The whole is in `schema.py`."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from fusechat.data.records import refuse_taken
from fusechat.models.chat_model import is_template_file
from fusechat.models.reference import COMMIT, Reference

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Dtype = Literal["float32", "bfloat16", "float16"]
Backend = Literal["transformers", "vllm"]
Url = Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]
PIVOT, FUSED, COMMON = "pivot", "fused", "data"  # names that sources may not have; COMMON is the recipe's own data set


def _not_taken(name: str) -> str:
    if name.lower() in (PIVOT, FUSED, COMMON):
        raise ValueError("this name is taken; choose another")
    return name


SourceName = Annotated[Name, AfterValidator(_not_taken)]  # also of targets


def _device_map(value: Any) -> Any:
    """Validates Accelerate's form."""
    ways = ("auto", "balanced", "balanced_low_0", "sequential")
    if isinstance(value, dict) and value:
        if all(isinstance(part, str) and isinstance(where, int | str) for part, where in value.items()):
            return value
    elif isinstance(value, str) and value in ways:
        return value
    raise ValueError(f"should be {', '.join(ways)}, or a device (or disk) for each part of the model, not {value!r}")


DeviceMap = Annotated[Any, AfterValidator(_device_map)]
Commit = Annotated[str, StringConstraints(pattern=f"^{COMMIT}$")]


class Section(BaseModel):
    """A section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TemplateName(Section):
    name: str


class ModelSpec(Section):
    """A chat LLM. In a recipe a bare reference means `{model: reference}`."""

    model: str | None = None
    wheel: list[str] | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    chat_template: str | TemplateName | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    trust_remote_code: bool = False
    commit: Commit | None = None

    @model_validator(mode="before")
    @classmethod
    def _full_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"model": value}
        if isinstance(value, dict):
            inner = value.get("model")
            if isinstance(inner, dict):  # model: {wheel: [...], sha256: ...}
                return {**{key: item for key, item in value.items() if key != "model"}, **inner}
            if isinstance(value.get("wheel"), str):
                return {**value, "wheel": [value["wheel"]]}
        return value

    @model_validator(mode="after")
    def _one_reference(self) -> "ModelSpec":
        self.check_reference()
        return self

    def check_reference(self) -> None:
        """Raises ValueError unless it names exactly one model."""
        if (self.model is None) == (not self.wheel):
            raise ValueError("names no model, or two: give either model or wheel")
        problem = self.reference.check()
        if problem:
            raise ValueError(problem)
        refuse_taken(self.chat_template_kwargs or {})
        if isinstance(self.chat_template, str) and is_template_file(self.chat_template):
            raise ValueError(f"chat_template: {self.chat_template}: no such file")
        if self.sha256 and not self.reference.is_wheel:
            raise ValueError("sha256 goes with a wheel: reference")
        if self.commit and not self.reference.is_hub:
            raise ValueError("commit goes with a model of the hub")

    @property
    def reference(self) -> Reference:
        """The model's reference."""
        wheels = (part if part.startswith("wheel:") else f"wheel:{part}" for part in self.wheel or ())
        parts = (self.model,) if self.model else tuple(wheels)
        return Reference(parts, self.sha256, self.trust_remote_code, self.commit)


class DataPath(Section):
    """A set of conversations: a file, or a data set of the hub."""

    path: str
    split: Annotated[str, StringConstraints(pattern=r"^\w[\w.]*$")] | None = None
    limit: int | None = Field(default=None, ge=1)
    commit: Commit | None = None

    @model_validator(mode="before")
    @classmethod
    def _full_form(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _as_written(self, whole: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without unset keys."""
        return {key: value for key, value in whole(self).items() if value is not None}


class TrainingSet(DataPath):
    """A set of conversations to train on. `weight`: how often each conversation is in an epoch."""

    name: Name | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _as_written(self, whole: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without unset keys."""
        said = super()._as_written(whole)
        return {key: value for key, value in said.items() if (key, value) != ("weight", 1.0)}

    @property
    def stem(self) -> str:
        """Its default name: the file's without suffix, or the hub data set's without owner."""
        name = Path(self.path).stem if Path(self.path).is_absolute() else self.path.partition("@")[0].rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")


TrainingSets = Annotated[
    Annotated[TrainingSet, Tag("[one]")] | Annotated[list[TrainingSet], Tag("[several]"), Field(min_length=1)],
    Discriminator(lambda value: "[several]" if isinstance(value, list) else "[one]"),
]


class SourceData(Section):
    train: TrainingSets
    validation: DataPath | None = None


class HeldOut(DataPath):
    name: Name | None = None


class Data(Section):
    train: TrainingSets | None = None
    validation: HeldOut | None = None
    max_length: int = Field(default=2048, ge=8)
    max_rejected: float = Field(default=0.1, ge=0, le=1)
    truncate: Literal["response", "token"] = "response"
    join_turns: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    on_overlap: Literal["warn", "stop"] = "warn"


class SourceCapture(Section):
    """A source's own capture settings; None takes the recipe's."""

    top_k: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    batch_tokens: int | None = Field(default=None, ge=1)
    device_map: DeviceMap | None = None
    backend: Backend | None = None
    tensor_parallel: int | None = Field(default=None, ge=1)
    url: Url | None = None


class Capture(Section):
    top_k: int = Field(default=10, ge=1)
    dtype: Dtype = "bfloat16"
    batch_tokens: int = Field(default=2048, ge=1)
    shard_conversations: int = Field(default=256, ge=1)
    device_map: DeviceMap | None = None
    backend: Backend = "transformers"
    tensor_parallel: int = Field(default=1, ge=1)
    url: Url | None = None


class Align(Section):
    sequence: Literal["boundary", "dtw"] = "boundary"
    vocabulary: Literal["exact", "edit", "statistics"] = "statistics"
    top_1: bool = False
    unaligned: Literal["label", "skip", "pivot", "condition"] = "condition"
    look_ahead: bool | None = None
    chain_rule: bool = False
    min_mass: float = Field(default=0.5, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    processes: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _counted(self) -> "Align":
        if self.look_ahead and self.vocabulary != "statistics":
            raise ValueError("look_ahead needs vocabulary: statistics")
        return self

    @property
    def looks_ahead(self) -> bool:
        """`look_ahead`, by default wherever the map has counts."""
        return self.vocabulary == "statistics" if self.look_ahead is None else self.look_ahead


class Fuse(Section):
    function: Literal["mince", "avgce", "source", "author"] = "mince"
    unit: Literal["byte", "token"] = "byte"
    level: Literal["conversation", "response", "position"] = "conversation"
    against: Literal["pivot", "student"] = "pivot"
    loss: Literal["cross_entropy", "kl", "reverse_kl", "jsd"] = "cross_entropy"
    tail: Literal["renormalise", "bucket"] = "renormalise"
    temperature: float = Field(default=1.0, gt=0)
    sft_weight: float = Field(default=0.9, ge=0, le=1)
    sft_weight_end: float | None = Field(default=None, ge=0, le=1)
    lora: dict[str, Any] | None = None
    training: dict[str, Any] = {}

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        from fusechat.recipe.training_arguments import check_arguments

        problems = check_arguments(value)
        if problems:
            raise ValueError(*problems)
        return value

    @field_validator("lora")
    @classmethod
    def _known_to_peft(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        from fusechat.recipe.training_arguments import check_lora

        problems = check_lora(value) if value is not None else []
        if problems:
            raise ValueError(*problems)
        return value


class Merge(Section):
    """The section `merge`: `targets`, `dtype`, and the method's parameters of `fusechat merge`, checked as there. `weight` and
    `density` may be given by target."""

    method: str = "sce"
    targets: list[str] | None = Field(default=None, min_length=1)
    granularity: Literal["tensor", "layer", "model"] | None = None
    select_topk: Any = None
    select_deltas: Any = None
    normalize: Any = None
    weight: Any = None
    density: Any = None
    rescale: Any = None
    lambda_: Any = Field(default=None, alias="lambda")
    t: Any = None
    dtype: Dtype | None = None

    @model_validator(mode="before")
    @classmethod
    def _all_kept(cls, raw: Any) -> Any:
        """SCE keeps every position by default: see docs/results.md."""
        if isinstance(raw, dict) and raw.get("method", "sce") == "sce" and raw.get("select_topk") is None:
            return {**raw, "select_topk": 1.0}
        return raw

    def parameters(self) -> dict[str, Any]:
        """The parameters that are set, by the methods' names."""
        given = self.model_dump(exclude={"method", "targets", "dtype"}, exclude_none=True)
        return {name.rstrip("_"): value for name, value in given.items()}


def named_sets(train: TrainingSets, own: str) -> Iterator[tuple[tuple[str, ...], str, TrainingSet]]:
    """Each set with its place and its name: in a list that of its file, else `own`."""
    if isinstance(train, TrainingSet):
        yield (), train.name or own, train
        return
    for index, one in enumerate(train):
        yield (str(index),), one.name or one.stem, one
