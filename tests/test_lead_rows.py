"""Tokens between the text that a model is asked by and its answer: learnt, aligned where both models write them, of no bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runs
import tiny
from aligning import conversation, gold_nll_of, prepared, sparse, toy
from fusechat.align.aligner import Aligner, Pair, Side, Strategy, Survey
from fusechat.align.back_off import BackOff
from fusechat.commands.run import run
from fusechat.data.conversations import Conversation, Message
from fusechat.data.prepared import FILE, Prepared, PreparedSet, write_prepared
from fusechat.fuse.student import Comparison
from fusechat.fuse.teacher_selection import Candidate, SelectionRule, cross_entropies
from fusechat.models.answers import Prompt
from fusechat.models.chat_model import ChatModel
from fusechat.models.generator import Generator
from fusechat.models.reference import Reference
from fusechat.models.templates import ChatTemplate
from fusechat.models.tokenise import prepare_conversation
from fusechat.pipeline import load_recipe

ANSWERS = ["Four eggs.", "4 eggs.", "北京是首都。", "😀 hi", "the capital", "3"]
# How templates of known models treat what stands before an answer, in a few words.
OPENCHAT = (
    "{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
THOUGHTS = (  # Qwen3: an empty block of thoughts before the last answer; asked without one unless enable_thinking is false
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TWO_TEXTS = (  # DeepSeek V3.1: the two texts differ
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A></think>{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>{% endif %}"
)
UNASKED = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"  # knows no generation prompt
)


def rows_of(tokenizer: Any, template: str | None, question: str, answer: str) -> Prepared:
    messages = Message("user", question), Message("assistant", answer)
    return prepare_conversation(Conversation(messages, "here"), ChatTemplate(tokenizer, template, "x"), max_length=999)[
        0
    ]


def test_every_token_after_the_generation_prompt_is_learnt(tokenizers: dict[str, Any]) -> None:
    """Against Transformers' own tokens of the generation prompt and of the whole conversation."""
    for kind, template in [*tiny.TEMPLATES.items(), ("mistral", OPENCHAT), ("gemma", OPENCHAT), ("llama", OPENCHAT)]:
        tokenizer, spaces = tokenizers[kind], 0
        for answer in ANSWERS:
            rows = rows_of(tokenizer, template, "How many?", answer)
            turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}]
            options = {"chat_template": template or tokenizer.chat_template, "tokenize": False}
            asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **options).rstrip(" ")
            whole = tokenizer.apply_chat_template(turns, **options)
            assert whole.startswith(asked)
            first, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
            assert ids[: len(first)] == first, "the model is asked by other tokens than it is taught after"
            end = ids.index(ChatTemplate(tokenizer, template, kind).end_of_turn, len(first))
            assert rows.gold.tolist() == ids[len(first) : end + 1]
            text = whole[len(asked) :]
            space = len(text) - len(text.lstrip(" "))
            alone = tokenizer(asked + " " * space, add_special_tokens=False)["input_ids"][len(first) :]
            stands_alone = space and ids[len(first) : len(first) + len(alone)] == alone
            assert rows.lead.sum() == (len(alone) if stands_alone else 0)
            spaces += int(rows.lead.sum())
            assert rows.content_bytes.tolist() == [len(answer.encode())]
            assert (rows.end[~rows.lead & ~rows.end_of_turn] > 0).all()
        assert spaces > 0 or (kind == "llama" and template is None), "there was a space that stands alone"


