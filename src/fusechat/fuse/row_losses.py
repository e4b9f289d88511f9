"""Both losses of every response row, and their gradient. The gradient is the only tensor of the logits' size.

See docs/training.md. With `z` the logits of a row, `q = softmax(z / T)` and `g_j = dD / d log q_j` for the kept tokens (and
`g_b` for the bucket, whose probability is `q_b`), `G = Σ g`, the derivative of the divergence with respect to `z_v` is

    1/T · (g_j - G · q_v)                 at a kept token j = v
    1/T · (g_b / q_b - G) · q_v           at any other token (g_b = 0 without a bucket)

A row's gradient is therefore a multiple of a softmax, except at its kept tokens and its label, which are set one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusechat.fuse.divergences import DIVERGENCES, left_over, target_outcomes

_CHUNK_ELEMENTS = {"cpu": 1 << 19}  # logits in a chunk: fit a core's cache as float32 …
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24  # … or, on GPUs, make launches few (64 MiB)


def row_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    target_ids: torch.Tensor | None,
    target_logprobs: torch.Tensor | None,
    *,
    target_tail: torch.Tensor | None = None,
    kind: str = "cross_entropy",
    tail: str = "renormalise",
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`-log Q(label)` [n] and the divergence D(P, Q) at `temperature` [n], in nats, both differentiable.

    Arguments as for `fusion_loss`. The divergence is 0 in rows without targets, and everywhere if the targets are None. Both are
    float32 (float64 for float64 logits); the gradient has the logits' dtype. Raises ValueError for unknown settings, shapes that
    do not fit, and a token that occurs twice in a row.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"kind is one of {', '.join(DIVERGENCES)}, not {kind!r}")
    if tail not in ("renormalise", "bucket"):
        raise ValueError(f"tail is renormalise or bucket, not {tail!r}")
    if not temperature > 0:
        raise ValueError(f"temperature is above 0, not {temperature}")
    if (target_ids is None) != (target_logprobs is None):
        raise ValueError("target_ids and target_logprobs come together")
    if target_ids is None or target_logprobs is None or target_ids.shape[1:] == (0,):
        nll: torch.Tensor = _Nll.apply(logits, labels)
        return nll, torch.zeros_like(nll)
    _check_targets(target_ids, target_logprobs, target_tail, len(logits))
    precise, rest = _precise(logits), None
    if tail == "bucket" and target_tail is None:
        rest = left_over(target_ids, target_logprobs.detach(), precise)
    elif tail == "bucket" and target_tail is not None:
        rest = target_tail.detach().to(precise).clamp(0.0, 1.0)
    log_p = target_outcomes(target_ids, target_logprobs.detach().to(precise), rest, temperature=temperature)
    nll, divergence = _NllAndDivergence.apply(logits, labels, target_ids, log_p, kind, temperature)
    return nll, divergence


def _check_targets(ids: torch.Tensor, logprobs: torch.Tensor, tail: torch.Tensor | None, rows: int) -> None:
    if ids.ndim != 2 or len(ids) != rows or logprobs.shape != ids.shape:
        shapes = f"{tuple(ids.shape)} and {tuple(logprobs.shape)}"
        raise ValueError(f"target_ids and target_logprobs are [{rows}, k], not {shapes}")
    if tail is not None and tail.shape != (rows,):
        raise ValueError(f"target_tail is [{rows}], not {tuple(tail.shape)}")
    ordered = ids.sort(dim=1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("target_ids: a row names a token twice")


class _Nll(torch.autograd.Function):
    """-log Q(label)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        gold, normaliser = _gathered(logits, labels[:, None]), _logsumexp(logits)
        ctx.save_for_backward(logits, labels, gold, normaliser)
        return normaliser - gold.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, gold, normaliser = ctx.saved_tensors
        at_label = slope[:, None] * torch.expm1(gold - normaliser[:, None])
        return _gradient(logits, [_Softmax(slope, normaliser)], labels[:, None], at_label), None


