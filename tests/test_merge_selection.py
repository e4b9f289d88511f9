"""The largest entries of a tensor against a sort: ties, levels of the search, samples that mislead."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cases import each, pairwise
from fusechat.merge.kernels import CHUNK
from fusechat.merge.selection import GATHER, SAMPLE, Selection, kept, select
from fusechat.merge.tensor import BLOCK, Workers
from merging import tensor_of

Rows = Sequence[np.ndarray]  # of keys, int64 ≥ 0
PART = (1 << 21) - 1  # a key of 63 bits is stored as three whole numbers, which float32 holds exactly
SHIFTS = (42, 21, 0)


def keys_of(block: np.ndarray, row: int, out: np.ndarray) -> None:
    out[:] = 0
    for part, shift in zip(block[3 * row : 3 * row + 3], SHIFTS, strict=True):
        out |= part.astype(np.int64) << shift


def chosen(
    rows: Rows,
    keep: Sequence[int] | Callable[[np.ndarray], np.ndarray],
    *,
    block: int = CHUNK,
    threads: int = 1,
    gather: int = GATHER,
    sample: int = 0,
) -> tuple[list[list[int]], Selection]:
    """The places that are kept, row by row, as they are asked for block by block."""
    stored = [(keys >> shift & PART).astype(np.float32) for keys in rows for shift in SHIFTS]
    workers = Workers(threads)
    tensor = tensor_of(stored, workers, block=block)
    how = keep if callable(keep) else lambda nonzero: np.array(keep, np.int64)
    found = select(tensor, keys_of, len(rows), how, gather=gather, sample=sample)
    workers.close()
    places = []
    for row, keys in enumerate(rows):
        mask = np.zeros(keys.size, np.bool_)
        for start in range(0, keys.size, block):
            end = min(start + block, keys.size)
            ties = found.ties[row, start // CHUNK : -(-end // CHUNK)]
            kept(keys[start:end], found.thresholds[row], ties, mask[start:end])
        places.append(np.flatnonzero(mask).tolist())
    return places, found


def largest(keys: np.ndarray, count: int) -> list[int]:
    """By a sort: larger keys first, of equal ones the lower index."""
    return sorted(np.lexsort((np.arange(keys.size), -keys))[: max(count, 0)].tolist())


def check(rows: Rows, keep: Sequence[int], **how: int) -> None:
    places, found = chosen(rows, keep, **how)
    for row, keys in enumerate(rows):
        expected = largest(keys, keep[row])
        assert found.counts[row] == len(expected)
        assert len(places[row]) == len(expected)
        assert places[row] == expected


def drawn(kind: str, size: int, seed: int) -> np.ndarray:
    """Keys of the kinds that a selection meets, or that are hard for it."""
    generator = np.random.default_rng(seed)
    normal = generator.normal(size=size)
    if kind == "few":  # distinct keys: almost all are ties
        return generator.integers(0, 3, size) << generator.integers(0, 60)
    if kind == "float64":
        return (normal**2).view(np.int64)
    if kind == "float32":
        return normal.astype(np.float32).view(np.int32).astype(np.int64) % (1 << 31) << 32
    if kind == "coarse":  # float32 of eight bits, as differences of bfloat16 are
        return (np.abs(normal).astype(np.float32).view(np.int32) >> 16 << 16).astype(np.int64) << 32
    if kind == "sparse":  # nearly all zero
        return np.where(generator.random(size) < 0.01, (normal**2).view(np.int64), 0)
    if kind == "range":  # every float64 ≥ 0 there is: most keys are bits at random
        return generator.integers(0, 0x7FF0 << 48, size)
    if kind == "lowest":  # equal but for the last bits
        return (0x3FF123456789 << 16 | 0x8000) - 40 + generator.integers(0, 80, size)
    return np.sort((normal**2).view(np.int64))[:: 1 if kind == "rising" else -1].copy()


KINDS = ("few", "float64", "float32", "coarse", "sparse", "range", "lowest", "rising", "falling")
SIZES = [1, 2, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK + 1, 9 * CHUNK + 5]


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 1 << 32),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    gather=st.sampled_from([0, 1, 50, GATHER]),
    sample=st.sampled_from([0, 1]),
    block=st.sampled_from([CHUNK, 2 * CHUNK, BLOCK]),
    threads=st.sampled_from([1, 2]),
)
def test_the_largest_are_those_of_a_sort(
    kinds: list[str], size: int, seed: int, shares: list[float], gather: int, sample: int, block: int, threads: int
) -> None:
    rows = [drawn(kind, size, seed + number) for number, kind in enumerate(kinds)]
    keep = [round(share * size) for share in shares[: len(rows)]]
    check(rows, keep, gather=gather, sample=sample, block=block, threads=threads)


EQUAL = pairwise(
    (0, 1, 1 << 15, 1 << 31, 1 << 47, (1 << 63) - 2), (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1), (0, 1, GATHER)
)


@each("key, size, gather", EQUAL)
def test_of_equal_keys_the_first_are_kept(key: int, size: int, gather: int) -> None:
    for count in {0, 1, size // 2, size - 1, size}:
        check([np.full(size, key)], [count], gather=gather, block=2 * CHUNK)


COUNTS = (0, 1, 2, 3, 400, CHUNK, 2 * CHUNK + 500, 5 * CHUNK, 10 * CHUNK, 12 * CHUNK)


@each("count, gather, sample", pairwise(COUNTS, (0, GATHER), (0, 1)))
def test_ties_at_the_threshold_in_many_chunks(count: int, gather: int, sample: int) -> None:
    """Two larger keys; the threshold's, with a smaller one at every third place; zeros after them."""
    keys = np.zeros(12 * CHUNK, np.int64)
    keys[: 9 * CHUNK] = 7 << 40
    keys[: 9 * CHUNK : 3] = 5 << 40
    keys[[CHUNK + 1, 8 * CHUNK]] = 9 << 40
    check([keys], [count], gather=gather, sample=sample, block=2 * CHUNK)


