"""`fusechat eval alignment`: strategies side by side on held-out conversations, with maps counted on the training set alone."""

import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from fusechat.align.aligner import Pair, Strategy
from fusechat.align.counts import Seen
from fusechat.commands.compare_alignments import STRATEGIES, evaluate_alignment
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import Prepared, PreparedSet
from fusechat.pipeline import load_recipe
from test_bad_align import rewrite
from test_bad_input import PREFIX

KEYS = {field.name for field in fields(Strategy)}
SHARES = ("coverage_of_positions", "coverage_of_mass", "coverage_of_bytes", "rarely_cut", "little_mass")
BITS = ("own", "common", "transferred", "own_there", "own_kept_there")
OTHERS = ("ratio", "ratio_to_kept", "nats_where_rarely_cut")


def strategy_of(record: dict[str, Any]) -> Strategy:
    return Strategy(**{key: record[key] for key in KEYS})


@pytest.fixture(scope="module")
def evaluated(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `recipe.yaml`, the figures `figures.json`, what was printed, and the work directory `work`."""
    directory = tmp_path_factory.mktemp("evaluated")
    recipe = runs.write_recipe(directory, models)
    where = ("--workdir", directory / "work", "--top-k", "3", "--top-k", "8", "--out", directory / "figures.json")
    done = runs.here("eval", "alignment", recipe, *where, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    (directory / "stdout").write_text(done.stdout, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def figures(evaluated: Path) -> list[dict[str, Any]]:
    return list(json.loads((evaluated / "figures.json").read_text()))


def test_every_strategy_is_measured_for_every_source_and_k(figures: list[dict[str, Any]]) -> None:
    found = [(each["source"], each["k"], strategy_of(each)) for each in figures]
    expected = [(source, k, strategy) for source in runs.SOURCES for k in (3, 8) for strategy in STRATEGIES]
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    for each in figures:
        assert each.keys() == {"source", "k", *KEYS, *SHARES, *BITS, *OTHERS}


def test_values_are_what_they_can_be(figures: list[dict[str, Any]]) -> None:
    for each in figures:
        assert all(0 <= each[key] <= 1 for key in SHARES), each
        assert all(each[key] > 0 for key in BITS), each
        assert each["ratio"] == pytest.approx(each["transferred"] / each["own_there"], rel=1e-4)
        assert each["ratio_to_kept"] == pytest.approx(each["transferred"] / each["own_kept_there"], rel=1e-4)
    for source in runs.SOURCES:
        several = [each for each in figures if each["source"] == source]
        assert len({each["own"] for each in several}) == 1, "the source's own is of no strategy and no k"
        for k in (3, 8):
            few = {strategy_of(each): each for each in several if each["k"] == k}
            plain = few[Strategy("boundary", "statistics")]
            conditioned = few[Strategy("boundary", "statistics", unaligned="condition")]
            assert conditioned["coverage_of_positions"] >= plain["coverage_of_positions"]
            assert conditioned["coverage_of_bytes"] >= plain["coverage_of_bytes"]
            ahead = few[Strategy("boundary", "statistics", unaligned="condition", look_ahead=True)]
            chained = few[STRATEGIES[-1]]
            assert chained["chain_rule"]
            assert chained["ratio"] <= ahead["ratio"]


def test_more_candidates_cover_more_mass(figures: list[dict[str, Any]]) -> None:
    few, many = ([each for each in figures if each["k"] == k] for k in (3, 8))
    for one, other in zip(few, many, strict=True):
        assert (one["source"], strategy_of(one)) == (other["source"], strategy_of(other))
        if not one["chain_rule"] and one["unaligned"] != "condition":
            assert one["coverage_of_mass"] <= other["coverage_of_mass"]
            assert one["coverage_of_positions"] == other["coverage_of_positions"]


def test_the_table_has_every_number_whole_at_80_columns(evaluated: Path, figures: list[dict[str, Any]]) -> None:
    lines = (evaluated / "stdout").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 80
    for source in runs.SOURCES:
        for k in (3, 8):
            begin = next(at for at, line in enumerate(lines) if line.strip().startswith(f"{source}, k = {k}:"))
            few = [each for each in figures if (each["source"], each["k"]) == (source, k)]
            assert f"{few[0]['own']:.3f} bits per byte" in lines[begin]
            heading = next(at for at in range(begin, len(lines)) if lines[at].split()[:1] == ["strategy"])
            assert lines[heading].split() == ["strategy", "rows", "mass", "little", "common", "there", "own", "ratio"]
            end = next(at for at in range(heading, len(lines)) if not lines[at].strip())
            rows = [line for line in lines[heading + 2 : end] if "." in line]  # names may continue below
            columns = (
                "coverage_of_positions",
                "coverage_of_mass",
                "little_mass",
                "common",
                "transferred",
                "own_there",
                "ratio",
            )
            for row, each in zip(rows, few, strict=True):
                assert row.split()[-7:] == [f"{each[key]:.3f}" for key in columns]
                assert row.split()[0] == f"{each['sequence']},"


def test_a_second_time_nothing_is_prepared_or_captured_again(evaluated: Path, figures: list[dict[str, Any]]) -> None:
    def manifests() -> dict[str, tuple[int, bytes]]:
        found = (evaluated / "work").rglob("manifest.json")
        return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in found}

    before = manifests()
    assert {Path(name).parts[-4] for name in before} == {"prepare", "capture"}
    arguments = ("--workdir", evaluated / "work", "--top-k", "8", "--top-k", "3", "--top-k", "8", "--json")
    assert json.loads(runs.here("eval", "alignment", evaluated / "recipe.yaml", *arguments).stdout) == figures
    assert manifests() == before


def test_processes_change_nothing_but_the_time(evaluated: Path, figures: list[dict[str, Any]]) -> None:
    recipe = load_recipe(evaluated / "recipe.yaml", ["align.processes=2"])
    assert evaluate_alignment(recipe, evaluated / "work", top_ks=[3, 8]) == figures


# -- what it is counted on ----------------------------------------------------------------------------------------------


def starts(rows: Prepared) -> dict[tuple[int, int], int]:
    """Where content tokens start, of those that have a width; one that takes in template text before the content does not count."""
    columns = (rows.response, rows.begin, rows.end, rows.end_of_turn | rows.lead, rows.gold)
    found: dict[tuple[int, int], int] = {}
    for response, begin, end, other, token in zip(*(column.tolist() for column in columns), strict=True):
        if not other and end > begin >= 0:
            found.setdefault((response, begin), token)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Strategy, Seen]]:
    """What each map is made of, while the test runs."""
    found: list[tuple[Strategy, Seen]] = []
    build = Pair.build_map

    def spy(pair: Pair, counted: Seen, back_off: Any) -> Any:
        found.append((pair.strategy, counted))
        return build(pair, counted, back_off)

    monkeypatch.setattr(Pair, "build_map", spy)
    return found


def pairs_of(seen: Seen) -> dict[tuple[int, int], int]:
    columns = (seen.pairs.source, seen.pairs.pivot, seen.pairs.count)
    return {(source, pivot): count for source, pivot, count in zip(*(c.tolist() for c in columns), strict=True)}


@pytest.mark.parametrize("first", [200, 6], ids=["apart", "partly trained on"])
def test_the_map_is_counted_on_training_conversations_that_are_not_held_out(
    copied: Path, tmp_path: Path, seen: list[tuple[Strategy, Seen]], first: int
) -> None:
    """Against a naive count over the stored tokens."""
    held_out = runs.write_conversations(tmp_path / "held-out.jsonl", 7, first=first)
    recipe = load_recipe(copied / "recipe.yaml", [f"data.validation={held_out}"])
    evaluate_alignment(recipe, copied / "work", top_ks=[3])
    prepared = copied / "work" / "prepare"
    assert [strategy for strategy, _ in seen] == 2 * list(STRATEGIES)
    half = len(STRATEGIES)
    for source, data, several in (("mistral", "data", seen[:half]), ("gemma", "gemma", seen[half:])):
        ours, theirs = (PreparedSet(prepared / name / data) for name in ("pivot", source))
        held_out = set(PreparedSet(prepared / "pivot" / f"{data}-held-out").ids)
        assert bool(held_out & set(ours.ids)) == (first == 6 and data == "data")
        expected: Counter[tuple[int, int]] = Counter()
        for one in ours:
            if one.id not in held_out:
                place, there = starts(one), starts(theirs[theirs.row_of[one.id]])
                expected.update((there[key], token) for key, token in place.items() if key in there)
        for strategy, found in several:
            assert strategy.sequence == "dtw" or pairs_of(found) == expected


def test_other_held_out_conversations_change_no_count(
    copied: Path, tmp_path: Path, seen: list[tuple[Strategy, Seen]]
) -> None:
    other = runs.write_conversations(tmp_path / "held-out.jsonl", 2, first=997)
    for changes in ([], [f"data.validation={other}"]):
        evaluate_alignment(load_recipe(copied / "recipe.yaml", changes), copied / "work", top_ks=[3])
    found = [(strategy, pairs_of(each), dict(each.parts)) for strategy, each in seen]
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert any(parts for *_, parts in found)


def test_a_source_with_the_pivots_tokens_loses_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """Another model with the same tokenizer: where everything corresponds, what is kept arrives as it was."""
    other = tiny.build("llama", tmp_path / "other", seed=1)
    recipe = runs.write_recipe(tmp_path, models, sources={"twin": str(other)})
    records = evaluate_alignment(load_recipe(recipe), tmp_path / "work", top_ks=[2, 8])
    assert len(records) == 2 * len(STRATEGIES)
    for each in records:
        assert each["coverage_of_positions"] == each["coverage_of_bytes"] == 1.0
        if strategy_of(each) == Strategy("boundary", "statistics"):
            assert each["ratio_to_kept"] == 1.0
            assert each["common"] == each["transferred"] == each["own_kept_there"]
            assert each["own_there"] == each["own"]


# -- together with a run ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_the_work_directory_of_an_evaluation(finished: Path, copied: Path, tmp_path: Path) -> None:
    """And gives what it gives alone."""
    recipe, work = finished / "recipe.yaml", tmp_path / "work"
    assert runs.here("eval", "alignment", recipe, "--workdir", work, "--top-k", "9").returncode == 0
    assert run(load_recipe(recipe), work, until="align") == 17 - 8, "all that is prepared"
    both, alone = runs.digests(work), runs.digests(runs.cut(copied / "work", "align"))
    assert alone.items() <= both.items()
    more = {name.rpartition("/")[0] for name in both.keys() - alone.keys()}
    assert more == {"capture/mistral/data-held-out", "capture/gemma/gemma-held-out"}


def test_an_evaluation_leaves_a_run_as_it_was(finished: Path, copied: Path) -> None:
    recipe, work = copied / "recipe.yaml", copied / "work"
    assert runs.here("eval", "alignment", recipe, "--workdir", work, "--top-k", "9").returncode == 0
    assert runs.digests(finished / "work").items() <= runs.digests(work).items()
    assert run(load_recipe(recipe), work) == 0


# -- mistakes -----------------------------------------------------------------------------------------------------------


def error_of(*arguments: str | Path) -> str:
    ended = runs.here("eval", "alignment", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = [
        line for line in ended.stderr.splitlines() if not line.startswith(("prepare", "capture", "compare", "see"))
    ]
    assert line.startswith(PREFIX)
    return line.removeprefix(PREFIX)


def test_a_source_without_held_out_conversations(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path, models, data={"train": "train.jsonl"})
    line = error_of(recipe, "--workdir", tmp_path / "work")
    assert line == "source mistral has no held-out conversations: set data.validation"
    assert not (tmp_path / "work").exists()


def test_held_out_conversations_that_are_not_there(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path, models)
    (tmp_path / "held-out.jsonl").unlink()
    assert error_of(recipe, "--workdir", tmp_path / "work") == f"{tmp_path / 'held-out.jsonl'}: no such file"
    assert not list((tmp_path / "work").rglob("manifest.json"))


def test_another_recipes_work_directory(evaluated: Path) -> None:
    changed = ("--workdir", evaluated / "work", "--set", "name=other")
    assert "is of a recipe with name tiny" in error_of(evaluated / "recipe.yaml", *changed)


def test_distributions_of_another_text(copied: Path, models: dict[str, Path]) -> None:
    recipe, work = copied / "recipe.yaml", copied / "work"
    assert runs.here("eval", "alignment", recipe, "--workdir", work, "--top-k", "3").returncode == 0
    directory = work / "capture" / "mistral" / "data-held-out"
    store = open_distributions(directory)
    rows = {identity: store[identity] for identity in store.index}
    victim = next(iter(rows))
    rows[victim] = replace(rows[victim], nll=rows[victim].nll[1:])
    rewrite(directory, rows)
    line = error_of(recipe, "--workdir", work, "--top-k", "3")
    assert line.startswith(f"mistral ({models['mistral']}): conversation {victim} has ")
