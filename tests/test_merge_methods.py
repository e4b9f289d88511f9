"""SCE and linear merging, by hand and against exact arithmetic on one element at a time."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusechat.merge.methods import Merged, linear, sce


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def merged(pivot: np.ndarray, *deltas: list[float], **how: object) -> Merged:
    return sce(pivot, [pivot + array(*delta) for delta in deltas], **how)  # type: ignore[arg-type]


def naive_sce(
    pivot: list[Fraction],
    deltas: list[list[Fraction]],
    *,
    select_topk: float,
    select_deltas: bool = True,
    normalize: bool = True,
) -> tuple[list[Fraction], list[Fraction]]:
    """(merged, coefficients) by Algorithm 1, exact."""
    targets, size = len(deltas), len(pivot)
    chosen = set(range(size))
    if select_topk < 1 and targets > 1:
        variance = []
        for i in range(size):
            mean = sum((delta[i] for delta in deltas), Fraction(0)) / targets
            variance.append(sum(((delta[i] - mean) ** 2 for delta in deltas), Fraction(0)) / targets)
        keep = int(select_topk * sum(value != 0 for value in variance))
        chosen = set(sorted(range(size), key=lambda i: (-variance[i], i))[:keep])
    selected = [[value if i in chosen else Fraction(0) for i, value in enumerate(delta)] for delta in deltas]
    squares = [sum((value**2 for value in delta), Fraction(0)) for delta in selected]
    total = sum(squares)
    eta = [square / total if total else Fraction(1, targets) for square in squares]
    used = selected if select_deltas else deltas
    result = []
    for i in range(size):
        positive = sum(delta[i] for delta in used) >= 0
        left = [j for j in range(targets) if used[j][i] != 0 and (used[j][i] > 0) == positive]
        update = sum((eta[j] * used[j][i] for j in left), Fraction(0))
        weight = sum((eta[j] for j in left), Fraction(0))
        if normalize:
            update = update / weight if weight else Fraction(0)
        result.append(pivot[i] + update)
    return result, eta


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Whole numbers: sums and, by the factor 3 in the deltas, the means of up to four targets are exact in float32."""
    size, targets = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3).map(lambda value: 3 * value), min_size=size, max_size=size)
    pivot = draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size))
    return pivot, draw(st.lists(row, min_size=targets, max_size=targets))


@settings(max_examples=300, deadline=None)
@given(
    problem=problems(),
    select_topk=st.sampled_from([0.0, 0.1, 0.29, 0.34, 0.5, 0.75, 0.99, 1.0, 2.0]),
    select_deltas=st.booleans(),
    normalize=st.booleans(),
)
@example(problem=([0, 0], [[3, 0], [0, 0]]), select_topk=0.5, select_deltas=True, normalize=True)
def test_sce_is_the_algorithm_one_element_at_a_time(
    problem: tuple[list[int], list[list[int]]], select_topk: float, select_deltas: bool, normalize: bool
) -> None:
    pivot, deltas = problem
    how = {"select_topk": select_topk, "select_deltas": select_deltas, "normalize": normalize}
    exact, eta = naive_sce(
        [Fraction(value) for value in pivot], [[Fraction(value) for value in delta] for delta in deltas], **how
    )
    found = merged(array(*pivot), *deltas, **how)
    assert found.tensor.dtype == np.float32
    assert found.tensor == pytest.approx(np.array(exact, dtype=np.float64), abs=1e-5)
    assert found.coefficients == pytest.approx([float(value) for value in eta])
    assert sum(found.coefficients) == pytest.approx(1.0)


def test_by_hand_with_every_step() -> None:
    """Variances 1, 4, 0, 1, 0.25: of four that are not zero, int(0.5 · 4) = 2 stay: the 4, and of the two 1 the first.

    Selected δ: (3, -2) and (1, 2). η = 13/18 and 5/18. At 0 both are positive: (13·3 + 5·1) / 18 / 1 = 22/9. At 1 the sum
    is zero, which counts as positive: -2 is erased, 2 stays alone.
    """
    pivot = array(10, 10, 10, 10, 10)
    found = merged(pivot, [3, -2, 1, 1, 0.5], [1, 2, 1, -1, -0.5], select_topk=0.5)
    assert found.coefficients == pytest.approx([13 / 18, 5 / 18])
    assert found.tensor == pytest.approx([10 + 22 / 9, 12, 10, 10, 10], rel=1e-6)
    assert found.selected == pytest.approx(2 / 5)
    assert found.erased == pytest.approx(1 / 4)


def test_without_normalisation_equation_9_as_printed() -> None:
    found = merged(array(10, 10, 10, 10, 10), [3, -2, 1, 1, 0.5], [1, 2, 1, -1, -0.5], select_topk=0.5, normalize=False)
    assert found.tensor == pytest.approx([10 + 22 / 9, 10 + 10 / 18, 10, 10, 10], rel=1e-6)


