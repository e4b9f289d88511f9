"""Counts of pairs against `collections.Counter`: order, parts and folding change nothing."""

import itertools
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusechat.align import counts as module
from fusechat.align.counts import Counts, Seen, add_counts, add_seen, count_pairs

Batch = list[tuple[int, int]]
BATCHES = st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=12), max_size=6)


def counted(batches: list[Batch]) -> Counts:
    return count_pairs(
        (np.array([s for s, _ in batch], dtype=np.int32), np.array([t for _, t in batch], dtype=np.int32))
        for batch in batches
    )


def columns(counts: Counts) -> list[tuple[int, int, int]]:
    return list(zip(counts.source.tolist(), counts.pivot.tolist(), counts.count.tolist(), strict=True))


def expected(batches: list[Batch]) -> list[tuple[int, int, int]]:
    return [(*pair, count) for pair, count in sorted(Counter(pair for batch in batches for pair in batch).items())]


@given(BATCHES)
def test_a_pair_that_occurs_twice_counts_twice(batches: list[Batch]) -> None:
    counts = counted(batches)
    assert columns(counts) == expected(batches)
    assert {counts.source.dtype, counts.pivot.dtype, counts.count.dtype} == {np.dtype(np.int64)}


@given(BATCHES, st.data())
def test_neither_the_order_nor_the_split_into_parts_changes_anything(batches: list[Batch], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations([data.draw(st.permutations(batch)) for batch in batches]))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(batches)), max_size=3))), len(batches)]
    parts = [counted(shuffled[begin:end]) for begin, end in itertools.pairwise(edges)]
    assert columns(add_counts(data.draw(st.permutations(parts)))) == columns(counted(shuffled)) == expected(batches)


@given(BATCHES, st.sampled_from([0, 1, 3, 4, 8]))
@example([[(1, 2), (1, 2)], [(0, 1)], [], [(1, 2), (3, 0), (0, 1)], [(2, 2), (1, 2), (5, 5), (0, 0)]], 8)
def test_folding_in_what_waits_changes_nothing(batches: list[Batch], room: int) -> None:
    folds, fold = [], module._fold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROOM", room)
        patch.setattr(module, "_fold", lambda *given: folds.append(0) or fold(*given))
        assert columns(counted(batches)) == expected(batches)
    assert len(folds) > (sum(map(len, batches)) > room)


def test_large_ids_and_counts_do_not_run_into_each_other_and_nothing_is_no_pairs() -> None:
    """A sum in floating point would lose the ones."""
    largest = 2**31 - 1
    counts = counted([[(262_143, 5), (5, 262_143), (5, 262_143), (largest, largest), (0, largest)]])
    assert columns(counts) == [(0, largest, 1), (5, 262_143, 2), (262_143, 5, 1), (largest, largest, 1)]
    most, one = (Counts(np.array([1]), np.array([2]), np.array([count])) for count in (2**60, 1))
    assert columns(add_counts([most, one, one, one])) == [(1, 2, 2**60 + 3)]
    assert columns(counted([])) == columns(counted([[], []])) == columns(add_counts([])) == []


# -- all that a pass over conversations finds ---------------------------------------------------------------------------

SEEN = st.builds(
    lambda batches, parts, tokens, rests: Seen(
        counted(batches), Counter(parts), np.array(sorted(tokens), dtype=np.int64), rests
    ),
    BATCHES,
    st.dictionaries(st.tuples(st.sampled_from([b"a", b"ab", b"\xe6"]), st.integers(0, 3)), st.integers(1, 5)),
    st.sets(st.integers(0, 9)),
    st.sets(st.sampled_from([b"a", b"ab", b"\xe6"])),
)


@given(st.lists(SEEN, max_size=4), st.randoms())
def test_what_parts_have_seen_adds_up_in_any_order(parts: list[Seen], random: Random) -> None:
    pairs = [[(s, t)] * count for part in parts for s, t, count in columns(part.pairs)]
    continued = [key for part in parts for key, count in part.parts.items() for _ in range(count)]
    tokens = {token for part in parts for token in part.tokens.tolist()}
    rests = {rest for part in parts for rest in part.remaining_bytes}
    random.shuffle(parts)
    total = add_seen(parts)
    assert columns(total.pairs) == expected(pairs)
    assert total.parts == Counter(continued)
    assert total.tokens.tolist() == sorted(tokens)
    assert total.remaining_bytes == rests


def test_a_sum_leaves_its_parts_as_they_were() -> None:
    part = Seen(counted([[(1, 2)]]), Counter({(b"a", 1): 2}), np.array([3]), {b"a"})
    add_seen([part, part])
    assert columns(part.pairs) == [(1, 2, 1)]
    assert part.parts == Counter({(b"a", 1): 2})
    assert part.remaining_bytes == {b"a"}
