"""Models spread by Accelerate over devices, memory and disk: what is captured and measured is bit for bit what it is without."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import MixtralConfig, MixtralForCausalLM

import runs
import tiny
from fusechat.capture.local import Local
from fusechat.commands.run import run
from fusechat.data.prepared import PreparedSet
from fusechat.models.forward import collate, device_of, response_logits
from fusechat.models.load import load_model
from fusechat.pipeline import build_steps, load_recipe

CPU = torch.device("cpu")
# Weights that stay on disk are read, layer by layer, whenever they are needed. Embedding and head of llama and gemma are one.
DISK: dict[str, int | str] = {"": "disk"}
PARTS: dict[str, int | str] = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
ONE: dict[str, int | str] = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}


@pytest.fixture(scope="module")
def kinds(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models and a mixture of experts, whose weights Transformers keeps in another form than the file."""
    directory = tmp_path_factory.mktemp("mixtral")
    tokenizer = tiny.tokenizer_of("mistral")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, initializer_range=0.3, **shape
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {**models, "mixtral": directory}


@pytest.fixture(scope="module")
def plain(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe and `plain`, what it gave with every model whole on one device."""
    directory = tmp_path_factory.mktemp("spread")
    training = {**runs.TRAINING, "num_train_epochs": 1, "save_strategy": "no"}
    sources = {name: str(kinds[name]) for name in ("mistral", "mixtral")}
    sources["gemma"] = {"model": str(kinds["gemma"]), "chat_template": tiny.TEMPLATE}  # type: ignore[assignment]
    path = runs.write_recipe(directory, kinds, sources=sources, fuse={"training": training})
    run(load_recipe(path), directory / "plain")
    return directory


@pytest.fixture(scope="module")
def conversations(plain: Path) -> dict[str, PreparedSet]:
    who = {"llama": "pivot", "mistral": "mistral", "gemma": "gemma", "mixtral": "mixtral"}
    return {kind: PreparedSet(plain / "plain" / "prepare" / name / "data") for kind, name in who.items()}


def test_a_run_with_spread_models_gives_the_bytes_of_one_without(plain: Path) -> None:
    changes = [
        f"capture.device_map={json.dumps(PARTS)}",
        "sources.mistral.capture.device_map=auto",
        f"sources.mixtral.capture.device_map={json.dumps(DISK)}",
    ]
    recipe = load_recipe(plain / "recipe.yaml", changes)
    work = plain / "work"
    run(recipe, work)
    own = {
        name: digest
        for name, digest in runs.digests(plain / "plain").items()
        if not name.endswith(("manifest.json", "recipe.yaml", "index.html", "README.md"))  # which show the recipe
    }
    assert {name for name in own if name.startswith("capture")} >= {"capture/pivot/data/store.json"}
    assert own == {name: digest for name, digest in runs.digests(work).items() if name in own}
    assert not list(work.rglob("*.partial"))


def test_nothing_is_captured_again_because_it_would_be_elsewhere(plain: Path) -> None:
    recipe = load_recipe(
        plain / "recipe.yaml", ["capture.device_map=auto", "sources.gemma.capture.device_map=balanced"]
    )
    steps = build_steps(recipe, plain / "plain")
    assert [step.label for step in steps if step.state()[0] != "done"] == ["report"], "it shows the recipe"


@pytest.mark.parametrize("kind", [*tiny.KINDS, "mixtral"])
@pytest.mark.parametrize("device_map", [DISK, PARTS, ONE], ids=["all", "parts", "one layer"])
def test_logits_of_a_spread_model(
    kinds: dict[str, Path],
    conversations: dict[str, PreparedSet],
    tmp_path: Path,
    kind: str,
    device_map: dict[str, int | str],
) -> None:
    batch = collate(list(conversations[kind])[:4])
    whole = load_model(kinds[kind], dtype="bfloat16", device=CPU)
    spread = load_model(kinds[kind], dtype="bfloat16", device=CPU, device_map=device_map, offload=tmp_path)
    assert next(spread.model.layers[1].parameters()).is_meta, "it is not in memory"
    assert any(file.name.endswith(".safetensors") for file in tmp_path.iterdir()) == (kind == "mixtral")
    assert device_of(spread) == CPU
    seen: list[tuple[int, ...]] = []
    head = spread.get_output_embeddings()
    head.register_forward_hook(lambda module, arguments, output: seen.append(tuple(output.shape)))
    with torch.inference_mode():
        logits = response_logits(spread, batch)
        assert torch.equal(logits, response_logits(whole, batch))
    assert seen == [(1, len(batch.rows), logits.shape[1])], "the head runs for response rows alone"
    assert next(spread.model.layers[1].parameters()).is_meta


def test_a_batch_that_does_not_fit_in_the_middle_of_a_spread_model(
    kinds: dict[str, Path], conversations: dict[str, PreparedSet], tmp_path: Path, heard: list[str]
) -> None:
    """The second layer has room for 300 tokens: its weights are there when it fails."""
    everything = list(conversations["mixtral"])
    longest = max(len(one.input_ids) for one in everything)
    whole = Local(load_model(kinds["mixtral"], dtype="float32", device=CPU), k=4, batch_tokens=250, name="")
    model = load_model(kinds["mixtral"], dtype="float32", device=CPU, device_map=PARTS, offload=tmp_path)

    def narrow(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[0] * arguments[0].shape[1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.layers[1].mlp.register_forward_pre_hook(narrow)
    backend = Local(model, k=4, batch_tokens=1000, name="mixtral (here)")
    found = backend.capture(everything, lambda number: None)
    assert longest < 250
    assert backend.batch_tokens == 250
    assert len(heard) == 2
    for one, other in zip(found, whole.capture(everything, lambda number: None), strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


@pytest.mark.parametrize(
    ("device_map", "line"),
    [
        (
            "everywhere",
            "recipe.yaml:17: capture.device_map: should be auto, balanced, balanced_low_0, sequential, or a device",
        ),
        ('{"model": "disk"}', "the model cannot be loaded: The device_map provided does not give any device for"),
        ('{"": "cuda:7"}', "the model cannot be loaded: "),
    ],
)
def test_a_map_that_does_not_suit_is_named(plain: Path, tmp_path: Path, device_map: str, line: str) -> None:
    done = runs.here(
        *("run", plain / "recipe.yaml", "--workdir", tmp_path / "work", "--until", "capture", "--only", "mistral"),
        *("--set", f"capture.device_map={device_map}"),
    )
    assert done.returncode == 2
    assert line in done.stderr, done.stderr


def test_a_recipe_keeps_its_map(plain: Path, tmp_path: Path) -> None:
    recipe = load_recipe(plain / "recipe.yaml", [f"capture.device_map={json.dumps({**PARTS, 'lm_head': 0})}"])
    assert recipe.capture_for("mistral").device_map == {**PARTS, "lm_head": 0}
    saved = yaml.safe_load((plain / "work" / "recipe.yaml").read_text())
    assert saved["sources"]["mistral"]["capture"] == {"device_map": "auto"}
