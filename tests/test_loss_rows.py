"""The losses of single rows, their gradient, and what they do at the edges."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from cases import each
from dense_losses import KINDS, TAILS, TEMPERATURES, dense_rows, problem
from fusechat.fuse import row_losses as module
from fusechat.fuse.loss import row_losses

NAMES = ("kind", "tail", "temperature")


def combinations(*choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Of the first of kind, tail and temperature, as arguments."""
    return [dict(zip(NAMES, values, strict=False)) for values in itertools.product(*choices)]


EVERY = combinations(KINDS, TAILS, TEMPERATURES)


def assert_equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def losses_and_gradient(
    function: Any, given: dict[str, torch.Tensor], by_row: torch.Tensor, **how: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nll [n], divergence [n], and the gradient where row i's losses are weighted `by_row[:, i]`."""
    logits = given["logits"].detach().requires_grad_()
    nll, divergence = function(**{**given, "logits": logits}, **how)
    weighted = (by_row[0].to(nll) * nll + by_row[1].to(nll) * divergence).sum()
    (gradient,) = torch.autograd.grad(weighted, logits)
    return nll.detach(), divergence.detach(), gradient


def assert_as_dense(
    given: dict[str, torch.Tensor], by_row: torch.Tensor, *, rtol: float, atol: float, **how: Any
) -> None:
    found = losses_and_gradient(row_losses, given, by_row, **how)
    expected = losses_and_gradient(dense_rows, {**given, "logits": given["logits"].double()}, by_row, **how)
    assert_equal([one.double() for one in found], expected, rtol=rtol, atol=atol)


def precise(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**given, "logits": given["logits"].double(), "target_logprobs": given["target_logprobs"].double()}


@each("how", EVERY)
def test_rows_and_their_weighted_gradient_are_the_dense_ones(how: dict[str, Any]) -> None:
    by_row = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))  # of either sign
    for seed in range(4):
        assert_as_dense(precise(problem(seed=seed)), by_row, rtol=1e-9, atol=1e-12, **how)
        assert_as_dense(problem(seed=seed), by_row, rtol=1e-4, atol=2e-6, **how)


@each("how", EVERY)
def test_the_tail_that_was_measured_is_the_bucket(how: dict[str, Any]) -> None:
    """However small, and whatever float16 has made of the kept tokens; the kept are scaled to what it leaves."""
    by_row = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))
    measured = torch.tensor([0.3, 1e-3, 1e-7, 0.5, 1e-12, 0.0], dtype=torch.float64)
    for seed in range(2):
        given = problem(seed=seed)
        given["target_logprobs"] = given["target_logprobs"].half()
        assert_as_dense(precise(given), by_row, rtol=1e-9, atol=1e-12, target_tail=measured, **how)
        assert_as_dense(given, by_row, rtol=1e-4, atol=2e-6, target_tail=measured, **how)


def test_without_a_tail_what_half_precision_may_have_made_is_none() -> None:
    """A sure row as float16 stores it: 2e-4 are left over, all of them rounding; that of float32 is a tail."""
    logits, labels = torch.zeros(1, 5), torch.tensor([0])
    logprobs = torch.tensor([[0.6, 0.3998]]).log()
    given = {"target_ids": torch.tensor([[0, 1]]), "kind": "reverse_kl", "tail": "bucket"}
    for dtype, rest in ((torch.float16, 0.0), (torch.bfloat16, 0.0), (torch.float32, 2e-4)):
        stored = logprobs.to(dtype)
        _, found = row_losses(logits, labels, target_logprobs=stored, **given)
        tails = torch.tensor([rest])
        _, expected = row_losses(logits, labels, target_logprobs=stored, target_tail=tails, **given)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"target_tail is \[1\]"):
        row_losses(logits, labels, target_logprobs=logprobs, target_tail=tails[:, None], **given)


