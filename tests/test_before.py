"""What a run says before any work, a line each and status 2: what its launch, its machine and its models could not do later."""

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import runs
from fusechat.align.back_off import BackOff
from fusechat.commands.chat import talk
from fusechat.commands.run import run
from fusechat.data.prepared import PreparedSet
from fusechat.errors import FuseChatError, ModelError
from fusechat.models.token_bytes import token_bytes
from fusechat.pipeline import build_steps, load_recipe, select_steps
from fusechat.plan import preflight as before
from test_bad_input import complaints, done
from test_bad_models import change_config, with_source

EXAMPLE = Path(__file__).parents[1] / "examples" / "fusechat-7b.yaml"
UNUSED = ["<|unused|>", "<|never written|>"]


def refused(recipe: Any, waiting: Sequence[Any]) -> tuple[str, ...]:
    try:
        before.check_settings(recipe, waiting)
    except FuseChatError as error:
        return error.messages
    return ()


def waiting(*stages: str) -> list[Any]:
    """Steps of the example, of these stages."""
    names = {"capture": ("pivot/data", "mixtral/data", "qwen/data"), "fuse": ("mixtral", "qwen")}
    return [SimpleNamespace(stage=stage, name=name) for stage in stages for name in names[stage]]


# -- the launch ---------------------------------------------------------------------------------------------------------


