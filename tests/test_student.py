"""Sources compared with the student as it is: what a batch carries for it, and where a source is still better."""

import math
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cases import each
from fusechat.data.prepared import Prepared
from fusechat.fuse.dataset import EMPTY
from fusechat.fuse.student import Comparison, join_comparisons, source_is_better
from fusechat.fuse.teacher_selection import Candidate, SelectionRule, cross_entropies
from fusing import (
    LEVELS,
    UNITS,
    conversation_of_several,
    naive_cross_entropies,
    naive_cross_entropy,
    naive_groups,
    nll,
    prepared,
    sparse,
)

INF = math.inf
RULES = [SelectionRule(unit=unit, level=level, against="student") for unit in UNITS for level in LEVELS]
PIVOT = prepared("a", [(2, 8), (1, 4)])


def comparison(
    pivot: Prepared, sources: list[Candidate], rule: SelectionRule, numbers: list[int] | None = None
) -> Comparison:
    """As the trainer's data make it; `numbers`: which candidates the sources are."""
    found = cross_entropies(sources, pivot, unit=rule.unit, level=rule.level)
    chosen = np.array(numbers or range(1, len(sources) + 1))[found.argmin(0)]
    return Comparison.of(pivot, [one.rows for one in sources], rule, best_source_ce=found.min(0), chosen=chosen)


def joined(*parts: tuple[Comparison, int]) -> dict[str, torch.Tensor]:
    """A batch of (comparison, set)."""
    return join_comparisons([one for one, _ in parts], [at for _, at in parts])


def better(pivot: Prepared, source: Candidate, student: list[float], rule: SelectionRule) -> list[bool]:
    batch = joined((comparison(pivot, [source], rule), 0))
    return source_is_better(torch.tensor(student), batch, level=rule.level).tolist()


# -- by hand ------------------------------------------------------------------------------------------------------------


def source(*values: float, responses: list[tuple[int, int]] | None = None) -> Candidate:
    rows = prepared("a", responses or [(1, 8), (3, 4)], first=100)
    return Candidate(rows, nll(*values), sparse([{}] * 5))


def test_of_a_conversation_the_ends_of_turn_count_for_neither() -> None:
    """The source has 6 nats over 12 bytes and 4 tokens, the student's content 3 tokens."""
    one = source(3, 99, 1, 1, 1, 99)
    byte, token = SelectionRule(against="student"), SelectionRule(unit="token", against="student")
    assert better(PIVOT, one, [2, 2, 99, 2.1, 99], byte) == [True]
    assert better(PIVOT, one, [2, 2, 0, 1.9, 0], byte) == [False]
    assert better(PIVOT, one, [2, 2, 0, 0.6, 0], token) == [True]  # 4.6 / 3 against 6 / 4
    assert better(PIVOT, one, [2, 2, 99, 0.4, 99], token) == [False]


def test_a_tie_is_the_students() -> None:
    assert better(PIVOT, source(3, 0, 1, 1, 1, 0), [2, 2, 0, 2, 0], SelectionRule(against="student")) == [False]


def test_each_response_by_itself() -> None:
    one = source(3, 0, 1, 1, 1, 0)  # 3/8 and 3/4 nats per byte, 3 and 1 per token
    assert better(PIVOT, one, [2, 2, 0, 2.9, 99], SelectionRule(level="response", against="student")) == [True, False]
    by_token = SelectionRule(level="response", unit="token", against="student")
    assert better(PIVOT, one, [2, 2, 99, 1.1, 0], by_token) == [False, True]


def test_of_a_response_that_the_source_lost_it_is_not_better() -> None:
    one = source(0, 0, responses=[(1, 8)])
    assert better(PIVOT, one, [5, 5, 5, 5, 5], SelectionRule(level="response", against="student")) == [True, False]


def test_responses_that_either_lost_are_not_compared() -> None:
    one = source(7, 0, responses=[(1, 8)])
    assert better(PIVOT, one, [4, 4, 0, 0, 0], SelectionRule(against="student")) == [True]
    assert better(PIVOT, one, [3, 3, 99, 99, 99], SelectionRule(against="student")) == [False]


def test_the_sources_nats_on_a_response_that_the_pivot_lost_do_not_count() -> None:
    """Over the first response alone the source needs 1/8 nats per byte, the student 4/8; the second one would make it 41/12."""
    one = Candidate(prepared("a", [(1, 8), (3, 4)]), nll(1, 0, 20, 10, 10, 0), sparse([{}] * 3))
    assert better(prepared("a", [(2, 8)]), one, [2, 2, 0], SelectionRule(against="student")) == [True]


def test_of_positions_no_probability_counts_as_less_than_the_floor() -> None:
    """Gold is 7, 8, 9, 12, 13; where both give it next to nothing neither is better."""
    rows = [{7: 0.5}, {8: 1e-6}, {}, {12: 0.5}, {13: 1.0}]
    one = Candidate(prepared("a", [(1, 8)]), nll(0, 0), sparse(rows))
    floor = -math.log(1e-4)
    found = better(PIVOT, one, [0.7, 20.0, 20.0, 0.6, 1e-3], SelectionRule(level="position", against="student"))
    assert found == [True, False, False, False, True]
    unlikely = better(
        PIVOT, one, [20.0, floor - 0.01, 20.0, 20.0, 20.0], SelectionRule(level="position", against="student")
    )
    assert unlikely == [True, False, False, True, True]


