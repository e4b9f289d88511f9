"""Which model teaches a conversation: cross-entropy per byte, MinCE and its ties, and the trainer's batches."""

from pathlib import Path

import numpy as np
import pytest

from fusechat.core.distributions import (
    DistributionSet,
    SparseDistribution,
    open_distributions,
    write_distributions,
    write_store,
)
from fusechat.core.prepared import Prepared, PreparedSet, write_prepared
from fusechat.fuse.choice import Candidate, common_responses, cross_entropy_per_byte, min_ce
from fusechat.fuse.dataset import FusionData, collate_fusion


def prepared(identity: str, responses: list[tuple[int, int]], *, ends_turn: bool = True, first: int = 5) -> Prepared:
    """A conversation of (tokens, bytes) responses, each after a prompt of two tokens; its tokens are numbered from `first`."""
    position, response, closing, at = [], [], [], 0
    for number, (tokens, _) in enumerate(responses):
        at += 2
        rows = tokens + ends_turn
        position += range(at, at + rows)
        response += [number] * rows
        closing += [False] * tokens + [True] * ends_turn
        at += rows
    n = len(position)
    return Prepared(
        id=identity,
        input_ids=np.arange(first, first + at, dtype=np.int32),
        position=np.array(position, dtype=np.int32),
        response=np.array(response, dtype=np.int32),
        begin=np.zeros(n, dtype=np.int32),
        end=np.ones(n, dtype=np.int32),
        end_of_turn=np.array(closing, dtype=bool),
        content_bytes=np.array([size for _, size in responses], dtype=np.int32),
    )


def nll(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_cross_entropy_is_nats_over_bytes_without_the_end_of_turn() -> None:
    candidate = Candidate(prepared("a", [(2, 10), (1, 6)]), nll(1.5, 2.5, 100.0, 4.0, 100.0))
    assert cross_entropy_per_byte(candidate, np.array([0])) == pytest.approx((1.5 + 2.5) / 10)
    assert cross_entropy_per_byte(candidate, np.array([1])) == pytest.approx(4.0 / 6)
    assert cross_entropy_per_byte(candidate, np.array([0, 1])) == pytest.approx((1.5 + 2.5 + 4.0) / 16)


def test_per_byte_not_per_token_decides() -> None:
    """The source needs twice the tokens for the same bytes: per token it looks better, per byte it is worse."""
    pivot = Candidate(prepared("a", [(2, 8)]), nll(2.0, 2.0, 0.0))
    source = Candidate(prepared("a", [(4, 8)]), nll(1.5, 1.5, 1.5, 1.5, 0.0))
    per_byte = [cross_entropy_per_byte(one, np.array([0])) for one in (pivot, source)]
    assert per_byte == pytest.approx([4 / 8, 6 / 8])
    assert min_ce(per_byte) == (0, False)


def test_many_small_terms_are_not_summed_in_half_precision() -> None:
    candidate = Candidate(prepared("a", [(5000, 5000)]), nll(*[1.0] * 4999, 1.25, 0.0))
    assert cross_entropy_per_byte(candidate, np.array([0])) == pytest.approx(5000.25 / 5000, rel=1e-9)


def test_only_responses_that_every_candidate_has_are_compared() -> None:
    three, two = prepared("a", [(1, 1)] * 3), prepared("a", [(1, 1)] * 2)
    found = common_responses([Candidate(three, nll(*[0.0] * 6)), Candidate(two, nll(*[0.0] * 4))])
    assert found.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.4], (1, False)),
        ([0.4, 0.5], (0, False)),
        ([0.4, 0.4], (0, True)),
        ([0.6, 0.4, 0.4], (1, True)),
        ([0.4, 0.5, 0.5], (0, False)),
        ([0.3], (0, False)),
    ],
)
def test_the_lowest_wins_and_ties_go_to_the_first(values: list[float], expected: tuple[int, bool]) -> None:
    assert min_ce(values) == expected


# -- the data of a target -----------------------------------------------------------------------------------------------


