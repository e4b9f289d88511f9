"""Merge files: published ones mean what they mean to mergekit, and every mistake is told with its place, all at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cases import each
from fusechat.merge.merge_file import MergeFile, read_merge_file
from fusechat.merge.methods import method_names
from fusechat.models.reference import Reference

OPENCHAT = "openchat/openchat_3.5"
TARGETS = [f"FuseAI/OpenChat-3.5-7B-{name}-v2.0" for name in ("Starling", "SOLAR", "InternLM", "Mixtral", "Qwen")]
Q, MLP, HEAD = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


def published(method: str, dtype: str, *, parameters: dict[str, Any] | None, base: str | None, **own: float) -> str:
    """As FuseChat's authors wrote theirs: the pivot first, without parameters, and the same ones for every target."""
    models: list[dict[str, Any]] = [
        {"model": target, "parameters": own} if own else {"model": target} for target in TARGETS
    ]
    config = {"models": [{"model": base}, *models] if base else models, "merge_method": method}
    config |= ({"base_model": base} if base else {}) | ({"parameters": parameters} if parameters else {})
    return yaml.safe_dump(config | {"dtype": dtype}, sort_keys=False)


def read(directory: Path, text: str) -> MergeFile:
    path = directory / "merge.yaml"
    path.write_text(text, encoding="utf-8")
    return read_merge_file(path)


def references(*names: str) -> list[Reference]:
    return [Reference((name,)) for name in names]


