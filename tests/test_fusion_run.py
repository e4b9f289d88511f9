"""The data of targets from what a real run wrote: two sources with other tokenizers, one on data of its own, responses lost by
truncation; who teaches, against plain loops over the artifacts."""

from pathlib import Path

import pytest

import runs
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.fuse.dataset import FusionData, Teacher, TeachingSet, collate_fusion
from fusechat.fuse.teacher_selection import Candidate, SelectionRule
from fusechat.pipeline import load_recipe
from fusing import FUNCTIONS, LEVELS, UNITS, naive_cross_entropies, naive_groups, naive_mix, naive_shares, rows_of

SOURCES = {"data": "mistral", "gemma": "gemma"}  # of each set
RULES = [
    SelectionRule(function, unit, level, against)
    for function in FUNCTIONS
    for unit in UNITS
    for level in LEVELS
    for against in ("pivot", "student")
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """A run up to the alignment, of models that lose responses at different places."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSECHAT_CACHE", str(directory / "cache"))
        changes = ["data.max_length=130", "targets.all=[mistral, gemma]", "evaluate.bits_per_byte=false"]
        changes.append("align.unaligned=skip")
        recipe = load_recipe(runs.write_recipe(directory, models), changes)
        assert run(recipe, directory / "work", until="align") == 10
        assert run(recipe, directory / "work", until="align") == 0
    return directory / "work"


def teaching_sets(workdir: Path, rule: SelectionRule) -> list[TeachingSet]:
    return [
        TeachingSet(
            name,
            PreparedSet(workdir / "prepare" / "pivot" / name),
            open_distributions(workdir / "capture" / "pivot" / name) if rule.compares_with_pivot else None,
            {
                source: Teacher(
                    PreparedSet(workdir / "prepare" / source / name),
                    open_distributions(workdir / "capture" / source / name),
                    open_distributions(workdir / "align" / source),
                )
            },
        )
        for name, source in SOURCES.items()
    ]


def candidates(data: TeachingSet, identity: str) -> dict[str, Candidate]:
    found = {}
    rows = next(one for one in data.pivot if one.id == identity)
    if data.captured is not None:
        found["pivot"] = Candidate(rows, data.captured[identity].nll, data.captured[identity])
    for name, teacher in (data.teachers or {}).items():
        [own] = [one for one in teacher.prepared if one.id == identity]
        found[name] = Candidate(own, teacher.captured[identity].nll, teacher.aligned[identity])
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_targets_and_counts_are_those_of_plain_loops(workdir: Path, rule: SelectionRule) -> None:
    sets = teaching_sets(workdir, rule)
    data = FusionData(sets, rule)
    assert len(data) == 18
    counts = {one.name: {"pivot": 0.0, "none": 0.0, SOURCES[one.name]: 0.0} for one in sets}
    for index in range(len(data)):
        item = data[index]
        rows, several = item["conversation"], candidates(sets[item["set"]], item["conversation"].id)
        found = naive_cross_entropies(list(several.values()), rows, rule)
        share = naive_shares(list(several.values()), rows, rule)
        targets = [rows_of(one.targets) for one in several.values()]
        for row, group in enumerate(naive_groups(rows, rule.level)):
            expected = naive_mix([each[row] for each in targets], [weights[group] for weights in share])
            assert rows_of(item["targets"])[row] == pytest.approx(expected, rel=1e-4)
        for group in range(len(found[0])):
            count = counts[sets[item["set"]].name]
            for name, weights in zip(several, share, strict=True):
                count[name] += weights[group]
            count["none"] += not any(weights[group] for weights in share)
        if rule.compares_with_student:
            assert item["comparison"].best_source_ce.tolist() == pytest.approx(
                [min(one) for one in zip(*found, strict=True)]
            )
    for name, count in counts.items():
        chosen = data.chosen[name]
        assert {key: chosen.get(key, 0.0) for key in count} == pytest.approx(count, abs=1e-3)


def test_models_lose_different_responses(workdir: Path) -> None:
    """Without which the test above says less."""
    lost = set()
    for one in teaching_sets(workdir, SelectionRule()):
        for rows in one.pivot:
            several = candidates(one, rows.id)
            lost |= {(name, len(each.rows.content_bytes) - len(rows.content_bytes)) for name, each in several.items()}
    assert {number for _, number in lost} >= {-1, 0, 1}, lost


def test_a_batch_over_both_sets(workdir: Path) -> None:
    data = FusionData(
        teaching_sets(workdir, SelectionRule(level="response", against="student")),
        SelectionRule(level="response", against="student"),
    )
    items = [data[0], data[12], data[3]]
    batch = collate_fusion(items, pad=0)
    n = sum(len(item["conversation"]) for item in items)
    gold = [token for item in items for token in item["conversation"].gold.tolist()]
    assert batch["labels"].tolist() == gold
    assert batch["target_ids"].shape == batch["target_logprobs"].shape == (n, 6)
    responses = [len(item["conversation"].content_bytes) for item in items]
    assert batch["comparison"]["groups"].max() + 1 == sum(responses)
    assert batch["comparison"]["set"].tolist() == [0] * responses[0] + [1] * responses[1] + [0] * responses[2]
