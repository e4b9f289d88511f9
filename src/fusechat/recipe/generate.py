"""The section `generate`, and a source's settings for answering. `problems` finds settings that do not fit together."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_serializer, model_validator

from fusechat.data.conversations import DataSet
from fusechat.errors import FuseChatError
from fusechat.models.client import check_url
from fusechat.models.reference import Reference
from fusechat.recipe import evaluate
from fusechat.recipe.evaluate import Verifier
from fusechat.recipe.sections import PIVOT, ModelSpec, Section, SourceCapture, SourceData, Url

ANSWERS = "answers"  # the target that all authors teach, and the set of chosen answers
CHOSEN = "generate/chosen/conversations.jsonl"  # the path of that set in a work directory
BY_SCORES = ("likelihood", "self", "vote", "random")
Text = Annotated[str, StringConstraints(min_length=1)]


class Server(Section):
    """A model of an OpenAI-compatible server. `key_env`: the environment variable of its key."""

    url: Url
    model: Text
    key_env: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")] | None = None

    @model_validator(mode="after")
    def _is_a_url(self) -> "Server":
        try:
            check_url(self.url, "url", self.key_env or "set key_env")
        except FuseChatError as error:
            raise ValueError(str(error).removeprefix("url: ")) from None
        return self


class SourceSpec(ModelSpec):
    """A source. `stop`: strings that end its answers. `server`: answers in its place, and can do nothing else."""

    data: SourceData | None = None
    capture: SourceCapture = SourceCapture()
    stop: Annotated[list[Text], Field(min_length=1)] | None = None
    server: Server | None = None

    def check_reference(self) -> None:
        """Raises ValueError unless it names exactly one model or server."""
        if self.server is None:
            return super().check_reference()
        beside = self.model_dump(exclude={"data", "stop", "server", "capture"}, exclude_defaults=True)
        beside |= {"capture": True} if self.capture != SourceCapture() else {}
        if beside:
            raise ValueError(f"has a server, which answers only: leave {', '.join(beside)} out")
        return None

    @property
    def label(self) -> str:
        """The model's name for people; of a server, its name there."""
        return self.server.model if self.server else str(self.reference)

    @property
    def reference(self) -> Reference:
        """The model's reference."""
        assert self.server is None, "a server is no model that could be run here"
        return super().reference


class Choose(Section):
    """How one of a prompt's answers is chosen: exactly one key, or in a recipe a bare name of `BY_SCORES`. `seconds`: for a
    verifier to check an answer."""

    by: Literal["likelihood", "self", "vote", "random"] | None = None
    source: str | None = None
    verifier: Verifier | None = None
    seconds: float | None = Field(default=None, gt=0)
    judge: Server | None = None
    reward: ModelSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _full_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in BY_SCORES:
                raise ValueError(f"should be {', '.join(BY_SCORES)}, or a mapping of source, verifier, judge or reward")
            return {"by": value}
        return value

    @model_validator(mode="after")
    def _one_way(self) -> "Choose":
        ways = [name for name in ("by", "source", "verifier", "judge", "reward") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError("should have one key: source, verifier, judge or reward")
        if self.seconds is not None and self.verifier is None:
            raise ValueError("seconds goes with a verifier")
        return self

    @model_serializer
    def _as_written(self) -> Any:
        said = {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}
        for name in ("judge", "reward"):
            if name in said:
                said[name] = said[name].model_dump(exclude_none=True)
        return said.get("by", said)

    @property
    def way(self) -> str:
        """`likelihood`, `self`, `vote`, `random`, `source`, `verifier`, `judge` or `reward`."""
        return self.by or next(name for name in type(self).model_fields if getattr(self, name) is not None)


class Generate(Section):
    """The section `generate`: who answers the prompts, how, and which answer is kept."""

    sources: Annotated[list[str], Field(min_length=1)] | None = None
    samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=512, ge=1)
    choose: Choose = Choose(by="likelihood")
    keep: float = Field(default=1.0, gt=0, le=1)
    targets: Literal["one", "each"] = "one"

    @property
    def scored_by_all(self) -> bool:
        """Whether every model scores every answer, or only its own."""
        way = self.choose.way
        return way in ("likelihood", "vote", "verifier", "judge") or (way == "source" and self.samples > 1)


def answering(sources: Mapping[str, SourceSpec], generate: Generate | None) -> list[str]:
    """The sources that answer prompts, in the recipe's order; none without the section."""
    if generate is None:
        return []
    only = [generate.choose.source] if generate.choose.source else list(sources)
    return generate.sources or only


