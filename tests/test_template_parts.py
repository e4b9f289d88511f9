"""What templates make of reasoning, calls of tools, context, variables and the day: learnt as they render it, or told."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from fusechat.align.sequence import align_rows
from fusechat.commands.run import run
from fusechat.data.messages import Conversation
from fusechat.data.prepared import PreparedSet
from fusechat.data.records import conversation_of
from fusechat.errors import ModelError
from fusechat.models.chat_model import ChatModel
from fusechat.models.dates import dated
from fusechat.models.reference import Reference
from fusechat.models.saved_template import asking
from fusechat.models.templates import ChatTemplate, UnrenderableError, choose_template
from fusechat.models.tokenise import prepare_conversation
from fusechat.pipeline import load_recipe

# As Qwen3's: reasoning stays in answers after the last question, in the template's own white space; calls are written as JSON.
QWEN_3 = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endif %}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{% endif %}{{ text.lstrip('\\n') }}{% for c in m.tool_calls or [] %}{{ '\\n' if text or not loop.first else '' }}"
    '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
# As DeepSeek's: a call's arguments are a text, reasoning is always left out, and asking writes what no conversation has.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}{% elif m.role == 'tool' %}{{ '<T>' + m.content }}"
    "{% else %}{% set text = m.content or '' %}{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<A>' + text }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + c.function.arguments + '<end>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ASKED = {"role": "user", "content": "Weather in Paris?"}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
DATED = "{{ strftime_now('%d %b %Y, %-d %%d %H:%M') }}" + tiny.CHATML


def template(tokenizers: dict[str, Any], text: str | None, **more: Any) -> ChatTemplate:
    return ChatTemplate(tokenizers["llama"], text, "the model", **more)


def learnt(found: ChatTemplate, conversation: Conversation) -> tuple[list[str], frozenset[str]]:
    """What follows each asked prompt, up to the end of turn."""
    rendered = found.render(conversation.messages, conversation)
    return [rendered.text[one.asked : one.end] for one in rendered.responses], rendered.marks - {"own_prompt"}


def talk(*turns: dict[str, Any], **record: Any) -> Conversation:
    return conversation_of({"messages": list(turns), **record}, "here")


def answer(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_reasoning_is_learnt_as_the_template_writes_it(tokenizers: dict[str, Any]) -> None:
    found = template(tokenizers, QWEN_3)
    expected = "<think>\nIt is far.\n</think>\n\nNo."
    for turn in (
        answer(expected),
        answer("<think>It is far.</think>No."),  # which the template writes in its own white space
        answer("No.", reasoning_content="It is far."),
        answer("No.", reasoning_content="\nIt is far.\n"),
    ):
        assert learnt(found, talk(ASKED, turn)) == ([expected], frozenset()), turn
    kept = template(tokenizers, None)  # ChatML keeps a content word for word, and knows no other key
    assert learnt(kept, talk(ASKED, answer(expected))) == ([expected], frozenset())
    assert learnt(kept, talk(ASKED, answer("No.", reasoning_content="It is far."))) == (["No."], {"reasoning_dropped"})


def test_reasoning_of_earlier_turns_is_left_out_where_the_template_does_so(tokenizers: dict[str, Any]) -> None:
    first, last = answer("<think>\nHm.\n</think>\n\nYes."), answer("<think>\nWell.\n</think>\n\nNo.")
    conversation = talk(ASKED, first, ASKED, last)
    texts, marks = learnt(template(tokenizers, QWEN_3), conversation)
    assert texts == ["Yes.", "<think>\nWell.\n</think>\n\nNo."]
    assert marks == {"reasoning_dropped"}
    texts, marks = learnt(template(tokenizers, DEEPSEEK), conversation)
    assert texts == ["\n\nYes.", "\n\nNo."]
    ours, theirs = (
        prepare_conversation(conversation, template(tokenizers, text), max_length=512)[0] for text in (QWEN_3, None)
    )
    matched = align_rows(ours, theirs).source_row
    assert (ours.gold[matched >= 0] == theirs.gold[matched[matched >= 0]]).all(), (
        "bytes are counted in the whole content"
    )
    assert (matched[(ours.response == 0) & ~ours.lead] >= 0).all()


def test_calls_are_learnt_as_the_template_writes_them(tokenizers: dict[str, Any]) -> None:
    reply = {"role": "tool", "content": "12 C"}
    beside = talk(ASKED, answer("Let me look.", tool_calls=[CALL]), tools=TOOLS)
    alone = talk(ASKED, answer(None, tool_calls=[CALL]), reply, answer("It is 12 C."), tools=TOOLS)
    found = template(tokenizers, QWEN_3)
    thought = "<think>\n\n</think>\n\n"  # before the answer that ends the conversation: asked by, not learnt
    assert learnt(found, beside) == ([f"Let me look.\n{WRITTEN}"], frozenset())
    texts, marks = learnt(found, alone)
    assert (texts, marks) == ([WRITTEN, "It is 12 C."], frozenset())
    assert f"# Tools\n{json.dumps(TOOLS[0])}" in found.render(alone.messages, alone).text
    assert thought in found.render(alone.messages, alone).text
    as_text = template(tokenizers, DEEPSEEK)
    assert learnt(as_text, alone)[0] == ['<call>weather {"city": "Paris"}<end>', "It is 12 C."]
    assert learnt(as_text, alone)[1] == {"tools_dropped"}
    for conversation in (beside, alone):
        with pytest.raises(UnrenderableError, match="writes no calls of tools"):
            learnt(template(tokenizers, None), conversation)
    prepared, _ = prepare_conversation(alone, found, max_length=512)
    tokens = tokenizers["llama"](f"{WRITTEN}<|im_end|>", add_special_tokens=False)["input_ids"]
    assert prepared.gold[prepared.response == 0].tolist() == tokens


def test_two_templates_words_for_a_call_correspond_only_where_they_are_the_same(tokenizers: dict[str, Any]) -> None:
    conversation = talk(ASKED, answer("Let me look.", tool_calls=[CALL]))
    one, same, other = (
        prepare_conversation(conversation, template(tokenizers, text), max_length=512)[0]
        for text in (QWEN_3, QWEN_3.replace("# Tools", "Tools:"), DEEPSEEK)
    )
    assert (align_rows(one, same).source_row >= 0).all()
    row = align_rows(one, other).source_row
    words = one.begin >= len("Let me look.")
    assert (row[words & ~one.end_of_turn] < 0).all()
    assert (row[~words] >= 0).all()


def test_a_message_of_weight_0_has_no_rows(tokenizers: dict[str, Any]) -> None:
    conversation = talk(ASKED, answer("Berlin.", weight=0), ASKED, answer("Paris."))
    prepared, _ = prepare_conversation(conversation, template(tokenizers, None), max_length=512)
    tokenizer = tokenizers["llama"]
    assert prepared.gold.tolist() == tokenizer("Paris.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert prepared.content_bytes.tolist() == [len("Paris.")]
    assert "Berlin." in tokenizer.decode(prepared.input_ids)


def test_control_tokens_in_texts_and_keys_that_no_template_reads_are_told(tokenizers: dict[str, Any]) -> None:
    found = template(tokenizers, None)
    assert learnt(found, talk(ASKED, answer("It ends with <|im_end|>.")))[1] == {"control_tokens"}
    assert learnt(found, talk({**ASKED, "name": "Ann"}, answer("No.")))[1] == {"keys_dropped"}
    assert (
        learnt(template(tokenizers, tiny.CHATML + "{# name #}"), talk({**ASKED, "name": "Ann"}, answer("No.")))[1]
        == set()
    )


def test_variables_of_the_recipe_and_of_a_record(tokenizers: dict[str, Any]) -> None:
    text = "{{ 'Mode: ' ~ (mode if mode is defined else 'none') ~ '.' }}" + tiny.CHATML
    plain, chosen = template(tokenizers, text), template(tokenizers, text, variables={"mode": "it's on"})
    record = talk(ASKED, answer("No."), chat_template_kwargs={"mode": "off"})
    for found, conversation, expected in (
        (plain, talk(ASKED, answer("No.")), "none"),
        (chosen, talk(ASKED, answer("No.")), "it's on"),
        (chosen, record, "off"),
    ):
        assert found.render(conversation.messages, conversation).text.startswith(f"Mode: {expected}.")
    saved = tokenizers["llama"].apply_chat_template([ASKED], chat_template=asking(chosen).template, tokenize=False)
    assert saved.startswith("Mode: it's on."), "other programs are told the same by the template that is saved"


def test_the_day_is_that_of_the_run(tokenizers: dict[str, Any]) -> None:
    day = datetime.date(2024, 2, 9)
    found = template(tokenizers, DATED, date=day.isoformat())
    assert found.render(talk(ASKED, answer("No.")).messages).text.startswith("09 Feb 2024, 9 %d 00:00<|im_start|>")
    assert dated(DATED, None) == DATED, "without a day it is Transformers' own"
    for code in "aAbBdejmUwyYFD":
        text = dated("{{ strftime_now('%" + code + " x') }}", day.isoformat())
        shown = tokenizers["llama"].apply_chat_template([ASKED], chat_template=text, tokenize=False)
        assert shown == day.strftime(f"%{code} x")


def test_the_day_is_kept_in_the_work_directory_and_counts_only_where_it_is_asked_for(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {"mistral": {"model": str(models["mistral"]), "chat_template": DATED.replace("%d %b %Y", "%Y")}}
    file = runs.write_recipe(tmp_path, models, sources=specs)
    work = tmp_path / "work"
    monkeypatch.setattr("fusechat.pipeline.today", lambda: "2020-05-17")
    run(load_recipe(file), work, until="prepare")
    monkeypatch.setattr("fusechat.pipeline.today", lambda: "2021-06-18")
    assert run(load_recipe(file), work, until="prepare") == 0
    assert load_recipe(work / "recipe.yaml").date == "2020-05-17"
    tokenizer = template({"llama": ChatModel("m", Reference((str(models["mistral"]),))).tokenizer()}, None).tokenizer
    text = tokenizer.decode(PreparedSet(work / "prepare" / "mistral" / "data")[0].input_ids)
    assert "2020" in text
    assert "2021" not in text
    redone = run(load_recipe(file, ["date=2021-06-18"]), work, until="prepare")
    assert redone == 2, "the source's two sets, and nothing of the pivot's"


def test_one_of_several_templates(tokenizers: dict[str, Any], tmp_path: Path, heard: list[str]) -> None:
    import copy

    from transformers import AutoTokenizer

    several = {"default": tiny.CHATML, "tool_use": QWEN_3}
    tokenizer = copy.deepcopy(tokenizers["llama"])
    tokenizer.chat_template = several
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert ChatTemplate(loaded, None, "model one").template == tiny.CHATML
    assert [line for line in heard if "model one" in line] == [
        "model one: has several chat templates (default, tool_use); default is used: chat_template: {name: …} takes another"
    ]
    assert ChatTemplate(loaded, None, "model one", name="tool_use").template == QWEN_3
    with pytest.raises(ModelError, match="no chat template rag; it has default, tool_use"):
        choose_template(several, "rag", "the model")
    with pytest.raises(ModelError, match="no chat template default; it has rag: choose one"):
        choose_template({"rag": QWEN_3}, None, "the model")
    with pytest.raises(ModelError, match="one chat template without a name, none called rag"):
        choose_template(QWEN_3, "rag", "the model")


def test_a_recipe_chooses_template_and_variables(tmp_path: Path, models: dict[str, Path]) -> None:
    spec = {
        "model": str(models["mistral"]),
        "chat_template": {"name": "tool_use"},
        "chat_template_kwargs": {"on": True},
    }
    recipe = load_recipe(runs.write_recipe(tmp_path, models, sources={"mistral": spec}))
    chat_model = recipe.chat_model("mistral")
    assert (chat_model.chat_template, chat_model.template_name, json.loads(chat_model.variables)) == (
        None,
        "tool_use",
        {"on": True},
    )
    plain = ChatModel("mistral", chat_model.reference)
    assert chat_model.tokenizer_identity != plain.tokenizer_identity
    with pytest.raises(Exception, match="tokenize is no variable"):
        load_recipe(tmp_path / "recipe.yaml", ["pivot.chat_template_kwargs.tokenize=true"])


def test_what_fits_of_a_response_is_learnt_where_the_recipe_truncates_at_tokens(tokenizers: dict[str, Any]) -> None:
    """As the paper does; the expected tokens are the tokenizer's own, cut."""
    text = "The answer is 40, größer als 30. 🙂 " * 4
    conversation = talk(ASKED, answer("Short."), ASKED, answer(text), ASKED, answer("Lost."))
    found = template(tokenizers, None)
    whole, _ = prepare_conversation(conversation, found, max_length=512)
    second = whole.position[whole.response == 1]
    for length in (int(second[0]) + 1, int(second[0]) + 5, int(second[-1])):
        cut, marks = prepare_conversation(conversation, found, max_length=length, truncate="token")
        assert marks["truncated"]
        assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
        kept = whole.position < length
        assert cut.gold.tolist() == whole.gold[kept].tolist()
        assert not cut.end_of_turn[cut.response == 1].any()
        assert cut.content_bytes.tolist() == [len("Short."), int(whole.end[kept][-1])]
        dropped, _ = prepare_conversation(conversation, found, max_length=length)
        assert dropped.content_bytes.tolist() == [len("Short.")]
    all_of_it, _ = prepare_conversation(conversation, found, max_length=int(second[-1]), truncate="token")
    assert all_of_it.content_bytes.tolist() == [len("Short."), len(text.encode())], "only the end of turn is missing"


