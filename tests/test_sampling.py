"""Answers at a temperature: drawn from the model's distribution, each by numbers of its own; where stop strings end them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fusechat.data.conversations import Conversation, Message
from fusechat.models.answers import Answer, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.generator import Generator
from fusechat.models.reference import Reference
from fusechat.models.sampling import GumbelNoise, draw

QUESTIONS = ("Hi", "What is the capital of France?", "1 + 1?", "Übung macht 🙂", "A train travels 60 miles.")


def generator(models: dict[str, Path], kind: str = "llama", stop: tuple[str, ...] = (), **how: Any) -> Generator:
    chat_model = ChatModel(kind, Reference((str(models[kind]),)), tiny.TEMPLATES[kind], stop=stop)
    return Generator(chat_model, dtype="float32", device="cpu", **{"batch_tokens": 10**6, "seed": 0, **how})


def answers(one: Generator, asked: list[Prompt]) -> list[Answer]:
    found: dict[int, Any] = {}
    one.answer(asked, lambda index, answer: found.update({index: answer}), [False] * len(asked))
    assert all(isinstance(answer, Answer) for answer in found.values())
    return [found[index] for index in range(len(asked))]


def prompts(temperature: float = 1.0, longest: int = 12, **more: Any) -> list[Prompt]:
    return [Prompt(text, (("user", text),), temperature, longest, **more) for text in QUESTIONS]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """Chi-squared over 20,000 draws of four tokens; 16.3 is passed once in a thousand times. At temperature 0.5, and with the
    least likely one outside the first 90%."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = logits.repeat(20_000, 1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.9)):
        expected = (logits.double() / temperature).softmax(-1)
        if top_p < 1:
            expected[-1] = 0.0  # 0.644, 0.237, 0.087 make 0.968: the third one is needed for 0.9
            expected /= expected.sum()
        scores: torch.Tensor = rows
        for processor in draw([[number] for number in range(len(rows))], temperature=temperature, top_p=top_p):
            scores = processor(torch.zeros(len(rows), 1, dtype=torch.long), scores)
        seen = torch.bincount(scores.argmax(-1), minlength=4).double()
        assert (seen[expected == 0] == 0).all()
        likely = expected > 0
        assert float(((seen - len(rows) * expected) ** 2 / (len(rows) * expected))[likely].sum()) < 16.3
    assert draw([[0]], temperature=0.0, top_p=1.0) == []


def test_noise_is_finite_however_many_numbers_are_drawn() -> None:
    noise = GumbelNoise([[0]])(torch.zeros(1, 1), torch.zeros(1, 1 << 22))
    assert torch.isfinite(noise).all()


def test_a_row_draws_its_own_numbers_whoever_is_beside_it(models: dict[str, Path]) -> None:
    together = answers(generator(models), prompts())
    assert together == [answers(generator(models), [one])[0] for one in prompts()], (
        "in these models rounding decides nothing"
    )
    assert together[::-1] == answers(generator(models), prompts()[::-1])
    assert together != answers(generator(models, seed=1), prompts())
    again = answers(generator(models), [replace(one, sample=1) for one in prompts()])
    assert all(one != other for one, other in zip(together, again, strict=True))
    assert answers(generator(models), prompts(0.001)) == answers(generator(models), prompts(0.0)), "almost greedy"
    assert answers(generator(models), prompts(top_p=1e-9)) == answers(generator(models), prompts(0.0))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_stop_strings_end_an_answer_and_are_no_part_of_it(kind: str, models: dict[str, Path]) -> None:
    whole = answers(generator(models, kind), prompts(0.0, 40))
    plain = ChatModel(kind, Reference((str(models[kind]),)), tiny.TEMPLATES[kind]).tokenizer()
    tried = 0
    for place, one in enumerate(whole):
        text = plain.decode(list(one.ids), skip_special_tokens=True)
        pairs = (text[at : at + 2] for at in range(1, len(text) - 1))
        stop = next((pair for pair in pairs if pair.isascii() and pair.isprintable() and pair.strip() == pair), None)
        if stop is None:  # nothing but pieces of characters
            continue
        found = answers(generator(models, kind, stop=("nowhere", stop)), prompts(0.0, 40))[place]
        assert found.text == text[: text.index(stop)].strip()
        assert found.complete
        assert plain.decode(list(found.ids), skip_special_tokens=True).strip().startswith(found.text)
        assert len(found.ids) == found.tokens <= len(one.ids)
        assert found.ids == one.ids[: len(found.ids)]
        tried += 1
    assert tried


def test_history_tools_and_variables_are_what_the_template_is_given(models: dict[str, Path]) -> None:
    history = (Message("user", "Hi"), Message("assistant", "Hello!", taught=False), Message("user", "And now?"))
    about = Conversation(history, "here")
    asked = Prompt("one", tuple((one.role, one.content) for one in history), 0.0, 12)
    assert answers(generator(models), [replace(asked, about=about)]) == answers(generator(models), [asked])
    template = (
        "{{ tools and tools[0]['function']['name'] }}{{ mood }}{% for m in messages %}{{ m.role }}{{ m.content }}"
    )
    template += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    chat_model = ChatModel("llama", Reference((str(models["llama"]),)), template)
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    one = Conversation(history, "here", tools=tools, variables={"mood": "glad"})
    assert chat_model.template().prompt(history, one).startswith("look_upgladuserHi")
