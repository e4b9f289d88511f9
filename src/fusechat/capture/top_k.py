"""From logits to sparse distributions: top-k and log-softmax in float32. See docs/training.md.

A vocabulary of 262,144 makes `torch.topk` on a CPU slower than the model's head. There, a kernel reads each row three times,
out of the cache: the greatest value of every block of the vocabulary; the values in blocks that may have one of the k; the
sum of the exponentials that are not of the k. Rows are shared among as many threads as PyTorch has, and none depends on another.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fusechat.data.distributions import SparseDistribution
from fusechat.models.forward import float_rows, gold_nll
from fusechat.models.teacher_forcing import Columns
from fusechat.run.compiled import compiled

_BLOCK = 256  # logits
_RUN = 4096  # exponentials that are added up in float32; such sums are added up in float64
_LEAST = -(1 << 31)
_INFINITE = 0x7F800000
_NOT_ZERO = 0x7FFFFFFF  # every bit but the sign's
_NEXT_TO_NOTHING = 2.0**-125  # an exponential of -inf comes out as 2^-126
_LOG2_E = np.float32(np.log2(np.e))
_POWER_OF_2 = tuple(np.float32(c) for c in (1.0, *(np.log(2.0) ** n / np.prod(range(1, n + 1)) for n in range(1, 8))))
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = _POWER_OF_2  # Taylor's; for |x| <= 1/2 its error is below float32's


def sparse_rows(logits: torch.Tensor, gold: torch.Tensor, k: int) -> Columns:
    """The `k` most likely tokens (at most all) of logits [n, V] (any float type): ids int32 [n, k], log-probabilities over the full
    vocabulary float32 [n, k], the gold tokens' nll float32 [n], and the probability of all other tokens float32 [n], exact
    however small; where `logits` are. The log-softmax is float32.

    On a CPU ties go to the lower id. A row with a NaN or +inf has NaN log-probabilities; -inf is a probability of 0.
    """
    return (_by_kernel if logits.device.type == "cpu" else _by_torch)(logits, gold, min(k, logits.shape[1]))


def distribution(ids: np.ndarray, logprobs: np.ndarray, nll: np.ndarray, tail: np.ndarray) -> SparseDistribution | None:
    """What `sparse_rows` gave of one conversation; None where something is not finite."""
    finite = np.isfinite(nll).all() and np.isfinite(logprobs).all()
    return SparseDistribution(ids, logprobs, nll, tail) if finite else None


def _by_torch(logits: torch.Tensor, gold: torch.Tensor, k: int) -> Columns:
    parts = []
    for rows, full in float_rows(logits):
        values, ids = full.topk(k, dim=1)
        others = full.scatter(1, ids, -torch.inf).logsumexp(dim=1)  # not 1 - Σ kept, which rounding makes of nothing
        logsumexp = torch.logaddexp(values.logsumexp(dim=1), others)
        nll = gold_nll(full, gold[rows], logsumexp)
        parts.append((ids.int(), values - logsumexp[:, None], nll, (others - logsumexp).exp()))
    ids, logprobs, nll, tail = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, logprobs, nll, tail


def _by_kernel(logits: torch.Tensor, gold: torch.Tensor, k: int) -> Columns:
    if logits.dtype != torch.bfloat16:
        logits = logits.float()
    bits = logits.contiguous().view(torch.int16 if logits.dtype == torch.bfloat16 else torch.int32).numpy()
    ids = np.empty((len(bits), k), np.int32)
    logprobs = np.empty((len(bits), k), np.float32)
    nll, tail = np.empty((2, len(bits)), np.float32)
    wanted = gold.numpy()
    threads = max(1, min(torch.get_num_threads(), len(bits)))
    bounds = np.linspace(0, len(bits), threads + 1).astype(int)

    def work(part: int) -> None:
        rows = slice(bounds[part], bounds[part + 1])
        _select(bits[rows], wanted[rows], ids[rows], logprobs[rows], nll[rows], tail[rows])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(nll), torch.from_numpy(tail)


@compiled()
def _select(bits, gold, ids, logprobs, nll, tail):  # type: ignore[no-untyped-def]
    """`sparse_rows` of logits [n, V], given as the bits of bfloat16 (int16) or of float32 (int32)."""
    n, size = bits.shape
    k = ids.shape[1]
    full = np.empty(size, np.int32)  # a row's bits as float32
    greatest = np.empty((size + _BLOCK - 1) // _BLOCK, np.int32)
    found = np.empty(size, np.int64)
    below = np.empty(k)  # by how much the kept are below the greatest
    for row in range(n):
        _widen(bits[row], full)
        values = full.view(np.float32)
        largest = _greatest(full, greatest)
        kept = np.sort(_at_least(full, greatest, _bound(greatest, k), found))[::-1]
        top = np.float64(values[_id(kept[0])])
        own = values[gold[row]] - top
        of_kept = 0.0
        for place in range(k):
            token = _id(kept[place])
            ids[row, place], below[place] = token, top - values[token]
            of_kept += np.exp(-below[place])
            values[token] = -np.inf  # so that what is left are the others
        total = others = np.nan  # sums of exponentials, with `top` taken off
        if largest < _INFINITE or (largest == _INFINITE and -np.inf < top < np.inf):  # neither a NaN nor +inf
            others = _sum_of_exponentials(values, np.float32(top))
            others = 0.0 if others <= size * _NEXT_TO_NOTHING else others
            total = of_kept + others
        for place in range(k):
            logprobs[row, place] = -below[place] - np.log(total)
        nll[row] = np.log(total) - own
        tail[row] = others / total


@compiled()
def _widen(bits, full):  # type: ignore[no-untyped-def]
    """bfloat16 is the upper half of a float32."""
    shift = 32 - 8 * bits.itemsize
    for i in range(bits.size):
        full[i] = np.int32(np.int32(bits[i]) << shift)


@compiled(inline="always")
def _key(bits):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats that have these bits."""
    return np.int32(bits ^ ((bits >> 31) & _NOT_ZERO))