def test_the_example_is_two_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process as far as `--until align`, then under torchrun; each of them alone is refused, and names the other."""
    monkeypatch.setattr(before.checks, "is_installed", lambda package: True)
    recipe = load_recipe(EXAMPLE)
    header = EXAMPLE.read_text().partition("name:")[0]
    assert "fusechat run examples/fusechat-7b.yaml --until align" in header
    assert "torchrun --nproc-per-node 8 -m fusechat run examples/fusechat-7b.yaml" in header
    assert refused(recipe, waiting("capture")) == ()
    [alone] = refused(recipe, waiting("capture", "fuse"))
    assert alone.startswith(
        "fuse.training.fsdp: shards the model over the processes of torchrun, and there is only one: "
    )
    assert "--until align" in alone
    monkeypatch.setattr(before.ranks, "world", lambda: 8)
    monkeypatch.setattr(before.fuse, "check", lambda recipe, here: None)  # which would wait for the other seven
    assert refused(recipe, waiting("fuse")) == ()
    [together] = refused(recipe, waiting("capture", "fuse"))
    assert together.startswith("mixtral, qwen: capture.backend: vllm starts the processes for its GPUs itself: ")
    assert "fusechat run RECIPE --until align" in together


def test_fsdp_without_torchrun_is_refused_before_any_work(models: dict[str, Path], tmp_path: Path) -> None:
    recipe, work = runs.write_recipe(tmp_path, models), tmp_path / "work"
    sharded = ("--workdir", work, "--only", "mistral", "--set", "fuse.training.fsdp=true")
    [line] = complaints("run", recipe, *sharded)
    assert line.startswith("fuse.training.fsdp: ")
    assert done(work) == []
    assert runs.here("run", recipe, *sharded, "--until", "prepare").returncode == 0
    assert runs.here("plan", recipe, "--device", "8xh100", "--set", "fuse.training.fsdp=true").returncode == 0
    planned = runs.here("plan", recipe, "--device", "h100", "--set", "fuse.training.fsdp=true")
    assert (planned.returncode, planned.stderr.count("fuse.training.fsdp: ")) == (2, 1)


def test_a_plan_says_the_two_commands(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path, models)
    inside = ("--set", "sources.mistral.capture={backend: vllm}")
    shown = runs.here("plan", recipe, "--device", "4xh100", *inside)
    assert shown.returncode == 0
    assert "torchrun --nproc-per-node 4 -m fusechat run RECIPE" in " ".join(shown.stdout.split())


# -- the machine --------------------------------------------------------------------------------------------------------


def test_one_gpu_for_several_processes_and_one_that_vllm_does_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before.checks, "is_installed", lambda package: package != "vllm")
    monkeypatch.setattr(before, "choose_device", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    recipe = load_recipe(EXAMPLE, ["device='cuda:1'"])
    found = refused(recipe, waiting("capture"))
    assert [line for line in found if "needs as many devices" in line] == [
        "qwen: capture.tensor_parallel 4 needs as many devices; there are 3"
    ]
    assert sum("vllm is not installed" in line for line in found) == 2
    assert sum("whatever device: cuda:1 says" in line for line in found) == 2
    monkeypatch.setattr(before.ranks, "world", lambda: 2)
    assert any(line.startswith("device: cuda:1 is one GPU, and there are 2 ") for line in refused(recipe, []))


def test_a_device_that_is_not_there(models: dict[str, Path], tmp_path: Path) -> None:
    """Told with what else is wrong, and not only when the first model is loaded."""
    recipe = runs.write_recipe(tmp_path, models)
    options = ("--set", "device=cuda:99", "--set", "sources.mistral.capture={backend: vllm}", "--until", "capture")
    if before.checks.is_installed("vllm") or torch.cuda.device_count() > 99:
        pytest.skip("this machine has both")
    device, backend = complaints("run", recipe, "--workdir", tmp_path / "work", *options)
    assert device.startswith("device: 'cuda:99' is unavailable")
    assert backend.startswith("mistral: capture.backend: vllm is not installed (pip install 'fusechat[vllm]')")
    assert done(tmp_path / "work") == []


def test_adapters_that_do_not_fit_are_told_before_any_work(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path, models)
    options = ("--set", "fuse.lora={target_modules: [nothing_like_it]}")
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work", *options)
    assert line.startswith("fuse.lora: ")
    assert done(tmp_path / "work") == []


def test_a_model_that_is_none_for_text(models: dict[str, Path], tmp_path: Path) -> None:
    """With everything else that is wrong with models, together."""
    model = copy_of(models["mistral"], tmp_path / "model")
    change_config(model, model_type="t5", architectures=["T5ForConditionalGeneration"])
    recipe = with_source(tmp_path, models, str(model))
    lines = complaints("run", recipe, "--workdir", tmp_path / "work", "--set", f"pivot={models['gemma']}")
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "has no chat template; a recipe can give it one",
        "its configuration makes no causal language model",
    ]
    assert done(tmp_path / "work") == []


# -- tokens without an embedding ----------------------------------------------------------------------------------------


def copy_of(model: Path, directory: Path, *added: str) -> Path:
    """A copy of a model whose tokenizer has more tokens than the model has embeddings; the first is its padding."""
    copied = Path(shutil.copytree(model, directory))
    if added:
        tokenizer = AutoTokenizer.from_pretrained(copied)
        tokenizer.add_tokens(list(added))
        tokenizer.pad_token = added[0]
        tokenizer.save_pretrained(copied)
    return copied


def test_a_template_of_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    model = copy_of(models["llama"], tmp_path / "model")
    change_config(model, vocab_size=20)
    recipe = runs.write_recipe(tmp_path, models, pivot=str(model))
    [line] = complaints("run", recipe, "--workdir", tmp_path / "work")
    assert line.startswith("pivot: its chat template writes token ")
    assert line.endswith(", and its configuration 20 embeddings; model and tokenizer do not belong together")
    assert done(tmp_path / "work") == []


def test_a_token_of_the_data_without_an_embedding(models: dict[str, Path], tmp_path: Path) -> None:
    for who, kind in (("pivot", "llama"), ("teacher", "mistral")):
        place = tmp_path / who
        place.mkdir()
        model = copy_of(models[kind], place / "model", "größer")
        rows = load_file(models[kind] / "model.safetensors")["model.embed_tokens.weight"].shape[0]
        token = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("größer")
        if kind == "mistral":  # padded past its tokenizer: the new token has a row, until it has none
            assert token < rows, "which is why a plain comparison of sizes says nothing"
            change_config(model, vocab_size=token)
            rows = token
        recipe = with_source(place, models, str(model))
        if who == "pivot":
            sources = {"teacher": str(models["mistral"])}
            recipe = runs.write_recipe(place, models, pivot=str(model), sources=sources)
        [line] = complaints("run", recipe, "--workdir", place / "work")
        written = "▁größer" if kind == "mistral" else "größer"
        assert line == (
            f"{who} ({model}): {place / 'train.jsonl'}:1 has token {token} ({written}), and its configuration {rows} embeddings; "
            "model and tokenizer do not belong together"
        )
        assert not any(step.startswith("capture") for step in done(place / "work"))
        planned = runs.here("plan", recipe, "--device", "h100")
        assert planned.returncode == 2
        assert f"{who}: data has token {token} ({written}), and its configuration {rows} embeddings" in planned.stderr


def test_unused_tokens_without_an_embedding_change_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """The pivot's padding is one of them. Targets are those of the very model without them, bit for bit."""
    model = copy_of(models["llama"], tmp_path / "model", *UNUSED)
    assert AutoTokenizer.from_pretrained(model).pad_token_id == 400
    found = []
    for name, pivot in (("plain", models["llama"]), ("more", model)):
        place = tmp_path / name
        place.mkdir()
        recipe = load_recipe(runs.write_recipe(place, models, pivot=str(pivot)), ["fuse.training.max_steps=2"])
        run(recipe, place / "work", only="mistral")
        found.append(load_file(place / "work" / "fuse" / "mistral" / "model" / "model.safetensors"))
    assert runs.here("plan", tmp_path / "more" / "recipe.yaml", "--device", "h100").returncode == 0
    plain, more = found
    assert plain.keys() == more.keys()
    assert all(torch.equal(more[name], tensor) for name, tensor in plain.items())


