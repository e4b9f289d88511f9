"""A plan: the very steps that a run would do, each with what it takes. For it models' configurations, tokenizers and a sample of
the data are read, and no weights."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

from fusechat.errors import FuseChatError, RecipeError
from fusechat.fuse import stage as fuse
from fusechat.models.chat_model import ChatModel
from fusechat.models.gguf_parallel import convert_together
from fusechat.pipeline import build_steps, evaluation_texts, of_day
from fusechat.plan import checks, estimate
from fusechat.plan.arguments import training_of
from fusechat.plan.devices import Device
from fusechat.plan.estimate import Estimate, Model
from fusechat.plan.generate import STAGE
from fusechat.plan.generation import REWARD, Generation
from fusechat.plan.metadata import WithoutWeights
from fusechat.plan.sampling import Counted, Texts, count, read_texts
from fusechat.plan.shapes import shape_of
from fusechat.plan.table import totals
from fusechat.prepare.overlap import Overlap, find_overlap
from fusechat.prepare.stage import OVERLAP, rules
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.recipe.sections import ModelSpec
from fusechat.run.steps import Step

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """`steps` in the order of a run; `problems`: what would end it; `notes`: what its user should know."""

    name: str
    device: Device
    steps: list[Estimate]
    problems: list[str]
    notes: list[str]


class _Planned(Recipe):
    def _chat_model(self, name: str, spec: ModelSpec) -> ChatModel:
        return _unread(super()._chat_model(name, spec))


_unread = lru_cache(maxsize=None)(WithoutWeights.of)


def make_plan(recipe: Recipe, workdir: Path, device: Device, *, conversations: int | None = None) -> Plan:
    """What `recipe` takes on `device`. `conversations`: as if the training sets had so many together, of the same kind. Raises
    FuseChatError with all models and data sets of which nothing can be known."""
    if recipe.rounds is not None:
        raise RecipeError("rounds: cannot be planned yet; --set rounds=null plans what comes before them")
    recipe = of_day(recipe, workdir)
    planned = _Planned.model_construct(**{name: getattr(recipe, name) for name in Recipe.model_fields})
    return _Planner(planned, workdir, device, conversations, _states(recipe, workdir)).plan()


def _states(recipe: Recipe, workdir: Path) -> dict[str, str]:
    """What is there of each step of `generate`, if anything is."""
    if recipe.generate is None or not (workdir / STAGE).is_dir():
        return {}
    return {step.name: step.state()[0] for step in build_steps(recipe, workdir) if step.stage == STAGE}


class _Planner:
    def __init__(
        self, recipe: Recipe, workdir: Path, device: Device, conversations: int | None, states: dict[str, str]
    ) -> None:
        self.recipe, self.workdir, self.device = recipe, workdir, device
        self.steps = build_steps(recipe, workdir)
        self.chat_models = {name: recipe.chat_model(name) for name in (PIVOT, *recipe.models)}
        if (judge := recipe.reward_model()) is not None:
            self.chat_models[REWARD] = judge
        training = recipe.all_read_sets()
        wanted = {step.name.partition("/")[2] for step in self.steps if step.stage == "prepare"}
        held_out = [data for data in recipe.validation_sets() if data.name in wanted]
        self.compared = training, evaluation_texts(recipe)
        convert_together([one.reference for one in self.chat_models.values()])
        failed: list[str] = []
        self.models = _each(self.chat_models, self._model, failed)
        self.templates = _each(self.chat_models, lambda name: self.chat_models[name].template(), failed)
        found = _each((*training, *held_out), read_texts, failed)
        self.texts: dict[str, Texts] = {data.name: texts for data, texts in found.items()}
        anywhere = recipe.model_copy(update={"device": "cpu"})
        judges: tuple[Callable[[Recipe], None], ...] = (partial(fuse.check, here=False), fuse.check_pivot)
        _each(judges, lambda check: check(anywhere), failed)
        if failed:
            raise FuseChatError(*dict.fromkeys(failed))
        have = sum(self.texts[data.name].conversations for data in training)
        more = conversations / max(1, have) if conversations else 1.0
        self.times = {data.name: more for data in training}
        self.counted: dict[str, Counted] = {}
        self.overlap: Overlap | None = None
        self.begun: set[tuple[str, ...]] = set()
        self.generation: Generation | None = None
        if recipe.generate is not None:
            told = {"models": self.models, "templates": self.templates, "texts": self.texts, "states": states}
            self.generation = Generation(recipe, workdir, device, times=more, **told)
            self.texts = self.texts | self.generation.texts(recipe.all_training_sets())
            self.begun |= {("prepare", name) for name in self.models}  # their tokenizers are open by then
        self.training = training_of(dict(recipe.fuse.training), seed=recipe.seed, processes=device.count)

    def plan(self) -> Plan:
        steps = [self._estimate(step) for step in self.steps]
        return Plan(self.recipe.name, self.device, steps, *self._found(steps))

    def _model(self, name: str) -> Model:
        chat_model = self.chat_models[name]
        trust, lora = chat_model.reference.trust_remote_code, self.recipe.fuse.lora if name == PIVOT else None
        shape = shape_of(chat_model.directory, trust_remote_code=trust, lora=lora, head=name != REWARD)
        began = time.perf_counter()
        chat_model.tokenizer()
        opening = time.perf_counter() - began
        weights = sum(file.stat().st_size for file in chat_model.directory.glob("*.safetensors"))
        tokenizer = sum(file.stat().st_size for file in chat_model.directory.glob("*token*") if file.is_file())
        return Model(shape, weights or shape.stored, tokenizer, opening)

    def _estimate(self, step: Step) -> Estimate:
        return {
            STAGE: self._generate,
            "prepare": self._prepare,
            "capture": self._capture,
            "align": self._align,
            "fuse": self._fuse,
            "merge": self._merge,
            "evaluate": self._evaluate,
            "report": lambda _: estimate.report(self.models.values()),
        }[step.stage](step)

    def _generate(self, step: Step) -> Estimate:
        assert self.generation is not None
        return self.generation.estimate(step, lambda: self._first("capture"))

    def _prepare(self, step: Step) -> Estimate:
        if step.name == OVERLAP:
            return self._overlap()
        who, _, data = step.name.partition("/")
        texts = self.texts[data]
        found = count(texts, self.templates[who], times=self.times.get(data, 1.0), **rules(self.recipe, texts.data))
        self.counted[step.name] = found
        return estimate.prepare(step.name, self.models[who], found, first=self._first("prepare", who))

    def _overlap(self) -> Estimate:
        """Looked for here and now: it is soon done, and tells what should be known before."""
        began = time.perf_counter()
        self.overlap = find_overlap(*self.compared)
        times = max(self.times.values(), default=1.0)
        return estimate.overlap(len(self.overlap.hits), (time.perf_counter() - began) * times)

    def _first(self, *what: str) -> bool:
        """Whether this is the first step of its kind, which starts something up."""
        new = what not in self.begun
        self.begun.add(what)
        return new

    def _capture(self, step: Step) -> Estimate:
        who = step.name.partition("/")[0]
        return estimate.capture(
            step.name,
            self.models[who],
            self.counted[step.name],
            self.recipe.capture_for(who),
            self.device,
            first=self._first("capture"),
        )

    def _align(self, step: Step) -> Estimate:
        source = self.recipe.capture_for(step.name)
        own = [above.name for above in step.upstream.values() if above.stage == "prepare"]
        rows, taught = (
            [self.counted[name] for name in own if name.startswith(f"{PIVOT}/") is mine] for mine in (True, False)
        )
        k = self.recipe.align.top_k or min(source.top_k, self.models[step.name].shape.vocabulary)
        return estimate.align(
            step.name,
            (self.models[PIVOT], self.models[step.name]),
            rows,
            k,
            sum(one.kinds for one in taught),
            first=self._first("align"),
        )

    def _fuse(self, step: Step) -> Estimate:
        own = {key: above.name for key, above in step.upstream.items() if above.stage == "prepare"}
        pivot = {key: name for key, name in own.items() if name.startswith(f"{PIVOT}/")}
        sets, held_out = (
            {
                key.rpartition("/")[0]: self.counted[name]
                for key, name in pivot.items()
                if key.endswith("/held_out") is measured
            }
            for measured in (False, True)
        )
        weighted = [one.times(self.recipe.weights()[name]) for name, one in sets.items()]
        teachers = self.recipe.teachers()[step.name]
        k = max((self.recipe.capture_for(name).top_k for name in teachers), default=0)
        return estimate.fuse(
            *(step.name, self.models[PIVOT], weighted, list(held_out.values()), self.training, k, self.device),
            first=self._first("fuse"),
        )

    def _merge(self, step: Step) -> Estimate:
        return estimate.merge(self.models[PIVOT], len(step.upstream), self.recipe.merge.dtype, self.device)

    def _evaluate(self, step: Step) -> Estimate:
        answers = step.name.startswith("answers ")
        who = step.name.removeprefix("answers ")
        if who == "results":
            return estimate.results(len(step.upstream), len(self.recipe.validation_sets()))
        source = who.removeprefix("source-") if who.startswith("source-") else PIVOT
        model = self.models[source] if who == PIVOT or source != PIVOT else self.models[PIVOT].as_target()
        spread = 1 if self.recipe.capture_for(source).device_map is None else self.device.count
        if answers:
            prompts = self._asked()
            return estimate.answer(step.name, model, prompts, self.recipe.evaluate, self.device, spread=spread)
        sets = [self.counted[above.name] for above in step.upstream.values() if above.stage == "prepare"]
        return estimate.score(step.name, model, sets, self.recipe.evaluate, self.device, spread=spread)

    def _asked(self) -> float:
        """How many held-out prompts each model answers: those that the report shows, or all that a verifier judges."""
        evaluate = self.recipe.evaluate
        sizes = [self.texts[data.name].conversations for data in self.recipe.validation_sets() if evaluate.verifier]
        return sum(min(size, evaluate.verifier_limit or size) for size in sizes) or evaluate.answers

    def _found(self, steps: list[Estimate]) -> tuple[list[str], list[str]]:
        """Problems and notes."""
        recipe, pairs = self.recipe, [checks.of_records(texts) for texts in self.texts.values()]
        pairs += [
            checks.of_conversations(
                name.partition("/")[0], self.texts[name.partition("/")[2]], counted, self._of(name), recipe.data
            )
            for name, counted in self.counted.items()
        ]
        pairs += [self.generation.found()] if self.generation is not None else []
        pairs.append(checks.of_disk(self.workdir, totals(steps)["fullest"], self._to_fetch(), self.device))
        pairs.append(checks.of_memory(steps, self.device))
        pairs.append(checks.of_launch(recipe, self.device))
        problems = [line for found, _ in pairs for line in found]
        for name, model in self.models.items():
            problems += checks.of_template(name, self.templates[name], model.shape.embedding_rows)
        for name, counted in self.counted.items():
            who, _, data = name.partition("/")
            rows = self.models[who].shape.embedding_rows
            problems += checks.of_vocabulary(who, data, self.templates[who].tokenizer, counted, rows)
        devices, here = self.device.count, self.device.measured
        problems += checks.of_backend(recipe, (PIVOT, *recipe.models), devices=devices, here=here)
        for name in recipe.models if here else ():
            problems += checks.of_package(recipe, name, recipe.chat_model(name).directory)
        if here:
            problems += checks.of_verifiers(recipe, ("generate", "evaluate"))
        if self.generation is not None and here:
            problems += checks.of_servers(recipe, [name for name in recipe.sources if name not in recipe.models])
        if REWARD in self.chat_models:
            problems += checks.of_reward(self.chat_models[REWARD])
        notes = [line for _, found in pairs for line in found] + checks.of_padding(steps, self.training.apart)
        (problems if recipe.data.on_overlap == "stop" else notes).extend(
            self.overlap.sentences() if self.overlap else []
        )
        fuse, evaluate = self.training.dtype, recipe.evaluate.dtype
        types = {"capture.dtype": recipe.capture.dtype, "evaluate.dtype": evaluate, "fuse.training.bf16": fuse}
        notes += checks.of_precision(types, self.device)
        notes += checks.of_licences(self.chat_models)
        return list(dict.fromkeys(problems)), list(dict.fromkeys(notes))

    def _of(self, name: str) -> Model:
        return self.models[name.partition("/")[0]]

    def _to_fetch(self) -> float:
        """Bytes of models that are not on this machine, as far as that can be known."""
        return sum(
            model.stored
            for name, model in self.models.items()
            if not any(self.chat_models[name].directory.glob("*.safetensors"))
        )


def _each(items: Iterable[K], work: Callable[[K], T], failed: list[str]) -> dict[K, T]:
    """What `work` gives of each; of those that fail, their messages go to `failed`."""
    found: dict[K, T] = {}
    for item in items:
        try:
            found[item] = work(item)
        except FuseChatError as error:
            failed += error.messages
    return found
