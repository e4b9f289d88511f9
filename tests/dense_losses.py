"""The two losses of each row as docs/training.md defines them: every distribution built in full: float64 [n, V], derivatives
by autograd."""

import torch

KINDS, TAILS, TEMPERATURES = ("cross_entropy", "kl", "reverse_kl", "jsd"), ("renormalise", "bucket"), (0.5, 1.0, 2.0)


def dense_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    target_ids: torch.Tensor,
    target_logprobs: torch.Tensor,
    *,
    target_tail: torch.Tensor | None = None,
    kind: str = "cross_entropy",
    tail: str = "renormalise",
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log Q(label) [n] and the divergence [n], 0 for a row without targets."""
    logits = logits.double()
    nll = -torch.log_softmax(logits, dim=1)[torch.arange(len(labels)), labels]
    p, kept = torch.zeros_like(logits), torch.zeros_like(logits)
    for row, ids in enumerate(target_ids.tolist()):
        for column, token in enumerate(ids):
            if token >= 0:
                p[row, token] = target_logprobs[row, column].double().exp()
                kept[row, token] = 1.0
    q = torch.softmax(logits / temperature, dim=1)
    if tail == "bucket":
        rest = 1 - p.sum(dim=1, keepdim=True)
        rest = rest * (rest > 1e-6)
        if target_tail is not None:
            rest = target_tail.double()[:, None]
            p = p / p.sum(dim=1, keepdim=True).clamp(min=1e-300) * (1 - rest)
        p = torch.cat([p, rest], dim=1)
        q = torch.cat([q * kept, (q * (1 - kept)).sum(dim=1, keepdim=True)], dim=1)
    p = p ** (1 / temperature)
    p = p / p.sum(dim=1, keepdim=True)
    has = p > 0
    q = torch.where(has, q, 0.0)
    if kind in ("reverse_kl", "jsd"):
        q = q / q.sum(dim=1, keepdim=True)
    p, q = torch.where(has, p, 1.0), torch.where(has, q, 1.0)  # what is not there gives 1 · log 1
    m = (p + q) / 2
    terms = {
        "cross_entropy": -p * q.log(),
        "kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": (p * (p / m).log() + q * (q / m).log()) / 2,
    }[kind]
    return nll, torch.where(kept.any(dim=1), terms.sum(dim=1), 0.0)


def problem(
    *, n: int = 6, vocabulary: int = 23, k: int = 4, seed: int = 0, scale: float = 2.0
) -> dict[str, torch.Tensor]:
    """Row 1 has one pad, row 2 one target only, row 3 none at all, row 4 is one-hot, row 5 sums to a little more than one, as
    half-precision storage makes it; all other rows are full."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (n,), generator=generator)
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(n)])
    probabilities = torch.softmax(torch.randn(n, k + 1, generator=generator), dim=1)[:, :k]
    probabilities[5] *= 1.0005 / probabilities[5].sum()
    logprobs = probabilities.log()
    ids[1, k - 1], ids[2, 1:], ids[3], ids[4, 1:] = -1, -1, -1, -1
    logprobs[4, 0] = 0.0
    logprobs[ids < 0] = -torch.inf
    labels[0], labels[1] = ids[0, 1], ids[1, 0]  # others are mostly not among the targets
    return {"logits": logits, "labels": labels, "target_ids": ids, "target_logprobs": logprobs}