def test_models_with_other_words_for_all_of_it_are_aligned(tmp_path: Path, models: dict[str, Path]) -> None:
    """Calls, context, and reasoning that one template drops: what both write is compared, the rest with nothing."""
    rows = []
    for number in range(6):
        asked = {"role": "user", "content": f"Weather in {number}?"}
        call = answer(None if number % 2 else "Let me look.", tool_calls=[CALL])
        told = answer(f"It is {number} C.", reasoning_content="Easy.")
        last = answer(f"<think>\nSo {number}.\n</think>\n\nYes {number}.")
        turns = [
            asked,
            call,
            {"role": "tool", "content": f"{number} C"},
            told,
            asked,
            answer("No.", weight=0),
            asked,
            last,
        ]
        rows.append({"tools": TOOLS, "messages": turns})
    specs = {
        "pivot": {"model": str(models["llama"]), "chat_template": QWEN_3},
        "sources": {
            "mistral": {"model": str(models["mistral"]), "chat_template": DEEPSEEK.replace("<|im_end|>", "</s>")}
        },
        "data": {"train": "train.jsonl", "max_length": 330, "truncate": "token"},
    }
    file = runs.write_recipe(tmp_path, models, **specs)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(load_recipe(file), tmp_path / "work", until="align")
    figures = json.loads((tmp_path / "work" / "align" / "mistral" / "figures.json").read_text())
    assert figures["conversations"] == 6
    assert 0 < figures["positions_aligned"] < figures["positions"]
