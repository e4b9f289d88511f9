"""Divergences between the targets P and the model's Q over a row's kept outcomes. See docs/training.md.

All of them take natural logarithms [n, m] of m outcomes a row, `log_p` with -inf where there is none. A divergence gives its
values [n] and its derivatives with respect to `log_q` [n, m]; a row without any outcome gives anything, NaN too.
"""

import math
from collections.abc import Callable

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_ROUNDING = 1e-6  # a tail below it is the rounding of the kept tokens, not a tail


def left_over(ids: torch.Tensor, logprobs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n] in `dtype`: what the kept tokens leave of each row's mass, 0 where that may be their rounding."""
    rest = 1.0 - logprobs.to(dtype).masked_fill(ids < 0, -torch.inf).exp().sum(dim=1)
    return rest.masked_fill(rest <= max(_ROUNDING, torch.finfo(logprobs.dtype).eps), 0.0)


def target_outcomes(
    ids: torch.Tensor, logprobs: torch.Tensor, rest: torch.Tensor | None, *, temperature: float
) -> torch.Tensor:
    """log P [n, k], or with `rest` [n], the mass of all other tokens, [n, k + 1] and that last, at `temperature` and normalised;
    `ids` int64 [n, k] with -1 pads, `logprobs` [n, k], which are scaled to what the rest leaves. NaN in a row without targets."""
    log_p = logprobs.masked_fill(ids < 0, -torch.inf)
    if rest is not None:
        kept = torch.log_softmax(log_p, dim=1) + torch.log1p(-rest)[:, None]
        log_p = torch.cat([kept, rest.log()[:, None]], dim=1)
    return torch.log_softmax(log_p / temperature, dim=1)


def _cross_entropy(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    return -_times(p, log_q).sum(dim=1), -p


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    return _times(p, log_p - log_q).sum(dim=1), -p


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_r = _restricted(log_p, log_q)
    r = log_r.exp()
    terms = _times(r, log_r - log_p)
    value = terms.sum(dim=1)
    return value, terms - r * value[:, None]


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_r = _restricted(log_p, log_q)
    p, r = log_p.exp(), log_r.exp()
    log_m = torch.logaddexp(log_p, log_r) - math.log(2)
    terms = _times(r, log_r - log_m)
    own = terms.sum(dim=1)
    return (_times(p, log_p - log_m).sum(dim=1) + own) / 2, (terms - r * own[:, None]) / 2


def _restricted(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """log Q over the outcomes that P has, renormalised as P is. With a bucket the outcomes are already all there are, but for a
    bucket that P leaves empty."""
    return torch.log_softmax(log_q.masked_fill(log_p == -torch.inf, -torch.inf), dim=1)


def _times(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight · value, zero where there is no weight, whatever the value."""
    return torch.where(weight > 0, weight * value, 0.0)


DIVERGENCES: dict[str, Divergence] = {
    "cross_entropy": _cross_entropy,
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}
