"""Answers of tiny models: batches change nothing, neither does an interruption; what has no room is missing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from cases import each
from fusechat.data.conversations import Message
from fusechat.errors import ModelError
from fusechat.evaluate.answers import Answering
from fusechat.evaluate.subjects import Subject
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.generator import Generator
from fusechat.models.memory import out_of_memory
from fusechat.models.reference import Reference

QUESTIONS = (
    "Hi",
    "What is the capital of France? Please explain.",
    "1 + 1?",
    "Übung macht 🙂",
    "A train travels 60 miles.",
)


def chat_model(models: dict[str, Path], kind: str) -> ChatModel:
    return ChatModel(kind, Reference((str(models[kind]),)), tiny.TEMPLATES[kind])


def prompts(temperature: float = 0.0, longest: int = 12) -> list[Prompt]:
    return [Prompt(str(i), (("user", text),), temperature, longest) for i, text in enumerate(QUESTIONS)]


def answers(generator: Generator, asked: list[Prompt]) -> list[Answer | Missing]:
    found: dict[int, Answer | Missing] = {}
    generator.answer(asked, lambda index, answer: found.update({index: answer}), [False] * len(asked))
    return [found[index] for index in range(len(asked))]


def greedy(model: Any, ids: list[int], stops: set[int], longest: int) -> list[int]:
    """One token after the other, without a cache or a batch."""
    said: list[int] = []
    while len(said) < longest:
        with torch.inference_mode():
            token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token in stops:
            break
        said.append(token)
    return said


@each("kind", tiny.KINDS)
def test_a_batch_gives_what_a_plain_loop_gives(kind: str, models: dict[str, Path], loaded: dict[str, Any]) -> None:
    one = chat_model(models, kind)
    template = one.template()
    found = answers(Generator(one, dtype="float32", device="cpu", batch_tokens=10**6, seed=0), prompts())
    stops = {template.end_of_turn, template.tokenizer.eos_token_id}
    for text, answer in zip(QUESTIONS, found, strict=True):
        ids = template.tokenizer(template.prompt([Message("user", text)]), add_special_tokens=False)["input_ids"]
        expected = greedy(loaded[kind], ids, stops, 12)
        assert isinstance(answer, Answer)
        assert answer.text == template.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert answer.complete == (len(expected) < 12)
        assert answer.tokens == len(expected)


def test_small_batches_give_the_same_greedy_answers(models: dict[str, Path]) -> None:
    together, apart = (
        answers(
            Generator(chat_model(models, "llama"), dtype="float32", device="cpu", batch_tokens=size, seed=0), prompts()
        )
        for size in (10**6, 1)
    )
    assert together == apart


def test_a_temperature_draws_and_the_seed_decides(models: dict[str, Path]) -> None:
    def drawn(seed: int) -> list[Answer | Missing]:
        generator = Generator(chat_model(models, "llama"), dtype="float32", device="cpu", batch_tokens=200, seed=seed)
        return answers(generator, prompts(0.9))

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_prompt_without_room_is_missing_and_the_others_are_not(models: dict[str, Path]) -> None:
    generator = Generator(chat_model(models, "mistral"), dtype="float32", device="cpu", batch_tokens=10**4, seed=0)
    asked = [*prompts()[:1], Prompt("long", (("user", "word " * 2100),), 0.0, 4), *prompts()[1:2]]
    asked.append(
        Prompt("system", (("system", "Be short."), ("user", "Hi")), 0.0, 4)
    )  # refused: goes before the question
    asked.append(Prompt("twice", (("assistant", "x"), ("assistant", "y"), ("system", "?")), 0.0, 4))
    found = answers(generator, asked)
    assert [type(one) for one in found] == [Answer, Missing, Answer, Answer, Missing]
    assert isinstance(found[1], Missing)
    assert "no room in the model's 2048" in found[1].reason
    assert isinstance(found[4], Missing)
    assert "Only user and assistant roles" in found[4].reason


def test_a_long_prompt_takes_no_room_from_those_beside_it(models: dict[str, Path]) -> None:
    generator = Generator(chat_model(models, "llama"), dtype="float32", device="cpu", batch_tokens=10**6, seed=0)
    alone = answers(generator, prompts(longest=40))
    written = (Prompt("long", (("user", "word " * count),), 0.0, 40) for count in range(100, 2000, 3))
    lengths = ((prompt, generator._asking.encode(prompt)) for prompt in written)
    long = next(prompt for prompt, ids in lengths if isinstance(ids, list) and len(ids) > 2048 - 30)
    asked = [long, *prompts(longest=40)]
    found = answers(generator, asked)
    assert found[1:] == alone
    assert isinstance(found[0], Answer)
    assert (found[0].tokens or 0) < 40


def test_a_batch_that_does_not_fit_is_halved(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    generator = Generator(chat_model(models, "llama"), dtype="float32", device="cpu", batch_tokens=10**6, seed=0)
    expected = answers(generator, prompts())
    plain: Callable[..., Any] = generator._generate
    fits = 2

    def tight(tokens: list[list[int]], **how: Any) -> list[Answer]:
        if len(tokens) > fits:
            raise MemoryError
        return plain(tokens, **how)

    monkeypatch.setattr(generator, "_generate", tight)
    assert answers(generator, prompts()) == expected
    assert sum("do not fit in memory together" in line for line in heard) == 2, "5, then 3"
    heard.clear()
    assert answers(generator, prompts()) == expected
    assert heard == [], "it is remembered how many do"
    fits = 0
    with pytest.raises(ModelError, match="one answer does not fit in memory"):
        answers(generator, prompts())
    assert out_of_memory(MemoryError())


def test_an_interrupted_run_gives_the_answers_of_one_that_was_not(models: dict[str, Path], tmp_path: Path) -> None:
    subject = Subject("", "one", chat_model=chat_model(models, "gemma"))

    def run(directory: Path) -> list[Answer | Missing]:
        with Answering(directory, dtype="float32", device="cpu", batch_tokens=120)(subject) as ask:
            return ask(prompts(0.8))

    expected = run(tmp_path / "whole")
    whole = (tmp_path / "whole" / "one" / "answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(QUESTIONS)
    for kept in range(len(lines)):
        file = tmp_path / f"after-{kept}" / "one" / "answers.jsonl"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"".join(lines[:kept]) + lines[kept][:7])  # killed while it wrote the next line
        assert run(file.parents[1]) == expected
        assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_model_is_loaded_only_for_what_is_new(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject("", "one", chat_model=chat_model(models, "llama"))
    answering = Answering(tmp_path, dtype="float32", device="cpu")
    with answering(subject) as ask:
        first = ask(prompts())
        second = ask([dataclasses.replace(prompt, key=f"again/{prompt.key}") for prompt in prompts()])
    assert [one.text for one in first if isinstance(one, Answer)] == [
        one.text for one in second if isinstance(one, Answer)
    ]
    monkeypatch.setattr("fusechat.models.generator.Generator", None)
    with answering(subject) as ask:
        assert ask(prompts()) == first
