"""`fusechat plan` where something is wrong: a table if there is one to print, a line for each problem, exit status 2."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import runs
import tiny


@pytest.fixture
def recipe(models: dict[str, Path], tmp_path: Path) -> Path:
    return runs.write_recipe(tmp_path, models)


def refused(recipe: Path, *options: str | Path) -> tuple[str, str]:
    shown = runs.here("plan", recipe, "--device", "rtx3090", *options)
    assert shown.returncode == 2
    told = ("fusechat: error: ", "see docs/recipe.md#")
    assert all(line.startswith(told) for line in shown.stderr.splitlines()), shown.stderr
    return shown.stdout, shown.stderr


def changed_model(tmp_path: Path, source: Path, **config: Any) -> Path:
    """A copy of a model's configuration and tokenizer, with another configuration."""
    copied = shutil.copytree(source, tmp_path / "changed", ignore=shutil.ignore_patterns("*.safetensors"))
    found = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(found | config))
    return Path(copied)


def large_model(directory: Path, tokenizer: Path) -> Path:
    """The configuration of a model of 7B, 14 GB in bfloat16, with the tokenizer of a tiny one."""
    config = transformers.MistralConfig(vocab_size=32000, architectures=["MistralForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    for file in (*tokenizer.glob("*token*"), tokenizer / "chat_template.jinja"):
        shutil.copy(file, directory)
    return directory


def test_no_template_no_data_no_model_are_told_together(recipe: Path, models: dict[str, Path]) -> None:
    changed = yaml.safe_load(recipe.read_text())
    del changed["sources"]["gemma"]["chat_template"]
    changed["sources"]["mistral"] = str(recipe.parent)
    changed["data"]["validation"] = "broken.json"
    (recipe.parent / "broken.json").write_text("{")
    recipe.write_text(yaml.safe_dump(changed))
    out, err = refused(recipe)
    assert out == ""
    assert re.search(r"gemma \(.*\): has no chat template", err)
    assert f"{recipe.parent}: its configuration makes no causal language model" in err
    assert f"{recipe.parent / 'broken.json'}: not JSON" in err


def test_malformed_records_with_their_lines(recipe: Path) -> None:
    train = recipe.parent / "train.jsonl"
    train.write_text(train.read_text() + '{"messages": 3}\n' + train.read_text().splitlines()[0] + "\n")
    out, err = refused(recipe)
    assert f"{train}:11: neither" in err
    assert "1 conversations are there more than once" in out
    skipped = runs.here("plan", recipe, "--device", "h100", "--set", "data.on_error=skip")
    assert skipped.returncode == 0
    assert f"{train}: 1 malformed records are left out" in skipped.stdout


def test_responses_that_cannot_be_found(recipe: Path) -> None:
    upper = "{% for m in messages %}{{ m.role + (m.content if loop.length == 2 else m.content | upper) }}{% endfor %}"
    messages = [{"role": role, "content": f"Say {role}."} for role in ("user", "assistant") * 2]
    for name in ("own.jsonl", "own-held-out.jsonl"):
        (recipe.parent / name).write_text(json.dumps({"messages": messages}) + "\n")
    _, err = refused(recipe, "--set", f"sources.gemma.chat_template={json.dumps(upper)}")
    assert "gemma: no conversation of gemma can be used: the template rewrites a message" in err
    _, err = refused(recipe, "--set", "data.max_length=9")
    assert "mistral: no conversation of data can be used: its first response ends after max_length (9 tokens)" in err


def test_some_left_out_and_some_too_long_are_notes(recipe: Path, models: dict[str, Path]) -> None:
    short = changed_model(recipe.parent, models["llama"], max_position_embeddings=60)
    changes = (f"pivot={short}", "data.max_length=80", "data.max_rejected=1")
    shown = runs.here("plan", recipe, "--device", "h100", *(word for change in changes for word in ("--set", change)))
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"pivot: .*% of the conversations of gemma are left out: its first response ends", shown.stdout)
    assert re.search(r"pivot: is made for 60 tokens, and .*% of the conversations of data have more", shown.stdout)


def test_a_pivot_that_cannot_be_trained(recipe: Path, models: dict[str, Path]) -> None:
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    changed = changed_model(recipe.parent, models["llama"], quantization_config=quantisation)
    assert "its weights are quantised (bitsandbytes)" in refused(recipe, "--set", f"pivot={changed}")[1]


def test_a_tokenizer_of_another_model(recipe: Path, models: dict[str, Path]) -> None:
    changed = changed_model(recipe.parent, models["llama"], vocab_size=20)
    assert "embeddings; model and tokenizer do not belong together" in refused(recipe, "--set", f"pivot={changed}")[1]


def test_too_little_memory_and_what_to_do(recipe: Path, tmp_path: Path) -> None:
    """A pivot of 7B takes 116 GB to train by itself, and its capture fits."""
    large = tmp_path / "large"
    config = transformers.MistralConfig(vocab_size=32000, architectures=["MistralForCausalLM"], dtype="bfloat16")
    config.save_pretrained(large)
    for file in Path(yaml.safe_load(recipe.read_text())["pivot"]).glob("*token*"):
        shutil.copy(file, large)
    template = json.dumps(tiny.CHATML)
    options = ("--set", f"pivot={large}", "--set", f"pivot.chat_template={template}")
    _, err = refused(recipe, *options, "--set", "capture.dtype=bfloat16", "--set", "evaluate.dtype=bfloat16")
    assert re.search(
        r"fuse mistral: takes 1\d\d GB on a rtx3090 of 24 GB: set fuse.training.activation_checkpointing", err
    )
    assert "capture pivot" not in err


def test_a_source_that_is_spread(recipe: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    """Of 7B parameters in float32, 29 GB, on GPUs of 24 GB: not on one, spread over two, and on one with a part elsewhere."""
    large = large_model(tmp_path / "large", models["mistral"])
    options = ("--set", f"sources.mistral={large}", "--set", "evaluate.bits_per_byte=false")
    auto = ("--set", "sources.mistral.capture.device_map=auto")
    shown = runs.here("plan", recipe, "--device", "2xrtx3090", *options)
    assert re.search(r"capture mistral/data: takes [23]\d.* GB on a rtx3090 of 24 GB: spread it", shown.stderr)
    assert runs.here("plan", recipe, "--device", "2xrtx3090", *options, *auto).returncode == 0
    shown = runs.here("plan", recipe, "--device", "rtx3090", *options, *auto)
    assert shown.returncode == 0, shown.stderr
    assert "capture.device_map keeps some of it elsewhere" in shown.stdout


def test_too_little_disk(recipe: Path) -> None:
    """Of so many conversations no disk has room for the distributions."""
    shown = runs.here("plan", recipe, "--device", "h100", "--conversations", str(10**12), "--by-stage")
    assert shown.returncode == 0  # the device is elsewhere, and so is its disk
    assert re.search(r"note: runs/tiny: takes .* at its fullest, and .* are free there", shown.stdout)
    shown = runs.here("plan", recipe, "--device", "cpu", "--conversations", str(10**12), "--by-stage")
    assert shown.returncode == 2
    assert re.search(r"runs/tiny: takes .* are free there; free some, or choose another --workdir", shown.stderr)


def test_more_devices_than_there_are(recipe: Path) -> None:
    options = ("--set", "sources.mistral.capture={backend: vllm, tensor_parallel: 4}")
    assert "mistral: capture.tensor_parallel 4 needs as many devices; there are 1" in refused(recipe, *options)[1]
    assert runs.here("plan", recipe, "--device", "4xh100", *options).returncode == 0


def test_a_source_that_a_server_runs_needs_no_memory_here(
    recipe: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    large = large_model(tmp_path / "large", models["mistral"])
    options = ("--set", f"sources.mistral={large}", "--set", "evaluate.bits_per_byte=false")
    assert "capture mistral/data: takes" in refused(recipe, *options)[1]
    served = ("--set", "sources.mistral.capture={backend: vllm, url: http://localhost:8000/v1}")
    assert runs.here("plan", recipe, "--device", "rtx3090", *options, *served).returncode == 0


def test_devices_that_do_not_exist(recipe: Path) -> None:
    for name in ("abacus", "0xh100", "8x", ""):
        shown = runs.here("plan", recipe, "--device", name)
        assert shown.returncode == 2
        assert shown.stderr.startswith(f"fusechat: error: --device {name}: ")


def test_arguments_that_transformers_refuses(recipe: Path) -> None:
    _, err = refused(recipe, "--set", "fuse.training.optim=abacus")
    assert "fuse.training: " in err
    assert "abacus" in err
    changed = yaml.safe_load(recipe.read_text())
    del changed["data"]["validation"]
    recipe.write_text(yaml.safe_dump(changed))
    _, err = refused(recipe, "--set", "fuse.training.eval_strategy=epoch")
    assert "fuse.training.eval_strategy: target mistral has no held-out conversations" in err