def test_select_for_the_coefficients_only_merges_all_updates() -> None:
    """η as above; at 2 both agree, at 3 the sum is zero and the 1 stays, at 4 the 0.5."""
    found = merged(
        array(10, 10, 10, 10, 10), [3, -2, 1, 1, 0.5], [1, 2, 1, -1, -0.5], select_topk=0.5, select_deltas=False
    )
    assert found.coefficients == pytest.approx([13 / 18, 5 / 18])
    assert found.tensor == pytest.approx([10 + 22 / 9, 12, 11, 11, 10.5], rel=1e-6)


def test_ties_in_variance_go_to_the_lower_index() -> None:
    found = merged(array(0, 0, 0, 0), [2, -2, 2, 2], [0, 0, 0, 0], select_topk=0.5)
    assert found.tensor.tolist() == [2, -2, 0, 0]


def test_two_dimensions_are_counted_in_flat_order() -> None:
    pivot = np.zeros((2, 2), dtype=np.float32)
    found = sce(pivot, [pivot + np.float32([[0, 1], [1, 1]]), pivot], select_topk=0.67)
    assert found.tensor.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("how", [{"select_topk": 1.0}, {"select_topk": 1.5}])
def test_nothing_is_zeroed_where_everything_is_selected(how: dict[str, float]) -> None:
    """The second position has no variance, and stays all the same."""
    found = merged(array(0, 0), [1, 3], [3, 3], **how)
    assert found.coefficients == pytest.approx([10 / 28, 18 / 28])
    assert found.tensor == pytest.approx([(10 * 1 + 18 * 3) / 28, 3])
    assert found.selected == 1.0


@pytest.mark.parametrize("select_topk", [0.01, 0.1, 1.0])
def test_one_target_is_taken_whole(select_topk: float) -> None:
    found = merged(array(1, 2, 3), [0.5, 0, -4], select_topk=select_topk)
    assert found.tensor == pytest.approx([1.5, 2, -1])
    assert found.coefficients == [1.0]
    assert found.erased == 0.0


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_a_tensor_that_did_not_change_stays_and_the_coefficients_are_equal(targets: int) -> None:
    pivot = array(0.1, -0.2, 0.3)
    found = sce(pivot, [pivot.copy() for _ in range(targets)], select_topk=0.1)
    assert found.tensor.tolist() == pivot.tolist()
    assert found.coefficients == pytest.approx([1 / targets] * targets)


@pytest.mark.parametrize("scale", [1e-3, 1e-8, 1e-15])
def test_coefficients_of_a_light_fine_tuning_are_not_equal(scale: float) -> None:
    """No absolute threshold: updates of any size have the same coefficients."""
    found = merged(array(0, 0), [2 * scale, 0], [0, scale], select_topk=1.0)
    assert found.coefficients == pytest.approx([0.8, 0.2])
    assert found.tensor == pytest.approx([2 * scale, scale], rel=1e-6, abs=0)


@pytest.mark.parametrize("targets", [2, 3, 5, 6, 7])
def test_targets_that_agree_everywhere_have_no_variance_to_select_by(targets: int) -> None:
    generator = np.random.default_rng(0)
    pivot, delta = generator.normal(size=(2, 64)).astype(np.float32)
    found = sce(pivot, [pivot + delta for _ in range(targets)], select_topk=0.5)
    assert found.tensor.tolist() == pivot.tolist()
    assert found.selected == 0.0


def test_an_empty_tensor() -> None:
    for select_topk in (0.1, 1.0):
        assert merged(array(), [], [], select_topk=select_topk).tensor.shape == (0,)


def test_the_inputs_are_left_as_they_were() -> None:
    pivot, targets = array(1, 2), [array(2, 2), array(0, 5)]
    sce(pivot, targets, select_topk=0.5)
    linear(pivot, targets)
    assert pivot.tolist() == [1, 2]
    assert [target.tolist() for target in targets] == [[2, 2], [0, 5]]


def test_linear_is_the_mean_of_the_targets() -> None:
    found = linear(array(100, 100), [array(1, 2), array(2, 4), array(6, 0)])
    assert found.tensor == pytest.approx([3, 2])
    assert found.coefficients == pytest.approx([1 / 3] * 3)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_linear_against_exact_means(problem: tuple[list[int], list[list[int]]]) -> None:
    pivot, rows = problem
    found = linear(array(*pivot), [array(*row) for row in rows])
    exact = [float(Fraction(sum(column), len(rows))) for column in zip(*rows, strict=True)]
    assert found.tensor == pytest.approx(np.array(exact), rel=1e-6)
