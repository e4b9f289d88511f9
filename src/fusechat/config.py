"""The recipe: what a user writes, checked as a whole before any work. Reading the file is in `recipe_file.py`."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fusechat.core.chatters import Chatter
from fusechat.core.conversations import DataSet
from fusechat.core.references import Reference
from fusechat.errors import RecipeError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Dtype = Literal["float32", "bfloat16", "float16"]
PIVOT, FUSED, COMMON = "pivot", "fused", "data"  # names that no source may have; COMMON is the recipe's own data set
STAGES = ("prepare", "capture", "align", "fuse", "merge", "evaluate", "report")


def _not_taken(name: str) -> str:
    if name.lower() in (PIVOT, FUSED, COMMON):
        raise ValueError("this name is taken; call the source something else")
    return name


SourceName = Annotated[Name, AfterValidator(_not_taken)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSpec(Section):
    """A chat LLM. In a recipe a bare reference stands for `{model: reference}`."""

    model: str | None = None
    wheel: list[str] | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False

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
        if (self.model is None) == (not self.wheel):
            raise ValueError("names no model, or two: give either model or wheel")
        problem = self.reference.check()
        if problem:
            raise ValueError(problem)
        if self.chat_template is not None and is_template_file(self.chat_template):
            raise ValueError(f"chat_template: {self.chat_template}: no such file")
        if self.sha256 and not self.reference.is_wheel:
            raise ValueError("sha256 goes with a wheel: reference")
        return self

    @property
    def reference(self) -> Reference:
        parts = (
            (self.model,)
            if self.model
            else tuple(part if part.startswith("wheel:") else f"wheel:{part}" for part in self.wheel or ())
        )
        return Reference(parts, self.sha256, self.trust_remote_code)


class DataPath(Section):
    path: str

    @model_validator(mode="before")
    @classmethod
    def _full_form(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class SourceData(Section):
    train: DataPath
    validation: DataPath | None = None


class Data(Section):
    train: DataPath | None = None
    validation: DataPath | None = None
    max_length: int = Field(default=2048, ge=8)
    on_error: Literal["stop", "skip"] = "stop"


class SourceCapture(Section):
    """What a source may set for itself; None takes the recipe's `capture`."""

    top_k: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    batch_tokens: int | None = Field(default=None, ge=1)


class SourceSpec(ModelSpec):
    data: SourceData | None = None
    capture: SourceCapture = SourceCapture()


class Capture(Section):
    top_k: int = Field(default=10, ge=1)
    dtype: Dtype = "bfloat16"
    batch_tokens: int = Field(default=2048, ge=1)
    shard_conversations: int = Field(default=256, ge=1)


class Align(Section):
    sequence: Literal["boundary", "dtw"] = "boundary"
    vocabulary: Literal["exact", "edit", "statistics"] = "statistics"
    top_1: bool = False
    unaligned: Literal["label", "skip", "pivot", "condition"] = "condition"
    look_ahead: bool | None = None
    chain_rule: bool = False
    top_k: int | None = Field(default=None, ge=1)
    processes: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _counted(self) -> "Align":
        if self.look_ahead and self.vocabulary != "statistics":
            raise ValueError("look_ahead needs vocabulary: statistics")
        return self

    def strategy(self) -> Any:
        """As the alignment takes it: without a word on `look_ahead`, it is used where the map is counted."""
        from fusechat.align.aligner import Strategy

        look_ahead = self.vocabulary == "statistics" if self.look_ahead is None else self.look_ahead
        return Strategy(
            self.sequence,
            self.vocabulary,
            top_1=self.top_1,
            unaligned=self.unaligned,
            look_ahead=look_ahead,
            chain_rule=self.chain_rule,
        )


class Fuse(Section):
    function: Literal["mince"] = "mince"
    loss: Literal["cross_entropy", "kl", "reverse_kl", "jsd"] = "cross_entropy"
    tail: Literal["renormalise", "bucket"] = "renormalise"
    temperature: float = Field(default=1.0, gt=0)
    sft_weight: float = Field(default=0.9, ge=0, le=1)
    training: dict[str, Any] = {}

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        from fusechat.fuse.arguments import check_arguments

        problems = check_arguments(value)
        if problems:
            raise ValueError(*problems)
        return value


