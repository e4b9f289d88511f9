"""The paper's recipe, on its six sources in small: prepare, capture, align to OpenChat's tokens, fuse, merge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import paper
import texts
from cases import each
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.pipeline import build_steps, load_recipe
from test_spans import BYTE_OF

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[1] / "examples" / "fusechat-7b.yaml"
ODD = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Schreibe „Größe“ auf 日本語 und 🙂."},
    {"role": "assistant", "content": "  大きさ, größer: 👩‍👩‍👧 12345 \n\n\tdef f(x):\n        return x  # ok"},
    {"role": "user", "content": "And مرحبا?"},
    {"role": "assistant", "content": "Привет! <s> is no token here.\n"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipe and the work directory `work` of its finished run."""
    directory = tmp_path_factory.mktemp("paper")
    write_data(directory)
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    recipe["pivot"] = str(paper.build("pivot", directory / "models" / "pivot"))
    for name in recipe["sources"]:
        recipe["sources"][name] = str(paper.build(name, directory / "models" / name))
    recipe["data"]["train"], recipe["device"] = "train.jsonl", "cpu"
    recipe["data"]["validation"] = "held-out.jsonl"
    recipe["evaluate"] = {"answers": 0}
    recipe["fuse"]["training"] |= {"learning_rate": 1e-3, "fsdp": False, "bf16": "auto"}
    recipe["capture"]["dtype"] = recipe["evaluate"]["dtype"] = "auto"  # minutes less on a CPU without bfloat16
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run(load_recipe(directory / "recipe.yaml"), directory / "work")
    return directory


def write_data(directory: Path) -> None:
    lines = [json.dumps({"messages": messages}) for messages in [*texts.conversations()[:13], ODD]]
    (directory / "train.jsonl").write_text("\n".join([*lines[:10], lines[13]]) + "\n", encoding="utf-8")
    (directory / "held-out.jsonl").write_text("\n".join(lines[10:13]) + "\n", encoding="utf-8")


def counts(place: Path, step: str) -> dict[str, Any]:
    return dict(json.loads((place / "work" / step / "manifest.json").read_text())["counts"])


def prepared(place: Path, name: str) -> PreparedSet:
    return PreparedSet(place / "work" / "prepare" / name / "data")


def test_every_step_is_done_and_no_conversation_is_left_out(place: Path) -> None:
    steps = build_steps(load_recipe(place / "recipe.yaml"), place / "work")
    assert {step.state()[0] for step in steps} == {"done"}
    for name in paper.SOURCES:
        found = counts(place, f"prepare/{name}/data")
        assert (found["conversations"], found["rejected"]) == (11, {}), name
        assert found.get("system_folded", 0) == (1 if name == "mixtral" else 0), "its template alone has no system role"
        assert counts(place, f"capture/{name}/data")["positions"] == found["response_tokens"], name


