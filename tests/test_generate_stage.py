"""The stage `generate`: models answer prompts, score each other's answers, one answer is chosen and teaches."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
import tiny
from answering import WORDS, question, teach, write_prompts
from fusechat.commands.run import run
from fusechat.pipeline import load_recipe

KNOWN = {
    "mistral": {word: said if place < 4 else "Auto" for place, (word, said) in enumerate(WORDS.items())},
    "gemma": {word: said if place >= 2 else "Auto" for place, (word, said) in enumerate(WORDS.items())},
}
TRAINING = {**runs.TRAINING, "num_train_epochs": 20, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def taught(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pivot as it is, and two sources that each know four words of six, and say the same of the other two."""
    root = tmp_path_factory.mktemp("taught")
    sources = {kind: teach(models[kind], root / kind, kind, known) for kind, known in KNOWN.items()}
    return {"llama": models["llama"], **sources}


def write_recipe(directory: Path, taught: dict[str, Path], **changes: Any) -> Path:
    """The llama pivot and two sources that answer six prompts; `changes` replace whole sections."""
    directory.mkdir(parents=True, exist_ok=True)
    write_prompts(directory / "prompts.jsonl")
    runs.write_conversations(directory / "held-out.jsonl", 3)
    recipe = {
        "name": "tiny",
        "pivot": str(taught["llama"]),
        "sources": {"mistral": str(taught["mistral"]), "gemma": gemma(taught)},
        "data": {"train": "prompts.jsonl", "validation": "held-out.jsonl", "max_length": 128},
        "generate": {"max_new_tokens": 16},
        "capture": {"top_k": 6, "dtype": "float32", "shard_conversations": 4, "batch_tokens": 300},
        "align": {"min_mass": 0.0},
        "fuse": {"sft_weight": 0.5, "training": TRAINING},
        "evaluate": {"dtype": "float32", "answers": 0},
        "device": "cpu",
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False), encoding="utf-8")
    return path


def gemma(taught: dict[str, Path]) -> dict[str, Any]:
    return {"model": str(taught["gemma"]), "chat_template": tiny.TEMPLATE}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rows(directory: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(directory.glob("*-*.json")) for row in json.loads(file.read_text())["rows"]]


def counts(workdir: Path, step: str) -> dict[str, Any]:
    return dict(json.loads((workdir / step / "manifest.json").read_text())["counts"])


@pytest.fixture(scope="module")
def finished(taught: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of one whole run."""
    directory = tmp_path_factory.mktemp("generated")
    run(load_recipe(write_recipe(directory, taught)), directory / "work")
    return directory / "work"


def test_each_source_answers_each_prompt(finished: Path, taught: dict[str, Path]) -> None:
    for name, known in KNOWN.items():
        found = rows(finished / "generate/models" / name / "answers")
        assert [row["text"] for row in found] == [known[word] for word in WORDS]
        tokenizer = AutoTokenizer.from_pretrained(taught[name])
        assert [tokenizer.decode(row["tokens"]).strip() for row in found] == [known[word] for word in WORDS]
        assert all(row["complete"] and not row["why"] for row in found)
    files = sorted(file.name for file in (finished / "generate/models/mistral/answers").glob("*.json"))
    assert files == ["answers-00000.json", "answers-00001.json", "manifest.json"], "six prompts, four a shard"


def naive_score(directory: Path, template: str | None, word: str, said: str) -> float:
    """Nats per byte of an answer and its end of turn: one forward pass, tokens found by the template's own text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template or tokenizer.chat_template
    asked = [{"role": "user", "content": question(word)}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).rstrip(" ")
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": said}], tokenize=False)
    end = whole.index(said) + len(said) + len(tokenizer.eos_token)
    ids = tokenizer(whole[:end], add_special_tokens=False)["input_ids"]
    begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(ids[begin:]).replace(tokenizer.eos_token, "").strip() == said
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs[at - 1, ids[at]]) for at in range(begin, len(ids))) / (len(said.encode()) + 1)