def test_no_token_without_an_embedding_stands_for_another(models: dict[str, Path], tmp_path: Path) -> None:
    tokens = token_bytes(
        AutoTokenizer.from_pretrained(copy_of(models["llama"], tmp_path / "model", "<pad>", "zyzzyva"))
    )
    assert BackOff(tokens).lookup(b"zyzzyva") == (401, "same bytes")
    limited = BackOff(tokens, 400)
    for found, _ in (limited.lookup(b"zyzzyva"), *limited.nearest([b"zyzzyva", b"zyzzyvas"])):
        assert 0 <= found < 400


def test_a_question_with_a_token_without_an_embedding(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(models["llama"], tmp_path / "model", "zyzzyva")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is a zyzzyva a word?\n"))
    with pytest.raises(
        ModelError, match=r"the question has token 400 \(zyzzyva\), and its configuration 400 embeddings"
    ):
        talk(str(model), system=None, max_new_tokens=2, temperature=0.0, seed=0, device="cpu")


def test_more_tokens_than_a_model_is_made_for_are_told_by_a_run_too(
    models: dict[str, Path], tmp_path: Path, heard: list[str]
) -> None:
    model = copy_of(models["mistral"], tmp_path / "model")
    change_config(model, max_position_embeddings=100)
    recipe = load_recipe(with_source(tmp_path, models, str(model)))
    run(recipe, tmp_path / "work", until="prepare")
    lengths = PreparedSet(tmp_path / "work" / "prepare" / "teacher" / "data").lengths()
    many = int((lengths > 100).sum())
    assert 0 < many < len(lengths)
    assert [line for line in heard if "made for" in line] == [
        f"prepare teacher/data: {many} of {len(lengths)} conversations have more than the 100 tokens that the model is made for: "
        "set data.max_length to 100"
    ]


def test_only_waiting_steps_are_checked(models: dict[str, Path], tmp_path: Path) -> None:
    """A source that is done is not looked at again: its model may be gone from this machine by then."""
    recipe = load_recipe(runs.write_recipe(tmp_path, models))
    work = tmp_path / "work"
    fine_tuning = [step for step in select_steps(build_steps(recipe, work)) if step.stage in ("fuse", "merge")]
    asked: list[str] = []
    recipe_seen = recipe.model_copy()
    object.__setattr__(recipe_seen, "chat_model", lambda name: asked.append(name) or recipe.chat_model(name))
    before.check_models(recipe_seen, fine_tuning)
    assert set(asked) == {"pivot"}
