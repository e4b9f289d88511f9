"""Where a response ends, what of it is cut, and that a model is asked as it is taught, with templates that are hard to read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs
import tiny
from aligning import sparse
from fusechat.align.aligner import Aligner, Pair, Side, Strategy, Survey
from fusechat.align.back_off import BackOff
from fusechat.commands.run import run
from fusechat.data.messages import Message
from fusechat.data.rejected import left_out
from fusechat.models.dates import dated
from fusechat.models.templates import ChatTemplate
from fusechat.models.tokenise import prepare_conversation
from fusechat.pipeline import build_steps, load_recipe
from test_lead_rows import END, FOUR_DIGIT, PIVOT, S_4, S_NEWLINE, S_SPACE, SOURCE, SPACE, after_space
from test_template_parts import ASKED, CALL, QWEN_3, answer, talk

# As GLM's: nothing ends a turn, and a result of a tool is a turn of its own. As Llama 3.1's: a call ends otherwise than an answer.
WITHOUT_END = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<obs>\n<result>' + m.content + '</result>' }}"
    "{% else %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '</call>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDS_OF_CALLS = (
    "{% for m in messages %}{{ '[' + m.role + ']\n' }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '()<eom>' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
# The system text stands in the last question, as in some of Mistral's.
SYSTEM_LAST = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (messages[0].content + '\n\n' if messages[0].role == 'system' and m == asked[-1]"
    " else '') + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TALK = [ASKED, answer("I look.", tool_calls=[CALL]), {"role": "tool", "content": "12 C"}, answer("It is 12 C.")]


def test_a_call_ends_before_what_the_template_writes_of_the_next_turn(tokenizers: dict[str, Any]) -> None:
    for text, expected in (
        (WITHOUT_END, ["I look.<call>weather</call>", "It is 12 C."]),
        (ENDS_OF_CALLS, ["weather()<eom>", "It is 12 C."]),
    ):
        found = ChatTemplate(tokenizers["llama"], text, "x")
        turns = [turn if text is WITHOUT_END or "tool_calls" not in turn else {**turn, "content": ""} for turn in TALK]
        conversation = talk(*turns)
        rendered = found.render(conversation.messages, conversation)
        assert [rendered.text[one.begin : one.end] for one in rendered.responses] == expected


def test_reasoning_before_a_call_alone_is_not_said_to_be_dropped(tokenizers: dict[str, Any]) -> None:
    found = ChatTemplate(tokenizers["llama"], QWEN_3, "x")
    conversation = talk(ASKED, answer(None, reasoning_content="I must call.", tool_calls=[CALL]))
    rendered = found.render(conversation.messages, conversation)
    (response,) = rendered.responses
    assert "I must call." in rendered.text[response.asked : response.end]
    assert "reasoning_dropped" not in rendered.marks


def test_a_response_cut_before_its_call_has_the_bytes_that_are_left(tokenizers: dict[str, Any]) -> None:
    """What the template writes in its own words is counted from elsewhere, which changes no size."""
    found = ChatTemplate(tokenizers["llama"], QWEN_3, "x")
    conversation = talk(ASKED, answer("Let me look that up for you.", tool_calls=[CALL]))
    whole, _ = prepare_conversation(conversation, found, max_length=999)
    first = int(whole.position[0])
    for kept in (3, 5, len(whole) - 4):
        cut, marks = prepare_conversation(conversation, found, max_length=first + kept, truncate="token")
        assert marks["truncated"]
        assert len(cut) == kept
        text = tokenizers["llama"].decode(cut.gold.tolist())
        assert cut.content_bytes.tolist() == [len(text.encode())]


def test_training_and_asking_agree_on_where_a_system_message_stands(tokenizers: dict[str, Any]) -> None:
    """Whatever the template makes of it, of an empty one too: the text before the last answer is what asks for it."""
    tokenizer = tokenizers["mistral"]
    for text in (SYSTEM_LAST, tiny.INST, tiny.TEMPLATE, tiny.CHATML, QWEN_3):
        found = ChatTemplate(tokenizer, text, "x")
        for system in ("Be brief.", "", " "):
            for turns in (1, 2):
                messages = [Message("system", system)]
                for turn in range(turns):
                    messages += [Message("user", f"Q{turn}"), Message("assistant", f"A{turn}")]
                rendered = found.render(messages)
                asked = rendered.text[: rendered.responses[-1].asked]
                assert found.prompt(messages[:-1]) == asked, (text, system, turns)
                assert rendered.system_folded == (
                    text in (SYSTEM_LAST, tiny.INST) and bool(system.strip()) and (turns == 2 or text == tiny.INST)
                )


def test_a_dated_template_keeps_the_white_space_that_it_begins_with(tokenizers: dict[str, Any]) -> None:
    template = "\n\n  Begin {{ strftime_now('%Y') }}" + tiny.CHATML
    expected = ChatTemplate(tokenizers["llama"], template.replace("{{ strftime_now('%Y') }}", "2024"), "x")
    found = ChatTemplate(tokenizers["llama"], template, "x", date="2024-05-06")
    assert dated(template, "2024-05-06") != template
    assert found.prompt([Message("user", "Hi")]) == expected.prompt([Message("user", "Hi")])


def test_malformed_records_of_a_whole_file_do_not_count_against_a_sample(
    models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path, models, sources={"mistral": str(models["mistral"])})
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, *["{}"] * 3]) + "\n", encoding="utf-8")
    changes = ["data.on_error=skip", "data.train={path: train.jsonl, limit: 3}"]
    loaded = load_recipe(recipe, changes)
    run(loaded, tmp_path / "work", until="prepare")
    (step,) = [one for one in build_steps(loaded, tmp_path / "work") if one.label == "prepare pivot/data"]
    found = left_out(step)
    assert found is not None
    assert (found.number, found.kept, found.share) == (3, 3, 0.0)
    assert json.loads((step.directory / "manifest.json").read_text())["counts"]["conversations"] == 3


@pytest.mark.parametrize("unaligned", ["label", "skip"])
def test_a_row_before_the_content_with_little_mass_is_the_gold_tokens_or_nothings(unaligned: Any) -> None:
    """1% of the source's mass is mapped: `skip` leaves nothing of it."""
    pivot, source = after_space(PIVOT, SPACE, FOUR_DIGIT, ends=END), after_space(SOURCE, S_SPACE, S_4, ends=6)
    pair = Pair(Side.of(PIVOT, END), Side.of(SOURCE, 6), Strategy(unaligned=unaligned, min_mass=0.5))
    captured = sparse([{S_SPACE: 0.01, S_NEWLINE: 0.0001}, {S_4: 0.75}, {6: 1.0}])
    survey = Survey(pair)
    survey.count(pivot, source)
    survey.need(pivot, source, captured)
    aligner = Aligner(pair, pair.build_map(survey.seen(), BackOff(PIVOT)), np.zeros(7, dtype=bool))
    found = aligner.align(pivot, source, captured, k=3)
    assert found.ids[0].tolist() == ([SPACE, -1, -1] if unaligned == "label" else [-1, -1, -1])
    assert found.tail[0] == (0.0 if unaligned == "label" else 1.0)