def test_every_model_scores_every_answer_as_a_plain_forward_pass_does(finished: Path, taught: dict[str, Path]) -> None:
    for model, kind in (("pivot", "llama"), ("mistral", "mistral"), ("gemma", "gemma")):
        for author, known in KNOWN.items():
            found = rows(finished / "generate/models" / model / "scores" / author)
            for row, (word, said) in zip(found, known.items(), strict=True):
                expected = naive_score(taught[kind], tiny.TEMPLATES[kind], word, said)
                assert row["nll"] / row["bytes"] == pytest.approx(expected, rel=1e-4), (model, word, said)


def test_the_answer_that_all_find_most_likely_is_chosen(finished: Path) -> None:
    chosen = lines(finished / "generate/chosen/conversations.jsonl")
    assert [one["messages"][0]["content"] for one in chosen] == [question(word) for word in WORDS]
    by_prompt = {
        (author, row["id"]): row["nll"] / row["bytes"]
        for model in ("pivot", "mistral", "gemma")
        for author in KNOWN
        for row in rows(finished / "generate/models" / model / "scores" / author)
        if model == "pivot"
    }
    for one, word in zip(chosen, WORDS, strict=True):
        answers = {author: known[word] for author, known in KNOWN.items()}
        assert set(one["scores"]) == {"pivot", "mistral", "gemma"}
        assert one["score"] == pytest.approx(sum(one["scores"].values()) / 3)
        assert one["messages"][-1]["content"] == answers[one["author"]]
        assert one["scores"]["pivot"] == pytest.approx(by_prompt[one["author"], one["prompt_id"]])
        if len(set(answers.values())) == 1:
            assert one["scores"][one["author"]] == min(one["scores"][name] for name in KNOWN)
    for one in lines(finished / "generate/chosen/candidates.jsonl"):
        means = [sum(each["scores"].values()) / 3 for each in one["candidates"]]
        assert one["chosen"] == means.index(min(means))
    found = counts(finished, "generate/chosen")
    assert (found["prompts"], found["answers"], found["candidates"], found["chosen"]) == (6, 12, 10, 6)
    assert found["agreement"] == pytest.approx(2 / 6)
    assert sum(found["authors"].values()) == 6
    assert found["score"] == pytest.approx(sum(one["score"] for one in chosen) / 6)


def test_each_answer_is_taught_by_its_author_and_the_one_target_is_copied(finished: Path) -> None:
    authors = counts(finished, "generate/chosen")["authors"]
    taught = counts(finished, "fuse/answers")["chosen"]
    for name in KNOWN:
        assert taught[f"answers-{name}"][name] == authors.get(name, 0)
        assert taught[f"answers-{name}"]["none"] == 0
        assert counts(finished, f"align/{name}")["conversations"] == authors.get(name, 0)
    target, fused = (load_file(finished / place / "model/model.safetensors") for place in ("fuse/answers", "merge"))
    assert target.keys() == fused.keys()
    assert all(torch.equal(target[name], fused[name]) for name in target)
    losses = lines(finished / "fuse/answers/losses.jsonl")
    assert losses[-1]["sft_loss"] < losses[0]["sft_loss"] / 2, "it learns what was chosen"


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = runs.digests(finished)
    assert run(load_recipe(finished.parent / "recipe.yaml"), finished) == 0
    assert runs.digests(finished) == before
    assert load_recipe(finished / "recipe.yaml") == load_recipe(finished.parent / "recipe.yaml").model_copy(
        update={"date": load_recipe(finished / "recipe.yaml").date}
    )


def test_plain_text_of_what_was_done(finished: Path) -> None:
    assert math.isfinite(counts(finished, "generate/chosen")["score"])
    status = runs.here("status", finished)
    assert "generate pivot/scores/mistral" in status.stdout
    assert status.returncode == 0
