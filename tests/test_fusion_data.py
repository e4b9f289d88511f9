"""What the trainer reads: whose distributions each conversation of a target's sets has, how often who teaches, batches."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import each
from fusechat.data.distributions import SparseDistribution
from fusechat.data.prepared import Prepared
from fusechat.fuse.dataset import PAD_INDEX, FusionData, Teacher, TeachingSet, collate_fusion
from fusechat.fuse.teacher_selection import Candidate, SelectionRule
from fusing import (
    FUNCTIONS,
    LEVELS,
    UNITS,
    naive_cross_entropies,
    naive_groups,
    naive_mix,
    naive_shares,
    nll,
    prepared,
    prepared_set,
    rows_of,
    sparse,
    store,
)

PIVOT, NONE, TIES, SINGLE_CANDIDATE = "pivot", "none", "ties", "without comparison"


@dataclass
class Model:
    """What a model has of a set, by conversation: its rows, the nll of its own tokens, and targets for the pivot's rows. It lacks
    the nll (its values were not finite), or the conversation (it cannot render it)."""

    rows: dict[str, Prepared] = field(default_factory=dict)
    nll: dict[str, np.ndarray] = field(default_factory=dict)
    targets: dict[str, SparseDistribution] = field(default_factory=dict)


@dataclass
class Talks:
    """A set of conversations as the pivot and the sources that teach on it see them."""

    name: str
    pivot: Model
    teachers: dict[str, Model]

    def candidates(self, identity: str, *, with_pivot: bool) -> dict[str, Candidate]:
        several = {PIVOT: self.pivot, **self.teachers} if with_pivot else self.teachers
        return {
            name: Candidate(one.rows[identity], one.nll[identity], one.targets[identity])
            for name, one in several.items()
            if identity in one.rows and identity in one.nll
        }

    def written(self, directory: Path, *, with_pivot: bool) -> TeachingSet:
        """Its stores; a source's hold the conversations in another order than the pivot's."""

        def captured(model: Model) -> dict[str, SparseDistribution]:
            return {
                name: SparseDistribution(np.zeros((len(values), 3), np.int32), np.zeros((len(values), 3)), values)
                for name, values in model.nll.items()
            }

        teachers = {}
        for name, one in self.teachers.items():
            at = directory / self.name / name
            teachers[name] = Teacher(
                prepared_set(at / "prepared", list(one.rows.values())[::-1]),
                store(at / "captured", dict(reversed(captured(one).items()))),
                store(at / "aligned", dict(reversed(one.targets.items()))),
            )
        at = directory / self.name / PIVOT
        own = {
            name: SparseDistribution(self.pivot.targets[name].ids, self.pivot.targets[name].logprobs, values)
            for name, values in self.pivot.nll.items()
        }
        captures = store(at / "captured", own) if with_pivot else None
        return TeachingSet(self.name, prepared_set(at / "prepared", list(self.pivot.rows.values())), captures, teachers)


def random_targets(rng: np.random.Generator, pivot: Prepared, k: int, empty: float) -> SparseDistribution:
    """Rows of up to k tokens, the gold one often among them, with the accuracy of a store; a share of the rows is empty."""
    rows = []
    for gold in pivot.gold.tolist():
        tokens = {int(token) for token in rng.integers(0, 40, rng.integers(1, k + 1))}
        if rng.random() < 0.7:
            tokens = {*list(tokens)[: k - 1], gold}
        shares = rng.dirichlet(np.ones(len(tokens) + 1))[:-1] + 1e-3
        rows.append({} if rng.random() < empty else dict(zip(tokens, shares.tolist(), strict=True)))
    return sparse(rows, k, np.float16)


def random_talks(seed: int, name: str, identities: list[str], sources: list[str]) -> Talks:
    """Every model cuts responses into tokens of its own and may lose later ones; each lacks a conversation now and then, the last
    is nobody's. The first conversation is a tie of all."""
    rng = np.random.default_rng(seed)
    pivot, teachers = Model(), {source: Model() for source in sources}
    for number, identity in enumerate(identities):
        sizes = rng.integers(2, 12, rng.integers(1, 4)).tolist()
        for model in (pivot, *teachers.values()):
            kept = sizes[: rng.integers(1, len(sizes) + 1)] if number else sizes
            responses = [(int(rng.integers(1, min(size, 5) + 1)) if number else 2, size) for size in kept]
            rows = prepared(identity, responses, first=int(rng.integers(0, 20)) if number else 3)
            lacks = rng.random() if 0 < number < len(identities) - 1 else float(number > 0)
            if lacks < 0.9 or model is pivot:
                model.rows[identity] = rows
            if lacks < 0.8:
                values = rng.uniform(0, 4, len(rows)).astype(np.float32)
                model.nll[identity] = values if number else np.ones(len(rows), np.float32)
            at = pivot.rows[identity]
            same = sparse([{int(gold): 0.5} for gold in at.gold], 3, np.float16)
            model.targets[identity] = random_targets(rng, at, 3, 0.0 if model is pivot else 0.2) if number else same
    return Talks(name, pivot, teachers)


