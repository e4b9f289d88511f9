"""Several training sets with weights: what a recipe may say, how often each conversation is seen, what a change redoes."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

import runs
from fusechat.commands.run import run
from fusechat.data.distributions import open_distributions
from fusechat.data.prepared import PreparedSet
from fusechat.data.tables import Table
from fusechat.errors import RecipeError
from fusechat.fuse.dataset import PAD_INDEX, FusionData, TeachingSet
from fusechat.fuse.epochs import epoch_members, epoch_size
from fusechat.fuse.sampler import FilledSampler, WeightedSampler
from fusechat.fuse.teacher_selection import SelectionRule
from fusechat.pipeline import build_steps, load_recipe
from fusechat.recipe.load import is_saved, save_recipe
from fusing import prepared, prepared_set

# -- the recipe -------------------------------------------------------------------------------------------------------------

LEAST = "name: tiny\npivot: org/pivot\n"


def recipe_of(directory: Path, train: str, sources: str = "{first: org/first}", more: str = "") -> Path:
    path = directory / "recipe.yaml"
    path.write_text(f"{LEAST}sources: {sources}\ndata:\n  train: {train}\n{more}")
    return path


def sets_of(path: Path, *overrides: str) -> dict[str, tuple[str, float]]:
    recipe = load_recipe(path, list(overrides))
    found = {data.name: Path(data.path).name for source in recipe.sources for data in recipe.sets_of(source)}
    return {name: (file, recipe.weights()[name]) for name, file in found.items()}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("a.jsonl", {"data": ("a.jsonl", 1.0)}),
        ("{path: a.jsonl}", {"data": ("a.jsonl", 1.0)}),
        ("{path: a.jsonl, weight: 2}", {"data": ("a.jsonl", 2.0)}),
        ("{path: a.jsonl, name: talks}", {"talks": ("a.jsonl", 1.0)}),
        ("[a.jsonl]", {"a": ("a.jsonl", 1.0)}),
        (
            "[{path: a.jsonl, weight: 2.0}, {path: x/b.v2.parquet, weight: 0.5}, c.json, {path: d.jsonl, name: data}]",
            {"a": ("a.jsonl", 2.0), "b.v2": ("b.v2.parquet", 0.5), "c": ("c.json", 1.0), "data": ("d.jsonl", 1.0)},
        ),
        (
            "[org/talks@v1, ./große Menge_.jsonl]",
            {"talks": ("talks@v1", 1.0), "gro-e-Menge": ("große Menge_.jsonl", 1)},
        ),
    ],
)
def test_what_is_trained_on_and_how_often(tmp_path: Path, train: str, expected: dict[str, tuple[str, float]]) -> None:
    path = recipe_of(tmp_path, train)
    assert sets_of(path) == expected
    recipe, saved = load_recipe(path), tmp_path / "elsewhere" / "saved.yaml"
    saved.parent.mkdir()
    save_recipe(recipe, saved)
    assert load_recipe(saved) == recipe
    assert is_saved(recipe, saved)


def test_sources_with_lists_of_their_own_may_share_a_set(tmp_path: Path) -> None:
    sources = (
        "{a: {model: org/a, data: {train: [x.jsonl, y.jsonl]}}, b: {model: org/b, data: {train: [y.jsonl]}}, c: org/c}"
    )
    recipe = load_recipe(recipe_of(tmp_path, "c.jsonl", sources, "targets: {all: [b, a, c], sft: []}"))

    def found(target: str) -> list[tuple[str, list[str]]]:
        return [(data.name, names) for data, names in recipe.training_sets(target).items()]

    assert found("a") == [("x", ["a"]), ("y", ["a"])]
    assert found("all") == [("y", ["b", "a"]), ("x", ["a"]), ("data", ["c"])]
    assert found("sft") == [("x", []), ("y", []), ("data", [])]


def test_a_weight_is_changed_on_the_command_line(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, "[a.jsonl, {path: b.jsonl, weight: 2}]")
    changed = sets_of(path, "data.train.0.weight=0.5", "data.train.1.name=other")
    assert changed == {"a": ("a.jsonl", 0.5), "other": ("b.jsonl", 2.0)}
    assert sets_of(recipe_of(tmp_path, "a.jsonl"), "data.train.weight=3") == {"data": ("a.jsonl", 3.0)}
    for wrong in ("2", "x", "-1"):
        with pytest.raises(
            RecipeError, match=rf"^--set data.train.{wrong}.weight=1: {wrong} is no index of a list of 2$"
        ):
            load_recipe(recipe_of(tmp_path, "[a.jsonl, b.jsonl]"), [f"data.train.{wrong}.weight=1"])


@pytest.mark.parametrize(
    ("train", "sources", "expected"),
    [
        ("[]", "", "5: data.train: List should have at least 1 item after validation, not 0"),
        ("[a.jsonl, {path: b.jsonl, weight: 0}]", "", "5: data.train.1.weight: Input should be greater than 0, not 0"),
        ("[{path: b.jsonl, weight: .inf}]", "", "5: data.train.0.weight: Input should be a finite number, not inf"),
        ("{path: b.jsonl, weight: much}", "", "5: data.train.weight: Input should be a valid number, not 'much'"),
        ("[{weight: 2}]", "", "5: data.train.0.path: is missing"),
        ("[{path: a.jsonl, weigth: 2}]", "", "5: data.train.0.weigth: unknown key; did you mean weight?"),
        ("[a.jsonl, [b.jsonl]]", "", "5: data.train.1: should be a mapping of keys, not list"),
        (
            "[{path: a.jsonl, name: a b}]",
            "",
            "5: data.train.0.name: a name holds letters, digits, '.', '_' and '-' only",
        ),
        (
            "[x/a.jsonl, y/a.jsonl]",
            "",
            "5: data.train.1: two sets of conversations are called a: give one another name",
        ),
        ("[a.jsonl, a.jsonl]", "", "5: data.train.1: two sets of conversations are called a: give one another name"),
        ("[A.jsonl, a.jsonl]", "", "5: data.train.1: two sets of conversations are called a: give one another name"),
        ("[…….jsonl]", "", "5: data.train.0: give it a name: {here}/…….jsonl has none that a directory could have"),
        (
            "[data-held-out.jsonl]\n  validation: data-held-out.jsonl",
            "",
            "5: data.train.0: two sets of conversations are called data-held-out: give one another name",
        ),
        (
            "[first.jsonl]",
            "{first: {model: org/first, data: {train: own.jsonl}}, second: org/second}",
            "3: sources.first.data.train: two sets of conversations are called first: give one another name",
        ),
        (
            "[x.jsonl]",
            "{first: {model: org/first, data: {train: [y.jsonl, {path: x.jsonl, weight: 2}]}}}",
            "3: sources.first.data.train.1: x has weight 1 elsewhere: a set has one weight",
        ),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, train: str, sources: str, expected: str) -> None:
    path = recipe_of(tmp_path, train, sources or "{first: org/first}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}:{expected.format(here=tmp_path)}"


# -- how often each conversation is seen ------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 3), st.integers(1, 8))
def test_every_conversation_is_seen_as_often_as_the_weight_says(n: int, tenths: int, seed: int, epochs: int) -> None:
    """To the whole number below or above, in each epoch and in all so far; exactly by the weight where it makes whole
    conversations of the set."""
    weight, ids = tenths / 10, [f"conversation {number}" for number in range(n)]
    size = epoch_size(n, weight)
    assert size == max(1, (2 * tenths * n + 10) // 20), "to the nearest, a half up"
    seen: Counter[int] = Counter(dict.fromkeys(range(n), 0))
    for epoch in range(epochs):
        members = epoch_members(ids, weight, epoch=epoch, seed=seed)
        assert len(members) == size
        of_one = Counter(dict.fromkeys(range(n), 0)) + Counter(members)
        assert {of_one[index] for index in range(n)} <= {size // n, -(-size // n)}
        seen.update(members)
        share = size * (epoch + 1)
        assert {seen[index] for index in range(n)} <= {share // n, -(-share // n)}
        if tenths * n % 10 == 0:
            times = tenths * (epoch + 1)
            assert {seen[index] for index in range(n)} <= {times // 10, -(-times // 10)}


def test_halves_by_hand() -> None:
    ids = [f"conversation {number}" for number in range(10)]
    halves = [epoch_members(ids, 0.5, epoch=epoch, seed=0) for epoch in range(4)]
    assert sorted(halves[0] + halves[1]) == list(range(10))
    assert halves[2:] == halves[:2]
    assert all(half == sorted(half) for half in halves), "in the order of the file"
    assert halves[0] not in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert halves[0] != epoch_members(ids, 0.5, epoch=0, seed=1)
    assert epoch_members(ids, 1.0, epoch=7, seed=0) == list(range(10))
    assert epoch_members(ids, 2.0, epoch=1, seed=0) == [*range(10), *range(10)]
    assert epoch_members(ids, 1.5, epoch=0, seed=0) == [*range(10), *halves[0]]
    assert epoch_members(ids, 1.5, epoch=1, seed=0) == [*halves[1], *range(10)]
    assert (epoch_members([], 2.0, epoch=0, seed=0), epoch_size(3, 0.01)) == ([], 1)


@pytest.fixture
def weighted(tmp_path: Path) -> FusionData:
    """Six conversations at a half, three at two, of which one is of the first set, and four at one."""
    rows = [prepared(f"{number}", [(2, 4)], first=10 * number) for number in range(12)]
    parts = {"a": (rows[:6], 0.5), "b": (rows[5:8], 2.0), "c": (rows[8:], 1.0)}
    return FusionData(
        [TeachingSet(name, prepared_set(tmp_path / name, part), weight=w) for name, (part, w) in parts.items()],
        SelectionRule(),
    )


def test_sets_are_seen_by_their_own_weights(weighted: FusionData) -> None:
    assert (len(weighted), weighted.examples_per_epoch) == (12, 3 + 4 + 4)
    for epoch in range(2):
        counts = Counter(weighted[index]["conversation"].id for index in weighted.epoch(epoch, seed=5))
        assert [counts[f"{number}"] for number in range(6, 12)] == [2, 2, 1, 1, 1, 1]
        assert sum(counts[f"{number}"] for number in range(6)) == 3
    both = Counter(weighted.epoch(0, seed=5) + weighted.epoch(1, seed=5))
    assert [both[index] for index in range(12)] == [1] * 6 + [4] * 2 + [2] * 4


class Ids(Dataset[int]):
    """Conversations as their indices, as many as the data's."""

    def __init__(self, data: FusionData) -> None:
        self.size = len(data)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def batches(data: FusionData, order: Any, *, epoch: int, process: int | None = None, skip: int = 0) -> list[list[int]]:
    """The batches of two that a process, or the only one, gets in an epoch; without the first `skip`."""
    sampler: Any = WeightedSampler(data, order, seed=3, epoch=lambda: epoch)
    if process is not None:
        sampler = FilledSampler(sampler, 4, seed=3, epoch=lambda: epoch)
    loader = prepare_data_loader(
        DataLoader(Ids(data), batch_size=2, sampler=sampler),
        num_processes=1 if process is None else 2,
        process_index=process or 0,
        put_on_device=False,
    )
    loader = skip_first_batches(loader, skip) if skip else loader
    loader.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("order", [RandomSampler, SequentialSampler])
