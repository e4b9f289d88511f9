"""Answers by vLLM are those of Transformers, in this process and by a server; so are the scores of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm installs and tests it", exc_type=ImportError)

from vllm_process import vllm_serving

from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.generator import Generator
from fusechat.models.reference import Reference
from fusechat.models.vllm_answers import VllmAnswers

QUESTIONS = (
    "Hi",
    "What is the capital of France? Please explain.",
    "1 + 1?",
    "Übung macht 🙂",
    "A train travels 60 miles.",
)


def prompts(temperature: float = 0.0, longest: int = 24, **more: Any) -> list[Prompt]:
    return [Prompt(text, (("user", text),), temperature, longest, **more) for text in QUESTIONS]


def chat_model(directory: Path, stop: tuple[str, ...] = ()) -> ChatModel:
    return ChatModel(directory.name, Reference((str(directory),)), stop=stop)


def by_transformers(one: ChatModel, asked: Sequence[Prompt]) -> list[Answer | Missing]:
    found: dict[int, Answer | Missing] = {}
    generator = Generator(one, dtype="float32", device="cpu", batch_tokens=10**6, seed=0)
    generator.answer(asked, lambda index, answer: found.update({index: answer}), [False] * len(asked))
    return [found[index] for index in range(len(asked))]


def by_vllm(one: ChatModel, asked: Sequence[Prompt], url: str | None = None) -> list[Answer | Missing]:
    answers = VllmAnswers(one, asked, dtype="float32", tensor_parallel=1, url=url, seed=0)
    try:
        return answers.answer(asked, lambda amount=1, note="": None)
    finally:
        answers.close()


def assert_same(found: list[Answer | Missing], expected: list[Answer | Missing]) -> None:
    assert found == expected
    assert [one.ids for one in found] == [one.ids for one in expected]  # type: ignore[union-attr]


def stop_of(answers: list[Answer | Missing]) -> str:
    """Two letters that are in one of the answers, not at its beginning."""
    texts = [one.text for one in answers if isinstance(one, Answer)]
    pairs = (text[at : at + 2] for text in texts for at in range(1, len(text) - 1))
    return next(pair for pair in pairs if pair.isascii() and pair.isalnum())


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_in_this_process(kind: str, wide: dict[str, Path]) -> None:
    expected = by_transformers(chat_model(wide[kind]), prompts())
    assert_same(by_vllm(chat_model(wide[kind]), prompts()), expected)
    stop = ("nowhere", stop_of(expected))
    stopped = by_transformers(chat_model(wide[kind], stop), prompts())
    assert stopped != expected
    assert_same(by_vllm(chat_model(wide[kind], stop), prompts()), stopped)


def test_answers_at_a_temperature_are_drawn_by_numbers_of_their_own(wide: dict[str, Path]) -> None:
    one = chat_model(wide["llama"])
    first = by_vllm(one, prompts(1.0))
    assert first == by_vllm(one, prompts(1.0))
    assert first == by_vllm(one, prompts(1.0)[::-1])[::-1]
    assert first != by_vllm(one, prompts(1.0, sample=1))


def test_by_a_server(wide: dict[str, Path], tmp_path: Path) -> None:
    with vllm_serving(wide["llama"], tmp_path / "log", "--max-model-len", "400") as url:
        expected = by_transformers(chat_model(wide["llama"]), prompts())
        assert_same(by_vllm(chat_model(wide["llama"]), prompts(), url), expected)
        stop = ("nowhere", stop_of(expected))
        stopped = by_transformers(chat_model(wide["llama"], stop), prompts())
        assert_same(by_vllm(chat_model(wide["llama"], stop), prompts(), url), stopped)
        long = Prompt("long", (("user", "word " * 500),), 0.0, 12)
        assert by_vllm(chat_model(wide["llama"]), [long], url) == [
            Missing("its prompt leaves no room in the model's 400 tokens")
        ]