def test_models_are_asked_after_the_text_that_they_are_taught_after(tokenizers: dict[str, Any]) -> None:
    think = "<think>\n\n</think>\n\n"
    for template, expected in (
        (OPENCHAT, "GPT4 Correct User: Hi</s>GPT4 Correct Assistant:"),
        (THOUGHTS, f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{think}"),
        (TWO_TEXTS, "<U>Hi<A></think>"),
        (UNASKED, "### user: Hi\n### assistant:"),
        (tiny.INST, "<s>[INST] Hi [/INST]"),
        (tiny.TEMPLATE, "<s>Question: Hi\n\nAnswer:"),
    ):
        own = ChatTemplate(tokenizers["mistral"], template, "x")
        assert own.prompt([Message("user", "Hi")]) == expected
        (response,) = own.render([Message("user", "Hi"), Message("assistant", "7")]).responses
        text = own.render([Message("user", "Hi"), Message("assistant", "7")]).text
        assert text[: response.asked] == expected
        assert text[response.asked : response.begin].strip() == ""


def test_an_earlier_answer_is_asked_for_in_its_own_form(tokenizers: dict[str, Any]) -> None:
    """A template that writes its empty thoughts before the last answer only."""
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    rendered = ChatTemplate(tokenizers["llama"], THOUGHTS, "x").render(turns)
    asked = [rendered.text[: response.asked] for response in rendered.responses]
    assert asked[0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert asked[1].endswith("c<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_lead_rows_are_stored_and_older_files_have_none(tokenizers: dict[str, Any], tmp_path: Any) -> None:
    import pyarrow as pa

    from fusechat.data.prepared import FILE

    rows = rows_of(tokenizers["mistral"], None, "How many?", "北京")
    assert rows.lead.tolist() == [True] + [False] * (len(rows) - 1)
    write_prepared(tmp_path / FILE, [rows])
    assert PreparedSet(tmp_path)[0].lead.tolist() == rows.lead.tolist()
    with pa.memory_map(str(tmp_path / FILE)) as file:
        table = pa.ipc.open_file(file).read_all().drop_columns(["lead"])
        (tmp_path / "old").mkdir()
        with pa.OSFile(str(tmp_path / "old" / FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as written:
            written.write_table(table)
    old = PreparedSet(tmp_path / "old")[0]
    assert not old.lead.any()
    assert old.gold.tolist() == rows.gold.tolist()


# -- alignment, by hand: `_` stands for a space ----------------------------------------------------------------------------

PIVOT = toy(" ", "4", " Four", "5", "Four")
SPACE, FOUR_DIGIT, SPACE_FOUR, FIVE, FOUR = range(5)
SOURCE = toy(" Four", " 4", " ", "4", "\n", " 5")
S_FOUR, S_SPACE4, S_SPACE, S_4, S_NEWLINE, S_SPACE5 = range(6)
END = 5  # PIVOT's; SOURCE's is 6


def with_lead(rows: Prepared, lead: int) -> Prepared:
    return Prepared(**{**vars(rows), "lead": np.arange(len(rows)) < lead})


def after_space(tokens: Any, *ids: int, ends: int, lead: int = 1) -> Prepared:
    """A response of these tokens, the first byte of which is the template's space."""
    return with_lead(conversation(tokens, ids, ends=ends, taken=[1]), lead)


def align(
    pivot: Prepared, source: Prepared, rows: list[dict[int, float]], *, unaligned: Any = "label"
) -> tuple[list[dict[int, float]], dict[str, Any]]:
    """Targets of each pivot row; the map has counted `␣4` and `␣5` cut as `␣|4`, as the middle of texts has them."""
    pair = Pair(Side.of(PIVOT, END), Side.of(SOURCE, 6), Strategy(unaligned=unaligned))
    survey, captured = Survey(pair), sparse(rows, nll=gold_nll_of(rows, source))
    survey.count(pivot, source)
    survey.need(pivot, source, captured)
    survey.count(
        conversation(PIVOT, [FOUR_DIGIT, SPACE, FOUR_DIGIT, SPACE, FIVE], ends=END),
        conversation(SOURCE, [S_4, S_SPACE4, S_SPACE5], ends=6),
    )
    aligner = Aligner(pair, pair.build_map(survey.seen(), BackOff(PIVOT)), np.zeros(7, dtype=bool))
    found = aligner.align(pivot, source, captured, k=4)
    targets = [
        {int(token): float(p) for token, p in zip(ids, ps, strict=True) if token >= 0}
        for ids, ps in zip(found.ids, found.probabilities, strict=True)
    ]
    return targets, aligner.figures.summary()


def test_a_file_without_lead_rows_beside_one_that_has_some(tmp_path: Path) -> None:
    """Two sets of conversations of one source, read one after the other."""
    places, marks = (tmp_path / "one", tmp_path / "other"), ([False, False], [True, False])
    rows, nothing = np.arange(1, 3, dtype=np.int32), np.zeros(2, np.int32)
    for place, lead in zip(places, marks, strict=True):
        place.mkdir()
        columns = (rows, rows, nothing, nothing, nothing, nothing.astype(bool), nothing[:1])
        write_prepared(place / FILE, [Prepared(place.name, *columns, lead=np.array(lead))])
    assert [one.lead.tolist() for one in PreparedSet(*places)] == list(marks)


def test_the_same_token_before_the_content_carries_its_distribution_over() -> None:
    """`␣|4` in both: what the source says of the space goes over whole, `␣Four` too."""
    pivot, source = after_space(PIVOT, SPACE, FOUR_DIGIT, ends=END), after_space(SOURCE, S_SPACE, S_4, ends=6)
    rows = [{S_SPACE: 0.6, S_FOUR: 0.3}, {S_4: 0.75}, {6: 1.0}]
    targets, figures = align(pivot, source, rows)
    assert targets[0] == pytest.approx({SPACE: 0.6, SPACE_FOUR: 0.3})
    assert targets[1] == pytest.approx({FOUR_DIGIT: 0.75})
    assert figures["positions"] == 2
    assert figures["positions_aligned"] == 2
    assert (figures["lead_positions"], figures["lead_positions_aligned"]) == (1, 1)
    assert figures["coverage_of_mass"] == pytest.approx((0.75 + 1) / 2)


def test_a_longer_source_token_gives_the_space_what_the_pivot_would_cut_so() -> None:
    """`␣4` against `␣|4`: all answers that the pivot begins with a lone space count for it, and `␣Four` for itself."""
    pivot, source = after_space(PIVOT, SPACE, FOUR_DIGIT, ends=END), after_space(SOURCE, S_SPACE4, ends=6, lead=0)
    targets, _ = align(pivot, source, [{S_SPACE4: 0.5, S_SPACE5: 0.2, S_FOUR: 0.25}, {6: 1.0}])
    assert targets[0] == pytest.approx({SPACE: 0.7, SPACE_FOUR: 0.25})


def test_without_such_a_source_row_the_gold_token_stands_in() -> None:
    pivot = after_space(PIVOT, SPACE, FOUR_DIGIT, ends=END)
    no_space = conversation(SOURCE, [S_4], ends=6)
    other_text = after_space(SOURCE, S_NEWLINE, S_4, ends=6)
    for source, rows in ((no_space, [{S_4: 0.5}]), (other_text, [{S_NEWLINE: 0.9}, {S_4: 0.5}])):
        for unaligned in ("label", "pivot", "condition", "skip"):
            targets, figures = align(pivot, source, [*rows, {6: 1.0}], unaligned=unaligned)
            assert targets[0] == ({} if unaligned == "skip" else {SPACE: 1.0})
            assert targets[1] == pytest.approx({FOUR_DIGIT: 0.5})
            assert (figures["lead_positions"], figures["lead_positions_aligned"]) == (1, 0)


def test_a_first_token_that_takes_in_the_same_space_goes_over_whole() -> None:
    """`␣Four` in both: the source's `␣` is the pivot's `␣`, which a model has to write before a digit."""
    pivot = after_space(PIVOT, SPACE_FOUR, ends=END, lead=0)
    source = after_space(SOURCE, S_FOUR, ends=6, lead=0)
    targets, _ = align(pivot, source, [{S_SPACE: 0.6, S_FOUR: 0.3}, {6: 1.0}])
    assert targets[0] == pytest.approx({SPACE: 0.6, SPACE_FOUR: 0.3})


def test_rows_before_the_content_are_in_no_count() -> None:
    pivot, source = after_space(PIVOT, SPACE, FOUR_DIGIT, ends=END), after_space(SOURCE, S_SPACE, S_4, ends=6)
    survey = Survey(Pair(Side.of(PIVOT, END), Side.of(SOURCE, 6), Strategy()))
    survey.count(pivot, source)
    counts = survey.counts()
    assert list(zip(counts.source.tolist(), counts.pivot.tolist(), strict=True)) == [(S_4, FOUR_DIGIT)]


def test_the_space_costs_nats_and_has_no_bytes() -> None:
    """`␣|4|eggs` of 6 nats over five content bytes: as `␣Four` pays for its space, the lone one does."""
    rows = with_lead(prepared([([(-1, 0), (0, 1), (1, 5)], True)]), 1)
    nll = np.array([1.0, 2.0, 3.0, 9.0], dtype=np.float32)
    candidate = Candidate(rows, nll, sparse([{0: 1.0}] * 4))
    by_level = {
        (unit, level): cross_entropies([candidate], rows, unit=unit, level=level)[0, 0]
        for unit in ("byte", "token")
        for level in ("conversation", "response")
    }
    assert by_level[("byte", "conversation")] == by_level[("byte", "response")] == pytest.approx(6 / 5)
    assert by_level[("token", "conversation")] == by_level[("token", "response")] == pytest.approx(6 / 2)
    for unit, size in (("byte", 5), ("token", 2)):
        found = Comparison.without_sources(rows, SelectionRule(unit=unit, against="student"))
        assert found.counted.tolist() == [True, True, True, False]
        assert found.size.tolist() == [size]


def test_answers_that_begin_with_a_lone_space_are_learnt_and_asked_for(models: dict[str, Path], tmp_path: Path) -> None:
    """Trained on a few answers until it knows them, a model gives them when asked, whatever they begin with."""
    answers = {"How many?": "4 eggs.", "Capital?": "北京", "Mood?": "😀 hi", "Which?": "the capital"}
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in answers.items()
    ]
    training = {
        "max_steps": 60,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
    }
    recipe = runs.write_recipe(
        tmp_path,
        models,
        pivot=str(models["mistral"]),
        sources={"gemma": {"model": str(models["gemma"]), "chat_template": tiny.TEMPLATE}},
        targets={"plain": []},
        data={"train": "few.jsonl", "max_length": 256},
        fuse={"training": training},
    )
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run(load_recipe(recipe), tmp_path / "work", until="fuse")
    chat_model = ChatModel("plain", Reference((str(tmp_path / "work" / "fuse" / "plain" / "model"),)))
    generator = Generator(chat_model, dtype="float32", device="cpu", batch_tokens=999, seed=0)
    prompts = [Prompt(q, (("user", q),), 0.0, 20) for q in answers]
    found: dict[str, Any] = {}
    generator.answer(prompts, lambda index, answer: found.update({prompts[index].key: answer.text}), [False] * 4)
    assert found == answers