def test_two_processes_have_the_order_of_one(weighted: FusionData, order: Any) -> None:
    for epoch in range(3):
        alone = [index for batch in batches(weighted, order, epoch=epoch) for index in batch]
        assert sorted(alone) == sorted(weighted.epoch(epoch, seed=3))
        assert (alone == weighted.epoch(epoch, seed=3)) is (order is SequentialSampler)
        both = zip(*(batches(weighted, order, epoch=epoch, process=process) for process in range(2)), strict=True)
        together = [index for pair in both for batch in pair for index in batch]
        assert together == [*alone, PAD_INDEX]
        for process in (None, 0, 1):
            whole = batches(weighted, order, epoch=epoch, process=process)
            assert batches(weighted, order, epoch=epoch, process=process, skip=2) == whole[2:]


def test_several_processes_go_on_in_the_middle_of_a_later_epoch() -> None:
    """Without weights too: Accelerate does not tell them which epoch it is."""

    def order(skip: int) -> list[list[int]]:
        sampler = FilledSampler(RandomSampler(range(8)), 4, seed=3, epoch=lambda: 1)
        loader = DataLoader(list(range(8)), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
        loader = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.set_epoch(1)
        return [batch.tolist() for batch in loader]

    assert order(1) == order(0)[1:]


# -- the pipeline -----------------------------------------------------------------------------------------------------------

BRIEF = {"bits_per_byte": False, "answers": 0}
DATA = {"train": ["train.jsonl", {"path": "more.jsonl", "weight": 0.5}], "max_length": 256}


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two sets, which share a conversation."""
    directory = tmp_path_factory.mktemp("sets")
    runs.write_conversations(directory / "more.jsonl", 6, first=9)
    training = {**runs.TRAINING, "per_device_train_batch_size": 4}
    changes = {"data": DATA, "evaluate": BRIEF, "fuse": {"sft_weight": 0.5, "training": training}}
    runs.write_recipe(directory, models, sources={"mistral": str(models["mistral"])}, **changes)
    run(load_recipe(directory / "recipe.yaml"), directory / "work")
    return directory


def states(directory: Path, *overrides: str) -> dict[str, str]:
    recipe = load_recipe(directory / "recipe.yaml", [*overrides])
    steps = [
        step for step in build_steps(recipe, directory / "work") if step.label != "prepare overlap"
    ]  # see test_overlap.py
    return {step.label: step.state()[0] for step in steps}


def test_sets_are_prepared_and_captured_apart_and_aligned_together(finished: Path, models: dict[str, Path]) -> None:
    work = finished / "work"
    ids = {name: PreparedSet(work / "prepare" / "pivot" / name).ids for name in ("train", "more")}
    assert [len(ids[name]) for name in ids] == [10, 6]
    assert ids["train"][9] == ids["more"][0]
    aligned = open_distributions(work / "align" / "mistral")
    assert aligned.table.column("id") == ids["train"] + ids["more"][1:]
    assert json.loads((work / "align" / "mistral" / "figures.json").read_text())["conversations"] == 15
    together = finished / "together"
    together.mkdir()
    lines = (finished / "train.jsonl").read_text() + "".join((finished / "more.jsonl").open().readlines()[1:])
    (finished / "both.jsonl").write_text(lines)
    run(load_recipe(finished / "recipe.yaml", ["data.train=both.jsonl"]), together, until="align", only="mistral")
    maps = [Table([place / "align" / "mistral" / "vocabulary_map.arrow"]).table for place in (work, together)]
    assert maps[0].equals(maps[1]), "counted over both sets"
    expected = open_distributions(together / "align" / "mistral")
    for identity in expected.index:
        np.testing.assert_array_equal(aligned[identity].ids, expected[identity].ids)
        np.testing.assert_allclose(aligned[identity].probabilities, expected[identity].probabilities, atol=2e-3)


def test_what_was_done_is_told_set_by_set(finished: Path) -> None:
    counts = json.loads((finished / "work" / "fuse" / "mistral" / "manifest.json").read_text())["counts"]
    taught = {name: who["pivot"] + who["mistral"] for name, who in counts["chosen"].items()}
    assert taught == {"train": 10, "more": 5}, "each conversation once, whatever the weight"
    assert (counts["conversations"], counts["an_epoch"]) == (15, 13)
    assert counts["steps"] == 2 * 2, "two epochs of ten and three conversations, eight a step"
    page = (finished / "work" / "report" / "index.html").read_text()
    assert "teaches mistral, weight 0.5" in page
    assert "train.jsonl, more.jsonl" in page
    shown = runs.here("tokens", "pivot", "mistral", "--workdir", finished / "work", "--conversation", "14", "--json")
    assert shown.returncode == 0, shown.stderr
    assert "29, größer als 14" in json.loads(shown.stdout)["passages"][0]["text"]


def test_another_weight_redoes_the_fusion_and_what_rests_on_it(finished: Path) -> None:
    assert set(states(finished).values()) == {"done"}
    changed = states(finished, "data.train.1.weight=0.6")
    assert {label for label, state in changed.items() if state != "done"} == {"fuse mistral", "merge", "report"}
    order = states(finished, f"data.train=[{{path: {finished}/more.jsonl, weight: 0.5}}, {finished}/train.jsonl]")
    assert {"fuse mistral"} < {label for label, state in order.items() if state != "done"}
    assert all(state == "done" for label, state in order.items() if label.split()[0] in ("prepare", "capture"))


def test_a_new_set_redoes_nothing_of_the_others(finished: Path) -> None:
    shutil.copy(finished / "own.jsonl", finished / "third.jsonl")
    train = yaml.safe_dump([*DATA["train"], "third.jsonl"], default_flow_style=True).strip()
    changed = states(finished, f"data.train={train}")
    new = {f"{stage} {model}/third" for stage in ("prepare", "capture") for model in ("pivot", "mistral")}
    assert {label for label, state in changed.items() if state == "absent"} == new
    assert {label for label, state in changed.items() if state == "stale"} == {
        "align mistral",
        "fuse mistral",
        "merge",
        "report",
    }


def test_a_sampling_strategy_that_knows_no_weights_is_refused(finished: Path, tmp_path: Path) -> None:
    strategy = "fuse.training.train_sampling_strategy=batch_rebalance"
    with pytest.raises(
        RecipeError, match="train_sampling_strategy: batch_rebalance does not support weights of training sets"
    ):
        run(load_recipe(finished / "recipe.yaml", [strategy]), tmp_path / "work")
