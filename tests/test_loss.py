"""The fusion loss and its gradients against a dense float64 implementation that builds every distribution in full."""

import itertools
from typing import Any

import pytest
import torch

from fusechat.fuse import fusion_loss
from fusechat.fuse.loss import fusion_loss_parts

KINDS, TAILS, TEMPERATURES = ("cross_entropy", "kl", "reverse_kl", "jsd"), ("renormalise", "bucket"), (1.0, 2.0, 0.5)
N, V, K = 6, 23, 4


def dense_terms(
    logits: torch.Tensor,
    labels: torch.Tensor,
    target_ids: torch.Tensor,
    target_logprobs: torch.Tensor,
    *,
    kind: str,
    tail: str,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(SFT, fusion) summed over rows, one row and one outcome at a time."""
    sft, fusion = logits.new_zeros(()), logits.new_zeros(())
    for z, label, ids, logprobs in zip(logits, labels, target_ids, target_logprobs, strict=True):
        sft = sft - torch.softmax(z, dim=0)[label].log()
        kept = [
            (int(token), logprob.double().exp()) for token, logprob in zip(ids, logprobs, strict=True) if token >= 0
        ]
        if not kept:
            continue
        q_full = torch.softmax(z / temperature, dim=0)
        p = torch.stack([probability for _, probability in kept])
        q = torch.stack([q_full[token] for token, _ in kept])
        if tail == "bucket":
            p = torch.cat([p, (1 - p.sum()).clamp(min=0)[None]])
            others = [token for token in range(len(z)) if token not in dict(kept)]
            q = torch.cat([q, q_full[others].sum()[None]])
        p = p ** (1 / temperature)
        p = p / p.sum()
        p, q = p[p > 0], q[p > 0]
        if kind in ("reverse_kl", "jsd"):
            q = q / q.sum()
        m = (p + q) / 2
        value = {
            "cross_entropy": lambda p=p, q=q: -(p * q.log()).sum(),
            "kl": lambda p=p, q=q: (p * (p / q).log()).sum(),
            "reverse_kl": lambda p=p, q=q: (q * (q / p).log()).sum(),
            "jsd": lambda p=p, q=q, m=m: ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
        }[kind]()
        fusion = fusion + temperature**2 * value
    return sft, fusion


def problem(seed: int = 0, scale: float = 2.0) -> dict[str, torch.Tensor]:
    """Row 0 is full, row 1 has one pad, row 2 one target only, row 3 none at all, row 4 is one-hot, row 5 sums to a
    little more than one, as half-precision storage makes it."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, V, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    probabilities = torch.softmax(torch.randn(N, K + 1, generator=generator), dim=1)[:, :K]
    probabilities[5] *= 1.0005 / probabilities[5].sum()
    logprobs = probabilities.log()
    ids[1, 3:], ids[2, 1:], ids[3], ids[4, 1:] = -1, -1, -1, -1
    logprobs[4, 0] = 0.0
    logprobs[ids < 0] = -torch.inf
    return {"logits": logits, "labels": labels, "target_ids": ids, "target_logprobs": logprobs}


def expected_and_gradient(
    given: dict[str, torch.Tensor], *, sft_weight: float, num_items: float, **how: Any
) -> tuple[float, torch.Tensor]:
    logits = given["logits"].double().requires_grad_()
    sft, fusion = dense_terms(**{**given, "logits": logits}, **how)
    total = (sft_weight * sft + (1 - sft_weight) * fusion) / num_items
    (gradient,) = torch.autograd.grad(total, logits)
    return total.item(), gradient


def found_and_gradient(given: dict[str, torch.Tensor], **how: Any) -> tuple[float, torch.Tensor]:
    logits = given["logits"].clone().requires_grad_()
    total = fusion_loss(**{**given, "logits": logits}, **how)
    (gradient,) = torch.autograd.grad(total, logits)
    return total.item(), gradient


@pytest.mark.parametrize(("kind", "tail", "temperature"), [*itertools.product(KINDS, TAILS, TEMPERATURES)])
def test_value_and_gradient_are_those_of_the_dense_loss(kind: str, tail: str, temperature: float) -> None:
    for seed, sft_weight in ((0, 0.9), (1, 0.25), (2, 0.0), (3, 1.0)):
        how = {"kind": kind, "tail": tail, "temperature": temperature, "sft_weight": sft_weight}
        expected, gradient = expected_and_gradient(problem(seed), num_items=N, **how)
        value, found = found_and_gradient(problem(seed), **how)
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


@pytest.mark.parametrize("kind", KINDS)
def test_sft_weight_one_is_plain_fine_tuning_and_zero_is_fusion_alone(kind: str) -> None:
    given = problem()
    plain = torch.nn.functional.cross_entropy(given["logits"], given["labels"])
    assert fusion_loss(**given, sft_weight=1.0, kind=kind).item() == pytest.approx(plain.item(), rel=1e-6)
    moved = {**given, "labels": (given["labels"] + 1) % V}
    assert fusion_loss(**given, sft_weight=0.0, kind=kind) == fusion_loss(**moved, sft_weight=0.0, kind=kind)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_targets_keeps_its_sft_term_and_has_no_fusion_term(kind: str, tail: str) -> None:
    given = {name: tensor[3:4] for name, tensor in problem().items()}
    assert (given["target_ids"] == -1).all()
    parts = fusion_loss_parts(**given, sft_weight=0.9, kind=kind, tail=tail)
    assert parts.fusion.item() == 0.0
    assert parts.sft.item() == pytest.approx(-torch.log_softmax(given["logits"][0], 0)[given["labels"][0]].item())
    assert parts.total.item() == pytest.approx(0.9 * parts.sft.item())
    _, gradient = found_and_gradient(given, sft_weight=0.0, kind=kind, tail=tail)
    assert (gradient == 0).all()


def test_both_terms_are_divided_by_num_items_so_that_parts_of_a_batch_add_up() -> None:
    given = problem()
    for kind, tail in itertools.product(KINDS, TAILS):
        how = {"sft_weight": 0.7, "kind": kind, "tail": tail, "num_items": 40}
        halves = [
            fusion_loss(**{name: tensor[part] for name, tensor in given.items()}, **how)
            for part in (slice(0, 2), slice(2, N))
        ]
        whole = fusion_loss(**given, **how)
        assert sum(halves).item() == pytest.approx(whole.item(), rel=1e-6)
        by_default = fusion_loss(**given, sft_weight=0.7, kind=kind, tail=tail)
        assert whole.item() == pytest.approx(by_default.item() * N / 40, rel=1e-6)


def test_num_items_may_be_a_tensor() -> None:
    given = problem()
    one, other = (fusion_loss(**given, sft_weight=0.5, num_items=items) for items in (torch.tensor(9), 9))
    assert one.item() == pytest.approx(other.item())


@pytest.mark.parametrize("tail", TAILS)
def test_divergences_from_the_models_own_distribution_are_zero(tail: str) -> None:
    given = problem()
    logprobs, ids = torch.log_softmax(given["logits"], dim=1).sort(dim=1, descending=True)
    own = {**given, "target_ids": ids, "target_logprobs": logprobs}  # the whole vocabulary: nothing is left to a tail
    for kind in ("kl", "reverse_kl", "jsd"):
        assert fusion_loss(**own, sft_weight=0.0, kind=kind, tail=tail).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_and_targets_are_computed_in_float32(kind: str) -> None:
    given = problem()
    coarse = {**given, "logits": given["logits"].bfloat16(), "target_logprobs": given["target_logprobs"].half()}
    same = {**given, "logits": coarse["logits"].float(), "target_logprobs": coarse["target_logprobs"].float()}
    found = fusion_loss(**coarse, sft_weight=0.9, kind=kind)
    assert found.dtype == torch.float32
    assert found.item() == fusion_loss(**same, sft_weight=0.9, kind=kind).item()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_give_finite_losses_and_gradients(kind: str, tail: str) -> None:
    given = problem(scale=60.0)
    value, gradient = found_and_gradient(given, sft_weight=0.5, kind=kind, tail=tail)
    assert torch.isfinite(torch.tensor(value))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bucket_of_a_confident_model_is_its_own_tail(kind: str) -> None:
    """The model leaves 1e-8 to the tail, the target a tenth: the loss must say so, and push."""
    logits = torch.zeros(1, V)
    logits[0, :2] = 20.0
    given = {
        "logits": logits,
        "labels": torch.tensor([0]),
        "target_ids": torch.tensor([[0, 1]]),
        "target_logprobs": torch.tensor([[0.6, 0.3]]).log(),
    }
    how = {"kind": kind, "tail": "bucket", "sft_weight": 0.0}
    expected, gradient = expected_and_gradient(given, num_items=1, temperature=1.0, **how)
    value, found = found_and_gradient(given, **how)
    assert value == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"kind": "mse"}, {"tail": "drop"}])
def test_an_unknown_kind_or_tail_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        fusion_loss(**problem(), sft_weight=0.9, **wrong)
