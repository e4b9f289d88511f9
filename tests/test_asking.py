"""Other programs ask a fused model after the text that it was taught after, and stop where its turn ends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import families
import runs
import tiny
from fusechat.commands.run import run
from fusechat.data.conversations import Conversation, Message
from fusechat.models.chat_files import write_chat_files
from fusechat.models.chat_model import ChatModel
from fusechat.models.reference import Reference
from fusechat.models.saved_template import asking
from fusechat.models.templates import ChatTemplate
from fusechat.models.tokenise import prepare_conversation
from fusechat.pipeline import load_recipe
from test_lead_rows import OPENCHAT, THOUGHTS, TWO_TEXTS, UNASKED

ANSWERS = ["Four eggs.", "4 eggs."]


def test_the_saved_template_asks_as_training_did(models: dict[str, Path], tmp_path: Path) -> None:
    """Transformers' own tokens of the saved template's prompt are those before the first token that was learnt, without a
    word of what the caller should set; a whole conversation has the tokens that it had."""
    for number, (kind, template, note) in enumerate(
        [
            ("llama", None, None),
            ("mistral", None, None),
            ("mistral", OPENCHAT, None),
            ("gemma", tiny.TEMPLATE, "without a space"),
            ("llama", THOUGHTS, "enable_thinking set to false"),
            ("llama", families.QWEN_3, "ends with what stood before the answers"),
            ("mistral", UNASKED.replace("'\\n'", "eos_token"), "ends with what stood before the answers"),
        ]
    ):
        directory = tmp_path / str(number)
        shutil.copytree(models[kind], directory)
        chat_model = ChatModel("pivot", Reference((str(models[kind]),)), template)
        write_chat_files(chat_model, directory, own_prompt=False, name="x")
        own, saved = chat_model.template(), AutoTokenizer.from_pretrained(directory)
        found = asking(own)
        assert found.exact
        assert (found.note or "").find(note or "") >= 0
        assert (found.note is None) == (note is None) == (saved.chat_template == own.template)
        for answer in ANSWERS:
            messages = Message("user", "How many?"), Message("assistant", answer)
            rows, _ = prepare_conversation(Conversation(messages, "here"), own, max_length=99)
            turns = [{"role": message.role, "content": message.content} for message in messages]
            whole = saved.apply_chat_template(turns, tokenize=False)
            asked = saved.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
            ids = saved(asked, add_special_tokens=False)["input_ids"]
            assert ids == rows.input_ids[: rows.position[0]].tolist(), (number, asked)
            assert saved(whole, add_special_tokens=False)["input_ids"][: len(rows.input_ids)] == rows.input_ids.tolist()


def test_a_program_may_still_ask_for_thoughts(models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    tokenizer.chat_template = asking(ChatTemplate(tokenizer, THOUGHTS, "x")).template
    turns = [{"role": "user", "content": "a"}]
    texts = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
        for options in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    ]
    assert texts[0] == texts[1] == texts[2] + "<think>\n\n</think>\n\n"


def test_variables_of_the_recipe_are_the_saved_templates_defaults(models: dict[str, Path]) -> None:
    """What a recipe gave its template is what programs that set nothing ask with."""
    template = "{% if style is defined %}{{ 'Style: ' + style + '\n' }}{% endif %}" + families.CHATML
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    own = ChatTemplate(tokenizer, template, "x", variables={"style": "long"})
    found = asking(own)
    assert found.exact
    assert 'style = "long"' in (found.note or "")
    tokenizer.chat_template = found.template
    turns = [{"role": "user", "content": "a"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(turns, **options) == own.prompt([Message("user", "a")])
    assert tokenizer.apply_chat_template(turns, **options).startswith("Style: long\n<|im_start|>")
    assert tokenizer.apply_chat_template(turns, style="short", **options).startswith("Style: short\n<|im_start|>")


def test_where_no_template_asks_so_a_note_says_what_to_ask_by(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(models["mistral"], tmp_path / "model")
    chat_model = ChatModel("pivot", Reference((str(models["mistral"]),)), TWO_TEXTS)
    write_chat_files(chat_model, tmp_path / "model", own_prompt=False, name="merge")
    (line,) = [line for line in caplog.messages if "generation prompt" in line]
    assert line.startswith("merge: its chat template's own generation prompt is not what it was trained after")
    assert '"<U>Why?<A></think>"' in line
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TWO_TEXTS


def test_a_model_that_learned_to_reason_is_asked_by_the_templates_own_prompt(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """The template writes an empty block of thoughts before answers that have none; the training data has thoughts."""
    template = families.QWEN_3.replace(
        "{% if m.role == 'assistant' and loop.last %}",
        "{% if m.role == 'assistant' and loop.last and '</think>' in m.content %}{% set text = m.content %}"
        "{% elif m.role == 'assistant' and loop.last %}",
    )
    lines = [{"role": "assistant", "content": f"<think>\nIt is {n}.\n</think>\n\n{n}" if n else "0"} for n in range(4)]
    text = "\n".join(
        json.dumps({"messages": [{"role": "user", "content": f"What is {n}?"}, one]}) for n, one in enumerate(lines)
    )
    recipe = runs.write_recipe(
        tmp_path,
        models,
        pivot={"model": str(models["llama"]), "chat_template": template},
        sources={"gemma": {"model": str(models["gemma"]), "chat_template": tiny.TEMPLATE}},
        targets={"plain": []},
        data={"train": "thoughts.jsonl", "max_length": 256},
        fuse={"training": {"max_steps": 1}},
    )
    (tmp_path / "thoughts.jsonl").write_text(text, encoding="utf-8")
    run(load_recipe(recipe), tmp_path / "work", until="merge")
    counts = json.loads((tmp_path / "work" / "prepare" / "pivot" / "data" / "manifest.json").read_text())["counts"]
    assert counts["own_prompt"] == 3
    for directory in (tmp_path / "work" / "fuse" / "plain" / "model", tmp_path / "work" / "merge" / "model"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        turns = [{"role": "user", "content": "What is 9?"}]
        own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert own.endswith("What is 9?<|im_end|>\n<|im_start|>assistant\n")
        chat_model = ChatModel("fused", Reference((str(directory),)))
        assert chat_model.template().prompt([Message("user", "What is 9?")]) == own
    assert "answers that begin with reasoning" in (tmp_path / "work" / "merge" / "model" / "README.md").read_text()


# -- where answers end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: its sequences end with <|endoftext|>, and it has no chat template."""
    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(models["llama"], directory)
    (directory / "chat_template.jinja").unlink()
    for name, change in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("config.json", {"eos_token_id": 0}),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return directory


