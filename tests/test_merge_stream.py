"""Merging whole models: several shards, a merge that was killed between them, models that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from fusechat.errors import ModelError
from fusechat.merge import stream
from fusechat.merge.methods import linear


@pytest.fixture
def targets(models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Two models of the llama pivot's shape with other weights."""
    return {name: tiny.build("llama", tmp_path / name, seed=seed) for name, seed in (("one", 1), ("two", 2))}


def merged(pivot: Path, targets: dict[str, Path], output: Path) -> dict[str, Any]:
    output.mkdir(exist_ok=True)
    return stream.merge_models(pivot, targets, output, method=linear, dtype=None, advance=lambda amount: None)


def test_many_shards_are_the_same_model_as_one_file(
    models: dict[str, Path], targets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = merged(models["llama"], targets, tmp_path / "whole")
    monkeypatch.setattr(stream, "SHARD_BYTES", 20_000)
    assert merged(models["llama"], targets, tmp_path / "parts") == report
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum((tmp_path / "parts" / file).stat().st_size for file in files)
    one, two = (load_file(directory / "model.safetensors") for directory in targets.values())
    (tmp_path / "parts" / "config.json").write_bytes((models["llama"] / "config.json").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == one.keys() == index["weight_map"].keys()
    for name, tensor in whole.items():
        assert torch.allclose(tensor, (one[name].double() + two[name].double()).float() / 2, atol=1e-6), name
        assert torch.equal(loaded[name], tensor), name


def test_shards_of_a_killed_merge_are_kept(
    models: dict[str, Path], targets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SHARD_BYTES", 20_000)
    report = merged(models["llama"], targets, tmp_path / "whole")
    write, written = stream.save_file, []

    def dying(tensors: Any, path: str, **options: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(tensors, path, **options)

    monkeypatch.setattr(stream, "save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        merged(models["llama"], targets, tmp_path / "again")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "again").glob("*.safetensors")}
    assert len(kept) == 2
    monkeypatch.setattr(stream, "save_file", write)
    assert merged(models["llama"], targets, tmp_path / "again") == report
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items()), "they are not written again"
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in (tmp_path / "again").iterdir()} == names
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), r"norm.weight: is \[32\] in the pivot and \[5\] in target two"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight: holds values that are not finite in two"),
        (lambda t: t.pop("model.norm.weight"), "targets one and two do not have the same tensors: model.norm.weight"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_named(
    models: dict[str, Path], targets: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    file = targets["two"] / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        merged(models["llama"], targets, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_index_may_not_point_outside_its_directory(
    models: dict[str, Path], targets: dict[str, Path], tmp_path: Path
) -> None:
    index = {"weight_map": {"model.norm.weight": "../one/model.safetensors"}}
    (targets["two"] / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no file in that directory"):
        merged(models["llama"], targets, tmp_path / "out")