FIRST = [f"a{number}" for number in range(9)]
SECOND = ["a2", *(f"b{number}" for number in range(7)), "a4"]  # two are in the first set as well
SETS = [random_talks(1, "data", FIRST, ["one", "two"]), random_talks(2, "own", SECOND, ["three"])]
RULES = [SelectionRule(function, unit, level) for function in FUNCTIONS for unit in UNITS for level in LEVELS]


def fusion_data(directory: Path, rule: SelectionRule, talks: list[Talks] = SETS) -> FusionData:
    return FusionData([one.written(directory, with_pivot=rule.compares_with_pivot) for one in talks], rule)


def expected_places() -> list[tuple[int, str]]:
    return [(0, name) for name in FIRST] + [(1, name) for name in SECOND if name not in FIRST]


# -- against plain loops ------------------------------------------------------------------------------------------------


def naive_counts(rule: SelectionRule) -> dict[str, dict[str, float]]:
    counts: dict[str, dict[str, float]] = {}
    for one in SETS:
        names = ([PIVOT] if rule.compares_with_pivot else []) + list(one.teachers)
        counts[one.name] = dict.fromkeys([*names, NONE, TIES, SINGLE_CANDIDATE], 0.0)
    for place, identity in expected_places():
        count, rows = counts[SETS[place].name], SETS[place].pivot.rows[identity]
        several = SETS[place].candidates(identity, with_pivot=rule.compares_with_pivot)
        number = len(set(naive_groups(rows, rule.level)))
        if not several:
            count[NONE] += number
            continue
        found = naive_cross_entropies(list(several.values()), rows, rule)
        share = naive_shares(list(several.values()), rows, rule)
        for group in range(number):
            values = [of_one[group] for of_one in found]
            known = [value for value in values if value < np.inf]
            count[NONE] += not known
            count[TIES] += known.count(min(known)) > 1 if known else 0
            count[SINGLE_CANDIDATE] += len(known) == 1
            for name, weights in zip(several, share, strict=True):
                count[name] += weights[group]
    return counts


@each("rule", RULES)
def test_who_teaches_how_much_and_the_targets_of_every_row(tmp_path: Path, rule: SelectionRule) -> None:
    data, counts = fusion_data(tmp_path, rule), naive_counts(rule)
    assert data.chosen.keys() == counts.keys()
    for name in counts:
        assert data.chosen[name] == pytest.approx(counts[name], abs=1e-3), name
        assert data.chosen[name].keys() == counts[name].keys()
    assert sum(count[NONE] for count in data.chosen.values()) > 0
    assert rule.function == "source" or data.chosen["data"][TIES] > 0
    assert len(data) == len(expected_places())
    for index, (place, identity) in enumerate(expected_places()):
        item, rows = data[index], SETS[place].pivot.rows[identity]
        assert (item["conversation"].id, item["set"], item["comparison"]) == (identity, place, None)
        assert item["input_ids"].tolist() == rows.input_ids.tolist()
        several = SETS[place].candidates(identity, with_pivot=rule.compares_with_pivot)
        targets = [rows_of(one.targets) for one in several.values()]
        share = naive_shares(list(several.values()), rows, rule) if several else []
        found = rows_of(item["targets"])
        assert len(found) == len(rows)
        for row, group in enumerate(naive_groups(rows, rule.level)):
            expected = naive_mix([each[row] for each in targets], [weights[group] for weights in share])
            assert found[row] == pytest.approx(expected, rel=1e-4), (identity, row)