def test_generation_stops_where_the_recipes_template_ends_a_turn(base: Path, tmp_path: Path) -> None:
    """A base pivot under ChatML from the recipe, from training to the fused model, by Transformers alone."""
    recipe = runs.write_recipe(
        tmp_path,
        {"llama": base, "mistral": base, "gemma": base},
        pivot={"model": str(base), "chat_template": families.CHATML},
        sources={"other": {"model": str(base), "chat_template": families.CHATML}},
        fuse={"training": {"max_steps": 1, "per_device_train_batch_size": 2}},
    )
    run(load_recipe(recipe), tmp_path / "work", until="merge")
    for directory in (tmp_path / "work" / "fuse" / "other" / "model", tmp_path / "work" / "merge" / "model"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.eos_token == "<|im_end|>"
        assert GenerationConfig.from_pretrained(directory).eos_token_id == [0, end]
        turns = [{"role": "user", "content": "Hi"}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        model = AutoModelForCausalLM.from_pretrained(directory)
        output = model.generate(**asked, max_new_tokens=9, do_sample=False, logits_processor=[_ends_third(end, asked)])
        assert output.shape[1] == asked["input_ids"].shape[1] + 3


def _ends_third(token: int, asked: Any) -> Any:
    """Makes `token` the third of an answer, and a plain one all others."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = token if ids.shape[1] == asked["input_ids"].shape[1] + 2 else 50
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([wanted]), 0.0)

    return process


def test_what_ends_generation_already_stays(models: dict[str, Path], tmp_path: Path) -> None:
    """The model's own template, whose end of turn is not the tokenizer's end of sequence: only generation is told."""
    for number, (before, expected) in enumerate([(0, [0, 2]), ([0, 2], [0, 2]), (None, 2)]):
        directory = tmp_path / str(number)
        shutil.copytree(models["llama"], directory)
        (directory / "generation_config.json").unlink()
        if before is not None:
            (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": before, "top_k": 7}))
        config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": None}
        (directory / "config.json").write_text(json.dumps(config))
        write_chat_files(ChatModel("pivot", Reference((str(models["llama"]),))), directory, own_prompt=False, name="x")
        settings = GenerationConfig.from_pretrained(directory)
        assert settings.eos_token_id == expected
        assert before is None or settings.top_k == 7
    nested = tmp_path / "nested"
    shutil.copytree(models["llama"], nested)
    (nested / "generation_config.json").unlink()
    config = json.loads((nested / "config.json").read_text()) | {
        "eos_token_id": None,
        "text_config": {"eos_token_id": 5},
    }
    (nested / "config.json").write_text(json.dumps(config))
    write_chat_files(ChatModel("pivot", Reference((str(models["llama"]),))), nested, own_prompt=False, name="x")
    assert json.loads((nested / "generation_config.json").read_text())["eos_token_id"] == [5, 2]


def test_a_template_whose_prompts_cannot_be_compared_is_told_of(models: dict[str, Path]) -> None:
    """What stands before an answer depends on the answer, so that no saved template is known to ask rightly."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ('<B>' if 'So' in m.content else '<A>') ~ m.content }}"
        "{% else %}{{ '<U>' ~ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    )
    found = asking(ChatTemplate(AutoTokenizer.from_pretrained(models["llama"]), template, "x"))
    assert not found.exact
    assert found.template == template
    assert "is not what it was trained after" in str(found.note)