class Merge(Section):
    """Beside `dtype`, what `fusechat merge` takes for the method, checked as there; `weight` and `density` also by target."""

    method: str = "sce"
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
    def _as_in_the_paper(cls, raw: Any) -> Any:
        """Without a word on it, SCE keeps the share that the paper's 7B models were merged with."""
        if isinstance(raw, dict) and raw.get("method", "sce") == "sce" and raw.get("select_topk") is None:
            return {**raw, "select_topk": 0.1}
        return raw

    def parameters(self) -> dict[str, Any]:
        """What is set, by the names that the methods know."""
        given = self.model_dump(exclude={"method", "dtype"}, exclude_none=True)
        return {name.rstrip("_"): value for name, value in given.items()}


class Evaluate(Section):
    bits_per_byte: bool = True
    dtype: Dtype = "bfloat16"
    batch_tokens: int = Field(default=2048, ge=1)


class Recipe(Section):
    name: Name
    pivot: ModelSpec
    sources: dict[SourceName, SourceSpec] = Field(min_length=1)
    data: Data = Field(default=Data(), validate_default=True)
    capture: Capture = Capture()
    align: Align = Align()
    fuse: Fuse = Fuse()
    merge: Merge = Merge(select_topk=0.1)
    evaluate: Evaluate = Evaluate()
    seed: int = Field(default=0, ge=0)
    device: str | None = None

    @field_validator("sources")
    @classmethod
    def _differ(cls, sources: dict[str, SourceSpec]) -> dict[str, SourceSpec]:
        if len({name.lower() for name in sources}) < len(sources):
            raise ValueError("two names differ in case only")
        return sources

    @field_validator("data")
    @classmethod
    def _for_every_source(cls, data: Data, info: ValidationInfo) -> Data:
        lacking = [name for name, source in info.data.get("sources", {}).items() if source.data is None]
        if lacking and data.train is None:
            raise ValueError(
                *(f"source {name} has no data: set data.train for all, or its own data" for name in lacking)
            )
        return data

    @field_validator("merge")
    @classmethod
    def _mergeable(cls, merge: Merge, info: ValidationInfo) -> Merge:
        from fusechat.merge.settings import problems

        found = problems(merge.method, merge.parameters(), list(info.data.get("sources", {})))
        if found:
            raise ValueError(*found)
        return merge

    def chatter(self, name: str) -> Chatter:
        spec = self.pivot if name == PIVOT else self.sources[name]
        return Chatter(name, spec.reference, spec.chat_template)

    def training_set(self, source: str) -> DataSet:
        """The conversations on which `source` teaches: its own, else the recipe's."""
        own = self.sources[source].data
        if own is not None:
            return DataSet(source, own.train.path, self.data.on_error)
        assert self.data.train is not None  # by _for_every_source
        return DataSet(COMMON, self.data.train.path, self.data.on_error)

    def validation_sets(self) -> list[DataSet]:
        """Held-out conversations, on which every model is measured: the recipe's, and each source's own."""
        sets = []
        if self.data.validation is not None:
            sets.append(DataSet(f"{COMMON}-held-out", self.data.validation.path, self.data.on_error))
        for name, source in self.sources.items():
            if source.data is not None and source.data.validation is not None:
                sets.append(DataSet(f"{name}-held-out", source.data.validation.path, self.data.on_error))
        return sets

    def validation_set(self, source: str) -> DataSet:
        """The held-out conversations on which `source` is measured: its own, else the recipe's. Raises RecipeError."""
        found = {data.name: data for data in self.validation_sets()}
        for name in (source, COMMON):
            if f"{name}-held-out" in found:
                return found[f"{name}-held-out"]
        raise RecipeError(f"source {source} has no held-out conversations: set data.validation")

    def capture_for(self, name: str) -> Capture:
        if name == PIVOT:
            return self.capture
        own = self.sources[name].capture.model_dump(exclude_none=True)
        return self.capture.model_copy(update=own)


def is_template_file(text: str) -> bool:
    """Whether a chat template is given as the name of a file: `template.jinja`."""
    return text.endswith((".jinja", ".jinja2", ".j2")) and "{" not in text and "\n" not in text