def store(directory: Path, records: dict[str, SparseDistribution]) -> DistributionSet:
    directory.mkdir(parents=True)
    write_distributions(directory / "rows.arrow", records.items())
    write_store(directory, k=next(iter(records.values())).ids.shape[1], files="*.arrow")
    return open_distributions(directory)


def captured(n: int, token: int, value: float, k: int = 2) -> SparseDistribution:
    """n rows that give `token` and the next ones equal shares; each row has the nll `value`."""
    ids = np.tile(np.arange(token, token + k, dtype=np.int32), (n, 1))
    return SparseDistribution(ids, np.full((n, k), -np.log(k), dtype=np.float16), nll(*[value] * n))


@pytest.fixture
def data(tmp_path: Path) -> FusionData:
    """Conversations: `won` and `lost` by the source, `tied`, and those that only one model, or none, has distributions of."""
    names = {"won": 2.0, "lost": 0.5, "tied": 1.0, "pivots": None, "sources": 1.0, "nobodys": None}
    own = [prepared(name, [(2, 4)], first=10 * number) for number, name in enumerate(names)]
    # Per byte `others` say the same as per row here: two content rows, four bytes.
    others = [prepared(name, [(2, 4)], first=1000) for name, value in names.items() if value is not None]
    for name, rows in (("pivot", own), ("source", others)):
        (tmp_path / name).mkdir()
        write_prepared(tmp_path / name / "conversations.arrow", reversed(rows) if name == "source" else rows)
    of_pivot = {
        name: captured(3, 50, value or 1.0) for name, value in names.items() if name not in ("sources", "nobodys")
    }
    of_source = {name: captured(3, 60, 1.0) for name, value in names.items() if value is not None}
    aligned = {one.id: captured(3, 70 + number, 0.0, k=3) for number, one in enumerate(own)}
    return FusionData(
        PreparedSet(tmp_path / "pivot"),
        PreparedSet(tmp_path / "source"),
        pivot_captured=store(tmp_path / "a", of_pivot),
        source_captured=store(tmp_path / "b", dict(reversed(of_source.items()))),
        aligned=store(tmp_path / "c", dict(reversed(aligned.items()))),
    )


def test_the_teacher_of_each_conversation_and_the_counts(data: FusionData) -> None:
    """Conversations are joined by id: the source's files hold them in another order."""
    assert data.chosen == {
        "won": "source",  # 4 nats of the pivot against 2 of the source, over 4 bytes
        "lost": "pivot",
        "tied": "pivot",
        "pivots": "pivot",
        "sources": "source",
        "nobodys": "none",
    }
    assert data.counts == {
        "ties": 1,
        "without_comparison": 3,
        "taught_by_pivot": 3,
        "taught_by_source": 2,
        "taught_by_none": 1,
    }


def test_targets_are_the_teachers(data: FusionData) -> None:
    by_name = {data[index]["conversation"].id: data[index]["targets"].ids for index in range(len(data))}
    assert by_name["won"].tolist() == [[70, 71, 72]] * 3
    assert by_name["lost"].tolist() == [[50, 51]] * 3
    assert by_name["sources"].tolist() == [[74, 75, 76]] * 3
    assert by_name["nobodys"].tolist() == [[-1]] * 3


def test_a_batch_pads_tokens_and_targets_and_labels_each_row_with_its_own_token(data: FusionData) -> None:
    order = [data.pivot.row_of[name] for name in ("lost", "nobodys", "won")]
    batch = collate_fusion([data[index] for index in order], pad=99)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [50, 51, 52, 53, 54], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [12, 13, 14, 52, 53, 54, 2, 3, 4]
    assert batch["target_ids"].tolist() == [[50, 51, -1]] * 3 + [[-1, -1, -1]] * 3 + [[70, 71, 72]] * 3
    probabilities = batch["target_logprobs"].exp().numpy()
    assert probabilities[0] == pytest.approx([0.5, 0.5, 0.0], abs=1e-3)
    assert probabilities[3].tolist() == [0.0] * 3
    assert batch["conversation_ids"] == ["lost", "nobodys", "won"]
