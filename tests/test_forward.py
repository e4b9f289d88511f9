"""Logits of response tokens, batches, and captured rows, against calls of the model on one conversation without padding."""

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cases import each
from fusechat.capture.local import Local
from fusechat.capture.top_k import sparse_rows
from fusechat.data.conversations import Conversation, Message
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.models import forward
from fusechat.models.forward import collate, keeps_logits, length_batches, response_logits
from fusechat.models.templates import ChatTemplate
from fusechat.models.tokenise import prepare_conversation

TURNS = [
    ("What is the capital of France?", "Paris, a city of two million people on the river Seine."),
    ("Hi", "Yo"),
    ("1 + 1?", "2", "and 12 * 3 - 7?", "12 * 3 - 7 = 29. 北京是中国的首都"),
]


def prepare_all(tokenizers: dict[str, Any], kind: str) -> list[Prepared]:
    template = ChatTemplate(tokenizers[kind], tiny.TEMPLATES[kind], kind)
    conversations = [
        Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)), "here")
        for turns in TURNS
    ]
    return [prepare_conversation(one, template, max_length=500)[0] for one in conversations]


def capture(model: Any, conversations: list[Prepared], k: int) -> list[SparseDistribution | None]:
    """All of them in one batch."""
    return Local(model, k=k, batch_tokens=10_000, name="").capture(conversations, lambda n: None)


@torch.no_grad()
def unpadded_logits(model: Any, conversation: Prepared) -> torch.Tensor:
    """Row i: what the model says after all tokens before the row's token."""
    ids = torch.tensor([conversation.input_ids.tolist()])
    full = model(input_ids=ids).logits[0]
    return torch.stack([full[position - 1] for position in conversation.position.tolist()])


@each("kind", tiny.KINDS)
@torch.no_grad()
def test_logits_and_captured_rows_are_those_of_each_conversation_alone(
    tokenizers: dict[str, Any], loaded: dict[str, Any], kind: str
) -> None:
    conversations = prepare_all(tokenizers, kind)
    assert len({len(one.input_ids) for one in conversations}) == 3  # so that two of them are padded
    found = response_logits(loaded[kind], collate(conversations, pad=tokenizers[kind].pad_token_id))
    expected = [unpadded_logits(loaded[kind], one) for one in conversations]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert found.std(dim=1).min() > 0.1  # the models are no uniform ones, for which any position would do
    captures = capture(loaded[kind], conversations, k=6)
    for conversation, captured, logits in zip(conversations, captures, expected, strict=True):
        exact = torch.log_softmax(logits.double(), dim=1)
        assert captured is not None
        assert captured.ids.shape == captured.logprobs.shape == (len(conversation), 6)
        ids, gold = (torch.from_numpy(tokens.astype(np.int64)) for tokens in (captured.ids, conversation.gold))
        np.testing.assert_allclose(captured.logprobs, exact.gather(1, ids), atol=2e-3)
        np.testing.assert_allclose(captured.logprobs, exact.topk(6).values, atol=2e-3)
        np.testing.assert_allclose(captured.nll, -exact[torch.arange(len(gold)), gold], atol=2e-3)


@each("kind", tiny.KINDS)
@torch.no_grad()
def test_the_prediction_does_not_see_the_token_that_it_predicts(
    tokenizers: dict[str, Any], loaded: dict[str, Any], kind: str
) -> None:
    (conversation, *_) = prepare_all(tokenizers, kind)
    row = len(conversation) // 2
    changed = conversation.input_ids.copy()
    changed[conversation.position[row]] = (changed[conversation.position[row]] + 1) % len(tokenizers[kind])
    other = Prepared(**{**conversation.__dict__, "input_ids": changed})
    one, two = (response_logits(loaded[kind], collate([which])) for which in (conversation, other))
    torch.testing.assert_close(one[: row + 1], two[: row + 1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one[row + 1], two[row + 1], atol=1e-3)


class Plain(torch.nn.Module):
    """A model that always runs its head everywhere."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


class Wrapped(torch.nn.Module):
    """As distributed training wraps a model."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@torch.no_grad()
def test_models_that_cannot_keep_chosen_logits_give_the_same(
    tokenizers: dict[str, Any], loaded: dict[str, Any]
) -> None:
    model = loaded["gemma"]
    batch = collate(prepare_all(tokenizers, "gemma"))
    assert keeps_logits(model)
    assert keeps_logits(Wrapped(model))
    assert not keeps_logits(Wrapped(Plain(model)))
    expected = response_logits(model, batch)
    for other in (Wrapped(model), Plain(model), Wrapped(Plain(model))):
        torch.testing.assert_close(response_logits(other, batch), expected, rtol=1e-5, atol=1e-5)


class Everywhere(Plain):
    """As `Plain`, and tells what its head is."""

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()


@each("kind", tiny.KINDS)
def test_the_head_runs_for_response_rows_alone_however_the_model_is_wrapped(
    tokenizers: dict[str, Any], loaded: dict[str, Any], kind: str
) -> None:
    """The same logits and gradients as picked from the logits of all positions."""
    from peft import LoraConfig, get_peft_model

    model = loaded[kind]
    weight = model.get_input_embeddings().weight
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    for conversations in (prepare_all(tokenizers, kind), prepare_all(tokenizers, kind)[:1]):
        batch = collate(conversations)
        everywhere = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        expected = everywhere[batch.rows[:, 0], batch.rows[:, 1] - 1]
        (gradient,) = torch.autograd.grad(expected.square().sum(), weight)
        ways = [(one, model) for one in (model, Wrapped(model), Plain(model), Everywhere(model))]
        for other, inner in (*ways, (adapted, adapted), (Wrapped(adapted), adapted)):
            shapes: list[torch.Size] = []
            head = inner.get_output_embeddings()
            hook = head.register_forward_hook(lambda m, i, output, shapes=shapes: shapes.append(output.shape))
            found = response_logits(other, batch)
            hook.remove()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            if not isinstance(other, Plain) or isinstance(other, Everywhere):
                assert [shape[:2] for shape in shapes] == [(1, len(batch.rows))]
            if other is model:
                (own,) = torch.autograd.grad(found.square().sum(), weight)
                torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-4)
        assert not model.lm_head._forward_pre_hooks