@each("how", EVERY)
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    by_row = torch.rand(2, 6, generator=torch.Generator().manual_seed(5))
    for dtype in (torch.float32, torch.bfloat16):
        given = {**problem(), "logits": problem()["logits"].to(dtype)}
        monkeypatch.undo()
        whole = losses_and_gradient(row_losses, given, by_row, **how)
        for elements in (1, 2 * 23, 5 * 23 + 1, 6 * 23):
            monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", elements)
            assert_equal(losses_and_gradient(row_losses, given, by_row, **how), whole, rtol=1e-6, atol=1e-7)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Rows of any mixture of targets and pads, in any order, labels and unlikely tokens among them."""
    n, vocabulary = draw(st.integers(0, 5)), draw(st.integers(2, 9))
    k = draw(st.integers(0, vocabulary - 1))  # so that the bucket holds something
    number = st.floats(-9, 9, width=32)
    ids = [draw(st.permutations(range(vocabulary)))[:k] for _ in range(n)]
    ids = [[-1 if draw(st.booleans()) else token for token in row] for row in ids]
    weights = torch.tensor([[draw(st.floats(0.01, 1.0)) for _ in range(k)] for _ in range(n)]).reshape(n, k)
    share = torch.tensor([[draw(st.floats(0.1, 0.95))] for _ in range(n)]).reshape(n, 1)
    target_ids = torch.tensor(ids, dtype=torch.long).reshape(n, k)
    weights = torch.where(target_ids >= 0, weights, 0.0)
    logits = [[draw(number) for _ in range(vocabulary)] for _ in range(n)]
    return {
        "logits": torch.tensor(logits, dtype=torch.float64).reshape(n, vocabulary),
        "labels": torch.tensor([draw(st.integers(0, vocabulary - 1)) for _ in range(n)], dtype=torch.long),
        "target_ids": target_ids,
        "target_logprobs": (share * weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)).log().double(),
    }


@drawn(problems(), st.sampled_from(EVERY), st.integers(0, 99), st.booleans())
def test_any_rows_are_the_dense_ones(
    given: dict[str, torch.Tensor], how: dict[str, Any], seed: int, in_single: bool
) -> None:
    by_row = torch.randn(2, len(given["labels"]), generator=torch.Generator().manual_seed(seed))
    tolerance = {"rtol": 1e-7, "atol": 1e-10}
    if in_single:
        given, tolerance = {**given, "logits": given["logits"].float()}, {"rtol": 1e-3, "atol": 1e-4}
    assert_as_dense(given, by_row, **tolerance, **how)


@each("how", EVERY)
def test_the_gradient_is_that_of_the_values(how: dict[str, Any]) -> None:
    """By finite differences of the losses themselves."""
    given = precise(problem(n=6, vocabulary=7, k=3))
    logits = given.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda z: row_losses(z, **given, **how), (logits,))


@each("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32_and_only_its_gradient_is_rounded(dtype: torch.dtype) -> None:
    coarse = {**problem(), "logits": problem()["logits"].to(dtype)}
    coarse["target_logprobs"] = coarse["target_logprobs"].half()
    by_row = torch.rand(2, 6, generator=torch.Generator().manual_seed(5))
    wide = torch.promote_types(dtype, torch.float32)
    same = {**coarse, "logits": coarse["logits"].to(wide), "target_logprobs": coarse["target_logprobs"].to(wide)}
    for how in EVERY:
        *losses, gradient = losses_and_gradient(row_losses, coarse, by_row, **how)
        *expected, of_wide = losses_and_gradient(row_losses, same, by_row, **how)
        assert [loss.dtype for loss in losses] == [wide, wide], how
        assert gradient.dtype == dtype
        assert_equal([*losses, gradient], [*expected, of_wide.to(dtype)], rtol=0, atol=0)


def test_autocast_and_the_order_in_memory_change_nothing() -> None:
    by_row = torch.ones(2, 6)
    for dtype, tail in itertools.product((torch.bfloat16, torch.float32), TAILS):
        given = {**problem(), "logits": problem()["logits"].to(dtype)}
        expected = losses_and_gradient(row_losses, given, by_row, tail=tail)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = losses_and_gradient(row_losses, given, by_row, tail=tail)
        assert_equal(found, expected, rtol=0, atol=0)
        transposed = {**given, "logits": given["logits"].T.contiguous().T}
        assert_equal(losses_and_gradient(row_losses, transposed, by_row, tail=tail), expected)


def test_without_targets_the_nll_is_that_of_fine_tuning() -> None:
    given = problem()
    logits = given["logits"].requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, given["labels"], reduction="none")
    weights = torch.arange(6.0)
    for ids in (None, torch.full((6, 0), -1), torch.full((6, 3), -1)):
        logprobs = None if ids is None else torch.full(ids.shape, -torch.inf)
        nll, divergence = row_losses(logits, given["labels"], ids, logprobs)
        assert torch.equal(divergence, torch.zeros(6))
        torch.testing.assert_close(nll, expected)
        gradients = [torch.autograd.grad(each @ weights, logits, retain_graph=True)[0] for each in (nll, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@each("how", EVERY)
def test_tokens_that_cannot_come_are_as_if_they_were_not_there(how: dict[str, Any]) -> None:
    """A vocabulary padded with tokens of logit -inf."""
    given, by_row = problem(), torch.ones(2, 6)
    padded = {**given, "logits": torch.nn.functional.pad(given["logits"], (0, 5), value=-torch.inf)}
    *losses, gradient = losses_and_gradient(row_losses, padded, by_row, **how)
    *expected, of_given = losses_and_gradient(row_losses, given, by_row, **how)
    assert_equal(losses, expected)
    torch.testing.assert_close(gradient[:, :-5], of_given, rtol=1e-5, atol=1e-6)
    assert (gradient[:, -5:] == 0).all()


def test_a_bucket_with_no_token_in_it() -> None:
    """All of the vocabulary is kept, or all that can come: Q of the bucket is zero, and so is P's."""
    logits = torch.tensor([[1.0, 2.0, 0.5, -torch.inf]])
    given = {
        "logits": logits,
        "labels": torch.tensor([2]),
        "target_ids": torch.tensor([[2, 0, 1]]),
        "target_logprobs": torch.tensor([[0.2, 0.3, 0.5]]).log(),
    }
    for kind, temperature in itertools.product(KINDS, TEMPERATURES):
        how = {"kind": kind, "temperature": temperature}
        assert_equal(*(losses_and_gradient(row_losses, given, torch.ones(2, 1), tail=tail, **how) for tail in TAILS))