@each("name", paper.SOURCES)
def test_a_model_sees_what_its_own_template_writes(place: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "models" / name)
    lines = [json.loads(line)["messages"] for line in (place / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    folded = [{"role": "user", "content": f"{ODD[0]['content']}\n\n{ODD[1]['content']}"}, *ODD[2:]]
    for messages, found in zip(lines, prepared(place, name), strict=True):
        asked = folded if name == "mixtral" and messages == ODD else messages
        expected = tokenizer.apply_chat_template(asked, tokenize=True, return_dict=False)
        assert found.input_ids.tolist() == expected


@each("name", paper.SOURCES)
def test_every_response_token_has_its_own_bytes(place: Path, name: str) -> None:
    """The bytes that a token's piece spells stand where its span says, and the spans tile each response."""
    tokenizer = AutoTokenizer.from_pretrained(place / "models" / name)
    lines = [json.loads(line)["messages"] for line in (place / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for messages, found in zip(lines, prepared(place, name), strict=True):
        answers = [message["content"].encode() for message in messages if message["role"] == "assistant"]
        ends = [0] * len(answers)
        for token, response, begin, end, last in zip(
            found.gold, found.response, found.begin, found.end, found.end_of_turn, strict=True
        ):
            if last:
                assert ends[response] == len(answers[response]) == begin == end
                continue
            piece = spelt(tokenizer.convert_ids_to_tokens(int(token)), byte_level=name == "qwen")
            if begin == end and piece == b" ":  # the dummy prefix of what follows a special token
                continue
            if begin > 0 and len(piece) == end - begin + 1 and piece.startswith(b" "):  # the same, as a part of a token
                piece = piece[1:]
            assert piece[max(-begin, 0) :] == answers[response][max(begin, 0) : end]
            assert max(begin, 0) == ends[response]
            ends[response] = end
        assert ends == [len(answer) for answer in answers]


def spelt(piece: str, *, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(BYTE_OF[letter] for letter in piece)
    if piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


@each("name", paper.SOURCES)
def test_what_is_captured_is_what_the_model_says(place: Path, name: str) -> None:
    dtype = getattr(torch, load_recipe(place / "recipe.yaml").capture.dtype)
    model = AutoModelForCausalLM.from_pretrained(place / "models" / name, dtype=dtype)
    stored = open_distributions(place / "work" / "capture" / name / "data")
    for found in list(prepared(place, name))[-2:]:
        with torch.inference_mode():
            logits = model(torch.tensor(found.input_ids.tolist())[None]).logits[0].float()
        logprobs = logits.log_softmax(-1)[torch.from_numpy(found.position - 1).long()]
        best = logprobs.topk(10).values.exp().numpy()
        rows = stored[found.id]
        np.testing.assert_allclose(rows.probabilities, best, rtol=0.1, atol=0.005)
        gold = -logprobs[torch.arange(len(found)), torch.from_numpy(found.gold).long()].numpy()
        np.testing.assert_allclose(rows.nll, gold, rtol=0.02, atol=0.1)


def test_all_say_it_in_the_tokens_of_openchat(place: Path) -> None:
    """Starling has the same tokens and template, so that nothing changes but that a token like <0x24> is written as the other one
    of its bytes, $; of the others most positions are aligned."""
    tokenizer = AutoTokenizer.from_pretrained(place / "models" / "pivot")

    def letters(token: int) -> bytes:
        return spelt(tokenizer.convert_ids_to_tokens(int(token)), byte_level=False)

    for name in (name for name in paper.SOURCES if name != "pivot"):
        aligned = open_distributions(place / "work" / "align" / name)
        figures = json.loads((place / "work" / "align" / name / "figures.json").read_text())
        assert figures["conversations"] == 11
        least = (
            0.5 if paper.SOURCES[name].vocabulary in paper.LIKE else 0.8
        )  # they have learnt other words than a real one
        assert figures["coverage_of_positions"] > least, name
        assert all(aligned[found.id].ids.max() < len(tokenizer) for found in prepared(place, "pivot"))
    captured = open_distributions(place / "work" / "capture" / "starling" / "data")
    aligned = open_distributions(place / "work" / "align" / "starling")
    for found in prepared(place, "pivot"):
        own, carried = captured[found.id], aligned[found.id]
        for row in range(len(found)):
            if found.begin[row] < 0 or (found.begin[row] == found.end[row] and not found.end_of_turn[row]):
                continue  # what cannot follow the template's space is cut there; a dummy prefix stands for no bytes
            before, after = (
                {
                    letters(each): probability
                    for each, probability in zip(rows.ids[row], rows.probabilities[row], strict=True)
                    if probability > 0
                }
                for rows in (own, carried)
            )
            assert after == pytest.approx(before, rel=5e-3)


def test_every_target_learns_and_the_fused_model_is_an_openchat(place: Path) -> None:
    for name in (name for name in paper.SOURCES if name != "pivot"):
        lines = (place / "work" / "fuse" / name / "losses.jsonl").read_text().splitlines()
        losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
        assert losses[-1] < losses[0] - 0.1, name
    fused = place / "work" / "merge" / "model"
    model, pivot = (AutoModelForCausalLM.from_pretrained(path) for path in (fused, place / "models" / "pivot"))
    assert type(model) is type(pivot)
    assert type(model).__name__ == "MistralForCausalLM"
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == {
        name: tuple(weight.shape) for name, weight in pivot.state_dict().items()
    }
    assert any(not torch.equal(model.state_dict()[name], weight) for name, weight in pivot.state_dict().items())
    text = AutoTokenizer.from_pretrained(fused).apply_chat_template(
        ODD[1:2], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|end_of_turn|>GPT4 Correct Assistant:")
