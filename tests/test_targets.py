"""Targets of a recipe: what is wrong with them, line by line, and which steps each of them needs."""

from pathlib import Path
from typing import Any

import pytest

import runs
from fusechat.errors import RecipeError
from fusechat.pipeline import build_steps, load_recipe, select_steps
from fusechat.recipe.schema import Recipe
from fusechat.run.steps import Step

# -- recipes that are wrong ---------------------------------------------------------------------------------------------

RECIPE = """\
name: tiny
pivot: org/pivot
sources:
  first: org/first
  second: org/second
targets:
  all: [first, second]
  sft: []
data:
  train: train.jsonl
fuse:
  lora: {r: 4, lora_alpha: 8}
merge:
  method: sce
  targets: [second, first]
"""
LORA = "lora: {r: 4, lora_alpha: 8}"
TAKEN = "this name is taken; every source has a target of its name"
RESERVED = "this name is taken; choose another"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[first, second]", "[first, third]", ["7: targets.all: third is no source; the recipe has first, second"]),
        ("[first, second]", "[First]", ["7: targets.all: First is no source; the recipe has first, second"]),
        ("[first, second]", "[all]", ["7: targets.all: all is no source; the recipe has first, second"]),
        ("[first, second]", "[first, second, first]", ["7: targets.all: names a source twice"]),
        ("  sft:", "  first:", [f"8: targets.first: {TAKEN}"]),
        ("  sft:", "  SECOND:", [f"8: targets.SECOND: {TAKEN}"]),
        ("  sft:", "  All:", [f"8: targets.All: {TAKEN}"]),
        ("  sft:", "  pivot:", [f"8: targets.pivot: {RESERVED}"]),
        ("  sft:", "  Fused:", [f"8: targets.Fused: {RESERVED}"]),
        ("  sft:", "  data:", [f"8: targets.data: {RESERVED}"]),
        ("  sft:", "  s/ft:", ["8: targets.s/ft: a name holds letters, digits, '.', '_' and '-' only"]),
        ("[first, second]", "first", ["7: targets.all: Input should be a valid list, not 'first'"]),
        ("[first, second]", "[first, 2]", ["7: targets.all.1: Input should be a valid string, not 2"]),
        ("  all: [first, second]\n  sft: []", "  - all", ["6: targets: should be a mapping of keys, not list"]),
        (
            "[second, first]",
            "[first, al]",
            ["15: merge.targets: al is no target; the recipe has first, second, all, sft"],
        ),
        ("[second, first]", "[all, first, all]", ["15: merge.targets: names a target twice"]),
        ("[second, first]", "[]", ["15: merge.targets: List should have at least 1 item after validation, not 0"]),
        ("[second, first]", "all", ["15: merge.targets: Input should be a valid list, not 'all'"]),
        ("lora_al", "loraal", ["12: fuse.lora: unknown LoRA argument loraalpha; did you mean lora_alpha?"]),
        ("lora_alpha", "zzzz", ["12: fuse.lora: unknown LoRA argument zzzz"]),
        ("r: 4", "r: four", ["12: fuse.lora: r should be int, not 'four'"]),
        ("r: 4", "r: true", ["12: fuse.lora: r should be int, not True"]),
        ("{r: 4, lora_alpha: 8}", "4", ["12: fuse.lora: should be a mapping of keys, not int"]),
        (
            "{r: 4, lora_alpha: 8}",
            "{r: 4.5, lora_alpha: two}",
            ["12: fuse.lora: r should be int, not 4.5", "12: fuse.lora: lora_alpha should be int, not 'two'"],
        ),
        (LORA, "unit: word", ["12: fuse.unit: Input should be 'byte' or 'token', not 'word'"]),
        (LORA, "level: turn", ["12: fuse.level: Input should be 'conversation', 'response' or 'position', not 'turn'"]),
        (LORA, "against: all", ["12: fuse.against: Input should be 'pivot' or 'student', not 'all'"]),
        (
            LORA,
            "function: max",
            ["12: fuse.function: Input should be 'mince', 'avgce', 'source' or 'author', not 'max'"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert RECIPE.count(old) == 1
    assert mistakes(tmp_path, RECIPE.replace(old, new)) == expected


def test_what_a_recipe_of_targets_may_say(tmp_path: Path) -> None:
    assert mistakes(tmp_path, RECIPE) == []
    assert mistakes(tmp_path, RECIPE.replace("[first, second]", "[second]").replace("sft: []", "SFT: []")) == []


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("[first, second]", "[third]").replace("  sft:", "  second:").replace("r: 4", "r: no")
    assert sorted(mistakes(tmp_path, text)) == [
        "12: fuse.lora: r should be int, not False",
        "7: targets.all: third is no source; the recipe has first, second",
        f"8: targets.second: {TAKEN}",
    ]


def test_every_unknown_source_is_named(tmp_path: Path) -> None:
    assert mistakes(tmp_path, RECIPE.replace("[first, second]", "[third, first, fourth]")) == [
        "7: targets.all: third is no source; the recipe has first, second",
        "7: targets.all: fourth is no source; the recipe has first, second",
    ]


def test_a_target_that_is_wrong_is_a_target_to_its_merge(tmp_path: Path) -> None:
    """No mistake is named that only follows from another."""
    text = RECIPE.replace("[second, first]", "[all, sft]").replace("[first, second]", "[first, third]")
    assert mistakes(tmp_path, text) == ["7: targets.all: third is no source; the recipe has first, second"]


def test_a_source_that_is_wrong_is_a_source_to_its_targets_and_merge(tmp_path: Path) -> None:
    found = mistakes(tmp_path, RECIPE.replace("second: org/second", "second: no model"))
    assert [line.partition(": '")[0] for line in found] == ["5: sources.second"]


def mistakes(directory: Path, text: str) -> list[str]:
    path = directory / "recipe.yaml"
    path.write_text(text)
    try:
        load_recipe(path)
    except RecipeError as error:
        return [message.removeprefix(f"{path}:").strip() for message in error.messages]
    return []


# -- the steps of a recipe ----------------------------------------------------------------------------------------------


@pytest.fixture
def steps(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds the steps of `runs.write_recipe` with other targets, `fuse` and so on, and the recipe.

    Its sources are mistral, on the recipe's data, and gemma, on its own."""
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))

    def build(*overrides: str, **changes: Any) -> tuple[Recipe, list[Step]]:
        recipe = load_recipe(runs.write_recipe(tmp_path, models, **changes), list(overrides))
        return recipe, build_steps(recipe, tmp_path / "work")

    return build


OVERLAP = "prepare overlap"


def labels(found: list[Step], *stages: str) -> set[str]:
    return {f"{step.stage} {step.name}".strip() for step in found if not stages or step.stage in stages}


def only(found: list[Step], name: str) -> set[str]:
    """The steps of a branch next to the search for evaluation texts, which every run has."""
    return labels(select_steps(found, only=name)) - {OVERLAP}


def named(found: list[Step], label: str) -> Step:
    [step] = [one for one in found if f"{one.stage} {one.name}".strip() == label]
    return step


MANY = {"targets": {"all": ["mistral", "gemma"], "sft": []}}
OF_MISTRAL = {"prepare pivot/data", "prepare mistral/data", "capture mistral/data", "align mistral", "fuse mistral"}
OF_GEMMA = {"prepare pivot/gemma", "prepare gemma/gemma", "capture gemma/gemma", "align gemma", "fuse gemma"}
PIVOT_CAPTURES = {"capture pivot/data", "capture pivot/gemma"}


def test_each_source_has_a_target_on_its_own_data(steps: Any) -> None:
    _, found = steps()
    assert labels(found, "fuse") == {"fuse mistral", "fuse gemma"}
    assert only(found, "mistral") == OF_MISTRAL | {"capture pivot/data"}
    assert only(found, "gemma") == OF_GEMMA | {"capture pivot/gemma"}


def test_a_target_of_all_sources_has_both_sets_and_nothing_is_done_twice(steps: Any) -> None:
    _, found = steps(**MANY)
    assert only(found, "all") == (OF_MISTRAL | OF_GEMMA | PIVOT_CAPTURES | {"fuse all"}) - {
        "fuse mistral",
        "fuse gemma",
    }
    assert len({step.directory for step in found}) == len(found)
    assert named(found, "fuse all").upstream.keys() == {
        *("data/pivot", "data/pivot_capture"),
        *(f"data/source/mistral{part}" for part in ("", "_capture", "_aligned")),
        *("gemma/pivot", "gemma/pivot_capture"),
        *(f"gemma/source/gemma{part}" for part in ("", "_capture", "_aligned")),
    }
    assert named(found, "fuse all").upstream["gemma/source/gemma_aligned"].name == "gemma"


def test_sources_on_the_same_data_share_the_pivots_part(steps: Any, models: dict[str, Path]) -> None:
    sources = {"mistral": str(models["mistral"]), "llama2": str(models["llama"])}
    _, found = steps(sources=sources, targets={"all": ["llama2", "mistral"]})
    assert only(found, "all") == {
        *("prepare pivot/data", "capture pivot/data", "prepare mistral/data", "prepare llama2/data"),
        *("capture mistral/data", "capture llama2/data", "align mistral", "align llama2", "fuse all"),
    }


def test_plain_fine_tuning_needs_nothing_but_tokens_of_all_sets(steps: Any) -> None:
    _, found = steps(**MANY)
    assert only(found, "sft") == {"prepare pivot/data", "prepare pivot/gemma", "fuse sft"}
    assert only(found, "all") > only(found, "sft") - {"fuse sft"}


def test_all_weight_on_sft_asks_for_no_distributions_at_all(steps: Any) -> None:
    _, found = steps("fuse.sft_weight=1.0", **MANY)
    assert labels(found, "capture", "align") == set()
    assert labels(found, "fuse") == {"fuse mistral", "fuse gemma", "fuse all", "fuse sft"}
    assert only(found, "mistral") == {"prepare pivot/data", "fuse mistral"}
    assert only(found, "all") == {"prepare pivot/data", "prepare pivot/gemma", "fuse all"}
    _, nearly = steps("fuse.sft_weight=0.999", **MANY)
    assert len(labels(nearly, "capture", "align")) == 6


@pytest.mark.parametrize(
    ("overrides", "captured"),
    [
        (["fuse.function=mince"], True),
        (["fuse.function=avgce"], True),
        (["fuse.function=source"], False),
        (["fuse.function=source", "fuse.against=student"], False),
        (["fuse.against=student"], False),
        (["fuse.function=avgce", "fuse.against=student", "fuse.level=position"], False),
        (["fuse.function=source", "align.unaligned=pivot"], True),
        (["fuse.against=student", "align.unaligned=pivot"], True),
        (["fuse.against=student", "align.unaligned=pivot", "fuse.sft_weight=1.0"], False),
    ],
    ids=str,
)
def test_the_pivot_is_captured_only_where_its_distributions_are_asked_for(
    steps: Any, overrides: list[str], captured: bool
) -> None:
    _, found = steps(*overrides, **MANY)
    assert labels(found) & PIVOT_CAPTURES == (PIVOT_CAPTURES if captured else set())
    asked = "fuse.function=source" not in overrides and "fuse.against=student" not in overrides
    assert ("data/pivot_capture" in named(found, "fuse mistral").upstream) == asked


def test_held_out_conversations_are_prepared_for_a_target_that_is_measured(steps: Any) -> None:
    training = {"eval_strategy": "steps", "eval_steps": 2}
    _, found = steps(fuse={"training": training}, evaluate={"bits_per_byte": False}, **MANY)
    held_out = {"mistral": {"data"}, "gemma": {"gemma"}, "all": {"data", "gemma"}, "sft": {"data", "gemma"}}
    for target, sets in held_out.items():
        upstream = named(found, f"fuse {target}").upstream
        assert {key for key in upstream if key.endswith("/held_out")} == {f"{one}-held-out/held_out" for one in sets}
        assert {f"prepare pivot/{one}-held-out" for one in sets} <= only(found, target)
    assert not any("held-out" in label for label in labels(found, "capture"))


# -- what is merged -----------------------------------------------------------------------------------------------------


def test_by_default_one_target_of_each_source_is_merged(steps: Any) -> None:
    recipe, found = steps(**MANY)
    assert recipe.merged_targets() == ["mistral", "gemma"]
    merge = named(found, "merge")
    assert {key: step.name for key, step in merge.upstream.items()} == {"mistral": "mistral", "gemma": "gemma"}
    assert merge.settings["sources"].keys() == {"mistral", "gemma"}
    _, without = steps()
    assert named(without, "merge").fingerprint == merge.fingerprint, "targets that are not merged change nothing"


def test_or_those_that_the_recipe_names(steps: Any) -> None:
    _, plain = steps(**MANY)
    merge = {"method": "sce", "targets": ["all", "sft"]}
    recipe, found = steps(merge=merge, **MANY)
    assert recipe.merged_targets() == ["all", "sft"]
    assert list(named(found, "merge").upstream) == ["all", "sft"]
    assert named(found, "merge").fingerprint != named(plain, "merge").fingerprint
    assert labels(found, "fuse") == labels(plain, "fuse"), "what is not merged is made all the same"
    _, one = steps(merge={"method": "sce", "targets": ["gemma"]}, **MANY)
    assert named(one, "merge").settings["sources"].keys() == {"gemma"}
    assert list(named(one, "merge").upstream) == ["gemma"]


def test_who_teaches_a_target_is_in_its_fingerprint(steps: Any) -> None:
    prints = set()
    for changes in (
        (),
        ("fuse.level=response",),
        ("fuse.unit=token",),
        ("fuse.function=avgce",),
        ("fuse.lora={r: 2}",),
    ):
        _, found = steps(*changes, **MANY)
        prints.add(named(found, "fuse all").fingerprint)
    assert len(prints) == 5
    _, found = steps(targets={"all": ["gemma", "mistral"], "one": ["mistral"]})
    assert named(found, "fuse all").fingerprint not in prints, "ties go to the one that is named first"
    assert named(found, "fuse one").upstream.keys() == named(found, "fuse mistral").upstream.keys()


def test_only_knows_targets_and_sources(steps: Any) -> None:
    _, found = steps(**MANY)
    message = "--only pivot: the recipe has no such source or target; it has mistral, gemma, all, sft"
    with pytest.raises(RecipeError) as refused:
        select_steps(found, only="pivot")
    assert refused.value.messages == (message,)
    assert labels(select_steps(found, only="sft", until="prepare")) == {
        OVERLAP,
        "prepare pivot/data",
        "prepare pivot/gemma",
    }