def own_targets(sources: Mapping[str, SourceSpec], generate: Generate | None) -> dict[str, list[str]]:
    """Default targets with their teachers: one for each source that is a model, or one that all answering sources teach."""
    models = [name for name, source in sources.items() if source.server is None]
    if generate is None or generate.targets == "each":
        return {name: [name] for name in models}
    return {ANSWERS: [name for name in answering(sources, generate) if name in models]}


def chosen_set(author: str | None = None) -> DataSet:
    """The set of answers that a run chose, or of one author's."""
    return DataSet(f"{ANSWERS}-{author}" if author else ANSWERS, CHOSEN, chosen=True, author=author)


def with_author(raw: Any) -> Any:
    """A raw recipe with `function: author`, if all share one target and it sets no function. Other forms are left to validation."""
    generate = raw.get("generate") if isinstance(raw, dict) else None
    fuse = raw.get("fuse", {}) if isinstance(raw, dict) else None
    if not isinstance(generate, dict) or not isinstance(fuse, dict):
        return raw
    if generate.get("targets", "one") != "one" or "function" in fuse:
        return raw
    return {**raw, "fuse": {**fuse, "function": "author"}}


def problems(recipe: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Place and message of each mistake in a recipe whose sections are valid by themselves."""
    yield from evaluate.problems(recipe)
    servers = [name for name, source in recipe.sources.items() if source.server is not None]
    generate = recipe.generate
    if generate is None:
        for name in servers:
            yield ("sources", name, "server"), "answers prompts, for which the recipe needs a section generate"
        if recipe.fuse.function == "author":
            yield ("fuse", "function"), "author: answers have authors where the recipe has a section generate"
        return
    yield from _of_answers(recipe, generate, servers)
    yield from _of_targets(recipe, generate, servers)


def _of_answers(recipe: Any, generate: Generate, servers: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    known, choose = [*recipe.sources, PIVOT], generate.choose
    answer = recipe.answering
    for name in dict.fromkeys(generate.sources or ()):
        if name not in known:
            yield ("generate", "sources"), f"{name} is no source; the recipe has {', '.join(known)}"
    if len(set(answer)) < len(answer):
        yield ("generate", "sources"), "names a source twice"
    if generate.samples > 1 and not generate.temperature:
        yield ("generate", "samples"), f"{generate.samples} at temperature 0 would all be the same: set temperature"
    may = generate.sources or known
    if choose.source is not None and choose.source not in may:
        yield ("generate", "choose", "source"), f"{choose.source} does not answer; choose one of {', '.join(may)}"
    if choose.way == "self":
        for name in servers:
            if name in answer:
                yield ("generate", "choose"), f"self: {name} is a server, which cannot score its answers"
    if choose.way == "random" and generate.keep < 1:
        yield ("generate", "keep"), "nothing tells which of answers chosen at random are the surest"
    for name, weight in recipe.weights().items():
        if weight != 1:
            yield ("data", "train"), f"{name} has a weight; with generate the answers to all prompts are one set"


def _of_targets(recipe: Any, generate: Generate, servers: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    function = recipe.fuse.function
    if generate.targets == "one" and function != "author":
        yield (
            ("fuse", "function"),
            f"{function} compares models, and with generate.targets: one each answer is taught by its author: leave it out, or "
            "set generate.targets: each",
        )
    if generate.targets == "each" and function == "author":
        yield ("fuse", "function"), "author goes with generate.targets: one"
    if generate.targets == "each" and len(servers) == len(recipe.sources):
        yield ("generate", "targets"), "each: no source can teach, for all are servers"
    if generate.targets == "one":
        for kind in ("sources", "targets"):
            if ANSWERS in (name.lower() for name in getattr(recipe, kind)):
                yield (kind, ANSWERS), "this name is taken by the target that learns all chosen answers"
    for name, teachers in recipe.targets.items():
        for teacher in teachers:
            if teacher in servers:
                yield ("targets", name), f"{teacher} is a server, which answers and cannot teach"
            elif function == "author" and teacher not in recipe.answering:
                yield ("targets", name), f"{teacher} does not answer, so that it has no answers to teach"
    made = {data.name.lower() for data in recipe.all_training_sets()} | {ANSWERS}
    for data in recipe.validation_sets():
        if data.name.lower() in made:
            yield ("sources",), f"a source's held-out set would be called {data.name}, as a set of answers: rename it"