def test_collate_masks_by_position_so_that_a_padding_token_may_mean_something() -> None:
    one = Prepared("a", *(np.array(column, dtype=np.int32) for column in ([7, 2, 2], [1, 2], [0, 0], [0, 1], [1, 2])),
                   np.array([False, True]), np.array([2], dtype=np.int32))  # fmt: skip
    longer = Prepared("b", np.arange(5, dtype=np.int32), *(np.array([4], dtype=np.int32) for _ in range(4)),
                      np.array([False]), np.array([2], dtype=np.int32))  # fmt: skip
    batch = collate([one, longer], pad=2)
    assert batch.input_ids.tolist() == [[7, 2, 2, 2, 2], [0, 1, 2, 3, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.rows.tolist() == [[0, 1], [0, 2], [1, 4]]


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_cover_each_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(length_batches(np.array(lengths, dtype=np.int64), budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for batch in batches[:-1]:  # none is smaller than it need be
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_sparse_rows_are_the_head_of_the_full_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, chunk in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1 << 26, 100, 1)):
        monkeypatch.setattr(forward, "_CHUNK_ELEMENTS", chunk)
        logits = (4 * torch.randn(7, 30, generator=generator)).to(dtype)
        gold = torch.randint(30, (7,), generator=generator)
        ids, logprobs, nll, _ = sparse_rows(logits, gold, 5)
        assert logprobs.dtype == nll.dtype == torch.float32
        exact = torch.log_softmax(logits.double(), dim=1)
        tolerance = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(logprobs.double(), exact.gather(1, ids.long()), **tolerance)
        torch.testing.assert_close(logprobs.double(), exact.topk(5).values, **tolerance)
        torch.testing.assert_close(nll.double(), -exact[torch.arange(7), gold], **tolerance)
        assert all(len(set(row)) == 5 for row in ids.tolist()), (dtype, chunk)


class Table(torch.nn.Module):
    """Logits by the last token alone."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def row_by_row(name: str, ids: list[int], positions: list[int]) -> Prepared:
    places = np.array(positions, dtype=np.int32)
    none = np.zeros(len(places), dtype=bool)
    return Prepared(name, np.array(ids, dtype=np.int32), *[places] * 4, none, np.array([2], dtype=np.int32))


def test_a_conversation_in_which_something_is_not_finite_is_rejected_alone() -> None:
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    names = {"good": [0, 1, 2], "bad": [3, 5, 1], "after": [4, 3, 5]}
    for bad in (torch.nan, torch.inf):
        table[5, 2] = bad
        conversations = [row_by_row(name, ids, [1, 2]) for name, ids in names.items()]
        good, rejected, after = capture(Table(table), conversations, k=3)
        assert rejected is None
        assert good is not None
        assert after is not None  # it ends with the token, from which nothing is predicted
        exact = torch.log_softmax(table.double(), dim=1)
        np.testing.assert_allclose(good.nll, [-exact[0, 1].item(), -exact[1, 2].item()], rtol=1e-5)


def test_more_candidates_than_tokens_are_all_tokens() -> None:
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    (captured,) = capture(Table(table), [row_by_row("a", [0, 1], [1])], k=10)
    assert captured is not None
    assert sorted(captured.ids[0].tolist()) == [0, 1, 2, 3]
    assert captured.tail == pytest.approx([0.0], abs=1e-6)