class _NllAndDivergence(torch.autograd.Function):
    """-log Q(label) and D(P, Q). `log_p` [n, k], or [n, k + 1] with the bucket, is from `target_outcomes`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ids: torch.Tensor,
        log_p: torch.Tensor,
        kind: str,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        present, bucket = ids >= 0, log_p.shape[1] > ids.shape[1]
        gold = _gathered(logits, labels[:, None])
        kept = _gathered(logits, ids.clamp(min=0)).masked_fill(~present, -torch.inf)
        others = tempered = _logsumexp(logits, temperature, without=ids if bucket else None)
        if bucket:
            # Not 1 - Σ kept, which cancels to 0 if the model is certain.
            tempered = torch.logaddexp(others, (kept / temperature).logsumexp(dim=1))
        normaliser = tempered if temperature == 1.0 else _logsumexp(logits)
        log_q = kept / temperature - tempered[:, None]
        if bucket:
            log_q = torch.cat([log_q, (others - tempered)[:, None]], dim=1)
        divergence, slope = DIVERGENCES[kind](log_p, log_q)
        taught = (log_p > -torch.inf).any(dim=1)
        slope = torch.where(taught[:, None], slope, 0.0)
        ctx.save_for_backward(logits, labels, gold, ids, kept, slope, normaliser, tempered, others)
        ctx.temperature = temperature
        return normaliser - gold.squeeze(1), torch.where(taught, divergence, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_nll: torch.Tensor, by_divergence: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, gold, ids, kept, slope, normaliser, tempered, others = ctx.saved_tensors
        temperature, k = ctx.temperature, ids.shape[1]
        slope = slope * (by_divergence / temperature)[:, None]
        total, of_bucket = slope.sum(dim=1), slope[:, k:].sum(dim=1)
        # Other tokens relative to their own sum, so that nothing overflows if the bucket is almost empty.
        share = (others - tempered).exp()
        others = torch.where(others > -torch.inf, others, tempered)
        of_others = of_bucket - total * share

        is_label = ids == labels[:, None]  # [n, k]
        log_q, log_gold = kept - normaliser[:, None], gold.squeeze(1) - normaliser
        at_kept = slope[:, :k] - total[:, None] * (kept / temperature - tempered[:, None]).exp()
        at_kept += by_nll[:, None] * torch.where(is_label, torch.expm1(log_q), log_q.exp())
        outside = of_others * (gold.squeeze(1) / temperature - others).exp() + by_nll * torch.expm1(log_gold)
        at_label = torch.where(is_label.any(dim=1), torch.where(is_label, at_kept, 0.0).sum(dim=1), outside)[:, None]

        if temperature == 1.0:
            softmaxes = [_Softmax(of_others + by_nll * share, others)]
        else:
            softmaxes = [_Softmax(of_others, others, temperature), _Softmax(by_nll, normaliser)]
        present = ids >= 0  # a pad repeats the label's value
        tokens = torch.cat([torch.where(present, ids, labels[:, None]), labels[:, None]], dim=1)
        values = torch.cat([torch.where(present, at_kept, at_label), at_label], dim=1)
        return _gradient(logits, softmaxes, tokens, values), None, None, None, None, None


@dataclass(frozen=True)
class _Softmax:
    """A part of every row's gradient: `coefficient · exp(z / temperature - base)`, both [n]."""

    coefficient: torch.Tensor
    base: torch.Tensor
    temperature: float = 1.0

    def write(self, z: torch.Tensor, rows: slice, out: torch.Tensor) -> torch.Tensor:
        torch.add(-self.base[rows, None], z, alpha=1.0 / self.temperature, out=out)
        return out.exp_().mul_(self.coefficient[rows, None])


def _gradient(
    logits: torch.Tensor, softmaxes: Sequence[_Softmax], tokens: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The sum of `softmaxes`, with `values` [n, m] at `tokens` [n, m], in the logits' dtype."""
    gradient = torch.empty_like(logits)
    for rows in _chunks(logits):
        z = logits[rows].to(values.dtype)
        in_place = gradient.dtype == values.dtype
        out = softmaxes[0].write(z, rows, gradient[rows] if in_place else torch.empty_like(z))
        for other in softmaxes[1:]:
            out += other.write(z, rows, torch.empty_like(z))
        if not in_place:
            gradient[rows] = out
    return gradient.scatter_(1, tokens, values.to(gradient.dtype))


def _logsumexp(logits: torch.Tensor, temperature: float = 1.0, *, without: torch.Tensor | None = None) -> torch.Tensor:
    """[n]: log Σ exp(z / temperature) over all tokens, or over those not in `without` [n, k] (-1 pads)."""
    result = logits.new_empty(len(logits), dtype=_precise(logits))
    for rows in _chunks(logits):
        z = logits[rows].to(result.dtype)
        if temperature != 1.0:
            z = z / temperature
        if without is not None:
            ids, size = without[rows], z.shape[1]
            z = torch.nn.functional.pad(z, (0, 1), value=-torch.inf)  # pads point to the extra column
            z = z.scatter_(1, torch.where(ids >= 0, ids, size), -torch.inf)
        result[rows] = z.logsumexp(dim=1)
    return result


def _gathered(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, tokens).to(_precise(logits))


def _precise(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of `logits` [n, V], with a bounded number of elements."""
    elements = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // max(1, logits.shape[1]))
    for begin in range(0, len(logits), step):
        yield slice(begin, begin + step)
