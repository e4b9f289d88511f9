"""The fusion loss as one number, and its gradient, against the dense one."""

import itertools
from typing import Any

import pytest
import torch

from cases import each
from dense_losses import KINDS, TAILS, TEMPERATURES, dense_rows, problem
from fusechat.fuse import fusion_loss
from fusechat.fuse.loss import fusion_loss_parts

N, V = problem()["logits"].shape


def expected_and_gradient(
    given: dict[str, torch.Tensor], *, sft_weight: float, num_items: float, temperature: float = 1.0, **how: Any
) -> tuple[float, torch.Tensor]:
    logits = given["logits"].double().requires_grad_()
    nll, divergence = dense_rows(**{**given, "logits": logits}, temperature=temperature, **how)
    fusion = temperature**2 * divergence.sum()
    total = (sft_weight * nll.sum() + (1 - sft_weight) * fusion) / num_items
    (gradient,) = torch.autograd.grad(total, logits)
    return total.item(), gradient


def found_and_gradient(given: dict[str, torch.Tensor], **how: Any) -> tuple[float, torch.Tensor]:
    logits = given["logits"].clone().requires_grad_()
    total = fusion_loss(**{**given, "logits": logits}, **how)
    (gradient,) = torch.autograd.grad(total, logits)
    return total.item(), gradient


@each("kind, tail, temperature", [*itertools.product(KINDS, TAILS, TEMPERATURES)])
def test_value_and_gradient_are_those_of_the_dense_loss(kind: str, tail: str, temperature: float) -> None:
    for seed, sft_weight in ((0, 0.9), (1, 0.25), (2, 0.0), (3, 1.0)):
        how = {"kind": kind, "tail": tail, "temperature": temperature, "sft_weight": sft_weight}
        expected, gradient = expected_and_gradient(problem(seed=seed), num_items=N, **how)
        value, found = found_and_gradient(problem(seed=seed), **how)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-6)


def test_by_hand() -> None:
    """Two outcomes of probability 1/2 each in a vocabulary of two, and targets 3/4 and 1/8."""
    given = {
        "logits": torch.zeros(1, 2),
        "labels": torch.tensor([0]),
        "target_ids": torch.tensor([[1, 0]]),
        "target_logprobs": torch.tensor([[0.75, 0.125]]).log(),
    }
    log2 = 0.6931472
    assert fusion_loss(**given, sft_weight=0.9).item() == pytest.approx(log2)
    # P renormalised is 6/7 and 1/7: KL = 6/7 log(12/7) + 1/7 log(2/7)
    assert fusion_loss(**given, sft_weight=0.0, kind="kl").item() == pytest.approx(0.2830309, abs=1e-6)
    # and at temperature 2 √6 : 1, times 2²: 4 · (0.7101021 log 1.4202041 + 0.2898979 log 0.5797959)
    assert fusion_loss(**given, sft_weight=0.0, kind="kl", temperature=2.0).item() == pytest.approx(0.3643476, abs=1e-6)


def test_sft_weight_one_is_plain_fine_tuning_and_zero_is_fusion_alone() -> None:
    given = problem()
    plain = torch.nn.functional.cross_entropy(given["logits"], given["labels"])
    moved = {**given, "labels": (given["labels"] + 1) % V}
    for kind in KINDS:
        assert fusion_loss(**given, sft_weight=1.0, kind=kind).item() == pytest.approx(plain.item(), rel=1e-6), kind
        assert fusion_loss(**given, sft_weight=0.0, kind=kind) == fusion_loss(**moved, sft_weight=0.0, kind=kind), kind


def test_the_parts_are_the_terms_and_the_total_their_weighted_sum() -> None:
    given = problem()
    parts = fusion_loss_parts(**given, sft_weight=0.75, kind="jsd", temperature=2.0, num_items=9)
    nll, divergence = dense_rows(**given, kind="jsd", temperature=2.0)
    assert parts.sft.item() == pytest.approx(nll.sum().item() / 9, rel=1e-6)
    assert parts.fusion.item() == pytest.approx(4 * divergence.sum().item() / 9, rel=1e-6)
    assert parts.total.item() == pytest.approx(0.75 * parts.sft.item() + 0.25 * parts.fusion.item(), rel=1e-6)


@each("kind, tail", itertools.product(KINDS, TAILS))
def test_a_row_without_targets_keeps_its_sft_term_and_has_no_fusion_term(kind: str, tail: str) -> None:
    given = {name: tensor[3:4] for name, tensor in problem().items()}
    assert (given["target_ids"] == -1).all()
    plain = -torch.log_softmax(given["logits"][0], 0)[given["labels"][0]].item()
    without = {**given, "target_ids": None, "target_logprobs": None}
    for targets, sft_weight in ((given, 0.9), (without, 0.9), (without, 1.0)):
        parts = fusion_loss_parts(**targets, sft_weight=sft_weight, kind=kind, tail=tail)
        assert parts.fusion.item() == 0.0
        assert parts.sft.item() == pytest.approx(plain, rel=1e-6)
        assert parts.total.item() == pytest.approx(sft_weight * plain, rel=1e-6)
    _, gradient = found_and_gradient(given, sft_weight=0.0, kind=kind, tail=tail)
    assert (gradient == 0).all()


