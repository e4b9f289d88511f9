"""Divergences between targets P and the model's Q over the kept outcomes of a row. See docs/training.md.

A divergence takes `log_p` and `log_q` [n, m], natural logarithms of m outcomes in a row, with -inf for none. It returns its
values [n] and their derivatives with respect to `log_q` [n, m]. Rows without any outcome may give NaN.
"""

import math
from collections.abc import Callable

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_ROUNDING = 1e-6  # a smaller tail is rounding of the kept tokens


def left_over(ids: torch.Tensor, logprobs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n] in `dtype`: the mass that the kept tokens leave in each row, 0 if it may be their rounding."""
    rest = 1.0 - logprobs.to(dtype).masked_fill(ids < 0, -torch.inf).exp().sum(dim=1)
    return rest.masked_fill(rest <= max(_ROUNDING, torch.finfo(logprobs.dtype).eps), 0.0)


def target_outcomes(
    ids: torch.Tensor, logprobs: torch.Tensor, rest: torch.Tensor | None, *, temperature: float
) -> torch.Tensor:
    """log P [n, k], or with `rest` [n], the mass of all other tokens, [n, k + 1] with the rest last; at `temperature`,
    normalised. `ids` int64 [n, k] with -1 pads. `logprobs` [n, k] are scaled to `1 - rest`. Rows without targets are NaN."""
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
    """log Q over the outcomes of P, renormalised as P is. With a bucket these are all outcomes, unless P's bucket is empty."""
    return torch.log_softmax(log_q.masked_fill(log_p == -torch.inf, -torch.inf), dim=1)


def _times(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight · value, 0 where the weight is 0, even for infinite values."""
    return torch.where(weight > 0, weight * value, 0.0)


DIVERGENCES: dict[str, Divergence] = {
    "cross_entropy": _cross_entropy,
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}
