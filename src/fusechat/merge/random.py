"""Random numbers that depend on nothing but what they are for: a seed, a tensor, a target, an element.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) is counted, not stepped: any element's number
can be computed by itself, in any order, on any thread.
"""

import hashlib

import numpy as np

from fusechat.merge.kernels import kernel


def tensor_key(seed: int, name: str) -> int:
    """64 bits for a tensor: those that BLAKE2b gives for seed and name, read from the least significant on."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def keep_mask(key: int, target: int, start: int, density: float, out: np.ndarray) -> None:
    """Writes to `out` bool [n] which elements of `target`, from `start` (a multiple of 4) on, are kept: each with probability
    `density`. Word `element % 4` of Philox at the counter (`element // 4`, `target`, 0) is below `density` · 2³²."""
    _keep(
        np.uint64(key), np.uint64(target), np.uint64(start), np.uint64(round(min(max(density, 0.0), 1.0) * 2**32)), out
    )


@kernel
def philox(counter0, counter1, counter2, counter3, key0, key1):  # type: ignore[no-untyped-def]
    """Four words of 32 bits, each in an uint64."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * counter0
        product1 = np.uint64(0xCD9E8D57) * counter2
        counter0 = (product1 >> half) ^ counter1 ^ key0
        counter2 = (product0 >> half) ^ counter3 ^ key1
        counter1 = product1 & low
        counter3 = product0 & low
        key0 = (key0 + np.uint64(0x9E3779B9)) & low
        key1 = (key1 + np.uint64(0xBB67AE85)) & low
    return counter0, counter1, counter2, counter3


@kernel
def _keep(key, target, start, limit, out):  # type: ignore[no-untyped-def]
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    key0, key1 = key & low, key >> half
    words = np.empty((4, 256), np.uint64)
    for first in range(0, out.size, 1024):
        size = min(1024, out.size - first)
        group = (start + np.uint64(first)) >> np.uint64(2)
        for i in range(256):
            number = group + np.uint64(i)
            words[0, i], words[1, i], words[2, i], words[3, i] = philox(
                number & low, number >> half, target, np.uint64(0), key0, key1
            )
        for i in range(size):
            out[first + i] = words[i & 3, i >> 2] < limit
