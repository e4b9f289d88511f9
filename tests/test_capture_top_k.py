"""The k most likely tokens and their log-probabilities, against sorting everything and a softmax in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import FEW, each, pairwise
from fusechat.capture import top_k
from fusechat.capture.top_k import sparse_rows

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def naive(row: list[float], k: int) -> tuple[list[int], list[float]]:
    """The k greatest of a row, ties to the lower id, and their log-probabilities."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))[:k]
    total = np.sum(np.exp(np.array(row) - max(row)))
    return order, [row[token] - max(row) - float(np.log(total)) for token in order]


def naive_tail(row: list[float], k: int) -> float:
    """The probability of all that are not of the k greatest, added up from the smallest on."""
    exponentials = np.sort(np.exp(np.array(row) - max(row)))
    return float(exponentials[: len(row) - k].sum() / exponentials.sum())


@st.composite
def logits(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Rows over vocabularies that are no multiple of a block, with many ties, -inf, zeros of both signs; and a k."""
    size = draw(st.sampled_from([1, 2, 7, 255, 256, 257, 511, 512, 1000, 5000]))
    some = draw(st.lists(st.sampled_from([-INF, -1e4, -3.5, -0.0, 0.0, 1.0, 1.0078125, 2.0, 80.0]), min_size=1))
    spread = draw(st.floats(0, 30))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    share = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))  # of the tokens, one of the few values above
    rows = np.where(
        random.random((3, size)) < share, random.choice(some, (3, size)), spread * random.normal(size=(3, size))
    )
    rows[:, random.integers(size)] = 1.0  # one is finite
    k = draw(st.one_of(st.integers(1, size), st.just(size), st.just(1)))
    return torch.from_numpy(rows).to(draw(st.sampled_from(DTYPES))), k


@FEW
@given(logits())
def test_as_by_sorting_everything(case: tuple[torch.Tensor, int]) -> None:
    rows, k = case
    gold = rows.float().argmin(dim=1)
    ids, logprobs, nll, tail = sparse_rows(rows, gold, k)
    assert (ids.dtype, *{logprobs.dtype, nll.dtype, tail.dtype}) == (torch.int32, torch.float32)
    for row, values in enumerate(rows.double().tolist()):
        order, expected = naive(values, k)
        assert ids[row].tolist() == order
        np.testing.assert_allclose(logprobs[row].numpy(), expected, rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(tail[row].item(), naive_tail(values, k), rtol=1e-5, atol=1e-30)
        assert -nll[row].item() == pytest.approx(naive(values, len(values))[1][-1], rel=1e-6, abs=2e-6)


@FEW
@given(logits())
def test_the_way_for_other_devices_gives_the_same(case: tuple[torch.Tensor, int]) -> None:
    """But for which of equal tokens it takes."""
    rows, k = case
    gold = torch.zeros(len(rows), dtype=torch.long)
    (ids, logprobs, nll, tail), ours = top_k._by_torch(rows, gold, k), sparse_rows(rows, gold, k)
    torch.testing.assert_close(tail, ours[3], rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(logprobs, ours[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, ours[2], rtol=1e-5, atol=1e-5)
    picked = rows.float().gather(1, ids.long())
    assert torch.equal(picked, rows.float().gather(1, ours[0].long()))
    assert all(len(set(row)) == k for row in ids.tolist())


@each("dtype, size", pairwise(DTYPES, (50_000, 262_144)))
def test_large_vocabularies_lose_nothing(dtype: torch.dtype, size: int) -> None:
    """Sums over many terms of like size are where float32 would lose digits."""
    rows = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).mul(0.1).to(dtype)
    gold = torch.tensor([0, 1, size - 1, size // 2])
    ids, logprobs, nll, tail = sparse_rows(rows, gold, 50)
    exact = rows.double().log_softmax(dim=1)
    expected = exact.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids.long(), expected.indices[:, :50])
    torch.testing.assert_close(logprobs.double(), expected.values[:, :50], rtol=0, atol=4e-6)
    torch.testing.assert_close(nll.double(), -exact.gather(1, gold[:, None])[:, 0], rtol=0, atol=4e-6)
    torch.testing.assert_close(tail.double(), expected.values[:, 50:].exp().sum(dim=1), rtol=4e-6, atol=0)


def test_what_is_not_finite_spoils_its_own_row() -> None:
    for dtype, bad, where in itertools.product(DTYPES, (float("nan"), -float("nan"), INF), (0, 299, 511)):
        rows = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
        rows[1, where] = bad
        _, logprobs, nll, _ = sparse_rows(rows.to(dtype), torch.tensor([1, 2, 3]), 4)
        assert logprobs.isnan().all(dim=1).tolist() == [False, True, False], (dtype, bad, where)
        assert nll.isnan().tolist() == [False, True, False], (dtype, bad, where)
    _, logprobs, nll, _ = sparse_rows(torch.full((1, 300), -INF), torch.tensor([0]), 3)
    assert logprobs.isnan().all()
    assert nll.isnan().all()


def test_threads_change_nothing() -> None:
    rows = torch.randn(5, 700, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(sparse_rows(rows, torch.arange(5), 9))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in found for one, other in zip(found[0], result, strict=True))


def test_rows_that_do_not_lie_together() -> None:
    wide = torch.randn(4, 600, generator=torch.Generator().manual_seed(0)).bfloat16()
    gold = torch.tensor([0, 1])
    for rows in (wide[::2, :300], wide[:2, ::2], wide.T[:2]):
        found = sparse_rows(rows, gold, 3)
        expected = sparse_rows(rows.clone(memory_format=torch.contiguous_format), gold, 3)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