def test_the_best_of_several_sources_is_named() -> None:
    good, bad = source(1, 0, 9, 9, 9, 0), source(4, 0, 1, 1, 1, 0)
    found = comparison(PIVOT, [good, bad], SelectionRule(level="response", against="student"), [4, 2])
    assert found.chosen.tolist() == [4, 2]
    assert found.best_source_ce.tolist() == [1 / 8, 3 / 4]
    assert found.size.tolist() == [8, 4]
    assert found.counted.tolist() == [True, True, False, True, False]


def test_the_students_nll_takes_no_gradient_from_the_comparison() -> None:
    values = torch.ones(5, dtype=torch.bfloat16, requires_grad=True)
    batch = joined((comparison(PIVOT, [source(1, 0, 1, 1, 1, 0)], RULES[0]), 0))
    found = source_is_better(values, batch, level="conversation")
    assert (found.dtype, found.requires_grad) == (torch.bool, False)


# -- batches ------------------------------------------------------------------------------------------------------------


def test_groups_are_numbered_through_a_batch_and_items_without_a_source_are_never_better() -> None:
    rule = SelectionRule(level="response", against="student")
    one = comparison(PIVOT, [source(1, 0, 1, 1, 1, 0)], rule)
    short = prepared("b", [(1, 2)])
    other = comparison(short, [Candidate(short, nll(0.5, 0), sparse([{}] * 2))], rule, [3])
    alone = Comparison.without_sources(prepared("c", [(1, 2), (1, 3)]), rule)
    fills = Comparison.without_sources(EMPTY, rule)
    batch = joined((one, 0), (alone, 1), (fills, 0), (other, 1))
    assert batch["groups"].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert batch["set"].tolist() == [0, 0, 1, 1, 1]
    assert batch["best_source_ce"].tolist() == [1 / 8, 3 / 4, INF, INF, 0.25]
    assert batch["size"].tolist() == [8, 4, 2, 3, 2]
    assert batch["chosen"].tolist() == [1, 1, 0, 0, 3]
    assert batch["counted"].tolist() == [True, True, False, True, False, True, False, True, False, True, False]
    found = source_is_better(torch.full((11,), 9.0), batch, level="response")
    assert found.tolist() == [True, True, False, False, True]
    assert source_is_better(torch.zeros(11), batch, level="response").tolist() == [False] * 5


@st.composite
def batches(draw: Callable) -> tuple[SelectionRule, list[tuple[list[Candidate], list[float]]]]:
    """Items of some sources on a conversation (the first candidate is how the pivot sees it; alone it has no comparison), and the
    student's nll."""
    rule = draw(st.sampled_from(RULES))
    items = []
    for _ in range(draw(st.integers(1, 3))):
        several = draw(conversation_of_several(draw(st.integers(1, 3))))
        n = len(several[0].rows)
        items.append((several, draw(st.lists(st.floats(0.0, 12.0, width=32), min_size=n, max_size=n))))
    return rule, items


def naive_better(several: list[Candidate], student: list[float], rule: SelectionRule) -> list[bool | None]:
    """Of each group whether the best source is better; None where it is too close for single precision."""
    pivot, sources = several[0].rows, several[1:]
    bars = naive_cross_entropies(sources, pivot, rule)
    found: list[bool | None] = []
    for group in range(max(naive_groups(pivot, rule.level)) + 1):
        best = min(of_source[group] for of_source in bars)
        if rule.level == "position":
            own = min(student[group], -math.log(1e-4))
        else:
            common = min(len(one.rows.content_bytes) for one in several)
            responses = range(common) if rule.level == "conversation" else [group]
            own = naive_cross_entropy(pivot, student, responses, rule.unit)
        found.append(None if abs(best - own) < 1e-4 else best < own)
    return found


@given(batches())
def test_as_plain_loops_find_it_in_any_batch(
    given_: tuple[SelectionRule, list[tuple[list[Candidate], list[float]]]],
) -> None:
    rule, items = given_
    parts: list[tuple[Comparison, int]] = []
    expected: list[bool | None] = []
    for several, student in items:
        pivot, sources = several[0].rows, several[1:]
        one = comparison(pivot, sources, rule) if sources else Comparison.without_sources(pivot, rule)
        parts.append((one, 0))
        expected += naive_better(several, student, rule) if sources else [False] * len(set(one.groups.tolist()))
    batch = joined(*parts)
    values = torch.tensor([value for _, student in items for value in student], dtype=torch.float32)
    found = source_is_better(values, batch, level=rule.level).tolist()
    assert len(found) == len(expected)
    assert [one for one, sure in zip(found, expected, strict=True) if sure is not None] == [
        sure for sure in expected if sure is not None
    ]
    assert len(batch["groups"]) == len(batch["counted"]) == len(values)


@each("rule", RULES)
@given(several=conversation_of_several(2))
def test_what_the_student_gets_better_at_never_makes_the_source_better(
    rule: SelectionRule, several: list[Candidate]
) -> None:
    pivot, one = several[0].rows, several[1]
    assume(len(pivot) > 0)
    before, after = several[0].nll, several[0].nll * 0.5
    batch = joined((comparison(pivot, [one], rule), 0))
    found = [source_is_better(torch.from_numpy(values), batch, level=rule.level) for values in (before, after)]
    assert not (found[1] & ~found[0]).any()
