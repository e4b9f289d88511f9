"""Recipes that are right: what is filled in, what paths mean, what `--set` changes, and that a saved one reads back."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from cases import each
from fusechat.errors import RecipeError
from fusechat.pipeline import load_recipe
from fusechat.recipe.load import recipe_identity, save_recipe
from fusechat.recipe.schema import Recipe

LEAST = {"name": "tiny", "pivot": "org/pivot", "sources": {"first": "org/first"}, "data": {"train": "train.jsonl"}}


def write(directory: Path, **changes: Any) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **changes}, sort_keys=False))
    return path


def test_defaults_are_those_of_the_recipe_page(tmp_path: Path) -> None:
    """Against the table of docs/recipe.md, where a default in words, or none, stands for `null`."""
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in page.splitlines() if line.startswith("| `")]
    table = {
        key.strip("`"): yaml.safe_load(cell.strip("`")) if cell[:1] in "`0123456789" else None for key, cell in rows
    }
    recipe = load_recipe(write(tmp_path)).model_dump(by_alias=True)
    sections = {name: recipe[name] for name in ("data", "capture", "align", "fuse", "merge", "evaluate")}
    found = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    found |= {"seed": recipe["seed"], "device": recipe["device"]}
    assert found.pop("fuse.training") == {}
    assert found.pop("data.train") == {"path": str(tmp_path / "train.jsonl")}
    assert found == {key: table.get(key, "not on the page") for key in found}


def test_the_defaults_are_those_that_the_results_page_gives(tmp_path: Path) -> None:
    """Alignment looks ahead by default where the map is counted."""
    recipe = load_recipe(write(tmp_path))
    assert (recipe.capture.top_k, recipe.fuse.sft_weight, recipe.merge.select_topk) == (10, 0.9, 1.0)
    assert (recipe.fuse.function, recipe.fuse.loss, recipe.merge.method) == ("mince", "cross_entropy", "sce")
    assert (recipe.data.max_length, recipe.data.on_error, recipe.seed, recipe.device) == (2048, "stop", 0, None)
    assert recipe.align.looks_ahead
    for changes in (["look_ahead=false"], ["vocabulary=exact"], ["vocabulary=edit", "look_ahead=false"]):
        changed = load_recipe(write(tmp_path), [f"align.{change}" for change in changes])
        assert not changed.align.looks_ahead, changes


def test_the_papers_settings_are_one_key_away(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, preset="paper"))
    align, fuse, merge = recipe.align, recipe.fuse, recipe.merge
    assert (align.sequence, align.vocabulary, align.top_1, align.unaligned) == ("dtw", "statistics", True, "label")
    assert not align.looks_ahead
    assert (fuse.function, fuse.unit, fuse.level, fuse.against) == ("mince", "token", "conversation", "pivot")
    assert (fuse.loss, fuse.tail, fuse.temperature, fuse.sft_weight) == ("cross_entropy", "renormalise", 1.0, 0.9)
    assert fuse.training == {
        "num_train_epochs": 3,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
    }
    assert (merge.method, merge.select_topk, recipe.capture.top_k, recipe.data.max_length) == ("sce", 0.1, 10, 2048)
    assert load_recipe(write(tmp_path), ["preset=paper"]) == recipe
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_what_a_recipe_says_itself_comes_before_a_preset(tmp_path: Path) -> None:
    own = {"fuse": {"unit": "byte", "training": {"learning_rate": 1e-4}}, "merge": {"method": "linear"}}
    recipe = load_recipe(write(tmp_path, preset="paper", **own))
    assert (recipe.fuse.unit, recipe.fuse.training["learning_rate"]) == ("byte", 1e-4)
    assert recipe.fuse.training["num_train_epochs"] == 3
    assert (recipe.merge.method, recipe.merge.select_topk) == ("linear", None)
    assert recipe.align.sequence == "dtw"
    with pytest.raises(RecipeError, match=r"recipe.yaml:7: preset: .*'paper'.*not 'papers'"):
        load_recipe(write(tmp_path, preset="papers"))
    with pytest.raises(RecipeError, match=r"fuse: should be a mapping of keys, not int"):
        load_recipe(write(tmp_path, preset="paper", fuse=3))


def test_a_number_is_a_number_however_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path)
    least = path.read_text()
    for text in ("5e-6", "5.0e-6", "0.000005", "5E-6", "+5e-6", "50e-7"):
        path.write_text(f"{least}fuse: {{training: {{learning_rate: {text}}}}}\n")
        rates = [load_recipe(path).fuse.training["learning_rate"]]
        path.write_text(least)
        rates.append(load_recipe(path, [f"fuse.training.learning_rate={text}"]).fuse.training["learning_rate"])
        assert all(isinstance(rate, float) for rate in rates), text
        assert rates == pytest.approx([0.000005] * 2, rel=1e-12)
    for text in ("e5", "1e", "model-5e-6", '"5e-6"', "0x1e5f"):
        path.write_text(f"{least}fuse: {{training: {{lr_scheduler_kwargs: {{power: {text}}}}}}}\n")
        assert not isinstance(load_recipe(path).fuse.training["lr_scheduler_kwargs"]["power"], float), text


def test_paths_are_meant_from_the_recipes_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "org" / "local").mkdir(parents=True)
    (tmp_path / "here" / "model").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "here" / "m.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wheel = "wheel:dist==1.0/a/model.gguf"
    sources = {
        "local": "org/local",
        "dots": "./model",
        "home": "~",
        "gguf": {"model": "m.gguf", "data": {"train": "own.jsonl", "validation": {"path": "../up.json"}}},
        "wheel": wheel,
        "hub": "org/name@v1",
        "absolute": str(tmp_path / "here" / "model"),
    }
    path = write(tmp_path / "here", sources=sources, data={"train": "org/talks", "validation": "no-such.parquet"})
    monkeypatch.chdir(tmp_path)
    for given in (path, Path("here/recipe.yaml"), Path("./here/../here/recipe.yaml")):
        recipe = load_recipe(given)
        here = tmp_path / "here"
        places = {"local": here / "org" / "local", "dots": here / "model", "home": tmp_path / "home"}
        places |= {"gguf": here / "m.gguf", "wheel": wheel, "hub": "org/name@v1", "absolute": here / "model"}
        assert {name: source.model for name, source in recipe.sources.items()} == {k: str(v) for k, v in places.items()}
        own: Any = recipe.sources["gguf"].data
        paths = [recipe.data.train, recipe.data.validation, own.train, own.validation]
        assert [data.path if data else None for data in paths] == [
            "org/talks", *(str(path) for path in (here / "no-such.parquet", here / "own.jsonl", tmp_path / "up.json"))
        ]  # fmt: skip


def full(directory: Path) -> Path:
    """A recipe that says something at every level."""
    (directory / "model").mkdir()
    return write(
        directory,
        sources={
            "first": "model",
            "second": {
                "wheel": ["part1==1/a.gguf.part00", "wheel:part2==1/a.gguf.part01"],
                "sha256": "ab" * 32,
                "chat_template": "{{ messages }}\n  {# größer: 'x' \"y\" #}\n",
                "capture": {"top_k": 3},
                "data": {"train": "own.jsonl", "validation": "own-held-out.jsonl"},
            },
        },
        data={"train": "train.jsonl", "validation": "held-out.jsonl", "on_error": "skip"},
        capture={"top_k": 7, "dtype": "float32"},
        targets={"all": ["second", "first"], "sft": []},
        fuse={
            "training": {"learning_rate": 5e-6, "optim": "adamw_torch", "bf16": True, "max_steps": 3},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
            "level": "response",
        },
        merge={"dtype": "bfloat16", "targets": ["all", "first"]},
        device="cpu",
    )


def test_a_saved_recipe_reads_back_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(full(tmp_path))
    saved = tmp_path / "elsewhere" / "deep" / "recipe.yaml"
    save_recipe(recipe, saved)
    monkeypatch.chdir("/")
    assert load_recipe(saved) == recipe
    text = saved.read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    assert raw["fuse"]["sft_weight"] == 0.9, "defaults are filled in"
    assert raw["sources"]["first"]["model"] == str(tmp_path / "model")
    assert os.path.isabs(raw["data"]["train"]["path"])
    assert "größer" in text
    save_recipe(load_recipe(saved), saved)
    assert saved.read_text(encoding="utf-8") == text


def test_a_saved_recipe_says_whose_it_is_though_its_models_are_gone(tmp_path: Path) -> None:
    recipe = load_recipe(full(tmp_path))
    save_recipe(recipe, tmp_path / "saved.yaml")
    (tmp_path / "model").rmdir()
    assert recipe_identity(tmp_path / "saved.yaml") == ("tiny", ("org/pivot",))
    parts = {"wheel": ["part1==1/a", "wheel:part2==1/b"]}
    save_recipe(load_recipe(write(tmp_path, pivot=parts)), tmp_path / "saved.yaml")
    assert recipe_identity(tmp_path / "saved.yaml") == ("tiny", ("wheel:part1==1/a", "wheel:part2==1/b"))


def test_both_ways_of_writing_a_model_in_wheels(tmp_path: Path) -> None:
    for spec in ({"wheel": ["a==1/x", "wheel:b==1/y"]}, {"wheel": ["wheel:a==1/x", "b==1/y"]}):
        for pivot in (spec | {"sha256": "ab" * 32}, {"model": spec | {"sha256": "ab" * 32}}):
            reference = load_recipe(write(tmp_path, pivot=pivot)).pivot.reference
            assert reference.parts == ("wheel:a==1/x", "wheel:b==1/y")
            assert reference.sha256 == "ab" * 32


@each("change, read, expected", [
    ("fuse.sft_weight=1", lambda recipe: recipe.fuse.sft_weight, 1.0),
    ("seed=7", lambda recipe: recipe.seed, 7),
    ("device=null", lambda recipe: recipe.device, None),
    ("align.top_1=true", lambda recipe: recipe.align.top_1, True),
    ("targets.sft=[]", lambda recipe: recipe.targets, {"sft": []}),
    ("fuse.lora.r=8", lambda recipe: recipe.fuse.lora, {"r": 8}),
    ("merge.method=linear", lambda recipe: recipe.merge.method, "linear"),
    ("fuse.training.run_name=a=b", lambda recipe: recipe.fuse.training["run_name"], "a=b"),
    ("fuse.training.lr_scheduler_kwargs={power: 2}", lambda recipe: recipe.fuse.training["lr_scheduler_kwargs"], {"power": 2}),
    ("sources.first.trust_remote_code=true", lambda recipe: recipe.sources["first"].trust_remote_code, True),
    ("sources.first.capture.top_k=3", lambda recipe: recipe.capture_for("first").top_k, 3),
    ("sources.third=org/third", lambda recipe: list(recipe.sources), ["first", "third"]),
    ("data.train=other.jsonl", lambda recipe: Path(recipe.data.train.path).name, "other.jsonl"),
    ("data.train.path=other.jsonl", lambda recipe: Path(recipe.data.train.path).name, "other.jsonl"),
    ("pivot.chat_template='{{ messages }}'", lambda recipe: recipe.pivot.chat_template, "{{ messages }}"),
])  # fmt: skip
def test_a_change_on_the_command_line(tmp_path: Path, change: str, read: Any, expected: Any) -> None:
    path = write(tmp_path)
    before = path.read_bytes()
    assert read(load_recipe(path, [change])) == expected
    assert path.read_bytes() == before


def test_changes_are_made_in_their_order(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["seed=1", "seed=2", "fuse.loss=kl", "fuse={sft_weight: 0.2}"])
    assert (recipe.seed, recipe.fuse.loss, recipe.fuse.sft_weight) == (2, "cross_entropy", 0.2)


def test_a_source_sets_for_itself_what_it_names_only(tmp_path: Path) -> None:
    recipe = load_recipe(full(tmp_path))
    assert (recipe.capture_for("second").top_k, recipe.capture_for("second").dtype) == (3, "float32")
    assert recipe.capture_for("first") == recipe.capture_for("pivot") == recipe.capture


def test_who_teaches_on_what_and_who_is_measured_on_what(tmp_path: Path) -> None:
    recipe = load_recipe(full(tmp_path))
    sets = {source: [(one.name, Path(one.path).name) for one in recipe.sets_of(source)] for source in recipe.sources}
    assert sets == {"first": [("data", "train.jsonl")], "second": [("second", "own.jsonl")]}
    held_out = {data.name: Path(data.path).name for data in recipe.validation_sets()}
    assert held_out == {"data-held-out": "held-out.jsonl", "second-held-out": "own-held-out.jsonl"}
    assert {one.on_error for name in recipe.sources for one in recipe.sets_of(name)} == {"skip"}


def test_every_source_has_a_target_of_its_name_before_those_of_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(full(tmp_path))
    assert list(recipe.teachers().items()) == [
        ("first", ["first"]),
        ("second", ["second"]),
        ("all", ["second", "first"]),
        ("sft", []),
    ]
    assert recipe.merged_targets() == ["all", "first"]
    plain = load_recipe(write(tmp_path))
    assert (plain.teachers(), plain.merged_targets()) == ({"first": ["first"]}, ["first"])


def test_a_target_has_the_conversations_of_its_sources(tmp_path: Path) -> None:
    """And for plain fine-tuning those of all; sources on the same ones are together."""

    def sets(target: str) -> dict[str, list[str]]:
        return {data.name: sources for data, sources in recipe.training_sets(target).items()}

    def held_out(target: str) -> list[str]:
        return [data.name for data in recipe.validation_sets_of(target)]

    recipe = load_recipe(full(tmp_path), ["sources.third=org/third", "targets.all=[second, third, first]"])
    assert sets("first") == {"data": ["first"]}
    assert sets("second") == {"second": ["second"]}
    assert sets("all") == {"second": ["second"], "data": ["third", "first"]}
    assert sets("sft") == {"data": [], "second": []}
    assert {Path(data.path).name for data in recipe.training_sets("all")} == {"train.jsonl", "own.jsonl"}
    assert (held_out("first"), held_out("second")) == (["data-held-out"], ["second-held-out"])
    assert held_out("all") == held_out("sft") == ["data-held-out", "second-held-out"]
    recipe = load_recipe(tmp_path / "recipe.yaml", ["sources.second.data.validation=null"])
    assert held_out("second") == held_out("all") == ["data-held-out"]


def test_a_source_with_data_of_its_own_needs_no_common_data(tmp_path: Path) -> None:
    sources = {"first": {"model": "org/first", "data": {"train": "own.jsonl"}}}
    path = write(tmp_path, sources=sources)
    raw = yaml.safe_load(path.read_text())
    del raw["data"]
    path.write_text(yaml.safe_dump(raw))
    assert isinstance(load_recipe(path), Recipe)
