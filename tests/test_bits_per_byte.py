"""Bits per byte against a loop over the tokens of one conversation at a time, and what models are compared on."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from cases import each
from fusechat.data.prepared import Prepared
from fusechat.evaluate.bits_per_byte import compare, score_responses
from test_forward import TURNS, prepare_all


@torch.no_grad()
def naive_scores(model: Any, conversation: Prepared, turns: tuple[str, ...]) -> list[tuple[float, int]]:
    """One prefix of tokens at a time."""
    scores = [(0.0, len(answer.encode())) for answer in turns[1::2]]
    rows = zip(conversation.position, conversation.response, conversation.end_of_turn, strict=True)
    for position, response, closing in rows:
        if not closing:
            before = torch.tensor([conversation.input_ids[:position].tolist()])
            logits = model(input_ids=before).logits[0, -1].double()
            nll = -torch.log_softmax(logits, dim=0)[int(conversation.input_ids[position])].item()
            scores[response] = scores[response][0] + nll, scores[response][1]
    return scores


@each("kind", tiny.KINDS)
def test_scores_are_those_of_a_naive_loop(tokenizers: dict[str, Any], loaded: dict[str, Any], kind: str) -> None:
    conversations = prepare_all(tokenizers, kind)
    naive = [naive_scores(loaded[kind], *both) for both in zip(conversations, TURNS, strict=True)]
    for batch_tokens in (1, 10_000):
        done: list[int] = []
        found = score_responses(loaded[kind], conversations, batch_tokens=batch_tokens, advance=done.append)
        assert list(found) == [conversation.id for conversation in conversations]
        assert sum(done) == 3
        for scores, expected in zip(found.values(), naive, strict=True):
            assert [size for _, size in scores] == [size for _, size in expected]
            assert [nll for nll, _ in scores] == pytest.approx([nll for nll, _ in expected], rel=1e-4), batch_tokens
        nats, size = (sum(column) for column in zip(*(pair for one in naive for pair in one), strict=True))
        score = compare({"one": found})["one"]
        assert score.value == pytest.approx(nats / size / math.log(2), rel=1e-4)
        assert (score.bytes, score.responses, score.missing) == (int(size), 4, 0)


def test_a_model_that_knows_nothing_has_the_bits_of_its_vocabulary(tokenizers: dict[str, Any]) -> None:
    """All logits equal: every token costs log2(V) bits."""
    model = tiny.model_of("llama", tokenizers["llama"])
    torch.nn.init.zeros_(model.lm_head.weight)
    conversations = prepare_all(tokenizers, "llama")
    found = score_responses(model, conversations, batch_tokens=1000, advance=lambda count: None)
    tokens = sum(int((~conversation.end_of_turn).sum()) for conversation in conversations)
    size = sum(len(answer.encode()) for turns in TURNS for answer in turns[1::2])
    assert compare({"one": found})["one"].value == pytest.approx(tokens * np.log2(400) / size, rel=1e-5)


def test_models_are_compared_on_the_responses_that_all_have() -> None:
    """`b` lost the second response of x, `c` rejected y: only the first of x is common."""
    scores = compare(
        {
            "a": {"x": [(8.0, 4), (100.0, 1)], "y": [(1.0, 1)]},
            "b": {"x": [(4.0, 4)], "y": [(2.0, 1)]},
            "c": {"x": [(2.0, 3), (7.0, 7)]},
        }
    )
    ln2 = math.log(2)
    assert scores["a"].value == pytest.approx(8 / 4 / ln2)
    assert scores["b"].value == pytest.approx(4 / 4 / ln2)
    assert scores["c"].value == pytest.approx(2 / 3 / ln2)
    assert {(score.responses, score.missing) for score in scores.values()} == {(1, 2)}


def test_what_cannot_be_measured_is_missing_not_zero() -> None:
    nothing = compare({"a": {"x": [(1.0, 1)]}, "b": {}})
    assert nothing["a"].value is None
    assert nothing["a"].missing == 1
    broken = compare({"a": {"x": [(math.nan, 1)]}, "b": {"x": [(1.0, 1)]}})
    assert broken["a"].value is None
    assert broken["b"].value == pytest.approx(1 / math.log(2))