@compiled()
def _greatest(full, greatest):  # type: ignore[no-untyped-def]
    """Fills in the greatest key of each block; returns the largest magnitude's bits: a NaN's are above infinity's."""
    largest = np.int32(0)
    for block in range(greatest.size):
        best = np.int32(_LEAST)
        part = full[block * _BLOCK : (block + 1) * _BLOCK]
        for i in range(part.size):
            best = max(best, _key(part[i]))
            largest = max(largest, np.int32(part[i] & _NOT_ZERO))
        greatest[block] = best
    return largest


@compiled()
def _bound(greatest, k):  # type: ignore[no-untyped-def]
    """A key that at least k values reach, and no block without one of the k greatest: the k-th greatest of the blocks'."""
    if greatest.size <= k:
        return np.int32(_LEAST)
    bound = np.partition(greatest, greatest.size - k)[greatest.size - k]
    return np.int32(-1) if bound == 0 else bound  # -0 is as great as 0


@compiled()
def _at_least(full, greatest, bound, found):  # type: ignore[no-untyped-def]
    """Keys from `bound` on, each with its id, as integers that sort by key; of equal keys the lower id is the greater."""
    count = 0
    for block in range(greatest.size):
        if greatest[block] >= bound:
            for i in range(block * _BLOCK, min((block + 1) * _BLOCK, full.size)):
                key = _key(full[i])
                if key >= bound:
                    found[count] = (np.int64(0 if key == -1 else key) << 32) | (_NOT_ZERO - i)
                    count += 1
    return found[:count]


@compiled(inline="always")
def _id(entry):  # type: ignore[no-untyped-def]
    return _NOT_ZERO - (entry & _NOT_ZERO)


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _sum_of_exponentials(values, top):  # type: ignore[no-untyped-def]
    """Σ exp(value - top), all of them finite or -inf and none above `top`, each 2^-126 at least; written so that it is done in
    vectors."""
    total = 0.0
    for begin in range(0, values.size, _RUN):
        part = values[begin : begin + _RUN]
        subtotal = np.float32(0)
        for i in range(part.size):
            power = max((part[i] - top) * _LOG2_E, np.float32(-126))  # 2^-126 is nothing compared with 1
            whole = np.floor(power + np.float32(0.5))
            x = power - whole
            fraction = _C0 + x * (_C1 + x * (_C2 + x * (_C3 + x * (_C4 + x * (_C5 + x * (_C6 + x * _C7))))))
            subtotal += fraction * np.int32((np.int32(whole) + 127) << 23).view(np.float32)  # times 2^whole
        total += subtotal
    return total