@each("gather", [0, 1, 9, GATHER])
def test_keys_that_differ_in_one_bit_only(gather: int) -> None:
    """The levels of the search end at bits 47, 31 and 15: keys in pairs that no earlier bit tells apart."""
    for bit in range(63):
        keys = np.full(100, 0x2AAA_5555_3333_0F0F & ~(1 << bit))
        keys[np.random.default_rng(bit).permutation(100)[:50]] |= 1 << bit
        for count in (1, 49, 50, 51, 99):
            places, found = chosen([keys], [count], gather=gather)
            assert (places, found.counts.tolist()) == ([largest(keys, count)], [count]), (bit, count)


@each("count", [1, 500, 5000])
def test_every_level_of_the_search_is_passed(count: int) -> None:
    """Where not one key may be gathered, every key but the last bits' has to be counted, and ties there are told by chunk."""
    generator = np.random.default_rng(0)
    keys = np.zeros(2 * CHUNK + 9, np.int64)
    for shift in (47, 31, 15, 0):
        keys |= generator.integers(0, 3, keys.size) << shift
    check([keys, keys[::-1].copy()], [count, count + 1], gather=0, block=CHUNK)
    assert len(np.unique(keys)) == 81
    calls = []

    def counting(block: np.ndarray, row: int, out: np.ndarray) -> None:
        calls.append(row)
        keys_of(block, row, out)

    stored = [(keys >> shift & PART).astype(np.float32) for shift in SHIFTS]
    tensor = tensor_of(stored, Workers(1), block=4 * CHUNK)
    select(tensor, counting, 1, lambda nonzero: np.array([count]), gather=0, sample=0)
    assert len(calls) == 5, "four levels, and the pass that tells where the ties are"
    calls.clear()
    select(tensor, counting, 1, lambda nonzero: np.array([count]), gather=keys.size, sample=0)
    assert len(calls) == 2, "one level, and the gathering"


def test_float64_of_every_range_is_ordered() -> None:
    tiny = 5e-324
    values = np.array(
        [0, tiny, 2 * tiny, 1e-310, 2.2e-308, 1e-300, 1e-300 * (1 + 2**-52), 1, 1 + 2**-52, 1e300, 1.7e308]
    )
    order = np.random.default_rng(0).permutation(values.size)
    keys = values[order].view(np.int64)
    for count in range(values.size + 1):
        for gather in (0, GATHER):
            check([keys], [count], gather=gather)
            places, _ = chosen([keys], [count], gather=gather)
            assert sorted(values[order][places[0]]) == sorted(values)[values.size - count :]


