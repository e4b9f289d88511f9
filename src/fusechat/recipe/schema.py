"""The recipe as a whole. Its sections are in `sections.py`; `load.py` reads the file."""

import datetime
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fusechat.data.conversations import DataSet
from fusechat.errors import RecipeError
from fusechat.models.chat_model import ChatModel, is_template_file
from fusechat.recipe.evaluate import Evaluate
from fusechat.recipe.generate import Generate, SourceSpec, answering, chosen_set, own_targets, problems, with_author
from fusechat.recipe.precision import Place, automatic, with_dtypes
from fusechat.recipe.presets import with_preset
from fusechat.recipe.rounds import Rounds
from fusechat.recipe.rounds import problems as problems_of_rounds
from fusechat.recipe.sections import (
    COMMON,
    FUSED,
    PIVOT,
    Align,
    Capture,
    Data,
    DataPath,
    Fuse,
    Merge,
    ModelSpec,
    Name,
    Section,
    SourceName,
    TrainingSets,
    named_sets,
)

__all__ = ["COMMON", "FUSED", "PIVOT", "STAGES", "Recipe", "SourceSpec", "is_template_file"]
STAGES = ("generate", "prepare", "capture", "align", "fuse", "rounds", "merge", "evaluate", "report")


class Recipe(Section):
    """A run as a user describes it, checked as a whole. docs/recipe.md explains every key."""

    name: Name
    preset: Literal["paper"] | None = None
    pivot: ModelSpec
    sources: dict[SourceName, SourceSpec] = Field(min_length=1)
    generate: Generate | None = None
    targets: dict[SourceName, list[str]] = Field(default={})
    data: Data = Field(default=Data(), validate_default=True)
    capture: Capture = Capture()
    align: Align = Align()
    fuse: Fuse = Fuse()
    rounds: Rounds | None = None
    merge: Merge = Merge(select_topk=1.0)
    evaluate: Evaluate = Evaluate()
    seed: int = Field(default=0, ge=0)
    device: str | None = None
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None

    @field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, value: Any) -> Any:
        return value.isoformat() if type(value) is datetime.date else value

    _automatic: tuple[Place, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _filled_in(cls, raw: Any, check: ModelWrapValidatorHandler["Recipe"], info: ValidationInfo) -> "Recipe":
        raw = with_preset(with_author(raw))
        recipe = check(with_dtypes(raw, (info.context or {}).get("dtype")))
        recipe._automatic = automatic(raw)
        return recipe

    def __eq__(self, other: object) -> bool:
        """Compares values, whether they were `auto` or not."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    @property
    def automatic(self) -> tuple[Place, ...]:
        """The keys that were `auto`; a work directory may have other values for them."""
        return self._automatic

    @field_validator("sources")
    @classmethod
    def _differ(cls, sources: dict[str, SourceSpec]) -> dict[str, SourceSpec]:
        if len({name.lower() for name in sources}) < len(sources):
            raise ValueError("two names differ in case only")
        return sources

    @field_validator("targets")
    @classmethod
    def _of_known_sources(cls, targets: dict[str, list[str]], info: ValidationInfo) -> dict[str, list[str]]:
        known = info.data.get("sources", {})
        taken = {name.lower() for name in known}
        wrong: list[Any] = []
        for name, sources in targets.items():
            if name.lower() in taken:
                wrong.append(((name,), "this name is taken; every source has a target of its name"))
            taken.add(name.lower())
            unknown = dict.fromkeys(source for source in sources if known and source not in known)
            wrong += [((name,), f"{source} is no source; the recipe has {', '.join(known)}") for source in unknown]
            if len(set(sources)) < len(sources):
                wrong.append(((name,), "names a source twice"))
        if wrong:
            raise ValueError(*wrong)
        return targets

    @field_validator("data")
    @classmethod
    def _for_every_source(cls, data: Data, info: ValidationInfo) -> Data:
        sources = info.data.get("sources", {})
        lacking = [name for name, source in sources.items() if source.data is None and data.train is None]
        wrong: list[Any] = [f"source {name} has no data: set data.train for all, or its own data" for name in lacking]
        if data.validation and (data.validation.name or "").lower() in map(str.lower, sources):
            wrong.append((("validation", "name"), f"a source is called {data.validation.name}: choose another name"))
        if wrong:
            raise ValueError(*wrong)
        return data

    @model_validator(mode="after")
    def _goes_together(self) -> "Recipe":
        """Names of sets are unique, because their directories have them, and a set has one weight. For the rest see `problems`."""
        wrong: list[Any] = []
        known: dict[str, tuple[Any, float]] = {data.name.lower(): (None, 1.0) for data in self.validation_sets()}
        for place, own, train in self._training():
            here: set[str] = set()
            for at, name, one in named_sets(train, own):
                what = one.path, one.split, one.limit
                other, weight = known.setdefault(name.lower(), (what, one.weight))
                if not name:
                    wrong.append(((*place, *at), f"give it a name: {one.path} has none that a directory could have"))
                elif other != what or name.lower() in here:
                    wrong.append(((*place, *at), f"two sets of conversations are called {name}: give one another name"))
                elif weight != one.weight:
                    wrong.append(((*place, *at), f"{name} has weight {weight:g} elsewhere: a set has one weight"))
                here.add(name.lower())
        if wrong := wrong or [*problems(self), *problems_of_rounds(self)]:
            raise ValueError(*wrong)
        return self

    @field_validator("merge")
    @classmethod
    def _mergeable(cls, merge: Merge, info: ValidationInfo) -> Merge:
        if "sources" not in info.data or "targets" not in info.data:  # invalid themselves
            return merge
        own = own_targets(info.data["sources"], info.data.get("generate"))
        every, merged = [*own, *info.data["targets"]], merge.targets or list(own)
        found: list[Any] = [
            (("targets",), f"{name} is no target; the recipe has {', '.join(every)}")
            for name in merged
            if name not in every
        ]
        if len(set(merged)) < len(merged):
            found.append((("targets",), "names a target twice"))
        check = (info.context or {}).get("merge_check")
        found = found or (check(merge.method, merge.parameters(), merged) if check else [])
        if found:
            raise ValueError(*found)
        return merge

    def chat_model(self, name: str) -> ChatModel:
        """The pivot or a source by name."""
        return self._chat_model(name, self.pivot if name == PIVOT else self.sources[name])

    def reward_model(self) -> ChatModel | None:
        """The reward model that chooses among answers, or None."""
        spec = self.generate.choose.reward if self.generate is not None else None
        return None if spec is None else self._chat_model("reward", spec)

    def _chat_model(self, name: str, spec: ModelSpec) -> ChatModel:
        given = spec.chat_template
        text, own = (given, None) if given is None or isinstance(given, str) else (None, given.name)
        variables = json.dumps(spec.chat_template_kwargs, sort_keys=True) if spec.chat_template_kwargs else ""
        stop = tuple(getattr(spec, "stop", None) or ())
        return ChatModel(name, spec.reference, text, own, variables, self.date, stop)

    @property
    def models(self) -> list[str]:
        """The sources that are models, and not servers."""
        return [name for name, source in self.sources.items() if source.server is None]

    @property
    def answering(self) -> list[str]:
        """The sources that answer prompts."""
        return answering(self.sources, self.generate)

    def teachers(self) -> dict[str, list[str]]:
        """Every target with its sources, none for plain fine-tuning: first those of `own_targets`, then the named ones."""
        return {**own_targets(self.sources, self.generate), **self.targets}

    def sft_target(self) -> str | None:
        """The target of plain fine-tuning: the first without sources, or None."""
        return next((name for name, sources in self.targets.items() if not sources), None)

    def merged_targets(self) -> list[str]:
        """The targets that are merged."""
        return self.merge.targets or list(own_targets(self.sources, self.generate))

    def _data_set(self, name: str, where: DataPath, *, prompts: bool = False) -> DataSet:
        return DataSet(
            name, where.path, self.data.on_error, where.split, where.limit, self.data.join_turns, where.commit, prompts
        )

    def _training(self) -> Iterator[tuple[tuple[str, ...], str, TrainingSets]]:
        """Training sets: their place in the recipe, the name of a single unnamed set, the sets."""
        if self.data.train is not None:
            yield ("data", "train"), COMMON, self.data.train
        for name, source in self.sources.items():
            if source.data is not None:
                yield ("sources", name, "data", "train"), name, source.data.train

    def read_sets(self, source: str) -> list[DataSet]:
        """The sets of `source`, else the recipe's; all for the pivot. If the recipe generates, these are prompts."""
        if source == PIVOT:
            return self.all_read_sets()
        by_owner = {own: train for _, own, train in self._training()}
        own = source if self.sources[source].data is not None else COMMON
        prompts = self.generate is not None
        return [self._data_set(name, one, prompts=prompts) for _, name, one in named_sets(by_owner[own], own)]

    def all_read_sets(self) -> list[DataSet]:
        """The sets of all sources, each once."""
        return list(dict.fromkeys(data for source in self.sources for data in self.read_sets(source)))

    def sets_of(self, source: str) -> list[DataSet]:
        """The conversations that `source` teaches: its sets, or the chosen answers, or as an author its own."""
        if self.generate is None:
            return self.read_sets(source)
        return [chosen_set(source) if self.fuse.function == "author" else chosen_set()]

    def all_training_sets(self) -> list[DataSet]:
        """The sets of all targets, each once."""
        return list(dict.fromkeys(data for target in self.teachers() for data in self.training_sets(target)))

    def training_sets(self, target: str) -> dict[DataSet, list[str]]:
        """The sets of a target, each with the sources that teach it; for plain fine-tuning those of all sources."""
        teachers, sets = self.teachers()[target], dict[DataSet, list[str]]()
        if self.generate is not None and (self.fuse.function != "author" or not teachers):
            return {chosen_set(): teachers}
        for source in self.answering or teachers or self.sources:
            for data in self.sets_of(source):
                sets.setdefault(data, []).extend([source] if source in teachers else [])
        return sets

    def weights(self) -> dict[str, float]:
        """How often each conversation of a training set is in an epoch, by the set's name; 1 for answers."""
        said = {name: one.weight for _, own, train in self._training() for _, name, one in named_sets(train, own)}
        return {data.name: said.get(data.name, 1.0) for data in (*self.all_read_sets(), *self.all_training_sets())}

    def validation_sets(self) -> list[DataSet]:
        """The held-out sets for all models: the recipe's, and each source's own."""
        sets = []
        if self.data.validation is not None:
            sets.append(self._data_set(self._common_held_out(), self.data.validation))
        for name, source in self.sources.items():
            if source.data is not None and source.data.validation is not None:
                sets.append(self._data_set(f"{name}-held-out", source.data.validation))
        return sets

    def validation_sets_of(self, target: str) -> list[DataSet]:
        """The held-out sets of a target's sources (their own, else the recipe's); of all sources for plain fine-tuning."""
        by_name = {data.name: data for data in self.validation_sets()}
        wanted = {
            name for source in self.teachers()[target] or self.sources for name in self._held_out_names(source)[:1]
        }
        return [data for name, data in by_name.items() if name in wanted]

    def _held_out_names(self, source: str) -> list[str]:
        """The names of a source's held-out sets, its own first."""
        existing = {data.name for data in self.validation_sets()}
        return [name for name in (f"{source}-held-out", self._common_held_out()) if name in existing]

    def _common_held_out(self) -> str:
        return f"{(self.data.validation and self.data.validation.name) or COMMON}-held-out"

    def validation_set(self, source: str) -> DataSet:
        """The held-out set of `source`: its own, else the recipe's. Raises RecipeError if there is none."""
        for name in self._held_out_names(source):
            return {data.name: data for data in self.validation_sets()}[name]
        raise RecipeError(f"source {source} has no held-out conversations: set data.validation")

    def capture_for(self, name: str) -> Capture:
        """The capture settings of a model, with a source's own."""
        if name == PIVOT:
            return self.capture
        own = self.sources[name].capture.model_dump(exclude_none=True)
        return self.capture.model_copy(update=own)
