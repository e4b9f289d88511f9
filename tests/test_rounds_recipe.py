"""The section `rounds` of a recipe: what it takes from `fuse.training`, whom it concerns, and every mistake in a line."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import answering
import runs
from fusechat.errors import RecipeError
from fusechat.pipeline import load_recipe
from fusechat.recipe.anchors import links
from fusechat.recipe.load import save_recipe
from fusechat.recipe.rounds import Rounds, Teacher, taught_targets, training_of


def wrong(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [re.sub(r"^\S+?: ", "", line) for line in caught.value.messages]


def test_defaults_are_those_of_the_recipe_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `rounds\.(\w+)` \| ([^|]+) \|", page, flags=re.MULTILINE))
    found = Rounds().model_dump()
    assert shown.pop("training") == "as `fuse.training`"
    assert found.pop("training") == {}
    assert {key: yaml.safe_load(cell.strip("`")) for key, cell in shown.items()} == found
    assert links(["r.yaml:3: rounds.until_wrnog: unknown key", "r.yaml:3: rounds.teacher: x"]) == [
        "docs/recipe.md#rounds",
        "docs/recipe.md#rounds.teacher",
    ]


def test_every_mistake_has_its_line(models: dict[str, Path], tmp_path: Path) -> None:
    for section, expected in (
        ({"count": 0}, ["rounds.count: Input should be greater than or equal to 1, not 0"]),
        (
            {"prompts": 0.0, "temperature": 0.0, "until_wrong": 1.5, "cuont": 2},
            [
                "rounds.prompts: Input should be greater than 0, not 0.0",
                "rounds.temperature: Input should be greater than 0, not 0.0",
                "rounds.until_wrong: Input should be less than or equal to 1, not 1.5",
                "rounds.cuont: unknown key; did you mean count?",
            ],
        ),
        ({"loss": "kl"}, ["rounds.loss: Input should be 'cross_entropy', 'reverse_kl' or 'jsd', not 'kl'"]),
        (
            {"teacher": "everybody"},
            ["rounds.teacher: should be author, best, or a mapping of source to a name, not 'everybody'"],
        ),
        (
            {"teacher": {"source": 3}},
            ["rounds.teacher: should be author, best, or a mapping of source to a name, not {'source': 3}"],
        ),
        (
            {"training": {"learning_rat": 1, "seed": 3, "eval_strategy": "steps"}},
            [
                "rounds.training: unknown training argument learning_rat; did you mean learning_rate?",
                "rounds.training: seed cannot be set: set seed at the top of the recipe",
                "rounds.training: eval_strategy cannot be set: rounds measure nothing held-out",
            ],
        ),
        (
            {},
            ["rounds.teacher: author: answers have authors where the recipe has a section generate; or name a source"],
        ),
        (
            {"teacher": "best"},
            ["rounds.teacher: best: answers have authors where the recipe has a section generate; or name a source"],
        ),
        (
            {"teacher": {"source": "qwen"}},
            ["rounds.teacher: qwen is no source; the recipe has mistral, gemma"],
        ),
        (
            {
                "teacher": {"source": "gemma"},
                "training": {"train_sampling_strategy": "batch_rebalance", "lr_scheduler_type": "greedy"},
            },
            [
                "rounds.training: train_sampling_strategy: batch_rebalance does not know in which round a conversation is",
                "rounds.training: lr_scheduler_type: greedy follows measurements, which rounds do not make",
            ],
        ),
    ):
        found = wrong(runs.write_recipe(tmp_path, models, rounds=section))
        assert [re.sub(r"^.*?(?=rounds\.)", "", line) for line in found] == expected, section


def test_who_cannot_teach(taught: dict[str, Path], tmp_path: Path) -> None:
    server = {"server": {"url": "http://localhost:1/v1", "model": "big"}}
    sources = {"mistral": str(taught["mistral"]), "big": server}
    path = answering.write_recipe(tmp_path, taught, sources=sources, rounds={"teacher": {"source": "big"}})
    assert any("big is a server, which answers and cannot teach" in line for line in wrong(path))
    path = answering.write_recipe(
        tmp_path, taught, sources=sources, generate={"sources": ["big"]}, rounds={"teacher": "best"}
    )
    assert any("best: nobody who answers can teach" in line for line in wrong(path))


def test_the_targets_that_have_rounds(models: dict[str, Path], taught: dict[str, Path], tmp_path: Path) -> None:
    targets = {"both": ["mistral", "gemma"], "sft": []}
    one = load_recipe(runs.write_recipe(tmp_path, models, targets=targets, rounds={"teacher": {"source": "gemma"}}))
    assert taught_targets(one) == {"gemma": ["gemma"], "both": ["gemma"]}
    assert one.rounds is not None
    assert one.rounds.teacher == Teacher(source="gemma")
    answers = load_recipe(answering.write_recipe(tmp_path / "answers", taught, rounds={}))
    assert taught_targets(answers) == {"answers": ["mistral", "gemma"]}
    assert taught_targets(load_recipe(runs.write_recipe(tmp_path, models))) == {}


def test_training_takes_what_the_section_does_not_say(models: dict[str, Path], tmp_path: Path) -> None:
    def found(first: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        rounds = {"teacher": {"source": "gemma"}, "training": own}
        path = runs.write_recipe(tmp_path, models, fuse={"training": first}, rounds=rounds)
        loaded = load_recipe(path)
        save_recipe(loaded, tmp_path / "saved.yaml")
        assert load_recipe(tmp_path / "saved.yaml") == loaded
        return training_of(loaded)

    first = {"num_train_epochs": 3, "learning_rate": 1e-5, "eval_strategy": "steps", "eval_steps": 5}
    assert found(first, {"learning_rate": 1e-6}) == {"num_train_epochs": 3, "learning_rate": 1e-6}
    assert found({"max_steps": 9}, {"num_train_epochs": 2}) == {"num_train_epochs": 2}
    assert found({"max_steps": 9}, {}) == {"max_steps": 9}