@each("unit, level", itertools.product(UNITS, LEVELS))
def test_against_the_student_the_best_source_is_the_bar(tmp_path: Path, unit: str, level: str) -> None:
    rule = SelectionRule(unit=unit, level=level, against="student")
    data = fusion_data(tmp_path, rule)
    assert data.candidates == [PIVOT, "one", "two", "three"]
    for index, (place, identity) in enumerate(expected_places()):
        comparison, rows = data[index]["comparison"], SETS[place].pivot.rows[identity]
        several = SETS[place].candidates(identity, with_pivot=False)
        if not several:
            assert comparison.groups.tolist() == naive_groups(rows, level)
            assert comparison.best_source_ce.tolist() == [np.inf] * len(set(comparison.groups.tolist()))
            continue
        found = naive_cross_entropies(list(several.values()), rows, rule)
        bars = [min(values) for values in zip(*found, strict=True)]
        assert comparison.best_source_ce.tolist() == pytest.approx(bars, rel=1e-5), identity
        names = [list(several)[values.index(min(values))] for values in zip(*found, strict=True)]
        assert [data.candidates[which] for which in comparison.chosen] == names
        assert comparison.groups.tolist() == naive_groups(rows, level)


# -- by hand ------------------------------------------------------------------------------------------------------------


def by_hand() -> Talks:
    """The source has 2 nats over the 4 bytes of each conversation; `pivots` it lacks, of `sources` the pivot has no captures."""
    pivot, source = Model(), Model()
    for number, (name, value) in enumerate(
        {"won": 2.0, "lost": 0.5, "tied": 1.0, "pivots": 1.0, "sources": None, "nobodys": None}.items()
    ):
        pivot.rows[name] = prepared(name, [(2, 4)], first=10 * number)
        pivot.targets[name] = sparse([{50: 0.75, 51: 0.25}] * 3, 2, np.float16)
        if value is not None:
            pivot.nll[name] = nll(value, value, 99)
        if name not in ("pivots", "nobodys"):
            source.rows[name], source.nll[name] = prepared(name, [(2, 4)], first=1000), nll(1, 1, 0)
        source.targets[name] = sparse([{70 + number: 0.5, 80: 0.25, 81: 0.125}] * 3, 3, np.float16)
    return Talks("data", pivot, {"source": source})


def test_a_conversation_that_one_model_lacks_is_the_others(tmp_path: Path) -> None:
    data = fusion_data(tmp_path, SelectionRule(), [by_hand()])
    assert data.chosen == {"data": {PIVOT: 3, "source": 2, NONE: 1, TIES: 1, SINGLE_CANDIDATE: 2}}
    first = {item["conversation"].id: item["targets"].ids[:, 0].tolist() for item in map(data.__getitem__, range(6))}
    expected = {"won": 70, "lost": 50, "tied": 50, "pivots": 50, "sources": 74, "nobodys": -1}
    assert first == {name: [token] * 3 for name, token in expected.items()}


def test_avgce_weighs_by_nats_a_token_whatever_they_are_compared_by(tmp_path: Path) -> None:
    """Ten tokens of 40 bytes, 0.5 nats a byte against 0.3: 2 nats a token against 1.2, so the weights are 1 / (1 + e^0.8) = 0.31
    and 0.69 (of 0.5 and 0.3 they would be 0.45 and 0.55)."""
    pivot, source = Model(), Model()
    pivot.rows["a"] = prepared("a", [(10, 40)])
    pivot.nll["a"], pivot.targets["a"] = nll(*[2.0] * 10, 9), sparse([{50: 1.0}] * 11, 2, np.float16)
    source.rows["a"] = prepared("a", [(4, 40)], first=1000)  # cut by another tokenizer: 3 nats a token of its own
    source.nll["a"], source.targets["a"] = nll(*[3.0] * 4, 9), sparse([{70: 1.0}] * 11, 2, np.float16)
    own = {}
    for unit, level in itertools.product(UNITS, LEVELS):
        data = fusion_data(
            tmp_path / unit / level, SelectionRule("avgce", unit, level), [Talks("data", pivot, {"source": source})]
        )
        own[unit, level] = rows_of(data[0]["targets"])[0][50]
    expected = {"byte": 1 / (1 + math.exp(0.8)), "token": 1 / (1 + math.exp(-1.0))}
    for (unit, level), found in own.items():
        assert found == pytest.approx(0.5 if level == "position" else expected[unit], rel=1e-3), (unit, level)


