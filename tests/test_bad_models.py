"""Models that are not there, damaged, dangerous or without a template: one line that names them, and nothing marked done."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
import tiny
from fusechat.errors import ModelError
from fusechat.models.chat_model import ChatModel
from fusechat.models.reference import Reference
from test_bad_input import complaints, done

FAILS = "its chat template fails on a plain question and answer: "


def with_source(directory: Path, models: dict[str, Path], source: Any) -> Path:
    """A recipe whose one source is `source`."""
    return runs.write_recipe(directory, models, sources={"teacher": source}, data={"train": "train.jsonl"})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("./nowhere", "'{here}/nowhere' is neither a directory, a .gguf file, a wheel: reference nor a hub id"),
        ("/nowhere/at/all", "'/nowhere/at/all' is neither a directory, a .gguf file, a wheel: reference nor a hub id"),
        ("train.jsonl", "'{here}/train.jsonl' is neither a directory, a .gguf file, a wheel: reference nor a hub id"),
        ("a/b/c", "'a/b/c' is neither a directory, a .gguf file, a wheel: reference nor a hub id"),
        ("gpt3", "'gpt3' is neither a directory, a .gguf file, a wheel: reference nor a hub id"),
        ("nowhere.gguf", "{here}/nowhere.gguf: no such file"),
        ("wheel:tiny/model.gguf", "'wheel:tiny/model.gguf' is not of the form wheel:DIST==VERSION/path/in/wheel"),
        ("wheel:tiny==1.0", "'wheel:tiny==1.0' is not of the form wheel:DIST==VERSION/path/in/wheel"),
        ({"wheel": ["tiny==1/a", "b"]}, "'wheel:b' is not of the form wheel:DIST==VERSION/path/in/wheel"),
        ({"wheel": []}, "names no model, or two: give either model or wheel"),
        ({"wheel": "tiny==1/a", "model": "a/b"}, "names no model, or two: give either model or wheel"),
        ({"chat_template": "x"}, "names no model, or two: give either model or wheel"),
        ({"model": "a/b", "sha256": "0" * 64}, "sha256 goes with a wheel: reference"),
    ],
)
def test_a_reference_that_can_be_none(tmp_path: Path, models: dict[str, Path], source: Any, expected: str) -> None:
    recipe = with_source(tmp_path, models, source)
    expected = expected.format(here=tmp_path.resolve())
    assert complaints("run", recipe, "--workdir", tmp_path / "work") == [f"{recipe}:4: sources.teacher: {expected}"]
    assert not (tmp_path / "work").exists()


def test_a_hub_id_that_the_hub_does_not_give(tmp_path: Path, models: dict[str, Path]) -> None:
    """The oldest ids have no owner before a slash."""
    for name in ("org/nothing@v2", "gpt2", "bert-base-uncased", "t5-small@main"):
        recipe = with_source(tmp_path, models, name)
        [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
        assert line.startswith(f"{name}: no such directory, and the hub gave no such model (")
        assert done(tmp_path) == []


# -- damaged directories ------------------------------------------------------------------------------------------------


def cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def cut_in_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def emptied(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    without_weights(directory)


def without_one_tensor(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def not_finite(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def config_cut(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def unknown_architecture(directory: Path) -> None:
    change_config(directory, model_type="nobody-knows")


def of_another_shape(directory: Path) -> None:
    change_config(directory, intermediate_size=64)


def without_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def tokenizer_cut(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "stage", "expected"),
    [
        (without_config, "prepare", "{model}: no config.json in {model}"),
        (without_weights, "prepare", "{model}: no safetensors weights in {model}"),
        (pickled, "prepare", "{model}: has pickled weights only (pytorch_model.bin), which can run code"),
        (config_cut, "prepare", "{model}: its configuration cannot be loaded: "),
        (without_tokenizer, "prepare", "{model}: its tokenizer cannot be loaded: Couldn't instantiate the backend"),
        (tokenizer_cut, "prepare", "{model}: its tokenizer cannot be loaded: "),
        (cut, "capture", "{model}: the model cannot be loaded: Error while deserializing header"),
        (cut_in_header, "capture", "{model}: the model cannot be loaded: Error while deserializing header"),
        (emptied, "capture", "{model}: the model cannot be loaded: Error while deserializing header"),
        (unknown_architecture, "prepare", "{model}: its configuration cannot be loaded: "),
        (
            of_another_shape,
            "capture",
            "{model}: model.layers.0.mlp.down_proj.weight is [32, 48] in the weights, and [32, 64] by config.json",
        ),
        (
            without_one_tensor,
            "capture",
            "{model}: lacks weights of its architecture: model.layers.1.mlp.up_proj.weight",
        ),
        (not_finite, "capture", "teacher ({model}): every conversation gave values that are not finite"),
    ],
)
def test_a_damaged_model_directory(
    tmp_path: Path, models: dict[str, Path], damage: Callable[[Path], None], stage: str, expected: str
) -> None:
    model = shutil.copytree(models["mistral"], tmp_path / "model")
    damage(model)
    recipe = with_source(tmp_path, models, str(model))
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work", "--until", "capture")
    assert line.startswith(expected.format(model=model))
    steps = done(tmp_path / "work")
    assert f"{stage}/teacher/data" not in steps
    assert ("prepare/teacher/data" in steps) == (stage == "capture")


def test_a_pivot_whose_weights_are_cut_off(tmp_path: Path, models: dict[str, Path]) -> None:
    model = shutil.copytree(models["llama"], tmp_path / "model")
    cut(model)
    recipe = runs.write_recipe(tmp_path, models, pivot=str(model), sources={"teacher": str(models["mistral"])})
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert line.startswith(f"{model}: the model cannot be loaded: Error while deserializing header")
    assert "capture/teacher/data" in done(tmp_path / "work")
    assert "capture/pivot/data" not in done(tmp_path / "work")


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_model_does_not_run_without_trust(tmp_path: Path, models: dict[str, Path], part: str) -> None:
    model = shutil.copytree(models["mistral"], tmp_path / "model")
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_config(
        model,
        model_type="of-its-own",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )
    if part == "tokenizer":
        (model / "tokenizer.json").unlink()
        (model / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}})
        )
    recipe = with_source(tmp_path, models, str(model))
    needs = "cannot be loaded: it needs custom code; set trust_remote_code: true for it if you trust that code"
    assert complaints("run", recipe, "--workdir", tmp_path / "work", "--until", "capture") == [
        f"{model}: its configuration {needs}"
    ]
    if part == "tokenizer":
        with pytest.raises(ModelError, match=f"^{re.escape(f'{model}: its tokenizer {needs}')}$"):
            ChatModel("teacher", Reference((str(model),))).tokenizer()
    assert not (tmp_path / "ran").exists()
    assert not any("capture/teacher" in step for step in done(tmp_path / "work"))


# -- chat templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "has no chat template; a recipe can give it one: set chat_template for it"),
        ("{% for message in messages %}{{ message.content }}", FAILS + "the template refuses it: Unexpected end"),
        ("{{ messages[0", FAILS + "the template refuses it: unexpected end of template"),
        ("{{ messages | nothing }}", FAILS + "the template refuses it: No filter named 'nothing'"),
        ("{{ nothing.at.all }}", FAILS + "the template refuses it: 'nothing' is undefined"),
        ("{{ messages + 1 }}", FAILS),
        ("{{ 1 / 0 }}", FAILS),
        ("the same for all", FAILS + "the template leaves out "),
        ("{{ messages[0].content }}", FAILS + "the template leaves out "),
    ],
)
def test_a_model_without_a_template_that_works(
    tmp_path: Path, models: dict[str, Path], template: str | None, expected: str
) -> None:
    source = {"model": str(models["gemma"])} | ({"chat_template": template} if template else {})
    recipe = with_source(tmp_path, models, source)
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert line.startswith(f"teacher ({models['gemma']}): {expected}")
    assert done(tmp_path / "work") == [], "it is said before any work"


def test_a_model_with_several_templates(tmp_path: Path, models: dict[str, Path]) -> None:
    model = shutil.copytree(models["gemma"], tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": tiny.TEMPLATE}, {"name": "tools", "template": "x"}]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = with_source(tmp_path, models, {"model": str(model), "chat_template": {"name": "rag"}})
    assert complaints("run", recipe, "--workdir", tmp_path / "work") == [
        f"teacher ({model}): has no chat template rag; it has default, tools: choose one by chat_template: {{name: …}}"
    ]


# -- GGUF files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is no GGUF file"),
        (b"PK\x03\x04", "is no GGUF file"),
        (b"GGUF", "Transformers cannot read this GGUF file: "),
        (b"GGUF\x03\0\0\0" + b"\xff" * 100, "Transformers cannot read this GGUF file: "),
    ],
)
def test_a_gguf_file_that_is_none(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model.gguf"
    model.write_bytes(content)
    recipe = with_source(tmp_path, models, str(model))
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert line.startswith(f"{model}: {expected}")
    assert done(tmp_path / "work") == [], "it is said before any work"
    assert [path.name for path in (tmp_path / "cache" / "converted").iterdir() if path.is_dir()] == []