def test_rows_are_selected_by_themselves() -> None:
    size = 9 * CHUNK
    rows = [drawn(kind, size, 3) for kind in ("float32", "few", "sparse", "rising", "lowest")]
    for how in ({"sample": 0}, {"sample": 1}, {"sample": 0, "gather": 3}, {"sample": 1, "gather": 3}):
        check(rows, [0, 777, size, 1, size - 1], threads=2, **how)


@each("zeros, sample", pairwise((0, 1, CHUNK, 9 * CHUNK - 1, 9 * CHUNK), (0, 1)))
def test_how_many_are_not_zero_is_told_exactly(zeros: int, sample: int) -> None:
    """The last thing that `keep` is told; of a sample it is told an estimate before."""
    keys = drawn("float64", 9 * CHUNK, 1)
    keys[::7] = 1  # the smallest number that is not zero
    keys[np.random.default_rng(1).permutation(keys.size)[:zeros]] = 0
    told = []

    def keep(nonzero: np.ndarray) -> np.ndarray:
        told.append(nonzero.tolist())
        return nonzero // 3

    places, found = chosen([keys, keys], keep, sample=sample)
    nonzero = int(np.count_nonzero(keys))
    assert told[-1] == [nonzero, nonzero]
    assert found.counts.tolist() == [nonzero // 3] * 2
    assert places[0] == largest(keys, nonzero // 3)


def test_no_more_are_kept_than_there_are() -> None:
    for sample, (wanted, count) in itertools.product((0, 1), ((-5, 0), (10**9, 9 * CHUNK))):
        places, found = chosen([drawn("float64", 9 * CHUNK, 2)], [wanted], sample=sample)
        assert found.counts.tolist() == [count], (sample, wanted)
        assert len(places[0]) == count
    places, found = chosen([np.zeros(0, np.int64)] * 2, [0, 3])
    assert places == [[], []]
    assert found.counts.tolist() == [0, 0]


@each("where, gather, count", pairwise((0, 1, 17, 39), (10, GATHER), (1, 50, CHUNK, 5 * CHUNK, 33 * CHUNK)))
def test_a_sample_that_misleads_does_not_change_what_is_found(where: int, gather: int, count: int) -> None:
    """All that is large lies in one chunk of forty, or all but one are the same."""
    keys = drawn("float64", 40 * CHUNK, where) % (1 << 40)
    keys[where * CHUNK : (where + 1) * CHUNK] += 1 << 50
    check([keys], [count], sample=5, gather=gather, block=4 * CHUNK)
    keys[: 39 * CHUNK] = 1 << 20
    check([keys, keys[::-1].copy()], [count, count + 7], sample=5, gather=gather, block=4 * CHUNK)


@each("kind", ["float64", "coarse", "few", "sparse", "falling"])
def test_a_large_tensor_is_sampled_without_being_asked(kind: str) -> None:
    size = 520 * CHUNK + 11
    keys = drawn(kind, size, 5)
    stored = [(keys >> shift & PART).astype(np.float32) for shift in SHIFTS]
    workers, seen = Workers(2), []

    def counting(block: np.ndarray, row: int, out: np.ndarray) -> None:
        seen.append(out.size)
        keys_of(block, row, out)

    found = select(tensor_of(stored, workers), counting, 1, lambda nonzero: nonzero // 10)
    workers.close()
    assert kind == "falling" or sum(seen) == size + SAMPLE * CHUNK, "the sample and one pass"
    count = int(np.count_nonzero(keys)) // 10
    mask = np.zeros(size, np.bool_)
    kept(keys, found.thresholds[0], found.ties[0], mask)
    assert found.counts.tolist() == [count] == [np.count_nonzero(mask)]
    threshold = np.partition(keys, size - count)[size - count]
    equal = np.flatnonzero(keys == threshold)
    assert mask[keys > threshold].all()
    assert not mask[keys < threshold].any()
    assert mask[equal].tolist() == sorted(mask[equal], reverse=True), "the first of the ties"