def test_a_gate_says_which_rows_have_a_fusion_term() -> None:
    given = problem()
    logits = given["logits"].double().requires_grad_()
    open_rows = torch.tensor([True, False, True, True, False, True])
    seen = []

    def gate(nll: torch.Tensor) -> torch.Tensor:
        assert not nll.requires_grad
        seen.append(nll)
        return open_rows

    for temperature in (1.0, 2.0):
        how = {"kind": "kl", "tail": "bucket", "temperature": temperature}
        parts = fusion_loss_parts(**{**given, "logits": logits}, sft_weight=0.5, num_items=7, gate=gate, **how)
        nll, divergence = dense_rows(**{**given, "logits": logits}, **how)
        expected = (0.5 * nll.sum() + 0.5 * temperature**2 * divergence[open_rows].sum()) / 7
        assert parts.total.item() == pytest.approx(expected.item(), rel=1e-9)
        gradients = [torch.autograd.grad(total, logits)[0] for total in (parts.total, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(seen.pop(), nll.detach())
    assert not seen


def test_a_closed_gate_leaves_plain_fine_tuning_even_where_the_divergence_is_infinite() -> None:
    given = problem()
    logits = given["logits"].clone()
    logits[0, given["target_ids"][0, 0]] = -torch.inf
    logits.requires_grad_()
    gated = {**given, "logits": logits}
    parts = fusion_loss_parts(**gated, sft_weight=0.5, gate=lambda nll: torch.arange(N) > 0)
    assert torch.isfinite(parts.total)
    assert torch.isfinite(torch.autograd.grad(parts.total, logits)[0]).all()
    assert not torch.isfinite(fusion_loss(**gated, sft_weight=0.5))


def test_both_terms_are_divided_by_num_items_so_that_parts_of_a_batch_add_up() -> None:
    given = problem()
    for kind, tail, items in itertools.product(KINDS, TAILS, (40, torch.tensor(40))):
        how = {"sft_weight": 0.7, "kind": kind, "tail": tail, "num_items": items}
        halves = [
            fusion_loss(**{name: tensor[part] for name, tensor in given.items()}, **how)
            for part in (slice(0, 2), slice(2, N))
        ]
        whole = fusion_loss(**given, **how)
        assert sum(halves).item() == pytest.approx(whole.item(), rel=1e-6)
        by_default = fusion_loss(**given, sft_weight=0.7, kind=kind, tail=tail)
        assert whole.item() == pytest.approx(by_default.item() * N / 40, rel=1e-6)


def test_divergences_from_the_models_own_distribution_are_zero() -> None:
    given = problem()
    logprobs, ids = torch.log_softmax(given["logits"], dim=1).sort(dim=1, descending=True)
    own = {**given, "target_ids": ids, "target_logprobs": logprobs}  # the whole vocabulary: nothing is left to a tail
    for kind, tail in itertools.product(("kl", "reverse_kl", "jsd"), TAILS):
        assert fusion_loss(**own, sft_weight=0.0, kind=kind, tail=tail).item() == pytest.approx(0.0, abs=1e-5), kind


def test_settings_that_do_not_exist_and_targets_that_do_not_fit_are_refused() -> None:
    given = problem()
    for wrong, sft_weight in itertools.product(({"kind": "mse"}, {"tail": "drop"}, {"temperature": 0.0}), (0.9, 1.0)):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            fusion_loss(**given, sft_weight=sft_weight, **wrong)
    twice = given["target_ids"].clone()
    twice[0, 3] = twice[0, 0]
    for wrong, message in (
        ({"target_ids": twice}, "a row names a token twice"),
        ({"target_ids": given["target_ids"][:-1]}, r"are \[6, k\], not \(5, 4\) and \(6, 4\)"),
        ({"target_logprobs": given["target_logprobs"][:, :-1]}, r"are \[6, k\], not \(6, 4\) and \(6, 3\)"),
        ({"target_logprobs": None}, "come together"),
    ):
        with pytest.raises(ValueError, match=message):
            fusion_loss(**{**given, **wrong}, sft_weight=0.9)


def test_rows_that_nobody_teaches_learn_their_gold_token_alone() -> None:
    """By hand: two outcomes; the first row has a teacher that says 3/4, 1/4, the second none. λ weighs the terms of the first."""
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.8]]))
    ids, logprobs = torch.tensor([[0, 1], [-1, -1]]), torch.log(torch.tensor([[0.75, 0.25], [1.0, 1.0]]))
    parts = fusion_loss_parts(
        logits, torch.tensor([0, 0]), ids, logprobs, sft_weight=0.4, alone=torch.tensor([False, True])
    )
    half, fifth = -torch.log(torch.tensor(0.5)), -torch.log(torch.tensor(0.2))
    assert parts.total.item() == pytest.approx(((0.4 * half + 0.6 * half + fifth) / 2).item(), rel=1e-6)
    assert parts.sft.item() == pytest.approx(((half + fifth) / 2).item(), rel=1e-6)