def listed(*names: str, **own: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": dict(own)} for name in names]


# -- published configurations -------------------------------------------------------------------------------------------


@each("text, values", [
    (published("sce", "bfloat16", base=OPENCHAT, parameters={"select_topk": 0.1}),
     {"select_topk": 0.1, "select_deltas": True, "normalize": True}),
    (published("linear", "float16", base=None, parameters=None, weight=0.2), {"weight": [0.2] * 5, "normalize": True}),
    (published("task_arithmetic", "bfloat16", base=OPENCHAT, parameters={"normalize": False}, weight=0.3),
     {"weight": [0.3] * 5, "normalize": False, "lambda": 1}),
    (published("ties", "bfloat16", base=OPENCHAT, parameters={"normalize": True}, density=0.6, weight=0.2),
     {"weight": [0.2] * 5, "density": [0.6] * 5, "normalize": True, "rescale": False, "lambda": 1}),
    (published("dare_linear", "bfloat16", base=OPENCHAT, parameters={"normalize": True}, density=0.6, weight=0.2),
     {"weight": [0.2] * 5, "density": [0.6] * 5, "normalize": True, "rescale": True, "lambda": 1, "seed": 0}),
])  # fmt: skip
def test_fusechats_own_configurations(tmp_path: Path, text: str, values: dict[str, Any], heard: list[str]) -> None:
    found = read(tmp_path, text)
    linear = found.method == "linear"
    assert found.targets == references(*TARGETS)
    assert found.base == (None if linear else Reference((OPENCHAT,)))
    assert found.donor == Reference((TARGETS[0] if linear else OPENCHAT,))
    assert found.dtype == ("float16" if linear else "bfloat16")
    assert (found.name, found.granularity) == (None, "tensor")
    assert all(found.values(tensor, 32) == values for tensor in (Q, MLP, HEAD))
    assert found.source == yaml.safe_load(text)
    assert heard == []


@each("base, targets", [
    ("Qwen/Qwen2.5-32B", ["Qwen/QwQ-32B-Preview", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"]),
    ("Qwen/Qwen2.5-32B", ["Qwen/QwQ-32B-Preview", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "NovaSky-AI/Sky-T1-32B-Preview"]),
    ("Qwen/Qwen2.5-32B", ["Qwen/QwQ-32B-Preview", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "NovaSky-AI/Sky-T1-32B-Flash"]),
    ("Qwen/Qwen2.5-32B", ["Qwen/Qwen2.5-32B-Instruct", "DeepSeek-R1-Distill-Qwen-32B"]),
    ("Qwen/Qwen2.5-32B-Coder", ["Qwen/Qwen2.5-32B-Coder-Instruct", "DeepSeek-R1-Distill-Qwen-32B"]),
])  # fmt: skip
def test_fuseo1s_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, targets: list[str]) -> None:
    """Two of them name a directory next to the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DeepSeek-R1-Distill-Qwen-32B").mkdir()
    models = "\n".join(f"  - model: {name}" for name in (base, *targets))
    text = (
        f"models:\n{models}\nmerge_method: sce\nbase_model: {base}\nparameters:\n  select_topk: 1.0\ndtype: bfloat16\n"
    )
    found = read(tmp_path, text)
    assert found.targets == references(*(str(tmp_path / name) if "/" not in name else name for name in targets))
    assert (found.base, found.donor, found.dtype) == (Reference((base,)), Reference((base,)), "bfloat16")
    assert found.values(Q, 64) == {"select_topk": 1, "select_deltas": True, "normalize": True}


# -- what the parts mean ------------------------------------------------------------------------------------------------


def test_the_least(heard: list[str]) -> None:
    config = {"merge_method": "sce", "base_model": "org/base", "models": [{"model": "org/a"}]}
    found = read_merge_file(config)
    assert found.values(Q, 2)["select_topk"] == 1, "an omitted one keeps everything"
    assert (found.targets, found.dtype, found.source) == (references("org/a"), None, config)
    assert (found.granularity, found.name) == ("tensor", None)
    assert found.source is not config
    assert found.source["models"] is not config["models"]
    assert heard == []
    parts = {"merge_method": "varm", "name": " Fused 7B ", "parameters": {"granularity": "layer"}}
    found = read_merge_file({**config, **parts})
    assert (found.granularity, found.name, found.values(Q, 2)) == ("layer", "Fused 7B", {})


def test_text_and_path_name_a_file(tmp_path: Path) -> None:
    by_path = read(tmp_path, "merge_method: linear\nmodels: [{model: org/a, parameters: {weight: 1e-3}}]\n")
    assert read_merge_file(str(tmp_path / "merge.yaml")) == by_path
    assert by_path.values(Q, 2)["weight"] == [0.001]


def test_who_is_a_target() -> None:
    def targets(method: str, models: list[str], base: str | None, **parameters: float) -> list[Reference]:
        config = {"merge_method": method, "models": [{"model": name} for name in models], "parameters": parameters}
        return read_merge_file(config | ({"base_model": base} if base else {})).targets

    assert targets("sce", ["org/a", "org/base", "org/b"], "org/base") == references("org/a", "org/b")
    assert targets("sce", ["org/b", "org/a"], "org/base") == references("org/b", "org/a")
    assert targets("sce", ["org/base@v1"], "org/base") == references("org/base@v1")
    assert targets("linear", ["org/a", "org/base"], "org/base", weight=1) == references("org/a", "org/base")
    assert targets("linear", ["org/a"], "org/base", weight=1) == references("org/a", "org/base"), "an input like others"
    assert targets("slerp", ["org/base", "org/a"], "org/base", t=0.5) == references("org/a")


def test_the_files_come_from_the_base_or_from_the_first_model() -> None:
    config: dict[str, Any] = {"merge_method": "linear", "models": listed("org/a", "org/b", weight=1)}
    assert read_merge_file(config).donor == Reference(("org/a",))
    with_base = read_merge_file(config | {"base_model": "org/b"})
    assert (with_base.donor, with_base.base) == (Reference(("org/b",)), None)
    assert with_base.targets == references("org/a", "org/b")


def test_the_type_of_the_output() -> None:
    config = {"merge_method": "sce", "base_model": "org/base", "models": [{"model": "org/a"}]}
    for given, dtype in (
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16", "out_dtype": None}, "float16"),
        ({"out_dtype": "torch.bfloat16"}, "bfloat16"),
    ):
        assert read_merge_file({**config, **given}).dtype == dtype, given


def test_a_models_own_parameters_come_first_then_the_files_then_the_default() -> None:
    models = [
        {"model": "org/a", "parameters": {"density": 0.5, "weight": [{"filter": "mlp", "value": [1, 3]}]}},
        {"model": "org/base", "parameters": {"density": 0.1, "weight": 9}},
        {"model": "org/b", "parameters": {"density": {"filter": "self_attn", "value": 0.25}}},
        {"model": "org/c", "parameters": None},
    ]
    config = {"merge_method": "ties", "base_model": "org/base", "models": models, "parameters": {"weight": [0, 1]}}
    found = read_merge_file(config)
    shared = {"normalize": True, "rescale": False, "lambda": 1}
    assert found.values(MLP, 3) == {"weight": [2, 0.5, 0.5], "density": [0.5, 1, 1], **shared}
    assert found.values(Q, 3) == {"weight": [0.5, 0.5, 0.5], "density": [0.5, 0.25, 1], **shared}
    assert found.values(HEAD, 3) == {"weight": [0, 0, 0], "density": [0.5, 1, 1], **shared}


def test_a_slerp_as_they_are_published() -> None:
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    config = {"merge_method": "slerp", "base_model": "org/a", "models": [{"model": "org/a"}, {"model": "org/b"}]}
    found = read_merge_file({**config, "parameters": {"t": t}})
    assert found.values(Q, 5) == {"t": 0.5}
    assert found.values(Q, 9) == {"t": pytest.approx(0.25)}
    assert found.values("model.layers.3.mlp.up_proj.weight", 5) == {"t": pytest.approx(0.3)}
    assert found.values(HEAD, 5) == {"t": 0.5}


def test_references_in_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for directory in ("org/local", "c++", "home/model"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    wheel = "wheel:dist==1.0+cpu/model.gguf"
    expected = {
        "org/hub": "org/hub",
        "org/hub@v1": "org/hub@v1",
        "org/local": str(tmp_path / "org" / "local"),
        "./c++/": str(tmp_path / "c++"),
        "~/model": str(tmp_path / "home" / "model"),
        "m.gguf": str(tmp_path / "m.gguf"),
        wheel: wheel,
    }
    mappings = [
        ({"model": {"path": "org/x", "revision": "v2"}}, "org/x@v2"),
        ({"model": {"path": "org/y", "revision": None}, "lora": None}, "org/y"),
        ({"model": "org/z", "override_architecture": None}, "org/z"),
    ]
    models = [*expected, *(mapping for mapping, _ in mappings)]
    config = {"merge_method": "sce", "base_model": "org/base", "models": [{"model": model} for model in models]}
    assert read_merge_file(config).targets == references(*expected.values(), *(text for _, text in mappings))
    base = read_merge_file(config | {"base_model": {"model": {"path": "./org/local"}}})
    assert base.base == Reference((str(tmp_path / "org" / "local"),))
    assert len(base.targets) == len(models) - 1, "written in two ways, it is the same directory"


def test_what_is_not_given_may_be_written_as_nothing() -> None:
    nothing = dict.fromkeys(
        ("slices", "modules", "tokenizer_source", "tokenizer", "chat_template", "parameters", "name")
    )
    config = {"merge_method": "sce", "base_model": "org/base", "models": [{"model": "org/a"}], "dtype": None, **nothing}
    assert read_merge_file(config).targets == references("org/a")
    assert read_merge_file(
        {**config, "merge_method": "linear", "models": listed("org/a", weight=1), "base_model": None}
    )


def test_every_method_can_be_read() -> None:
    for method in method_names():
        config = {
            "merge_method": method,
            "base_model": "org/base",
            "models": [{"model": "org/base"}, {"model": "org/a"}],
            "parameters": {"t": 0.5} if method == "slerp" else {"weight": 1} if method not in ("sce", "varm") else {},
        }
        found = read_merge_file(config)
        values = found.values(Q, 2)
        assert all(value is not None for value in values.values())
        assert all(len(value) == len(found.targets) for value in values.values() if isinstance(value, list))


# -- warnings -----------------------------------------------------------------------------------------------------------


def test_what_the_method_does_not_read_is_told_once(tmp_path: Path, heard: list[str]) -> None:
    read(
        tmp_path,
        """\
models:
  - model: org/a
    parameters: {weight: 0.5, density: 0.9}
  - model: org/b
    parameters: {weight: 0.5, density: 0.9, select_topk: 0.3, epsilon: 0.1}
merge_method: sce
base_model: org/base
parameters: {int8_mask: true, smooth: false, filter_wise: false, lambda: 1.0, select_topk: 0.1}
""",
    )
    at = f"{tmp_path / 'merge.yaml'}:"
    assert heard == [
        f"{at}8: parameters.smooth: is not read by sce; ignored",
        f"{at}8: parameters.filter_wise: is not read by sce; ignored",
        f"{at}8: parameters.lambda: is not read by sce; ignored",
        f"{at}3: models.0.parameters.weight: is not read by sce; ignored",
        f"{at}3: models.0.parameters.density: is not read by sce; ignored",
        f"{at}5: models.1.parameters.select_topk: is one for all models, and not read here; ignored",
        f"{at}5: models.1.parameters.epsilon: is not read by sce; ignored",
    ]


def test_reading_touches_no_model(tmp_path: Path) -> None:
    """An empty directory is as good as any other."""
    for name in ("a", "base"):
        (tmp_path / name).mkdir()
    config = {"merge_method": "sce", "base_model": str(tmp_path / "base"), "models": [{"model": str(tmp_path / "a")}]}
    assert read_merge_file(config).targets == references(str(tmp_path / "a"))