def test_without_teachers_there_are_no_targets(tmp_path: Path) -> None:
    """Plain fine-tuning: a conversation in two sets is learnt once."""
    pivot = by_hand().pivot
    one = TeachingSet("data", prepared_set(tmp_path / "a", [*pivot.rows.values()][:4]))
    other = TeachingSet("own", prepared_set(tmp_path / "b", [*pivot.rows.values()][3:]), None, {})
    data = FusionData([one, other], SelectionRule(level="response"))
    assert [data[index]["conversation"].id for index in range(len(data))] == list(pivot.rows)
    assert data.chosen == {
        "data": {NONE: 4, TIES: 0, SINGLE_CANDIDATE: 0},
        "own": {NONE: 2, TIES: 0, SINGLE_CANDIDATE: 0},
    }
    batch = collate_fusion([data[0], data[5]], pad=0)
    assert batch["target_ids"].tolist() == [[-1]] * 6
    assert batch["target_logprobs"].exp().tolist() == [[0.0]] * 6
    assert "comparison" not in batch


def test_a_batch_pads_tokens_and_targets_and_labels_each_row_with_its_own_token(tmp_path: Path) -> None:
    data = fusion_data(tmp_path, SelectionRule(), [by_hand()])
    names = list(by_hand().pivot.rows)
    short = prepared("short", [(1, 1)], first=200)
    items = [data[names.index(name)] for name in ("lost", "nobodys", "won")]
    items.append({**items[1], "conversation": short, "targets": sparse([{3: 1.0}] * 2), "input_ids": short.input_ids})
    batch = collate_fusion([*items, data[PAD_INDEX]], pad=99)
    assert batch["input_ids"].tolist()[:3] == [[10, 11, 12, 13, 14], [50, 51, 52, 53, 54], [0, 1, 2, 3, 4]]
    assert batch["input_ids"][3].tolist() == [200, 201, 202, 203, 99]
    assert batch["attention_mask"][:4].tolist() == [[1] * 5] * 3 + [[1] * 4 + [0]]
    assert batch["labels"].tolist() == [12, 13, 14, 52, 53, 54, 2, 3, 4, 202, 203]
    rows = [*([50, 51, -1],) * 3, *([-1, -1, -1],) * 3, *([70, 80, 81],) * 3, *([3, -1, -1],) * 2]
    assert batch["target_ids"].tolist() == rows
    probabilities = batch["target_logprobs"].exp().numpy()
    assert probabilities[0] == pytest.approx([0.75, 0.25, 0.0], abs=1e-3)
    assert probabilities[3].tolist() == [0.0] * 3
    assert probabilities[6] == pytest.approx([0.5, 0.25, 0.125], abs=1e-3)
    assert batch["conversation_ids"] == ["lost", "nobodys", "won", "short"]
    assert (batch["labels"].dtype, batch["target_ids"].dtype) == (torch.int64, torch.int64)
    assert batch["target_logprobs"].dtype == torch.float32


def test_an_item_that_only_fills_up_has_no_rows(tmp_path: Path) -> None:
    rule = SelectionRule(against="student")
    data = fusion_data(tmp_path, rule, [by_hand()])
    batch = collate_fusion([data[PAD_INDEX], data[0], data[PAD_INDEX]], pad=0)
    assert batch["labels"].tolist() == [2, 3, 4]
    assert batch["rows"].tolist() == [[1, 2], [1, 3], [1, 4]]
    assert batch["conversation_ids"] == ["won"]
    assert batch["comparison"]["groups"].tolist() == [0, 0, 0]
    assert batch["comparison"]["best_source_ce"].tolist() == [0.5], (
        "what fills up is nobody's to teach, and is not counted"
    )
    alone = collate_fusion([data[PAD_INDEX]], pad=0)
    assert (alone["labels"].tolist(), alone["target_ids"].shape[0]) == ([], 0)
