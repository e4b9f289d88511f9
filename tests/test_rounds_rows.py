"""Sampled tokens as rows, the rows that are learnt, and the figures of a round's answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fusechat.data.conversations import Conversation, Message
from fusechat.data.prepared import ROWS, Prepared
from fusechat.data.prompts import answered
from fusechat.models.chat_model import ChatModel
from fusechat.models.reference import Reference
from fusechat.models.token_bytes import token_bytes
from fusechat.models.tokenise import prepare_conversation
from fusechat.rounds.alarms import NOTHING, alarms, of_answers, repetition
from fusechat.rounds.cut import kept_rows, take_rows
from fusechat.rounds.sampled import Opening, Sampled, sampled
from fusing import prepared as made
from fusing import sparse

PROMPT = Conversation((Message("user", "What is the capital of France?"),), "here")
TEXTS = ("Paris, a city.", "4 eggs", "größer 你好 🙂", "The answer is 40.\nAnd so on", "El niño")


def template_of(models: dict[str, Path], kind: str) -> Any:
    return ChatModel(kind, Reference((str(models[kind]),)), tiny.TEMPLATES[kind]).template()


def resampled(template: Any, tokens: list[int], end: int | None, *, max_length: int = 512) -> Sampled:
    prompt = list(template.tokenizer(template.prompt(PROMPT.messages, PROMPT), add_special_tokens=False)["input_ids"])
    opening = Opening.of(template)
    return sampled("one", prompt, tokens, end, token_bytes(template.tokenizer), opening, max_length=max_length)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_templates_own_tokens_are_the_rows_that_prepare_makes(models: dict[str, Path], kind: str) -> None:
    template = template_of(models, kind)
    for text in TEXTS:
        gold, _ = prepare_conversation(answered(PROMPT, text), template, max_length=512)
        tokens, closing = gold.gold[~gold.end_of_turn].tolist(), gold.gold[gold.end_of_turn].tolist()
        found = resampled(template, tokens, closing[0])
        assert found.text == text
        assert found.rows is not None
        for name in (*ROWS, "content_bytes"):
            assert getattr(found.rows, name).tolist() == getattr(gold, name).tolist(), (kind, text, name)
        assert found.rows.input_ids.tolist() == gold.input_ids[: gold.position[-1] + 1].tolist()


def test_tokens_stay_as_sampled_where_the_text_would_be_encoded_otherwise(models: dict[str, Path]) -> None:
    template = template_of(models, "llama")
    letters = [template.tokenizer.convert_tokens_to_ids(letter) for letter in "Paris"]
    found = resampled(template, letters, template.end_of_turn)
    assert found.rows is not None
    assert found.text == "Paris"
    assert found.rows.gold.tolist() == [*letters, template.end_of_turn]
    assert found.rows.begin.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.rows.end.tolist() == [1, 2, 3, 4, 5, 5]
    assert found.rows.end_of_turn.tolist() == [False] * 5 + [True]


def test_a_space_that_the_template_does_not_write_is_the_answers_own(models: dict[str, Path]) -> None:
    template = template_of(models, "llama")
    tokens = template.tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    found = resampled(template, tokens, None)
    assert (found.text, found.rows is not None and found.rows.begin[0]) == (" Paris", 0)
    template = template_of(models, "mistral")  # whose answers begin with one
    table = token_bytes(template.tokenizer)
    without = [token for token, piece in enumerate(table.pieces) if piece == b"P" and token not in table.special][:1]
    found = resampled(template, without, None)
    assert (found.text, found.rows is not None and found.rows.begin.tolist()) == ("P", [0])


def test_where_tokens_are_no_text_the_answer_ends(models: dict[str, Path]) -> None:
    template = template_of(models, "llama")
    table = token_bytes(template.tokenizer)
    byte = {piece: token for token, piece in enumerate(table.pieces) if len(piece) == 1}
    start = template.tokenizer.convert_tokens_to_ids("<|im_start|>")
    one, two, third = (byte[bytes([value])] for value in "你".encode())
    a, b = byte[b"a"], byte[b"b"]
    for tokens, end, text, gold in (
        ([a, start, b], 7, "a", [a, start]),  # the special token stands where the turn might end
        ([a, one, b, b], 7, "a", [a, one]),  # half a character and then another
        ([a, one, two], None, "a", [a]),  # the answer was cut inside of a character …
        ([a, one, two], 7, "a", [a, one]),  # … or ended there
        ([a, one, two, third], 7, "a你", [a, one, two, third, 7]),
        ([a, len(table) + 3, b], 7, "a", [a, len(table) + 3]),  # of a padded vocabulary
        ([a, b], None, "ab", [a, b]),
    ):
        found = resampled(template, tokens, end)
        assert found.rows is not None
        assert (found.text, found.rows.gold.tolist()) == (text, gold), tokens
        assert found.rows.content_bytes.tolist() == [len(text.encode())]
    for tokens in ([], [start], [one], [byte[b" "], byte[b"\n"]]):
        assert resampled(template, tokens, 7) == Sampled(None)
    prompt = resampled(template, [a], None).rows
    assert prompt is not None
    cut = resampled(template, [a, b, a], 7, max_length=int(prompt.position[0]) + 2)
    assert cut.rows is not None
    assert (cut.text, cut.rows.gold.tolist()) == ("ab", [a, b])


def naive(gold: list[int], rows: list[dict[int, float]], until_wrong: float) -> list[bool]:
    kept, cut = [], False
    for token, row in zip(gold, rows, strict=True):
        kept.append(bool(row) and not cut)
        if row and not cut and row.get(token, 0.0) / sum(row.values()) < until_wrong:
            cut = True
    return kept


def test_rows_are_kept_up_to_the_first_wrong_token() -> None:
    rows = [{3: 0.5, 4: 0.2}, {}, {5: 0.08, 6: 0.4}, {6: 0.9}]
    assert kept_rows(np.array([3, 1, 5, 6]), sparse(rows, 2), 0.1).tolist() == [True, False, True, True]
    assert kept_rows(np.array([3, 6, 9, 6]), sparse(rows, 2), 0.1).tolist() == [True, False, True, False]
    assert kept_rows(np.array([9, 1, 5, 6]), sparse(rows, 2), 0.1).tolist() == [True, False, False, False]
    assert kept_rows(np.array([9, 1, 9, 9]), sparse(rows, 2), 0.0).tolist() == [True, False, True, True]
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(1, 8))
        rows = [
            {
                int(token): float(generator.random()) / 3
                for token in generator.choice(6, int(generator.integers(0, 4)), False)
            }
            for _ in range(n)
        ]
        gold = generator.integers(0, 6, n)
        for share in (0.0, 0.1, 0.5, 1.0):
            found = kept_rows(gold, sparse(rows, 3, np.float64), share).tolist()
            assert found == naive(gold.tolist(), rows, share)


def test_a_conversation_with_the_kept_rows_alone() -> None:
    rows = made("one", [(4, 9)])
    kept = take_rows(rows, np.array([True, False, True, False, False]))
    assert isinstance(kept, Prepared)
    assert (kept.id, kept.gold.tolist()) == ("one", rows.gold[[0, 2]].tolist())
    assert len(kept.input_ids) == kept.position[-1] + 1
    assert kept.content_bytes.tolist() == [9]


def test_figures_of_answers() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 8) == pytest.approx(4 / 5)  # five sequences of four, one of them new
    rows = [
        {"text": "a", "tokens": [1, 2], "end": 7},
        {"text": "a", "tokens": [7] * 8, "end": None},
        {"text": "b", "tokens": [1, 2], "end": 7},
    ]
    assert of_answers(rows) == {
        "tokens": 4.0,
        "repetition": round(0.8 / 3, 6),
        "same": round(2 / 3, 6),
        "ended": round(2 / 3, 6),
    }
    assert of_answers([]) == {"tokens": None, "repetition": None, "same": None, "ended": None}


def test_alarms_compare_with_the_first_round() -> None:
    first = {"kept": 58, "share_kept": 0.58, "tokens": 20.0, "repetition": 0.1, "same": 0.05, "ended": 0.9}
    first["nats_per_byte"] = 0.5
    assert alarms(first, first) == []
    for change, expected in (
        ({"kept": 0}, [NOTHING]),
        ({"share_kept": 0.2}, ["rows that are kept: 20%, 58% in round 1"]),
        ({"share_kept": 0.9, "tokens": 39.0, "ended": 0.5, "nats_per_byte": 0.2, "repetition": 0.0}, []),
        ({"tokens": 41.0}, ["tokens an answer: 41, 20 in round 1"]),
        (
            {"tokens": 3.0, "ended": 0.4},
            ["answers that end: 40%, 90% in round 1", "tokens an answer: 3, 20 in round 1"],
        ),
        ({"repetition": 0.4}, ["repetition within answers: 40%, 10% in round 1"]),
        ({"same": 0.9}, ["answers that are the same text: 90%, 5% in round 1"]),
        ({"nats_per_byte": 1.1}, ["nats per byte of the answers under their teachers: 1.10, 0.50 in round 1"]),
    ):
        assert alarms({**first, **change}, first) == expected
