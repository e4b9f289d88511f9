"""From logits to sparse distributions. Source: METHOD, "Capture"."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fusechat.core.distributions import SparseDistribution
from fusechat.core.forward import collate, float_rows, gold_nll, response_logits
from fusechat.core.prepared import Prepared


def sparse_rows(logits: torch.Tensor, gold: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `k` most likely tokens of logits [n, V] (any float type): ids int64 [n, k], log-probabilities over the full
    vocabulary float32 [n, k], and the gold tokens' nll float32 [n]. The log-softmax is float32."""
    parts = []
    for rows, full in float_rows(logits):
        logsumexp = full.logsumexp(dim=1)
        values, ids = full.topk(k, dim=1)
        parts.append((ids, values - logsumexp[:, None], gold_nll(full, gold[rows], logsumexp)))
    ids, logprobs, nll = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, logprobs, nll


@torch.inference_mode()
def capture_batch(model: Any, conversations: Sequence[Prepared], *, k: int) -> list[SparseDistribution | None]:
    """Distributions of each conversation's rows; None for one in which something is not finite."""
    device = next(model.parameters()).device
    batch = collate(conversations)
    gold = batch.input_ids[batch.rows[:, 0], batch.rows[:, 1]].to(device)
    logits = response_logits(model, batch.to(device))
    ids, logprobs, nll = (column.cpu().numpy() for column in sparse_rows(logits, gold, min(k, logits.shape[1])))
    results: list[SparseDistribution | None] = []
    begin = 0
    for conversation in conversations:
        rows = slice(begin, begin + len(conversation))
        begin = rows.stop
        finite = np.isfinite(nll[rows]).all() and np.isfinite(logprobs[rows]).all()
        results.append(SparseDistribution(ids[rows], logprobs[rows], nll[rows]) if finite else None)
    return results
