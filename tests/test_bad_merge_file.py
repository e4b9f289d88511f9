"""Merge files with mistakes: a message for each that says where it is, all at once, before any model is read."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cases import each
from fusechat.errors import RecipeError
from fusechat.merge.merge_file import read_merge_file
from fusechat.merge.methods import method_names

METHODS = ", ".join(method_names())
GOOD = """\
name: fused
models:
  - model: org/base
  - model: org/a
    parameters:
      weight: 0.5
  - model: org/b
    parameters: {weight: 0.5, density: 0.5}
merge_method: ties
base_model: org/base
parameters:
  normalize: true
dtype: bfloat16
"""


def complaints(config: Any) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        read_merge_file(config)
    return list(raised.value.messages)


def listed(*names: str, **own: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": dict(own)} for name in names]


def test_the_file_that_is_spoilt_below_is_good(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert [str(target) for target in read_merge_file(path).targets] == ["org/a", "org/b"]


@each("old, new, expected", [
    # the file's own keys
    ("name: fused", "nmae: fused", ["1: nmae: unknown key; did you mean name?"]),
    ("dtype: bfloat16", "dype: float32", ["13: dype: unknown key; did you mean dtype?"]),
    ("dtype: bfloat16", "q: 1",
     ["13: q: unknown key; known here: name, merge_method, base_model, models, parameters, dtype, out_dtype"]),
    ("dtype: bfloat16", "select_topk: 0.1", ["13: select_topk: belongs under parameters"]),
    ("dtype: bfloat16", "density: 0.1", ["13: density: belongs under parameters"]),
    ("name: fused", "name: [a]", ["1: name: should be one line of text, not list"]),
    ("name: fused", 'name: "a\\nb"', ["1: name: should be one line of text, not 'a\\nb'"]),
    ("name: fused", 'name: ""', ["1: name: should be one line of text, not ''"]),
    ("bfloat16", "float64", ["13: dtype: should be float32, bfloat16 or float16, not 'float64'"]),
    ("bfloat16", "16", ["13: dtype: should be float32, bfloat16 or float16, not 16"]),
    ("dtype: b", "out_dtype: torch.b", None),
    ("dtype: bfloat16", "out_dtype: [x]", ["13: out_dtype: should be float32, bfloat16 or float16, not list"]),
    # what is not supported
    ("name: fused", "slices: []",
     ["1: slices: putting a model together from layers of others is not supported: list whole models under models"]),
    ("name: fused", "modules: {text: {}}",
     ["1: modules: merging the modules of a model apart is not supported: list whole models under models"]),
    ("name: fused", "tokenizer_source: union",
     ["1: tokenizer_source: tokenizers are not merged: the base model's, or the first model's, is kept"]),
    ("name: fused", "tokenizer: {source: org/b}",
     ["1: tokenizer: tokenizers are not merged: the base model's, or the first model's, is kept"]),
    ("name: fused", "chat_template: chatml",
     ["1: chat_template: not supported: the base model's, or the first model's, is kept"]),
    ("name: fused", "tokenizer: {source: base, pad_to_multiple_of: 8}",
     ["1: tokenizer: tokenizers are not merged: the base model's, or the first model's, is kept"]),
    ("name: fused", "x: &w {weight: 1}",
     ["1: x: unknown key; known here: name, merge_method, base_model, models, parameters, dtype, out_dtype"]),
    ("name: fused", "normalize: false", ["1: normalize: belongs under parameters"]),
    ("merge_method: ties", "merge_method: TIES",
     [f"9: merge_method: no such method as 'TIES'; known here: {METHODS}; did you mean ties?"]),
    # the method
    ("merge_method: ties\n", "", [f" merge_method: is missing; known here: {METHODS}"]),
    ("merge_method: ties", "merge_method: tise",
     [f"9: merge_method: no such method as 'tise'; known here: {METHODS}; did you mean ties?"]),
    ("merge_method: ties", "merge_method: zzzz", [f"9: merge_method: no such method as 'zzzz'; known here: {METHODS}"]),
    ("merge_method: ties", "merge_method: [ties]",
     [f"9: merge_method: should be the name of a method, not list; known here: {METHODS}"]),
    ("merge_method: ties", "merge_method: model_stock",
     [f"9: merge_method: model_stock is a method of mergekit that is not here; known here: {METHODS}"]),
    # models
    ("- model: org/base", "- org/base", ["3: models.0: should be a mapping of model and parameters, not 'org/base'"]),
    ("- model: org/base", "- [a]", ["3: models.0: should be a mapping of model and parameters, not list"]),
    ("- model: org/base", "-", ["3: models.0: should be a mapping of model and parameters, not nothing"]),
    ("- model: org/base", "- parameters: {}", ["3: models.0.model: is missing"]),
    ("- model: org/base", "- model: ", ["3: models.0.model: should name a model, not nothing"]),
    ("- model: org/base", "- model: [org/x]", ["3: models.0.model: should name a model, not list"]),
    ("- model: org/base", '- model: ""', ["3: models.0.model: should name a model, not ''"]),
    ("- model: org/base", "- model: ./nowhere",
     ["3: models.0.model: './nowhere' is neither a directory, a .gguf file, a wheel: reference nor a hub id"]),
    ("- model: org/base", "- model: gone.gguf", ["3: models.0.model: gone.gguf: no such file"]),
    ("- model: org/base", "- model: wheel:dist/m.gguf",
     ["3: models.0.model: 'wheel:dist/m.gguf' is not of the form wheel:DIST==VERSION/path/in/wheel"]),
    ("- model: org/base", "- model: org/base+org/lora",
     ["3: models.0.model: 'org/base+org/lora' adds a LoRA adapter, which is not supported: merge it into its model first"]),
    ("- model: org/base", "- model: {model: org/base, lora: {path: org/lora}}", ["3: models.0.model.lora: not supported"]),
    (
        "- model: org/base",
        "- model: {model: {path: org/base, revison: v1}, lroa: 1}",
        [
            "3: models.0.model.lroa: unknown key; known here: model",
            "3: models.0.model.model.revison: unknown key; did you mean revision?",
        ],
    ),
    ("- model: org/base", "- model: {model: {path: org/base, revision: 1.0}}",
     ["3: models.0.model.model.revision: should be text, not 1.0"]),
    ("- model: org/base", "- model: {model: {revision: v1}}", ["3: models.0.model.model.path: should name a model, not nothing"]),
    ("- model: org/base", "- model: {}", ["3: models.0.model.model: should name a model, not nothing"]),
    ("- model: org/b\n", "- model: org/a\n", ["7: models.2.model: org/a is listed twice"]),
    ("- model: org/base", "- model: org/base\n    weight: 1", ["4: models.0.weight: belongs under parameters"]),
    ("- model: org/base", "- model: org/base\n    layer_range: [0, 2]",
     ["4: models.0.layer_range: unknown key; known here: model, parameters"]),
    ("parameters: {weight: 0.5, density: 0.5}", "parameters: 0.5",
     ["8: models.2.parameters: should be a mapping of parameters, not 0.5"]),
    # the base model
    (
        "base_model: org/base\n",
        "",
        [
            " base_model: is missing: ties works on updates from a base model",
            "3: models.0: org/base has no weight, for which ties has no default",
        ],
    ),
    ("base_model: org/base", "base_model: nowhere",
     ["10: base_model: 'nowhere' is neither a directory, a .gguf file, a wheel: reference nor a hub id"]),
    ("base_model: org/base", "base_model: [x]", ["10: base_model: should name a model, not list"]),
    # parameters
    (
        "weight: 0.5\n",
        "weigth: 0.5\n",
        [
            "6: models.1.parameters.weigth: unknown parameter; did you mean weight?",
            "4: models.1: org/a has no weight, for which ties has no default",
        ],
    ),
    ("normalize: true", "zzzz: 1",
     ["12: parameters.zzzz: unknown parameter; known here: weight, density, normalize, rescale, lambda"]),
    ("normalize: true", "seed: 1",
     ["12: parameters.seed: unknown parameter; known here: weight, density, normalize, rescale, lambda"]),
    ("normalize: true", "granularity: layer",
     ["12: parameters.granularity: unknown parameter; known here: weight, density, normalize, rescale, lambda"]),
    ("normalize: true", "normalize: 2", ["12: parameters.normalize: should be true or false, not 2"]),
    ("parameters:\n  normalize: true", "parameters: [a]", ["11: parameters: should be a mapping of parameters, not list"]),
    ("weight: 0.5\n", "weight: .nan\n", ["6: models.1.parameters.weight: should be a number, not nan"]),
    ("weight: 0.5\n", "weight: []\n", ["6: models.1.parameters.weight: is an empty list"]),
    (
        "weight: 0.5\n",
        "weight:\n        - {filter: mlp, value: x}\n        - 3\n",
        [
            "7: models.1.parameters.weight.0.value: should be a number, not 'x'",
            "8: models.1.parameters.weight.1: in a list with filters, should be a mapping of value and filter, not 3",
        ],
    ),
    ("density: 0.5", "density: 1.5", ["8: models.2.parameters.density: should be between 0 and 1, not 1.5"]),
    # several at once, and YAML's own
    ("name: fused", "name: fused\nname: again", ["2: name: stands here twice"]),
    (
        "normalize: true\ndtype: bfloat16",
        "normalize: x\n  lambda: y\ndtype: z\nslices: 1",
        [
            "15: slices: putting a model together from layers of others is not supported: list whole models under "
            "models",
            "14: dtype: should be float32, bfloat16 or float16, not 'z'",
            "12: parameters.normalize: should be true or false, not 'x'",
            "13: parameters.lambda: should be a number, not 'y'",
        ],
    ),
    ("dtype: bfloat16", "---\ndtype: bfloat16",
     ["14: a second document begins here; a merge configuration is a file of its own"]),
    ("dtype: bfloat16", "dtype: [", ["14: not YAML: expected the node content, but found '<stream end>'"]),
])  # fmt: skip
def test_mistakes(tmp_path: Path, old: str, new: str, expected: list[str] | None) -> None:
    assert GOOD.count(old) == 1
    path = tmp_path / "merge.yaml"
    path.write_text(GOOD.replace(old, new), encoding="utf-8")
    if expected is None:
        assert read_merge_file(path).dtype == "bfloat16"
        return
    found = complaints(path)
    assert [message.removeprefix(f"{path}:") for message in found] == expected


def test_the_lines_name_the_file_and_without_a_file_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(GOOD.replace("ties", "tise"), encoding="utf-8")
    config = {**yaml.safe_load(GOOD), "merge_method": "tise"}
    what = f"merge_method: no such method as 'tise'; known here: {METHODS}; did you mean ties?"
    assert complaints(tmp_path / "merge.yaml") == [f"{tmp_path / 'merge.yaml'}:9: {what}"]
    assert complaints(config) == [f"merge: {what}"]


@each("config, expected", [
    ([], "merge: a merge configuration is a mapping of keys, not list"),
    (None, "merge: a merge configuration is a mapping of keys, not nothing"),
    (Path("no-such.yaml"), "no-such.yaml: no such file"),
])  # fmt: skip
def test_what_is_no_configuration(config: Any, expected: str) -> None:
    assert complaints(config) == [expected]


@each("text, expected", [
    ("", ": a merge configuration is a mapping of keys, not nothing"),
    ("[a]", ": a merge configuration is a mapping of keys, not list"),
    ("a: 1\n---\nb: 2\n---\nc: 3\n", ":3: a second document begins here; a merge configuration is a file of its own"),
    ("a: &x [*x]\n", ": nests too deep, or in itself"),
])  # fmt: skip
def test_what_is_no_merge_file(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(text, encoding="utf-8")
    assert complaints(path) == [f"{path}{expected}"]


@each("change, expected", [
    ({"models": None}, ["models: is missing"]),
    ({"models": []}, ["models: lists no model"]),
    ({"models": {"model": "org/a"}}, ["models: should be a list of models, not dict"]),
    ({"models": [{"model": "org/base"}]}, ["models: none is left to merge but the base model"]),
    ({"base_model": None}, ["base_model: is missing: sce works on updates from a base model"]),
    ({"base_model": "org/base+org/lora"},
     ["base_model: 'org/base+org/lora' adds a LoRA adapter, which is not supported: merge it into its model first"]),
    ({"merge_method": "slerp"}, ["parameters.t: is missing: slerp has no default for it"]),
    ({"merge_method": "slerp", "models": listed("org/a", "org/b"), "parameters": {"t": 1.5}},
     ["parameters.t: should be between 0 and 1, not 1.5", "models: slerp takes 1 in addition to the base model, not 2"]),
    (
        {"merge_method": "linear", "models": listed("org/a", "org/b")},
        [
            "models.0: org/a has no weight, for which linear has no default",
            "models.1: org/b has no weight, for which linear has no default",
            "base_model: org/base has no weight, for which linear has no default; merged by this method too, it "
            "should stand among the models",
        ],
    ),
    (
        {"merge_method": "linear", "models": listed("org/a", weight=1)},
        [
            "base_model: org/base has no weight, for which linear has no default; merged by this method too, it "
            "should stand among the models"
        ],
    ),
    ({"merge_method": "linear", "base_model": None, "models": listed("org/a", weight=True)},
     ["models.0.parameters.weight: should be a number, not True"]),
    ({"merge_method": "dare_ties", "parameters": {"weight": 1, "seed": [1]}},
     ["parameters.seed: is one whole number for all tensors, not list"]),
    (
        {"parameters": {"granularity": ["layer"], "select_topk": -1, "normalise": True}},
        [
            "parameters.granularity: should be tensor, layer or model, not list",
            "parameters.select_topk: should be at least 0, not -1",
            "parameters.normalise: unknown parameter; did you mean normalize?",
        ],
    ),
    ({"parameters": {"granularity": "tensors"}}, ["parameters.granularity: should be tensor, layer or model, not 'tensors'"]),
    ({"granularity": "layer"}, ["granularity: belongs under parameters"]),
    ({"select_deltas": False}, ["select_deltas: belongs under parameters"]),
    ({"models": listed("org/a", select_deltas=False, select_topc=1)},
     ["models.0.parameters.select_topc: unknown parameter; did you mean select_topk?"]),
    ({"models": None, "slices": [1]},
     ["slices: putting a model together from layers of others is not supported: list whole models under models"]),
    ({"models": None, "modules": {"x": 1}},
     ["modules: merging the modules of a model apart is not supported: list whole models under models"]),
    ({"models": [{"model": {"model": {"path": 3, "revision": 4}}}]},
     ["models.0.model.model.revision: should be text, not 4", "models.0.model.model.path: should name a model, not 3"]),
])  # fmt: skip
def test_mistakes_between_the_parts(change: dict[str, Any], expected: list[str]) -> None:
    config = {"merge_method": "sce", "base_model": "org/base", "models": [{"model": "org/a"}]}
    assert [message.removeprefix("merge: ") for message in complaints({**config, **change})] == expected


def test_filters_that_leave_a_tensor_without_a_value(tmp_path: Path) -> None:
    config = """\
models:
  - model: org/a
    parameters:
      weight: [{filter: mlp, value: 1}]
  - model: org/b
merge_method: linear
parameters:
  weight: {filter: self_attn, value: 2}
"""
    path = tmp_path / "merge.yaml"
    path.write_text(config, encoding="utf-8")
    found = read_merge_file(path)
    assert found.values("h.0.self_attn.weight", 2)["weight"] == [2, 2]
    for tensor, place in (
        ("lm_head.weight", "4: models.0.parameters.weight"),
        ("h.1.mlp.bias", "8: parameters.weight"),
    ):
        with pytest.raises(RecipeError) as raised:
            found.values(tensor, 2)
        assert raised.value.messages == (f"{path}:{place}: no filter holds for {tensor}, and there is no default",)