def test_an_outcome_that_the_model_excludes() -> None:
    """A logit of -inf is the limit of low ones: infinitely wrong for KL and cross-entropy, no more than wrong for the others."""
    given = precise(problem())
    low, never = given["logits"].clone(), given["logits"].clone()
    low[0, given["target_ids"][0, 0]] = -80.0
    never[0, given["target_ids"][0, 0]] = -torch.inf
    by_row, problems = torch.ones(2, 6), [{**given, "logits": logits} for logits in (never, low)]
    for how in combinations(("reverse_kl", "jsd"), TAILS):
        assert_equal(*(losses_and_gradient(row_losses, each, by_row, **how) for each in problems))
    for how in combinations(("cross_entropy", "kl"), TAILS):
        _, divergence = row_losses(**problems[0], **how)
        assert divergence[0] == torch.inf
        assert torch.isfinite(divergence[1:]).all()


def test_the_bucket_of_a_confident_model_is_its_own_tail() -> None:
    """The model leaves from 1e-8 to 1e-51 to the tail (1e-103 at temperature 0.5), the target a tenth: that must be said,
    and pushed."""
    logits = torch.zeros(3, 23)
    logits[:, 0] = torch.tensor([20.0, 60.0, 120.0])
    logits[:, 1] = logits[:, 0] - 1
    given = {
        "logits": logits,
        "labels": torch.tensor([0, 1, 7]),
        "target_ids": torch.tensor([[0, 1]]).expand(3, 2),
        "target_logprobs": torch.tensor([[0.6, 0.3]]).log().expand(3, 2),
    }
    for how in combinations(KINDS, ("bucket",), TEMPERATURES):
        assert_as_dense(given, torch.tensor([[1.0, 0.5, 0.0], [1.0, 2.0, 1.0]]), rtol=1e-4, atol=1e-6, **how)


def test_large_logits_give_finite_losses_and_gradients() -> None:
    for how in combinations(KINDS, TAILS):
        for found in losses_and_gradient(row_losses, problem(scale=60.0), torch.ones(2, 6), **how):
            assert torch.isfinite(found).all(), how


def test_targets_of_vanishing_mass_count_by_their_proportions() -> None:
    given, by_row = problem(), torch.ones(2, 6)
    faint = {**given, "target_logprobs": given["target_logprobs"] - 200.0}
    for how in combinations(KINDS, ("renormalise",), TEMPERATURES):
        both = (losses_and_gradient(row_losses, each, by_row, **how) for each in (faint, given))
        assert_equal(*both, rtol=1e-3, atol=1e-4)


def test_no_gradient_where_none_is_wanted() -> None:
    given = problem()
    logits = given["logits"].requires_grad_()
    with torch.no_grad():
        found = row_losses(**{**given, "logits": logits})
    found += row_losses(**{**given, "logits": logits.detach()})
    assert [loss.requires_grad for loss in found] == [False] * 4
