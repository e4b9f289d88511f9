"""From logits to sparse distributions: top-k and log-softmax in float32. See docs/training.md.

With a vocabulary of 262,144, `torch.topk` on a CPU is slower than the model's head. There, a kernel reads each row three times
from the cache: for the maximum of every block of the vocabulary; for the values of blocks that may have one of the k; for the
sum of the other exponentials. Threads work on separate rows.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fusechat.data.distributions import SparseDistribution
from fusechat.models.forward import float_rows, gold_nll
from fusechat.models.teacher_forcing import Columns
from fusechat.run.compiled import compiled

_BLOCK = 256  # logits
_RUN = 4096  # exponentials summed in float32; these sums are summed in float64
_LEAST = -(1 << 31)
_INFINITE = 0x7F800000
_NOT_ZERO = 0x7FFFFFFF  # every bit but the sign's
_NEXT_TO_NOTHING = 2.0**-125  # an exponential of -inf comes out as 2^-126
_LOG2_E = np.float32(np.log2(np.e))
_POWER_OF_2 = tuple(np.float32(c) for c in (1.0, *(np.log(2.0) ** n / np.prod(range(1, n + 1)) for n in range(1, 8))))
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = _POWER_OF_2  # Taylor's; for |x| <= 1/2 its error is below float32's


def sparse_rows(logits: torch.Tensor, gold: torch.Tensor, k: int) -> Columns:
    """The `k` most probable tokens (at most all) of `logits` [n, V], any float dtype, on their device.

    Returns ids int32 [n, k], log-probabilities over the full vocabulary float32 [n, k], the nll of the gold tokens float32 [n]
    (nats), and the probability of all other tokens float32 [n], exact even if tiny. The log-softmax is float32. On a CPU the
    lower id wins a tie. A row with NaN or +inf has NaN log-probabilities; -inf is probability 0.
    """
    return (_by_kernel if logits.device.type == "cpu" else _by_torch)(logits, gold, min(k, logits.shape[1]))


def distribution(ids: np.ndarray, logprobs: np.ndarray, nll: np.ndarray, tail: np.ndarray) -> SparseDistribution | None:
    """The distribution of one conversation from the columns of `sparse_rows`; None if a value is not finite."""
    finite = np.isfinite(nll).all() and np.isfinite(logprobs).all()
    return SparseDistribution(ids, logprobs, nll, tail) if finite else None


def _by_torch(logits: torch.Tensor, gold: torch.Tensor, k: int) -> Columns:
    parts = []
    for rows, full in float_rows(logits):
        values, ids = full.topk(k, dim=1)
        others = full.scatter(1, ids, -torch.inf).logsumexp(dim=1)  # not 1 - Σ kept, which is rounding
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
    """`sparse_rows` for logits [n, V] given as bits of bfloat16 (int16) or float32 (int32)."""
    n, size = bits.shape
    k = ids.shape[1]
    full = np.empty(size, np.int32)  # a row's bits as float32
    greatest = np.empty((size + _BLOCK - 1) // _BLOCK, np.int32)
    found = np.empty(size, np.int64)
    below = np.empty(k)  # kept values less the maximum
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
            values[token] = -np.inf  # the others remain
        total = others = np.nan  # sums of exp(value - top)
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
    """Integers in the order of the floats with these bits."""
    return np.int32(bits ^ ((bits >> 31) & _NOT_ZERO))


@compiled()
def _greatest(full, greatest):  # type: ignore[no-untyped-def]
    """Writes the maximum key of each block. Returns the bits of the largest magnitude: those of NaN exceed those of infinity."""
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
    """A key that at least k values reach: the k-th largest of the blocks' maxima. Blocks below it have none of the k largest."""
    if greatest.size <= k:
        return np.int32(_LEAST)
    bound = np.partition(greatest, greatest.size - k)[greatest.size - k]
    return np.int32(-1) if bound == 0 else bound  # -0 is as great as 0


@compiled()
def _at_least(full, greatest, bound, found):  # type: ignore[no-untyped-def]
    """Keys from `bound` on with their ids, as integers that sort by key, then by descending id."""
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
    """Σ exp(value - top), each at least 2^-126, for values that are finite or -inf and at most `top`. Written to be vectorised."""
    total = 0.0
    for begin in range(0, values.size, _RUN):
        part = values[begin : begin + _RUN]
        subtotal = np.float32(0)
        for i in range(part.size):
            power = max((part[i] - top) * _LOG2_E, np.float32(-126))  # 2^-126 vanishes next to 1
            whole = np.floor(power + np.float32(0.5))
            x = power - whole
            fraction = _C0 + x * (_C1 + x * (_C2 + x * (_C3 + x * (_C4 + x * (_C5 + x * (_C6 + x * _C7))))))
            subtotal += fraction * np.int32((np.int32(whole) + 127) << 23).view(np.float32)  # times 2^whole
        total += subtotal
    return total
