"""The stage `generate` in a plan: what each author answers, what its steps take, and the sets of conversations that come of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.data.conversations import DataSet
from fusechat.generate.judge import MOST, ToJudge, text_for
from fusechat.generate.stage import Authors, authors
from fusechat.models.asking import Asking
from fusechat.models.client import Estimate as Calls
from fusechat.models.verify import needs_reference
from fusechat.plan import generate as estimates
from fusechat.plan import memory
from fusechat.plan.answers import Answers, Asked, ask, ask_server, expected, join, stored
from fusechat.plan.devices import Device
from fusechat.plan.estimate import Estimate, Model
from fusechat.plan.sampling import Texts, count, read_texts
from fusechat.recipe.evaluate import SECONDS
from fusechat.recipe.generate import Generate, chosen_set
from fusechat.recipe.schema import PIVOT, Recipe
from fusechat.run.steps import Step
from fusechat.run.units import amount, duration, percent

REWARD = "generate.choose.reward"  # what the reward model is called here
_SHOWN = 3
_FAR = 1.5  # times the expected time, from where the longest possible is told


class Generation:
    """`models`, `templates`: by name, the reward model's as `REWARD`; `texts`: prompts by their set's name; `times`: how often they
    count; `states`: what a run left of the stage, by the steps' names."""

    def __init__(
        self,
        recipe: Recipe,
        workdir: Path,
        device: Device,
        *,
        models: Mapping[str, Model],
        templates: Mapping[str, Any],
        texts: Mapping[str, Texts],
        times: float,
        states: Mapping[str, str],
    ) -> None:
        assert recipe.generate is not None
        self.recipe, self.workdir, self.device, self.times = recipe, workdir, device, times
        self.models, self.templates, self.states = models, templates, states
        self.how: Generate = recipe.generate
        self._sets = texts
        self.steps: Authors = authors(recipe, workdir)
        self.prompts = {
            name: join([texts[data.name] for data in recipe.read_sets(name)]) for name in self.steps.answers
        }
        self.asked = {name: self._ask(name) for name in self.prompts}
        self.answers = {name: self._answer(name) for name in self.prompts}
        self.estimates: list[Estimate] = []
        self.unscored: list[str] = []

    def _ask(self, name: str) -> Asked:
        if name not in self.models:
            return ask_server(self.prompts[name], self._tokenizer(name))
        return ask(self.prompts[name], Asking(self.recipe.chat_model(name), self.templates[name]))

    def _tokenizer(self, name: str) -> Any:
        return self.templates.get(name, self.templates[PIVOT]).tokenizer

    def _answer(self, name: str) -> Answers:
        step, prompts, tokenizer = self.steps.answers[name], self.prompts[name], self._tokenizer(name)
        there = self.states.get(step.name) in ("done", "partial")
        found = stored(prompts, step.directory, tokenizer, self.how, self.times) if there else None
        return found or expected(prompts, self.asked[name], tokenizer, self.how, self.times)

    def estimate(self, step: Step, first: Callable[[], bool]) -> Estimate:
        """`first`: whether no model was opened before."""
        who, _, what = step.name.partition("/")
        rewards = step.directory.parent == self.workdir / estimates.STAGE / "rewards"
        if step.name == "chosen":
            scorers = len({scorer for scorer, _ in self.steps.scores})
            number, chosen = self._prompts(), sum(self.chosen.values())
            return estimates.choose(self.answers.values(), self.estimates, number, chosen, scorers)
        if rewards:
            found = self._scores(step.name, REWARD, what, first)
        elif what == "answers":
            found = self._answers(step.name, who, first)
        else:
            found = self._scores(step.name, who, what.partition("/")[2], first)
        if who in self.models or rewards:
            sizes = {model.shape.directory: model.tokenizer for model in self.models.values()}
            found = replace(found, memory=found.memory + memory.tokenizers(list(sizes.values()), self.device))
        self.estimates.append(found)
        return found

    def _answers(self, name: str, who: str, first: Callable[[], bool]) -> Estimate:
        asked, answers = self.asked[who], self.answers[who]
        if who not in self.models:
            return estimates.served(name, asked, answers, self.how, self.recipe.capture.shard_conversations)
        capture = self.recipe.capture_for(who)
        return estimates.answer(name, self.models[who], asked, answers, self.how, capture, self.device, first=first())

    def _scores(self, name: str, model: str, author: str, first: Callable[[], bool]) -> Estimate:
        reward = model == REWARD
        capture = self.recipe.capture if reward else self.recipe.capture_for(model)
        most = self.models[model].shape.positions if reward else self.recipe.data.max_length
        counted = count(self.answers[author].texts, self.templates[model], max_length=most or 1 << 30)
        if reward:
            counted = replace(counted, rows=counted.rows * 0)
            capture = capture.model_copy(update={"device_map": None, "backend": "transformers", "url": None})
        left_out = sum(counted.rejected.values())
        if left_out:
            why = "; ".join(list(counted.rejected)[:_SHOWN])
            share = percent(left_out / (left_out + counted.conversations))
            self.unscored.append(f"generate {name}: {share} of the answers have no value: {why}")
        return estimates.score(name, self.models[model], counted, capture, self.device, first=first())

    # -- what is chosen -------------------------------------------------------------------------------------------------

    def _prompts(self) -> float:
        """Different ones, of all authors."""
        sets = {data.name for name in self.prompts for data in self.recipe.read_sets(name)}
        return self.times * sum(self._sets[name].conversations for name in sets)

    @cached_property
    def chosen(self) -> dict[str, float]:
        """How many answers of each author are chosen: each prompt that has candidates has one, of each of their authors equally
        often."""
        found = dict.fromkeys(self.prompts, 0.0)
        sets = dict.fromkeys(data for name in self.prompts for data in self.recipe.read_sets(name))
        for data in sets:
            shares = {
                name: self.answers[name].share
                for name in self.prompts
                if data in self.recipe.read_sets(name) and self.how.choose.source in (None, name)
            }
            any_ = 1 - math.prod(1 - share for share in shares.values())
            number = self.times * self._sets[data.name].conversations * any_ * self.how.keep
            for name, share in shares.items():
                found[name] += number * share / max(sum(shares.values()), 1e-9)
        return found

    def texts(self, sets: list[DataSet]) -> dict[str, Texts]:
        """Sets of chosen answers, by their names: those that were chosen, or that are expected."""
        if self.states.get("chosen") == "done":
            found = {data.name: read_texts(data.within(self.workdir)) for data in sets}
            return {key: replace(one, conversations=one.conversations * self.times) for key, one in found.items()}
        own = {name: self._texts(name) for name in self.prompts}
        nothing = Texts(chosen_set(), 0, ())
        together = join([one for one in own.values() if one.sample] or [nothing])
        return {
            data.name: replace(together if data.author is None else own.get(data.author, nothing), data=data)
            for data in sets
        }

    def _texts(self, name: str) -> Texts:
        """The answers of one author that are expected to be chosen; of several to one prompt the sample holds the first."""
        texts = self.answers[name].texts
        first = {one.messages[:-1]: one for one in reversed(texts.sample)}
        sample = tuple(one for one in texts.sample if first[one.messages[:-1]] is one)
        return replace(texts, conversations=self.chosen[name], sample=sample)

    # -- what is told ---------------------------------------------------------------------------------------------------

    def found(self) -> tuple[list[str], list[str]]:
        """Problems and notes."""
        problems, notes = self._of_prompts()
        notes += self._of_lengths()
        if self.states.get("chosen") != "done":
            notes.append(
                "generate: it is assumed that no two answers to a prompt are alike, and that those of each source are chosen "
                "equally often"
            )
        return problems, notes + self.unscored + self._of_calls()

    def _of_prompts(self) -> tuple[list[str], list[str]]:
        problems, notes, reasons = [], [], list[str]()
        for name, asked in self.asked.items():
            number = sum(asked.refused.values())
            whole = number + len(asked.able)
            if number:
                why = "; ".join(reason for reason, _ in asked.refused.most_common(_SHOWN))
                reasons.append(why)
                notes.append(f"{name}: {percent(number / whole)} of the prompts have no answer of it: {why}")
            short = int((asked.lengths + self.how.max_new_tokens > asked.room).sum()) if asked.room else 0
            if short:
                notes.append(
                    f"{name}: takes {asked.room} tokens; {percent(short / whole)} of the prompts leave less than "
                    f"generate.max_new_tokens, {self.how.max_new_tokens}, to an answer"
                )
        if not any(asked.able for asked in self.asked.values()):
            problems.append(
                f"generate: no prompt can be answered: {'; '.join(dict.fromkeys(reasons)) or 'there is none'}"
            )
        verifier = self.how.choose.verifier
        if verifier is not None and needs_reference(verifier):
            lacking = [where for one in self._sets.values() for where in one.unanswered]
            for where in lacking[:_SHOWN]:
                problems.append(f"{where}: holds no answer, which the verifier {verifier} needs")
            if len(lacking) > _SHOWN:
                problems.append(f"generate: {len(lacking)} prompts hold no answer, which the verifier {verifier} needs")
        return problems, notes

    def _of_lengths(self) -> list[str]:
        """How long answers are taken to be, and why."""
        said = {
            "disk": "generate: answers that are on disk stand for all",
            "file": "generate: answers are expected to be those of the data file",
            "assumed": "generate: the data file holds no answers; half of generate.max_new_tokens is assumed",
        }
        notes = []
        for origin, why in said.items():
            means = [
                f"{name} {one.tokens / max(1.0, one.answers):.1f}"
                + (f" ({amount(one.have)} of {amount(one.answers)})" if one.have and one.have < one.answers else "")
                for name, one in self.answers.items()
                if one.origin == origin
            ]
            if means:
                notes.append(f"{why}; tokens of an answer: {', '.join(means)}")
        for step in self.estimates:
            longest = step.details.get("at_most_seconds", 0.0)
            author = step.name.partition("/")[0]
            if longest > _FAR * step.seconds and self.answers[author].origin != "disk":
                notes.append(
                    f"{step.label}: a batch lasts as long as its longest answer; where one in each does not end, "
                    f"{duration(longest)}, not {duration(step.seconds)}"
                )
        return notes

    def _of_calls(self) -> list[str]:
        """What servers and verifiers do, which take what time they take."""
        notes = []
        for step in self.estimates:
            if "calls" in step.details:
                server, told = self.recipe.sources[step.name.partition("/")[0]].server, step.details
                assert server is not None
                notes.append(
                    f"{step.label}: {told['calls']:,} calls of {server.model} at {server.url}, about {told['read']:,} tokens to "
                    f"read and {told['written']:,} to write; their time is not known"
                )
        candidates = round(sum(one.texts.conversations for one in self.answers.values()))
        choose = self.how.choose
        if choose.judge is not None:
            judge = f"{choose.judge.model} at {choose.judge.url}"
            calls = Calls(judge, candidates, 0, math.ceil(self._judged_bytes() / 4), candidates * MOST)
            notes.append(f"generate chosen: {calls}; their time is not known")
        if choose.verifier is not None:
            notes.append(
                f"generate chosen: {candidates:,} answers are verified, which may take {choose.seconds or SECONDS:g} s each; all "
                "are taken to be right"
            )
        return notes

    def _judged_bytes(self) -> float:
        """What a judge reads of all candidates."""
        found = 0.0
        for name, one in self.answers.items():
            beside = self.prompts[name].beside
            for conversation in one.texts.sample:
                prompt = replace(conversation, messages=conversation.messages[:-1])
                told = ToJudge(prompt, conversation.messages[-1].content, beside.get(prompt.id))
                found += len(text_for(told).encode()) * one.texts.conversations / len(one.texts.sample)
        return found
