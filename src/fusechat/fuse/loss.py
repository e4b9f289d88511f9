"""The fusion loss: L_SFT and L_Fusion of the paper (arXiv 2408.07990, section 3.3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusechat.fuse.row_losses import row_losses

__all__ = ["LossParts", "fusion_loss", "fusion_loss_parts", "row_losses"]

Gate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LossParts:
    """Scalar losses: `sft` and `fusion`, divided by the same number of tokens, and `total`. `total = sft_weight · sft + (1 -
    sft_weight) · fusion`, where rows without a teacher (`alone`) have `sft` with weight 1."""

    total: torch.Tensor
    sft: torch.Tensor
    fusion: torch.Tensor


def fusion_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    target_ids: torch.Tensor,
    target_logprobs: torch.Tensor,
    *,
    sft_weight: float,
    target_tail: torch.Tensor | None = None,
    kind: str = "cross_entropy",
    tail: str = "renormalise",
    temperature: float = 1.0,
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Computes `λ·CE(gold, Q) + (1 - λ)·D(P, Q)` (nats, λ = `sft_weight`), summed over rows, divided by `num_items` (default n).

    `logits` [n, V] and `labels` int64 [n] are already shifted: row i predicts label i. `target_ids` int64 [n, k] (-1 pads,
    distinct ids in a row) and `target_logprobs` [n, k] (natural logarithms) are P; a row of pads has no fusion term. `kind` is
    `cross_entropy`, `kl` (P‖Q), `reverse_kl` (Q‖P) or `jsd`. `tail` is `renormalise` (P over the kept tokens) or `bucket` (all
    other tokens are one more outcome of mass `target_tail` [n], by default what the kept tokens leave; 0 if that may be their
    rounding: below 1e-6, for float16 9.8e-4, for bfloat16 7.8e-3). `temperature` T softens P and Q; D is times T².

    Returns a scalar, in float32 (float64 for float64 logits); the gradient has the logits' dtype. Raises ValueError for
    arguments that do not fit.
    """
    parts = fusion_loss_parts(
        logits, labels, target_ids, target_logprobs, sft_weight=sft_weight, target_tail=target_tail, kind=kind, tail=tail,
        temperature=temperature, num_items=num_items,
    )  # fmt: skip
    return parts.total


def fusion_loss_parts(
    logits: torch.Tensor,
    labels: torch.Tensor,
    target_ids: torch.Tensor | None,
    target_logprobs: torch.Tensor | None,
    *,
    sft_weight: float,
    target_tail: torch.Tensor | None = None,
    kind: str = "cross_entropy",
    tail: str = "renormalise",
    temperature: float = 1.0,
    num_items: torch.Tensor | float | None = None,
    gate: Gate | None = None,
    alone: torch.Tensor | None = None,
) -> LossParts:
    """As `fusion_loss`, with both terms separate. `alone` bool [n]: rows without a teacher, trained with λ = 1.

    `gate` takes the rows' detached `-log Q(label)` [n] and returns the weight of each row's fusion term, bool or float [n].
    Without targets (None), or with `sft_weight` 1, the fusion term is not computed and is 0.
    """
    if sft_weight == 1.0:
        target_ids = target_logprobs = None
    nll, divergence = row_losses(
        logits,
        labels,
        target_ids,
        target_logprobs,
        target_tail=target_tail,
        kind=kind,
        tail=tail,
        temperature=temperature,
    )
    count = len(labels) if num_items is None else num_items
    sft = nll.sum() / count
    if target_ids is None:
        return LossParts(sft_weight * sft, sft, torch.zeros_like(sft))
    if gate is not None:
        weight = gate(nll.detach())
        divergence = torch.where(weight > 0, weight * divergence, 0.0)
    fusion = temperature**2 * divergence.sum() / count
    rest = fusion if alone is None else fusion + torch.where(alone, nll, 0.0).sum() / count
    return LossParts(sft_weight * sft + (1 - sft_weight) * rest, sft, fusion)
