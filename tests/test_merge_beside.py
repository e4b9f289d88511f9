"""Files next to the weights: the same from the hub as from a directory, and none that is not read; models that are adapters."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

import hub
import runs
from checkpoints import INDEX, configuration, read, relative, write
from fusechat.errors import ModelError
from fusechat.merge import merge
from fusechat.models.companion_files import beside, to_fetch, weight_files

HALF = {"weight": 0.5}
AUTO_MAP = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
COPIED = {  # next to weights and config.json
    *(
        "LICENSE.md",
        "license.txt",
        "COPYING",
        "Notice",
        "USE_POLICY.md",
        "words.tiktoken",
        "tokenizer.model.v3",
        "tekken.json",
    ),
    *("source.spm", "target.spm", "vocab.bpe", "encoder.json", "bpe.codes", "spiece.model", "chat_template.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    *("additional_chat_templates/rag.jinja", "configuration_own.py", "modeling_own.py", "odd_words.dat"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}
LEFT = {
    *("consolidated.safetensors", "pytorch_model.bin", "tf_model.h5", "original/params.json", "onnx/model.onnx"),
    *("onnx/config.json", "runs/events.log", "picture.png", ".gitattributes", "weights.dat"),
}


@pytest.fixture
def pair(models: dict[str, Path], tmp_path: Path) -> list[Path]:
    """A base with files of all kinds, under the name of a repository, and a relative."""
    kept = read(models["llama"])
    base = write(tmp_path / "org" / "base", kept, models["llama"], shards=2, auto_map=AUTO_MAP)
    one = relative(base, tmp_path / "gpt2", 1)
    for name in {*COPIED, *LEFT, "README.md"}:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        if not (base / name).exists():
            (base / name).write_text(f"{name}\n")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../other"}]))
    (base / "modeling_own.py").write_text("FILES = {'words': 'odd_words.dat', 'weights': 'pytorch_model.bin'}\n")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return [base, one]


def names(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def test_a_merge_by_hub_ids_gives_the_directory_that_local_copies_give(pair: list[Path], tmp_path: Path) -> None:
    """One id has no owner. What is not read is not fetched, and what was fetched serves without the hub."""
    merge(configuration("task_arithmetic", pair, HALF), tmp_path / "local")
    config = configuration("task_arithmetic", [Path("org/base"), Path("gpt2")], HALF)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    with hub.serving(tmp_path) as (address, fetched):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        ended = runs.fusechat("merge", tmp_path / "merge.yaml", tmp_path / "out", **environment)
        assert ended.returncode == 0, ended.stderr
    environment["HF_HUB_OFFLINE"] = "1"
    offline = runs.fusechat("merge", tmp_path / "merge.yaml", tmp_path / "offline", **environment)
    assert offline.returncode == 0, offline.stderr
    environment["HF_HUB_OFFLINE"] = "0"  # and no hub is there any more
    gone = runs.fusechat("merge", tmp_path / "merge.yaml", tmp_path / "gone", **environment)
    assert gone.returncode == 0, gone.stderr
    for file in names(tmp_path / "local") - {"README.md", "merge_report.json"}:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "local" / file).read_bytes(), file
    own = {"config.json", "README.md", "merge_report.json", "model.safetensors"}
    assert names(tmp_path / "out") == names(tmp_path / "local") == COPIED | own
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert len(fetched) == len(set(fetched))
    asked = {file.removeprefix("org/base/") for file in fetched if file.startswith("org/base/")}
    assert {*COPIED, "config.json", "README.md", INDEX} < asked
    assert asked & LEFT == set()


def test_which_weights_of_a_repository_are_fetched(tmp_path: Path) -> None:
    one = "model.safetensors"
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    spare = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "README.md"]
    assert weight_files([one, *spare, "other.safetensors"], tmp_path) == [one]
    assert weight_files([*shards, *spare], tmp_path) == shards
    assert weight_files(spare, tmp_path) == ["consolidated.safetensors"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shards[0], "b": "../x.safetensors"}}))
    assert weight_files([*shards, one, *spare], tmp_path) == sorted([shards[0], one]), "both, as a directory has both"
    assert to_fetch(["1_Pooling/config.json", "x/y.json", "a.py", "b.bin", "b.txt"]) == ["a.py", "b.txt"]


def test_code_and_what_it_names_goes_with_a_configuration_that_asks_for_it(pair: list[Path]) -> None:
    base = pair[0]
    assert {str(file.relative_to(base)) for file in beside(base)} == COPIED
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "auto_map"}))
    without = {str(file.relative_to(base)) for file in beside(base)}
    assert without == COPIED - {"configuration_own.py", "modeling_own.py", "odd_words.dat"}


def test_weights_of_further_modules_are_copied_and_named(
    pair: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fusechat"), "propagate", True)
    base = pair[0]
    (base / "1_Pooling" / "model.safetensors").write_bytes(b"dense")
    merge(configuration("task_arithmetic", pair, HALF), tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "model.safetensors").read_bytes() == b"dense"
    what = f"1_Pooling/model.safetensors: is copied from {base} as it is, and not merged"
    assert what in caplog.messages


def test_adapters_are_called_so(pair: list[Path], tmp_path: Path) -> None:
    """Alone, with a configuration, and next to the model that they are for, where it is the model that is meant."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (adapter / "adapter_model.safetensors").write_bytes((pair[1] / "model.safetensors").read_bytes())
    expected = f"{adapter}: is an adapter to org/base (it has adapter_config.json); merge it into its model first"
    config: dict[str, Any] = configuration("task_arithmetic", [pair[0], adapter], HALF)
    for file in (None, "config.json"):
        if file:
            (adapter / file).write_bytes((pair[1] / file).read_bytes())
        with pytest.raises(ModelError) as raised:
            merge(config, tmp_path / "out")
        assert raised.value.messages == (expected,)
    (adapter / "own.safetensors").write_bytes((pair[1] / "model.safetensors").read_bytes())
    merge(config, tmp_path / "out")
