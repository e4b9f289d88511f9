"""What a merged directory holds next to its values: files, configuration, card, shards; what is said on the way."""

import datetime
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoints
import runs
import tiny
from checkpoints import INDEX, configuration, read, relative, write
from forks import Command
from fusechat.merge import merge
from test_bad_input import complaints

HALF = {"weight": 0.5}


@pytest.fixture
def pair(models: dict[str, Path], tmp_path: Path) -> list[Path]:
    """A base with files of all kinds, and a relative."""
    base = write(tmp_path / "base", read(models["llama"]), models["llama"])
    return [base, relative(base, tmp_path / "one", 1)]


def ta(models: list[Path], **keys: Any) -> dict[str, Any]:
    return configuration("task_arithmetic", models, HALF, **keys)


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("kind", [*tiny.KINDS, *checkpoints.FURTHER])
def test_transformers_loads_it_and_generates(
    models: dict[str, Path], tokenizers: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    base = models.get(kind) or checkpoints.build_further(kind, tmp_path / "first", tokenizers["llama"])
    merge(ta([base, relative(base, tmp_path / "one", 1)]), tmp_path / "out", shard_bytes=20_000)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("What is the capital of France?", return_tensors="pt")
    assert (
        model.generate(prompt["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    )
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    for (name, mine), theirs in zip(model.state_dict().items(), half.state_dict().values(), strict=True):
        moved = theirs.shape and not torch.equal(mine, theirs)
        assert moved or not mine.is_floating_point(), name


# -- files --------------------------------------------------------------------------------------------------------------

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MORE = {
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "vocab.json": b"{}",
    "vocab.txt": b"a\n",
    "merges.txt": b"a b\n",
    "tokenizer.model": bytes(range(256)),
    "LICENSE": b"mine\n",
    "NOTICE.txt": b"ours\n",
    "preprocessor_config.json": b"{}",
    "additional_chat_templates/rag.jinja": b"{{ messages }}",
}
LEFT = (
    "pytorch_model.bin",
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "modeling_own.py",
    ".gitattributes",
)


def test_files_of_the_base_are_copied_byte_for_byte(pair: list[Path], tmp_path: Path) -> None:
    base, one = pair
    for name, data in MORE.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(data)
    for name in LEFT:
        (base / name).write_bytes(b"not the model's")
    for path in one.iterdir():
        if path.suffix in (".jinja", ".json") and path.name != "config.json":
            path.write_text("{}")
    merge(ta(pair), tmp_path / "out")
    for name in (*COPIED, *MORE):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    own = {"config.json", "README.md", "merge_report.json", "model.safetensors"}
    assert {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()} == {
        *COPIED,
        *MORE,
        *own,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"base", "one", "out"}, "nothing next to it"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_copied_where_a_configuration_names_it(pair: list[Path], tmp_path: Path, file: str) -> None:
    base = pair[0]
    config = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}))
    (base / "own.py").write_text("raise SystemExit('code was run')")
    merge(ta(pair), tmp_path / "out")
    assert (tmp_path / "out" / "own.py").read_bytes() == (base / "own.py").read_bytes()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": None, "torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": None}, {"dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "hidden_size": 32}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 32}},
        ),
    ],
)
def test_the_configuration_is_the_bases_with_the_type_that_the_weights_have(
    pair: list[Path], tmp_path: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    base = write(tmp_path / "own", read(pair[0]), pair[0], **given)
    merge(ta([base, pair[1]], dtype="bfloat16"), tmp_path / "out")
    before = {key: value for key, value in config_of(base).items() if key not in given}
    assert config_of(tmp_path / "out") == before | expected


def test_the_card(pair: list[Path], tmp_path: Path) -> None:
    """Its header is the base's where that speaks of the licence; paths of this machine are not published."""
    (pair[0] / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [x]\nmodel-index: []\n---\n# B\n"
    )
    report = merge(configuration("sce", pair, {"select_topk": 0.5}), tmp_path / "Fused-7B")
    card = (tmp_path / "Fused-7B" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "tags": ["merge", "fusechat"],
        "base_model": ["base", "one"],
    }
    for line in ("# Fused-7B", "- Base: `base`", "- Merged: `one`", "| one | 1.0000 |", "  select_topk: 0.5"):
        assert line in card.splitlines()
    assert yaml.safe_load(card.split("```yaml\n")[1].removesuffix("```\n"))["models"] == [
        {"model": "one", "parameters": {}}
    ]
    assert str(tmp_path) not in card
    assert str(tmp_path) not in json.dumps(report)
    merge(configuration("sce", pair, name="A name"), tmp_path / "named")
    assert "\n# A name\n" in (tmp_path / "named" / "README.md").read_text()


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "---\nno end", "---\n- a\n---\n", "\xff"])
def test_a_base_whose_card_cannot_be_read(pair: list[Path], tmp_path: Path, text: str) -> None:
    (pair[0] / "README.md").write_bytes(text.encode("latin-1"))
    merge(ta(pair), tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1]).keys() == {
        "library_name",
        "tags",
        "base_model",
    }


