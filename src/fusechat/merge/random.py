"""Random numbers that depend only on a seed, a tensor, a target and an element.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) is counter-based: each element's number is
computed independently, in any order, on any thread.
"""

import hashlib

import numpy as np

from fusechat.merge.kernels import kernel


def tensor_key(seed: int, name: str) -> int:
    """A 64-bit key for a tensor: BLAKE2b of seed and name, little-endian."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def keep_mask(key: int, target: int, start: int, density: float, out: np.ndarray) -> None:
    """Writes to `out` bool [n] which elements of `target` from `start` (a multiple of 4) on are kept, with probability
    `density`.

    An element is kept if word `element % 4` of Philox at the counter (`element // 4`, `target`, 0) is below `density` · 2³².
    """
    _keep(
        np.uint64(key), np.uint64(target), np.uint64(start), np.uint64(round(min(max(density, 0.0), 1.0) * 2**32)), out
    )


@kernel
def philox(counters, key):  # type: ignore[no-untyped-def]
    """Turns `counters` uint32 [4, n] (little-endian words) into as many random words, with one uint64 key."""
    first, second, third, fourth = counters[0], counters[1], counters[2], counters[3]
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    for _ in range(10):
        for i in range(first.size):
            product = np.uint64(0xD2511F53) * np.uint64(first[i])
            other = np.uint64(0xCD9E8D57) * np.uint64(third[i])
            first[i] = np.uint32(other >> np.uint64(32)) ^ second[i] ^ low
            third[i] = np.uint32(product >> np.uint64(32)) ^ fourth[i] ^ high
            second[i] = np.uint32(other)
            fourth[i] = np.uint32(product)
        low = np.uint32(low + np.uint32(0x9E3779B9))
        high = np.uint32(high + np.uint32(0xBB67AE85))


@kernel
def _keep(key, target, start, limit, out):  # type: ignore[no-untyped-def]
    words = np.empty((4, 256), np.uint32)
    for begin in range(0, out.size, 1024):
        group = (start + np.uint64(begin)) >> np.uint64(2)
        for i in range(256):
            number = group + np.uint64(i)
            words[0, i] = np.uint32(number)
            words[1, i] = np.uint32(number >> np.uint64(32))
            words[2, i] = np.uint32(target)
            words[3, i] = np.uint32(0)
        philox(words, key)
        part = out[begin : begin + 1024]
        if part.size == 1024:
            for i in range(256):
                for word in range(4):
                    part[4 * i + word] = words[word, i] < limit
        else:
            for i in range(part.size):
                part[i] = words[i & 3, i >> 2] < limit
