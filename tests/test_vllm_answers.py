"""Answers by vLLM, as far as they can be tested without it: what it is asked, and what its tokens say."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from answering import counts, gemma, refused, rows, texts, write_recipe
from fusechat.commands.run import run
from fusechat.errors import FuseChatError
from fusechat.models import vllm_answers
from fusechat.models.answers import Answer, Missing, Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.generator import Generator
from fusechat.models.reference import Reference
from fusechat.models.vllm_answers import VllmAnswers
from fusechat.pipeline import load_recipe
from vllm_like import Engine, serving

QUESTIONS = ("Hi", "What is the capital of France?", "1 + 1?")


def prompts(temperature: float = 0.0, longest: int = 12, **more: Any) -> list[Prompt]:
    return [Prompt(text, (("user", text),), temperature, longest, **more) for text in QUESTIONS]


def chat_model(models: dict[str, Path], stop: tuple[str, ...] = ()) -> ChatModel:
    return ChatModel("llama", Reference((str(models["llama"]),)), stop=stop)


def by_transformers(one: ChatModel, asked: Sequence[Prompt]) -> list[Answer | Missing]:
    found: dict[int, Answer | Missing] = {}
    generator = Generator(one, dtype="float32", device="cpu", batch_tokens=10**6, seed=0)
    generator.answer(asked, lambda index, answer: found.update({index: answer}), [False] * len(asked))
    return [found[index] for index in range(len(asked))]


def opened(one: ChatModel, asked: Sequence[Prompt], url: str | None = None) -> VllmAnswers:
    return VllmAnswers(one, asked, dtype="float32", tensor_parallel=1, url=url, seed=0)


def test_a_server_gives_what_transformers_gives(
    models: dict[str, Path], loaded: dict[str, Any], tokenizers: dict[str, Any]
) -> None:
    engine = Engine(loaded["llama"], tokenizers["llama"])
    text = next(
        one.text for one in by_transformers(chat_model(models), prompts()) if isinstance(one, Answer) and one.text
    )
    with serving(engine) as root:
        for stop in ((), (text[1:3],)):
            one = chat_model(models, stop)
            answers = opened(one, prompts(), f"{root}/v1")
            long = Prompt("long", (("user", "word " * 300),), 0.0, 12)
            found = answers.answer([*prompts(), long], lambda amount=1, note="": None)
            assert found[:3] == by_transformers(one, prompts())
            assert [one.ids for one in found[:3]] == [one.ids for one in by_transformers(one, prompts())]  # type: ignore[union-attr]
            assert found[3] == Missing("its prompt leaves no room in the model's 256 tokens"), (
                "of the server, not its own"
            )
            answers.close()
            assert answers.notes == {"served_at": f"{root}/v1"}
        engine.asked.clear()
        answers = opened(one, prompts(), f"{root}/v1")
        answers.answer(prompts(0.7, top_p=0.9), lambda amount=1, note="": None)
        drawn = [body for body in engine.asked if "seed" in body]
        assert len({body["seed"] for body in drawn}) == 3
        assert {(body["temperature"], body["top_p"]) for body in drawn} == {(0.7, 0.9)}
        answers.close()


class FakeEngine:
    """What `vllm.Engine` is told, and tokens as vLLM gives them, the one that ended them among them."""

    told: dict[str, Any]

    def __init__(self, one: ChatModel, room: Any, **options: Any) -> None:
        self.takes, self.length = room(SimpleNamespace(max_model_len=2048))
        self.who, type(self).told = "it", {"length": self.length, **options}
        self._by = Generator(one, dtype="float32", device="cpu", batch_tokens=10**6, seed=0)

    def parameters(self, **options: Any) -> Any:
        return options

    def generate(self, asked: Sequence[list[int]], parameters: Any) -> list[Any]:
        type(self).told["parameters"] = parameters
        outputs = []
        for ids, one in zip(asked, parameters, strict=True):
            answer = self._by._generate([ids], longest=one["max_tokens"], processors=[])[0]
            end = [one["stop_token_ids"][-1]] if answer.complete else []
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=[*answer.ids, *end])]))
        return outputs

    def close(self) -> None:
        pass


def test_in_this_process_it_is_told_what_to_do(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_answers, "Engine", FakeEngine)
    one = chat_model(models)
    template = one.template()
    asked = [len(template.tokenizer(template.prompt(p.about or _messages(p)))["input_ids"]) for p in prompts()]
    answers = opened(one, prompts())
    assert answers.answer(prompts(), lambda amount=1, note="": None) == by_transformers(one, prompts())
    told = FakeEngine.told
    assert told["length"] == max(asked) + 12, "no more room than is needed"
    assert told["skip_tokenizer_init"] is True
    stops = sorted({template.end_of_turn, template.tokenizer.eos_token_id})
    plain = {"max_tokens": 12, "temperature": 0.0, "stop_token_ids": stops, "detokenize": False}
    assert told["parameters"] == [plain] * 3
    stopped = opened(chat_model(models, ("x",)), prompts())
    stopped.answer(prompts(0.5, sample=1), lambda amount=1, note="": None)
    told = FakeEngine.told
    assert told["skip_tokenizer_init"] is False
    assert [one["stop"] for one in told["parameters"]] == [["x"]] * 3
    assert all(one["detokenize"] for one in told["parameters"])
    assert len({one["seed"] for one in told["parameters"]}) == 3


def _messages(prompt: Prompt) -> Any:
    from fusechat.data.conversations import Message

    return [Message(role, content) for role, content in prompt.messages]


def test_a_run_whose_source_a_vllm_server_has(
    models: dict[str, Path], loaded: dict[str, Any], tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    """The source answers, scores and is captured by the server; its scores are those of Transformers."""
    generate = {"max_new_tokens": 24}
    source = {"model": str(models["llama"]), "stop": ["a", "e", "1", " "], "capture": {"backend": "vllm"}}
    with serving(Engine(loaded["llama"], tokenizers["llama"])) as root:
        source["capture"]["url"] = f"{root}/v1"  # type: ignore[index]
        path = write_recipe(tmp_path, models, sources={"big": source}, generate=generate)
        run(load_recipe(path), tmp_path / "work", until="align")
    plain = {key: value for key, value in source.items() if key != "capture"}
    path = write_recipe(tmp_path / "plain", models, sources={"big": plain}, generate=generate)
    run(load_recipe(path), tmp_path / "plain" / "work", until="generate")
    assert texts(tmp_path / "work") == texts(tmp_path / "plain" / "work")
    one, other = (
        rows(place / "generate/models/big/scores/big") for place in (tmp_path / "work", tmp_path / "plain/work")
    )
    for left, right in zip(one, other or rows(tmp_path / "plain/work/generate/models/pivot/scores/big"), strict=True):
        assert left["nll"] == pytest.approx(right["nll"], rel=1e-5)
    assert counts(tmp_path / "work", "generate/models/big/answers")["served_at"] == f"{root}/v1"


def test_several_processes_are_refused_before_any_work(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FuseChatError, match="run the capture without torchrun"):
        opened(chat_model(models), prompts())
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    sources = {"big": {"model": str(models["llama"]), "capture": {"backend": "vllm"}}, "gemma": gemma(models)}
    assert "vllm is not installed" in refused(write_recipe(tmp_path, models, sources=sources)).replace("vLLM", "vllm")
