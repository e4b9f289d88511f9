"""The average of several candidates' rows: against dictionaries, and the laws that it keeps."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusechat.data.distributions import SparseDistribution, nothing
from fusechat.fuse.mixture import mix
from fusing import distributions, naive_mix, rows_of, sparse


def weights(*columns: tuple[float, ...]) -> np.ndarray:
    """[candidates, n], from the weights of each row."""
    return np.array(columns, dtype=np.float64).T


def test_by_hand() -> None:
    """The probabilities of an id that both have are summed; what each leaves out stays out, averaged."""
    one = sparse([{1: 0.5, 2: 0.25}, {4: 1.0}])
    other = sparse([{2: 0.5, 3: 0.25, 1: 0.125}, {5: 0.5}])
    found = mix([one, other], weights((0.75, 0.25), (0.5, 0.5)))
    expected = [
        {1: 0.375 + 0.125 / 4, 2: 0.1875 + 0.125, 3: 0.0625},
        {4: 0.5, 5: 0.25},
    ]
    assert [row.keys() for row in rows_of(found)] == [row.keys() for row in expected]
    for row, by_hand in zip(rows_of(found), expected, strict=True):
        assert row == pytest.approx(by_hand)
    assert found.ids.tolist() == [[1, 2, 3], [4, 5, -1]], "most likely first"
    assert found.tail.tolist() == pytest.approx([0.75 * 0.25 + 0.25 * 0.125, 0.25])
    assert (found.ids.dtype, found.logprobs.dtype) == (np.int32, np.float32)


def test_tails_that_were_measured_are_averaged_and_not_made_of_rounded_sums() -> None:
    one, other = sparse([{1: 0.6, 2: 0.4}] * 2), sparse([{1: 0.5, 3: 0.5}] * 2)
    one, other = replace(one, tail=np.array([1e-9, 1e-9])), replace(other, tail=np.array([3e-9, 3e-9]))
    found = mix([one, other], weights((0.75, 0.25), (1.0, 0.0)))
    assert found.tail.tolist() == pytest.approx([1.5e-9, 1e-9], rel=1e-9)


def test_a_row_without_targets_gives_its_weight_to_the_others_in_proportion() -> None:
    one, empty, other = sparse([{1: 0.5}]), nothing(1), sparse([{2: 0.25}])
    [row] = rows_of(mix([one, empty, other], weights((0.2, 0.2, 0.6))))
    assert row == pytest.approx({1: 0.5 * 0.25, 2: 0.25 * 0.75})
    alone = mix([one, empty], weights((0.001, 0.999)))
    assert rows_of(alone) == rows_of(one)


def test_no_weight_and_no_target_give_no_target() -> None:
    one, other = sparse([{1: 0.5}, {}]), sparse([{2: 0.5}, {}])
    assert rows_of(mix([one, other], weights((0.0, 0.0), (0.5, 0.5)))) == [{}, {}]
    only = mix([one, other], weights((0.0, 0.0), (1.0, 0.0)))
    assert rows_of(only) == [{}, {}], "a chosen candidate without targets leaves the row without"


def test_nothing_has_rows_and_no_mass() -> None:
    found = nothing(3)
    assert (len(found), rows_of(found), found.tail.tolist()) == (3, [{}] * 3, [1.0] * 3)
    assert len(mix([nothing(0), nothing(0)], np.zeros((2, 0)))) == 0


def test_of_one_candidate_of_a_store_nothing_changes() -> None:
    one = sparse([{1: 0.3, 2: 0.2}, {7: 0.9}], k=5, kind=np.float16)
    found = mix([one], np.ones((1, 2)))
    np.testing.assert_array_equal(found.ids, one.ids)
    np.testing.assert_array_equal(found.logprobs, one.logprobs.astype(np.float32))


def test_a_row_of_one_candidate_keeps_its_order_and_what_no_float64_holds() -> None:
    """Of equally likely tokens, as the capture had them; a probability of e^-800 is 0 in any arithmetic but that of logarithms."""
    logprobs = np.array([[-1.0, -1.0, -1.0, -800.0]], dtype=np.float16)
    one = SparseDistribution(np.array([[9, 3, 5, 1]], dtype=np.int32), logprobs, np.zeros(0, dtype=np.float32))
    for others, share in (([], (1.0,)), ([sparse([{1: 1.0}])], (1.0, 0.0)), ([nothing(1)], (0.25, 0.75))):
        found = mix([one, *others], weights(share))
        _same_row(found, one, 0)


def test_a_very_small_share_is_kept_and_a_hundred_candidates_are_summed() -> None:
    found = mix([sparse([{1: 1.0}]), sparse([{2: 1.0}])], weights((1 - 1e-12, 1e-12)))
    assert rows_of(found)[0] == pytest.approx({1: 1.0, 2: 1e-12}, rel=1e-5)
    many = mix([sparse([{0: 0.5, 1 + index: 0.5}]) for index in range(100)], np.full((100, 1), 0.01))
    assert rows_of(many)[0] == pytest.approx({0: 0.5, **{1 + index: 0.005 for index in range(100)}}, rel=1e-5)


@st.composite
def mixtures(draw: Callable) -> tuple[list[list[dict[int, float]]], np.ndarray]:
    """Rows of 1 to 4 candidates, and weights that sum to one in each row, or are zero; some are one-hot."""
    n, number = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = [draw(distributions(n)) for _ in range(number)]
    columns = []
    for _ in range(n):
        parts = draw(st.lists(st.integers(0, 5), min_size=number, max_size=number))
        columns.append(tuple(part / max(sum(parts), 1) for part in parts))
    return rows, weights(*columns)


@given(mixtures())
def test_the_average_over_the_union_of_ids_is_that_of_dictionaries(
    given_: tuple[list[list[dict[int, float]]], np.ndarray],
) -> None:
    rows, share = given_
    found = mix([sparse(each) for each in rows], share)
    assert len(found) == share.shape[1]
    for index, row in enumerate(rows_of(found)):
        assert row == pytest.approx(naive_mix([each[index] for each in rows], share[:, index].tolist()), rel=1e-5)
    assert (np.diff(np.where(found.ids >= 0, found.logprobs, -1e9), axis=1) <= 1e-6).all(), "most likely first"


@given(mixtures())
def test_mass_is_conserved(given_: tuple[list[list[dict[int, float]]], np.ndarray]) -> None:
    """What is kept, and the tail, are the weighted averages of what the candidates keep and of their tails."""
    rows, share = given_
    found = mix([sparse(each) for each in rows], share)
    for index, row in enumerate(rows_of(found)):
        parts = [(sum(each[index].values()), weight) for each, weight in zip(rows, share[:, index], strict=True)]
        total = sum(weight for kept, weight in parts if kept)
        kept = sum(kept * weight for kept, weight in parts) / total if total else 0.0
        assert sum(row.values()) == pytest.approx(kept, abs=1e-5)
        assert found.tail[index] == pytest.approx(1 - kept, abs=1e-5)


@given(mixtures(), st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(
    given_: tuple[list[list[dict[int, float]]], np.ndarray], random: object
) -> None:
    rows, share = given_
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    one = rows_of(mix([sparse(each) for each in rows], share))
    other = rows_of(mix([sparse(rows[index]) for index in order], share[order]))
    for row, again in zip(one, other, strict=True):
        assert row == pytest.approx(again, rel=1e-5)


@given(mixtures(), st.data())
def test_one_hot_weights_give_that_candidate_bit_for_bit(
    given_: tuple[list[list[dict[int, float]]], np.ndarray], data: st.DataObject
) -> None:
    """Also where rows of other candidates next to it are averaged."""
    rows, share = given_
    n = share.shape[1]
    candidates = [sparse(each, kind=np.float16) for each in rows]
    hot = {row: data.draw(st.integers(0, len(rows) - 1)) for row in data.draw(st.sets(st.integers(0, n - 1)))}
    for row, index in hot.items():
        share[:, row] = np.arange(len(rows)) == index
    found = mix(candidates, share)
    for row, index in hot.items():
        _same_row(found, candidates[index], row)


def _same_row(found: SparseDistribution, candidate: SparseDistribution, row: int) -> None:
    k = candidate.ids.shape[1]
    assert found.ids[row, :k].tolist() == candidate.ids[row].tolist()
    assert found.logprobs[row, :k].tobytes() == candidate.logprobs[row].astype(np.float32).tobytes()
    assert (found.ids[row, k:] == -1).all()
    assert (found.logprobs[row, k:] == -math.inf).all()