# -- shards -------------------------------------------------------------------------------------------------------------


def test_sharded_or_in_one_file_it_is_the_same_model(pair: list[Path], tmp_path: Path) -> None:
    """Inputs in shards, the output in shards: the same bytes of every tensor; the index fits."""
    base, one = pair
    merge(ta(pair), tmp_path / "out")
    whole = read(tmp_path / "out")
    parts = [write(tmp_path / "parts" / path.name, read(path), path, shards=n) for path, n in ((base, 3), (one, 5))]
    limit = 12_000
    merge(ta(parts), tmp_path / "sharded", shard_bytes=limit)
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in whole.values())}
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert files == sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        with safe_open(tmp_path / "sharded" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
        assert {name for name, where in index["weight_map"].items() if where == file} == tensors.keys()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    merge(ta(parts), tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "again" / INDEX).exists()


def test_the_file_that_transformers_reads_is_the_model(pair: list[Path], tmp_path: Path) -> None:
    """Some models have their weights a second time, under other names."""
    merge(ta(pair), tmp_path / "out")
    for path in pair:
        (path / "consolidated.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    merge(ta(pair), tmp_path / "again")
    assert runs.digests(tmp_path / "again")["model.safetensors"] == runs.digests(tmp_path / "out")["model.safetensors"]


def test_models_of_more_files_than_a_process_may_open(pair: list[Path], tmp_path: Path) -> None:
    models = [write(tmp_path / "parts" / path.name, read(path), path, shards=20) for path in pair]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(ta(models)))
    few = {resource.RLIMIT_NOFILE: 30}
    ended = Command("merge", tmp_path / "merge.yaml", tmp_path / "out", limits=few).ended()
    assert ended.returncode == 0, ended.stderr


# -- what is said -------------------------------------------------------------------------------------------------------


def test_the_summary_as_json(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(ta(pair)))
    out = tmp_path / "[bold]out"
    arguments = ("merge", tmp_path / "merge.yaml", out, "--json", "--shard-size", "0.00002")
    ended = runs.here(*arguments)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    size = sum(tensor.nbytes for tensor in read(pair[0]).values())
    assert found.pop("seconds") > 0
    assert found == {
        "out": str(out),
        "method": "task_arithmetic",
        "tensors": 20,
        "merged": 20,
        "bytes_read": 2 * size,
        "bytes_written": size,
        "mean_coefficients": {"one": 0.5},
    }
    assert len(list(out.glob("*.safetensors"))) > 3
    again = runs.here(*arguments)
    assert json.loads(again.stdout) == found | {"seconds": None}
    assert again.stderr == f"{out}: is there already, merged by the same configuration from the same models\n"
    assert f"merged model: {out}\n" in runs.here(*(item for item in arguments if item != "--json")).stdout


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_a_size_of_shards_that_is_none(pair: list[Path], tmp_path: Path, size: str) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(ta(pair)))
    expected = f"--shard-size {float(size)}: should be a number of GB, more than 0"
    assert complaints("merge", tmp_path / "merge.yaml", tmp_path / "out", "--shard-size", size) == [expected]


def test_a_progress_bar_in_bytes(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(ta(pair)))
    shown = runs.on_a_terminal(160, "merge", tmp_path / "merge.yaml", tmp_path / "out")
    size = sum(tensor.nbytes for tensor in read(pair[0]).values()) / 1e3
    assert "merge (task_arithmetic)" in shown
    assert f"{size:.1f}/{size:.1f} kB" in shown


def test_settings_that_python_has_and_yaml_has_not(pair: list[Path], tmp_path: Path) -> None:
    """Numbers of NumPy, dates and infinities where nothing reads them."""
    parameters = {"weight": np.float32(0.5), "int8_mask": datetime.date(2026, 1, 2), "filter_wise": float("nan")}
    merge(configuration("task_arithmetic", pair, parameters), tmp_path / "out")
    merge(configuration("task_arithmetic", pair, parameters), tmp_path / "out")
    merge(ta(pair), tmp_path / "plain")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    assert "weight: 0.5\n" in (tmp_path / "out" / "README.md").read_text()
