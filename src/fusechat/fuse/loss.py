"""The fusion loss. Source: METHOD, "Fusion"; the paper's equations for L_SFT and L_Fusion.

The targets are k ids a position, so nothing of the size of the vocabulary is built for them: with `z` the logits,
`CE = Σ P·(logsumexp(z) - z_k)`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossParts:
    """Scalars: `total = sft_weight · sft + (1 - sft_weight) · fusion`, both divided by the same number of tokens."""

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
    kind: str = "cross_entropy",
    tail: str = "renormalise",
    temperature: float = 1.0,
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """`λ·CE(gold, Q) + (1 - λ)·D(P, Q)` as a scalar, summed over n positions and divided by `num_items` (default n).

    `logits` [n, V] and `labels` int64 [n] are already shifted: row i predicts label i. `target_ids` int64 [n, k] with -1 pads,
    `target_logprobs` [n, k] natural logarithms; a row of pads only has no fusion term. `kind` is `cross_entropy`, `kl` (P‖Q),
    `reverse_kl` (Q‖P) or `jsd`; `tail` is `renormalise` (P over the kept tokens) or `bucket` (the rest is one more outcome).
    """
    parts = fusion_loss_parts(
        logits, labels, target_ids, target_logprobs, sft_weight=sft_weight, kind=kind, tail=tail, temperature=temperature,
        num_items=num_items,
    )  # fmt: skip
    return parts.total


def fusion_loss_parts(
    logits: torch.Tensor,
    labels: torch.Tensor,
    target_ids: torch.Tensor,
    target_logprobs: torch.Tensor,
    *,
    sft_weight: float,
    kind: str = "cross_entropy",
    tail: str = "renormalise",
    temperature: float = 1.0,
    num_items: torch.Tensor | float | None = None,
) -> LossParts:
    """As `fusion_loss`, with its two terms apart."""
    if kind not in DIVERGENCES:
        raise ValueError(f"kind is one of {', '.join(DIVERGENCES)}, not {kind!r}")
    if tail not in ("renormalise", "bucket"):
        raise ValueError(f"tail is renormalise or bucket, not {tail!r}")
    count = len(labels) if num_items is None else num_items
    logits = logits.float()
    logsumexp = logits.logsumexp(dim=-1)  # [n]
    sft = (logsumexp - logits.gather(1, labels[:, None]).squeeze(1)).sum() / count
    log_p = _target_outcomes(target_ids, target_logprobs, tail, temperature)  # [n, k or k + 1]
    has_target = (target_ids >= 0).any(dim=1)
    log_q = _model_outcomes(logits, logsumexp, target_ids, tail, temperature)
    per_row = DIVERGENCES[kind](log_p, log_q, tail)
    fusion = temperature**2 * torch.where(has_target, per_row, 0.0).sum() / count
    return LossParts(sft_weight * sft + (1 - sft_weight) * fusion, sft, fusion)


_ROUNDING = 1e-6  # a tail below it is the rounding of the kept tokens, not a tail
_NONE = -1e30  # the logarithm of a probability of zero, finite so that 0 · log 0 and its gradient are 0


def _target_outcomes(ids: torch.Tensor, logprobs: torch.Tensor, tail: str, temperature: float) -> torch.Tensor:
    """log P over the kept outcomes, normalised; a row without any target is all `_NONE`."""
    present = ids >= 0
    log_p = torch.where(present, logprobs.float(), _NONE)
    if tail == "bucket":
        rest = (1.0 - torch.where(present, log_p.exp(), 0.0).sum(dim=1, keepdim=True)).clamp(min=0.0)
        log_p = torch.cat([log_p, torch.where(rest > _ROUNDING, rest.clamp(min=_ROUNDING).log(), _NONE)], dim=1)
    log_p = torch.where(log_p > _NONE, log_p / temperature, _NONE)
    normaliser = log_p.logsumexp(dim=1, keepdim=True)
    return torch.where(log_p > _NONE, log_p - normaliser, _NONE)


def _model_outcomes(
    logits: torch.Tensor, logsumexp: torch.Tensor, ids: torch.Tensor, tail: str, temperature: float
) -> torch.Tensor:
    """log Q of the same outcomes under the model's full distribution at `temperature`, not renormalised; `_NONE` at pads."""
    if temperature != 1.0:
        logsumexp = (logits / temperature).logsumexp(dim=-1)
    kept = logits.gather(1, ids.clamp(min=0)) / temperature - logsumexp[:, None]
    log_q = torch.where(ids >= 0, kept, _NONE)
    if tail == "bucket":
        # The tokens outside, summed as they are: 1 - Σ kept would cancel to nothing where the model is sure.
        inside = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
        inside.scatter_(1, torch.where(ids >= 0, ids, logits.shape[1]), True)
        outside = (logits / temperature).masked_fill(inside[:, :-1], _NONE).logsumexp(dim=1) - logsumexp
        log_q = torch.cat([log_q, outside[:, None]], dim=1)
    return log_q


def _cross_entropy(log_p: torch.Tensor, log_q: torch.Tensor, tail: str) -> torch.Tensor:
    return -_expect(log_p, log_q)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor, tail: str) -> torch.Tensor:
    return _expect(log_p, log_p - log_q)


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, tail: str) -> torch.Tensor:
    log_q = _restrict(log_p, log_q, tail)
    return _expect(log_q, log_q - log_p)


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, tail: str) -> torch.Tensor:
    log_q = _restrict(log_p, log_q, tail)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return (_expect(log_p, log_p - log_m) + _expect(log_q, log_q - log_m)) / 2


def _restrict(log_p: torch.Tensor, log_q: torch.Tensor, tail: str) -> torch.Tensor:
    """log Q over the outcomes that P has, renormalised as P is. With a bucket the outcomes are already all there are, but for a
    bucket that P leaves empty."""
    log_q = torch.where(log_p > _NONE, log_q, _NONE)
    return torch.where(log_p > _NONE, log_q - log_q.logsumexp(dim=1, keepdim=True), _NONE)


def _expect(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Σ exp(log_weight)·value over the outcomes that have weight."""
    weight = torch.where(log_weight > _NONE, log_weight.exp(), 0.0)
    return (weight * torch.where(log_weight > _NONE, value, 0.0)).sum(dim=1)


DIVERGENCES = {"cross_entropy": _cross_entropy, "kl": _kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
